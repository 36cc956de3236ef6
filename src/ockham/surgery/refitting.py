"""Attributes that repeat a shape (`out_channels`, `num_heads`, ...), made true again after tensors were sliced.

`nn.MultiheadAttention` cannot have fewer heads than fill its embedding; `ReducedAttention` can.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ockham.core.modes import keeping_modes
from ockham.surgery.groups import Plan
from ockham.surgery.labels import COUNTS, Edit
from ockham.surgery.resizing import attach


def refit(model: nn.Module, small: nn.Module, plan: Plan) -> None:
    """Make the attributes of `small` (sliced tensors in it) consistent; `model` is the network before.

    Weights under a parametrisation are only read in evaluation mode: spectral norm moves its buffers in training mode.
    """
    with keeping_modes(model), keeping_modes(small):
        for module in (*model.modules(), *small.modules()):
            module.training = False
        _refit(model, small, plan)


def _refit(model: nn.Module, small: nn.Module, plan: Plan) -> None:
    before = dict(model.named_modules())
    for name, module in small.named_modules():
        _recompute(module)
        adapt(module, before[name])
    for path, sizes in plan.counts.items():
        _recount(small.get_submodule(path), sizes)
    for path, names in plan.caches.items():
        for name in names:
            getattr(small.get_submodule(path), name).clear()
    edits: dict[str, list[Edit]] = defaultdict(list)
    for edit in plan.edits:
        edits[edit.module].append(edit)
    after = dict(small.named_modules())
    for path, own in edits.items():
        if not isinstance(after[path], nn.MultiheadAttention):
            attach(after[path], own)


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
    if before.groups > 1 and (old.shape[1] == 1 or old.shape[0] == before.groups):  # whole groups went
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
        if before.num_groups * module.num_channels % before.num_channels == 0:
            module.num_groups = before.num_groups * module.num_channels // before.num_channels


@adapt.register
def _(module: nn.LayerNorm, before: nn.LayerNorm) -> None:
    if module.elementwise_affine:
        module.normalized_shape = tuple(module.weight.shape)


@adapt.register
def _(module: nn.RMSNorm, before: nn.RMSNorm) -> None:
    if module.elementwise_affine:
        module.normalized_shape = tuple(module.weight.shape)


@adapt.register
def _(module: nn.Embedding, before: nn.Module) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


@adapt.register
def _(module: nn.PReLU, before: nn.Module) -> None:
    module.num_parameters = module.weight.shape[0]


@adapt.register
def _(module: nn.RNNBase, before: nn.RNNBase) -> None:
    sizes: dict[str, tuple[int, ...]] = {
        n: getattr(module, n).shape for n in ("weight_ih_l0", "weight_hr_l0") if hasattr(module, n)
    }
    module.input_size = sizes["weight_ih_l0"][1]
    module.hidden_size = sizes["weight_ih_l0"][0] * before.hidden_size // getattr(before, "weight_ih_l0").shape[0]  # noqa: B009
    if before.proj_size:
        module.proj_size = sizes["weight_hr_l0"][0]


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


class ReducedAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose heads need not fill the embedding: ``num_heads * head_dim < embed_dim``.

    Same parameter names, same arguments, same results. It is made by `reduce_attention`, never built.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and results are those of `nn.MultiheadAttention.forward`."""
        single = query.dim() == 2
        if single:
            query, key, value = (t.unsqueeze(0 if self.batch_first else 1) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._project(query, key, value)
        bias = self._bias(key_padding_mask, attn_mask, q)
        if bias is not None and bias.shape[-1] < k.shape[2]:  # nothing forbids the learned or zero positions
            bias = F.pad(bias, (0, k.shape[2] - bias.shape[-1]))
        out, weights = self._attend(q, k, v, bias=bias, need_weights=need_weights)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        out = out if self.batch_first else out.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if single:
            return out.squeeze(0 if self.batch_first else 1), None if weights is None else weights.squeeze(0)
        return out, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed: Tensor | None = self.in_proj_weight
        apart = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        weights = apart if packed is None else list(packed.chunk(3))
        biases = [None] * 3 if self.in_proj_bias is None else list(self.in_proj_bias.chunk(3))
        parts = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
        q, k, v = (p.reshape(*p.shape[:-1], -1, self.head_dim).transpose(1, 2) for p in parts)
        if self.bias_k is not None:
            k, v = self._longer(k, self.bias_k), self._longer(v, self.bias_v)
        if self.add_zero_attn:
            k, v = self._longer(k, None), self._longer(v, None)
        return q, k, v

    def _longer(self, heads: Tensor, bias: Tensor | None) -> Tensor:
        """Append one more position to keys or values: the learned bias, or zeros."""
        if bias is None:
            return F.pad(heads, (0, 0, 0, 1))
        own = bias.reshape(1, 1, -1, self.head_dim).transpose(1, 2)
        return torch.cat([heads, own.expand(heads.shape[0], -1, -1, -1)], 2)

    def _bias(self, padding: Tensor | None, mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Add the two masks, as numbers broadcastable to ``(batch, heads, query, key)``."""
        found = []
        if padding is not None:
            found.append(_as_float(padding, q)[:, None, None, :])
        if mask is not None:
            mask = _as_float(mask, q)
            found.append(mask if mask.dim() == 2 else mask.reshape(q.shape[0], -1, *mask.shape[1:]))
        return sum(found[1:], found[0]) if found else None

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        drop = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop), None
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
        weights = F.dropout(weights, drop) if drop else weights
        return weights @ v, weights


def _as_float(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def reduce_attention(module: nn.MultiheadAttention, before: nn.MultiheadAttention) -> None:
    """Turn `module`, whose tensors were sliced, into a `ReducedAttention` of as many heads as are left."""
    shapes = [tuple(p.shape) for p in module.parameters()]
    if shapes == [tuple(p.shape) for p in before.parameters()]:
        return
    module.num_heads = module.out_proj.weight.shape[1] // before.head_dim
    module.embed_dim = module.out_proj.weight.shape[0]
    module.out_proj.out_features, module.out_proj.in_features = module.out_proj.weight.shape
    module.__class__ = ReducedAttention
    attributes: dict[str, Any] = {
        "_qkv_same_embed_dim": False
    }  # keeps callers off the fused path, which wants all heads
    module.__dict__.update(attributes)
