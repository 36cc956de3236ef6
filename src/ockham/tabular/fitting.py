"""Fitting a sparse network to a table: restarts, removal, refitting, evidence; its noise; draws that predict."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ockham.core.posterior import Posterior
from ockham.tabular.draws import Draws, factorised
from ockham.tabular.inference import Inference
from ockham.tabular.joint import ClassJoint, Joint, NoiseJoint
from ockham.tabular.likelihoods import Classes, EqualNoise, Likelihood
from ockham.tabular.noise import Noise, fit_noise
from ockham.tabular.running import OnStep, Plan, Run, Table, initial
from ockham.tabular.trimming import input_evidence, median_keep, reduced, without_input

__all__ = ["Fitted", "Predictive", "fit", "predictive"]

_FIRST_VARIANCE = 0.25
_MOST_WORK = 4_000_000  # rows times (overhead + living weights): a minute or so of chain
_OVERHEAD = 50
_RESIDUAL_DRAWS = 64
_MOST_WEIGHTS = 1500


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A network that lives on: posterior over one network of its layout, noise, and how it went.

    Attributes:
        posterior: with inclusion; removed weights are gone.
        before: the posterior before anything was removed; what inclusion is read from.
        settled: the posterior of what stayed, refitted; its median model is the network that lives on.
        whole: the inference before anything was removed; where a warm start begins.
        noise_variance: of the standardised target, as if it were the same everywhere; of no meaning for classes.
        log_odds: prior log-odds of inclusion by tensor name, as learned.
        by_input: input to the full-covariance evidence of its weights, nats; of those that it sent away, too.
        evidence: ELBO in nats at the checks, of the network that lived on.
        restarts: ELBO of each restart when one was chosen.
        steps: taken in all.
    """

    posterior: Posterior
    before: Posterior
    settled: Posterior
    whole: Inference
    noise_variance: float
    log_odds: dict[str, float]
    by_input: dict[int, float]
    evidence: tuple[float, ...]
    restarts: tuple[float, ...]
    steps: int


def fit(table: Table, plan: Plan, *, start: Fitted | None = None, on_step: OnStep | None = None) -> Fitted:
    """Fit, choose, remove, refit.

    The KL warms up over the first 40 % of the steps with all restarts side by side; the best two by evidence go on
    alone, at a falling learning rate; at 80 % everything below one half goes and the rest settles. The better of the
    two reduced networks, again by evidence, is the result: before the removal it does not tell them apart well.

    Args:
        table: the data.
        plan: settings.
        start: go on from here with one network and no warm-up.
        on_step: called every 50 steps.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite.
    """
    if start is not None:
        variance = torch.tensor([start.noise_variance])
        return _finished(Run(table, plan, start.whole.only(0), _likelihood(plan, variance)), start.restarts, on_step)
    first = _likelihood(plan, torch.full((plan.restarts,), _FIRST_VARIANCE))
    crowd = Run(table, plan, initial(table, plan), first)
    final = [_finished(alone, crowd.scores, on_step) for alone in crowd.finalists(on_step)]
    return max(final, key=lambda fitted: fitted.evidence[-1])


def _finished(alone: Run, restarts: tuple[float, ...], on_step: OnStep | None) -> Fitted:
    """One network on its own: the rest of its training, removal, refitting, evidence."""
    alone.go(0.5, 0.8, warm=False, on_step=on_step)
    whole = alone.inference.only(0)
    before, settled = reduced(alone, on_step)
    history = tuple(alone.history)
    alone, by_input = _trimmed(alone, on_step)
    evidence = (*history, float(alone.elbo()[0]))
    return Fitted(
        posterior=alone.inference.posterior(),
        before=before,
        settled=settled,
        whole=whole,
        noise_variance=_variance(alone) or _FIRST_VARIANCE,
        log_odds=alone.inference.log_odds(),
        by_input=by_input,
        evidence=evidence,
        restarts=restarts,
        steps=alone.inference.steps,
    )


def _likelihood(plan: Plan, variance: Tensor) -> Likelihood:
    return Classes() if plan.classify else EqualNoise(variance)


def _variance(run: Run) -> float | None:
    return float(run.likelihood.variance[0]) if isinstance(run.likelihood, EqualNoise) else None


def _trimmed(full: Run, on_step: OnStep | None) -> tuple[Run, dict[int, float]]:
    """The run without the inputs that the full covariance sends away, unless its evidence is the worse for it."""
    trial, before = full.alone(0), float(full.elbo()[0])
    by_input = _without(trial)
    if not by_input or min(by_input.values()) >= 0:
        return full, by_input
    trial.go(0.9, 1.0, warm=False, on_step=on_step)
    trial.remove(median_keep(trial.inference.posterior()))
    if float(trial.elbo()[0]) < before:
        return full, {j: abs(nats) for j, nats in by_input.items()}
    return trial, by_input


