r"""The prior precision of a layer that its own Laplace evidence prefers.

With H the curvature of the negative log-likelihood at the mean (eigenvalues h_i) the log evidence of a layer is, up to
what does not depend on the prior precision d,

    L(d) = n/2 ln d  -  d/2 |mean|^2  -  1/2 sum_i ln(h_i + d)

Its derivative is zero where sum_i h_i / (d (h_i + d)) = |mean|^2. The left side falls from infinity to 0 as d grows, so
there is exactly one optimum, found here by bisection on ln d.

Reference: MacKay 1992, The evidence framework; Immer et al. 2021, arXiv 2104.04975.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ockham.errors import OckhamError

__all__ = ["evidence_prior_precision", "laplace_evidence", "mean_square_prior_precision"]

_STEPS = 200


def laplace_evidence(curvature: Tensor, mean: Tensor, prior_precision: float) -> float:
    """L(d) above in nats, without the log-likelihood at the mean.

    Args:
        curvature: eigenvalues of H, or its diagonal; any shape with as many numbers as ``mean``.
        mean: the weights.
        prior_precision: d.
    """
    h, d = curvature.double(), prior_precision
    return float(-0.5 * torch.log1p(h / d).sum() - 0.5 * d * mean.double().square().sum())


def evidence_prior_precision(curvature: Tensor, mean: Tensor) -> float:
    r"""The prior precision d of a layer with the largest Laplace evidence.

    Args:
        curvature: eigenvalues (or, for a diagonal posterior, the diagonal) of the Hessian of the *summed* NLL, >= 0.
        mean: the trained weights, as many numbers.

    Returns:
        d > 0. A layer that the data never touched (curvature 0), or whose weights are all zero, has no optimum;
        `mean_square_prior_precision` is returned for it.

    Raises:
        OckhamError: a curvature is negative or not finite.

    >>> round(evidence_prior_precision(torch.full((4,), 1e8), torch.full((4,), 0.5)), 4)
    4.0
    """
    h = curvature.double().reshape(-1)
    if not bool(((h >= 0) & h.isfinite()).all()):
        raise OckhamError(f"curvature must be finite and >= 0 (a GGN or Fisher is); got a minimum of {float(h.min())}")
    square = float(mean.double().square().sum())
    if square == 0.0 or float(h.max()) == 0.0:
        return mean_square_prior_precision(h, mean)
    low, high = -60.0, math.log(h.numel() / square)  # h / (h + d) < 1, so d < n / |mean|^2
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        d = math.exp(middle)
        if float((h / (h + d)).sum()) / d > square:
            low = middle
        else:
            high = middle
        if high - low < 1e-9:
            break
    return math.exp(0.5 * (low + high))


def mean_square_prior_precision(curvature: Tensor, mean: Tensor) -> float:
    """Precision n / |mean|^2: the prior whose variance is the mean square of the weights; 1 where all are zero.

    The limit of `evidence_prior_precision` for well-determined weights, and an upper bound of it everywhere: it takes
    every weight for a draw from the prior, also those that the data do not determine. The curvature is not used.
    """
    square = float(mean.double().square().sum())
    return mean.numel() / square if square > 0 else 1.0
