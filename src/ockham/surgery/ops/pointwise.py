"""Rules of element-wise ops: labels pass through, operands broadcast together are tied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from ockham.surgery.labels import Value, along, argument, match, op_name, reduced_axes, tidy, varying

if TYPE_CHECKING:
    from ockham.surgery.walk import Call, Values

__all__ = []

KEEPS_ZERO = frozenset(
    {
        "abs", "alias", "alpha_dropout", "asin", "asinh", "atan", "atanh", "celu", "clamp_min", "clone", "contiguous",
        "detach", "detach_", "dropout", "elu", "erf", "erfinv", "expm1", "feature_alpha_dropout", "feature_dropout",
        "fix", "floor", "frac", "gelu", "hardshrink", "hardswish", "hardtanh", "leaky_relu", "lift_fresh",
        "lift_fresh_copy", "log1p", "mish", "native_dropout", "neg", "nan_to_num", "positive", "relu", "relu6",
        "round", "rrelu", "selu", "sgn", "sign", "silu", "sin", "sinh", "softshrink", "sqrt", "square",
        "tan", "tanh", "to", "_to_copy", "type_as", "trunc", "float", "half", "double", "_to_dtype",
        "zero", "zeros_like", "ceil", "deg2rad", "rad2deg", "relu_", "cpu", "cuda",
    }
)  # fmt: skip
"""Unary ops with f(0) = 0 (``clamp_min`` is checked)."""
LOSES_ZERO = frozenset(
    {
        "bitwise_not", "cos", "cosh", "digamma", "erfc", "exp", "exp2", "hardsigmoid", "isfinite", "isinf", "isnan",
        "lgamma", "log", "log10", "log2", "log_sigmoid", "logical_not", "logit", "reciprocal", "rsqrt", "sigmoid",
        "softplus", "threshold", "ones_like", "full_like", "empty_like", "clamp", "clip", "clamp_max", "fill", "acos",
        "rand_like", "randn_like", "bernoulli", "normal_", "uniform_", "bernoulli_", "random_", "exponential_",
    }
)  # fmt: skip
BINARY = frozenset(
    {
        "add", "sub", "mul", "div", "pow", "remainder", "fmod", "maximum", "minimum", "atan2", "eq", "ne", "lt", "le",
        "gt", "ge", "logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor",
        "true_divide", "floor_divide", "divide", "multiply", "subtract", "rsub", "lerp", "xlogy", "where",
        "masked_fill", "addcmul", "addcdiv", "copysign", "__and__", "__or__", "copy", "hypot", "normal", "logaddexp",
        "fmax", "fmin",
    }
)  # fmt: skip


DIVISIONS = frozenset({"div", "true_divide", "floor_divide", "divide", "remainder", "fmod", "addcdiv"})
UNDEFINED_AT_ZERO = frozenset({"digamma", "lgamma", "log", "log10", "log2", "logit", "reciprocal", "rsqrt"})


def unary(call: Call) -> Values:
    """Element-wise function of one tensor: labels stay as they are."""
    x = call.first()
    if call.name in UNDEFINED_AT_ZERO and x.zero and x.factors:
        return call.freeze_all("a function without a value at zero, which a removed unit would be")
    return call.like_outputs(lambda shape: Value(shape, x.factors, x.zero and _keeps_zero(call)))


def _keeps_zero(call: Call) -> bool:
    """Is the function zero at zero? A clamp is, if its bounds allow it; so is filling with zeros."""
    name = call.name.rstrip("_")
    if name in ("clamp", "clip", "clamp_min", "clamp_max"):
        low, high = call.get("min", None), call.get("max", None)
        return all(b is None or isinstance(b, (int, float)) for b in (low, high)) and (low or 0) <= 0 <= (high or 0)
    if name in ("fill", "full_like"):
        return bool(call.get("value", call.get("fill_value", 1)) == 0)
    return name in KEEPS_ZERO or call.name in KEEPS_ZERO


def binary(call: Call) -> Values:
    """Element-wise function of several tensors: what lies on top of each other lives and dies together."""
    tensors = call.tensors()
    if call.name.rstrip("_") in DIVISIONS:
        below = call.tensor("tensor2") if call.name.startswith("addcdiv") else call.tensor("other")
        if below is not None and below.zero and below.factors:
            return call.freeze_all("a division by something that is zero where a unit was removed")
    out = tensors[0]
    for other in tensors[1:]:
        factors, shape = match(out, other, call.ledger, reason=call.reason("meets a tensor of fixed size"))
        out = tidy(shape, factors, False, call.ledger, call.reason("two structures meet in one dimension"))
    return Value(out.shape, out.factors, _zero(call, tensors, out))


def _zero(call: Call, tensors: list[Value], out: Value) -> bool:
    """Is the result zero wherever a unit is removed? Only if no operand without its labels adds something."""
    first, name = tensors[0], call.name.rstrip("_")
    if name in ("mul", "multiply"):
        return any(t.zero and covers(t, out) for t in tensors)
    if name in ("div", "divide", "true_divide"):
        return first.zero and covers(first, out) and isinstance(call.get("self"), fx.Node)
    if name == "pow":
        power = call.get("exponent", None)
        return first.zero and isinstance(power, (int, float)) and power > 0
    if name == "copy":
        return tensors[-1].zero and covers(tensors[-1], out)
    if name in ("add", "sub", "subtract"):
        given = [call.get("self"), call.get("other")]
        return all(isinstance(g, fx.Node) or g == 0 for g in given) and all(t.zero and covers(t, out) for t in tensors)
    return False


def covers(one: Value, out: Value) -> bool:
    """Does `one` carry the labels of every factor of a result (aligned from the right)?"""

    def dims(v: Value) -> set[int]:
        return {d - len(v.shape) for f in v.factors for d in range(len(v.shape)) if f.shape[d] > 1}

    return dims(out) <= dims(one)


def mixing(call: Call) -> Values:
    """Softmax, cumulative sums, sorting: the elements along `dim` depend on each other, so they stay together."""
    x = call.first()
    rank = len(x.shape)
    dim = call.get("dim", None)
    dims = list(range(rank)) if dim is None else [d % rank for d in ([dim] if isinstance(dim, int) else dim)]
    if call.name.startswith(("tril", "triu")):
        dims = [rank - 2, rank - 1]
    reason = call.reason("mixes the elements of this dimension")
    factors = [call.ledger.collapse(f, dims, reason) for f in x.factors]
    kept = tuple(f for f in factors if f.numel() > 1)
    return call.like_outputs(lambda shape: Value(shape, kept, False))


COUNTING = frozenset({"mean", "var", "std"})
"""Reductions that divide by the number of elements; `resizing.py` keeps the old number."""
ADDING = frozenset({"sum", "norm", "linalg_vector_norm", "frobenius_norm"}) | COUNTING
"""Reductions to which an element that is zero adds nothing."""


def reduction(call: Call) -> Values:
    """Sum, mean, maximum over dimensions: units that are exactly zero add nothing to a sum; others are collapsed."""
    x = call.first()
    if len(call.tensors()) > 1:
        return binary(call)
    dims = reduced_axes(call.node, len(x.shape))
    around = _centred(call, dims)
    x = around or x
    power = call.get("ord", call.get("p", 2))
    exact = x.zero and call.name in ADDING and (power is None or (isinstance(power, (int, float)) and power > 0))
    reason = call.reason("reduces over this dimension; its size changes the result")
    factors = []
    for factor in x.factors:
        if not (exact and set(varying(factor)) <= set(dims)):
            factors.append(call.ledger.collapse(factor, dims, reason))
    kept = [f for f in factors if f.numel() > 1]
    zero = x.zero and call.name in ADDING and call.name not in ("var", "std") and around is None
    if kept and kept[0].ndim != len(call.shape()):
        kept = [f.squeeze(tuple(dims)) for f in kept]
    result = call.like_outputs(lambda shape: Value(shape, tuple(kept), zero))
    if call.name in COUNTING:
        call.note(x if exact else Value(x.shape), result, "" if around is None else "centred_mean")
    return result


def _centred(call: Call, dims: list[int]) -> Value | None:
    """Return what is known of x where the op is a variance written out: the mean of (x - mean(x))^2 over `dims`.

    A removed unit is then no zero, but minus the mean; the sum over all that are gone is known (`resizing.py`).
    """
    squared: Any = call.get("self", None)
    if call.name != "mean" or not isinstance(squared, fx.Node):
        return None
    bare, args = op_name(squared.target), squared.args
    square = bare == "square" or (bare == "pow" and args[1] == 2) or (bare == "mul" and args[0] is args[1])
    apart: Any = args[0] if square else None
    if not isinstance(apart, fx.Node) or op_name(apart.target) != "sub" or len(apart.args) != 2 or apart.kwargs:
        return None
    x, mean = apart.args
    found = call.known.get(x) if isinstance(x, fx.Node) else None
    if not isinstance(mean, fx.Node) or op_name(mean.target) != "mean" or mean.args[0] is not x:
        return None
    if not isinstance(found, Value) or not found.zero or not argument(mean, "keepdim"):
        return None
    return found if reduced_axes(mean, len(found.shape)) == dims else None


def gated(call: Call) -> Value:
    """GLU: a * sigmoid(b), the halves of one dimension, tied position by position."""
    x = call.first()
    dim = int(call.get("dim")) % len(x.shape)
    half = x.shape[dim] // 2
    reason = call.reason("gates it with a half of fixed size")
    sides = []
    for start in (0, half):
        cut = [f.narrow(dim, start, half) if f.shape[dim] > 1 else f for f in x.factors]
        sides.append(Value((*x.shape[:dim], half, *x.shape[dim + 1 :]), tuple(cut), x.zero))
    factors, shape = match(sides[0], sides[1], call.ledger, reason=reason)
    return tidy(shape, factors, x.zero, call.ledger, reason)


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
        plain = [f for f in side.factors if value.learned and len(varying(f)) == 1]
        call.ledger.consumed.extend(f.flatten() for f in plain if letters[varying(f)[0]] not in out)
    factors, shape = match(a, b, call.ledger, reason=call.reason("multiplies it with a tensor of fixed size"))
    reason, kept = call.reason("contracts this dimension with something never zero"), []
    for factor in factors:
        summed = [d for d in varying(factor) if letters[d] not in out]
        if summed and len(varying(factor)) == 1 and (left.zero or right.zero):
            continue
        kept.append(call.ledger.collapse(factor, summed, reason))
    order = [letters.index(c) for c in out]
    gone = [i for i, c in enumerate(letters) if c not in out]
    moved = [f.permute(order + gone).reshape([f.shape[i] for i in order]) for f in kept if f.numel() > 1]
    return tidy(tuple(shape[i] for i in order), moved, left.zero or right.zero, call.ledger, call.reason("product"))


def _spread(value: Value, names: str, letters: str) -> Value:
    """Return `value` with one dimension per letter (size 1 where it has none)."""
    order = [names.index(c) for c in letters if c in names]

    def place(shape: tuple[int, ...]) -> list[int]:
        return [shape[names.index(c)] if c in names else 1 for c in letters]

    factors = tuple(f.permute(order).reshape(place(tuple(f.shape))) for f in value.factors)
    return Value(tuple(place(value.shape)), factors, value.zero)


def linear(call: Call) -> Value:
    """X W^T + b with W ``(out, in)``."""
    x, weight = call.need("input"), call.need("weight")
    lead = "abcdefghijkl"[: len(x.shape) - 1]
    rows = "y" if len(weight.shape) == 2 else ""
    out = contract(x, weight, f"{lead}z,{rows}z->{lead}{rows}", call)
    return add_bias(out, call.tensor("bias"), -1, call)


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
    x, y = call.tensors()
    return product(x, y, call)


def product(x: Value, y: Value, call: Call) -> Value:
    """Return the value of ``torch.matmul(x, y)``."""
    lead = "abcdefghij"[: max(len(x.shape), len(y.shape), 2) - 2]
    one = lead[len(lead) - len(x.shape) + 2 :] + "mk" if len(x.shape) > 1 else "k"
    two = lead[len(lead) - len(y.shape) + 2 :] + "kn" if len(y.shape) > 1 else "k"
    out = lead + ("m" if "m" in one else "") + ("n" if "n" in two else "")
    return contract(x, y, f"{one},{two}->{out}", call)


def addmm(call: Call) -> Value:
    """Addmm and baddbmm: b + x W, the form of transformers' ``Conv1D``."""
    bias, x, y = call.need("self"), call.need("mat1", "batch1"), call.need("mat2", "batch2")
    out = product(x, y, call)
    if len(bias.shape) == 1:
        return add_bias(out, bias, -1, call)
    factors, shape = match(out, bias, call.ledger, reason=call.reason("adds a tensor of fixed size"))
    return Value(shape, tuple(factors), out.zero and bias.zero and bool(bias.factors) == bool(out.factors))


