"""What the numbers of a result say, in sentences a person can read; honest where the result is not good."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ockham.report.folder import Results
from ockham.report.page import count, percent, seconds, signed, size, times

__all__ = [
    "GLOSSARY",
    "MEASURES",
    "Measure",
    "calls",
    "change",
    "headline",
    "removed",
    "totals",
    "verdict",
    "warnings_of",
    "why",
]

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Measure:
    """How a measure is named, written and judged.

    Attributes:
        key: in ``metrics.json``.
        label: for the table.
        kind: "share", "number", "count" or "bytes".
        goal: "up", "down", or the value that would be perfect.
    """

    key: str
    label: str
    kind: str
    goal: str | float

    def write(self, value: float | None) -> str:
        """The value as text."""
        if value is None:
            return "–"
        if self.kind == "share":
            return percent(value, 2)
        return count(value) if self.kind == "count" else size(value) if self.kind == "bytes" else f"{value:.4f}"

    def change(self, before: float | None, after: float | None) -> str:
        """What became better or worse, and by how much."""
        if before is None or after is None:
            return "–"
        if self.kind in ("count", "bytes"):
            ratio = times(before, after)
            return (
                "–"
                if ratio is None
                else f"{ratio:,.3g} times fewer"
                if self.kind == "count"
                else f"{ratio:,.3g} times smaller"
            )
        text = f"{signed(100 * (after - before), 2)} points" if self.kind == "share" else signed(after - before, 4)
        gain = self.loss(before) - self.loss(after)
        return (
            f"{'same' if text[0] == '0' else 'better' if gain > 0 else 'worse' if gain < 0 else 'as far off'} ({text})"
        )

    def loss(self, value: float) -> float:
        """Smaller is better."""
        if isinstance(self.goal, str):
            return -value if self.goal == "up" else value
        return abs(value - self.goal)


MEASURES = (
    Measure("accuracy", "accuracy", "share", "up"),
    Measure("rmse", "root mean squared error", "number", "down"),
    Measure("nll", "negative log likelihood (NLL), nats", "number", "down"),
    Measure("crps", "CRPS", "number", "down"),
    Measure("ece", "calibration error (ECE)", "number", "down"),
    Measure("ece_equal_mass", "calibration error, bins of equal mass", "number", "down"),
    Measure("brier", "Brier score", "number", "down"),
    Measure("coverage_50", "observed coverage of 50 % intervals", "share", 0.50),
    Measure("coverage_90", "observed coverage of 90 % intervals", "share", 0.90),
    Measure("coverage_95", "observed coverage of 95 % intervals", "share", 0.95),
    Measure("parameters", "stored values (not zero)", "count", "down"),
    Measure("bytes", "size on disk", "bytes", "down"),
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


def totals(results: Results) -> tuple[int | None, int | None]:
    """Weights that are kept and weights there were; None where the result does not say."""
    layers = results.analysis["layers"]
    if not layers:
        return None, None
    return sum(r["kept"] for r in layers), sum(r["total"] for r in layers)


def headline(results: Results) -> str:
    """The title: what was removed from what."""
    network = (results.metrics["network"] or "A network").removeprefix("zoo:")
    on = f" on {results.metrics['dataset']}" if results.metrics["dataset"] else ""
    gone = percent(1 - results.metrics["kept"]).replace(" ", "\N{NO-BREAK SPACE}")
    return f"{network}{on}: " + (
        f"{gone} of its weights removed" if results.metrics["kept"] < 1 else "no weight was removed"
    )


def removed(results: Results) -> str:
    """What was removed, by which principle, and how small the network is now."""
    kept, total = totals(results)
    left = (
        f"{count(kept)} of its {count(total)} weights"
        if total is not None
        else f"{percent(results.metrics['kept'])} of its weights"
    )
    text = f"{_principle(results)} {left} remain"
    text += f" ({percent(results.metrics['kept'])})." if total is not None else "."
    before, after = results.metrics["before"] or {}, results.metrics["after"]
    smaller = times(before.get("bytes"), after.get("bytes"))
    if smaller:
        ratio = f"{smaller:.3g} times smaller" if smaller >= 1 else "which is larger"
        text += (
            f" On disk the network takes {size(after.get('bytes'))} instead of {size(before.get('bytes'))}: {ratio}."
        )
    if results.metrics["seconds"] is not None:
        text += f" The whole run took {seconds(results.metrics['seconds'])}."
    return text


def verdict(results: Results) -> str:
    """What the removal cost or gained."""
    metrics = results.metrics
    if metrics["before"] is None:
        return (
            "No network to compare with was measured, so this report shows how good the reduced network is, "
            "not what the reduction cost or gained."
        )
    sentences = [f"It is compared with {_source(metrics['before_source'])}."]
    sentences.append(_accuracy(results) or _main(metrics, "rmse", "The root mean squared error"))
    sentences.append(_main(metrics, "nll", "The negative log likelihood, which judges the probabilities it gives,"))
    sentences.append(_main(metrics, "ece", "The calibration error"))
    return " ".join(s for s in sentences if s)


def why(results: Results) -> str:
    """How the total evidence judges the removal."""
    rounds = results.history["rounds"]
    if not rounds:
        if (results.result["settings"] or {}).get("one_shot"):
            return "All that was removed went at once, without rounds of training between."
        return "No round of removal took place."
    gain, gone = sum(r["delta_f"] for r in rounds), sum(r["removed"] for r in rounds)
    rounds_ = "1 round" if len(rounds) == 1 else f"{len(rounds)} rounds"
    text = f"In {rounds_}, {count(gone)} weights went. "
    if gain >= 0:
        text += f"The evidence was predicted to rise by {gain:,.0f} nats: the data are better explained without them."
    else:
        text += (
            f"The evidence was predicted to fall by {-gain:,.0f} nats in all: more was removed than the data ask for, "
            "because a budget or a price demanded it."
        )
    costs = [r["nll_cost"] for r in rounds if r["nll_cost"] is not None]
    return text + (_expected(sum(costs), _first_loss(results)) if costs else "")


def _first_loss(results: Results) -> float:
    losses = [e["loss"] for e in results.history["epochs"]]
    return max(losses, default=0.0)


def _expected(cost: float, loss: float) -> str:
    if cost > 0:
        return (
            f" Without any refitting, the negative log likelihood was expected to rise by {cost:.4f} nats per example; "
            "the refitting between rounds makes up for part of it."
        )
    if -cost > loss:
        return (
            " No second-order estimate of what the removal cost is given: it would fall below zero loss, which says "
            "that the spread of the posterior had not settled when the first weights went, and that their evidence is "
            "rather too high."
        )
    return (
        f" Without any refitting, the negative log likelihood was expected to fall by {-cost:.4f} nats per example: "
        "the weights that went had brought more noise than use."
    )


def warnings_of(results: Results) -> list[str]:
    """What a reader must know before trusting the result; empty when there is nothing."""
    found = list((results.history["diagnosis"] or {}).get("warnings", ()))
    for row in results.analysis["layers"] or ():
        if not row["kept"] and len(row["shape"]) > 1:
            found.append(f"Every weight of {row['name']} was removed: what passes through this layer is a constant.")
    drop, chance = _drop(results)
    if drop is not None and drop > max(chance, 0.005):
        found.append(
            f"Accuracy fell by {100 * drop:.2f} points, more than chance explains. If that is too much, train for "
            f"more epochs, "
            "keep a larger share, or protect the layers that lost most."
        )
    return found


def change(results: Results, measure: Measure, before: float | None, after: float | None) -> str:
    """What became better or worse; a difference of accuracy that chance explains is called that."""
    drop, chance = _drop(results)
    text = measure.change(before, after)
    if measure.key == "accuracy" and drop and abs(drop) <= chance:
        return f"within chance {text[text.index('(') :]}"
    return text


def calls(results: Results, measure: Measure) -> tuple[str, str]:
    """The line below a tile and its tone, e.g. ("better (+0.10 points)", "good")."""
    before, after = (results.metrics["before"] or {}).get(measure.key), results.metrics["after"].get(measure.key)
    if before is None or after is None:
        return "nothing to compare with", ""
    text = change(results, measure, before, after)
    return text, "good" if text.startswith("better") else "bad" if text.startswith("worse") else ""


def _principle(results: Results) -> str:
    settings = results.result["settings"] or {}
    if settings.get("one_shot"):
        return _at_once(settings)
    rule = str(settings.get("rule") or "evidence")
    if rule.lower().startswith("budget") or rule.lower() in ("magnitude", "snr", "random"):
        return f"Weights were removed by the baseline rule “{rule}”, for comparison, not because of the evidence."
    return (
        "While this network was trained, it learned not only a value for every weight but also how sure it can be of "
        "that value. Ockham then asked of each weight whether the data give evidence that it is needed, removed those "
        "that are not, let the others settle, and asked again."
    )


def _at_once(settings: Mapping[str, Any]) -> str:
    limited = settings.get("keep") is not None or settings.get("macs") is not None
    tuned = settings.get("epochs")
    text = "One pass over the training data showed how sure the data make every weight of the network you gave"
    text += ", and which weights can stand in for each other. " if settings["one_shot"] == "kronecker" else ". "
    text += "What was worth least went, down to the budget you set" if limited else "What the evidence does not ask for"
    text += ", at once" if limited else " went, at once"
    text += ", and the rest moved to make up for it. " if settings["one_shot"] == "kronecker" else ". "
    return text + (f"The rest was trained for {tuned} more epochs." if tuned else "No weight was trained any further.")


def _source(source: str | None) -> str:
    known = {
        "adam": "the same network trained the usual way (by Adam, as long)",
        "given weights": "the network you gave, before anything was removed",
        None: "the network before the reduction",
    }
    return known.get(source, f"the network before the reduction ({source})")


def _drop(results: Results) -> tuple[float | None, float]:
    before = (results.metrics["before"] or {}).get("accuracy")
    after = results.metrics["after"].get("accuracy")
    if before is None or after is None:
        return None, 0.0
    n = (results.result["dataset"] or {}).get("n_test")
    variance = before * (1 - before) + after * (1 - after)
    return before - after, 2 * math.sqrt(variance / n) if n else 0.0


def _accuracy(results: Results) -> str:
    drop, chance = _drop(results)
    if drop is None:
        return ""
    before, after = percent(results.metrics["before"]["accuracy"], 2), percent(results.metrics["after"]["accuracy"], 2)
    if before == after:
        return f"Accuracy on unseen test examples stayed at {after}."
    text = f"Accuracy on unseen test examples {'fell' if drop > 0 else 'rose'} from {before} to {after} "
    text += f"({signed(-100 * drop, 2)} points)"
    n = (results.result["dataset"] or {}).get("n_test")
    if not n:
        return text + "."
    if abs(drop) <= chance:
        return f"{text}; with {count(n)} test examples, differences up to {100 * chance:.2f} points may be chance."
    return f"{text}, more than the {100 * chance:.2f} points that chance may explain with {count(n)} test examples."


def _main(metrics: Record, key: str, name: str) -> str:
    before, after = metrics["before"].get(key), metrics["after"].get(key)
    if before is None or after is None:
        return ""
    measure = next(m for m in MEASURES if m.key == key)
    old, new = measure.write(before), measure.write(after)
    if old == new:
        return f"{name} stayed at {new}."
    better = measure.loss(after) < measure.loss(before)
    return f"{name} went from {old} to {new} ({'better' if better else 'worse'}; lower is better)."
