"""Living weights as flat vectors: which elements are alive, where their state lies, how to read and write them.

The state of a variational optimizer holds one number per *living* weight, all parameters of a group behind each other
in one arena, so that a step is a few operations on long vectors, whatever the number of tensors. The arena is worked
through in spans, which keeps temporary memory small and cached. Removed weights cost nothing: no noise, no moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["Piece", "Span", "alive_index", "chunks", "read", "spans", "write", "zero_removed_"]

_CPU_SPAN = 3 << 17
_CPU_CHUNK = 1 << 15
_ACCELERATOR_SPAN = 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A run of living weights of one parameter.

    Attributes:
        parameter: the parameter.
        start: first position in the parameter's state vectors.
        stop: one past the last.
        index: flat positions in the parameter, or None where the run is elements start..stop of a dense parameter.
    """

    parameter: Tensor
    start: int
    stop: int
    index: Tensor | None

    def flat(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """The run's values of a tensor shaped like the parameter; a view where possible, else a copy (in ``out``)."""
        flat = tensor.detach().reshape(-1)
        if self.index is None:
            return flat[self.start : self.stop]
        return torch.index_select(flat, 0, self.index, out=out)

    def put(self, values: Tensor) -> None:
        """Write the run's values into the parameter; nothing to do where they are a view of it."""
        target = self.parameter.detach()
        if self.index is None and target.is_contiguous():
            place = target.view(-1)[self.start : self.stop]
            if place.data_ptr() != values.data_ptr():
                place.copy_(values)
        elif self.index is None:
            target.copy_(values.view(target.shape))
        elif target.is_contiguous():
            target.view(-1).scatter_(0, self.index, values)
        else:
            target.put_(self.index, values)


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """A run of the arena: positions start..stop, and the pieces that lie there in order."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]

    @property
    def lengths(self) -> list[int]:
        """Of the pieces."""
        return [p.stop - p.start for p in self.pieces]

    def split(self) -> list[Span]:
        """The same run, one span per piece."""
        result, at = [], self.start
        for piece in self.pieces:
            length = piece.stop - piece.start
            result.append(Span(at, at + length, (piece,)))
            at += length
        return result


def alive_index(keep: Tensor) -> Tensor:
    """Flat positions of the survivors, in logical (row-major) order."""
    return keep.reshape(-1).nonzero().squeeze(1)


def spans(alive: Sequence[tuple[Tensor, Tensor | None]]) -> list[Span]:
    """Cut the arena of (parameter, index of survivors or None) into spans of bounded, about equal length."""
    total = sum(p.numel() if index is None else index.numel() for p, index in alive)
    limit = _CPU_SPAN if not alive or alive[0][0].device.type == "cpu" else _ACCELERATOR_SPAN
    size = -(-total // max(1, -(-total // limit)))
    result: list[Span] = []
    run: list[Piece] = []
    start = at = 0
    for parameter, index in alive:
        for piece in _cut(parameter, index, first=size - (at - start), size=size):
            run.append(piece)
            at += piece.stop - piece.start
            if at - start >= size:
                result.append(Span(start, at, tuple(run)))
                run, start = [], at
    return [*result, Span(start, at, tuple(run))] if run else result


def _cut(parameter: Tensor, index: Tensor | None, *, first: int, size: int) -> list[Piece]:
    total = parameter.numel() if index is None else index.numel()
    whole = Piece(parameter, 0, total, index)
    if index is None and not parameter.is_contiguous():
        return [whole]  # written back through its shape, so never cut
    edges = [0, *range(min(first, total), total, size), total] if total else [0]
    cuts = [replace(whole, start=a, stop=b) for a, b in pairwise(edges) if b > a]
    return [c if index is None else replace(c, index=index[c.start : c.stop]) for c in cuts]


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat tensors of one length side by side, on the CPU in pieces whose temporaries stay in cache.

    Longer ones are given back to the system after every operation and faulted in again, which costs more than it.
    """
    size = _CPU_CHUNK if tensors[0].device.type == "cpu" else max(1, tensors[0].numel())
    return zip(*(t.split(size) for t in tensors), strict=True)


def read(span: Span, tensors: Sequence[Tensor], out: Tensor) -> Tensor:
    """The span's values, one tensor per piece, shaped like its parameter: a view if one dense piece, else ``out``."""
    if len(span.pieces) == 1:
        return span.pieces[0].flat(tensors[0], out)
    return torch.cat([piece.flat(t) for piece, t in zip(span.pieces, tensors, strict=True)], out=out)


def write(span: Span, values: Tensor) -> None:
    """Write a flat vector back into the parameters of the span."""
    if len(span.pieces) == 1:
        span.pieces[0].put(values)
        return
    for piece, part in zip(span.pieces, values.split(span.lengths), strict=True):
        piece.put(part)


def zero_removed_(parameter: Tensor, keep: Tensor) -> None:
    """Set the removed elements of a parameter to exactly zero."""
    with torch.no_grad():
        parameter.masked_fill_(~keep, 0.0)
