"""The posterior as a value: a frozen mapping in the order of the network."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ockham.core.posterior import Gaussian, Posterior
from ockham.errors import OckhamError
from ockham.fit.mean_field import MeanField


def gaussian(n=3, **changes):
    fields = {
        "mean": torch.arange(float(n)),
        "precision": torch.full((n,), 4.0),
        "prior_precision": torch.tensor(1.0),
        "prior_mean": torch.tensor(0.0),
        "keep": torch.ones(n, dtype=torch.bool),
    }
    return Gaussian(**{**fields, **changes})


@pytest.mark.parametrize("toy", [MeanField], indirect=True)
def test_posterior_of_an_optimizer_in_the_order_of_the_network(toy):
    net, opt = toy.train(3, n_data=321, temperature=0.5)
    posterior = opt.posterior()
    assert list(posterior) == [n for n, _ in net.named_parameters()]
    assert (posterior.n_data, posterior.temperature, posterior.source) == (321.0, 0.5, "MeanField")
    for name, p in net.named_parameters():
        g = posterior[name]
        assert torch.equal(g.mean, p) and g.precision.shape == p.shape and not g.mean.requires_grad
        assert float(g.prior_precision) == 1.0 and float(g.prior_mean) == 0.0
        assert g.precision.dtype is p.dtype and g.mean.data_ptr() != p.data_ptr()


@pytest.mark.parametrize("toy64", [MeanField], indirect=True)
def test_initial_std_is_the_std_of_the_first_posterior(toy64):
    net, opt = toy64.make(initial_std=0.37, lr=1e-12)
    toy64.step(net, opt)
    for g in opt.posterior().values():
        torch.testing.assert_close(g.std, torch.full_like(g.mean, 0.37), rtol=1e-9, atol=0)


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
    ],
)
def test_moments_must_fit_together(changes, message):
    with pytest.raises(OckhamError, match=message):
        gaussian(**changes)
