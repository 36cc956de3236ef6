"""Log-normal gates against 50-digit values, quadrature, finite differences and the distribution itself."""

from __future__ import annotations

import functools
import math

import mpmath
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from ockham.errors import OckhamError
from ockham.evidence.special import log_mills, log_scaled_mass
from ockham.methods.gates import lognormal

F64 = torch.float64
SCORES = {
    "mean_theta": lambda m, s: lognormal.moment(m, s, 1),
    "second_moment_theta": lambda m, s: lognormal.moment(m, s, 2),
    "delta_f_n": lognormal.delta_f_n,
    "savage_dickey": lognormal.delta_f_spike,
    "delta_f_u8": lambda m, s: lognormal.delta_f_u(m, s, 8),
    "delta_f_u4": lambda m, s: lognormal.delta_f_u(m, s, 4),
    "delta_f_u8_from_a": lambda m, s: lognormal.delta_f_u(m, s, 8, reduced_low=-20.0),
}
DIFFERENTIABLE = {
    "kl": lognormal.kl,
    "mean": lambda m, s: lognormal.log_moment(m, s, 1),
    "snr": lambda m, s: lognormal.snr(m, s).log(),
    "n": lognormal.delta_f_n,
    "spike": lognormal.delta_f_spike,
    "u8": lambda m, s: lognormal.delta_f_u(m, s, 8),
}


def t(*values):
    return torch.tensor(values, dtype=F64)


def cases(reference, dtype=F64):
    rows = reference("lognormal")["cases"]
    columns = {k: torch.tensor([float(r[k]) for r in rows], dtype=F64) for k in rows[0]}
    return columns["mean"].to(dtype), columns["std"].to(dtype), columns


def box():
    """The box of means and stds, its edges included."""
    means = torch.tensor([-25.0, -22, -20, -19.99, -14, -7, -1, -1e-3, 0, 1e-3, 0.5, 5], dtype=F64)
    stds = torch.linspace(-8, 5, 14, dtype=F64).exp()
    mean, std = torch.meshgrid(means, stds, indexing="ij")
    return mean.reshape(-1), std.reshape(-1)


def differences(function, mean, std):
    """Central differences in (mean, ln std), Richardson-extrapolated, steps small beside the scale of change."""
    out = []
    for dm, ds in ((1.0, 0.0), (0.0, 1.0)):
        step = 2e-4 * torch.minimum(std, torch.ones_like(std)) if dm else torch.full_like(std, 2e-4)

        def central(h, dm=dm, ds=ds):
            return (function(mean + dm * h, std * (ds * h).exp()) - function(mean - dm * h, std * (-ds * h).exp())) / (
                2 * h
            )

        out.append((4 * central(step / 2) - central(step)) / 3)
    return out


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("name", SCORES)
def test_scores_against_reference(reference, name):
    mean, std, columns = cases(reference)
    got = SCORES[name](mean, std)
    assert ((got - columns[name]) / columns[name]).abs().max() <= 1e-9
    single = SCORES[name](mean.float(), std.float())
    assert single.dtype is torch.float32
    inside = columns[name].abs() > 1e-37
    scale = columns[name].abs() + (1e-2 if name.startswith(("delta", "savage")) else 0)
    assert (((single - columns[name]) / scale).abs()[inside]).max() <= 2e-4  # float32 means alone move them that much


@pytest.mark.parametrize("name", ["kl", "snr"])
def test_kl_and_snr_against_reference(reference, name):
    mean, std, columns = cases(reference)
    got = getattr(lognormal, name)(mean, std)
    assert ((got - columns[name]) / columns[name]).abs().max() <= 1e-7
    single = getattr(lognormal, name)(mean.float(), std.float())
    assert ((single - columns[name]) / columns[name]).abs().max() <= 2e-4


