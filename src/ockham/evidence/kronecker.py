r"""Evidence of a weight matrix whose posterior precision is a Kronecker product plus the prior.

The posterior of a weight matrix W [outputs, inputs] is N(mean, S) with the precision

    S^-1 = G (x) A + P0 I,      (G (x) A)_{rj,sk} = G_rs A_jk

A [inputs, inputs] being the summed curvature on the side of the inputs, G [outputs, outputs] on the side of the
outputs. With eigendecompositions G = U diag(b) U', A = Q diag(a) Q' everything below is exact: K-FAC *plus a prior* is
no matrix-normal distribution, and factors damped into one invent evidence (1.2 nats for weights that the data never
touched). All tensors carry a leading dimension of independent groups (grouped convolutions; 1 elsewhere).

Reference: Martens & Grosse 2015, arXiv 1503.05671; Grosse & Martens 2016, arXiv 1602.01407; Ritter, Botev & Barber
2018 (K-FAC Laplace); Hassibi & Stork 1993 (the conditional mean as update of the survivors).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ockham.errors import OckhamError

__all__ = [
    "KroneckerPrecision",
    "compensated_columns",
    "conditional_mean",
    "conditional_precision",
    "covariance",
    "delta_f_columns",
    "delta_f_kronecker",
    "delta_f_kronecker_rows",
    "delta_f_matrix",
    "factorised",
    "marginal_variance",
    "removal_cost",
    "row_covariance",
    "without_columns",
]

_CG_STEPS = 500
_AFFORDABLE = 1e12  # operations for the determinants of one matrix
_AT_ONCE = 2**23  # numbers in the row covariances that are factorised together


@dataclass(frozen=True, slots=True, eq=False)
class KroneckerPrecision:
    """G (x) A + P0 I in the eigenbasis of its factors.

    Attributes:
        input_values: a >= 0, [groups, inputs].
        input_vectors: Q, [groups, inputs, inputs], eigenvectors in columns.
        output_values: b >= 0, [groups, outputs].
        output_vectors: U, [groups, outputs, outputs].
        prior_precision: P0 of every weight of the matrix.
    """

    input_values: Tensor
    input_vectors: Tensor
    output_values: Tensor
    output_vectors: Tensor
    prior_precision: float

    @property
    def curvature(self) -> Tensor:
        """Eigenvalues b_k a_j of the data's part, [groups, outputs, inputs], float64."""
        return self.output_values.double().unsqueeze(-1) * self.input_values.double().unsqueeze(-2)

    @property
    def shape(self) -> torch.Size:
        """(groups, outputs, inputs)."""
        return torch.Size((*self.output_values.shape, self.input_values.shape[-1]))

    def to(self, device: torch.device | str) -> KroneckerPrecision:
        """The same factors on a device."""
        inputs = self.input_values.to(device), self.input_vectors.to(device)
        outputs = self.output_values.to(device), self.output_vectors.to(device)
        return KroneckerPrecision(*inputs, *outputs, self.prior_precision)


def factorised(inputs: Tensor, outputs: Tensor, prior_precision: float) -> KroneckerPrecision:
    """Eigendecompose the two factors; eigenvalues that rounding made negative count as zero.

    Args:
        inputs: A, symmetric, [groups, inputs, inputs].
        outputs: G, symmetric, [groups, outputs, outputs].
        prior_precision: P0 > 0.

    Raises:
        OckhamError: shapes that do not fit, values that are not finite, or P0 out of range.

    >>> k = factorised(torch.eye(3)[None], 2 * torch.eye(2)[None], 1.0)
    >>> conditional_precision(k)[0]
    tensor([[3., 3., 3.],
            [3., 3., 3.]], dtype=torch.float64)
    """
    for name, t in (("inputs", inputs), ("outputs", outputs)):
        if t.ndim != 3 or t.shape[-1] != t.shape[-2] or t.shape[0] != inputs.shape[0]:
            raise OckhamError(f"factor {name} must be [groups, n, n]; got {tuple(t.shape)}")
        if not bool(t.isfinite().all()):
            raise OckhamError(f"factor {name} is not finite: the network's outputs or gradients overflow")
    if not 0 < prior_precision < math.inf:
        raise OckhamError(f"prior_precision must be positive and finite; got {prior_precision}")
    a, q = torch.linalg.eigh(inputs.double())
    b, u = torch.linalg.eigh(outputs.double())
    # contiguous, so that the same bits come back from a file
    return KroneckerPrecision(a.clamp_min(0), q.contiguous(), b.clamp_min(0), u.contiguous(), float(prior_precision))


