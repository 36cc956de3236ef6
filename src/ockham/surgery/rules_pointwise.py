"""Rules of element-wise ops: labels pass through, operands broadcast together are tied."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, fx

from ockham.surgery.labels import Value, match, tidy

if TYPE_CHECKING:
    from ockham.surgery.walk import Call, Result

KEEPS_ZERO = frozenset(
    [
        "abs",
        "alias",
        "alpha_dropout",
        "asin",
        "atan",
        "celu",
        "clamp_min",
        "clone",
        "contiguous",
        "detach",
        "detach_",
        "dropout",
        "elu",
        "erf",
        "expm1",
        "feature_alpha_dropout",
        "feature_dropout",
        "floor",
        "gelu",
        "hardshrink",
        "hardswish",
        "hardtanh",
        "leaky_relu",
        "lift_fresh",
        "lift_fresh_copy",
        "log1p",
        "mish",
        "native_dropout",
        "neg",
        "nan_to_num",
        "positive",
        "relu",
        "relu6",
        "round",
        "rrelu",
        "selu",
        "sgn",
        "sign",
        "silu",
        "sin",
        "softshrink",
        "softsign",
        "sqrt",
        "square",
        "tan",
        "tanh",
        "tanhshrink",
        "to",
        "_to_copy",
        "type_as",
        "trunc",
        "float",
        "half",
        "double",
        "_to_dtype",
    ]
)
"""Unary ops with f(0) = 0 (``clamp_min`` is checked)."""
LOSES_ZERO = frozenset(
    [
        "bitwise_not",
        "ceil",
        "cos",
        "cosh",
        "digamma",
        "exp",
        "exp2",
        "hardsigmoid",
        "isfinite",
        "isinf",
        "isnan",
        "log",
        "log10",
        "log2",
        "log_sigmoid",
        "logical_not",
        "logit",
        "reciprocal",
        "rsqrt",
        "sigmoid",
        "softplus",
        "threshold",
        "ones_like",
        "zeros_like",
        "full_like",
        "empty_like",
        "clamp",
        "clamp_max",
    ]
)
BINARY = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "pow",
        "remainder",
        "fmod",
        "maximum",
        "minimum",
        "atan2",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "logical_and",
        "logical_or",
        "logical_xor",
        "bitwise_and",
        "bitwise_or",
        "true_divide",
        "floor_divide",
        "rsub",
        "lerp",
        "xlogy",
        "where",
        "masked_fill",
        "addcmul",
        "addcdiv",
        "copysign",
        "__and__",
        "__or__",
    ]
)


DIVISIONS = frozenset(["div", "true_divide", "floor_divide", "remainder", "fmod", "addcdiv"])
UNDEFINED_AT_ZERO = frozenset(["digamma", "log", "log10", "log2", "logit", "reciprocal", "rsqrt"])


def unary(call: Call) -> Result:
    """Element-wise function of one tensor: labels stay as they are."""
    (x,) = call.tensors()[:1]
    if call.name in UNDEFINED_AT_ZERO and x.zero and x.factors:
        return call.freeze_all("a function without a value at zero, which a removed unit would be")
    return Value(x.shape, x.factors, x.zero and call.name in KEEPS_ZERO and not call.floor_above_zero())


def binary(call: Call) -> Result:
    """Element-wise function of several tensors: what lies on top of each other lives and dies together."""
    tensors = call.tensors()
    if call.name in DIVISIONS and _divisor_vanishes(call):
        return call.freeze_all("a division by something that is zero where a unit was removed")
    out = tensors[0]
    for other in tensors[1:]:
        factors, shape = match(out, other, call.ledger, reason=call.reason("meets a tensor of fixed size"))
        out = tidy(shape, factors, False, call.ledger, call.reason("two structures meet in one dimension"))
    return Value(out.shape, out.factors, _zero(call, tensors))


def _divisor_vanishes(call: Call) -> bool:
    below = call.optional(2 if call.name == "addcdiv" else 1, "other")
    return below is not None and below.zero and bool(below.factors)


def _zero(call: Call, tensors: list[Value]) -> bool:
    """Is the result zero wherever a unit is removed? Only if no operand without its labels adds something."""
    first = tensors[0]
    if call.name == "mul":
        return any(t.zero and covers(t, tensors) for t in tensors)
    if call.name == "div":
        return first.zero and covers(first, tensors) and isinstance(call.args[0], fx.Node)
    if call.name in ("add", "sub"):
        return len(tensors) == len(call.args) and all(t.zero and covers(t, tensors) for t in tensors)
    return False


def covers(one: Value, all_: list[Value]) -> bool:
    """Does `one` carry the labels of every factor any operand has (aligned from the right)?"""

    def dims(v: Value) -> set[int]:
        return {d - len(v.shape) for f in v.factors for d in range(len(v.shape)) if f.shape[d] > 1}

    return all(dims(v) <= dims(one) for v in all_)


def softmax(call: Call) -> Value:
    """Softmax, cumulative sums, sorting: the elements along `dim` depend on each other, so they stay together."""
    (x,) = call.tensors()[:1]
    dim = call.arg(1, "dim", -1)
    dims = [dim % len(x.shape)] if isinstance(dim, int) else [d % len(x.shape) for d in dim]
    reason = call.reason("mixes the elements of this dimension")
    factors = [call.ledger.collapse(f, dims, reason) for f in x.factors]
    return Value(x.shape, tuple(f for f in factors if f.numel() > 1), False)


def reduction(call: Call) -> Result:
    """Sum, mean, maximum over dimensions: those are collapsed, the others keep their labels."""
    (x,) = call.tensors()[:1]
    dim = call.arg(1, "dim", None)
    if isinstance(dim, fx.Node):
        return binary(call)
    rank = len(x.shape)
    every = list(range(rank))
    dims = every if dim is None or dim == [] else [d % rank for d in ([dim] if isinstance(dim, int) else dim)]
    reason = call.reason("reduces over this dimension; its size changes the result")
    factors = [f for f in (call.ledger.collapse(f, dims, reason) for f in x.factors) if f.numel() > 1]
    return call.like_outputs(lambda shape: _squeezed(factors, dims, shape, x.zero and call.name in ("sum", "mean")))


def _squeezed(factors: list[Tensor], dims: list[int], shape: tuple[int, ...], zero: bool) -> Value:
    rank = len(shape)
    if factors and factors[0].ndim != rank:
        factors = [f.squeeze(tuple(dims)) for f in factors]
    return Value(shape, tuple(factors), zero)


def gated(call: Call) -> Value:
    """GLU: a * sigmoid(b), the halves of one dimension, tied position by position."""
    (x,) = call.tensors()
    dim = int(call.arg(1, "dim", -1)) % len(x.shape)
    half = x.shape[dim] // 2
    reason = call.reason("gates it with a half of fixed size")
    sides = []
    for start in (0, half):
        cut = [f.narrow(dim, start, half) if f.shape[dim] > 1 else f for f in x.factors]
        sides.append(Value((*x.shape[:dim], half, *x.shape[dim + 1 :]), tuple(cut), x.zero))
    factors, shape = match(sides[0], sides[1], call.ledger, reason=reason)
    return tidy(shape, factors, x.zero, call.ledger, reason)
