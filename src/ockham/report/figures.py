"""Figures of the report as SVG: a canvas, and curves, bars and calibration on it."""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ockham.report.page import count, percent, size
from ockham.run.records import (
    BINS,
    EpochRecord,
    GroupRecord,
    LayerRecord,
    Measures,
    ReliabilityTable,
    RoundRecord,
    ShiftCurve,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "AFTER",
    "BEFORE",
    "GONE",
    "INK",
    "LINE",
    "MUTED",
    "PALETTE",
    "TRACK",
    "Drawing",
    "coverage",
    "drawing",
    "evidence",
    "histogram",
    "integers",
    "kept_share",
    "layers",
    "path",
    "percents",
    "pixel_map",
    "reliability_diagram",
    "shift",
    "show_the_rest",
    "sizes",
    "speed",
    "thousands",
    "width_bars",
    "ylabel",
]


INK, MUTED, LINE, TRACK = "#1c2530", "#5b6875", "#dfe5eb", "#edf0f4"
AFTER, BEFORE, GONE = "#2f5fd0", "#b9601f", "#b4bfcb"

PALETTE = (
    "#3366cc", "#d1495b", "#2a8c4a", "#b07a00", "#7b4fc9", "#00848c", "#d0669e", "#7a5230", "#5f6b7a", "#86a800",
)  # fmt: skip
"""Ten colours told apart, for curves side by side; ``c0`` to ``c9`` in a legend (`ockham.report.page.figure`)."""

_VARIABLES = {colour: f"--c{i}" for i, colour in enumerate(PALETTE)} | {
    INK: "--ink", MUTED: "--muted", LINE: "--line", TRACK: "--track",
    AFTER: "--after", BEFORE: "--before", GONE: "--gone",
}  # fmt: skip
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "text.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": GONE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": GONE,
    "ytick.color": GONE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


@dataclass(slots=True)
class Drawing:
    """A figure that is being painted, and its picture afterwards.

    Attributes:
        figure: sheet to put axes and marks on.
        svg: ``<svg>`` element, there when the block of `drawing` has ended.
    """

    figure: Figure
    svg: str = ""


@contextmanager
def drawing(
    key: str,
    label: str,
    height: float,
    *,
    width: float = 4.6,
    margins: tuple[float, float, float, float] = (0.74, 0.2, 0.5, 0.12),
) -> Iterator[Drawing]:
    """A sheet without any global state; what the block paints becomes an inline SVG element.

    The colours of the element are the page's CSS variables, and the same marks give the same text.

    Args:
        key: letters and digits, unique in the page; prefix of all ids inside.
        label: words that a screen reader says in place of the picture.
        height: height of the sheet, inches.
        width: width of the sheet, inches.
        margins: inches left, right, below and above the axes; fixed, because measuring texts costs half the time.

    >>> with drawing("example", "a rising line", 2.0) as sheet:
    ...     lines = sheet.figure.add_subplot().plot([0, 1])
    >>> sheet.svg[:18]
    '<svg class="chart"'
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": key}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's browser brings the font
        left, right, bottom, top = margins
        sheet = Drawing(Figure(figsize=(width, height)))
        edges = {"left": left / width, "right": 1 - right / width, "bottom": bottom / height, "top": 1 - top / height}
        sheet.figure.subplots_adjust(**edges)
        yield sheet
        nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        sheet.figure.savefig(buffer, format="svg", metadata=nothing)
    sheet.svg = _inline(buffer.getvalue(), key, label)


def _inline(svg: str, key: str, label: str) -> str:
    svg = svg[svg.index("<svg") :]
    for unwanted in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->"):
        svg = re.sub(unwanted, "", svg, flags=re.DOTALL)
    referred = set(re.findall(r'(?:url\(|href=")#([\w-]+)', svg))

    def tag(match: re.Match[str]) -> str:
        text = re.sub(r' id="([^"]+)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in referred else "", match[0])
        text = re.sub(r"""(url\(|href=")#""", rf"\1#{key}-", text)
        text = re.sub(r'font-family: [^;"]+;? ?', "", text)  # newer matplotlib; older ones write the next line's form
        text = re.sub(r'font: ((?:\d+ )?[\d.]+px) [^;"]+', r"font: \1 var(--font)", text)
        return re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var({_VARIABLES[m[0]]})" if m[0] in _VARIABLES else m[0], text)

    svg = re.sub(r"<[^>]+>", tag, svg)
    box = re.search(r'viewBox="([^"]+)"', svg)
    label = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in label)
    root = f'<svg class="chart" role="img" aria-label="{html.escape(label)}" viewBox="{box[1] if box else ""}">'
    return re.sub(r"\s*\n\s*", "\n", root + svg[svg.index(">") + 1 :]).strip()


