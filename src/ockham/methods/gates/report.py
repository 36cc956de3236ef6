"""What a gate run shows: its curve of evidence and its page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ockham.choose.planning import plan
from ockham.methods.gates.attach import Gates
from ockham.methods.gates.rules import GateRule
from ockham.report import page
from ockham.report.figures import AFTER, BEFORE, GONE, INK, PALETTE, drawing, integers, percents, thousands, ylabel
from ockham.report.html import Addition
from ockham.report.page import count, percent
from ockham.run.records import GateCurve, GateLayer, GateWidths
from ockham.run.schema import GateFacts, Result, Settings

__all__ = [
    "Curve",
    "CurvePoint",
    "compression_curve",
    "curve_figure",
    "curves_as_plain",
    "evidence_figure",
    "gate_curves",
    "gate_layers",
    "gate_sections",
    "gate_warnings",
    "gate_widths",
    "gated_without",
    "gates_figure",
    "parameters_left",
    "widths_figure",
]


MeasureNetwork = Callable[[nn.Module], Mapping[str, float]]
"""A network in evaluation mode to named numbers, such as accuracy and NLL."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One compression.

    Attributes:
        structures: number of removed ones.
        removed: share of the learnable values that are physically gone.
        measures: results of the network there, E[theta] in place of the noise, no refit.
    """

    structures: int
    removed: float
    measures: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Curve:
    """One rule.

    Attributes:
        points: compressions from nothing removed to one structure a group.
        stop: place where the rule stops by itself; nothing removed for rules that only order.
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
        gates: gates of a trained network.
        rules: rules by name.
        measure: function of the network, which is in evaluation mode then.
        points: number of compressions, besides the stop.
        sensitivity: result of `ockham.methods.gates.training.gate_sensitivity`, for the Taylor rule.

    Returns:
        Name to curve.
    """
    most = sum(len(p) - 1 for p in gates.places.values())
    counts = sorted({round(most * math.sin(0.5 * math.pi * i / max(1, points - 1))) for i in range(points)})
    curves = {}
    for name, rule in rules.items():
        evidence = gates.evidence(rule, sensitivity=sensitivity)
        found = tuple(_point(gates, evidence.matched(n), measure) for n in counts)
        curves[name] = Curve(found, _point(gates, evidence.keep, measure))
    return curves


def _point(gates: Gates, keep: Mapping[str, Tensor], measure: MeasureNetwork) -> CurvePoint:
    with gated_without(gates, keep) as model:
        measures = dict(measure(model))
    total, left = parameters_left(gates, {k: torch.ones_like(m) for k, m in keep.items()}), parameters_left(gates, keep)
    return CurvePoint(sum(int((~m).sum()) for m in keep.values()), 1 - left / total, measures)


@contextmanager
def gated_without(gates: Gates, keep: Mapping[str, Tensor]) -> Iterator[nn.Module]:
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


_START_LOG_STD = -5.0  # where `GateNoise` starts the ln standard deviation of ln theta; its mean starts at 0
_MOST_LAYERS = 12  # drawn one by one; the table has all
_MOST_GATES = 200  # drawn of one layer, evenly spaced in its order
_THRESHOLD = -0.5 * math.log(2 * math.pi)  # of the released rule, nats


def gate_sections(result: Result) -> Addition:
    """Sections and warnings of a result with gates; nothing of any other."""
    if result.gates is None:
        return Addition()
    gates = result.gates
    sections = (gate_widths(gates), gate_layers(gates), gate_curves(gates))
    return Addition(tuple(s for s in sections if s), tuple(gate_warnings(result, gates)))


def gates_figure(key: str, layer: GateLayer) -> str:
    """Gates of a layer, each as its mean and two standard deviations of ln theta, most alive first.

    Args:
        key: unique name.
        layer: living gates before a decision, and what was decided.
    """
    label = f"Gates of {layer.id}: {sum(layer.keep)} of {len(layer.keep)} stay"
    with drawing(key, label, 2.6) as sheet:
        axes = sheet.figure.add_subplot()
        for place, i in _spread(sorted(range(len(layer.keep)), key=lambda i: -(layer.theta[i] or 0.0))):
            mean, std, colour = layer.mean[i], layer.std[i], AFTER if layer.keep[i] else GONE
            if mean is not None and std is not None:
                ends = [max(-20, mean - 2 * std), min(0, mean + 2 * std)]
                axes.plot([place, place], ends, color=colour, linewidth=1.2, alpha=0.45)
                axes.plot([place], [min(0, max(-20, mean))], marker="o", markersize=2.5, color=colour)
        axes.set(ylim=(-20.5, 0.8), xlabel="gates, largest E[θ] first")
        integers(axes)
        ylabel(axes, "ln θ")
    return sheet.svg


def evidence_figure(key: str, layer: GateLayer) -> str:
    """The true delta_f of the gates of a layer, in order, on a symmetric logarithmic axis."""
    known = [(value, keep) for value, keep in zip(layer.delta_f, layer.keep, strict=True) if value is not None]
    with drawing(key, f"Evidence of the gates of {layer.id}, nats", 2.6, margins=(0.8, 0.2, 0.5, 0.12)) as sheet:
        axes = sheet.figure.add_subplot()
        shown = [(place, *known[i]) for place, i in _spread(sorted(range(len(known)), key=lambda i: known[i][0]))]
        colours = [AFTER if keep else GONE for _, _, keep in shown]
        axes.scatter([place for place, _, _ in shown], [value for _, value, _ in shown], s=9, c=colours)
        axes.axhline(0, color=INK, linewidth=1)
        axes.axhline(_THRESHOLD, color=BEFORE, linewidth=1, linestyle=(0, (4, 3)))
        if max((abs(value) for value, _ in known), default=0.0) > 1:
            axes.set_yscale("symlog", linthresh=1.0)
        thousands(axes.yaxis)
        axes.set_xlabel("gates, least removable first")
        integers(axes)
        ylabel(axes, "ΔF, nats")
    return sheet.svg


def _spread(order: Sequence[int]) -> list[tuple[int, int]]:
    """(place, item) of at most `_MOST_GATES` items, evenly spaced."""
    step = max(1.0, len(order) / _MOST_GATES)
    places = sorted({int(i * step) for i in range(min(len(order), _MOST_GATES))})
    return [(place, order[place]) for place in places]


def widths_figure(epochs: Sequence[GateWidths]) -> tuple[str, list[tuple[str, str]]]:
    """Structures that are left in every layer over the epochs, as a share of the first.

    Returns:
        The picture, and a legend with one colour for each curve; the ten layers that lost most where there are more.
    """
    first, last = epochs[0].start, epochs[-1].widths
    lost = {name: last.get(name, n) / max(1, n) for name, n in first.items()}
    shown = [name for name in first if name in sorted(lost, key=lambda k: lost[k])[: len(PALETTE)]]
    curves = [
        (f"c{n}", PALETTE[n], f"{name}: {last.get(name, first[name]):,} of {first[name]:,}",
         [(0.0, 1.0), *((e.epoch, e.widths.get(name, first[name]) / max(1, first[name])) for e in epochs)])
        for n, name in enumerate(shown)
    ]  # fmt: skip
    with drawing("widthsofgates", f"Widths over {len(epochs)} epochs", 3.2) as sheet:
        axes = sheet.figure.add_subplot()
        for _, colour, _, points in curves:
            axes.plot([x for x, _ in points], [y for _, y in points], color=colour, alpha=0.85)
        axes.set(ylim=(0, 1.03), xlabel="epoch")
        integers(axes)
        percents(axes.yaxis)
        ylabel(axes, "structures left")
    return sheet.svg, [(key, text) for key, _, text, _ in curves]


def curve_figure(curves: Mapping[str, GateCurve]) -> tuple[str, list[tuple[str, str]]]:
    """Accuracy against the share of parameters removed, a colour a rule, a dot where it stops by itself.

    Returns:
        The picture, and its legend.
    """
    label = "Accuracy against compression: " + ", ".join(
        f"{name} stops at {percent(curve.stop.removed)}" for name, curve in curves.items()
    )
    shown = list(zip(curves.items(), PALETTE, strict=False))
    with drawing("curve", label, 3.6) as sheet:
        axes = sheet.figure.add_subplot()
        for (_, curve), colour in shown:
            points = sorted((p.removed, p.measures.accuracy) for p in curve.points if p.measures.accuracy is not None)
            axes.plot([x for x, _ in points], [y for _, y in points], color=colour, alpha=0.85)
            if curve.stop.structures and curve.stop.measures.accuracy is not None:
                axes.plot([curve.stop.removed], [curve.stop.measures.accuracy], "o", markersize=6, color=colour)
        axes.set_xlabel("parameters removed")
        percents(axes.xaxis)
        percents(axes.yaxis)
        ylabel(axes, "accuracy")
    return sheet.svg, [(f"c{n}", name) for n, ((name, _), _) in enumerate(shown)]


def gate_warnings(result: Result, gates: GateFacts) -> list[str]:
    """What a reader must know of gates before trusting the result, in plain words."""
    quiet = sum(sum(layer.no_evidence) for layer in gates.layers)
    total = sum(len(layer.keep) for layer in gates.layers)
    found = _why_nothing_went(result, gates)
    if quiet:
        found.append(
            f"For {quiet} of {total} gates the data say nothing at all (their posterior is their prior, to within 0.01 "
            "nats). Rules that remove them remove what nobody asked for."
        )
    single = [layer.id for layer in gates.layers if sum(layer.keep) == 1 < len(layer.keep)]
    if single:
        found.append(f"Only one structure is left in {', '.join(single)}: the rule would have removed the whole layer.")
    price = gates.kl_weight.removeprefix("Tempered(temperature=").removesuffix(")")
    if price != gates.kl_weight:
        found.append(
            f"Keeping a structure was made {price.removesuffix('.0')} times as dear as the data make it: treat the "
            "nats as a ranking, not as odds."
        )
    elif gates.kl_weight != "true_elbo":
        found.append(
            f"The price of a structure follows the reproduction setting “{gates.kl_weight}”, not the number of "
            "examples: what is called evidence here is a ranking, and none in nats of the data."
        )
    return found


def _why_nothing_went(result: Result, gates: GateFacts) -> list[str]:
    """Where no structure went: whether the gates were still on their way, and how far the steps could carry them."""
    last = gates.epochs[-1].widths if gates.epochs else {}
    stds = [std for layer in gates.layers for std in layer.std if std is not None and std > 0]
    if not stds or any(last.get(name, n) < n for name, n in gates.epochs[0].start.items()):
        return []
    settings, data = result.provenance.settings or Settings(), result.provenance.dataset
    moved = sum(math.log(std) for std in stds) / len(stds) - _START_LOG_STD
    ratio, rate = settings.others.get("gate_rate", 1.0), settings.learning_rate
    if data is not None and data.n_train and settings.batch_size and settings.epochs and rate:
        steps = settings.epochs * math.ceil(data.n_train / settings.batch_size)
        reach = steps * rate * (ratio if isinstance(ratio, (int, float)) else 1.0)
        if moved > 0.5 * reach:
            return [
                f"No structure went, because the gates hardly moved: in {count(steps)} steps at a learning rate of "
                f"{rate:g} the spread of a gate can grow {math.exp(min(reach, 50.0)):.2g}-fold at most, and about "
                "150-fold is needed before it can close. This says nothing about the network: train for more epochs, "
                "or at a higher rate."
            ]
    if moved < 0.2:
        return [
            "No structure went, because the gates stayed where they started: nothing pushed them, neither the data "
            "nor the price of a structure. Train for more epochs, or raise the price (--temperature)."
        ]
    best = max((d for layer in gates.layers for d in layer.delta_f if d is not None), default=0.0)
    return [
        "No structure went, although the gates had settled: the data ask for every one of them (the least needed is "
        f"worth {-best:,.1f} nats). A higher price (--temperature) or a budget (--keep-share) would force some out."
    ]


def gate_widths(gates: GateFacts) -> str:
    """Section on the widths over the epochs; nothing where there were no epochs."""
    if not gates.epochs:
        return ""
    svg, legend = widths_figure(gates.epochs)
    text = "Share of structures left in every layer after each epoch; at the end, how many of how many."
    if len(gates.epochs[0].start) > len(legend):
        text += f" The {len(legend)} layers that lost most, of {len(gates.epochs[0].start)}."
    last = gates.epochs[-1].widths
    rows = [(name, count(n), count(last.get(name, n))) for name, n in gates.epochs[0].start.items()]
    table = page.table("Structures of each layer", ("layer", "at first", "left"), rows)
    figure = page.figure("Widths", svg, text, legend=legend)
    return page.section("widths", "Widths over the epochs", page.grid([figure, table]))


def gate_layers(gates: GateFacts) -> str:
    """Section on the gates before the last decision, layer by layer."""
    if not gates.layers:
        return page.section("gates", "Gates, layer by layer", page.paragraph("No decision about gates took place."))
    text = page.paragraph(
        "Each gate is a factor θ = e^y between e^-20 and 1 on one structure. Drawn: the posterior of y before the last "
        "decision (mean and two standard deviations, cut off to the interval), and the true evidence change ΔF for "
        "taking the structure out; positive favours removal."
    )
    figures, keys = [], [("after", "stays"), ("gone", "goes")]
    lines = [("mark", "no change of the evidence"), ("before", "threshold of the released rule, −½ ln 2π (dashed)")]
    for i, layer in enumerate(gates.layers[:_MOST_LAYERS]):
        stays = f"{sum(layer.keep)} of {len(layer.keep)} stay"
        stays += f"; {_MOST_GATES} of them drawn" if len(layer.keep) > _MOST_GATES else ""
        figures.append(page.figure(f"{layer.id}: posterior", gates_figure(f"gates{i}", layer), stays, legend=keys))
        svg = evidence_figure(f"gateevidence{i}", layer)
        figures.append(page.figure(f"{layer.id}: evidence", svg, stays, legend=keys + lines))
    some = page.paragraph(f"The first {_MOST_LAYERS} of {len(gates.layers)} layers; the table has all.", "quiet")

    def middle(values: Sequence[float | None]) -> str:
        known = sorted(v for v in values if v is not None)
        return f"{known[len(known) // 2]:.3g}".replace("-", "\N{MINUS SIGN}") if known else "–"

    rows = [
        (layer.id, str(len(layer.keep)), str(sum(layer.keep)), str(sum(layer.no_evidence)), middle(layer.theta),
         middle(layer.delta_f), f"{sum(v for v in layer.kl if v is not None):.4g}")
        for layer in gates.layers
    ]  # fmt: skip
    header = ("layer", "gates", "stay", "posterior = prior", "median E[θ]", "median ΔF, nats", "KL, nats")
    table = page.table("Gates before the last decision", header, rows)
    many = some if len(gates.layers) > _MOST_LAYERS else ""
    return page.section("gates", "Gates, layer by layer", text, many, page.grid(figures), table)


def gate_curves(gates: GateFacts) -> str:
    """Section on accuracy against compression; nothing where structures went during training."""
    if not gates.curves:
        return ""
    text = page.paragraph(
        "After training, structures taken out step by step in the order of each rule, without refitting, on held-out "
        "data. A dot marks where a rule stops by itself; rules without one only order, or find nothing to remove. (The "
        "Taylor rule takes structures without any gradient by itself.) Where rules agree, their curves lie on each "
        "other."
    )
    rows = [
        (
            name,
            percent(curve.stop.removed) if curve.stop.structures else "removes nothing by itself",
            percent(curve.stop.measures.accuracy, 2) if curve.stop.structures else "–",
        )
        for name, curve in gates.curves.items()
    ]
    table = page.table("Where the rules stop", ("rule", "parameters removed", "accuracy"), rows)
    svg, legend = curve_figure(gates.curves)
    figure = page.figure("Accuracy against compression", svg, legend=legend)
    return page.section("curve", "Accuracy against compression", text, page.grid([figure, table]))
