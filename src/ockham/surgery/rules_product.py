"""Rules of contractions: linear, matmul, einsum, attention. All of them are one rule on letters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ockham.surgery.labels import Ledger, Value, along, match, tidy, varying

if TYPE_CHECKING:
    from ockham.surgery.walk import Call, Result


def contract(left: Value, right: Value, equation: str, call: Call) -> Value:
    """Return the value of ``einsum(equation, left, right)``.

    A factor along a contracted letter is consumed when one side is exactly zero for removed units (weights are);
    otherwise, or when it spans further letters (the head of an attention), it is collapsed along that letter.
    """
    ins, out = equation.split("->")
    one, two = ins.split(",")
    letters = "".join(dict.fromkeys(one + two))
    a, b = _spread(left, one, letters), _spread(right, two, letters)
    for side, value in ((a, left), (b, right)):
        if value.learned:
            call.ledger.consumed.extend(_contracted(side, letters, out))
    factors, shape = match(a, b, call.ledger, reason=call.reason("multiplies it with a tensor of fixed size"))
    zero = left.zero or right.zero
    kept = [f for f in (_consume(f, letters, out, zero=zero, call=call) for f in factors) if f.numel() > 1]
    order = [letters.index(c) for c in out]
    gone = [i for i, c in enumerate(letters) if c not in out]
    moved = [f.permute(order + gone).reshape([f.shape[i] for i in order]) for f in kept]
    return tidy(tuple(shape[i] for i in order), moved, left.zero or right.zero, call.ledger, call.reason("product"))


def _spread(value: Value, names: str, letters: str) -> Value:
    """Return `value` with one dimension per letter (size 1 where it has none)."""
    order = [names.index(c) for c in letters if c in names]

    def place(shape: tuple[int, ...]) -> list[int]:
        return [shape[names.index(c)] if c in names else 1 for c in letters]

    factors = tuple(f.permute(order).reshape(place(tuple(f.shape))) for f in value.factors)
    return Value(tuple(place(value.shape)), factors, value.zero)


def _contracted(side: Value, letters: str, out: str) -> list[Tensor]:
    return [f.flatten() for f in side.factors if len(varying(f)) == 1 and letters[varying(f)[0]] not in out]


def _consume(factor: Tensor, letters: str, out: str, *, zero: bool, call: Call) -> Tensor:
    gone = [d for d in varying(factor) if letters[d] not in out]
    if gone and len(varying(factor)) == 1 and zero:
        return factor.narrow(gone[0], 0, 1)
    return call.ledger.collapse(factor, gone, call.reason("contracts this dimension with something never zero"))


def linear(call: Call) -> Value:
    """X W^T + b with W ``(out, in)``."""
    x, weight = call.value(0), call.value(1)
    lead = "abcdefghijkl"[: len(x.shape) - 1]
    out = contract(x, weight, f"{lead}z,yz->{lead}y", call) if len(weight.shape) == 2 else _vector(x, weight, call)
    return add_bias(out, call.optional(2, "bias"), -1, call)


def _vector(x: Value, weight: Value, call: Call) -> Value:
    lead = "abcdefghijkl"[: len(x.shape) - 1]
    return contract(x, weight, f"{lead}z,z->{lead}", call)


def add_bias(out: Value, bias: Value | None, dim: int, call: Call) -> Value:
    """Tie a bias of shape ``(channels,)`` to dimension `dim` of `out`."""
    if bias is None:
        return out
    placed = Value(
        tuple(bias.shape[0] if d == dim % len(out.shape) else 1 for d in range(len(out.shape))),
        tuple(along(f.flatten(), len(out.shape), dim) for f in bias.factors),
        bias.zero,
    )
    factors, shape = match(out, placed, call.ledger, reason=call.reason("adds a bias of fixed size"))
    return Value(shape, tuple(factors), out.zero and bias.zero and bool(placed.factors) == bool(out.factors))


def matmul(call: Call) -> Value:
    """matmul, mm, bmm, mv, dot with broadcasting of leading dimensions."""
    return product(call.value(0), call.value(1), call)


def product(x: Value, y: Value, call: Call) -> Value:
    """Return the value of ``torch.matmul(x, y)``."""
    lead = "abcdefghij"[: max(len(x.shape), len(y.shape), 2) - 2]
    one = lead[len(lead) - len(x.shape) + 2 :] + "mk" if len(x.shape) > 1 else "k"
    two = lead[len(lead) - len(y.shape) + 2 :] + "kn" if len(y.shape) > 1 else "k"
    out = lead + ("m" if "m" in one else "") + ("n" if "n" in two else "")
    return contract(x, y, f"{one},{two}->{out}", call)


def addmm(call: Call) -> Value:
    """Addmm and baddbmm: b + x W, the form of transformers' ``Conv1D``."""
    bias, x, y = (call.value(i) for i in range(3))
    out = product(x, y, call)
    if len(bias.shape) == 1:
        return add_bias(out, bias, -1, call)
    factors, shape = match(out, bias, call.ledger, reason=call.reason("adds a tensor of fixed size"))
    return Value(shape, tuple(factors), out.zero and bias.zero and bool(bias.factors) == bool(out.factors))


def einsum(call: Call) -> Result:
    """Einsum of one or two operands without repeated letters or an ellipsis; anything else is frozen."""
    equation = str(call.args[0]).replace(" ", "")
    operands = call.tensors()
    ins = equation.split("->")[0].split(",")
    if "->" not in equation or "." in equation or len(operands) != 2 or any(len(set(i)) < len(i) for i in ins):
        return call.freeze_all("an einsum whose meaning is not clear")
    return contract(operands[0], operands[1], equation, call)


def attention(call: Call) -> Value:
    """scaled_dot_product_attention on ``(..., heads, length, width)``: whole heads (groups of heads under GQA)."""
    q, k, v = (_heads(call.value(i), call) for i in range(3))
    if call.arg(8, "enable_gqa", False):
        k, v = (_repeat(x, q.shape[-3], call.ledger) for x in (k, v))
    reason = call.reason("attends with heads that do not match")
    flat = [Value((*x.shape[:-2], 1, 1), x.factors) for x in (q, k, v)]
    mask = call.optional(3, "attn_mask")
    joint = flat[0]
    for other in (*flat[1:], *((_heads(mask, call, whole=True),) if mask is not None else ())):
        shape = (*other.shape[:-2], 1, 1)
        factors, shape = match(joint, Value(shape, other.factors), call.ledger, reason=reason)
        joint = Value(shape, tuple(factors))
    return Value((*joint.shape[:-2], q.shape[-2], v.shape[-1]), joint.factors, v.zero)


def _heads(x: Value, call: Call, whole: bool = False) -> Value:
    """Collapse everything but batch and heads: widths within a head and positions stay whole."""
    rank = len(x.shape)
    reason = call.reason("attends: only whole heads can go")
    factors = [call.ledger.collapse(f, [rank - 2, rank - 1], reason) for f in x.factors]
    return Value(x.shape, tuple(f for f in factors if f.numel() > 1), x.zero and not whole)


def _repeat(x: Value, heads: int, ledger: Ledger) -> Value:
    """Repeat the heads of keys or values as grouped-query attention does."""
    dim, times = len(x.shape) - 3, heads // x.shape[-3]
    factors = tuple(f.repeat_interleave(times, dim) if f.shape[dim] > 1 else f for f in x.factors)
    return Value((*x.shape[:-3], heads, *x.shape[-2:]), factors, x.zero)
