"""What the data say about the outputs of a network, and through its gradients about weights."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["counting_for_all", "gauss_newton", "of_classes"]

_ROWS = 2048


def counting_for_all(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of at most 2048 rows, evenly spread, and weights that make them count for all."""
    n = len(weight)
    rows = torch.arange(n) if n <= _ROWS else torch.linspace(0, n - 1, _ROWS).long()
    return rows, weight[rows] * (weight.sum() / weight[rows].sum())


def gauss_newton(gradients: Tensor, curvature: Tensor, weight: Tensor) -> Tensor:
    r"""Generalised Gauss-Newton matrix sum_i w_i J_i' L_i J_i, [d, d].

    Args:
        gradients: J, of the outputs in the weights, [n, outputs, d].
        curvature: L, of the negative log-likelihood in the outputs, [n, outputs, outputs].
        weight: of the examples, [n].
    """
    weighted = (curvature @ gradients) * weight[:, None, None]
    return torch.einsum("nka,nkb->ab", gradients, weighted)


def of_classes(logits: Tensor) -> Tensor:
    """Curvature [n, K, K] of the negative log-likelihood of classes in logits [n, K]; K = 1 for two classes."""
    if logits.shape[1] == 1:
        p = torch.sigmoid(logits)
        return (p * (1 - p)).unsqueeze(2)
    p = logits.softmax(1)
    return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
