"""Where the units of a network that shrank several times stood in the network before: one plan out of many."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ockham.surgery.groups import Groups, Plan, plan_masks

__all__ = ["Origin"]


class Origin:
    """Follows plan after plan; knows which units of the first network are left and what the others were worth.

    Args:
        groups: of the network before.
    """

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self._left = {name: [torch.arange(n) for n in shape] for name, shape in groups.shapes.items()}
        self._nats = {g.id: torch.zeros(g.size, dtype=torch.float64) for g in groups}

    def follow(self, now: Groups | None, plan: Plan) -> None:
        """Take note of a plan for the network as it is; ``now`` are the groups it was made from, for its nats."""
        for key, units in plan.removed.items():
            if now is not None and key in plan.nats:
                self._enter(now, key, units, plan.nats[key])
        for name, dims in self._left.items():
            self._left[name] = [left[plan.kept(name, d)] for d, left in enumerate(dims)]

    def alive(self, key: str) -> Tensor:
        """Units of a group of the first network that are left, boolean ``(units,)``."""
        member = self.groups[key].members[0]
        return torch.isin(member.index[:, 0], self._left[member.name][member.dim])

    def widths(self) -> dict[str, int]:
        """Group id to units left."""
        return {g.id: int(self.alive(g.id).sum()) for g in self.groups}

    def plan(self) -> Plan:
        """All of it as one plan for the first network."""
        return plan_masks(self.groups, {g.id: self.alive(g.id) for g in self.groups}, nats=self._nats)

    def state(self) -> dict[str, list[float]]:
        """Nats by group, plain."""
        return {key: values.tolist() for key, values in self._nats.items()}

    def load(self, state: Mapping[str, list[float]]) -> None:
        """Nats of `state`; the plans are followed anew."""
        self._nats = {key: torch.tensor(values, dtype=torch.float64) for key, values in state.items()}

    def _enter(self, now: Groups, key: str, units: tuple[int, ...], nats: tuple[float, ...]) -> None:
        member = now[key].members[0]
        places = self._left[member.name][member.dim][member.index[list(units), 0]]
        for group in self.groups:
            for other in (m for m in group.members if (m.name, m.dim) == (member.name, member.dim)):
                at = (other.index[None, :, :] == places[:, None, None]).any(2)
                worth = torch.tensor(nats, dtype=torch.float64)[:, None].expand(at.shape)
                self._nats[group.id][at.any(0)] = worth[at][torch.argsort(at.nonzero()[:, 1], stable=True)]
