"""The only loop over batches: one epoch of training by any optimizer, resumable to the same bits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ockham.choose.rules import RoundInfo
from ockham.core.batch import Batch, Loader
from ockham.core.likelihood import Likelihood
from ockham.core.modes import device_of, seeded, train_
from ockham.core.objective import Objective
from ockham.errors import DataError, NonFiniteLossError, OckhamError
from ockham.fit.optimizer import VariationalOptimizer

__all__ = ["EpochInfo", "OnStep", "RunState", "StructureInfo", "Trainer", "rates_of"]

OnStep = Callable[[int, int, float], None]
"""Called after a step with (step in epoch, steps per epoch, running mean NLL)."""

Term = Callable[["RunState", float], Tensor | None]
"""(State, epochs done with their fraction) to what a method adds to the mean NLL of a batch, or None."""

_CHECK_EVERY = 50  # steps between looks for NaN, so that an accelerator need not wait at every step


@dataclass(frozen=True, slots=True)
class StructureInfo:
    """What one round removed as a whole.

    Attributes:
        epoch: number of the epoch it came after.
        removed: units that went.
        free: number of these that nobody read any more.
        nats: sum of E_g over the units that went, what the evidence loses by them.
        widths: group id (of the network before the run) to the units it has now.
        parameters: learnable values that the network has now.
        macs: multiply-accumulates of one example now.
    """

    epoch: int
    removed: int
    free: int
    nats: float
    widths: Mapping[str, int]
    parameters: int
    macs: int


@dataclass(frozen=True, slots=True)
class EpochInfo:
    """What one epoch of a run showed: the one record that progress bars, histories and checkpoints share.

    Attributes:
        epoch: number, from 1.
        loss: mean NLL over the epoch, nats, under the weights (or gates) as drawn.
        accuracy: share of right classes over the epoch as drawn; nan where there are no classes.
        kept_share: share of the weights (with gates: of the parameters) that is left after the epoch.
        epochs: number of epochs planned.
        stage: name of the stage of the command that it belongs to.
        seconds: wall time of the training of this epoch.
        kl: KL of the living gates after it, nats; 0 for other methods, whose optimizers know theirs.
        parameters: learnable values of the network as it is; 0 where nobody counted.
        widths: group id to the number of structures left, with gates.
        removed: number of structures removed after this epoch, with gates.
        round: account of the round after this epoch, if there was one.
        structures: account of what went as a whole, if anything.
    """

    epoch: int
    loss: float
    accuracy: float = math.nan
    kept_share: float = 1.0
    epochs: int = 0
    stage: str = ""
    seconds: float = 0.0
    kl: float = 0.0
    parameters: int = 0
    widths: Mapping[str, int] = field(default_factory=dict)
    removed: int = 0
    round: RoundInfo | None = None
    structures: StructureInfo | None = None

    def plain(self) -> dict[str, Any]:
        """JSON-able values, nan as None."""
        return {**asdict(self), "accuracy": None if math.isnan(self.accuracy) else self.accuracy}

    @staticmethod
    def of(plain: Mapping[str, Any]) -> EpochInfo:
        """The record of `plain`."""
        accuracy = math.nan if plain["accuracy"] is None else plain["accuracy"]
        did = plain["round"] and RoundInfo(**plain["round"])
        whole = plain["structures"] and StructureInfo(**plain["structures"])
        return EpochInfo(**{**plain, "accuracy": accuracy, "round": did, "structures": whole})


@dataclass(frozen=True, slots=True, eq=False)
class RunState:
    """All that the next epoch of a run depends on.

    Attributes:
        network: module in training; its parameters change in place, the module itself only when it shrinks.
        objective: reader of batches and outputs, with the likelihood, trained along where it has parameters.
        optimizer: any optimizer over the network.
        noise: optimizer of the likelihood's own parameters, None where it has none.
        rates: learning rate of every group of the optimizer at the start of the schedule.
        done: number of epochs trained.
        history: records of all epochs.
        own: state of the method.
    """

    network: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    noise: torch.optim.Optimizer | None
    rates: tuple[float, ...]
    done: int = 0
    history: tuple[EpochInfo, ...] = ()
    own: Any = None

    @staticmethod
    def start(network: nn.Module, objective: Objective, optimizer: torch.optim.Optimizer, own: Any = None) -> RunState:
        """The state before the first epoch."""
        learned = list(objective.likelihood.parameters())
        noise = torch.optim.Adam(learned, lr=1e-2) if learned else None
        return RunState(network, objective, optimizer, noise, rates_of(optimizer), own=own)

    @property
    def likelihood(self) -> Likelihood:
        """Module that turns outputs and targets into nats."""
        return self.objective.likelihood

    def swapped(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> RunState:
        """The state with a smaller network and the optimizer that was carried over to it."""
        return replace(self, network=network, optimizer=optimizer)

    def saved(self) -> dict[str, Any]:
        """Plain values and tensors, without the method's own."""
        groups = self.optimizer.param_groups
        return {
            "done": self.done,
            "network": dict(self.network.state_dict()),
            "likelihood": dict(self.likelihood.state_dict()),
            "optimizer": {k: v for k, v in self.optimizer.state_dict().items() if k != "param_groups"},
            "groups": [{k: v for k, v in g.items() if isinstance(v, (int, float))} for g in groups],
            "noise": {} if self.noise is None else self.noise.state_dict()["state"],
            "history": [info.plain() for info in self.history],
        }

    def restored(self, saved: Mapping[str, Any]) -> RunState:
        """The state of `saved`; network and optimizer must have its shapes already."""
        self.network.load_state_dict(saved["network"])
        self.likelihood.load_state_dict(saved["likelihood"])
        for optimizer, state in ((self.optimizer, saved["optimizer"]), (self.noise, {"state": saved["noise"]})):
            if optimizer is not None:
                optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})
        for group, kept in zip(self.optimizer.param_groups, saved["groups"], strict=True):
            group.update(kept)  # what an optimizer keeps in its groups: a peak learning rate, a scale
        return replace(self, done=int(saved["done"]), history=tuple(EpochInfo.of(h) for h in saved["history"]))


