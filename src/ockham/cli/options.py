"""Options of the verbs: one frozen class a method; an option that is no field of it is an error by construction."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ockham.core.files import read_toml
from ockham.errors import OckhamError, ResultError

__all__ = [
    "METHODS",
    "Common",
    "EvidenceOptions",
    "GateOptions",
    "OneShotOptions",
    "Options",
    "SpikeSlabOptions",
    "options_of",
    "parse_device",
    "read_config",
]


def _option(default: Any, text: str, group: str) -> Any:
    """A field with the help that the verb shows and the group that it is shown in."""
    return field(default=default, metadata={"help": text, "group": group})


DATA, TRAINING, REMOVAL, STRUCTURES, RUN = "Network and data", "Training", "What goes", "Structures", "The run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """Options of every method. None means: chosen by the data."""

    out: str | None = _option(None, "Result folder.", DATA)
    data: str | None = _option(None, "Folder, CSV or Parquet file, or package.module:function. [digits]", DATA)
    target: str | None = _option(None, "Column of a table to predict. [target, label or y]", DATA)
    normalize: str | None = _option(None, "none, or means:stds, as 0.49,0.48:0.25,0.24. [of the data]", DATA)
    max_bytes: int | None = _option(None, "Most bytes of one array or file that is read. [what is free]", DATA)
    model: str | None = _option(None, "Zoo name or package.module:function. [by the data]", DATA)
    weights: str | None = _option(None, "Start from these: safetensors, npz, torch file or folder.", DATA)
    likelihood: str | None = _option(None, "classification or regression. [by the targets]", DATA)
    ood: str | None = _option(None, "Foreign data for the out-of-distribution measure.", DATA)
    epochs: int | None = _option(None, "Passes over the data. [by the data]", TRAINING)
    batch_size: int | None = _option(None, "Examples a step. [128; small data 64]", TRAINING)
    learning_rate: float | None = _option(None, "Learning rate at first. [by the method]", TRAINING)
    baseline: bool = _option(True, "Train Adam for comparison.", TRAINING)
    keep_share: float | None = _option(None, "Budget: share that stays. [the evidence decides]", REMOVAL)
    ignore: tuple[str, ...] = _option((), "Protect: parameter or module name, or re:pattern.", REMOVAL)
    draws: int = _option(20, "Posterior draws of a prediction.", RUN)
    device: str = _option("cpu", "cpu, cuda, cuda:1, mps.", RUN)
    threads: int | None = _option(None, "CPU threads. [torch's; small data 1]", RUN)
    seed: int = _option(0, "Of everything random.", RUN)
    resume: bool = _option(False, "Continue an interrupted run.", RUN)
    overwrite: bool = _option(False, "Replace a finished result in --out.", RUN)
    log_dir: str | None = _option(None, "Write TensorBoard scalars here.", RUN)
    quiet: bool = _option(False, "No progress bars.", RUN)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "draws", "rounds", "threads", "round_to"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise OckhamError(f"--{name.replace('_', '-')} must be at least 1; got {value}")


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
    round_to: int = _option(1, "Widths in multiples of this.", STRUCTURES)


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
    """Options of `ockham prune`: a trained network in, one pass, one removal, a short refit."""

    posterior: str = _option("kronecker", "kronecker (correlations) or laplace (diagonal).", TRAINING)
    prior_variance: float | None = _option(None, "Of every weight. [fitted]", TRAINING)
    rule: str = _option("evidence", "evidence, or an order for --keep-share.", REMOVAL)
    structure: bool = _option(False, "Take out whole channels instead of weights.", STRUCTURES)
    macs: float | None = _option(None, "Budget: share of multiply-accumulates that stays.", STRUCTURES)
    unit_price: float | None = _option(None, "Nats a unit must be worth. [0]", STRUCTURES)
    round_to: int = _option(1, "Widths in multiples of this.", STRUCTURES)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateOptions(Common):
    """Options of `ockham gate`: multiplicative gates on structures, removed by a BMRS rule."""

    rule: str = _option("n", "n, n-printed, u8, u4, snr; with --keep-share also mean, l2, taylor, random.", REMOVAL)
    temperature: float | None = _option(None, "Weight of the KL: a price on structures; 1 is Bayes. [1]", TRAINING)
    after_training: bool = _option(False, "Remove once, after training, and draw the curves.", REMOVAL)


METHODS: dict[str, type[Common]] = {
    "evidence": EvidenceOptions,
    "spike-slab": SpikeSlabOptions,
    "one-shot": OneShotOptions,
    "gates": GateOptions,
}
"""Methods by name, with the options that they take."""

_SPOKEN = {
    "evidence": "ockham compress",
    "spike-slab": "ockham compress --posterior spike-slab",
    "one-shot": "ockham prune",
    "gates": "ockham gate",
}


class Options(dict[str, Any]):
    """What the user gave, by field name; which method it is for is found out by `options_of`."""

    def __init__(self, **given: Any) -> None:
        super().__init__({k: v for k, v in given.items() if v is not None and v != ()})


def options_of(given: Mapping[str, Any], method: str | None = None) -> Common:
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
            raise OckhamError(_refusal(name, f"--method {spelt}" if spelt else _SPOKEN[method], own))
    return METHODS[method](**given)


def _refusal(name: str, owner: str, own: set[str]) -> str:
    spelt = "--" + name.replace("_", "-")
    others = [_SPOKEN[m] for m, kind in METHODS.items() if name in {f.name for f in fields(kind)}]
    near = difflib.get_close_matches(name, own, 1)
    advice = f"it belongs to {', '.join(f'`{o}`' for o in others)}" if others else "no method has it"
    if near:
        advice += f"; the nearest here is --{near[0].replace('_', '-')}"
    return f"{owner} does not use {spelt}: drop it ({advice})"


def read_config(path: Path) -> dict[str, Any]:
    """Options from a TOML file.

    Raises:
        OckhamError: the file cannot be read, or has a key or a type that is not an option.
    """
    try:
        table = read_toml(path)
    except ResultError as error:
        raise OckhamError(f"--config {error}") from error
    known: dict[str, Field[Any]] = {f.name: f for kind in METHODS.values() for f in fields(kind)}
    table = {key.replace("-", "_"): value for key, value in table.items()}
    unknown = [key for key in table if key not in known and key != "method"]
    if unknown:
        near = [n for key in unknown for n in difflib.get_close_matches(key, known, 1)]
        meant = f" (did you mean {', '.join(near)}?)" if near else ""
        raise OckhamError(f"--config {path}: unknown keys {', '.join(unknown)}{meant}; known are {', '.join(known)}")
    for key, value in table.items():
        if isinstance(value, list):
            table[key] = tuple(value)
        elif key in known and not _fits(value, str(known[key].type)):
            raise OckhamError(f"--config {path}: {key} should be {known[key].type}; got {value!r}")
    return table


def _fits(value: Any, annotation: str) -> bool:
    allowed = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    wanted = next((types for word, types in allowed.items() if word in annotation), (object,))
    return isinstance(value, wanted) and (bool in wanted or object in wanted or not isinstance(value, bool))


def default_of(option: Field[Any]) -> Any:
    """The default of an option."""
    return None if option.default is MISSING else option.default


def parse_device(name: str) -> torch.device:
    """A torch device that is there.

    Raises:
        OckhamError: unknown, or not on this machine.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OckhamError(f"--device {name}: not on this machine ({str(error).splitlines()[0]}); try cpu") from error
    return device
