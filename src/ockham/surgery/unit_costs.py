"""What a plan leaves and what a unit costs: parameters by counting, multiply-accumulates on fake tensors, latency."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from ockham.reduction.prices import UnitCosts
from ockham.surgery.cloning import clone
from ockham.surgery.cost import latency
from ockham.surgery.groups import Group, Groups, Plan, plan_masks
from ockham.surgery.resizing import refit
from ockham.surgery.shrinking import shrink
from ockham.surgery.tracing import as_arguments

__all__ = ["latency_after", "macs_after", "parameters_after", "unit_costs"]


def parameters_after(model: nn.Module, plan: Plan) -> int:
    """Learnable values that a plan leaves, tied ones once."""
    return sum(math.prod(plan.shape(name)) for name, _ in model.named_parameters())


def macs_after(model: nn.Module, plan: Plan, example_inputs: Any) -> int:
    """Multiply-accumulates of one forward pass on the example inputs after a plan; nothing is computed (fake tensors).

    Args:
        model: the network the plan is for; left as it is.
        plan: the edits.
        example_inputs: as for `trace`; the batch counts.
    """
    arguments = as_arguments(example_inputs)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = pytree.tree_map_only(Tensor, fake.from_tensor, arguments)
    counter = FlopCounterMode(display=False)
    with fake, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = clone(model, lambda n, t: _empty(t, plan.shape(n)))
        refit(model, small, plan)
        with counter:
            small.eval()(*args, **kwargs)
    return int(counter.get_total_flops() // 2)


def latency_after(model: nn.Module, plan: Plan, example_inputs: Any, *, batch: int = 64) -> float:
    """Measured seconds of a forward pass of the shrunk network (median, warm)."""
    return latency(shrink(model, plan), example_inputs, batch=batch)


def unit_costs(
    model: nn.Module, groups: Groups, example_inputs: Any, *, measured: Collection[str] = ("macs",)
) -> UnitCosts:
    """What one unit of each group costs, the others as they are.

    Multiply-accumulates come from a count without the unit, milliseconds (batch 64) from a measurement without half of
    the group, divided by the number of units taken out.

    Args:
        model: the traced network.
        groups: its groups.
        example_inputs: as for `trace`.
        measured: beside parameters, which always are: "macs", "milliseconds".
    """
    whole = plan_masks(groups, {})
    one = {g.id: plan_masks(groups, {g.id: _without(g, 1)}) for g in groups}
    count = parameters_after(model, whole)
    parameters = {key: float(count - parameters_after(model, p)) for key, p in one.items()}
    macs: dict[str, float] = {}
    if "macs" in measured:
        rows = next((t.shape[0] for t in pytree.tree_leaves(as_arguments(example_inputs)) if _is_batch(t)), 1)
        before = macs_after(model, whole, example_inputs)
        macs = {key: (before - macs_after(model, p, example_inputs)) / rows for key, p in one.items()}
    times: dict[str, float] = {}
    if "milliseconds" in measured:
        dense = latency_after(model, whole, example_inputs)
        for group in groups:
            half = max(1, group.size // 2)
            after = latency_after(model, plan_masks(groups, {group.id: _without(group, half)}), example_inputs)
            times[group.id] = max(0.0, 1e3 * (dense - after) / half)
    return UnitCosts(parameters, macs, times)


def _without(group: Group, count: int) -> Tensor:
    keep = torch.ones(group.size, dtype=torch.bool)
    keep[group.size - count :] = False
    return keep


def _is_batch(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def _empty(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    new = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