def einsum(call: Call) -> Values:
    """Einsum of any number of operands, two by two; one with repeated letters or with one operand is frozen."""
    equation, operands = str(call.get("equation")).replace(" ", ""), call.tensors()
    terms = _written_out(equation, operands)
    ins, out = terms[:-1], terms[-1]
    if len(operands) < 2 or any(len(set(i)) < len(i) for i in ins):
        return call.freeze_all("an einsum whose meaning is not clear")
    value, letters = operands[0], ins[0]
    for index in range(1, len(operands)):
        later = set(out).union(*ins[index + 1 :])
        kept = (
            out if index == len(operands) - 1 else "".join(c for c in dict.fromkeys(letters + ins[index]) if c in later)
        )
        value, letters = contract(value, operands[index], f"{letters},{ins[index]}->{kept}", call), kept
    return value


def tensordot(call: Call) -> Value:
    """Tensordot: the dimensions of two tensors that it names are summed over, pair by pair."""
    x, y = call.need("self"), call.need("other")
    one, two = list("abcdefghijklm"[: len(x.shape)]), list("nopqrstuvwxyz"[: len(y.shape)])
    for left, right in zip(call.get("dims_self"), call.get("dims_other"), strict=True):
        two[right] = one[left]
    out = [c for c in (*one, *two) if (c in one) != (c in two)]
    return contract(x, y, f"{''.join(one)},{''.join(two)}->{''.join(out)}", call)


