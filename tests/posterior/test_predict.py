"""The posterior predictive: probabilities, entropies, draws, and a model left as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import ockham
from ockham.core.posterior import Gaussian, Posterior
from ockham.errors import DataError, OckhamError
from ockham.fit.predict import draw_outputs, draw_parameters, predict


def posterior_of(model, std=0.5, keep=None):
    moments = {}
    for name, p in model.named_parameters():
        mask = torch.ones_like(p, dtype=torch.bool) if keep is None or name not in keep else keep[name]
        mean, precision = p.detach().clone() * mask, torch.full_like(p, std**-2).masked_fill(~mask, torch.inf)
        moments[name] = Gaussian(mean, precision.detach(), torch.tensor(1.0), torch.tensor(0.0), mask)
    return Posterior(moments, 100)


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))


X = torch.linspace(-2, 2, 40).view(10, 4)


def test_probabilities_and_entropies_fit_together(model):
    p = predict(model, posterior_of(model), X, draws=16)
    torch.testing.assert_close(p.probabilities.sum(1), torch.ones(10))
    assert bool((p.probabilities >= 0).all()) and bool((p.epistemic >= 0).all()) and bool((p.aleatoric >= 0).all())
    torch.testing.assert_close(p.aleatoric + p.epistemic, p.total)
    entropy = -(p.probabilities * p.probabilities.log()).sum(1)
    torch.testing.assert_close(p.total, entropy)
    assert float(p.epistemic.max()) > 0.01 and float(p.total.max()) <= math.log(3) + 1e-6


def test_prediction_is_the_average_over_its_own_draws(model):
    posterior = posterior_of(model)
    p = predict(model, posterior, X, draws=5, generator=generator())
    stacked = torch.stack(list(draw_outputs(model, posterior, X, draws=5, generator=generator()))).softmax(-1)
    torch.testing.assert_close(p.probabilities, stacked.mean(0))
    torch.testing.assert_close(p.aleatoric, -(stacked * stacked.log()).sum(-1).mean(0))


def test_a_certain_posterior_is_the_mean_network_without_epistemic_part(model):
    p = predict(model, posterior_of(model, std=1e-7), X, draws=3)
    torch.testing.assert_close(p.probabilities, model.eval()(X).softmax(1), rtol=1e-4, atol=1e-5)
    assert float(p.epistemic.max()) < 1e-5


def test_the_model_is_left_as_it_was(model):
    model.train()
    model[2].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    predict(model, posterior_of(model), X, draws=3)
    assert [m.training for m in model] == [True, True, False, True, True] and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # BatchNorm statistics too
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_train_mode_comes_back_after_an_exception_and_after_half_the_draws(model):
    model.train()
    with pytest.raises(OckhamError):
        predict(model, posterior_of(model), torch.ones(2, 7), draws=2)
    assert model.training
    outputs = draw_outputs(model, posterior_of(model), X, draws=5, generator=generator())
    next(outputs)
    outputs.close()
    assert model.training and model[1].training


def test_draws_follow_the_generator_and_no_global_state(model):
    posterior, before = posterior_of(model), torch.get_rng_state()
    one, same, other = (predict(model, posterior, X, draws=2, generator=generator(s)) for s in (1, 1, 2))
    assert torch.equal(one.probabilities, same.probabilities)
    assert not torch.equal(one.probabilities, other.probabilities)
    default = [predict(model, posterior, X, draws=2).probabilities for _ in range(2)]
    assert torch.equal(*default) and torch.equal(torch.get_rng_state(), before)


def test_the_size_of_an_input_batch_changes_nothing(model):
    posterior = posterior_of(model)
    parts, whole = (list(draw_outputs(model, posterior, X, draws=2, generator=generator(), batch=b)) for b in (3, 99))
    torch.testing.assert_close(torch.stack(parts), torch.stack(whole))


def test_drawn_parameters_have_the_moments_and_exact_zeros():
    layer = nn.Linear(100, 100, bias=False)
    keep = {"weight": torch.rand(100, 100, generator=generator()) > 0.2}
    posterior = posterior_of(layer, 0.3, keep)
    w = draw_parameters(posterior, generator())["weight"]
    assert bool((w[~keep["weight"]] == 0).all())
    z = ((w - posterior["weight"].mean) / 0.3)[keep["weight"]]
    assert abs(float(z.mean())) < 4 / len(z) ** 0.5 and abs(float(z.var()) - 1) < 4 * (2 / len(z)) ** 0.5
    assert not torch.equal(w, posterior["weight"].mean) and w.shape == (100, 100)


def test_tied_weights_are_drawn_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    model.forward = lambda x: model["b"](x) - model["a"](x)
    assert list(posterior_of(model)) == ["a.weight"]
    for out in draw_outputs(model, posterior_of(model), torch.ones(2, 3), draws=3, generator=generator()):
        assert torch.equal(out, torch.zeros(2, 3))


def test_impossible_classes_are_not_nan():
    class Masked(nn.Linear):
        def forward(self, x):
            return super().forward(x).index_fill(1, torch.tensor([1]), -math.inf)

    model = Masked(4, 3)
    p = predict(model, posterior_of(model), X, draws=4)
    assert bool(torch.isfinite(p.total).all()) and bool(torch.isfinite(p.epistemic).all())
    assert bool((p.probabilities[:, 1] == 0).all())


def test_bad_requests_are_named(model):
    with pytest.raises(OckhamError, match="draws must be at least 1; got 0"):
        predict(model, posterior_of(model), X, draws=0)
    with pytest.raises(OckhamError, match=r"lacks: \['0.weight'.*load the model it belongs to"):
        predict(nn.Linear(4, 3), posterior_of(model), X)


def test_draws_of_a_point_are_the_point():
    from ockham import PointEstimate

    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    opt = PointEstimate(net.named_parameters(), n_data=10)
    with opt.sampled():
        net(torch.ones(4, 3)).square().mean().backward()
    opt.step()
    posterior, x = opt.posterior(), torch.randn(5, 3)
    found = predict(net, posterior, x, draws=3)
    torch.testing.assert_close(found.probabilities, net(x).softmax(-1))
    assert posterior.is_point and float(found.epistemic.abs().max()) < 1e-6


def test_statistics_are_those_of_before_where_a_refresh_cannot_go_well():
    """A NaN in one example, or no batch at all: said, and the network is as it was."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ockham.refresh_batchnorm(net, [(torch.randn(16, 3), None)], batch=lambda raw: ockham.Batch((raw[0],)))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    broken = torch.randn(16, 3)
    broken[5, 1] = float("nan")
    rows = [(torch.randn(16, 3), torch.zeros(16)), (broken, torch.zeros(16))]
    for loader, words in ((rows, "batch 1 .*nan in example 5"), ([], "is empty"), (None, "iterable of batches")):
        with pytest.raises(DataError, match=words):
            ockham.refresh_batchnorm(net, loader)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), words
