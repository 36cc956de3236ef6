"""Noise that depends on the inputs, has heavy tails, or neither: found, absent, and a density that is one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

from ockham.errors import OckhamError
from ockham.tabular import SparseBNNClassifier, SparseBNNRegressor
from ockham.tabular.predicting import interval

SETTINGS = {"n_restarts": 1, "hidden_layer_sizes": (8,), "n_draws": 24, "random_state": 0}


def uneven(seed, rows):
    """y = x0 + N(0, exp(0.8 x1 - 1)^2)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3))
    std = np.exp(0.8 * x[:, 1] - 1)
    return x, x[:, 0] + std * rng.normal(size=rows), std


@pytest.fixture(scope="module")
def model():
    return SparseBNNRegressor(**SETTINGS).fit(*uneven(0, 500)[:2])


def test_what_moves_the_noise_is_found(model):
    assert (model.noise_inclusion_ > 0.5).tolist() == [False, True, False]
    assert model.noise_freedom_ > 10
    assert model.summary().splitlines()[-1].endswith("moved by x1")
    x, y, std = uneven(1, 4000)
    best = -stats.norm.logpdf(y, x[:, 0], std).mean()
    equal = -stats.norm.logpdf(y, x[:, 0], np.sqrt(np.mean(std**2))).mean()
    nll = -model.log_density(x, y).mean()
    assert best < nll < best + 0.05 and nll < equal - 0.25
    said = model.predict(x, return_std=True)[1]
    np.testing.assert_allclose(np.median(said / std), 1.0, atol=0.15)
    lower, upper = model.predict_interval(x, 0.9)
    inside = (lower < y) & (y < upper)
    assert inside.mean() == pytest.approx(0.9, abs=0.03)
    for part in (x[:, 1] < -0.7, x[:, 1] > 0.7):  # where an equal noise would cover all, or far too little
        assert inside[part].mean() == pytest.approx(0.9, abs=0.05)


def test_an_input_that_only_moves_the_noise_does_not_pass_for_one_of_the_mean(model):
    """Under equal noise its large residuals may have many nats for a kink in the mean."""
    assert (model.inclusion_ > 0.5).tolist() == [True, False, False]
    assert model.summary().splitlines()[2].split()[0] == "x0"


def test_equal_noise_costs_no_weights(table):
    model = SparseBNNRegressor(**SETTINGS).fit(*table)
    assert (model.noise_inclusion_ < 0.5).all()
    assert model.n_noise_weights_ == 0
    assert model.noise_std_ == pytest.approx(0.3, rel=0.2)


def test_heavy_tails_are_found_and_do_not_move_the_mean():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(600, 2))
    y = x[:, 0] + 0.2 * rng.standard_t(2.5, size=600)
    model = SparseBNNRegressor(**SETTINGS).fit(x, y)
    assert 2 < model.noise_freedom_ < 6
    assert ("very heavy" in model.summary()) == (model.noise_freedom_ < 3)
    assert np.sqrt(np.mean((model.predict(x) - x[:, 0]) ** 2)) < 0.06
    new = rng.normal(size=(4000, 2))
    residual = 0.2 * rng.standard_t(2.5, size=4000)
    nll = -model.log_density(new, new[:, 0] + residual).mean()
    assert nll < -stats.t.logpdf(residual, 2.5, scale=0.2).mean() + 0.05


def test_the_density_integrates_to_one_and_agrees_with_moments_and_intervals(model):
    row = np.array([[0.5, 0.3, -1.0]])

    def density(y):
        return math.exp(float(model.log_density(row, np.array([y]))[0]))

    mean, std = (float(v[0]) for v in model.predict(row, return_std=True))
    edges = mean - 60 * std, mean + 60 * std
    total, first, second = (
        integrate.quad(lambda y, k=k: y**k * density(y), *edges, points=[mean], limit=200)[0] for k in (0, 1, 2)
    )
    assert total == pytest.approx(1.0, abs=1e-4)
    assert first == pytest.approx(mean, abs=1e-4)
    assert math.sqrt(second - first**2) == pytest.approx(std, rel=0.01)
    lower, upper = (float(v[0]) for v in model.predict_interval(row, 0.8))
    assert integrate.quad(density, lower, upper, limit=200)[0] == pytest.approx(0.8, abs=1e-5)
    assert integrate.quad(density, edges[0], lower, limit=200)[0] == pytest.approx(0.1, abs=1e-4)


