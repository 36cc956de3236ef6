"""`Compression` and `compress`: rounds of evidence while a network trains, with an estimator of one's choice."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Protocol, Unpack

import torch
from torch import Tensor, nn

from ockham.choose.prices import Structures
from ockham.choose.rules import (
    BudgetRule,
    Diagnosis,
    Evidence,
    EvidenceRule,
    RoundInfo,
    Rounds,
    Rule,
    counted,
    diagnose,
    evidence_falls,
    score,
)
from ockham.core.batch import Loader, LoaderOptions
from ockham.core.likelihood import Likelihood, Regression
from ockham.core.network import Ignore, copied, ignored, protected_names, unwrapped
from ockham.core.objective import Objective, fit_noise
from ockham.core.posterior import Posterior
from ockham.core.processes import ALONE, Processes
from ockham.errors import OckhamError, OckhamWarning, check_keywords
from ockham.fit.ivon import IVON
from ockham.fit.mean_field import MeanField, PointEstimate
from ockham.fit.optimizer import VariationalOptimizer
from ockham.fit.predict import refresh_batchnorm
from ockham.fit.priors import FixedPrior, Prior
from ockham.run.engine import Compressed, Engine, EpochInfo, Method, OnStep, RunState, Task
from ockham.run.measure import HeldOut
from ockham.run.structures import Shrinking, Shrunk, example_of, structures_from_name, structures_name

__all__ = [
    "SMALL_DATA",
    "Compression",
    "Estimator",
    "PlainTraining",
    "Progress",
    "Training",
    "WeightRounds",
    "compress",
    "decided",
    "defaults_for",
    "ivon",
    "mean_field",
    "point_estimate",
]


WEIGHT_DECAY = 0.3
"""Decoupled weight decay of the yardstick; chosen on held-out training images, see the decisions."""


@dataclass(frozen=True, slots=True, eq=False)
class PlainTraining(Method):
    """Train by Adam with decoupled weight decay and remove nothing: the yardstick.

    Attributes:
        rate: learning rate at first.
        stage: name, for the progress bar and the checkpoint.
        held_out: inputs and targets by which every epoch is judged; None judges none.
    """

    several: ClassVar[bool] = True

    rate: float
    stage: str = "adam"
    held_out: tuple[Tensor, Tensor] | None = None

    def start(self, network: nn.Module, task: Task) -> RunState:
        """AdamW over all parameters; vectors (biases, scales of norms) do not decay."""
        fused = next(network.parameters()).device.type in ("cpu", "cuda")
        groups: list[dict[str, Any]] = [
            {"params": [p for p in network.parameters() if (p.ndim > 1) is decays], "weight_decay": decay}
            for decays, decay in ((True, WEIGHT_DECAY), (False, 0.0))
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.rate, fused=fused)
        return RunState.start(network, task.objective, optimizer, (task, HeldOut()))

    def after_epoch(self, state: RunState, info: EpochInfo) -> tuple[RunState, EpochInfo]:
        """Remember the best epoch."""
        if self.held_out is None:
            return state, info
        task, best = state.own
        done = self.result(state)
        now = HeldOut.of(done.model, *self.held_out, likelihood=state.likelihood.kind, epoch=state.done)
        return replace(state, own=(task, min(best, now, key=lambda h: h.nll))), info

    def saved(self, state: RunState) -> dict[str, Any]:
        """The best epoch so far."""
        return asdict(state.own[1])

    def resumed(self, state: RunState, saved: Mapping[str, Any]) -> RunState:
        """The best epoch so far."""
        return replace(state, own=(state.own[0], HeldOut(**saved)))

    def result(self, state: RunState) -> Compressed:
        """The network as it is."""
        task, none = state.own[0], Posterior({}, state.own[0].n_data)
        model, objective = copied(state.network, {}), state.objective
        if isinstance(objective.likelihood, Regression):
            objective = copy.deepcopy(objective)
            fit_noise(model, task.loader, objective, sharded=task.processes.count > 1)
        model, none = objective.finished(model, none)
        return Compressed(model, none, (), state.history, None, none.noise_variance, parameters=task.parameters)

    def settings(self) -> dict[str, Any]:
        """Rate and decay."""
        return {"rate": self.rate, "weight_decay": WEIGHT_DECAY}


@dataclass(frozen=True, slots=True)
class Training:
    """Settings of the variational training run.

    Attributes:
        epochs: passes over the data, reduction and refitting included.
        learning_rate: learning rate of mean and ln std, at first.
        hold: share of the steps at full learning rate; it falls linearly to zero after them.
        prior: prior of every weight.
        initial_std: starting standard deviation.
        temperature: temperature T of the posterior; 1 is Bayes.
        kl_warmup: share of the steps over which the KL gets its weight.
        seed: seed of noise, shuffling and dropout.
    """

    epochs: int = 30
    learning_rate: float = 2e-3
    hold: float = 0.5
    prior: Prior = field(default_factory=lambda: FixedPrior(0.3))
    initial_std: float = 1e-2
    temperature: float = 1.0
    kl_warmup: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise OckhamError(f"Training: epochs must be at least 1; got {self.epochs}")
        for name in ("learning_rate", "initial_std", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise OckhamError(f"Training: {name} must be positive and finite; got {getattr(self, name)}")
        if not isinstance(self.prior, Prior):
            raise OckhamError(f"Training: prior must be a Prior such as ockham.FixedPrior(0.3); got {self.prior!r}")
        if not (0 <= self.hold < 1 and 0 <= self.kl_warmup <= 1):
            raise OckhamError(f"Training: hold in [0, 1), kl_warmup in [0, 1]; got {self.hold}, {self.kl_warmup}")


SMALL_DATA = 10_000
"""Fewer training examples than this count as small."""


def defaults_for(examples: int) -> tuple[Training, Rounds, int]:
    """Training, rounds and batch size of the command for a number of training examples.

    Small data get more epochs and smaller batches, a wider prior, a longer warm-up of the KL and a later first round:
    a posterior that has not formed removes too much at once. Their posterior is tempered (T = 0.1), since posterior
    averages are underconfident there; what was measured is in docs/decisions.md.
    """
    if examples >= SMALL_DATA:
        return Training(), Rounds(), 128
    settings = {"temperature": 0.1, "kl_warmup": 0.15, "prior": FixedPrior(1.0)}
    return Training(epochs=80, learning_rate=3e-3, **settings), Rounds(start=0.25, end=0.9, count=11), 64  # type: ignore[arg-type]


Estimator = Callable[..., VariationalOptimizer]
"""(model, training, *, n_data, steps) to an optimizer over the model's parameters that require a gradient."""


