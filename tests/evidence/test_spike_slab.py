"""Spike-and-slab formulas against quadrature, enumeration, torch.distributions and finite differences."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.stats import norm
from torch.distributions import Beta, InverseGamma

from ockham.errors import OckhamError, OckhamWarning
from ockham.evidence.exact import exact_inclusion
from ockham.methods.spike_slab.correlated import correlation, inclusion_correlated, likelihood_of
from ockham.methods.spike_slab.formulas import (
    factorised_log_odds,
    factorised_precision,
    gaussian_spike_log_odds,
    inclusion_log_odds,
    inclusion_slope,
    paired_log_odds,
    rate_log_odds,
    slab_expectations,
    slab_kl,
    spike_slab_kl,
    weight_mean,
    weight_variance,
)

F64 = torch.float64


def likelihood(h, b):
    return lambda w: math.exp(b * w - 0.5 * h * w * w)


@pytest.mark.parametrize(("h", "b", "p0", "v1", "v0"), [(30.0, 4.0, 0.2, 1.0, 0.01), (2.0, -3.0, 0.6, 4.0, 0.3)])
def test_one_weight_equals_quadrature(h, b, p0, v1, v0):
    variance = 1 / (h + 1 / v1)
    mean, odds = torch.tensor([variance * b], dtype=F64), math.log(p0 / (1 - p0))
    f = likelihood(h, b)
    slab = quad(lambda w: f(w) * norm.pdf(w, scale=v1**0.5), -20, 20, points=[0.0, float(mean)])[0]
    spike = quad(lambda w: f(w) * norm.pdf(w, scale=v0**0.5), -5, 5, points=[0.0])[0]
    dirac = inclusion_log_odds(mean, variance, odds, v1)
    assert float(dirac) == pytest.approx(odds + math.log(slab), abs=1e-7)
    gaussian = gaussian_spike_log_odds(mean, torch.full((1,), variance, dtype=F64), odds, v1, v0)
    assert float(gaussian) == pytest.approx(odds + math.log(slab) - math.log(spike), abs=1e-7)
    narrow = gaussian_spike_log_odds(mean, torch.full((1,), variance, dtype=F64), odds, v1, 1e-10)
    assert float(narrow) == pytest.approx(float(dirac), abs=1e-6)


@pytest.mark.parametrize(("h", "b"), [(30.0, 4.0), (2.0, -3.0), (0.3, 0.1)])
def test_a_learned_slab_under_a_gaussian_spike_is_the_best_of_both_elbos(h, b):
    """E[1/v1] and E[ln v1] are two numbers: both components' bounds maximised numerically, their difference taken."""
    shape, rate, v0, odds = 2.5, 3.0, 0.05, -0.4
    inverse, log_v1 = slab_expectations(0.0, 0.0, shape=shape, rate=rate)
    assert log_v1 < -math.log(inverse) + 0.3 and abs(log_v1 + math.log(inverse)) > 0.1

    def best(precision, log_variance):
        def loss(x):
            m, v = torch.tensor([x[0]], dtype=F64), torch.tensor([math.exp(x[1])], dtype=F64)
            return float(0.5 * h * (v + m * m) - b * m + slab_kl(m, v, precision, log_variance))

        found = minimize(
            loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000}
        )
        return -found.fun, found.x

    (slab, at), (spike, _) = best(inverse, log_v1), best(1 / v0, math.log(v0))
    mean, variance = torch.tensor([at[0]], dtype=F64), torch.tensor([math.exp(at[1])], dtype=F64)
    got = gaussian_spike_log_odds(mean, variance, odds, 1 / inverse, v0, log_slab_variance=log_v1)
    assert float(got) == pytest.approx(odds + slab - spike, abs=1e-5)


def test_gradient_and_optimum_forms_agree_at_the_optimum():
    # quadratic likelihood: D = b m - h (s2 + m2) / 2
    h, b, v1, odds = 30.0, 4.0, 1.5, -1.0
    variance = torch.tensor([1 / (h + 1 / v1)], dtype=F64)
    mean = variance * b
    drive = b * mean - 0.5 * h * (variance + mean.square())
    by_gradient = paired_log_odds(drive, slab_kl(mean, variance, 1 / v1), odds)
    torch.testing.assert_close(by_gradient, inclusion_log_odds(mean, variance, odds, v1), atol=1e-12, rtol=0)


