"""The report of a run with gates: one self-contained HTML file, from the numbers in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ockham.errors import ResultError
from ockham.files.tree import SCHEMA, read_json, write_bytes
from ockham.report import gate_figures, page
from ockham.report.words import count, number, percent, seconds

__all__ = ["GATES", "render_gates", "write_gate_report"]

GATES = "gates.json"
"""The file that makes a folder a run with gates."""

Record = Mapping[str, Any]


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
        parts = (_widths(gates), _layers(gates), _curves(gates), _numbers(metrics), _provenance(result))
        title = f"{percent(1 - metrics['kept'])} of {metrics['network']} removed by gates"
        return page.document(f"{title} · Ockham", _head(title, metrics, gates), parts, _foot(result))
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ResultError(f"{folder}: its numbers are damaged ({type(error).__name__}: {error})") from error


def write_gate_report(folder: Path) -> Path:
    """Write ``report.html`` into the folder, atomically; returns its path."""
    path = Path(folder) / "report.html"
    write_bytes(path, render_gates(Path(folder)).encode("utf-8", "replace"))
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


def _widths(gates: Record) -> str:
    epochs = gates["epochs"]
    svg = gate_figures.widths(epochs)
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
        figures.append(page.figure(f"{layer['id']}: posterior", gate_figures.gates(f"gates{i}", layer), stays))
        figures.append(page.figure(f"{layer['id']}: evidence", gate_figures.evidence(f"evidence{i}", layer)))
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
    figure = page.figure("Accuracy against compression", gate_figures.curve(curves))
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
