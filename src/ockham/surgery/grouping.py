"""From settled atoms to groups: units which go together, and the weights by which each of them is judged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ockham.surgery.sites import Site

Cut = list[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One dimension of one tensor in a group.

    Attributes:
        name: parameter or buffer.
        dim: dimension of it.
        index: ``(units, k)``: the k indices of the dimension which belong to each unit.
        consumes: True on the outgoing side (weights which read the unit), False on the incoming side.
        learned: True for parameters, False for buffers.
    """

    name: str
    dim: int
    index: Tensor
    consumes: bool
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
    """

    id: str
    kind: str
    size: int
    members: tuple[Member, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def outgoing(self, unit: int) -> Cut:
        """Return the weights which read `unit`: a list of (parameter, flat positions), each parameter once."""
        return self._cut(unit, consumes=True)

    def incoming(self, unit: int) -> Cut:
        """Return the weights, bias and norm affine which make `unit`: a list of (parameter, flat positions)."""
        return self._cut(unit, consumes=False)

    def _cut(self, unit: int, *, consumes: bool) -> Cut:
        found: dict[str, list[Tensor]] = defaultdict(list)
        for member in self.members:
            if member.learned and member.consumes == consumes:
                positions = torch.arange(torch.Size(self.shapes[member.name]).numel()).view(self.shapes[member.name])
                found[member.name].append(positions.index_select(member.dim, member.index[unit]).flatten())
        return [(name, torch.cat(parts).sort()[0]) for name, parts in found.items()]


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """All structures of a model that can be removed, and why the others cannot.

    Attributes:
        groups: by `Group.id`.
        frozen: (tensor name, dimension) to the reason why it (or some of it) stays.
        shapes: shape of every parameter and buffer of the model.
        units: group id to the settled component of each unit, shape ``(units,)``.
        sites: places of the model's code whose constants change with a plan.
        heads: all places that split or join dimensions, for attributes such as `num_heads`.
        spared: tensors which `mask` leaves alone, because zeros in them are no zeros (directions of a weight norm).
    """

    groups: Mapping[str, Group]
    frozen: Mapping[tuple[str, int], str]
    shapes: Mapping[str, tuple[int, ...]]
    units: Mapping[str, Tensor]
    sites: tuple[Site, ...] = ()
    heads: tuple[Site, ...] = ()
    spared: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups.values())

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, key: str) -> Group:
        return self.groups[key]

    def __str__(self) -> str:
        lines = [f"{g.id}: {g.size} {g.kind}s in {len(g.members)} dimensions" for g in self]
        reasons: dict[str, list[str]] = defaultdict(list)
        for (name, dim), why in self.frozen.items():
            reasons[why].append(f"{name}:{dim}")
        lines += [f"stays: {', '.join(names)} ({why})" for why, names in reasons.items()]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """The atoms of one dimension of one tensor: ``start .. start + size``."""

    name: str
    dim: int
    start: int
    size: int
    learned: bool


def reasons_by_root(root: Tensor, frozen: list[tuple[Tensor, str]]) -> dict[int, str]:
    """Return the first reason for each frozen component."""
    found: dict[int, str] = {}
    for atoms, reason in frozen:
        for r in set(root[atoms].tolist()):
            found.setdefault(r, reason)
    return found


def build(
    axes: list[Axis],
    root: Tensor,
    *,
    reasons: Mapping[int, str],
    consumed: Tensor,
    shapes: Mapping[str, tuple[int, ...]],
) -> Groups:
    """Return the groups and the frozen dimensions with reasons.

    Components which hold the same number of indices of the same dimensions are units of one group.
    """
    frozen: dict[tuple[str, int], str] = {}
    units: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    for number, axis in enumerate(axes):
        own = root[axis.start : axis.start + axis.size]
        order = torch.argsort(own, stable=True)
        values, counts = torch.unique_consecutive(own[order], return_counts=True)
        for value, indices in zip(values.tolist(), torch.split(order, counts.tolist()), strict=True):
            if value in reasons:
                frozen.setdefault((axis.name, axis.dim), reasons[value])
            else:
                units[value].append((number, indices))
    families: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for value, places in units.items():
        families[tuple((number, len(indices)) for number, indices in places)].append(value)
    groups: dict[str, Group] = {}
    roots: dict[str, Tensor] = {}
    for signature, values_ in families.items():
        group = _group(axes, signature, [units[v] for v in values_], consumed=consumed, shapes=shapes)
        group = _renamed(group, groups)
        if not any(member.consumes for member in group.members):
            _freeze(frozen, group, "is read by nothing that could be taken out with it")
        elif group.size > 1:
            groups[group.id], roots[group.id] = group, torch.tensor(values_)
        else:
            _freeze(frozen, group, "is a single unit: nothing would be left")
    return Groups(groups, frozen, shapes, roots)


def _freeze(frozen: dict[tuple[str, int], str], group: Group, reason: str) -> None:
    for member in group.members:
        frozen.setdefault((member.name, member.dim), reason)


def _group(
    axes: list[Axis],
    signature: tuple[tuple[int, int], ...],
    units: list[list[tuple[int, Tensor]]],
    *,
    consumed: Tensor,
    shapes: Mapping[str, tuple[int, ...]],
) -> Group:
    members = []
    for position, (number, _) in enumerate(signature):
        axis = axes[number]
        index = torch.stack([unit[position][1] for unit in units])
        reads = bool(consumed[axis.start + int(index[0, 0])])
        members.append(Member(axis.name, axis.dim, index, reads, axis.learned))
    made = next((m for m in members if not m.consumes and m.learned), members[0])
    learned = [m.index.shape[1] for m in members if m.learned]
    kind = "channel" if max(learned, default=1) == 1 else "block"
    held = {m.name: shapes[m.name] for m in members}
    return Group(f"{made.name}:{made.dim}", kind, len(units), tuple(members), held)


def _renamed(group: Group, taken: Mapping[str, Group]) -> Group:
    """Return the group under an id nobody has yet: ``name:dim``, ``name:dim#2``, ..."""
    same = sum(other.split("#")[0] == group.id for other in taken)
    return replace(group, id=f"{group.id}#{same + 1}") if same else group
