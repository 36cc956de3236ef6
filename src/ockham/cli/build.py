"""The options of every method as a frozen class, and the job that they describe."""

from __future__ import annotations

import copy
import difflib
import importlib
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import singledispatch
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ockham.choose.prices import FlatPrice, Structures
from ockham.choose.rules import (
    BudgetRule,
    EvidenceRule,
    LearnedOddsRule,
    Rounds,
    Rule,
    by_delta_f,
    by_magnitude,
    by_random,
    by_snr,
)
from ockham.core.likelihood import likelihood_from
from ockham.core.network import parse_device
from ockham.core.posterior import Posterior
from ockham.core.processes import ALONE, Processes
from ockham.errors import DataError, OckhamError
from ockham.fit.priors import FixedPrior
from ockham.methods.gates.attach import GATE_RULES, Gates
from ockham.methods.gates.report import compression_curve, curves_as_plain, gate_sections
from ockham.methods.gates.training import (
    Decision,
    GateRounds,
    GateTraining,
    ParametersLeft,
    Tempered,
    by_threshold,
    gate_sensitivity,
    true_elbo,
)
from ockham.methods.laplace.one_shot import OneShot, OneShotReduction
from ockham.methods.spike_slab.optimizer import spike_slab
from ockham.methods.spike_slab.priors import FixedSpikeSlab, MedianRule
from ockham.report.html import write_report
from ockham.run.compression import (
    SMALL_DATA,
    Estimator,
    Training,
    WeightRounds,
    defaults_for,
    ivon,
    mean_field,
    point_estimate,
)
from ockham.run.engine import RunState
from ockham.run.job import Job, Recipe
from ockham.run.measure import mean_predictor, measures
from ockham.run.weights import huggingface_model, read_weights
from ockham.zoo.data import Dataset, digits, inputs_as, load_folder, normalization
from ockham.zoo.networks import NETWORKS, constructor, suggest

__all__ = [
    "METHODS",
    "TARGETS",
    "Basic",
    "BlockOptions",
    "Common",
    "EvidenceOptions",
    "GateOptions",
    "OneShotOptions",
    "Options",
    "SpikeSlabOptions",
    "build_job",
    "load_data",
    "load_model",
    "options_of",
]


def _option(default: Any, text: str, group: str) -> Any:
    """A field with the help that the verb shows and the group that it is shown in."""
    return field(default=default, metadata={"help": text, "group": group})


