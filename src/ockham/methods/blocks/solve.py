r"""One weight matrix made sparse under its Kronecker curvature, the survivors moved to make good for what goes.

With the damped factors of a matrix W0 [outputs, inputs],

    A' = A / mean diag A + lambda I,        G' = (1 - tau) G / mean diag G + tau I,

the weights that stay are the minimum of  tr G' (W - W0) A' (W - W0)'  over matrices with the chosen zeros. Weights go
in rounds, those first that cost least once the others of their row and column have moved:

    cost of w_rj   ~   w_rj^2 / ([A'^-1]_jj [G'^-1]_rr)

tau = 1 takes rows as independent (the objective of SparseGPT and ALPS). All tensors carry a leading dimension of
independent groups; a bias is a last column that always stays.

Reference: Hassibi & Stork 1993 (the order, and the move); Frantar & Alistarh 2023, arXiv 2301.00774; Meng et al. 2024,
ALPS, arXiv 2406.07831 (conjugate gradients on a support).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ockham.errors import OckhamError

__all__ = ["Damping", "NofM", "Quadratic", "damped", "loss_increase", "quadratic", "single_costs", "sparse_matrix"]

_TINY = 1e-30
_TOLERANCE = 1e-4
_ROUNDS, _STEPS, _LAST_STEPS = 4, 3, 8
_TOP = 16  # directions of the inputs that the preconditioner treats exactly


@dataclass(frozen=True, slots=True)
class Damping:
    """How far the factors of a matrix are trusted.

    Attributes:
        inputs: lambda, share of A's mean diagonal that is added to A's diagonal.
        outputs: tau in (0, 1], weight of the identity in G'; 1 ignores G.
    """

    inputs: float
    outputs: float


@dataclass(frozen=True, slots=True)
class NofM:
    """A pattern in which at most ``n`` of every ``m`` weights along the inputs stay.

    Attributes:
        n: weights that stay.
        m: weights in a run.
    """

    n: int
    m: int

    @staticmethod
    def parse(text: str) -> NofM:
        """Read "2:4".

        Raises:
            OckhamError: anything else.
        """
        parts = text.split(":")
        if len(parts) == 2 and all(p.strip().isdigit() for p in parts):
            n, m = (int(p) for p in parts)
            if 0 < n < m:
                return NofM(n, m)
        raise OckhamError(f"pattern must be 'n:m' with 0 < n < m, such as '2:4'; got {text!r}")


@dataclass(frozen=True, slots=True, eq=False)
class Quadratic:
    """The damped curvature of a matrix: D -> G' D A'.

    Attributes:
        inputs: A', ``[groups, inputs, inputs]``.
        outputs: G', ``[groups, outputs, outputs]``, or None for the identity.
    """

    inputs: Tensor
    outputs: Tensor | None

    def apply(self, x: Tensor) -> Tensor:
        """G' X A'."""
        x = x @ self.inputs
        return x if self.outputs is None else self.outputs @ x

    def conditional(self) -> Tensor:
        """What a weight costs per square once its row and column have moved, 1 / ([A'^-1]_jj [G'^-1]_rr)."""
        a = 1 / _inverse_diagonal(self.inputs).unsqueeze(-2)
        return a if self.outputs is None else a / _inverse_diagonal(self.outputs).unsqueeze(-1)


def damped(factor: Tensor, damping: float) -> Tensor:
    """F / mean diag F + damping I, ``[groups, n, n]``; a factor of zeros becomes damping I."""
    mean = factor.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(_TINY)
    new = factor / mean[:, None, None]
    new.diagonal(dim1=-2, dim2=-1).add_(damping)
    return new


def quadratic(inputs: Tensor, outputs: Tensor, damping: Damping) -> Quadratic:
    """The damped curvature of a matrix from its two factors, ``[groups, n, n]`` each."""
    if damping.outputs >= 1:
        return Quadratic(damped(inputs, damping.inputs), None)
    tau = damping.outputs
    return Quadratic(damped(inputs, damping.inputs), (1 - tau) * damped(outputs, tau / (1 - tau)))


def single_costs(weight: Tensor, inputs: Tensor, outputs: Tensor, scale: float, damping: float) -> Tensor:
    r"""What each weight costs by itself, its row making good for it: nats per term, ``[groups, outputs, inputs]``.

        s_rj = 1/2 w_rj^2 G_rr / [A_l^-1]_jj / scale,      A_l = A + damping mean(diag A) I

    Args:
        weight: the matrix.
        inputs: A, summed.
        outputs: G, summed.
        scale: rows x terms; the sums divided by it are the curvature of one term.
        damping: l.
    """
    mean = inputs.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None]
    conditional = mean / _inverse_diagonal(damped(inputs, damping))
    rows = outputs.diagonal(dim1=-2, dim2=-1).clamp_min(0)
    return 0.5 * weight.square() * (rows[:, :, None] * (conditional[:, None, :] / scale))


def loss_increase(change: Tensor, inputs: Tensor, outputs: Tensor, scale: float) -> float:
    """1/2 tr G D A D' / scale: what a change of a matrix costs to second order, nats per term."""
    return 0.5 * float(((outputs @ change @ inputs) * change).sum(dtype=torch.float64)) / scale