def mean_field(model: nn.Module, training: Training, *, n_data: float, steps: int) -> VariationalOptimizer:
    """`ockham.MeanField` with the settings of the run; ``steps`` is its whole length."""
    optimizer = MeanField(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad],
        n_data=n_data,
        lr=training.learning_rate,
        prior=training.prior,
        initial_std=training.initial_std,
        temperature=training.temperature,
        kl_warmup=round(training.kl_warmup * steps),
        prior_interval=max(1, steps // (training.epochs * training.prior.updates_per_epoch)),
        seed=training.seed,
    )
    optimizer.hold(model)
    return optimizer


def point_estimate(model: nn.Module, training: Training, *, n_data: float, steps: int) -> VariationalOptimizer:
    """`ockham.PointEstimate`, for magnitude pruning through the same door."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = PointEstimate(named, n_data=n_data, lr=training.learning_rate)
    optimizer.hold(model)
    return optimizer


def ivon(model: nn.Module, training: Training, *, n_data: float, steps: int) -> VariationalOptimizer:
    """`ockham.IVON` with the settings of the run; its learning rate is 50 times that of Adam (decisions)."""
    optimizer = IVON(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad],
        n_data=n_data,
        lr=50 * training.learning_rate,
        steps=steps,
        prior=training.prior,
        initial_std=training.initial_std,
        temperature=training.temperature,
        kl_warmup=round(training.kl_warmup * steps),
        prior_interval=max(1, steps // training.epochs),
        seed=training.seed,
    )
    optimizer.hold(model)
    return optimizer


def as_plain(training: Training) -> dict[str, Any]:
    """Settings as JSON-able values, the prior by its type and numbers."""
    plain = {f.name: getattr(training, f.name) for f in fields(training)}
    shown = [f"{f.name}={getattr(training.prior, f.name):g}" for f in fields(training.prior) if f.repr]  # type: ignore[arg-type]
    return plain | {"prior": f"{type(training.prior).__name__}({', '.join(shown)})"}


Progress = EpochInfo
"""One epoch of the main job, for those who look in."""


class Seeing(Protocol):
    """Another look at a posterior before a round scores it, such as `ockham.Correlated`."""

    def seen(self, posterior: Posterior, model: nn.Module, loader: Loader, objective: Objective) -> Posterior:
        """The posterior that the round scores."""


@dataclass(frozen=True, slots=True, eq=False)
class Removed:
    """What rounds of removal need to know of those before.

    Attributes:
        history: account of every round.
        diagnosis: verdict on the posterior before the first.
        histograms: delta_f before every round.
        total: number of scored weights before the first round.
        shrunk: knowledge of the structures that went; None where only single weights go.
    """

    history: tuple[RoundInfo, ...] = ()
    diagnosis: Diagnosis | None = None
    histograms: tuple[dict[str, Any], ...] = ()
    total: int = 0
    shrunk: Shrunk | None = None


@dataclass(frozen=True, slots=True, eq=False)
class WeightRounds(Method):
    """Fit a posterior; after the epochs that `Rounds` names score, decide, remove, and take idle structures out.

    Attributes:
        training: settings of the run.
        rule: decision what goes.
        rounds: schedule of the removals.
        ignore: parameters to protect.
        estimator: maker of the optimizer.
        structures: settings by which whole units go; None: single weights only.
        correlated: correction of the posterior of a round by correlations; None: as the optimizer has it.
    """

    several: ClassVar[bool] = True

    training: Training = field(default_factory=Training)
    rule: Rule = field(default_factory=EvidenceRule)
    rounds: Rounds = field(default_factory=Rounds)
    ignore: Ignore = ()
    estimator: Estimator = mean_field
    structures: Structures | None = None
    correlated: Seeing | None = None

    def start(self, network: nn.Module, task: Task) -> RunState:
        """The posterior before the first step.

        Raises:
            OckhamError: correlated evidence with several processes, each of which has but a part of the data.
        """
        if self.correlated is not None and task.processes.count > 1:
            raise OckhamError("correlated= reads all of the data, and every process has a part: train in one process")
        optimizer = self.estimator(network, self.training, n_data=task.n_data, steps=task.steps)
        traced, protected = sorted(ignored(network, self.ignore)), protected_names(network, self.ignore)
        shrinking, shrunk, rule = None, None, self.rule
        if self.structures is not None:
            inputs = example_of(task.loader, task.objective, network)
            shrinking = Shrinking(self.structures, inputs, tuple(traced), task.processes)
            shrunk, rule = shrinking.start(network), counted(rule, task.trainable)
        own = _Run(task, rule, self.rounds.epochs(task.epochs), protected, shrinking, Removed(shrunk=shrunk))
        return RunState.start(network, task.objective, optimizer, own)

    def after_epoch(self, state: RunState, info: EpochInfo) -> tuple[RunState, EpochInfo]:
        """The round, and the surgery after it, where one is due."""
        own, done = state.own, None
        ended = isinstance(own.rule, EvidenceRule) and evidence_falls(list(own.removed.history), self.rounds.patience)
        if info.epoch in own.due and not ended:
            own, done = self._round(state, info)
            state = replace(state, own=own)
            if own.shrinking is not None and len(own.removed.history) > own.shrinking.rule.wait:
                before, pair = own.removed.shrunk, (state.network, _posterior_of(state))
                assert before is not None
                known, network, small = own.shrinking.shrink(before, *pair, info.epoch)
                own = replace(own, removed=replace(own.removed, shrunk=known))
                state = replace(state.swapped(network, small), own=own)
                if len(known.history) > len(before.history):
                    info = replace(info, structures=known.history[-1])
        kept = sum(int(k.sum()) for k in _posterior_of(state).keep().values())
        return state, replace(info, round=done, kept_share=kept / max(1, own.task.trainable))

    def _round(self, state: RunState, info: EpochInfo) -> tuple[_Run, RoundInfo]:
        optimizer, own = _posterior_of(state), state.own
        posterior, processes = optimizer.posterior(), own.task.processes
        processes.agree(t for g in posterior.values() for t in (g.mean, g.precision))
        if self.correlated is not None:
            posterior = self.correlated.seen(posterior, state.network, own.task.loader, state.objective)
        evidence, removed = score(posterior), own.removed
        if removed.diagnosis is None:
            removed = replace(removed, diagnosis=diagnose(posterior, info.loss))
            for text in removed.diagnosis.warnings:
                warnings.warn(text, OckhamWarning, stacklevel=4)
        total = removed.total or posterior.size()
        keep = decided(own.rule, evidence, own.protected, (own.due.index(info.epoch) + 1) / len(own.due))
        keep = {name: processes.told(mask) for name, mask in keep.items()}
        if removed.shrunk is not None:
            shrunk = replace(removed.shrunk, ledger=removed.shrunk.ledger.entered(evidence, keep))
            removed = replace(removed, shrunk=shrunk)
        energy = -(posterior.n_data * info.loss + posterior.temperature * optimizer.kl())
        gain, cost = evidence.gain(keep), evidence.nll_cost(keep)
        gone = optimizer.remove(keep)
        for name, mask in keep.items():
            if mask.ndim >= 2 and not bool(mask.any()):
                warnings.warn(
                    f"every weight of {name!r} was removed: what passes through it is now a constant. If that is not "
                    f"wanted, protect it with ignore=[{name!r}] or use a wider prior",
                    OckhamWarning,
                    stacklevel=5,
                )
        did = RoundInfo(info.epoch, gone, (posterior.kept() - gone) / total, gain, cost, energy)
        # Counts of delta_f in 60 bins over [-25, 5] nats, outliers in the end bins.
        parts = [delta.float().clamp(-24.999, 4.999).histc(60, -25, 5) for delta in evidence.values()]
        counts = [int(c) for c in sum(parts[1:], parts[0])] if parts else []
        pictures = (*removed.histograms, {"epoch": info.epoch, "delta_f": counts})
        removed = replace(removed, history=(*removed.history, did), histograms=pictures, total=total)
        return replace(own, removed=removed), did

    @property
    def name(self) -> str:
        """The posterior, as the command calls it."""
        spelt = {"mean_field": "mean-field", "ivon": "ivon", "point_estimate": "map", "spike_slab": "spike-slab"}
        made = self.estimator.__name__
        return spelt.get(made, made)

    def settings(self) -> dict[str, Any]:
        """Settings of the run, the rule and the rounds, the structures."""
        made = {"rule": rule_name(self.rule), "structures": structures_name(self.structures)}
        names = {"posterior": self.name, "ignore": repr(self.ignore)}
        return as_plain(self.training) | made | names | asdict(self.rounds)

    def saved(self, state: RunState) -> dict[str, Any]:
        """History, diagnosis and structures, plain values and tensors."""
        r = state.own.removed
        return {
            "history": [asdict(info) for info in r.history],
            "diagnosis": asdict(r.diagnosis) if r.diagnosis else None,
            "histograms": list(r.histograms),
            "total": r.total,
            "structures": {} if r.shrunk is None else r.shrunk.saved(),
        }

    def resumed(self, state: RunState, saved: Mapping[str, Any]) -> RunState:
        """Continue from `saved`."""
        own, found, shrunk = state.own, saved["diagnosis"], state.own.removed.shrunk
        if own.shrinking is not None:
            pair = (state.network, state.optimizer)
            shrunk, network, optimizer = own.shrinking.resumed(shrunk, saved["structures"], *pair)
            state = state.swapped(network, optimizer)
        diagnosis = Diagnosis(**{**found, "warnings": tuple(found["warnings"])}) if found else None
        history = tuple(RoundInfo(**r) for r in saved["history"])
        removed = Removed(history, diagnosis, tuple(saved["histograms"]), saved["total"], shrunk)
        return replace(state, own=replace(own, removed=removed))

    def result(self, state: RunState) -> Compressed:
        """A copy of the mean network with statistics of BatchNorm refreshed, and its posterior."""
        own, optimizer = state.own, _posterior_of(state)
        model, posterior, plan = optimizer.plain(copied(state.network, {})), optimizer.posterior(), None
        refresh_batchnorm(model, own.task.loader, batch=own.task.objective.batch)
        own.task.processes.mean_(model.buffers())
        shrunk = own.removed.shrunk
        if own.shrinking is not None:
            model, posterior, plan = own.shrinking.finished(shrunk, model.eval(), posterior)
        model, posterior = own.task.objective.finished(model, posterior)
        return Compressed(
            model.eval(),
            posterior,
            own.removed.history,
            state.history,
            own.removed.diagnosis,
            posterior.noise_variance,
            own.removed.histograms,
            plan,
            () if shrunk is None else shrunk.history,
            own.task.parameters,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """What rounds need to know of the run that they are part of."""

    task: Task
    rule: Rule
    due: list[int]  # epochs after which there is a round
    protected: frozenset[str]
    shrinking: Shrinking | None
    removed: Removed


class Compression:
    """The main job as a loop: iterate over its epochs, look in, stop when you like, then take `result`.

    Args:
        model: your network; a copy is trained. In `torch.nn.parallel.DistributedDataParallel` all its processes train
            one network on the data of all their loaders, and each gets the result.
        loader: batches of (inputs, targets) with a length.
        likelihood: "classification", "regression", or a `Likelihood` such as `ockham.Loss(function, reduction="mean")`.
        training: settings of the run.
        rounds: schedule of the removals.
        rule: decision what goes; default the evidence.
        ignore: parameters to protect: names, "re:" patterns, module names or types.
        n_data: number of summed log-likelihood terms; counted in one pass where not given.
        estimator: maker of the optimizer; default `mean_field`, for baselines `point_estimate`.
        structures: settings by which whole channels, neurons and heads go, too: after each round network and
            optimizer become physically smaller and training goes on at the lower cost. None: single weights only.
        correlated: score of the last thousands of weights by their marginals under the full covariance of all of them.
            None: one by one.
        **reading: ``batch``, ``output`` and ``steps_per_epoch``, see `ockham.core.batch.LoaderOptions`.

    Raises:
        DataError: the loader is empty, labels out of range, n_data impossible.
        OckhamError: settings or parameters out of range.
        TraceError: structures are asked for and the network cannot be traced.

    >>> job = Compression(net, loader)                                                  # doctest: +SKIP
    >>> for progress in job: print(progress.epoch, progress.kept_share)                 # doctest: +SKIP
    >>> small = job.result()                                                            # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
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
        **reading: Unpack[LoaderOptions],
    ) -> None:
        check_keywords("Compression", reading, LoaderOptions, Training, Rounds)
        self.training = t = training or Training()
        model, processes = unwrapped(model)
        if processes is ALONE and (world := Processes.world().count) > 1:
            warnings.warn(
                f"there are {world} processes, and each trains a network of its own on the data of its own loader: "
                "wrap the network in torch.nn.parallel.DistributedDataParallel to train one together",
                OckhamWarning,
                stacklevel=2,
            )
        network = copied(model)
        names = tuple(sorted(ignored(model, ignore)))
        method = WeightRounds(
            t, rule or EvidenceRule(), rounds or Rounds(), names, estimator or mean_field, structures, correlated
        )
        task = Task.of(network, loader, likelihood, epochs=t.epochs, n_data=n_data, processes=processes, **reading)
        self.engine = Engine(method, network, task, hold=t.hold, seed=t.seed)

    @property
    def network(self) -> nn.Module:
        """The network in training, as it is now."""
        return self.engine.state.network

    @property
    def on_step(self) -> OnStep | None:
        """Called within epochs."""
        return self.engine.on_step

    @on_step.setter
    def on_step(self, call: OnStep | None) -> None:
        self.engine.on_step = call

    def __iter__(self) -> Iterator[EpochInfo]:
        """Train and reduce, one epoch per item; iterating again goes on where the last loop stopped."""
        return iter(self.engine)

    def result(self) -> Compressed:
        """What there is now: a copy of the mean network with statistics of BatchNorm refreshed, and its posterior."""
        return self.engine.result()

    def state(self) -> dict[str, Any]:
        """Plain values and tensors from which `load` continues to the same bits."""
        return self.engine.saved()

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state` of a `Compression` built with the same arguments."""
        self.engine.load(state)


def compress(
    model: nn.Module,
    loader: Loader,
    *,
    keep_share: float | None = None,
    keep: float | None = None,
    structure: str | Structures | None = None,
    on_progress: Callable[[EpochInfo], None] | None = None,
    **settings: Any,
) -> Compressed:
    """Make a network smaller: a network and data in, a smaller network with its posterior out.

    Fits a posterior, removes the weights whose evidence favours removal, refits, and again (`Rounds`).

    Args:
        model: your network; it is not changed.
        loader: batches of (inputs, targets) with a length.
        keep_share: budget instead of the evidence: share of the weights that stays (or their number, an int > 1).
        keep: alias of ``keep_share``.
        structure: "auto" or `Structures`: whole channels, neurons and heads go, too, and the result is physically
            smaller, with the plan that made it so. Default: single weights only.
        on_progress: function called after every epoch with its `Progress`.
        **settings: keywords of `Compression`: ``likelihood``, ``training``, ``rounds``, ``rule``, ``ignore``,
            ``n_data``, ``estimator``, ``correlated``, ``batch``, ``output``, ``steps_per_epoch``.

    Returns:
        `Compressed`.

    Raises:
        OckhamError: see `Compression`; also when both a rule and a budget are given.
    """
    if keep is not None and keep_share is not None:
        raise OckhamError(f"keep is an alias of keep_share: give one of them; got keep={keep}, keep_share={keep_share}")
    budget = keep_share if keep_share is not None else keep
    if budget is not None:
        if settings.get("rule") is not None:
            raise OckhamError(
                "give either a rule or a budget (keep_share), not both; BudgetRule is a rule with a budget"
            )
        settings["rule"] = BudgetRule(budget)
    job = Compression(model, loader, structures=structures_from_name(structure), **settings)
    for progress in job:
        if on_progress is not None:
            on_progress(progress)
    return job.result()


def _posterior_of(state: RunState) -> VariationalOptimizer:
    assert isinstance(state.optimizer, VariationalOptimizer)
    return state.optimizer


def decided(rule: Rule, evidence: Evidence, protected: frozenset[str], progress: float) -> dict[str, Tensor]:
    """The rule's keep masks; a budget in weights that structures have met already removes none."""
    limit = rule.keep if isinstance(rule, BudgetRule) else 0
    if limit > 1 and limit >= evidence.posterior.kept():
        return {name: g.keep.clone() for name, g in evidence.posterior.items()}
    keep = rule.decide(evidence, protected, progress)
    for name, mask in keep.items():
        expected = tuple(evidence.posterior[name].mean.shape) if name in evidence.posterior else None
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or tuple(mask.shape) != expected:
            got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            wanted = "no such parameter" if expected is None else f"booleans (True = stays) of the shape {expected}"
            raise OckhamError(f"the rule {type(rule).__name__} must give {name!r} {wanted}; got {got}")
    return keep


def rule_name(rule: Rule | None) -> str:
    """A rule with its numbers and its order, for the record and for telling jobs apart."""
    if rule is None:
        return "EvidenceRule()"
    found: dict[str, Any] = {f.name: getattr(rule, f.name) for f in fields(rule)} if is_dataclass(rule) else {}
    shown = {k: getattr(v, "__qualname__", v) for k, v in found.items()}
    return f"{type(rule).__name__}({', '.join(f'{k}={v}' for k, v in shown.items())})"
