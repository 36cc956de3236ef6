"""What a result folder says, as frozen values, and the one place where they become JSON files and are read back.

A folder is one `Result`. `write_result` writes it, ``result.json`` last, because that file lists the others;
`read_result` reads it, and folders of older versions, so that a damaged, foreign or newer file is refused with its
name, the field and the reason. How a value looks in JSON follows from its class (`ockham.core.files`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ockham.core.files import Count, Share, from_plain, read_json, rest, to_plain, write_json, wrong
from ockham.errors import ResultError
from ockham.run.records import (
    DiagnosisRecord,
    EpochRecord,
    ForeignInputs,
    GateCurve,
    GateLayer,
    GateWidths,
    GroupRecord,
    HistogramRecord,
    LayerRecord,
    Measures,
    ReliabilityPair,
    RoundRecord,
    ShiftCurve,
    StructureRecord,
)
from ockham.zoo.data import Dataset

__all__ = [
    "RESULT",
    "SCHEMA",
    "Analysis",
    "DataSource",
    "GateFacts",
    "History",
    "Metrics",
    "NetworkSource",
    "Provenance",
    "Result",
    "Settings",
    "Structure",
    "load_lines",
    "read_result",
    "write_result",
]

SCHEMA = 2
"""Version of the JSON files that are written; older ones are read, newer ones refused."""

RESULT = "result.json"
"""Name of the file that makes a folder a result: it says how it was made and which other parts there are."""

_LONGEST_FILE = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Metrics:
    """Measures before and after, ``metrics.json``.

    Attributes:
        method: name of what removed: "mean-field", "ivon", "map", "spike-slab", "laplace", "kronecker", "bmrs", or
            "evidence" in folders that do not say which posterior it was.
        before: measures of the network it is compared with, or None.
        after: measures of the reduced network, as it is meant to be used.
        mean_network: measures of the reduced network with every weight at its mean, or None.
        kept: share of the learnable values of the network before that stay.
        seconds: wall time of the whole run.
        seed: seed of all randomness.
        noise_variance: noise variance of a regression, in the targets' unit squared, one number or one per output.
        dataset: name of the data.
        network: label of the network, such as "zoo:lenet".
        before_source: origin of the network before: "adam", "given weights", "none", or words for people.
        before_rate: learning rate of the network before.
        before_epochs: number of epochs that it was trained for.
        before_temperature: divisor of its logits.
        draws: posterior draws that a prediction averages; 1 for a network used once, None where not recorded.
        likelihood: name of the likelihood; None in folders of before, where a noise tells a regression.
    """

    method: str
    before: Measures | None
    after: Measures
    mean_network: Measures | None
    kept: Share
    seconds: float | None
    seed: Count | None
    noise_variance: float | tuple[float, ...] | None
    dataset: str | None
    network: str | None
    before_source: str | None = None
    before_rate: float | None = None
    before_epochs: Count | None = None
    before_temperature: float | None = None
    draws: Count | None = None
    likelihood: str | None = None


@dataclass(frozen=True, slots=True)
class History:
    """How the run went, ``history.json``.

    Attributes:
        epochs: one record an epoch.
        rounds: one record a round of removal.
        histograms: delta_f before every round.
        diagnosis: state of the posterior before the first round, None without one.
    """

    epochs: tuple[EpochRecord, ...]
    rounds: tuple[RoundRecord, ...]
    histograms: tuple[HistogramRecord, ...] | None
    diagnosis: DiagnosisRecord | None


@dataclass(frozen=True, slots=True)
class Analysis:
    """What the reduced network is like, ``analysis.json``; None where it was not measured or makes no sense.

    Attributes:
        layers: facts of every parameter tensor after the removal.
        reliability: confidence against accuracy.
        input_map: kept first-layer weights per input pixel, rows of one length.
        input_inclusion: probability that a living path leads from each input to an output.
        shift: corruption to its curve.
        ood: detection of foreign inputs.
    """

    layers: tuple[LayerRecord, ...] | None
    reliability: ReliabilityPair | None
    input_map: tuple[tuple[Count, ...], ...] | None
    input_inclusion: tuple[Share, ...] | None
    shift: Mapping[str, ShiftCurve] | None
    ood: ForeignInputs | None

    def __post_init__(self) -> None:
        rows = self.input_map
        if rows is not None and (not rows or not rows[0] or any(len(r) != len(rows[0]) for r in rows)):
            raise wrong("input_map", "a table of rows of one length", rows)


@dataclass(frozen=True, slots=True)
class Structure:
    """What the removal of whole units changed, ``structure.json``.

    Attributes:
        groups: width of every group before and after.
        before: costs of a forward pass of the network before, and its dense size in memory.
        after: the same of the reduced network, measured in turn with it.
        rounds: units that each round removed.
    """

    groups: tuple[GroupRecord, ...]
    before: Measures
    after: Measures
    rounds: tuple[StructureRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class GateFacts:
    """What became of the gates, ``gates.json``.

    Attributes:
        rule: name of the rule that decided.
        kl_weight: name of the weight of the divergence in the loss.
        epochs: widths after every epoch.
        layers: gates before the last decision.
        curves: rule to its curve; empty where structures went during training.
    """

    rule: str
    kl_weight: str
    epochs: tuple[GateWidths, ...]
    layers: tuple[GateLayer, ...]
    curves: Mapping[str, GateCurve] | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings that had a part in the run; None where a method has no such setting.

    Attributes:
        rule: words for what decided, with its numbers.
        epochs: epochs of training, or of fine-tuning after a one-shot reduction.
        fine_tune: epochs after the gates were folded in.
        batch_size: examples a step.
        learning_rate: rate at first.
        temperature: power 1/T of the posterior; below 1 it is sharper than the data make it.
        log_odds: prior log odds of keeping a weight, nats: removal is favoured beyond it.
        keep_share: budget, as the share that stays.
        macs: budget, as the share of the multiply-accumulates that stays.
        params: budget, as the share of the parameters that stays.
        latency: budget, as the share of the measured latency that stays.
        others: settings of other names.
    """

    rule: str | None = None
    epochs: Count | None = None
    fine_tune: Count | None = None
    batch_size: Count | None = None
    learning_rate: float | None = None
    temperature: float | None = None
    log_odds: float | None = None
    keep_share: float | None = None
    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    others: Mapping[str, Any] = rest()

    @property
    def limited(self) -> bool:
        """Whether a budget decided how much went."""
        return any(v is not None for v in (self.keep_share, self.macs, self.params, self.latency))

    def decision_line(self) -> float:
        """The delta_f in nats beyond which removal was favoured: the prior log odds, as set or as the rule says."""
        told = re.search(r"log_odds=(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)", self.rule or "")
        odds = self.log_odds if self.log_odds is not None else float(told[1]) if told else 0.0
        return odds if abs(odds) < 25 else 0.0  # beyond, nothing in a histogram is decided by it

    def named(self) -> dict[str, Any]:
        """All settings by their names, those that are None left out; a list as its items side by side."""
        found: dict[str, Any] = to_plain(self)
        return {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in found.items()}


