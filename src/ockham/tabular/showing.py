"""What people look at: a table, a bar chart, a progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt

__all__ = ["bars", "progress", "table_of"]


def table_of(names: Sequence[str], inclusion: npt.NDArray[Any], weights: npt.NDArray[Any], top: int) -> str:
    """Features by inclusion, the likeliest first, at most ``top`` of those that are out."""
    order = sorted(range(len(names)), key=lambda j: (-inclusion[j], j))
    inside = [j for j in order if weights[j] > 0]
    shown = inside + [j for j in order if weights[j] == 0][:top]
    width = max([len("feature"), *(len(names[j]) for j in shown)])
    lines = [f"{'feature':<{width}}  inclusion  weights", f"{'-' * width}  ---------  -------"]
    lines += [f"{names[j]:<{width}}  {inclusion[j]:>9.3f}  {int(weights[j]):>7}" for j in shown]
    hidden = len(order) - len(shown)
    return "\n".join([*lines, f"... and {hidden} more, all out"] if hidden else lines)


def bars(names: Sequence[str], inclusion: npt.NDArray[Any], top: int, ax: Any) -> Any:
    """Horizontal bars of the ``top`` likeliest features, a line at one half; returns the axes."""
    from matplotlib import pyplot

    if ax is None:
        ax = pyplot.subplots(figsize=(6, 0.6 + 0.28 * min(top, len(names))), layout="constrained")[1]
    order = sorted(range(len(names)), key=lambda j: -inclusion[j])[:top][::-1]
    ax.barh([names[j] for j in order], [inclusion[j] for j in order], color="#3b5b7a")
    ax.axvline(0.5, color="#b5482a", linewidth=1)
    ax.set(xlim=(0, 1), xlabel="inclusion probability")
    return ax


@contextmanager
def progress(show: bool) -> Iterator[Callable[[int, int, float], None] | None]:
    """A callback (step, of, evidence) that moves a progress bar, or None."""
    if not show:
        yield None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("spike-and-slab", total=None)

        def update(step: int, total: int, evidence: float) -> None:
            said = "warming up" if math.isnan(evidence) else f"evidence {evidence:,.1f} nats"
            bar.update(task, completed=step, total=total, description=said)

        yield update
