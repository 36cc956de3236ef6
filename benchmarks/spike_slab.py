"""Spike-and-slab against known truth: enumeration, calibration, S1, S2, Friedman, UCI.

    python benchmarks/spike_slab.py linear calibration                       # seconds
    python benchmarks/spike_slab.py s1 s2 friedman                           # the estimators on problems of known truth
    python benchmarks/spike_slab.py uci --data PATH/uci [--split 0 1 2 3 4]
    python benchmarks/spike_slab.py --table

The estimators run with their defaults; nothing is chosen on these replicates and splits (settings were chosen on
replicates 100 to 102 of S1 and on validation parts of the UCI training sets; docs/decisions.md).
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from harness import Benchmark, Option, Record, section, spread
from ockham.evidence.exact import exact_inclusion
from ockham.methods.spike_slab.correlated import inclusion_correlated
from ockham.methods.spike_slab.formulas import factorised_log_odds, factorised_precision, inclusion_log_odds
from ockham.tabular import SparseBNNRegressor

F64 = torch.float64
Array = NDArray[np.float64]
TRUE = 5

# ---------------------------------------------------------------- linear models: every form against enumeration


def paired(x: torch.Tensor, y: torch.Tensor, p0: float, v: float, s: float) -> torch.Tensor:
    """Fixed point of the paired mean-field posterior, coordinate by coordinate."""
    gram, b = x.T @ x / s, x.T @ y / s
    variance = 1 / (gram.diagonal() + 1 / v)
    mean, pi = torch.zeros_like(b), torch.full_like(b, 0.5)
    odds = math.log(p0 / (1 - p0))
    for _ in range(2000):
        old = pi.clone()
        for j in range(len(b)):
            mean[j] = variance[j] * (b[j] - gram[j] @ (pi * mean) + gram[j, j] * pi[j] * mean[j])
            pi[j] = torch.sigmoid(inclusion_log_odds(mean[j], variance[j], odds, v))
        if float((pi - old).abs().max()) < 1e-10:
            break
    return pi


def marginal(x: torch.Tensor, y: torch.Tensor, p0: float, v: float, s: float) -> torch.Tensor:
    """Savage-Dickey with the full covariance of the model that has every column."""
    covariance = torch.linalg.inv(x.T @ x / s + torch.eye(x.shape[1], dtype=F64) / v)
    return torch.sigmoid(
        inclusion_log_odds(covariance @ x.T @ y / s, covariance.diagonal(), math.log(p0 / (1 - p0)), v)
    )


def propagation(x: torch.Tensor, y: torch.Tensor, p0: float, v: float, s: float) -> torch.Tensor:
    """Expectation propagation."""
    return inclusion_correlated(
        x.T @ x / s, x.T @ y / s, log_odds=math.log(p0 / (1 - p0)), slab_variance=v
    ).probabilities


def factorised(x: torch.Tensor, y: torch.Tensor, p0: float, v: float, s: float, spike: float = 1e-4) -> torch.Tensor:
    """E1 with a narrow spike: the trap."""
    gram, b = x.T @ x / s, x.T @ y / s
    pi = torch.full_like(b, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(200):
            precision = gram + torch.diag(factorised_precision(pi, v, spike))
            mean, variance = torch.linalg.solve(precision, b), 1 / precision.diagonal()
            pi = torch.sigmoid(factorised_log_odds(mean, variance, math.log(p0 / (1 - p0)), v, spike))
    return pi


FORMS: dict[str, Callable[..., torch.Tensor]] = {
    "paired (E4 at its fixed point)": paired,
    "full-covariance Savage-Dickey": marginal,
    "expectation propagation": propagation,
    "factorised E1, spike 1e-4": factorised,
}


def linear(reference: Path) -> Record:
    cases = json.loads((reference / "spike_slab.json").read_text())["linear_gaussian"]
    rows = []
    for c in cases:
        x, y, exact = (torch.tensor(c[k], dtype=F64) for k in ("X", "y", "inclusion"))
        for name, form in FORMS.items():
            got = form(x, y, 0.2, 1.0, 1.0)
            error = float((got - exact).abs().max())
            rows.append({"rho": c["rho"], "form": name, "max_error": error, "correlation": _corr(got, exact)})
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(60, 12, generator=generator, dtype=F64))
    x = q * 60**0.5
    y = x @ (0.3 * torch.randn(12, generator=generator, dtype=F64)) + torch.randn(60, generator=generator, dtype=F64)
    exact = exact_inclusion(x, y, prior_inclusion=0.2, slab_variance=1.0, noise_variance=1.0).probabilities
    errors = {name: float((form(x, y, 0.2, 1.0, 1.0) - exact).abs().max()) for name, form in FORMS.items()}
    return {"reference": rows, "orthogonal_max_error": errors}


def calibration(draws: int) -> Record:
    rng = np.random.default_rng(0)
    rows = []
    for rho in (0.0, 0.5, 0.9):
        found: dict[str, list[Array]] = {name: [] for name in (*FORMS, "exact")}
        truth = []
        for _ in range(draws):
            x = rng.normal(size=(40, 8))
            for j in range(1, 8):
                x[:, j] = rho * x[:, j - 1] + math.sqrt(1 - rho**2) * x[:, j]
            z = rng.uniform(size=8) < 0.2
            y = x @ (z * rng.normal(size=8)) + rng.normal(size=40)
            design, target = torch.from_numpy(x), torch.from_numpy(y)
            for name, form in FORMS.items():
                found[name].append(form(design, target, 0.2, 1.0, 1.0).numpy())
            exact = exact_inclusion(x, y, prior_inclusion=0.2, slab_variance=1.0, noise_variance=1.0)
            found["exact"].append(exact.probabilities)
            truth.append(z)
        for name, values in found.items():
            rows.append({"rho": rho, "form": name, "ece": _ece(np.concatenate(values), np.concatenate(truth))})
    return {"draws": draws, "rows": rows}


def _corr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def _ece(p: Array, z: NDArray[np.bool_]) -> float:
    bins = np.minimum((p * 10).astype(int), 9)
    return float(sum(abs(p[bins == k].mean() - z[bins == k].mean()) * (bins == k).mean() for k in set(bins.tolist())))


# ---------------------------------------------------------------- networks on problems of known truth


def s1(seed: int, rows: int) -> tuple[Array, Array]:
    """Bai, Song & Cheng: 200 uniform inputs, five matter."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (rows, 200))
    return x, _signal(x) + rng.normal(size=rows)