def test_moments_are_those_of_the_mixture():
    m, s2, pi, v0 = (torch.tensor([x], dtype=F64) for x in (0.7, 0.04, 0.3, 0.01))
    first = pi * m
    second = pi * (s2 + m * m) + (1 - pi) * v0
    torch.testing.assert_close(weight_mean(m, pi), first)
    torch.testing.assert_close(weight_variance(m, s2, pi, float(v0)), second - first.square())


class Linear:
    """ELBO of a paired posterior of a linear-Gaussian model, in closed form."""

    def __init__(self, spike=0.0):
        g = torch.Generator().manual_seed(1)
        self.x = torch.randn(30, 4, generator=g, dtype=F64)
        self.y = torch.randn(30, generator=g, dtype=F64)
        self.v1, self.p0, self.spike = 2.0, 0.3, spike

    def moments(self, m, log_std, pi):
        return weight_mean(m, pi), weight_variance(m, (2 * log_std).exp(), pi, self.spike)

    def nll(self, mean, variance):
        return 0.5 * ((self.y - self.x @ mean).square().sum() + (self.x.square() @ variance).sum())

    def loss(self, m, log_std, pi):
        cost = slab_kl(m, (2 * log_std).exp(), 1 / self.v1)
        kl = spike_slab_kl(pi, cost, math.log(self.p0), math.log1p(-self.p0)).sum()
        return self.nll(*self.moments(m, log_std, pi)) + kl


@pytest.mark.parametrize("spike", [0.0, 0.05])
def test_gradients_of_the_elbo_equal_finite_differences(spike):
    from ockham.methods.spike_slab.optimizer import Run, SlabFacts, by_gradient

    task = Linear(spike)
    m = torch.tensor([0.5, -0.2, 0.1, 1.0], dtype=F64)
    log_std = torch.tensor([-1.0, -2.0, -0.5, -3.0], dtype=F64)
    pi = torch.tensor([0.9, 0.1, 0.5, 0.02], dtype=F64)
    mean, variance = (t.requires_grad_() for t in task.moments(m, log_std, pi))
    of_mean, of_variance = torch.autograd.grad(task.nll(mean, variance), (mean, variance))
    run = Run(m, (2 * log_std).exp(), pi, of_mean, of_variance)
    mean_grad, std_grad = run.gradients(1.0, 1 / task.v1)

    class Prior:
        spike_variance = spike

    facts = SlabFacts(1, 1 / task.v1, math.log(task.v1), math.log(task.p0), math.log1p(-task.p0), True, True)
    group = {"prior": Prior(), "n_data": 1.0, "temperature": 1.0, "kl_warmup": 0}
    logit_grad = -by_gradient(run, torch.logit(pi), facts, group)
    for j, grads in enumerate((mean_grad * pi, std_grad * pi, logit_grad)):
        for i in range(4):
            step = 1e-5
            around = []
            for sign in (1, -1):
                values = [m.clone(), log_std.clone(), pi.clone()]
                values[j][i] += sign * step
                around.append(float(task.loss(*values)))
            numeric = (around[0] - around[1]) / (2 * step)
            assert float(grads[i]) == pytest.approx(numeric, rel=1e-6, abs=1e-6), (j, i)


def test_slope_is_the_derivative_by_inclusion():
    task = Linear(0.02)
    m, s2 = torch.randn(4, dtype=F64, generator=torch.Generator().manual_seed(2)), torch.full((4,), 0.1, dtype=F64)
    pi = torch.tensor([0.2, 0.4, 0.6, 0.9], dtype=F64, requires_grad=True)
    mean, variance = weight_mean(m, pi), weight_variance(m, s2, pi, task.spike)
    nll = task.nll(mean, variance)
    of_mean, of_variance, want = torch.autograd.grad(nll, (mean, variance, pi))
    got = inclusion_slope(of_mean, of_variance, m, s2, pi.detach(), task.spike)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


def test_kl_equals_monte_carlo_of_its_definition():
    pi, m, s2, v1, p0 = 0.3, 0.4, 0.05, 1.5, 0.2
    slab = quad(lambda w: norm.pdf(w, m, s2**0.5) * (norm.logpdf(w, m, s2**0.5) - norm.logpdf(w, 0, v1**0.5)), -3, 4)[0]
    want = pi * (slab + math.log(pi / p0)) + (1 - pi) * math.log((1 - pi) / (1 - p0))
    cost = slab_kl(torch.tensor([m], dtype=F64), torch.tensor([s2], dtype=F64), 1 / v1)
    got = spike_slab_kl(torch.tensor([pi], dtype=F64), cost, math.log(p0), math.log1p(-p0))
    assert float(got) == pytest.approx(want, abs=1e-8)
    ends = spike_slab_kl(torch.tensor([0.0, 1.0], dtype=F64), cost, math.log(p0), math.log1p(-p0))
    assert torch.isfinite(ends).all() and float(ends[0]) == pytest.approx(-math.log1p(-p0))


