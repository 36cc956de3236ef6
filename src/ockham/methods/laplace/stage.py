"""One shot as a method of the engine: a Laplace posterior of given weights, one reduction, a short refit."""

from __future__ import annotations

import copy
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from ockham.choose.correlated import removed_in_rounds
from ockham.choose.planning import plan
from ockham.choose.prices import Structures
from ockham.choose.score import Diagnosis, diagnose
from ockham.core.likelihood import Regression
from ockham.core.modes import device_of, evaluating, seeded
from ockham.core.names import Ignore, ignored
from ockham.core.objective import fit_noise
from ockham.core.posterior import POINT, Gaussian, Posterior
from ockham.errors import OckhamWarning
from ockham.fit.point import PointEstimate
from ockham.fit.predict import refresh_batchnorm
from ockham.methods.laplace.one_shot import compensated, laplace_of, unscored, with_means
from ockham.run.compression import structures_name
from ockham.run.engine import Compressed, Method, Task
from ockham.run.structures import example_of
from ockham.run.trainer import EpochInfo, RunState
from ockham.surgery import Plan, shrink, trace

__all__ = ["OneShot", "OneShotReduction"]


@dataclass(frozen=True, slots=True)
class OneShot:
    """Settings of a job that prunes a trained network once.

    Attributes:
        structure: kind of the Laplace posterior, "diagonal" or "kronecker".
        keep: share of the scored weights that stays; None: the evidence decides.
        epochs: number of epochs of refitting, 0 for none.
        learning_rate: rate of refitting.
        structures: price and widths of whole units that go instead of single weights; None: single weights.
        macs: share of the multiply-accumulates that stays, with structures; None: the evidence decides.
        prior_variance: variance of the prior over every weight; None: fitted (see `ockham.laplace`).
    """

    structure: str
    keep: float | None = None
    epochs: int = 0
    learning_rate: float = 3e-4
    structures: Structures | None = None
    macs: float | None = None
    prior_variance: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """State of a reduction in one shot."""

    task: Task
    scored: int  # weights of the posterior before
    small: Posterior
    diagnosis: Diagnosis
    plan: Plan | None


@dataclass(frozen=True, slots=True, eq=False)
class OneShotReduction(Method):
    """Laplace posterior of a trained network, reduction, and refitting of the survivors by Adam.

    The result is a point: its stored posterior has the means and masks only, and predictions are those of the network.
    (Draws from a Laplace posterior of a whole network predict worse than its mean.)

    Attributes:
        shot: posterior, budget, refit.
        ignore: parameters to protect.
    """

    shot: OneShot
    ignore: Ignore = ()
    stage = "prune"

    @property
    def name(self) -> str:
        """The posterior, as the command calls it."""
        return "kronecker" if self.shot.structure == "kronecker" else "laplace"

    @property
    def shuffle(self) -> bool:  # type: ignore[override]
        """Only a refit needs the examples in a new order every epoch."""
        return bool(self.shot.epochs)

    def start(self, network: nn.Module, task: Task) -> RunState:
        """Posterior and reduction; what is left is what the refit starts from."""
        s = self.shot
        prior = None if s.prior_variance is None else 1 / s.prior_variance
        posterior = laplace_of(network, task.loader, task.objective, structure=s.structure, prior=prior)
        found = diagnose(posterior)
        if found.warnings:
            warnings.warn(" ".join(found.warnings), OckhamWarning, stacklevel=2)
        chosen = None
        if s.structures is None:
            small = removed_in_rounds(posterior, s.keep, unscored(network, self.ignore))
            model = with_means(network, small)
        else:
            example = example_of(task.loader, task.objective, device_of(network))
            groups = trace(network.eval(), example, ignore=tuple(sorted(ignored(network, self.ignore))))
            budget = None if s.macs is None else {"macs": f"{100 * s.macs}%"}
            options: dict[str, Any] = {"price": s.structures.price, "round_to": s.structures.round_to, "budget": budget}
            chosen = plan(groups, posterior, model=network, example_inputs=example, **options)
            moved = compensated(network, posterior, groups, chosen)
            model, cut = shrink(with_means(network, moved), chosen, posterior=moved)
            small = Posterior(cut, posterior.n_data, posterior.temperature, posterior.source)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        optimizer = PointEstimate(named, n_data=task.n_data, lr=s.learning_rate)
        optimizer.remove({n: g.keep for n, g in small.items()})
        state = RunState.start(model, task.objective, optimizer, _Run(task, posterior.size(), small, found, chosen))
        if s.epochs:
            return state
        info = EpochInfo(1, *_looked_at(state), kept_share=small.kept() / posterior.size(), epochs=1, stage=self.stage)
        return replace(state, history=(info,))

    def after_epoch(self, state: RunState, info: EpochInfo) -> tuple[RunState, EpochInfo]:
        """Nothing goes after the one shot."""
        return state, replace(info, kept_share=state.own.small.kept() / state.own.scored)

    def settings(self) -> dict[str, Any]:
        """Plain values, for the record."""
        s = self.shot
        own = asdict(replace(s, structures=None)) | {"structures": structures_name(s.structures)}
        own |= {"keep_share": own.pop("keep")}
        return {"one_shot": own.pop("structure"), "ignore": repr(self.ignore), **own}

    def result(self, state: RunState) -> Compressed:
        """Network, point posterior and plan."""
        own, model = state.own, state.network
        if self.shot.epochs:
            refresh_batchnorm(model, own.task.loader, batch=own.task.objective.batch)
        if isinstance(state.likelihood, Regression):
            fit_noise(model, own.task.loader, own.task.objective)
        values = {n: p.detach().clone() for n, p in model.named_parameters()}
        moments: dict[str, Gaussian] = {}
        for name, g in own.small.items():
            prior = g.prior_precision.expand(g.mean.shape).masked_fill(~g.keep, torch.inf)
            moments[name] = replace(g, mean=values[name], precision=prior, marginal_precision=None)
        point = Posterior(moments, own.small.n_data, 1.0, POINT)
        whole: dict[str, Any] = {"plan": own.plan, "parameters": own.task.parameters}
        model, point = own.task.objective.finished(copy.deepcopy(model), point)
        return Compressed(model.eval(), point, (), state.history, own.diagnosis, point.noise_variance, **whole)


@torch.no_grad()
def _looked_at(state: RunState) -> tuple[float, float]:
    """Mean NLL and accuracy of the reduced network on the training data."""
    objective, losses, right, terms, count = state.objective, 0.0, 0.0, 0.0, 0
    with evaluating(state.network) as device, seeded(0, 0, device):
        for batch in objective.batches(state.own.task.loader, device):
            nll, output = objective.loss(state.network, batch)
            here = objective.terms(batch)
            losses, terms = losses + float(nll) * here, terms + here
            right, count = right + float(objective.right(output, batch)) * batch.size, count + batch.size
    return losses / max(1.0, terms), right / max(1, count)