def s2(seed: int, rows: int) -> tuple[Array, Array]:
    """Sun, Song & Liang: 2000 inputs of correlation one half, the same five."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(rows, 1)) + rng.normal(size=(rows, 2000))) / math.sqrt(2)
    return x, _signal(x) + rng.normal(size=rows)


def friedman(seed: int, rows: int) -> tuple[Array, Array]:
    """Friedman's first function with 95 inputs that do nothing."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(size=(rows, 100))
    f = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    return x, f + rng.normal(size=rows)


def _signal(x: Array) -> Array:
    product: Array = 7 * x[:, 1] / (1 + x[:, 0] ** 2) + 5 * np.sin(x[:, 2] * x[:, 3]) + 2 * x[:, 4]
    return product


PROBLEMS: dict[str, tuple[Callable[[int, int], tuple[Array, Array]], int, int]] = {
    "s1": (s1, 3000, 10_000),
    "s2": (s2, 10_000, 1000),
    "friedman": (friedman, 1000, 10_000),
}


def problem(name: str, seed: int) -> Record:
    make, rows, test = PROBLEMS[name]
    x, y = make(seed, rows + test)
    began, cpu = time.perf_counter(), time.process_time()
    model = SparseBNNRegressor(random_state=seed).fit(x[:rows], y[:rows])
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    chosen = set((model.inclusion_ > 0.5).nonzero()[0].tolist())
    return {
        "problem": name,
        "seed": seed,
        "rows": rows,
        "false_inputs": len(chosen - set(range(TRUE))),
        "missed_inputs": TRUE - len(chosen & set(range(TRUE))),
        "weights": model.n_weights_,
        "noise_weights": model.n_noise_weights_,
        "noise_freedom": model.noise_freedom_,
        **_scores_of(model, x[rows:], y[rows:]),
        "inclusion_of_true": model.inclusion_[:TRUE].round(4).tolist(),
        "largest_inclusion_of_others": float(model.inclusion_[TRUE:].max()),
        "evidence": model.evidence_,
        "steps": model.n_iter_,
        "seconds": {"wall": wall, "cpu": cpu},
    }


