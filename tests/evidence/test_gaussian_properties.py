"""Limits, invariances, gradients, domain and errors of the Gaussian evidence."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ockham.errors import OckhamError
from ockham.evidence.gaussian import (
    delta_f,
    delta_f_dense,
    delta_f_rows,
    expected_nll_cost,
    group_sum,
    reduced_posterior,
    survivors,
)

F64 = torch.float64
INF = math.inf
logs = st.floats(-6, 12)
some = settings(max_examples=50, deadline=None, derandomize=True)


def t(*values, dtype=F64):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-12, 1e-9, 1e-6, 1e-3, -1e-9, -1e-3])
def test_precision_close_to_prior_keeps_its_digits(gap):
    # 1/2 ln(1 + d) = d/2 - d^2/4 + d^3/6 - ..., and (1 + d) as stored
    d = ((1.0 + gap) * 3.0 - 3.0) / 3.0
    series = sum((-1) ** (k + 1) * d**k / (2 * k) for k in range(1, 8))
    assert float(delta_f(t(0.0), (1.0 + gap) * 3.0, 3.0)) == pytest.approx(series, rel=1e-13, abs=0.0)


@pytest.mark.parametrize("gap", [1e-12, 1e-8, 1e-4])
def test_reduced_prior_close_to_full_keeps_its_digits(gap):
    # to first order in P1 - P0: (P1 - P0)/2 (1/P0 - 1/P - m^2)
    p1 = 1.0 + gap
    first = 0.5 * (p1 - 1.0) * (1 - 1 / 7.0 - 0.3**2)
    assert float(delta_f(t(0.3), 7.0, 1.0, p1)) == pytest.approx(first, rel=3 * gap + 1e-13, abs=0.0)


@pytest.mark.parametrize("p1", [1e6, 1e12])
def test_a_mean_moved_almost_onto_a_narrow_prior_keeps_its_digits(p1):
    mean, _ = reduced_posterior(t(3.0), 2.0, 1.0, p1)
    assert float(mean) == pytest.approx(6.0 / (p1 + 1.0), rel=1e-14, abs=0.0)


@given(logs, logs, st.floats(-5, 5), st.floats(-3, 3))
@some
def test_reduced_equal_to_full_changes_nothing(ratio, base, z, m0):
    p0 = 10.0 ** (base / 4)
    p = p0 * 10.0**ratio
    mean = t(z / math.sqrt(p))
    assert float(delta_f(mean, p, p0, p0, m0, m0)) == 0.0
    same, precision = reduced_posterior(mean, p, p0, p0, m0, m0)
    assert float(same) == pytest.approx(float(mean), rel=1e-12, abs=1e-300)
    assert float(precision) == p


def test_spike_is_the_limit_of_narrowing_gaussians():
    args = t(0.4, -0.1, 0.0), t(9.0, 100.0, 2.0), t(1.0, 4.0, 2.0)
    spike = delta_f(*args, prior_mean=0.3, reduced_mean=0.1)
    errors = [
        float((delta_f(*args, 10.0**k, prior_mean=0.3, reduced_mean=0.1) - spike).abs().max()) for k in range(3, 13, 3)
    ]
    assert all(b < a / 500 for a, b in itertools.pairwise(errors)) and errors[-1] < 1e-9
    mean, precision = reduced_posterior(*args, INF, 0.3, 0.1)
    assert torch.equal(mean, t(0.1, 0.1, 0.1)) and bool(torch.isinf(precision).all())


@given(logs, logs, st.floats(-4, 4), st.floats(-3, 3), st.booleans())
@some
def test_units_of_the_weight_do_not_matter(ratio, narrowing, z, log_unit, spike):
    p0, c = 2.0, 10.0**log_unit
    p, p1 = p0 * 10.0**ratio, INF if spike else p0 * 10.0 ** abs(narrowing)
    mean, m0, m1 = z / math.sqrt(p), 0.2, -0.1
    one = delta_f(t(mean), p, p0, p1, m0, m1)
    other = delta_f(t(c * mean), p / c**2, p0 / c**2, p1 / c**2, c * m0, c * m1)
    size = 1 + abs(float(one)) + p * (mean - m1) ** 2 + abs(math.log(p / p0))
    assert float(one) == pytest.approx(float(other), abs=1e-11 * size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(ratio=logs, reduced=logs, base=st.floats(-3, 3), z=st.floats(-30, 30), spike=st.booleans())
@some
def test_never_nan_on_the_domain(dtype, ratio, reduced, base, z, spike):
    p0 = 10.0**base
    p = p0 * 10.0**ratio
    p1 = INF if spike else p0 * 10.0**reduced
    if not torch.tensor(p, dtype=dtype) + (torch.tensor(p1, dtype=dtype) - torch.tensor(p0, dtype=dtype)) > 0:
        return
    mean = torch.tensor([z / math.sqrt(p), 0.0], dtype=dtype)
    assert bool(torch.isfinite(delta_f(mean, p, p0, p1)).all())
    assert not any(bool(torch.isnan(v).any()) for v in reduced_posterior(mean, p, p0, p1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_corners_of_the_domain_are_not_nan(dtype):
    for p0 in (1e-20, 1.0, 1e20):
        for ratio in (1e-6, 1.0, 1e12):
            for p1 in (p0, p0 * 1e6, p0 * 1e12, INF):
                got = delta_f(torch.zeros(1, dtype=dtype), p0 * ratio, p0, p1)
                assert bool(torch.isfinite(got)), (ratio, p0, p1)


def test_wide_reduced_posterior_where_precision_is_below_prior():
    # a horseshoe-like wide prior: P < P0 is allowed as long as the reduced posterior is proper
    assert math.isfinite(float(delta_f(t(0.1), 1.0, 2.0, 1.5)))
    with pytest.raises(OckhamError, match=r"improper.*1\.0 \+ 0\.5 - 2\.0"):
        delta_f(t(0.1), 1.0, 2.0, 0.5)


@pytest.mark.parametrize("finite", [3.0, 2.0 + 1e-9, 1e8])
def test_gradients_in_all_arguments(finite):
    p1 = t(finite, finite * 2).requires_grad_()
    inputs = [v.requires_grad_() for v in (t(0.3, -0.2), t(5.0, 2.5), t(2.0, 2.0))]
    means = [v.requires_grad_() for v in (t(0.1, 0.0), t(0.0, 0.2))]
    assert torch.autograd.gradcheck(delta_f, (*inputs, p1, *means), eps=1e-7, atol=1e-5)


def test_gradients_of_the_spike_and_of_a_mixture_stay_finite():
    m, p, p0 = (v.requires_grad_() for v in (t(0.3, 0.0, 1.0), t(2.0, 2.0, 9.0), t(2.0, 1.0, 1.0)))
    assert torch.autograd.gradcheck(delta_f, (m, p, p0))
    p1 = t(INF, 5.0, INF).requires_grad_()
    delta_f(m, p, p0, p1).sum().backward()
    assert all(bool(torch.isfinite(v.grad).all()) for v in (m, p, p0, p1))


def test_mixed_reduced_precisions_equal_each_alone():
    m, p, p0 = t(0.3, -0.2, 0.1), t(5.0, 40.0, 2.0), t(1.0, 2.0, 2.0)
    mixed = delta_f(m, p, p0, t(INF, 7.0, INF), 0.1, 0.2)
    assert torch.equal(mixed[[0, 2]], delta_f(m, p, p0, INF, 0.1, 0.2)[[0, 2]])
    assert torch.equal(mixed[1], delta_f(m, p, p0, 7.0, 0.1, 0.2)[1])
    mean, precision = reduced_posterior(m, p, p0, t(INF, 7.0, INF), 0.1, 0.2)
    assert torch.equal(mean[[0, 2]], t(0.2, 0.2)) and precision.tolist() == [INF, 45.0, INF]
    assert float(mean[1]) == pytest.approx((40 * -0.2 + 7 * 0.2 - 2 * 0.1) / 45, rel=1e-14)


def test_broadcasts_and_keeps_dtype_and_arguments():
    mean = torch.zeros(2, 3)
    got = delta_f(mean, torch.full((3,), 4.0), torch.ones(2, 1))
    assert got.shape == (2, 3) and got.dtype is torch.float32 and bool((mean == 0).all())


def test_untouched_weight_is_no_evidence():
    assert float(delta_f(t(0.0), 3.0, 3.0)) == 0.0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, INF])
def test_precisions_must_be_positive_and_finite(bad):
    with pytest.raises(OckhamError, match=r"^precision must be positive and finite"):
        delta_f(t(0.1, 0.2), t(1.0, bad), 1.0)
    with pytest.raises(OckhamError, match="prior_precision must be positive and finite"):
        delta_f(t(0.1), 1.0, bad)
    with pytest.raises(OckhamError, match="prior_precision must be positive"):
        reduced_posterior(t(0.1), 1.0, bad, 2.0)


@pytest.mark.parametrize("bad", [0.0, -2.0, math.nan])
def test_reduced_precision_must_be_positive(bad):
    with pytest.raises(OckhamError, match="reduced_precision must be positive"):
        delta_f(t(0.1), 1.0, 0.5, bad)


# ------------------------------------------------------------------ dense


def test_diagonal_covariance_equals_the_elementwise_sum_with_priors_that_are_not_unit():
    m, v, v0 = t(0.3, -1.0, 0.2), t(0.1, 0.5, 0.01), t(4.0, 0.25, 9.0)
    single = delta_f(m, 1 / v, 1 / v0)
    for removed in ([0], [1, 2], [2, 0, 1]):
        got = delta_f_dense(m, torch.diag(v), v0, removed)
        assert float(got) == pytest.approx(float(single[removed].sum()), abs=1e-12)
    rows = delta_f_rows(m.unsqueeze(0), t(2.0).unsqueeze(0), torch.diag(v), v0)
    want = delta_f(m, 1 / (2 * v), 1 / v0).sum()
    assert float(rows) == pytest.approx(float(want), abs=1e-12)


def test_of_two_duplicates_either_may_go_but_not_both():
    # y = (w1 + w2) x: the exact posterior is narrow along the sum and as wide as the prior along the difference
    data = 400.0
    precision = data * torch.ones(2, 2, dtype=F64) + torch.eye(2, dtype=F64)
    covariance = torch.linalg.inv(precision)
    mean = covariance @ t(data, data)  # the sum is 1
    one, both = (float(delta_f_dense(mean, covariance, 1.0, r)) for r in ([0], [0, 1]))
    conditional = float(delta_f(mean, precision.diagonal(), 1.0)[0])
    assert 0 < one < 0.5 and both < -150 and conditional < -40
    moved, left = survivors(mean, covariance, [0])
    assert float(moved) == pytest.approx(data / (data + 1), rel=1e-9)  # the other takes over: the one-weight posterior
    assert float(left) == pytest.approx(1 / (data + 1), rel=1e-9)
    alone = float(delta_f_dense(moved, left, 1.0, [0]))
    assert one + alone == pytest.approx(both, rel=1e-9)  # one after the other, with compensation, is both at once


def test_removing_nothing_is_nothing():
    mean, covariance = t(1.0, 2.0), torch.eye(2, dtype=F64)
    assert float(delta_f_dense(mean, covariance, 1.0, [])) == 0.0
    kept, left = survivors(mean, covariance, [])
    assert torch.equal(kept, mean) and torch.equal(left, covariance)
    none, empty = survivors(mean, covariance, [0, 1])
    assert none.shape == (0,) and empty.shape == (0, 0)


@pytest.mark.parametrize("removed", [[2], [-1], [0, 0]])
def test_dense_refuses_bad_indices(removed):
    with pytest.raises(OckhamError, match=r"different indices in 0\.\.1"):
        delta_f_dense(t(1.0, 2.0), torch.eye(2, dtype=F64), 1.0, removed)


def test_dense_and_rows_refuse_shapes_and_indefinite_matrices():
    eye = torch.eye(2, dtype=F64)
    with pytest.raises(OckhamError, match=r"covariance \[n, n\]"):
        delta_f_dense(t(1.0, 2.0, 3.0), eye, 1.0, [0])
    with pytest.raises(OckhamError, match="not positive definite"):
        delta_f_dense(t(1.0, 2.0), -eye, 1.0, [0])
    with pytest.raises(OckhamError, match="not positive definite"):
        survivors(t(1.0, 2.0), torch.ones(2, 2, dtype=F64), [0, 1])
    with pytest.raises(OckhamError, match="row_covariance"):
        delta_f_rows(torch.ones(2, 3, dtype=F64), eye, eye, 1.0)
    with pytest.raises(OckhamError, match="column_covariance is not positive definite"):
        delta_f_rows(torch.ones(2, 2, dtype=F64), eye, -eye, 1.0)
    with pytest.raises(OckhamError, match="prior_variance must be positive"):
        delta_f_dense(t(1.0, 2.0), eye, 0.0, [0])


# ------------------------------------------------------------------ sums and costs


def test_group_sum_accumulates_in_float64():
    delta = torch.full((200_001,), 0.1, dtype=torch.float32)
    delta[0] = 1e8
    got = group_sum(delta, torch.zeros(200_001, dtype=torch.long), 2)
    assert got.dtype is torch.float64
    assert got.tolist() == pytest.approx([1e8 + 200_000 * float(torch.tensor(0.1)), 0.0], rel=1e-10)


def test_group_sum_over_the_filters_of_a_convolution():
    delta = torch.arange(24.0).view(3, 2, 2, 2)
    group = torch.arange(3).view(3, 1, 1, 1).expand(3, 2, 2, 2)
    assert group_sum(delta, group, 3).tolist() == [28.0, 92.0, 156.0]


def test_expected_nll_cost_is_what_a_quadratic_loss_loses():
    # N (E_q[nll] at w = 0 minus before) for nll = (P - P0)/2 (w - w*)^2 / N, P mean = (P - P0) w*
    p, p0, m, n = 9.0, 2.0, 0.5, 50.0
    star = p * m / (p - p0)
    loss = lambda second, first: 0.5 * (p - p0) * (second - 2 * star * first + star**2) / n  # noqa: E731
    want = loss(0.0, 0.0) - loss(m * m + 1 / p, m)
    assert float(expected_nll_cost(t(m), p, p0, n)) == pytest.approx(want, rel=1e-12)