def test_hyper_priors_are_expectations_of_their_factors():
    log_rate, log_rest = rate_log_odds(7.5, 30.0, keep_count=2.0, remove_count=3.0)
    beta = Beta(torch.tensor(9.5, dtype=F64), torch.tensor(33.0, dtype=F64))
    draws = beta.sample((400_000,)).double()
    assert log_rate == pytest.approx(float(draws.log().mean()), abs=4e-3)
    assert log_rest == pytest.approx(float((1 - draws).log().mean()), abs=1e-3)
    precision, log_variance = slab_expectations(10.0, 4.0, shape=2.0, rate=1.0)
    torch.manual_seed(0)
    v = InverseGamma(torch.tensor(7.0, dtype=F64), torch.tensor(3.0, dtype=F64)).sample((400_000,))
    assert precision == pytest.approx(float((1 / v).mean()), rel=5e-3)
    assert log_variance == pytest.approx(float(v.log().mean()), abs=5e-3)


def test_factorised_form_warns_with_the_number_when_the_spike_is_narrow():
    m, s2 = torch.zeros(4, dtype=F64), torch.full((4,), 0.04, dtype=F64)
    with pytest.warns(OckhamWarning, match=r"0\.0001.*100%.*0\.04"):
        odds = factorised_log_odds(m, s2, 0.0, 1.0, 1e-4)
    assert float(odds.min()) > 100  # a weight at zero reads as included: the trap
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide = factorised_log_odds(m, s2, 0.0, 1.0, 0.05)
    assert float(wide.max()) < 0
    pi = torch.tensor([0.0, 1.0], dtype=F64)
    torch.testing.assert_close(factorised_precision(pi, 2.0, 0.1), torch.tensor([10.0, 0.5], dtype=F64))


def test_factorised_form_is_the_conditional_of_its_model():
    m, s2, p0, v1, v0 = 0.3, 0.01, 0.4, 1.0, 0.05
    got = factorised_log_odds(
        torch.tensor([m], dtype=F64), torch.tensor([s2], dtype=F64), math.log(p0 / (1 - p0)), v1, v0
    )
    each = [quad(lambda w, v=v: norm.pdf(w, m, s2**0.5) * norm.logpdf(w, 0, v**0.5), -2, 2)[0] for v in (v1, v0)]
    assert float(got) == pytest.approx(math.log(p0 / (1 - p0)) + each[0] - each[1], abs=1e-7)


@pytest.mark.parametrize(("spike", "slab"), [(0.0, 1.0), (2.0, 1.0)])
def test_impossible_spikes_are_refused(spike, slab):
    with pytest.raises(OckhamError, match="spike_variance"):
        factorised_log_odds(torch.zeros(1), torch.ones(1), 0.0, slab, spike)
    with pytest.raises(OckhamError, match="spike_variance"):
        gaussian_spike_log_odds(torch.zeros(1), torch.ones(1) * 0.1, 0.0, slab, spike)


@pytest.mark.parametrize("odds", [math.inf, math.nan])
def test_infinite_odds_are_refused(odds):
    with pytest.raises(OckhamError, match="log_odds"):
        inclusion_log_odds(torch.zeros(1), 0.1, odds, 1.0)


@pytest.mark.parametrize(("case", "most"), [(0, 0.05), (1, 0.08), (2, 0.12)])
def test_expectation_propagation_is_close_to_enumeration(reference, case, most):
    c = reference("spike_slab")["linear_gaussian"][case]
    x, y = torch.tensor(c["X"], dtype=F64), torch.tensor(c["y"], dtype=F64)
    got = inclusion_correlated(x.T @ x, x.T @ y, log_odds=math.log(0.25), slab_variance=1.0)
    assert float((got.probabilities - torch.tensor(c["inclusion"], dtype=F64)).abs().max()) < most