def _scores_of(model: SparseBNNRegressor, x: Array, y: Array) -> dict[str, float]:
    lower, upper = model.predict_interval(x, 0.95)
    return {
        "rmse": float(np.sqrt(np.mean((y - model.predict(x)) ** 2))),
        "nll": float(-model.log_density(x, y).mean()),
        "coverage_95": float(np.mean((lower < y) & (y < upper))),
    }


# ---------------------------------------------------------------- UCI


UCI = {
    "bostonHousing": 2.54,
    "concrete": 3.09,
    "energy": 2.7,
    "kin8nm": -1.1,
    "power-plant": 2.8,
    "wine-quality-red": 0.95,
    "yacht": 2.3,
}
"""Set to the anchor for the negative log-likelihood (the weaker end where a range is published)."""


def uci(name: str, split: int, data: Path) -> Record:
    x_train, y_train, x_test, y_test = uci_split(data, name, split)
    record: Record = {"set": name, "split": split, "rows": len(x_train)}
    for method, build in {"ockham": _ockham, "mlp": _mlp, "boosting": _boosting}.items():
        began = time.process_time()
        record[method] = build(x_train, y_train, x_test, y_test, split) | {"cpu": time.process_time() - began}
    return record


def uci_split(data: Path, name: str, split: int) -> tuple[Array, Array, Array, Array]:
    """The published split: training inputs and targets, test inputs and targets."""
    table = np.loadtxt(data / name / "data.txt")
    with np.load(data / name / "splits.npz") as parts:
        x, y = table[:, parts["index_features"]], table[:, int(parts["index_target"][0])]
        train, test = parts[f"train_{split}"], parts[f"test_{split}"]
    return x[train], y[train], x[test], y[test]


def _ockham(x: Array, y: Array, x_test: Array, y_test: Array, seed: int) -> dict[str, float]:
    model = SparseBNNRegressor(random_state=seed).fit(x, y)
    total = (64 + 16) * (x.shape[1] + 2) + 2 * (1 + x.shape[1])  # of the mean and of the noise
    kept = {"weights": model.n_weights_, "kept_share": model.n_weights_ / total, "evidence": model.evidence_}
    noise = {
        "noise_weights": model.n_noise_weights_,
        "noise_freedom": model.noise_freedom_,
        "acceptance": model.acceptance_,
    }
    return _scores_of(model, x_test, y_test) | kept | noise


def _mlp(x: Array, y: Array, x_test: Array, y_test: Array, seed: int) -> dict[str, float]:
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.neural_network import MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    network = MLPRegressor(hidden_layer_sizes=(50,), early_stopping=len(x) > 1000, max_iter=2000, random_state=seed)
    model = TransformedTargetRegressor(make_pipeline(StandardScaler(), network), transformer=StandardScaler())
    return _with_residual_noise(model, x, y, x_test, y_test, seed)


