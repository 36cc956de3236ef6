"""From options to a job: network, data, weights, rule, by name. The only place where a string chooses an algorithm."""

from __future__ import annotations

import copy
import importlib
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import singledispatch
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ockham.choose.prices import FlatPrice, Structures
from ockham.choose.rules import BudgetRule, EvidenceRule, LearnedOddsRule, Rounds, Rule
from ockham.choose.score import by_delta_f, by_magnitude, by_random, by_snr
from ockham.cli.options import (
    Common,
    EvidenceOptions,
    GateOptions,
    OneShotOptions,
    SpikeSlabOptions,
    options_of,
    parse_device,
)
from ockham.core.likelihood import likelihood_from
from ockham.core.posterior import Posterior
from ockham.errors import DataError, OckhamError
from ockham.fit.priors import FixedPrior
from ockham.methods.gates.attach import GATE_RULES, Gates
from ockham.methods.gates.curve import compression_curve, curves_as_plain
from ockham.methods.gates.report import gate_sections
from ockham.methods.gates.training import (
    Decision,
    GateRounds,
    GateTraining,
    ParameterBudget,
    Tempered,
    by_threshold,
    gate_sensitivity,
    true_elbo,
)
from ockham.methods.laplace.stage import OneShot, OneShotReduction
from ockham.methods.spike_slab.inclusion import MedianRule
from ockham.methods.spike_slab.optimizer import spike_slab
from ockham.methods.spike_slab.priors import FixedSpikeSlab
from ockham.report.html import write_report
from ockham.run.compression import WeightRounds
from ockham.run.estimators import SMALL_DATA, Estimator, Training, defaults_for, ivon, mean_field, point_estimate
from ockham.run.job import Job, Recipe
from ockham.run.measure import mean_predictor, measures
from ockham.run.trainer import RunState
from ockham.run.weights import huggingface_model, read_weights
from ockham.zoo.data import Dataset, Normalize, digits, load_folder
from ockham.zoo.networks import NETWORKS, suggest

__all__ = ["build_job", "load_data", "load_model"]

T = TypeVar("T")

ESTIMATORS: dict[str, Estimator] = {"mean-field": mean_field, "ivon": ivon, "map": point_estimate}

LAPLACE = {"laplace": "diagonal", "kronecker": "kronecker"}  # posteriors of given weights, and their structure

BUDGET_RULES: dict[str, Callable[[float, int], Rule]] = {
    "snr": lambda keep, seed: BudgetRule(keep, by_snr),
    "gradual-snr": lambda keep, seed: BudgetRule(keep, by_snr, gradual=3.0),
    "delta-f": lambda keep, seed: BudgetRule(keep, by_delta_f),
    "magnitude": lambda keep, seed: BudgetRule(keep, by_magnitude),
    "gradual-magnitude": lambda keep, seed: BudgetRule(keep, by_magnitude, gradual=3.0),
    "random": lambda keep, seed: BudgetRule(keep, by_random(seed)),
}

EVIDENCE_RULES: dict[str, Rule] = {"evidence": EvidenceRule(), "learned-odds": LearnedOddsRule()}

_SLAB_ROUNDS = Rounds(start=0.5, end=0.9, count=5)


