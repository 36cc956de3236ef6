"""Likelihoods: how outputs and targets become a mean negative log-likelihood, and draws a predictive."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ockham.errors import DataError, OckhamError

__all__ = [
    "Classification",
    "Likelihood",
    "Loss",
    "Regression",
    "likelihood_from",
]


class Likelihood(nn.Module, ABC):
    """The data's part of the free energy. It may hold parameters of its own (a learned noise)."""

    @abstractmethod
    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean negative log-likelihood per term, in nats, a scalar."""

    @abstractmethod
    def terms(self, target: Tensor) -> int:
        """How many log-likelihood terms a batch of targets sums (`n_data` counts these)."""

    def check(self, output: Tensor, target: Tensor) -> None:
        """Raise a `DataError` when outputs and targets do not fit; called on the first batch and on a bad loss."""


class Classification(Likelihood):
    """Softmax likelihood: outputs [N, K, ...] are logits, targets [N, ...] integer classes.

    Args:
        ignore_index: targets with this value (padding) are no data.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy over the targets that count."""
        return nn.functional.cross_entropy(output, target, ignore_index=self.ignore_index)

    def terms(self, target: Tensor) -> int:
        """Targets that are not padding."""
        return int((target != self.ignore_index).sum())

    def check(self, output: Tensor, target: Tensor) -> None:
        """Integer labels in range, shapes that fit.

        Raises:
            DataError: with the labels or shapes at fault.
        """
        if target.is_floating_point():
            raise DataError(
                f"classification needs integer labels; got {target.dtype}. Use labels.long(), or regression"
            )
        if output.ndim != target.ndim + 1 or output.shape[:1] + output.shape[2:] != target.shape:
            raise DataError(
                f"classification needs logits [N, K, ...] for labels [N, ...]; got {tuple(output.shape)} "
                f"for {tuple(target.shape)}"
            )
        real = target[target != self.ignore_index]
        if real.numel() and (int(real.min()) < 0 or int(real.max()) >= output.shape[1]):
            raise DataError(
                f"labels must lie in 0..{output.shape[1] - 1} (the network has {output.shape[1]} outputs); "
                f"got {int(real.min())}..{int(real.max())}"
            )


class Regression(Likelihood):
    """Gaussian likelihood with one learned noise standard deviation; outputs and targets of the same shape.

    NLL = (y - f)^2 / (2 s^2) + ln s + 1/2 ln 2 pi per number; s is fitted together with the network.
    """

    def __init__(self, initial_noise_std: float = 1.0) -> None:
        super().__init__()
        self.log_noise_std = nn.Parameter(torch.tensor(math.log(initial_noise_std)))

    @property
    def noise_variance(self) -> float:
        """The fitted noise variance."""
        return math.exp(2 * float(self.log_noise_std.detach()))

    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean over all numbers of the target."""
        residual = (target - output.reshape(target.shape)) * (-self.log_noise_std).exp()
        return 0.5 * residual.square().mean() + self.log_noise_std + 0.5 * math.log(2 * math.pi)

    def terms(self, target: Tensor) -> int:
        """Numbers in the target."""
        return target.numel()

    def check(self, output: Tensor, target: Tensor) -> None:
        """Same number of values.

        Raises:
            DataError: with both shapes.
        """
        if output.numel() != target.numel() or not target.is_floating_point():
            raise DataError(
                f"regression needs floating targets of the outputs' shape; got {target.dtype} {tuple(target.shape)} "
                f"for outputs {tuple(output.shape)}"
            )


class Loss(Likelihood):
    """The user's own negative log-likelihood.

    Args:
        function: (output, target) to scalar, in nats.
        reduction: what it does over the batch, "mean" or "sum".
        terms: counts the log-likelihood terms of a batch of targets; default: the first dimension.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        *,
        reduction: Literal["mean", "sum"],
        terms: Callable[[Tensor], int] = len,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise OckhamError(
                f"Loss: reduction says what your loss does over the batch, 'mean' or 'sum'; got {reduction!r}"
            )
        self._function = function
        self._terms = terms
        self.reduction = reduction

    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        """The user's loss as a mean per term."""
        value = self._function(output, target)
        if value.ndim != 0:
            raise OckhamError(f"the loss must return a scalar; got shape {tuple(value.shape)}")
        return value / max(1, self._terms(target)) if self.reduction == "sum" else value

    def terms(self, target: Tensor) -> int:
        """As declared."""
        return self._terms(target)

    def looks_summed(self, output: Tensor, target: Tensor) -> bool:
        """True when a loss declared as a mean doubles as the batch is doubled: it is plainly a sum."""
        if self.reduction == "sum" or target.shape[:1] != output.shape[:1]:
            return False
        with torch.no_grad():
            once = float(self._function(output, target))
            twice = float(self._function(torch.cat([output, output]), torch.cat([target, target])))
        return abs(once) > 1e-12 and abs(twice / once - 2) < 1e-3


def likelihood_from(spec: str | Likelihood) -> Likelihood:
    """The façade's choice by name.

    Raises:
        OckhamError: an unknown name.
    """
    if isinstance(spec, Likelihood):
        return spec
    match spec:
        case "classification":
            return Classification()
        case "regression":
            return Regression()
    raise OckhamError(f"likelihood must be 'classification', 'regression' or a Likelihood; got {spec!r}")