def ylabel(axes: Axes, text: str, offset: float | None = None) -> None:
    """A label at a fixed distance from the axes (inches), at the left edge of the figure where not given."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    box, width = axes.get_position(), figure.get_size_inches()[0]
    offset = box.x0 * width - 0.17 if offset is None else offset
    axes.set_ylabel(text)
    axes.yaxis.set_label_coords(-offset / (box.width * width), 0.5)


def percents(axis: Axis) -> None:
    """Tick labels in percent."""
    from matplotlib.ticker import LogLocator, NullLocator

    if axis.get_scale() == "log":
        low, high = sorted(axis.get_view_interval())
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.set_major_formatter(lambda v, _: f"{100 * v:.6g} %")
    axis.set_minor_locator(NullLocator())


def thousands(axis: Axis) -> None:
    """Tick labels with separators."""
    from matplotlib.ticker import NullLocator

    def write(value: float, _: float) -> str:
        text = f"{value / 1e6:,.6g} M" if abs(value) >= 1e6 else f"{value:,.6g}"
        return text.replace("-", "\N{MINUS SIGN}")

    axis.set_major_formatter(write)
    axis.set_minor_locator(NullLocator())


def integers(axes: Axes) -> None:
    """At most seven ticks, at whole numbers, on the horizontal axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))


def show_the_rest(axes: Axes, energies: Sequence[float]) -> None:
    """Where the first point lies far below all others, cut it off and say where it is."""
    rest = energies[1:]
    if len(rest) < 3 or min(rest) - energies[0] < 8 * (max(rest) - min(rest)):
        return
    room = 0.12 * (max(rest) - min(rest)) or 1.0
    axes.set_ylim(min(rest) - 3 * room, max(rest) + room)
    text = f"first round: {count(energies[0])} ↓"
    axes.text(0.98, 0.05, text, transform=axes.transAxes, va="bottom", ha="right", color=MUTED, size=8.5)


_DASHED: Any = (0, (4, 3))


def layers(rows: Sequence[LayerRecord]) -> str:
    """Kept share of every layer as horizontal bars, each with its counts."""
    shares = [r.kept / r.total if r.total else 0.0 for r in rows]
    least = min((s for s in shares if s), default=1.0)
    left = 10.0 ** math.floor(math.log10(least * 0.9)) if least < 0.05 else 0.0
    label = "Kept share per layer: " + ", ".join(f"{r.name} {percent(s)}" for r, s in zip(rows, shares, strict=True))
    bars = [(r.name, f"{percent(s)}  ·  {r.kept:,} of {r.total:,}", 1.0, s) for r, s in zip(rows, shares, strict=True)]
    return _nested("layers", label, bars, left, "share kept", lambda axes: percents(axes.xaxis))


def width_bars(rows: Sequence[GroupRecord]) -> str:
    """Width of every group of units before and after, as nested bars."""
    label = "Widths: " + ", ".join(f"{r.id} {r.after} of {r.before}" for r in rows)
    wide = max(r.before for r in rows) > 30 * min(r.after for r in rows)
    bars = [(r.id, f"{r.before:,} → {r.after:,}", float(r.before), float(r.after)) for r in rows]

    def ticks(axes: Axes) -> None:
        if not wide:
            integers(axes)
        thousands(axes.xaxis)

    return _nested("widths", label, bars, 0.7 if wide else 0.0, "units", ticks)


def _nested(
    key: str,
    label: str,
    bars: Sequence[tuple[str, str, float, float]],
    left: float,
    xlabel: str,
    ticks: Callable[[Axes], None],
) -> str:
    """Bars inside bars, of (name, numbers, whole, part); a log scale where they begin at ``left`` above zero."""
    with drawing(key, label, 0.55 + 0.44 * len(bars), margins=(0.24, 0.3, 0.5, 0.05)) as sheet:
        axes = sheet.figure.add_subplot()
        place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "baseline"}
        for i, (name, numbers, whole, part) in enumerate(bars):
            axes.barh(i, whole - left, left=left, height=0.3, color=TRACK)
            axes.barh(i, max(0.0, part - left), left=left, height=0.3, color=AFTER)
            shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
            axes.text(0, i - 0.27, shown if len(shown) <= 30 else f"{shown[:15]}…{shown[-14:]}", color=INK, **place)
            axes.text(1, i - 0.27, numbers, ha="right", color=MUTED, size=8.5, **place)
        if left:
            axes.set_xscale("log")
        axes.set(xlim=(left, max(whole for _, _, whole, _ in bars)), ylim=(len(bars) - 0.6, -0.75), yticks=[])
        axes.set_xlabel(xlabel + (" (log scale)" if left else ""))
        axes.spines["left"].set_visible(False)
        ticks(axes)
    return sheet.svg


