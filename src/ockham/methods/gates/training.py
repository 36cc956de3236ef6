"""Settings of training with gates: how the KL is weighted, what decides, when structures go."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ockham.choose.planning import plan
from ockham.core.batch import Loader, count_terms, forward, to_device
from ockham.core.likelihood import Likelihood, likelihood_from
from ockham.core.modes import seeded
from ockham.errors import OckhamError
from ockham.fit.predict import refresh_batchnorm
from ockham.methods.gates import lognormal
from ockham.methods.gates.attach import NAME, Gates, attach_gates
from ockham.methods.gates.curve import parameters_left
from ockham.methods.gates.noise import GateDraw, per_example
from ockham.methods.gates.rules import GateEvidence, GateRule, bmrs_n, by_taylor
from ockham.surgery import Plan, shrink

__all__ = [
    "Decision",
    "GateCompression",
    "GateProgress",
    "GateTraining",
    "KLWeight",
    "ParameterBudget",
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
        temperature: 1 is `true_elbo`; above it more structures go, and delta_f is *tempered* evidence.
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
class ParameterBudget:
    """A number of parameters left at the end, by order of score; on the way there in a cubic schedule.

    Attributes:
        parameters: learnable values of the network at the end, gates not counted.
        full: at the start.
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
        epochs: with gates.
        fine_tune: epochs afterwards, of the plain network with E[theta] folded in.
        learning_rate: of Adam, for weights, at first.
        gate_rate: that of the gates over that of the weights.
        hold: share of the steps at full learning rate; it falls linearly to zero after them.
        kl_weight: `true_elbo`, `Tempered` for a price on structures, or `mean_mean` for reproduction.
        kl_warmup: share of the steps with gates over which the KL gets its weight.
        every: epochs between removals; 0 removes once, after the training with gates.
        start: share of the epochs before the first removal.
        shrink_every: removals between physical shrinking; 0 shrinks at the end only.
        noise: `per_example`, or ``per_element`` for reproduction.
        seed: of noise, shuffling and dropout.
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


@dataclass(frozen=True, slots=True)
class GateProgress:
    """One epoch.

    Attributes:
        epoch: number, from 1.
        loss: mean NLL of the epoch under the drawn gates, nats.
        kl: of the living gates at its end, nats; 0 without gates.
        accuracy: training accuracy, nan without classes.
        parameters: learnable values of the network as it is, without those of the gates.
        widths: group id to the number of structures that are left.
        removed: structures removed after this epoch.
        seconds: wall time of the training of this epoch.
    """

    epoch: int
    loss: float
    kl: float
    accuracy: float
    parameters: int
    widths: Mapping[str, int]
    removed: int
    seconds: float