def test_expectation_propagation_from_a_dense_posterior_is_the_same():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 5, generator=g, dtype=F64), torch.randn(30, generator=g, dtype=F64)
    covariance = torch.linalg.inv(x.T @ x + torch.eye(5, dtype=F64) / 2.0)
    h, b = likelihood_of(covariance @ x.T @ y, covariance, 2.0)
    torch.testing.assert_close(h, x.T @ x, atol=1e-9, rtol=0)
    torch.testing.assert_close(b, x.T @ y, atol=1e-9, rtol=0)


def test_expectation_propagation_is_exact_without_correlation():
    q, _ = torch.linalg.qr(torch.randn(40, 6, generator=torch.Generator().manual_seed(4), dtype=F64))
    y = 3 * q[:, 0] + torch.randn(40, generator=torch.Generator().manual_seed(5), dtype=F64)
    got = inclusion_correlated(q.T @ q, q.T @ y, log_odds=-1.0, slab_variance=3.0)
    want = exact_inclusion(
        q, y, prior_inclusion=torch.sigmoid(torch.tensor(-1.0, dtype=F64)), slab_variance=3.0, noise_variance=1.0
    )
    torch.testing.assert_close(got.probabilities, want.probabilities, atol=1e-7, rtol=0)


def test_correlation_of_columns():
    x = torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [3.0, 6.0, 0.0]], dtype=F64)
    np.testing.assert_allclose(correlation(x.T @ x), [1.0, 1.0, 0.0])


def test_unfit_matrices_are_refused():
    with pytest.raises(OckhamError, match=r"\[p, p\]"):
        inclusion_correlated(torch.eye(3), torch.zeros(2), log_odds=0.0, slab_variance=1.0)
    with pytest.raises(OckhamError, match="finite"):
        inclusion_correlated(torch.eye(2), torch.zeros(2), log_odds=math.inf, slab_variance=1.0)
    with pytest.raises(OckhamError, match="positive definite"):
        likelihood_of(torch.zeros(2), torch.zeros(2, 2), 1.0)


def test_paired_fixed_points_maximise_the_elbo_of_every_coordinate(reference):
    from ockham.methods.spike_slab.correlated import inclusion_paired

    c = reference("spike_slab")["linear_gaussian"][1]
    x, y = torch.tensor(c["X"], dtype=F64), torch.tensor(c["y"], dtype=F64)
    want = torch.tensor(c["inclusion"], dtype=F64)
    one = inclusion_paired(x.T @ x, x.T @ y, log_odds=math.log(0.25), slab_variance=1.0)
    assert float((one.probabilities - want).abs().max()) < 0.15
    assert float(torch.corrcoef(torch.stack([one.probabilities, want]))[0, 1]) > 0.99
    c = reference("spike_slab")["linear_gaussian"][0]
    base = -0.5 * (len(c["y"]) * math.log(2 * math.pi) + float(np.square(c["y"]).sum()))
    x, y = torch.tensor(c["X"], dtype=F64), torch.tensor(c["y"], dtype=F64)
    one = inclusion_paired(x.T @ x, x.T @ y, log_odds=math.log(0.25), slab_variance=1.0)
    evidence = exact_inclusion(x, y, prior_inclusion=0.2, slab_variance=1.0, noise_variance=1.0).log_evidence
    assert -1.0 < one.elbo + base - float(evidence) < 0  # a lower bound, and close


def test_several_starts_mix_the_twins_of_a_duplicated_column():
    from ockham.methods.spike_slab.correlated import inclusion_paired

    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 1, generator=g, dtype=F64)
    x = torch.cat([x, x + 0.01 * torch.randn(40, 1, generator=g, dtype=F64)], 1)
    y = 2 * x[:, 0] + torch.randn(40, generator=g, dtype=F64)
    one = inclusion_paired(x.T @ x, x.T @ y, log_odds=-2.0, slab_variance=4.0)
    many = inclusion_paired(x.T @ x, x.T @ y, log_odds=-2.0, slab_variance=4.0, starts=20)
    rate = 1 / (1 + math.exp(2.0))
    want = exact_inclusion(x, y, prior_inclusion=rate, slab_variance=4.0, noise_variance=1.0).probabilities
    assert many.fixed_points >= 2 and many.elbo >= one.elbo - 1e-9
    assert float((many.probabilities - want).abs().max()) < 0.5 * float((one.probabilities - want).abs().max())
    with pytest.raises(OckhamError, match="starts"):
        inclusion_paired(x.T @ x, x.T @ y, log_odds=0.0, slab_variance=1.0, starts=0)
