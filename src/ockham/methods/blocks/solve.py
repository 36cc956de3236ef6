"""Matrices of a block, and their weights solved on a support."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ockham.errors import OckhamError

__all__ = [
    "BlockMatrix",
    "Damping",
    "NofM",
    "Quadratic",
    "Region",
    "Use",
    "Using",
    "damped",
    "loss_increase",
    "lowest_of",
    "quadratic",
    "sparse_matrix",
]


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a parameter, as a strided window on its memory.

    Attributes:
        name: parameter it lies in.
        size: shape of the window.
        stride: steps in memory.
        offset: first element, counted from the parameter's own first.
    """

    name: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The window on the parameter of this name: writing to it writes to the parameter."""
        p = parameters[self.name].detach()
        return p.as_strided(self.size, self.stride, p.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class BlockMatrix:
    """A weight matrix ``[groups, outputs, inputs]``, with its bias as one more input.

    Attributes:
        key: its name: that of the parameter, with an index where the parameter holds several.
        weight: where its numbers lie.
        transposed: True where they lie as ``[inputs, outputs]``.
        bias: where its bias lies, or None.
        groups: independent blocks of rows (grouped convolutions; 1 elsewhere).
    """

    key: str
    weight: Region
    transposed: bool
    bias: Region | None
    groups: int = 1

    def read(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """A float32 copy, ``[groups, outputs, inputs]`` (``inputs + 1`` with a bias, which comes last)."""
        w = self.weight.of(parameters)
        w = (w.mT if self.transposed else w).float()
        w = w.reshape(self.groups, w.shape[0] // self.groups, -1)
        if self.bias is None:
            return w.clone()
        return torch.cat([w, self.bias.of(parameters).float().reshape(self.groups, -1, 1)], -1)

    def write(self, parameters: Mapping[str, Tensor], value: Tensor) -> None:
        """Put a value of `read`'s shape back, in the parameters' own dtype."""
        region = self.weight.of(parameters)
        region = region.mT if self.transposed else region
        weight = value if self.bias is None else value[..., :-1]
        region.copy_(weight.reshape(region.shape))
        if self.bias is not None:
            bias = self.bias.of(parameters)
            bias.copy_(value[..., -1].reshape(bias.shape))

    def siblings(self, parameter: Tensor) -> list[BlockMatrix]:
        """The matrix with all others of the same kind in its parameter: every expert, where one slice was used."""
        w = self.weight
        if parameter.ndim != len(w.size) + 1 or w.size != tuple(parameter.shape[1:]) or self.bias is not None:
            return [self]
        step = parameter.stride(0)
        regions = [replace(w, offset=i * step) for i in range(len(parameter))]
        return [replace(self, key=f"{w.name}[{i}]", weight=r) for i, r in enumerate(regions)]

    @property
    def weights(self) -> int:
        """Number of weights, without the bias."""
        return torch.Size(self.weight.size).numel()

    @property
    def fan_in(self) -> int:
        """Inputs of the weight, without the bias."""
        size = torch.Size(self.weight.size)
        return size[0] if self.transposed else size[1:].numel()


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """One product with a weight matrix, as it happens.

    Attributes:
        matrix: which one.
        source: tensor that went in.
        rows: function to everything the weight is multiplied with, ``[groups, rows, inputs]``, the 1 of a bias last.
        gradients: function from the gradient of the result to ``[groups, rows, outputs]``.
        windows: what makes rows of the tensor besides it (kernel, stride, padding, dilation, groups of a convolution).
    """

    matrix: BlockMatrix
    source: Tensor
    rows: Callable[[], Tensor]
    gradients: Callable[[Tensor], Tensor]
    windows: tuple[Any, ...] = ()


Visitor = Callable[[Use, Tensor], None]
"""Called after each product with (use, result)."""


class Using(TorchFunctionMode):
    """Inside this block every product with a matrix of the network is shown to a visitor.

    Args:
        parameters: name to parameter, two-dimensional ones or more; biases among them too.
        visitor: function called with each use and its result. It may raise to end the forward pass.
        before: function called with the use before the product is made; it may raise as well.
        silent: keys of matrices whose products are zero in this pass, and not made.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        visitor: Visitor,
        before: Callable[[Use], None] | None = None,
        silent: Collection[str] = (),
    ) -> None:
        super().__init__()
        self._visitor, self._before, self._silent = visitor, before, silent
        placed = sorted((p.data_ptr(), name) for name, p in parameters.items() if p.numel())
        self._starts, self._names = [s for s, _ in placed], [n for _, n in placed]
        self._parameters = parameters
        self._inside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let the call happen, and show it where it is a product with a matrix."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self, _as_written():
                return func(*args, **kwargs)
        reader = _READERS.get(func)
        use = None if reader is None else reader(self, args, kwargs)
        if use is None:
            return func(*args, **kwargs)
        if self._before is not None:
            self._before(use)
        if use.matrix.key not in self._silent:
            result = func(*args, **kwargs)
        elif func in _CONVOLUTIONS:
            result = func(*args, **kwargs).zero_()
        else:
            outputs = use.matrix.weights // use.matrix.fan_in
            result = use.source.new_zeros(*use.source.shape[:-1], outputs)
        self._visitor(use, result)
        return result

    def region(self, tensor: Any) -> Region | None:
        """The part of a parameter that a tensor is, or None."""
        if not isinstance(tensor, Tensor) or tensor.numel() == 0 or not self._starts:
            return None
        at = bisect_right(self._starts, tensor.data_ptr()) - 1
        if at < 0:
            return None
        p = self._parameters[self._names[at]]
        offset, rest = divmod(tensor.data_ptr() - p.data_ptr(), p.element_size())
        reach = 1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
        if rest or offset >= reach or tensor.dtype != p.dtype:
            return None
        return Region(self._names[at], tuple(tensor.shape), tensor.stride(), offset)

    def matrix(self, weight: Any, bias: Any, *, transposed: bool = False, groups: int = 1) -> BlockMatrix | None:
        """The matrix that a product's operand is, or None where it is no parameter."""
        region = self.region(weight)
        if region is None or len(region.size) < 2:
            return None
        place = self.region(bias)
        p = self._parameters[region.name]
        whole = p.numel() == weight.numel()
        index = "" if whole else f"[{region.offset // weight.numel()}]"
        return BlockMatrix(region.name + index, region, transposed, place, groups)