def _written_out(equation: str, operands: list[Value]) -> list[str]:
    """Return the letters of each operand and of the result, with letters for an ellipsis and an implied result."""
    given, arrow, out = equation.partition("->")
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    ins = given.split(",")
    spare = max((len(v.shape) - len(i) + 3 for i, v in zip(ins, operands, strict=True) if "." in i), default=0)
    more = "".join(free[:spare])
    full = [
        i.replace("...", more[spare - (len(v.shape) - len(i) + 3) :] if len(v.shape) - len(i) + 3 else "")
        for i, v in zip(ins, operands, strict=True)
    ]
    if not arrow:
        letters = given.replace(",", "").replace(".", "")
        out = "..." + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return [*full, out.replace("...", more)]


def similarity(call: Call) -> Value:
    """Cosine similarity, or (cdist) norms of all differences: a unit that is zero on both sides adds nothing."""
    given = call.tensors()
    sides, rank = given, max(len(v.shape) for v in given)
    dim = int(call.get("dim", 1)) % rank
    if call.name == "cdist":  # rows a of the one with rows b of the other, over their last dimension
        lead, dim = "defghijk"[: rank - 2], rank
        own = [lead[rank - len(v.shape) :] + f"{row}z" for v, row in zip(given, "ab", strict=True)]
        sides = [_spread(v, names, f"{lead}abz") for v, names in zip(given, own, strict=True)]
    reason = call.reason("compares it with a tensor of fixed size")
    factors, shape = match(sides[0], sides[1], call.ledger, reason=reason)
    exact = all(v.zero and ((1,) * len(shape) + v.shape)[dim - len(shape)] == shape[dim] for v in sides)
    reason, kept = call.reason("compares over this dimension; its size changes the result"), []
    for factor in factors:
        if not (exact and varying(factor) == (dim,)):
            kept.append(call.ledger.collapse(factor, [dim], reason))
    for value, side in zip(given, sides, strict=True):
        aligned = dim - len(shape) + len(side.shape)
        call.ledger.consumed.extend(f.flatten() for f in side.factors if value.learned and varying(f) == (aligned,))
    left = [f.squeeze(dim) for f in kept if f.numel() > 1]
    return tidy(tuple(n for d, n in enumerate(shape) if d != dim), left, False, call.ledger, reason)


