"""Pictures of a run with gates: distributions, evidence, widths, accuracy against compression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ockham.core.files import SCHEMA, read_json
from ockham.errors import ResultError
from ockham.report import page
from ockham.report.canvas import AFTER, BEFORE, GONE, INK, MUTED, draw, integers, percents, thousands, ylabel
from ockham.report.page import count, number, percent, seconds
from ockham.run.folder import amend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "GATES",
    "curve_figure",
    "evidence_figure",
    "gates_figure",
    "render_gates",
    "widths_figure",
    "write_gate_report",
]

Record = Mapping[str, Any]


def gates_figure(key: str, layer: Record) -> str:
    """Every gate of a layer as its mean and two standard deviations of ln theta, most alive first.

    Args:
        key: unique name.
        layer: ``mean``, ``std``, ``theta`` and ``keep`` of its gates, and its ``id``.
    """
    label = f"Gates of {layer['id']}: {sum(layer['keep'])} of {len(layer['keep'])} stay"
    return draw(key, label, 2.6, partial(_gates, layer=layer))


def evidence_figure(key: str, layer: Record) -> str:
    """The true delta_f of every gate of a layer, in order, on a symmetric logarithmic axis."""
    label = f"Evidence of the gates of {layer['id']}, nats"
    return draw(key, label, 2.6, partial(_evidence, layer=layer), margins=(0.8, 0.2, 0.5, 0.12))


def widths_figure(epochs: Sequence[Record]) -> str:
    """Structures that are left in every layer, over the epochs, as a share of the first."""
    label = f"Widths over {len(epochs)} epochs"
    return draw("widths", label, 3.2, partial(_widths, epochs=epochs), margins=(0.74, 1.3, 0.5, 0.12))


def curve_figure(curves: Mapping[str, Record]) -> str:
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


GATES = "gates.json"
"""The file that makes a folder a run with gates."""


def render_gates(folder: Path) -> str:
    """The report as HTML text; the same files give the same text.

    Args:
        folder: with ``metrics.json``, ``gates.json`` and ``result.json``.

    Raises:
        ResultError: a file is missing, damaged or newer; names the file.
    """
    metrics, gates, result = (read_json(folder / name) for name in ("metrics.json", GATES, "result.json"))
    if result.get("schema", 0) > SCHEMA:
        raise ResultError(f"{folder / 'result.json'}: written by a newer Ockham (schema {result['schema']}); upgrade")
    try:
        parts = (_widths_gate_report(gates), _layers(gates), _curves(gates), _numbers(metrics), _provenance(result))
        title = f"{percent(1 - metrics['kept'])} of {metrics['network']} removed by gates"
        return page.document(f"{title} · Ockham", _head(title, metrics, gates), parts, _foot(result))
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ResultError(f"{folder}: its numbers are damaged ({type(error).__name__}: {error})") from error


def write_gate_report(folder: Path) -> Path:
    """Write ``report.html`` into the folder, atomically; returns its path."""
    path = Path(folder) / "report.html"
    amend(path, render_gates(Path(folder)).encode("utf-8", "replace"))
    return path


def _head(title: str, metrics: Record, gates: Record) -> str:
    text = page.paragraph("Ockham · gates report", "eyebrow") + f"<h1>{page.escape(title)}</h1>"
    decided = f"Structures went by the rule “{gates['rule']}”; the survivors form a smaller, ordinary network."
    text += page.paragraph(decided, "lead")
    if warnings := _warnings(gates):
        text += page.note("Before you rely on this result", warnings)
    after, before = metrics["after"], metrics["before"] or {}
    tiles = [page.tile("Parameters kept", percent(metrics["kept"]), f"{count(after['parameters'])} values")]
    for key, label in (("accuracy", "Accuracy"), ("nll", "NLL, nats"), ("ece", "Calibration error"), ("rmse", "RMSE")):
        if after.get(key) is not None:
            shown = percent(after[key], 2) if key == "accuracy" else number(after[key])
            old = before.get(key)
            was = "" if old is None else f"before: {percent(old, 2) if key == 'accuracy' else number(old)}"
            tiles.append(page.tile(label, shown, was))
    tiles.append(page.tile("Time", seconds(metrics["seconds"]), "the whole run"))
    return text + f'<dl class="tiles">{"".join(tiles)}</dl>'


def _warnings(gates: Record) -> list[str]:
    layers = gates["layers"]
    quiet = sum(sum(layer["no_evidence"]) for layer in layers)
    total = sum(len(layer["keep"]) for layer in layers)
    found = []
    if quiet:
        found.append(
            f"{quiet} of {total} gates have a posterior that is their prior (to within 0.01 nats): the data say "
            "nothing about them, and their delta_f is no evidence. Rules that remove them remove what was not asked."
        )
    single = [layer["id"] for layer in layers if sum(layer["keep"]) == 1 < len(layer["keep"])]
    if single:
        found.append(f"Only one structure is left in {', '.join(single)}: the rule would have removed the whole layer.")
    if gates["kl_weight"] != "true_elbo":
        found.append(
            f"The KL was weighted by {gates['kl_weight']}, not by 1/N: the posterior is not that of these data, and "
            "nothing here is evidence in nats of the data."
        )
    return found


def _widths_gate_report(gates: Record) -> str:
    epochs = gates["epochs"]
    svg = widths_figure(epochs)
    caption = "Share of structures left in every layer after each epoch; at the end, how many of how many."
    return page.section("widths", "Widths over the epochs", page.figure("Widths", svg, caption))


def _layers(gates: Record) -> str:
    text = page.paragraph(
        "Each gate is a factor θ = e^y between e^-20 and 1 on one structure. Drawn: the posterior of y before the last "
        "decision (mean and two standard deviations, cut off to the interval), and the true evidence change ΔF for "
        "taking the structure out; positive favours removal. The dashed line is the threshold of the released rule, "
        "−½ ln 2π."
    )
    figures = []
    for i, layer in enumerate(gates["layers"]):
        stays = f"{sum(layer['keep'])} of {len(layer['keep'])} stay"
        figures.append(page.figure(f"{layer['id']}: posterior", gates_figure(f"gates{i}", layer), stays))
        figures.append(page.figure(f"{layer['id']}: evidence", evidence_figure(f"evidence{i}", layer)))
    return page.section("gates", "Gates, layer by layer", text, page.grid(figures), _table(gates["layers"]))


def _table(layers: Sequence[Record]) -> str:
    rows = [
        (
            layer["id"],
            str(len(layer["keep"])),
            str(sum(layer["keep"])),
            str(sum(layer["no_evidence"])),
            f"{sorted(layer['theta'])[len(layer['theta']) // 2]:.3g}",
            f"{sorted(layer['delta_f'])[len(layer['delta_f']) // 2]:.3g}",
            f"{sum(layer['kl']):.4g}",
        )
        for layer in layers
    ]
    header = ("layer", "gates", "stay", "posterior = prior", "median E[θ]", "median ΔF, nats", "KL, nats")
    return page.table("Gates before the last decision", header, rows)


def _curves(gates: Record) -> str:
    curves = gates.get("curves")
    if not curves:
        return ""
    text = page.paragraph(
        "After training, structures taken out step by step in the order of each rule, without refitting, on held-out "
        "data. A dot marks where a rule stops by itself; rules without one only order, or find nothing to remove. (The "
        "Taylor rule takes structures without any gradient by itself.)"
    )
    rows = [
        (
            name,
            percent(c["stop"]["removed"]) if c["stop"]["structures"] else "removes nothing by itself",
            percent(c["stop"]["measures"]["accuracy"], 2) if c["stop"]["structures"] else "–",
        )
        for name, c in curves.items()
    ]
    table = page.table("Where the rules stop", ("rule", "parameters removed", "accuracy"), rows)
    figure = page.figure("Accuracy against compression", curve_figure(curves))
    return page.section("curve", "Accuracy against compression", text, figure, table)


def _numbers(metrics: Record) -> str:
    before, after = metrics["before"] or {}, metrics["after"]
    rows = [(k, _shown(before.get(k)), _shown(after[k])) for k in after if isinstance(after[k], (int, float))]
    return page.section("numbers", "Numbers", page.table("On test data", ("measure", "before", "after"), rows))


def _shown(value: float | None) -> str:
    return count(value) if isinstance(value, int) else number(value)


def _provenance(result: Record) -> str:
    rows = [(k, str(v)) for k, v in result.items() if not isinstance(v, (dict, list))]
    rows += [
        (f"{k}: {name}", str(v)) for k, inner in result.items() if isinstance(inner, dict) for name, v in inner.items()
    ]
    return page.section("made", "How it was made", page.table("Provenance", ("what", "value"), rows, words=2))


def _foot(result: Record) -> str:
    return page.paragraph(
        f"Written by Ockham {result.get('ockham')}. This file needs no network and contains no scripts."
    )


def write_any_report(folder: Path) -> Path:
    """Write ``report.html`` of a result folder, with or without gates; returns the file."""
    from ockham.report.html import write_report

    return write_gate_report(folder) if (folder / GATES).exists() else write_report(folder)