@dataclass(frozen=True, slots=True)
class NetworkSource:
    """Where the network came from: "zoo:name", or a label such as "package.module:function"."""

    builder: str | None


@dataclass(frozen=True, slots=True)
class DataSource:
    """Which data they were.

    Attributes:
        name: name of the data.
        n_train: training examples.
        n_test: test examples.
        source: place the data came from.
        inputs: shape of the inputs of one example; None where not recorded, as below.
        mean: mean that was taken off the inputs (of bytes: off pixel / 255), one number or one a channel or column.
        std: standard deviation by which they were divided, likewise.
        classes: names of the classes; None for numbers, too.
        target: name of the column that is predicted, of tables.
    """

    name: str | None
    n_train: Count | None
    n_test: Count | None
    source: str | None
    inputs: tuple[Count, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: tuple[str, ...] | None = None
    target: str | None = None

    @classmethod
    def of(cls, data: Dataset) -> DataSource:
        """What a data set says of itself."""
        moments = (None if t is None else (t.double() / data.unit).reshape(-1).tolist() for t in (data.mean, data.std))
        mean, std = (None if v is None else tuple(v) for v in moments)
        told = (tuple(data.train_x.shape[1:]), mean, std, data.classes, data.target)
        return cls(data.name, len(data.train_x), len(data.test_x), data.name, *told)


@dataclass(frozen=True, slots=True)
class Provenance:
    """How the result was made, ``result.json``.

    Attributes:
        ockham: version of this library.
        command: line as typed.
        seed: seed of all randomness.
        date: time at which it was finished, ISO 8601.
        seconds: wall time of the whole run.
        versions: library to its version.
        machine: words for the processor.
        network: origin of the network.
        dataset: origin of the data.
        settings: settings of the run.
        load: three lines of Python that load the network; `write_result` fills them in.
    """

    ockham: str | None
    command: str | None
    seed: Count | None
    date: str | None
    seconds: float | None
    versions: Mapping[str, str] | None
    machine: str | None
    network: NetworkSource | None
    dataset: DataSource | None
    settings: Settings | None
    load: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """Everything that a result folder says; a part that a method does not have is None.

    Attributes:
        metrics: measures before and after.
        provenance: facts on how the result was made.
        history: epochs and rounds.
        analysis: description of the reduced network.
        structure: changes by the removal of whole units.
        gates: facts of the gates.
    """

    metrics: Metrics
    provenance: Provenance
    history: History | None = None
    analysis: Analysis | None = None
    structure: Structure | None = None
    gates: GateFacts | None = None


_PARTS: dict[str, type] = {
    "metrics": Metrics, "history": History, "analysis": Analysis, "structure": Structure, "gates": GateFacts,
}  # fmt: skip


def load_lines(folder: str | Path, builder: str | None, inputs: Sequence[int] | None = None) -> str:
    """Three lines of Python that load the network of a folder and call it once; they run as they stand.

    Args:
        folder: place of the result, as typed.
        builder: label of the network; a "package.module:function" is imported by name.
        inputs: shape of the inputs of one example; None: the call is a comment.
    """
    first, given = "import ockham, torch", ""
    if builder is None or not builder.startswith("zoo:"):
        named = re.fullmatch(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)", builder or "")
        pretrained = re.fullmatch(r"hf:([\w./-]+)", builder or "")
        made = f"{named[2]}()" if named else "your_constructor()"
        if pretrained:
            first += "; from ockham.run.weights import huggingface_model"
            made = f"huggingface_model({pretrained[1]!r})"
        elif named:
            first += f"; from {named[1]} import {named[2]}"
        given = f", model={made}"
    shape = ", ".join(map(str, (1, *(inputs or ()))))
    last = "# outputs = network(inputs)" if inputs is None else f"outputs = network(torch.zeros({shape}))"
    return f"{first}\nnetwork = ockham.load({str(folder)!r}{given})\n{last}"


def write_result(folder: str | Path, result: Result) -> None:
    """Write all JSON files of a result, and take away those of an earlier one that it does not have.

    Everything is checked by the rules of `read_result` before the first file is written.

    Args:
        folder: folder, made where it is missing.
        result: values to write.

    Raises:
        ResultError: a value could not be read back; names the file and the field.
        OckhamError: the folder cannot be written.
    """
    path, made = Path(folder), result.provenance
    if not made.load:
        shape = made.dataset.inputs if made.dataset else None
        made = replace(made, load=load_lines(folder, made.network.builder if made.network else None, shape))
    values = {name: getattr(result, name) for name in _PARTS if getattr(result, name) is not None}
    files = {path / f"{name}.json": value for name, value in values.items()} | {path / RESULT: made}
    plain = {}
    for file, value in files.items():
        try:
            plain[file] = to_plain(value)
            from_plain(type(value), plain[file])
        except ResultError as error:
            raise ResultError(f"{file}: cannot be written ({error})") from error
    plain[path / RESULT]["parts"] = list(values)
    for name in _PARTS.keys() - values.keys():
        (path / f"{name}.json").unlink(missing_ok=True)
    for file, content in plain.items():  # result.json last: it says which parts there are
        write_json(file, {"schema": SCHEMA} | content)


def read_result(folder: str | Path) -> Result:
    """Read and check all JSON files of a result folder, of this version or an older one.

    Raises:
        ResultError: a file is missing, damaged, foreign or newer; names the file, the field and the reason.
    """
    path = Path(folder)
    head, version = _loaded(path / RESULT)
    parts: Any = head.get("parts")
    if version < 2:  # no list of parts: gates had neither history nor analysis, all else had both
        gates = _loaded(path / "metrics.json")[0].get("method") == "bmrs"
        more = ["structure"] * (path / "structure.json").exists()
        parts = ["metrics", "gates"] if gates else ["metrics", "history", "analysis", *more]
    if not isinstance(parts, list) or "metrics" not in parts or any(name not in [*_PARTS] for name in parts):
        raise ResultError(f"{path / RESULT}: damaged or foreign ({wrong('parts', 'names of parts', parts)})")
    plain = {name: _loaded(path / f"{name}.json")[0] for name in parts}
    if version < 2:
        _upgrade(path, head, plain)
    values = {name: _parsed(path / f"{name}.json", _PARTS[name], content) for name, content in plain.items()}
    return Result(provenance=_parsed(path / RESULT, Provenance, head), **values)


def _loaded(path: Path) -> tuple[dict[str, Any], int]:
    """Content and schema of a file; nothing but a plain file of a bounded size is opened."""
    try:
        if not path.is_file():
            raise ResultError("no such file; a result folder is what `ockham compress --out FOLDER` wrote")
        if path.stat().st_size > _LONGEST_FILE:
            raise ResultError(f"{path.stat().st_size:,} bytes, at most {_LONGEST_FILE:,} are read; not a result")
        content: dict[str, Any] = _parsed(path, Mapping[str, Any], read_json(path))
        version: int = _parsed(path, Count, content.get("schema", 0), "schema")
        if version > SCHEMA:
            raise ResultError(f"written by a newer Ockham (schema {version}, this one reads up to {SCHEMA}); upgrade")
    except (OSError, RecursionError, ResultError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ResultError(f"{path}: {reason.removeprefix(f'{path}: ')}") from error
    return content, version


def _upgrade(folder: Path, head: dict[str, Any], plain: Mapping[str, dict[str, Any]]) -> None:
    """Put files of version 0 and 1 into the words of version 2, in place; damage is left for the check to find."""

    def table(owner: Mapping[str, Any], key: str) -> dict[str, Any]:
        value = owner.get(key)
        return value if isinstance(value, dict) else {}

    settings, metrics = table(head, "settings"), plain["metrics"]
    if "one_shot" in settings:
        once = settings.pop("one_shot")
        metrics |= {"method": "kronecker" if once == "kronecker" else "laplace", "draws": 1}
        settings["keep_share"] = settings.pop("keep", None)
    if "gates" in plain:
        metrics |= {"draws": 1} | ({} if metrics.get("before") is None else {"before_source": "adam"})
        for epoch in plain["gates"].get("epochs") or ():  # a group with one structure left was not listed
            start, widths = (table(epoch, key) if isinstance(epoch, dict) else {} for key in ("start", "widths"))
            for name in start.keys() - widths.keys():
                widths[name] = 1
    slab = str(settings.get("prior")).startswith("FixedSpikeSlab")
    metrics.setdefault("method", "spike-slab" if slab else "evidence")
    for side in (table(metrics, "before"), table(metrics, "after")):
        if isinstance(side.get("latency_ms"), (int, float)):
            side["latency_1"] = side.pop("latency_ms") / 1000
    builder = table(head, "network").get("builder")
    head["load"] = load_lines(folder, builder if isinstance(builder, str) else None)


def _parsed(path: Path, kind: Any, content: Any, at: str = "") -> Any:
    try:
        return from_plain(kind, content, at)
    except ResultError as error:
        raise ResultError(f"{path}: damaged or foreign ({error})") from error
