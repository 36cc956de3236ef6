"""Kronecker precision plus prior: everything against the dense matrix."""

from __future__ import annotations

import pytest
import torch

from ockham.errors import OckhamError
from ockham.evidence import kronecker as kron
from ockham.evidence.gaussian import delta_f_dense, survivors

F64 = torch.float64
GROUPS, ROWS, COLUMNS = 2, 3, 4


def spd(groups, n, rank, generator):
    half = torch.randn(groups, n, rank, generator=generator, dtype=F64)
    return half @ half.mT


@pytest.fixture(scope="module")
def case():
    g = torch.Generator().manual_seed(3)
    a, b = spd(GROUPS, COLUMNS, 3, g), spd(GROUPS, ROWS, 2, g)  # both singular: the prior makes it proper
    mean = torch.randn(GROUPS, ROWS, COLUMNS, generator=g, dtype=F64)
    dense = torch.stack([torch.kron(b[i], a[i]) + 0.7 * torch.eye(ROWS * COLUMNS, dtype=F64) for i in range(GROUPS)])
    return kron.factorised(a, b, 0.7), mean, dense


def test_diagonals_are_those_of_the_dense_matrix(case):
    k, _, dense = case
    torch.testing.assert_close(kron.conditional_precision(k).flatten(1), dense.diagonal(dim1=1, dim2=2))
    inverse = dense.inverse()
    torch.testing.assert_close(kron.marginal_variance(k).flatten(1), inverse.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(kron.covariance(k, 1), inverse[1])
    block = inverse[1].view(ROWS, COLUMNS, ROWS, COLUMNS)[2, :, 2]
    torch.testing.assert_close(kron.row_covariance(k, 1, 2), block)


@pytest.mark.parametrize("alive", [[True, False, True, True], [False, True, False, False], [True] * 4])
def test_covariance_without_columns_is_that_of_the_conditioned_dense_matrix(case, alive):
    k, _, dense = case
    living = torch.tensor(alive)
    at = living.repeat(ROWS).nonzero().squeeze(1)
    for group in range(GROUPS):
        inner = kron.without_columns(k, group, living)
        want = dense[group][at][:, at].inverse()  # given that the others are zero, their precision is a block
        torch.testing.assert_close(kron.covariance(inner), want)
        torch.testing.assert_close(kron.marginal_variance(inner).reshape(-1), want.diagonal())


def test_row_evidence_is_the_dense_savage_dickey_of_the_row(case):
    k, mean, dense = case
    got = kron.delta_f_kronecker_rows(mean, k)
    for group in range(GROUPS):
        for row in range(ROWS):
            index = [row * COLUMNS + j for j in range(COLUMNS)]
            want = delta_f_dense(mean[group].reshape(-1), dense[group].inverse(), 1 / 0.7, index)
            assert float(got[group, row]) == pytest.approx(float(want), rel=1e-9)


@pytest.mark.parametrize("at_once", [16, 2**23])
def test_joint_evidence_is_dense_for_one_row_and_below_it_for_more(case, at_once, monkeypatch):
    monkeypatch.setattr(kron, "_AT_ONCE", at_once)
    k, mean, dense = case

    def both(keep):
        want = 0.0
        for i in range(GROUPS):
            gone = (~keep[i]).reshape(-1).nonzero().squeeze(1).tolist()
            if gone:
                want += float(delta_f_dense(mean[i].reshape(-1), dense[i].inverse(), 1 / 0.7, gone))
        return kron.delta_f_kronecker(mean, k, keep, 1e-9), want

    keep = torch.ones(GROUPS, ROWS, COLUMNS, dtype=torch.bool)
    assert kron.delta_f_kronecker(mean, k, keep) == 0.0
    keep[0, 1, [0, 2, 3]] = keep[1, 0, [1, 2]] = False
    got, want = both(keep)
    assert got == pytest.approx(want, rel=1e-9)
    for seed in range(3):
        got, want = both(mask_of(seed))
        assert got <= want + 1e-9 and got > want - 0.5 * abs(want) - 5


def test_joint_evidence_of_a_large_matrix_is_a_lower_bound_still(case, monkeypatch):
    k, mean, _ = case
    exact = [kron.delta_f_kronecker(mean, k, mask_of(seed), 1e-9) for seed in range(3)]
    monkeypatch.setattr(kron, "_AFFORDABLE", 0)
    bounds = [kron.delta_f_kronecker(mean, k, mask_of(seed), 1e-9) for seed in range(3)]
    assert all(b <= e + 1e-9 for b, e in zip(bounds, exact, strict=True)) and bounds != exact
    one = torch.ones(GROUPS, ROWS, COLUMNS, dtype=torch.bool)
    one[0, 1, 2] = False
    single = -0.5 * (mean.square() / kron.marginal_variance(k) + (0.7 * kron.marginal_variance(k)).log())
    assert kron.delta_f_kronecker(mean, k, one, 1e-9) == pytest.approx(float(single[0, 1, 2]), rel=1e-8)


def test_rows_that_the_data_never_touch_have_no_evidence():
    # factors damped by sqrt(prior), the usual shortcut, would give 1.2 nats here
    a = torch.diag(torch.tensor([3.0, 1.0], dtype=F64))[None]
    b = torch.diag(torch.tensor([5.0, 0.0], dtype=F64))[None]
    k = kron.factorised(a, b, 0.5)
    delta = kron.delta_f_kronecker_rows(torch.zeros(1, 2, 2, dtype=F64), k)
    assert float(delta[0, 1]) == 0.0 and float(delta[0, 0]) > 1


def mask_of(seed):
    return torch.rand(GROUPS, ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) < 0.6


@pytest.mark.parametrize("seed", range(4))
def test_survivors_move_to_the_dense_conditional_mean(case, seed):
    k, mean, dense = case
    keep = mask_of(seed)
    got = kron.conditional_mean(mean, k, keep)
    assert bool((got[~keep] == 0).all())
    cost = 0.0
    for i in range(GROUPS):
        gone = (~keep[i]).reshape(-1).nonzero().squeeze(1).tolist()
        covariance = dense[i].inverse()
        want, _ = survivors(mean[i].reshape(-1), covariance, gone)
        torch.testing.assert_close(got[i].reshape(-1)[keep[i].reshape(-1)], want, rtol=1e-5, atol=1e-7)
        part = mean[i].reshape(-1)[gone]
        cost += 0.5 * float(part @ torch.linalg.solve(covariance[gone][:, gone], part))
    assert kron.removal_cost(mean, k, keep) == pytest.approx(cost, rel=1e-6)


def test_conditioning_twice_is_conditioning_once(case):
    k, mean, _ = case
    first, both = mask_of(0), mask_of(0) & mask_of(1)
    once = kron.conditional_mean(mean, k, both)
    twice = kron.conditional_mean(kron.conditional_mean(mean, k, first), k, both)
    torch.testing.assert_close(once, twice, rtol=1e-5, atol=1e-7)


def test_a_flat_prior_moves_survivors_by_the_data_alone(case):
    # least squares in the metric of the data: one row, full rank
    g = torch.Generator().manual_seed(5)
    a, mean = spd(1, COLUMNS, 6, g), torch.randn(1, 1, COLUMNS, generator=g, dtype=F64)
    k = kron.factorised(a, torch.ones(1, 1, 1, dtype=F64), 50.0)
    keep = torch.tensor([[[True, False, True, True]]])
    stay = [0, 2, 3]
    want = torch.linalg.solve(a[0][stay][:, stay], a[0][stay] @ mean[0, 0])
    torch.testing.assert_close(kron.conditional_mean(mean, k, keep, 1e-12)[0, 0, stay], want, rtol=1e-5, atol=1e-8)
    assert float((kron.conditional_mean(mean, k, keep)[0, 0, stay] - want).abs().max()) > 0.05  # the prior holds them


def test_bad_factors_are_named():
    eye = torch.eye(2)[None]
    with pytest.raises(OckhamError, match="groups"):
        kron.factorised(torch.eye(2), eye, 1.0)
    with pytest.raises(OckhamError, match="not finite"):
        kron.factorised(eye * torch.inf, eye, 1.0)
    with pytest.raises(OckhamError, match="prior_precision"):
        kron.factorised(eye, eye, 0.0)
