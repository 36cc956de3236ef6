"""The sections of a report about the evidence itself: the rounds, the training they happened in, the calibration."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ockham.report import figures, page, story
from ockham.report.canvas import AFTER, BEFORE
from ockham.report.folder import BINS, Results
from ockham.report.words import count, number, percent, signed

__all__ = ["calibration", "evidence", "training"]

Record = dict[str, Any]

_NOMINAL = {"coverage_50": 0.50, "coverage_90": 0.90, "coverage_95": 0.95}


def evidence(results: Results) -> str:
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
            svg = figures.reliability(
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
