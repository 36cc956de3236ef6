"""From single weights that go to structures that go: units nobody reads any more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ockham.surgery.grouping import Group, Groups
from ockham.surgery.planning import Plan, PlanError, plan_masks

__all__ = ["plan_unread"]


def plan_unread(groups: Groups, keep: Mapping[str, Tensor]) -> Plan:
    """Plan to take out every unit whose outgoing weights are all removed, and what only fed such units, and so on.

    The network's function does not change: nobody read these units. One unit of each group stays, as surgery needs it.

    Args:
        groups: result of `ockham.trace`.
        keep: parameter name to boolean tensor, True = stays (a median model, `Compressed.keep`); names left out stay.

    Returns:
        The plan; ``ockham.shrink(model, plan)`` carries it out on the model whose removed weights are zero.

    Raises:
        PlanError: a mask is not boolean or of another shape than the parameter.
    """
    alive = {name: _checked(groups, name, mask).clone() for name, mask in keep.items()}
    stays = {g.id: torch.ones(g.size, dtype=torch.bool) for g in groups if g.outgoing_cuts()}
    changed = True
    while changed:
        changed = False
        for key, before in list(stays.items()):
            read = _read(groups[key], alive) & before
            if not bool(read.any()):
                read[int(before.nonzero()[0])] = True
            if not torch.equal(read, before):
                changed = True
                _silence(groups[key], alive, ~read)
                stays[key] = read
    return plan_masks(groups, stays)


def _read(group: Group, alive: Mapping[str, Tensor]) -> Tensor:
    """Units of which a living weight reads."""
    found = torch.zeros(group.size, dtype=torch.bool)
    for name, positions in group.outgoing_cuts():
        if name not in alive:
            return torch.ones(group.size, dtype=torch.bool)
        found |= alive[name].reshape(-1)[positions].any(1)
    return found


def _silence(group: Group, alive: dict[str, Tensor], gone: Tensor) -> None:
    """The weights that make these units are of no use any more."""
    for name, positions in group.incoming_cuts():
        if name in alive:
            alive[name].view(-1)[positions[gone].reshape(-1)] = False


def _checked(groups: Groups, name: str, mask: Tensor) -> Tensor:
    if mask.dtype is not torch.bool or tuple(mask.shape) != groups.shapes.get(name):
        raise PlanError(
            f"keep[{name!r}] must be boolean (True = stays) of shape {groups.shapes.get(name, 'of no parameter')}; "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    return mask.cpu()
