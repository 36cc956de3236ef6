"""After training: accuracy against compression, one curve a rule, with the place where each rule stops by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ockham.choose.planning import plan
from ockham.methods.gates.attach import Gates
from ockham.methods.gates.rules import GateEvidence, GateRule

__all__ = [
    "Curve",
    "CurvePoint",
    "compression_curve",
    "curves_as_plain",
    "parameters_left",
    "without",
]

MeasureNetwork = Callable[[nn.Module], Mapping[str, float]]
"""A network in evaluation mode to named numbers, such as accuracy and NLL."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One compression.

    Attributes:
        structures: removed.
        removed: share of the learnable values that are physically gone.
        measures: of the network there, E[theta] in place of the noise, no refit.
    """

    structures: int
    removed: float
    measures: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Curve:
    """One rule.

    Attributes:
        points: from nothing removed to one structure a group.
        stop: where the rule stops by itself; with nothing removed for rules that only order.
    """

    points: tuple[CurvePoint, ...]
    stop: CurvePoint


def compression_curve(
    gates: Gates,
    rules: Mapping[str, GateRule],
    measure: MeasureNetwork,
    *,
    points: int = 12,
    sensitivity: Tensor | None = None,
) -> dict[str, Curve]:
    """Remove by each rule's order, step by step, and measure; nothing stays removed.

    Choose a rule and a place on held-out data: reading the test set at every point is choosing on it.

    Args:
        gates: of a trained network.
        rules: by name.
        measure: what to measure; the network is in evaluation mode then.
        points: number of compressions, besides the stop.
        sensitivity: for the Taylor rule, see `ockham.methods.gates.training.gate_sensitivity`.

    Returns:
        Name to curve.
    """
    return {
        name: _curve(gates, gates.evidence(rule, sensitivity=sensitivity), measure, points)
        for name, rule in rules.items()
    }


def _curve(gates: Gates, evidence: GateEvidence, measure: MeasureNetwork, points: int) -> Curve:
    most = sum(len(p) - 1 for p in gates.places.values())
    counts = sorted({round(most * math.sin(0.5 * math.pi * i / max(1, points - 1))) for i in range(points)})
    found = tuple(_point(gates, evidence.matched(n), measure) for n in counts)
    return Curve(found, _point(gates, evidence.keep, measure))


def _point(gates: Gates, keep: Mapping[str, Tensor], measure: MeasureNetwork) -> CurvePoint:
    with without(gates, keep) as model:
        measures = dict(measure(model))
    total, left = parameters_left(gates, {k: torch.ones_like(m) for k, m in keep.items()}), parameters_left(gates, keep)
    return CurvePoint(sum(int((~m).sum()) for m in keep.values()), 1 - left / total, measures)


@contextmanager
def without(gates: Gates, keep: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """The network in evaluation mode without some structures, as it was after the block."""
    before = gates.noise.keep.clone()
    modes = {m: m.training for m in gates.model.modules()}
    stays = before.clone()
    for group, mask in keep.items():
        stays[gates.places[group]] &= mask.to(stays.device)
    try:
        gates.noise.keep.copy_(stays)
        yield gates.model.eval()
    finally:
        gates.noise.keep.copy_(before)
        for module, mode in modes.items():
            module.training = mode


def parameters_left(gates: Gates, keep: Mapping[str, Tensor]) -> int:
    """Learnable values of the network after surgery by masks, gates not counted."""
    small = plan(gates.groups, dict(keep))
    names = [name for name, _ in gates.model.named_parameters() if name in small.shapes]
    return sum(math.prod(small.shape(name)) for name in names)


def curves_as_plain(curves: Mapping[str, Curve]) -> dict[str, Any]:
    """JSON-able values of `compression_curve`."""
    return {name: asdict(curve) for name, curve in curves.items()}
