"""Training with gates: how the KL is weighted, what decides, when structures go, and the rounds themselves."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ockham.choose.planning import plan
from ockham.core.batch import Loader, LoaderOptions
from ockham.core.likelihood import Likelihood, Regression
from ockham.core.network import copied, device_of, evaluating, seeded
from ockham.core.objective import Objective, fit_noise, objective_of
from ockham.core.posterior import Posterior
from ockham.errors import OckhamError, check_keywords
from ockham.fit.predict import refresh_batchnorm
from ockham.methods.gates import lognormal
from ockham.methods.gates.attach import GATE_RULES, NAME, Gates, attach_gates
from ockham.methods.gates.noise import GateDraw, per_example
from ockham.methods.gates.report import parameters_left
from ockham.methods.gates.rules import GateEvidence, GateRule, bmrs_n, by_taylor
from ockham.run.engine import Compressed, Engine, EpochInfo, Method, RunState, Task, rates_of
from ockham.surgery import Groups, Plan, shrink

__all__ = [
    "Decision",
    "GateCompression",
    "GateProgress",
    "GateRounds",
    "GateTraining",
    "KLWeight",
    "ParametersLeft",
    "Tempered",
    "by_threshold",
    "gate_sensitivity",
    "layer_facts",
    "mean_mean",
    "true_elbo",
    "without_gates",
]

KLWeight = Callable[[Gates, float], Tensor]
"""(gates, n_data) to the term that joins the mean NLL of a batch."""

Decision = Callable[[Gates, GateEvidence, float], Mapping[str, Tensor]]
"""(gates, their evidence, share of the training done) to masks of what stays."""


def true_elbo(gates: Gates, n_data: float) -> Tensor:
    """Sum of the KL over N: the evidence lower bound, per example."""
    return gates.kl() / n_data


def mean_mean(gates: Gates, n_data: float) -> Tensor:
    """Mean over layers of the mean KL per gate, whatever the number of examples: what the released code of BMRS adds.

    N / (number of gates) times the true weight: 160 times on 48,000 images and 300 gates. Training then collapses
    gates that the data want, and rules with a fixed threshold remove whole layers.
    """
    noise = gates.noise
    each = lognormal.kl(noise.mean, noise.std, low=noise.low, high=noise.high)
    means = [each[p][noise.keep[p]].mean() for p in gates.places.values()]
    # a group of one unit is no group: with one left in every layer nothing more can go
    return torch.stack(means).mean() if means else 0 * gates.kl()


@dataclass(frozen=True, slots=True)
class Tempered:
    """A multiple of the true weight: the posterior of the data to the power 1/temperature, a price on structures.

    Attributes:
        temperature: temperature T. 1 is `true_elbo`; above it more structures go, and delta_f is *tempered* evidence.
    """

    temperature: float

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise OckhamError(f"Tempered: temperature must be positive and finite; got {self.temperature}")

    def __call__(self, gates: Gates, n_data: float) -> Tensor:
        """Temperature times KL over N."""
        return self.temperature * gates.kl() / n_data


def by_threshold(gates: Gates, evidence: GateEvidence, progress: float) -> Mapping[str, Tensor]:
    """The rule's own stopping point: what has a score >= 0 goes."""
    return evidence.keep


@dataclass(frozen=True, slots=True)
class ParametersLeft:
    """A number of parameters left at the end, by order of score; on the way there in a cubic schedule.

    Attributes:
        parameters: learnable values of the network at the end, gates not counted.
        full: learnable values of the network at the start.
    """

    parameters: int
    full: int

    def __call__(self, gates: Gates, evidence: GateEvidence, progress: float) -> Mapping[str, Tensor]:
        """The least removal that leaves no more than what is allowed now."""
        allowed = self.full - (self.full - self.parameters) * (1 - (1 - progress) ** 3)
        low, high = 0, sum(len(p) for p in gates.places.values())
        while low < high:
            middle = (low + high) // 2
            if parameters_left(gates, evidence.matched(middle)) <= allowed:
                high = middle
            else:
                low = middle + 1
        return evidence.matched(low)


