"""Plans: units that a price or a budget leaves, a few at a time under correlations, at widths that pay."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ockham.choose.correlated import ColumnEvidence, narrowed, removed_together, score_columns, with_branches
from ockham.choose.prices import (
    Budget,
    FlatPrice,
    LearnedRate,
    Price,
    Subject,
    UnitCosts,
    budget_from,
    costs_for,
    most_allowed,
    within,
)
from ockham.choose.units import Choice, Multiples, StructureEvidence, choose_units, structures_from
from ockham.core.network import watched
from ockham.core.posterior import Posterior
from ockham.errors import OckhamWarning
from ockham.surgery.copies import as_arguments, given_to
from ockham.surgery.costs import width_times
from ockham.surgery.groups import Group, Groups, Plan, PlanError, plan_masks

__all__ = [
    "chosen_in_rounds",
    "fitting_multiple",
    "multiples_that_pay",
    "multiples_within",
    "plan",
]

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
    round_to: Multiples,
) -> tuple[ColumnEvidence, Choice]:
    """Units that a price or a budget leaves.

    With a budget: the units with the smallest cost in nats per resource go, in geometric steps, to exactly what is
    allowed. Without: units go while delta_f plus their price is positive, until none is left or all that one round
    took *together* is not worth removing; that round is taken back. ``round_to`` is heeded in the last step.

    Args:
        groups: result of `trace`.
        posterior: distribution with `matrices`.
        priced: price (None: 0) and costs of a unit, as it needs them.
        limited: the budget, and the network it is measured on; None for none.
        round_to: widths become multiples of it; or one number a group.

    Returns:
        Evidence of every unit (of removed ones as it was when they went), and the choice.
    """
    limit, subject = limited
    if limit is None or subject is None:
        return _while_it_pays(groups, posterior, priced[0] or FlatPrice(0.0), priced[1], round_to)
    most, whole = most_allowed(limit, subject, groups), limit.measure(subject, plan_masks(groups, {}))
    rounds = max(1, math.ceil(math.log(min(1.0, most / whole)) / math.log(_STEP)))
    options = {"limit": limit, "subject": subject, "costs": limit.unit_costs(subject, groups), "floors": {}}
    told, now, held = None, posterior, None
    for i in watched(range(1, rounds + 1), "planning", rounds):
        evidence = cast(ColumnEvidence, with_branches(score_columns(now, groups), posterior, groups))
        told = _remembered(told, evidence)
        held = held or evidence.held
        last, allowed = i == rounds, whole * (most / whole) ** (i / rounds)
        width = round_to if last else 1
        order = replace(evidence, nats=_ordered(evidence, evidence.cost))
        if last and width != 1:  # units that went before may come back to fill up a multiple
            order = replace(told, nats=_ordered(replace(told, held=held), told.cost), held=held)
        prices = {key: torch.zeros(len(nats), dtype=torch.float64) for key, nats in evidence.items()}
        choice = within(groups, order, prices, round_to=width, most=allowed, asked=most, **options)  # type: ignore[arg-type]
        if not last:
            now = narrowed(now, groups, choice.keep)
    assert told is not None
    return told, choice


def _while_it_pays(
    groups: Groups, posterior: Posterior, price: Price, costs: UnitCosts, round_to: Multiples
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
    units = choose_units(replace(told, nats=decided), flat, round_to=round_to)
    every = with_branches(told, posterior, groups)
    whole = every.only(groups.branches)
    keep = {**units.keep, **choose_units(whole, price.nats(whole, costs)).keep}
    return cast(ColumnEvidence, every), Choice(keep, units.forced)


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


MULTIPLES = (1, 2, 4, 8, 16)
"""Multiples of widths among which `multiples_that_pay` chooses."""
_USUAL = 8
"""The multiple where nothing can be measured."""


def multiples_that_pay(subject: Subject, groups: Groups, *, runtime: str | None = None) -> dict[str, int]:
    """Measure for each group of which number its width should be a multiple on this machine.

    The Linear layers and convolutions that make or read the group are timed at about half of the width, batch 64, each
    shape once in a process. The smallest of 1, 2, 4, 8 and 16 is chosen whose odd multiple is about as much faster as
    it is narrower (`fitting_multiple`). Where nothing can be timed it is 8, as far as units and width allow.

    Args:
        subject: the traced network and example inputs.
        groups: its groups.
        runtime: "torch" or "onnxruntime"; None: the larger multiple of both, as far as ONNX Runtime and onnx are there.

    Returns:
        Group id to multiple, in units.
    """
    model = subject.model
    layers = {g.id: _layers(model, g) for g in groups}
    paths = {path for found in layers.values() for path in found}
    hollow = any(p.is_meta for p in model.parameters())
    given = {} if hollow else given_to(model, paths, as_arguments(model, subject.example_inputs))
    tensors = (t for t in pytree.tree_leaves(subject.example_inputs) if isinstance(t, Tensor) and t.ndim)
    times = 64 / max(1, next((t.shape[0] for t in tensors), 1))
    found = {}
    for group in groups:
        widest = min(m.index.shape[1] for m in group.members)  # indices of a unit where it has fewest
        found[group.id] = most = 2 ** int(math.log2(max(1, min(_USUAL // widest, group.size // 2))))
        timed = [(p, c) for p, c in layers[group.id].items() if p in given and isinstance(given[p][0], Tensor)]
        if widest >= MULTIPLES[-1] or group.size < MULTIPLES[-1] or not timed:
            continue
        span = MULTIPLES[-1] if group.size >= 2 * MULTIPLES[-1] else _USUAL
        base = span * (group.size // 2 // span)
        odd = {w for m in MULTIPLES if m < span for w in (base + m, base + span - m)}
        widths = [base, *sorted(odd), base + span]
        told = []
        for clock in ("torch", "onnxruntime") if runtime is None else (runtime,):
            with contextlib.suppress(ImportError) if runtime is None else contextlib.nullcontext():
                rows = [
                    width_times(model.get_submodule(p), cuts, given[p][0], widths, times, clock) for p, cuts in timed
                ]
                told.append(fitting_multiple(dict(zip(widths, map(sum, zip(*rows, strict=True)), strict=True))))
        known = [m for m in told if m is not None]
        found[group.id] = min(max(known), 2 ** int(math.log2(group.size // 2))) if known else most
    return found


def multiples_within(subject: Subject, groups: Groups, limit: Budget | None) -> dict[str, int]:
    """The multiples of `multiples_that_pay`, halved as often as a budget asks for: it comes before friendly widths."""
    found = multiples_that_pay(subject, groups, runtime=getattr(limit, "runtime", None))
    while limit is not None and max(found.values(), default=1) > 1:
        least = {g.id: torch.arange(g.size) < max(g.least, min(found[g.id], g.size)) for g in groups}
        if limit.measure(subject, plan_masks(groups, least)) <= most_allowed(limit, subject, groups):
            break
        found = {key: max(1, multiple // 2) for key, multiple in found.items()}
    return found


def fitting_multiple(seconds: Mapping[int, float]) -> int | None:
    """The smallest multiple m of which odd ones save what is due, less a tenth of the whole step.

    Between two friendly widths, a and a + span, the time should grow evenly: m fits where t(w) is at most t(a) +
    ((w - a) / span + 1/10) (t(a + span) - t(a)) for w = a + m and w = a + span - m. If none fits, it is the span.

    Args:
        seconds: width to time, for a, a + span (8 or 16) and, of 1, 2, 4, 8 those that are less, m more or less.

    Returns:
        1, 2, 4, 8 or 16; None where a whole span makes less than a twentieth of the time or 20 microseconds.

    >>> steps_of_eight = {32: 4.0, 33: 5.0, 34: 5.0, 36: 5.0, 40: 5.0, 44: 6.0, 46: 6.0, 47: 6.0, 48: 6.0}
    >>> fitting_multiple(steps_of_eight)
    8
    """
    base, top = min(seconds), max(seconds)
    step = seconds[top] - seconds[base]
    if step < max(0.05 * seconds[top], 2e-5):
        return None
    fits = {w: t <= seconds[base] + step * ((w - base) / (top - base) + 0.1) for w, t in seconds.items()}
    return next(m for m in MULTIPLES if base + m == top or (fits[base + m] and fits[top - m]))


def _layers(model: nn.Module, group: Group) -> dict[str, dict[tuple[str, int], int]]:
    """Layers that can be timed: path to {(tensor, dimension) of the group in it: indices a unit}."""
    found: dict[str, dict[tuple[str, int], int]] = {}
    for member in group.members:
        path, _, leaf = member.name.rpartition(".")
        layer = model.get_submodule(path)
        conv = type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and getattr(layer, "groups", 0) == 1
        if conv or type(layer) is nn.Linear or (hasattr(layer, "nf") and type(layer).__name__ == "Conv1D"):
            found.setdefault(path, {})[leaf, member.dim] = member.index.shape[1]
    return found


def plan(
    groups: Groups,
    keep: Any,
    *,
    nats: Mapping[str, Tensor] | None = None,
    price: Price | None = None,
    budget: Budget | Mapping[str, Any] | None = None,
    round_to: Multiples | Literal["auto"] = 1,
    model: nn.Module | None = None,
    example_inputs: Any = None,
) -> Plan:
    """Build a plan: from masks, or from the evidence of structures.

    Args:
        groups: result of `trace`.
        keep: either masks, group id to a boolean tensor ``(units,)``, True = stays (groups left out stay whole); or
            evidence: a posterior, its `score`, or ``evidence.by_group(groups)``.
        nats: evidence of the units, only to be printed and saved; for masks.
        price: least worth of a unit that stays, for evidence: `LearnedRate` (default), `FlatPrice`, `PerParameter`,
            `PerMac`, `PerMillisecond`. Units that nobody reads go for free.
        budget: ``{"macs": "50%"}``, ``{"params": 1_000_000}``, ``{"latency": 0.004}`` (seconds, batch 64, measured;
            ``{"latency": "50%", "runtime": "onnxruntime"}`` measures in ONNX Runtime): the units worth least per cost
            go until it is met; its default price beside that is 0.
        round_to: number of which widths become multiples, whichever are worth most; "auto" measures for each group
            which of 1, 2, 4, 8 and 16 pays on this machine (`ockham.choose.planning.multiples_that_pay`), in the
            runtime of a latency budget or in PyTorch and ONNX Runtime.
        model: the traced network, for prices per resource and budgets.
        example_inputs: inputs as for `trace`, for the same.

    A posterior with correlations inside weight matrices (`ockham.laplace` with "kronecker") is planned for in rounds:
    after each the survivors are scored as if they had moved to make good for what went. Let them move with
    `ockham.compensate` before shrinking. With a budget the units go that cost the fewest nats of NLL, not those with
    the least evidence. Groups whose units share the statistics of a norm stay (`Groups.sharing`): masks may take them.

    Residual branches of ``trace(..., whole=["branches"])`` go where the evidence of all their weights together is below
    their price, or worth least per cost under a budget; for that ``keep`` is a posterior or its `score`.

    Returns:
        The plan; at least one unit of every group (or ``round_to``) stays, and a warning says where none was wanted.

    Raises:
        PlanError: masks that do not fit, a budget that cannot be met (says what the least is), something is missing.
    """
    if isinstance(keep, dict):
        if price is not None or budget is not None or round_to != 1:
            raise PlanError("masks say what stays; a price, a budget or round_to need evidence instead of masks")
        return plan_masks(groups, keep, nats=nats)
    groups = groups.separate
    if isinstance(keep, StructureEvidence):
        keep = keep.only(groups.groups)
    limit = budget_from(budget) if isinstance(budget, Mapping) else budget
    subject = None if model is None else Subject(model, example_inputs)
    if limit is not None and subject is None:
        raise PlanError(f"a budget of {limit.unit} is measured on the network: pass model= and example_inputs=")
    if round_to == "auto":
        if subject is None:
            raise PlanError("round_to='auto' is measured on the network: pass model= and example_inputs=")
        round_to = multiples_within(subject, groups, limit)
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
    made = plan_masks(groups, choice.keep, nats=evidence)
    lost = made.lost
    forced = [key for key in choice.forced if not {m.name for m in groups[key].members} <= lost]
    if forced:
        warnings.warn(
            f"no unit of {', '.join(forced)} was worth its price; the best of each stays, since an empty layer "
            "computes nothing. If that is not wanted, use a lower price or a wider prior",
            OckhamWarning,
            stacklevel=3,
        )
    return made
