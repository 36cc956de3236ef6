"""The one engine: task, method and state of a run, and the one loop over batches."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ockham.choose.rules import Diagnosis, RoundInfo
from ockham.core.batch import (
    READ_ONCE,
    Batch,
    Loader,
    ReadBatch,
    ReadOutput,
    random_states,
    restore_random_states,
    sized,
)
from ockham.core.likelihood import Likelihood
from ockham.core.network import device_of, seeded, train_
from ockham.core.objective import Objective, objective_of
from ockham.core.posterior import Posterior
from ockham.core.processes import ALONE, Processes
from ockham.errors import DataError, NonFiniteLossError, OckhamError
from ockham.fit.optimizer import VariationalOptimizer
from ockham.fit.predict import Prediction, RegressionPrediction, predict, predict_regression
from ockham.run.folder import NETWORK, PLAN, POSTERIOR, ResultFolder, save_network, save_plan
from ockham.surgery.groups import Plan

__all__ = [
    "Compressed",
    "Engine",
    "EpochInfo",
    "Method",
    "OnStep",
    "RunState",
    "StructureInfo",
    "Task",
    "Trainer",
    "rates_of",
]


@dataclass(frozen=True, slots=True, eq=False)
class Compressed:
    """A reduced network that still carries its posterior.

    Attributes:
        model: mean network; removed weights are exactly zero. A new module, the user's own is untouched.
        posterior: posterior of its weights; empty after gates, which leave a plain network.
        rounds: account of every round.
        epochs: record of every epoch.
        diagnosis: verdict on the posterior before the first round; None if there was no round.
        noise_variance: variance fitted by the regression likelihood, else None.
        histograms: delta_f before every round, counts in 60 bins over [-25, 5] nats.
        plan: account of what was taken out of the user's network as a whole; None unless structures went.
        structures: account of what every round removed as a whole.
        parameters: learnable values of the network before.
    """

    model: nn.Module
    posterior: Posterior
    rounds: tuple[RoundInfo, ...]
    epochs: tuple[EpochInfo, ...]
    diagnosis: Diagnosis | None
    noise_variance: Tensor | None
    histograms: tuple[dict[str, Any], ...] = ()
    plan: Plan | None = None
    structures: tuple[StructureInfo, ...] = ()
    parameters: int = 0

    @property
    def keep(self) -> dict[str, Tensor]:
        """Boolean masks, True = stays."""
        return {name: g.keep for name, g in self.posterior.items()}

    @property
    def keep_share(self) -> float:
        """Weights that stay over all weights of the original network, frozen ones included."""
        now = sum(p.numel() for p in self.model.parameters())
        return (now - self.posterior.size() + self.posterior.kept()) / (self.parameters or now)

    def predict(
        self,
        x: Any,
        draws: int = 20,
        generator: torch.Generator | None = None,
        output: ReadOutput | None = None,
    ) -> Prediction | RegressionPrediction:
        """Posterior predictive: `ockham.predict`, or `ockham.predict_regression` after "regression" and "poisson"."""
        given: dict[str, Any] = {"draws": draws, "generator": generator, "output": output}
        if self.posterior.likelihood in ("regression", "poisson"):
            return predict_regression(self.model, self.posterior, x, noise_variance=self.noise_variance, **given)
        return predict(self.model, self.posterior, x, **given)

    def save(self, folder: str | Path, *, builder: str = "user") -> Path:
        """Write network, posterior and plan as a sealed result folder, for `ockham.load` and `ockham.load_posterior`.

        Args:
            folder: place of the result; made where it is missing.
            builder: label of the network's constructor; "zoo:name" lets `ockham.load` build it, anything else is for
                people.

        Returns:
            The folder.

        Raises:
            OckhamError: it cannot be written.
        """
        with ResultFolder(folder, overwrite=True) as new:
            save_network(self.model, new.path(NETWORK), builder=builder)
            self.posterior.save(new.path(POSTERIOR))
            save_plan(self.plan, new.path(PLAN))
            new.commit()
        return Path(folder)

    def __repr__(self) -> str:
        """One line."""
        return f"Compressed(kept {self.keep_share:.2%} of the weights, {len(self.rounds)} rounds, {self.posterior!r})"


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What every method is given: data, likelihood and the schedule of a run.

    Attributes:
        loader: batches of the training data, with a length.
        objective: likelihood, on the network's device, and how batches and outputs are read.
        n_data: number of summed log-likelihood terms.
        epochs: number planned.
        parameters: learnable values of the network before.
        trainable: number of these that require a gradient.
        steps_per_epoch: batches of an epoch; with several processes the most that any of them has.
        processes: those that train the network together, each with a loader of its own.
    """

    loader: Loader
    objective: Objective
    n_data: float
    epochs: int
    parameters: int
    trainable: int
    steps_per_epoch: int
    processes: Processes = ALONE

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @staticmethod
    def of(
        network: nn.Module,
        loader: Iterable[Any],
        likelihood: str | Likelihood,
        *,
        epochs: int,
        n_data: float | None = None,
        batch: ReadBatch | None = None,
        output: ReadOutput | None = None,
        steps_per_epoch: int | None = None,
        processes: Processes = ALONE,
    ) -> Task:
        """The task of a user's arguments, checked before any work.

        The network is put into standardised units where it already predicts the targets of a regression.

        Raises:
            DataError: the first batch cannot work, the loader has no length or no batches, or n_data is impossible.
            OckhamError: the network has nothing to train, or the likelihood is unknown.
        """
        data = sized(loader, steps_per_epoch)
        objective = objective_of(network, likelihood, batch=batch, output=output)
        parameters = list(network.parameters())
        total, trainable = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
        if not trainable:
            raise OckhamError("no parameter of the network requires a gradient: call model.requires_grad_() first")
        processes.agree(parameters)
        terms = objective.prepare(network, data, n_data, processes)
        steps = int(processes.gathered(torch.tensor(len(data))).max())
        return Task(data, objective, terms, epochs, total, trainable, steps, processes)