@dataclass(frozen=True, slots=True)
class GateTraining:
    """Settings of a run.

    Attributes:
        epochs: epochs with gates.
        fine_tune: epochs afterwards, of the plain network with E[theta] folded in.
        learning_rate: learning rate of Adam, for weights, at first.
        gate_rate: learning rate of the gates over that of the weights.
        hold: share of the steps at full learning rate; it falls linearly to zero after them.
        kl_weight: `true_elbo`, `Tempered` for a price on structures, or `mean_mean` for reproduction.
        kl_warmup: share of the steps with gates over which the KL gets its weight.
        every: epochs between removals; 0 removes once, after the training with gates.
        start: share of the epochs before the first removal.
        shrink_every: removals between physical shrinking; 0 shrinks at the end only.
        noise: `per_example`, or ``per_element`` for reproduction.
        seed: seed of noise, shuffling and dropout.
    """

    epochs: int = 50
    fine_tune: int = 10
    learning_rate: float = 1e-3
    gate_rate: float = 1.0
    hold: float = 0.5
    kl_weight: KLWeight = true_elbo
    kl_warmup: float = 0.1
    every: int = 1
    start: float = 0.0
    shrink_every: int = 1
    noise: GateDraw = per_example
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or min(self.fine_tune, self.every, self.shrink_every) < 0:
            raise OckhamError(f"GateTraining: at least one epoch, nothing negative; got {self}")
        if not (0 < self.learning_rate < math.inf and 0 < self.gate_rate < math.inf):
            raise OckhamError(f"GateTraining: rates must be positive; got {self.learning_rate}, {self.gate_rate}")
        if not (0 <= self.hold <= 1 and 0 <= self.kl_warmup <= 1 and 0 <= self.start <= 1):
            raise OckhamError(f"GateTraining: hold, kl_warmup and start are shares in [0, 1]; got {self}")


GateProgress = EpochInfo
"""One epoch with gates; its ``widths``, ``kl``, ``removed`` and ``parameters`` are filled in."""


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """State of a run with gates."""

    task: Task
    gates: Gates | None  # None once they are folded in
    first: Mapping[str, Tensor]  # group id to the places of its gates in the network before
    groups: Groups  # of the network before
    keys: Tensor  # of the living gates, as they were numbered at first
    plans: tuple[Plan, ...] = ()
    removals: int = 0
    layers: tuple[dict[str, Any], ...] = ()
    curves: Mapping[str, Any] = field(default_factory=dict)

    def living(self) -> Tensor:
        """Keys of the gates that are alive."""
        return self.keys if self.gates is None else self.gates.noise.key[self.gates.noise.keep]

    def widths(self) -> dict[str, int]:
        """Structures left by group."""
        living = self.living().cpu()
        return {k: int(torch.isin(places.cpu(), living).sum()) for k, places in self.first.items()}


