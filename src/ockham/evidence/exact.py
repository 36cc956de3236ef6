"""Exact inclusion probabilities of a linear-Gaussian model: all 2^p subsets of its columns, p <= 20.

The ground truth that every approximation here is judged by. With subset g (its columns X_g), noise variance s and
weights w_g ~ N(0, V_g):

    ln p(y | g) = -n/2 ln(2 pi s) - y'y / (2 s) - 1/2 ln|V_g| - 1/2 ln|A_g| + 1/2 b' A_g^-1 b,
    A_g = X_g'X_g / s + V_g^-1,   b = X_g'y / s,   PIP_j = sum_{g: g_j = 1} p(g | y)

The subsets share their Cholesky pivots: column after column is either dropped or eliminated from all subsets so far, so
that 2^20 models cost about seven operations on 2^20 numbers and no factorisation twice.

Reference: George & McCulloch 1993; Zellner 1986 (g-prior).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ockham.errors import OckhamError

__all__ = [
    "MOST_COLUMNS",
    "Inclusion",
    "exact_inclusion",
    "inclusion_g_prior",
    "subset_log_weights",
]

MOST_COLUMNS = 20


class Inclusion(NamedTuple):
    """Exact posterior of the subsets, summed up.

    Attributes:
        probabilities: posterior inclusion probability of each column, shape [p].
        log_evidence: ln p(y), all subsets averaged, nats; every constant included.
    """

    probabilities: Any
    log_evidence: Any


def exact_inclusion(X: Any, y: Any, *, prior_inclusion: Any, slab_variance: Any, noise_variance: float) -> Inclusion:  # noqa: N803
    r"""Exact inclusion probabilities under independent slabs, w_j ~ N(0, slab_variance) where included.

    For orthogonal columns (X'X = d I) this is the closed form

        logit PIP_j = logit p0 - 1/2 ln(1 + v d / s) + (x_j'y)^2 / (2 s^2 (d / s + 1 / v))

    Args:
        X: design, shape [n, p], p <= 20; NumPy array or tensor. There is no intercept: centre X and y for one.
        y: targets, shape [n].
        prior_inclusion: p0 in (0, 1), scalar or one per column.
        slab_variance: v, positive, scalar or one per column.
        noise_variance: s, positive.

    Returns:
        `Inclusion` (unpacks into two): NumPy in, NumPy and float out; tensor in, tensors of its dtype and device out.
        Computed in float64.

    Raises:
        OckhamError: shapes do not fit, more than 20 columns, values not finite, or a setting out of range.

    >>> x = torch.eye(3, dtype=torch.float64) * 10
    >>> found = exact_inclusion(x, x @ torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64),
    ...                   prior_inclusion=0.5, slab_variance=1.0, noise_variance=1.0)
    >>> found.probabilities.round(decimals=3)
    tensor([1.0000, 0.0900, 1.0000], dtype=torch.float64)
    """
    design, target = _data(X, y)
    p = design.shape[1]
    odds = _prior_odds(prior_inclusion, p)
    variance = _positive("slab_variance", torch.broadcast_to(_float64(slab_variance), (p,)))
    noise = _noise(noise_variance)
    gram = design.T @ design / noise + torch.diag(1.0 / variance)
    logs = subset_log_weights(gram, design.T @ target / noise, odds, -0.5 * variance.log())
    return _as_given(X, logs, p, _base(target, noise))


def inclusion_g_prior(X: Any, y: Any, *, prior_inclusion: Any, g: float, noise_variance: float) -> Inclusion:  # noqa: N803
    r"""Exact inclusion probabilities under Zellner's g-prior, w_g ~ N(0, g s (X_g'X_g)^-1).

        ln p(y | subset) = base - k/2 ln(1 + g) + g / (1 + g) * b' (X_g'X_g / s)^-1 b / 2

    Args:
        X: design, shape [n, p], p <= 20, of full column rank; NumPy array or tensor.
        y: targets, shape [n].
        prior_inclusion: p0 in (0, 1), scalar or one per column.
        g: prior variance in units of the variance of least squares, positive; n is the unit-information prior.
        noise_variance: s, positive.

    Returns:
        As `inclusion`.

    Raises:
        OckhamError: as `inclusion`; also where columns are linearly dependent (the prior does not exist then).
    """
    design, target = _data(X, y)
    p = design.shape[1]
    noise = _noise(noise_variance)
    factor = float(_positive("g", torch.tensor(float(g), dtype=torch.float64)))
    gram = design.T @ design / noise
    if p and float(torch.linalg.cond(gram)) > 1e13:
        raise OckhamError("the g-prior needs linearly independent columns: drop duplicates, or use independent slabs")
    # scaled by g/(1+g), elimination gives the quadratic form; the pivots' logarithms are taken back by the prior
    scale = factor / (1 + factor)
    logs = subset_log_weights(
        gram / scale,
        design.T @ target / noise,
        _prior_odds(prior_inclusion, p),
        torch.full((p,), -0.5 * math.log1p(factor), dtype=torch.float64, device=gram.device),
        pivots_count=False,
    )
    return _as_given(X, logs, p, _base(target, noise))


def subset_log_weights(
    gram: Tensor, projected: Tensor, log_rates: tuple[Tensor, Tensor], log_priors: Tensor, *, pivots_count: bool = True
) -> Tensor:
    r"""Log weight of each of the 2^p subsets, up to the constant of the empty model.

        sum_{j in g} (ln p_j + log_priors_j) + sum_{j not in g} ln(1 - p_j) - 1/2 ln|A_g| + 1/2 b' A_g^-1 b

    Args:
        gram: A, shape [p, p], positive definite, float64.
        projected: b, shape [p].
        log_rates: (ln p_j, ln(1 - p_j)), each shape [p].
        log_priors: further cost of an included column, shape [p], nats.
        pivots_count: flag, True where -1/2 ln|A_g| enters.

    Returns:
        Shape [2^p]; bit p - 1 - j of the index (column 0 is the highest) says whether column j is included.
    """
    weights = gram.new_zeros(1)
    rest, b = gram.unsqueeze(0), projected.unsqueeze(0)
    for j in range(gram.shape[0]):
        pivot, row, first = rest[:, 0, 0], rest[:, 0, 1:], b[:, 0]
        gain = 0.5 * first.square() / pivot + (log_rates[0][j] + log_priors[j])
        if pivots_count:
            gain = gain - 0.5 * pivot.log()
        weights = torch.stack([weights + log_rates[1][j], weights + gain], 1).reshape(-1)
        ratio = row / pivot.unsqueeze(1)
        reduced = rest[:, 1:, 1:] - ratio.unsqueeze(2) * row.unsqueeze(1)
        moved = b[:, 1:] - ratio * first.unsqueeze(1)
        rest = torch.stack([rest[:, 1:, 1:], reduced], 1).flatten(0, 1)
        b = torch.stack([b[:, 1:], moved], 1).flatten(0, 1)
    return weights


def _as_given(like: Any, logs: Tensor, p: int, base: float) -> Inclusion:
    total = torch.logsumexp(logs, 0)
    table = (logs - total).exp().reshape([2] * p)
    each = [table.movedim(j, 0)[1].sum() for j in range(p)]
    found = torch.stack(each).clamp(0.0, 1.0) if each else logs.new_zeros(0)
    evidence = total + base
    if isinstance(like, Tensor):
        kind = like.dtype if like.is_floating_point() else torch.float64
        return Inclusion(found.to(kind), evidence.to(kind))
    return Inclusion(found.cpu().numpy(), float(evidence))


def _data(X: Any, y: Any) -> tuple[Tensor, Tensor]:  # noqa: N803
    design, target = (_float64(v) for v in (X, y))
    target = target.to(design.device)
    if design.ndim != 2 or target.shape != design.shape[:1]:
        got = f"{tuple(design.shape)} and {tuple(target.shape)}"
        raise OckhamError(f"inclusion needs X [n, p] and y [n]; got {got}")
    if design.shape[1] > MOST_COLUMNS:
        raise OckhamError(
            f"enumeration visits all 2^p subsets and stops at p = {MOST_COLUMNS} columns; got {design.shape[1]}. "
            "Choose the most doubtful columns, or use ockham.inclusion on a posterior"
        )
    for name, value in (("X", design), ("y", target)):
        if not bool(value.isfinite().all()):
            raise OckhamError(f"inclusion: {name} holds NaN or infinity; remove or impute those rows")
    return design, target


def _float64(value: Any) -> Tensor:
    return value.detach().double() if isinstance(value, Tensor) else torch.from_numpy(np.array(value, dtype=np.float64))


def _prior_odds(prior_inclusion: Any, p: int) -> tuple[Tensor, Tensor]:
    rate = torch.broadcast_to(_float64(prior_inclusion).cpu(), (p,))
    if not bool(((rate > 0) & (rate < 1)).all()):
        raise OckhamError(f"prior_inclusion is a probability in (0, 1); got {prior_inclusion}")
    return rate.log(), torch.log1p(-rate)


def _positive(name: str, value: Tensor) -> Tensor:
    if not bool(((value > 0) & value.isfinite()).all()):
        raise OckhamError(f"{name} must be positive and finite; got {value.tolist()}")
    return value


def _noise(value: float) -> float:
    return float(_positive("noise_variance", torch.tensor(float(value), dtype=torch.float64)))


def _base(y: Tensor, noise: float) -> float:
    return -0.5 * (y.numel() * math.log(2 * math.pi * noise) + float(y @ y) / noise)
