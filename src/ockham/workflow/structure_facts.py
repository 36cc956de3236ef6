"""What the removal of structures changed: widths, parameters, multiply-accumulates, bytes, measured latency."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from ockham.surgery.cost import cost, latencies
from ockham.workflow.compression import Compressed

__all__ = ["STRUCTURE", "structure_facts"]

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
