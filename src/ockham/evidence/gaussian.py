"""Change of log evidence for Gaussian posteriors (generalised Savage-Dickey ratio).

Conventions: ``delta_f = ln p(D | reduced) - ln p(D | full)`` in nats, positive favours removal. The posterior of a
weight is N(mean, 1/precision), its prior N(prior_mean, 1/prior_precision), the reduced prior N(reduced_mean,
1/reduced_precision); ``reduced_precision = inf`` is the spike, its own case and not a very narrow Gaussian.

Domain: all precisions positive and finite (``reduced_precision`` may be inf), and
``precision + reduced_precision - prior_precision > 0``; outside it an `OckhamError` is raised, inside it nothing is
NaN. Rounding, with Pt = P + P1 - P0 summed without loss: the error of ``delta_f`` is at most four units in the last
place (1.2e-7 in float32, 2.2e-16 in float64) of

    1/2 |ln P/P0| + 1/2 |ln P1/Pt| + 1/2 P |P1 - P0| (m1 - m)^2 / Pt + 1

plus, where priors have means, 1/2 P0 |m1 - m0| (P (|m1 - m| + |m0 - m|) + P1 |m1 - m0|) / Pt. For zero means and a
reduced prior that is not wider than the full one (the spike included) that is never more than twice
``1/2 |ln P/P0| + 1/2 P mean^2 + 1``. For a wider one it can be large: as Pt -> 0 the result itself diverges.

Reference: Friston & Penny, Post hoc Bayesian model selection, NeuroImage 2011, eqs 8-11; Markovic, Friston & Kiebel,
Bayesian sparsification of deep neural networks with Bayesian model reduction, 2023, arXiv 2309.12095, eqs 9-12.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ockham.errors import OckhamError

__all__ = [
    "beta_log_odds",
    "beta_log_odds_published",
    "delta_f",
    "delta_f_dense",
    "delta_f_rows",
    "expected_nll_cost",
    "group_sum",
    "reduced_posterior",
    "remove_by_log_odds",
    "survivors",
]


Real = Tensor | float


def delta_f(
    mean: Tensor,
    precision: Real,
    prior_precision: Real,
    reduced_precision: Real = math.inf,
    prior_mean: Real = 0.0,
    reduced_mean: Real = 0.0,
) -> Tensor:
    r"""Log evidence change, elementwise, when the prior of each weight is replaced by a reduced one.

    With P = precision, P0 = prior_precision, P1 = reduced_precision, Pt = P + P1 - P0 and m, m0, m1 the means:

        delta_f = 1/2 ln[ P P1 / (P0 Pt) ] - 1/2 [ P (P1 (m1-m)^2 - P0 (m0-m)^2) - P0 P1 (m1-m0)^2 ] / Pt
        spike:    1/2 ln[ P / P0 ] - 1/2 P (m-m1)^2 + 1/2 P0 (m1-m0)^2

    Args:
        mean: posterior means, any shape.
        precision: posterior precisions, broadcastable to ``mean``.
        prior_precision: precision of the full prior, broadcastable.
        reduced_precision: precision of the reduced prior; ``inf`` (the default, or single elements) is the spike.
        prior_mean: mean of the full prior.
        reduced_mean: mean of the reduced prior, or the place of the spike.

    Returns:
        Tensor of the broadcast shape, dtype and device of ``mean``; nats, positive favours the reduced prior.

    Raises:
        OckhamError: a precision is not positive and finite, or the reduced posterior would be improper.

    Reference: arXiv 2309.12095 eq. 10; the spike is Savage-Dickey, ln q(m1) - ln p(m1).

    >>> delta_f(torch.tensor([0.0, 0.5]), torch.tensor([100.0, 100.0]), 1.0)
    tensor([  2.3026, -10.1974])
    """
    others = (precision, prior_precision, reduced_precision, prior_mean, reduced_mean)
    values = [mean, *(_as(v, mean) for v in others)]
    if torch.is_grad_enabled() and any(v.requires_grad for v in values):
        return _elementwise(*torch.broadcast_tensors(*values))
    shape = torch.broadcast_shapes(*(v.shape for v in values))
    m, p, *rest = (v.reshape(()) if v.numel() == 1 else v.expand(shape).reshape(-1) for v in values)
    out = torch.empty(shape, dtype=mean.dtype, device=mean.device)
    size = _AT_ONCE if mean.device.type == "cpu" else max(1, out.numel())
    if m.ndim == p.ndim == 1 and all(v.ndim == 0 for v in rest) and float(rest[1]) == math.inf:
        p0, _, m0, m1 = (float(v) for v in rest)
        _spike_in_pieces_(
            out.view(-1), m, p, _check_precision("prior_precision", rest[0])[0], m1, p0 * (m1 - m0) ** 2, size
        )
        return out
    for start in range(0, out.numel(), size):
        part = slice(start, start + size)
        out.view(-1)[part] = _elementwise(*(v if v.ndim == 0 else v[part] for v in (m, p, *rest)))
    return out


_AT_ONCE = 1 << 16  # elements of a piece: its temporaries stay in cache, so memory is read once and written once


def _spike_in_pieces_(out: Tensor, m: Tensor, p: Tensor, p0: float, m1: float, offset: float, size: int) -> None:
    """2 delta_f = ln(P/P0) - P (m - m1)^2 + offset into ``out``, halved, with memory for two pieces."""
    logs, squares = out.new_empty(2, min(size, out.numel()))
    largest = p0 * torch.finfo(out.dtype).max
    for some, mean, precision in zip(out.split(size), m.split(size), p.split(size), strict=True):
        low, high = _check_precision("precision", precision)
        log, square = logs[: len(some)], squares[: len(some)]
        if low > 0.5 * p0 and high < largest:
            torch.sub(precision, p0, out=log).div_(p0).log1p_()
        else:
            log.copy_(_log_ratio(precision, torch.full_like(precision, p0)))
        away = mean if m1 == 0.0 else torch.sub(mean, m1, out=square)
        torch.mul(away, away, out=square)
        log.addcmul_(precision, square, value=-1.0)
        torch.mul(log.add_(offset) if offset else log, 0.5, out=some)


def _elementwise(m: Tensor, p: Tensor, p0: Tensor, p1: Tensor, m0: Tensor, m1: Tensor) -> Tensor:
    _check_precision("precision", p)
    _check_precision("prior_precision", p0)
    spike = torch.isinf(p1)
    if bool(spike.all()) and bool((p1 > 0).all()):
        return _spike(m, p, p0, m0, m1)
    _check_reduced(p, p0, p1)
    p1 = torch.where(spike, p0, p1)
    gap, shift, away = p1 - p0, m1 - m0, m1 - m
    reduced = _sum_without_loss(p, p1, p0)
    share = p / reduced
    # P P1 / (P0 Pt) = 1 + x exactly; log1p near one, difference of logs elsewhere.
    x = ((p - p0) / p0) * (gap / reduced)
    near = x.abs() < 0.5
    log = torch.where(near, torch.log1p(torch.where(near, x, 0.0)), _log_ratio(p, p0) - _log_ratio(reduced, p1))
    across = p0 * shift * (share * (away + m0 - m) - (p1 / reduced) * shift)
    narrow = 0.5 * log - 0.5 * (share * gap * away * away + across)
    return torch.where(spike, _spike(m, p, p0, m0, m1), narrow) if bool(spike.any()) else narrow


def reduced_posterior(
    mean: Tensor,
    precision: Real,
    prior_precision: Real,
    reduced_precision: Real,
    prior_mean: Real = 0.0,
    reduced_mean: Real = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Posterior under the reduced prior, without seeing the data again.

        Pt = P + P1 - P0,    mt = m + (P1 (m1 - m) - P0 (m0 - m)) / Pt

    The mean is written as a move from ``mean``, which does not cancel. For ``reduced_precision = inf`` the result is
    the spike itself: mean ``reduced_mean`` and precision ``inf``.

    Returns:
        (mean, precision), each of the broadcast shape and the dtype of ``mean``.

    Raises:
        OckhamError: as `delta_f`.

    Reference: arXiv 2309.12095 eq. 11.
    """
    values = (mean, precision, prior_precision, reduced_precision, prior_mean, reduced_mean)
    m, p, p0, p1, m0, m1 = torch.broadcast_tensors(*(_as(v, mean) for v in values))
    _check_precision("precision", p)
    _check_precision("prior_precision", p0)
    _check_reduced(p, p0, p1)
    spike = torch.isinf(p1)
    finite = torch.where(spike, p0, p1)
    reduced = _sum_without_loss(p, finite, p0)
    moved = m + (finite * (m1 - m) - p0 * (m0 - m)) / reduced
    # With m = 0 moved to a far narrower prior the sum above cancels: P m is then the small remainder.
    direct = (p * m + finite * m1 - p0 * m0) / reduced
    close = (finite - p0).abs() > p
    return torch.where(spike, m1, torch.where(close, direct, moved)), torch.where(spike, p1, reduced)


