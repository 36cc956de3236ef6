"""The report of a result folder: one self-contained HTML file for every method, no network, no scripts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ockham.report import page, sections, story
from ockham.report.page import count, percent, seconds, size, times
from ockham.run.folder import amend
from ockham.run.schema import Result, read_result

__all__ = ["Addition", "More", "render", "write_report"]


@dataclass(frozen=True, slots=True)
class Addition:
    """What a method adds to the page.

    Attributes:
        sections: HTML of whole sections, placed after the shape of the network.
        warnings: sentences that a reader must know before trusting the result.
    """

    sections: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


More = Callable[[Result], Addition]
"""A result to what one method has to say of it; nothing where the result is not its own."""


def render(result: Result, more: More = lambda result: Addition()) -> str:
    """The report as HTML text; the same result gives the same text.

    Args:
        result: everything the folder says.
        more: sections and warnings of one method, such as `ockham.methods.gates.report.gate_sections`.
    """
    added = more(result)
    parts = (
        sections.comparison(result),
        sections.structures(result),
        *added.sections,
        sections.layers_section(result),
        sections.evidence_section(result),
        sections.training(result),
        sections.calibration(result),
        sections.input_map_section(result),
        sections.shift_section(result),
        sections.ood(result),
        sections.sizes_section(result),
        sections.source_section(result),
        sections.loading(result),
        sections.glossary(),
    )
    headline, date = story.headline(result), (result.provenance.date or "")[:10]
    head = page.paragraph(f"Ockham · {story.kind_of(result)} report" + (f" · {date}" if date else ""), "eyebrow")
    head += f"<h1>{page.escape(headline)}</h1>"
    head += page.paragraph(story.removed(result), "lead") + page.paragraph(story.verdict(result), "lead")
    if warnings := [*story.warnings_of(result), *added.warnings]:
        head += page.note("Before you rely on this result", warnings)
    head += f'<dl class="tiles">{"".join(_tiles(result))}</dl>'
    version = result.provenance.ockham or "unknown"
    foot = page.paragraph(f"Written by Ockham {version}. This file needs no network and contains no scripts.")
    return page.document(f"{headline} · Ockham", head, parts, foot)


def write_report(folder: str | Path, more: More = lambda result: Addition()) -> Path:
    """Write ``report.html`` into a result folder, atomically, and renew its seal.

    Args:
        folder: result of any method.
        more: sections and warnings of one method.

    Returns:
        The path of the report.

    Raises:
        ResultError: a file of the folder is missing, damaged or newer; names the file.
        OckhamError: the folder cannot be written.
    """
    path = Path(folder) / "report.html"
    amend(path, render(read_result(folder), more).encode("utf-8", "replace"))
    return path


def _tiles(result: Result) -> list[str]:
    metrics, (kept, total) = result.metrics, story.totals(result)
    tiles = []
    if story.units_gone(result):
        for batch, before, after in story.speeds(result)[-1:]:
            what = "Speed, one example" if batch == 1 else f"Speed, batch {batch}"
            aside = f"{1e3 * before:.3g} → {1e3 * after:.3g} ms, measured"
            tiles.append(page.tile(what, f"{before / after:.3g} ×", aside, "good" if before > 1.05 * after else ""))
    aside = f"{count(kept)} of {count(total)}" if total else f"{count(metrics.after.parameters)} stored values"
    what = "Parameters kept" if result.gates is not None else "Weights kept"
    tiles.append(page.tile(what, percent(metrics.kept), aside))
    for key, label in (("accuracy", "Accuracy"), ("rmse", "RMSE"), ("nll", "NLL, nats"), ("ece", "Calibration error")):
        measure = next(m for m in story.MEASURES if m.key == key)
        value = measure.of(metrics.after)
        if value is not None:
            tiles.append(page.tile(label, measure.write(value), *story.calls(result, measure)))
    old, new = metrics.before.bytes if metrics.before else None, metrics.after.bytes
    if new is not None:
        ratio = times(old, new)
        smaller = f"was {size(old)}, {ratio:.3g} times smaller" if ratio else "as stored"
        tiles.append(page.tile("Size on disk", size(new), smaller))
    return [*tiles, page.tile("Time", seconds(metrics.seconds), "the whole run")]