def test_whole_numbers_have_no_density_without_bounds():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(400, 3))
    y = np.round(1.5 * np.tanh(x[:, 0]))  # a function that a narrow density could sit on
    model = SparseBNNRegressor(**SETTINGS).fit(x, y)
    peak = math.sqrt(12 / (2 * math.pi))  # of the Gaussian whose variance is that of rounding
    assert model.log_density(x, y).max() <= math.log(peak) + 0.05


@pytest.mark.parametrize("coverage", [0.0, 1.0, 95])
def test_coverage_is_a_probability(model, coverage):
    with pytest.raises(OckhamError, match="coverage"):
        model.predict_interval(np.zeros((1, 3)), coverage)


def test_a_density_needs_its_targets(model):
    with pytest.raises(ValueError, match="inconsistent"):
        model.log_density(np.zeros((3, 3)), np.zeros(2))


@pytest.mark.parametrize("unit", [1.0, 1e-3])  # repetitions, and weights that are relative
@pytest.mark.filterwarnings("ignore:sample_weight sums to")
def test_the_size_of_the_noise_is_that_of_weighted_maximum_likelihood(unit):
    """Judged by the maximum of the likelihood on the same rows; the size they were drawn at is 7 % away at 400."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(2000, 1))
    y = np.exp(0.8 * x[:, 0] - 1) * rng.normal(size=2000)
    weight = np.where(x[:, 0] < 0, 4.0, 1.0)

    def nll(at, share):
        log = at[1] + at[2] * x[:, 0]
        return share @ (0.5 * ((y - at[0]) * np.exp(-log)) ** 2 + log)

    def size(share):
        at = optimize.minimize(nll, [0.0, -1.0, 0.0], args=(share / share.sum(),), method="BFGS").x
        return math.sqrt(np.average(np.exp(2 * (at[1] + at[2] * x[:, 0])), weights=share))

    found = SparseBNNRegressor(**SETTINGS).fit(x, y, sample_weight=unit * weight).noise_std_
    assert found == pytest.approx(size(weight), rel=0.04)
    assert size(np.ones(2000)) > 1.3 * found


@pytest.fixture(scope="module")
def counts():
    """y ~ Poisson(exp(1 + .6 x0 - .4 |x2|))."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(2400, 4))
    rate = np.exp(1 + 0.6 * x[:, 0] - 0.4 * np.abs(x[:, 2]))
    return x, rng.poisson(rate), rate


@pytest.fixture(scope="module")
def counting(counts):
    x, y, _ = counts
    return SparseBNNRegressor(**SETTINGS, loss="poisson").fit(x[:600], y[:600])


def test_counts_have_their_rates(counts, counting):
    x, y, rate = (part[600:] for part in counts)
    assert (counting.inclusion_ > 0.5).tolist() == [True, False, True, False]
    mean, std = counting.predict(x, return_std=True)
    assert np.abs(mean / rate - 1).mean() < 0.1
    np.testing.assert_allclose(np.median(std / np.sqrt(rate)), 1.0, atol=0.05)
    best = -stats.poisson.logpmf(y, rate).mean()
    assert best - 0.02 < -counting.log_density(x, y).mean() < best + 0.03
    assert (counting.noise_freedom_, counting.n_noise_weights_) == (math.inf, 0)
    assert counting.noise_std_ == pytest.approx(math.sqrt(rate.mean()), rel=0.1)
    assert "Poisson" in counting.summary()


