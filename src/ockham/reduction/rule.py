"""Rules: which weights go this round. A rule is an order of removal and a reason to stop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ockham.errors import OckhamError
from ockham.evidence.hyper import beta_log_odds
from ockham.reduction.score import Evidence, Salience, by_snr

__all__ = ["BudgetRule", "EvidenceRule", "LearnedOddsRule", "Rule", "budget_count", "counted"]


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
        cap: as `EvidenceRule`; it matters here, since a learned rate makes the rich richer.
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
        go = _least(salience(evidence), go, count)
    keep = {}
    for name, gone in go.items():
        mask = evidence.posterior[name].keep.clone()
        mask[mask.clone()] = ~gone
        keep[name] = mask
    return keep


def _least(order: Mapping[str, Tensor], go: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    names = list(go)
    flat = torch.cat([torch.where(go[n], order[n], torch.inf).double().cpu() for n in names])
    chosen = torch.zeros(flat.shape, dtype=torch.bool)
    chosen[torch.argsort(flat, stable=True)[:count]] = True
    parts = chosen.split([go[n].numel() for n in names])
    return {n: part.to(go[n].device) for n, part in zip(names, parts, strict=True)}
