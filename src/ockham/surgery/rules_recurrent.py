"""Rules of LSTM, GRU and RNN: one unit is one hidden index, in all gates, directions and layers.

`torch.nn.LSTM` holds a single ``hidden_size``, so index j goes in every layer and direction at once; the same for
``proj_size``. A removed unit is exactly zero in the masked layer: all gates see zero, so its state never leaves zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ockham.surgery.labels import Value, along
from ockham.surgery.rules_layers import axis, channels

if TYPE_CHECKING:
    from ockham.surgery.walk import Call

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1, "lstm_cell": 4, "gru_cell": 3, "rnn_tanh_cell": 1}


def recurrent(call: Call) -> list[Value]:
    """lstm.input, gru.input, rnn_tanh.input, rnn_relu.input; packed sequences are frozen."""
    if not isinstance(call.args[3], bool):
        call.freeze_all("a packed sequence")
        return [Value(s) for s in call.shapes()]
    lstm = call.name == "lstm"
    x, states = call.value(0), call.values(1) if call.name == "lstm" else [call.value(1)]
    both, biases = bool(call.args[7]), bool(call.args[3])
    weights = call.values(2)
    layers, directions = int(call.args[4]), 2 if both else 1
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
    return _outputs(call, below, (carried, hidden) if lstm else (carried,))


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


def _outputs(call: Call, top: Tensor, states: tuple[Tensor, ...]) -> list[Value]:
    shapes = call.shapes()
    assert isinstance(shapes, list)
    labels = (top, *states)
    return [
        Value(s, (along(k, len(s), -1),) if k.numel() > 1 else (), True) for s, k in zip(shapes, labels, strict=True)
    ]


def cell(call: Call) -> Value | list[Value]:
    """lstm_cell, gru_cell, rnn_tanh_cell: one step."""
    x, lstm = call.value(0), call.name == "lstm_cell"
    states = call.values(1) if lstm else [call.value(1)]
    hidden = call.ledger.atoms(states[0].shape[-1])
    weights = [call.value(i) for i in range(2, 6) if call.optional(i, "") is not None]
    _cell(call, weights, channels(x, len(x.shape) - 1, call), hidden=hidden, carried=hidden)
    for state in states:
        call.ledger.unify(channels(state, len(state.shape) - 1, call), hidden, call.reason("starts from a given state"))
    if lstm:
        return [Value(s, (along(hidden, len(s), -1),), True) for s in call.shapes()]
    return Value(call.shape(), (along(hidden, len(call.shape()), -1),), True)
