"""From options to a job: network, data, weights, rule, by name. The only place where a string chooses an algorithm."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ockham.choose.prices import FlatPrice, Structures
from ockham.choose.rules import BudgetRule, EvidenceRule, LearnedOddsRule, Rounds, Rule
from ockham.choose.score import by_delta_f, by_magnitude, by_random, by_snr
from ockham.cli.gates import build_gate_job
from ockham.cli.options import Options, parse_device
from ockham.cli.slab import with_spike_slab
from ockham.core.files import header
from ockham.core.likelihood import Likelihood, likelihood_from
from ockham.errors import DataError, OckhamError
from ockham.fit.priors import FixedPrior
from ockham.methods.gates.job import GateJob
from ockham.run.estimators import SMALL_DATA, Estimator, Training, defaults_for, ivon, mean_field, point_estimate
from ockham.run.job import Job, OneShot, Recipe
from ockham.run.result import load_state
from ockham.zoo.data import Dataset, digits, load_folder
from ockham.zoo.networks import NETWORKS, suggest

__all__ = ["build_job", "load_data", "load_model"]

T = TypeVar("T")

METHODS = ("evidence", "bmrs", "spike-slab")

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


def build_job(options: Options, command: str) -> Job | GateJob:
    """Everything that the options name, checked.

    Raises:
        OckhamError: a name is unknown, a file unreadable, settings contradict each other.
    """
    if options.out is None:
        raise OckhamError("--out FOLDER is needed: where shall the result go?")
    method = _pick("--method", options.method, {name: name for name in METHODS})
    data = load_data(options.data)
    device = parse_device(options.device)
    builder, build = load_model(options.model, data)
    if options.threads is None and len(data.train_x) < SMALL_DATA:
        torch.set_num_threads(1)  # small steps: threads would wait for each other longer than they work
    training = _training(options, data)
    _, rounds, batch_size = defaults_for(len(data.train_x))
    one_shot = _one_shot(options)
    recipe = Recipe(
        build=build,
        likelihood=_likelihood(options, data),
        data=data,
        batch_size=options.batch_size or batch_size,
        training=training,
        rounds=_rounds(options, rounds),
        rule=None if method == "bmrs" else _rule(options),
        ignore=options.ignore,
        estimator=_pick("--posterior", options.posterior, {**ESTIMATORS, **dict.fromkeys(LAPLACE, point_estimate)}),
        device=device,
        structures=_structures(options) if one_shot is None else one_shot.structures,
        one_shot=one_shot,
    )
    if method == "spike-slab":
        recipe = with_spike_slab(options, recipe)
    if method == "bmrs":
        return build_gate_job(options, recipe, builder, small=len(data.train_x) < SMALL_DATA, command=command)
    weights = None if options.weights is None else _weights(Path(options.weights))
    ood = None if options.ood is None else load_data(options.ood).test_x
    return Job(
        recipe,
        Path(options.out),
        builder,
        command=command,
        weights=weights,
        baseline=options.baseline,
        draws=options.draws,
        ood=ood,
        resume=options.resume,
    )


def load_data(source: str | None) -> Dataset:
    """The embedded digits, a folder, or what the user's "package.module:function" returns.

    Raises:
        DataError: nothing there, or the function returned something else.
    """
    if source is None or source == "digits":
        return digits()
    if Path(source).exists():
        return load_folder(source)
    if ":" not in source:
        raise DataError(
            f"--data {source}: no such folder; give a folder in IDX or npz form, or package.module:function"
        )
    data = _imported("--data", source)()
    if not isinstance(data, Dataset):
        raise DataError(f"--data {source} must return an ockham.zoo.data.Dataset; got {type(data).__name__}")
    return data


def load_model(source: str | None, data: Dataset) -> tuple[str, Callable[[], nn.Module]]:
    """(label, constructor): from the zoo by name or by the shape of the data, or the user's own function.

    Raises:
        OckhamError: unknown name, or a constructor that returns no module.
    """
    if source is None or ":" not in source:
        name = suggest(data) if source is None else source.removeprefix("zoo:")
        return f"zoo:{name}", _pick("--model", name, NETWORKS)
    function = _imported("--model", source)

    def build() -> nn.Module:
        model = function()
        if not isinstance(model, nn.Module):
            raise OckhamError(f"--model {source} must return a torch.nn.Module; got {type(model).__name__}")
        return model

    return source, build


def _training(options: Options, data: Dataset) -> Training:
    default = defaults_for(len(data.train_x))[0]
    if options.learning_rate is not None and not 0 < options.learning_rate < math.inf:
        raise OckhamError(f"--learning-rate must be positive; got {options.learning_rate}")
    given: dict[str, Any] = {
        "epochs": options.epochs,
        "learning_rate": options.learning_rate,
        "prior": None if options.prior_variance is None else FixedPrior(options.prior_variance),
        "temperature": options.temperature,
        "seed": options.seed,
    }
    return replace(default, **{k: v for k, v in given.items() if v is not None})


def _rounds(options: Options, usual: Rounds) -> Rounds:
    given = {"count": options.rounds, "start": options.first_round}
    if options.first_round is not None and not 0 <= options.first_round <= usual.end:
        raise OckhamError(f"--first-round is a share of the epochs, 0 to {usual.end}; got {options.first_round}")
    return replace(usual, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]


def _one_shot(options: Options) -> OneShot | None:
    if options.macs is not None and not (options.posterior in LAPLACE and options.structure):
        raise OckhamError("--macs is a budget for --posterior kronecker --structure: add both, or use --unit-price")
    if options.posterior not in LAPLACE:
        return None
    if options.weights is None:
        raise OckhamError(f"--posterior {options.posterior} needs a trained network: add --weights file.safetensors")
    owner, structures = f"--posterior {options.posterior}", _structures(options)
    if options.rule not in ("evidence", "snr"):
        raise OckhamError(f"{owner} removes by evidence, or to a budget; got --rule {options.rule}")
    options.refuse(owner, "cap", "log_odds", "first_round", "rounds")
    if structures is not None:
        options.refuse(f"{owner} --structure", "keep_share")
        if LAPLACE[options.posterior] != "kronecker":
            raise OckhamError(f"--structure needs a posterior with correlations: --posterior kronecker; got {owner}")
        if options.unit_price is None:
            structures = replace(structures, price=FlatPrice(0.0))
    if options.macs is not None and not 0 < options.macs <= 1:
        raise OckhamError(f"--macs is the share of multiply-accumulates that stays, in (0, 1]; got {options.macs}")
    found = OneShot(LAPLACE[options.posterior], options.keep_share, options.epochs or 0)
    if options.learning_rate is not None:
        found = replace(found, learning_rate=options.learning_rate)
    return replace(found, structures=structures, macs=options.macs)


def _rule(options: Options) -> Rule | None:
    if options.log_odds is not None or options.cap is not None:
        if options.rule != "evidence" or options.keep_share is not None:
            raise OckhamError("--log-odds and --cap need --rule evidence and no --keep-share: drop those")
        return EvidenceRule(options.log_odds or 0.0, 1.0 if options.cap is None else options.cap)
    if options.keep_share is None:
        if options.rule in BUDGET_RULES:
            raise OckhamError(
                f"--rule {options.rule} needs a budget: add --keep-share 0.05 (the evidence rule needs none)"
            )
        return _pick("--rule", options.rule, EVIDENCE_RULES)
    name = "snr" if options.rule == "evidence" else options.rule
    return _pick("--rule", name, BUDGET_RULES)(options.keep_share, options.seed)


def _structures(options: Options) -> Structures | None:
    if not options.structure:
        if options.unit_price is not None or options.round_to != 1:
            raise OckhamError("--unit-price and --round-to are about structures: add --structure")
        return None
    usual = Structures()
    price = usual.price if options.unit_price is None else FlatPrice(options.unit_price)
    return replace(usual, price=price, round_to=options.round_to)


def _likelihood(options: Options, data: Dataset) -> Callable[[], Likelihood]:
    name = options.likelihood or ("regression" if data.train_y.is_floating_point() else "classification")
    likelihood_from(name)
    return lambda: likelihood_from(name)


def _weights(path: Path) -> Mapping[str, Tensor]:
    try:
        if "ockham" in header(path):
            return load_state(path)[1]
        return load_file(str(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise OckhamError(f"--weights {path}: not readable as safetensors ({error})") from error


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