@contextmanager
def _as_written() -> Iterator[None]:
    """The body of `F.multi_head_attention_forward` runs here instead of being handed over once more."""
    held = vars(F)["has_torch_function"]
    vars(F)["has_torch_function"] = lambda *_: False
    try:
        yield
    finally:
        vars(F)["has_torch_function"] = held


def _given(args: Any, kwargs: Any, index: int, name: str, default: Any = None) -> Any:
    return args[index] if index < len(args) else kwargs.get(name, default)


def _dense(mode: Using, x: Tensor, weight: Any, bias: Any, *, transposed: bool) -> Use | None:
    flat = isinstance(weight, Tensor) and weight.ndim == 2
    if not flat or (matrix := mode.matrix(weight, bias, transposed=transposed)) is None:
        return None

    def rows() -> Tensor:
        flat = x.detach().reshape(1, -1, x.shape[-1])
        return flat if matrix.bias is None else F.pad(flat, (0, 1), value=1.0)

    return Use(matrix, x, rows, lambda g: g.reshape(1, -1, g.shape[-1]))


def _convolution(mode: Using, args: Any, kwargs: Any) -> Use | None:
    x, weight, bias = (_given(args, kwargs, i, n) for i, n in enumerate(("input", "weight", "bias")))
    groups = _given(args, kwargs, 6, "groups", 1)
    matrix = mode.matrix(weight, bias, groups=groups)
    if matrix is None:
        return None
    d = weight.ndim - 2
    settings = ((3, "stride"), (4, "padding"), (5, "dilation"))
    stride, padding, dilation = (_given(args, kwargs, i, n, i != 4) for i, n in settings)

    def rows() -> Tensor:
        columns = _windows(x.detach(), weight.shape[2:], _each(stride, d), _each(dilation, d), padding)
        columns = columns.unflatten(1, (groups, -1))  # [N, groups, channels, *positions, *kernel]
        order = [1, 0, *range(3, 3 + d), 2, *range(3 + d, 3 + 2 * d)]
        flat = columns.permute(order).flatten(2 + d).flatten(1, 1 + d)
        return flat if matrix.bias is None else F.pad(flat, (0, 1), value=1.0)

    def gradients(g: Tensor) -> Tensor:
        g = g if g.ndim == d + 2 else g.unsqueeze(0)
        per_group: Tensor = g.unflatten(1, (groups, -1)).flatten(3).permute(1, 0, 3, 2)
        return per_group.flatten(1, 2)

    look = (tuple(weight.shape[2:]), *(v if isinstance(v, str) else _each(v, d) for v in (stride, padding, dilation)))
    return Use(matrix, x, rows, gradients, (*look, groups))


