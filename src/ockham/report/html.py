"""The report of a result folder: one self-contained HTML file, no network, no scripts."""

from __future__ import annotations

from pathlib import Path

from ockham.report import page, sections, story
from ockham.report.folder import Results, read_results
from ockham.report.page import count, percent, seconds, size, times
from ockham.run.folder import amend

__all__ = [
    "render",
    "write_report",
]


def render(folder: Path) -> str:
    """The report as HTML text; the same files give the same text.

    Args:
        folder: with ``metrics.json``, ``history.json``, ``analysis.json``, ``result.json``; ``structure.json`` if any.

    Raises:
        ResultError: a file is missing, damaged or newer; names the file.
    """
    results = read_results(Path(folder))
    parts = (
        sections.comparison(results),
        sections.layers_section(results),
        sections.structures(results),
        sections.evidence_section(results),
        sections.training(results),
        sections.calibration(results),
        sections.input_map_section(results),
        sections.shift_section(results),
        sections.ood(results),
        sections.sizes_section(results),
        sections.provenance(results),
        sections.glossary(),
    )
    version = results.result["ockham"] or "unknown"
    foot = page.paragraph(f"Written by Ockham {version}. This file needs no network and contains no scripts.")
    return page.document(f"{story.headline(results)} · Ockham", _head(results), parts, foot)


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a result folder, atomically.

    Returns:
        The path of the report.

    Raises:
        ResultError: as `render`.
        OckhamError: the folder cannot be written.
    """
    path = Path(folder) / "report.html"
    amend(path, render(folder).encode("utf-8", "replace"))
    return path


def _head(results: Results) -> str:
    date = (results.result["date"] or "")[:10]
    text = page.paragraph("Ockham · evidence report" + (f" · {date}" if date else ""), "eyebrow")
    text += f"<h1>{page.escape(story.headline(results))}</h1>"
    text += page.paragraph(story.removed(results), "lead") + page.paragraph(story.verdict(results), "lead")
    warnings = story.warnings_of(results)
    if warnings:
        text += page.note("Before you rely on this result", warnings)
    return text + f'<dl class="tiles">{"".join(_tiles(results))}</dl>'


def _tiles(results: Results) -> list[str]:
    before, after = results.metrics["before"] or {}, results.metrics["after"]
    kept, total = story.totals(results)
    aside = (
        f"{count(kept)} of {count(total)}" if total is not None else f"{count(after.get('parameters'))} stored values"
    )
    tiles = [page.tile("Weights kept", percent(results.metrics["kept"]), aside)]
    for key, label in (("accuracy", "Accuracy"), ("rmse", "RMSE"), ("nll", "NLL, nats"), ("ece", "Calibration error")):
        measure = next(m for m in story.MEASURES if m.key == key)
        if after.get(key) is not None:
            tiles.append(page.tile(label, measure.write(after[key]), *story.calls(results, measure)))
    ratio = times(before.get("bytes"), after.get("bytes"))
    smaller = f"was {size(before.get('bytes'))}, {ratio:.3g} times smaller" if ratio else "as stored"
    tiles.append(page.tile("Size on disk", size(after.get("bytes")), smaller))
    return [*tiles, page.tile("Time", seconds(results.metrics["seconds"]), "the whole run")]