def build_job(given: Common | Mapping[str, Any], command: str) -> Job:
    """Everything that the options name, checked.

    Args:
        given: options of a method, or what the user gave by name.
        command: line as typed, for the record.

    Raises:
        OckhamError: a name is unknown, a file unreadable, settings contradict each other.
    """
    o = given if isinstance(given, Common) else options_of(given)
    if o.out is None:
        raise OckhamError("--out FOLDER is needed: where shall the result go?")
    if o.learning_rate is not None and not 0 < o.learning_rate < math.inf:
        raise OckhamError(f"--learning-rate must be positive; got {o.learning_rate}")
    if isinstance(o, OneShotOptions) and o.weights is None:
        raise OckhamError(f"--posterior {o.posterior} needs a trained network: add --weights file.safetensors")
    weights = None if o.weights is None else read_weights(o.weights, max_bytes=o.max_bytes)
    reading = {"target": o.target, "normalize": _normalize(o.normalize), "max_bytes": o.max_bytes}
    data, device = load_data(o.data, **reading), parse_device(o.device)
    builder, build = load_model(o.model, data)
    if o.threads is None and len(data.train_x) < SMALL_DATA:
        torch.set_num_threads(1)  # small steps: threads would wait for each other longer than they work
    name = o.likelihood or ("regression" if data.train_y.is_floating_point() else "classification")
    likelihood_from(name)
    training, _, batch_size = defaults_for(len(data.train_x))
    changed = _changed(epochs=o.epochs, learning_rate=o.learning_rate, seed=o.seed)
    recipe = Recipe(
        build=build,
        likelihood=lambda: likelihood_from(name),
        data=data,
        batch_size=o.batch_size or batch_size,
        method=WeightRounds(replace(training, **changed), ignore=o.ignore),
        epochs=o.epochs or training.epochs,
        hold=training.hold,
        seed=o.seed,
        device=device,
    )
    return Job(
        _with_method(o, recipe),
        Path(o.out),
        builder,
        command=command,
        weights=weights,
        baseline=o.baseline,
        draws=o.draws,
        ood=None if o.ood is None else load_data(o.ood).test_x,
        resume=o.resume,
        overwrite=o.overwrite,
        report=lambda folder: write_report(folder, gate_sections),
    )


@singledispatch
def _with_method(o: Common, recipe: Recipe) -> Recipe:
    """The recipe with the method that the options are of."""
    raise TypeError(type(o))


@_with_method.register
def _(o: EvidenceOptions, recipe: Recipe) -> Recipe:
    usual = _training(recipe)
    prior = None if o.prior_variance is None else FixedPrior(o.prior_variance)
    training = replace(usual, **_changed(prior=prior, temperature=o.temperature))
    rounds = _rounds(o, defaults_for(len(recipe.data.train_x))[1])
    estimator, rule = _pick("--posterior", o.posterior, ESTIMATORS), _rule(o)
    return replace(recipe, method=WeightRounds(training, rule, rounds, o.ignore, estimator, _structures(o)))


@_with_method.register
def _(o: SpikeSlabOptions, recipe: Recipe) -> Recipe:
    """Inclusion probabilities: their prior, the median model or a budget, later and fewer rounds."""
    variance = 1.0 if o.prior_variance is None else FixedPrior(o.prior_variance).variance
    odds = math.log(0.1 / 0.9) if o.log_odds is None else o.log_odds  # not learned: docs/decisions.md
    if not abs(odds) < 30:
        raise OckhamError(f"--log-odds is ln p/(1-p) of the prior inclusion, within 30 nats; got {odds}")
    prior = FixedSpikeSlab(inclusion=1 / (1 + math.exp(-odds)), slab_variance=variance)
    training = replace(_training(recipe), **_changed(prior=prior, temperature=o.temperature))
    if o.keep_share is not None and o.log_odds is not None:
        raise OckhamError("--log-odds is the prior of the median model, --keep-share a budget: drop one of them")
    if o.keep_share is None and o.rule != "evidence":
        raise OckhamError(f"--method spike-slab keeps the median model or a --keep-share: drop --rule {o.rule}")
    order = "snr" if o.rule == "evidence" else o.rule
    rule = MedianRule() if o.keep_share is None else _pick("--rule", order, BUDGET_RULES)(o.keep_share, o.seed)
    rounds = _rounds(o, _SLAB_ROUNDS)
    return replace(recipe, method=WeightRounds(training, rule, rounds, o.ignore, spike_slab, _structures(o)))


