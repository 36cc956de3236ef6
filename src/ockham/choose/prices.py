"""What a unit must be worth: its price in nats, ln P(off)/P(on) before the data. Where it comes from is an object."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from ockham.choose.units import Cut, Inside, StructureEvidence, held_weights, outgoing
from ockham.errors import OckhamError
from ockham.evidence.hyper import beta_log_odds
from ockham.surgery.cloning import clone
from ockham.surgery.comparing import as_arguments
from ockham.surgery.cost import latency
from ockham.surgery.groups import Group, Groups, Plan, plan_masks
from ockham.surgery.refitting import refit
from ockham.surgery.shrinking import shrink

__all__ = [
    "FlatPrice",
    "LearnedRate",
    "PerMac",
    "PerMillisecond",
    "PerParameter",
    "Price",
    "Structures",
    "UnitCosts",
    "latency_after",
    "macs_after",
    "parameters_after",
    "unit_costs",
]


@dataclass(frozen=True, slots=True)
class UnitCosts:
    """What one unit of each group costs as the network stands (group id to a number).

    Attributes:
        parameters: learnable values that go with it.
        macs: multiply-accumulates of one example.
        milliseconds: of the measured latency of a batch; empty where nobody measured.
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
        return {key: torch.full_like(e, self._price(e, evidence.gone.get(key, 0))) for key, e in evidence.items()}

    def _price(self, nats: Tensor, gone: int) -> float:
        every = torch.ones_like(nats, dtype=torch.bool)
        log_odds = beta_log_odds(-nats, every, keep_count=self.on, remove_count=self.off + gone)
        return max(0.0, -float(log_odds))


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
    return sum(math.prod(plan.shape(name)) for name, _ in model.named_parameters())


def macs_after(model: nn.Module, plan: Plan, example_inputs: Any) -> int:
    """Multiply-accumulates of one forward pass on the example inputs after a plan; nothing is computed (fake tensors).

    Args:
        model: the network the plan is for; left as it is.
        plan: the edits.
        example_inputs: as for `trace`; the batch counts.
    """
    arguments = as_arguments(example_inputs)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = pytree.tree_map_only(Tensor, fake.from_tensor, arguments)
    counter = FlopCounterMode(display=False)
    with fake, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = clone(model, lambda n, t: _empty(t, plan.shape(n)))
        refit(model, small, plan)
        with counter:
            small.eval()(*args, **kwargs)
    return int(counter.get_total_flops() // 2)


def latency_after(model: nn.Module, plan: Plan, example_inputs: Any, *, batch: int = 64) -> float:
    """Measured seconds of a forward pass of the shrunk network (median, warm)."""
    return latency(shrink(model, plan), example_inputs, batch=batch)


def unit_costs(
    model: nn.Module, groups: Groups, example_inputs: Any, *, measured: Collection[str] = ("macs",)
) -> UnitCosts:
    """What one unit of each group costs, the others as they are.

    Multiply-accumulates come from a count without the unit, milliseconds (batch 64) from a measurement without half of
    the group, divided by the number of units taken out.

    Args:
        model: the traced network.
        groups: its groups.
        example_inputs: as for `trace`.
        measured: beside parameters, which always are: "macs", "milliseconds".
    """
    whole = plan_masks(groups, {})
    one = {g.id: plan_masks(groups, {g.id: _without(g, 1)}) for g in groups}
    count = parameters_after(model, whole)
    parameters = {key: float(count - parameters_after(model, p)) for key, p in one.items()}
    macs: dict[str, float] = {}
    if "macs" in measured:
        rows = next((t.shape[0] for t in pytree.tree_leaves(as_arguments(example_inputs)) if _is_batch(t)), 1)
        before = macs_after(model, whole, example_inputs)
        macs = {key: (before - macs_after(model, p, example_inputs)) / rows for key, p in one.items()}
    times: dict[str, float] = {}
    if "milliseconds" in measured:
        dense = latency_after(model, whole, example_inputs)
        for group in groups:
            half = max(1, group.size // 2)
            after = latency_after(model, plan_masks(groups, {group.id: _without(group, half)}), example_inputs)
            times[group.id] = max(0.0, 1e3 * (dense - after) / half)
    return UnitCosts(parameters, macs, times)


def _without(group: Group, count: int) -> Tensor:
    keep = torch.ones(group.size, dtype=torch.bool)
    keep[group.size - count :] = False
    return keep


def _is_batch(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def _empty(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    new = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


@dataclass(frozen=True, slots=True)
class Structures:
    """Structures go by evidence after the single weights of a round, and the network shrinks at once.

    Attributes:
        price: what a unit must be worth, nats.
        cut: the side of a unit that is scored, `outgoing` or `incoming` of `ockham.choose.units`.
        inside: which weights of the cut count, `held_weights()` or `all_masks()` of the same module.
        round_to: widths become multiples of it.
        cap: largest share of the units of a group that one round takes, those that nobody reads aside.
        wait: rounds of single weights before the first structures go.
    """

    price: Price = field(default_factory=LearnedRate)
    cut: Cut = outgoing
    inside: Inside = field(default_factory=held_weights)
    round_to: int = 1
    cap: float = 0.25
    wait: int = 1

    def __post_init__(self) -> None:
        if self.round_to < 1:
            raise OckhamError(f"Structures: round_to is a multiple of widths, at least 1; got {self.round_to}")
        if not 0 < self.cap <= 1 or self.wait < 0:
            raise OckhamError(f"Structures: cap is a share in (0, 1], wait at least 0; got {self.cap} and {self.wait}")