def _without(run: Run) -> dict[int, float]:
    """Take out inputs whose weights together have no evidence, one by one.

    Returns:
        Evidence of every input that was there, nats; of those sent away, when they went.
    """
    gone: dict[int, float] = {}
    table, variance = run.table, _variance(run)
    precision = None if variance is None else torch.full_like(table.weight, 1 / variance)
    while True:
        posterior = run.inference.posterior()
        found = input_evidence(posterior, table.x, table.weight, run.inference.log_odds(), precision)
        if not found or min(found.values()) >= 0:
            return {**found, **gone}
        worst = min(found, key=found.__getitem__)
        gone[worst] = found[worst]
        keep = {n: g.keep.clone() for n, g in posterior.items()}
        for name in run.inference.layout.readers:
            keep[name][..., worst] = False
        run.remove(keep)
        run.remove(median_keep(run.inference.posterior()))


@dataclass(frozen=True, slots=True, eq=False)
class Predictive:
    """What predicts.

    Attributes:
        posterior: over the network of the mean, after the last word on its inputs.
        by_input: input to its evidence as far as any is known, nats; of those sent away, too.
        noise: of a regression.
        draws: networks, and noise with them.
    """

    posterior: Posterior
    by_input: dict[int, float]
    noise: Noise | None
    draws: Draws


def predictive(fitted: Fitted, table: Table, plan: Plan, draws: int) -> Predictive:
    """Draw all that lives, jointly; of a regression fit the noise to the residuals first.

    With a noise that is not the same everywhere some inputs of the mean may turn out to have explained noise: those
    whose weights together have no evidence under it go, the worst first, the rest settles in between. Where rows times
    (50 + weights) exceed four million the posterior is narrow and the work large: weights are then drawn independently.

    Args:
        fitted: the network.
        table: the data it was fitted to.
        plan: its settings.
        draws: networks that a prediction averages.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    posterior, by_input, noise = fitted.posterior, dict(fitted.by_input), None
    if not plan.classify:
        before = factorised(posterior, None, _RESIDUAL_DRAWS, generator)
        outputs = torch.cat(list(before.outputs(table.x.double())), 1)[..., 0]
        noise = fit_noise(table, plan, outputs, fitted.noise_variance)
    living = posterior.kept() + (0 if noise is None else noise.posterior.kept())
    if not 0 < living <= _MOST_WEIGHTS:
        return Predictive(posterior, by_input, noise, factorised(posterior, noise, draws, generator))
    if noise is None:
        joint: Joint = ClassJoint(posterior, table)
    else:
        posterior, found, joint = _last_word(fitted, noise, table)
        by_input |= found
    if len(table.x) * (_OVERHEAD + living) > _MOST_WORK:
        return Predictive(posterior, by_input, noise, factorised(posterior, noise, draws, generator))
    return Predictive(posterior, by_input, noise, joint.sample(draws, generator))


def _last_word(fitted: Fitted, noise: Noise, table: Table) -> tuple[Posterior, dict[int, float], Joint]:
    """The posterior without inputs that have no evidence under the noise, evidence of all, the joint of what stays."""
    by_input: dict[int, float] = {}
    posterior, joint = fitted.posterior, NoiseJoint(fitted.posterior, noise, table)
    mode = joint.mode()
    while True:
        moved, precision = joint.moved(posterior, mode), joint.precision(mode)
        found = input_evidence(moved, table.x, table.weight, fitted.log_odds, precision)
        by_input |= found
        if not found or min(found.values()) >= 0:
            return posterior, by_input, joint
        worst = min(found, key=found.__getitem__)
        smaller = without_input(posterior, worst)
        trial = NoiseJoint(smaller, noise, table)
        there = trial.mode()
        before = joint.evidence(mode) + _belief(posterior, fitted.log_odds)
        if trial.evidence(there) + _belief(smaller, fitted.log_odds) < before:
            return posterior, by_input | {j: abs(nats) for j, nats in found.items()}, joint
        posterior, joint, mode = smaller, trial, there


def _belief(posterior: Posterior, log_odds: dict[str, float]) -> float:
    """Ln of the prior probability of what lives, nats, up to a constant."""
    return sum(log_odds[name] * int(g.keep.sum()) for name, g in posterior.items())
