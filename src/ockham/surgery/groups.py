"""From settled atoms to groups: units which go together, and the weights by which each of them is judged."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ockham.errors import OckhamError
from ockham.surgery.copies import Arguments, moves_up, renumbered
from ockham.surgery.labels import Edit, Site, counts_of, edits_of
from ockham.surgery.resizing import Branch, compose

CutTensors = list[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One dimension of one tensor in a group.

    Attributes:
        name: parameter or buffer.
        dim: dimension of it.
        index: ``(units, k)``: the k indices of the dimension which belong to each unit.
        consumes: True on the outgoing side (weights which read the unit).
        makes: True on the incoming side (weights, bias, norm affine of the unit); a tied embedding is on both.
        learned: True for parameters, False for buffers.
    """

    name: str
    dim: int
    index: Tensor
    consumes: bool
    makes: bool
    learned: bool


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Units of one kind, each of which can be removed on its own; at least one of them stays.

    Attributes:
        id: name of the first dimension in it, ``"layer1.conv.weight:0"``.
        kind: ``"channel"``, ``"head"``, ...: what one unit is, by its widest member.
        size: number of units.
        members: the dimensions that shrink together.
        shapes: shape of every tensor in `members`.
        least: number of units that have to stay.
        router: name of the weight whose rows choose among the units; "" for none. What it does not choose is as if it
            were not there, but zeros in a unit are no such thing: `mask` sets its row's result to minus infinity.
    """

    id: str
    kind: str
    size: int
    members: tuple[Member, ...]
    shapes: Mapping[str, tuple[int, ...]]
    least: int = 1
    router: str = ""

    def outgoing(self, unit: int) -> CutTensors:
        """Return the weights which read `unit`: a list of (parameter, flat positions), each parameter once."""
        return _one(self.outgoing_cuts(), unit)

    def incoming(self, unit: int) -> CutTensors:
        """Return the weights, bias and norm affine which make `unit`: a list of (parameter, flat positions)."""
        return _one(self.incoming_cuts(), unit)

    def outgoing_cuts(self) -> CutTensors:
        """Return the reading weights of all units: a list of (parameter, flat positions ``(units, n)``).

        A parameter which reads a unit along two of its dimensions comes twice; `outgoing` unites them.
        """
        return [self._cut(member) for member in self.members if member.learned and member.consumes]

    def incoming_cuts(self) -> CutTensors:
        """Return the making weights of all units, as `outgoing_cuts` does the reading ones."""
        return [self._cut(member) for member in self.members if member.learned and member.makes]

    def _cut(self, member: Member) -> tuple[str, Tensor]:
        shape = self.shapes[member.name]
        before, after = math.prod(shape[: member.dim]), math.prod(shape[member.dim + 1 :])
        outer = torch.arange(before).view(1, 1, before, 1) * (shape[member.dim] * after)
        inner = torch.arange(after).view(1, 1, 1, after)
        return member.name, (member.index[:, :, None, None] * after + outer + inner).flatten(1)


def _one(cuts: CutTensors, unit: int) -> CutTensors:
    """Return the positions of one unit, sorted, each parameter once."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    for name, positions in cuts:
        found[name].append(positions[unit])
    return [(name, torch.tensor(sorted(set(torch.cat(parts).tolist())))) for name, parts in found.items()]


