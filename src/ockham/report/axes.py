"""Ticks and labels that the figures share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ockham.report.canvas import MUTED
from ockham.report.words import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.ticker import Locator

__all__ = ["integers", "percents", "show_the_rest", "thousands", "ylabel"]


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
    from matplotlib.ticker import LogLocator

    if axis.get_scale() == "log":
        low, high = sorted(axis.get_view_interval())
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.set_major_formatter(lambda v, _: f"{100 * v:.6g} %")
    axis.set_minor_locator(_no_ticks())


def thousands(axis: Axis) -> None:
    """Tick labels with separators."""

    def write(value: float, _: float) -> str:
        text = f"{value / 1e6:,.6g} M" if abs(value) >= 1e6 else f"{value:,.6g}"
        return text.replace("-", "\N{MINUS SIGN}")

    axis.set_major_formatter(write)
    axis.set_minor_locator(_no_ticks())


def _no_ticks() -> Locator:
    from matplotlib.ticker import NullLocator

    return NullLocator()


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