def histogram(key: str, counts: Sequence[int], *, line: float, label: str) -> str:
    """Weights over delta_f, with the decision line.

    Args:
        key: unique name.
        counts: weights in `BINS` bins over [-25, 5] nats.
        line: place to the right of which removal is favoured, nats.
        label: words for screen readers.
    """
    with drawing(key, label, 2.9, margins=(0.8, 0.25, 0.5, 0.3)) as sheet:
        axes = sheet.figure.add_subplot()
        width = 30 / BINS
        middles = [-25 + width * (i + 0.5) for i in range(BINS)]
        axes.bar(middles, counts, width=0.9 * width, color=[GONE if m > line else AFTER for m in middles])
        if max(counts) > 50 * max(1, sorted(counts)[len(counts) // 2]):
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.7)
        axes.axvline(line, color=INK, linewidth=1.4)
        place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "va": "bottom", "size": 9}
        axes.text(line - 0.5, 1.02, "← needed", ha="right", color=AFTER, weight="bold", **place)
        axes.text(line + 0.5, 1.02, "may go →", color=MUTED, **place)
        axes.set(xlim=(-25.4, 5.4), xlabel="ΔF of one weight, nats")
        ylabel(axes, "weights")
        axes.set_xticks([-25, -20, -15, -10, -5, 0, 5], ["≤ −25", "−20", "−15", "−10", "−5", "0", "≥ 5"])
        axes.grid(visible=False, axis="x")
        thousands(axes.yaxis)
    return sheet.svg


def evidence(rounds: Sequence[RoundRecord]) -> str:
    """Free energy before every round, and the gain that each round predicted."""
    known = [(r.epoch, r.free_energy) for r in rounds if r.free_energy is not None]
    ends = f" from {known[0][1]:,.0f} to {known[-1][1]:,.0f} nats" if known else ""
    label = f"Free energy over {len(rounds)} rounds{ends}"
    with drawing("evidence", label, 3.4, margins=(0.95, 0.2, 0.5, 0.12)) as sheet:
        top, low = sheet.figure.subplots(2, 1, sharex=True, height_ratios=[3, 2], gridspec_kw={"hspace": 0.14})
        top.plot([epoch for epoch, _ in known], [energy for _, energy in known], "o-", color=AFTER)
        show_the_rest(top, [energy for _, energy in known])
        ylabel(top, "free energy, nats")
        gained = [(r.epoch, r.delta_f) for r in rounds if r.delta_f is not None]
        epochs, gains = [epoch for epoch, _ in gained], [gain for _, gain in gained]
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
    return sheet.svg


def kept_share(epochs: Sequence[EpochRecord], rounds: Sequence[RoundRecord]) -> str:
    """Share of weights kept over the epochs, with a dot at every round."""
    label = f"Share of weights kept over {len(epochs)} epochs, at the end {percent(epochs[-1].kept_share)}"
    with drawing("keptshare", label, 3.4) as sheet:
        axes = sheet.figure.add_subplot()
        axes.plot([e.epoch for e in epochs], [e.kept_share for e in epochs], color=AFTER)
        axes.plot([r.epoch for r in rounds], [r.kept_share for r in rounds], "o", color=AFTER)
        least = min(e.kept_share for e in epochs)
        axes.set_xlabel("epoch")
        ylabel(axes, "weights kept")
        if 0 < least < 0.2:
            axes.set_yscale("log")
            axes.set_ylim(least / 1.6, 1.3)
        else:
            axes.set_ylim(0, 1.05)
        integers(axes)
        percents(axes.yaxis)
    return sheet.svg


