"""Forwards whose constants follow the plan: `x.view(-1, 800)` asks for 400 once half the channels are gone.

A module that needs it gets a subclass of its own class whose forward runs under a `TorchFunctionMode`. The mode
recognises an op by the sizes of its input and the numbers it is asked for, and replaces those; numbers it does not
know raise, so nothing is ever resized by guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ockham.errors import OckhamError
from ockham.surgery.sites import Edit

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
