"""Rotation of a residual stream: its coordinates become the directions that matter, so that the others can go.

RMSNorm(x Q) = RMSNorm(x) Q for an orthogonal Q once the gains are folded into what reads them (Ashkboos et al. 2024,
"SliceGPT", eq. 2 and section 3.2); LayerNorm is RMSNorm of a stream whose mean is zero, which the writers can see to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ockham.errors import OckhamError
from ockham.surgery.copies import Arguments, as_arguments, clone, difference, outputs, still, to_double
from ockham.surgery.groups import Group, Groups, Member

TOLERANCE = 1e-5


class RotationError(OckhamError):
    """A stream cannot be rotated; the text says what stands in the way."""


def rotate(model: nn.Module, groups: Groups, inputs: Any) -> Any:
    """Return a copy of `model` with the same outputs whose residual streams lie along their principal directions.

    A stream is a group whose units pass RMS or layer norms. The gains of the norms move into the weights that read them
    (layer norms become `torch.nn.RMSNorm`: their bias moves too, and the weights that write the stream lose their
    mean), and then every weight of the group is multiplied by Q, the eigenvectors of the second moment of the
    normalised stream, largest first: the last coordinates are those that matter least. Tied weights come apart where a
    gain is between them. Trace the copy to plan what goes; a posterior or optimizer of `model` does not describe it.

    Args:
        model: network with residual streams behind norms whose readers are `torch.nn.Linear`; left as it is.
        groups: result of `ockham.trace` for `model`.
        inputs: example inputs as for `trace`, a batch of data: they say along which directions the stream varies.

    Raises:
        RotationError: when no group is a stream, when something other than linear layers reads it, or when the outputs
            would change by more than 1e-5.
    """
    arguments = as_arguments(inputs)
    twin: nn.Module = clone(model, lambda _, t: t.detach().clone()).eval()
    streams = [group for group in groups if any(_is_norm(twin, m) for m in group.members)]
    if not streams:
        raise RotationError("no group of this network passes a norm, so there is no stream to rotate: print(groups)")
    for group in streams:
        _rotate_(twin, group, arguments)
    doubled = [clone(m, lambda _, t: t.detach().clone()).double().eval() for m in (model, twin)]
    with still(doubled[0]), still(doubled[1]):
        gap = difference(*(outputs(m, to_double(arguments)) for m in doubled))
    if gap > TOLERANCE:
        raise RotationError(
            f"rotating {', '.join(g.id for g in streams)} would change the outputs by {gap:.1e}: something else than "
            "linear layers behind norms reads the stream. Prune its coordinates as they are"
        )
    return twin.train(model.training)


def _rotate_(twin: nn.Module, group: Group, arguments: Arguments) -> None:
    """Fold the norms of one stream and multiply its weights by Q, in place."""
    parts = [m for m in group.members if not _is_norm(twin, m)]
    for member in parts:
        _check(twin, group, member)
    norms = dict.fromkeys(_owner(m) for m in group.members if _is_norm(twin, m))
    read = {id(twin.get_parameter(m.name)) for m in parts if m.consumes}
    linear = [n for n, m in twin.named_modules() if isinstance(m, nn.Linear) and id(m.weight) in read]
    given, made = _seen(twin, [*norms, *linear], arguments)
    layered = {isinstance(twin.get_submodule(n), nn.LayerNorm) for n in norms}
    if len(layered) > 1 or not set(norms) <= set(given):
        raise RotationError(f"{group.id}: its norms are of several kinds, or are not called with a tensor")
    centred = layered.pop()
    apart: list[Tensor] = []
    for name in norms:
        own = made[name].untyped_storage().data_ptr()
        readers = [n for n in linear if n in given and given[n].untyped_storage().data_ptr() == own]
        apart += _fold_(twin, name, readers)
    width = group.size
    moment = torch.zeros(width, width, dtype=torch.float64)  # of the normalised stream, over all norms
    for flat in (given[n].detach().double().flatten(0, -2) for n in norms):
        rows = flat - flat.mean(-1, keepdim=True) if centred else flat
        z = rows / (rows.square().mean(-1, keepdim=True).sqrt() + 1e-12)
        moment += (z.T @ z / len(z)).cpu()
    q = torch.linalg.eigh(moment / len(norms))[1].flip(1)
    done: set[tuple[int, int]] = set()
    for member in parts:
        tensor: Tensor = twin.get_parameter(member.name)
        if (id(tensor), member.dim) not in done:
            done.add((id(tensor), member.dim))
            rows = tensor.data.double().movedim(member.dim, -1)
            rows = rows - rows.mean(-1, keepdim=True) if centred and member.makes else rows
            tensor.data.copy_((rows @ q.to(rows.device)).movedim(-1, member.dim))
    for tensor in apart:
        tensor.data.copy_(tensor.data.double() @ q.to(tensor.device))


def _owner(member: Member) -> str:
    return member.name.rpartition(".")[0]


def _is_norm(model: nn.Module, member: Member) -> bool:
    module = model.get_submodule(_owner(member))
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or type(module).__name__.endswith("RMSNorm")


def _check(model: nn.Module, group: Group, member: Member) -> None:
    """Refuse what a rotation would not carry through."""
    module, shape = model.get_submodule(_owner(member)), group.shapes[member.name]
    if not member.learned or member.index.shape[1] != 1 or group.size != shape[member.dim]:
        raise RotationError(f"{group.id}: {member.name} holds only a part of the stream, several times, or in a buffer")
    if member.consumes and not isinstance(module, (nn.Linear, nn.Embedding)):
        raise RotationError(f"{group.id}: {member.name} of {type(module).__name__} reads the stream; only Linear may")
    if not member.consumes and len(shape) == 1 and "bias" not in member.name.rpartition(".")[2]:
        raise RotationError(f"{group.id}: {member.name} scales each coordinate of the stream for itself")


def _seen(model: nn.Module, names: list[str], arguments: Arguments) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what the modules `names` were given and returned in one forward."""
    given: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(_module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                given[name], made[name] = args[0], out

        return keep

    handles = [model.get_submodule(n).register_forward_hook(keeper(n)) for n in dict.fromkeys(names)]
    try:
        outputs(model, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return given, made


def _fold_(twin: nn.Module, path: str, readers: list[str]) -> list[Tensor]:
    """Move gain and bias of a norm into its readers; returns weights that were tied to others and now are not."""
    norm = twin.get_submodule(path)
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is None:
        raise RotationError(f"{path} has no gain of its own")
    gain = weight.detach().clone()
    if not isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):  # perhaps it multiplies by one plus its weight
        with torch.no_grad():
            gain = norm(100 * torch.ones_like(weight)[None])[0].detach().to(weight.dtype)
    apart: list[Tensor] = []
    held = [id(p) for m in twin.modules() for p in m._parameters.values() if p is not None]
    for name in readers:
        layer = twin.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if held.count(id(layer.weight)) > 1:
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.weight.requires_grad)
            apart.append(layer.weight)
            for owner in (twin, *twin.children()):
                config: Any = getattr(owner, "config", None)
                if getattr(config, "tie_word_embeddings", False):
                    config.tie_word_embeddings = False
        if bias is not None:
            more = (layer.weight.data.double() @ bias.data.double()).to(layer.weight.dtype)
            layer.bias = nn.Parameter(more if layer.bias is None else layer.bias.data + more)
        layer.weight.data.mul_(gain)
    if isinstance(norm, nn.LayerNorm):
        plain = nn.RMSNorm(norm.normalized_shape, eps=norm.eps, device=weight.device, dtype=weight.dtype)
        parent, _, leaf = path.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, plain.train(norm.training))
    else:
        weight.data.sub_(gain - 1)  # a gain of one, whether the norm multiplies by its weight or by one plus it
    return apart
