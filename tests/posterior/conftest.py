"""Small networks, data and a training step shared by the tests of the optimizer contract."""

from __future__ import annotations

import copy

import pytest
import torch

from ockham.fit.ivon import IVON
from ockham.fit.mean_field import MeanField


class Toy:
    """A small regression task and the steps of a loop on it."""

    def __init__(self, dtype=torch.float32, method=MeanField):
        self.method = method
        g = torch.Generator().manual_seed(7)
        self.x = torch.randn(16, 5, generator=g, dtype=dtype)
        self.y = torch.randn(16, 2, generator=g, dtype=dtype)

    def net(self, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
        return net.to(self.x.dtype)

    def loss(self, net, rows=slice(None)):
        return (net(self.x[rows]) - self.y[rows]).square().mean()

    def step(self, net, opt):
        opt.zero_grad()
        with opt.sampled():
            loss = self.loss(net)
            loss.backward()
        opt.step()
        return loss.detach()

    def make(self, seed=0, **options):
        net = self.net(seed)
        settings = {"n_data": 200, "lr": 0.01, "initial_std": 0.1, **options}
        return net, self.method(net.named_parameters(), **settings)

    def train(self, steps, seed=0, **options):
        net, opt = self.make(seed, **options)
        for _ in range(steps):
            self.step(net, opt)
        return net, opt


@pytest.fixture(params=[MeanField, IVON], ids=["MeanField", "IVON"])
def toy(request):
    """Every method: the contract is common."""
    return Toy(method=request.param)


@pytest.fixture(params=[MeanField, IVON], ids=["MeanField", "IVON"])
def toy64(request):
    return Toy(torch.float64, method=request.param)


@pytest.fixture
def snapshot():
    """Copies of all parameters, and whether a network still has exactly these bits."""

    def take(net):
        return copy.deepcopy(dict(net.state_dict()))

    def same(net, saved):
        return all(torch.equal(v, saved[k]) for k, v in net.state_dict().items())

    take.same = same
    return take
