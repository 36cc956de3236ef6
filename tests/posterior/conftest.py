"""The contract of the optimizers: a value per method that says what may differ; a network, data, a training step."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ockham.fit.ivon import IVON
from ockham.fit.mean_field import MeanField, PointEstimate
from ockham.fit.optimizer import VariationalOptimizer
from ockham.fit.priors import EmpiricalBayes, FixedPrior, Prior
from ockham.methods.spike_slab.optimizer import SpikeSlab
from ockham.methods.spike_slab.priors import FixedSpikeSlab, LearnedSpikeSlab

_spec = importlib.util.spec_from_file_location("own_method", Path(__file__).parents[2] / "examples" / "own_method.py")
_example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_example)


@dataclass(frozen=True)
class Contract:
    """What every method must do is in the tests; this says in what it may differ.

    Attributes:
        method: class of the optimizer.
        options: names of the options of `MeanField` that it has.
        prior: a `Prior` to the options that state it; None where the method takes a `Prior` as it is.
        draws: whether a block perturbs the weights (a point estimate has nothing to draw).
        spread_is_stepped: whether the spread moves with the learning rate, and so rests where it is zero.
        takes_spread: whether `start_from` reads more of a posterior than its means.
        gaussian: whether the posterior is Gaussian, so that its KL is that of Gaussians.
    """

    method: type[VariationalOptimizer]
    options: frozenset[str]
    prior: Callable[[Prior], Mapping[str, object]] | None = None
    draws: bool = True
    spread_is_stepped: bool = True
    gaussian: bool = True
    takes_spread: bool = True

    def translated(self, options):
        """Options of `MeanField` as this method has them; skips the test where it has no such thing."""
        given = dict(options)
        if "prior" in given and self.prior is not None:
            given.update(self.prior(given.pop("prior")))
        missing = set(given) - self.options
        if missing:
            pytest.skip(f"{self.method.__name__} has no {sorted(missing)}")
        return given


def _slab(prior):
    if isinstance(prior, FixedPrior):
        return {"prior": FixedSpikeSlab(0.5, prior.variance)}
    if isinstance(prior, EmpiricalBayes):
        return {"prior": LearnedSpikeSlab(0.5, prior.variance)}
    pytest.skip(f"SpikeSlab has no {type(prior).__name__}")


def _variance(prior):
    return {"prior_variance": prior.variance} if isinstance(prior, FixedPrior) else {"prior": prior}


ALL = frozenset(
    {"n_data", "lr", "betas", "eps", "prior", "prior_mean", "initial_std", "std_rate", "temperature", "kl_warmup"}
    | {"prior_interval", "seed"}
)
POINT = frozenset({"n_data", "lr", "betas", "eps", "prior_variance"})
NaturalGradient = _example.NaturalGradient
OWN = frozenset({"n_data", "lr", "initial_std", "prior_variance", "temperature", "seed"})
CONTRACTS = {
    "MeanField": Contract(MeanField, ALL),
    "IVON": Contract(IVON, ALL - {"eps", "std_rate"}, spread_is_stepped=False),
    "SpikeSlab": Contract(SpikeSlab, ALL - {"prior_mean"}, _slab, gaussian=False),
    "PointEstimate": Contract(PointEstimate, POINT, _variance, draws=False, takes_spread=False),
    "own_method": Contract(NaturalGradient, OWN, _variance, takes_spread=False),
}


class Toy:
    """A small regression task and the steps of a loop on it."""

    def __init__(self, contract, dtype=torch.float32):
        self.contract, self.method = contract, contract.method
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

    def over(self, params, **options):
        """The optimizer over any parameters; what the method has no option for and the test did not ask is left out."""
        usual = {"n_data": 200, "lr": 0.01, "initial_std": 0.1}
        usual = {k: v for k, v in usual.items() if k in self.contract.options}
        return self.method(params, **usual | self.contract.translated(options))

    def make(self, seed=0, **options):
        net = self.net(seed)
        return net, self.over(net.named_parameters(), **options)

    def train(self, steps, seed=0, **options):
        net, opt = self.make(seed, **options)
        for _ in range(steps):
            self.step(net, opt)
        return net, opt

    def needs_draws(self):
        if not self.contract.draws:
            pytest.skip(f"{self.method.__name__} draws nothing")


@pytest.fixture(params=CONTRACTS.values(), ids=CONTRACTS)
def toy(request):
    """Every method: the contract is common."""
    return Toy(request.param if isinstance(request.param, Contract) else CONTRACTS[request.param.__name__])


@pytest.fixture(params=CONTRACTS.values(), ids=CONTRACTS)
def toy64(request):
    contract = request.param if isinstance(request.param, Contract) else CONTRACTS[request.param.__name__]
    return Toy(contract, torch.float64)


@pytest.fixture
def mean_field():
    """The same task for tests of one method."""
    return Toy(CONTRACTS["MeanField"])


@pytest.fixture
def snapshot():
    """Copies of all parameters, and whether a network still has exactly these bits."""

    def take(net):
        return copy.deepcopy(dict(net.state_dict()))

    def same(net, saved):
        return all(torch.equal(v, saved[k]) for k, v in net.state_dict().items())

    take.same = same
    return take