def quadrature(mean, std, low, high):
    """Moments and KL of the cut-off normal by adaptive quadrature of its definition."""
    points = [p for p in (mean - 5 * std, mean, mean + 5 * std) if low < p < high]
    density = lambda y: math.exp(-0.5 * ((y - mean) / std) ** 2)  # noqa: E731

    def integral(f):
        return scipy.integrate.quad(f, low, high, points=points or None, epsabs=1e-14, epsrel=1e-10, limit=400)[0]

    mass = integral(density)
    q = lambda y: density(y) / mass  # noqa: E731
    first, second = (integral(lambda y, k=k: q(y) * math.exp(k * y)) for k in (1, 2))
    kl = integral(lambda y: q(y) * math.log(q(y) * (high - low)) if q(y) > 0 else 0.0)
    return first, second, kl


@pytest.mark.parametrize(("low", "high"), [(-20.0, 0.0), (-3.0, 1.0)])
@pytest.mark.parametrize(("mean", "std"), [(-1.0, 0.5), (-2.5, 4.0), (3.0, 0.7), (-9.0, 2.0), (0.2, 30.0)])
def test_moments_and_kl_against_quadrature(mean, std, low, high):
    if mean < low:
        mean = low - 1
    first, second, kl = quadrature(mean, std, low, high)
    given = {"low": low, "high": high}
    assert float(lognormal.moment(t(mean), t(std), 1, **given)) == pytest.approx(first, rel=1e-9)
    assert float(lognormal.moment(t(mean), t(std), 2, **given)) == pytest.approx(second, rel=1e-9)
    assert float(lognormal.kl(t(mean), t(std), **given)) == pytest.approx(kl, rel=1e-7, abs=1e-10)
    assert float(lognormal.snr(t(mean), t(std), **given)) == pytest.approx(
        first / math.sqrt(second - first**2), rel=1e-7
    )


def test_negative_and_fractional_orders_are_moments_too():
    exact = (
        scipy.integrate.quad(lambda y: math.exp(-0.5 * y - 0.5 * (y + 2) ** 2), -20, 0)[0]
        / scipy.integrate.quad(lambda y: math.exp(-0.5 * (y + 2) ** 2), -20, 0)[0]
    )
    assert float(lognormal.moment(t(-2.0), t(1.0), -0.5)) == pytest.approx(exact, rel=1e-9)
    assert float(lognormal.moment(t(-2.0), t(1.0), 0)) == 1.0


def test_the_true_delta_f_n_is_a_difference_of_evidences():
    # ln E_q[p~ / p], the definition, with a reduced prior wide enough for quadrature
    low, high, m, s, w = -4.0, 0.0, -2.0, 1.5, 0.3
    cut = lambda x, mu, sd: scipy.stats.truncnorm.pdf(x, (low - mu) / sd, (high - mu) / sd, mu, sd)  # noqa: E731
    exact = scipy.integrate.quad(lambda y: cut(y, m, s) * cut(y, low, w) * (high - low), low, high, epsrel=1e-12)[0]
    got = lognormal.delta_f_n(t(m), t(s), reduced_std=w, low=low, high=high)
    assert float(got) == pytest.approx(math.log(exact), abs=1e-10)


def test_the_spike_is_the_limit_and_the_density_ratio():
    mean, std = t(-3.0, -14.0, -1.0, -21.0), t(2.0, 9.0, 30.0, 0.4)
    spike = lognormal.delta_f_spike(mean, std)
    density = scipy.stats.truncnorm.logpdf(
        -20, (-20 - mean.numpy()) / std.numpy(), -mean.numpy() / std.numpy(), mean.numpy(), std.numpy()
    )
    np.testing.assert_allclose(spike, density + math.log(20), rtol=1e-9)
    narrow = lognormal.delta_f_n(mean, std, reduced_std=1e-10)
    assert (narrow - spike).abs().max() < 1e-7


def test_delta_f_u_is_the_mass_on_the_reduced_interval():
    mean, std, low, high = -6.0, 2.5, -23 * math.log(2), -4 * math.log(2)
    q = scipy.stats.truncnorm((-20 - mean) / std, -mean / std, mean, std)
    exact = math.log((q.cdf(high) - q.cdf(low)) * 20 / (high - low))
    assert float(lognormal.delta_f_u(t(mean), t(std), 4)) == pytest.approx(exact, rel=1e-10)


