"""Attributes that repeat a shape (`out_channels`, `num_heads`, ...), made true again after tensors were sliced."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import singledispatch

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ockham.surgery.attention import reduce_attention
from ockham.surgery.planning import Plan
from ockham.surgery.resizing import attach
from ockham.surgery.sites import COUNTS, Edit


def refit(model: nn.Module, small: nn.Module, plan: Plan, *, seen: list[Edit] | None = None) -> None:
    """Make the attributes of `small` (sliced tensors in it) consistent; `model` is the network before."""
    before = dict(model.named_modules())
    for name, module in small.named_modules():
        _recompute(module)
        adapt(module, before[name])
    for path, sizes in plan.counts.items():
        _recount(small.get_submodule(path), sizes)
    edits: dict[str, list[Edit]] = defaultdict(list)
    for edit in plan.edits:
        edits[edit.module].append(edit)
    after = dict(small.named_modules())
    for path, own in edits.items():
        if not isinstance(after[path], nn.MultiheadAttention):
            attach(after[path], own, seen)


def _recompute(module: nn.Module) -> None:
    """Recompute tensors which hooks of `torch.nn.utils` keep as plain attributes: masked or normalised weights."""
    held = {**module._parameters, **module._buffers}
    for name in [n for n, value in vars(module).items() if isinstance(value, Tensor)]:
        original, keep = held.get(f"{name}_orig"), held.get(f"{name}_mask")
        scale, direction = held.get(f"{name}_g"), held.get(f"{name}_v")
        if original is not None and keep is not None:
            setattr(module, name, (original * keep).detach())
        elif scale is not None and direction is not None:
            setattr(module, name, direction.detach())


def _recount(module: nn.Module, sizes: Mapping[int, int]) -> None:
    """Correct attributes which count heads or hold the width of all of them."""
    if isinstance(module, nn.MultiheadAttention):
        return
    for name in COUNTS & set(vars(module)):
        held = getattr(module, name)
        if isinstance(held, int) and held in sizes:
            setattr(module, name, sizes[held])


@singledispatch
def adapt(module: nn.Module, before: nn.Module) -> None:
    """Correct the attributes of one module from its new shapes and the module before."""
    _by_name(module)


@adapt.register
def _(module: nn.Linear, before: nn.Module) -> None:
    module.out_features, module.in_features = module.weight.shape


@adapt.register
def _(module: _ConvNd, before: _ConvNd) -> None:
    weight, old = module.weight, before.weight
    if before.groups > 1 and old.shape[1] == 1 and before.in_channels == before.groups:
        module.groups = weight.shape[0] * before.groups // old.shape[0]
    module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups


@adapt.register
def _(module: _ConvTransposeNd, before: _ConvTransposeNd) -> None:
    if before.groups > 1 and before.in_channels == before.groups:
        module.groups = module.weight.shape[0]
    module.in_channels, module.out_channels = module.weight.shape[0], module.weight.shape[1] * module.groups


@adapt.register
def _(module: _NormBase, before: nn.Module) -> None:
    held = module.weight if module.weight is not None else module.running_mean
    if held is not None:
        module.num_features = held.shape[0]


@adapt.register
def _(module: nn.GroupNorm, before: nn.GroupNorm) -> None:
    if module.affine:
        module.num_channels = module.weight.shape[0]
        module.num_groups = before.num_groups * module.num_channels // before.num_channels


@adapt.register
def _(module: nn.Embedding, before: nn.Module) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


@adapt.register
def _(module: nn.PReLU, before: nn.Module) -> None:
    module.num_parameters = module.weight.shape[0]


@adapt.register
def _(module: nn.RNNBase, before: nn.RNNBase) -> None:
    old, new = before.get_parameter("weight_ih_l0"), module.get_parameter("weight_ih_l0")
    module.input_size = new.shape[1]
    module.hidden_size = new.shape[0] * before.hidden_size // old.shape[0]
    if before.proj_size:
        module.proj_size = module.get_parameter("weight_hr_l0").shape[0]


@adapt.register
def _(module: nn.RNNCellBase, before: nn.RNNCellBase) -> None:
    module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]


@adapt.register
def _(module: nn.MultiheadAttention, before: nn.MultiheadAttention) -> None:
    reduce_attention(module, before)


def _by_name(module: nn.Module) -> None:
    """Correct the ``Conv1D`` of transformers, which keeps (in, out) as ``nx`` and ``nf``."""
    weight = getattr(module, "weight", None)
    if hasattr(module, "nf") and weight is not None and weight.ndim == 2:
        module.nf = weight.shape[1]
        if hasattr(module, "nx"):
            module.nx = weight.shape[0]