STATISTICS = frozenset({"mean", "var", "layer_norm", "rms_norm", "group_norm", "grouped"})
"""Ops of sites that put all units together into a mean or a scale."""


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """All structures of a model that can be removed, and why the others cannot.

    Attributes:
        groups: groups by `Group.id`.
        frozen: (tensor name, dimension) to the reason why it (or some of it) stays.
        shapes: shape of every parameter and buffer of the model.
        units: group id to the settled component of each unit, shape ``(units,)``.
        sites: places of the model's code whose constants change with a plan.
        heads: all places that split or join dimensions, for attributes such as `num_heads`.
        spared: tensors which `mask` leaves alone, because zeros in them are no zeros (directions of a weight norm).
        caches: module path to its attributes with tensors from earlier forwards; the small network starts without.
        arguments: arguments of the call that was traced.
        branches: residual branches by `Branch.id`, each of which can go as a whole (`trace` with ``whole``).
    """

    groups: Mapping[str, Group]
    frozen: Mapping[tuple[str, int], str]
    shapes: Mapping[str, tuple[int, ...]]
    units: Mapping[str, Tensor]
    sites: tuple[Site, ...] = ()
    heads: tuple[Site, ...] = ()
    spared: tuple[str, ...] = ()
    caches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    branches: Mapping[str, Branch] = field(default_factory=dict)
    arguments: Arguments = ((), {})

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups.values())

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, key: str) -> Group:
        return self.groups[key]

    @property
    def sharing(self) -> frozenset[str]:
        """Ids of the groups whose units share statistics: a norm, mean or variance runs over them.

        There a unit matters to the others even where no weight reads it, so that evidence of the weights that read it
        does not tell what its removal changes. A plan may take such units out exactly; gates and evidence leave them.
        """
        summed = [site for site in self.sites if site.op in STATISTICS]
        found = [torch.cat([part.reshape(-1) for part in site.before.values()]) for site in summed if site.before]
        return frozenset(k for k, units in self.units.items() if any(bool(torch.isin(units, c).any()) for c in found))

    @property
    def separate(self) -> Groups:
        """The groups whose units do not share statistics; the others stay, with that as their reason."""
        shared, why = (
            self.sharing,
            "its units share the statistics of a norm: evidence leaves them, a plan may take them",
        )
        held = {(m.name, m.dim): why for k in shared for m in self.groups[k].members}
        left = {k: g for k, g in self.groups.items() if k not in shared}
        return replace(self, groups=left, frozen={**self.frozen, **held}) if shared else self

    def __str__(self) -> str:
        lines = [f"{g.id}: {g.size} {g.kind}s in {len(g.members)} dimensions" for g in self]
        lines += [f"{b.id}: a branch of {len(b.modules)} modules" for b in self.branches.values()]
        reasons: dict[str, list[str]] = defaultdict(list)
        for (name, dim), why in self.frozen.items():
            reasons[why.replace(f" in {name.rpartition('.')[0]} ", " ")].append(f"{name}:{dim}")
        for why, names in reasons.items():
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            lines.append(f"stays: {', '.join(names[:6])}{more} ({why})")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """The atoms of one dimension of one tensor: ``start .. start + size``."""

    name: str
    dim: int
    start: int
    size: int
    learned: bool


def build(
    axes: list[Axis],
    root: Tensor,
    *,
    frozen: list[tuple[Tensor, str]],
    consumed: Tensor,
    made: Tensor,
    shapes: Mapping[str, tuple[int, ...]],
) -> Groups:
    """Return the groups and the frozen dimensions with reasons.

    Components which hold the same number of indices of the same dimensions are units of one group.

    Args:
        axes: all dimensions of the model; their atoms come first and without gaps.
        root: component of each atom.
        frozen: atoms that stay, with reasons; their whole components stay.
        consumed: boolean over atoms, True on the reading side of a weight.
        made: boolean over atoms, True where a weight both makes and is read.
        shapes: shape of every tensor of the model.
    """
    why = torch.full((root.numel(),), len(frozen))  # of each component: the number of its first reason to stay
    for number in reversed(range(len(frozen))):
        why[root[frozen[number][0]]] = number
    stays = {
        (axis.name, axis.dim): frozen[int(reason)][1]
        for axis in axes
        if (reason := why[root[axis.start : axis.start + axis.size]].min()) < len(frozen)
    }
    families = _families(axes, root, free=why == len(frozen))
    groups: dict[str, Group] = {}
    roots: dict[str, Tensor] = {}
    for family, numbers in families:
        group = _group([axes[n] for n in numbers], root, family=family, sides=(consumed, made), shapes=shapes)
        same = sum(other.split("#")[0] == group.id for other in groups)
        group = replace(group, id=f"{group.id}#{same + 1}") if same else group
        if not any(member.consumes for member in group.members):
            _freeze(stays, group, "is read by nothing that could be taken out with it")
        elif group.size > 1:
            groups[group.id], roots[group.id] = group, family
        else:
            _freeze(stays, group, "is a single unit: nothing would be left")
    return Groups(groups, stays, shapes, roots)