def conditional_precision(k: KroneckerPrecision) -> Tensor:
    """Diagonal of the precision, [groups, outputs, inputs]: what a weight feels with all others held."""
    b = _spread(k.output_vectors, k.output_values.double())
    a = _spread(k.input_vectors, k.input_values.double())
    return b.unsqueeze(-1) * a.unsqueeze(-2) + k.prior_precision


def marginal_variance(k: KroneckerPrecision) -> Tensor:
    r"""Diagonal of the covariance: sum_kl U_rk^2 Q_jl^2 / (b_k a_l + P0), [groups, outputs, inputs]."""
    inner = 1 / (k.curvature + k.prior_precision)
    return k.output_vectors.double().square() @ inner @ k.input_vectors.double().square().mT


def row_covariance(k: KroneckerPrecision, group: int, row: int) -> Tensor:
    """Marginal covariance of one row of the matrix, Q diag(d_r) Q', [inputs, inputs]."""
    d = _row_spectrum(k)[group, row]
    q = k.input_vectors[group].double()
    return (q * d) @ q.mT


def delta_f_kronecker_rows(mean: Tensor, k: KroneckerPrecision) -> Tensor:
    r"""Log evidence change of setting one whole row (an output unit, a filter) to zero.

    Row r has the marginal covariance Q diag(d_r) Q' with d_rj = sum_k U_rk^2 / (b_k a_j + P0), so

        delta_f_r = -1/2 sum_j ln(P0 d_rj) - 1/2 sum_j (Q' mean_r)_j^2 / d_rj

    Args:
        mean: posterior means, [groups, outputs, inputs].
        k: precision of the matrix.

    Returns:
        [groups, outputs], nats, positive favours removal; scores of different rows do not add.
    """
    d = _row_spectrum(k)
    turned = mean.double() @ k.input_vectors.double()
    return -0.5 * ((k.prior_precision * d).log() + turned.square() / d).sum(-1)