def _boosting(x: Array, y: Array, x_test: Array, y_test: Array, seed: int) -> dict[str, float]:
    from sklearn.ensemble import HistGradientBoostingRegressor

    return _with_residual_noise(HistGradientBoostingRegressor(random_state=seed), x, y, x_test, y_test, seed)


def _with_residual_noise(
    model: object, x: Array, y: Array, x_test: Array, y_test: Array, seed: int
) -> dict[str, float]:
    """A point predictor's density: Student's t fitted to its errors on a fifth held out; then it is fitted on all."""
    held = np.random.default_rng(seed).permutation(len(x)) < len(x) // 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(x[~held], y[~held])  # type: ignore[attr-defined]
        errors = y[held] - model.predict(x[held])  # type: ignore[attr-defined]
        model.fit(x, y)  # type: ignore[attr-defined]
    freedom, _, scale = stats.t.fit(errors, floc=0.0)
    test = y_test - model.predict(x_test)  # type: ignore[attr-defined]
    return {
        "rmse": float(np.sqrt(np.mean(test**2))),
        "nll": float(-stats.t.logpdf(test, freedom, scale=scale).mean()),
        "nll_gaussian": float(-stats.norm.logpdf(test, scale=np.sqrt(np.mean(errors**2))).mean()),
        "coverage_95": float(np.mean(np.abs(test) < stats.t.ppf(0.975, freedom, scale=scale))),
    }


# ---------------------------------------------------------------- pages

TITLES = {
    "s1": "S1: 200 inputs, 5 matter, n = 3000",
    "s2": "S2: 2000 correlated inputs, 5 matter, n = 10,000",
    "friedman": "Friedman: 100 inputs, 5 matter, n = 1000",
}
Found = Mapping[str, Record]


def pages() -> dict[str, list[str]]:
    found = BENCH.records()
    lines = ["# Spike-and-slab: measured", "", "Written by `python benchmarks/spike_slab.py --table`.", ""]
    for part in (_problems, _linear, _calibration, _uci, _mnist):
        lines += part(found)
    return {"spike_slab.md": lines}


def _problems(found: Found) -> list[str]:
    table = []
    for key, title in TITLES.items():
        rows = [r for name, r in found.items() if name.startswith(f"{key}.")]
        if rows:
            each = " ".join(f"{r['false_inputs']}/{r['missed_inputs']}" for r in rows)
            false, missed, rmse, weights, cover = (
                mean(r[k] for r in rows) for k in ("false_inputs", "missed_inputs", "rmse", "weights", "coverage_95")
            )
            cpu = mean(r["seconds"]["cpu"] for r in rows)
            table.append(
                f"{title} | {len(rows)} | {false:.2f} | {missed:.2f} | {each} | {rmse:.3f} | {weights:.0f} | "
                f"{cover:.3f} | {cpu:.0f}"
            )
    said = "`SparseBNNRegressor` with its defaults; mean over replicates (each: false / missed)."
    head = "problem | replicates | false inputs | missed | each | RMSE (noise 1) | weights | 95 % coverage | CPU s"
    return section("## Problems of known truth", said, head, table)


def _linear(found: Found) -> list[str]:
    if "linear" not in found:
        return []
    rows, orthogonal = found["linear"]["reference"], found["linear"]["orthogonal_max_error"]
    forms, rhos = list(dict.fromkeys(r["form"] for r in rows)), sorted({r["rho"] for r in rows})

    def cell(form: str, rho: float) -> str:
        some = [r for r in rows if r["form"] == form and r["rho"] == rho]
        return f"{max(r['max_error'] for r in some):.3f} ({min(r['correlation'] for r in some):.3f})"

    said = "Largest error of an inclusion probability (correlation with the exact ones)."
    head = ["form", *(f"rho = {r:g}" for r in rhos), "orthogonal"]
    table = [[f, *(cell(f, rho) for rho in rhos), f"{orthogonal[f]:.1e}"] for f in forms]
    return section("## Linear models against enumeration", said, head, table)


