"""Forwards whose constants follow the plan: `x.view(-1, 800)` asks for 400 once half the channels are gone.

A module that needs it gets a subclass of its own class whose forward runs under a `TorchFunctionMode`. The mode
recognises an op by the sizes of its input and the numbers it is asked for, and replaces those; where two places of one
forward look alike, their order tells them apart, and where even that does not, it raises. Norms and means go on
counting the elements of the network before, of which the removed ones are zero.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ockham.errors import OckhamError
from ockham.surgery.labels import Edit

Sizes = tuple[Any, ...]
SizedEdits = list[tuple[int, Edit]]


_tracing = contextvars.ContextVar("tracing", default=False)
_inner: contextvars.ContextVar[Any] = contextvars.ContextVar("inner", default=None)


@contextlib.contextmanager
def plain_norms() -> Iterator[None]:
    """Inside, norms that count removed elements are ordinary norms: for tracing, which notes them once more."""
    token = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(token)


class SizeError(OckhamError):
    """A forward asks for a size the plan has no number for."""


class Resizing(TorchFunctionMode):
    """Replaces sizes in views, splits and slices by those of the shrunk network, for one call of a forward.

    Args:
        edits: the numbers, in the order in which the forward comes by them.
    """

    def __init__(self, edits: Sequence[Edit]) -> None:
        super().__init__()
        self.edits = tuple(edits)
        self.at = 0
        self.mean = torch.zeros(())  # the last one that counts removed elements

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, with other numbers where an edit says so."""
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        applies = handler is _factory or (bool(args) and isinstance(args[0], Tensor))
        if handler is None or not applies or _inner.get() is not self:  # what a module inside does is its own
            return func(*args, **kwargs)
        return handler(self, func, args, kwargs)

    def __enter__(self) -> Resizing:
        """Begin: the mode of a module outside pauses."""
        self.outer = _inner.set(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """End."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _inner.reset(self.outer)

    def fitting(self, op: str, x: Tensor, dim: int = -1) -> SizedEdits:
        """Return the edits of `op` (with their numbers) for an input of the shrunk sizes of `x`."""
        return [
            (i, e)
            for i, e in enumerate(self.edits)
            if e.op == op and e.rank == x.ndim and e.dim in (dim, -1) and all(x.shape[d] == n for d, _, n in e.sizes)
        ]

    def choose(self, found: list[tuple[int, Any]]) -> Any:
        """Return the answer of the edits `found`; where they differ, that of the next one in the order of the code.

        Raises:
            SizeError: when the order does not tell, either.
        """
        later = [(i, answer) for i, answer in found if i >= self.at]
        if any(answer != found[0][1] for _, answer in found):
            if not later or len({self.edits[i].call for i, _ in found}) > 1:
                edit = self.edits[found[0][0]]
                raise SizeError(
                    f"{edit.module or 'the model'}: {edit.op} could mean more than one size ({[a for _, a in found]}). "
                    "Remove as many units in each of the parts, or none: pass ignore= to trace"
                )
            found = later
        if later:
            self.at = later[0][0] + 1
        return found[0][1]

    def view(self, op: str, x: Tensor, asked: Sizes, dim: int = -1) -> Sizes:
        """Return the sizes to use instead of `asked`; numbers no edit knows give way to the one place that fits `x`.

        They do so where a part of them is known, or where they are nonsense for a tensor of as many elements.
        """
        plain = tuple(map(_plain, asked))
        found = self.fitting(op, x, dim)
        count = x.numel() if op == "view" else x.shape[dim] if op == "unflatten" else 0
        told = ((i, _replaced(e, plain)) for i, e in found)
        known = [(i, new) for i, new in told if new is not None and _fits(new, count)]
        if not known and op != "expand":
            lost = not count or not _fits(plain, count)
            for i, e in (pair for pair in found if len(pair[1].new) == len(asked)):
                sizes = tuple(a if n is None or a == -1 else n for a, n in zip(plain, e.new, strict=True))
                part = any(None is not o != n and a in (o, n) for o, n, a in zip(e.old, e.new, plain, strict=True))
                known += [(i, sizes)] if _fits(sizes, count) and (lost or part) else []
        if not known:
            return asked
        return tuple(a if p == n else n for a, p, n in zip(asked, plain, self.choose(known), strict=True))


Handler = Callable[[Resizing, Any, tuple[Any, ...], dict[str, Any]], Any]
HANDLERS: dict[Any, Handler] = {}
"""Function of torch to what calls it with other numbers."""


def _handles(*functions: Any) -> Callable[[Handler], Handler]:
    """Enter a handler in `HANDLERS`; functions this version of torch does not have are None."""

    def enter(handler: Handler) -> Handler:
        HANDLERS.update({f: handler for f in functions if f is not None})
        return handler

    return enter


def _plain(number: Any) -> Any:
    """Return a size as an int; under `torch.jit.trace` sizes are tensors."""
    return int(number) if isinstance(number, Tensor) else number


def _replaced(edit: Edit, asked: Sizes) -> Sizes | None:
    """Return `asked` with the numbers of `edit`, or None when `asked` is not what the edit is about."""
    if len(asked) != len(edit.old):
        return None
    out, told = list(asked), False
    for i, (have, old, new) in enumerate(zip(asked, edit.old, edit.new, strict=True)):
        if old is None or new is None or have == -1:
            continue
        if have not in (old, new):
            return None
        out[i], told = new, True
    return tuple(out) if told else None


def _fits(sizes: Sizes, count: int) -> bool:
    """Can `count` elements be viewed in these sizes? Yes, where their number is not known (0)."""
    whole = math.prod(n for n in sizes if n != -1)
    return not count or (bool(whole) and (count % whole == 0 if -1 in sizes else whole == count))


def _given(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    """Return the arguments after the first one by their names, None where not given."""
    return [kwargs.get(name, args[i] if i < len(args) else None) for i, name in enumerate(names, 1)]


@_handles(torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.Tensor.expand)
def _view(mode: Resizing, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    op = "expand" if func is torch.Tensor.expand else "view"
    name = "shape" if func in (torch.reshape, torch.Tensor.reshape) else "size"
    asked: Any = args[1:] or (kwargs.get(name),)
    asked = asked[0] if len(asked) == 1 and isinstance(asked[0], (tuple, list)) else asked
    if not all(isinstance(n, (int, torch.SymInt)) or (isinstance(n, Tensor) and n.ndim == 0) for n in asked):
        return func(*args, **kwargs)
    return func(args[0], mode.view(op, args[0], tuple(asked)))


@_handles(torch.zeros, torch.empty, torch.Tensor.new_zeros, torch.Tensor.new_empty)
def _factory(mode: Resizing, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a tensor of other sizes where those of the code are of a width that went."""
    before = args[: func.__name__.startswith("new_")]
    sizes = args[len(before) :] or (kwargs.get("size"),)
    listed = isinstance(sizes[0], (tuple, list))
    asked = tuple(map(_plain, sizes[0] if listed else sizes))
    found = [(i, n) for i, e in enumerate(mode.edits) if e.op == "factory" and (n := _replaced(e, asked)) is not None]
    if not found:
        return func(*args, **kwargs)
    rest = {k: v for k, v in kwargs.items() if k != "size"}
    return func(*before, mode.choose(found), *(sizes[1:] if listed else ()), **rest)


@_handles(torch.Tensor.unflatten, torch.unflatten)
def _unflatten(mode: Resizing, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dim, sizes = _given(args, kwargs, "dim", "sizes")
    if not isinstance(dim, int):
        return func(*args, **kwargs)
    return func(args[0], dim, mode.view("unflatten", args[0], tuple(sizes), dim % args[0].ndim))


@_handles(torch.split, torch.Tensor.split, torch.Tensor.split_with_sizes, torch.split_with_sizes)
@_handles(torch.chunk, torch.Tensor.chunk, torch.tensor_split, torch.Tensor.tensor_split)
def _split(mode: Resizing, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    names = ("split_size_or_sections", "split_size", "split_sizes", "chunks", "indices_or_sections", "sections")
    how = args[1] if len(args) > 1 else next(kwargs[k] for k in names if k in kwargs)
    dim = int(args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x.ndim
    fitting = mode.fitting("split", x, dim)
    found = [(i, e.new) for i, e in fitting if _asks(func, how, e)]
    if not found:  # parts of a computed size: the place with as many parts
        size = int(x.shape[dim])
        found = [(i, e.new) for i, e in fitting if e.changes and _parts(func, how, size, len(e.new)) == len(e.new)]
    return torch.split(x, list(mode.choose(found)), dim) if found else func(*args, **kwargs)


def _by_count(func: Any) -> bool:
    return func in (torch.chunk, torch.Tensor.chunk, torch.tensor_split, torch.Tensor.tensor_split)


def _parts(func: Any, how: Any, size: int, meant: int) -> int:
    """Return into how many parts a split goes; into `meant` ones if each was to be that share of the size."""
    if isinstance(how, (list, tuple)):
        return len(how) + int(func in (torch.tensor_split, torch.Tensor.tensor_split))
    how = max(1, int(how))
    return how if _by_count(func) else meant if how == size // meant else math.ceil(size / how)


def _asks(func: Any, how: Any, edit: Edit) -> bool:
    """Is `edit` about a split into `how`: sizes of the parts, one size for all, or a number of parts?"""
    if isinstance(how, (list, tuple)):
        if func in (torch.tensor_split, torch.Tensor.tensor_split):
            how = [b - a for a, b in zip([0, *how], [*how, sum(n or 0 for n in edit.old)], strict=True)]
        return list(how) == list(edit.old) or list(how) == list(edit.new)
    wanted = len(edit.old) if _by_count(func) else edit.old[0]
    return bool(how == wanted)


@_handles(torch.narrow, torch.Tensor.narrow)
def _narrow(mode: Resizing, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, (dim, start, length) = args[0], _given(args, kwargs, "dim", "start", "length")
    if not all(isinstance(n, int) for n in (dim, start, length)):
        return func(*args, **kwargs)
    cut = _sliced(mode, x, dim % x.ndim, slice(start, start + length))
    return torch.narrow(x, dim, cut.start, cut.stop - cut.start)


@_handles(F.pad)
def _pad(mode: Resizing, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, pads = args[0], list(args[1] if len(args) > 1 else kwargs["pad"])
    for i in range(0, len(pads), 2):
        pads[i : i + 2] = mode.view("pad", x, tuple(pads[i : i + 2]), x.ndim - 1 - i // 2)
    return func(x, pads, *args[2:], **{k: v for k, v in kwargs.items() if k != "pad"})


@_handles(torch.Tensor.__getitem__, torch.Tensor.__setitem__)
def _item(mode: Resizing, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Read or write ``x[...]`` with slices at other bounds."""
    x, index = args[:2]
    items = list(index) if isinstance(index, tuple) else [index]
    used = sum(1 for i in items if i is not None and i is not Ellipsis)
    dim, out = 0, []
    for item in items:
        plain = isinstance(item, slice) and item.step in (None, 1)
        out.append(_sliced(mode, x, dim, item) if plain else item)
        dim += x.ndim - used if item is Ellipsis else (0 if item is None else 1)
    return func(x, tuple(out) if isinstance(index, tuple) else out[0], *args[2:])


def _sliced(mode: Resizing, x: Tensor, dim: int, item: slice) -> slice:
    """Return `item` with other bounds; an open or negative bound counts from the size before or after."""
    if item.start is None and item.stop is None:
        return item
    asked = slice(*(_plain(b) for b in (item.start, item.stop)))
    written, computed = [], []
    for i, edit in mode.fitting("slice", x, dim):
        size = int(x.shape[dim])
        before, after = next(((o, n) for d, o, n in edit.sizes if d == dim), (size, size))
        begins = asked.start == 0 or (asked.start is None) == (edit.old[0] == 0)  # a computed start may be 0
        ends = asked.stop is not None or edit.old[1] == before
        if asked.indices(before)[:2] == edit.old:
            written.append((i, edit.new))
        elif asked.indices(after)[:2] == edit.new or (begins and ends):
            computed.append((i, edit.new))
    found = written or computed
    return slice(*mode.choose(found)) if found else item


@_handles(torch.mean, torch.Tensor.mean)
def _mean(mode: Resizing, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Keep on dividing by the number before; a variance written out holds the mean of what is gone, squared."""
    out, x = func(*args, **kwargs), args[0]
    dims = _dims(_given(args, kwargs, "dim")[0], x.ndim)
    found = [
        (i, (e.op, math.prod(new / old for d, old, new in e.sizes if d in dims)))
        for i, e in sorted(mode.fitting("mean", x) + mode.fitting("centred", x))
    ]
    op, share = mode.choose(found) if found else ("", 1.0)
    if share == 1 or _tracing.get():
        return out
    if op == "centred":
        return out * share + mode.mean.reshape(out.shape).square() * (1 - share)
    mode.mean = out * share
    return mode.mean


def _dims(dim: Any, rank: int) -> list[int]:
    if dim is None or isinstance(dim, bool) or dim in ((), []):
        return list(range(rank))
    return [d % rank for d in ([dim] if isinstance(dim, int) else dim)]


@_handles(torch.var, torch.Tensor.var, torch.std, torch.Tensor.std)
def _variance(mode: Resizing, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, found = args[0], mode.fitting("var", args[0])
    given = {**dict(zip(("dim", "unbiased", "keepdim"), args[1:], strict=False)), **kwargs}
    if isinstance(given.get("dim"), bool):
        given["unbiased"] = given.pop("dim")
    dims = _dims(given.get("dim"), x.ndim)
    absent = _absent(mode, x, dims, found)
    if absent == 0:
        return func(*args, **kwargs)
    total = math.prod(x.shape[d] for d in dims) + absent
    correction = given["correction"] if "correction" in given else int(given.get("unbiased", True))
    correction = 1 if correction is None else correction
    _, square = _moments(x, dims, absent)
    out = square * (total / max(total - correction, 0))
    out = out if given.get("keepdim", False) else out.squeeze(tuple(dims))
    return out.sqrt() if func in (torch.std, torch.Tensor.std) else out


def _absent(mode: Resizing, x: Tensor, dims: Sequence[int], found: SizedEdits) -> int:
    """Return how many elements along `dims` are gone, which were zero."""
    now = {d: int(x.shape[d]) for d in dims}
    before = [(i, math.prod({**now, **{d: old for d, old, _ in e.sizes if d in dims}}.values())) for i, e in found]
    return int(mode.choose(before)) - math.prod(now.values()) if before else 0


def _moments(x: Tensor, dims: Sequence[int], absent: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance over `dims` with `absent` further elements that are zero (the dimensions kept)."""
    dims = list(dims)
    total = math.prod(x.shape[d] for d in dims) + absent
    mean = x.sum(dims, keepdim=True) / total
    square = ((x - mean).square().sum(dims, keepdim=True) + absent * mean.square()) / total
    return mean, square


def _wide(x: Tensor) -> Tensor:
    """Return `x` in a precision in which sums may be formed."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@_handles(F.layer_norm, torch.layer_norm)
def _layer_norm(mode: Resizing, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, (sizes, weight, bias, eps) = args[0], _given(args, kwargs, "normalized_shape", "weight", "bias", "eps")
    dims = list(range(x.ndim - len(sizes), x.ndim))
    absent = _absent(mode, x, dims, mode.fitting("layer_norm", x))
    if absent == 0:
        return func(*args, **kwargs)
    if _tracing.get():
        return func(x, x.shape[dims[0] :], weight, bias, **({} if eps is None else {"eps": eps}))
    wide = _wide(x)
    mean, square = _moments(wide, dims, absent)
    out = ((wide - mean) * torch.rsqrt(square + (1e-5 if eps is None else eps))).to(x.dtype)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


@_handles(F.rms_norm, torch.rms_norm)
def _rms_norm(mode: Resizing, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, (sizes, weight, eps) = args[0], _given(args, kwargs, "normalized_shape", "weight", "eps")
    dims = list(range(x.ndim - len(sizes), x.ndim))
    absent = _absent(mode, x, dims, mode.fitting("rms_norm", x))
    if absent == 0:
        return func(*args, **kwargs)
    if _tracing.get():
        return func(x, x.shape[dims[0] :], weight, **({} if eps is None else {"eps": eps}))
    wide = _wide(x)
    total = math.prod(x.shape[d] for d in dims) + absent
    square = wide.square().sum(dims, keepdim=True) / total
    out = (wide * torch.rsqrt(square + (torch.finfo(x.dtype).eps if eps is None else eps))).to(x.dtype)
    return out if weight is None else out * weight


@_handles(F.group_norm, torch.group_norm)
def _group_norm(mode: Resizing, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, (_, weight, bias, eps) = args[0], _given(args, kwargs, "num_groups", "weight", "bias", "eps")
    fitting = mode.fitting("group_norm", x, 1)
    if not fitting:
        return func(*args, **kwargs)
    before, after = mode.choose([(i, (e.old, e.new)) for i, e in fitting])
    if _tracing.get():
        return _uneven_norm()(x, list(after), weight, bias)
    parts = []
    for part, old, new in zip(_wide(x).split(list(after), 1), before, after, strict=True):
        dims = list(range(1, x.ndim))
        mean, square = _moments(part, dims, (old - new) * math.prod(x.shape[2:]))
        parts.append((part - mean) * torch.rsqrt(square + (1e-5 if eps is None else eps)))
    out = torch.cat(parts, 1).to(x.dtype)
    shape = (-1, *(1,) * (x.ndim - 2))
    out = out if weight is None else out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape)


@functools.cache
def _uneven_norm() -> Any:
    """Return an op that stands in a graph for a group norm over groups of unequal sizes; it is never run on values."""

    @torch.library.custom_op("ockham::uneven_norm", mutates_args=())
    def uneven_norm(x: Tensor, sizes: list[int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return torch.empty_like(x)

    uneven_norm.register_fake(lambda x, sizes, weight, bias: torch.empty_like(x))
    return uneven_norm


@_handles(getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None))
def _grouped_product(mode: Resizing, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pad what a grouped product multiplies to rows of whole 16 bytes, which its kernels ask for."""
    x, weight = args[:2]
    unit, (k, n) = 16 // x.element_size(), weight.shape[-2:]
    more_k, more_n = -k % unit, -n % unit
    if more_k == more_n == 0:
        return func(*args, **kwargs)
    x, weight = F.pad(x, (0, more_k)).contiguous(), F.pad(weight, (0, more_n, 0, more_k)).contiguous()
    return func(x, weight, *args[2:], **kwargs)[..., :n]


@functools.cache
def resized_class(base: Any) -> type[nn.Module]:
    """Return the subclass of `base` whose forward runs under `Resizing`; it can be pickled where `base` can."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        held, edits = self.__dict__["_resized"]
        with Resizing(edits):
            return held.forward(self, *args, **kwargs)

    def reduced(self: nn.Module, protocol: Any) -> Any:
        return _empty, (self.__dict__["_resized"][0],), self.__dict__

    own = {"forward": forward, "__reduce_ex__": reduced, "__module__": base.__module__, "__doc__": base.__doc__}
    kind: type[nn.Module] = type(base.__name__, (base,), {**own, "__qualname__": base.__qualname__})
    return kind


def _empty(base: Any) -> nn.Module:
    """Return an instance without state, for `pickle` and `copy.deepcopy` to fill."""
    key: Any = base
    kind: Any = resized_class(key)
    made: nn.Module = kind.__new__(kind)
    return made


def attach(module: nn.Module, edits: Sequence[Edit]) -> None:
    """Let the forward of `module` run under `Resizing`: its class becomes a subclass with the same name.

    A module which was resized before keeps one layer of resizing: the numbers of both are composed.
    """
    base, earlier = module.__dict__.get("_resized", (type(module), ()))
    module.__dict__["_resized"] = (base, compose(earlier, edits))
    module.__class__ = resized_class(base)


def compose(earlier: Sequence[Edit], later: Sequence[Edit]) -> tuple[Edit, ...]:
    """Return the edits from the numbers in the code to those after both; the code may also say those in between."""
    out: list[Edit] = []
    for first in earlier:
        followed = [_follow(first, second) for second in later]
        out.extend([edit for edit in followed if edit is not None] or [first])
    if not out:
        return tuple(later)
    follows = {e for first in earlier for e in later if _follow(first, e) is not None}
    return tuple(dict.fromkeys([*out, *(e for e in later if e not in follows)]))


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
    return replace(first, sizes=tuple((d, *pair) for d, pair in sorted(sizes.items())), old=start, new=end)


@dataclass(frozen=True, slots=True)
class Branch:
    """A residual branch, which is computed from a stream and added to it: x + branch(x). It can go as a whole.

    Attributes:
        id: path of the module that holds it and nothing else, or of the one that computes what is added.
        parameters: names of the parameters that go with it.
        buffers: names of the buffers that go with it.
        modules: path of a module in it to what stands there afterwards, "same" (returns its input) or "zero" (returns
            zeros of the shape of its input), and the number of its results where it returns a tuple ("zero 2").
    """

    id: str
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    modules: Mapping[str, str]

    def to_data(self) -> dict[str, Any]:
        """Return plain values."""
        names = {"parameters": list(self.parameters), "buffers": list(self.buffers)}
        return {"id": self.id, **names, "modules": dict(self.modules)}

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Branch:
        """Read what `to_data` wrote."""
        modules = {str(path): str(word) for path, word in data["modules"].items()}
        for word in modules.values():
            Skipped(word)
        parameters, buffers = (tuple(map(str, data[key])) for key in ("parameters", "buffers"))
        return Branch(str(data["id"]), parameters, buffers, modules)


class Skipped(nn.Identity):
    """Stands where a module of a removed branch was: passes its first tensor on, or zeros like it.

    Args:
        what: "same" or "zero", and the number of results where the module returned a tuple; those after the first are
            None.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        word, _, count = what.partition(" ")
        if word not in ("same", "zero") or not (count.isdecimal() or count == ""):
            raise ValueError(f"a removed module is 'same' or 'zero', perhaps with a number of results; got {what!r}")
        self.what, self.zero, self.results = what, word == "zero", int(count or 0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first tensor of the arguments, or zeros of its shape."""
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        first = torch.zeros_like(first) if self.zero else first
        return first if not self.results else (first, *(None,) * (self.results - 1))

    def extra_repr(self) -> str:
        """Return what it does."""
        return self.what


def leave_out(network: nn.Module, branches: Sequence[Branch]) -> None:
    """Put a `Skipped` in the place of every module of some branches, with the plain attributes that it had."""
    for path, what in (pair for branch in branches for pair in branch.modules.items()):
        parent, _, leaf = path.rpartition(".")
        owner, gone, stand = network.get_submodule(parent), network.get_submodule(path), Skipped(what)
        own = {n: v for n, v in vars(gone).items() if n[0] != "_" and isinstance(v, (bool, int, float, str))}
        vars(stand).update(own | dict.fromkeys(gone._parameters))  # a forward may ask for them
        setattr(owner, leaf, stand)
        if isinstance(owner, nn.TransformerEncoderLayer):
            owner.activation_relu_or_gelu = 0  # keeps it off the fused path, which wants all weights