class Method(ABC):
    """A way to make a network smaller, as far as it differs from the others."""

    stage: str = "compress"  # name, for progress bars and checkpoints
    shuffle: bool = True  # whether the examples come in a new order every epoch
    several: ClassVar[bool] = False  # whether several processes can run it together

    @abstractmethod
    def start(self, network: nn.Module, task: Task) -> RunState:
        """The state before the first epoch: the network (changed at will), its optimizer, the method's own state."""

    def term(self, state: RunState, at: float) -> Tensor | None:
        """What is added to the mean NLL of a batch, nats per term; ``at`` counts epochs done, with their fraction."""
        return None

    def after_epoch(self, state: RunState, info: EpochInfo) -> tuple[RunState, EpochInfo]:
        """The round that is due after an epoch, if one is: the state after it, and the record completed."""
        return state, info

    def saved(self, state: RunState) -> dict[str, Any]:
        """Plain values and tensors of the method's own state."""
        return {}

    def resumed(self, state: RunState, saved: Mapping[str, Any]) -> RunState:
        """A fresh state with the own state of `saved`, and network and optimizer of the shapes that they had then."""
        return state

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Plain values of all settings, for the record and for telling jobs apart."""

    @property
    def name(self) -> str:
        """The name by which a result folder tells what removed."""
        return self.stage

    def record(self, state: RunState) -> dict[str, Any] | None:
        """What became of the gates, plain values of `ockham.run.schema.GateFacts`; None without gates."""
        return None

    @abstractmethod
    def result(self, state: RunState) -> Compressed:
        """The network as it is now, finished."""


class Engine:
    """Runs a method over its epochs: iterate, look in, stop when you like, then take `result`.

    Args:
        method: supplier of optimizer, term of the loss and round.
        network: module that is trained in place.
        task: data, likelihood and schedule.
        hold: share of the steps at full learning rate.
        seed: seed of shuffling and dropout.
    """

    def __init__(self, method: Method, network: nn.Module, task: Task, *, hold: float = 0.5, seed: int = 0) -> None:
        self.method, self.task = method, task
        self.trainer = Trainer(task.loader, task.epochs, hold, seed, method.term, task.processes, task.steps_per_epoch)
        self.state = method.start(network, task)
        self.on_step: OnStep | None = None

    def epoch(self, state: RunState) -> tuple[RunState, EpochInfo]:
        """One epoch of training and the round that follows it."""
        state, info = self.trainer.epoch(state, self.on_step)
        state, info = self.method.after_epoch(state, replace(info, stage=self.method.stage))
        return replace(state, history=(*state.history, info)), info

    def __iter__(self) -> Iterator[EpochInfo]:
        """One epoch per item; iterating again goes on where the last loop stopped."""
        while self.state.done < self.task.epochs:
            self.state, info = self.epoch(self.state)
            yield info

    def result(self) -> Compressed:
        """What there is now."""
        return self.method.result(self.state)

    def saved(self) -> dict[str, Any]:
        """Plain values and tensors from which `load` continues to the same bits."""
        own = {"run": self.state.saved(), "method": self.method.saved(self.state)}
        return own | {"loader": random_states(self.task.loader)}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Continue from `saved` of an engine built with the same arguments.

        Raises:
            DataError: the loader holds other random generators than the one before.
        """
        restore_random_states(self.task.loader, saved.get("loader", ()))
        self.state = self.method.resumed(self.state, saved["method"]).restored(saved["run"])


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
        seed: seed of shuffling and dropout.
        term: function that a method adds to the mean NLL.
        processes: those that train together; each step has the gradient of their joined batch.
        steps: batches of an epoch; None: the length of the loader.
    """

    loader: Loader
    epochs: int
    hold: float = 0.5
    seed: int = 0
    term: Term = lambda state, at: None
    processes: Processes = ALONE
    steps: int | None = None

    def epoch(self, state: RunState, on_step: OnStep | None = None) -> tuple[RunState, EpochInfo]:
        """Train one epoch.

        Raises:
            NonFiniteLossError: the loss became NaN or infinite; says at which step.
            DataError: outputs and targets do not fit, or the loader is empty.
        """
        start, steps, tally = time.perf_counter(), self.steps or len(self.loader), _Tally(state.done)
        if steps == 0:
            raise DataError("the training loader is empty: it has no batches; give it at least one")
        if not torch.is_grad_enabled():
            raise OckhamError("training needs gradients, and torch.no_grad() is on: leave that block")
        train_(state.network)
        device = device_of(state.network)
        renew = getattr(getattr(self.loader, "sampler", None), "set_epoch", None)
        if renew is not None:  # of a DistributedSampler: without it every epoch has the same order
            renew(state.done)
        with seeded(self.seed, state.done, device):
            batches = state.objective.batches(self.loader, device)
            for i, batch in enumerate(self.processes.padded(batches, steps)):
                progress = (state.done * steps + i) / (self.epochs * steps)
                factor = 1.0 if progress < self.hold else (1 - progress) / (1 - self.hold)
                for group, rate in zip(state.optimizer.param_groups, state.rates, strict=True):
                    group["lr"] = rate * factor
                tally.add(i, *self._step(state, batch, state.done + i / steps))
                if on_step is not None and (i % 10 == 0 or i + 1 == steps):
                    on_step(i + 1, steps, tally.loss())
        self.processes.mean_(state.network.buffers())
        spent = time.perf_counter() - start
        info = EpochInfo(state.done + 1, tally.loss(final=True), tally.accuracy(), epochs=self.epochs, seconds=spent)
        return replace(state, done=state.done + 1), info

    def _step(self, state: RunState, batch: Batch | None, at: float) -> tuple[Tensor, Tensor]:
        """One step; without a batch, where other processes still have one."""
        optimizer, processes = state.optimizer, self.processes
        nll = right = torch.zeros((), device=device_of(state.network))
        for each in (optimizer, state.noise):
            if each is not None:
                each.zero_grad()
        with optimizer.sampled() if isinstance(optimizer, VariationalOptimizer) else nullcontext():
            if batch is not None:
                nll, output = state.objective.loss(state.network, batch)
                term = self.term(state, at)
                (nll if term is None else nll + term).backward()
                right = state.objective.right(output, batch)
        if processes.count > 1:
            learned = [p for p in (*state.network.parameters(), *state.likelihood.parameters()) if p.requires_grad]
            means = torch.stack([nll.detach().double().cpu(), right.double().cpu()])
            terms = 0.0 if batch is None else state.objective.terms(batch)
            nll, right = processes.join_gradients_(learned, means, terms)
        try:
            for each in (optimizer, state.noise):
                if each is not None:
                    each.step()
        except OckhamError as error:
            if bool(torch.isfinite(nll.detach())):
                raise
            raise NonFiniteLossError(
                _not_finite(
                    float(nll.detach()), state.done, round((at - state.done) * (self.steps or len(self.loader)))
                )
            ) from error
        return nll.detach(), right


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
        if final and not self._count:
            raise DataError(READ_ONCE)
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
