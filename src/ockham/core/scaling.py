"""Targets: their shape, and the units of regression targets, in the data and in the last layer of a network.

A network that ends in a Linear or convolution layer can learn standardised targets and be put into the user's units
afterwards: with f' = c + s f, weights W' = s W and biases b' = s b + c. Its posterior goes along exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ockham.core.batch import described
from ockham.core.posterior import Gaussian, Posterior
from ockham.core.processes import Processes
from ockham.errors import DataError

__all__ = [
    "Head",
    "TargetStatistics",
    "aligned",
    "check_target",
    "find_head",
    "rescale_",
    "rescaled",
    "spread_weight",
]


class TargetStatistics:
    """Weighted mean and spread of targets, batch by batch, in float64.

    Args:
        axis: axis of the targets that counts the outputs.
    """

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._weight = self._mean = self._square = torch.zeros(1, dtype=torch.float64)
        self._ndim = 1

    def add(self, target: Tensor, weight: Tensor) -> None:
        """Take in a batch; ``weight`` is broadcastable to the targets."""
        self._ndim = max(1, target.ndim)
        y, w = (self._columns(t.detach().double().cpu()) for t in torch.broadcast_tensors(target, weight.to(target)))
        total = w.sum(0)
        mean = (w * y).sum(0) / total.clamp_min(torch.finfo(torch.float64).tiny)
        square = (w * (y - mean).square()).sum(0)
        both = self._weight + total
        share = total / both.clamp_min(torch.finfo(torch.float64).tiny)
        away = mean - self._mean
        self._square = self._square + square + away.square() * self._weight * share
        self._mean = self._mean + away * share
        self._weight = both

    def joined(self, processes: Processes) -> None:
        """Take in what all processes have seen."""
        every = processes.gathered(torch.stack([self._weight, self._mean, self._square]))
        weight, mean, square = every.unbind(1)
        self._weight = weight.sum(0)
        self._mean = (weight * mean).sum(0) / self._weight
        self._square = (square + weight * (mean - self._mean).square()).sum(0)

    def columns(self, target: Tensor) -> Tensor:
        """Numbers of a batch as [numbers, outputs], float64."""
        return self._columns(target.detach().double().cpu())

    def each(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every output, [outputs]; a spread of zero counts as one."""
        return self._mean, _positive((self._square / self._weight).sqrt(), self._mean)

    @property
    def filled(self) -> bool:
        """Whether any batch came."""
        return bool((self._weight > 0).any())

    @property
    def weight(self) -> Tensor:
        """Sum of the weights of every output, [outputs]."""
        return self._weight

    def mean_square(self) -> Tensor:
        """Mean square of every output, [outputs]."""
        return self._square / self._weight + self._mean.square()

    def root_mean_square(self) -> Tensor:
        """Square root of it; a root of zero counts as one."""
        return _positive(self.mean_square().sqrt(), self._mean)

    def pooled(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of all outputs together, [1] each."""
        total = self._weight.sum()
        mean = (self._weight * self._mean).sum() / total
        square = self._square.sum() + (self._weight * (self._mean - mean).square()).sum()
        return mean[None], _positive((square / total).sqrt()[None], mean[None])

    def shaped(self, values: Tensor) -> Tensor:
        """One number an output, in a shape that broadcasts to the targets."""
        after = 0 if self._axis == -1 else max(0, self._ndim - 2)
        return values.reshape(-1, *[1] * after)

    def _columns(self, values: Tensor) -> Tensor:
        if values.ndim < 2:
            return values.reshape(-1, 1)
        return values.movedim(self._axis, -1).flatten(0, -2)


def _positive(spread: Tensor, mean: Tensor) -> Tensor:
    """Spreads with one for those that are nothing but rounding."""
    smallest = 1e-12 * mean.abs().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(spread > smallest, spread, torch.ones_like(spread))


@dataclass(frozen=True, slots=True)
class Head:
    """The layer that a network's outputs come from, unchanged but for their shape.

    Attributes:
        weight: name of its weight.
        bias: name of its bias, or None.
        rows: whether its rows are the outputs, so that each can have its own unit.
    """

    weight: str
    bias: str | None
    rows: bool


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAST = 3


@torch.no_grad()
def find_head(model: nn.Module, answer: Callable[[], Tensor], *, outputs: int, axis: int) -> Head | None:
    """The last Linear or convolution of a network, if the outputs follow it as f' = c + s f.

    It is tried, not read from the code: with other weights the same batch must give the outputs so changed.

    Args:
        model: network in evaluation mode; it is as before afterwards.
        answer: calls it on some batch.
        outputs: how many there are.
        axis: axis of the answer that counts them.
    """
    called: list[nn.Module] = []
    layers = [m for m in model.modules() if isinstance(m, _LAYERS)]
    handles = [m.register_forward_hook(lambda module, args, out: called.append(module)) for m in layers]
    try:
        before = answer().double()
    finally:
        for handle in handles:
            handle.remove()
    names = {p: name for name, p in model.named_parameters()}
    last = list(dict.fromkeys(reversed(called)))[:_LAST]
    for module, rows in itertools.product(last, (True, False)):
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is None or not weight.requires_grad or (rows and len(weight) != outputs):
            continue
        head = Head(names[weight], None if bias is None else names[bias], rows)
        if _follows(model, head, answer, before, outputs, axis):
            return head
    return None


def _follows(
    model: nn.Module, head: Head, answer: Callable[[], Tensor], before: Tensor, outputs: int, axis: int
) -> bool:
    generator = torch.Generator().manual_seed(0)
    count = outputs if head.rows else 1
    factor = 0.5 + torch.rand(count, generator=generator, dtype=torch.float64)
    shift = torch.rand(count, generator=generator, dtype=torch.float64) * (head.bias is not None)
    with _unchanged(model, head):
        rescale_(model, head, factor, shift)
        after = answer().double()
    shape = [1] * before.ndim
    if before.ndim > 1:
        shape[axis] = -1
    if count > 1 and (before.ndim < 2 or before.shape[axis] != count):
        return False
    factor, shift = (t.to(before.device).view(shape) for t in (factor, shift))
    wanted = factor * before + shift
    return after.shape == wanted.shape and bool(((after - wanted).abs() <= 1e-4 * (1 + wanted.abs())).all())


@contextmanager
def _unchanged(model: nn.Module, head: Head) -> Iterator[None]:
    held = [model.get_parameter(n) for n in (head.weight, head.bias) if n is not None]
    saved = [p.detach().clone() for p in held]
    try:
        yield
    finally:
        for p, value in zip(held, saved, strict=True):
            p.copy_(value)


@torch.no_grad()
def rescale_(model: nn.Module, head: Head, factor: Tensor, shift: Tensor) -> None:
    """Change a network in place so that its outputs become ``factor f + shift``.

    Args:
        model: network that has the head.
        head: head from `find_head`.
        factor: one number a row, or one for all.
        shift: likewise; without a bias it is not used.
    """
    weight = model.get_parameter(head.weight)
    weight.copy_(weight.double() * _rows(factor, weight))
    if head.bias is not None:
        bias = model.get_parameter(head.bias)
        bias.copy_(bias.double() * factor.to(bias.device) + shift.to(bias.device))


def rescaled(posterior: Posterior, head: Head, factor: Tensor, shift: Tensor) -> Posterior:
    """The posterior of a network after `rescale_`; evidence of its weights stays what it was.

    A bias that was removed becomes a constant, the shift: a weight that the network holds fixed (`Gaussian.keep`).
    A bias with an inclusion probability becomes the Gaussian of the same mean and variance.
    """
    moments = dict(posterior.moments)
    if head.weight in moments:
        g = moments[head.weight]
        moments[head.weight] = _scaled(g, _rows(factor, g.mean), torch.zeros(1, dtype=torch.float64))
    if head.bias in moments:
        g = moments[head.bias]
        if (pi := g.inclusion) is not None:
            variance = pi * (1 / g.precision) + pi * (1 - pi) * g.mean.square()
            precision = torch.where(g.keep, 1 / variance, torch.inf)
            g = replace(g, mean=pi * g.mean, precision=precision, inclusion=g.keep.to(pi.dtype))
        moments[head.bias] = _scaled(g, factor.to(g.mean.device), shift)
    return replace(posterior, moments=moments)


def _rows(factor: Tensor, like: Tensor) -> Tensor:
    return factor.to(like.device).view(-1, *[1] * (like.ndim - 1))


def _scaled(g: Gaussian, factor: Tensor, shift: Tensor) -> Gaussian:
    def cast(values: Tensor) -> Tensor:
        return values.to(g.mean.dtype)

    shift, square = shift.to(g.mean.device), factor.square()
    mean = cast(g.mean.double() * factor + shift)
    marginal = None if g.marginal_precision is None else cast(g.marginal_precision.double() / square)
    precision, prior = cast(g.precision.double() / square), cast(g.prior_precision.double() / square)
    return Gaussian(mean, precision, prior, cast(g.prior_mean.double() * factor + shift), g.keep, marginal, g.inclusion)


def spread_weight(weight: Tensor, terms: Tensor) -> Tensor:
    """Sample weights [N], or of the terms' shape, broadcastable to terms [N, ...].

    Raises:
        DataError: other shapes, or weights that are negative or not finite.
    """
    if weight.shape == terms.shape:
        return weight
    if weight.ndim and weight.numel() == len(weight) == len(terms):
        return weight.reshape(-1, *[1] * (terms.ndim - 1))
    raise DataError(
        f"sample weights must be one an example [N] or one a target; got {tuple(weight.shape)} for {tuple(terms.shape)}"
    )


def aligned(output: Tensor, target: Tensor, what: str) -> Tensor:
    """Outputs in the targets' shape; only axes of size one may differ, so that no two numbers are paired by accident.

    Raises:
        DataError: with both shapes.
    """
    if output.shape == target.shape:
        return output
    if [n for n in output.shape if n != 1] == [n for n in target.shape if n != 1] and output.shape[:1] == target.shape[
        :1
    ]:
        return output.reshape(target.shape)
    raise DataError(
        f"{what} needs outputs and targets of one shape, axis by axis (only axes of size 1 may differ); got outputs "
        f"{tuple(output.shape)} for targets {tuple(target.shape)}"
    )


def check_target(target: Any, what: str) -> None:
    """Refuse targets that are no tensor, or those of one example.

    Raises:
        DataError: says what came, and what to yield.
    """
    if isinstance(target, (int, float, np.number)) or (isinstance(target, Tensor) and target.ndim == 0):
        raise DataError(
            "the targets have no batch axis: the loader yields single examples. Put it through a "
            "torch.utils.data.DataLoader(..., batch_size=32), or yield batches"
        )
    if not isinstance(target, Tensor):
        texts = isinstance(target, (list, tuple)) and any(isinstance(v, str) for v in target)
        way = "Number the classes 0..K-1 and yield" if texts else "Yield"
        raise DataError(f"{what} needs a tensor of targets; got {described(target)}. {way} torch.as_tensor(targets)")