def test_a_posterior_equal_to_the_prior_is_no_evidence():
    mean, std = t(-10.0), t(1e6)
    assert 0 <= float(lognormal.kl(mean, std)) < 1e-20
    assert abs(float(lognormal.delta_f_n(mean, std))) < 1e-9
    assert float(lognormal.snr(mean, std)) == pytest.approx(1 / 3, abs=1e-6)


def test_collapsed_gates_have_a_true_delta_f_below_zero_and_a_released_score_above():
    # collapsed units of trained runs sit near mean -1, std 20 to 60 (math: 2.1)
    score = lognormal.delta_f_n(torch.full((41,), -1.0, dtype=F64), torch.linspace(20, 60, 41, dtype=F64))
    assert bool((score < 0).all()) and bool((score + 0.5 * math.log(2 * math.pi) > 0).all())


def test_far_outside_everything_is_finite_and_positive():
    mean, std = torch.meshgrid(t(-1e6, -300, -26, 6, 300, 1e6), t(1e-8, 1e-3, 0.1, 10, 1e3, 1e5), indexing="ij")
    for dtype in (F64, torch.float32):
        m, s = mean.to(dtype).requires_grad_(), std.to(dtype).requires_grad_()
        for function in (lognormal.kl, lognormal.snr, lambda a, b: lognormal.moment(a, b, 1)):
            value = function(m, s)
            assert bool((torch.isfinite(value) & (value > 0)).all())
            assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(value.log().sum(), (m, s)))


def test_the_whole_box_against_sixty_digits():
    """Random places and the edges, scores and both tails, and float32 wherever float64 is finite."""
    rng = np.random.default_rng(5)
    places = [(rng.uniform(-25, 5), math.exp(rng.uniform(-8, 5))) for _ in range(150)]
    places += [(m, math.exp(s)) for m in (-25.0, -20.0, -19.999, -1e-4, 0.0, 5.0) for s in np.linspace(-8, 5, 9)]
    columns = [exact(m, s) for m, s in places]
    mean, std = (t(*values) for values in zip(*places, strict=True))
    inside = (mean >= -20) & (mean <= 0)
    for name in columns[0]:
        function = SCORES.get(name) or getattr(lognormal, name)
        want, got = t(*(c[name] for c in columns)), function(mean, std)
        error = ((got - want) / want).abs()
        if name in ("kl", "snr"):
            assert float(error[inside].max()) <= 1e-6 and float(error.max()) <= 1e-2, name
            assert bool((got > 0).all())
        else:
            assert float(error[want.abs() > 1e-300].max()) <= 1e-8, name
        single = function(mean.float(), std.float()).double()
        loss = (single - want).abs() / (want.abs() + 1e-2)
        assert float(loss[(want.abs() > 1e-37) & (want.abs() < 1e38)].max()) <= 2e-3, name
        assert bool(torch.isfinite(single[want.abs() < 1e38]).all()), name


def exact(mean, std):
    """Plain formulas in 60 digits; names of `SCORES`, kl and snr."""
    with mpmath.workdps(60):
        m, s, a, b = (mpmath.mpf(v) for v in (mean, std, -20, 0))
        mass = functools.partial(_mass, m, s)
        alpha, beta, z = (a - m) / s, (b - m) / s, mass(a, b)
        ends = alpha * mpmath.npdf(alpha) - beta * mpmath.npdf(beta)
        first, second = (mpmath.exp(k * m + k * k * s * s / 2) * _mass(m + k * s * s, s, a, b) / z for k in (1, 2))
        v = s * s + mpmath.mpf("1e-12")
        reduced = _mass((m * mpmath.mpf("1e-12") + a * s * s) / v, s * mpmath.mpf("1e-6") / mpmath.sqrt(v), a, b)
        found = {
            "kl": mpmath.log((b - a) / (s * z)) - mpmath.log(2 * mpmath.pi * mpmath.e) / 2 - ends / (2 * z),
            "snr": 1 / mpmath.sqrt(second / first**2 - 1),
            "mean_theta": first,
            "delta_f_n": mpmath.log((b - a) * mpmath.npdf(m, a, mpmath.sqrt(v)) * reduced / z * 2),
        }
        for bits in (8, 4):
            low, high = -23 * mpmath.log(2), -bits * mpmath.log(2)
            found[f"delta_f_u{bits}"] = mpmath.log((b - a) / (high - low) * mass(low, high) / z)
        return {k: float(value) for k, value in found.items()}


