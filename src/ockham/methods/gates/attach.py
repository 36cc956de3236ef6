"""Which position of which layer reads which structure: from traced groups to the readers of gates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ockham.choose.planning import plan
from ockham.core.network import Ignore
from ockham.errors import OckhamError
from ockham.methods.gates.noise import GateDraw, GateNoise, Reader, detach, per_example
from ockham.methods.gates.rules import (
    GateEvidence,
    GateRule,
    GateTable,
    bmrs_n,
    bmrs_n_printed,
    bmrs_u,
    by_mean,
    by_norm,
    by_taylor,
    gate_evidence,
    in_random_order,
    snr_below,
)
from ockham.run.structures import traced_again
from ockham.surgery import Group, Groups, Plan
from ockham.surgery.copies import as_arguments, canonical_names, clone
from ockham.surgery.groups import Member

__all__ = [
    "GATE_RULES",
    "NAME",
    "Gates",
    "Wiring",
    "attach_gates",
    "canonical",
    "chosen",
    "keys_of",
    "plain",
    "wire",
]

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
    names, called = canonical_names(model), _called(model, example_inputs)
    owners: dict[
        str, list[tuple[str, str]]
    ] = {}  # parameter, by its first name: every (module path, name) that holds it
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(names[id(parameter)], []).append((path, name))
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


@torch.no_grad()
def _called(model: nn.Module, example_inputs: Any) -> set[str]:
    """Paths of the modules that run as modules, on one forward in evaluation mode."""
    seen: set[str] = set()

    def note(path: str) -> Any:
        return lambda module, args: seen.add(path)

    handles = [m.register_forward_pre_hook(note(path)) for path, m in model.named_modules()]
    modes = {m: m.training for m in model.modules()}
    args, kwargs = as_arguments(model, example_inputs)
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


GATE_RULES: dict[str, GateRule] = {
    "n": bmrs_n,
    "n-printed": bmrs_n_printed,
    "u8": bmrs_u(8),
    "u4": bmrs_u(4),
    "snr": snr_below(1.0),
    "mean": by_mean,
    "l2": by_norm,
    "taylor": by_taylor,
    "random": in_random_order(),
}
"""Rules by the names of the command."""


@dataclass(frozen=True, slots=True, eq=False)
class Gates:
    """The gates of one network, as `attach_gates` returns them.

    Attributes:
        model: the network; its parameters now include those of the gates.
        noise: the module that holds them.
        groups: the structures, as `ockham.trace` finds them.
        places: group id to the places of its gates in ``noise.mean``; groups without gates are missing.
        skipped: group id to the reason why it has no gates.
        example_inputs: inputs that the network was traced with.
        ignore: names of what stays whole.
    """

    model: nn.Module
    noise: GateNoise
    groups: Groups
    places: Mapping[str, Tensor]
    skipped: Mapping[str, str]
    example_inputs: Any
    ignore: Ignore = ()

    def kl(self) -> Tensor:
        """Sum of the KL of all living gates, nats: add ``gates.kl() / n_data`` to the mean NLL of a batch."""
        return self.noise.kl()

    def parameters(self) -> list[nn.Parameter]:
        """Means and ln standard deviations, for a parameter group of their own."""
        return list(self.noise.parameters())

    def evidence(self, rule: str | GateRule = "n", *, sensitivity: Tensor | None = None) -> GateEvidence:
        """Score every structure.

        Args:
            rule: a function (`ockham.methods.gates.rules`), or its name in the command.
            sensitivity: mean square, for the Taylor rule, of dL/d ln theta per gate; default from the gradients that
                the weights have now.

        Raises:
            OckhamError: unknown name, or the rule lacks what it needs.
        """
        if isinstance(rule, str):
            if rule not in GATE_RULES:
                raise OckhamError(f"no rule {rule!r}; choose from {', '.join(GATE_RULES)}, or pass a function")
            rule = GATE_RULES[rule]
        return gate_evidence(self.table(sensitivity), rule, self.places, self.noise.keep)

    @torch.no_grad()
    def table(self, sensitivity: Tensor | None = None) -> GateTable:
        """What rules see."""
        n = self.noise
        layer = torch.zeros(n.mean.numel(), dtype=torch.long, device=n.mean.device)
        for i, places in enumerate(self.places.values()):
            layer[places] = i
        if sensitivity is None:
            read = {name for g in self.places for name, _ in self.groups[g].outgoing_cuts()}
            if all(self.model.get_parameter(name).grad is not None for name in read):
                sensitivity = self.log_gradients().square()
        squares = {k: p.detach().double().square() for k, p in self.model.named_parameters()}
        norms = self._by_unit({g: self.groups[g].incoming_cuts() for g in self.places}, squares).sqrt()
        for places in self.places.values():
            norms[places] /= norms[places].mean().clamp_min(1e-30)
        return GateTable(n.mean.double(), n.std.double(), n.low, n.high, layer, norms, sensitivity)

    @torch.no_grad()
    def log_gradients(self) -> Tensor:
        """dL/d ln theta at the weights' gradients of now: sum of w dL/dw over what reads each structure."""
        products = {k: p * p.grad for k, p in self.model.named_parameters() if p.grad is not None}
        return self._by_unit({g: self.groups[g].outgoing_cuts() for g in self.places}, products)

    def _by_unit(self, cuts: Mapping[str, list[tuple[str, Tensor]]], values: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros_like(self.noise.mean, dtype=torch.float64)
        for group, parts in cuts.items():
            for name, positions in parts:
                flat = values[name].reshape(-1).double()
                total[self.places[group]] += flat[positions.to(flat.device)].sum(1)
        return total

    def remove(self, keep: Mapping[str, Tensor] | GateEvidence) -> int:
        """Remove structures for good: theta is exactly zero from now on, and the gate leaves the KL.

        Args:
            keep: group id to booleans [units], True = stays (or evidence, whose ``keep`` is used).

        Returns:
            How many structures went.

        Raises:
            OckhamError: unknown group, a mask of another shape, or one that keeps nothing.
        """
        masks = keep.keep if isinstance(keep, GateEvidence) else keep
        stays = torch.ones_like(self.noise.keep)
        for group, mask in masks.items():
            if group not in self.places:
                raise OckhamError(f"no gates on {group!r}; there are some on {', '.join(self.places)}")
            stays[self.places[group]] = mask.to(stays.device)
        for group, places in self.places.items():
            if not bool((stays & self.noise.keep)[places].any()):
                raise OckhamError(f"keep[{group!r}] removes all that is left of the group; at least one must stay")
        return self.noise.remove(stays)

    @property
    def keep(self) -> dict[str, Tensor]:
        """Booleans [units] by group id, True = not removed."""
        return {k: self.noise.keep[places].cpu() for k, places in self.places.items()}

    @property
    def plan(self) -> Plan:
        """Surgery that takes the removed structures out of the *gated* network, gates included.

        ``ockham.shrink(gates.model, gates.plan, optimizer=optimizer)`` is a smaller gated network, and
        `Gates.of` finds its gates. For the network after `fold`, use ``ockham.plan(gates.groups, gates.keep)``.
        """
        base = plan(self.groups, self.keep)
        own = {f"{NAME}.{k}": tuple(v.shape) for k, v in self.noise.state_dict().items()}
        shapes = {**base.shapes, **own}
        gone = tuple((~self.noise.keep).nonzero().flatten().tolist())
        cuts = {**base.cuts, **({f"{NAME}.{k}": {0: gone} for k in ("mean", "log_std", "keep", "key")} if gone else {})}
        for i, (module, weight, dim, _) in enumerate(self.noise.readers):
            cut = base.cuts.get(canonical(self.model, f"{module}.{weight}"), {}).get(dim)
            if cut:
                cuts[f"{NAME}.reader_{i}"] = {0: cut}
        return replace(base, shapes=shapes, cuts=cuts)

    def fold(self) -> nn.Module:
        """Multiply E[theta] into the weights, in place, and leave a plain network without gates.

        The columns of removed structures become zero. The outputs are those of the gated network in evaluation mode.

        Returns:
            The model, for chaining.
        """
        self.noise.fold_(self.model)
        return self.model

    @staticmethod
    def of(model: nn.Module, example_inputs: Any, *, ignore: Ignore = ()) -> Gates:
        """Find the gates that a network has: after `ockham.shrink`, `copy.deepcopy`, or loading a state.

        Raises:
            OckhamError: it has none.
        """
        noise = getattr(model, NAME, None)
        if not isinstance(noise, GateNoise):
            raise OckhamError(f"{type(model).__name__} has no gates; attach_gates(model, example_inputs) puts them on")
        groups = traced_again(plain(model), example_inputs, ignore)
        places = {}
        for group in groups:
            keys = keys_of(model, noise, group)
            if keys is not None:
                places[group.id] = noise.indices(keys)
        skipped = {g.id: "has no gates" for g in groups if g.id not in places}
        return Gates(model, noise, groups, places, skipped, example_inputs, ignore)

    def __str__(self) -> str:
        lines = [f"{k}: {len(p)} gates, {int(self.noise.keep[p].sum())} alive" for k, p in self.places.items()]
        return "\n".join([*lines, *(f"{k}: no gates ({why})" for k, why in self.skipped.items())])


def attach_gates(
    model: nn.Module,
    example_inputs: Any,
    *,
    layers: Iterable[str] | None = None,
    ignore: Ignore = (),
    noise: GateDraw = per_example,
    generator: torch.Generator | None = None,
) -> Gates:
    r"""Put one multiplicative gate on every structure that tracing finds; coupled structures share one.

        loss = criterion(model(x), y) + gates.kl() / n_data

    The gates become a submodule ``ockham_gates`` of the model, so that ``model.parameters()``, ``state_dict()``,
    ``copy.deepcopy``, ``.to()`` and ``.train()`` include them: make the optimizer afterwards. To resume, attach again
    and load the state.

    Args:
        model: network, changed: hooks and a submodule are added. Any network that `ockham.trace` can read.
        example_inputs: inputs as for `ockham.trace`; the network runs once on them, in evaluation mode.
        layers: places of the gates: only groups with a member in one of these modules or parameters
            (names, or "re:" patterns).
        ignore: names of what stays whole, as for `ockham.trace`.
        noise: `ockham.methods.gates.noise.per_example` (one draw per example and structure), or ``per_element``, the
            paper's released code.
        generator: source of the noise; None is torch's global one, as for dropout.

    Returns:
        The gates.

    Raises:
        OckhamError: the model has gates already, a layer has no structure that can go, or nothing can.
        TraceError: the model cannot be traced.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> gates = attach_gates(net, torch.zeros(1, 4))
    >>> print(gates)
    0.weight:0: 8 gates, 8 alive
    >>> evidence = gates.evidence("n")
    >>> gates.remove(evidence), type(gates.fold()).__name__
    (0, 'Sequential')
    """
    if hasattr(model, NAME):
        raise OckhamError("this model has gates already; Gates.of(model, example_inputs) finds them")
    groups = traced_again(model, example_inputs, ignore)
    wanted = chosen(groups, layers)
    wiring = wire(model, groups, wanted, example_inputs)
    if not wiring.count:
        reasons = "; ".join(f"{k}: {why}" for k, why in wiring.skipped.items())
        raise OckhamError(f"no structure of {type(model).__name__} can have a gate. {groups}\n{reasons}")
    module = GateNoise(wiring.count, wiring.readers, noise=noise, generator=generator)
    first = next(model.parameters())
    module.to(device=first.device, dtype=first.dtype).train(model.training)
    module.attach(model, NAME)
    places = {k: p.to(first.device) for k, p in wiring.places.items()}
    return Gates(model, module, groups, places, wiring.skipped, example_inputs, ignore)
