"""When rounds of removal happen, and when they end because the evidence no longer rises."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ockham.choose.order import smallest
from ockham.choose.score import Evidence, Salience, by_snr
from ockham.errors import OckhamError
from ockham.evidence.hyper import beta_log_odds

__all__ = [
    "BudgetRule",
    "EvidenceRule",
    "LearnedOddsRule",
    "RoundInfo",
    "Rounds",
    "Rule",
    "budget_count",
    "counted",
    "evidence_falls",
]


@dataclass(frozen=True, slots=True)
class Rounds:
    """Schedule of removal rounds inside a training run.

    Attributes:
        start: share of the epochs before the first round (the posterior must have formed).
        end: share of the epochs at which the last round happens.
        count: number of rounds at most, spread evenly, one per epoch at most.
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
        epoch: number of the epoch after which it happened.
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


class Rule(ABC):
    """Decides a round: takes the evidence, returns boolean keep masks (True = stays)."""

    @abstractmethod
    def decide(self, evidence: Evidence, protected: Collection[str] = (), progress: float = 1.0) -> dict[str, Tensor]:
        """Keep masks by parameter name, already removed weights False.

        Args:
            evidence: of the current posterior.
            protected: parameter names from which nothing goes.
            progress: 0..1, how far this round is through the planned rounds (1 = last).
        """


@dataclass(frozen=True, slots=True)
class EvidenceRule(Rule):
    """Remove every weight with delta_f > log_odds: no target, no threshold to tune.

    Attributes:
        log_odds: ln P(keep)/P(remove) of a weight before the data; 0 treats both alike.
        cap: largest share of the living weights that one round may take; the least salient go first.
        salience: order inside a capped round.
    """

    log_odds: float = 0.0
    cap: float = 1.0
    salience: Salience = by_snr

    def __post_init__(self) -> None:
        _check_cap("EvidenceRule", self.cap)

    def decide(self, evidence: Evidence, protected: Collection[str] = (), progress: float = 1.0) -> dict[str, Tensor]:
        """Remove where delta_f > log_odds, at most a share ``cap`` of the living weights."""
        go = {n: d > self.log_odds for n, d in evidence.items() if n not in protected}
        return _capped(evidence, go, self.cap, self.salience)


@dataclass(frozen=True, slots=True)
class LearnedOddsRule(Rule):
    """The evidence rule with log-odds learned per parameter tensor under an informative Beta prior.

    Attributes:
        strength: pseudo-counts of the Beta, as a share of the tensor's size, split evenly between keep and remove.
        cap: share as in `EvidenceRule`; it matters here, since a learned rate makes the rich richer.
    """

    strength: float = 1.0
    cap: float = 0.5

    def __post_init__(self) -> None:
        _check_cap("LearnedOddsRule", self.cap)
        if not self.strength >= 0:
            raise OckhamError(f"LearnedOddsRule: strength is a share of the tensor's size, >= 0; got {self.strength}")

    def decide(self, evidence: Evidence, protected: Collection[str] = (), progress: float = 1.0) -> dict[str, Tensor]:
        """Remove where delta_f exceeds the learned log-odds of its tensor."""
        go = {}
        for name, delta in evidence.items():
            if name in protected or delta.numel() == 0:
                continue
            half = max(0.5 * self.strength * evidence.posterior[name].keep.numel(), 1.0)
            alive = torch.ones_like(delta, dtype=torch.bool)
            go[name] = delta > beta_log_odds(delta, alive, keep_count=half, remove_count=half).to(delta)
        return _capped(evidence, go, self.cap, by_snr)


@dataclass(frozen=True, slots=True)
class BudgetRule(Rule):
    """Remove the least salient weights until a budget is met, whatever the evidence says.

    Attributes:
        keep: share (0..1) of the scored weights that stay at the end, or their number as an int > 1. `decide` raises
            an `OckhamError` when protected parameters alone hold more.
        salience: the order; `by_magnitude`, `by_snr`, `by_random(seed)`, `by_delta_f`.
        gradual: exponent of the path from 1 to ``keep`` over the rounds; 3 is gradual magnitude pruning
            (Zhu & Gupta 2017), 0 goes there in the first round.
    """

    keep: float
    salience: Salience = by_snr
    gradual: float = 0.0

    def __post_init__(self) -> None:
        count = isinstance(self.keep, int) and self.keep > 1
        if not (count or 0 < self.keep <= 1):
            raise OckhamError(f"BudgetRule: keep is a share in (0, 1] or a whole number of weights; got {self.keep}")

    def decide(self, evidence: Evidence, protected: Collection[str] = (), progress: float = 1.0) -> dict[str, Tensor]:
        """Remove the least salient of all living weights down to this round's budget."""
        total = evidence.posterior.size()
        target = budget_count(self.keep, total)
        path = (1 - progress) ** self.gradual if self.gradual else 0.0
        alive = evidence.posterior.kept()
        excess = alive - max(target, round(target + (total - target) * path))
        go = {n: torch.ones_like(d, dtype=torch.bool) for n, d in evidence.items() if n not in protected}
        removable = sum(g.numel() for g in go.values())
        if go and excess > removable:
            raise OckhamError(
                f"the budget of {target} weights cannot be met: protected parameters alone hold {alive - removable}; "
                "keep more, or protect less"
            )
        return _lowest(evidence, go, max(0, excess), self.salience)


def budget_count(keep: float, total: int) -> int:
    """Number of weights that a budget leaves of ``total``.

    Raises:
        OckhamError: the budget is not positive or larger than the network.
    """
    count = int(keep) if isinstance(keep, int) and keep > 1 else round(float(keep) * total)
    if not 0 < count <= total:
        raise OckhamError(f"a budget must keep between 1 and {total} weights (or a share in (0, 1]); got {keep}")
    return count


def counted(rule: Rule, total: int) -> Rule:
    """The same rule with a budget in weights instead of a share, for a network that will become smaller."""
    if isinstance(rule, BudgetRule):
        return replace(rule, keep=max(2, budget_count(rule.keep, total)))
    return rule


def _check_cap(owner: str, cap: float) -> None:
    if not 0 < cap <= 1:
        raise OckhamError(f"{owner}: cap is a share of the living weights in (0, 1]; got {cap}")


def _capped(evidence: Evidence, go: Mapping[str, Tensor], cap: float, salience: Salience) -> dict[str, Tensor]:
    candidates = sum(int(g.sum()) for g in go.values())
    allowed = int(cap * evidence.posterior.kept()) if cap < 1 else candidates
    return _lowest(evidence, go, min(candidates, allowed), salience)


def _lowest(evidence: Evidence, go: Mapping[str, Tensor], count: int, salience: Salience) -> dict[str, Tensor]:
    """Remove the ``count`` least salient candidates."""
    if count < sum(int(g.sum()) for g in go.values()):
        go = smallest(salience(evidence), go, count)
    keep = {}
    for name, gone in go.items():
        alive = evidence.posterior[name].keep
        whole = gone.numel() == alive.numel()
        keep[name] = ~gone.view(alive.shape) if whole else alive.masked_scatter(alive, ~gone)
    return keep
