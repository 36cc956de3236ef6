"""Pictures of a run with gates: distributions, evidence, widths, accuracy against compression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ockham.report.axes import integers, percents, thousands, ylabel
from ockham.report.canvas import AFTER, BEFORE, GONE, INK, MUTED, draw
from ockham.report.words import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["curve", "evidence", "gates", "widths"]

Record = Mapping[str, Any]


def gates(key: str, layer: Record) -> str:
    """Every gate of a layer as its mean and two standard deviations of ln theta, most alive first.

    Args:
        key: unique name.
        layer: ``mean``, ``std``, ``theta`` and ``keep`` of its gates, and its ``id``.
    """
    label = f"Gates of {layer['id']}: {sum(layer['keep'])} of {len(layer['keep'])} stay"
    return draw(key, label, 2.6, partial(_gates, layer=layer))


def evidence(key: str, layer: Record) -> str:
    """The true delta_f of every gate of a layer, in order, on a symmetric logarithmic axis."""
    label = f"Evidence of the gates of {layer['id']}, nats"
    return draw(key, label, 2.6, partial(_evidence, layer=layer), margins=(0.8, 0.2, 0.5, 0.12))


def widths(epochs: Sequence[Record]) -> str:
    """Structures that are left in every layer, over the epochs, as a share of the first."""
    label = f"Widths over {len(epochs)} epochs"
    return draw("widths", label, 3.2, partial(_widths, epochs=epochs), margins=(0.74, 1.3, 0.5, 0.12))


def curve(curves: Mapping[str, Record]) -> str:
    """Accuracy against the share of parameters removed, a line a rule, a dot where it stops by itself."""
    label = "Accuracy against compression: " + ", ".join(f"{n} stops at {percent(_stop(c))}" for n, c in curves.items())
    return draw("curve", label, 3.6, partial(_curve, curves=curves), margins=(0.74, 0.9, 0.5, 0.12))


def _stop(record: Record) -> float:
    return float(record["stop"]["removed"])


def _gates(figure: Figure, layer: Record) -> None:
    axes = figure.add_subplot()
    order = sorted(range(len(layer["mean"])), key=lambda i: -layer["theta"][i])
    for place, i in enumerate(order):
        colour = AFTER if layer["keep"][i] else GONE
        low, high = (layer["mean"][i] + s * 2 * layer["std"][i] for s in (-1, 1))
        axes.plot([place, place], [max(-20, low), min(0, high)], color=colour, linewidth=1.2, alpha=0.45)
        axes.plot([place], [min(0, max(-20, layer["mean"][i]))], marker="o", markersize=2.5, color=colour)
    axes.set(ylim=(-20.5, 0.8), xlabel="gates, largest E[θ] first")
    integers(axes)
    ylabel(axes, "ln θ")


def _evidence(figure: Figure, layer: Record) -> None:
    axes = figure.add_subplot()
    order = sorted(range(len(layer["delta_f"])), key=lambda i: layer["delta_f"][i])
    colours = [AFTER if layer["keep"][i] else GONE for i in order]
    axes.scatter(range(len(order)), [layer["delta_f"][i] for i in order], s=9, c=colours)
    axes.axhline(0, color=INK, linewidth=1)
    axes.axhline(-0.9189385, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yscale("symlog", linthresh=1.0)
    thousands(axes.yaxis)
    axes.set_xlabel("gates, least removable first")
    integers(axes)
    ylabel(axes, "ΔF, nats")


def _widths(figure: Figure, epochs: Sequence[Record]) -> None:
    axes = figure.add_subplot()
    first = epochs[0]["start"]
    ends = {name: epochs[-1]["widths"].get(name, 1) / first[name] for name in first}
    heights = dict(zip(sorted(ends, key=lambda k: ends[k]), _apart(sorted(ends.values())), strict=True))
    for n, name in enumerate(first):
        shares = [1.0] + [e["widths"].get(name, 1) / first[name] for e in epochs]
        shade = 1 - 0.6 * n / max(1, len(first) - 1)
        axes.plot([0, *(e["epoch"] for e in epochs)], shares, color=AFTER, alpha=shade)
        text = f"{name.split(':')[0].removesuffix('.weight')}: {epochs[-1]['widths'].get(name, 1)} of {first[name]}"
        if len(first) <= 9:
            axes.text(
                1.02, heights[name], text[:22], transform=axes.get_yaxis_transform(), color=MUTED, size=8, va="center"
            )
    axes.set(ylim=(0, 1.03), xlabel="epoch")
    integers(axes)
    percents(axes.yaxis)
    ylabel(axes, "structures left")


def _apart(heights: Sequence[float], least: float = 0.075) -> list[float]:
    """Ascending heights in [0, 1], moved as little as it takes for labels not to overlap."""
    placed: list[float] = []
    for n, height in enumerate(heights):
        room = 1.0 - least * (len(heights) - 1 - n)
        placed.append(min(max(height, placed[-1] + least if placed else 0.0), max(room, 0.0)))
    return placed


def _curve(figure: Figure, curves: Mapping[str, Record]) -> None:
    axes = figure.add_subplot()
    styles = [(colour, line) for line in ("-", "--", ":") for colour in (AFTER, BEFORE, GONE)]
    for n, (name, record) in enumerate(curves.items()):
        colour, line = styles[n % len(styles)]
        points = sorted(record["points"], key=lambda p: p["removed"])
        axes.plot(
            [p["removed"] for p in points], [p["measures"]["accuracy"] for p in points], line, color=colour, label=name
        )
        stop = record["stop"]
        if stop["structures"]:
            axes.plot([stop["removed"]], [stop["measures"]["accuracy"]], marker="o", markersize=6, color=colour)
    axes.set_xlabel("parameters removed")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8.5, labelcolor=MUTED)
    percents(axes.xaxis)
    percents(axes.yaxis)
    ylabel(axes, "accuracy")