@_with_method.register
def _(o: OneShotOptions, recipe: Recipe) -> Recipe:
    owner = f"--posterior {o.posterior}"
    structure = _pick("--posterior", o.posterior, LAPLACE)
    if o.rule not in ("evidence", "snr"):
        raise OckhamError(f"{owner} removes by evidence, or to a budget; got --rule {o.rule}")
    if o.prior_variance is not None:
        FixedPrior(o.prior_variance)
    structures = _structures(o)
    if structures is None and o.macs is not None:
        raise OckhamError("--macs is a budget for whole channels: add --structure, or use --keep-share")
    if structures is not None:
        if o.keep_share is not None:
            raise OckhamError(f"{owner} --structure does not use --keep-share: say --macs")
        if structure != "kronecker":
            raise OckhamError(f"--structure needs a posterior with correlations: --posterior kronecker; got {owner}")
        structures = structures if o.unit_price is not None else replace(structures, price=FlatPrice(0.0))
    if o.macs is not None and not 0 < o.macs <= 1:
        raise OckhamError(f"--macs is the share of multiply-accumulates that stays, in (0, 1]; got {o.macs}")
    shot = OneShot(structure, o.keep_share, o.epochs or 0, structures=structures, macs=o.macs)
    shot = replace(shot, prior_variance=o.prior_variance, **_changed(learning_rate=o.learning_rate))
    return replace(recipe, method=OneShotReduction(shot, o.ignore), epochs=shot.epochs, hold=0.0)


@_with_method.register
def _(o: GateOptions, recipe: Recipe) -> Recipe:
    if o.rule not in GATE_RULES:
        raise OckhamError(f"--rule {o.rule}: unknown for --method bmrs; choose from {', '.join(GATE_RULES)}")
    if o.rule in ("mean", "l2", "taylor", "random") and o.keep_share is None:
        raise OckhamError(f"--rule {o.rule} only orders the structures: add --keep-share 0.2, a budget")
    small = len(recipe.data.train_x) < SMALL_DATA
    epochs = o.epochs or (200 if small else 50)
    training = GateTraining(
        epochs=epochs,
        fine_tune=max(1, round(epochs / 5)),
        learning_rate=o.learning_rate or (3e-3 if small else 1e-3),
        kl_weight=true_elbo if o.temperature is None or o.temperature == 1.0 else Tempered(o.temperature),
        every=0 if o.after_training else 1,
        seed=o.seed,
    )
    decide: Decision = by_threshold
    if o.keep_share is not None:
        full = sum(p.numel() for p in recipe.network().parameters())
        decide = ParameterBudget(round(o.keep_share * full), full)
    inputs = recipe.data.train_x[:2].to(recipe.device)
    recipe = replace(recipe, held_out=0.1 if o.after_training else 0.0)
    held = recipe.split(recipe.held_out)[1]

    def curves(gates: Gates, state: RunState) -> Mapping[str, Any]:
        """Accuracy against compression on the held-out examples, a curve a rule."""
        found = gate_sensitivity(gates, state.own.task.loader, state.objective, seed=o.seed)
        noise = state.likelihood.noise_variance

        def measure(model: nn.Module) -> Mapping[str, float]:
            if noise is not None:
                model, _ = state.objective.finished(copy.deepcopy(model), Posterior({}, 1.0))
            return measures(mean_predictor(model, classify=noise is None), *held, noise_variance=noise)

        return curves_as_plain(compression_curve(gates, dict(GATE_RULES), measure, sensitivity=found))

    look = curves if o.after_training else None
    method = GateRounds(training, inputs, GATE_RULES[o.rule], decide, o.ignore, look)
    return replace(recipe, method=method, epochs=training.epochs + training.fine_tune, hold=training.hold)


def load_data(source: str | None, **reading: Any) -> Dataset:
    """The embedded digits, a folder or file, or what the user's "package.module:function" returns.

    Args:
        source: name of the data; None: the digits.
        reading: keywords for `load_folder`.

    Raises:
        DataError: nothing there, or the function returned something else.
    """
    if source is None or source == "digits":
        return digits()
    if Path(source).exists():
        return load_folder(source, **reading)
    if ":" not in source:
        raise DataError(f"--data {source}: no such folder or file; give one, or package.module:function")
    data = _imported("--data", source)()
    if not isinstance(data, Dataset):
        raise DataError(f"--data {source} must return an ockham.zoo.data.Dataset; got {type(data).__name__}")
    return data