def delta_f_kronecker(mean: Tensor, k: KroneckerPrecision, keep: Tensor, tolerance: float = 1e-4) -> float:
    r"""Log evidence change of setting many weights of a matrix to zero together, a lower bound.

        delta_f_G = -1/2 mean_G' S_GG^-1 mean_G - 1/2 ln det(P0 S_GG)
                 >= -1/2 mean_G' S_GG^-1 mean_G - 1/2 sum over rows r of ln det(P0 S_GrGr)

    by Fischer's inequality, equal where rows are independent. The quadratic part is that of all rows together
    (`removal_cost`). Sums of single delta_f count what correlated weights share once per weight; this does not.

    Args:
        mean: means of the full posterior, [groups, outputs, inputs].
        k: precision of the matrix.
        keep: boolean, False = goes, the same shape.
        tolerance: relative error of the quadratic part.

    Returns:
        Nats, positive favours removal. Costs outputs x inputs^3 operations; where that is more than 10^12, the volume
        is bounded further, by Hadamard's inequality: -1/2 sum of ln(P0 S_ii) over the removed.
    """
    groups, outputs, inputs = k.shape
    if groups * outputs * inputs**3 > _AFFORDABLE:
        volume = 0.5 * float((k.prior_precision * marginal_variance(k)).log()[~keep].sum())
        return -removal_cost(mean, k, keep, tolerance) - volume
    spectrum, q = _row_spectrum(k) * k.prior_precision, k.input_vectors.double()
    some, volume = max(1, _AT_ONCE // inputs**2), 0.0
    eye = torch.eye(inputs, dtype=torch.float64, device=keep.device)
    for g in range(groups):
        for first in range(0, outputs, some):
            rows = slice(first, first + some)
            gone = ~keep[g, rows]
            within = (q[g] * spectrum[g, rows].unsqueeze(1)) @ q[g].mT
            within = torch.where(gone.unsqueeze(1) & gone.unsqueeze(2), within, eye)
            volume += float(torch.linalg.cholesky(within).diagonal(dim1=-2, dim2=-1).log().sum())
    return -removal_cost(mean, k, keep, tolerance) - volume


def delta_f_matrix(mean: Tensor, k: KroneckerPrecision) -> tuple[float, float]:
    r"""Cost and log evidence change of setting a whole matrix to zero, exact.

    With T = U' mean Q in the eigenbasis and c = b a the eigenvalues of the data's part,

        cost = 1/2 sum (c + P0) T^2,    delta_f = -cost + 1/2 sum ln((c + P0) / P0)

    Args:
        mean: means of the full posterior, [groups, outputs, inputs].
        k: precision of the matrix.

    Returns:
        (cost, delta_f), nats: the rise of the posterior's energy, and the change of evidence, positive favours removal.

    >>> k = factorised(torch.zeros(1, 2, 2), torch.zeros(1, 1, 1), 1.0)  # the data say nothing: nothing is gained
    >>> delta_f_matrix(torch.zeros(1, 1, 2), k)
    (0.0, 0.0)
    """
    turned = k.output_vectors.double().mT @ mean.double() @ k.input_vectors.double()
    full = k.curvature + k.prior_precision
    cost = 0.5 * float((full * turned.square()).sum())
    return cost, 0.5 * float((full / k.prior_precision).log().sum()) - cost


def covariance(k: KroneckerPrecision, group: int = 0) -> Tensor:
    """The dense covariance of vec(W), rows behind each other, for small matrices: [outputs*inputs, outputs*inputs]."""
    basis = torch.kron(*(v[group].double().contiguous() for v in (k.output_vectors, k.input_vectors)))
    values = (k.curvature[group] + k.prior_precision).reshape(-1)
    return (basis / values) @ basis.mT


def conditional_mean(
    mean: Tensor, k: KroneckerPrecision, keep: Tensor, damping: float | None = None, tolerance: float = 1e-8
) -> Tensor:
    r"""Conditional mean of the survivors when all other weights of the matrix are zero.

        mean_r - S_rG S_GG^-1 mean_G    =    argmin over w with w_G = 0 of (w - mean)' (G (x) A + d I) (w - mean)

    solved by preconditioned conjugate gradients, all rows together.

    Args:
        mean: [groups, outputs, inputs].
        k: precision of the matrix.
        keep: boolean, True = stays, the same shape.
        damping: ridge d. None takes d = P0, the posterior as it stands. A number takes d = damping x (mean of the
            diagonal of G (x) A) instead: the survivors' reduced prior is then all but flat, and they move as the
            data alone say.
        tolerance: relative error at which the iteration ends, in the norm of the quadratic form.

    Returns:
        [groups, outputs, inputs], exactly zero where removed, in the dtype of ``mean``.

    Reference: Hassibi & Stork 1993; corrections of survivors under the K-FAC Laplace posterior.
    """
    b = _restored(k.output_vectors, k.output_values)
    a = _restored(k.input_vectors, k.input_values)
    diagonal = b.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * a.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    if damping is None:
        ridge = torch.full_like(diagonal[:, :1, :1], k.prior_precision)
    else:
        ridge = (damping * diagonal.mean((-2, -1), keepdim=True)).clamp_min(torch.finfo(torch.float64).tiny)
    stays, start = keep.to(a.dtype), mean.double() * keep
    found = _conjugate(lambda x: b @ x @ a + ridge * x, diagonal + ridge, mean.double(), start, stays, tolerance)
    return found.to(mean.dtype)


def removal_cost(mean: Tensor, k: KroneckerPrecision, keep: Tensor, tolerance: float = 1e-8) -> float:
    """Quadratic part of a joint removal, 1/2 mean_G' S_GG^-1 mean_G, nats: what the survivors cannot make good."""
    moved = conditional_mean(mean.double(), k, keep, tolerance=tolerance) - mean.double()
    turned = k.output_vectors.double().mT @ moved @ k.input_vectors.double()
    return float(0.5 * ((k.curvature + k.prior_precision) * turned.square()).sum())


def _conjugate(apply, diagonal: Tensor, mean: Tensor, x: Tensor, stays: Tensor, tolerance: float) -> Tensor:  # type: ignore[no-untyped-def]
    residual = stays * apply(mean - x)
    z = residual / diagonal
    direction, product = z, (residual * z).sum((-2, -1), keepdim=True)
    target = tolerance**2 * product
    for _ in range(_CG_STEPS):
        if bool((product <= target).all()):
            break
        image = stays * apply(direction)
        length = product / (direction * image).sum((-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        x = x + length * direction
        residual = residual - length * image
        z = residual / diagonal
        before, product = product, (residual * z).sum((-2, -1), keepdim=True)
        direction = z + product / before.clamp_min(torch.finfo(x.dtype).tiny) * direction
    return x * stays


def _row_spectrum(k: KroneckerPrecision) -> Tensor:
    return k.output_vectors.double().square() @ (1 / (k.curvature + k.prior_precision))


def _restored(vectors: Tensor, values: Tensor) -> Tensor:
    v = vectors.double()
    return (v * values.double().unsqueeze(-2)) @ v.mT


def _spread(vectors: Tensor, values: Tensor) -> Tensor:
    return (vectors.double().square() @ values.unsqueeze(-1)).squeeze(-1)


_COLUMNS_AT_ONCE = 2**23  # numbers in the products that are made together


def without_columns(k: KroneckerPrecision, group: int, alive: Tensor) -> KroneckerPrecision:
    """Precision of one group of a matrix given that the columns not ``alive`` are zero: A loses their rows and columns.

    Args:
        k: precision of the whole matrix.
        group: number of one of its independent groups.
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
    return KroneckerPrecision(a.clamp_min(0)[None], vectors.contiguous()[None], *outputs, k.prior_precision)


def delta_f_columns(mean: Tensor, k: KroneckerPrecision, columns: Tensor) -> tuple[Tensor, Tensor]:
    r"""Log evidence change of setting sets of whole columns J to zero, each set by itself, and its quadratic part.

        cost_J    = 1/2 sum_k w_kJ' (S_k,JJ)^-1 w_kJ,          w = U' mean,    S_k = (b_k A + P0 I)^-1
        delta_f_J = -cost_J - 1/2 sum_k ln det(P0 S_k,JJ)

    cost_J is the rise of the summed NLL (and prior term), to second order, once all other weights of the matrix have
    moved to make good for the loss.

    Args:
        mean: [outputs, inputs].
        k: precision of the matrix, one group.
        columns: [sets, n], inputs that each set takes.

    Returns:
        (cost >= 0, delta_f), each [sets], float64 nats; delta_f > 0 favours removal. Takes sets x outputs x n^2 x
        inputs operations.

    >>> from ockham.evidence.kronecker import factorised
    >>> k = factorised(torch.eye(2)[None] * 3, torch.eye(1)[None], 1.0)
    >>> cost, delta = delta_f_columns(torch.tensor([[2.0, 0.0]]), k, torch.tensor([[0], [1]]))
    >>> cost.tolist(), [round(d, 6) for d in delta.tolist()]  # cost = 1/2 (3 + 1) 2^2; volume = 1/2 ln 4
    ([8.0, 0.0], [-7.306853, 0.693147])
    """
    q, spectrum = k.input_vectors[0].double(), 1 / (k.curvature[0] + k.prior_precision)
    turned = k.output_vectors[0].double().mT @ mean.double()
    n, (outputs, inputs) = columns.shape[1], spectrum.shape
    first, second = torch.tril_indices(n, n, device=q.device)
    costs, changes = [], []
    for some in columns.split(max(1, _COLUMNS_AT_ONCE // max(1, n * n * max(inputs, outputs)))):
        rows, count = q[some], len(some)  # [sets, n, inputs]
        s = q.new_empty(count, len(first), outputs)  # S_k,JJ, the lower triangle: products of rows, times 1 / spectrum
        for part in torch.arange(len(first), device=q.device).split(max(1, _COLUMNS_AT_ONCE // (count * inputs))):
            s[:, part] = (rows[:, first[part]] * rows[:, second[part]]) @ spectrum.mT
        w = turned[:, some].permute(1, 0, 2)  # [sets, outputs, n]
        if n == 1:
            cost, volume = 0.5 * (w.square() / s.mT).sum((1, 2)), 0.5 * s.log().sum((1, 2))
        else:
            covariance = q.new_zeros(count, outputs, n, n)
            covariance[..., first, second] = covariance[..., second, first] = s.mT
            root = torch.linalg.cholesky(covariance)
            cost = 0.5 * torch.linalg.solve_triangular(root, w.unsqueeze(-1), upper=False).square().sum((1, 2, 3))
            volume = root.diagonal(dim1=-2, dim2=-1).log().sum((1, 2))
        volume = volume + 0.5 * outputs * n * math.log(k.prior_precision)
        costs.append(cost)
        changes.append(-cost - volume)
    return torch.cat(costs), torch.cat(changes)


def compensated_columns(
    mean: Tensor, k: KroneckerPrecision, group: int, alive: Tensor, gone: Tensor, damping: float
) -> Tensor:
    r"""Means of the living columns once others are zero, as the data alone say.

    `ockham.evidence.kronecker.conditional_mean` for whole columns, in closed form:

        mean_K + mean_J A_JK (A_KK + d I)^-1,    J gone, K those left, d = damping x mean of the diagonal of A

    Args:
        mean: [outputs, inputs].
        k: precision of the whole matrix.
        group: number of one of its groups.
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
