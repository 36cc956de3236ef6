"""The horseshoe as reduced prior: densities, its bound against the exact evidence, and what it does to weights."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, stats

from ockham.errors import OckhamError
from ockham.evidence.gaussian import delta_f
from ockham.methods import horseshoe as hs

F64 = torch.float64


def test_densities_are_those_of_the_logarithms():
    x = torch.linspace(-6, 5, 23, dtype=F64)
    want = torch.tensor(stats.halfcauchy.logpdf(x.exp())) + x
    torch.testing.assert_close(hs.log_half_cauchy(x), want)
    want = torch.tensor(stats.invgamma.logpdf(x.exp(), 2, scale=6)) + x
    torch.testing.assert_close(hs.log_inverse_gamma(x), want)
    assert math.isclose(
        integrate.quad(lambda v: math.exp(hs.log_half_cauchy(torch.tensor(v))), -40, 40)[0], 1.0, rel_tol=1e-6
    )


def test_scale_is_the_regularised_one_and_stable():
    t, c2 = torch.tensor([1e-8, 0.3, 5.0], dtype=F64), torch.tensor([3.0, 3.0, 3.0], dtype=F64)
    want = 0.5 * (c2 * t**2 / (c2 + t**2)).log()
    torch.testing.assert_close(hs.log_horseshoe_scale(t.log(), c2.log()), want)
    ends = hs.log_horseshoe_scale(torch.tensor([-400.0, 400.0], dtype=F64), torch.zeros(2, dtype=F64))
    torch.testing.assert_close(ends, torch.tensor([-400.0, 0.0], dtype=F64))


def test_the_gain_inside_is_delta_f():
    g = torch.Generator().manual_seed(0)
    m, p0 = torch.randn(50, generator=g, dtype=F64), torch.ones(50, dtype=F64)
    p, p1 = 1 + 100 * torch.rand(50, generator=g, dtype=F64), 0.5 + 50 * torch.rand(50, generator=g, dtype=F64)
    torch.testing.assert_close(hs._gain(m, p, p0, p1), delta_f(m, p, p0, p1))


def exact_evidence(m, p, p0, scale):
    """ln of the evidence ratio, averaged over the prior of e * tau * lambda and c^2, by brute force."""
    g = torch.Generator().manual_seed(1)
    n = 400_000
    t = sum(torch.empty(n, dtype=F64).cauchy_(generator=g).abs().log() for _ in range(3)) + math.log(scale)
    slab = -torch.distributions.Gamma(torch.tensor(2.0, dtype=F64), torch.tensor(6.0, dtype=F64)).sample((n,)).log()
    p1 = (-2 * hs.log_horseshoe_scale(t, slab)).exp()
    return float((hs._gain(*(torch.tensor(v, dtype=F64) for v in (m, p, p0)), p1)).logsumexp(0) - math.log(n))


@pytest.mark.parametrize(
    ("m", "p"),
    [
        (0.0, 400.0),
        pytest.param(0.8, 400.0, marks=pytest.mark.slow),
        pytest.param(0.05, 30.0, marks=pytest.mark.slow),
    ],
)
def test_the_bound_is_below_the_exact_evidence_and_near_it(m, p):
    torch.manual_seed(0)  # Gamma of torch.distributions
    exact = exact_evidence(m, p, 1.0, 0.1)
    fit = hs.fit_horseshoe(torch.tensor([[m]], dtype=F64), torch.tensor([[p]], dtype=F64), 1.0, scale=0.1, steps=800)
    assert exact - 3 < fit.free_energy < exact + 0.1  # three scales that share one job are not independent


def test_small_weights_are_pulled_in_and_large_ones_left_alone():
    mean = torch.tensor([[0.01, -0.02, 1.0], [0.0, 0.01, -0.005]])
    fit = hs.fit_horseshoe(mean, torch.full((2, 3), 1e3), 1.0, scale=0.1, steps=300)
    assert float(fit.precision[0, 2]) < 20 and float(fit.precision[0, :2].min()) > 200
    assert float(fit.precision[1].min()) > float(fit.precision[0, :2].max())  # the row without a large weight more so
    assert sum(fit.bounds[-50:]) > sum(fit.bounds[:50])


def test_fits_are_reproducible_and_the_world_untouched():
    state = torch.get_rng_state()
    a, b = (hs.fit_horseshoe(torch.ones(2, 2), torch.full((2, 2), 50.0), 1.0, steps=20) for _ in range(2))
    assert torch.equal(a.precision, b.precision) and torch.equal(state, torch.get_rng_state())
    with pytest.raises(OckhamError, match="precision"):
        hs.fit_horseshoe(torch.ones(2, 2), torch.zeros(2, 2), 1.0)
    with pytest.raises(OckhamError, match="steps"):
        hs.fit_horseshoe(torch.ones(2, 2), torch.ones(2, 2), 1.0, steps=0)
