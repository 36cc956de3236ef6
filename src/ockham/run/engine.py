"""The engine: one state, one epoch, one loop; a method supplies its optimizer, its term of the loss and its round."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ockham.choose.rules import RoundInfo
from ockham.choose.score import Diagnosis
from ockham.core.batch import Loader, ReadBatch, ReadOutput, sized
from ockham.core.likelihood import Likelihood
from ockham.core.objective import Objective, objective_of
from ockham.core.posterior import Posterior
from ockham.fit.predict import Prediction, RegressionPrediction, predict, predict_regression
from ockham.run.folder import ResultFolder
from ockham.run.result import NETWORK, PLAN, POSTERIOR, save_network, save_plan
from ockham.run.trainer import EpochInfo, OnStep, RunState, StructureInfo, Trainer
from ockham.surgery.groups import Plan

__all__ = ["Compressed", "Engine", "Method", "Task"]


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
    """

    loader: Loader
    objective: Objective
    n_data: float
    epochs: int
    parameters: int
    trainable: int

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * len(self.loader)

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
    ) -> Task:
        """The task of a user's arguments, checked before any work.

        The network is put into standardised units where it already predicts the targets of a regression.

        Raises:
            DataError: the first batch cannot work, the loader has no length or no batches, or n_data is impossible.
            OckhamError: the network has no parameters, or the likelihood is unknown.
        """
        data = sized(loader, steps_per_epoch)
        objective = objective_of(network, likelihood, batch=batch, output=output)
        terms = objective.prepare(network, data, n_data)
        parameters = list(network.parameters())
        total = sum(p.numel() for p in parameters)
        return Task(data, objective, terms, epochs, total, sum(p.numel() for p in parameters if p.requires_grad))


class Method(ABC):
    """A way to make a network smaller, as far as it differs from the others."""

    stage: str = "compress"  # name, for progress bars and checkpoints
    shuffle: bool = True  # whether the examples come in a new order every epoch

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
        seed: of shuffling and dropout.
    """

    def __init__(self, method: Method, network: nn.Module, task: Task, *, hold: float = 0.5, seed: int = 0) -> None:
        self.method, self.task = method, task
        self.trainer = Trainer(task.loader, task.epochs, hold, seed, method.term)
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
        return {"run": self.state.saved(), "method": self.method.saved(self.state)}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Continue from `saved` of an engine built with the same arguments."""
        self.state = self.method.resumed(self.state, saved["method"]).restored(saved["run"])