def _mass(mean, std, low, high):
    """Probability of [low, high], from the tail in which it does not cancel."""
    ends = [(x - mean) / std / mpmath.sqrt(2) for x in (low, high)]
    if ends[0] < 0:
        ends = [-ends[1], -ends[0]]
    return (mpmath.erfc(ends[0]) - mpmath.erfc(ends[1])) / 2


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_against_differences(name):
    function = DIFFERENTIABLE[name]
    mean, std = box()
    m, s = mean.clone().requires_grad_(), std.clone().requires_grad_()
    value = function(m, s)
    by_mean, by_std = torch.autograd.grad(value.sum(), (m, s))
    assert bool(torch.isfinite(by_mean).all()) and bool(torch.isfinite(by_std).all())
    want_mean, want_log = differences(function, mean, std)
    # differences of numbers of this size lose digits; beyond that they must agree
    noise = (3e-8 if name == "snr" else 1e-11) * (value.detach().abs() + 1)
    for got, want, step in ((by_mean, want_mean, 2e-4 * std.clamp_max(1)), (by_std * std, want_log, 2e-4)):
        assert ((got - want).abs() <= 2e-5 * want.abs() + noise / step + 1e-7).all(), name


@pytest.mark.parametrize("x", [0.0, 0.5, 3.0, 24.9, 25.1, 300.0, 1e5, 1e10])
def test_the_derivative_of_mills_ratio(x):
    argument = t(x).requires_grad_()
    (got,) = torch.autograd.grad(log_mills(argument).sum(), argument)
    # -d ln R = 1/R - x is the mean of an exponentially tilted half-normal: a continued fraction
    fraction = x
    for k in range(400, 0, -1):
        fraction = x + k / fraction if fraction else float(k)
    exact = x - math.sqrt(2 / math.pi) if x == 0 else -1 / (x + 2 / (x + 3 / (x + 4 / fraction))) if x > 20 else None
    if exact is None:
        exact = x - math.exp(-float(log_mills(t(x))))
    assert float(got) == pytest.approx(exact, rel=1e-5 if x > 20 else 1e-12)


def test_log_mass_in_a_far_narrow_interval():
    # phi is constant across it: ln[phi(n) width] + n^2/2
    assert float(log_scaled_mass(t(30.0), t(30.0 + 1e-9))) == pytest.approx(
        math.log(1e-9) - 0.5 * math.log(2 * math.pi), rel=1e-7
    )


# ------------------------------------------------------------------ samples


def test_samples_are_quantiles():
    mean, std = box()
    uniform = torch.tensor([1e-6, 0.01, 0.3, 0.5, 0.9, 1 - 1e-6], dtype=F64)
    y = lognormal.sample(mean.unsqueeze(1), std.unsqueeze(1), uniform).log()
    assert bool((y >= -20 - 1e-12).all()) and bool((y <= 1e-12).all())
    for m, s, row in zip(mean.tolist(), std.tolist(), y.numpy(), strict=True):
        alpha, beta = (-20 - m) / s, -m / s
        near = max(alpha, -beta)
        if near > 30:  # the mode is far outside: an exponential with the rate of the nearer end, to 1/near^2
            fall = -np.log1p(-(uniform.numpy() if alpha > 0 else 1 - uniform.numpy())) * s / near
            np.testing.assert_allclose(row, np.clip(-20 + fall if alpha > 0 else -fall, -20, 0), rtol=2e-2, atol=1e-9)
            continue
        side = -1 if alpha > 0 else 1  # probabilities of the tail that is not lost in 1 - p
        ends = [scipy.stats.norm.logcdf(side * e) for e in (alpha, beta)]
        shares = [
            np.exp(scipy.stats.norm.logcdf(side * (row - m) / s) - max(ends)),
            *(math.exp(e - max(ends)) for e in ends),
        ]
        found = (shares[0] - shares[1]) / (shares[2] - shares[1])
        np.testing.assert_allclose(found, uniform.numpy(), atol=2e-6 if s < 1e-2 else 1e-8)