class GateCompression:
    """Train with gates, remove by a rule, shrink, fold, fine-tune; iterate over its epochs, then take `result`.

    Args:
        model: your network; a copy is trained.
        example_inputs: one batch of inputs, for tracing.
        loader: batches of (inputs, targets) with a length.
        likelihood: "classification", "regression", or a `Likelihood`.
        training: settings.
        rule: scores the structures.
        decide: `by_threshold`, or a `Budget`.
        ignore: as for `ockham.attach_gates`.
        n_data: number of summed log-likelihood terms; counted in one pass where not given.

    Raises:
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
    ) -> None:
        self.training = training or GateTraining()
        self.rule, self.decide, self.loader = rule, decide, loader
        self.likelihood = likelihood_from(likelihood)
        self.model = copy.deepcopy(model)
        self.device = next(self.model.parameters()).device
        self.n_data = float(n_data) if n_data is not None else float(count_terms(loader, self.likelihood))
        self._inputs, self._ignore = example_inputs, ignore
        self.gates: Gates | None = attach_gates(self.model, example_inputs, ignore=ignore, noise=self.training.noise)
        self.first = dict(self.gates.places)
        self._groups, self._keys = self.gates.groups, self.gates.noise.key.clone()
        self.optimizer = self._adam()
        self.plans: list[Plan] = []
        self.done = 0
        self.history: list[GateProgress] = []
        self.layers: list[dict[str, Any]] = []
        self.on_trained: Callable[[Gates], None] | None = None
        self._removals = 0
        self._folded: dict[str, int] = {}

    # ------------------------------------------------------------------ the run
    @property
    def plain_plans(self) -> list[Plan]:
        """What surgery did, in order, as plans for a fresh network without gates."""
        return [without_gates(p) for p in self.plans]

    @property
    def plan(self) -> Plan:
        """All that went so far, as one plan for a fresh network without gates."""
        keys = self._living().cpu()
        return plan(self._groups, {group: torch.isin(places.cpu(), keys) for group, places in self.first.items()})

    @property
    def total(self) -> int:
        """Epochs in all."""
        return self.training.epochs + self.training.fine_tune

    def __iter__(self) -> Iterator[GateProgress]:
        """Epoch by epoch; iterating again goes on where the last loop stopped."""
        while self.done < self.total:
            loss, accuracy, seconds = self._epoch()
            self.done += 1
            removed = self._after_epoch()
            info = GateProgress(
                self.done, loss, self._kl(), accuracy, _size(self.model), self._widths(), removed, seconds
            )
            self.history.append(info)
            yield info

    def result(self) -> nn.Module:
        """The plain network as it is now: removed structures gone, E[theta] folded in, BatchNorm refreshed."""
        model = copy.deepcopy(self.model)
        if self.gates is not None:
            gates = Gates.of(model, self._inputs, ignore=self._ignore)
            model = shrink(gates.model, gates.plan)
            Gates.of(model, self._inputs, ignore=self._ignore).fold()
        refresh_batchnorm(model, self.loader)
        return model.eval()

    def _epoch(self) -> tuple[float, float, float]:
        start, t = time.perf_counter(), self.training
        self.model.train()
        losses, right = [], []
        with seeded(t.seed, self.done, self.device):
            for i, batch in enumerate(self.loader):
                x, y = to_device(batch[0], self.device), to_device(batch[1], self.device)
                self._schedule(self.done + i / len(self.loader))
                loss, correct = self._step(x, y, self.done + i / len(self.loader))
                losses.append(loss)
                right.append(correct)
        mean = float(torch.stack(losses).double().mean())
        if not math.isfinite(mean):
            raise OckhamError(f"the loss became {mean} in epoch {self.done + 1}; lower the learning rate")
        return mean, float(torch.stack(right).mean()), time.perf_counter() - start

    def _step(self, x: Any, y: Tensor, epoch: float) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        output = forward(self.model, x)
        nll = self.likelihood.nll(output, y)
        loss = nll
        if self.gates is not None:
            t = self.training
            warm = min(1.0, epoch / max(1e-9, t.kl_warmup * t.epochs))
            loss = nll + warm * t.kl_weight(self.gates, self.n_data)
        loss.backward()
        self.optimizer.step()
        classes = isinstance(output, Tensor) and output.ndim == y.ndim + 1 and not y.is_floating_point()
        return nll.detach(), (output.detach().argmax(1) == y).float().mean() if classes else torch.tensor(math.nan)

    def _schedule(self, epoch: float) -> None:
        t = self.training
        progress = epoch / self.total
        factor = 1.0 if progress < t.hold else (1 - progress) / (1 - t.hold)
        for group in self.optimizer.param_groups:
            group["lr"] = t.learning_rate * group["scale"] * factor

    def _after_epoch(self) -> int:
        t, gates = self.training, self.gates
        if gates is None:
            return 0
        removed = 0
        last = self.done == t.epochs
        if last and self.on_trained is not None:
            self.on_trained(gates)
        if (last and not t.every) or (t.every and self.done % t.every == 0 and self.done >= t.start * t.epochs):
            removed = gates.remove(self._decided(gates))
            self._removals += 1
            if t.shrink_every and self._removals % t.shrink_every == 0 and not bool(gates.noise.keep.all()):
                self._shrink(gates)
        if last and t.fine_tune:
            self._fold()
        return removed

    def _decided(self, gates: Gates) -> Mapping[str, Tensor]:
        evidence = gates.evidence(self.rule, sensitivity=self._sensitivity(gates))
        keep = self.decide(gates, evidence, min(1.0, self.done / self.training.epochs))
        self.layers = layer_facts(gates, evidence, keep)
        return keep

    def _sensitivity(self, gates: Gates) -> Tensor | None:
        """Only where the rule asks for it: it costs a pass over a part of the data."""
        if self.rule is not by_taylor:
            return None
        return gate_sensitivity(gates, self.loader, self.likelihood, seed=self.training.seed)

    def _shrink(self, gates: Gates) -> None:
        surgery = gates.plan
        self.model, self.optimizer = shrink(self.model, surgery, optimizer=self.optimizer)
        self.plans.append(surgery)
        self.gates = Gates.of(self.model, self._inputs, ignore=self._ignore)

    def _fold(self) -> None:
        assert self.gates is not None
        self._folded, self._keys = self._widths(), self._living()
        if not bool(self.gates.noise.keep.all()):
            self._shrink(self.gates)
        self.gates.fold()
        self.gates = None
        self.optimizer = self._adam()

    def _adam(self) -> torch.optim.Optimizer:
        own = set() if self.gates is None else set(self.gates.parameters())
        weights = [p for p in self.model.parameters() if p not in own and p.requires_grad]
        rate = self.training.learning_rate
        groups = [{"params": weights, "scale": 1.0}]
        if self.gates is not None:
            groups.append({"params": self.gates.parameters(), "scale": self.training.gate_rate})
        return torch.optim.Adam(groups, lr=rate, fused=self.device.type in ("cpu", "cuda"))

    def _living(self) -> Tensor:
        """Keys of the gates that are alive, as they were numbered at first."""
        return self._keys if self.gates is None else self.gates.noise.key[self.gates.noise.keep]

    def _kl(self) -> float:
        return 0.0 if self.gates is None else float(self.gates.kl().detach())

    def _widths(self) -> dict[str, int]:
        if self.gates is None:
            return self._folded or dict(self.history[-1].widths)
        return {k: int(v.sum()) for k, v in self.gates.keep.items()}

    # ------------------------------------------------------------------ state
    def state(self) -> dict[str, Any]:
        """Plain values and tensors from which `load` continues to the same bits."""
        history = [{**asdict(h), "accuracy": None if math.isnan(h.accuracy) else h.accuracy} for h in self.history]
        return {
            "done": self.done,
            "removals": self._removals,
            "gated": self.gates is not None,
            "keys": self._living(),
            "plans": [p.to_json() for p in self.plans],
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict()["state"],
            "history": history,
            "layers": self.layers,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state` of a job built with the same arguments."""
        for text in state["plans"]:
            assert self.gates is not None
            self.model, self.optimizer = shrink(self.model, Plan.from_json(text), optimizer=self.optimizer)
            self.plans.append(Plan.from_json(text))
            self.gates = Gates.of(self.model, self._inputs, ignore=self._ignore)
        if not state["gated"] and self.gates is not None:
            self.gates.fold()
            self.gates = None
            self.optimizer = self._adam()
        self._keys = torch.as_tensor(state["keys"], device=self.device)
        self.model.load_state_dict(dict(state["model"]))
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": dict(state["optimizer"]), "param_groups": groups})
        self.done, self._removals, self.layers = int(state["done"]), int(state["removals"]), list(state["layers"])
        self.history = [
            GateProgress(**{**h, "accuracy": math.nan if h["accuracy"] is None else h["accuracy"]})
            for h in state["history"]
        ]


