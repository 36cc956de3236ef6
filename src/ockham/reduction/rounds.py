"""When rounds of removal happen, and when they end because the evidence no longer rises."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ockham.errors import OckhamError

__all__ = ["RoundInfo", "Rounds", "evidence_falls"]


@dataclass(frozen=True, slots=True)
class Rounds:
    """Schedule of removal rounds inside a training run.

    Attributes:
        start: share of the epochs before the first round (the posterior must have formed).
        end: share of the epochs at which the last round happens.
        count: how many rounds at most, spread evenly, one per epoch at most.
        patience: rounds without a rise of the free energy of the refitted network after which removal ends.
    """

    start: float = 0.125
    end: float = 0.9
    count: int = 20
    patience: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise OckhamError(f"Rounds: 0 <= start <= end <= 1 expected; got start={self.start}, end={self.end}")
        if self.count < 1 or self.patience < 1:
            raise OckhamError(f"Rounds: count and patience must be at least 1; got {self.count} and {self.patience}")

    def epochs(self, total: int) -> list[int]:
        """Epochs (1-based) after which a round happens, for a run of ``total`` epochs.

        >>> Rounds(start=0.5, end=1.0, count=3).epochs(10)
        [5, 7, 10]
        """
        first = max(1, math.ceil(self.start * total))
        last = max(first, math.floor(self.end * total))
        steps = max(1, self.count - 1)
        return sorted({first + round((last - first) * i / steps) for i in range(self.count)})


@dataclass(frozen=True, slots=True)
class RoundInfo:
    """What one round did.

    Attributes:
        epoch: after which epoch.
        removed: weights that went.
        kept_share: living weights over all weights, after the round.
        delta_f: predicted change of log evidence, nats (sum over the removed).
        nll_cost: predicted rise of the mean NLL, nats per example.
        free_energy: ELBO (nats) of the network *before* the round, refitted since the last: -(N E[NLL] + T KL).
    """

    epoch: int
    removed: int
    kept_share: float
    delta_f: float
    nll_cost: float
    free_energy: float


def evidence_falls(rounds: list[RoundInfo], patience: int) -> bool:
    """True when the free energy has not exceeded its earlier maximum for ``patience`` rounds of refitting."""
    energies = [r.free_energy for r in rounds]
    if len(energies) <= patience:
        return False
    return max(energies[-patience:]) <= max(energies[:-patience])
