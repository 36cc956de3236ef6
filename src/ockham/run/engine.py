"""The engine: one state, one epoch, one loop; a method supplies its optimizer, its term of the loss and its round."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ockham.choose.rules import RoundInfo
from ockham.choose.score import Diagnosis
from ockham.core.batch import Loader, count_terms
from ockham.core.likelihood import Likelihood, Loss, likelihood_from
from ockham.core.modes import device_of, seeded
from ockham.core.posterior import Posterior
from ockham.errors import DataError, OckhamError
from ockham.fit.predict import Prediction, RegressionPrediction, predict, predict_regression
from ockham.run.result import NETWORK, PLAN, POSTERIOR, save_network, save_plan
from ockham.run.trainer import EpochInfo, OnStep, RunState, StructureInfo, Trainer
from ockham.surgery.planning import Plan

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
    noise_variance: float | None
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
        self, x: Tensor, draws: int = 20, generator: torch.Generator | None = None
    ) -> Prediction | RegressionPrediction:
        """Posterior predictive: `ockham.predict`, or `ockham.predict_regression` after the regression likelihood."""
        given: dict[str, Any] = {"draws": draws, "generator": generator}
        if self.noise_variance is not None:
            return predict_regression(self.model, self.posterior, x, noise_variance=self.noise_variance, **given)
        return predict(self.model, self.posterior, x, **given)

    def save(self, folder: str | Path, *, builder: str = "user") -> Path:
        """Write network, posterior and plan as a result folder that `ockham.load` and `ockham.load_posterior` read.

        Args:
            folder: place of the result; made where it is missing.
            builder: label of the network's constructor; "zoo:name" lets `ockham.load` build it, anything else is for
                people.

        Returns:
            The folder.

        Raises:
            OckhamError: it cannot be written.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        save_network(self.model, path / NETWORK, builder=builder)
        self.posterior.save(path / POSTERIOR)
        save_plan(self.plan, path / PLAN)
        return path

    def __repr__(self) -> str:
        """One line."""
        return f"Compressed(kept {self.keep_share:.2%} of the weights, {len(self.rounds)} rounds, {self.posterior!r})"


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What every method is given: data, likelihood and the schedule of a run.

    Attributes:
        loader: batches of the training data, with a length.
        likelihood: on the network's device; a copy of the user's own unless it is a `Loss`.
        n_data: number of summed log-likelihood terms.
        epochs: number planned.
        parameters: learnable values of the network before.
        trainable: number of these that require a gradient.
    """

    loader: Loader
    likelihood: Likelihood
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
        network: nn.Module, loader: Loader, likelihood: str | Likelihood, *, epochs: int, n_data: float | None = None
    ) -> Task:
        """The task of a user's arguments, checked before any work.

        Raises:
            DataError: the loader has no length or no batches, or n_data is impossible.
            OckhamError: the network has no parameters, or the likelihood is unknown.
        """
        parameters = list(network.parameters())
        if not parameters:
            raise OckhamError("the model has no parameters")
        try:
            length = len(loader)
        except TypeError as error:
            raise DataError("the loader needs a length (batches an epoch): schedules are planned from it") from error
        if length == 0:
            raise DataError("the training loader has no batches; give it at least one")
        named = likelihood_from(likelihood)
        own = (named if isinstance(named, Loss) else copy.deepcopy(named)).to(device_of(network))
        terms = float(n_data) if n_data is not None else float(count_terms(loader, own))
        _check_n_data(terms, loader, own)
        total = sum(p.numel() for p in parameters)
        return Task(loader, own, terms, epochs, total, sum(p.numel() for p in parameters if p.requires_grad))


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

    def record(self, state: RunState) -> dict[str, Mapping[str, Any]]:
        """File name to plain values that a result folder says of this method alone."""
        return {}

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


def _check_n_data(terms: float, loader: Loader, likelihood: Likelihood) -> None:
    if not terms > 0:
        raise DataError(f"n_data counts log-likelihood terms and must be positive; got {terms}")
    with seeded(0, 0, torch.device("cpu")):
        batch = next(iter(loader))
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise DataError(f"the loader must yield pairs (inputs, targets); got {type(batch).__name__}")
    if likelihood.terms(batch[1]) > terms:
        raise DataError(
            f"n_data = {terms:g} is smaller than one batch ({likelihood.terms(batch[1])} terms); it is the number of "
            "log-likelihood terms of the whole training set"
        )
