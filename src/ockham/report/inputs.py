"""The rim of the measures: predictions and truths become float64 tensors on the CPU, or a `DataError` says why not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ockham.errors import DataError

__all__ = ["by_class", "check_sums", "confidence", "distributions", "mixture", "real"]


def real(name: str, values: Tensor) -> Tensor:
    """Float64 copy of ``values`` on the CPU, without gradient; not empty, no NaN."""
    if values.numel() == 0:
        raise DataError(f"{name} is empty, shape {tuple(values.shape)}; at least one example is needed")
    double = values.detach().to("cpu", torch.float64)
    if count := int(double.isnan().sum()):
        raise DataError(f"{name}: {count} of {double.numel()} values are NaN")
    return double


def by_class(name: str, values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K, d1, ...] with labels [N, d1, ...] as rows [M, K] with labels [M], one row a label."""
    if not values.is_floating_point():
        raise DataError(f"{name} must be floating point; got {values.dtype}")
    _check_labels(name, values, labels)
    rows = real(name, values).movedim(1, -1).flatten(0, -2)
    return rows, labels.detach().to("cpu", torch.int64).flatten()


def _check_labels(name: str, values: Tensor, labels: Tensor) -> None:
    """Labels are class indices 0..K-1, one for every row of classes."""
    shape = tuple(values.shape)
    if values.ndim < 2 or (shape[0], *shape[2:]) != tuple(labels.shape):
        raise DataError(
            f"{name} {shape} and labels {tuple(labels.shape)} do not fit; expected [N, K] with labels [N], or "
            "[N, K, d1, ...] with [N, d1, ...] (class indices, not one-hot)"
        )
    if labels.is_floating_point() or labels.is_complex():
        raise DataError(f"labels must be integers (class indices); got {labels.dtype}")
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= shape[1]):
        raise DataError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but {name} has {shape[1]} classes "
            f"(0..{shape[1] - 1}); drop padding and ignored examples first"
        )


def distributions(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as `by_class`, each a distribution over the classes."""
    rows, truth = by_class("probabilities", probabilities, labels)
    if bool((rows < 0).any()):
        raise DataError(f"probabilities must not be negative; smallest is {float(rows.min()):.4g}; apply softmax first")
    check_sums("probabilities", rows.sum(1), probabilities)
    return rows, truth


def check_sums(name: str, sums: Tensor, source: Tensor) -> None:
    """Every row sums to one, to within 1e-3 plus what the dtype and the number of classes of ``source`` explain."""
    tolerance = 1e-3 + torch.finfo(source.dtype).eps * (1 + math.log(source.shape[1]))
    worst = sums[(sums - 1).abs().argmax()]
    if not abs(float(worst) - 1) <= tolerance:
        raise DataError(
            f"{name} must be normalised over dimension 1; one row has total probability {float(worst):.6g}; "
            "apply softmax (log_softmax for log-probabilities) first"
        )


def confidence(probabilities: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Largest probability [M] and whether it is right [M] (0.0 or 1.0); ``bins`` is at least one."""
    if bins < 1:
        raise DataError(f"bins must be at least 1; got {bins}")
    rows, truth = distributions(probabilities, labels)
    largest, guess = rows.max(1)
    return largest, (guess == truth).double()


def mixture(name: str, means: Tensor, target: Tensor, variance: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Means [S, N, ...], target [N, ...] and variance expanded to the means; all finite, variance not negative."""
    if means.shape[1:] != target.shape:
        raise DataError(
            f"{name} and target do not fit: {tuple(means.shape[1:])} and {tuple(target.shape)}"
            f"{' (after the dimension of draws)' if name == 'means' else ''}; nothing is broadcast here"
        )
    m, y, v = real(name, means), real("target", target), real("variance", torch.as_tensor(variance))
    for label, values in ((name, m), ("target", y), ("variance", v)):
        if not bool(values.isfinite().all()):
            raise DataError(f"{label} has infinite values")
    if bool((v < 0).any()):
        raise DataError(f"variance must not be negative; smallest is {float(v.min()):.4g} (a log-variance?)")
    try:
        return m, y, v.expand(m.shape)
    except RuntimeError:
        got = f"{tuple(v.shape)} and {tuple(m.shape)}"
        raise DataError(f"variance does not broadcast to the means (draws first): {got}") from None