def _each(value: Any, d: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (int(value),) * d


def _windows(x: Tensor, kernel: Any, stride: tuple[int, ...], dilation: tuple[int, ...], padding: Any) -> Tensor:
    """Sliding windows of every axis, ``[N, channels, *positions, *kernel]``."""
    d = len(kernel)
    x = x if x.ndim == d + 2 else x.unsqueeze(0)
    spans = [dilation[i] * (kernel[i] - 1) for i in range(d)]
    if isinstance(padding, str):
        ends = [(s // 2, s - s // 2) if padding == "same" else (0, 0) for s in spans]
    else:
        ends = [(p, p) for p in _each(padding, d)]
    x = F.pad(x, [p for pair in reversed(ends) for p in pair])
    for i in range(d):
        x = x.unfold(i + 2, spans[i] + 1, stride[i])[..., :: dilation[i]]
    return x


_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d)
_READERS: dict[Any, Callable[[Using, Any, Any], Use | None]] = {
    F.linear: lambda mode, args, kwargs: _dense(
        mode,
        *(_given(args, kwargs, i, n) for i, n in enumerate(("input", "weight", "bias"))),
        transposed=False,
    ),
    torch.addmm: lambda mode, args, kwargs: (
        None
        if kwargs.get("alpha", 1) != 1 or kwargs.get("beta", 1) != 1
        else _dense(mode, args[1], args[2], args[0], transposed=True)
    ),
    **dict.fromkeys(
        [torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__],
        lambda mode, args, kwargs: _dense(
            mode, args[0], _given(args, kwargs, 1, "other", kwargs.get("mat2")), None, transposed=True
        ),
    ),
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
}


_TINY, _TOLERANCE = 1e-30, 1e-4
_STEPS, _LAST_STEPS = 3, 8
_WORTH_MORE = 1.1  # a support that its first steps bring so near the other's cost is followed to its end
_SWAPS, _SETTLED, _WEAKER = 300, 30, 3  # steps at most; from which one a support that stands ends them; weaker starts
_SAMPLED = 1 << 16  # values from which on a sample tells where the lowest end
_TOP = 16  # directions of the inputs that the preconditioner treats exactly


@dataclass(frozen=True, slots=True)
class Damping:
    """How far the factors of a matrix are trusted.

    Attributes:
        inputs: lambda, share of A's mean diagonal that is added to A's diagonal.
        outputs: tau in (0, 1], weight of the identity in G'; 1 ignores G.
    """

    inputs: float
    outputs: float


@dataclass(frozen=True, slots=True)
class NofM:
    """A pattern in which at most ``n`` of every ``m`` weights along the inputs stay.

    Attributes:
        n: weights that stay.
        m: weights in a run.
    """

    n: int
    m: int

    @staticmethod
    def parse(text: str) -> NofM:
        """Read "2:4".

        Raises:
            OckhamError: anything else.
        """
        parts = text.split(":")
        if len(parts) == 2 and all(p.strip().isdigit() for p in parts):
            n, m = (int(p) for p in parts)
            if 0 < n < m:
                return NofM(n, m)
        raise OckhamError(f"pattern must be 'n:m' with 0 < n < m, such as '2:4'; got {text!r}")


@dataclass(frozen=True, slots=True, eq=False)
class Quadratic:
    """The damped curvature of a matrix: D -> G' D A'.

    Attributes:
        inputs: A', ``[groups, inputs, inputs]``.
        outputs: G', ``[groups, outputs, outputs]``, or None for the identity.
    """

    inputs: Tensor
    outputs: Tensor | None

    def apply(self, x: Tensor) -> Tensor:
        """G' X A'."""
        x = x @ self.inputs
        return x if self.outputs is None else self.outputs @ x

    def conditional(self) -> Tensor:
        """What a weight costs per square once its row and column have moved, 1 / ([A'^-1]_jj [G'^-1]_rr)."""
        a = 1 / _inverse_diagonal(self.inputs).unsqueeze(-2)
        return a if self.outputs is None else a / _inverse_diagonal(self.outputs).unsqueeze(-1)


def damped(factor: Tensor, damping: float) -> Tensor:
    """F / mean diag F + damping I, ``[groups, n, n]``; a factor of zeros becomes damping I."""
    mean = factor.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(_TINY)
    new = factor / mean[:, None, None]
    new.diagonal(dim1=-2, dim2=-1).add_(damping)
    return new


def quadratic(inputs: Tensor, outputs: Tensor, damping: Damping) -> Quadratic:
    """The damped curvature of a matrix from its two factors, ``[groups, n, n]`` each."""
    if damping.outputs >= 1:
        return Quadratic(damped(inputs, damping.inputs), None)
    tau = damping.outputs
    return Quadratic(damped(inputs, damping.inputs), (1 - tau) * damped(outputs, tau / (1 - tau)))


def loss_increase(change: Tensor, inputs: Tensor, outputs: Tensor, scale: float) -> float:
    """1/2 tr G D A D' / scale: what a change of a matrix costs to second order, nats per term."""
    return 0.5 * float(((outputs @ change @ inputs) * change).sum(dtype=torch.float64)) / scale


def sparse_matrix(
    target: Tensor,
    curvature: Quadratic,
    worth: Tensor | None = None,
    *,
    keep: float | NofM,
    bias: bool = False,
    rounds: int | None = None,
    swaps: int = _SWAPS,
    steps: tuple[int, int] = (_STEPS, _LAST_STEPS),
) -> Tensor:
    """The matrix with zeros where weights went, and the others where they make good for it.

    Args:
        target: the trained matrix, ``[groups, outputs, inputs]``.
        curvature: curvature of `quadratic`.
        worth: its `Quadratic.conditional`, which rounds need; None makes it.
        keep: share of the weights that stays, over the whole matrix, or a pattern along the inputs.
        bias: True where the last column is a bias, which stays.
        rounds: None lets weights that went come back for others (`_swapped`); a number takes them greedily in so many
            rounds, the cheapest given all others first, which is faster and costs more of the loss.
        swaps: without rounds, steps of the search for a support at most.
        steps: conjugate gradient steps after a round and at the end.
    """
    free, top = target.shape[-1] - bias, _top(curvature.inputs)
    if rounds is None:
        largest, stays, start = _swapped(target, curvature, keep, free, swaps)

        def solved(support: Tensor, start: Tensor, count: int) -> tuple[Tensor, float]:
            x = _on_support(target, curvature, support, start, count, top=top)
            return x, float((curvature.apply(x - target) * (x - target)).sum())

        found, cost = solved(stays, start, steps[1])
        plain, other = solved(largest, target, steps[0])
        plain, other = solved(largest, plain, steps[1]) if other < _WORTH_MORE * cost else (plain, other)
        return plain if other < cost else found
    stays, moved = torch.ones_like(target, dtype=torch.bool), target
    worth = curvature.conditional() if worth is None else worth
    share = keep.n / keep.m if isinstance(keep, NofM) else keep
    for i in range(1, rounds + 1):
        value = (moved.square() * worth).masked_fill(~stays, -1.0)
        stays = _largest(value, keep, share ** (i / rounds), free)
        moved = _on_support(target, curvature, stays, moved, steps[i == rounds], top=top)
    return moved


def _largest(value: Tensor, keep: float | NofM, share: float, free: int) -> Tensor:
    """True for the largest share of a matrix (only so many of a run go as a pattern lets), and for its bias."""
    stays = torch.ones_like(value, dtype=torch.bool)
    flat = value[..., :free].reshape(-1)
    gone = round(flat.numel() * (1 - share))
    if isinstance(keep, NofM):
        runs = flat.view(-1, keep.m)
        may = torch.zeros_like(runs, dtype=torch.bool)
        may.scatter_(1, runs.topk(keep.m - keep.n, 1, largest=False).indices, True)
        flat = flat.masked_fill(~may.flatten(), torch.inf)
        gone = min(gone, int(may.sum()))
    stays[..., :free] = ~lowest_of(flat, gone).view(stays[..., :free].shape)
    return stays


def lowest_of(values: Tensor, count: int) -> Tensor:
    """True for so many of the lowest values ``[n]``: those below what a sample says, and the rest of those near it."""
    found = torch.zeros_like(values, dtype=torch.bool)
    if len(values) > _SAMPLED and 0 < count < len(values):
        sample = values[::61].sort().values  # an odd step sees every column
        at, margin = count / len(values) * len(sample), 3 * len(sample) ** 0.5
        low, high = (sample[max(0, min(len(sample) - 1, int(at + m)))] for m in (-margin, margin))
        below = values < low
        near = ((values >= low) & (values <= high)).nonzero().squeeze(1)
        sure = int(below.sum())
        if sure <= count <= sure + len(near):
            below[near[values[near].topk(count - sure, largest=False, sorted=False).indices]] = True
            return below
    found[values.topk(count, largest=False, sorted=False).indices] = True
    return found


def _swapped(
    target: Tensor, curvature: Quadratic, keep: float | NofM, free: int, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Supports: the largest weights', and from there by alternating directions, this one with a start for its weights.

        X = argmin 1/2 tr G' (X - T) A' (X - T)' + <V, X> + r/2 ||X - S||^2,    S = the largest of X + V / r,
        V = V + r (X - S)

    in units in which A' and G' have a diagonal of ones; X is exact, in the eigenvectors of both. r grows as long as the
    support moves (the steps of ALPS, Meng et al. 2024, arXiv 2406.07831, which knows A only), so the two meet.
    """
    share = keep.n / keep.m if isinstance(keep, NofM) else keep
    sides = [curvature.inputs] if curvature.outputs is None else [curvature.inputs, curvature.outputs]
    roots = [f.diagonal(dim1=-2, dim2=-1).sqrt() for f in sides]
    plain = [f / r.unsqueeze(-1) / r.unsqueeze(-2) for f, r in zip(sides, roots, strict=True)]
    (values, right), *rest = [torch.linalg.eigh(f) for f in plain]
    bend, scale, left = values.unsqueeze(-2), roots[0].unsqueeze(-2), None
    if rest:
        bend, scale, left = rest[0][0].unsqueeze(-1) * bend, roots[1].unsqueeze(-1) * scale, rest[0][1]

    def turned(x: Tensor, back: bool = False) -> Tensor:
        x = x @ (right.mT if back else right)
        return x if left is None else (left if back else left.mT) @ x

    dense = target * scale
    first = _largest(dense.square(), keep, share, free)
    goal, count, penalty, tries = bend * turned(dense), int(first[..., :free].sum()), 0.1, 0
    x, sparse, dual, before, grown = dense, dense * first, torch.zeros_like(dense), first, False
    for i in range(1, most + 1):
        x = turned((goal + turned(penalty * sparse - dual)) / (bend + penalty), back=True)
        sum_ = x + dual / penalty
        stays = _largest(sum_.square(), keep, share, free)
        sparse = sum_ * stays
        dual = penalty * (sum_ - sparse)
        if i % 3:
            continue
        moved = int((stays != before).sum())
        factor = 1.3 if moved > 0.1 * count else 1.2 if moved > 0.005 * count else 1.1
        if factor > 1.1 or (grown and moved):
            grown, penalty, before = True, penalty * factor, stays
        elif grown or tries == _WEAKER:
            break
        else:  # so high a penalty from the start that little moves
            penalty, tries = penalty / 5, tries + 1
            x, sparse, dual = dense, dense * first, torch.zeros_like(dense)
        if i >= _SETTLED and moved < 3e-4 * count:
            break
    return first, _largest(x.square(), keep, share, free), x / scale


def _on_support(
    target: Tensor, curvature: Quadratic, stays: Tensor, start: Tensor, steps: int, *, top: tuple[Tensor, Tensor]
) -> Tensor:
    """Minimum over matrices that are zero outside the support of tr G' (X - T) A' (X - T)', by preconditioned CG."""
    keep = stays.to(target.dtype)
    precondition = _preconditioner(curvature, keep, *top)
    # rows that are independent have step lengths of their own
    alone = (-2, -1) if curvature.outputs is not None else (-1,)
    x = start * keep
    residual = keep * curvature.apply(target - x)
    z = precondition(residual)
    direction, product = z, (residual * z).sum(alone, keepdim=True)
    enough = product * _TOLERANCE**2
    for _ in range(steps):
        image = keep * curvature.apply(direction)
        bend = (direction * image).sum(alone, keepdim=True)
        length = torch.where(bend > 0, product / bend.clamp_min(_TINY), 0.0)
        x = x + length * direction
        residual = residual - length * image
        z = precondition(residual)
        before, product = product, (residual * z).sum(alone, keepdim=True)
        if bool((product <= enough).all()):
            break
        direction = z + product / before.clamp_min(_TINY) * direction
    return x * keep


def _preconditioner(curvature: Quadratic, keep: Tensor, vectors: Tensor, values: Tensor) -> Callable[[Tensor], Tensor]:
    r"""Inverse of diag(G') (x) (D + V L V') on each row's own support, by Woodbury's formula.

    Activations have a few directions hundreds of times the mean, which a diagonal does not see; with them taken care
    of a third of the steps reach the same minimum.

    Args:
        curvature: curvature of the matrix.
        keep: 1 where a weight stays, 0 elsewhere.
        vectors: V, ``[groups, inputs, k]``, of `_top`.
        values: L, ``[groups, k]``.
    """
    k = values.shape[-1]
    diagonal = curvature.inputs.diagonal(dim1=-2, dim2=-1)
    rest = diagonal - (vectors.square() * values.unsqueeze(-2)).sum(-1)
    rest = torch.maximum(rest, 1e-3 * diagonal.mean(-1, keepdim=True)).unsqueeze(-2)  # D, [groups, 1, inputs]
    pairs = (vectors.unsqueeze(-1) * vectors.unsqueeze(-2) / rest.mT.unsqueeze(-1)).flatten(-2)
    core = (keep @ pairs).unflatten(-1, (k, k)) + torch.diag_embed(1 / values).unsqueeze(-3)
    root = torch.linalg.cholesky(core)
    scale = keep / rest
    rows = 1.0 if curvature.outputs is None else curvature.outputs.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)

    def apply(r: Tensor) -> Tensor:
        z = r * scale
        inner = torch.cholesky_solve((z @ vectors).unsqueeze(-1), root).squeeze(-1)
        return (z - scale * (inner @ vectors.mT)) / rows

    return apply


def _top(factor: Tensor) -> tuple[Tensor, Tensor]:
    """About the largest eigenpairs of ``[groups, n, n]``, by subspace iteration; exact ones are not needed."""
    n = factor.shape[-1]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, min(n, _TOP + 8), generator=generator, dtype=torch.float64).to(factor)
    basis = torch.linalg.qr(factor @ start)[0]
    for _ in range(2):
        basis = torch.linalg.qr(factor @ basis)[0]
    values, vectors = torch.linalg.eigh(basis.mT @ factor @ basis)
    return basis @ vectors[..., -_TOP:], values[..., -_TOP:].clamp_min(_TINY)


def _inverse_diagonal(factor: Tensor) -> Tensor:
    """Diagonal of the inverse of a positive definite matrix, in float64 inside."""
    root, failed = torch.linalg.cholesky_ex(factor.double())
    if bool(failed.any()):
        raise OckhamError(
            "a damped curvature factor is not positive definite: activations or gradients of the calibration data are "
            "not finite or overflow float32"
        )
    return torch.cholesky_inverse(root).diagonal(dim1=-2, dim2=-1).to(factor.dtype)
