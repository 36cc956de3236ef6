"""The horseshoe during training: the same function at first, its energy, and sparsity where the data allow it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import HalfCauchy, InverseGamma

import ockham
from ockham.errors import OckhamError


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def test_it_starts_as_the_same_function():
    model, x = network(), torch.randn(7, 6, dtype=torch.float64)
    net = ockham.horseshoe(model)
    torch.testing.assert_close(net(x), model(x))
    torch.testing.assert_close(net.plain()(x), model(x))
    assert [n for n, p in net.model.named_parameters() if p.requires_grad] == ["0.bias", "2.bias"]
    assert all(p.requires_grad for p in model.parameters())


def test_energy_is_the_density_of_the_scales():
    net = ockham.horseshoe(network())
    want = 0.0
    for name, p in net.scales.items():
        x = p.detach()
        prior = InverseGamma(2.0, 6.0).log_prob(x.exp()) if name.endswith("slab") else HalfCauchy(1.0).log_prob(x.exp())
        want -= float((prior + x + x.square() / 200).sum())  # density of the logarithm, without the wide Gaussian
    assert float(net.energy().detach()) == pytest.approx(want, rel=1e-6)


def test_every_parameter_is_in_one_group_and_the_gradient_reaches_it():
    net = ockham.horseshoe(network())
    grouped = [p for g in net.groups() for _, p in g["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in net.parameters() if p.requires_grad}
    (net(torch.randn(3, 6, dtype=torch.float64)).square().sum() + net.energy()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in grouped)


def test_inputs_without_use_are_shrunk():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=g, dtype=torch.float64)
    y = x[:, :1] * 1.5 + 0.1 * torch.randn(300, 1, generator=g, dtype=torch.float64)
    net = ockham.horseshoe(nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 1)).double())
    opt = ockham.MeanField(net.groups(), n_data=300, lr=0.02)
    for k in range(400):
        for group in opt.param_groups:
            group["lr"] = 0.04 * min(1.0, 2 * (1 - k / 400))
        opt.zero_grad()
        with opt.sampled():
            (0.5 * (net(x) - y).square().mean() / 0.01 + net.energy() / 300).backward()
        opt.step()
    weight = net.weights()["0.weight"].detach().abs()[0]
    assert float(weight[1:].max()) < 0.02 * float(weight[0])
    assert float(net.plain()(x).sub(y).square().mean().detach()) < 0.02


def test_the_first_paper_has_one_scale_for_the_last_matrix():
    net = ockham.horseshoe(network())
    assert [n for n in net.scales if n.startswith("2-weight")] == ["2-weight:all"]
    shapes = {n.split(":")[1]: tuple(p.shape) for n, p in net.scales.items() if n.startswith("0-weight")}
    assert shapes == {"all": (1, 1), "row": (8, 1), "weight": (8, 6), "slab": (1, 1)}


def test_bad_input_is_named():
    with pytest.raises(OckhamError, match="scale"):
        ockham.horseshoe(network(), scale=math.inf)
    with pytest.raises(OckhamError, match="weight matrix"):
        ockham.horseshoe(nn.BatchNorm1d(3))
