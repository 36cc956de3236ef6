"""The state of all living weights of a parameter group behind each other, and what a run of them shares."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ockham.posterior.pieces import Span

__all__ = ["Arena", "Facts"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What all weights of a run share: steps taken (the current one included) and prior precision."""

    step: int
    prior_precision: float


@dataclass(frozen=True, slots=True, eq=False)
class Arena:
    """State vectors of all living weights of a group, and their division into spans."""

    parameters: tuple[Tensor, ...]
    vectors: Mapping[str, Tensor]
    spans: tuple[Span, ...]
    _views: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)

    def holds(self, alive: list[Tensor]) -> bool:
        """Whether these are the arena's parameters."""
        return len(self.parameters) == len(alive) and all(map(operator.is_, self.parameters, alive))

    def at(self, span: Span) -> dict[str, Tensor]:
        """Views of all vectors on a span, made once."""
        key = (span.start, span.stop)
        if key not in self._views:
            self._views[key] = {name: v[span.start : span.stop] for name, v in self.vectors.items()}
        return self._views[key]