DATA, TRAINING, REMOVAL, STRUCTURES, RUN = "Network and data", "Training", "What goes", "Structures", "The run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Basic:
    """Options of every method. None means: chosen by the data."""

    out: str | None = _option(None, "Result folder.", DATA)
    model: str | None = _option(
        None, "Zoo name, mlp_13_50_1, hf:FOLDER or package.module:function. [by the data]", DATA
    )
    keep_share: float | None = _option(None, "Budget: share that stays. [the evidence decides]", REMOVAL)
    ignore: tuple[str, ...] = _option((), "Protect: parameter or module name, or re:pattern.", REMOVAL)
    threads: int | None = _option(None, "CPU threads. [torch's; small data 1]", RUN)
    seed: int = _option(0, "Of everything random.", RUN)
    resume: bool = _option(False, "Continue an interrupted run.", RUN)
    overwrite: bool = _option(False, "Replace a finished result in --out.", RUN)
    quiet: bool = _option(False, "No progress bars.", RUN)

    def __post_init__(self) -> None:
        counts = ("epochs", "batch_size", "draws", "rounds", "threads", "windows", "window", "calibration", "max_bytes")
        for name in counts:
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise OckhamError(f"--{name.replace('_', '-')} must be at least 1; got {value}")
        if not 0 <= self.seed < 2**63 or self.out == "":
            raise OckhamError(
                f"--seed is a whole number from 0 on, and --out names a folder; got {self.seed}, {self.out!r}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Common(Basic):
    """Options of every method that reads a data set of examples with targets."""

    data: str | None = _option(None, "Folder, CSV or Parquet file, or package.module:function. [digits]", DATA)
    target: str | None = _option(None, "Column of a table to predict. [target, label or y]", DATA)
    normalize: str | None = _option(None, "none, or means:stds, as 0.49,0.48:0.25,0.24. [of the data]", DATA)
    max_bytes: int | None = _option(None, "Most bytes of one array or file that is read. [what is free]", DATA)
    weights: str | None = _option(None, "Start from these: safetensors, npz, torch file or folder.", DATA)
    likelihood: str | None = _option(None, "classification, binary, poisson or regression. [by the targets]", DATA)
    ood: str | None = _option(None, "Foreign data for the out-of-distribution measure.", DATA)
    epochs: int | None = _option(None, "Passes over the data. [by the data]", TRAINING)
    batch_size: int | None = _option(None, "Examples a step. [128; small data 64]", TRAINING)
    learning_rate: float | None = _option(None, "Learning rate at first. [by the method]", TRAINING)
    baseline: bool = _option(True, "Train Adam for comparison.", TRAINING)
    draws: int = _option(20, "Posterior draws of a prediction.", RUN)
    device: str = _option("cpu", "cpu, cuda, cuda:1, mps.", RUN)
    log_dir: str | None = _option(None, "Write TensorBoard scalars here.", RUN)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variational(Common):
    """What mean-field, IVON, point and spike-and-slab posteriors share."""

    posterior: str = _option("mean-field", "mean-field, ivon, map or spike-slab.", TRAINING)
    prior_variance: float | None = _option(None, "Of every weight (spike-slab: of the slab). [0.3; small 1]", TRAINING)
    temperature: float | None = _option(None, "Of the posterior; 1 is Bayes. [1; small data 0.1]", TRAINING)
    rounds: int | None = _option(None, "Rounds of removal at most. [20; small data 11]", REMOVAL)
    first_round: float | None = _option(None, "Share of the epochs before the first round. [0.125; 0.25]", REMOVAL)
    log_odds: float | None = _option(None, "ln P(keep)/P(remove) of a weight before the data. [0]", REMOVAL)
    structure: bool = _option(False, "Take out whole channels, neurons and heads, too.", STRUCTURES)
    unit_price: float | None = _option(None, "Nats a unit must be worth. [learned]", STRUCTURES)
    round_to: str | int | None = _option(None, "Widths in multiples of this; auto: measured. [auto]", STRUCTURES)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceOptions(_Variational):
    """Options of `ockham compress`: fit a posterior, remove by evidence, refit, and again."""

    rule: str = _option(
        "evidence",
        "evidence or learned-odds; with --keep-share also snr, delta-f, magnitude, random, gradual-snr (-magnitude).",
        REMOVAL,
    )
    cap: float | None = _option(None, "Share of the living weights that a round may take. [1]", REMOVAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpikeSlabOptions(_Variational):
    """Options of `ockham compress --posterior spike-slab`: inclusion probabilities, the median model."""

    rule: str = _option("evidence", "With --keep-share: snr, delta-f, magnitude, random. [the median model]", REMOVAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class OneShotOptions(Common):
    """Options of `ockham prune`: a trained network in, one pass, one removal; a refit only with --epochs."""

    posterior: str = _option("kronecker", "kronecker (correlations) or laplace (diagonal).", TRAINING)
    prior_variance: float | None = _option(None, "Of every weight. [fitted]", TRAINING)
    calibration: int = _option(4000, "Training examples that the curvature is taken from.", TRAINING)
    rule: str = _option("evidence", "evidence; with --keep-share also snr, its order in any case.", REMOVAL)
    structure: bool = _option(False, "Take out whole channels instead of weights.", STRUCTURES)
    depth: bool = _option(False, "Whole residual branches, too; with --calibrate --params: whole blocks.", STRUCTURES)
    macs: float | None = _option(None, "Budget: share of multiply-accumulates that stays.", STRUCTURES)
    params: float | None = _option(None, "Budget: share of the parameters that stays.", STRUCTURES)
    latency: float | None = _option(None, "Budget: share of the measured latency that stays.", STRUCTURES)
    unit_price: float | None = _option(None, "Nats a unit must be worth. [0]", STRUCTURES)
    round_to: str | int | None = _option(None, "Widths in multiples of this; auto: measured. [auto]", STRUCTURES)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateOptions(Common):
    """Options of `ockham gate`: multiplicative gates on structures, removed by a BMRS rule."""

    rule: str = _option("n", "n, n-printed, u8, u4, snr; with --keep-share also mean, l2, taylor, random.", REMOVAL)
    temperature: float | None = _option(None, "Weight of the KL: a price on structures; 1 is Bayes. [1]", TRAINING)
    after_training: bool = _option(False, "Remove once, after training, and draw the curves.", REMOVAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockOptions(Basic):
    """Options of `ockham prune --model hf:FOLDER --calibrate TEXT`: a transformers folder, reduced block by block."""

    calibrate: str | None = _option(None, "Text file, or folder of .txt files, for --model hf:FOLDER.", DATA)
    windows: int = _option(32, "Windows of the text to calibrate on.", DATA)
    window: int = _option(512, "Tokens of a window.", DATA)
    pattern: str | None = _option(None, "2:4, or another n:m along the inputs of each matrix.", REMOVAL)
    reconstruct: int = _option(0, "Epochs in which each reduced block is trained to answer as before.", TRAINING)
    params: float | None = _option(None, "Budget: share of all parameters that stays; whole units go.", STRUCTURES)
    depth: bool = _option(False, "Whole residual branches, too; with --calibrate --params: whole blocks.", STRUCTURES)


METHODS: dict[str, type[Basic]] = {
    "evidence": EvidenceOptions,
    "spike-slab": SpikeSlabOptions,
    "one-shot": OneShotOptions,
    "blocks": BlockOptions,
    "gates": GateOptions,
}
"""Methods by name, with the options that they take."""

_SPOKEN = {
    "evidence": "ockham compress",
    "spike-slab": "ockham compress --posterior spike-slab",
    "one-shot": "ockham prune",
    "blocks": "ockham prune --calibrate",
    "gates": "ockham gate",
}


class Options(dict[str, Any]):
    """What the user gave, by field name; which method it is for is found out by `options_of`."""

    def __init__(self, **given: Any) -> None:
        super().__init__({k: v for k, v in given.items() if v is not None and v != ()})


def options_of(given: Mapping[str, Any], method: str | None = None) -> Basic:
    """The options of the method that is asked for, by verb or by an old spelling.

    Args:
        given: field name to value, only what was given.
        method: name in `METHODS`; None: by ``method`` and ``posterior`` among the given.

    Raises:
        OckhamError: an option that the method does not have; names it, its nearest, and the method that has it.
    """
    given = dict(given)
    spelt = given.pop("method", None)
    old = {None: None, "evidence": "evidence", "bmrs": "gates", "spike-slab": "spike-slab"}
    if spelt not in old:
        raise OckhamError(f"--method {spelt}: unknown; choose from {', '.join(k for k in old if k)}")
    posterior = given.get("posterior")
    if method == "one-shot" and "calibrate" in given:
        method = "blocks"
    if method is None:
        by_posterior = {"laplace": "one-shot", "kronecker": "one-shot", "spike-slab": "spike-slab"}
        method = old[spelt] or by_posterior.get(posterior or "", "evidence")
    if method == "spike-slab" and posterior not in (None, "spike-slab"):
        raise OckhamError(f"--method spike-slab is a posterior of its own: drop --posterior {posterior}")
    if method == "gates" and given.get("rule") == "evidence":
        del given["rule"]
    own = {f.name for f in fields(METHODS[method])}
    for name in given:
        if name not in own:
            others = [_SPOKEN[m] for m, kind in METHODS.items() if name in {f.name for f in fields(kind)}]
            advice = f"it belongs to {', '.join(f'`{o}`' for o in others)}" if others else "no method has it"
            near = difflib.get_close_matches(name, own, 1)
            if near:
                advice += f"; the nearest here is --{near[0].replace('_', '-')}"
            owner = f"--method {spelt}" if spelt else _SPOKEN[method]
            raise OckhamError(f"{owner} does not use --{name.replace('_', '-')}: drop it ({advice})")
    return METHODS[method](**given)


_T = TypeVar("_T")

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


def build_job(given: Common | Mapping[str, Any], command: str, processes: Processes = ALONE) -> Job:
    """Everything that the options name, checked.

    Args:
        given: options of a method, or what the user gave by name.
        command: line as typed, for the record.
        processes: those that do the job together.

    Raises:
        OckhamError: a name is unknown, a file unreadable, settings contradict each other.
    """
    o = given if isinstance(given, Common) else options_of(given)
    assert isinstance(o, Common)
    if o.out is None:
        raise OckhamError("--out FOLDER is needed: where shall the result go?")
    if o.learning_rate is not None and not 0 < o.learning_rate < math.inf:
        raise OckhamError(f"--learning-rate must be positive; got {o.learning_rate}")
    if isinstance(o, OneShotOptions) and o.weights is None and o.data is None and (o.model or "").startswith("hf:"):
        raise OckhamError(f"--model {o.model}: add --calibrate text.txt, the text that a language model is reduced on")
    if isinstance(o, OneShotOptions) and o.weights is None:
        raise OckhamError(f"--posterior {o.posterior} needs a trained network: add --weights file.safetensors")
    if o.likelihood is not None:
        _pick("--likelihood", o.likelihood, TARGETS)
    weights = None if o.weights is None else read_weights(o.weights, max_bytes=o.max_bytes)
    kind = TARGETS.get(o.likelihood or "")
    reading: dict[str, Any] = {
        "target": o.target,
        "normalize": normalization(o.normalize),
        "max_bytes": o.max_bytes,
        "targets": kind,
    }
    data, device = load_data(o.data, **reading), parse_device(o.device)
    builder, build = load_model(o.model, data, single=o.likelihood in ("binary", "poisson"))
    if o.threads is None and len(data.train_x) < SMALL_DATA:
        torch.set_num_threads(1)  # small steps: threads would wait for each other longer than they work
    name = o.likelihood or ("regression" if data.train_y.is_floating_point() else "classification")
    foreign = {"target": data.target} if data.target and Path(o.ood or "").is_file() else {}
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
        processes=processes,
    )
    return Job(
        _with_method(o, recipe),
        Path(o.out),
        builder,
        command=command,
        weights=weights,
        baseline=o.baseline,
        draws=o.draws,
        ood=None if o.ood is None else inputs_as(load_data(o.ood, option="--ood", **foreign), data, recipe.network()),
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
    estimator = _pick("--posterior", o.posterior, ESTIMATORS)
    rule: Rule
    if o.log_odds is not None or o.cap is not None:
        if o.rule != "evidence" or o.keep_share is not None:
            raise OckhamError("--log-odds and --cap need --rule evidence and no --keep-share: drop those")
        rule = EvidenceRule(o.log_odds or 0.0, 1.0 if o.cap is None else o.cap)
    elif o.keep_share is not None:
        rule = _pick("--rule", "snr" if o.rule == "evidence" else o.rule, BUDGET_RULES)(o.keep_share, o.seed)
    elif o.rule in BUDGET_RULES:
        raise OckhamError(f"--rule {o.rule} needs a budget: add --keep-share 0.05 (the evidence rule needs none)")
    else:
        rule = _pick("--rule", o.rule, EVIDENCE_RULES)
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
    FixedPrior(1.0 if o.prior_variance is None else o.prior_variance)  # refuses what is no variance
    structures = _structures(o)
    budget = _changed(macs=o.macs, params=o.params, latency=o.latency)
    asked = [*budget, *(["depth"] if o.depth else [])]
    if structures is None and asked:
        raise OckhamError(f"--{min(asked)} is about whole channels: add --structure, or use --keep-share")
    if len(budget) > 1:
        raise OckhamError(f"one budget at a time: got --{' and --'.join(sorted(budget))}")
    if structures is not None:
        if o.keep_share is not None:
            raise OckhamError(f"{owner} --structure does not use --keep-share: say --macs, --params or --latency")
        if structure != "kronecker":
            raise OckhamError(f"--structure needs a posterior with correlations: --posterior kronecker; got {owner}")
        structures = structures if o.unit_price is not None else replace(structures, price=FlatPrice(0.0))
    for name, share in budget.items():
        if not 0 < share <= 1:
            raise OckhamError(f"--{name} is the share of it that stays, in (0, 1]; got {share}")
    more = _changed(learning_rate=o.learning_rate, prior_variance=o.prior_variance, structures=structures)
    more |= {"depth": o.depth, "calibration": o.calibration, "budget": budget or None}
    shot = OneShot(structure, o.keep_share, o.epochs or 0, **more)
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
        decide = ParametersLeft(round(o.keep_share * full), full)
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
            told: dict[str, Any] = {"likelihood": state.likelihood.kind}
            return measures(mean_predictor(model, **told), *held, noise_variance=noise, **told)

        return curves_as_plain(compression_curve(gates, dict(GATE_RULES), measure, sensitivity=found))

    look = curves if o.after_training else None
    method = GateRounds(training, inputs, GATE_RULES[o.rule], decide, o.ignore, look)
    return replace(recipe, method=method, epochs=training.epochs + training.fine_tune, hold=training.hold)


TARGETS = {"classification": "classes", "binary": "classes", "poisson": "numbers", "regression": "numbers"}
"""Likelihoods of the command, and what whole-number targets are to them."""


def load_data(source: str | None, *, option: str = "--data", **reading: Any) -> Dataset:
    """The embedded digits, a folder or file, or what the user's "package.module:function" returns.

    Args:
        source: name of the data; None: the digits.
        option: name of the option, for messages.
        reading: keywords for `load_folder`.

    Raises:
        DataError: nothing there, or the function returned something else.
        OckhamError: an option on how files are read, where no file is.
    """
    known = source is None or source == "digits"
    if source and not known and Path(source).exists():
        return load_folder(source, **reading)
    if not known and ":" not in str(source):
        raise DataError(f"{option} {source}: no such folder or file; give one, or package.module:function")
    idle = [name for name in ("target", "normalize") if reading.get(name) is not None]
    if idle:
        raise OckhamError(
            f"--{idle[0]} is for data in files; {source or 'digits'} comes as it is: drop it, or give {option} a file"
        )
    if known:
        return digits()
    data = _imported(option, str(source))()
    if not isinstance(data, Dataset):
        raise DataError(f"{option} {source} must return an ockham.zoo.data.Dataset; got {type(data).__name__}")
    return data


def load_model(source: str | None, data: Dataset, *, single: bool = False) -> tuple[str, Callable[[], nn.Module]]:
    """(label, constructor): from the zoo by name or by the shape of the data, or the user's own function.

    Args:
        source: option as typed; None: chosen by the data.
        data: data set that the network is for.
        single: flag, True: a network chosen by the data has one output.

    Raises:
        OckhamError: unknown name, or a constructor that returns no module.
    """
    if source is None or ":" not in source or source.startswith("zoo:"):
        name = suggest(data, single=single) if source is None else source.removeprefix("zoo:")
        return f"zoo:{name}", constructor(name) or _pick("--model", name, NETWORKS)
    if source.startswith("hf:"):
        return source, lambda: huggingface_model(source[3:])
    function = _imported("--model", source)

    def build() -> nn.Module:
        model = function()
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


def _structures(o: EvidenceOptions | SpikeSlabOptions | OneShotOptions) -> Structures | None:
    if not o.structure:
        if o.unit_price is not None or o.round_to is not None:
            raise OckhamError("--unit-price and --round-to are about structures: add --structure")
        return None
    usual = Structures()
    price = usual.price if o.unit_price is None else FlatPrice(o.unit_price)
    widths = "auto" if o.round_to is None else str(o.round_to)
    if widths != "auto" and not (widths.isdecimal() and int(widths) >= 1):
        raise OckhamError(f"--round-to is auto or a whole number, at least 1; got {o.round_to}")
    return replace(usual, price=price, round_to="auto" if widths == "auto" else int(widths))


def _imported(option: str, source: str) -> Callable[[], Any]:
    module_name, _, attribute = source.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise OckhamError(f"{option} {source}: cannot import it ({error}); expected package.module:function") from error
    if not callable(found):
        raise OckhamError(f"{option} {source}: is a {type(found).__name__}, a function is expected")

    def call() -> Any:
        try:
            return found()
        except OckhamError:
            raise
        except Exception as error:  # whatever a function of the user's raises
            at = traceback.extract_tb(error.__traceback__)[1:]
            where = f" ({at[-1].filename}, line {at[-1].lineno})" if at else ""
            said = f"raises {type(error).__name__}: {error}{where}"
            raise OckhamError(f"{option} {source}, called without arguments, {said}") from error

    return call


def _pick(option: str, name: str, table: Mapping[str, _T]) -> _T:
    if name not in table:
        raise OckhamError(f"{option} {name}: unknown; choose from {', '.join(sorted(table))}")
    return table[name]
