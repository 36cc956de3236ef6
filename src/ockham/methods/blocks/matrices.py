r"""Weight matrices as a forward pass uses them, with the rows that go in and the gradients that come back.

A matrix is found by what is done with a parameter, not by the class of the module that holds it: `Using` watches calls
of `linear`, `addmm`, `matmul` and the convolutions, and knows a weight by its place in memory. So `nn.Linear`, its
subclasses, the `Conv1D` of GPT-2, packed projections, slices of a batched expert tensor and a bare parameter in
somebody's own `F.linear` are all the same.

    curvature of vec(W)  ~  (sum_r a_r a_r') (x) (sum_r g_r g_r') / rows,     y_r = W a_r,   g_r = d NLL / d y_r

over all rows r: tokens, positions of a convolution, calls. A bias is one more input that is always 1.

Reference: Martens & Grosse 2015, arXiv 1503.05671; Grosse & Martens 2016, arXiv 1602.01407.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["BlockMatrix", "Region", "Use", "Using", "add_gram_", "symmetric"]

_STRIP = 384  # rows of a Gram matrix that are made at a time


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
    """

    matrix: BlockMatrix
    source: Tensor
    rows: Callable[[], Tensor]
    gradients: Callable[[Tensor], Tensor]


Visitor = Callable[[Use, Tensor], None]
"""Called after each product with (use, result)."""


class Using(TorchFunctionMode):
    """Inside this block every product with a matrix of the network is shown to a visitor.

    Args:
        parameters: name to parameter, two-dimensional ones or more; biases among them too.
        visitor: called with each use and its result. It may raise to end the forward pass.
        before: called with the use before the product is made; it may raise as well.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], visitor: Visitor, before: Callable[[Use], None] | None = None
    ) -> None:
        super().__init__()
        self._visitor, self._before = visitor, before
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
        result = func(*args, **kwargs)
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
        if rest or offset >= _reach(p) or tensor.dtype != p.dtype:
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


def _reach(p: Tensor) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))


def _given(args: Any, kwargs: Any, index: int, name: str, default: Any = None) -> Any:
    return args[index] if index < len(args) else kwargs.get(name, default)


def _dense(mode: Using, x: Tensor, weight: Any, bias: Any, *, transposed: bool) -> Use | None:
    matrix = (
        mode.matrix(weight, bias, transposed=transposed) if isinstance(weight, Tensor) and weight.ndim == 2 else None
    )
    if matrix is None:
        return None

    def rows() -> Tensor:
        flat = x.detach().reshape(1, -1, x.shape[-1])
        return flat if matrix.bias is None else F.pad(flat, (0, 1), value=1.0)

    return Use(matrix, x, rows, lambda g: g.reshape(1, -1, g.shape[-1]))


def _linear(mode: Using, args: Any, kwargs: Any) -> Use | None:
    x, weight = _given(args, kwargs, 0, "input"), _given(args, kwargs, 1, "weight")
    return _dense(mode, x, weight, _given(args, kwargs, 2, "bias"), transposed=False)


def _addmm(mode: Using, args: Any, kwargs: Any) -> Use | None:
    if kwargs.get("alpha", 1) != 1 or kwargs.get("beta", 1) != 1:
        return None
    return _dense(mode, args[1], args[2], args[0], transposed=True)


def _matmul(mode: Using, args: Any, kwargs: Any) -> Use | None:
    weight = _given(args, kwargs, 1, "other", kwargs.get("mat2"))
    return _dense(mode, args[0], weight, None, transposed=True)


def _convolution(mode: Using, args: Any, kwargs: Any) -> Use | None:
    x, weight, bias = (_given(args, kwargs, i, n) for i, n in enumerate(("input", "weight", "bias")))
    groups = _given(args, kwargs, 6, "groups", 1)
    matrix = mode.matrix(weight, bias, groups=groups)
    if matrix is None:
        return None
    d = weight.ndim - 2
    stride, padding, dilation = (
        _given(args, kwargs, i, n, i != 4) for i, n in ((3, "stride"), (4, "padding"), (5, "dilation"))
    )

    def rows() -> Tensor:
        columns = _windows(x.detach(), weight.shape[2:], _each(stride, d), _each(dilation, d), padding)
        flat = _rows(columns.unflatten(1, (groups, -1)), d)
        return flat if matrix.bias is None else F.pad(flat, (0, 1), value=1.0)

    def gradients(g: Tensor) -> Tensor:
        g = g if g.ndim == d + 2 else g.unsqueeze(0)
        per_group: Tensor = g.unflatten(1, (groups, -1)).flatten(3).permute(1, 0, 3, 2)
        return per_group.flatten(1, 2)

    return Use(matrix, x, rows, gradients)


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


def _rows(x: Tensor, d: int) -> Tensor:
    """``[N, groups, channels, *positions, *kernel]`` as ``[groups, rows, inputs]``."""
    order = [1, 0, *range(3, 3 + d), 2, *range(3 + d, 3 + 2 * d)]
    return x.permute(order).flatten(2 + d).flatten(1, 1 + d)


_READERS: dict[Any, Callable[[Using, Any, Any], Use | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys([torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__], _matmul),
    **dict.fromkeys([torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d], _convolution),
}


def add_gram_(sums: Tensor, rows: Tensor) -> None:
    """Add rows' rows to the lower triangle of ``sums``; `symmetric` completes it.

    Args:
        sums: ``[groups, n, n]``, changed.
        rows: ``[groups, rows, n]``.
    """
    x = rows.to(sums.dtype)
    for first in range(0, sums.shape[-1], _STRIP):
        last = first + _STRIP
        sums[:, first:last, :last] += x[..., first:last].mT @ x[..., :last]


def symmetric(sums: Tensor) -> Tensor:
    """The matrix whose lower triangle was summed."""
    lower = sums.tril()
    return lower + lower.tril(-1).mT
