"""The last weights of a network under their full covariance: exact in a linear model, and what rounds make of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ockham
from ockham.choose.rules import Rule
from ockham.core.batch import Batch
from ockham.core.likelihood import Regression
from ockham.core.objective import Objective
from ockham.errors import DataError, OckhamError
from ockham.methods.laplace.curvature import Score
from ockham.methods.laplace.posterior import living_curvature, with_marginals

NOISE = 0.25


def table(n: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Six inputs, the second nearly a copy of the first."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=g)
    x[:, 1] = x[:, 0] + 0.05 * torch.randn(n, generator=g)
    y = x[:, :1] + x[:, 1:2] - 2 * x[:, 3:4] + NOISE**0.5 * torch.randn(n, 1, generator=g)
    return x, y


def diagonal(net: nn.Module, keep: torch.Tensor, n: int, temperature: float = 1.0) -> ockham.Posterior:
    """Some posterior over a linear layer with a prior precision of 2."""
    moments = {}
    for name, p in net.named_parameters():
        stays = keep if name == "weight" else torch.ones_like(p, dtype=torch.bool)
        precision = torch.full_like(p, 100.0).masked_fill(~stays, torch.inf)
        mean = p.detach() * stays
        moments[name] = ockham.Gaussian(mean, precision, torch.tensor(2.0), torch.tensor(0.0), stays)
    return ockham.Posterior(moments, float(n), temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_marginals_of_a_linear_model_are_those_of_its_exact_posterior(temperature):
    x, y = table()
    net = nn.Linear(6, 1)
    keep = torch.tensor([[True, True, False, True, True, False]])
    with torch.no_grad():
        net.weight.mul_(keep)
    posterior = diagonal(net, keep, 600, temperature)  # the pass sees half of the data
    batches = [Batch((x[:100],), {}, y[:100]), Batch((x[100:],), {}, y[100:])]
    score = Score(Objective(Regression(NOISE**0.5)))
    found, terms = living_curvature(net, posterior, batches, score, torch.Generator().manual_seed(0))
    assert terms == 300 and found.shape == (5, 5)
    design = torch.cat([x[:, keep[0]], torch.ones(300, 1)], 1).double()
    torch.testing.assert_close(found * NOISE, design.T @ design, rtol=1e-5, atol=1e-3)
    seen = with_marginals(posterior, found, terms)
    covariance = torch.linalg.inv(2 * design.T @ design / (NOISE * temperature) + 2 * torch.eye(5, dtype=torch.float64))
    want = 1 / covariance.diagonal()
    torch.testing.assert_close(seen["weight"].marginal_precision[keep].double(), want[:4], rtol=1e-4, atol=0)
    torch.testing.assert_close(seen["bias"].marginal_precision.double(), want[4:], rtol=1e-4, atol=0)
    assert bool((seen["weight"].marginal_precision[~keep] == torch.inf).all())
    assert torch.equal(seen["weight"].precision, posterior["weight"].precision)
    with pytest.raises(DataError, match="no batches"):
        living_curvature(net, posterior, [], score, torch.Generator())


@dataclass
class Recorder(Rule):
    """Keeps everything, remembers what it saw."""

    seen: list = field(default_factory=list)

    def decide(self, evidence, protected=(), progress=1.0):
        self.seen.append(evidence)
        keep = {n: g.keep.clone() for n, g in evidence.posterior.items()}
        if len(self.seen) == 1:
            keep["weight"][:, 2] = False
        return keep


def job_of(**options):
    x, y = table()
    loader = DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True)
    net = nn.Linear(6, 1)
    rule = Recorder()
    training = ockham.Training(epochs=30, learning_rate=0.05, prior=ockham.FixedPrior(1.0))
    job = ockham.Compression(net, loader, likelihood=Regression(NOISE**0.5), training=training, rule=rule,
                             rounds=ockham.Rounds(start=0.9, end=1.0, count=3), **options)  # fmt: skip
    list(job)
    return rule.seen


def test_rounds_see_that_one_of_two_copies_may_go():
    torch.manual_seed(0)
    alone = job_of()[-1]["weight"]
    together = job_of(correlated=ockham.Correlated(weights=100))[-1]["weight"]
    # columns 0 and 1 are copies: each is needed given the other's mean, neither on its own; column 3 is needed anyway
    assert float(alone[:2].max()) < -20 < -10 < float(together[:2].max())
    assert float(together[2]) < -100 and float(alone[2]) < -100


def test_many_weights_are_seen_one_by_one():
    first, second, _ = job_of(correlated=ockham.Correlated(weights=6))
    assert first.posterior["weight"].marginal_precision is None  # seven weights live
    assert second.posterior["weight"].marginal_precision is not None  # six
    with pytest.raises(OckhamError, match="at least 1"):
        ockham.Correlated(weights=0)


@pytest.mark.filterwarnings("ignore::ockham.errors.OckhamWarning")
def test_convolutions_and_batch_norm_are_seen_too_and_go_on_training():
    torch.manual_seed(0)
    x, y = torch.randn(96, 1, 6, 6), torch.arange(96) % 3
    x[torch.arange(96), 0, 2 * y] += 2.0
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    job = ockham.Compression(net, loader, training=ockham.Training(epochs=6, learning_rate=2e-2),
                             rounds=ockham.Rounds(start=0.5, end=1.0, count=3), rule=ockham.BudgetRule(60, gradual=3),
                             correlated=ockham.Correlated(examples=50))  # fmt: skip
    before = torch.random.get_rng_state()
    for _ in job:
        assert job.network.training
    assert torch.equal(torch.random.get_rng_state(), before)  # global randomness is not touched
    found = job.result()
    assert sum(int(k.sum()) for k in found.keep.values()) == 60
    assert (found.predict(x).probabilities.argmax(1) == y).float().mean() > 0.8
