"""One look for all figures: a matplotlib figure becomes an SVG inside an HTML page that follows its colours."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ockham.report.page import count

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
    "drawing",
    "integers",
    "percents",
    "show_the_rest",
    "thousands",
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
        margins: left, right, bottom, top of the axes, inches; fixed, because measuring texts costs half the time.

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
