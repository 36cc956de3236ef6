"""Rules: scores of weights, the order they go in, and how many."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ockham.core.posterior import Gaussian, Posterior
from ockham.errors import OckhamError
from ockham.evidence.gaussian import beta_log_odds, delta_f, expected_nll_cost

if TYPE_CHECKING:
    from ockham.choose.units import GroupLike, StructureEvidence

__all__ = [
    "BudgetRule",
    "Diagnosis",
    "Evidence",
    "EvidenceRule",
    "LearnedOddsRule",
    "Limit",
    "LowestRule",
    "RoundInfo",
    "Rounds",
    "Rule",
    "Salience",
    "budget_count",
    "by_delta_f",
    "by_magnitude",
    "by_random",
    "by_snr",
    "counted",
    "diagnose",
    "evidence_falls",
    "mask_without",
    "order_keys",
    "score",
    "smallest",
]


_AT_ONCE = 1 << 16
_DIGIT = 16  # bits that one pass decides


def smallest(order: Mapping[str, Tensor], candidates: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Which candidates are the ``count`` smallest of all tensors together.

    Of equal numbers those that come first go first, as in a stable sort; NaN comes last. Numbers are mapped to integers
    of the same order, and a histogram of their leading sixteen bits, then of the next ones inside the bin that holds
    the threshold, finds it exactly. Temporary memory is that of one piece of 65,536 numbers.

    Args:
        order: numbers by name, flat tensors; float32, or anything that float64 holds.
        candidates: boolean tensors of the same shapes by name, True = may be chosen; names left out are not looked at.
        count: number to choose, at most that of the candidates.

    Returns:
        Boolean tensors by name, True = chosen.

    >>> smallest({"a": torch.tensor([3.0, 1.0, 2.0])}, {"a": torch.tensor([True, False, True])}, 1)["a"]
    tensor([False, False,  True])
    """
    single = all(order[name].dtype is torch.float32 for name in candidates)

    def pieces(name: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Places, keys and which of them are candidates, piece by piece."""
        values, free = order[name], candidates[name]
        size = _AT_ONCE if values.device.type == "cpu" else max(1, values.numel())
        for start in range(0, values.numel(), size):
            place = slice(start, start + size)
            yield place, order_keys(values[place], single), free[place]

    limit = Limit.of(lambda: ((k, free) for name in candidates for _, k, free in pieces(name)), count, single)
    found = {name: torch.zeros_like(mask) for name, mask in candidates.items()}
    for name in candidates:
        for place, keys, free in pieces(name):
            found[name][place] = limit.below(keys, free)
    return found


def order_keys(values: Tensor, single: bool) -> Tensor:
    """Integers in the order of the numbers, NaN last: of a negative one all bits but the sign are turned round."""
    real, integer = (torch.float32, torch.int32) if single else (torch.float64, torch.int64)
    finite = values.to(real).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    keys = (finite + 0.0).view(integer)
    return torch.where(keys < 0, keys ^ torch.iinfo(integer).max, keys)


@dataclass(slots=True)
class Limit:
    """What the smallest keys lie below.

    Attributes:
        threshold: keys below it are among them.
        equal: number of those on it that are, the first ones; it falls with each that `below` chooses.
    """

    threshold: int
    equal: int

    @classmethod
    def of(cls, parts: Callable[[], Iterable[tuple[Tensor, Tensor]]], count: int, single: bool) -> Limit:
        """Of keys and which of them are candidates, which are gone through once for every sixteen bits."""
        whole = 32 if single else 64
        threshold, left = 0, count  # the bits so far; how many of those that share them are to be chosen
        for shift in range(whole - _DIGIT, -1, -_DIGIT):
            counts = torch.zeros(1 << _DIGIT, dtype=torch.int64)
            for keys, free in parts():
                digits = ((keys >> shift) & 0xFFFF) if shift + _DIGIT < whole else (keys >> shift) + (1 << 15)
                inside = free if shift + _DIGIT == whole else free & ((keys >> (shift + _DIGIT)) == threshold)
                counts += torch.bincount(digits[inside].long(), minlength=1 << _DIGIT).cpu()
            sums = counts.cumsum(0)
            digit = int(torch.searchsorted(sums, left))
            left -= int(sums[digit - 1]) if digit else 0
            threshold = digit - (1 << 15) if shift + _DIGIT == whole else (threshold << _DIGIT) + digit
        return cls(threshold, left)

    def below(self, keys: Tensor, free: Tensor) -> Tensor:
        """Which of the next candidates are among the smallest."""
        chosen = free & (keys < self.threshold)
        if self.equal:
            on = (free & (keys == self.threshold)).nonzero().squeeze(1)[: self.equal]
            chosen[on] = True
            self.equal -= on.numel()
        return chosen


@dataclass(frozen=True, slots=True, eq=False)
class Evidence(Mapping[str, Tensor]):
    """delta_f of every living weight against the spike at zero, with what a decision may want beside it.

    As a mapping it gives the delta_f of the living weights of a parameter as a flat tensor, in row-major order.

    Attributes:
        delta_f: name to flat tensor over living weights, nats, positive favours removal.
        posterior: the posterior that was scored.
    """

    delta_f: Mapping[str, Tensor]
    posterior: Posterior

    def __getitem__(self, name: str) -> Tensor:
        """delta_f of the living weights of one parameter."""
        return self.delta_f[name]

    def __iter__(self) -> Iterator[str]:
        """Parameter names in the order of the network."""
        return iter(self.delta_f)

    def __len__(self) -> int:
        """Number of parameter tensors."""
        return len(self.delta_f)

    def by_group(self, groups: Iterable[GroupLike], **options: Any) -> StructureEvidence:
        """E_g of the structures that ``groups`` names; options and formula: `ockham.choose.units`."""
        from ockham.choose.units import score_structures

        return score_structures(self, groups, **options)

    def gain(self, keep: Mapping[str, Tensor]) -> float:
        """Summed delta_f, float64 nats, of the living weights that ``keep`` removes (independent weights)."""
        total = 0.0
        for name, delta in self.delta_f.items():
            if name in keep:
                total += float(delta[~keep[name][self.posterior[name].keep]].sum(dtype=torch.float64))
        return total

    def nll_cost(self, keep: Mapping[str, Tensor]) -> float:
        """Expected rise of the mean NLL, nats per example, if ``keep`` is carried out (independent weights)."""
        total = 0.0
        for name in keep:
            g = self.posterior[name]
            gone = g.keep & ~keep[name]
            prior = torch.broadcast_to(g.prior_precision, g.mean.shape)[gone].double()
            cost = expected_nll_cost(g.mean[gone].double(), g.precision[gone].double(), prior, 1.0)
            total += float(cost.sum())
        return total / self.posterior.n_data


Salience = Callable[[Evidence], Mapping[str, Tensor]]
"""An order of removal: name to one number per living weight; the smallest go first."""


def score(posterior: Posterior) -> Evidence:
    """delta_f of every living weight alone (Savage-Dickey; see `ockham.evidence.gaussian.delta_f`).

    Where the posterior knows correlations the *marginal* precision is used: of two duplicates either one may go, and
    the scores of both do not add.

    Raises:
        OckhamError: the posterior is outside the domain of delta_f.
    """
    result = {}
    for name, g in posterior.items():
        alive = _living(g)
        prior, prior_mean = alive(g.prior_precision), alive(g.prior_mean)
        result[name] = delta_f(alive(g.mean), alive(g.scored_precision), prior, prior_mean=prior_mean)
    return Evidence(result, posterior)


def _living(g: Gaussian) -> Callable[[Tensor], Tensor]:
    """Values of the living weights, flat: a view where all live; one number for all stays one number."""
    if bool(g.keep.all()):
        return lambda t: t if t.ndim == 0 and g.mean.ndim else t.expand(g.mean.shape).reshape(-1)
    return lambda t: t if t.ndim == 0 and g.mean.ndim else t.expand(g.mean.shape)[g.keep]


def by_snr(evidence: Evidence) -> Mapping[str, Tensor]:
    """P mean^2 with the scored precision: squared signal-to-noise, never worse than delta_f where P is uncertain."""
    found = {}
    for name, g in evidence.posterior.items():
        alive = _living(g)
        found[name] = alive(g.mean).square().mul_(alive(g.scored_precision))
    return found


def by_delta_f(evidence: Evidence) -> Mapping[str, Tensor]:
    """-delta_f: what the evidence likes least goes first."""
    return {name: -delta for name, delta in evidence.items()}


def by_magnitude(evidence: Evidence) -> Mapping[str, Tensor]:
    """|mean|, the usual baseline."""
    return {n: _living(g)(g.mean).abs() for n, g in evidence.posterior.items()}


def by_random(seed: int) -> Salience:
    """A random order, the same for the same seed and the same set of living weights."""

    def order(evidence: Evidence) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {n: torch.rand(d.shape, generator=generator).to(d.device) for n, d in evidence.items()}

    return order


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the spread of a posterior's precision says.

    Attributes:
        undetermined: share of living weights with P / P0 < 1.05: the data never touched them.
        spread: coefficient of variation of P inside a parameter tensor, averaged over weights; near zero the
            "evidence" is magnitude pruning under another name.
        removable: share of living weights with delta_f > 0.
        noise_cost: price of the posterior's spread in mean NLL, nats per example (to second order),
            (T/N) sum 1/2 (1 - P0/P). A settled posterior cannot pay more for its spread than its whole loss.
        nll: the mean NLL that was measured under the posterior, nats per example; None where it was not given.
        warnings: sentences for people; empty when the posterior can support pruning.
    """

    undetermined: float
    spread: float
    removable: float
    warnings: tuple[str, ...]
    noise_cost: float = 0.0
    nll: float | None = None

    @property
    def settled(self) -> bool | None:
        """Whether the standard deviations agree with the loss (noise_cost <= nll); None where no loss was given.

        Standard deviations that are still growing are too small, their Occam factors too large: evidence is inflated.
        """
        return None if self.nll is None else self.noise_cost <= self.nll


def diagnose(posterior: Posterior, nll: float | None = None) -> Diagnosis:
    """Share of undetermined weights, relative spread of the precision, and what follows from them.

    Args:
        posterior: the posterior before its first reduction.
        nll: mean negative log-likelihood under its draws, nats per example, to see whether it has settled.

    Reference: the noise cost is the second-order term of `expected_nll_cost` with all means in place.
    """
    alive = max(1, posterior.kept())
    undetermined = spread = noise = 0.0
    for g in posterior.values():
        ratio = (g.precision / g.prior_precision)[g.keep].double()
        undetermined += float((ratio < 1.05).sum())
        noise += 0.5 * float((1 - 1 / ratio).sum())
        if ratio.numel() > 1:
            spread += float(ratio.std() / ratio.mean()) * ratio.numel()
    removable = sum(float((d > 0).sum()) for d in score(posterior).values())
    undetermined, spread, removable = undetermined / alive, spread / alive, removable / alive
    found = []
    if undetermined > 0.5:
        found.append(
            f"{undetermined:.0%} of the weights are undetermined (posterior = prior): for them delta_f is no evidence. "
            "Train longer, use a wider prior, or rank by P mean^2 with a budget."
        )
    if spread < 0.02:
        found.append(
            f"the posterior precision hardly varies inside a layer (relative spread {spread:.1%}): delta_f is "
            "magnitude pruning here. Train the posterior longer or warm-start its precision."
        )
    if removable == 0.0:
        found.append("no weight has evidence for removal; a wider prior asks a stronger question, a budget forces one.")
    if posterior.temperature != 1.0:
        found.append(f"the posterior is tempered (T = {posterior.temperature:g}): its evidence is tempered evidence.")
    cost = noise * posterior.temperature / posterior.n_data
    return Diagnosis(undetermined, spread, removable, tuple(found), cost, nll)


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
            evidence: score of the current posterior.
            protected: parameter names from which nothing goes.
            progress: share of the planned rounds up to this one, 0..1 (1 = last).
        """


class LowestRule(Rule):
    """A rule that names candidates and how many of them go; the least salient do."""

    salience: Salience

    @abstractmethod
    def candidates(self, evidence: Evidence, protected: Collection[str] = ()) -> dict[str, Tensor]:
        """Which living weights may go, by parameter name, flat."""

    @abstractmethod
    def number(self, size: int, alive: int, candidates: int, progress: float = 1.0) -> int:
        """How many of the candidates go, of a posterior of `size` weights of which some are alive."""

    def decide(self, evidence: Evidence, protected: Collection[str] = (), progress: float = 1.0) -> dict[str, Tensor]:
        """Remove the least salient candidates, as many as the rule allows."""
        go, whole = self.candidates(evidence, protected), evidence.posterior
        found = sum(int(g.sum()) for g in go.values())
        count = self.number(whole.size(), whole.kept(), found, progress) if go else 0  # all is protected
        if count < found:
            go = smallest(self.salience(evidence), go, count)
        return {name: mask_without(whole[name].keep, gone) for name, gone in go.items()}


def mask_without(alive: Tensor, gone: Tensor) -> Tensor:
    """Mask of what stays when some of the living, flat, go."""
    return ~gone.view(alive.shape) if gone.numel() == alive.numel() else alive.masked_scatter(alive, ~gone)


@dataclass(frozen=True, slots=True)
class EvidenceRule(LowestRule):
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
        if math.isnan(self.log_odds):
            raise OckhamError(f"EvidenceRule: log_odds is ln P(keep)/P(remove) in nats, a number; got {self.log_odds}")

    def candidates(self, evidence: Evidence, protected: Collection[str] = ()) -> dict[str, Tensor]:
        """Where delta_f > log_odds."""
        return {n: d > self.log_odds for n, d in evidence.items() if n not in protected}

    def number(self, size: int, alive: int, candidates: int, progress: float = 1.0) -> int:
        """All of them, but at most a share ``cap`` of the living weights."""
        return _at_most(self.cap, alive, candidates)


@dataclass(frozen=True, slots=True)
class LearnedOddsRule(LowestRule):
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

    @property
    def salience(self) -> Salience:  # type: ignore[override]
        """Order inside a capped round."""
        return by_snr

    def number(self, size: int, alive: int, candidates: int, progress: float = 1.0) -> int:
        """All of them, but at most a share ``cap`` of the living weights."""
        return _at_most(self.cap, alive, candidates)

    def candidates(self, evidence: Evidence, protected: Collection[str] = ()) -> dict[str, Tensor]:
        """Where delta_f exceeds the learned log-odds of its tensor."""
        go = {}
        for name, delta in evidence.items():
            if name in protected or delta.numel() == 0:
                continue
            half = max(0.5 * self.strength * evidence.posterior[name].keep.numel(), 1.0)
            alive = torch.ones_like(delta, dtype=torch.bool)
            go[name] = delta > beta_log_odds(delta, alive, keep_count=half, remove_count=half).to(delta)
        return go


@dataclass(frozen=True, slots=True)
class BudgetRule(LowestRule):
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

    def candidates(self, evidence: Evidence, protected: Collection[str] = ()) -> dict[str, Tensor]:
        """All living weights."""
        return {n: torch.ones_like(d, dtype=torch.bool) for n, d in evidence.items() if n not in protected}

    def number(self, size: int, alive: int, candidates: int, progress: float = 1.0) -> int:
        """Down to this round's budget."""
        target = budget_count(self.keep, size)
        path = (1 - progress) ** self.gradual if self.gradual else 0.0
        excess = alive - max(target, round(target + (size - target) * path))
        if excess > candidates:
            raise OckhamError(
                f"the budget of {target} weights cannot be met: protected parameters alone hold {alive - candidates}; "
                "keep more, or protect less"
            )
        return max(0, excess)


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


def _at_most(cap: float, alive: int, candidates: int) -> int:
    return min(candidates, int(cap * alive) if cap < 1 else candidates)
