"""What survivors take over: constants folded into biases, weights refitted."""

from __future__ import annotations

import copy
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial, singledispatch
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

from ockham.core.network import keeping_modes
from ockham.surgery.copies import Valueless, as_arguments, clone, given_to, named_tensors, tensors_of
from ockham.surgery.groups import Group, Groups, Member, Plan, PlanError, plan_masks
from ockham.surgery.labels import COUNTS, Edit
from ockham.surgery.resizing import attach, leave_out

__all__ = ["Constant", "constants", "fold", "plan_unread"]


EXPERTS = frozenset({"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"})
"""Attributes and fields that hold a number of experts."""
_T = TypeVar("_T")
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
        groups: groups of the model.
        example_inputs: inputs as for `trace`; a few rows are enough, since candidates have no living input.
        candidates: group id to boolean ``(units,)``: units whose making weights are all zero.
    """
    readers = {key: _readers(model, groups[key]) for key, mask in candidates.items() if bool(mask.any())}
    wanted = {layer for found in readers.values() for layer, _ in found or ()}
    seen = given_to(model, wanted, as_arguments(model, example_inputs))
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
    padded = isinstance(module, _ConvNd) and (
        module.padding_mode != "zeros" or module.padding not in ("valid", (0,) * (module.weight.ndim - 2))
    )
    if padded and bool((rows != 0).any()):
        return None
    return Constant(key, unit, layer, index.to(rows.device), rows.mean(1))


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
    for name, mask in keep.items():
        if mask.dtype is not torch.bool or tuple(mask.shape) != groups.shapes.get(name):
            raise PlanError(
                f"keep[{name!r}] must be boolean (True = stays) of shape {groups.shapes.get(name, 'of no parameter')}; "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
    alive = {name: mask.cpu().clone() for name, mask in keep.items()}
    stays = {g.id: torch.ones(g.size, dtype=torch.bool) for g in groups if g.outgoing_cuts() and not g.router}
    changed = True
    while changed:
        changed = False
        for key, before in list(stays.items()):
            read = _read(groups[key], alive) & before
            if not bool(read.any()):
                read[int(before.nonzero()[0])] = True
            if not torch.equal(read, before):
                changed = True
                for name, positions in groups[key].incoming_cuts():  # what makes these units is of no use any more
                    if name in alive:
                        alive[name].view(-1)[positions[~read].reshape(-1)] = False
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


def refit(model: nn.Module, small: nn.Module, plan: Plan) -> None:
    """Make the attributes of `small` (sliced tensors in it) consistent; `model` is the network before.

    Weights under a parametrisation are only read in evaluation mode: spectral norm moves its buffers in training mode.
    """
    with keeping_modes(model), keeping_modes(small):
        for module in (*model.modules(), *small.modules()):
            module.training = False
        before, after = dict(model.named_modules()), dict(small.named_modules())
        for name, module in after.items():
            _recompute(module)
            adapt(module, before[name])
        count_experts(after, before, plan.routers)
        for path, names in plan.caches.items():
            for name in names:
                getattr(after[path], name).clear()
        edits: dict[str, list[Edit]] = defaultdict(list)
        for edit in plan.edits:
            edits[edit.module].append(edit)
        for path in dict.fromkeys([*plan.counts, *edits]):
            module, sizes = small.get_submodule(path), plan.counts.get(path, {})
            if isinstance(module, nn.MultiheadAttention):
                continue
            for name in COUNTS & vars(module).keys():  # numbers of heads, or the width of all of them
                held = getattr(module, name)
                setattr(module, name, sizes.get(held, held) if type(held) is int else held)
            if path in edits:
                attach(module, edits[path])
        leave_out(small, plan.dropped)


def without_values(
    model: nn.Module, arguments: Any, plan: Plan, call: Callable[[nn.Module, Any, Any], _T], *, bare: bool = False
) -> _T:
    """Return what `call` says of the shrunk network and its arguments, none of which have values.

    Args:
        model: network before; left as it is.
        arguments: arguments of a call.
        plan: what is removed.
        call: function of the shrunk network in evaluation mode, positional and keyword arguments.
        bare: flag, True: all is on the device `meta`, which is fast; False: fake tensors, which know devices, and some
            values.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    placed = partial(Tensor.to, device="meta") if bare else fake.from_tensor
    mode: Any = torch.device("meta") if bare else fake
    args, kwargs = pytree.tree_map_only(Tensor, placed, arguments)
    loud = logging.getLogger("torch._subclasses.fake_tensor")
    quiet, loud.disabled = loud.disabled, True

    def empty(name: str, tensor: Tensor) -> Tensor:
        with mode:
            new = torch.empty(plan.shape(name), dtype=tensor.dtype, device="meta" if bare else tensor.device)
        return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new

    try:
        small = clone(model, empty, others=placed)
        with mode, Valueless(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refit(model, small, plan)
            return call(small.eval(), args, kwargs)
    finally:
        loud.disabled = quiet


def shapes_without_values(model: nn.Module, arguments: Any, plan: Plan, *, bare: bool) -> list[tuple[int, ...]]:
    """Return the sizes of the outputs of the shrunk network (`without_values`)."""

    def sizes(small: nn.Module, args: Any, kwargs: Any) -> list[tuple[int, ...]]:
        return [tuple(t.shape) for t in tensors_of(small(*args, **kwargs))]

    return without_values(model, arguments, plan, sizes, bare=bare)


def count_experts(after: Mapping[str, nn.Module], before: Mapping[str, nn.Module], routers: Collection[str]) -> None:
    """Correct the number of experts which the blocks of routers and their children hold.

    Args:
        after: path to module of the small network.
        before: the same of the network before.
        routers: names of the routers' weights.
    """
    blocks = {router.rpartition(".")[0].rpartition(".")[0] for router in routers}
    for path in (p for p in after if p in blocks or p.rpartition(".")[0] in blocks):
        for name in EXPERTS & vars(after[path]).keys():
            held = getattr(before[path], name)
            pairs = zip(after[path].parameters(), before[path].parameters(), strict=True)
            now = {new.shape[0] for new, old in pairs if old.ndim == 3 or (old.ndim == 2 and old.shape[0] == held)}
            if len(now) == 1:
                setattr(after[path], name, now.pop())


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


@singledispatch
def adapt(module: nn.Module, before: nn.Module) -> None:
    """Correct the attributes of one module from its new shapes and the module before.

    Here those of the ``Conv1D`` of transformers, which keeps (in, out) as ``nx`` and ``nf``; other classes have theirs.
    """
    weight = getattr(module, "weight", None)
    if hasattr(module, "nf") and weight is not None and weight.ndim == 2:
        module.nf = weight.shape[1]
        if hasattr(module, "nx"):
            module.nx = weight.shape[0]


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


@adapt.register(nn.Embedding)
@adapt.register(nn.EmbeddingBag)
def _(module: nn.Embedding | nn.EmbeddingBag, before: nn.Module) -> None:
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
        if module.hidden_size <= module.proj_size and type(module) is nn.LSTM:
            module.__class__ = ReducedLSTM


@adapt.register
def _(module: nn.RNNCellBase, before: nn.RNNCellBase) -> None:
    module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]