def _families(axes: list[Axis], root: Tensor, *, free: Tensor) -> list[tuple[Tensor, list[int]]]:
    """Return (components, axis numbers) for components that touch the same axes equally often, in order of axes."""
    if not axes:
        return []
    # no list of the length of all atoms is kept longer than it is read
    number = torch.repeat_interleave(torch.arange(len(axes)), torch.tensor([a.size for a in axes]))
    inside = free[root[: number.numel()]]
    pairs, counts = torch.unique(root[: number.numel()][inside] * len(axes) + number[inside], return_counts=True)
    del number, inside
    component, axis = pairs // len(axes), pairs.remainder_(len(axes))
    kinds = torch.unique(counts.add_(axis * (root.numel() + 1)), return_inverse=True)[1]
    del counts
    code = torch.randint(
        2**62, (int(kinds.max()) + 1 if len(kinds) else 0,), generator=torch.Generator().manual_seed(0)
    )
    total = torch.zeros(root.numel(), dtype=torch.long).index_add_(0, component, code[kinds])
    present = torch.unique_consecutive(component)
    signatures, family = torch.unique(total[present], return_inverse=True)
    sizes = torch.bincount(family, minlength=len(signatures)).tolist()
    found = present[torch.argsort(family, stable=True)].split(sizes)
    firsts = torch.stack([members[0] for members in found]) if len(signatures) else component[:0]
    spans = zip(*(torch.searchsorted(component, firsts, side=side).tolist() for side in ("left", "right")), strict=True)
    numbered = [(members, axis[a:b].tolist()) for members, (a, b) in zip(found, spans, strict=True)]
    return sorted(numbered, key=lambda entry: (entry[1], int(entry[0][0])))


def _freeze(frozen: dict[tuple[str, int], str], group: Group, reason: str) -> None:
    for member in group.members:
        frozen.setdefault((member.name, member.dim), reason)


