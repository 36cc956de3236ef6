"""What a batch and an input may be: the one place where a network meets the batches of a loader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ockham.core.likelihood import Likelihood
from ockham.core.modes import device_of, seeded
from ockham.errors import DataError, OckhamError

__all__ = ["Loader", "batches_on", "checked_batches", "count_terms", "forward", "to_device"]


class Loader(Protocol):
    """Batches of (inputs, targets), iterable again and again, of known length."""

    def __iter__(self) -> Iterator[Any]:
        """One epoch."""

    def __len__(self) -> int:
        """Batches an epoch."""


def forward(model: nn.Module, x: Any) -> Any:
    """Call the model with a tensor, a tuple of positional or a mapping of keyword inputs."""
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, (tuple, list)) else model(x)


def to_device(value: Any, device: torch.device) -> Any:
    """Move tensors in (nested) tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {k: to_device(v, device) for k, v in value.items()}
    return [to_device(v, device) for v in value] if isinstance(value, (tuple, list)) else value


def batches_on(loader: Loader, device: torch.device) -> Iterator[tuple[Any, Any]]:
    """Pairs of inputs and targets on a device."""
    for batch in loader:
        yield to_device(batch[0], device), to_device(batch[1], device)


def checked_batches(loader: Loader, likelihood: Likelihood, model: nn.Module) -> Iterator[Any]:
    """Pairs on the model's device, under a seed; the first is checked against the likelihood.

    Raises:
        DataError: the loader yields something else than pairs, or outputs and targets do not fit.
    """
    device = device_of(model)
    with seeded(0, 0, device):
        for i, batch in enumerate(loader):
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise DataError(f"the loader must yield pairs (inputs, targets); got {type(batch).__name__}")
            x, y = to_device(batch[0], device), to_device(batch[1], device)
            if i == 0:
                with torch.no_grad():
                    likelihood.check(_outputs(model, x), y)
            yield x, y


def _outputs(model: nn.Module, x: Any) -> Tensor:
    try:
        found = forward(model, x)
    except RuntimeError as error:
        raise DataError(f"the network cannot take the data's inputs: {error}") from error
    if not isinstance(found, Tensor):
        raise OckhamError(f"a Laplace posterior needs a network with one output tensor; got {type(found).__name__}")
    return found


def count_terms(loader: Loader, likelihood: Likelihood) -> int:
    """Log-likelihood terms of an epoch: one pass over the targets.

    Raises:
        DataError: the loader is empty.
    """
    with seeded(0, 0, torch.device("cpu")):
        total = sum(likelihood.terms(batch[1]) for batch in loader)
    if total == 0:
        raise DataError("the training loader is empty: it yields no targets")
    return total