@dataclass(frozen=True, slots=True, eq=False)
class GateRounds(Method):
    """Train with gates, remove by a rule, shrink on the way, fold E[theta] in, fine-tune.

    Attributes:
        training: settings.
        inputs: batch of inputs, for tracing.
        rule: function that scores the structures.
        decide: function from scores to masks: `by_threshold`, or a `ParametersLeft`.
        ignore: parameters that stay whole, as for `ockham.attach_gates`.
        inspect: function of the trained gates before the last decision, whose plain answer the result keeps.
    """

    training: GateTraining
    inputs: Any
    rule: GateRule = bmrs_n
    decide: Decision = by_threshold
    ignore: Any = ()
    inspect: Callable[[Gates, RunState], Mapping[str, Any]] | None = None
    stage = "gates"

    def start(self, network: nn.Module, task: Task) -> RunState:
        """Gates on every structure that can have one, and Adam over both."""
        gates = attach_gates(network, self.inputs, ignore=self.ignore, noise=self.training.noise)
        own = _Run(task, gates, dict(gates.places), gates.groups, gates.noise.key.clone())
        return RunState.start(network, task.objective, self._adam(network, gates), own)

    def term(self, state: RunState, at: float) -> Tensor | None:
        """The KL of the gates per example, warmed up."""
        t, own = self.training, state.own
        if own.gates is None:
            return None
        return min(1.0, at / max(1e-9, t.kl_warmup * t.epochs)) * t.kl_weight(own.gates, own.task.n_data)

    def after_epoch(self, state: RunState, info: EpochInfo) -> tuple[RunState, EpochInfo]:
        """Remove, shrink and fold when it is time."""
        t, gates, removed, last = self.training, state.own.gates, 0, info.epoch == self.training.epochs
        if gates is not None:
            if last and self.inspect is not None:
                state = replace(state, own=replace(state.own, curves=self.inspect(gates, state)))
            if (last and not t.every) or (t.every and info.epoch % t.every == 0 and info.epoch >= t.start * t.epochs):
                sensitivity = None
                if self.rule is by_taylor:  # it costs a pass over a part of the data
                    sensitivity = gate_sensitivity(gates, state.own.task.loader, state.objective, seed=t.seed)
                evidence = gates.evidence(self.rule, sensitivity=sensitivity)
                keep = self.decide(gates, evidence, min(1.0, info.epoch / t.epochs))
                layers = tuple(layer_facts(gates, evidence, keep))
                removed, count = gates.remove(keep), state.own.removals + 1
                state = replace(state, own=replace(state.own, layers=layers, removals=count))
                if t.shrink_every and count % t.shrink_every == 0:
                    state = self._shrunk(state)
            if last and t.fine_tune:
                state = self._folded(self._shrunk(state))
        own = state.own
        bare = sum(p.numel() for n, p in state.network.named_parameters() if not n.startswith(f"{NAME}."))
        kl = 0.0 if own.gates is None else float(own.gates.kl().detach())
        done: dict[str, Any] = {"kl": kl, "widths": own.widths(), "removed": removed, "parameters": bare}
        return state, replace(info, kept_share=bare / own.task.parameters, **done)

    def settings(self) -> dict[str, Any]:
        """Settings of the training, rule and decision."""
        t = self.training
        plain = {f.name: getattr(t, f.name) for f in fields(t)}
        named = {k: getattr(v, "__name__", str(v)) if callable(v) else v for k, v in plain.items()}
        decide = getattr(self.decide, "__name__", str(self.decide))
        return {**named, "rule": self.rule_name(), "decide": decide, "ignore": repr(self.ignore)}

    def rule_name(self) -> str:
        """The rule's name in the command, or that of the function."""
        return next((k for k, v in GATE_RULES.items() if v is self.rule), getattr(self.rule, "__name__", "rule"))

    @property
    def name(self) -> str:
        """BMRS, whatever the rule."""
        return "bmrs"

    def record(self, state: RunState) -> dict[str, Any]:
        """Widths over the epochs, the gates before the last decision, curves."""
        start = {k: len(places) for k, places in state.own.first.items()}
        epochs = [{"start": start, "epoch": h.epoch, "widths": dict(h.widths)} for h in state.history]
        weight, own = self.settings()["kl_weight"], state.own
        values = {"rule": self.rule_name(), "kl_weight": weight, "epochs": epochs}
        return {**values, "layers": list(own.layers), "curves": dict(own.curves)}

    def saved(self, state: RunState) -> dict[str, Any]:
        """Plans, keys of the living and what the report shows."""
        own = state.own
        return {
            "removals": own.removals,
            "gated": own.gates is not None,
            "keys": own.living(),
            "plans": [p.to_json() for p in own.plans],
            "layers": json.dumps(own.layers),
            "curves": json.dumps(own.curves),
        }

    def resumed(self, state: RunState, saved: Mapping[str, Any]) -> RunState:
        """Replay the plans, and fold if that was done."""
        for text in saved["plans"]:
            state = self._cut(state, Plan.from_json(text))
        if not saved["gated"]:
            state = self._folded(state)
        keys = torch.as_tensor(saved["keys"], device=state.own.keys.device)
        layers, curves = tuple(json.loads(saved["layers"])), json.loads(saved["curves"])
        own = replace(state.own, keys=keys, removals=int(saved["removals"]), layers=layers, curves=curves)
        return replace(state, own=own)

    def result(self, state: RunState) -> Compressed:
        """A plain network: removed structures gone, E[theta] folded in, BatchNorm refreshed."""
        model, own = copied(state.network, {}), state.own
        if own.gates is not None:
            gates = Gates.of(model, self.inputs, ignore=self.ignore)
            model = shrink(gates.model, gates.plan)
            Gates.of(model, self.inputs, ignore=self.ignore).fold()
        refresh_batchnorm(model, own.task.loader, batch=own.task.objective.batch)
        objective = own.task.objective
        if isinstance(objective.likelihood, Regression):  # the noise that was trained also saw that of the gates
            objective = copy.deepcopy(objective)
            fit_noise(model, own.task.loader, objective)
        model, none = objective.finished(model, Posterior({}, own.task.n_data))
        noise = none.noise_variance
        whole: dict[str, Any] = {"plan": self.plan(state), "parameters": own.task.parameters}
        return Compressed(model.eval(), none, (), state.history, None, noise, **whole)

    def plan(self, state: RunState) -> Plan:
        """All that went so far, as one plan for a fresh network without gates."""
        living = state.own.living().cpu()
        return plan(state.own.groups, {k: torch.isin(places.cpu(), living) for k, places in state.own.first.items()})

    def _shrunk(self, state: RunState) -> RunState:
        gates = state.own.gates
        return state if bool(gates.noise.keep.all()) else self._cut(state, gates.plan)

    def _cut(self, state: RunState, surgery: Plan) -> RunState:
        network, optimizer = shrink(state.network, surgery, optimizer=state.optimizer)
        gates = Gates.of(network, self.inputs, ignore=self.ignore)
        return replace(
            state.swapped(network, optimizer), own=replace(state.own, gates=gates, plans=(*state.own.plans, surgery))
        )

    def _folded(self, state: RunState) -> RunState:
        """The plain network, and an optimizer without memory of the gates."""
        own = replace(state.own, keys=state.own.living(), gates=None)
        state.own.gates.fold()
        optimizer = self._adam(state.network, None)
        return replace(state, optimizer=optimizer, rates=rates_of(optimizer), own=own)

    def _adam(self, network: nn.Module, gates: Gates | None) -> torch.optim.Optimizer:
        held = set() if gates is None else set(gates.parameters())
        rate, device = self.training.learning_rate, device_of(network)
        groups = [{"params": [p for p in network.parameters() if p not in held and p.requires_grad], "lr": rate}]
        if gates is not None:
            groups.append({"params": gates.parameters(), "lr": rate * self.training.gate_rate})
        return torch.optim.Adam(groups, lr=rate, fused=device.type in ("cpu", "cuda"))


