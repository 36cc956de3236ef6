"""What the report says of a network: measures, reliability, shift, foreign inputs, which input pixels still count."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ockham.choose.paths import chain_weights, node_inclusion
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
from ockham.run.result import stored_values
from ockham.surgery.cost import cost, latencies
from ockham.zoo.data import Dataset

__all__ = [
    "STRUCTURE",
    "NetworkFacts",
    "compressed_facts",
    "input_inclusion",
    "input_map",
    "network_facts",
    "structure_facts",
]

_SHIFT_EXAMPLES = 500
_SHIFT_DRAWS = 10  # twenty corrupted copies of every example are predicted, so fewer draws than for the test set


@dataclass(frozen=True, slots=True)
class NetworkFacts:
    """Plain values about one predictor on one data set.

    Attributes:
        measures: of `ockham.run.measure.measures`.
        parameters: nonzero learnable values.
        reliability: 15 bins, classifiers only.
        shift: accuracy and ECE under corruption, image classifiers only.
        ood: AUROC of entropy against foreign inputs, classifiers only.
        ood_name: what the foreign inputs are.
        input_map: kept first-layer weights per input pixel, image inputs only.
    """

    measures: dict[str, float]
    parameters: int
    reliability: dict[str, Any] | None
    shift: dict[str, dict[str, list[float]]] | None
    ood: float | None
    ood_name: str
    input_map: list[list[int]] | None


def network_facts(model: nn.Module, data: Dataset, noise_variance: float | None, foreign: Tensor) -> NetworkFacts:
    """Of a network as it stands; ``noise_variance`` None means a classifier."""
    predictor = mean_predictor(model, classify=noise_variance is None)
    return _facts(predictor, predictor, model, data, noise_variance, foreign)


def compressed_facts(
    result: Compressed, data: Dataset, foreign: Tensor, *, draws: int, seed: int
) -> tuple[NetworkFacts, NetworkFacts]:
    """Of the posterior predictive, and of the mean network."""
    noise = result.noise_variance

    def predictor(count: int) -> Predictor:
        return posterior_predictor(result.model, result.posterior, classify=noise is None, draws=count, seed=seed)

    few = predictor(min(draws, _SHIFT_DRAWS))
    after = _facts(predictor(draws), few, result.model, data, noise, foreign)
    return after, network_facts(result.model, data, noise, foreign)


def _facts(
    predictor: Predictor, quick: Predictor, model: nn.Module, data: Dataset, noise: float | None, foreign: Tensor
) -> NetworkFacts:
    x, y = data.test_x, data.test_y
    outputs = predictor(x)
    found = measures(lambda _: outputs, x, y, noise_variance=noise)
    few = slice(0, _SHIFT_EXAMPLES)
    shapes = noise is None and y.ndim == 1
    return NetworkFacts(
        found,
        stored_values(model),
        reliability_of(lambda _: outputs, x, y) if shapes else None,
        corruption_shift(quick, x[few], y[few], low=data.low, high=data.high) if shapes and data.image_shape else None,
        ood_auroc(quick, x[few], foreign[few]) if shapes else None,
        "foreign inputs" if foreign.shape[1:] != x.shape[1:] else "test inputs with their pixels permuted",
        input_map(model, data),
    )


@torch.no_grad()
def input_map(model: nn.Module, data: Dataset) -> list[list[int]] | None:
    """Kept first-layer weights per pixel [H][W], all channels; None if the first layer is no Linear on pixels."""
    first = next((m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))), None)
    if data.image_shape is None or not isinstance(first, nn.Linear):
        return None
    channels, height, width = data.image_shape
    if first.in_features != channels * height * width:
        return None
    counts = (first.weight != 0).sum(0).view(channels, height, width).sum(0)
    return [[int(c) for c in row] for row in counts]


def input_inclusion(model: nn.Module, posterior: Posterior) -> list[float] | None:
    """Probability that a living path leads from each input to an output (path rule); of plain chains of layers only.

    None where the posterior has no inclusion probabilities, or the network is not one `nn.Sequential` of Linear layers.
    """
    layers = [m for m in model.modules() if not list(m.children())]
    chain = isinstance(model, nn.Sequential) and all(
        isinstance(m, nn.Linear) or not list(m.parameters()) for m in layers
    )
    if not chain or any(g.inclusion is None for g in posterior.values()):
        return None
    return [round(float(p), 6) for p in node_inclusion(chain_weights(model, posterior)).inputs]


STRUCTURE = "structure.json"
BATCHES = (1, 64)


def structure_facts(before: nn.Module, result: Compressed, example: Any) -> dict[str, Any]:
    """Plain values for ``structure.json``.

    Args:
        before: the network before anything went; only its shapes matter.
        result: of the compression, with its plan.
        example: inputs of one example, on the networks' device.

    Returns:
        ``groups``: id, width before and after, nats that the removed units were worth; ``before`` and ``after``:
        parameters, bytes (dense), macs of one example, latency in seconds by batch size (median, warm, the two
        networks measured in turn); ``rounds``: what each removed.
    """
    plan = result.plan
    assert plan is not None
    groups = [
        {
            "id": key,
            "before": width,
            "after": width - len(plan.removed.get(key, ())),
            "nats": sum(plan.nats.get(key, ())),
        }
        for key, width in plan.widths.items()
    ]
    networks = (before, result.model)
    times = {batch: latencies(networks, example, batch=batch) for batch in BATCHES}
    sides = [
        asdict(cost(network, example)) | {f"latency_{batch}": times[batch][i] for batch in BATCHES}
        for i, network in enumerate(networks)
    ]
    rounds = [asdict(info) for info in result.structures]
    return {"groups": groups, "before": sides[0], "after": sides[1], "rounds": rounds}