@adapt.register
def _(module: nn.MultiheadAttention, before: nn.MultiheadAttention) -> None:
    reduce_attention(module, before)


class ReducedLSTM(nn.LSTM):
    """`nn.LSTM` with as many projected units as hidden ones, or more, which torch cannot run.

    It computes hidden units whose weights are zero in addition, which stay zero. Made by `shrink`, never built.
    """

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run over a (packed) sequence; arguments and results are those of `nn.LSTM.forward`."""
        more = self.proj_size + 1 - self.hidden_size
        self._update_flat_weights()
        weights = []
        for name in self._flat_weights_names:
            weight, row = getattr(self, name), (0, 0) if "weight" in name else ()
            wide = F.pad(weight, (0, more)) if "weight_hr" in name else None
            weights.append(F.pad(weight.unflatten(0, (4, -1)), (*row, 0, more)).flatten(0, 1) if wide is None else wide)
        twin = nn.LSTM.__new__(nn.LSTM)
        twin.__dict__ = {**vars(self), "hidden_size": self.hidden_size + more, "_flat_weights": weights}
        given = None if hx is None else (hx[0], F.pad(hx[1], (0, more)))
        out, (h, c) = nn.LSTM.forward(twin, input, given)
        return out, (h, c[..., : self.hidden_size])


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
        bias = None if key_padding_mask is None else _as_float(key_padding_mask, q)[:, None, None, :]
        if attn_mask is not None:
            mask = _as_float(attn_mask, q)
            mask = mask if mask.dim() == 2 else mask.reshape(q.shape[0], -1, *mask.shape[1:])
            bias = mask if bias is None else bias + mask
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


def check_model(plan: Plan, model: nn.Module) -> None:
    """Refuse a plan made for a model of other names or shapes.

    Raises:
        PlanError: with the first differences.
    """
    here = {name: tuple(t.shape) for name, t in named_tensors(model).items()}
    if here == dict(plan.shapes):
        return
    wrong = [
        f"{name}: plan {plan.shapes.get(name, 'has none')}, model {here.get(name, 'has none')}"
        for name in dict.fromkeys([*plan.shapes, *here])
        if plan.shapes.get(name) != here.get(name)
    ]
    raise PlanError(
        f"the plan is for another model ({len(wrong)} tensors differ): {'; '.join(wrong[:3])}. "
        "Build the model it was made for, or trace this one and plan again."
    )
