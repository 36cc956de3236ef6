"""Training an epoch at a time, by any optimizer, so that an interrupted run resumes to the same bits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ockham.core.batch import Loader, forward, to_device
from ockham.core.likelihood import Likelihood, Loss
from ockham.core.modes import seeded
from ockham.errors import DataError, NonFiniteLossError, OckhamWarning
from ockham.fit.optimizer import VariationalOptimizer

__all__ = [
    "EpochInfo",
    "OnStep",
    "Trainer",
]

OnStep = Callable[[int, int, float], None]
"""Called after a step with (step in epoch, steps per epoch, running mean NLL)."""

_CHECK_EVERY = 50


@dataclass(frozen=True, slots=True)
class EpochInfo:
    """What an epoch showed.

    Attributes:
        epoch: number, from 1.
        loss: mean NLL over the epoch, nats, under the weights as drawn.
        accuracy: share of right classes over the epoch as drawn; nan where there are no classes.
    """

    epoch: int
    loss: float
    accuracy: float


class Trainer:
    """A network, its likelihood and an optimizer; `epoch` by epoch.

    The learning rate is constant for a share ``hold`` of all steps and then falls linearly to zero. Global randomness
    inside an epoch (shuffling, dropout) is seeded by (seed, epoch) and restored afterwards.

    Args:
        model: trained in place.
        likelihood: trained with it, if it has parameters.
        optimizer: a `VariationalOptimizer` (its `sampled` block is used) or any other.
        loader: the data.
        epochs: planned, for the schedule of the learning rate.
        hold: share of the steps at full learning rate.
        seed: of shuffling and dropout.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        optimizer: torch.optim.Optimizer,
        loader: Loader,
        *,
        epochs: int,
        hold: float = 0.5,
        seed: int = 0,
    ) -> None:
        self.model, self.likelihood, self.optimizer, self.loader = model, likelihood, optimizer, loader
        self.epochs, self.hold, self.seed = epochs, hold, seed
        self.done = 0
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._rates = [float(g["lr"]) for g in optimizer.param_groups]
        own = list(likelihood.parameters())
        self._own = torch.optim.Adam(own, lr=1e-2) if own else None
        if len(loader) == 0:
            raise DataError("the training loader has no batches; give it at least one")

    def epoch(self, on_step: OnStep | None = None) -> EpochInfo:
        """Train one epoch.

        Raises:
            NonFiniteLossError: the loss became NaN or infinite; says at which step.
            DataError: outputs and targets do not fit.
        """
        self.model.train()
        steps, tally = len(self.loader), _Tally(self.done)
        with seeded(self.seed, self.done, self._device):
            for i, batch in enumerate(self.loader):
                x, y = to_device(batch[0], self._device), to_device(batch[1], self._device)
                self._set_rate((self.done * steps + i) / (self.epochs * steps))
                tally.add(i, *self._step(x, y, first=self.done == 0 and i == 0))
                if on_step is not None and (i % 10 == 0 or i + 1 == steps):
                    on_step(i + 1, steps, tally.loss())
        self.done += 1
        return EpochInfo(self.done, tally.loss(final=True), tally.accuracy())

    def swap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Go on with a smaller model and the optimizer that was carried over to it."""
        self.model, self.optimizer = model, optimizer

    def state(self) -> dict[str, Any]:
        """Everything the next epoch depends on, plain values and tensors."""
        own = self._own.state_dict()["state"] if self._own is not None else {}
        optimizer = {k: v for k, v in self.optimizer.state_dict().items() if k != "param_groups"}
        model, likelihood = dict(self.model.state_dict()), dict(self.likelihood.state_dict())
        return {"done": self.done, "model": model, "likelihood": likelihood, "optimizer": optimizer, "own": own}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state` of a trainer built with the same arguments."""
        self.done = int(state["done"])
        self.model.load_state_dict(state["model"])
        self.likelihood.load_state_dict(state["likelihood"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        if self._own is not None:
            groups = self._own.state_dict()["param_groups"]
            self._own.load_state_dict({"state": state["own"], "param_groups": groups})

    def _step(self, x: Any, y: Tensor, *, first: bool) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        if self._own is not None:
            self._own.zero_grad()
        with _block(self.optimizer):
            output = _first_output(self.model, self.likelihood, x, y) if first else forward(self.model, x)
            loss = self.likelihood.nll(output, y)
            loss.backward()
        self.optimizer.step()
        if self._own is not None:
            self._own.step()
        return loss.detach(), _right(output, y)

    def _set_rate(self, progress: float) -> None:
        factor = 1.0 if progress < self.hold else (1 - progress) / (1 - self.hold)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor


class _Tally:
    """Losses and right answers of an epoch; looks for NaN every few steps so that accelerators need not wait."""

    def __init__(self, epoch: int) -> None:
        self._epoch, self._first = epoch, 0
        self._losses: list[Tensor] = []
        self._right: list[Tensor] = []
        self._sum, self._count = 0.0, 0

    def add(self, step: int, loss: Tensor, right: Tensor) -> None:
        self._losses.append(loss)
        self._right.append(right)
        if len(self._losses) >= _CHECK_EVERY:
            self._settle()
            self._first = step + 1

    def loss(self, *, final: bool = False) -> float:
        if final or not self._count:
            self._settle()
        return self._sum / max(1, self._count)

    def accuracy(self) -> float:
        return float(torch.stack(self._right).mean()) if self._right else math.nan

    def _settle(self) -> None:
        if not self._losses:
            return
        values = torch.stack(self._losses).double().cpu()
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            at = self._first + int(bad[0])
            raise NonFiniteLossError(
                f"the loss became {float(values[bad[0]])} at step {at + 1} of epoch {self._epoch + 1}. Lower the "
                "learning rate, check the inputs for NaN; the last checkpoint is untouched"
            )
        self._sum, self._count = self._sum + float(values.sum()), self._count + len(values)
        self._first += len(values)
        self._losses.clear()


def _block(optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
    return optimizer.sampled() if isinstance(optimizer, VariationalOptimizer) else nullcontext()


def _first_output(model: nn.Module, likelihood: Likelihood, x: Any, target: Tensor) -> Any:
    try:
        output = forward(model, x)
    except RuntimeError as error:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise DataError(f"the network cannot take the data's inputs ({shape}): {error}") from error
    likelihood.check(output, target)
    if isinstance(likelihood, Loss) and likelihood.looks_summed(output, target):
        warnings.warn(
            "the loss is declared a mean, but doubles when the batch is doubled: it is a sum. Declare "
            "ockham.Loss(..., reduction='sum'), else the data count many times over",
            OckhamWarning,
            stacklevel=4,
        )
    return output


def _right(output: Any, target: Tensor) -> Tensor:
    if not isinstance(output, Tensor) or target.is_floating_point() or output.ndim != target.ndim + 1:
        return torch.tensor(math.nan)
    return (output.detach().argmax(1) == target).float().mean()