def test_the_density_of_counts_adds_up_to_one_and_agrees_with_intervals(counting):
    rows, numbers = np.array([[0.5, 0.0, 1.0, 0.0], [2.0, 0.0, 0.0, 0.0]]), np.arange(120)
    lower, upper = counting.predict_interval(rows, 0.8)
    for k, row in enumerate(rows):
        p = np.exp(counting.log_density(np.tile(row, (120, 1)), numbers))
        assert p.sum() == pytest.approx(1.0, abs=1e-6)
        assert p @ numbers == pytest.approx(counting.predict(rows)[k], rel=1e-5)
        up_to = np.cumsum(p)
        assert lower[k] == numbers[up_to >= 0.1][0] and upper[k] == numbers[up_to >= 0.9][0]


@pytest.mark.parametrize("bad", [-1.0, 0.5])
def test_what_is_no_count_is_named(counts, bad):
    x, y = counts[0][:50], counts[1][:50].astype(float)
    y[7] = bad
    with pytest.raises(OckhamError, match=f"got {bad:g} .row 7."):
        SparseBNNRegressor(**SETTINGS, loss="poisson").fit(x, y)


@pytest.mark.parametrize("classes", [2, 3])
def test_labels_with_mistakes(classes):
    """A fifth of the labels is drawn at random: the share is found, and the truth is learned all the same."""
    rng = np.random.default_rng(8)
    x = rng.normal(size=(1500, 3))
    truth = np.digitize(x[:, 0], [0.0] if classes == 2 else [-0.6, 0.6])
    hat = rng.random(1500) < 0.2
    y = np.where(hat, rng.integers(classes, size=1500), truth)
    model = SparseBNNClassifier(**SETTINGS, label_noise=True).fit(x[:600], y[:600])
    plain = SparseBNNClassifier(**SETTINGS).fit(x[:600], y[:600])
    assert model.label_noise_ == pytest.approx((y[:600] != truth[:600]).mean(), abs=0.04) and plain.label_noise_ == 0
    right = 0.8 + 0.2 / classes
    best = -np.log(np.where(y == truth, right, (1 - right) / (classes - 1)))[600:].mean()
    assert -np.log(model.predict_proba(x[600:])[np.arange(900), y[600:]]).mean() < best + 0.03
    assert (model.predict(x[600:]) == truth[600:]).mean() > 0.95
    np.testing.assert_allclose(model.predict_proba(x).sum(1), 1.0)


class Mixture:
    """Stands for draws of which a table asks location, scale and freedom."""

    def __init__(self, location: torch.Tensor, scale: torch.Tensor, freedom: float) -> None:
        self.model = SimpleNamespace(likelihood=None)
        self.parts = location, scale, torch.full((len(location), 1), freedom).double()

    def with_scales(self, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for rows in torch.arange(self.parts[0].shape[1]).split(7):
            yield self.parts[0][:, rows], self.parts[1][:, rows], self.parts[2]


@pytest.mark.parametrize("freedom", [2.1, 8.0, 1e6])
@pytest.mark.parametrize("coverage", [0.02, 0.5, 0.95, 0.999])
def test_quantiles_of_mixtures_with_far_parts(freedom: float, coverage: float) -> None:
    """The cdf of the mixture at the ends is what it should be, whatever lies between its parts."""
    g = torch.Generator().manual_seed(3)
    location = torch.randn(12, 20, generator=g).double() * torch.logspace(-2, 4, 20).double()
    location[:, 0] = 1.0
    scale = torch.rand(12, 20, generator=g).double() * torch.logspace(0, -3, 20).double() + 1e-6
    scale[:, 0] = 0.3
    ends = interval(Mixture(location, scale, freedom), torch.zeros(20, 1), coverage)  # type: ignore[arg-type]
    for end, q in zip(ends, (0.5 - 0.5 * coverage, 0.5 + 0.5 * coverage), strict=True):
        cdf = stats.t.cdf(end, freedom, location.numpy(), scale.numpy()).mean(0)
        off = np.abs(cdf - q)
        beside = stats.t.cdf(end + 1e-6 * scale.numpy().min(0), freedom, location.numpy(), scale.numpy()).mean(0)
        before = stats.t.cdf(end - 1e-6 * scale.numpy().min(0), freedom, location.numpy(), scale.numpy()).mean(0)
        assert ((off < 1e-6) | ((before <= q) & (q <= beside))).all()
