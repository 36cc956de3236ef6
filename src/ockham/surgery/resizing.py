"""Forwards whose constants follow the plan: `x.view(-1, 800)` asks for 400 once half the channels are gone.

A module that needs it gets a subclass of its own class whose forward runs under a `TorchFunctionMode`. The mode
recognises an op by the sizes of its input and the numbers it is asked for, and replaces those; numbers it does not
know raise, so nothing is ever resized by guess.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from ockham.errors import OckhamError
from ockham.surgery.groups import Plan
from ockham.surgery.labels import COUNTS, Edit

__all__ = []

Sizes = tuple[Any, ...]


class SizeError(OckhamError):
    """A forward asks for a size the plan has no number for."""


class Resizing(TorchFunctionMode):
    """Replaces sizes in views, splits and slices by those of the shrunk network.

    Args:
        edits: the numbers.
        seen: a list which gets every edit that was needed.
    """

    def __init__(self, edits: Sequence[Edit], seen: list[Edit] | None = None) -> None:
        super().__init__()
        self.edits = tuple(edits)
        self.seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, with other numbers where an edit says so."""
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if handler is None or not args or not isinstance(args[0], Tensor):
            return func(*args, **kwargs)
        return handler(self, func, args, kwargs)

    def fitting(self, op: str, x: Tensor, dim: int = -1) -> list[Edit]:
        """Return the edits of `op` for an input of the shrunk sizes of `x`."""
        return [
            e
            for e in self.edits
            if e.op == op and e.rank == x.ndim and e.dim in (dim, -1) and all(x.shape[d] == n for d, _, n in e.sizes)
        ]

    def view(self, op: str, x: Tensor, asked: Sizes) -> Sizes:
        """Return the sizes for a view of `x`; sizes that cannot hold it are replaced if only one edit fits `x`."""
        found = self.fitting(op, x)
        known = self.known(found, asked)
        meant = list(dict.fromkeys(e.new for e in found if len(e.new) == len(asked)))
        if known or op != "view" or len(meant) != 1 or not _impossible(x, asked):
            return self.replace(found, asked)
        self.remember(next(e for e in found if e.new == meant[0]))
        return tuple(a if n is None or a == -1 else n for a, n in zip(asked, meant[0], strict=True))

    def known(self, found: list[Edit], asked: Sizes) -> list[tuple[Edit, Sizes]]:
        """Return the edits which are about `asked`, with the numbers they put instead."""
        pairs = [(edit, _replaced(edit, asked)) for edit in found]
        return [(edit, new) for edit, new in pairs if new is not None]

    def replace(self, found: list[Edit], asked: Sizes) -> Sizes:
        """Return the numbers to use instead of `asked`; raises when two edits disagree."""
        known = self.known(found, asked)
        if not known:
            return asked
        edit, new = known[0]
        if any(other != new for _, other in known):
            raise SizeError(f"{edit.module or 'the model'}: {edit.op} to {asked} could mean more than one size")
        if new != asked:
            self.remember(edit)
        return new

    def remember(self, edit: Edit) -> None:
        """Note that `edit` was needed."""
        if self.seen is not None:
            self.seen.append(edit)


def _impossible(x: Tensor, sizes: Sizes) -> bool:
    """Can `x` not be viewed with these sizes?"""
    wanted = math.prod(n for n in sizes if n != -1)
    if -1 in sizes:
        return wanted == 0 or bool(x.numel() % wanted != 0)
    return bool(x.numel() != wanted)


def _replaced(edit: Edit, asked: Sizes) -> Sizes | None:
    """Return `asked` with the numbers of `edit`, or None when `asked` is not what the edit is about."""
    if len(asked) != len(edit.old):
        return None
    out = list(asked)
    for i, (have, old, new) in enumerate(zip(asked, edit.old, edit.new, strict=True)):
        if old is None or new is None or have == -1:
            continue
        if have not in (old, new):
            return None
        out[i] = new
    return tuple(out)


