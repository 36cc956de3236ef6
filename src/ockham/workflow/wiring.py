"""Which position of which layer reads which structure: from traced groups to the readers of gates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ockham.errors import OckhamError
from ockham.posterior.gates import GateNoise, Reader, detach
from ockham.surgery import Group, Groups
from ockham.surgery.cloning import canonical_names, clone
from ockham.surgery.groups import Member
from ockham.surgery.tracing import as_arguments

__all__ = ["NAME", "Wiring", "canonical", "chosen", "keys_of", "plain", "wire"]

NAME = "ockham_gates"
"""Name of the gates as a submodule of the network."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True, eq=False)
class Wiring:
    """Where gates act.

    Attributes:
        count: number of gates.
        readers: positions of layers.
        places: group id to the numbers of its gates [units].
        skipped: group id to the reason why it gets none.
    """

    count: int
    readers: tuple[Reader, ...]
    places: Mapping[str, Tensor]
    skipped: Mapping[str, str]


def wire(model: nn.Module, groups: Groups, wanted: list[str], example_inputs: Any) -> Wiring:
    """Number the units of the wanted groups and find what reads them."""
    owners, called = _owners(model), _called(model, example_inputs)
    skipped = {k: why for k in wanted if (why := _obstacle(model, groups[k], owners))}
    places, start = {}, 0
    for key in wanted:
        if key not in skipped:
            places[key] = torch.arange(start, start + groups[key].size)
            start += groups[key].size
    read: dict[tuple[str, str, int], Tensor] = {}
    for key, units in places.items():
        for member in _readers(groups[key]):
            for path, name in owners[member.name]:
                size = groups[key].shapes[member.name][member.dim]
                gates = read.setdefault((path, name, member.dim), torch.full((size,), -1))
                gates[member.index] = units.unsqueeze(1).expand_as(member.index)
    readers = tuple(
        Reader(path, name, dim, _axis(model.get_submodule(path), dim) if path in called else None, gates)
        for (path, name, dim), gates in read.items()
    )
    return Wiring(start, readers, places, skipped)


def chosen(groups: Groups, layers: Iterable[str] | None) -> list[str]:
    """Ids of the groups with a making member in one of the layers; all of them for None.

    Raises:
        OckhamError: a layer has no structure that can go; says why.
    """
    if layers is None:
        return list(groups.groups)
    found: set[str] = set()
    for layer in [layers] if isinstance(layers, str) else layers:
        hits = {g.id for g in groups if any(m.makes and _matches(layer, m.name) for m in g.members)}
        if not hits:
            reasons = [f"{n}:{d} {why}" for (n, d), why in groups.frozen.items() if _matches(layer, n)]
            raise OckhamError(f"layer {layer!r} has no structure that can go: {'; '.join(reasons) or 'no such layer'}")
        found |= hits
    return [k for k in groups.groups if k in found]


def keys_of(model: nn.Module, noise: GateNoise, group: Group) -> Tensor | None:
    """Keys of the gates on the units of a group, None where it has none."""
    by_name = {(canonical(model, f"{path}.{name}"), dim): i for i, (path, name, dim, _) in enumerate(noise.readers)}
    for member in _readers(group):
        reader = by_name.get((member.name, member.dim))
        if reader is not None:
            keys = noise.positions(reader)[member.index[:, 0].to(noise.key.device)]
            return keys if bool((keys >= 0).all()) else None
    return None


def canonical(model: nn.Module, name: str) -> str:
    """The name under which surgery knows a parameter (tied ones have one)."""
    return canonical_names(model)[id(model.get_parameter(name.removeprefix(".")))]


def plain(model: nn.Module) -> nn.Module:
    """The network without its gates, sharing memory with it: for looking, not for training."""
    twin: nn.Module = clone(model, lambda _, t: t.detach())
    detach(twin, getattr(twin, NAME))
    return twin


def _readers(group: Group) -> list[Member]:
    return [m for m in group.members if m.learned and m.consumes and not m.makes]


def _obstacle(model: nn.Module, group: Group, owners: Mapping[str, list[tuple[str, str]]]) -> str:
    """Why a group can have no gates; empty if it can."""
    for member in group.members:
        for path, _ in owners.get(member.name, ()):
            module = model.get_submodule(path)
            if member.consumes and isinstance(module, nn.RNNBase):
                return f"{path} reads it inside a recurrent kernel"
            depthwise = isinstance(module, _CONVOLUTIONS) and module.groups > 1
            if member.consumes and member.makes and not depthwise:
                return f"{member.name} both makes and reads it"
    return "" if _readers(group) else "no weight of its own reads it"


def _axis(module: nn.Module, dim: int) -> int | None:
    """Dimension of the module's input that meets dimension ``dim`` of its weight; None if it is not that simple."""
    if isinstance(module, nn.Linear) and dim == 1:
        return -1
    kinds = enumerate(zip(_CONVOLUTIONS, _TRANSPOSED, strict=True), 1)
    spatial = next((n for n, kind in kinds if isinstance(module, kind)), 0)
    if spatial and module.groups == 1 and dim == (1 if isinstance(module, _CONVOLUTIONS) else 0):
        return -1 - spatial
    return -1 if type(module).__name__ == "Conv1D" and dim == 0 else None


def _owners(model: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """Parameter, by its first name, to all (module path, name in it) that hold it."""
    names = canonical_names(model)
    found: dict[str, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            found.setdefault(names[id(parameter)], []).append((path, name))
    return found


@torch.no_grad()
def _called(model: nn.Module, example_inputs: Any) -> set[str]:
    """Paths of the modules that run as modules, on one forward in evaluation mode."""
    seen: set[str] = set()

    def note(path: str) -> Any:
        return lambda module, args: seen.add(path)

    handles = [m.register_forward_pre_hook(note(path)) for path, m in model.named_modules()]
    modes = {m: m.training for m in model.modules()}
    args, kwargs = as_arguments(example_inputs)
    try:
        model.eval()(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return seen


def _matches(wanted: str, name: str) -> bool:
    if wanted.startswith("re:"):
        return re.search(wanted[3:], name) is not None
    return name == wanted or name.startswith(wanted + ".")
