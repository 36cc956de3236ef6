"""What the numbers of a result say, in sentences a person can read; honest where the result is not good."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ockham.report.page import count, percent, seconds, signed, size, times
from ockham.run.compression import SMALL_DATA
from ockham.run.records import DiagnosisRecord, Measures
from ockham.run.schema import Result, Settings

__all__ = [
    "GLOSSARY",
    "MEASURES",
    "Measure",
    "calls",
    "change",
    "expected_cost",
    "headline",
    "kind_of",
    "removed",
    "speeds",
    "totals",
    "units_gone",
    "verdict",
    "warnings_of",
    "why",
]

_ONCE = ("laplace", "kronecker")  # methods that remove in one shot
_SAME = 0.05  # share by which two measured times may differ and still count as equal


@dataclass(frozen=True, slots=True)
class Measure:
    """How a measure is named, written and judged.

    Attributes:
        key: name of the attribute of `ockham.run.records.Measures`.
        label: words for the table.
        kind: "share", "number", "unit" (a number in the unit of the targets), "count" or "bytes".
        goal: "up", "down", or the value that would be perfect.
    """

    key: str
    label: str
    kind: str
    goal: str | float

    def of(self, measures: Measures | None) -> float | None:
        """The value among those of a network, None where it was not measured."""
        value: float | None = getattr(measures, self.key, None)
        return value

    def write(self, value: float | None) -> str:
        """The value as text."""
        if value is None:
            return "–"
        if self.kind == "share":
            return percent(value, 2)
        if self.kind in ("count", "bytes"):
            return count(value) if self.kind == "count" else size(value)
        return f"{value:.{self._digits(value)}f}"

    def change(self, before: float | None, after: float | None) -> str:
        """What became better or worse, and by how much."""
        if before is None or after is None:
            return "–"
        if self.kind in ("count", "bytes"):
            ratio = times(before, after)
            what = "fewer" if self.kind == "count" else "smaller"
            return "–" if ratio is None else "same" if before == after else f"{ratio:,.3g} times {what}"
        points = f"{signed(100 * (after - before), 2)} points"
        text = points if self.kind == "share" else signed(after - before, self._digits(before))
        gain = self.loss(before) - self.loss(after)
        return (
            f"{'same' if text[0] == '0' else 'better' if gain > 0 else 'worse' if gain < 0 else 'as far off'} ({text})"
        )

    def _digits(self, value: float) -> int:
        """Digits after the point: four, and more of what is small only because its unit is large."""
        return 4 if self.kind != "unit" or abs(value) >= 0.1 or not value else 3 - math.floor(math.log10(abs(value)))

    def loss(self, value: float) -> float:
        """Smaller is better."""
        if isinstance(self.goal, str):
            return -value if self.goal == "up" else value
        return abs(value - self.goal)


MEASURES = (
    Measure("accuracy", "accuracy", "share", "up"),
    Measure("rmse", "root mean squared error", "unit", "down"),
    Measure("nll", "negative log likelihood (NLL), nats", "number", "down"),
    Measure("crps", "CRPS", "unit", "down"),
    Measure("ece", "calibration error (ECE)", "number", "down"),
    Measure("ece_equal_mass", "calibration error, bins of equal mass", "number", "down"),
    Measure("brier", "Brier score", "number", "down"),
    Measure("coverage_50", "observed coverage of 50 % intervals", "share", 0.50),
    Measure("coverage_90", "observed coverage of 90 % intervals", "share", 0.90),
    Measure("coverage_95", "observed coverage of 95 % intervals", "share", 0.95),
    Measure("parameters", "stored values (not zero)", "count", "down"),
    Measure("bytes", "size on disk", "bytes", "down"),
    Measure("macs", "multiply-accumulates of one example", "count", "down"),
)

GLOSSARY = (
    ("Evidence", "How probable the training data are under a network whose weights are not yet known, averaged over "
     "all weights "
     "its prior allows. It rewards fit and charges for every weight that must be set precisely: Ockham's razor, "
     "computed."),
    ("ΔF (delta_f)", "The change of the log evidence if a weight is removed. Above zero: the data are better "
     "explained without "
     "it, so it may go. Below zero: it is needed, and more so the further below."),
    ("Nat", "The unit of log evidence. 1 nat is a factor of 2.7 in probability, 5 nats one of about 150, 10 nats one "
     "of 22,000."),
    ("Free energy", "Here the lower bound on the log evidence of the whole network (the ELBO), in nats: higher is "
     "better."),
    ("Sharpened posterior", "The network is told that it saw more data than it did, so that it becomes surer of its "
     "weights. That helps where data are few, but the nats are then no odds any more: only their order counts."),
    ("Negative log likelihood (NLL)", "How surprised the network is by the true answers, on average; lower is better. "
     "It punishes confident mistakes."),
    ("Calibration, ECE", "A calibrated network that says “80 % sure” is right 8 times in 10. The expected "
     "calibration error is the "
     "average distance between what it says and how often it is right: 0 is perfect, 0.01 is one point off."),
    ("Brier score", "Mean squared distance between the predicted probabilities and the truth; lower is better."),
    ("CRPS", "For regression: the distance between the predicted distribution and the observed value, in the value's "
     "unit; lower is better."),
    ("AUROC", "How well unusual inputs are told from usual ones by the network's uncertainty: 0.5 is guessing, 1 is "
     "perfect."),
    ("Mean network", "The reduced network used once, with every weight at its most likely value, instead of averaged "
     "over draws."),
)  # fmt: skip


def kind_of(result: Result) -> str:
    """What did the work: "gates", "one-shot" or "evidence"."""
    if result.gates is not None:
        return "gates"
    return "one-shot" if result.metrics.method in _ONCE else "evidence"


def totals(result: Result) -> tuple[int | None, int | None]:
    """Weights that are kept and weights there were; None where the result does not say."""
    layers = result.analysis.layers if result.analysis else None
    if layers:
        return sum(r.kept for r in layers), sum(r.total for r in layers)
    if result.gates is not None and result.metrics.after.parameters and result.metrics.kept:
        return result.metrics.after.parameters, round(result.metrics.after.parameters / result.metrics.kept)
    return None, None


def units_gone(result: Result) -> int | None:
    """Channels, neurons and heads that went as a whole; None where only single weights were asked for."""
    if result.structure is not None:
        return sum(g.before - g.after for g in result.structure.groups)
    if result.gates is not None and result.gates.epochs:
        first, last = result.gates.epochs[0].start, result.gates.epochs[-1].widths
        return sum(n - last.get(name, n) for name, n in first.items())
    return None


def speeds(result: Result) -> list[tuple[int, float, float]]:
    """Measured time of a forward pass, (batch size, seconds before, seconds after), where both were measured."""
    part = result.structure
    before, after = (part.before, part.after) if part else (result.metrics.before, result.metrics.after)
    found = []
    for batch, name in ((1, "latency_1"), (64, "latency_64")):
        old, new = getattr(before, name, None), getattr(after, name, None)
        if old and new:
            found.append((batch, old, new))
    return found


def headline(result: Result) -> str:
    """The title: what became faster where whole units went and that was measured, else what was removed."""
    metrics = result.metrics
    network = (metrics.network or "A network").removeprefix("zoo:")
    name, units = f"{network}{f' on {metrics.dataset}' if metrics.dataset else ''}", units_gone(result)
    share = percent(1 - metrics.kept).replace(" ", "\N{NO-BREAK SPACE}")
    if not units:
        if result.gates is not None:
            return f"{name}: no structure was removed"
        return f"{name}: {f'{share} of its weights removed' if metrics.kept < 1 else 'no weight was removed'}"
    measured = speeds(result)
    if not measured:
        return f"{name}: {share} of its parameters removed, in whole units"
    _, before, after = measured[-1]
    ratio = before / after
    if ratio > 1 + _SAME:
        return f"{name}: {ratio:.3g} times faster"
    pace = "as fast as before" if ratio > 1 - _SAME else "slower than before"
    return f"{name}: {count(units)} units removed, {pace}"


def removed(result: Result) -> str:
    """What was removed, by which principle, and how small the network is now."""
    kept, total = totals(result)
    share, before, after = percent(result.metrics.kept), result.metrics.before or Measures(), result.metrics.after
    noun = "parameters" if result.gates is not None else "weights"
    text = _principle(result) + " "
    text += f"{share} of its {noun} remain." if total is None else f"{count(kept)} of its {count(total)} {noun} remain"
    text += "" if total is None else f" ({share})."
    units = units_gone(result)
    if units:
        text += f" {count(units)} whole units went"
        for batch, old, new in speeds(result)[-1:]:
            who = "one example takes" if batch == 1 else f"{batch} examples at once take"
            text += f": {who} {1e3 * new:.3g} ms instead of {1e3 * old:.3g} ms, measured on this machine"
        text += "."
    smaller = times(before.bytes, after.bytes)
    if smaller:
        ratio = f"{smaller:.3g} times smaller" if smaller >= 1 else "which is larger"
        text += f" On disk the network takes {size(after.bytes)} instead of {size(before.bytes)}: {ratio}."
    if result.metrics.kept < 1 and not units and result.gates is None:
        text += " Single weights went, so it is smaller on disk but takes as long to run as before."
    if result.metrics.seconds is not None:
        text += f" The whole run took {seconds(result.metrics.seconds)}."
    return text


def verdict(result: Result) -> str:
    """What the removal cost or gained."""
    metrics = result.metrics
    if metrics.before is None:
        return (
            "No network to compare with was measured, so this report shows how good the reduced network is, "
            "not what the reduction cost or gained."
        )
    sure = (
        "its noise"
        if metrics.before.rmse is not None
        else f"how sure it may be (its logits divided by {metrics.before_temperature or 1:.2f})"
    )
    chosen = (
        f"{metrics.before_epochs} epochs of AdamW at a learning rate of {metrics.before_rate:g}, and {sure}; all three "
        "chosen on a tenth of the training examples"
        if metrics.before_epochs and metrics.before_rate and metrics.before_temperature
        else "by Adam, as long"
    )
    known = {
        "adam": f"the same network trained the usual way ({chosen})",
        "given weights": "the network you gave, before anything was removed",
        None: "the network before the reduction",
    }
    source = known.get(metrics.before_source, f"the network before the reduction ({metrics.before_source})")
    sentences = [
        f"It is compared with {source}.",
        _accuracy(result) or _main(result, "rmse", "The typical error (RMSE)"),
    ]
    sentences.append(_main(result, "nll", "The negative log likelihood, which judges the probabilities it gives,"))
    sentences.append(_main(result, "ece", "The calibration error"))
    return " ".join(s for s in sentences if s)


def why(result: Result) -> str:
    """How the total evidence judges the removal."""
    rounds = result.history.rounds if result.history else ()
    if not rounds:
        if kind_of(result) == "one-shot":
            return "All that was removed went at once, without rounds of training between."
        return "No round of removal took place."
    gain, gone = sum(r.delta_f or 0.0 for r in rounds), sum(r.removed for r in rounds)
    text = f"In {'1 round' if len(rounds) == 1 else f'{len(rounds)} rounds'}, {count(gone)} weights went. "
    if gain >= 0:
        text += f"The evidence was predicted to rise by {gain:,.0f} nats: the data are better explained without them."
    else:
        text += (
            f"The evidence was predicted to fall by {-gain:,.0f} nats in all: more was removed than the data ask for, "
            "because a budget or a price demanded it."
        )
    return text + expected_cost(result)


def expected_cost(result: Result) -> str:
    """What the removal was expected to cost without any refitting; empty where that was not computed."""
    history = result.history
    costs = [r.nll_cost for r in history.rounds if r.nll_cost is not None] if history else []
    if not costs:
        return ""
    cost = sum(costs)
    losses = [e.loss for e in history.epochs if e.loss is not None] if history else []
    if cost > 0:
        return (
            f" Without any refitting, the negative log likelihood was expected to rise by {cost:.4f} nats per example; "
            "the refitting between rounds makes up for part of it."
        )
    if -cost > max(losses, default=0.0):
        return (
            " No second-order estimate of what the removal cost is given: it would fall below zero loss, which says "
            "that the spread of the posterior had not settled when the first weights went, and that their evidence is "
            "rather too high."
        )
    return (
        f" Without any refitting, the negative log likelihood was expected to fall by {-cost:.4f} nats per example: "
        "the weights that went had brought more noise than use."
    )


def warnings_of(result: Result) -> list[str]:
    """What a reader must know before trusting the result, in plain words; empty when there is nothing."""
    settings = result.provenance.settings or Settings()
    n_train = result.provenance.dataset.n_train if result.provenance.dataset else None
    diagnosis = result.history.diagnosis if result.history else None
    found = [] if diagnosis is None else [_in_plain_words(w, diagnosis, settings, n_train) for w in diagnosis.warnings]
    for row in (result.analysis.layers if result.analysis else None) or ():
        if not row.kept and len(row.shape) > 1:
            found.append(f"Every weight of {row.name} was removed: what passes through this layer is a constant.")
    drop, chance = _drop(result)
    if drop is not None and drop > max(chance, 0.005):
        found.append(
            f"Accuracy fell by {100 * drop:.2f} points, more than chance explains. If that is too much, train for "
            "more epochs, keep a larger share, or protect the layers that lost most."
        )
    measured = speeds(result)
    if units_gone(result) and measured and measured[-1][1] < (1 + _SAME) * measured[-1][2]:
        batch, before, after = measured[-1]
        found.append(
            f"Whole units went, but the network is not faster on this machine ({1e3 * before:.3g} ms before, "
            f"{1e3 * after:.3g} ms after, for {'one example' if batch == 1 else f'{batch} examples'}): at this size "
            "the time goes into the calls between layers, not into arithmetic. Remove more, or measure larger batches."
        )
    return found


def _in_plain_words(warning: str, diagnosis: DiagnosisRecord, settings: Settings, n_train: int | None) -> str:
    """A warning of `ockham.choose.rules.diagnose` for somebody who does not know its words; others as they are."""
    if "tempered" in warning and settings.temperature:
        t = settings.temperature
        factor = max(t, 1 / t)
        numbers = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
        whole = abs(factor - round(factor)) < 1e-6 and 2 <= round(factor) <= 12
        shown = numbers[round(factor) - 2] if whole else f"{factor:.3g}"
        few = " because the data are few" if n_train is not None and n_train < SMALL_DATA else " as the settings ask"
        verb = f"sharpened {shown} times{few}" if t < 1 else f"flattened {shown} times as the settings ask"
        return f"The posterior was {verb}: treat the nats as a ranking of the weights, not as odds."
    if "undetermined" in warning:
        return (
            f"For {percent(diagnosis.undetermined)} of the weights the data had said nothing yet when the first went: "
            "their evidence is none. Train longer before removing, or rank by a budget."
        )
    if "hardly varies" in warning:
        return (
            "The network was equally sure of all weights inside a layer, so in effect the smallest went, whatever the "
            "data say. Train longer before removing."
        )
    if "no weight has evidence" in warning:
        return "The data ask for every single weight: nothing goes unless a budget or a stronger prior forces it."
    return warning


def change(result: Result, measure: Measure, before: float | None, after: float | None) -> str:
    """What became better or worse; a difference of accuracy that chance explains is called that."""
    drop, chance = _drop(result)
    text = measure.change(before, after)
    if measure.key == "accuracy" and drop and abs(drop) <= chance:
        return f"within chance {text[text.index('(') :]}"
    return text


def calls(result: Result, measure: Measure) -> tuple[str, str]:
    """The line below a tile and its tone, e.g. ("better (+0.10 points)", "good")."""
    before, after = measure.of(result.metrics.before), measure.of(result.metrics.after)
    if before is None or after is None:
        return "nothing to compare with", ""
    text = change(result, measure, before, after)
    return text, "good" if text.startswith("better") else "bad" if text.startswith("worse") else ""


def _principle(result: Result) -> str:
    """How it was decided what goes, method by method."""
    settings, method = result.provenance.settings or Settings(), result.metrics.method
    rule = settings.rule or "evidence"
    if result.gates is not None:
        return (
            "Every channel, neuron or head was given a gate, a factor that the training may close, and a posterior "
            f"that says how sure the data are of it. Structures went by the rule “{result.gates.rule}”; the survivors "
            "form a smaller, ordinary network."
        )
    if kind_of(result) == "one-shot":
        limited, tuned = settings.limited, settings.epochs
        correlated = method == "kronecker"
        text = "One pass over the training data showed how sure the data make every weight of the network you gave"
        text += ", and which weights can stand in for each other. " if correlated else ". "
        text += (
            "What was worth least went, down to the budget you set" if limited else "What the evidence does not ask for"
        )
        text += ", at once" if limited else " went, at once"
        text += ", and the rest moved to make up for it. " if correlated else ". "
        text += f"The rest was trained for {tuned} more epochs." if tuned else "No weight was trained any further."
        return text
    if rule.lower().startswith("budget") or rule.lower() in ("magnitude", "snr", "random") or method == "map":
        return (
            f"Weights were removed by the baseline rule “{rule}”, for comparison, not because of the evidence."
            if "delta_f" not in rule
            else f"Weights were removed in the order of their evidence, down to the budget of the rule “{rule}”."
        )
    if method == "spike-slab":
        return (
            "While this network was trained, it learned for every weight how likely it is to be needed at all. Ockham "
            "kept the weights that are likelier needed than not (or a budget of them, where one was set), let them "
            "settle, and asked again."
        )
    return (
        "While this network was trained, it learned not only a value for every weight but also how sure it can be of "
        "that value. Ockham then asked of each weight whether the data give evidence that it is needed, removed those "
        "that are not, let the others settle, and asked again."
    )


def _drop(result: Result) -> tuple[float | None, float]:
    """Fall of the accuracy, and how far two tests of that size differ by chance (two standard deviations)."""
    before, after = (result.metrics.before or Measures()).accuracy, result.metrics.after.accuracy
    if before is None or after is None:
        return None, 0.0
    n = result.provenance.dataset.n_test if result.provenance.dataset else None
    variance = before * (1 - before) + after * (1 - after)
    return before - after, 2 * math.sqrt(variance / n) if n else 0.0


def _accuracy(result: Result) -> str:
    drop, chance = _drop(result)
    if drop is None or result.metrics.before is None:
        return ""
    before, after = percent(result.metrics.before.accuracy, 2), percent(result.metrics.after.accuracy, 2)
    if before == after:
        return f"Accuracy on unseen test examples stayed at {after}."
    text = f"Accuracy on unseen test examples {'fell' if drop > 0 else 'rose'} from {before} to {after} "
    text += f"({signed(-100 * drop, 2)} points)"
    n = result.provenance.dataset.n_test if result.provenance.dataset else None
    if not n:
        return text + "."
    if abs(drop) <= chance:
        return f"{text}; with {count(n)} test examples, differences up to {100 * chance:.2f} points may be chance."
    return f"{text}, more than the {100 * chance:.2f} points that chance may explain with {count(n)} test examples."


def _main(result: Result, key: str, name: str) -> str:
    measure = next(m for m in MEASURES if m.key == key)
    before, after = measure.of(result.metrics.before), measure.of(result.metrics.after)
    if before is None or after is None:
        return ""
    old, new = measure.write(before), measure.write(after)
    if old == new:
        return f"{name} stayed at {new}."
    better = measure.loss(after) < measure.loss(before)
    return f"{name} went from {old} to {new} ({'better' if better else 'worse'}; lower is better)."