def delta_f_dense(mean: Tensor, covariance: Tensor, prior_variance: Real, removed: Sequence[int]) -> Tensor:
    r"""Log evidence change of setting a set G of correlated weights to zero.

        delta_f = ln N(0; mean_G, C_GG) - ln N(0; 0, V0_GG)
                = 1/2 sum_G ln v0 - 1/2 ln|C_GG| - 1/2 mean_G' C_GG^-1 mean_G

    C_GG is the *marginal* covariance of the set, so of two duplicates either one, but not both, may go.

    Args:
        mean: posterior means, shape [n].
        covariance: posterior covariance, shape [n, n].
        prior_variance: variances of the zero-mean, independent prior; scalar or shape [n].
        removed: indices of the weights to remove; may be empty (evidence change 0).

    Returns:
        Scalar tensor, nats, positive favours removal.

    Raises:
        OckhamError: shapes do not fit, an index is out of range or repeated, or C_GG is not positive definite.

    Reference: Savage-Dickey for a block; arXiv 2309.12095 eq. 12 (whose published code misses the 1/2 of ln v0).
    """
    index = _removed_index(mean, covariance, removed)
    if index.numel() == 0:
        return mean.new_zeros(())
    v0 = torch.broadcast_to(_as(prior_variance, mean), mean.shape)[index]
    _check_precision("prior_variance", v0)
    factor = _cholesky(covariance[index][:, index], "the covariance of the removed weights")
    z: Tensor = torch.linalg.solve_triangular(factor, mean[index].unsqueeze(-1), upper=False)
    return 0.5 * v0.log().sum() - factor.diagonal().log().sum() - 0.5 * z.square().sum()


