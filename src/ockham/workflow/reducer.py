"""Rounds of removal beside a training run: score, decide, remove, and say what happened."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from ockham.errors import OckhamError, OckhamWarning
from ockham.posterior.posterior import Posterior
from ockham.posterior.spike_slab import SpikeSlab
from ockham.posterior.variational import VariationalOptimizer
from ockham.reduction.diagnose import Diagnosis, diagnose
from ockham.reduction.rounds import RoundInfo, Rounds, evidence_falls
from ockham.reduction.rule import BudgetRule, EvidenceRule, Rule
from ockham.reduction.score import Evidence, score
from ockham.reduction.structures import Ledger

__all__ = ["Ignore", "Reducer", "protected_names"]

Ignore = Sequence[str | type[nn.Module]]
"""Parameters to protect: names, "re:" patterns on names, module names, or module types."""


class Reducer:
    """Removes weights after the epochs that `Rounds` names.

    Args:
        optimizer: holds the posterior and removes for good.
        rule: decides what goes.
        rounds: when.
        epochs: of the whole run.
        protected: names of parameters from which nothing goes.
    """

    def __init__(
        self,
        optimizer: VariationalOptimizer,
        *,
        rule: Rule,
        rounds: Rounds,
        epochs: int,
        protected: frozenset[str] = frozenset(),
    ) -> None:
        self.optimizer, self.rule, self.rounds, self.protected = optimizer, rule, rounds, protected
        self.plan = rounds.epochs(epochs)
        self.history: list[RoundInfo] = []
        self.diagnosis: Diagnosis | None = None
        self.histograms: list[dict[str, Any]] = []
        self.ledger: Ledger | None = None
        self.seen: Callable[[Posterior], Posterior] = lambda posterior: posterior
        self._total: int | None = None

    def after_epoch(self, epoch: int, loss: float) -> RoundInfo | None:
        """Do the round that is due after this epoch, if one is.

        Args:
            epoch: from 1.
            loss: mean NLL of the epoch, for the free energy.

        Returns:
            What the round did, or None.
        """
        if epoch not in self.plan or self.ended():
            return None
        evidence = score(self.seen(self.optimizer.posterior()))
        if self.diagnosis is None:
            self.diagnosis = diagnose(evidence.posterior, loss)
            for text in self.diagnosis.warnings:
                warnings.warn(text, OckhamWarning, stacklevel=3)
        self.history.append(self._round(evidence, epoch, loss))
        return self.history[-1]

    def ended(self) -> bool:
        """True when the evidence has stopped rising; a budget goes on to its end."""
        return isinstance(self.rule, EvidenceRule) and evidence_falls(self.history, self.rounds.patience)

    def state(self) -> dict[str, Any]:
        """History and diagnosis, plain values."""
        diagnosis = asdict(self.diagnosis) if self.diagnosis else None
        history = [asdict(r) for r in self.history]
        return {"history": history, "diagnosis": diagnosis, "histograms": self.histograms, "total": self._total}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.history = [RoundInfo(**r) for r in state["history"]]
        found = state["diagnosis"]
        self.diagnosis = Diagnosis(**{**found, "warnings": tuple(found["warnings"])}) if found else None
        self.histograms = list(state["histograms"])
        self._total = state["total"]

    def _round(self, evidence: Evidence, epoch: int, loss: float) -> RoundInfo:
        posterior = evidence.posterior
        progress = (self.plan.index(epoch) + 1) / len(self.plan)
        self._total = self._total or posterior.size()
        keep = self._decide(evidence, progress)
        if self.ledger is not None:
            self.ledger.enter(evidence, keep)
        gain, cost = evidence.gain(keep), evidence.nll_cost(keep)
        self.histograms.append({"epoch": epoch, "delta_f": _histogram(evidence)})
        kl = self.optimizer.kl() if isinstance(self.optimizer, SpikeSlab) else self._kl_before(evidence)
        removed = self.optimizer.remove(keep)
        _warn_emptied(keep)
        energy = -(posterior.n_data * loss + posterior.temperature * kl)
        share = (posterior.kept() - removed) / self._total
        return RoundInfo(epoch, removed, share, gain, cost, energy)

    def _decide(self, evidence: Evidence, progress: float) -> dict[str, Tensor]:
        """The rule's keep masks; a budget in weights that structures have met already removes none."""
        limit = self.rule.keep if isinstance(self.rule, BudgetRule) else 0
        if limit > 1 and limit >= evidence.posterior.kept():
            return {name: g.keep.clone() for name, g in evidence.posterior.items()}
        return self.rule.decide(evidence, self.protected, progress)

    @staticmethod
    def _kl_before(evidence: Evidence) -> float:
        return sum(_kl(evidence, name) for name in evidence)


def _kl(evidence: Evidence, name: str) -> float:
    g = evidence.posterior[name]
    p0, p = g.prior_precision.expand(g.mean.shape)[g.keep].double(), g.precision[g.keep].double()
    away = (g.mean - g.prior_mean)[g.keep].double()
    return float((0.5 * p0 * (1 / p + away.square()) - 0.5 + 0.5 * (p / p0).log()).sum())


def _histogram(evidence: Evidence) -> list[int]:
    """Counts of delta_f in 60 bins over [-25, 5] nats, outliers in the end bins."""
    counts = None
    for delta in evidence.values():
        part = delta.float().clamp(-24.999, 4.999).histc(60, -25, 5)
        counts = part if counts is None else counts + part
    return [] if counts is None else [int(c) for c in counts]


def _warn_emptied(keep: dict[str, Tensor]) -> None:
    for name, mask in keep.items():
        if mask.ndim >= 2 and not bool(mask.any()):
            warnings.warn(
                f"every weight of {name!r} was removed: what passes through it is now a constant. If that is not "
                f"wanted, protect it with ignore=[{name!r}] or use a wider prior",
                OckhamWarning,
                stacklevel=5,
            )


def protected_names(model: nn.Module, ignore: Ignore) -> frozenset[str]:
    """Parameter names that ``ignore`` covers.

    Raises:
        OckhamError: an entry matches nothing, or a pattern is not a regular expression.
    """
    names = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for entry in ignore:
        matches = {n for n in names if _predicate(model, entry)(n)}
        if not matches:
            raise OckhamError(f"ignore entry {entry!r} matches no parameter; there are {', '.join(names[:8])}, ...")
        found |= matches
    return frozenset(found)


def _predicate(model: nn.Module, entry: str | type[nn.Module]) -> Callable[[str], bool]:
    if isinstance(entry, type):
        owners = [m for m, module in model.named_modules() if isinstance(module, entry)]
        return lambda name: any(name.rpartition(".")[0] == o for o in owners)
    if entry.startswith("re:"):
        try:
            pattern = re.compile(entry[3:])
        except re.error as error:
            raise OckhamError(f"ignore pattern {entry!r} is not a regular expression: {error}") from error
        return lambda name: pattern.search(name) is not None
    return lambda name: name == entry or name.startswith(entry + ".")
