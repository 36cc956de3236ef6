"""Rules of convolutions, norms, embeddings and pooling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ockham.surgery.labels import Value, along, match
from ockham.surgery.ops.pointwise import add_bias

if TYPE_CHECKING:
    from ockham.surgery.walk import Call, Values


def channels(x: Value, dim: int, call: Call) -> Tensor:
    """Return the labels of `x` along `dim`, shape ``(size,)``; everything else they depend on is collapsed.

    Elements without labels are `FIXED`.
    """
    reason = call.reason("needs every position to have the same channels")
    out = torch.full((x.shape[dim],), -1)
    for factor in x.factors:
        rest = [d for d in range(factor.ndim) if d != dim]
        flat = call.ledger.collapse(factor, rest, reason)
        out = flat.flatten() if flat.numel() > 1 else out
    return out


def kernel(weight: Value, call: Call) -> None:
    """Freeze the spatial dimensions of a convolution's weight."""
    for factor in weight.factors:
        if any(factor.shape[d] > 1 for d in range(2, factor.ndim)):
            call.ledger.freeze(factor, call.reason("slides over this dimension"))


def axis(weight: Value, dim: int) -> Tensor:
    """Return the labels of dimension `dim` of a weight, shape ``(size,)``; `FIXED` where it has none."""
    factor = weight.factor_at(dim)
    return torch.full((weight.shape[dim],), -1) if factor is None else factor.flatten()


def convolution(call: Call) -> Value:
    """conv1d to conv3d, grouped and depthwise: x ``(n, in, ...)``, weight ``(out, in / groups, ...)``."""
    x, weight = call.need("input"), call.need("weight")
    groups = int(call.get("groups"))
    rows, columns = axis(weight, 0), axis(weight, 1)
    kernel(weight, call)
    dim = _channel_dim(x, weight)
    labels = channels(x, dim, call)
    reason = call.reason("convolves an input of fixed width")
    if weight.shape[0] == groups > 1 or (weight.shape[1] == 1 and groups > 1):  # a group makes one unit or reads one
        call.ledger.freeze(columns, call.reason("reads the channels of each group together"))
        tied, own = labels.reshape(groups, -1), rows.reshape(groups, -1)
        call.ledger.unify(tied, own[:, :1].expand_as(tied), reason)
        call.ledger.unify(own, own[:, :1].expand_as(own), reason)
        return _finish(call, rows, dim)
    call.ledger.consumed.append(columns)
    call.ledger.unify(labels.reshape(groups, -1), columns.reshape(1, -1), reason)
    grid = rows.reshape(groups, -1)
    call.ledger.unify(grid, grid[:1].expand_as(grid), reason)
    return _finish(call, rows, dim)


def transposed(call: Call) -> Value:
    """conv_transpose1d to 3d: weight ``(in, out / groups, ...)``."""
    x, weight = call.need("input"), call.need("weight")
    groups = int(call.get("groups"))
    rows, columns = axis(weight, 0), axis(weight, 1)
    kernel(weight, call)
    dim = _channel_dim(x, weight)
    labels = channels(x, dim, call)
    reason = call.reason("convolves an input of fixed width")
    call.ledger.unify(labels, rows, reason)
    if groups == 1:
        call.ledger.consumed.append(rows)
        return _finish(call, columns, dim)
    if weight.shape[0] == groups:
        call.ledger.freeze(columns, reason)
        return _finish(call, rows.repeat_interleave(weight.shape[1]), dim)
    call.ledger.consumed.append(rows)
    grid = rows.reshape(groups, -1)
    call.ledger.unify(grid, grid[:1].expand_as(grid), reason)
    return _finish(call, columns.repeat(groups), dim)


def _channel_dim(x: Value, weight: Value) -> int:
    return len(x.shape) - len(weight.shape) + 1


def _finish(call: Call, rows: Tensor, dim: int) -> Value:
    shape = call.shape()
    out = Value(shape, (along(rows, len(shape), dim),) if shape[dim] > 1 else (), True)
    return add_bias(out, call.tensor("bias"), dim, call)


def batch_norm(call: Call) -> Value:
    """Batch and instance norm: every channel of dimension 1 on its own, so removal is exact."""
    x = call.need("input")
    names = ("weight", "bias", "running_mean", "running_var")
    parts = [part for part in map(call.tensor, names) if part is not None]
    call.note(x, [])
    return _per_channel(call, x, channels(x, 1, call), parts, affine=call.tensor("bias") is not None)