def rates_of(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    """Learning rates of the groups."""
    return tuple(float(group["lr"]) for group in optimizer.param_groups)


@dataclass(frozen=True, slots=True, eq=False)
class Trainer:
    """How an epoch goes: the data, the schedule of the learning rate, the seed.

    The learning rate is constant for a share ``hold`` of all steps and then falls linearly to zero. Global randomness
    inside an epoch (shuffling, dropout, gates) is seeded by (seed, epoch) and restored afterwards. Where the optimizer
    is a `VariationalOptimizer` its `sampled` block is used.

    Attributes:
        loader: batches of the training data.
        epochs: number planned.
        hold: share of the steps at full learning rate.
        seed: of shuffling and dropout.
        term: function that a method adds to the mean NLL.
    """

    loader: Loader
    epochs: int
    hold: float = 0.5
    seed: int = 0
    term: Term = lambda state, at: None

    def epoch(self, state: RunState, on_step: OnStep | None = None) -> tuple[RunState, EpochInfo]:
        """Train one epoch.

        Raises:
            NonFiniteLossError: the loss became NaN or infinite; says at which step.
            DataError: outputs and targets do not fit, or the loader is empty.
        """
        start, steps, tally = time.perf_counter(), len(self.loader), _Tally(state.done)
        if steps == 0:
            raise DataError("the training loader is empty: it has no batches; give it at least one")
        train_(state.network)
        device = device_of(state.network)
        with seeded(self.seed, state.done, device):
            for i, batch in enumerate(state.objective.batches(self.loader, device)):
                self._set_rates(state, (state.done * steps + i) / (self.epochs * steps))
                tally.add(i, *self._step(state, batch, state.done + i / steps))
                if on_step is not None and (i % 10 == 0 or i + 1 == steps):
                    on_step(i + 1, steps, tally.loss())
        spent = time.perf_counter() - start
        info = EpochInfo(state.done + 1, tally.loss(final=True), tally.accuracy(), epochs=self.epochs, seconds=spent)
        return replace(state, done=state.done + 1), info

    def _step(self, state: RunState, batch: Batch, at: float) -> tuple[Tensor, Tensor]:
        optimizer = state.optimizer
        for each in (optimizer, state.noise):
            if each is not None:
                each.zero_grad()
        with optimizer.sampled() if isinstance(optimizer, VariationalOptimizer) else nullcontext():
            nll, output = state.objective.loss(state.network, batch)
            term = self.term(state, at)
            (nll if term is None else nll + term).backward()
        try:
            for each in (optimizer, state.noise):
                if each is not None:
                    each.step()
        except OckhamError as error:
            if bool(torch.isfinite(nll.detach())):
                raise
            raise NonFiniteLossError(
                _not_finite(float(nll.detach()), state.done, round((at - state.done) * len(self.loader)))
            ) from error
        return nll.detach(), state.objective.right(output, batch)

    def _set_rates(self, state: RunState, progress: float) -> None:
        factor = 1.0 if progress < self.hold else (1 - progress) / (1 - self.hold)
        for group, rate in zip(state.optimizer.param_groups, state.rates, strict=True):
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
            step = self._first + int(bad[0])
            raise NonFiniteLossError(_not_finite(float(values[bad[0]]), self._epoch, step))
        self._sum, self._count = self._sum + float(values.sum()), self._count + len(values)
        self._first += len(values)
        self._losses.clear()


def _not_finite(loss: float, epoch: int, step: int) -> str:
    return (
        f"the loss became {loss} at step {step + 1} of epoch {epoch + 1}. Lower the learning rate, check the inputs "
        "for NaN; the last checkpoint is untouched"
    )
