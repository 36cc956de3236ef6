"""The report of a result folder: its sections, and the page that they make."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ockham.report import figures, page, story
from ockham.report.figures import AFTER, BEFORE
from ockham.report.page import count, number, percent, seconds, signed, size, times
from ockham.run.folder import amend
from ockham.run.records import BINS, EpochRecord, Measures, RoundRecord
from ockham.run.schema import DataSource, Result, Settings, load_lines, read_result

__all__ = [
    "Addition",
    "More",
    "calibration",
    "comparison",
    "evidence_section",
    "glossary",
    "input_map_section",
    "layers_section",
    "loading",
    "ood",
    "render",
    "shift_section",
    "sizes_section",
    "source_section",
    "structures",
    "training",
    "write_report",
]


_BOTH = (("before", "before"), ("after", "reduced"))
_MOST_BARS = 30
_NOMINAL = {"coverage_50": 0.50, "coverage_90": 0.90, "coverage_95": 0.95}


def comparison(result: Result) -> str:
    """The headline table."""
    metrics = result.metrics
    mean = metrics.mean_network if metrics.draws != 1 else None  # the same network otherwise
    rows: list[tuple[str, ...]] = []
    for m in story.MEASURES:
        b, a, s = m.of(metrics.before), m.of(metrics.after), m.of(mean)
        if (b, a, s) != (None, None, None):
            rows.append((m.label, m.write(b), m.write(a), story.change(result, m, b, a), m.write(s)))
    rows += [
        (name, number(getattr(metrics.before, "others", {}).get(name)), number(value), "–", "–")
        for name, value in metrics.after.others.items()
    ]
    header: tuple[str, ...] = ("", "before", "reduced", "change", "reduced, mean network only")
    words = (
        "“Reduced” averages the predictions of several networks drawn from what was learned about the weights; “mean "
        "network only” uses every weight once, at its most likely value, and costs no more than an ordinary network."
    )
    if mean is None:
        header, rows = header[:-1], [row[:-1] for row in rows]
        words = "“Reduced” is one ordinary network, every weight at one value; nothing is averaged over draws."
    text = page.table("All on test data that no step of the work has seen", header, rows)
    return page.section("comparison", "Before and after", text, page.paragraph(words, "quiet"))


def layers_section(result: Result) -> str:
    """Kept share per layer."""
    rows, title = result.analysis.layers if result.analysis else None, "Where weights were removed"
    if not rows:
        if result.gates is not None:
            return ""
        return page.section("layers", title, page.paragraph("The result does not list its layers."))
    shown = sorted(sorted(range(len(rows)), key=lambda i: -rows[i].total)[:_MOST_BARS])
    some = f"The {_MOST_BARS} largest of {len(rows)}; the table has all." if len(rows) > _MOST_BARS else ""
    svg = figures.layers([rows[i] for i in shown])
    legend = [("after", "kept"), ("track", "removed")]
    picture = page.figure("Share of weights kept in each layer", svg, some, legend=legend)
    cells: list[tuple[str, ...]] = [
        (r.name, " × ".join(map(str, r.shape)) or "scalar", count(r.total), count(r.kept),
         percent(r.kept / r.total if r.total else None))
        for r in rows
    ]  # fmt: skip
    header: tuple[str, ...] = ("layer", "shape", "weights", "kept", "share kept")
    expected = [r.expected for r in rows if r.expected is not None]
    inside = ""
    if len(expected) == len(rows):
        header += ("sum of inclusion probabilities",)
        cells = [(*c, f"{e:,.1f}") for c, e in zip(cells, expected, strict=True)]
        said = (
            "Every weight has an inclusion probability: how likely it is, after the data, not to be zero. A weight "
            "stays where that exceeds one half. Weights that can stand in for each other share their probability; "
            "“ockham audit” compares the last layer with exact enumeration."
        )
        inputs = result.analysis.input_inclusion if result.analysis else None
        if inputs is not None:
            likely = sum(p > 0.5 for p in inputs)
            said += f" Of {count(len(inputs))} inputs, {count(likely)} are likelier used than not."
        inside = page.paragraph(said)
    table = page.table("Weights per layer", header, cells, words=2)
    most = max(rows, key=lambda r: r.total - r.kept)
    text = page.paragraph(
        f"Most weights went from {most.name}: {count(most.total - most.kept)} of {count(most.total)}. "
        "No share was set per layer; it follows from what was decided weight by weight."
    )
    return page.section("layers", title, text, inside, page.grid([picture, table]))


_KINDS = "channels, neurons or heads"


def structures(result: Result) -> str:
    """Widths before and after, and what they changed; nothing where no structures were asked for."""
    found, title = result.structure, "The shape of the network, and its speed"
    if found is None or not found.groups:
        return ""
    gone = story.units_gone(result)
    if not gone and result.gates is not None:
        return ""
    if not gone:
        words = "No channel, neuron or head went as a whole: each was worth its price, or cannot be removed."
        return page.section("structures", title, page.paragraph(words))
    rows, before, after = found.groups, found.before, found.after
    shown = sorted(sorted(range(len(rows)), key=lambda i: rows[i].after - rows[i].before)[:_MOST_BARS])
    some = f"The {_MOST_BARS} groups that lost most, of {len(rows)}." if len(rows) > _MOST_BARS else ""
    svg = figures.width_bars([rows[i] for i in shown])
    legend = [("after", "left"), ("track", "removed")]
    picture = page.figure("Units of each group, before and after", svg, some, legend=legend)
    pictures = [picture]
    times = story.speeds(result)
    if times:
        where = f" on {result.provenance.machine}" if result.provenance.machine else ""
        said = f"Measured{where}: the median of many runs, warm, both networks in turn. Shorter is faster."
        pictures.append(page.figure("Time of a forward pass", figures.speed(times), said, legend=_BOTH))
    cells: list[tuple[str, ...]] = [
        (r.id, count(r.before), count(r.after), "–" if r.nats is None or r.after == r.before else f"{r.nats:,.1f}")
        for r in rows
    ]
    header: tuple[str, ...] = ("group", "before", "after", "evidence of the removed, nats")
    if result.gates is not None:  # the gates' own section has their evidence
        header, cells = header[:3], [row[:3] for row in cells]
    table = page.table("Units per group", header, cells)
    costs = [
        ("parameters, dense", count(before.parameters), count(after.parameters)),
        ("multiply-accumulates of one example", count(before.macs), count(after.macs)),
        *((f"latency, batch {n}, ms", f"{1e3 * old:.3f}", f"{1e3 * new:.3f}") for n, old, new in times),
    ]
    costs_table = page.table("What a forward pass costs", ("", "before", "after"), costs)
    left = [f"{percent(after.macs / before.macs, 0)} of the multiply-accumulates"] if after.macs and before.macs else []
    left += [f"{percent(new / old, 0)} of the measured time at batch {n}" for n, old, new in times[-1:]]
    kinds = "channels, neurons, heads or residual branches" if any(not r.after for r in rows) else _KINDS
    text = page.paragraph(
        f"{count(gone)} {kinds} went as a whole, and the network is physically smaller"
        f"{': ' + ' and '.join(left) + ' remain' if left else ''}. "
        "A group is named after the first dimension in it; the dimensions of other layers that read it shrank with it."
    )
    return page.section("structures", title, text, page.grid(pictures), page.grid([table, costs_table]))


def input_map_section(result: Result) -> str:
    """Which input pixels still matter."""
    rows, title = result.analysis.input_map if result.analysis else None, "What the network still looks at"
    if rows is None:
        if result.gates is not None:
            return ""
        words = "There is no map of input pixels: the inputs are not images that a first full layer reads."
        return page.section("inputs", title, page.paragraph(words))
    pixels, used = len(rows) * len(rows[0]), sum(v > 0 for row in rows for v in row)
    most = max(map(max, rows))
    text = page.paragraph(
        f"{count(used)} of {count(pixels)} input pixels ({percent(used / pixels)}) still have a weight in the first "
        "layer; the network ignores the others. Nobody told it where the interesting part of the image is."
        if used < pixels
        else f"All {count(pixels)} input pixels still have a weight in the first layer: none is ignored altogether."
    )
    caption = f"Kept first-layer weights per pixel: none (empty) to {most} (darkest)."
    picture = page.figure("Kept weights per input pixel", figures.pixel_map(rows), caption)
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


def shift_section(result: Result) -> str:
    """Accuracy and calibration under corruption."""
    shift, title = result.analysis.shift if result.analysis else None, "When the data get worse"
    found = {name: c for name, c in (shift or {}).items() if c.severity}
    if not found:
        words = "Behaviour under corrupted inputs was not measured for this result."
        return page.section("shift", title, page.paragraph(words))
    before, after = result.metrics.before, result.metrics.after
    legend = _BOTH if any(c.before is not None for c in found.values()) else _BOTH[1:]
    pictures = [
        page.figure(
            name.replace("_", " "),
            figures.shift(f"shift{i}", name, curve, before=before, after=after),
            legend=legend,
        )
        for i, (name, curve) in enumerate(found.items())
    ]
    text = page.paragraph(
        "Test images were damaged in several ways, from severity 1 to 5 (0 is clean). A good network loses accuracy "
        "slowly and knows when it is unsure: its calibration error (ECE) stays low."
    )

    rows = []
    for name, curve in found.items():
        columns = [
            [percent(v, 1) for v in curve.before or ()], [percent(v, 1) for v in curve.after],
            [number(v) for v in curve.before_ece or ()], [number(v) for v in curve.after_ece or ()],
        ]  # fmt: skip
        rows += [(name, f"{s:g}", *(c[i] if c else "–" for c in columns)) for i, s in enumerate(curve.severity)]
    header = ("damage", "severity", "accuracy before", "accuracy reduced", "ECE before", "ECE reduced")
    table = page.table("Accuracy and calibration error under damage", header, rows)
    return page.section("shift", title, text, page.grid(pictures), page.details("The numbers as a table", table))


def ood(result: Result) -> str:
    """Detection of inputs from elsewhere."""
    found, title = result.analysis.ood if result.analysis else None, "Inputs of another kind"
    if found is None or found.after is None:
        words = "Detection of inputs of another kind was not measured for this result."
        return page.section("ood", title, page.paragraph(words))
    text = (
        f"Inputs of another kind ({found.name}) are told from the test data by the network's uncertainty with an "
        f"AUROC of {found.after:.3f} (0.5 is guessing, 1 is perfect)"
    )
    if found.before is None:
        return page.section("ood", title, page.paragraph(text + "."))
    change = f"the network before the reduction reached {found.before:.3f}"
    rows = [("AUROC", f"{found.before:.4f}", f"{found.after:.4f}", signed(found.after - found.before, 4))]
    table = page.table("Telling inputs of another kind from the test data", ("", "before", "reduced", "change"), rows)
    return page.section("ood", title, page.paragraph(f"{text}; {change}."), table)


def sizes_section(result: Result) -> str:
    """Stored values and bytes."""
    before, after = result.metrics.before, result.metrics.after
    rows = [
        (m.label, m.write(m.of(before)), m.write(m.of(after)), m.change(m.of(before), m.of(after)))
        for m in story.MEASURES
        if m.kind in ("count", "bytes") and m.of(after) is not None
    ]
    legend = _BOTH if before else _BOTH[1:]
    picture = page.figure("How large it is", figures.sizes(before, after), legend=legend)
    table = page.table("Size", ("", "before", "reduced", "change"), rows)
    text = "Removed weights are not stored: one bit a weight says whether it is left, then come the values of those. "
    text += f"The whole run took {seconds(result.metrics.seconds)}."
    return page.section("sizes", "Size and time", page.paragraph(text), page.grid([picture, table]))


def evidence_section(result: Result) -> str:
    """Histograms of delta_f, the evidence curve, the table of rounds."""
    rounds, title = result.history.rounds if result.history else (), "The evidence"
    if not rounds:
        text = page.paragraph(story.why(result)) + _diagnosis(result)
        return "" if result.gates is not None else page.section("evidence", title, text)
    pictures = _histograms(result)
    legend = [("after", "free energy (higher is better)")]
    legend += [("gone", "gain that the round predicted")] * any((r.delta_f or 0) >= 0 for r in rounds)
    legend += [("before", "loss that the round predicted")] * any((r.delta_f or 0) < 0 for r in rounds)
    caption = "The network just before each round, refitted since the last."
    pictures.append(page.figure("Evidence over the rounds", figures.evidence(rounds), caption, legend=legend))
    epochs = result.history.epochs if result.history else ()
    if epochs:
        svg = figures.kept_share(epochs, rounds)
        pictures.append(page.figure("Weights kept over the epochs", svg, "A dot is a round of removal."))
    header = ("after epoch", "removed", "kept", "predicted gain ΔF, nats", "expected NLL cost, nats per example",
              "free energy before, nats")  # fmt: skip
    rows = [
        (
            str(r.epoch),
            count(r.removed),
            percent(r.kept_share),
            "–" if r.delta_f is None else signed(r.delta_f, 1),
            "–" if r.nll_cost is None else signed(r.nll_cost, 5),
            "–" if r.free_energy is None else f"{r.free_energy:,.1f}".replace("-", "\N{MINUS SIGN}"),
        )
        for r in rounds
    ]
    table = page.details("All rounds as a table", page.table("Rounds of removal", header, rows))
    text = page.paragraph(story.why(result)) + _diagnosis(result)
    return page.section("evidence", title, text, page.grid(pictures), table)


def _histograms(result: Result) -> list[str]:
    history, settings = result.history, result.provenance.settings or Settings()
    found = [h for h in (history.histograms if history else None) or () if sum(h.delta_f)]
    ends = [("First round", "histogramfirst", found[0])] if found else []
    ends += [("Last round", "histogramlast", found[-1])] if len(found) > 1 else []
    line = settings.decision_line()
    edges = [-25 + 30 / BINS * i for i in range(BINS + 1)]
    pictures = []
    for name, key, h in ends:
        share = sum(n for i, n in enumerate(h.delta_f) if edges[i] >= line) / sum(h.delta_f)
        caption = f"{count(sum(h.delta_f))} weights; for {percent(share)} the data are better explained without."
        svg = figures.histogram(key, h.delta_f, line=line, label=f"Histogram of delta F, {name}. {caption}")
        rows = [
            ("less" if i == 0 else signed(edges[i], 1), "more" if i == BINS - 1 else signed(edges[i + 1], 1), count(n))
            for i, n in enumerate(h.delta_f)
            if n
        ]
        table = page.table(f"Weights by ΔF, {name.lower()}", ("ΔF from, nats", "to", "weights"), rows)
        legend = [("after", "needed"), ("gone", "may go"), ("mark", "where the rule decides")]
        picture = page.figure(f"{name}, after epoch {h.epoch}", svg, caption, legend=legend)
        pictures.append(f"<div>{picture}{page.details('As a table', table)}</div>")
    return pictures


def _diagnosis(result: Result) -> str:
    d = result.history.diagnosis if result.history else None
    if d is None:
        return ""
    text = (
        f"Before anything went, {percent(d.undetermined)} of the weights were undetermined (the data had told "
        f"nothing about them), the precision of the others varied by {percent(d.spread)} around its mean, and "
        f"{percent(d.removable)} of the weights had evidence for their removal. "
    )
    text += (
        "That is not enough to trust the evidence blindly; see the warning at the top."
        if d.warnings
        else "That is enough to prune from."
    )
    if d.noise_cost is not None and d.nll is not None and d.noise_cost > d.nll:
        text += (
            f" Its spread should have cost {number(d.noise_cost)} nats an example, yet the whole loss was "
            f"{number(d.nll)}: the standard deviations were still growing, and the first round's evidence is larger "
            "than a settled posterior would give. The later rounds refit before they ask again."
        )
    return page.paragraph(text)


def training(result: Result) -> str:
    """Accuracy against the share kept."""
    history, metrics, once = result.history, result.metrics, story.kind_of(result) == "one-shot"
    epochs, title = history.epochs if history else (), "The training afterwards" if once else "What it cost on the way"
    if history is None or not epochs:
        if result.gates is not None:
            return ""
        return page.section("training", title, page.paragraph("The result does not list its epochs."))
    before, after = metrics.before or Measures(), metrics.after
    classes = after.accuracy is not None
    end = (metrics.kept, after.accuracy) if after.accuracy is not None else None
    drawn = "training data" if once or result.gates is not None or metrics.draws == 1 else "training data, one draw"
    legend = [("gone", drawn)]
    if classes:
        legend += [("before", "before, test")] * (before.accuracy is not None) + [("after", "reduced, test")]
    name = "Accuracy as the network shrinks" if classes else "Loss as the network shrinks"
    picture = page.figure(name, figures.path(epochs, before.accuracy, end), legend=legend)
    header = ("epoch", "weights kept", "training loss, nats", *["training accuracy"] * classes, "removed after it")
    rows = _epoch_rows(epochs, history.rounds, classes)
    table = page.details("All epochs as a table", page.table("Every epoch", header, rows))
    if once:
        tuned = (result.provenance.settings or Settings()).epochs
        words = (
            "The weights went before these epochs, in which the survivors were trained on."
            if tuned
            else "No training followed: the row is the reduced network on the training data."
        )
        table = page.table("Every epoch", header[:-1], [row[:-1] for row in rows])
        return page.section("training", title, page.paragraph(words), table)
    share, halvings = epochs[0].kept_share, []
    for this, following in pairwise(epochs):
        if following.kept_share <= share / 2:
            halvings.append(this)
            share = following.kept_share
    rows = _epoch_rows([*halvings, epochs[-1]], history.rounds, classes)
    short = page.table("Before every halving of the network", header[:-1], [row[:-1] for row in rows])
    return page.section("training", title, page.grid([picture, short]), table)


def _epoch_rows(epochs: Sequence[EpochRecord], rounds: Sequence[RoundRecord], classes: bool) -> list[tuple[str, ...]]:
    gone = {r.epoch: r.removed for r in rounds}
    return [
        (
            str(e.epoch),
            percent(e.kept_share),
            number(e.loss),
            *[percent(e.accuracy, 2)] * classes,
            "" if (n := gone.get(e.epoch, e.removed or None)) is None else count(n),
        )
        for e in epochs
    ]


def calibration(result: Result) -> str:
    """Reliability diagrams, or coverage of intervals for regression."""
    metrics, title = result.metrics, "Does it know what it does not know?"
    found = result.analysis.reliability if result.analysis else None
    if found is None:
        return page.section("calibration", title, _coverage(result))
    text = page.paragraph(
        "Each bar gathers the test examples on which the network was about equally sure. Where the bar ends on the "
        "black mark, it is right as often as it says; a bar below its mark means too sure, above it too modest. On the "
        "dashed line, what it says is what happens."
    )
    pictures, rows = [], []
    sides = (
        ("before", "Before", found.before, metrics.before, BEFORE),
        ("after", "Reduced", found.after, metrics.after, AFTER),
    )
    for who, name, table, measures, colour in sides:
        if table is None:
            continue
        error = number(measures.ece if measures else None)
        label = f"Reliability diagram {name}, ECE {error}"
        svg = figures.reliability_diagram(f"reliability{who}", table, colour=colour, label=label)
        legend = [(who, "how often it is right"), ("mark", "what the network says")]
        pictures.append(page.figure(f"{name}: ECE {error}", svg, legend=legend))
        for i, n in enumerate(table.count):
            edges = f"{table.edges[i]:.3f} to {table.edges[i + 1]:.3f}"
            bars = (percent(table.confidence[i], 1), percent(table.accuracy[i], 1))
            rows.append((name.lower(), edges, *bars, count(n)))
    absent = page.paragraph("There is no diagram of the network before the reduction.", "quiet")
    header = ("network", "confidence bin", "mean confidence", "accuracy", "examples")
    bins = page.details("The bins as a table", page.table("Reliability", header, rows, words=2))
    return page.section("calibration", title, text, page.grid(pictures), "" if found.before else absent, bins)


def _coverage(result: Result) -> str:
    before, after = ([getattr(m, key, None) for key in _NOMINAL] for m in (result.metrics.before, result.metrics.after))
    observed = [v for v in after if v is not None]
    if len(observed) < len(_NOMINAL):
        return page.paragraph("Calibration was not measured for this result.")
    complete = [b for b in before if b is not None]
    both = complete if len(complete) == len(before) else None
    nominal = list(_NOMINAL.values())
    svg, words = figures.coverage(both, observed, nominal), "On the dashed line, intervals hold what they promise."
    legend = _BOTH if both else _BOTH[1:]
    picture = page.figure("Coverage of prediction intervals", svg, words, legend=legend)
    rows = [(percent(n), percent(b, 1), percent(a, 1)) for n, b, a in zip(nominal, before, after, strict=True)]
    table = page.table("Coverage on test data", ("promised", "observed before", "observed reduced"), rows)
    text = page.paragraph(
        "A 90 % interval should hold the true value nine times in ten: fewer means the network is too sure, more "
        "that it is too modest."
    )
    return text + page.grid([picture, table])


def source_section(result: Result) -> str:
    """The command, settings, versions."""
    made, data = result.provenance, result.provenance.dataset or DataSource(None, None, None, None)
    builder = made.network.builder if made.network else None
    facts = [
        ("method", result.metrics.method), ("date", made.date), ("random seed", made.seed),
        ("run time", None if made.seconds is None else seconds(made.seconds)), ("machine", made.machine),
        ("network", builder), ("data", data.name), ("data from", data.source),
        ("training examples", None if data.n_train is None else count(data.n_train)),
        ("test examples", None if data.n_test is None else count(data.n_test)),
        ("ockham", made.ockham), *(made.versions or {}).items(),
    ]  # fmt: skip
    tables = [page.table("The run", ("", "value"), [(k, str(v)) for k, v in facts if v is not None], words=2)]
    rows = [
        (k, "none" if v in ("", None) else str(v)) for k, v in sorted((made.settings or Settings()).named().items())
    ]
    if rows:
        tables.append(page.table("Settings", ("setting", "value"), rows, words=2))
    command = page.code(made.command) if made.command else ""
    return page.section("provenance", "How to get this again", command, page.grid(tables))


def loading(result: Result) -> str:
    """Three lines that load the network, made anew: what somebody may have put into the folder is not repeated."""
    made = result.provenance
    builder, shape = made.network.builder if made.network else None, made.dataset.inputs if made.dataset else None
    found = re.search(r"ockham\.load\('([^'\\\n]*)'", made.load)
    lines = load_lines(found[1] if found else "path/of/this/folder", builder, shape)
    words = (
        "The folder of this report holds the reduced network. Nothing in it is ever executed when it is loaded; the "
        "path is the one it was written to."
    )
    return page.section("load", "How to load this", page.paragraph(words), page.code(lines))


def glossary() -> str:
    """Words in plain English."""
    words = "".join(f"<dt>{page.escape(k)}</dt><dd>{page.escape(v)}</dd>" for k, v in story.GLOSSARY)
    return page.section("glossary", "Words", f'<dl class="words">{words}</dl>')


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
        result: content of the folder.
        more: sections and warnings of one method, such as `ockham.methods.gates.report.gate_sections`.
    """
    added = more(result)
    parts = (
        comparison(result),
        structures(result),
        *added.sections,
        layers_section(result),
        evidence_section(result),
        training(result),
        calibration(result),
        input_map_section(result),
        shift_section(result),
        ood(result),
        sizes_section(result),
        source_section(result),
        loading(result),
        glossary(),
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