def bilinear(call: Call) -> Value:
    """X W y + b for each output, W of shape ``(out, in1, in2)``."""
    x, y, weight = call.need("input1"), call.need("input2"), call.need("weight")
    lead = "abcdefgh"[: len(x.shape) - 1]
    half = contract(x, weight, f"{lead}i,oij->{lead}oj", call)
    return add_bias(contract(half, y, f"{lead}oj,{lead}j->{lead}o", call), call.tensor("bias"), -1, call)


def grouped_product(call: Call) -> Value:
    """Rows of x ``(tokens, k)`` times the matrix ``(k, n)`` of their expert: experts stay, widths go."""
    x, weight = call.tensors()[:2]
    reason = call.reason("gives every token to an expert by its number")
    inner = Value(weight.shape, tuple(f for f in weight.factors if f.shape[0] == 1), weight.zero, weight.learned)
    for factor in weight.factors:
        if factor.shape[0] > 1:
            call.ledger.freeze(factor, reason)
    inner = Value(inner.shape[1:], tuple(f[0] for f in inner.factors), inner.zero, inner.learned)
    out = contract(x, inner, "tk,kn->tn", call)
    call.note(x, out)
    return out


def attention(call: Call) -> Value:
    """scaled_dot_product_attention on ``(..., heads, length, width)``: whole heads (groups of heads under GQA)."""
    q, k, v = (_heads(call.need(n), call) for n in ("query", "key", "value"))
    if call.get("enable_gqa", False):

        def repeated(x: Value) -> Value:
            times, shape = q.shape[-3] // x.shape[-3], (*x.shape[:-3], q.shape[-3], *x.shape[-2:])
            factors = (f.repeat_interleave(times, -3) if f.shape[-3] > 1 else f for f in x.factors)
            return Value(shape, tuple(factors), x.zero)

        k, v = repeated(k), repeated(v)
    reason = call.reason("attends with heads that do not match")
    flat = [Value((*x.shape[:-2], 1, 1), x.factors) for x in (q, k, v)]
    mask = call.tensor("attn_mask")
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
