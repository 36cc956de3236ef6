"""Plans by evidence: which units a price, a budget or friendly widths leave."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ockham.errors import OckhamWarning
from ockham.posterior.posterior import Posterior
from ockham.reduction.choice import Choice, choose_units
from ockham.reduction.prices import FlatPrice, LearnedRate, Price
from ockham.reduction.structures import StructureEvidence, structures_from
from ockham.surgery.budgets import Budget, Subject, budget_from, costs_for, most_allowed, within
from ockham.surgery.correlated import chosen_in_rounds
from ockham.surgery.groups import Groups, Plan, PlanError, plan_masks

__all__ = ["plan"]


def plan(
    groups: Groups,
    keep: Any,
    *,
    nats: Mapping[str, Tensor] | None = None,
    price: Price | None = None,
    budget: Budget | Mapping[str, Any] | None = None,
    round_to: int = 1,
    model: nn.Module | None = None,
    example_inputs: Any = None,
) -> Plan:
    """Build a plan: from masks, or from the evidence of structures.

    Args:
        groups: result of `trace`.
        keep: either masks, group id to a boolean tensor ``(units,)``, True = stays (groups left out stay whole); or
            evidence: a posterior, its `score`, or ``evidence.by_group(groups)``.
        nats: with masks, the evidence of the units, only to be printed and saved.
        price: with evidence, what a unit must be worth: `LearnedRate` (default), `FlatPrice`, `PerParameter`,
            `PerMac`, `PerMillisecond`. Units that nobody reads go for free.
        budget: ``{"macs": "50%"}``, ``{"params": 1_000_000}``, ``{"latency": 0.004}`` (seconds, batch 64, measured):
            the units worth least per cost go until it is met; its default price beside that is 0.
        round_to: widths become multiples of it, whichever are worth most.
        model: the traced network, for prices per resource and budgets.
        example_inputs: as for `trace`, for the same.

    A posterior with correlations inside weight matrices (`ockham.laplace` with "kronecker") is planned for in rounds:
    after each the survivors are scored as if they had moved to make good for what went. Let them move with
    `ockham.compensate` before shrinking. With a budget the units go that cost the fewest nats of NLL, not those with
    the least evidence.

    Returns:
        The plan; at least one unit of every group (or ``round_to``) stays, and a warning says where none was wanted.

    Raises:
        PlanError: masks that do not fit, a budget that cannot be met (says what the least is), something is missing.
    """
    if isinstance(keep, dict):
        if price is not None or budget is not None or round_to != 1:
            raise PlanError("masks say what stays; a price, a budget or round_to need evidence instead of masks")
        return plan_masks(groups, keep, nats=nats)
    limit = budget_from(budget) if isinstance(budget, Mapping) else budget
    subject = None if model is None else Subject(model, example_inputs)
    if limit is not None and subject is None:
        raise PlanError(f"a budget of {limit.unit} is measured on the network: pass model= and example_inputs=")
    costs = costs_for(price, groups, subject)
    if isinstance(keep, Posterior) and keep.matrices:
        return _told(groups, *chosen_in_rounds(groups, keep, (price, costs), (limit, subject), round_to=round_to))
    evidence = structures_from(keep, groups)
    if limit is None or subject is None:
        choice = choose_units(evidence, (price or LearnedRate()).nats(evidence, costs), round_to=round_to)
        return _told(groups, evidence, choice)
    prices = (price or FlatPrice(0.0)).nats(evidence, costs)
    most, per_unit = most_allowed(limit, subject, groups), limit.unit_costs(subject, groups)
    options = {"limit": limit, "subject": subject, "costs": per_unit, "round_to": round_to, "most": most}
    choice = within(groups, evidence, prices, **options)  # type: ignore[arg-type]
    return _told(groups, evidence, choice)


def _told(groups: Groups, evidence: StructureEvidence, choice: Choice) -> Plan:
    if choice.forced:
        warnings.warn(
            f"no unit of {', '.join(choice.forced)} was worth its price; the best of each stays, since an empty layer "
            "computes nothing. If that is not wanted, use a lower price or a wider prior",
            OckhamWarning,
            stacklevel=3,
        )
    return plan_masks(groups, choice.keep, nats=evidence)