def gate_sensitivity(
    gates: Gates, loader: Loader, likelihood: Likelihood, *, batches: int = 50, seed: int = 0
) -> Tensor:
    """Mean square over batches of dL/d ln theta, for the Taylor rule; E[theta] in place of the noise.

    Args:
        gates: of the network.
        loader: batches of (inputs, targets).
        likelihood: gives L, the mean NLL of a batch.
        batches: how many at most.
        seed: of shuffling.

    Returns:
        [gates], float64. Gradients of the parameters are cleared.
    """
    model, device = gates.model, next(gates.model.parameters()).device
    modes = {m: m.training for m in model.modules()}
    model.eval()
    total, count = torch.zeros_like(gates.noise.mean, dtype=torch.float64), 0
    try:
        with seeded(seed, 0, device):
            for batch in loader:
                model.zero_grad()
                likelihood.nll(forward(model, to_device(batch[0], device)), to_device(batch[1], device)).backward()
                total += gates.log_gradients().square()
                count += 1
                if count == batches:
                    break
    finally:
        model.zero_grad()
        for module, mode in modes.items():
            module.training = mode
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


def _size(model: nn.Module) -> int:
    gates = getattr(model, "ockham_gates", None)
    own = set(gates.parameters()) if gates is not None else set()
    return sum(p.numel() for p in model.parameters() if p not in own)
