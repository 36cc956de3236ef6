"""Where the units of a network that shrank several times stood in the network before: one plan out of many."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ockham.choose.planning import multiples_that_pay
from ockham.choose.prices import Structures, Subject, unit_costs
from ockham.choose.rules import score
from ockham.choose.units import Account, Multiples, StructureEvidence, choose_units, multiple_of
from ockham.core.batch import READ_ONCE, Loader, arranged, described, read_batch
from ockham.core.network import Ignore, device_of, seeded
from ockham.core.objective import Objective
from ockham.core.posterior import Gaussian, Posterior
from ockham.core.processes import ALONE, Processes
from ockham.errors import DataError, OckhamError, OckhamWarning
from ockham.fit.optimizer import VariationalOptimizer
from ockham.run.engine import Compressed, StructureInfo
from ockham.run.records import GroupRecord, Measures, StructureRecord
from ockham.run.schema import Structure
from ockham.surgery.costs import cost, latencies
from ockham.surgery.groups import Groups, Plan, plan_masks
from ockham.surgery.refitting import Constant, constants, fold
from ockham.surgery.shrinking import mask, shrink, slice_tensor, verify
from ockham.surgery.tracing import trace

__all__ = [
    "Origin",
    "Shrinking",
    "Shrunk",
    "StructureInfo",
    "example_of",
    "fold_constants",
    "structure",
    "traced_again",
]


class Origin:
    """Follows plan after plan; knows which units of the first network are left and what the others were worth.

    Args:
        groups: groups of the network before.
    """

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self._left = {name: [torch.arange(n) for n in shape] for name, shape in groups.shapes.items()}
        self._nats = {g.id: torch.zeros(g.size, dtype=torch.float64) for g in groups}

    def follow(self, now: Groups | None, plan: Plan) -> None:
        """Take note of a plan for the network as it is; ``now`` are the groups it was made from, for its nats."""
        for key, units in plan.removed.items():
            if now is None or key not in plan.nats:
                continue
            member = now[key].members[0]
            places = self._left[member.name][member.dim][member.index[list(units), 0]]
            nats = torch.tensor(plan.nats[key], dtype=torch.float64)[:, None]
            for group in self.groups:
                for other in (m for m in group.members if (m.name, m.dim) == (member.name, member.dim)):
                    at = (other.index[None, :, :] == places[:, None, None]).any(2)
                    worth = nats.expand(at.shape)[at]
                    self._nats[group.id][at.any(0)] = worth[torch.argsort(at.nonzero()[:, 1], stable=True)]
        for name, dims in self._left.items():
            self._left[name] = [left[plan.kept(name, d)] for d, left in enumerate(dims)]

    def alive(self, key: str) -> Tensor:
        """Units of a group of the first network that are left, boolean ``(units,)``."""
        member = self.groups[key].members[0]
        return torch.isin(member.index[:, 0], self._left[member.name][member.dim])

    def widths(self) -> dict[str, int]:
        """Group id to units left."""
        return {g.id: int(self.alive(g.id).sum()) for g in self.groups}

    def plan(self) -> Plan:
        """All of it as one plan for the first network."""
        return plan_masks(self.groups, {g.id: self.alive(g.id) for g in self.groups}, nats=self._nats)

    def state(self) -> dict[str, list[float]]:
        """Nats by group, plain."""
        return {key: values.tolist() for key, values in self._nats.items()}

    def load(self, state: Mapping[str, list[float]]) -> None:
        """Nats of `state`; the plans are followed anew."""
        self._nats = {key: torch.tensor(values, dtype=torch.float64) for key, values in state.items()}


def fold_constants(
    model: nn.Module,
    posterior: Posterior,
    origin: Origin,
    *,
    example_inputs: Any,
    ignore: tuple[Any, ...],
    round_to: Multiples = 1,
) -> tuple[nn.Module, Posterior, Plan]:
    """Take out the units whose making weights are all gone; what they add moves into biases.

    The mean network computes the same function, which is proved on the example inputs. In the posterior a bias that
    takes a constant c over from weights w becomes b + sum c w: mean and variance add up, and it lives again if it was
    removed. Widths stay multiples of ``round_to`` where they are, and no group is emptied.

    Returns:
        The network, its posterior, and the plan from the first network to it.

    Raises:
        MismatchError: the folded network computes something else.
    """
    groups = traced_again(model, example_inputs, ignore)
    alive = {name: g.keep.reshape(-1) for name, g in posterior.items()}
    made = {}
    for group in groups:
        count = torch.zeros(group.size, dtype=torch.long)
        for name, at in group.incoming_cuts():
            if name not in alive or posterior[name].mean.ndim > 1:
                count += alive[name][at].sum(1).cpu() if name in alive else at.shape[1]
        made[group.id] = count
    found = constants(model, groups, example_inputs, {key: count == 0 for key, count in made.items()})
    found = _fitting(found, {g.id: g.size for g in groups}, round_to)
    if not found:
        return model, posterior, origin.plan()
    folded = fold(model, found)
    keep = {g.id: torch.ones(g.size, dtype=torch.bool) for g in groups}
    for constant in found:
        keep[constant.group][constant.unit] = False
    plan = plan_masks(groups, keep)
    moments = _folded(posterior, found)
    small, cut = shrink(folded, plan, posterior=moments)
    verify(model, small, example_inputs)
    after = copy.deepcopy(origin)
    after.follow(None, plan)
    left = Posterior(cut, posterior.n_data, posterior.temperature, posterior.source)
    options: dict[str, Any] = {"example_inputs": example_inputs, "ignore": ignore, "round_to": round_to}
    return fold_constants(small, left, after, **options)  # who read nothing but constants is a constant now


def _fitting(found: list[Constant], sizes: Mapping[str, int], round_to: Multiples) -> list[Constant]:
    """As many as leave a multiple of ``round_to`` in every group, and at least that."""
    units: dict[str, list[int]] = {}
    for constant in found:
        units.setdefault(constant.group, []).append(constant.unit)
    chosen: dict[str, set[int]] = {}
    for key, several in units.items():
        gone = sorted(set(several))
        multiple = multiple_of(round_to, key)
        left = max(multiple, -(-(sizes[key] - len(gone)) // multiple) * multiple)
        chosen[key] = set(gone[: max(0, sizes[key] - left)])
    return [c for c in found if c.unit in chosen[c.group]]


def _folded(posterior: Posterior, found: list[Constant]) -> dict[str, Gaussian]:
    """Biases become Gaussians of b + sum_i c_i w_i, independent; kept where a living weight adds, then surely in."""
    moments = dict(posterior)
    for constant in found:
        weight, bias = moments.get(f"{constant.layer}.weight"), moments.get(f"{constant.layer}.bias")
        if weight is None or bias is None:
            continue
        value = constant.value.to(weight.mean).view([1, -1] + [1] * (weight.mean.ndim - 2))
        taken = (weight.keep[:, constant.index] & (value != 0)).flatten(1).any(1)
        added = (value * weight.expected[:, constant.index]).flatten(1).sum(1)
        spread = (value.square() * _variance(weight)[:, constant.index]).flatten(1).sum(1)
        mean = torch.where(taken, bias.expected + added, bias.mean)
        variance = torch.where(taken, _variance(bias) + spread, bias.std.square())
        alive = bias.keep | taken
        inclusion = None if bias.inclusion is None else bias.inclusion.masked_fill(taken, 1.0)
        precision = torch.where(alive, 1 / variance, torch.inf)
        moments[f"{constant.layer}.bias"] = Gaussian(
            mean, precision, bias.prior_precision, bias.prior_mean, alive, inclusion=inclusion
        )
    return moments


def _variance(g: Gaussian) -> Tensor:
    """Of the weight as it enters: pi s^2 + pi (1 - pi) m^2 where it may be zero."""
    if g.inclusion is None:
        return g.std.square()
    return g.inclusion * (g.std.square() + (1 - g.inclusion) * g.mean.square())


ROWS = 2  # of an example for tracing and proof: enough to tell a batch from a constant


@dataclass(frozen=True, slots=True, eq=False)
class Shrunk:
    """What is known of the structures of a run so far.

    Attributes:
        origin: map from the units of the network now to those of the network before.
        now: groups of the network as it is; None where it has to be traced anew.
        ledger: delta_f of the single weights that went.
        history: account of every round that took structures.
        steps: plans done, as JSON.
        round_to: number of which the width of each group is a multiple, measured when the run began or as stated.
    """

    origin: Origin
    now: Groups | None
    round_to: Multiples = 1
    ledger: Account = field(default_factory=Account)
    history: tuple[StructureInfo, ...] = ()
    steps: tuple[str, ...] = ()

    def saved(self) -> dict[str, Any]:
        """Plain values and tensors."""
        history = [asdict(info) for info in self.history]
        ledger = dict(self.ledger.delta_f)
        widths = self.round_to if isinstance(self.round_to, int) else dict(self.round_to)
        known = {"steps": list(self.steps), "history": history, "ledger": ledger, "nats": self.origin.state()}
        return {**known, "round_to": widths}

    def followed(self, plan: Plan) -> Shrunk:
        """The knowledge after a plan was carried out."""
        origin = copy.deepcopy(self.origin)
        origin.follow(self.now if plan.nats else None, plan)
        ledger = self.ledger.cut(lambda name, values: slice_tensor(plan, name, values))
        return replace(self, origin=origin, now=None, ledger=ledger, steps=(*self.steps, plan.to_json()))


@dataclass(frozen=True, slots=True, eq=False)
class Shrinking:
    """Scores the structures of a network in training and takes out what is not worth its price.

    Attributes:
        rule: evidence, price and widths.
        inputs: small batch of inputs, for tracing and proof.
        ignore: parameters that stay whole.
        processes: those that train together; all carry out the plan of process 0.
    """

    rule: Structures
    inputs: Any
    ignore: tuple[Any, ...] = ()
    processes: Processes = ALONE

    def start(self, network: nn.Module) -> Shrunk:
        """Before the run.

        Raises:
            TraceError: the network cannot be traced; train it with masks only (``structure=None``).
        """
        with seeded(0, 0, torch.device("cpu")):
            groups = trace(network, self.inputs, ignore=self.ignore).separate
            widths = self.rule.round_to
            multiples = multiples_that_pay(Subject(network, self.inputs), groups) if widths == "auto" else widths
        if self.processes.count > 1:  # what pays is measured, and differs from process to process
            multiples = json.loads(self.processes.told_bytes(json.dumps(multiples).encode()))
        return Shrunk(Origin(groups), groups, multiples)

    def shrink(
        self, known: Shrunk, network: nn.Module, optimizer: VariationalOptimizer, epoch: int
    ) -> tuple[Shrunk, nn.Module, VariationalOptimizer]:
        """Take out the structures that have gone; everything as it was where all stay.

        Raises:
            MismatchError: the smaller network computes something else than the masked one.
        """
        with seeded(0, 0, device_of(network)):
            groups = known.now or traced_again(network, self.inputs, self.ignore)
            known = replace(known, now=groups)
            before = {g.id: g.size for g in known.origin.groups}
            options = {
                "cut": self.rule.cut,
                "inside": self.rule.inside,
                "ledger": known.ledger,
                "gone": {g.id: before[g.id] - g.size for g in groups if g.id in before},
            }
            evidence = score(optimizer.posterior()).by_group(groups, **options)
            plan = self._choose(network, groups, evidence, known.round_to)
            if self.processes.count > 1:  # a price in milliseconds differs from process to process
                plan = Plan.from_json(self.processes.told_bytes(plan.to_json().encode()).decode())
            if not plan.removed:
                return known, network, optimizer
            small, carried = shrink(network, plan, optimizer=optimizer)
            verify(mask(network, plan), small, self.inputs, draws=1)
            known = known.followed(plan)
            now = cost(small, self.inputs)
        gone = {key: torch.tensor(units) for key, units in plan.removed.items()}
        nats = sum(float(evidence[key][units].sum()) for key, units in gone.items())
        free = sum(int((evidence.held[key][units] == 0).sum()) for key, units in gone.items())
        first = next((t for t in pytree.tree_leaves(self.inputs) if isinstance(t, Tensor) and t.ndim), None)
        if first is None:
            raise OckhamError("the loader's inputs hold no tensor with a batch dimension")
        removed, macs = sum(len(units) for units in gone.values()), now.macs // int(first.shape[0])
        info = StructureInfo(epoch, removed, free, nats, known.origin.widths(), now.parameters, macs)
        return replace(known, history=(*known.history, info)), small, carried

    def finished(self, known: Shrunk, network: nn.Module, posterior: Posterior) -> tuple[nn.Module, Posterior, Plan]:
        """Network and posterior with constants folded, and all that went as one plan for the first network."""
        with seeded(0, 0, device_of(network)):
            options: dict[str, Any] = {"example_inputs": self.inputs, "ignore": self.ignore}
            return fold_constants(network, posterior, known.origin, round_to=known.round_to, **options)

    def resumed(
        self, known: Shrunk, saved: Mapping[str, Any], network: nn.Module, optimizer: VariationalOptimizer
    ) -> tuple[Shrunk, nn.Module, VariationalOptimizer]:
        """Replay the plans of `Shrunk.saved` on a fresh network and its optimizer."""
        for text in saved["steps"]:
            plan = Plan.from_json(text)
            network, optimizer = shrink(network, plan, optimizer=optimizer)
            known = known.followed(plan)
        origin = copy.deepcopy(known.origin)
        origin.load(saved["nats"])
        history = tuple(StructureInfo(**info) for info in saved["history"])
        ledger = Account(dict(saved["ledger"]))
        known = replace(known, round_to=saved.get("round_to", known.round_to))  # what this machine says now may differ
        return replace(known, origin=origin, ledger=ledger, history=history), network, optimizer

    def _choose(self, network: nn.Module, groups: Groups, evidence: StructureEvidence, multiples: Multiples) -> Plan:
        costs = unit_costs(network, groups, self.inputs, measured=self.rule.price.measured)
        options: dict[str, Any] = {"round_to": multiples, "cap": self.rule.cap}
        choice = choose_units(evidence, self.rule.price.nats(evidence, costs), **options)
        if choice.forced:
            warnings.warn(
                f"no unit of {', '.join(choice.forced)} was worth its price; the best stays, since an empty layer "
                "computes nothing",
                OckhamWarning,
                stacklevel=5,
            )
        return plan_masks(groups, choice.keep, nats=evidence)


def traced_again(network: nn.Module, inputs: Any, ignore: Ignore) -> Groups:
    """The groups of a network that has shrunk; where nothing is left to go, that is no news."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="nothing of this network can be removed")
        return trace(network, inputs, ignore=ignore).separate


