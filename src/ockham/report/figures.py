"""The pictures of a report: each function takes checked values and returns an inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ockham.report.canvas import (
    AFTER,
    BEFORE,
    GONE,
    INK,
    MUTED,
    TRACK,
    draw,
    integers,
    percents,
    show_the_rest,
    thousands,
    ylabel,
)
from ockham.report.folder import BINS
from ockham.report.page import count, percent, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "coverage",
    "evidence",
    "histogram",
    "input_map",
    "kept_share",
    "layers",
    "path",
    "reliability_diagram",
    "shift",
    "sizes",
    "width_bars",
]

Record = dict[str, Any]


def layers(rows: Sequence[Record]) -> str:
    """Kept share of every layer as horizontal bars, each with its counts."""
    label = "Kept share per layer: " + ", ".join(f"{r['name']} {percent(_share(r))}" for r in rows)
    return draw("layers", label, 0.55 + 0.44 * len(rows), partial(_layers, rows=rows), margins=(0.24, 0.3, 0.5, 0.05))


def histogram(key: str, counts: Sequence[int], *, line: float, label: str) -> str:
    """Weights over delta_f, with the decision line.

    Args:
        key: unique name.
        counts: in 60 bins over [-25, 5] nats.
        line: removal is favoured to its right, nats.
        label: for screen readers.
    """
    return draw(key, label, 2.9, partial(_histogram, counts=counts, line=line), margins=(0.8, 0.25, 0.5, 0.3))


def evidence(rounds: Sequence[Record]) -> str:
    """Free energy before every round, and the gain that each round predicted."""
    pairs = [(r["epoch"], r["free_energy"]) for r in rounds if r["free_energy"] is not None]
    ends = f" from {pairs[0][1]:,.0f} to {pairs[-1][1]:,.0f} nats" if pairs else ""
    label = f"Free energy over {len(rounds)} rounds{ends}"
    return draw("evidence", label, 3.4, partial(_evidence, rounds=rounds), margins=(0.95, 0.2, 0.5, 0.12))


def kept_share(epochs: Sequence[Record], rounds: Sequence[Record]) -> str:
    """Share of weights kept over the epochs, with a dot at every round."""
    label = f"Share of weights kept over {len(epochs)} epochs, at the end {percent(epochs[-1]['kept_share'])}"
    return draw("keptshare", label, 3.4, partial(_kept_share, epochs=epochs, rounds=rounds))


def path(epochs: Sequence[Record], before: float | None, after: tuple[float, float] | None) -> str:
    """Training accuracy (or loss, without classes) against the share kept.

    Args:
        epochs: of the history.
        before: test accuracy of the network it is compared with.
        after: share kept and test accuracy of the reduced network.
    """
    classes = any(e["accuracy"] is not None for e in epochs)
    label = f"{'Accuracy' if classes else 'Training loss'} against the share of weights kept"
    return draw("path", label, 2.9, partial(_path, epochs=epochs, classes=classes, before=before, after=after))


def reliability_diagram(key: str, bins: Record, *, colour: str, label: str) -> str:
    """Accuracy over confidence in bins, with the number of examples below."""
    return draw(key, label, 3.6, partial(_reliability, bins=bins, colour=colour))


def coverage(before: Sequence[float] | None, after: Sequence[float], nominal: Sequence[float]) -> str:
    """Observed against promised coverage of prediction intervals (regression)."""
    label = "Coverage of prediction intervals: " + ", ".join(
        f"promised {percent(n)}, observed {percent(a)}" for n, a in zip(nominal, after, strict=True)
    )
    return draw("coverage", label, 3.2, partial(_coverage, before=before, after=after, nominal=nominal))


def shift(key: str, name: str, curves: Record, *, clean: Record) -> str:
    """Accuracy and ECE over the severity of a corruption.

    Args:
        key: unique name.
        name: of the corruption.
        curves: as in ``analysis.json``.
        clean: values on clean data under the same keys, None where not known.
    """
    label = (
        f"{name}: accuracy and calibration error over severity; accuracy at the worst {percent(curves['after'][-1])}"
    )
    return draw(key, label, 2.25, partial(_shift, curves=curves, clean=clean))


def sizes(before: Record | None, after: Record) -> str:
    """Stored values and bytes on disk, before and after."""
    label = f"After: {count(after.get('parameters'))} stored values, {size(after.get('bytes'))} on disk"
    return draw("sizes", label, 2.6, partial(_sizes, before=before, after=after), margins=(0.05, 0.05, 0.05, 0.25))


def width_bars(rows: Sequence[Record]) -> str:
    """Width of every group of units before and after, as nested bars."""
    label = "Widths: " + ", ".join(f"{r['id']} {r['after']} of {r['before']}" for r in rows)
    return draw("widths", label, 0.55 + 0.44 * len(rows), partial(_widths, rows=rows), margins=(0.24, 0.3, 0.5, 0.05))


def input_map(rows: Sequence[Sequence[int]]) -> str:
    """Heat map of kept first-layer weights per input pixel."""
    high, wide = len(rows), len(rows[0])
    label = f"Map of {high} x {wide} input pixels, darker where more first-layer weights were kept"
    height, edges = max(0.6, min(4.4, 3.4 * high / wide)), (0.05, 0.05, 0.05, 0.05)
    return draw("inputmap", label, height, partial(_input_map, rows=rows), width=3.4, margins=edges)


def _share(row: Record) -> float:
    return row["kept"] / row["total"] if row["total"] else 0.0


def _short(name: str, room: int = 30) -> str:
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return name if len(name) <= room else f"{name[: room // 2]}…{name[-room // 2 + 1 :]}"


def _layers(figure: Figure, rows: Sequence[Record]) -> None:
    axes = figure.add_subplot()
    shares = [_share(r) for r in rows]
    least = min((s for s in shares if s), default=1.0)
    left = 10.0 ** math.floor(math.log10(least * 0.9)) if least < 0.05 else 0.0
    for i, (row, share) in enumerate(zip(rows, shares, strict=True)):
        axes.barh(i, 1 - left, left=left, height=0.3, color=TRACK)
        axes.barh(i, max(0.0, share - left), left=left, height=0.3, color=AFTER)
        place: Record = {"transform": axes.get_yaxis_transform(), "va": "baseline"}
        axes.text(0, i - 0.27, _short(row["name"]), color=INK, **place)
        numbers = f"{percent(share)}  ·  {row['kept']:,} of {row['total']:,}"
        axes.text(1, i - 0.27, numbers, ha="right", color=MUTED, size=8.5, **place)
    if left:
        axes.set_xscale("log")
    axes.set(xlim=(left, 1), ylim=(len(rows) - 0.6, -0.75), yticks=[])
    axes.set_xlabel("share kept" + (" (log scale)" if left else ""))
    axes.spines["left"].set_visible(False)
    percents(axes.xaxis)


def _widths(figure: Figure, rows: Sequence[Record]) -> None:
    axes = figure.add_subplot()
    most, least = max(r["before"] for r in rows), min(r["after"] for r in rows)
    wide = most > 30 * least
    left = 0.7 if wide else 0.0
    for i, row in enumerate(rows):
        axes.barh(i, row["before"] - left, left=left, height=0.3, color=TRACK)
        axes.barh(i, row["after"] - left, left=left, height=0.3, color=AFTER)
        place: Record = {"transform": axes.get_yaxis_transform(), "va": "baseline"}
        axes.text(0, i - 0.27, _short(row["id"]), color=INK, **place)
        axes.text(1, i - 0.27, f"{row['before']:,} → {row['after']:,}", ha="right", color=MUTED, size=8.5, **place)
    if wide:
        axes.set_xscale("log")
    axes.set(xlim=(left, most), ylim=(len(rows) - 0.6, -0.75), yticks=[])
    axes.set_xlabel("units" + (" (log scale)" if wide else ""))
    axes.spines["left"].set_visible(False)
    integers(axes) if not wide else thousands(axes.xaxis)


def _histogram(figure: Figure, counts: Sequence[int], line: float) -> None:
    axes = figure.add_subplot()
    width = 30 / BINS
    middles = [-25 + width * (i + 0.5) for i in range(BINS)]
    axes.bar(middles, counts, width=0.9 * width, color=[GONE if m > line else AFTER for m in middles])
    if max(counts) > 50 * max(1, sorted(counts)[len(counts) // 2]):
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
    axes.axvline(line, color=INK, linewidth=1.4)
    place: Record = {"transform": axes.get_xaxis_transform(), "va": "bottom", "size": 9}
    axes.text(line - 0.5, 1.02, "← needed", ha="right", color=AFTER, weight="bold", **place)
    axes.text(line + 0.5, 1.02, "may go →", color=MUTED, **place)
    axes.set(xlim=(-25.4, 5.4), xlabel="ΔF of one weight, nats")
    ylabel(axes, "weights")
    axes.set_xticks([-25, -20, -15, -10, -5, 0, 5], ["≤ −25", "−20", "−15", "−10", "−5", "0", "≥ 5"])
    axes.grid(visible=False, axis="x")
    thousands(axes.yaxis)


def _evidence(figure: Figure, rounds: Sequence[Record]) -> None:
    top, low = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2], gridspec_kw={"hspace": 0.14})
    known = [r for r in rounds if r["free_energy"] is not None]
    top.plot([r["epoch"] for r in known], [r["free_energy"] for r in known], "o-", color=AFTER)
    show_the_rest(top, [r["free_energy"] for r in known])
    ylabel(top, "free energy, nats")
    epochs, gains = [r["epoch"] for r in rounds], [r["delta_f"] for r in rounds]
    gap = min((b - a for a, b in pairwise(epochs) if b > a), default=1)
    low.bar(epochs, gains, width=0.55 * gap, color=[GONE if g >= 0 else BEFORE for g in gains])
    low.axhline(0, color=MUTED, linewidth=0.8)
    positive = [g for g in gains if g > 0]
    if positive and min(gains) >= 0 and max(positive) > 100 * min(positive):
        low.set_yscale("log")
        low.set_ylim(bottom=min(positive) / 3)
    low.set_xlabel("epoch of the round")
    ylabel(low, "gain, nats")
    integers(low)
    for axes in (top, low):
        axes.grid(visible=False, axis="x")
        thousands(axes.yaxis)


def _kept_share(figure: Figure, epochs: Sequence[Record], rounds: Sequence[Record]) -> None:
    axes = figure.add_subplot()
    axes.plot([e["epoch"] for e in epochs], [e["kept_share"] for e in epochs], color=AFTER)
    axes.plot([r["epoch"] for r in rounds], [r["kept_share"] for r in rounds], "o", color=AFTER)
    least = min(e["kept_share"] for e in epochs)
    axes.set_xlabel("epoch")
    ylabel(axes, "weights kept")
    if 0 < least < 0.2:
        axes.set_yscale("log")
        axes.set_ylim(least / 1.6, 1.3)
    else:
        axes.set_ylim(0, 1.05)
    integers(axes)
    percents(axes.yaxis)


def _path(
    figure: Figure, epochs: Sequence[Record], classes: bool, before: float | None, after: tuple[float, float] | None
) -> None:
    axes = figure.add_subplot()
    what = "accuracy" if classes else "loss"
    points = [(e["kept_share"], e[what]) for e in epochs if e[what] is not None and e["kept_share"] > 0]
    axes.plot([p[0] for p in points], [p[1] for p in points], "o-", color=GONE, markersize=3, linewidth=1.2)
    if classes and before is not None:
        axes.plot([1], [before], "D", color=BEFORE, markersize=7, clip_on=False)
    if classes and after is not None:
        axes.plot([after[0]], [after[1]], "D", color=AFTER, markersize=7, clip_on=False)
    least = min((p[0] for p in points), default=1.0)
    axes.set_xscale("log") if least < 0.2 else None
    axes.set_xlim(1.12, least / 1.15)
    axes.set_xlabel("weights kept (fewer to the right)")
    ylabel(axes, what if classes else "training loss, nats")
    percents(axes.xaxis)
    percents(axes.yaxis) if classes else None


def _reliability(figure: Figure, bins: Record, colour: str) -> None:
    top, low = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1.1], gridspec_kw={"hspace": 0.12})
    edges, counts = bins["edges"], bins["count"]
    for i, (confidence, accuracy) in enumerate(zip(bins["confidence"], bins["accuracy"], strict=True)):
        at, width = (edges[i] + edges[i + 1]) / 2, 0.86 * (edges[i + 1] - edges[i])
        low.bar(at, counts[i], width=width, color=colour)
        if confidence is not None and accuracy is not None:
            top.bar(at, accuracy, width=width, color=colour, alpha=0.85)
            top.plot([at - width / 2, at + width / 2], [confidence, confidence], color=INK, linewidth=1.6)
    top.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    top.set(xlim=(0, 1), ylim=(0, 1.02))
    low.set_xlabel("confidence of the network")
    ylabel(top, "accuracy in the bin")
    ylabel(low, "examples")
    if max(counts, default=0) > 50 * max(1, min((c for c in counts if c), default=1)):
        low.set_yscale("log")
        low.set_ylim(bottom=0.7)
    percents(top.yaxis)
    percents(low.xaxis)
    thousands(low.yaxis)
    for axes in (top, low):
        axes.grid(visible=False, axis="x")


def _coverage(figure: Figure, before: Sequence[float] | None, after: Sequence[float], nominal: Sequence[float]) -> None:
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    if before is not None:
        axes.plot(nominal, before, "D", color=BEFORE, markersize=7, clip_on=False)
    axes.plot(nominal, after, "o", color=AFTER, markersize=8, clip_on=False)
    least = min([0.45, *after, *(before or [])]) - 0.05
    axes.set(xlim=(0.45, 1), ylim=(max(0.0, least), 1.0), xlabel="promised coverage")
    ylabel(axes, "observed coverage")
    axes.set_xticks(list(nominal))
    percents(axes.xaxis)
    percents(axes.yaxis)


def _shift(figure: Figure, curves: Record, clean: Record) -> None:
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.5})
    for axes, ending in ((left, ""), (right, "_ece")):
        for who, colour, mark in (("before", BEFORE, "D--"), ("after", AFTER, "o-")):
            values = curves[who + ending]
            if values is None:
                continue
            start = clean.get(who + ending)
            x, y = (curves["severity"], values) if start is None else ([0, *curves["severity"]], [start, *values])
            axes.plot(x, y, mark, color=colour, clip_on=False, markersize=4)
        axes.set(xlabel="severity", ylim=(0, 1.0 if not ending else None))
        integers(axes)
        ylabel(axes, "ECE" if ending else "accuracy", 0.5)
        axes.grid(visible=False, axis="x")
    percents(left.yaxis)


def _sizes(figure: Figure, before: Record | None, after: Record) -> None:
    kinds = (("parameters", "stored values", count), ("bytes", "on disk", size))
    for axes, (key, title, write) in zip(figure.subplots(2, 1, gridspec_kw={"hspace": 0.3}), kinds, strict=True):
        pairs = (("before", (before or {}).get(key), BEFORE), ("after", after.get(key), AFTER))
        rows = [(name, float(value), colour) for name, value, colour in pairs if value is not None]
        top = max((value for _, value, _ in rows), default=1.0) or 1.0
        for i, (_, value, colour) in enumerate(rows):
            axes.barh(i, value, height=0.6, color=colour)
            axes.text(value + 0.012 * top, i, write(value), va="center", color=INK)
        axes.set(xlim=(0, 1.25 * top), ylim=(len(rows) - 0.4, -0.6), xticks=[], yticks=[])
        axes.set_title(title, loc="left", size=9.5, color=MUTED)
        axes.spines[:].set_visible(False)


def _input_map(figure: Figure, rows: Sequence[Sequence[int]]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    axes = figure.add_subplot()
    rgb = (0.27, 0.47, 0.9)  # in a bitmap, so one that reads on light and dark
    shades = LinearSegmentedColormap.from_list("kept", [(*rgb, 0.15), (*rgb, 1.0)])
    visible, most = shades.with_extremes(under=(0, 0, 0, 0)), max(1, *map(max, rows))
    axes.imshow(rows, cmap=visible, vmin=0.5, vmax=most, interpolation="none")
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
