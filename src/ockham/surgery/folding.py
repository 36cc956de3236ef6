"""Units that became constants: what they add goes into the bias of the layers that read them, exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ockham.surgery.comparing import as_arguments
from ockham.surgery.groups import Group, Groups, Member, Plan, PlanError, plan_masks

__all__ = [
    "Constant",
    "constants",
    "fold",
    "plan_unread",
]

_SPREAD = 1e-5  # of a constant over examples and places, relative: rounding of what is equal in exact arithmetic


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """What one layer reads from a unit that always says the same.

    Attributes:
        group: id of the unit's group.
        unit: number in it.
        layer: name of a Linear layer or convolution that reads it and has a bias.
        index: input features (channels) of the layer that belong to the unit.
        value: what each of them always is.
    """

    group: str
    unit: int
    layer: str
    index: Tensor
    value: Tensor


def constants(
    model: nn.Module, groups: Groups, example_inputs: Any, candidates: Mapping[str, Tensor]
) -> list[Constant]:
    """Find the units among the candidates that can be folded, by running the network.

    A unit can be folded when everything that reads it is a Linear layer or a convolution with a bias, and each of its
    features is the same at every place of every example; in a convolution with zero padding only if it is zero.

    Args:
        model: evaluated, left as it is.
        groups: of the model.
        example_inputs: as for `trace`; a few rows are enough, since candidates have no living input.
        candidates: group id to boolean ``(units,)``: units whose making weights are all zero.
    """
    readers = {key: _readers(model, groups[key]) for key, mask in candidates.items() if bool(mask.any())}
    wanted = {layer for found in readers.values() for layer, _ in found or ()}
    seen = _inputs(model, wanted, example_inputs)
    result = []
    for key, found in readers.items():
        for unit in candidates[key].nonzero().flatten().tolist() if found else ():
            parts = [_constant(model, key, unit, layer, member, seen) for layer, member in found or ()]
            if all(part is not None for part in parts):
                result += [part for part in parts if part is not None]
    return result


def fold(model: nn.Module, found: list[Constant]) -> nn.Module:
    """A copy of the model in which the constants have moved into biases and the weights that read them are zero."""
    twin: nn.Module = copy.deepcopy(model)
    with torch.no_grad():
        for constant in found:
            layer = twin.get_submodule(constant.layer)
            assert isinstance(layer, (nn.Linear, _ConvNd)) and isinstance(layer.bias, Tensor)
            read = (
                layer.weight[:, constant.index].flatten(2).sum(2)
                if layer.weight.ndim > 2
                else layer.weight[:, constant.index]
            )
            layer.bias += (read.double() @ constant.value.double()).to(layer.bias)
            layer.weight[:, constant.index] = 0
    return twin


def _readers(model: nn.Module, group: Group) -> list[tuple[str, Member]] | None:
    """Layers that read the units, or None where one of them cannot take a constant in its bias."""
    found = []
    for member in group.members:
        if not member.consumes:
            continue
        path, _, leaf = member.name.rpartition(".")
        module = model.get_submodule(path)
        plain = type(module) is nn.Linear or (
            isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd) and module.groups == 1
        )
        if not plain or leaf != "weight" or member.dim != 1 or module.bias is None:
            return None
        found.append((path, member))
    return found


def _inputs(model: nn.Module, layers: set[str], example_inputs: Any) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {}

    def keeper(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, args: seen.setdefault(name, []).append(args[0].detach())

    handles = [model.get_submodule(name).register_forward_pre_hook(keeper(name)) for name in layers]
    modes = {module: module.training for module in model.modules()}
    args, kwargs = as_arguments(example_inputs)
    try:
        with torch.no_grad():
            model.eval()(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return seen


def _constant(
    model: nn.Module, key: str, unit: int, layer: str, member: Member, seen: Mapping[str, list[Tensor]]
) -> Constant | None:
    module, index = model.get_submodule(layer), member.index[unit]
    if layer not in seen:
        return None
    assert isinstance(module, (nn.Linear, _ConvNd))
    dim = 1 - module.weight.ndim  # features last of a Linear layer, before the places of a convolution
    rows = torch.cat([x.movedim(dim, 0)[index.to(x.device)].reshape(len(index), -1).double() for x in seen[layer]], 1)
    low, high = rows.min(1).values, rows.max(1).values
    if bool((high - low > _SPREAD * torch.maximum(low.abs(), high.abs())).any()):
        return None
    padded = isinstance(module, _ConvNd) and (module.padding_mode != "zeros" or any(_sides(module.padding)))
    if padded and bool((rows != 0).any()):
        return None
    return Constant(key, unit, layer, index.to(rows.device), rows.mean(1))


def _sides(padding: Any) -> tuple[int, ...]:
    return (1,) if padding == "same" else () if padding == "valid" else tuple(padding)


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
