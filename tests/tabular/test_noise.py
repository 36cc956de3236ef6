"""Noise that depends on the inputs, has heavy tails, or neither: found, absent, and a density that is one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ockham.tabular.noise import fit_noise
from ockham.tabular.running import Plan, Table
from scipy import integrate, stats

from ockham.errors import OckhamError
from ockham.tabular import SparseBNNRegressor
from ockham.tabular.likelihoods import log_scale, resolution, student_nll
from ockham.tabular.predicting import weights_by_input

SETTINGS = {"max_iter": 2500, "n_restarts": 2, "hidden_layer_sizes": (8,), "n_draws": 24, "random_state": 0}


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


def test_an_input_that_only_moves_the_noise_does_not_pass_for_one_of_the_mean():
    """Under equal noise its large residuals have hundreds of nats for a kink in the mean."""
    model = SparseBNNRegressor(**SETTINGS).fit(*uneven(0, 500)[:2])
    assert model._fitted.by_input[1] > 10  # under equal noise
    assert model._predictive.by_input[1] < 0  # under its own
    assert weights_by_input(model._predictive.posterior)[1] == 0
    assert (model.inclusion_ > 0.5).tolist() == [True, False, False]


def test_equal_noise_costs_no_weights(table):
    model = SparseBNNRegressor(**SETTINGS).fit(*table)
    assert (model.noise_inclusion_ < 0.5).all()
    assert model.n_weights_ == model._predictive.posterior.kept()
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


def test_resolution_is_that_of_rounding():
    g = torch.Generator().manual_seed(6)
    rounded = torch.rand(2000, generator=g, dtype=torch.float64).mul(40).round().div(4)
    rounded[0] = 300.0  # one wide gap
    exact = torch.rand(200_000, generator=g, dtype=torch.float64) * 10
    assert math.exp(resolution(rounded)) == pytest.approx(float((exact - (exact * 4).round() / 4).std()), rel=0.02)
    assert math.exp(resolution(torch.tensor([1.0, 1.0]))) == pytest.approx(1e-3)  # a constant has no gap


def test_student_against_scipy():
    r, f = np.array([0.0, 0.3, -7.0, 1e4]), np.array([2.1, 5.0, 30.0, 1e4])
    got = student_nll(torch.tensor(r), torch.tensor(0.7, dtype=torch.float64), torch.tensor(f))
    np.testing.assert_allclose(got, -stats.t.logpdf(r, f, scale=math.exp(0.7)), rtol=1e-9)
    assert float(log_scale(torch.tensor(-50.0), -2.0)) == pytest.approx(-2.0)
    assert float(log_scale(torch.tensor(30.0), -2.0)) == pytest.approx(30.0)


@pytest.mark.parametrize("coverage", [0.0, 1.0, 95])
def test_coverage_is_a_probability(model, coverage):
    with pytest.raises(OckhamError, match="coverage"):
        model.predict_interval(np.zeros((1, 3)), coverage)


def test_a_density_needs_its_targets(model):
    with pytest.raises(ValueError, match="inconsistent"):
        model.log_density(np.zeros((3, 3)), np.zeros(2))


@pytest.mark.parametrize("unknown", [0.0, 0.05, 0.3])
def test_what_is_not_known_of_the_mean_is_no_noise_of_another_size(unknown):
    """Residuals known up to a variance: the scale that comes out is that of both, and nothing moves it."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 2, generator=g), 0.1 * torch.randn(300, generator=g)
    outputs = unknown * torch.randn(64, 300, generator=g)
    plan = Plan((8,), 1, False, 2, 5000, 256, 0.01, 1.0, 0, 6, 0)
    noise = fit_noise(Table(x, y, torch.ones(300)), plan, outputs, 0.1**2 + unknown**2)
    assert noise.posterior.kept() == 0
    freedom = 2 + math.exp(noise.log_freedom)
    scale = float(log_scale(torch.tensor(noise.base), noise.floor).exp())
    assert scale * math.sqrt(freedom / (freedom - 2)) == pytest.approx(math.hypot(0.1, unknown), rel=0.12)


def test_a_constant_target_is_known_exactly():
    x = np.random.default_rng(0).normal(size=(80, 2))
    model = SparseBNNRegressor(max_iter=300, n_restarts=2, hidden_layer_sizes=(4,), n_draws=8, random_state=0)
    mean, std = model.fit(x, np.full(80, 3e-6)).predict(x, return_std=True)
    assert np.abs(mean - 3e-6).max() < 0.02 and std.max() < 0.05


def test_the_size_of_the_noise_counts_rows_by_weight():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(400, 1))
    std = np.exp(0.8 * x[:, 0] - 1)
    weight = np.where(x[:, 0] < 0, 4.0, 1.0)
    model = SparseBNNRegressor(**SETTINGS).fit(x, std * rng.normal(size=400), sample_weight=weight)
    assert model.noise_std_ == pytest.approx(np.sqrt(np.average(std**2, weights=weight)), rel=0.15)
