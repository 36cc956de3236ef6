"""delta_f and its relatives against 50-digit values, quadrature and plain numpy."""

from __future__ import annotations

import math
import random

import mpmath
import numpy as np
import pytest
import scipy.integrate
import torch

from ockham.errors import OckhamError
from ockham.evidence import gaussian
from ockham.evidence.gaussian import delta_f, delta_f_dense, delta_f_rows, reduced_posterior, survivors

DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-4)]
FIELDS = ("mean", "precision", "prior_precision", "reduced_precision", "prior_mean", "reduced_mean")


def scale(case):
    m, p, p0 = (float(case[k]) for k in ("mean", "precision", "prior_precision"))
    return 0.5 * abs(math.log(p / p0)) + 0.5 * p * m * m + 1


def column(cases, field, dtype):
    return torch.tensor([float(c[field]) for c in cases], dtype=dtype)


def normal(x, mean, precision):
    return np.sqrt(precision / (2 * np.pi)) * np.exp(-0.5 * precision * (x - mean) ** 2)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_narrower_prior_against_reference(reference, dtype, tolerance):
    cases = reference("gaussian")["diagonal"]
    got = delta_f(*(column(cases, f, dtype) for f in FIELDS))
    assert got.dtype is dtype
    for case, value in zip(cases, got.tolist(), strict=True):
        assert abs(value - float(case["delta_f"])) <= tolerance * scale(case), case


def documented_scale(m, p, p0, p1, m0, m1):
    """What the rounding error is stated in, with 60 digits (module docstring of `ockham.evidence.gaussian`)."""
    pt, away, shift = p + p1 - p0, abs(m1 - m), abs(m1 - m0)
    quadratic = p * abs(p1 - p0) * away**2 + p0 * shift * (p * (away + abs(m0 - m)) + p1 * shift)
    return abs(mpmath.log(p / p0)) / 2 + abs(mpmath.log(p1 / pt)) / 2 + quadratic / pt / 2 + 1


def exact(m, p, p0, p1, m0, m1):
    pt = p + p1 - p0
    quadratic = p * (p1 * (m1 - m) ** 2 - p0 * (m0 - m) ** 2) - p0 * p1 * (m1 - m0) ** 2
    return mpmath.log(p * p1 / (p0 * pt)) / 2 - quadratic / pt / 2


def random_case(rng, wider):
    p0 = 10 ** rng.uniform(-3, 3)
    p = p0 * 10 ** rng.uniform(-1, 4)
    p1 = p0 * (1 - 10 ** rng.uniform(-12, 0)) if wider else p0 * 10 ** rng.uniform(0, 6)
    if wider and rng.random() < 0.4:
        p = (p0 - p1) * (1 + 10 ** rng.uniform(-12, 0))  # hardly any precision is left
    means = (rng.gauss(0, 1) * p0**-0.5 * 10 ** rng.uniform(-2, 0.5) if rng.random() < 0.5 else 0.0 for _ in range(2))
    return (rng.gauss(0, 3) * p**-0.5, p, p0, p1, *means)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("wider", [False, True])
def test_the_documented_error_holds_against_60_digits(dtype, wider):
    rng = random.Random(1)
    rows = torch.tensor([random_case(rng, wider) for _ in range(1500)], dtype=torch.float64).to(dtype)
    with mpmath.workdps(60):
        cases = [[mpmath.mpf(v) for v in row] for row in rows.double().tolist()]
        proper = [c[1] + c[3] - c[2] > 0 and c[3] > 0 for c in cases]
        cases = [c for c, fits in zip(cases, proper, strict=True) if fits]
        got = delta_f(*rows[torch.tensor(proper)].T).double().tolist()
        errors = [abs(g - exact(*c)) / documented_scale(*c) for g, c in zip(got, cases, strict=True)]
    assert len(errors) > 1000 and float(max(errors)) < 4 * torch.finfo(dtype).eps


