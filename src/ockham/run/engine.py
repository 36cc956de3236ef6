"""Rounds of removal beside a training run: score, decide, remove, and say what happened."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ockham.choose.prices import Structures
from ockham.choose.rules import BudgetRule, EvidenceRule, RoundInfo, Rounds, Rule, counted, evidence_falls
from ockham.choose.score import Diagnosis, Evidence, diagnose, score
from ockham.choose.units import Ledger
from ockham.core.batch import Loader, count_terms
from ockham.core.likelihood import Likelihood, Loss, Regression, likelihood_from
from ockham.core.modes import seeded
from ockham.core.names import Ignore, protected_names
from ockham.core.posterior import Posterior
from ockham.errors import DataError, OckhamError, OckhamWarning
from ockham.fit.optimizer import VariationalOptimizer
from ockham.fit.predict import Prediction, RegressionPrediction, predict, predict_regression, refresh_batchnorm
from ockham.run.estimators import Estimator, Training, mean_field
from ockham.run.result import NETWORK, PLAN, POSTERIOR, save_network, save_plan
from ockham.run.structures import Shrinker, StructureInfo, example_of
from ockham.run.trainer import EpochInfo, OnStep, Trainer
from ockham.surgery.planning import Plan

__all__ = [
    "Compressed",
    "Compression",
    "Progress",
    "Reducer",
    "compress",
]


class Reducer:
    """Removes weights after the epochs that `Rounds` names.

    Args:
        optimizer: holds the posterior and removes for good.
        rule: decides what goes.
        rounds: when.
        epochs: of the whole run.
        protected: names of parameters from which nothing goes.
    """

    def __init__(
        self,
        optimizer: VariationalOptimizer,
        *,
        rule: Rule,
        rounds: Rounds,
        epochs: int,
        protected: frozenset[str] = frozenset(),
    ) -> None:
        self.optimizer, self.rule, self.rounds, self.protected = optimizer, rule, rounds, protected
        self.plan = rounds.epochs(epochs)
        self.history: list[RoundInfo] = []
        self.diagnosis: Diagnosis | None = None
        self.histograms: list[dict[str, Any]] = []
        self.ledger: Ledger | None = None
        self.seen: Callable[[Posterior], Posterior] = lambda posterior: posterior
        self._total: int | None = None

    def after_epoch(self, epoch: int, loss: float) -> RoundInfo | None:
        """Do the round that is due after this epoch, if one is.

        Args:
            epoch: from 1.
            loss: mean NLL of the epoch, for the free energy.

        Returns:
            What the round did, or None.
        """
        if epoch not in self.plan or self.ended():
            return None
        evidence = score(self.seen(self.optimizer.posterior()))
        if self.diagnosis is None:
            self.diagnosis = diagnose(evidence.posterior, loss)
            for text in self.diagnosis.warnings:
                warnings.warn(text, OckhamWarning, stacklevel=3)
        self.history.append(self._round(evidence, epoch, loss))
        return self.history[-1]

    def ended(self) -> bool:
        """True when the evidence has stopped rising; a budget goes on to its end."""
        return isinstance(self.rule, EvidenceRule) and evidence_falls(self.history, self.rounds.patience)

    def state(self) -> dict[str, Any]:
        """History and diagnosis, plain values."""
        diagnosis = asdict(self.diagnosis) if self.diagnosis else None
        history = [asdict(r) for r in self.history]
        return {"history": history, "diagnosis": diagnosis, "histograms": self.histograms, "total": self._total}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.history = [RoundInfo(**r) for r in state["history"]]
        found = state["diagnosis"]
        self.diagnosis = Diagnosis(**{**found, "warnings": tuple(found["warnings"])}) if found else None
        self.histograms = list(state["histograms"])
        self._total = state["total"]

    def _round(self, evidence: Evidence, epoch: int, loss: float) -> RoundInfo:
        posterior = evidence.posterior
        progress = (self.plan.index(epoch) + 1) / len(self.plan)
        self._total = self._total or posterior.size()
        keep = self._decide(evidence, progress)
        if self.ledger is not None:
            self.ledger.enter(evidence, keep)
        gain, cost = evidence.gain(keep), evidence.nll_cost(keep)
        self.histograms.append({"epoch": epoch, "delta_f": _histogram(evidence)})
        kl = self.optimizer.kl()
        removed = self.optimizer.remove(keep)
        _warn_emptied(keep)
        energy = -(posterior.n_data * loss + posterior.temperature * kl)
        share = (posterior.kept() - removed) / self._total
        return RoundInfo(epoch, removed, share, gain, cost, energy)

    def _decide(self, evidence: Evidence, progress: float) -> dict[str, Tensor]:
        """The rule's keep masks; a budget in weights that structures have met already removes none."""
        limit = self.rule.keep if isinstance(self.rule, BudgetRule) else 0
        if limit > 1 and limit >= evidence.posterior.kept():
            return {name: g.keep.clone() for name, g in evidence.posterior.items()}
        return self.rule.decide(evidence, self.protected, progress)


