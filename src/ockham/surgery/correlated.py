"""Choosing units under a posterior with correlations: a few at a time, the others scored as they stand after each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ockham.posterior.posterior import Posterior
from ockham.reduction.choice import Choice, choose_units
from ockham.reduction.columns import ColumnEvidence, narrowed, removed_together, score_columns
from ockham.reduction.prices import FlatPrice, Price, UnitCosts
from ockham.surgery.budgets import Budget, Subject, most_allowed, within
from ockham.surgery.groups import Groups, plan_masks

__all__ = ["chosen_in_rounds"]

_STEP = 0.94
"""With a budget every round leaves at least this share of what the last one left: finer is no better (decisions)."""
_SHARE = 0.125
"""Without one every round takes at most this share of the units of a group."""


def chosen_in_rounds(
    groups: Groups,
    posterior: Posterior,
    priced: tuple[Price | None, UnitCosts],
    limited: tuple[Budget | None, Subject | None],
    *,
    round_to: int,
) -> tuple[ColumnEvidence, Choice]:
    """Units that a price or a budget leaves.

    With a budget: the units with the smallest cost in nats per resource go, in geometric steps, to exactly what is
    allowed. Without: units go while delta_f plus their price is positive, until none is left or all that one round
    took *together* is not worth removing; that round is taken back. ``round_to`` is heeded in the last step.

    Args:
        groups: what `trace` found.
        posterior: with matrices.
        priced: the price (None: 0) and what units cost, as it needs them.
        limited: the budget, and the network it is measured on; None for none.
        round_to: widths become multiples of it.

    Returns:
        Evidence of every unit (of removed ones as it was when they went), and the choice.
    """
    limit, subject = limited
    price = priced[0] or FlatPrice(0.0)
    if limit is None or subject is None:
        return _while_it_pays(groups, posterior, price, priced[1], round_to)
    return _down_to(groups, posterior, limit, subject, round_to)


def _down_to(
    groups: Groups, posterior: Posterior, limit: Budget, subject: Subject, round_to: int
) -> tuple[ColumnEvidence, Choice]:
    most, whole = most_allowed(limit, subject, groups), limit.measure(subject, plan_masks(groups, {}))
    rounds = max(1, math.ceil(math.log(min(1.0, most / whole)) / math.log(_STEP)))
    options = {"limit": limit, "subject": subject, "costs": limit.unit_costs(subject, groups)}
    told, now = None, posterior
    for i in range(1, rounds + 1):
        evidence = score_columns(now, groups)
        told = _remembered(told, evidence)
        order = replace(evidence, nats=_ordered(evidence, evidence.cost))
        prices = {key: torch.zeros(len(nats), dtype=torch.float64) for key, nats in evidence.items()}
        last, allowed = i == rounds, whole * (most / whole) ** (i / rounds)
        width = round_to if last else 1
        choice = within(groups, order, prices, round_to=width, most=allowed, **options)  # type: ignore[arg-type]
        if not last:
            now = narrowed(now, groups, choice.keep)
    assert told is not None
    return told, choice


def _while_it_pays(
    groups: Groups, posterior: Posterior, price: Price, costs: UnitCosts, round_to: int
) -> tuple[ColumnEvidence, Choice]:
    told, now = None, posterior
    left = {g.id: torch.ones(g.size, dtype=torch.bool) for g in groups}
    while True:
        evidence = score_columns(now, groups)
        told = _remembered(told, evidence)
        prices = price.nats(evidence, costs)
        keep = choose_units(replace(evidence, nats=_ordered(evidence, evidence.nats)), prices, cap=_SHARE).keep
        gone = {key: left[key] & ~mask for key, mask in keep.items()}
        if not any(bool(lost.any()) for lost in gone.values()):
            break
        paid = sum(float(prices[key][lost].sum()) for key, lost in gone.items())
        if removed_together(now, groups, {key: ~lost for key, lost in gone.items()}) + paid <= 0:
            break
        left, now = dict(keep), narrowed(now, groups, keep)
    decided = {key: torch.where(mask, torch.inf, -torch.inf) for key, mask in left.items()}
    flat = {key: torch.zeros(len(mask), dtype=torch.float64) for key, mask in left.items()}
    return told, choose_units(replace(told, nats=decided), flat, round_to=round_to)


def _ordered(evidence: ColumnEvidence, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Values of the units that somebody reads; the others go before all of them."""
    return {key: torch.where(evidence.held[key] > 0, value, -torch.inf) for key, value in values.items()}


def _remembered(told: ColumnEvidence | None, evidence: ColumnEvidence) -> ColumnEvidence:
    """The new evidence, but of units that are gone what was said of them last."""
    if told is None:
        return evidence
    read = {key: held > 0 for key, held in evidence.held.items()}
    nats = {key: torch.where(read[key], new, told.nats[key]) for key, new in evidence.nats.items()}
    cost = {key: torch.where(read[key], new, told.cost[key]) for key, new in evidence.cost.items()}
    return replace(evidence, nats=nats, cost=cost)
