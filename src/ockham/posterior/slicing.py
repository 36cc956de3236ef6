"""A variational optimizer carried over to a smaller network: state of the survivors as it was, the rest forgotten."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ockham.errors import OckhamError
from ockham.posterior.group_priors import GroupPrior
from ockham.posterior.pieces import alive_index
from ockham.posterior.unit_scales import slice_scales

if TYPE_CHECKING:
    from ockham.posterior.variational import VariationalOptimizer

__all__ = ["sliced"]

Take = Callable[[str, Tensor], Tensor]
"""(Parameter name, tensor of the parameter's old shape) to what stays of it."""


@torch.no_grad()
def sliced(optimizer: VariationalOptimizer, parameters: Mapping[str, Tensor], take: Take) -> VariationalOptimizer:
    """A copy of the optimizer over the parameters of a smaller network; the original is left as it is.

    Moments, spreads, masks, the pending draw and the state of the noise generator go along, so training goes on as if
    the removed weights had only been removed.

    Args:
        optimizer: of the network before.
        parameters: name to parameter of the smaller network.
        take: cuts a tensor shaped like a parameter.

    Raises:
        OckhamError: called inside `sampled`, or a parameter is missing.
    """
    optimizer._outside("sliced")
    missing = [name for name in optimizer._names.values() if name not in parameters]
    if missing:
        raise OckhamError(f"the smaller network has no parameter {missing[:3]}: shrink the network of this optimizer")
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)  # copy.copy would drop all that torch's __getstate__ does not know
    twin.state, twin.param_groups = defaultdict(dict), []
    twin._index, twin._arenas = {}, {}
    twin._generators = {d: g.clone_state() for d, g in optimizer._generators.items()}
    twin._names = {parameters[name]: name for name in optimizer._names.values()}
    shapes = {name: tuple(p.shape) for p, name in optimizer._names.items()}
    for group in optimizer.param_groups:
        fresh = {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "prior")}
        if "prior" in group:
            prior = group["prior"]
            fresh["prior"] = prior.sliced(take, shapes) if isinstance(prior, GroupPrior) else prior
        twin.param_groups.append({"params": [parameters[optimizer._names[p]] for p in group["params"]], **fresh})
        for p in group["params"]:
            if optimizer.state.get(p):
                _carry(optimizer, twin, p, take, group)
    return twin


def _carry(
    optimizer: VariationalOptimizer, twin: VariationalOptimizer, p: Tensor, take: Take, group: dict[str, Any]
) -> None:
    name, state = optimizer._names[p], optimizer.state[p]
    new = next(q for q, n in twin._names.items() if n == name)
    old_keep = optimizer._keep_of(p)
    keep = take(name, old_keep)
    vectors = (*optimizer._vectors, "noise")
    kept = {k: copy.deepcopy(v) for k, v in state.items() if k not in vectors and k != "keep"}
    for vector in vectors:
        wide = torch.zeros(p.shape, dtype=state[vector].dtype, device=p.device)
        wide[old_keep] = state[vector]
        kept[vector] = take(name, wide)[keep]
    if not bool(keep.all()):
        kept["keep"] = keep
        twin._index[new] = alive_index(keep)
    twin.state[new] = kept | slice_scales(p, group, state, lambda t: take(name, t))