def group_norm(call: Call) -> Values:
    """Group norm: zeros of removed channels keep their place in the statistics of the group, exactly.

    Channels which would not be zero share statistics with the rest: then only whole groups can go.
    """
    x = call.need("input", "x")
    labels = channels(x, 1, call)
    parts = [part for part in map(call.tensor, ("weight", "bias")) if part is not None]
    affine = call.tensor("bias") is not None
    if x.zero:
        out = _per_channel(call, x, labels, parts, affine=affine)
        call.note(Value(x.shape, (along(labels, len(x.shape), 1),)) if labels.numel() > 1 else Value(x.shape), out)
        return out
    groups = int(call.get("num_groups", 0))
    if call.tensor("weight") is None or not groups:
        return call.freeze_all("a group norm without affine: its groups are not written in any shape")
    grid = labels.reshape(groups, -1)
    call.ledger.unify(grid, grid[:, :1].expand_as(grid), call.reason("normalises a group with a fixed channel"))
    if groups == 1:
        call.ledger.freeze(labels, call.reason("normalises all channels together; removal changes the statistics"))
    return _per_channel(call, x, labels, parts, affine=affine)


def _per_channel(call: Call, x: Value, labels: Tensor, parts: list[Value], *, affine: bool) -> Value:
    for part in parts:
        call.ledger.unify(labels, axis(part, 0), call.reason("acts on an input of fixed width"))
    factors = (along(labels, len(x.shape), 1),) if labels.numel() > 1 and bool((labels >= 0).any()) else ()
    return Value(x.shape, factors, affine)


def prelu(call: Call) -> Value:
    """PReLU with one slope (shared) or one per channel."""
    x, slope = call.need("self"), call.need("weight")
    if len(slope.shape) == 0 or slope.shape[0] == 1:
        return Value(x.shape, x.factors, x.zero)
    return Value(x.shape, _per_channel(call, x, channels(x, 1, call), [slope], affine=False).factors, x.zero)


def layer_norm(call: Call) -> Value:
    """Layer and RMS norm: units that are exactly zero leave the sums as they are; the old count stays (`resizing.py`).

    Where removed units would not be zero, the normalised dimensions share statistics and stay whole.
    """
    x, sizes = call.need("input"), call.get("normalized_shape")
    parts = [part for part in map(call.tensor, ("weight", "bias")) if part is not None]
    dims = list(range(len(x.shape) - len(sizes), len(x.shape)))
    if not x.zero:
        reason = call.reason("normalises over this dimension; removal would change the statistics")
        factors = [call.ledger.collapse(f, dims, reason) for f in x.factors]
        for part in parts:
            call.ledger.freeze_value(part, reason)
        out = Value(x.shape, tuple(f for f in factors if f.numel() > 1), False)
        call.note(Value(x.shape), out)
        return out
    call.note(x, x)
    out = Value(x.shape, x.factors)
    for part in parts:
        placed = Value((1,) * dims[0] + part.shape, tuple(f.reshape((1,) * dims[0] + f.shape) for f in part.factors))
        joint, shape = match(out, placed, call.ledger, reason=call.reason("scales an input of fixed width"))
        out = Value(shape, tuple(joint))
    scaled = call.tensor("weight") is not None or call.name == "rms_norm"  # else a removed unit is minus the mean
    return Value(out.shape, out.factors, scaled and all(part.zero for part in parts))


def embedding(call: Call) -> Value | list[Value]:
    """Embedding and embedding_bag: the width of the table goes with the channels, its rows, indexed by the input, stay.

    A bag sums or averages rows of the table, or takes the largest: zero for a column of zeros all the same.
    """
    table, index = call.need("weight"), call.need("indices")
    rows, columns = axis(table, 0), axis(table, 1)
    call.ledger.freeze(rows, call.reason("is indexed by values of the input"))
    for other in (index, *(v for v in map(call.tensor, ("offsets", "per_sample_weights")) if v is not None)):
        call.ledger.freeze_value(other, call.reason("holds indices"))
    call.ledger.made.append(columns)

    def looked_up(shape: tuple[int, ...]) -> Value:
        wide = shape[-1:] == (columns.numel(),) and columns.numel() > 1
        return Value(shape, (along(columns, len(shape), -1),) if wide else (), table.zero)

    if call.name == "embedding":
        return looked_up(call.shape())
    out, *counts = call.shapes()
    return [looked_up(out), *map(Value, counts)]


def pooling(call: Call) -> Value | list[Value]:
    """Pooling, interpolation, sampling: spatial dimensions are collapsed, channels pass.

    A dimension whose windows hold one element each is left alone: it may be that of the channels.
    """
    x = call.first()
    rank = len(x.shape)
    dims = list(range(rank - next((int(c) for c in call.name if c in "123"), 2), rank))
    if call.get("kernel_size", None) is not None:
        usual = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
        windows = [(call.get(name, one) or one, one) for name, one in usual.items()]
        dims = [d for d in dims if any((w if isinstance(w, int) else w[(d - rank) % len(w)]) != n for w, n in windows)]
    reason = call.reason("pools over this dimension")
    factors = tuple(f for f in (call.ledger.collapse(f, dims, reason) for f in x.factors) if f.numel() > 1)
    for other in call.tensors()[1:]:
        call.ledger.freeze_value(other, call.reason("says where to sample"))
    return call.like_outputs(lambda shape: Value(shape, factors, x.zero))