def _calibration(found: Found) -> list[str]:
    if "calibration" not in found:
        return []
    errors = {(r["form"], r["rho"]): f"{r['ece']:.3f}" for r in found["calibration"]["rows"]}
    forms, rhos = list(dict.fromkeys(form for form, _ in errors)), sorted({rho for _, rho in errors})
    said = f"10-bin ECE of inclusion, {found['calibration']['draws']} draws, n = 40, p = 8."
    head = ["form", *(f"rho = {r:g}" for r in rhos)]
    table = [[f, *(errors[f, rho] for rho in rhos)] for f in forms]
    return section("## Calibration over the prior predictive", said, head, table)


def _uci(found: Found) -> list[str]:
    methods, table = ("ockham", "mlp", "boosting"), []
    for name, anchor in UCI.items():
        if f"uci.{name}.0" not in found:
            continue
        rows = [r for key, r in found.items() if key.startswith(f"uci.{name}.")]
        cells = [spread([r[method][key] for r in rows]) for key in ("nll", "rmse") for method in methods]
        weights, share, noise, cover = (
            mean(r["ockham"][k] for r in rows) for k in ("weights", "kept_share", "noise_weights", "coverage_95")
        )
        cpu = ", ".join(f"{mean(r[m]['cpu'] for r in rows):.0f}" for m in methods)
        kept = f"{weights:.0f} ({share:.0%}), {noise:.0f}"
        table.append([name, len(rows), f"{anchor:g}", *cells, f"{cover:.3f}", kept, cpu])
    said = """Defaults, the target in its own units; mean ± standard deviation over splits. The density of the two point
predictors is a Student's t fitted to their errors on a fifth held out."""
    head = (
        "set | splits | anchor NLL | NLL: Ockham | MLP | boosting | RMSE: Ockham | MLP | boosting | 95 % coverage | "
        "weights kept, of them for the noise | CPU s: Ockham, MLP, boosting"
    )
    return section("## UCI, the given splits", said, head, table)


def _mnist(found: Found) -> list[str]:
    table = [
        f"{'-'.join(map(str, [784, *r['hidden'], 10]))} | {r['seed']} | {r['weights']} | {r['inputs']} | "
        f"{r['error']['mean_network']:.2f} | {r['error']['posterior']:.2f} | {r['cpu_seconds']:.0f}"
        for name, r in found.items()
        if name.startswith("mnist.") and "validate" not in name
    ]
    said = """`benchmarks/spike_slab_mnist.py`; settings chosen on the last 10,000 training images, test read once.
Published: 3.27 % with 883 weights, 3.82 % with 750 (input-skip LBBNN, 784-600-600-10)."""
    head = "network | seed | weights | inputs used | error %, mean network | posterior, 50 draws | CPU s"
    return section("## MNIST, few weights", said, head, table)


def run(args: argparse.Namespace) -> None:
    for what in args.what:
        if what == "linear":
            BENCH.record(what, partial(linear, args.reference))
        elif what == "calibration":
            BENCH.record(what, partial(calibration, args.draws), draws=args.draws)
        elif what == "uci":
            for split in args.split:
                for name in UCI:
                    BENCH.record(f"uci.{name}.{split}", partial(uci, name, split, args.data), set=name, split=split)
        else:
            for seed in args.seed or range(10 if what == "s1" else 3):
                BENCH.record(f"{what}.{seed}", partial(problem, what, seed), problem=what, seed=seed)


BENCH = Benchmark(
    __file__, __doc__, run, pages,
    what=Option([], "what to measure", choices=("linear", "calibration", *PROBLEMS, "uci"), word=True),
    reference=Option(Path("."), "folder of spike_slab.json, for linear"),
    data=Option(Path("."), "folder of the UCI sets"),
    seed=Option([], "replicates; default 10 of s1, 3 of the others", kind=int), split=[0, 1, 2, 3, 4], draws=2000,
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
