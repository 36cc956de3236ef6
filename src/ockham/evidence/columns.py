r"""Evidence of whole columns of a weight matrix (what reads a unit) whose posterior precision is G (x) A + P0 I.

Turning the rows, which every column holds all of, into the eigenbasis of G makes them independent: row k of U' W has
the precision b_k A + P0 I. So everything here is exact, the prior and the correlations of all weights included.

Reference: Hassibi & Stork 1993 (the conditional mean as update of the survivors); Martens & Grosse 2015 (the factors).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ockham.evidence.kronecker import KroneckerPrecision

__all__ = ["compensated_columns", "delta_f_columns", "without_columns"]

_AT_ONCE = 2**23  # numbers in the products that are made together


def without_columns(k: KroneckerPrecision, group: int, alive: Tensor) -> KroneckerPrecision:
    """Precision of one group of a matrix given that the columns not ``alive`` are zero: A loses their rows and columns.

    Args:
        k: precision of the whole matrix.
        group: which of its independent groups.
        alive: boolean [inputs], True = stays.

    Returns:
        Precision of [1, outputs, living inputs].
    """
    if bool(alive.all()):
        own = slice(group, group + 1)
        inputs = k.input_values[own], k.input_vectors[own]
        return KroneckerPrecision(*inputs, k.output_values[own], k.output_vectors[own], k.prior_precision)
    q = k.input_vectors[group].double()[alive]
    a, vectors = torch.linalg.eigh((q * k.input_values[group].double()) @ q.mT)
    outputs = k.output_values[group : group + 1], k.output_vectors[group : group + 1]
    return KroneckerPrecision(a.clamp_min(0)[None], vectors[None], *outputs, k.prior_precision)


def delta_f_columns(mean: Tensor, k: KroneckerPrecision, columns: Tensor) -> tuple[Tensor, Tensor]:
    r"""Log evidence change of setting sets of whole columns J to zero, each set by itself, and its quadratic part.

        cost_J    = 1/2 sum_k w_kJ' (S_k,JJ)^-1 w_kJ,          w = U' mean,    S_k = (b_k A + P0 I)^-1
        delta_f_J = -cost_J - 1/2 sum_k ln det(P0 S_k,JJ)

    cost_J is the rise of the summed NLL (and prior term), to second order, once all other weights of the matrix have
    moved to make good for the loss.

    Args:
        mean: [outputs, inputs].
        k: its precision, one group.
        columns: [sets, n], inputs that each set takes.

    Returns:
        (cost >= 0, delta_f), each [sets], float64 nats; delta_f > 0 favours removal. Costs sets x outputs x n^2 x
        inputs operations.

    >>> from ockham.evidence.kronecker import factorised
    >>> k = factorised(torch.eye(2)[None] * 3, torch.eye(1)[None], 1.0)
    >>> cost, delta = delta_f_columns(torch.tensor([[2.0, 0.0]]), k, torch.tensor([[0], [1]]))
    >>> cost.tolist(), [round(d, 6) for d in delta.tolist()]  # cost = 1/2 (3 + 1) 2^2; volume = 1/2 ln 4
    ([8.0, 0.0], [-7.306853, 0.693147])
    """
    q, spectrum = k.input_vectors[0].double(), 1 / (k.curvature[0] + k.prior_precision)
    turned = k.output_vectors[0].double().mT @ mean.double()
    n = columns.shape[1]
    each = max(1, _AT_ONCE // max(1, spectrum.numel() * n))
    costs, changes = [], []
    for some in columns.split(each):
        rows = q[some]  # [sets, n, inputs]
        covariance = (rows.unsqueeze(1) * spectrum[:, None, :]) @ rows.unsqueeze(1).mT
        root = torch.linalg.cholesky(covariance)
        w = turned[:, some].movedim(0, 1).unsqueeze(-1)
        cost = 0.5 * torch.linalg.solve_triangular(root, w, upper=False).square().sum((1, 2, 3))
        volume = root.diagonal(dim1=-2, dim2=-1).log().sum((1, 2))
        volume = volume + 0.5 * len(spectrum) * n * math.log(k.prior_precision)
        costs.append(cost)
        changes.append(-cost - volume)
    return torch.cat(costs), torch.cat(changes)


def compensated_columns(
    mean: Tensor, k: KroneckerPrecision, group: int, alive: Tensor, gone: Tensor, damping: float
) -> Tensor:
    r"""Means of the living columns once others are zero, as the data alone say.

    `ockham.evidence.kronecker.compensated` for whole columns, in closed form:

        mean_K + mean_J A_JK (A_KK + d I)^-1,    J gone, K those left, d = damping x mean of the diagonal of A

    Args:
        mean: [outputs, inputs].
        k: precision of the whole matrix.
        group: which of its groups.
        alive: boolean [inputs], columns that live until now.
        gone: boolean [inputs], those of them that go.
        damping: relative ridge.

    Returns:
        [outputs, inputs], zero where gone, in the dtype of ``mean``.
    """
    q = k.input_vectors[group].double()
    a = (q * k.input_values[group].double()) @ q.mT
    left = alive & ~gone
    ridge = damping * a.diagonal()[alive].mean().clamp_min(torch.finfo(a.dtype).tiny)
    inner = a[left][:, left] + ridge * torch.eye(int(left.sum()), dtype=a.dtype, device=a.device)
    found = mean.double().masked_fill(gone, 0.0)
    found[:, left] += torch.linalg.solve(inner, a[left][:, gone] @ mean.double()[:, gone].mT).mT
    return found.to(mean.dtype)