def test_float32_samples_have_the_moments():
    mean, std = torch.tensor([-0.5, -3.0, 0.3, -21.0, 4.0]), torch.tensor([0.3, 5.0, 0.05, 0.5, 0.1])
    uniform = torch.rand(200_000, 5, generator=torch.Generator().manual_seed(0))
    theta = lognormal.sample(mean, std, uniform)
    assert theta.dtype is torch.float32
    exact = lognormal.moment(mean, std, 1)
    error = (theta.double().mean(0) / exact - 1).abs() / (1 / lognormal.snr(mean, std)) * 200_000**0.5
    assert float(error.max()) < 4  # standard errors


def test_sample_gradients_against_differences():
    mean, std = box()
    uniform = torch.rand(mean.shape, generator=torch.Generator().manual_seed(1), dtype=F64) * 0.98 + 0.01
    log = lambda m, s: lognormal.sample(m, s, uniform).log()  # noqa: E731
    m, s = mean.clone().requires_grad_(), std.clone().requires_grad_()
    by_mean, by_std = torch.autograd.grad(log(m, s).sum(), (m, s))
    want_mean, want_log = differences(log, mean, std)
    assert ((by_mean - want_mean).abs() <= 1e-5 * want_mean.abs() + 1e-6 + 1e-10 / std).all()
    assert ((by_std * std - want_log).abs() <= 1e-5 * want_log.abs() + 1e-6 * std.clamp_max(1) + 5e-8).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_sample_gradients_are_finite_at_the_ends(dtype):
    mean, std = (v.to(dtype).unsqueeze(1).requires_grad_() for v in box())
    uniform = torch.tensor([0.0, 1e-7, 1 - 1e-7, 1.0], dtype=dtype)
    theta = lognormal.sample(mean, std, uniform)
    grads = torch.autograd.grad(theta.sum(), (mean, std))
    assert bool(torch.isfinite(theta).all()) and all(bool(torch.isfinite(g).all()) for g in grads)
    assert grads[0].shape == mean.shape and grads[0].dtype is dtype


# ------------------------------------------------------------------ arguments


def test_broadcasts_and_changes_nothing():
    mean, std = torch.zeros(2, 3), torch.full((3,), 0.5)
    assert lognormal.kl(mean, std).shape == (2, 3)
    assert lognormal.delta_f_u(mean, std, 8).shape == (2, 3)
    assert bool((mean == 0).all()) and bool((std == 0.5).all())


def test_blocks_change_nothing():
    mean, std = torch.rand(70_000, dtype=F64) * 30 - 25, torch.rand(70_000, dtype=F64) + 0.1
    whole = lognormal.delta_f_n(mean.requires_grad_(), std).detach()
    with torch.no_grad():
        assert torch.equal(lognormal.delta_f_n(mean, std), whole)


@pytest.mark.parametrize("function", [lognormal.kl, lognormal.snr, lognormal.delta_f_n, lognormal.delta_f_spike])
def test_bad_arguments_are_named(function):
    with pytest.raises(OckhamError, match="std must be positive; smallest is -1"):
        function(t(0.0), t(-1.0))
    with pytest.raises(OckhamError, match=r"the interval \[low, high\]"):
        function(t(0.0), t(1.0), low=1.0, high=0.0)


def test_bad_reduced_priors_are_named():
    for given in ({"bits": 30}, {"bits": 0, "high": -1.0}, {"bits": 8, "reduced_low": -21.0}):
        with pytest.raises(OckhamError, match="the reduced prior"):
            functools.partial(lognormal.delta_f_u, t(0.0), t(1.0))(**given)
    with pytest.raises(OckhamError, match="std must be positive"):
        lognormal.delta_f_n(t(0.0), t(1.0), reduced_std=0.0)
