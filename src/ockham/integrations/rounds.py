"""Rounds of removal inside a training loop that counts steps and belongs to somebody else."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ockham.choose.rules import EvidenceRule, RoundInfo, Rounds, Rule, diagnose, evidence_falls, score
from ockham.core.network import Ignore, Processes, ignored
from ockham.errors import OckhamError, OckhamWarning
from ockham.fit.optimizer import VariationalOptimizer

__all__ = ["StepRounds", "variational"]


@dataclass(slots=True, eq=False)
class StepRounds:
    """Scores, decides and removes after certain steps of a loop.

    Attributes:
        rounds: schedule, as shares of all steps.
        rule: decides what goes; default the evidence.
        ignore: parameters to protect, as everywhere.
        history: account of every round; ``epoch`` counts steps.
        due: steps (from 1) after which there is a round, once `plan` knows how many steps there are.
    """

    rounds: Rounds = field(default_factory=lambda: Rounds(start=0.3, end=0.8, count=8))
    rule: Rule = field(default_factory=EvidenceRule)
    ignore: Ignore = ()
    history: list[RoundInfo] = field(default_factory=list)
    due: list[int] = field(default_factory=list)
    _protected: frozenset[str] = frozenset()

    def plan(self, model: nn.Module, steps: int) -> None:
        """Fix the steps after which there is a round.

        Args:
            model: the user's, whose parameters ``ignore`` names.
            steps: optimizer steps of the whole run.

        Raises:
            OckhamError: the number of steps is not known, or ``ignore`` names nothing.
        """
        if steps < 1:
            raise OckhamError(f"rounds are planned from the number of steps of the run: set it; got {steps}")
        self._protected, self.due = ignored(model, self.ignore), self.rounds.epochs(steps)

    def after_step(self, optimizer: VariationalOptimizer, step: int, loss: float) -> RoundInfo | None:
        """The round that is due after a step, if one is.

        Args:
            optimizer: holds the posterior, outside its `sampled` block.
            step: optimizer steps done so far.
            loss: recent mean NLL, nats, for the free energy; nan where it is not known.

        Returns:
            What the round did, or None.

        Raises:
            OckhamError: there are several processes and they hold different weights; nothing is removed then.
        """
        if step not in self.due:
            return None
        processes = Processes.world()
        processes.agree(p for group in optimizer.param_groups for p in group["params"])
        loss = float(processes.gathered(torch.tensor(loss, dtype=torch.float64)).mean())
        ended = isinstance(self.rule, EvidenceRule) and evidence_falls(self.history, self.rounds.patience)
        if ended or any(r.epoch >= step for r in self.history):
            return None
        evidence = score(optimizer.posterior())
        posterior = evidence.posterior
        if not self.history:
            for text in diagnose(posterior, loss).warnings:
                warnings.warn(text, OckhamWarning, stacklevel=3)
        keep = self.rule.decide(evidence, self._protected, (self.due.index(step) + 1) / len(self.due))
        keep = {name: processes.told(mask) for name, mask in keep.items()}
        gain, cost = evidence.gain(keep), evidence.nll_cost(keep)
        energy = -(posterior.n_data * loss + posterior.temperature * optimizer.kl())
        removed = optimizer.remove(keep)
        share = (posterior.kept() - removed) / max(1, posterior.size())
        self.history.append(RoundInfo(step, removed, share, gain, cost, energy))
        return self.history[-1]

    def state(self) -> dict[str, Any]:
        """Plain values from which `load` goes on."""
        return {"history": [_finite(asdict(r)) for r in self.history]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.history = []
        for saved in state["history"]:
            plain: dict[str, Any] = {k: math.nan if v is None else v for k, v in saved.items()}
            self.history.append(RoundInfo(**plain))


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def variational(optimizer: Any, owner: str) -> VariationalOptimizer:
    """The variational optimizer inside the wrappers that a loop puts around optimizers.

    Raises:
        OckhamError: there is none; says how to give one.
    """
    found = optimizer
    while not isinstance(found, VariationalOptimizer):
        inner = getattr(found, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer):
            raise OckhamError(
                f"{owner} needs a variational optimizer such as ockham.MeanField(model.named_parameters(), n_data=...)"
                f"; got {type(found).__name__}"
            )
        found = inner
    return found
