"""Multi-head attention with fewer heads: `nn.MultiheadAttention` cannot have them, this subclass can."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
        q, k, v = (p.reshape(*p.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2) for p in parts)
        return q, k, v

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