def survivors(mean: Tensor, covariance: Tensor, removed: Sequence[int]) -> tuple[Tensor, Tensor]:
    r"""Posterior of the remaining weights after a set G is set to zero (their compensation).

        mean_r - C_rG C_GG^-1 mean_G,      C_rr - C_rG C_GG^-1 C_Gr

    This line is the update of Optimal Brain Surgeon.

    Args:
        mean: shape [n].
        covariance: shape [n, n].
        removed: indices of the removed weights.

    Returns:
        (mean, covariance) of the survivors in their old order, shapes [n - |G|] and [n - |G|, n - |G|].

    Raises:
        OckhamError: as `delta_f_dense`.
    """
    index = _removed_index(mean, covariance, removed)
    stays = torch.ones(mean.shape[0], dtype=torch.bool, device=mean.device)
    stays[index] = False
    cross = covariance[stays][:, index]
    if index.numel() == 0:
        return mean.clone(), covariance.clone()
    factor = _cholesky(covariance[index][:, index], "the covariance of the removed weights")
    gain = torch.cholesky_solve(cross.T, factor).T
    return mean[stays] - gain @ mean[index], covariance[stays][:, stays] - gain @ cross.T


def delta_f_rows(mean: Tensor, row_covariance: Tensor, column_covariance: Tensor, prior_variance: Real) -> Tensor:
    r"""Log evidence change of each row of a matrix with a matrix-normal posterior MN(M, U, V).

    Row r has the marginal N(M_r, U_rr V), so with n columns

        delta_f_r = 1/2 sum_j ln v0_rj - 1/2 (n ln U_rr + ln|V|) - 1/2 M_r V^-1 M_r' / U_rr

    Args:
        mean: M, shape [rows, columns].
        row_covariance: U, shape [rows, rows] (only its diagonal enters: each row is scored alone).
        column_covariance: V, shape [columns, columns].
        prior_variance: scalar or broadcastable to [rows, columns].

    Returns:
        Shape [rows], nats, positive favours removal of the row. Scores of different rows do not add.

    Raises:
        OckhamError: shapes do not fit or V is not positive definite.
    """
    rows, columns = mean.shape if mean.ndim == 2 else (-1, -1)
    if row_covariance.shape != (rows, rows) or column_covariance.shape != (columns, columns):
        raise OckhamError(
            f"delta_f_rows: mean {tuple(mean.shape)} needs row_covariance [rows, rows] and column_covariance "
            f"[columns, columns]; got {tuple(row_covariance.shape)} and {tuple(column_covariance.shape)}"
        )
    v0 = torch.broadcast_to(_as(prior_variance, mean), mean.shape)
    _check_precision("prior_variance", v0)
    u = row_covariance.diagonal()
    _check_precision("row_covariance diagonal", u)
    factor = _cholesky(column_covariance, "column_covariance")
    z: Tensor = torch.linalg.solve_triangular(factor, mean.T, upper=False)
    log_det = columns * u.log() + 2 * factor.diagonal().log().sum()
    return 0.5 * (v0.log().sum(1) - log_det - z.square().sum(0) / u)