def path(epochs: Sequence[EpochRecord], before: float | None, after: tuple[float, float] | None) -> str:
    """Training accuracy (or loss, without classes) against the share kept.

    Args:
        epochs: records of the epochs.
        before: test accuracy of the network it is compared with.
        after: share kept and test accuracy of the reduced network.
    """
    classes = any(e.accuracy is not None for e in epochs)
    label = f"{'Accuracy' if classes else 'Training loss'} against the share of weights kept"
    with drawing("path", label, 2.9) as sheet:
        axes = sheet.figure.add_subplot()
        seen = [(e.kept_share, e.accuracy if classes else e.loss) for e in epochs if e.kept_share > 0]
        points = [(share, value) for share, value in seen if value is not None]
        axes.plot([p[0] for p in points], [p[1] for p in points], "o-", color=GONE, markersize=3, linewidth=1.2)
        if classes and before is not None:
            axes.plot([1], [before], "D", color=BEFORE, markersize=7, clip_on=False)
        if classes and after is not None:
            axes.plot([after[0]], [after[1]], "D", color=AFTER, markersize=7, clip_on=False)
        least = min((p[0] for p in points), default=1.0)
        axes.set_xscale("log") if least < 0.2 else None
        axes.set_xlim(1.12, least / 1.15)
        axes.set_xlabel("weights kept (fewer to the right)")
        ylabel(axes, "accuracy" if classes else "training loss, nats")
        percents(axes.xaxis)
        percents(axes.yaxis) if classes else None
    return sheet.svg


def reliability_diagram(key: str, bins: ReliabilityTable, *, colour: str, label: str) -> str:
    """Accuracy over confidence in bins, with the number of examples below."""
    with drawing(key, label, 3.6) as sheet:
        top, low = sheet.figure.subplots(2, 1, sharex=True, height_ratios=[4, 1.1], gridspec_kw={"hspace": 0.12})
        for i, (confidence, accuracy) in enumerate(zip(bins.confidence, bins.accuracy, strict=True)):
            at, width = (bins.edges[i] + bins.edges[i + 1]) / 2, 0.86 * (bins.edges[i + 1] - bins.edges[i])
            low.bar(at, bins.count[i], width=width, color=colour)
            if confidence is not None and accuracy is not None:
                top.bar(at, accuracy, width=width, color=colour, alpha=0.85)
                top.plot([at - width / 2, at + width / 2], [confidence, confidence], color=INK, linewidth=1.6)
        top.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=_DASHED)
        top.set(xlim=(0, 1), ylim=(0, 1.02))
        low.set_xlabel("confidence of the network")
        ylabel(top, "accuracy in the bin")
        ylabel(low, "examples")
        if max(bins.count, default=0) > 50 * max(1, min((c for c in bins.count if c), default=1)):
            low.set_yscale("log")
            low.set_ylim(bottom=0.7)
        percents(top.yaxis)
        percents(low.xaxis)
        thousands(low.yaxis)
        for axes in (top, low):
            axes.grid(visible=False, axis="x")
    return sheet.svg


