"""From settled atoms to groups: units which go together, and the weights by which each of them is judged."""

from __future__ import annotations

import math
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
    """

    id: str
    kind: str
    size: int
    members: tuple[Member, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def outgoing(self, unit: int) -> Cut:
        """Return the weights which read `unit`: a list of (parameter, flat positions), each parameter once."""
        return _one(self.outgoing_cuts(), unit)

    def incoming(self, unit: int) -> Cut:
        """Return the weights, bias and norm affine which make `unit`: a list of (parameter, flat positions)."""
        return _one(self.incoming_cuts(), unit)

    def outgoing_cuts(self) -> Cut:
        """Return the reading weights of all units: a list of (parameter, flat positions ``(units, n)``).

        A parameter which reads a unit along two of its dimensions comes twice; `outgoing` unites them.
        """
        return [self._cut(member) for member in self.members if member.learned and member.consumes]

    def incoming_cuts(self) -> Cut:
        """Return the making weights of all units, as `outgoing_cuts` does the reading ones."""
        return [self._cut(member) for member in self.members if member.learned and member.makes]

    def _cut(self, member: Member) -> tuple[str, Tensor]:
        shape = self.shapes[member.name]
        before, after = math.prod(shape[: member.dim]), math.prod(shape[member.dim + 1 :])
        outer = torch.arange(before).view(1, 1, before, 1) * (shape[member.dim] * after)
        inner = torch.arange(after).view(1, 1, 1, after)
        return member.name, (member.index[:, :, None, None] * after + outer + inner).flatten(1)


def _one(cuts: Cut, unit: int) -> Cut:
    """Return the positions of one unit, sorted, each parameter once."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    for name, positions in cuts:
        found[name].append(positions[unit])
    return [(name, torch.tensor(sorted(set(torch.cat(parts).tolist())))) for name, parts in found.items()]


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
            reasons[why.replace(f" in {name.rpartition('.')[0]} ", " ")].append(f"{name}:{dim}")
        return "\n".join([*lines, *(f"stays: {_some(names)} ({why})" for why, names in reasons.items())])


def _some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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
    why = _first_reason(root, frozen)
    stays = {
        (axis.name, axis.dim): frozen[int(reason)][1]
        for axis in axes
        if (reason := why[root[axis.start : axis.start + axis.size]].min()) < len(frozen)
    }
    families = _families(axes, root, free=why == len(frozen))
    groups: dict[str, Group] = {}
    roots: dict[str, Tensor] = {}
    for family, numbers in families:
        group = _renamed(
            _group([axes[n] for n in numbers], root, family=family, sides=(consumed, made), shapes=shapes), groups
        )
        if not any(member.consumes for member in group.members):
            _freeze(stays, group, "is read by nothing that could be taken out with it")
        elif group.size > 1:
            groups[group.id], roots[group.id] = group, family
        else:
            _freeze(stays, group, "is a single unit: nothing would be left")
    return Groups(groups, stays, shapes, roots)


def _first_reason(root: Tensor, frozen: list[tuple[Tensor, str]]) -> Tensor:
    """Return, for each component, the index of the first reason to keep it; ``len(frozen)`` for none."""
    why = torch.full((root.numel(),), len(frozen))
    for number in reversed(range(len(frozen))):
        why[root[frozen[number][0]]] = number
    return why


def _families(axes: list[Axis], root: Tensor, *, free: Tensor) -> list[tuple[Tensor, list[int]]]:
    """Return (components, axis numbers) for components that touch the same axes equally often, in order of axes."""
    if not axes:
        return []
    number = torch.repeat_interleave(torch.arange(len(axes)), torch.tensor([a.size for a in axes]))
    own = root[: number.numel()]
    number, own = number[free[own]], own[free[own]]
    pairs, counts = torch.unique(own * len(axes) + number, return_counts=True)
    component, axis = pairs // len(axes), pairs % len(axes)
    _, kinds = torch.unique(axis * (root.numel() + 1) + counts, return_inverse=True)
    code = torch.randint(
        2**62, (int(kinds.max()) + 1 if len(kinds) else 0,), generator=torch.Generator().manual_seed(0)
    )
    total = torch.zeros(root.numel(), dtype=torch.long).index_add_(0, component, code[kinds])
    present = torch.unique(component)
    signatures, family = torch.unique(total[present], return_inverse=True)
    found = [present[family == f] for f in range(len(signatures))]
    numbered = [(members, axis[component == members[0]].tolist()) for members in found]
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


def _renamed(group: Group, taken: Mapping[str, Group]) -> Group:
    """Return the group under an id nobody has yet: ``name:dim``, ``name:dim#2``, ..."""
    same = sum(other.split("#")[0] == group.id for other in taken)
    return replace(group, id=f"{group.id}#{same + 1}") if same else group