def sparse_matrix(
    target: Tensor,
    curvature: Quadratic,
    worth: Tensor,
    *,
    keep: float | NofM,
    bias: bool = False,
    rounds: int = _ROUNDS,
    steps: tuple[int, int] = (_STEPS, _LAST_STEPS),
) -> Tensor:
    """The matrix with zeros where weights went, and the others where they make good for it.

    Args:
        target: the trained matrix, ``[groups, outputs, inputs]``.
        curvature: of `quadratic`.
        worth: its `Quadratic.conditional`.
        keep: share of the weights that stays, over the whole matrix, or a pattern along the inputs.
        bias: True where the last column is a bias, which stays.
        rounds: how finely; the share falls geometrically.
        steps: conjugate gradient steps after a round and after the last.
    """
    free = target.shape[-1] - bias
    stays = torch.ones_like(target, dtype=torch.bool)
    pattern = keep if isinstance(keep, NofM) else None
    share = keep.n / keep.m if isinstance(keep, NofM) else keep
    moved, top = target.clone(), _top(curvature.inputs)
    for i in range(1, rounds + 1):
        value = (moved.square() * worth)[..., :free].masked_fill(~stays[..., :free], -1.0)
        gone = round(value.numel() * (1 - share ** (i / rounds)))
        stays[..., :free] = _staying(value, gone, pattern)
        moved = _on_support(target, curvature, stays, moved, steps[i == rounds], top=top)
    return moved


def _staying(value: Tensor, gone: int, pattern: NofM | None) -> Tensor:
    """All but the ``gone`` lowest; with a pattern only so many of a run go as the pattern lets go."""
    flat = value.flatten()
    if pattern is not None:
        runs = value.reshape(-1, pattern.m)
        may = torch.zeros_like(runs, dtype=torch.bool)
        may.scatter_(1, runs.topk(pattern.m - pattern.n, 1, largest=False).indices, True)
        flat = flat.masked_fill(~may.flatten(), torch.inf)
        gone = min(gone, int(may.sum()))
    stays = torch.ones_like(flat, dtype=torch.bool)
    stays[flat.topk(gone, largest=False).indices] = False
    return stays.view(value.shape)


def _on_support(
    target: Tensor, curvature: Quadratic, stays: Tensor, start: Tensor, steps: int, *, top: tuple[Tensor, Tensor]
) -> Tensor:
    """Minimum over matrices that are zero outside the support of tr G' (X - T) A' (X - T)', by preconditioned CG."""
    keep = stays.to(target.dtype)
    precondition = _preconditioner(curvature, keep, *top)
    # rows that are independent have step lengths of their own
    alone = (-2, -1) if curvature.outputs is not None else (-1,)
    x = start * keep
    residual = keep * curvature.apply(target - x)
    z = precondition(residual)
    direction, product = z, (residual * z).sum(alone, keepdim=True)
    enough = product * _TOLERANCE**2
    for _ in range(steps):
        image = keep * curvature.apply(direction)
        bend = (direction * image).sum(alone, keepdim=True)
        length = torch.where(bend > 0, product / bend.clamp_min(_TINY), 0.0)
        x = x + length * direction
        residual = residual - length * image
        z = precondition(residual)
        before, product = product, (residual * z).sum(alone, keepdim=True)
        if bool((product <= enough).all()):
            break
        direction = z + product / before.clamp_min(_TINY) * direction
    return x * keep


def _preconditioner(curvature: Quadratic, keep: Tensor, vectors: Tensor, values: Tensor) -> Callable[[Tensor], Tensor]:
    r"""Inverse of diag(G') (x) (D + V L V') on each row's own support, by Woodbury's formula.

    Activations have a few directions hundreds of times the mean, which a diagonal does not see; with them taken care
    of a third of the steps reach the same minimum.

    Args:
        curvature: of the matrix.
        keep: 1 where a weight stays, 0 elsewhere.
        vectors: V, ``[groups, inputs, k]``, of `_top`.
        values: L, ``[groups, k]``.
    """
    k = values.shape[-1]
    diagonal = curvature.inputs.diagonal(dim1=-2, dim2=-1)
    rest = diagonal - (vectors.square() * values.unsqueeze(-2)).sum(-1)
    rest = torch.maximum(rest, 1e-3 * diagonal.mean(-1, keepdim=True)).unsqueeze(-2)  # D, [groups, 1, inputs]
    pairs = (vectors.unsqueeze(-1) * vectors.unsqueeze(-2) / rest.mT.unsqueeze(-1)).flatten(-2)
    core = (keep @ pairs).unflatten(-1, (k, k)) + torch.diag_embed(1 / values).unsqueeze(-3)
    root = torch.linalg.cholesky(core)
    scale = keep / rest
    rows = 1.0 if curvature.outputs is None else curvature.outputs.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)

    def apply(r: Tensor) -> Tensor:
        z = r * scale
        inner = torch.cholesky_solve((z @ vectors).unsqueeze(-1), root).squeeze(-1)
        return (z - scale * (inner @ vectors.mT)) / rows

    return apply


def _top(factor: Tensor) -> tuple[Tensor, Tensor]:
    """About the largest eigenpairs of ``[groups, n, n]``, by subspace iteration; exact ones are not needed."""
    n = factor.shape[-1]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, min(n, _TOP + 8), generator=generator, dtype=torch.float64).to(factor)
    basis = torch.linalg.qr(factor @ start)[0]
    for _ in range(2):
        basis = torch.linalg.qr(factor @ basis)[0]
    values, vectors = torch.linalg.eigh(basis.mT @ factor @ basis)
    return basis @ vectors[..., -_TOP:], values[..., -_TOP:].clamp_min(_TINY)


def _inverse_diagonal(factor: Tensor) -> Tensor:
    """Diagonal of the inverse of a positive definite matrix, in float64 inside."""
    root, failed = torch.linalg.cholesky_ex(factor.double())
    if bool(failed.any()):
        raise OckhamError(
            "a damped curvature factor is not positive definite: activations or gradients of the calibration data are "
            "not finite or overflow float32"
        )
    return torch.cholesky_inverse(root).diagonal(dim1=-2, dim2=-1).to(factor.dtype)