def _normalize(text: str | None) -> Normalize:
    """Means and stds of an option such as ``0.49,0.48,0.45:0.25,0.24,0.26``."""
    if text in (None, "none"):
        return text
    try:
        means, stds = ([float(v) for v in half.split(",")] for half in str(text).split(":"))
    except ValueError as error:
        raise OckhamError(f"--normalize {text}: expected none, or means:stds such as 0.49,0.48:0.25,0.24") from error
    return means, stds


def load_model(source: str | None, data: Dataset) -> tuple[str, Callable[[], nn.Module]]:
    """(label, constructor): from the zoo by name or by the shape of the data, or the user's own function.

    Raises:
        OckhamError: unknown name, or a constructor that returns no module.
    """
    if source is None or ":" not in source or source.startswith("zoo:"):
        name = suggest(data) if source is None else source.removeprefix("zoo:")
        return f"zoo:{name}", _pick("--model", name, NETWORKS)
    if source.startswith("hf:"):
        return source, lambda: huggingface_model(source[3:])
    function = _imported("--model", source)

    def build() -> nn.Module:
        try:
            model = function()
        except TypeError as error:
            raise OckhamError(f"--model {source} must work without arguments; it says: {error}") from error
        if not isinstance(model, nn.Module):
            raise OckhamError(f"--model {source} must return a torch.nn.Module; got {type(model).__name__}")
        return model

    return source, build


def _changed(**given: Any) -> dict[str, Any]:
    return {k: v for k, v in given.items() if v is not None}


def _training(recipe: Recipe) -> Training:
    assert isinstance(recipe.method, WeightRounds)
    return recipe.method.training


def _rounds(o: EvidenceOptions | SpikeSlabOptions, usual: Rounds) -> Rounds:
    if o.first_round is not None and not 0 <= o.first_round <= usual.end:
        raise OckhamError(f"--first-round is a share of the epochs, 0 to {usual.end}; got {o.first_round}")
    return replace(usual, **_changed(count=o.rounds, start=o.first_round))


def _rule(o: EvidenceOptions) -> Rule:
    if o.log_odds is not None or o.cap is not None:
        if o.rule != "evidence" or o.keep_share is not None:
            raise OckhamError("--log-odds and --cap need --rule evidence and no --keep-share: drop those")
        return EvidenceRule(o.log_odds or 0.0, 1.0 if o.cap is None else o.cap)
    if o.keep_share is None:
        if o.rule in BUDGET_RULES:
            raise OckhamError(f"--rule {o.rule} needs a budget: add --keep-share 0.05 (the evidence rule needs none)")
        return _pick("--rule", o.rule, EVIDENCE_RULES)
    name = "snr" if o.rule == "evidence" else o.rule
    return _pick("--rule", name, BUDGET_RULES)(o.keep_share, o.seed)


def _structures(o: EvidenceOptions | SpikeSlabOptions | OneShotOptions) -> Structures | None:
    if not o.structure:
        if o.unit_price is not None or o.round_to != 1:
            raise OckhamError("--unit-price and --round-to are about structures: add --structure")
        return None
    usual = Structures()
    price = usual.price if o.unit_price is None else FlatPrice(o.unit_price)
    return replace(usual, price=price, round_to=o.round_to)


def _imported(option: str, source: str) -> Callable[[], Any]:
    module_name, _, attribute = source.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise OckhamError(f"{option} {source}: cannot import it ({error}); expected package.module:function") from error
    if not callable(found):
        raise OckhamError(f"{option} {source}: is a {type(found).__name__}, a function is expected")
    return found  # type: ignore[no-any-return]


def _pick(option: str, name: str, table: Mapping[str, T]) -> T:
    if name not in table:
        raise OckhamError(f"{option} {name}: unknown; choose from {', '.join(sorted(table))}")
    return table[name]
