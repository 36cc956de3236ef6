"""The scales of structures inside an optimizer whose prior is a `GroupPrior`: which weight has which, how they learn.

The truth is one number per structure and parameter, ``unit_precision`` in the parameter's state; the steps of the
optimizer read it per living weight, from the state vector `VECTOR`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ockham.posterior.group_priors import GroupPrior

__all__ = ["VECTOR", "learn_scales", "prior_of", "slice_scales", "start_scales"]

_EACH = "unit_precision"  # state of a parameter: one number per index of the dimension that numbers its structures


VECTOR = "prior_each"
"""State vector with the prior precision of every living weight: what a step reads."""


def start_scales(p: Tensor, group: dict[str, Any], each: Tensor) -> dict[str, Tensor]:
    """State of a parameter seen for the first time; ``each`` holds its prior per weight."""
    if not isinstance(group["prior"], GroupPrior):
        return {}
    _, ids = _layout(group)[p]
    return {_EACH: each.new_full(ids.shape, group["prior"].start_precision)}


def prior_of(p: Tensor, group: dict[str, Any], state: Mapping[str, Any]) -> Tensor:
    """Prior precision of every weight, shape of the parameter (an expanded view of one number a structure)."""
    return _along(_layout(group)[p][0], state[_EACH].clone(), p.shape)


def slice_scales(
    p: Tensor, group: dict[str, Any], state: Mapping[str, Any], take: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """State of the same parameter in a smaller network; ``take`` cuts a tensor of the parameter's shape."""
    if _EACH not in state:
        return {}
    dim = _layout(group)[p][0]
    left = take(_along(dim, state[_EACH], p.shape))
    return {_EACH: left.movedim(dim, 0).reshape(left.shape[dim], -1)[:, 0].clone() if p.ndim else state[_EACH].clone()}


@torch.no_grad()
def learn_scales(
    group: dict[str, Any],
    moments: Mapping[Tensor, Tensor],
    index: Mapping[Tensor, Tensor | None],
    states: Mapping[Tensor, dict[str, Any]],
) -> None:
    """One update of all structures of a group.

    Args:
        group: the parameter group.
        moments: parameter to E[(w - m0)^2] of its living weights, flat.
        index: parameter to the flat positions of its living weights; missing or None where all live.
        states: of the optimizer.
    """
    known = _layout(group)
    layout = {p: known[p] for p in moments}
    total = 1 + max(int(ids.max()) for _, ids in layout.values())
    device = next(iter(moments.values())).device
    second, count, precision = (torch.zeros(total, dtype=torch.float64, device=device) for _ in range(3))
    numbers = {p: _living(_along(dim, ids, p.shape), index.get(p)) for p, (dim, ids) in layout.items()}
    for p, moment in moments.items():
        second.index_add_(0, numbers[p], moment)
        count.index_add_(0, numbers[p], torch.ones_like(moment))
        precision[layout[p][1]] = states[p][_EACH].double()
    new = group["prior"].updated_each(precision, count, second)
    for p, (_, ids) in layout.items():
        states[p][_EACH] = new[ids].to(states[p][_EACH].dtype)  # a new tensor: a loaded state may be shared
        states[p][VECTOR].copy_(new[numbers[p]])


def _layout(group: dict[str, Any]) -> dict[Tensor, tuple[int, Tensor]]:
    """Parameter to the dimension that numbers its structures, and their numbers."""
    named = dict(zip(group["param_names"], group["params"], strict=True))
    found = group["prior"].layout({n: tuple(p.shape) for n, p in named.items()})
    return {p: (found[n][0], found[n][1].to(p.device)) for n, p in named.items()}


def _along(dim: int, values: Tensor, shape: torch.Size) -> Tensor:
    """Values per index of a dimension, as a view of a whole shape."""
    if not shape:
        return values.reshape(())
    return values.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)


def _living(wide: Tensor, index: Tensor | None) -> Tensor:
    flat = wide.reshape(-1)
    return flat if index is None else flat[index]
