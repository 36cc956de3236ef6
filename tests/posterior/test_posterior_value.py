"""The posterior as a value: a frozen mapping in the order of the network."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ockham.core.posterior import Gaussian, Posterior
from ockham.errors import OckhamError


def gaussian(n=3, **changes):
    fields = {
        "mean": torch.arange(float(n)),
        "precision": torch.full((n,), 4.0),
        "prior_precision": torch.tensor(1.0),
        "prior_mean": torch.tensor(0.0),
        "keep": torch.ones(n, dtype=torch.bool),
    }
    return Gaussian(**{**fields, **changes})


def test_posterior_of_an_optimizer_in_the_order_of_the_network(mean_field):
    net, opt = mean_field.train(3, n_data=321, temperature=0.5)
    posterior = opt.posterior()
    assert list(posterior) == [n for n, _ in net.named_parameters()]
    assert (posterior.n_data, posterior.temperature, posterior.source) == (321.0, 0.5, "MeanField")
    for name, p in net.named_parameters():
        g = posterior[name]
        assert torch.equal(g.mean, p) and g.precision.shape == p.shape and not g.mean.requires_grad
        assert float(g.prior_precision) == 1.0 and float(g.prior_mean) == 0.0
        assert g.precision.dtype is p.dtype and g.mean.data_ptr() != p.data_ptr()


def test_initial_std_is_the_std_of_the_first_posterior(mean_field):
    net, opt = mean_field.make(initial_std=0.37, lr=1e-12)
    mean_field.step(net, opt)
    for g in opt.posterior().values():
        torch.testing.assert_close(g.std, torch.full_like(g.mean, 0.37), rtol=1e-6, atol=0)


def test_kept_size_and_std_count_removed_weights():
    keep = torch.tensor([True, False, True])
    g = gaussian(keep=keep, precision=torch.tensor([4.0, torch.inf, 16.0]))
    posterior = Posterior({"w": g, "v": gaussian(2)}, 10)
    assert (posterior.kept(), posterior.size(), len(posterior)) == (4, 5, 2)
    assert g.std.tolist() == [0.5, 0.0, 0.25]


def test_unknown_names_are_listed_with_the_known():
    with pytest.raises(KeyError, match=r"no parameter 'x' in this posterior; it has w"):
        Posterior({"w": gaussian()}, 10)["x"]
    assert "x" not in Posterior({"w": gaussian()}, 10)


def test_values_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        gaussian().mean = torch.zeros(3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Posterior({}, 1).n_data = 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": torch.ones(2)}, r"precision has shape \(2,\), mean has \(3,\)"),
        ({"keep": torch.ones(2, dtype=torch.bool)}, r"keep has shape \(2,\)"),
        ({"keep": torch.ones(3)}, "keep must be boolean"),
        ({"marginal_precision": torch.ones(2)}, r"marginal_precision has shape \(2,\)"),
        ({"prior_precision": torch.ones(2)}, r"prior_precision of shape \(2,\) does not broadcast"),
        ({"prior_mean": torch.zeros(2, 3)}, r"prior_mean of shape \(2, 3\) does not broadcast"),
        ({"mean": torch.tensor([0.0, torch.nan, 1.0])}, "mean must be finite everywhere"),
        ({"mean": torch.tensor([0.0, -torch.inf, 1.0])}, "mean must be finite everywhere"),
        ({"precision": torch.tensor([1.0, 0.0, 1.0])}, "precision must be positive"),
        ({"precision": torch.tensor([1.0, torch.nan, 1.0])}, "precision must be positive"),
        ({"marginal_precision": torch.tensor([1.0, -2.0, 1.0])}, "marginal_precision must be positive"),
        ({"inclusion": torch.tensor([0.0, 1.5, 1.0])}, "inclusion must be a probability"),
    ],
)
def test_moments_must_fit_together(changes, message):
    with pytest.raises(OckhamError, match=message):
        gaussian(**changes)


@pytest.mark.parametrize(
    ("name", "bad"), [("n_data", 0.0), ("n_data", torch.nan), ("temperature", -1.0), ("n_data", "x")]
)
def test_numbers_of_a_posterior_are_checked(name, bad):
    with pytest.raises(OckhamError, match=f"Posterior: {name} must be a number, positive"):
        Posterior({"w": gaussian()}, **{"n_data": 10, name: bad})


def test_empty_tensors_are_moments_too():
    assert Posterior({"w": gaussian(0)}, 1).size() == 0