def coverage(before: Sequence[float] | None, after: Sequence[float], nominal: Sequence[float]) -> str:
    """Observed against promised coverage of prediction intervals (regression)."""
    label = "Coverage of prediction intervals: " + ", ".join(
        f"promised {percent(n)}, observed {percent(a)}" for n, a in zip(nominal, after, strict=True)
    )
    with drawing("coverage", label, 3.2) as sheet:
        axes = sheet.figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=_DASHED)
        if before is not None:
            axes.plot(nominal, before, "D", color=BEFORE, markersize=7, clip_on=False)
        axes.plot(nominal, after, "o", color=AFTER, markersize=8, clip_on=False)
        least = min([0.45, *after, *(before or [])]) - 0.05
        axes.set(xlim=(0.45, 1), ylim=(max(0.0, least), 1.0), xlabel="promised coverage")
        ylabel(axes, "observed coverage")
        axes.set_xticks([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
        percents(axes.xaxis)
        percents(axes.yaxis)
    return sheet.svg


def shift(key: str, name: str, curve: ShiftCurve, *, before: Measures | None, after: Measures) -> str:
    """Accuracy and ECE over the severity of a corruption.

    Args:
        key: unique name.
        name: name of the corruption.
        curve: values at every severity.
        before: measures on clean data of the network before, drawn at severity 0.
        after: measures on clean data of the reduced network.
    """
    worst = percent(curve.after[-1])
    label = f"{name}: accuracy and calibration error over severity; accuracy at the worst {worst}"
    clean = before or Measures()
    sides = (
        ("accuracy", ((curve.before, clean.accuracy, BEFORE, "D--"), (curve.after, after.accuracy, AFTER, "o-"))),
        ("ECE", ((curve.before_ece, clean.ece, BEFORE, "D--"), (curve.after_ece, after.ece, AFTER, "o-"))),
    )
    with drawing(key, label, 2.25) as sheet:
        both: Sequence[Axes] = sheet.figure.subplots(1, 2, gridspec_kw={"wspace": 0.5})
        for axes, (what, lines) in zip(both, sides, strict=True):
            for values, start, colour, mark in lines:
                if values is not None:
                    begin: tuple[list[float], list[float]] = ([], []) if start is None else ([0.0], [start])
                    x, y = [*begin[0], *curve.severity], [*begin[1], *values]
                    axes.plot(x, y, mark, color=colour, clip_on=False, markersize=4)
            axes.set(xlabel="severity", ylim=(0, 1.0 if what == "accuracy" else None))
            integers(axes)
            ylabel(axes, what, 0.5)
            axes.grid(visible=False, axis="x")
        percents(both[0].yaxis)
    return sheet.svg


def sizes(before: Measures | None, after: Measures) -> str:
    """Stored values and bytes on disk, before and after."""
    old = before or Measures()
    label = f"After: {count(after.parameters)} stored values, {size(after.bytes)} on disk"
    rows = [
        ("stored values", count, old.parameters, after.parameters),
        ("on disk", size, old.bytes, after.bytes),
    ]
    return _pairs("sizes", label, rows)


def speed(rows: Sequence[tuple[int, float, float]]) -> str:
    """Measured time of a forward pass before and after, of (batch size, seconds before, seconds after)."""

    def milliseconds(value: float | None) -> str:
        return f"{1e3 * (value or 0):,.3g} ms"

    said = ", ".join(f"batch {n}: {milliseconds(b)} before, {milliseconds(a)} after" for n, b, a in rows)
    titles = ["one example" if n == 1 else f"{n} examples at once" for n, _, _ in rows]
    bars = [(title, milliseconds, b, a) for title, (_, b, a) in zip(titles, rows, strict=True)]
    return _pairs("speed", f"Time of a forward pass; {said}", bars)


Pair = tuple[str, Callable[[float | None], str], float | None, float | None]


def _pairs(key: str, label: str, rows: Sequence[Pair]) -> str:
    """For every (title, how to write a value, before, after) a small plot with its two bars."""
    with drawing(key, label, 1.3 * len(rows), margins=(0.05, 0.05, 0.05, 0.25)) as sheet:
        plots = sheet.figure.subplots(len(rows), 1, gridspec_kw={"hspace": 0.3}, squeeze=False)
        for axes, (title, write, before, after) in zip(plots[:, 0], rows, strict=True):
            bars = [(value, colour) for value, colour in ((before, BEFORE), (after, AFTER)) if value is not None]
            top = max((value for value, _ in bars), default=1.0) or 1.0
            for i, (value, colour) in enumerate(bars):
                axes.barh(i, value, height=0.6, color=colour)
                axes.text(value + 0.012 * top, i, write(value), va="center", color=INK)
            axes.set(xlim=(0, 1.25 * top), ylim=(len(bars) - 0.4, -0.6), xticks=[], yticks=[])
            axes.set_title(title, loc="left", size=9.5, color=MUTED)
            axes.spines[:].set_visible(False)
    return sheet.svg


def pixel_map(rows: Sequence[Sequence[int]]) -> str:
    """Heat map of kept first-layer weights per input pixel."""
    from matplotlib.colors import LinearSegmentedColormap

    high, wide = len(rows), len(rows[0])
    label = f"Map of {high} x {wide} input pixels, darker where more first-layer weights were kept"
    height, edges = max(0.6, min(4.4, 3.4 * high / wide)), (0.05, 0.05, 0.05, 0.05)
    with drawing("inputmap", label, height, width=3.4, margins=edges) as sheet:
        axes = sheet.figure.add_subplot()
        rgb = (0.27, 0.47, 0.9)  # in a bitmap, so one that reads on light and dark
        shades = LinearSegmentedColormap.from_list("kept", [(*rgb, 0.15), (*rgb, 1.0)])
        visible, most = shades.with_extremes(under=(0, 0, 0, 0)), max(1, *map(max, rows))
        axes.imshow(rows, cmap=visible, vmin=0.5, vmax=most, interpolation="none")
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.spines[:].set_visible(True)
    return sheet.svg
