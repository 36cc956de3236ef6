"""The Markdown table of `spike_slab.py --table`, from the records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev

__all__ = ["table"]

_PROBLEMS = {
    "s1": "S1: 200 inputs, 5 matter, n = 3000",
    "s2": "S2: 2000 correlated inputs, 5 matter, n = 10,000",
    "friedman": "Friedman: 100 inputs, 5 matter, n = 1000",
}


def table(results: Path, anchors: Mapping[str, float]) -> str:
    """All records as one page."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted(results.glob("*.json"))}
    parts = [_problems(found), _linear(found), _calibration(found), _uci(found, anchors), _mnist(found)]
    head = ["# Spike-and-slab: measured", "", "Written by `python benchmarks/spike_slab.py --table`.", ""]
    return "\n".join([*head, *(line for part in parts if part for line in [*part, ""])])


def _problems(found: Mapping[str, dict]) -> list[str]:
    lines = [
        "## Problems of known truth",
        "",
        "`SparseBNNRegressor` as it was fitted before second-order steps (today's: Tables); "
        "mean over replicates (each: false / missed).",
        "",
        "| problem | replicates | false inputs | missed | each | RMSE (noise 1) | weights | 95 % coverage | CPU s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, title in _PROBLEMS.items():
        rows = [r for name, r in found.items() if name.startswith(f"{key}.")]
        if rows:
            each = " ".join(f"{r['false_inputs']}/{r['missed_inputs']}" for r in rows)
            numbers = [mean(r[k] for r in rows) for k in ("rmse", "weights", "coverage_95")]
            wrong = [mean(r[k] for r in rows) for k in ("false_inputs", "missed_inputs")]
            cpu = mean(r["seconds"]["cpu"] for r in rows)
            lines.append(
                f"| {title} | {len(rows)} | {wrong[0]:.2f} | {wrong[1]:.2f} | {each} | {numbers[0]:.3f} | "
                f"{numbers[1]:.0f} | {numbers[2]:.3f} | {cpu:.0f} |"
            )
    return lines if len(lines) > 6 else []


def _linear(found: Mapping[str, dict]) -> list[str]:
    if "linear" not in found:
        return []
    rows = found["linear"]["reference"]
    forms, rhos = list(dict.fromkeys(r["form"] for r in rows)), sorted({r["rho"] for r in rows})
    lines = [
        "## Linear models against enumeration",
        "",
        "Largest error of an inclusion probability (correlation with the exact ones).",
        "",
        "| form | " + " | ".join(f"rho = {r:g}" for r in rhos) + " | orthogonal |",
        "| --- |" + " --- |" * (len(rhos) + 1),
    ]
    for form in forms:
        cells = []
        for rho in rhos:
            some = [r for r in rows if r["form"] == form and r["rho"] == rho]
            cells.append(f"{max(r['max_error'] for r in some):.3f} ({min(r['correlation'] for r in some):.3f})")
        lines.append(f"| {form} | {' | '.join(cells)} | {found['linear']['orthogonal_max_error'][form]:.1e} |")
    return lines


def _calibration(found: Mapping[str, dict]) -> list[str]:
    if "calibration" not in found:
        return []
    rows = found["calibration"]["rows"]
    rhos = sorted({r["rho"] for r in rows})
    lines = [
        "## Calibration over the prior predictive",
        "",
        f"10-bin ECE of inclusion, {found['calibration']['draws']} draws, n = 40, p = 8.",
        "",
        "| form | " + " | ".join(f"rho = {r:g}" for r in rhos) + " |",
        "| --- |" + " --- |" * len(rhos),
    ]
    for form in dict.fromkeys(r["form"] for r in rows):
        cells = [f"{next(r['ece'] for r in rows if r['form'] == form and r['rho'] == rho):.3f}" for rho in rhos]
        lines.append(f"| {form} | {' | '.join(cells)} |")
    return lines


def _uci(found: Mapping[str, dict], anchors: Mapping[str, float]) -> list[str]:
    sets = [name for name in anchors if f"uci.{name}.0" in found]
    if not sets:
        return []
    lines = [
        "## UCI, the given splits",
        "",
        "The fit before second-order steps (today's: Tables). "
        "Defaults, the target in its own units; mean ± standard deviation over splits. The density of the two point",
        "predictors is a Student's t fitted to their errors on a fifth held out.",
        "",
        "| set | splits | anchor NLL | NLL: Ockham | MLP | boosting | RMSE: Ockham | MLP | boosting | 95 % "
        "coverage | weights kept, of them for the noise | CPU s: Ockham, MLP, boosting |",
        "| --- |" + " --- |" * 11,
    ]
    for name in sets:
        rows = [r for key, r in found.items() if key.startswith(f"uci.{name}.")]
        cells = [
            _spread([r[method][key] for r in rows])
            for key in ("nll", "rmse")
            for method in ("ockham", "mlp", "boosting")
        ]
        ours = {key: mean(r["ockham"][key] for r in rows) for key in ("weights", "kept_share", "noise_weights")}
        kept = f"{ours['weights']:.0f} ({ours['kept_share']:.0%}), {ours['noise_weights']:.0f}"
        cover = f"{mean(r['ockham']['coverage_95'] for r in rows):.3f}"
        cpu = ", ".join(f"{mean(r[m]['cpu'] for r in rows):.0f}" for m in ("ockham", "mlp", "boosting"))
        lines.append(f"| {name} | {len(rows)} | {anchors[name]:g} | {' | '.join(cells)} | {cover} | {kept} | {cpu} |")
    return lines


def _mnist(found: Mapping[str, dict]) -> list[str]:
    rows = [r for name, r in found.items() if name.startswith("mnist.") and "validate" not in name]
    if not rows:
        return []
    lines = [
        "## MNIST, few weights",
        "",
        "`benchmarks/spike_slab_mnist.py`; settings chosen on the last 10,000 training images, test read once.",
        "Published: 3.27 % with 883 weights, 3.82 % with 750 (input-skip LBBNN, 784-600-600-10).",
        "",
        "| network | seed | weights | inputs used | error %, mean network | posterior, 50 draws | CPU s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        net = "-".join(map(str, [784, *r["hidden"], 10]))
        e = r["error"]
        errors = f"{e['mean_network']:.2f} | {e['posterior']:.2f}"
        lines.append(f"| {net} | {r['seed']} | {r['weights']} | {r['inputs']} | {errors} | {r['cpu_seconds']:.0f} |")
    return lines


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"
