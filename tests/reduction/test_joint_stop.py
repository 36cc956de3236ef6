"""The joint evidence stop of the one-shot path, against a conjugate model whose evidence is known for every subset."""

from __future__ import annotations

import pytest
import torch

from ockham.choose import correlated
from ockham.choose.correlated import joint_delta_f, removed_in_rounds
from ockham.choose.rules import score
from ockham.core.posterior import Gaussian, Posterior, WeightMatrix
from ockham.evidence.kronecker import conditional_precision, factorised, marginal_variance

NOISE, PRIOR = 0.5, 0.4


class Model:
    """Bayesian linear regression on inputs of which many say nearly the same; one output, so the factors are exact."""

    def __init__(self, copies=5, hidden=3, rho=0.15):
        g = torch.Generator().manual_seed(2)
        latent = torch.randn(40, hidden, generator=g, dtype=torch.float64)
        x = latent.repeat(1, copies) + rho * torch.randn(40, hidden * copies, generator=g, dtype=torch.float64)
        self.x, self.y = x, latent @ torch.tensor([1.0, -0.7, 0.5], dtype=torch.float64)
        self.y = self.y + NOISE**0.5 * torch.randn(40, generator=g, dtype=torch.float64)
        k = factorised((x.T @ x)[None], torch.eye(1, dtype=torch.float64)[None] / NOISE, PRIOR)
        exact = x.T @ x / NOISE + PRIOR * torch.eye(x.shape[1], dtype=torch.float64)
        mean = torch.linalg.solve(exact, x.T @ self.y / NOISE)[None]
        prior, zero = torch.tensor(PRIOR, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        moments = Gaussian(
            mean, conditional_precision(k)[0], prior, zero, torch.ones_like(mean).bool(), 1 / marginal_variance(k)[0]
        )
        self.posterior = Posterior({"w": moments}, 40.0, matrices=(WeightMatrix("w", None, k),))

    def log_evidence(self, keep):
        """ln p(y) of the columns that stay, as a density of the data: no posterior, no Savage-Dickey."""
        x = self.x[:, keep.reshape(-1)]
        covariance = NOISE * torch.eye(40, dtype=torch.float64) + x @ x.T / PRIOR
        return float(
            torch.distributions.MultivariateNormal(torch.zeros(40, dtype=torch.float64), covariance).log_prob(self.y)
        )


@pytest.fixture(scope="module")
def model():
    return Model()


@pytest.mark.parametrize("gone", [[0], [0, 3], [1, 4, 7, 10], list(range(12)), list(range(15))])
def test_joint_delta_f_is_the_difference_of_two_evidences(model, gone):
    keep = torch.ones(1, 15, dtype=torch.bool)
    keep[0, gone] = False
    want = model.log_evidence(keep) - model.log_evidence(torch.ones_like(keep))
    assert joint_delta_f(model.posterior, {"w": keep}) == pytest.approx(want, abs=1e-3)
    if len(gone) == 15:  # every copy: each may go alone, together they are all there is
        assert want < score(model.posterior).gain({"w": keep}) - 5


def stages(model, rounds):
    """Keep masks of every round when nothing but single scores ends it."""
    found, current = [model.posterior["w"].keep], model.posterior
    for _ in range(4 * rounds):
        smaller = correlated._round_of_evidence(current, (), 1 / rounds)
        if smaller is None:
            break
        found.append(smaller["w"].keep)
        current = smaller
    return found


def test_removal_ends_at_the_summit_of_the_evidence_and_not_where_single_scores_end(model):
    path = stages(model, 8)
    heights = [model.log_evidence(keep) for keep in path]
    summit = next(i for i in range(len(heights)) if i + 1 == len(heights) or heights[i + 1] < heights[i])
    assert summit + 1 < len(path) and heights[-1] < heights[summit] - 1  # single scores go on, far down the other side
    left = removed_in_rounds(model.posterior, None)["w"].keep
    assert torch.equal(left, path[summit])


def test_the_joint_stop_is_what_ends_it(model, monkeypatch):
    kept = int(removed_in_rounds(model.posterior, None)["w"].keep.sum())
    rising = iter(range(1000))
    monkeypatch.setattr(correlated, "joint_delta_f", lambda posterior, keep: float(next(rising)))
    assert int(removed_in_rounds(model.posterior, None)["w"].keep.sum()) < kept
