"""When rounds happen and when they end; what a diagnosis says before the first."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ockham.choose.rules import RoundInfo, Rounds, diagnose, evidence_falls
from ockham.core.posterior import Gaussian, Posterior
from ockham.errors import OckhamError


def rounds_with(*energies):
    return [RoundInfo(k, 1, 0.5, 1.0, 0.0, e) for k, e in enumerate(energies)]


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 40), st.integers(1, 60))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_rounds_lie_inside_the_run_and_not_before_the_start(a, b, count, total):
    start, end = sorted((a, b))
    epochs = Rounds(start, end, count).epochs(total)
    assert 1 <= len(epochs) <= count and epochs == sorted(set(epochs))
    assert epochs[0] == max(1, math.ceil(start * total)) and epochs[-1] <= total


@pytest.mark.parametrize(
    ("rounds", "total", "epochs"),
    [
        (Rounds(start=0.5, end=1.0, count=3), 10, [5, 7, 10]),
        (Rounds(start=0.0, end=1.0, count=4), 4, [1, 2, 3, 4]),
        (Rounds(start=0.2, end=0.6, count=50), 10, [2, 3, 4, 5, 6]),
        (Rounds(start=0.5, end=0.5, count=3), 5, [3]),
        (Rounds(count=1, start=0.4), 10, [4]),
        (Rounds(), 1, [1]),
    ],
)
def test_epochs_by_hand(rounds, total, epochs):
    assert rounds.epochs(total) == epochs


@pytest.mark.parametrize(
    "bad", [{"start": -0.1}, {"start": 0.8, "end": 0.5}, {"end": 1.1}, {"count": 0}, {"patience": 0}]
)
def test_impossible_schedules_are_named(bad):
    with pytest.raises(OckhamError, match=r"Rounds: .*got"):
        Rounds(**bad)


@pytest.mark.parametrize(
    ("energies", "patience", "falls"),
    [
        ((), 1, False),
        ((-9.0,), 1, False),
        ((-9.0, -8.0, -8.5), 1, True),
        ((-9.0, -8.0, -8.5), 2, False),
        ((-9.0, -8.0, -8.5, -8.4), 2, True),
        ((-9.0, -8.0, -8.5, -7.9), 2, False),
        ((-8.0, -8.0, -8.0), 2, True),
    ],
)
def test_evidence_falls_when_no_recent_round_beats_the_best_before(energies, patience, falls):
    assert evidence_falls(rounds_with(*energies), patience) is falls


# ------------------------------------------------------------------ diagnosis


def test_a_healthy_posterior_has_no_warnings(make_gaussian):
    g = make_gaussian(torch.linspace(-1, 1, 50), torch.logspace(1, 4, 50))
    d = diagnose(Posterior({"w": g}, 10))
    assert d.warnings == () and d.undetermined == 0.0 and d.spread > 0.5 and 0 < d.removable < 1


def test_undetermined_weights_are_counted_against_their_own_prior(make_gaussian):
    prior = torch.tensor([1.0, 100.0, 1.0, 1.0])
    g = make_gaussian([0.0, 0.1, 0.5, 1.0], [1.04, 101.0, 50.0, 1.03], prior, [True, True, True, False])
    d = diagnose(Posterior({"w": g}, 10))
    assert d.undetermined == pytest.approx(2 / 3)
    assert any("67% of the weights are undetermined" in w for w in d.warnings)


def test_equal_precisions_are_called_magnitude_pruning(make_gaussian):
    layers = {n: make_gaussian(torch.linspace(-1, 1, 20), p) for n, p in (("a", 50.0), ("b", 5000.0))}
    d = diagnose(Posterior(layers, 10))  # they differ between the layers, not inside one
    assert d.spread == pytest.approx(0.0, abs=1e-12) and any("magnitude" in w for w in d.warnings)


def test_spread_is_the_coefficient_of_variation(make_gaussian):
    p = torch.tensor([10.0, 20.0, 60.0], dtype=torch.float64)
    d = diagnose(Posterior({"w": make_gaussian([0.1, 0.2, 0.3], p, 2.0)}, 10))
    assert d.spread == pytest.approx(float(p.std() / p.mean()), rel=1e-12)


def test_nothing_removable_and_temperature_are_said(make_gaussian):
    g = make_gaussian(torch.full((4,), 5.0), torch.logspace(1, 3, 4))
    d = diagnose(Posterior({"w": g}, 10, temperature=0.5))
    assert d.removable == 0.0
    assert any("no weight has evidence" in w for w in d.warnings) and any("T = 0.5" in w for w in d.warnings)


def test_an_emptied_posterior_is_diagnosed_and_not_a_crash(make_gaussian):
    g = make_gaussian([1.0, 2.0], 4.0, 1.0, [False, False])
    d = diagnose(Posterior({"w": g, "b": make_gaussian([0.3], 2.0)}, 10))
    assert d.spread == 0.0 and d.undetermined == 0.0


def test_noise_cost_is_the_expected_rise_of_a_quadratic_loss():
    # N * NLL(w) = 1/2 sum c_i (w_i - m_i)^2 with P = c + P0: E over the posterior = 1/2 sum c / P, exactly
    torch.manual_seed(0)
    c, p0, n = torch.rand(500, dtype=torch.double) * 50, 2.0, 40.0
    one = torch.ones(500, dtype=torch.bool)
    zero = torch.zeros((), dtype=torch.double)
    gaussian = Gaussian(torch.randn(500, dtype=torch.double), c + p0, torch.tensor(p0).double(), zero, one)
    posterior = Posterior({"w": gaussian}, n, 1.0, "test")
    draws = gaussian.std * torch.randn(4000, 500, dtype=torch.double)
    rise = float((0.5 * c * draws.square()).sum(1).mean() / n)
    found = diagnose(posterior, nll=rise * 0.5)
    assert found.noise_cost == pytest.approx(rise, rel=0.01) and found.settled is False
    assert diagnose(posterior, nll=rise * 2).settled is True and diagnose(posterior).settled is None
