"""A table model explained: effects, figures, a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ockham.errors import OckhamError
from ockham.report import page
from ockham.report.figures import AFTER, BEFORE, INK, MUTED, drawing, ylabel
from ockham.tabular.data import Encoding, Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Effect", "Facts", "bars", "effect", "paint", "progress", "strongest_pair", "table_of", "write_page"]


Ask = Callable[[Floats], Floats]
"""Rows of numbers [n, q] to what each draw says of them, [D, n]."""

_GRID = 25
_TOP = 8
_PAIRS_AMONG = 5
_BARS = 20


@dataclass(frozen=True, slots=True, eq=False)
class Effect:
    """Mean prediction while one feature takes each of some values and the others are as they come.

    Attributes:
        name: feature.
        values: numbers, or names of levels, [G].
        mean: over draws, [G].
        lower: 5 % quantile over draws, [G].
        upper: 95 % quantile over draws, [G].
    """

    name: str
    values: list[Any]
    mean: Floats
    lower: Floats
    upper: Floats


def effect(ask: Ask, rows: Floats, encoding: Encoding, feature: int, name: str) -> Effect:
    """Partial dependence of a feature, with the posterior's interval.

    Args:
        ask: what the draws say.
        rows: rows of numbers that the other features are taken from, [m, q].
        encoding: where the feature's numbers are.
        feature: index of the feature.
        name: its name.
    """
    settings = _settings(rows, encoding, feature)
    curves = np.stack([ask(_with(rows, columns, value)).mean(1) for _, columns, value in settings], 1)
    lower, upper = np.quantile(curves, [0.05, 0.95], axis=0)
    return Effect(name, [label for label, _, _ in settings], curves.mean(0), lower, upper)


def _settings(rows: Floats, encoding: Encoding, feature: int) -> list[tuple[Any, Any, Floats]]:
    """Label, columns and their numbers for each value that a feature is shown at."""
    columns = (encoding.origin == feature).nonzero()[0]
    kind = encoding.columns[feature]
    if kind.levels is not None and kind.means is None:
        return [(level, columns, np.eye(len(columns) + 1)[i][1:]) for i, level in enumerate(kind.levels)]
    if kind.means is not None:
        order = np.argsort(kind.means[:, 0])
        chosen = order[np.linspace(0, len(order) - 1, min(len(order), _GRID)).astype(int)]
        return [(kind.levels[i] if kind.levels else i, columns, kind.means[i]) for i in chosen]
    first = rows[:, columns[0]]
    distinct = np.unique(first)
    low, high = (float(np.quantile(first, q)) for q in (0.02, 0.98))
    values = distinct if len(distinct) <= _GRID else np.linspace(low, high, _GRID)
    found: list[tuple[Any, Any, Floats]] = [(float(v), columns, np.r_[v, np.zeros(len(columns) - 1)]) for v in values]
    if kind.missing:
        found.append((float("nan"), columns, np.array([kind.fill, 1.0])))
    return found


def _with(rows: Floats, columns: Any, value: Floats | np.float64) -> Floats:
    changed = rows.copy()
    changed[:, columns] = value
    return changed


def strongest_pair(
    ask: Ask, rows: Floats, encoding: Encoding, features: Sequence[int], names: Sequence[str]
) -> list[tuple[str, Effect]]:
    """Effects of a feature where another is low, middle and high, of the two whose joint effect is least a sum.

    Judged by the variance that the sum of their own effects leaves.

    Args:
        ask: what the draws say.
        rows: rows of numbers that the other features are taken from, [m, q].
        encoding: where the features' numbers are.
        features: features to choose from, the likeliest first; five at most are tried.
        names: names of all features.

    Returns:
        Label and effect, three of them; none where no two features interact.

    References:
        Friedman & Popescu (2008), *Predictive learning via rule ensembles*, section 8.1, without the normalisation.
    """
    best, found = 0.0, None  # variance and pair
    for j, k in combinations(features[:_PAIRS_AMONG], 2):
        ends = [_settings(rows, encoding, f) for f in (j, k)]
        ends = [[s[i] for i in np.linspace(0, len(s) - 1, min(3, len(s))).astype(int)] for s in ends]
        joint = np.array([[ask(_with(_with(rows, a[1], a[2]), b[1], b[2])).mean() for b in ends[1]] for a in ends[0]])
        alone = joint - joint.mean(0) - joint.mean(1, keepdims=True) + joint.mean()
        if float(alone.var()) > best:
            best, found = float(alone.var()), (j, k)
    curves: list[tuple[str, Effect]] = []
    if found is None:
        return curves
    column = int((encoding.origin == found[1]).nonzero()[0][0])
    for q, word in ((0.1, "low"), (0.5, "middle"), (0.9, "high")):
        at = _with(rows, column, np.quantile(rows[:, column], q))
        curves.append((f"{names[found[1]]} {word}", effect(ask, at, encoding, found[0], names[found[0]])))
    return curves


def paint(axes: Axes, shown: Effect, colour: str, label: str | None = None) -> None:
    """A curve with its band, or points with bars for levels."""
    if all(isinstance(v, float) for v in shown.values):
        there = ~np.isnan(shown.values)
        x = np.array(shown.values)[there]
        axes.fill_between(x, shown.lower[there], shown.upper[there], color=colour, alpha=0.2, linewidth=0)
        axes.plot(x, shown.mean[there], color=colour, label=label)
    else:
        place = np.arange(len(shown.values))
        bars = np.stack([shown.mean - shown.lower, shown.upper - shown.mean])
        axes.errorbar(place, shown.mean, yerr=bars, fmt="o", color=colour, label=label)
        axes.set_xticks(place, [str(v)[:10] for v in shown.values])
    axes.set_xlabel(shown.name)


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """What the page of a model says.

    Attributes:
        title: title of the page.
        names: features.
        inclusion: probability that each is used.
        weights: living weights that read each.
        read: whether networks or trees read each.
        why: why a feature is not used, one text each, empty for those that are.
        tiles: (label, value, aside) of the head.
        effects: effects of the features that are used, the likeliest first.
        pair: effects of one feature where another is low, middle and high, with the label of each; may be empty.
        noise: effects on the standard deviation of the noise.
        target: what the effects are in.
        coverage: nominal and observed coverage of intervals on held-out rows; None where no rows were given.
        remarks: sentences about the noise and the like.
    """

    title: str
    names: Sequence[str]
    inclusion: Floats
    weights: Floats
    read: npt.NDArray[np.bool_]
    why: Sequence[str]
    tiles: Sequence[tuple[str, str, str]]
    effects: Sequence[Effect]
    pair: Sequence[tuple[str, Effect]]
    noise: Sequence[Effect]
    target: str
    coverage: tuple[Floats, Floats] | None
    remarks: Sequence[str]


def write_page(facts: Facts, path: str | Path) -> Path:
    """Write the page.

    Raises:
        OckhamError: the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise OckhamError(f"report: the folder {path.parent} does not exist; create it first")
    order = np.argsort(-facts.inclusion, kind="stable")
    used = [j for j in order if facts.read[j]]
    head = f"<h1>{page.escape(facts.title)}</h1>" + "".join(page.paragraph(r) for r in facts.remarks)
    head += f'<dl class="tiles">{"".join(page.tile(*t) for t in facts.tiles)}</dl>'
    with drawing("inclusion", "inclusion probabilities", 0.7 + 0.26 * min(_BARS, len(order))) as sheet:
        axes, shown = sheet.figure.add_subplot(), order[:_BARS][::-1]
        axes.barh([str(facts.names[j])[:18] for j in shown], [facts.inclusion[j] for j in shown], color=AFTER)
        axes.axvline(0.5, color=INK, linewidth=0.8)
        axes.set(xlim=(0, 1), xlabel="inclusion probability")
    inside = [[facts.names[j], f"{facts.inclusion[j]:.3f}", str(int(facts.weights[j]))] for j in used]
    parts = [
        page.section(
            "inputs",
            "Which inputs, and how sure",
            page.paragraph(
                "The inclusion of an input is the probability that the target depends on it, from the evidence of the "
                "model with and without it, and with its stand-ins."
            ),
            page.figure("Inclusion probability", sheet.svg),
            page.table("Inputs that are used", ["input", "inclusion", "weights"], inside),
        ),
        page.section("effects", "Effects", page.paragraph(_EFFECTS), _curves("effect", facts.effects, facts.target)),
    ]
    if facts.pair:
        with drawing("pair", "effects of the strongest pair", 2.8) as sheet:
            axes = sheet.figure.add_subplot()
            for (label, curve), colour in zip(facts.pair, (BEFORE, MUTED, AFTER), strict=False):
                paint(axes, curve, colour, label)
            axes.legend(frameon=False)
            ylabel(axes, facts.target)
        parts.append(page.section("pair", "The strongest pair", page.figure(facts.pair[0][1].name, sheet.svg)))
    if facts.noise:
        text = page.paragraph("Standard deviation of the noise while one input moves.")
        parts.append(page.section("noise", "Where the noise grows", text, _curves("noise", facts.noise, "noise")))
    if facts.coverage is None:
        said = page.paragraph("No held-out rows were given: report(path, X, y) shows how often intervals hold them.")
    else:
        shares = [[f"{100 * a:.0f} %", f"{100 * b:.1f} %"] for a, b in zip(*facts.coverage, strict=True)]
        said = page.table("Held-out rows", ["promised", "observed"], shares)
    parts.append(page.section("calibration", "Calibration on held-out rows", said))
    out = [[facts.names[j], f"{facts.inclusion[j]:.3f}", facts.why[j]] for j in order if not facts.read[j]]
    left = page.table("Inputs that are not used", ["input", "inclusion", "why"], out, words=3)
    left = left if out else page.paragraph("Nothing: every input is used.")
    parts.append(page.section("out", "What was left out, and why", left))
    path.write_text(page.document(facts.title, head, parts, "Written by Ockham."), encoding="utf-8")
    return path


_EFFECTS = (
    "Mean prediction while one input takes each value and the others are as they come in the table; bands hold 90 % of "
    "the networks of the posterior."
)


def _curves(key: str, effects: Sequence[Effect], target: str) -> str:
    cards = []
    for i, shown in enumerate(effects[:_TOP]):
        with drawing(f"{key}{i}", f"effect of {shown.name} on {target}", 2.4) as sheet:
            axes = sheet.figure.add_subplot()
            paint(axes, shown, AFTER)
            ylabel(axes, target)
        cards.append(page.figure(shown.name, sheet.svg))
    return page.grid(cards) if cards else page.paragraph("No input is used.")


def table_of(
    names: Sequence[str], inclusion: npt.NDArray[Any], weights: npt.NDArray[Any], read: npt.NDArray[Any], top: int
) -> str:
    """Features by inclusion, the likeliest first, at most ``top`` of those that are out."""
    order = sorted(range(len(names)), key=lambda j: (-inclusion[j], j))
    shown = [j for j in order if read[j]] + [j for j in order if not read[j]][:top]
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