class GateCompression:
    """Train with gates, remove by a rule, shrink, fold, fine-tune; iterate over its epochs, then take `result`.

    Args:
        model: your network; a copy is trained.
        example_inputs: batch of inputs, for tracing.
        loader: batches of (inputs, targets) with a length.
        likelihood: "classification", "regression", or a `Likelihood`.
        training: settings.
        rule: function that scores the structures.
        decide: function from scores to masks: `by_threshold`, or a `ParametersLeft`.
        ignore: parameters that stay whole, as for `ockham.attach_gates`.
        n_data: number of summed log-likelihood terms; counted in one pass where not given.
        **reading: ``batch``, ``output`` and ``steps_per_epoch``, see `ockham.core.batch.LoaderOptions`.

    Raises:
        DataError: the loader is empty, labels out of range, n_data impossible.
        OckhamError: settings out of range, or nothing can have a gate.

    >>> job = GateCompression(net, x, loader, rule=bmrs_u(4))                           # doctest: +SKIP
    >>> for progress in job: print(progress.widths)                                     # doctest: +SKIP
    >>> small = job.result()                                                            # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        loader: Loader,
        *,
        likelihood: str | Likelihood = "classification",
        training: GateTraining | None = None,
        rule: GateRule = bmrs_n,
        decide: Decision = by_threshold,
        ignore: Any = (),
        n_data: float | None = None,
        **reading: Unpack[LoaderOptions],
    ) -> None:
        check_keywords("GateCompression", reading, LoaderOptions)
        self.training = t = training or GateTraining()
        self.on_trained: Callable[[Gates], None] | None = None
        network = copied(model)
        task = Task.of(network, loader, likelihood, epochs=t.epochs + t.fine_tune, n_data=n_data, **reading)
        self.method = GateRounds(t, example_inputs, rule, decide, ignore, self._look)
        self.engine = Engine(self.method, network, task, hold=t.hold, seed=t.seed)

    def _look(self, gates: Gates, state: RunState) -> Mapping[str, Any]:
        if self.on_trained is not None:
            self.on_trained(gates)
        return {}

    @property
    def model(self) -> nn.Module:
        """The network in training, as it is now."""
        return self.engine.state.network

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Its optimizer."""
        return self.engine.state.optimizer

    @property
    def likelihood(self) -> Likelihood:
        """What is fitted; it knows the noise of a regression."""
        return self.engine.state.likelihood

    @property
    def gates(self) -> Gates | None:
        """The gates as they are now; None once they are folded in."""
        found: Gates | None = self.engine.state.own.gates
        return found

    @property
    def history(self) -> list[EpochInfo]:
        """Records of the epochs."""
        return list(self.engine.state.history)

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Plain values of the gates before the last decision, see `layer_facts`."""
        return list(self.engine.state.own.layers)

    @property
    def plans(self) -> list[Plan]:
        """What surgery did, in order, as plans for the gated network."""
        return list(self.engine.state.own.plans)

    @property
    def plain_plans(self) -> list[Plan]:
        """What surgery did, in order, as plans for a fresh network without gates."""
        return [without_gates(p) for p in self.plans]

    @property
    def plan(self) -> Plan:
        """All that went so far, as one plan for a fresh network without gates."""
        return self.method.plan(self.engine.state)

    @property
    def total(self) -> int:
        """Epochs in all."""
        return self.engine.task.epochs

    def __iter__(self) -> Iterator[EpochInfo]:
        """Epoch by epoch; iterating again goes on where the last loop stopped."""
        return iter(self.engine)

    def result(self) -> nn.Module:
        """The plain network as it is now: removed structures gone, E[theta] folded in, BatchNorm refreshed."""
        return self.engine.result().model

    def state(self) -> dict[str, Any]:
        """Plain values and tensors from which `load` continues to the same bits."""
        saved = self.engine.saved()
        return {**saved["run"], **saved["method"]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state` of a job built with the same arguments."""
        self.engine.load({"run": state, "method": state})


