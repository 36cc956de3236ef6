"""Prices and budgets of whole units."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ockham.choose.units import (
    Choice,
    CutOf,
    Inside,
    Multiples,
    StructureEvidence,
    choose_units,
    held_weights,
    outgoing,
)
from ockham.errors import OckhamError, first_line
from ockham.evidence.gaussian import beta_log_odds
from ockham.surgery.copies import as_arguments
from ockham.surgery.costs import cost, latencies, multiply_accumulates, onnx_latencies
from ockham.surgery.groups import Group, Groups, Plan, PlanError, plan_masks
from ockham.surgery.refitting import without_values
from ockham.surgery.shrinking import shrink

__all__ = [
    "Budget",
    "FlatPrice",
    "LatencyBudget",
    "LearnedRate",
    "MacBudget",
    "ParameterBudget",
    "PerMac",
    "PerMillisecond",
    "PerParameter",
    "Price",
    "Structures",
    "Subject",
    "UnitCosts",
    "UnitShare",
    "budget_from",
    "costs_for",
    "latency_after",
    "macs_after",
    "most_allowed",
    "parameters_after",
    "unit_costs",
    "within",
]


@dataclass(frozen=True, slots=True)
class UnitCosts:
    """What one unit of each group costs as the network stands (group id to a number).

    Attributes:
        parameters: learnable values that go with it.
        macs: multiply-accumulates of one example.
        milliseconds: share of the measured latency of a batch; empty where nobody measured.
    """

    parameters: Mapping[str, float]
    macs: Mapping[str, float]
    milliseconds: Mapping[str, float]


class Price(ABC):
    """Decides what the units of each group must be worth.

    ``measured`` names the costs it asks for beside parameters: "macs", "milliseconds".
    """

    measured: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def nats(self, evidence: StructureEvidence, costs: UnitCosts) -> dict[str, Tensor]:
        """Group id to price, float64 nats ``(units,)``: a unit is removed where E_g < price.

        Raises:
            OckhamError: the price is per something that ``costs`` does not know.
        """


@dataclass(frozen=True, slots=True)
class LearnedRate(Price):
    """The rate of living units, learned per group: Beta(on, off) and the evidence of its units; nothing to set.

    ln P(on)/P(off) = psi(on + sum q) - psi(off + sum (1 - q) + gone), q = sigma(log-odds + E_g), to the fixed point;
    units removed before count as off. It moves by about ln(number of units) nats only, and never below a price of 0:
    a unit that the data do not want at all goes.

    Attributes:
        on: pseudo-count of living units.
        off: pseudo-count of removed ones.
    """

    on: float = 1.0
    off: float = 1.0

    def __post_init__(self) -> None:
        if not (self.on > 0 and self.off > 0):
            raise OckhamError(f"LearnedRate: pseudo-counts must be positive; got on={self.on}, off={self.off}")

    def nats(self, evidence: StructureEvidence, costs: UnitCosts) -> dict[str, Tensor]:
        """The same price for all units of a group."""
        prices = {}
        for key, nats in evidence.items():
            every, off = torch.ones_like(nats, dtype=torch.bool), self.off + evidence.gone.get(key, 0)
            log_odds = beta_log_odds(-nats, every, keep_count=self.on, remove_count=off)
            prices[key] = torch.full_like(nats, max(0.0, -float(log_odds)))
        return prices


@dataclass(frozen=True, slots=True)
class FlatPrice(Price):
    """The same stated price for every unit.

    Attributes:
        per_unit: nats, not negative.
    """

    per_unit: float

    def __post_init__(self) -> None:
        _check("FlatPrice", self.per_unit)

    def nats(self, evidence: StructureEvidence, costs: UnitCosts) -> dict[str, Tensor]:
        """``per_unit`` everywhere."""
        return {key: torch.full_like(e, self.per_unit) for key, e in evidence.items()}


@dataclass(frozen=True, slots=True)
class PerParameter(Price):
    """A price per learnable value that goes with a unit, removed single weights included: what a dense unit stores.

    Attributes:
        per_parameter: nats, not negative.
    """

    per_parameter: float

    def __post_init__(self) -> None:
        _check("PerParameter", self.per_parameter)

    def nats(self, evidence: StructureEvidence, costs: UnitCosts) -> dict[str, Tensor]:
        """``per_parameter`` times the parameters of a unit."""
        return _each(evidence, costs.parameters, self.per_parameter, "parameters")


@dataclass(frozen=True, slots=True)
class PerMac(Price):
    """A price per multiply-accumulate of one example.

    Attributes:
        per_mac: nats, not negative.
    """

    measured: ClassVar[tuple[str, ...]] = ("macs",)

    per_mac: float

    def __post_init__(self) -> None:
        _check("PerMac", self.per_mac)

    def nats(self, evidence: StructureEvidence, costs: UnitCosts) -> dict[str, Tensor]:
        """``per_mac`` times the multiply-accumulates of a unit."""
        return _each(evidence, costs.macs, self.per_mac, "multiply-accumulates")


@dataclass(frozen=True, slots=True)
class PerMillisecond(Price):
    """A price per millisecond of measured latency.

    Attributes:
        per_millisecond: nats, not negative.
    """

    measured: ClassVar[tuple[str, ...]] = ("milliseconds",)

    per_millisecond: float

    def __post_init__(self) -> None:
        _check("PerMillisecond", self.per_millisecond)

    def nats(self, evidence: StructureEvidence, costs: UnitCosts) -> dict[str, Tensor]:
        """``per_millisecond`` times the measured time of a unit."""
        return _each(evidence, costs.milliseconds, self.per_millisecond, "milliseconds")


@dataclass(frozen=True, slots=True)
class UnitShare(Price):
    """The price at which a stated share of the units of every group has gone: those of least evidence, group by group.

    Units that the data do not want at all, E_g < 0, go beyond the share.

    For posteriors whose nats rank units and are no odds, as those at a temperature below 1: a price in nats says little
    there. Units removed before count; where ``cap`` of `Structures` lets fewer go at once, later rounds take the rest.

    Attributes:
        share: share of the units of the first network, rounded down to whole units.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise OckhamError(f"UnitShare: share must lie between 0 and 1; got {self.share}")

    def nats(self, evidence: StructureEvidence, costs: UnitCosts) -> dict[str, Tensor]:
        """Half way from the last unit that goes to the next; 0 once enough have gone or where nothing is known."""
        prices = {}
        for key, nats in evidence.items():
            gone, known = evidence.gone.get(key, 0), nats[nats.isfinite()].sort().values
            more = min(len(known), math.floor(self.share * (len(nats) + gone) + 1e-9) - gone)
            around = [*known[more - 1 : more + 1].tolist(), float(known[-1]) + 1][:2] if more > 0 else [0.0]
            prices[key] = torch.full_like(nats, max(0.0, sum(around) / len(around)))
        return prices


