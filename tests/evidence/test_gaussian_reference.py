"""delta_f and its relatives against 50-digit values, quadrature and plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import torch

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
