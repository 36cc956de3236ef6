"""Plans applied: `mask` zeroes the removed structures, `shrink` takes them out for good."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ockham.surgery.attributes import refit
from ockham.surgery.cloning import canonical_names, clone
from ockham.surgery.configs import settle_config
from ockham.surgery.planning import Plan, PlanError, check_model


@runtime_checkable
class Sliceable(Protocol):
    """An optimizer that carries its own state over to a smaller network."""

    def sliced(self, parameters: Mapping[str, Tensor], take: Callable[[str, Tensor], Tensor]) -> Any:
        """A copy over ``parameters`` (by name); ``take`` cuts a tensor shaped like the named parameter."""


@runtime_checkable
class Follower(Protocol):
    """An optimizer that reads its network, not only its parameters."""

    def follow(self, network: nn.Module) -> None:
        """Use ``network`` from now on, which holds its parameters."""


def slice_tensor(plan: Plan, name: str, tensor: Tensor) -> Tensor:
    """Return what stays of `tensor`, which is shaped as parameter (or buffer) `name` was before.

    Works for anything of that shape: weights, gradients, optimizer state, posterior means and precisions. The result
    owns its memory and keeps dtype, device and memory format.

    Raises:
        PlanError: when the shape is another one.
    """
    if name not in plan.shapes or tuple(tensor.shape) != plan.shapes[name]:
        expected = plan.shapes.get(name, "no such tensor in the plan")
        raise PlanError(f"{name}: got shape {tuple(tensor.shape)}, the plan expects {expected}")
    out = tensor.detach()
    for dim in plan.cuts.get(name, {}):
        out = out.index_select(dim, plan.kept(name, dim).to(out.device))
    return out.clone(memory_format=_format(tensor))


def _format(tensor: Tensor) -> torch.memory_format:
    """Return the memory format `tensor` clearly has."""
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if tensor.ndim == 5 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def masked_tensor(plan: Plan, name: str, tensor: Tensor) -> Tensor:
    """Return a copy of `tensor` with zeros in all that the plan removes from it."""
    out = tensor.detach().clone()
    for dim, gone in plan.cuts.get(name, {}).items():
        out.index_fill_(dim, torch.tensor(gone, device=out.device), 0)
    return out


def mask(model: nn.Module, plan: Plan) -> Any:
    """Return a copy of `model` in which every weight of a removed structure is zero.

    Zeroed are the weights that make a unit (with bias and norm affine) and those which read it, so the copy computes
    the function of the network without the unit: whatever constant a norm or an activation would leave behind
    (bias -> BatchNorm -> ReLU) meets zero weights. No constant is ever left to fold. Running statistics stay.

    Raises:
        PlanError: when the plan is for another model.
    """
    check_model(plan, model)
    zeroed = {name for name, _ in model.named_parameters()} - set(plan.spared)
    return clone(model, lambda n, t: masked_tensor(plan, n, t) if n in zeroed else t.detach().clone())


def shrink(
    model: nn.Module,
    plan: Plan,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    posterior: Mapping[str, Any] | None = None,
) -> Any:
    """Return a smaller copy of `model`: ``f_small(x) = f_masked(x)``. The original is left as it is.

    Parameters keep dtype, device, memory format and ``requires_grad``, modules their mode, and their attributes
    (``out_channels``, ``num_heads``, ...) follow the new shapes; a transformers ``config`` does where it can describe
    them (all layers alike), and stays the old one where it cannot.

    Args:
        model: the model the plan was made for (a fresh instance will do).
        plan: the edits.
        optimizer: an optimizer over the parameters of `model`; a copy over those of the small model is returned too,
            its state sliced alike.
        posterior: parameter name to an object whose tensors of the parameter's shape are to be sliced, or to a tensor.

    Returns:
        The small model; with `optimizer` or `posterior` a tuple ``(small, optimizer, posterior)`` of what was given.

    Raises:
        PlanError: when the plan is for another model.
    """
    check_model(plan, model)
    small = clone(model, lambda n, t: slice_tensor(plan, n, t))
    refit(model, small, plan)
    settle_config(model, small, plan)
    extras: list[Any] = []
    if optimizer is not None:
        extras.append(shrink_optimizer(model, small, plan, optimizer=optimizer))
    if posterior is not None:
        extras.append({n: slice_values(plan, n, value) for n, value in posterior.items()})
    return (small, *extras) if extras else small


def slice_values(plan: Plan, name: str, value: Any) -> Any:
    """Return `value` with every tensor shaped like parameter `name` sliced: tensors, mappings, dataclasses, objects."""
    if isinstance(value, Tensor):
        return slice_tensor(plan, name, value) if tuple(value.shape) == plan.shapes[name] else value.detach().clone()
    if isinstance(value, Mapping):
        return {k: slice_values(plan, name, v) for k, v in value.items()}
    names = getattr(value, "__dataclass_fields__", None) or getattr(value, "__dict__", None)
    if not names:
        return copy.deepcopy(value)
    twin = copy.copy(value)
    for field in names:
        object.__setattr__(twin, field, slice_values(plan, name, getattr(value, field)))
    return twin


def shrink_optimizer(
    model: nn.Module, small: nn.Module, plan: Plan, *, optimizer: torch.optim.Optimizer
) -> torch.optim.Optimizer:
    """Return a copy of `optimizer` over the parameters of `small`, with its state (momenta, ...) sliced alike.

    An optimizer that knows how (it has ``sliced(parameters, take)``, as the variational ones do) does it itself.

    Raises:
        PlanError: when the optimizer holds a parameter the model does not have.
    """
    names = canonical_names(model)
    after = dict(small.named_parameters())
    if isinstance(optimizer, Sliceable):
        carried: torch.optim.Optimizer = optimizer.sliced(after, lambda name, tensor: slice_tensor(plan, name, tensor))
        if isinstance(carried, Follower):
            carried.follow(small)
        return carried
    twin = copy.copy(optimizer)
    twin.state = defaultdict(dict)
    twin.param_groups = []
    for group in optimizer.param_groups:
        if any(id(p) not in names for p in group["params"]):
            raise PlanError("the optimizer holds a parameter that is not one of this model")
        fresh = {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
        twin.param_groups.append({"params": [after[names[id(p)]] for p in group["params"]], **fresh})
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        twin.state[after[name]] = {k: _state(plan, name, v) for k, v in state.items()}
    return twin


def _state(plan: Plan, name: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim and tuple(value.shape) != plan.shapes[name]:
        raise PlanError(
            f"the optimizer's state for {name} has shape {tuple(value.shape)}, the parameter {plan.shapes[name]}: it "
            "cannot be sliced. Make a new optimizer over the small model"
        )
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        raise PlanError(f"the optimizer's state for {name} is not one tensor per parameter; make a new optimizer")
    return slice_values(plan, name, value) if isinstance(value, (Tensor, Mapping)) else copy.deepcopy(value)