def _histogram(evidence: Evidence) -> list[int]:
    """Counts of delta_f in 60 bins over [-25, 5] nats, outliers in the end bins."""
    counts = None
    for delta in evidence.values():
        part = delta.float().clamp(-24.999, 4.999).histc(60, -25, 5)
        counts = part if counts is None else counts + part
    return [] if counts is None else [int(c) for c in counts]


def _warn_emptied(keep: dict[str, Tensor]) -> None:
    for name, mask in keep.items():
        if mask.ndim >= 2 and not bool(mask.any()):
            warnings.warn(
                f"every weight of {name!r} was removed: what passes through it is now a constant. If that is not "
                f"wanted, protect it with ignore=[{name!r}] or use a wider prior",
                OckhamWarning,
                stacklevel=5,
            )


class Seeing(Protocol):
    """Another look at a posterior before a round scores it, such as `ockham.Correlated`."""

    def seen(self, posterior: Posterior, model: nn.Module, loader: Loader, likelihood: Likelihood) -> Posterior:
        """The posterior that the round scores."""


@dataclass(frozen=True, slots=True)
class Progress:
    """One epoch of the main job, for those who look in.

    Attributes:
        epoch: number, from 1.
        epochs: planned.
        loss: mean NLL of the epoch, nats.
        accuracy: training accuracy as drawn, nan without classes.
        kept_share: living weights over all.
        round: what the round after this epoch did, if there was one.
        structures: what it removed as a whole, if anything.
    """

    epoch: int
    epochs: int
    loss: float
    accuracy: float
    kept_share: float
    round: RoundInfo | None
    structures: StructureInfo | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Compressed:
    """A reduced network that still carries its posterior.

    Attributes:
        model: the mean network; removed weights are exactly zero. A new module, the user's own is untouched.
        posterior: of its weights.
        rounds: what every round did.
        epochs: loss and accuracy of every epoch.
        diagnosis: of the posterior before the first round; None if there was no round.
        noise_variance: fitted by the regression likelihood, else None.
        histograms: delta_f before every round, counts in 60 bins over [-25, 5] nats.
        plan: what was taken out of the user's network as a whole; None unless structures went.
        structures: what every round removed as a whole.
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
            folder: made where it is missing.
            builder: "zoo:name" lets `ockham.load` build the network; anything else is a label for people.

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


class Compression:
    """The main job as a loop: iterate over its epochs, look in, stop when you like, then take `result`.

    Args:
        model: your network; a copy is trained.
        loader: batches of (inputs, targets) with a length.
        likelihood: "classification", "regression", or a `Likelihood` such as `ockham.Loss(function, reduction="mean")`.
        training: settings of the run.
        rounds: when weights go.
        rule: which go; default the evidence decides.
        ignore: parameters to protect: names, "re:" patterns, module names or types.
        n_data: number of summed log-likelihood terms; counted in one pass where not given.
        estimator: makes the optimizer; default `mean_field`, for baselines `point_estimate`.
        structures: take whole channels, neurons and heads out, too: after each round network and optimizer become
            physically smaller and training goes on at the lower cost. None: single weights only.
        correlated: score the last thousands of weights by their marginals under the full covariance of all of them.
            None: one by one.

    Raises:
        DataError: the loader is empty, labels out of range, n_data impossible.
        OckhamError: settings or parameters out of range.
        TraceError: structures are asked for and the network cannot be traced.

    >>> job = Compression(net, loader)                                                  # doctest: +SKIP
    >>> for progress in job: print(progress.epoch, progress.kept_share)                 # doctest: +SKIP
    >>> small = job.result()                                                            # doctest: +SKIP
    """

    def __init__(  # noqa: PLR0913 - the settings of a run, all keywords
        self,
        model: nn.Module,
        loader: Loader,
        *,
        likelihood: str | Likelihood = "classification",
        training: Training | None = None,
        rounds: Rounds | None = None,
        rule: Rule | None = None,
        ignore: Ignore = (),
        n_data: float | None = None,
        estimator: Estimator | None = None,
        structures: Structures | None = None,
        correlated: Seeing | None = None,
    ) -> None:
        self.training = training or Training()
        self._loader = loader
        network = copy.deepcopy(model)
        self._likelihood = _near(likelihood_from(likelihood), network)
        steps = _length(loader) * self.training.epochs
        terms = float(n_data) if n_data is not None else float(count_terms(loader, self._likelihood))
        _check_n_data(terms, loader, self._likelihood)
        estimator = estimator or mean_field
        optimizer = self._optimizer = estimator(network, self.training, n_data=terms, steps=steps)
        t = self.training
        self._trainer = Trainer(network, self._likelihood, optimizer, loader, epochs=t.epochs, hold=t.hold, seed=t.seed)
        protected = protected_names(network, ignore)
        rounds = rounds or Rounds()
        epochs = self.training.epochs
        self._reducer = Reducer(
            optimizer, rule=rule or EvidenceRule(), rounds=rounds, epochs=epochs, protected=protected
        )
        if correlated is not None:
            self._reducer.seen = lambda posterior: correlated.seen(
                posterior, self._trainer.model, loader, self._likelihood
            )
        self._parameters = sum(p.numel() for p in network.parameters())
        self._trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
        self._shrinker = None
        if structures is not None:
            inputs = example_of(loader, next(network.parameters()).device)
            self._shrinker = Shrinker(network, structures, inputs, ignore)
            self._reducer.ledger = self._shrinker.ledger
            self._reducer.rule = counted(self._reducer.rule, self._trainable)
        self._epochs: list[EpochInfo] = []
        self.on_step: OnStep | None = None

    def __iter__(self) -> Iterator[Progress]:
        """Train and reduce, one epoch per item; iterating again goes on where the last loop stopped."""
        while self._trainer.done < self.training.epochs:
            info = self._trainer.epoch(self.on_step)
            self._epochs.append(info)
            done = self._reducer.after_epoch(info.epoch, info.loss)
            gone = None if done is None else self._shrink(info.epoch)
            yield Progress(info.epoch, self.training.epochs, info.loss, info.accuracy, self._kept_share(), done, gone)

    def result(self) -> Compressed:
        """What there is now: a copy of the mean network with statistics of BatchNorm refreshed, and its posterior."""
        model, posterior, plan = (
            self._optimizer.plain(copy.deepcopy(self._trainer.model)),
            self._optimizer.posterior(),
            None,
        )
        refresh_batchnorm(model, self._loader)
        if self._shrinker is not None:
            model, posterior, plan = self._shrinker.finished(model.eval(), posterior)
        noise = self._likelihood.noise_variance if isinstance(self._likelihood, Regression) else None
        return Compressed(
            model.eval(),
            posterior,
            tuple(self._reducer.history),
            tuple(self._epochs),
            self._reducer.diagnosis,
            noise,
            tuple(self._reducer.histograms),
            plan,
            () if self._shrinker is None else tuple(self._shrinker.history),
            self._parameters,
        )

    def state(self) -> dict[str, Any]:
        """Plain values and tensors from which `load` continues to the same bits."""
        epochs = [[e.epoch, e.loss, None if e.accuracy != e.accuracy else e.accuracy] for e in self._epochs]
        structures = {} if self._shrinker is None else self._shrinker.state()
        state = {"trainer": self._trainer.state(), "reducer": self._reducer.state(), "epochs": epochs}
        return state | {"structures": structures}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state` of a `Compression` built with the same arguments."""
        if self._shrinker is not None:
            self._swap(*self._shrinker.load(state["structures"], self._trainer.model, self._optimizer))
        self._trainer.load(state["trainer"])
        self._reducer.load(state["reducer"])
        self._epochs = [EpochInfo(e, loss, float("nan") if a is None else a) for e, loss, a in state["epochs"]]

    def _kept_share(self) -> float:
        return sum(int(k.sum()) for k in self._optimizer.keep().values()) / max(1, self._trainable)

    def _shrink(self, epoch: int) -> StructureInfo | None:
        if self._shrinker is None or len(self._reducer.history) <= self._shrinker.rule.wait:
            return None
        smaller = self._shrinker.shrink(self._trainer.model, self._optimizer, epoch)
        if smaller is None:
            return None
        self._swap(*smaller)
        return self._shrinker.history[-1]

    def _swap(self, network: nn.Module, optimizer: VariationalOptimizer) -> None:
        assert self._shrinker is not None
        self._optimizer = self._reducer.optimizer = optimizer
        self._trainer.swap(network, optimizer)
        self._reducer.ledger = self._shrinker.ledger