def gate_sensitivity(
    gates: Gates, loader: Loader, objective: Objective | Likelihood, *, batches: int = 50, seed: int = 0
) -> Tensor:
    """Mean square over batches of dL/d ln theta, for the Taylor rule; E[theta] in place of the noise.

    Args:
        gates: gates of the network.
        loader: batches of the training data.
        objective: mean NLL of a batch, L; a likelihood will do.
        batches: number of batches at most.
        seed: seed of shuffling.

    Returns:
        [gates], float64. Gradients of the parameters are cleared.
    """
    model = gates.model
    if isinstance(objective, Likelihood):
        objective = objective_of(model, objective)
    total, count = torch.zeros_like(gates.noise.mean, dtype=torch.float64), 0
    with evaluating(model) as device, seeded(seed, 0, device):
        try:
            for batch in islice(objective.batches(loader, device), batches):
                model.zero_grad()
                objective.loss(model, batch)[0].backward()
                total += gates.log_gradients().square()
                count += 1
        finally:
            model.zero_grad()
    return total / max(1, count)


def without_gates(gated: Plan) -> Plan:
    """A plan for a gated network as one for the network alone."""
    bare = {n: s for n, s in gated.shapes.items() if not n.startswith(f"{NAME}.")}
    return replace(gated, shapes=bare, cuts={n: c for n, c in gated.cuts.items() if n in bare})


def layer_facts(gates: Gates, evidence: GateEvidence, keep: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Plain values of the living gates of every group before a decision, and what was decided."""
    found = []
    for group, places in gates.places.items():
        alive = evidence.alive[group]
        columns = {
            "mean": gates.noise.mean[places],
            "std": gates.noise.std[places],
            "theta": evidence.mean[group],
            "delta_f": evidence.delta_f[group],
            "kl": evidence.kl[group],
            "score": evidence.score[group],
            "keep": keep[group],
            "no_evidence": evidence.no_evidence[group],
        }
        found.append({"id": group, **{k: v.detach().cpu()[alive].tolist() for k, v in columns.items()}})
    return found
