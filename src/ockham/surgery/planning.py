"""Plans: what is removed, as data which can be printed, saved as JSON and replayed on a fresh model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ockham.errors import OckhamError
from ockham.surgery.cloning import named_tensors
from ockham.surgery.grouping import Group, Groups
from ockham.surgery.sites import Edit, counts_of, edits_of

SCHEMA = 1


class PlanError(OckhamError):
    """A plan does not fit: wrong groups or masks, another model, a foreign or damaged file."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The edits that make a network smaller.

    Attributes:
        removed: group id to the removed units.
        widths: group id to its number of units before.
        cuts: tensor name to {dimension: removed indices}.
        shapes: shape of every parameter and buffer before.
        edits: constants in the model's own code that change with the sizes.
        counts: module path to {size before: size after} of its heads and their widths, for attributes like `num_heads`.
        spared: tensors which `mask` does not zero (see `Groups`).
        nats: group id to the evidence of its removed units, if it was given (same order as `removed`).
    """

    removed: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, int]
    cuts: Mapping[str, Mapping[int, tuple[int, ...]]]
    shapes: Mapping[str, tuple[int, ...]]
    edits: tuple[Edit, ...] = ()
    counts: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    spared: tuple[str, ...] = ()
    nats: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Hash of the names and shapes of the model this plan is for."""
        return fingerprint(self.shapes)

    def kept(self, name: str, dim: int) -> Tensor:
        """Return the indices that stay in dimension `dim` of tensor `name`."""
        stays = torch.ones(self.shapes[name][dim], dtype=torch.bool)
        stays[list(self.cuts.get(name, {}).get(dim, ()))] = False
        return stays.nonzero().flatten()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of tensor `name` afterwards."""
        gone = self.cuts.get(name, {})
        return tuple(n - len(gone.get(d, ())) for d, n in enumerate(self.shapes[name]))

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(
            {
                "schema": SCHEMA,
                "kind": "ockham-plan",
                "fingerprint": self.fingerprint,
                "removed": {k: list(v) for k, v in self.removed.items()},
                "widths": dict(self.widths),
                "cuts": {n: {str(d): list(i) for d, i in c.items()} for n, c in self.cuts.items()},
                "shapes": {n: list(s) for n, s in self.shapes.items()},
                "edits": [e.to_data() for e in self.edits],
                "counts": {m: {str(a): b for a, b in c.items()} for m, c in self.counts.items()},
                "spared": list(self.spared),
                "nats": {k: list(v) for k, v in self.nats.items()},
            }
        )

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan written by `to_json`.

        Raises:
            PlanError: for text that is not a plan, is damaged, or comes from a newer version.
        """
        return _read(text)

    def __str__(self) -> str:
        lines = [f"plan {self.fingerprint[:12]}"]
        for key, width in self.widths.items():
            gone = self.removed.get(key, ())
            if gone:
                said = f" ({sum(self.nats[key]):.1f} nats)" if key in self.nats else ""
                lines.append(f"  {key}: {width} -> {width - len(gone)}, without {_ranges(gone)}{said}")
        return "\n".join(lines if len(lines) > 1 else [*lines, "  nothing is removed"])


