"""Rounds of removal inside a training loop that counts steps and belongs to somebody else."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ockham.choose.prices import Structures
from ockham.choose.rules import EvidenceRule, RoundInfo, Rounds, Rule, counted, diagnose, evidence_falls, score
from ockham.core.likelihood import Classification
from ockham.core.network import Ignore, ignored, protected_names, unwrapped
from ockham.core.objective import Objective
from ockham.core.posterior import Posterior
from ockham.core.processes import Processes
from ockham.errors import OckhamError, OckhamWarning
from ockham.fit.optimizer import VariationalOptimizer
from ockham.run.compression import SMALL_DATA, decided
from ockham.run.structures import Shrinking, Shrunk, example_of

__all__ = ["StepRounds", "variational"]

_MOVED = 0.4  # root mean square of ln(std / initial_std) below which the spread is that of the start


@dataclass(slots=True, eq=False)
class StepRounds:
    """Scores, decides and removes after certain steps of a loop.

    Attributes:
        rounds: schedule, as shares of all steps.
        rule: decides what goes; default the evidence.
        ignore: parameters to protect, as everywhere.
        structures: how whole units go, too; None: single weights only.
        history: account of every round; ``epoch`` counts steps.
        due: steps (from 1) after which there is a round, once `plan` knows how many steps there are.
        shrunk: knowledge of the structures that went; None without structures.
    """

    rounds: Rounds = field(default_factory=lambda: Rounds(start=0.3, end=0.8, count=8))
    rule: Rule = field(default_factory=EvidenceRule)
    ignore: Ignore = ()
    structures: Structures | None = None
    history: list[RoundInfo] = field(default_factory=list)
    due: list[int] = field(default_factory=list)
    shrunk: Shrunk | None = None
    _protected: frozenset[str] = frozenset()
    _shrinking: Shrinking | None = None
    _total: int = 0

    def __post_init__(self) -> None:
        """Look at the types, so that a wrong one is found before anything is trained.

        Raises:
            OckhamError: rounds, rule or structures are something else.
        """
        given = (("rounds", self.rounds, Rounds, "Rounds()"), ("rule", self.rule, Rule, "EvidenceRule()"))
        for name, value, kind, example in (*given, ("structures", self.structures, Structures, "Structures()")):
            if not isinstance(value, kind) and (name, value) != ("structures", None):
                raise OckhamError(f"EvidenceCallback: {name} must be such as ockham.{example}; got {value!r}")

    def plan(
        self,
        model: nn.Module,
        steps: int,
        loader: Any = None,
        *,
        optimizer: VariationalOptimizer | None = None,
        anew: bool = False,
    ) -> None:
        """Fix the steps after which there is a round.

        Args:
            model: the user's, whose parameters ``ignore`` names.
            steps: optimizer steps of the whole run.
            loader: loader of the training data; with structures its first batch is the example for tracing.
            optimizer: optimizer of the run, whose parameters are compared with the model's; None compares nothing.
            anew: flag, True: the rounds of an earlier run are forgotten.

        Raises:
            OckhamError: the number of steps is not known, the optimizer is of another model, ``ignore`` names nothing,
                or structures cannot go in place.
            TraceError: structures are to go and the network cannot be traced.
        """
        if steps < 1:
            raise OckhamError(
                f"rounds are planned from the number of steps of the run: set max_steps, or epochs; got {steps}"
            )
        mine = {id(p) for p in model.parameters()}
        groups = [] if optimizer is None else optimizer.param_groups
        if groups and not any(id(p) in mine for group in groups for p in group["params"]):
            raise OckhamError(
                "the optimizer holds no parameter of the model that is trained: build it from the named_parameters() "
                "of that model, after the model was replaced or moved"
            )
        if anew:
            self.history, self._total = [], 0
        self._protected, self.due = protected_names(model, self.ignore), self.rounds.epochs(steps)
        if self.structures is None:
            return
        if Processes.world().count > 1 or unwrapped(model)[0] is not model:
            raise OckhamError(
                "structures change the network in place, which a wrapper around it does not see: train in one process, "
                "or use ockham.compress(DistributedDataParallel(model), ...), which takes them out in several"
            )
        inputs = example_of(loader, Objective(Classification()), model)
        self._shrinking = Shrinking(self.structures, inputs, tuple(sorted(ignored(model, self.ignore))))
        self.shrunk = self._shrinking.start(model)
        self.rule = counted(self.rule, sum(p.numel() for p in model.parameters() if p.requires_grad))

    def after_step(
        self, optimizer: VariationalOptimizer, step: int, loss: float, model: nn.Module | None = None
    ) -> RoundInfo | None:
        """The round that is due after a step, if one is; with structures network and optimizer shrink in place.

        Args:
            optimizer: holds the posterior, outside its `sampled` block.
            step: optimizer steps done so far.
            loss: recent mean NLL, nats, for the free energy; nan where it is not known.
            model: the network in training, needed with structures.

        Returns:
            What the round did, or None.

        Raises:
            OckhamError: there are several processes and they hold different weights; nothing is removed then.
        """
        if step not in self.due:
            return None
        processes, posterior = Processes.world(), optimizer.posterior()
        processes.agree(t for g in posterior.values() for t in (g.mean, g.precision))
        loss = float(processes.gathered(torch.tensor(loss, dtype=torch.float64)).mean())
        ended = isinstance(self.rule, EvidenceRule) and evidence_falls(self.history, self.rounds.patience)
        if ended or any(r.epoch >= step for r in self.history):
            return None
        evidence = score(posterior)
        if not self.history:
            said = [*diagnose(posterior, loss).warnings, *_unmoved(optimizer, posterior)]
            if isinstance(self.rule, EvidenceRule) and posterior.temperature == 1 and posterior.n_data < SMALL_DATA:
                said.append(
                    f"N = {posterior.n_data:g} data stand against {posterior.size()} weights: at temperature 1 the "
                    "evidence may empty whole layers. Give the optimizer temperature=0.1, as the command does for "
                    f"less than {SMALL_DATA} examples, or a budget: rule=ockham.BudgetRule(0.5)"
                )
            for text in said:
                warnings.warn(text, OckhamWarning, stacklevel=3)
        keep = decided(self.rule, evidence, self._protected, (self.due.index(step) + 1) / len(self.due))
        keep = {name: processes.told(mask) for name, mask in keep.items()}
        gain, cost = evidence.gain(keep), evidence.nll_cost(keep)
        energy = -(posterior.n_data * loss + posterior.temperature * optimizer.kl())
        if self.shrunk is not None:
            self.shrunk = replace(self.shrunk, ledger=self.shrunk.ledger.entered(evidence, keep))
        removed, self._total = optimizer.remove(keep), self._total or posterior.size()
        if self._shrinking is not None and len(self.history) >= self._shrinking.rule.wait:
            assert self.shrunk is not None and model is not None
            self.shrunk, small, carried = self._shrinking.shrink(self.shrunk, model, optimizer, step)
            if small is not model:  # whoever holds the network or the optimizer holds the smaller one then
                own = {k: v for k, v in vars(model).items() if k in ("forward", "_original_forward")}
                vars(model).update({**vars(small), **own})
                vars(optimizer).update(vars(carried))
        share = optimizer.posterior().kept() / max(1, self._total)
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


def _unmoved(optimizer: VariationalOptimizer, posterior: Posterior) -> Iterator[str]:
    """What to say of standard deviations that are still those of the start when the first weights go."""
    for group in (g for g in optimizer.param_groups if "std_rate" in g):
        stds = [posterior[n].std[posterior[n].keep].double() for n in group["param_names"] if n in posterior]
        moved = float((torch.cat(stds or [torch.ones(0)]) / group["initial_std"]).log().square().mean().sqrt())
        if moved < _MOVED:
            yield (
                f"the standard deviations moved by a factor of {math.exp(moved):.2f} from initial_std="
                f"{group['initial_std']:g} before the first round: the evidence judges the start and not the data. "
                "They move by lr * std_rate a step at most: give the optimizer initial_std=1e-3 and a std_rate of 3 to "
                "10, or train longer"
            )
            return


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
