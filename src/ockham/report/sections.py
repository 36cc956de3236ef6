"""The sections of a report, one function each: values in, HTML out. What was not measured says so in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ockham.report import figures, page, story
from ockham.report.canvas import AFTER, BEFORE
from ockham.report.folder import BINS, Results
from ockham.report.page import count, number, percent, seconds, signed

__all__ = [
    "calibration",
    "comparison",
    "evidence_section",
    "glossary",
    "input_map_section",
    "layers_section",
    "ood",
    "provenance",
    "shift_section",
    "sizes_section",
    "structures",
    "training",
]

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


def layers_section(results: Results) -> str:
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
    picture = page.figure("Units of each group, before and after", figures.width_bars([rows[i] for i in shown]), some)
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


def input_map_section(results: Results) -> str:
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


def shift_section(results: Results) -> str:
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


def sizes_section(results: Results) -> str:
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


_NOMINAL = {"coverage_50": 0.50, "coverage_90": 0.90, "coverage_95": 0.95}


def evidence_section(results: Results) -> str:
    """Histograms of delta_f, the evidence curve, the table of rounds."""
    rounds = results.history["rounds"]
    text = page.paragraph(story.why(results))
    if not rounds:
        return page.section("evidence", "The evidence", text)
    pictures = _histograms(results)
    legend = (("after", "free energy (higher is better)"), ("gone", "gain that the round predicted"))
    caption = "The network just before each round, refitted since the last."
    pictures.append(page.figure("Evidence over the rounds", figures.evidence(rounds), caption, legend=legend))
    epochs = results.history["epochs"]
    if epochs:
        svg = figures.kept_share(epochs, rounds)
        pictures.append(page.figure("Weights kept over the epochs", svg, "A dot is a round of removal."))
    table = page.details("All rounds as a table", _rounds(rounds))
    return page.section("evidence", "The evidence", text, _diagnosis(results), page.grid(pictures), table)


def training(results: Results) -> str:
    """Accuracy against the share kept."""
    epochs, title = results.history["epochs"], "What it cost on the way"
    if not epochs:
        return page.section("training", title, page.paragraph("The result does not list its epochs."))
    before, after = results.metrics["before"] or {}, results.metrics["after"]
    classes = after.get("accuracy") is not None
    end = (results.metrics["kept"], after["accuracy"]) if classes else None
    legend = [("gone", "training data, one draw of the weights")]
    if classes:
        legend += [("before", "before, test")] * ("accuracy" in before) + [("after", "reduced, test")]
    name = "Accuracy as the network shrinks" if classes else "Loss as the network shrinks"
    picture = page.figure(name, figures.path(epochs, before.get("accuracy"), end), legend=legend)
    header = ("epoch", "weights kept", "training loss, nats", "training accuracy", "removed after it")
    rounds = results.history["rounds"]
    short = page.table("At every halving of the network", header, _epochs(_halvings(epochs), rounds))
    table = page.details("All epochs as a table", page.table("Every epoch", header, _epochs(epochs, rounds)))
    return page.section("training", title, page.grid([picture, short]), table)


def calibration(results: Results) -> str:
    """Reliability diagrams, or coverage of intervals for regression."""
    found, title = results.analysis["reliability"], "Does it know what it does not know?"
    if found is None:
        return page.section("calibration", title, _coverage(results))
    text = page.paragraph(
        "Each bar gathers the test examples on which the network was about equally sure. Where the bar ends on the "
        "black mark, it is right as often as it says; a bar below its mark means too sure, above it too modest."
    )
    legend = [("mark", "what the network says")]
    pictures = []
    for who, name, colour in (("before", "Before", BEFORE), ("after", "Reduced", AFTER)):
        if found[who] is not None:
            error = number((results.metrics[who] or {}).get("ece"))
            svg = figures.reliability_diagram(
                f"reliability{who}", found[who], colour=colour, label=f"Reliability diagram {name}, ECE {error}"
            )
            pictures.append(page.figure(f"{name}: ECE {error}", svg, legend=[(who, "how often it is right"), *legend]))
    absent = (
        page.paragraph("There is no diagram of the network before the reduction.", "quiet")
        if found["before"] is None
        else ""
    )
    return page.section(
        "calibration", title, text, page.grid(pictures), absent, page.details("The bins as a table", _bins(found))
    )


def _halvings(epochs: Sequence[Record]) -> list[Record]:
    """The last epoch before each halving of the kept share, and the last of all."""
    found, share = [], epochs[0]["kept_share"]
    for this, following in pairwise(epochs):
        if following["kept_share"] <= share / 2:
            found.append(this)
            share = following["kept_share"]
    return [*found, epochs[-1]]


def _epochs(epochs: Sequence[Record], rounds: Sequence[Record]) -> list[tuple[str, ...]]:
    gone = {r["epoch"]: count(r["removed"]) for r in rounds}
    return [
        (
            str(e["epoch"]),
            percent(e["kept_share"]),
            number(e["loss"]),
            percent(e["accuracy"], 2),
            gone.get(e["epoch"], ""),
        )
        for e in epochs
    ]


def _line(results: Results) -> float:
    """Where the decision line stands: prior log odds of keeping, nats."""
    value = (results.result["settings"] or {}).get("log_odds")
    return float(value) if isinstance(value, (int, float)) and abs(value) < 25 else 0.0


def _histograms(results: Results) -> list[str]:
    found = [h for h in results.history["histograms"] or () if sum(h["delta_f"])]
    ends = [("First round", "histogramfirst", found[0])] if found else []
    ends += [("Last round", "histogramlast", found[-1])] if len(found) > 1 else []
    line, pictures = _line(results), []
    for name, key, h in ends:
        share = sum(n for i, n in enumerate(h["delta_f"]) if _edge(i) >= line) / sum(h["delta_f"])
        caption = f"{count(sum(h['delta_f']))} weights; for {percent(share)} the data are better explained without."
        svg = figures.histogram(key, h["delta_f"], line=line, label=f"Histogram of delta F, {name}. {caption}")
        table = page.table(f"Weights by ΔF, {name.lower()}", ("ΔF from, nats", "to", "weights"), _counts(h["delta_f"]))
        picture = page.figure(f"{name}, after epoch {h['epoch']}", svg, caption)
        pictures.append(f"<div>{picture}{page.details('As a table', table)}</div>")
    return pictures


def _edge(i: int) -> float:
    return -25 + 30 / BINS * i


def _counts(counts: Sequence[int]) -> list[tuple[str, str, str]]:
    def ends(i: int) -> tuple[str, str]:
        return ("less" if i == 0 else signed(_edge(i), 1)), ("more" if i == BINS - 1 else signed(_edge(i + 1), 1))

    return [(*ends(i), count(n)) for i, n in enumerate(counts) if n]


def _diagnosis(results: Results) -> str:
    d = results.history["diagnosis"]
    if d is None:
        return ""
    text = (
        f"Before the first round, {percent(d['undetermined'])} of the weights were undetermined (the data had told "
        f"nothing about them), "
        f"the precision of the others varied by {percent(d['spread'])} around its mean, and "
        f"{percent(d['removable'])} of the weights "
        "had evidence for their removal. "
    )
    text += (
        "That is not enough to trust the evidence blindly; see the warning at the top."
        if d["warnings"]
        else "That is enough to prune from."
    )
    return page.paragraph(text + _settled(d))


def _settled(d: Record) -> str:
    cost, nll = d.get("noise_cost"), d.get("nll")
    if cost is None or nll is None or cost <= nll:
        return ""
    return (
        f" Its spread should have cost {number(cost)} nats an example, yet the whole loss was {number(nll)}: the "
        "standard deviations were still growing, and the first round's evidence is larger than a settled posterior "
        "would give. The later rounds refit before they ask again."
    )


def _rounds(rounds: Sequence[Record]) -> str:
    rows = [
        (
            str(r["epoch"]),
            count(r["removed"]),
            percent(r["kept_share"]),
            signed(r["delta_f"], 1),
            "–" if r["nll_cost"] is None else signed(r["nll_cost"], 5),
            "–" if r["free_energy"] is None else f"{r['free_energy']:,.1f}".replace("-", "\N{MINUS SIGN}"),
        )
        for r in rounds
    ]
    header = (
        "after epoch",
        "removed",
        "kept",
        "predicted gain ΔF, nats",
        "expected NLL cost, nats per example",
        "free energy before, nats",
    )
    return page.table("Rounds of removal", header, rows)


def _coverage(results: Results) -> str:
    metrics = results.metrics
    found = {key: metrics["after"].get(key) for key in _NOMINAL}
    if any(value is None for value in found.values()):
        return page.paragraph("Calibration was not measured for this result.")
    before = [(metrics["before"] or {}).get(key) for key in _NOMINAL]
    complete = [b for b in before if b is not None]
    both = complete if len(complete) == len(before) else None
    svg = figures.coverage(both, [v for v in found.values() if v is not None], list(_NOMINAL.values()))
    legend = [("before", "before"), ("after", "reduced")] if both else [("after", "reduced")]
    picture = page.figure(
        "Coverage of prediction intervals", svg, "On the dashed line, intervals hold what they promise.", legend=legend
    )
    rows = [
        (percent(n), percent(b, 1), percent(found[k], 1)) for (k, n), b in zip(_NOMINAL.items(), before, strict=True)
    ]
    table = page.table("Coverage on test data", ("promised", "observed before", "observed reduced"), rows)
    text = page.paragraph(
        "A 90 % interval should hold the true value nine times in ten: fewer means the network is too sure, more "
        "that it is too modest."
    )
    return text + page.grid([picture, table])


def _bins(found: Record) -> str:
    rows = []
    for who, name in (("before", "before"), ("after", "reduced")):
        for i, n in enumerate((found[who] or {"count": []})["count"]):
            edges = f"{found[who]['edges'][i]:.3f} to {found[who]['edges'][i + 1]:.3f}"
            rows.append(
                (name, edges, percent(found[who]["confidence"][i], 1), percent(found[who]["accuracy"][i], 1), count(n))
            )
    return page.table(
        "Reliability", ("network", "confidence bin", "mean confidence", "accuracy", "examples"), rows, words=2
    )