def example_of(loader: Loader, objective: Objective, network: nn.Module) -> Any:
    """The first rows of the loader's first inputs, on the network's device, as surgery takes them.

    Raises:
        DataError: the loader is empty, or there are keyword inputs beside positional ones that have no name.
    """
    with seeded(0, 0, torch.device("cpu")):
        raw = next(iter(loader), None)
    if raw is None:
        raise DataError(READ_ONCE)
    first = read_batch(raw, objective.batch)
    args, kwargs = arranged(network, first.part(slice(0, ROWS)).to(device_of(network)))
    if not (args and kwargs):
        return kwargs or args
    parameters = inspect.signature(network.forward).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(names) < len(args):
        raise DataError(
            f"structures are traced with inputs all by position or all by name; got {described(first)}. Name them all "
            "in batch=: ockham.Batch(kwargs={...}, target=...)"
        )
    return dict(zip(names, args, strict=False)) | kwargs


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


def structures_name(structures: Structures | None) -> str:
    """How structures go, with its numbers, for the record and for telling jobs apart."""
    if structures is None:
        return "none"
    shown = f"{structures.price!r}, {structures.cut.__name__} cut, widths in steps of {structures.round_to}"
    inside = structures.inside.__qualname__.partition(".")[0]
    return f"{shown}, {inside}, cap {structures.cap:g}, after {structures.wait} round(s)"


def structure(before: nn.Module, result: Compressed, example: Any) -> Structure | None:
    """What the removal of whole units changed, latencies measured in turn; None where no units were asked for.

    Args:
        before: network before anything went; only its shapes matter.
        result: outcome of the compression, with its plan.
        example: inputs of one example, on the networks' device.
    """
    plan, networks = result.plan, (before, result.model)
    if plan is None:
        return None
    gone = {key: len(plan.removed.get(key, ())) for key in plan.widths}
    gone |= {key: width for key, width in plan.widths.items() if key.rpartition(":")[0] in plan.lost}
    groups = tuple(
        GroupRecord(key, width, width - gone[key], float(sum(plan.nats.get(key, ()))))
        for key, width in plan.widths.items()
    )
    groups += tuple(GroupRecord(b.id, 1, 0, float(sum(plan.nats.get(b.id, ())))) for b in plan.dropped)
    times = {f"latency_{batch}": latencies(networks, example, batch=batch) for batch in (1, 64)}
    old, new = (
        Measures.of(asdict(cost(network, example)) | {name: values[i] for name, values in times.items()})
        for i, network in enumerate(networks)
    )
    return Structure(groups, old, new, tuple(StructureRecord(**asdict(r)) for r in result.structures))