def group_sum(delta: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sum of delta_f over the members of each group, accumulated in float64.

    Args:
        delta: evidence changes, any shape, nats.
        group: group number of each element, integers in [0, groups), same shape.
        groups: number of groups.

    Returns:
        float64 tensor of shape [groups]. It is the evidence of removing all members at once *if they are independent*;
        over whole, unpruned structures it is a trap (docs: gotchas), score nested instead.

    >>> group_sum(torch.tensor([1.0, 2.0, -4.0]), torch.tensor([0, 0, 1]), 2)
    tensor([ 3., -4.], dtype=torch.float64)
    """
    total = torch.zeros(groups, dtype=torch.float64, device=delta.device)
    return total.index_add_(0, group.reshape(-1), delta.reshape(-1).double())


def expected_nll_cost(mean: Tensor, precision: Real, prior_precision: Real, n_data: float) -> Tensor:
    r"""Expected rise of the mean negative log-likelihood when weights with zero-mean priors are set to zero.

        [ 1/2 (P + P0) m^2 - 1/2 (1 - P0 / P) ] / N

    In nats per example; unlike delta_f it carries no Occam factor, so report both.
    """
    p, p0 = _as(precision, mean), _as(prior_precision, mean)
    return 0.5 * ((p + p0) * mean.square() - (1 - p0 / p)) / n_data


def _spike(m: Tensor, p: Tensor, p0: Tensor, m0: Tensor, m1: Tensor) -> Tensor:
    return 0.5 * _log_ratio(p, p0) - 0.5 * (p * (m - m1) * (m - m1) - p0 * (m1 - m0).square())


def _sum_without_loss(p: Tensor, p1: Tensor, p0: Tensor) -> Tensor:
    """P + P1 - P0 to the last place, whatever cancels: both roundings are summed beside it (Knuth's two-sum)."""
    gap = p1 - p0
    back = gap - p1
    lost = (p1 - (gap - back)) - (p0 + back)
    total = p + gap
    back = total - p
    return total + (lost + ((p - (total - back)) + (gap - back)))


def _log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """ln(a/b), with its digits as a -> b: ln(1 + x) of the exact difference wherever that loses nothing."""
    x = (a - b) / b
    low, high = (float(v) for v in x.detach().aminmax()) if x.numel() else (0.0, 0.0)
    if low > -0.5 and high < math.inf:
        return torch.log1p(x)
    near = (x > -0.5) & (x < math.inf)
    ratio = a / b
    plain = (ratio > torch.finfo(ratio.dtype).tiny) & (ratio < math.inf)
    far = torch.where(plain, torch.where(plain, ratio, 1.0).log(), a.log() - b.log())
    return torch.where(near, torch.log1p(torch.where(near, x, 0.0)), far)


def _as(value: Real, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _check_precision(name: str, value: Tensor) -> tuple[float, float]:
    low, high = (float(v) for v in value.detach().aminmax()) if value.numel() else (1.0, 1.0)  # NaN wherever one is
    if not (low > 0 and high < math.inf):
        worst = value[~((value > 0) & torch.isfinite(value))].reshape(-1)[0].item()
        raise OckhamError(f"{name} must be positive and finite everywhere; got {worst}")
    return low, high


def _check_reduced(p: Tensor, p0: Tensor, p1: Tensor) -> None:
    if not bool((p1 > 0).all()):
        raise OckhamError(f"reduced_precision must be positive (inf = spike); got {p1.min().item()}")
    finite = torch.where(torch.isinf(p1), p0, p1)
    improper = ~(_sum_without_loss(p, finite, p0) > 0)
    if bool(improper.any()):
        at = tuple(v[improper][0].item() for v in (p, p1, p0))
        raise OckhamError(
            "the reduced posterior is improper: precision + reduced_precision - prior_precision must be positive; "
            f"got {at[0]} + {at[1]} - {at[2]}. Use a reduced prior that is not wider than the full one."
        )


def _removed_index(mean: Tensor, covariance: Tensor, removed: Sequence[int]) -> Tensor:
    n = mean.shape[0] if mean.ndim == 1 else -1
    if covariance.shape != (n, n):
        raise OckhamError(f"mean [n] needs covariance [n, n]; got {tuple(mean.shape)} and {tuple(covariance.shape)}")
    indices = [int(i) for i in removed]
    if len(set(indices)) != len(indices) or any(not 0 <= i < n for i in indices):
        raise OckhamError(f"removed must list different indices in 0..{n - 1}; got {indices}")
    return torch.tensor(indices, dtype=torch.long, device=mean.device)


def _cholesky(matrix: Tensor, name: str) -> Tensor:
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise OckhamError(
            f"{name} is not positive definite (leading minor {int(info)}); add damping or fix the estimate"
        )
    return factor


def remove_by_log_odds(delta: Tensor, log_odds: float | Tensor = 0.0) -> Tensor:
    """Boolean keep: True where ``delta_f <= log_odds``, False (remove) where the evidence exceeds the prior odds.

    Args:
        delta: delta_f, nats, any shape.
        log_odds: ln P(keep)/P(remove) before the data; 0 treats both alike.

    Returns:
        Boolean tensor like ``delta``.
    """
    return ~(delta > log_odds)


def beta_log_odds(
    delta: Tensor, alive: Tensor, *, keep_count: float, remove_count: float, tolerance: float = 1e-10
) -> Tensor:
    r"""Learned log-odds for the weights still alive, under an informative Beta prior (our default scheme).

    pi ~ Beta(keep_count, remove_count) is the rate of kept weights; iterate to the fixed point

        q_i = sigma(log_odds - delta_i),   log_odds = psi(keep_count + sum q) - psi(remove_count + sum (1 - q))

    over the living weights only: removed ones have relaxed to delta_f = 0 and would drag the odds.

    Args:
        delta: delta_f in nats, any shape.
        alive: boolean, the weights to sum over.
        keep_count: Beta pseudo-count of kept weights, positive; choose it of the order of the layer's size.
        remove_count: pseudo-count of removed weights, positive.
        tolerance: move of the log-odds below which the iteration ends, nats.

    Returns:
        Scalar float64 tensor: the log-odds of keeping.

    Raises:
        OckhamError: pseudo-counts are not positive.

    Reference: arXiv 2309.12095 eq. 16, with living weights only and a stated prior.
    """
    if not (keep_count > 0 and remove_count > 0):
        raise OckhamError(f"Beta pseudo-counts must be positive; got {keep_count} and {remove_count}")
    d = delta[alive].double()
    a = torch.tensor(float(keep_count), dtype=torch.float64, device=d.device)
    b = torch.tensor(float(remove_count), dtype=torch.float64, device=d.device)
    zeta = torch.digamma(a) - torch.digamma(b)
    for _ in range(500):
        q = torch.sigmoid(zeta - d)
        new = torch.digamma(a + q.sum()) - torch.digamma(b + (1 - q).sum())
        if bool((new - zeta).abs() < tolerance):
            return new
        zeta = new
    return zeta


def beta_log_odds_published(delta: Tensor) -> Tensor:
    r"""The published scheme, for reproduction only: Beta(1, 1), four iterations from 0, removed weights included.

    Pass delta_f of *all* weights of the layer, with 0 for those already removed, as the released code does.

    Returns:
        Scalar float64 tensor: the log-odds of keeping after the fourth iteration; remove where ``delta_f > log_odds``.

    Reference: arXiv 2309.12095 eq. 16 and its released code.
    """
    d = delta.reshape(-1).double()
    one = torch.ones((), dtype=torch.float64, device=d.device)
    zeta = torch.zeros_like(one)
    for _ in range(4):
        q = torch.sigmoid(zeta - d)
        zeta = torch.digamma(one + q.sum()) - torch.digamma(one + (1 - q).sum())
    return zeta
