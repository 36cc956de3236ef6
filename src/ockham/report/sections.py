"""The sections of a report, one function each: values in, HTML out. What was not measured says so in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ockham.report import figures, page, story
from ockham.report.folder import Results
from ockham.report.words import count, number, percent, seconds, signed

__all__ = ["comparison", "glossary", "input_map", "layers", "ood", "provenance", "shift", "sizes", "structures"]

Record = dict[str, Any]

_BOTH = (("before", "before"), ("after", "reduced"))
_MOST_BARS = 30


def comparison(results: Results) -> str:
    """The headline table."""
    before, after = results.metrics["before"] or {}, results.metrics["after"]
    mean = results.metrics["mean_network"] or {}
    rows = []
    for m in story.MEASURES:
        b, a, s = before.get(m.key), after.get(m.key), mean.get(m.key)
        if (b, a, s) != (None, None, None):
            rows.append((m.label, m.write(b), m.write(a), story.change(results, m, b, a), m.write(s)))
    header = ("", "before", "reduced", "change", "reduced, mean network only")
    text = page.table("All on test data that no step of the work has seen", header, rows)
    words = (
        "“Reduced” averages the predictions of several networks drawn from what was learned about the weights; “mean "
        "network only” uses every weight once, at its most likely value, and costs no more than an ordinary network."
    )
    return page.section("comparison", "Before and after", text, page.paragraph(words, "quiet"))


def layers(results: Results) -> str:
    """Kept share per layer."""
    rows = results.analysis["layers"]
    if not rows:
        return page.section(
            "layers", "Where weights were removed", page.paragraph("The result does not list its layers.")
        )
    shown = sorted(sorted(range(len(rows)), key=lambda i: -rows[i]["total"])[:_MOST_BARS])
    some = f"The {_MOST_BARS} largest of {len(rows)}; the table has all." if len(rows) > _MOST_BARS else ""
    picture = page.figure("Share of weights kept in each layer", figures.layers([rows[i] for i in shown]), some)
    cells: list[tuple[str, ...]] = [
        (r["name"], " × ".join(map(str, r["shape"])) or "scalar", count(r["total"]), count(r["kept"]),
         percent(r["kept"] / r["total"] if r["total"] else None))
        for r in rows
    ]  # fmt: skip
    header: tuple[str, ...] = ("layer", "shape", "weights", "kept", "share kept")
    said = all(r["expected"] is not None for r in rows)
    if said:
        header += ("sum of inclusion probabilities",)
        cells = [(*c, f"{r['expected']:,.1f}") for c, r in zip(cells, rows, strict=True)]
    table = page.table("Weights per layer", header, cells, words=2)
    most = max(rows, key=lambda r: r["total"] - r["kept"])
    text = page.paragraph(
        f"Most weights went from {most['name']}: {count(most['total'] - most['kept'])} of {count(most['total'])}. "
        "No share was set per layer; it follows from what was decided weight by weight."
    )
    inside = page.paragraph(_inclusion(results)) if said else ""
    return page.section("layers", "Where weights were removed", text, inside, page.grid([picture, table]))


def _inclusion(results: Results) -> str:
    text = (
        "Every weight has an inclusion probability: how likely it is, after the data, not to be zero. A weight stays "
        "where that exceeds one half. Weights that can stand in for each other share their probability; "
        "“ockham audit” compares the last layer with exact enumeration."
    )
    inputs = results.analysis["input_inclusion"]
    if inputs is None:
        return text
    likely = sum(p > 0.5 for p in inputs)
    return f"{text} Of {count(len(inputs))} inputs, {count(likely)} are likelier used than not."


def structures(results: Results) -> str:
    """Widths before and after, and what they changed; nothing where no structures were asked for."""
    found = results.structure
    if found is None:
        return ""
    rows, before, after = found["groups"], found["before"], found["after"]
    gone = sum(r["before"] - r["after"] for r in rows)
    if not gone:
        return page.section(
            "structures",
            "The shape of the network",
            page.paragraph(
                "No channel, neuron or head went as a whole: each was worth its price, or cannot be removed."
            ),
        )
    shown = sorted(sorted(range(len(rows)), key=lambda i: rows[i]["after"] - rows[i]["before"])[:_MOST_BARS])
    some = f"The {_MOST_BARS} groups that lost most, of {len(rows)}." if len(rows) > _MOST_BARS else ""
    picture = page.figure("Units of each group, before and after", figures.widths([rows[i] for i in shown]), some)
    cells = [
        (r["id"], count(r["before"]), count(r["after"]), f"{r['nats']:,.1f}" if r["after"] < r["before"] else "–")
        for r in rows
    ]
    table = page.table("Units per group", ("group", "before", "after", "evidence of the removed, nats"), cells)
    costs = [
        ("parameters, dense", count(before["parameters"]), count(after["parameters"])),
        ("multiply-accumulates of one example", count(before["macs"]), count(after["macs"])),
        ("latency, batch 1, ms", f"{1e3 * before['latency_1']:.3f}", f"{1e3 * after['latency_1']:.3f}"),
        ("latency, batch 64, ms", f"{1e3 * before['latency_64']:.3f}", f"{1e3 * after['latency_64']:.3f}"),
    ]
    costs_table = page.table("What a forward pass costs", ("", "before", "after"), costs)
    work, time = (percent(after[key] / max(1e-12, before[key]), 0) for key in ("macs", "latency_64"))
    text = page.paragraph(
        f"{count(gone)} channels, neurons or heads went as a whole, and the network is physically smaller: "
        f"{work} of the multiply-accumulates and {time} of the measured time at batch 64 remain. "
        "A group is named after the first dimension in it; the dimensions of other layers that read it shrank with it."
    )
    return page.section("structures", "The shape of the network", text, page.grid([picture, table]), costs_table)


def input_map(results: Results) -> str:
    """Which input pixels still matter."""
    rows, title = results.analysis["input_map"], "What the network still looks at"
    if rows is None:
        return page.section(
            "inputs", title, page.paragraph("There is no map of input pixels: the inputs are not images.")
        )
    pixels, used = len(rows) * len(rows[0]), sum(v > 0 for row in rows for v in row)
    most = max(map(max, rows))
    text = page.paragraph(
        f"{count(used)} of {count(pixels)} input pixels ({percent(used / pixels)}) still have a weight in the first "
        "layer; the network ignores the others. Nobody told it where the interesting part of the image is."
    )
    caption = f"Kept first-layer weights per pixel: none (empty) to {most} (darkest)."
    picture = page.figure("Kept weights per input pixel", figures.input_map(rows), caption)
    at = next((y, row.index(most)) for y, row in enumerate(rows) if most in row)
    facts = [
        ("pixels", count(pixels)),
        ("still used", count(used)),
        ("ignored", count(pixels - used)),
        ("most weights on one pixel", f"{most}, in row {at[0] + 1}, column {at[1] + 1}"),
    ]
    text += page.table("The map in short", ("", "value"), facts, words=2)
    if pixels > 4096:
        return page.section("inputs", title, page.grid([picture, f"<div>{text}</div>"]))
    width = len(str(most))
    numbers = "\n".join(" ".join(f"{v:{width}d}" if v else f"{'·':>{width}}" for v in row) for row in rows)
    table = page.details("The map in numbers", f'<pre class="map">{numbers}</pre>')
    return page.section("inputs", title, page.grid([picture, f"<div>{text}{table}</div>"]))


def shift(results: Results) -> str:
    """Accuracy and calibration under corruption."""
    found, title = results.analysis["shift"], "When the data get worse"
    found = {name: c for name, c in (found or {}).items() if c["severity"]}
    if not found:
        return page.section(
            "shift", title, page.paragraph("Behaviour under corrupted inputs was not measured for this result.")
        )
    before, after = results.metrics["before"] or {}, results.metrics["after"]
    clean = {
        "before": before.get("accuracy"),
        "after": after.get("accuracy"),
        "before_ece": before.get("ece"),
        "after_ece": after.get("ece"),
    }
    both = any(c["before"] is not None for c in found.values())
    legend = _BOTH if both else _BOTH[1:]
    pictures = [
        page.figure(name.replace("_", " "), figures.shift(f"shift{i}", name, curves, clean=clean), legend=legend)
        for i, (name, curves) in enumerate(found.items())
    ]
    text = page.paragraph(
        "Test images were damaged in several ways, from severity 1 to 5 (0 is clean). A good network loses accuracy "
        "slowly "
        "and knows when it is unsure: its calibration error (ECE) stays low."
    )
    rows = [row for name, curves in found.items() for row in _severities(name, curves)]
    header = ("damage", "severity", "accuracy before", "accuracy reduced", "ECE before", "ECE reduced")
    table = page.table("Accuracy and calibration error under damage", header, rows)
    return page.section("shift", title, text, page.grid(pictures), page.details("The numbers as a table", table))


def ood(results: Results) -> str:
    """Detection of inputs from elsewhere."""
    found, title = results.analysis["ood"], "Inputs of another kind"
    if found is None or found["after"] is None:
        return page.section(
            "ood", title, page.paragraph("Detection of inputs of another kind was not measured for this result.")
        )
    text = (
        f"Inputs of another kind ({found['name']}) are told from the test data by the network's uncertainty with an "
        f"AUROC of {found['after']:.3f} (0.5 is guessing, 1 is perfect)"
    )
    if found["before"] is None:
        return page.section("ood", title, page.paragraph(text + "."))
    change = f"the network before the reduction reached {found['before']:.3f}"
    rows = [("AUROC", f"{found['before']:.4f}", f"{found['after']:.4f}", signed(found["after"] - found["before"], 4))]
    table = page.table("Telling inputs of another kind from the test data", ("", "before", "reduced", "change"), rows)
    return page.section("ood", title, page.paragraph(f"{text}; {change}."), table)


def sizes(results: Results) -> str:
    """Stored values and bytes."""
    before, after = results.metrics["before"], results.metrics["after"]
    rows = [
        (
            m.label,
            m.write((before or {}).get(m.key)),
            m.write(after.get(m.key)),
            m.change((before or {}).get(m.key), after.get(m.key)),
        )
        for m in story.MEASURES
        if m.kind in ("count", "bytes")
    ]
    picture = page.figure("How large it is", figures.sizes(before, after), legend=_BOTH if before else _BOTH[1:])
    table = page.table("Size", ("", "before", "reduced", "change"), rows)
    text = "Removed weights are not stored: one bit a weight says whether it is left, then come the values of those. "
    text += f"The whole run took {seconds(results.metrics['seconds'])}."
    return page.section("sizes", "Size and time", page.paragraph(text), page.grid([picture, table]))


def provenance(results: Results) -> str:
    """The command, settings, versions."""
    r, versions = results.result, results.result["versions"] or {}
    data = r["dataset"] or {}
    facts = [
        ("date", r["date"]), ("random seed", r["seed"]), ("run time", seconds(r["seconds"])), ("machine", r["machine"]),
        ("network", (r["network"] or {}).get("builder")), ("data", data.get("name")), ("data from", data.get("source")),
        ("training examples", _maybe_count(data.get("n_train"))), ("test examples", _maybe_count(data.get("n_test"))),
        ("ockham", r["ockham"]), *versions.items(),
    ]  # fmt: skip
    table = page.table("The run", ("", "value"), [(k, str(v)) for k, v in facts if v is not None], words=2)
    tables = [table]
    if r["settings"]:
        rows = [(k, _setting(v)) for k, v in sorted(r["settings"].items())]
        tables.append(page.table("Settings", ("setting", "value"), rows, words=2))
    command = f'<pre class="wrap">{page.escape(r["command"])}</pre>' if r["command"] else ""
    return page.section("provenance", "How to get this again", command, page.grid(tables))


def glossary() -> str:
    """Words in plain English."""
    words = "".join(f"<dt>{page.escape(k)}</dt><dd>{page.escape(v)}</dd>" for k, v in story.GLOSSARY)
    return page.section("glossary", "Words", f'<dl class="words">{words}</dl>')


def _maybe_count(value: int | None) -> str | None:
    return None if value is None else count(value)


def _setting(value: Any) -> str:
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return "none" if value in ("", None) else str(value)


def _severities(name: str, curves: Record) -> list[tuple[str, ...]]:
    def cell(values: Sequence[float] | None, i: int, share: bool) -> str:
        if values is None:
            return "–"
        return percent(values[i], 1) if share else number(values[i])

    keys = (("before", True), ("after", True), ("before_ece", False), ("after_ece", False))
    return [
        (name, f"{v:g}", *(cell(curves[k], i, share) for k, share in keys)) for i, v in enumerate(curves["severity"])
    ]