def _each(evidence: StructureEvidence, cost: Mapping[str, float], rate: float, what: str) -> dict[str, Tensor]:
    missing = [key for key in evidence if key not in cost]
    if missing:
        raise OckhamError(
            f"a price per {what} needs the cost of a unit of {missing[:3]}: pass model= and example_inputs="
        )
    return {key: torch.full_like(e, rate * cost[key]) for key, e in evidence.items()}


def _check(owner: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise OckhamError(f"{owner}: a price is a finite number of nats, 0 or more; got {value}")


def parameters_after(model: nn.Module, plan: Plan) -> int:
    """Learnable values that a plan leaves, tied ones once."""
    lost = plan.lost
    return sum(math.prod(plan.shape(name)) for name, _ in model.named_parameters() if name not in lost)


def macs_after(model: nn.Module, plan: Plan, example_inputs: Any) -> int:
    """Multiply-accumulates of one forward pass on the example inputs after a plan.

    Nothing is computed (fake tensors), unless the forward asks for values: then the shrunk network runs.

    Args:
        model: the network the plan is for; left as it is.
        plan: edits to make.
        example_inputs: inputs as for `trace`; the batch counts.

    Raises:
        OckhamError: the forward asks for values of a network that has none.
    """
    arguments = as_arguments(model, example_inputs)
    try:
        return without_values(model, arguments, plan, multiply_accumulates)
    except Exception as error:  # what a forward does with values it has not got fails in many ways
        if any(
            t.is_meta for t in pytree.tree_leaves((dict(model.named_parameters()), arguments)) if isinstance(t, Tensor)
        ):
            raise OckhamError(
                f"the multiply-accumulates of {type(model).__name__} cannot be counted without values: "
                f"{first_line(error)}. Way out: give it "
                "weights and inputs on a device other than meta, or a budget in parameters"
            ) from error
        return cost(shrink(model, plan), example_inputs).macs


def latency_after(
    model: nn.Module, plan: Plan, example_inputs: Any, *, batch: int = 64, runtime: str = "torch", share: bool = False
) -> float:
    """Measured seconds of a forward pass of the shrunk network (median, warm), in "torch" or in "onnxruntime".

    With ``share`` it is the share of the whole network's time, which runs in turn with it.
    """
    clock = onnx_latencies if runtime == "onnxruntime" else latencies
    small = shrink(model, plan)
    *whole, own = clock([model, small] if share else [small], example_inputs, batch=batch)
    return own / whole[0] if share else own


def unit_costs(
    model: nn.Module,
    groups: Groups,
    example_inputs: Any,
    *,
    measured: Collection[str] = ("macs",),
    runtime: str = "torch",
) -> UnitCosts:
    """What one unit of each group, and each residual branch, costs, the others as they are.

    Multiply-accumulates come from a count without the unit, milliseconds (batch 64) from a measurement without half of
    the group, divided by the number of units taken out.

    Args:
        model: the traced network.
        groups: groups of the network.
        example_inputs: inputs as for `trace`.
        measured: costs to measure beside parameters, which always are: "macs", "milliseconds".
        runtime: name of what runs the network for milliseconds, "torch" or "onnxruntime".
    """
    whole = plan_masks(groups, {})
    one = {g.id: plan_masks(groups, {g.id: _without(g, 1)}) for g in groups}
    one |= {key: plan_masks(groups, {key: torch.tensor([False])}) for key in groups.branches}
    count = parameters_after(model, whole)
    parameters = {key: float(count - parameters_after(model, p)) for key, p in one.items()}
    macs: dict[str, float] = {}
    if "macs" in measured:
        leaves = pytree.tree_leaves(example_inputs)
        rows = next((t.shape[0] for t in leaves if isinstance(t, Tensor) and t.ndim > 0), 1)
        before = macs_after(model, whole, example_inputs)
        macs = {key: (before - macs_after(model, p, example_inputs)) / rows for key, p in one.items()}
    times: dict[str, float] = {}
    if "milliseconds" in measured:
        dense = latency_after(model, whole, example_inputs, runtime=runtime)
        half = {g.id: max(1, min(g.size // 2, g.size - g.least)) for g in groups}
        less = one | {g.id: plan_masks(groups, {g.id: _without(g, half[g.id])}) for g in groups}
        for key, made in less.items():
            after = latency_after(model, made, example_inputs, runtime=runtime)
            times[key] = max(0.0, 1e3 * (dense - after) / half.get(key, 1))
    return UnitCosts(parameters, macs, times)


def _without(group: Group, count: int) -> Tensor:
    keep = torch.ones(group.size, dtype=torch.bool)
    keep[group.size - count :] = False
    return keep


@dataclass(frozen=True, slots=True)
class Structures:
    """Structures go by evidence after the single weights of a round, and the network shrinks at once.

    Attributes:
        price: least worth of a unit that stays, nats.
        cut: the side of a unit that is scored, `outgoing` or `incoming` of `ockham.choose.units`.
        inside: choice of the weights of a cut that count, `held_weights()` or `all_masks()` of the same module.
        round_to: widths become multiples of it; "auto": of what is measured to pay on this machine.
        cap: largest share of the units of a group that one round takes, those that nobody reads aside.
        wait: rounds of single weights before the first structures go.
    """

    price: Price = field(default_factory=LearnedRate)
    cut: CutOf = outgoing
    inside: Inside = field(default_factory=held_weights)
    round_to: int | Literal["auto"] = 1
    cap: float = 0.25
    wait: int = 1

    def __post_init__(self) -> None:
        if self.round_to != "auto" and not (isinstance(self.round_to, int) and self.round_to >= 1):
            raise OckhamError(
                f"Structures: round_to is 'auto' or a multiple of widths, at least 1; got {self.round_to!r}"
            )
        if not 0 < self.cap <= 1 or self.wait < 0:
            raise OckhamError(f"Structures: cap is a share in (0, 1], wait at least 0; got {self.cap} and {self.wait}")


@dataclass(frozen=True, slots=True)
class Subject:
    """What a price per resource or a budget is measured on: the traced network and example inputs."""

    model: nn.Module
    example_inputs: Any


@dataclass(frozen=True, slots=True)
class Budget(ABC):
    """A limit on what the small network may cost.

    Attributes:
        limit: a share of the whole network's (``share`` True) or a number.
        share: flag, True where ``limit`` is a share.
    """

    limit: float
    share: bool

    unit = ""

    @abstractmethod
    def measure(self, subject: Subject, plan: Plan) -> float:
        """What a plan leaves."""

    @abstractmethod
    def unit_costs(self, subject: Subject, groups: Groups) -> Mapping[str, float]:
        """What a unit of each group costs, for the order of removal: evidence per cost."""


class MacBudget(Budget):
    """Multiply-accumulates of one example, whatever the number of example inputs."""

    unit = "multiply-accumulates"

    def measure(self, subject: Subject, plan: Plan) -> float:
        """Counted on fake tensors; the first dimension of the first input counts examples."""
        tensors = (t for t in pytree.tree_leaves(subject.example_inputs) if isinstance(t, Tensor) and t.ndim)
        rows = next((t.shape[0] for t in tensors), 1)
        return macs_after(subject.model, plan, subject.example_inputs) / max(1, rows)

    def unit_costs(self, subject: Subject, groups: Groups) -> Mapping[str, float]:
        """Multiply-accumulates."""
        return unit_costs(subject.model, groups, subject.example_inputs).macs


class ParameterBudget(Budget):
    """Learnable values, tied ones once."""

    unit = "parameters"

    def measure(self, subject: Subject, plan: Plan) -> float:
        """Counted from the shapes."""
        return parameters_after(subject.model, plan)

    def unit_costs(self, subject: Subject, groups: Groups) -> Mapping[str, float]:
        """Parameters."""
        return unit_costs(subject.model, groups, subject.example_inputs, measured=()).parameters


@dataclass(frozen=True, slots=True)
class LatencyBudget(Budget):
    """Seconds of a forward pass, batch 64, median and warm, measured on this machine; a share runs beside the whole.

    Attributes:
        runtime: name of what runs the network, "torch" or "onnxruntime".
    """

    runtime: str = "torch"

    unit = "seconds (or of the whole network's time)"

    def measure(self, subject: Subject, plan: Plan) -> float:
        """Measured: seconds, or of the time of the whole network, 1 for itself."""
        if self.share and not (plan.removed or plan.dropped):
            return 1.0
        options: dict[str, Any] = {"runtime": self.runtime, "share": self.share}
        return latency_after(subject.model, plan, subject.example_inputs, **options)

    def unit_costs(self, subject: Subject, groups: Groups) -> Mapping[str, float]:
        """Milliseconds; one percent of the dearest unit at least, since a measurement may say zero."""
        options: dict[str, Any] = {"measured": ("milliseconds",), "runtime": self.runtime}
        found = unit_costs(subject.model, groups, subject.example_inputs, **options).milliseconds
        least = 0.01 * max(found.values(), default=1.0) or 1.0
        return {key: max(value, least) for key, value in found.items()}


def budget_from(given: Mapping[str, Any]) -> Budget:
    """The façade's budget by name: one of "macs", "params", "latency"; a number, or a share as "50%".

    Beside a latency "runtime" may say what is timed: "torch" (the default) or "onnxruntime".

    Raises:
        PlanError: another name, more than one, or a value that is neither.
    """
    kinds: dict[str, type[Budget]] = {"macs": MacBudget, "params": ParameterBudget, "latency": LatencyBudget}
    asked, runtime = dict(given), None
    if "latency" in asked:
        runtime = asked.pop("runtime", "torch")
    if runtime not in (None, "torch", "onnxruntime"):
        raise PlanError(f"budget latency: runtime is 'torch' or 'onnxruntime'; got {runtime!r}")
    if len(asked) != 1 or next(iter(asked)) not in kinds:
        raise PlanError(f"a budget names one of {', '.join(kinds)}, as in {{'macs': '50%'}}; got {dict(given)}")
    name, value = next(iter(asked.items()))
    share = isinstance(value, str) and value.strip().endswith("%")
    try:
        limit = float(str(value).strip().rstrip("%")) / (100 if share else 1)
    except ValueError as error:
        raise PlanError(f"budget {name}: a number or a share such as '50%' expected; got {value!r}") from error
    if not 0 < limit < float("inf"):
        raise PlanError(f"budget {name}: must be positive and finite; got {value!r}")
    return kinds[name](limit, share) if runtime is None else LatencyBudget(limit, share, str(runtime))


def costs_for(price: Price | None, groups: Groups, subject: Subject | None) -> UnitCosts:
    """Costs of units as far as the price asks for them; nothing without a network to measure."""
    if subject is None:
        return UnitCosts({}, {}, {})
    return unit_costs(subject.model, groups, subject.example_inputs, measured=price.measured if price else ())


def most_allowed(limit: Budget, subject: Subject, groups: Groups) -> float:
    """What may be left, in the budget's unit."""
    return limit.limit * limit.measure(subject, plan_masks(groups, {})) if limit.share else limit.limit


def within(
    groups: Groups,
    evidence: StructureEvidence,
    prices: Mapping[str, Tensor],
    *,
    limit: Budget,
    subject: Subject,
    costs: Mapping[str, float],
    round_to: Multiples,
    most: float,
    asked: float | None = None,
    floors: dict[str, float] | None = None,
) -> Choice:
    """Raise the price per cost until at most ``most`` is left: a search among the worths per cost of all units.

    Where that cannot be, the error names the budget that was ``asked`` for, of which ``most`` may be a step. What is
    left when all goes that can is measured once for each ``round_to`` and kept in ``floors``.
    """

    def choice(rate: float) -> Choice:
        return choose_units(evidence, {k: p + rate * costs[k] for k, p in prices.items()}, round_to=round_to)

    def measured(rate: float) -> float:
        return limit.measure(subject, plan_masks(groups, choice(rate).keep))

    # Prices per cost at which a unit goes, rising; 0 first, beyond all of them last.
    worth = {k: ((e - prices[k]) / costs[k]).clamp(0, 1e12) for k, e in evidence.items() if costs[k] > 0}
    every, where = torch.cat([torch.zeros(1, dtype=torch.float64), *worth.values()]).unique(return_inverse=True)
    rates = [0.0, *torch.nextafter(every, torch.full_like(every, float("inf"))).tolist(), 1e15]
    each = torch.cat([torch.zeros(1), *(torch.full((len(e),), costs[k]) for k, e in worth.items())]).double()
    gone = torch.zeros(len(every), dtype=torch.float64).index_add_(0, where, each).cumsum(0)
    gone = torch.cat([gone.new_zeros(1), gone, gone[-1:]])  # about what each rate takes, if units' costs added up
    known = {} if floors is None else floors
    if str(round_to) not in known:
        known[str(round_to)] = measured(rates[-1])
    least = known[str(round_to)]
    if least > most:
        raise PlanError(
            f"the budget of {most if asked is None else asked:,.6g} {limit.unit} cannot be met: the least that the "
            f"removable structures reach is {least:,.6g}, with "
            f"{round_to if isinstance(round_to, int) else max(round_to.values())} unit(s) of each group left. Allow "
            "more, give a smaller round_to, or see groups.frozen for what cannot go"
        )
    fits = first_within(lambda i: measured(rates[i]), most, gone, least=least)
    return choice(rates[fits])


def first_within(left: Callable[[int], float], most: float, gone: Tensor, *, least: float) -> int:
    """The smallest number at which at most ``most`` is left, where less and less is, and that at the end is known.

    A measurement may take a second, so the next number is the one that would be right if ``gone`` were between the
    measured ends of the bracket, pulled to its middle so far that no search takes more than one step more than
    halving (Oliveira and Takahashi 2020, ACM Transactions on Mathematical Software 47, 5: ITP).

    Args:
        left: function of a number, what is left: falling.
        most: what may be left.
        gone: about what is gone at each number, from 0 on: rising.
        least: what is left at the last number, at most ``most``.
    """
    low, high = 0, len(gone) - 1
    above, below = left(low), least
    if above <= most:
        return low
    steps = math.ceil(math.log2(high - low)) + 1  # at most: one more than halving takes
    spread = 0.2 / (high - low)
    while high - low > 1:
        share = (above - most) / (above - below) if above > below else 0.5
        line = int(torch.searchsorted(gone, gone[low] + share * (gone[high] - gone[low])))
        half = 0.5 * (low + high)
        aside = math.copysign(min(spread * (high - low) ** 2, abs(half - line)), half - line)  # not always the same end
        reach = 2.0 ** (steps - 1) - 0.5 * (high - low)
        there = min(max(line + aside, half - reach), half + reach)
        middle = min(max(round(there), low + 1), high - 1)
        found, steps = left(middle), steps - 1
        if found <= most:
            high, below = middle, found
        else:
            low, above = middle, found
    return high