def _ranges(indices: tuple[int, ...]) -> str:
    """Write sorted indices with runs shortened: ``0, 3-5``."""
    runs: list[list[int]] = []
    for i in sorted(indices):
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def fingerprint(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return a hash of tensor names and shapes."""
    text = json.dumps(sorted((n, list(s)) for n, s in shapes.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _read(text: str) -> Plan:
    try:
        data: dict[str, Any] = json.loads(text)
        if data.get("kind") != "ockham-plan":
            raise PlanError("this is not an Ockham plan")
        if int(data["schema"]) > SCHEMA:
            raise PlanError(f"the plan has schema {data['schema']}, this version reads up to {SCHEMA}: upgrade Ockham")
        plan = Plan(
            removed={k: tuple(v) for k, v in data["removed"].items()},
            widths={k: int(v) for k, v in data["widths"].items()},
            cuts={n: {int(d): tuple(i) for d, i in c.items()} for n, c in data["cuts"].items()},
            shapes={n: tuple(s) for n, s in data["shapes"].items()},
            edits=tuple(Edit.from_data(e) for e in data["edits"]),
            counts={m: {int(a): int(b) for a, b in c.items()} for m, c in data["counts"].items()},
            spared=tuple(data["spared"]),
            nats={k: tuple(v) for k, v in data["nats"].items()},
        )
        _check_bounds(plan)
    except (
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        OverflowError,
        RecursionError,
        json.JSONDecodeError,
    ) as error:
        raise PlanError(f"the plan is damaged: {type(error).__name__}: {error}") from error
    if plan.fingerprint != data["fingerprint"]:
        raise PlanError("the plan is damaged: its shapes do not match its fingerprint")
    return plan


def _check_bounds(plan: Plan) -> None:
    for name, cut in plan.cuts.items():
        for dim, gone in cut.items():
            size = plan.shapes[name][dim]
            if not all(isinstance(i, int) and 0 <= i < size for i in gone) or not len(set(gone)) == len(gone) < size:
                raise PlanError(f"the plan is damaged: {name}:{dim} has {size} indices and cannot lose {list(gone)}")


def check_model(plan: Plan, model: nn.Module) -> None:
    """Refuse a plan made for a model of other names or shapes.

    Raises:
        PlanError: with the first differences.
    """
    here = {name: tuple(t.shape) for name, t in named_tensors(model).items()}
    if here == dict(plan.shapes):
        return
    wrong = [
        f"{name}: plan {plan.shapes.get(name, 'has none')}, model {here.get(name, 'has none')}"
        for name in dict.fromkeys([*plan.shapes, *here])
        if plan.shapes.get(name) != here.get(name)
    ]
    raise PlanError(
        f"the plan is for another model ({len(wrong)} tensors differ): {'; '.join(wrong[:3])}. "
        "Build the model it was made for, or trace this one and plan again."
    )


def plan_masks(groups: Groups, keep: Mapping[str, Tensor], *, nats: Mapping[str, Tensor] | None = None) -> Plan:
    """Build a plan from masks of the units that stay.

    Args:
        groups: result of `trace`.
        keep: group id to a boolean tensor of shape ``(units,)``, True = stays; groups left out stay whole.
        nats: group id to a tensor of shape ``(units,)`` with the evidence for each unit, only to be printed and saved.

    Raises:
        PlanError: for unknown groups, masks of another dtype or shape, or a mask that keeps nothing.
    """
    for key, mask in keep.items():
        _check_mask(groups, key, mask)
    gone = {k: tuple((~keep[k]).nonzero().flatten().tolist()) for k in groups.groups if k in keep}
    gone = {k: v for k, v in gone.items() if v}
    cuts: dict[str, dict[int, list[int]]] = {}
    for key, units in gone.items():
        for member in groups[key].members:
            indices = member.index[list(units)].flatten().tolist()
            cuts.setdefault(member.name, {}).setdefault(member.dim, []).extend(indices)
    said = {k: tuple(nats[k][list(v)].double().tolist()) for k, v in gone.items() if nats and k in nats}
    return Plan(
        removed=gone,
        widths={g.id: g.size for g in groups},
        cuts={n: {d: tuple(sorted(i)) for d, i in c.items()} for n, c in cuts.items()},
        shapes=dict(groups.shapes),
        edits=edits_of(groups.sites, _gone(groups, gone)),
        counts=counts_of(groups.heads, _gone(groups, gone)),
        spared=groups.spared,
        nats=said,
    )


def _gone(groups: Groups, removed: Mapping[str, tuple[int, ...]]) -> Tensor:
    found = [groups.units[k][list(v)] for k, v in removed.items()]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long)


def _check_mask(groups: Groups, key: str, mask: Tensor) -> None:
    if key not in groups.groups:
        raise PlanError(f"no group {key!r}; known: {', '.join(list(groups.groups)[:5])}, ...")
    size = groups[key].size
    if mask.dtype != torch.bool or tuple(mask.shape) != (size,):
        raise PlanError(f"keep[{key!r}] is {mask.dtype} of shape {tuple(mask.shape)}; expected torch.bool of ({size},)")
    if not bool(mask.any()):
        raise PlanError(f"keep[{key!r}] removes all {size} units; at least one must stay")


def random_plan(groups: Groups, ratio: float, *, generator: torch.Generator | None = None) -> Plan:
    """Build a plan that removes a random share `ratio` of the units of every group (at least one unit stays).

    Args:
        groups: result of `trace`.
        ratio: share in ``[0, 1]``; each group loses the nearest whole number of units.
        generator: source of randomness; the global one when None.

    Raises:
        PlanError: when `ratio` lies outside ``[0, 1]``.
    """
    if not 0 <= ratio <= 1:
        raise PlanError(f"ratio is {ratio}; expected a share between 0 and 1")
    return plan_masks(groups, {g.id: _random_mask(g, ratio, generator) for g in groups})


def _random_mask(group: Group, ratio: float, generator: torch.Generator | None) -> Tensor:
    count = min(round(ratio * group.size), group.size - 1)
    mask = torch.ones(group.size, dtype=torch.bool)
    mask[torch.randperm(group.size, generator=generator)[:count]] = False
    return mask