def test_the_domain_is_decided_by_the_sum_without_loss():
    p0, p1 = 282.0260620117187500, 0.1158475279808044
    low, high = torch.tensor([281.910217285156, 281.91], dtype=torch.float64)  # just inside of it, just outside
    assert math.isfinite(float(delta_f(torch.zeros((), dtype=torch.float64), low, p0, p1)))
    with pytest.raises(OckhamError, match="improper"):
        delta_f(torch.zeros((), dtype=torch.float64), high, p0, p1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pieces_are_the_elementwise_formula(dtype, monkeypatch):
    """Odd sizes, precisions far below and far above the prior, a spike elsewhere: as each element by itself."""
    g = torch.Generator().manual_seed(0)
    m, p = torch.randn(3, 37, generator=g).to(dtype), (10 ** (8 * torch.rand(3, 37, generator=g) - 4)).to(dtype)
    monkeypatch.setattr(gaussian, "_AT_ONCE", 7)
    for more in ({}, {"prior_mean": 0.3, "reduced_mean": -0.2}, {"reduced_mean": torch.linspace(0, 1, 37).to(dtype)}):
        got = delta_f(m, p, 0.7, **more)
        with mpmath.workdps(40):
            for at in range(0, 111, 5):
                values = [mpmath.mpf(float(t.expand(3, 37).reshape(-1)[at])) for t in (m, p)]
                m0, m1 = (
                    mpmath.mpf(float(torch.as_tensor(more.get(k, 0.0), dtype=dtype).expand(3, 37).reshape(-1)[at]))
                    for k in ("prior_mean", "reduced_mean")
                )
                p0 = mpmath.mpf(float(torch.tensor(0.7, dtype=dtype)))
                want = mpmath.log(values[1] / p0) / 2 - values[1] * (values[0] - m1) ** 2 / 2 + p0 * (m1 - m0) ** 2 / 2
                size = (
                    1
                    + abs(mpmath.log(values[1] / p0)) / 2
                    + values[1] * (values[0] - m1) ** 2 / 2
                    + p0 * (m1 - m0) ** 2
                )
                assert abs(float(got.reshape(-1)[at]) - want) < 4 * torch.finfo(dtype).eps * size
    with pytest.raises(OckhamError, match="precision must be positive"):
        delta_f(m, p.index_fill(1, torch.tensor([30]), 0.0), 0.7)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_spike_against_reference(reference, dtype, tolerance):
    cases = reference("gaussian")["diagonal"]
    m, p, p0 = (column(cases, f, dtype) for f in FIELDS[:3])
    got = delta_f(m, p, p0, prior_mean=column(cases, "prior_mean", dtype))
    for case, value in zip(cases, got.tolist(), strict=True):
        assert abs(value - float(case["spike_delta_f"])) <= tolerance * scale(case), case


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_reduced_posterior_against_reference(reference, dtype, tolerance):
    cases = reference("gaussian")["diagonal"]
    mean, precision = reduced_posterior(*(column(cases, f, dtype) for f in FIELDS))
    want_mean, want_precision = (column(cases, f"reduced_posterior_{k}", torch.float64) for k in ("mean", "precision"))
    assert (precision.double() / want_precision - 1).abs().max() <= tolerance
    spread = want_precision.rsqrt() + want_mean.abs()  # rounding of the inputs moves the mean by parts of these
    inputs = torch.stack([column(cases, f, torch.float64).abs() for f in ("prior_mean", "reduced_mean")]).amax(0)
    assert ((mean.double() - want_mean).abs() / (spread + inputs)).max() <= tolerance


@pytest.mark.parametrize(
    ("m", "p", "p0", "p1", "m0", "m1"),
    [(0.3, 4.0, 1.0, 9.0, 0.0, 0.0), (-1.0, 2.5, 0.1, 0.7, 0.4, -0.2), (2.0, 50.0, 1.0, 1.0, -0.5, 0.5)],
)
def test_narrower_prior_against_quadrature(m, p, p0, p1, m0, m1):
    # ln E_q[p1 / p0], no closed form: the definition of the evidence change
    f = lambda w: normal(w, m, p) * normal(w, m1, p1) / normal(w, m0, p0)  # noqa: E731
    exact = math.log(scipy.integrate.quad(f, -30, 30, points=(m, m1), epsabs=1e-14, epsrel=1e-12, limit=400)[0])
    got = delta_f(torch.tensor(m, dtype=torch.float64), p, p0, p1, m0, m1)
    assert float(got) == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize(("p0", "p1"), [(3.0, 1.0), (1.0, 0.2)])
def test_wider_prior_inside_the_domain_against_quadrature(p0, p1):
    f = lambda w: normal(w, 0.4, 5.0) * normal(w, 0.1, p1) / normal(w, -0.3, p0)  # noqa: E731
    exact = math.log(scipy.integrate.quad(f, -20, 20, epsabs=1e-14, epsrel=1e-12, limit=400)[0])
    got = delta_f(torch.tensor(0.4, dtype=torch.float64), 5.0, p0, p1, -0.3, 0.1)
    assert float(got) == pytest.approx(exact, abs=1e-9)


def test_spike_is_the_density_ratio_at_its_place():
    got = delta_f(torch.tensor(0.7, dtype=torch.float64), 6.0, 0.5, prior_mean=0.2, reduced_mean=-0.4)
    assert float(got) == pytest.approx(math.log(normal(-0.4, 0.7, 6.0) / normal(-0.4, 0.2, 0.5)), abs=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_dense_against_reference(reference, dtype, tolerance):
    for case in reference("gaussian")["dense"]:
        mean, covariance, v0 = (torch.tensor(case[k], dtype=dtype) for k in ("mean", "covariance", "prior_variance"))
        exact = float(case["spike_delta_f"])
        got = delta_f_dense(mean, covariance, v0, case["removed"])
        assert got.shape == ()
        assert float(got) == pytest.approx(exact, abs=10 * tolerance * (1 + abs(exact)))
        moved, _ = survivors(mean, covariance, case["removed"])
        assert moved.tolist() == pytest.approx([float(x) for x in case["survivors_mean"]], abs=20 * tolerance)


def test_dense_and_survivors_against_numpy():
    rng = np.random.default_rng(3)
    a, mean, v0 = rng.normal(size=(6, 6)), rng.normal(size=6), rng.uniform(0.5, 4, 6)
    covariance, gone, rest = a @ a.T + 0.1 * np.eye(6), [4, 0], [1, 2, 3, 5]
    c = covariance[np.ix_(gone, gone)]
    exact = (
        0.5 * np.log(v0[gone]).sum() - 0.5 * np.linalg.slogdet(c)[1] - 0.5 * mean[gone] @ np.linalg.inv(c) @ mean[gone]
    )
    args = torch.from_numpy(mean), torch.from_numpy(covariance)
    assert float(delta_f_dense(*args, torch.from_numpy(v0), gone)) == pytest.approx(exact, abs=1e-11)
    moved, left = survivors(*args, gone)
    gain = covariance[np.ix_(rest, gone)] @ np.linalg.inv(c)
    np.testing.assert_allclose(moved, mean[rest] - gain @ mean[gone], atol=1e-11)
    np.testing.assert_allclose(left, covariance[np.ix_(rest, rest)] - gain @ covariance[np.ix_(gone, rest)], atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_rows_against_reference(reference, dtype, tolerance):
    names = ("mean", "row_covariance", "column_covariance", "prior_variance")
    for case in reference("gaussian")["matrix_normal"]:
        got = delta_f_rows(*(torch.tensor(case[k], dtype=dtype) for k in names))
        want = [float(x) for x in case["spike_delta_f_per_row"]]
        assert got.tolist() == pytest.approx(want, rel=10 * tolerance, abs=10 * tolerance)


def test_rows_equal_dense_on_the_kronecker_product():
    g = torch.Generator().manual_seed(1)
    a, b, m = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((3, 3), (4, 4), (3, 4)))
    u, v = a @ a.T + torch.eye(3), b @ b.T + torch.eye(4)
    v0 = 0.5 + torch.rand(3, 4, generator=g, dtype=torch.float64)
    got = delta_f_rows(m, u, v, v0)
    for r in range(3):
        want = delta_f_dense(m.reshape(-1), torch.kron(u, v), v0.reshape(-1), range(4 * r, 4 * r + 4))
        assert float(got[r]) == pytest.approx(float(want), abs=1e-11)