def patches(call: Call) -> Value:
    """im2col: every channel becomes its k places in one dimension; col2im takes them back."""
    x = call.first()
    labels = channels(x, 1, call)
    out = call.shape()
    times = out[1] // x.shape[1]
    if times:
        return Value(
            out, (along(labels.repeat_interleave(times), len(out), 1),) if bool((labels >= 0).any()) else (), x.zero
        )
    grid = labels.reshape(out[1], -1)
    call.ledger.unify(grid, grid[:, :1].expand_as(grid), call.reason("lays the places of one channel together"))
    return Value(out, (along(grid[:, 0], len(out), 1),) if out[1] > 1 else (), x.zero)


def weight_norm(call: Call) -> Value:
    """W = g v / ||v||: rows go freely, columns share the norm and stay."""
    v, g = call.need("v"), call.need("g")
    dim = int(call.get("dim"))
    reason = call.reason("normalises the weight over this dimension (remove_parametrizations folds it)")
    for factor in v.factors:
        call.ledger.spared.append(factor.flatten())
        if factor.shape[dim] == 1:
            call.ledger.freeze(factor, reason)
    rows = Value(v.shape, tuple(f for f in v.factors if f.shape[dim] > 1), True)
    joint, _ = match(rows, g, call.ledger, reason=reason)
    columns = [f for f in v.factors if f.shape[dim] == 1]
    return Value(v.shape, (*joint, *columns), g.zero)


GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1, "lstm_cell": 4, "gru_cell": 3, "rnn_tanh_cell": 1}


def recurrent(call: Call) -> list[Value]:
    """lstm, gru, rnn_tanh, rnn_relu, over padded or packed sequences."""
    lstm = call.name == "lstm"
    x = call.need("input", "data")
    states = call.listed("hx") if lstm else [call.need("hx")]
    weights, layers, biases = call.listed("params"), int(call.get("num_layers")), bool(call.get("has_biases"))
    directions = 2 if call.get("bidirectional") else 1
    each = len(weights) // (layers * directions)
    projected = each == (5 if biases else 3)
    hidden = call.ledger.atoms(weights[0].shape[0] // GATES[call.name])
    carried = call.ledger.atoms(weights[1].shape[1]) if projected else hidden
    below = channels(x, len(x.shape) - 1, call)
    for layer in range(layers):
        for direction in range(directions):
            at = (layer * directions + direction) * each
            _cell(call, weights[at : at + each], below, hidden=hidden, carried=carried)
        below = carried.repeat(directions)
    for state, labels in zip(states, (carried, hidden) if lstm else (carried,), strict=True):
        call.ledger.unify(channels(state, len(state.shape) - 1, call), labels, call.reason("starts from a given state"))
    ends = (below, carried, hidden) if lstm else (below, carried)
    return [
        Value(s, (along(k, len(s), -1),) if k.numel() > 1 else (), True)
        for s, k in zip(call.shapes(), ends, strict=True)
    ]


def _cell(call: Call, weights: list[Value], below: Tensor, *, hidden: Tensor, carried: Tensor) -> None:
    """Tie the gates of one layer and direction: rows to `hidden`, columns to `below` and `carried`."""
    gates = GATES[call.name]
    reason = call.reason("reads an input of fixed width")
    for weight in weights[:2]:
        call.ledger.unify(axis(weight, 0), hidden.repeat(gates), reason)
    for weight, labels in zip(weights[:2], (below, carried), strict=True):
        columns = axis(weight, 1)
        call.ledger.consumed.append(columns)
        call.ledger.unify(columns, labels, reason)
    for extra in weights[2:]:
        if len(extra.shape) == 1:
            call.ledger.unify(axis(extra, 0), hidden.repeat(gates), reason)
        else:
            call.ledger.unify(axis(extra, 0), carried, reason)
            columns = axis(extra, 1)
            call.ledger.consumed.append(columns)
            call.ledger.unify(columns, hidden, reason)


def cell(call: Call) -> Value | list[Value]:
    """lstm_cell, gru_cell, rnn_tanh_cell: one step."""
    x, lstm = call.need("input"), call.name == "lstm_cell"
    states = call.listed("hx") if lstm else [call.need("hx")]
    hidden = call.ledger.atoms(states[0].shape[-1])
    weights = [w for w in map(call.tensor, ("w_ih", "w_hh", "b_ih", "b_hh")) if w is not None]
    _cell(call, weights, channels(x, len(x.shape) - 1, call), hidden=hidden, carried=hidden)
    for state in states:
        call.ledger.unify(channels(state, len(state.shape) - 1, call), hidden, call.reason("starts from a given state"))
    if lstm:
        return [Value(s, (along(hidden, len(s), -1),), True) for s in call.shapes()]
    return Value(call.shape(), (along(hidden, len(call.shape()), -1),), True)