def _sizes(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Sizes | None:
    found: Any = args if args else (kwargs.get(name),)
    if len(found) == 1 and isinstance(found[0], (tuple, list)):
        found = found[0]
    return tuple(found) if all(isinstance(n, (int, torch.SymInt)) for n in found) else None


def _view(mode: Resizing, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    op = "expand" if func is torch.Tensor.expand else "view"
    asked = _sizes(args[1:], kwargs, "shape" if func in (torch.reshape, torch.Tensor.reshape) else "size")
    if asked is None:
        return func(*args, **kwargs)
    return func(args[0], mode.view(op, args[0], asked))


def _unflatten(mode: Resizing, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dim, sizes = (*args[1:], *kwargs.values())
    if not isinstance(dim, int):
        return func(*args, **kwargs)
    return func(args[0], dim, mode.replace(mode.fitting("unflatten", args[0], dim % args[0].ndim), tuple(sizes)))


def _split(mode: Resizing, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    named = [
        kwargs[k]
        for k in ("split_size_or_sections", "split_size", "split_sizes", "chunks", "indices_or_sections")
        if k in kwargs
    ]
    how = args[1] if len(args) > 1 else named[0]
    dim = int(args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x.ndim
    for edit in mode.fitting("split", x, dim):
        if _asks(func, how, edit):
            sizes = [n or 0 for n in edit.new]
            if mode.seen is not None and [p.shape[dim] for p in _quietly(func, args, kwargs)] != sizes:
                mode.seen.append(edit)
            return torch.split(x, sizes, dim)
    return func(*args, **kwargs)


def _quietly(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Tensor]:
    try:
        return list(func(*args, **kwargs))
    except RuntimeError:
        return []


def _asks(func: Any, how: Any, edit: Edit) -> bool:
    """Is `edit` about a split into `how`: sizes of the parts, one size for all, or a number of parts?"""
    if isinstance(how, (list, tuple)):
        return list(how) == list(edit.old) or list(how) == list(edit.new)
    by_count = func in (torch.chunk, torch.Tensor.chunk, torch.tensor_split, torch.Tensor.tensor_split)
    wanted = len(edit.old) if by_count else edit.old[0]
    matches: bool = how == wanted
    return matches


def _narrow(mode: Resizing, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, dim, start, length = (
        args[0],
        *(kwargs.get(k, a) for k, a in zip(("dim", "start", "length"), (*args[1:], None, None, None), strict=False)),
    )
    if not all(isinstance(n, int) for n in (dim, start, length)):
        return func(*args, **kwargs)
    start, stop = mode.replace(mode.fitting("slice", x, dim % x.ndim), (start, start + length))
    return torch.narrow(x, dim, start, stop - start)


def _pad(mode: Resizing, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, pads = args[0], list(args[1] if len(args) > 1 else kwargs["pad"])
    for i in range(0, len(pads), 2):
        dim = x.ndim - 1 - i // 2
        pads[i : i + 2] = mode.replace(mode.fitting("pad", x, dim), tuple(pads[i : i + 2]))
    return func(x, pads, *args[2:], **{k: v for k, v in kwargs.items() if k != "pad"})


def _getitem(mode: Resizing, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, index = args
    items = list(index) if isinstance(index, tuple) else [index]
    used = sum(1 for i in items if i is not None and i is not Ellipsis)
    dim, out = 0, []
    for item in items:
        plain = isinstance(item, slice) and item.step in (None, 1)
        out.append(_sliced(mode, x, dim, item) if plain else item)
        dim += x.ndim - used if item is Ellipsis else (0 if item is None else 1)
    return func(x, tuple(out) if isinstance(index, tuple) else out[0])


def _sliced(mode: Resizing, x: Tensor, dim: int, item: slice) -> slice:
    """Return `item` with other bounds; an open or negative bound counts from the size before or after."""
    if item.start is None and item.stop is None:
        return item
    for edit in mode.fitting("slice", x, dim):
        old_size, new_size = next(((o, n) for d, o, n in edit.sizes if d == dim), (x.shape[dim], x.shape[dim]))
        for size, bounds in ((old_size, edit.old), (new_size, edit.new)):
            if item.indices(size)[:2] == bounds:
                start, stop = (int(n or 0) for n in edit.new)
                if mode.seen is not None and item.indices(new_size)[:2] != edit.new:
                    mode.seen.append(edit)
                return slice(start, stop)
    return item


Handler = Callable[[Resizing, Any, tuple[Any, ...], dict[str, Any]], Any]
HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys((torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.Tensor.expand), _view),
    **dict.fromkeys((torch.Tensor.unflatten, torch.unflatten), _unflatten),
    **dict.fromkeys((torch.split, torch.Tensor.split, torch.Tensor.split_with_sizes, torch.split_with_sizes), _split),
    **dict.fromkeys((torch.chunk, torch.Tensor.chunk, torch.tensor_split, torch.Tensor.tensor_split), _split),
    **dict.fromkeys((torch.narrow, torch.Tensor.narrow), _narrow),
    torch.nn.functional.pad: _pad,
    torch.Tensor.__getitem__: _getitem,
}


def attach(module: nn.Module, edits: Sequence[Edit], seen: list[Edit] | None = None) -> None:
    """Let the forward of `module` run under `Resizing`: its class becomes a subclass with the same name.

    A module which was resized before keeps one layer of resizing: the numbers of both are composed.
    """
    base, earlier = module.__dict__.get("_resized", (type(module), ()))
    every = (*edits, *compose(earlier, edits))
    mode = Resizing(every, seen)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with mode:
            return base.forward(self, *args, **kwargs)

    module.__class__ = type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})
    module.__dict__["_resized"] = (base, every)


def compose(earlier: Sequence[Edit], later: Sequence[Edit]) -> list[Edit]:
    """Return the edits from the sizes in the code to those after both; edits that nothing follows stay as they are."""
    out: list[Edit] = []
    for first in earlier:
        followed = [_follow(first, second) for second in later]
        out.extend([edit for edit in followed if edit is not None] or [first])
    return list(dict.fromkeys(out))


def _follow(first: Edit, second: Edit) -> Edit | None:
    """Return `first` and then `second` as one edit, or None when they are about different ops."""
    if (first.op, first.rank, first.dim, len(first.old)) != (second.op, second.rank, second.dim, len(second.old)):
        return None
    sizes = {d: (old, new) for d, old, new in first.sizes}
    for d, old, new in second.sizes:
        if d in sizes and sizes[d][1] != old:
            return None
        sizes[d] = (sizes[d][0] if d in sizes else old, new)
    if any(a is not None and b is not None and a != b for a, b in zip(first.new, second.old, strict=True)):
        return None
    start = tuple(b if a is None else a for a, b in zip(first.old, second.old, strict=True))
    end = tuple(a if b is None else b for a, b in zip(first.new, second.new, strict=True))
    joined = tuple((d, *pair) for d, pair in sorted(sizes.items()))
    return Edit(first.module, first.op, first.rank, joined, first.dim, start, end)


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
