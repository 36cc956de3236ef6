"""The state of all living weights of a parameter group behind each other, and what a run of them shares."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ockham.posterior.pieces import Span

__all__ = ["WORK", "Arena", "Facts"]

WORK = ("first", "second", "third")  # names of the vectors as long as a span that a step may overwrite
_SMALL = 1 << 20


@dataclass(frozen=True, slots=True)
class Facts:
    """What all weights of a run share: steps taken (the current one included) and prior precision."""

    step: int
    prior_precision: float


@dataclass(frozen=True, slots=True, eq=False)
class Arena:
    """State vectors of all living weights of a group, their division into spans, and memory to work in.

    Memory to work in is kept from step to step: fresh memory for every operation would cost more than the operations.
    It is shared by all spans, except the ``first`` part of it in a small arena, which then still holds the standard
    deviations of the draw (runs in `drawn`) when the step needs them again.
    """

    parameters: tuple[Tensor, ...]
    vectors: Mapping[str, Tensor]
    spans: tuple[Span, ...]
    drawn: set[tuple[int, int]] = field(default_factory=set)
    _views: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)
    _work: dict[str, Tensor] = field(default_factory=dict)

    def holds(self, alive: list[Tensor]) -> bool:
        """Whether these are the arena's parameters."""
        return len(self.parameters) == len(alive) and all(map(operator.is_, self.parameters, alive))

    def at(self, span: Span) -> dict[str, Tensor]:
        """Views, made once: of all vectors on a span, of ``mean`` (the mean behind a draw), and of `WORK`."""
        key = (span.start, span.stop)
        if key not in self._views:
            size, own = span.stop - span.start, slice(span.start, span.stop)
            found = {name: v[own] for name, v in self.vectors.items()}
            found["mean"] = self._memory("mean", found, self.spans[-1].stop)[own]
            for name in WORK:
                if name == "first" and self.small:
                    found[name] = self._memory(name, found, self.spans[-1].stop)[own]
                else:
                    found[name] = self._memory(name, found, max(x.stop - x.start for x in self.spans))[:size]
            self._views[key] = found
        return self._views[key]

    def lent(self, parameter: Tensor) -> Tensor:
        """One value per living weight of a parameter whose weights are not drawn: its unused part of ``mean``."""
        at, first, last = 0, 0, 0
        for span in self.spans:
            for piece in span.pieces:
                length = piece.stop - piece.start
                if piece.parameter is parameter:
                    first, last = (at if last == 0 else first), at + length
                at += length
        return self._memory("mean", self.vectors, at)[first:last]

    @property
    def small(self) -> bool:
        """Whether memory for one more vector does not matter."""
        return self.spans[-1].stop <= _SMALL

    def _memory(self, name: str, like: Mapping[str, Tensor], size: int) -> Tensor:
        if name not in self._work:
            kind = next(v for n, v in like.items() if n != "noise")
            self._work[name] = torch.empty(size, dtype=kind.dtype, device=kind.device)
        return self._work[name]
