"""The collapse of the SNR rule: both curves, epoch by epoch, from the records of `bmrs.py`.

    python benchmarks/bmrs_curves.py

Writes docs/images/snr_collapse.svg and prints the same numbers as a Markdown table.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "images" / "snr_collapse.svg"
ARMS = {"published-snr": ("mean-mean KL", "#c2571a"), "snr-elbo": ("KL / N", "#2857b5")}


def records(arm: str, setting: str = "mlp-fashion") -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted((HERE / "results" / "bmrs").glob(f"{setting}.{arm}.*.json"))]


def picture() -> None:
    figure = Figure(figsize=(7.6, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm, (label, colour) in ARMS.items():
        for n, run in enumerate(records(arm)):
            at = [e["epoch"] for e in run["epochs"]]
            given = {"color": colour, "alpha": 0.8, "label": label if not n else None}
            left.plot(at, [100 * e["training_accuracy"] for e in run["epochs"]], **given)
            right.plot(at, [100 * e["parameters"] / run["parameters_before"] for e in run["epochs"]], **given)
    left.set(ylabel="training accuracy, %", xlabel="epoch", ylim=(0, 100))
    right.set(ylabel="parameters left, %", xlabel="epoch", yscale="log")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    left.legend(frameon=False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


def table() -> str:
    lines = ["| after epoch | " + " | ".join(f"{label}: accuracy / left, %" for label, _ in ARMS.values()) + " |"]
    lines.append("| --- " * (1 + len(ARMS)) + "|")
    runs = {arm: records(arm) for arm in ARMS}
    last = len(runs["published-snr"][0]["epochs"])
    for epoch in (e for e in (1, 2, 3, 4, 5, 7, 10, 15, 20, 25, 50, 60) if e <= last):
        cells = []
        for found in runs.values():
            at = [(r["epochs"][epoch - 1], r["parameters_before"]) for r in found]
            accuracy = statistics.mean(100 * e["training_accuracy"] for e, _ in at)
            cells.append(f"{accuracy:.1f} / {statistics.mean(100 * e['parameters'] / n for e, n in at):.2f}")
        lines.append(f"| {epoch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    picture()
    print(table())