def compress(  # noqa: PLR0913 - the façade's nouns, keywords
    model: nn.Module,
    loader: Loader,
    *,
    likelihood: str | Likelihood = "classification",
    training: Training | None = None,
    rounds: Rounds | None = None,
    rule: Rule | None = None,
    keep_share: float | None = None,
    keep: float | None = None,
    ignore: Ignore = (),
    n_data: float | None = None,
    structure: str | Structures | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Compressed:
    """A network and data in, a smaller network with its posterior out.

    Fits a mean-field posterior, removes the weights whose evidence favours removal, refits, and again (`Rounds`).

    Args:
        model: your network; it is not changed.
        loader: batches of (inputs, targets) with a length.
        likelihood: "classification", "regression" or a `Likelihood`.
        training: settings of the run.
        rounds: when weights go.
        rule: which go; default `EvidenceRule()`: no threshold.
        keep_share: a budget instead: share of the weights that stays (or their number, an int > 1).
        keep: alias of ``keep_share``.
        ignore: parameters to protect: names, "re:" patterns, module names or types.
        n_data: number of summed log-likelihood terms; counted where not given.
        structure: "auto" or `Structures`: whole channels, neurons and heads go, too, and the result is physically
            smaller, with the plan that made it so. Default: single weights only.
        on_progress: called after every epoch.

    Returns:
        `Compressed`.

    Raises:
        OckhamError: see `Compression`; also when both a rule and a budget are given.
    """
    if keep is not None and keep_share is not None:
        raise OckhamError(f"keep is an alias of keep_share: give one of them; got keep={keep}, keep_share={keep_share}")
    budget = keep_share if keep_share is not None else keep
    if budget is not None and rule is not None:
        raise OckhamError("give either a rule or a budget (keep_share), not both; BudgetRule is a rule with a budget")
    if budget is not None:
        rule = BudgetRule(budget)
    structures = structures_from_name(structure)
    settings: dict[str, Any] = {"likelihood": likelihood, "training": training, "rounds": rounds, "rule": rule}
    job = Compression(model, loader, ignore=ignore, n_data=n_data, structures=structures, **settings)
    for progress in job:
        if on_progress is not None:
            on_progress(progress)
    return job.result()


def structures_from_name(structure: str | Structures | None) -> Structures | None:
    """The façade's choice by name.

    Raises:
        OckhamError: an unknown name.
    """
    if structure is None or isinstance(structure, Structures):
        return structure
    if structure == "auto":
        return Structures()
    raise OckhamError(f"structure must be 'auto', a Structures or None; got {structure!r}")


def _near(likelihood: Likelihood, model: nn.Module) -> Likelihood:
    first = next(model.parameters(), None)
    if first is None:
        raise OckhamError("the model has no parameters")
    own = likelihood if isinstance(likelihood, Loss) else copy.deepcopy(likelihood)
    return own.to(first.device)


def _length(loader: Loader) -> int:
    try:
        length = len(loader)
    except TypeError as error:
        raise DataError("the loader needs a length (batches an epoch): schedules are planned from it") from error
    if length == 0:
        raise DataError("the training loader is empty: no batches")
    return length


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