def _group(
    axes: list[Axis],
    root: Tensor,
    *,
    family: Tensor,
    sides: tuple[Tensor, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> Group:
    """Return the group of the components in `family`, which touch `axes`."""
    inside = torch.zeros(root.numel(), dtype=torch.bool)
    inside[family] = True
    members = []
    for axis in axes:
        own = root[axis.start : axis.start + axis.size]
        positions = inside[own].nonzero().flatten()
        index = positions[torch.argsort(own[positions], stable=True)].reshape(family.numel(), -1)
        reads, makes = (bool(side[axis.start + int(index[0, 0])]) for side in sides)
        members.append(Member(axis.name, axis.dim, index, reads, makes or not reads, axis.learned))
    made = next((m for m in members if m.makes and m.learned), members[0])
    learned = [m.index.shape[1] for m in members if m.learned]
    kind = "channel" if max(learned, default=1) == 1 else "block"
    held = {m.name: shapes[m.name] for m in members}
    return Group(f"{made.name}:{made.dim}", kind, family.numel(), tuple(members), held)


PLAN_SCHEMA = 1


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
        caches: module path to its attributes with tensors from earlier forwards; the small network starts without.
        dropped: residual branches that go as a whole.
        routers: weights whose rows choose among units, where some of these go.
    """

    removed: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, int]
    cuts: Mapping[str, Mapping[int, tuple[int, ...]]]
    shapes: Mapping[str, tuple[int, ...]]
    edits: tuple[Edit, ...] = ()
    counts: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    spared: tuple[str, ...] = ()
    nats: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    caches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: tuple[Branch, ...] = ()
    routers: tuple[str, ...] = ()

    @property
    def lost(self) -> frozenset[str]:
        """Names of the tensors that go with a whole branch."""
        return frozenset(name for branch in self.dropped for name in (*branch.parameters, *branch.buffers))

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

    def then(self, other: Plan) -> Plan:
        """Return one plan that does what this plan and then `other` do, for the model this plan is for.

        Args:
            other: a plan for the network that this one leaves.

        Raises:
            PlanError: when `other` is for another network.
        """
        lost = self.lost
        between = {name: self.shape(name) for name in self.shapes if name not in lost}
        moves = moves_up(between)  # of layers in a list where nothing is left of others
        if dict(other.shapes) == {renumbered(n, moves): shape for n, shape in between.items()} != between:
            back = {path: {now: old for old, now in places.items()} for path, places in moves.items()}
            content = renumbered({**json.loads(other.to_json()), "sha256": None}, back)
            other = Plan.from_json(json.dumps(content | {"fingerprint": fingerprint(content["shapes"])}))
        if between != dict(other.shapes):
            wrong = [n for n in dict.fromkeys([*between, *other.shapes]) if between.get(n) != other.shapes.get(n)]
            raise PlanError(
                f"the second plan is for another network: {wrong[0]} has shape {between.get(wrong[0], 'none')} after "
                f"the first plan, the second one expects {other.shapes.get(wrong[0], 'none')}. Trace the shrunk network"
            )
        cuts = {
            name: {
                dim: _joined(self.shapes[name][dim], *(plan.cuts.get(name, {}).get(dim, ()) for plan in (self, other)))
                for dim in sorted({*self.cuts.get(name, {}), *other.cuts.get(name, {})})
            }
            for name in dict.fromkeys([*self.cuts, *other.cuts])
        }
        widths = {**other.widths, **self.widths}
        removed = {
            key: _joined(widths[key], self.removed.get(key, ()), other.removed.get(key, ()))
            for key in dict.fromkeys([*self.removed, *other.removed])
        }
        modules = dict.fromkeys(e.module for e in (*self.edits, *other.edits))
        own = {m: [[e for e in plan.edits if e.module == m] for plan in (self, other)] for m in modules}
        counts: dict[str, dict[int, int]] = {}
        for m in dict.fromkeys([*self.counts, *other.counts]):
            first, second = self.counts.get(m, {}), other.counts.get(m, {})
            fresh = {a: b for a, b in second.items() if a not in first.values()}  # stands in the code as it is
            counts[m] = {**fresh, **{a: second.get(b, b) for a, b in first.items()}}
        return replace(
            self,
            removed=removed,
            widths=widths,
            cuts=cuts,
            edits=tuple(e for pair in own.values() for e in compose(*pair)),
            counts=counts,
            spared=tuple(dict.fromkeys((*self.spared, *other.spared))),
            nats={key: self.nats[key] for key in self.nats if removed.get(key) == self.removed.get(key)},
            caches={**self.caches, **other.caches},
            dropped=(*self.dropped, *other.dropped),
            routers=tuple(dict.fromkeys((*self.routers, *other.routers))),
        )

    def to_json(self) -> str:
        """Return the plan as JSON text, with the SHA-256 of its content."""
        content = {
            "schema": PLAN_SCHEMA,
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
            "caches": {k: list(v) for k, v in self.caches.items()},
        }
        whole = {"dropped": [b.to_data() for b in self.dropped], "routers": list(self.routers)}
        content |= {k: v for k, v in whole.items() if v}  # earlier versions refuse a plan with a field they do not know
        return json.dumps(content | {"sha256": _digest(content)})

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan written by `to_json`.

        Raises:
            PlanError: for text that is not a plan, is damaged, or comes from a newer version.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            told = data.pop("sha256", None)  # plans of earlier versions, and those written by hand, have none
            if data.get("kind") != "ockham-plan":
                raise PlanError("this is not an Ockham plan")
            if int(data["schema"]) > PLAN_SCHEMA:
                raise PlanError(
                    f"the plan has schema {data['schema']}, this version reads up to {PLAN_SCHEMA}: upgrade Ockham"
                )
            strange = data.keys() - {f.name for f in fields(Plan)} - {"schema", "kind", "fingerprint"}
            if strange:  # perhaps a name that was "sha256"
                raise PlanError(f"the plan is damaged or was changed: unknown field {min(strange)!r}")
            plan = Plan(
                removed={k: tuple(v) for k, v in data["removed"].items()},
                widths={k: int(v) for k, v in data["widths"].items()},
                cuts={n: {int(d): tuple(i) for d, i in c.items()} for n, c in data["cuts"].items()},
                shapes={n: tuple(s) for n, s in data["shapes"].items()},
                edits=tuple(Edit.from_data(e) for e in data["edits"]),
                counts={m: {int(a): int(b) for a, b in c.items()} for m, c in data["counts"].items()},
                spared=tuple(data["spared"]),
                nats={k: tuple(v) for k, v in data["nats"].items()},
                caches={k: tuple(v) for k, v in data.get("caches", {}).items()},
                dropped=tuple(Branch.from_data(b) for b in data.get("dropped", ())),
                routers=tuple(map(str, data.get("routers", ()))),
            )
            for name, dim, gone in ((n, d, i) for n, cut in plan.cuts.items() for d, i in cut.items()):
                size = plan.shapes[name][dim]
                inside = all(isinstance(i, int) and 0 <= i < size for i in gone)
                if not inside or not len(set(gone)) == len(gone) < size:
                    raise PlanError(
                        f"the plan is damaged: {name}:{dim} has {size} indices and cannot lose {list(gone)}"
                    )
        except PlanError:
            raise
        except (KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError, ValueError) as error:
            raise PlanError(f"the plan is damaged: {type(error).__name__}: {error}") from error
        if plan.fingerprint != data["fingerprint"] or not {*plan.lost, *plan.routers} <= plan.shapes.keys():
            raise PlanError("the plan is damaged: its shapes do not match its fingerprint")
        if told is not None and told != _digest(data):
            raise PlanError(
                "the plan is damaged or was changed: its SHA-256 is another. "
                "After a change by hand, take that field out"
            )
        return plan

    def __str__(self) -> str:
        lines = [f"plan {self.fingerprint[:12]}"]
        for key, width in self.widths.items():
            gone = self.removed.get(key, ())
            if gone:
                said = f" ({sum(self.nats[key]):.1f} nats)" if key in self.nats else ""
                lines.append(f"  {key}: {width} -> {width - len(gone)}, without {_ranges(gone)}{said}")
        for branch in self.dropped:
            said = f" ({self.nats[branch.id][0]:.1f} nats)" if branch.id in self.nats else ""
            lines.append(f"  {branch.id}: without {', '.join(branch.modules)}{said}")
        return "\n".join(lines if len(lines) > 1 else [*lines, "  nothing is removed"])


def _joined(size: int, first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    """Return the indices out of `size` that are gone after `first`, and `second` of what that left."""
    left = sorted(set(range(size)) - set(first))
    return tuple(sorted({*first, *(left[i] for i in second)}))


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


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def plan_masks(groups: Groups, keep: Mapping[str, Tensor], *, nats: Mapping[str, Tensor] | None = None) -> Plan:
    """Build a plan from masks of the units that stay.

    Args:
        groups: result of `trace`.
        keep: group id to a boolean tensor of shape ``(units,)``, True = stays; groups left out stay whole. Of a branch
            the shape is ``(1,)``.
        nats: group id to a tensor of shape ``(units,)`` with the evidence for each unit, only to be printed and saved.

    Raises:
        PlanError: for unknown groups, masks of another dtype or shape, or a mask that keeps nothing.
    """
    whole = {key: mask for key, mask in keep.items() if key in groups.branches}
    keep = {key: mask for key, mask in keep.items() if key not in whole}
    for key, mask in whole.items():
        if mask.dtype != torch.bool or tuple(mask.shape) != (1,):
            raise PlanError(f"keep[{key!r}] is {mask.dtype} of shape {tuple(mask.shape)}; expected torch.bool of (1,)")
    for key, mask in keep.items():
        if key not in groups.groups:
            raise PlanError(f"no group {key!r}; known: {', '.join(list(groups.groups)[:5])}, ...")
        size, shape = groups[key].size, tuple(mask.shape)
        if mask.dtype != torch.bool or shape != (size,):
            raise PlanError(f"keep[{key!r}] is {mask.dtype} of shape {shape}; expected torch.bool of ({size},)")
        if int(mask.sum()) < groups[key].least:
            many = "all" if not bool(mask.any()) else f"{int((~mask).sum())} of"
            few = "one" if groups[key].least == 1 else groups[key].least
            raise PlanError(f"keep[{key!r}] removes {many} {size} units; at least {few} must stay")
    lost = {k: (~keep[k].cpu()).nonzero().flatten() for k in groups.groups if k in keep}
    lost = {k: which for k, which in lost.items() if len(which)}
    gone = {k: tuple(which.tolist()) for k, which in lost.items()}
    cuts: dict[str, dict[int, list[Tensor]]] = {}
    for key, which in lost.items():
        for member in groups[key].members:
            cuts.setdefault(member.name, {}).setdefault(member.dim, []).append(member.index[which].flatten())
    sizes = [(groups.shapes[n][d], sum(map(len, i))) for n, cut in cuts.items() for d, i in cut.items()]
    widths = {size: {size - count for other, count in set(sizes) if other == size} for size in dict(sizes)}
    units = torch.cat([torch.empty(0, dtype=torch.long), *(groups.units[k][v] for k, v in lost.items())])
    every = gone | {k: (0,) for k, mask in whole.items() if not bool(mask[0])}
    said = {k: tuple(nats[k][list(v)].double().tolist()) for k, v in every.items() if nats and k in nats}
    return Plan(
        removed=gone,
        widths={g.id: g.size for g in groups},
        cuts={n: {d: tuple(torch.cat(i).sort().values.tolist()) for d, i in c.items()} for n, c in cuts.items()},
        shapes=dict(groups.shapes),
        edits=edits_of(groups.sites, units, widths),
        counts=counts_of(groups.heads, units),
        spared=groups.spared,
        nats=said,
        caches=groups.caches,
        dropped=tuple(b for key, b in groups.branches.items() if key in every),
        routers=tuple(groups[key].router for key in gone if groups[key].router),
    )


def random_plan(groups: Groups, ratio: float, *, generator: torch.Generator | None = None) -> Plan:
    """Build a plan that removes a random share `ratio` of the units of every group, and of the branches.

    Args:
        groups: result of `trace`.
        ratio: share in ``[0, 1]``; each group loses the nearest whole number of units.
        generator: source of randomness; the global one when None.

    Raises:
        PlanError: when `ratio` lies outside ``[0, 1]``.
    """
    if not 0 <= ratio <= 1:
        raise PlanError(f"ratio is {ratio}; expected a share between 0 and 1")
    keep = {}
    for group in groups:
        keep[group.id] = torch.ones(group.size, dtype=torch.bool)
        count = min(round(ratio * group.size), group.size - group.least)
        keep[group.id][torch.randperm(group.size, generator=generator)[:count]] = False
    gone = torch.randperm(len(groups.branches), generator=generator)[: round(ratio * len(groups.branches))].tolist()
    keep |= {key: torch.tensor([i not in gone]) for i, key in enumerate(groups.branches)}
    return plan_masks(groups, keep)
