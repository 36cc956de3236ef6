"""Budgets: what a small network may cost, and the units that meet one at the least loss of evidence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ockham.choose.prices import Price, UnitCosts, latency_after, macs_after, parameters_after, unit_costs
from ockham.choose.units import Choice, StructureEvidence, choose_units
from ockham.surgery.groups import Groups, Plan, PlanError, plan_masks

__all__ = [
    "Budget",
    "LatencyBudget",
    "MacBudget",
    "ParameterBudget",
    "Subject",
    "budget_from",
    "costs_for",
    "most_allowed",
    "within",
]


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
        share: which of the two.
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


class LatencyBudget(Budget):
    """Seconds of a forward pass, batch 64, median and warm, measured on this machine."""

    unit = "seconds"

    def measure(self, subject: Subject, plan: Plan) -> float:
        """Measured."""
        return latency_after(subject.model, plan, subject.example_inputs)

    def unit_costs(self, subject: Subject, groups: Groups) -> Mapping[str, float]:
        """Milliseconds; one percent of the dearest unit at least, since a measurement may say zero."""
        found = unit_costs(subject.model, groups, subject.example_inputs, measured=("milliseconds",)).milliseconds
        least = 0.01 * max(found.values(), default=1.0) or 1.0
        return {key: max(value, least) for key, value in found.items()}


def budget_from(given: Mapping[str, Any]) -> Budget:
    """The façade's budget by name: one of "macs", "params", "latency"; a number, or a share as "50%".

    Raises:
        PlanError: another name, more than one, or a value that is neither.
    """
    kinds: dict[str, type[Budget]] = {"macs": MacBudget, "params": ParameterBudget, "latency": LatencyBudget}
    if len(given) != 1 or next(iter(given)) not in kinds:
        raise PlanError(f"a budget names one of {', '.join(kinds)}, as in {{'macs': '50%'}}; got {dict(given)}")
    name, value = next(iter(given.items()))
    share = isinstance(value, str) and value.strip().endswith("%")
    try:
        limit = float(str(value).strip().rstrip("%")) / (100 if share else 1)
    except ValueError as error:
        raise PlanError(f"budget {name}: a number or a share such as '50%' expected; got {value!r}") from error
    if not 0 < limit < float("inf"):
        raise PlanError(f"budget {name}: must be positive and finite; got {value!r}")
    return kinds[name](limit, share)


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
    round_to: int,
    most: float,
) -> Choice:
    """Raise the price per cost until at most ``most`` is left: a bisection over the worths per cost of all units."""

    def choice(rate: float) -> Choice:
        return choose_units(evidence, {k: p + rate * costs[k] for k, p in prices.items()}, round_to=round_to)

    def fits(rate: float) -> bool:
        return limit.measure(subject, plan_masks(groups, choice(rate).keep)) <= most

    rates = _rates(evidence, prices, costs)
    if not fits(rates[-1]):
        least = limit.measure(subject, plan_masks(groups, choice(rates[-1]).keep))
        raise PlanError(
            f"the budget of {most:,.6g} {limit.unit} cannot be met: the least that the removable structures reach is "
            f"{least:,.6g}, with {round_to} unit(s) of each group left. Allow more, or see groups.frozen for what "
            "cannot go"
        )
    low, high = -1, len(rates) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(rates[middle]) else (middle, high)
    return choice(rates[high])


def _rates(evidence: StructureEvidence, prices: Mapping[str, Tensor], costs: Mapping[str, float]) -> list[float]:
    """Prices per cost at which a unit goes, rising; 0 first, beyond all of them last."""
    worth = [((e - prices[k]) / costs[k]).clamp(max=1e12) for k, e in evidence.items() if costs[k] > 0]
    every = torch.cat([*worth, torch.zeros(1, dtype=torch.float64)]).clamp(min=0).unique()
    above = torch.nextafter(every, torch.full_like(every, float("inf")))
    return [0.0, *above.tolist(), 1e15]
