"""What a result says of its networks, measured here: predictions, plans and posteriors become parts of a `Result`."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ockham.choose.paths import chain_weights, node_inclusion
from ockham.core.plain import Count, Share, from_plain, to_plain
from ockham.core.posterior import Posterior
from ockham.run.engine import Compressed
from ockham.run.measure import (
    Predictor,
    corruption_shift,
    mean_predictor,
    measures,
    ood_auroc,
    posterior_predictor,
    reliability_of,
)
from ockham.run.records import (
    DiagnosisRecord,
    EpochRecord,
    ForeignInputs,
    GroupRecord,
    HistogramRecord,
    LayerRecord,
    Measures,
    ReliabilityPair,
    ReliabilityTable,
    RoundRecord,
    ShiftCurve,
    StructureRecord,
)
from ockham.run.result import layer_rows, stored_values
from ockham.run.schema import (
    Analysis,
    DataSource,
    History,
    NetworkSource,
    Provenance,
    Settings,
    Structure,
    load_lines,
)
from ockham.run.shift import SEVERITIES
from ockham.surgery.cost import cost, latencies
from ockham.version import __version__
from ockham.zoo.data import Dataset

__all__ = [
    "NetworkFacts",
    "analysis",
    "compressed_facts",
    "history",
    "input_map",
    "network_facts",
    "path_inclusion",
    "provenance",
    "structure",
]

_SHIFT_EXAMPLES = 500
_SHIFT_DRAWS = 10  # twenty corrupted copies of every example are predicted, so fewer draws than for the test set
_BATCHES = (1, 64)


@dataclass(frozen=True, slots=True)
class NetworkFacts:
    """What was measured of one network or posterior on one data set; `ockham.core.plain` makes JSON of it.

    Attributes:
        measures: measures of its predictions, and the number of its stored values.
        reliability: 15 bins of confidence, of classifiers only.
        shift: corruption to "accuracy" and "ece" at severities 1 to 5, of image classifiers only.
        ood: AUROC of the entropy against foreign inputs, of classifiers only.
        ood_name: words for what the foreign inputs are.
        input_map: kept first-layer weights per input pixel, of image inputs only.
    """

    measures: Measures
    reliability: ReliabilityTable | None
    shift: Mapping[str, Mapping[str, tuple[Share, ...]]] | None
    ood: Share | None
    ood_name: str
    input_map: tuple[tuple[Count, ...], ...] | None

    def stored(self, size: int) -> NetworkFacts:
        """The same with its size on disk, bytes."""
        return replace(self, measures=replace(self.measures, bytes=size))


def network_facts(model: nn.Module, data: Dataset, noise_variance: Tensor | None, foreign: Tensor) -> NetworkFacts:
    """Measure a network as it stands.

    Args:
        model: network with every weight at its one value.
        data: examples; those of the test part are used.
        noise_variance: that of a regression, or None for a classifier.
        foreign: inputs of another kind.
    """
    predictor = mean_predictor(model, classify=noise_variance is None)
    return _facts(predictor, predictor, model, data, noise_variance, foreign)


def compressed_facts(
    result: Compressed, data: Dataset, foreign: Tensor, *, draws: int, seed: int
) -> tuple[NetworkFacts, NetworkFacts]:
    """Measure the posterior predictive, and the mean network beside it."""
    noise = result.noise_variance

    def predictor(count: int) -> Predictor:
        return posterior_predictor(result.model, result.posterior, classify=noise is None, draws=count, seed=seed)

    few = predictor(min(draws, _SHIFT_DRAWS))
    after = _facts(predictor(draws), few, result.model, data, noise, foreign)
    return after, network_facts(result.model, data, noise, foreign)


def _facts(
    predictor: Predictor, quick: Predictor, model: nn.Module, data: Dataset, noise: Tensor | None, foreign: Tensor
) -> NetworkFacts:
    x, y = data.test_x, data.test_y
    outputs = predictor(x)
    found = measures(lambda _: outputs, x, y, noise_variance=noise)
    few = slice(0, _SHIFT_EXAMPLES)
    classes = noise is None and y.ndim == 1
    shift: dict[str, dict[str, tuple[float, ...]]] | None = None
    if classes and data.image_shape:
        curves = corruption_shift(quick, x[few], y[few], low=data.low, high=data.high)
        shift = {name: {k: tuple(v) for k, v in rows.items()} for name, rows in curves.items()}
    return NetworkFacts(
        Measures.of(found, parameters=stored_values(model)),
        from_plain(ReliabilityTable, reliability_of(lambda _: outputs, x, y)) if classes else None,
        shift,
        ood_auroc(quick, x[few], foreign[few]) if classes else None,
        "foreign inputs" if foreign.shape[1:] != x.shape[1:] else "test inputs with their pixels permuted",
        input_map(model, data),
    )


@torch.no_grad()
def input_map(model: nn.Module, data: Dataset) -> tuple[tuple[int, ...], ...] | None:
    """Kept first-layer weights per pixel [H][W], all channels; None if the first layer is no Linear on pixels."""
    first = next((m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))), None)
    if data.image_shape is None or not isinstance(first, nn.Linear):
        return None
    channels, height, width = data.image_shape
    if first.in_features != channels * height * width:
        return None
    counts = (first.weight != 0).sum(0).view(channels, height, width).sum(0)
    return tuple(tuple(int(c) for c in row) for row in counts)


def path_inclusion(model: nn.Module, posterior: Posterior) -> tuple[float, ...] | None:
    """Probability that a living path leads from each input to an output (path rule); of plain chains of layers only.

    None where the posterior has no inclusion probabilities, or the network is not one `nn.Sequential` of Linear layers.
    """
    layers = [m for m in model.modules() if not list(m.children())]
    chain = isinstance(model, nn.Sequential) and all(
        isinstance(m, nn.Linear) or not list(m.parameters()) for m in layers
    )
    if not chain or not posterior or any(g.inclusion is None for g in posterior.values()):
        return None
    return tuple(round(float(p), 6) for p in node_inclusion(chain_weights(model, posterior)).inputs)


def history(result: Compressed) -> History:
    """What a run says of its epochs and rounds."""
    epochs = tuple(
        EpochRecord(
            e.epoch,
            e.loss,
            None if math.isnan(e.accuracy) else e.accuracy,
            e.kept_share,
            kl=e.kl or None,
            parameters=e.parameters or None,
            widths=dict(e.widths) or None,
            removed=e.removed if e.widths else None,
        )
        for e in result.epochs
    )
    rounds = tuple(RoundRecord(**asdict(r)) for r in result.rounds)
    counts = tuple(HistogramRecord(h["epoch"], tuple(h["delta_f"])) for h in result.histograms)
    diagnosis = DiagnosisRecord(**asdict(result.diagnosis)) if result.diagnosis else None
    return History(epochs, rounds, counts, diagnosis)


def analysis(result: Compressed, after: NetworkFacts, before: NetworkFacts | None) -> Analysis:
    """What the reduced network is like, beside the network before where that was measured."""
    shift: dict[str, ShiftCurve] | None = None
    if after.shift is not None:
        old = (before.shift if before else None) or {}
        shift = {
            name: ShiftCurve(
                tuple(map(float, SEVERITIES)),
                old.get(name, {}).get("accuracy"),
                rows["accuracy"],
                old.get(name, {}).get("ece"),
                rows["ece"],
            )
            for name, rows in after.shift.items()
        }
    return Analysis(
        layers=from_plain(tuple[LayerRecord, ...], layer_rows(result.posterior, result.plan)) or None,
        reliability=ReliabilityPair(before.reliability if before else None, after.reliability)
        if after.reliability
        else None,
        input_map=after.input_map,
        input_inclusion=path_inclusion(result.model, result.posterior),
        shift=shift,
        ood=None if after.ood is None else ForeignInputs(after.ood_name, before.ood if before else None, after.ood),
    )


def structure(before: nn.Module, result: Compressed, example: Any) -> Structure | None:
    """What the removal of whole units changed, latencies measured in turn; None where no units were asked for.

    Args:
        before: network before anything went; only its shapes matter.
        result: outcome of the compression, with its plan.
        example: inputs of one example, on the networks' device.
    """
    plan, networks = result.plan, (before, result.model)
    if plan is None:
        return None
    gone = {key: len(plan.removed.get(key, ())) for key in plan.widths}
    groups = tuple(
        GroupRecord(key, width, width - gone[key], float(sum(plan.nats.get(key, ()))))
        for key, width in plan.widths.items()
    )
    times = {f"latency_{batch}": latencies(networks, example, batch=batch) for batch in _BATCHES}
    old, new = (
        Measures.of(asdict(cost(network, example)) | {name: values[i] for name, values in times.items()})
        for i, network in enumerate(networks)
    )
    return Structure(groups, old, new, tuple(StructureRecord(**asdict(r)) for r in result.structures))


def provenance(
    data: Dataset,
    settings: Mapping[str, Any],
    folder: Path,
    *,
    command: str,
    builder: str,
    seed: int,
    seconds: float,
    device: torch.device,
) -> Provenance:
    """How a result was made, on this machine and now.

    Args:
        data: examples of the run.
        settings: plain values by the name of the setting.
        folder: place where the result will be found, as typed.
        command: line as typed.
        builder: label of the network.
        seed: seed of all randomness.
        seconds: wall time of the run.
        device: place of the computation.
    """
    return Provenance(
        ockham=__version__,
        command=command,
        seed=seed,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=seconds,
        versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads, {device}",
        network=NetworkSource(builder),
        dataset=DataSource(data.name, len(data.train_x), len(data.test_x), data.name),
        settings=from_plain(Settings, to_plain(settings)),
        load=load_lines(folder, builder),
    )
