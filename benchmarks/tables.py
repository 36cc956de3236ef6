"""Tables: seconds of a fit, densities beside rivals on the UCI splits, inputs believed on simulated tables.

    python benchmarks/tables.py speed [--size 500x13 1000x18 20000x18 100000x18 500x2000]
    python benchmarks/tables.py uci --data PATH/uci [--set yacht ...] [--split 0 1 2 3 4] [--method ockham boosting ...]
    python benchmarks/tables.py inputs [--seed 0 1 ... 99] [--method ockham lasso ...]
    python benchmarks/tables.py repeats --data PATH/uci          # test rows of wine that are in its training rows, too
    python benchmarks/tables.py known                            # S1, S2 and Friedman of spike_slab.py
    python benchmarks/tables.py --table

Every run is one JSON in benchmarks/results/tables/ and is skipped when it is there. Defaults everywhere, nothing chosen
on test rows. Rivals beyond scikit-learn (catboost, ngboost, boruta) are used where they are installed. Seconds are CPU
seconds of one thread, one fit at a time; `reference` is what a fixed piece of work took just before and after, so that
seconds of a busy machine can be read.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from harness import origin
from ockham.tabular import SparseBNNRegressor
from spike_slab import PROBLEMS, TRUE, uci_split

RESULTS = Path(__file__).parent / "results" / "tables"
Array = NDArray[np.float64]
UCI = ("bostonHousing", "concrete", "energy", "kin8nm", "power-plant", "wine-quality-red", "yacht")
SIZES = ("500x13", "1000x18", "20000x18", "100000x18", "500x2000")
CORRELATIONS = (0.0, 0.5, 0.9)
TRUTHS = ("linear", "kinked", "product")


def reference() -> float:
    """Seconds of a fixed piece of work like that of a fit: small products and many small operations."""
    j, a = torch.randn(1000, 100, dtype=torch.float64), torch.randn(50, 50, dtype=torch.float64)
    best = math.inf
    for _ in range(3):
        began = time.process_time()
        for _ in range(60):
            j.T @ j
            for _ in range(40):
                (a + 1).view(-1).sum()
        best = min(best, time.process_time() - began)
    return best


# ---------------------------------------------------------------- seconds


def smooth(seed: int, rows: int, columns: int) -> tuple[Array, Array]:
    """A sine, a product, a square, a line and a kink in six of the columns; the seventh moves the noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns))
    f = np.sin(2 * x[:, 0]) + 0.7 * x[:, 1] * x[:, 2] + 0.5 * x[:, 3] ** 2 + x[:, 4] - 0.5 * np.abs(x[:, 5])
    return x, f + 0.3 * np.exp(0.3 * x[:, 6]) * rng.normal(size=rows)


def run_speed(args: argparse.Namespace) -> None:
    for size in args.size:
        rows, columns = (int(part) for part in size.split("x"))
        if _there(f"speed.{size}"):
            continue
        x, y = smooth(0, rows, columns)
        new, target = smooth(1, 10_000, columns)
        before = reference()
        began = time.process_time()
        model = SparseBNNRegressor(random_state=0).fit(x, y)
        cpu = time.process_time() - began
        began = time.process_time()
        said = model.predict(new)
        record = {
            "size": size,
            "cpu": cpu,
            "predict_cpu": time.process_time() - began,
            "reference": [before, reference()],
            "rmse": float(np.sqrt(np.mean((said - target) ** 2))),
            "nll": float(-model.log_density(new, target).mean()),
            "weights": model.n_weights_,
            "steps": model.n_iter_,
            "false_inputs": int((model.inclusion_[6:] > 0.5).sum()),
            "missed_inputs": int((model.inclusion_[:6] <= 0.5).sum()),
        }
        _write(f"speed.{size}", record)


# ---------------------------------------------------------------- densities


def run_uci(args: argparse.Namespace) -> None:
    for split in args.split:
        for name in args.set:
            for method in args.method or DENSITIES:
                if _there(f"uci.{name}.{split}.{method}") or not _installed(method):
                    continue
                x, y, x_test, y_test = uci_split(args.data, name, split)
                if method == "process" and len(x) > 2000:
                    continue
                before, began = reference(), time.process_time()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    scores = DENSITIES[method](x, y, x_test, y_test, split)
                cpu = time.process_time() - began
                record = {"set": name, "split": split, "method": method, "rows": len(x), "cpu": cpu}
                _write(f"uci.{name}.{split}.{method}", record | scores | {"reference": [before, reference()]})


def _ockham(x: Array, y: Array, x_test: Array, y_test: Array, seed: int, trees: bool = True) -> dict[str, float]:
    model = SparseBNNRegressor(random_state=seed, residual_trees=trees).fit(x, y)
    lower, upper = model.predict_interval(x_test, 0.95)

    def log_cell() -> Array:  # ln P(y - 1/2 < Y < y + 1/2) by fifteen nodes of Gauss and Legendre
        nodes, weights = np.polynomial.legendre.leggauss(15)
        return np.log(
            sum(
                0.5 * w * np.exp(model.log_density(x_test, y_test + 0.5 * t))
                for t, w in zip(nodes, weights, strict=True)
            )
        )

    return {
        "rmse": float(np.sqrt(np.mean((y_test - model.predict(x_test)) ** 2))),
        **_nll(y, model.log_density(x_test, y_test), log_cell),
        "coverage_95": float(np.mean((lower < y_test) & (y_test < upper))),
        "weights": model.n_weights_,
        "leaves": model.n_leaves_,
        "evidence": model.evidence_,
    }


def _nll(y: Array, log_density: Array, log_cell: Callable[[], Array]) -> dict[str, float]:
    """Of whole numbers the probability of each number is scored, its density only noted."""
    density = float(-log_density.mean())
    if (y != np.round(y)).any() or len(np.unique(y)) > 20:
        return {"nll": density}
    return {"nll": float(-log_cell().mean()), "nll_density": density}


def _cell(frozen: stats.rv_frozen, y: Array) -> Array:
    """Ln P(y - 1/2 < Y < y + 1/2), from the tail that is nearer."""
    low, high = y - 0.5, y + 0.5
    upper = low > frozen.median()
    part = np.where(upper, frozen.sf(low) - frozen.sf(high), frozen.cdf(high) - frozen.cdf(low))
    return np.log(np.maximum(part, 1e-300))


def _boosting(x: Array, y: Array, x_test: Array, y_test: Array, seed: int) -> dict[str, float]:
    from sklearn.ensemble import HistGradientBoostingRegressor

    return _with_residual_noise(HistGradientBoostingRegressor(random_state=seed), x, y, x_test, y_test, seed)


def _mlp(x: Array, y: Array, x_test: Array, y_test: Array, seed: int) -> dict[str, float]:
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.neural_network import MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    network = MLPRegressor(hidden_layer_sizes=(50,), early_stopping=len(x) > 1000, max_iter=2000, random_state=seed)
    model = TransformedTargetRegressor(make_pipeline(StandardScaler(), network), transformer=StandardScaler())
    return _with_residual_noise(model, x, y, x_test, y_test, seed)


def _with_residual_noise(
    model: object, x: Array, y: Array, x_test: Array, y_test: Array, seed: int
) -> dict[str, float]:
    """A point predictor's density: Student's t fitted to its errors on a fifth held out; then it is fitted on all."""
    held = np.random.default_rng(seed).permutation(len(x)) < len(x) // 5
    model.fit(x[~held], y[~held])  # type: ignore[attr-defined]
    errors = y[held] - model.predict(x[held])  # type: ignore[attr-defined]
    model.fit(x, y)  # type: ignore[attr-defined]
    freedom, _, scale = stats.t.fit(errors, floc=0.0)
    test = y_test - model.predict(x_test)  # type: ignore[attr-defined]
    return {
        "rmse": float(np.sqrt(np.mean(test**2))),
        **_nll(y, stats.t.logpdf(test, freedom, scale=scale), lambda: _cell(stats.t(freedom, scale=scale), test)),
        "coverage_95": float(np.mean(np.abs(test) < stats.t.ppf(0.975, freedom, scale=scale))),
    }


def _gaussian_scores(mean: Array, std: Array, y: Array) -> dict[str, float]:
    return {
        "rmse": float(np.sqrt(np.mean((y - mean) ** 2))),
        **_nll(y, stats.norm.logpdf(y, mean, std), lambda: _cell(stats.norm(mean, std), y)),
        "coverage_95": float(np.mean(np.abs(y - mean) < 1.96 * std)),
    }


def _catboost(x: Array, y: Array, x_test: Array, y_test: Array, seed: int) -> dict[str, float]:
    from catboost import CatBoostRegressor

    model = CatBoostRegressor(
        loss_function="RMSEWithUncertainty", random_seed=seed, verbose=False, thread_count=1, allow_writing_files=False
    )
    mean, variance = model.fit(x, y).predict(x_test).T
    return _gaussian_scores(mean, np.sqrt(variance), y_test)


def _ngboost(x: Array, y: Array, x_test: Array, y_test: Array, seed: int) -> dict[str, float]:
    from ngboost import NGBRegressor

    found = NGBRegressor(random_state=seed, verbose=False).fit(x, y).pred_dist(x_test)
    return _gaussian_scores(found.loc, found.scale, y_test)


def _process(x: Array, y: Array, x_test: Array, y_test: Array, seed: int) -> dict[str, float]:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
    from sklearn.preprocessing import StandardScaler

    scale = StandardScaler().fit(x)
    kernel = ConstantKernel(1.0) * RBF(np.ones(x.shape[1])) + WhiteKernel(0.1)
    model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed).fit(scale.transform(x), y)
    return _gaussian_scores(*model.predict(scale.transform(x_test), return_std=True), y_test)


DENSITIES: dict[str, Callable[[Array, Array, Array, Array, int], dict[str, float]]] = {
    "ockham": _ockham,
    "networks": partial(_ockham, trees=False),
    "boosting": _boosting,
    "mlp": _mlp,
    "catboost": _catboost,
    "ngboost": _ngboost,
    "process": _process,
}


def run_repeats(args: argparse.Namespace) -> None:
    """Errors on test rows whose inputs are those of a training row, and on the others."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    for split in args.split:
        name = "wine-quality-red"
        if _there(f"repeats.{name}.{split}"):
            continue
        x, y, x_test, y_test = uci_split(args.data, name, split)
        known = {row.tobytes() for row in x}
        again = np.array([row.tobytes() in known for row in x_test])
        record: dict[str, object] = {"set": name, "split": split, "repeated": float(again.mean())}
        ours, boosting = SparseBNNRegressor(random_state=split), HistGradientBoostingRegressor(random_state=split)
        for method, model in (("ockham", ours), ("boosting", boosting)):
            error = (y_test - model.fit(x, y).predict(x_test)) ** 2
            record[method] = [float(np.sqrt(error[rows].mean())) for rows in (again, ~again)]
        _write(f"repeats.{name}.{split}", record)


# ---------------------------------------------------------------- inputs


def simulated(seed: int, correlation: float, truth: str) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Twenty equally correlated columns, one to six of which matter, 200 rows, signal variance 1, noise 1/2."""
    rng = np.random.default_rng([seed, int(100 * correlation), TRUTHS.index(truth)])
    shared, own = rng.normal(size=(200, 1)), rng.normal(size=(200, 20))
    x = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    chosen = rng.permutation(20)[: rng.integers(1, 7)]
    size = rng.choice([-1.0, 1.0], len(chosen)) * rng.uniform(0.5, 1.5, len(chosen))
    columns = x[:, chosen]
    if truth == "kinked":
        columns = np.abs(columns - rng.normal(size=len(chosen)))
    elif truth == "product" and len(chosen) > 1:
        columns = columns * np.roll(columns, 1, 1)
    f = columns @ size
    used = np.zeros(20, dtype=bool)
    used[chosen] = True
    return x, (f - f.mean()) / f.std() + math.sqrt(0.5) * rng.normal(size=200), used


def run_inputs(args: argparse.Namespace) -> None:
    for seed in args.seed or range(100):
        for correlation in CORRELATIONS:
            for truth in TRUTHS:
                x, y, used = simulated(seed, correlation, truth)
                for method in args.method or SELECTORS:
                    name = f"inputs.{seed}.{correlation}.{truth}.{method}"
                    if _there(name) or not _installed(method):
                        continue
                    began = time.process_time()
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        score, chosen = SELECTORS[method](x, y, seed)
                    record = {
                        "seed": seed,
                        "correlation": correlation,
                        "truth": truth,
                        "method": method,
                        "score": [round(float(s), 5) for s in score],
                        "chosen": [int(c) for c in chosen.nonzero()[0]],
                        "used": [int(u) for u in used.nonzero()[0]],
                        "cpu": time.process_time() - began,
                    }
                    _write(name, record)


Selected = tuple[Array, NDArray[np.bool_]]


def _by_inclusion(x: Array, y: Array, seed: int) -> Selected:
    inclusion = SparseBNNRegressor(random_state=seed, n_draws=1).fit(x, y).inclusion_
    return inclusion, inclusion > 0.5


def _lasso(x: Array, y: Array, seed: int) -> Selected:
    from sklearn.linear_model import LassoCV

    weight = np.abs(LassoCV(random_state=seed).fit(x / x.std(0), y).coef_)
    return weight, weight > 0


def _permutation(x: Array, y: Array, seed: int) -> Selected:
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    held = np.random.default_rng(seed).permutation(len(x)) < len(x) // 4
    forest = RandomForestRegressor(200, random_state=seed).fit(x[~held], y[~held])
    found = permutation_importance(forest, x[held], y[held], n_repeats=20, random_state=seed)
    return found.importances_mean, found.importances_mean > 2 * found.importances_std


def _boruta(x: Array, y: Array, seed: int) -> Selected:
    from boruta import BorutaPy
    from sklearn.ensemble import RandomForestRegressor

    found = BorutaPy(RandomForestRegressor(max_depth=5, random_state=seed), n_estimators=100, random_state=seed)
    found.fit(x, y)
    return -found.ranking_.astype(float), found.support_


def _knockoffs(x: Array, y: Array, seed: int) -> Selected:
    """Model-X knockoffs, Gaussian with the sample's moments, equicorrelated; Lasso differences, q = .05 with offset 0.

    Candes, Fan, Janson & Lv (2018), *Panning for gold*.
    """
    from sklearn.linear_model import LassoCV

    rng = np.random.default_rng(seed)
    x = (x - x.mean(0)) / x.std(0)
    sigma = np.corrcoef(x.T)
    s = min(1.0, 2 * np.linalg.eigvalsh(sigma)[0]) * 0.999 * np.ones(x.shape[1])
    solved = np.linalg.solve(sigma, np.diag(s))
    root = np.linalg.cholesky(2 * np.diag(s) - np.diag(s) @ solved + 1e-9 * np.eye(len(s)))
    twin = x - x @ solved + rng.normal(size=x.shape) @ root.T
    weight = np.abs(LassoCV(random_state=seed).fit(np.column_stack([x, twin]), y).coef_)
    gap = weight[: x.shape[1]] - weight[x.shape[1] :]
    steps = sorted({abs(float(g)) for g in gap if g != 0})
    least = next((t for t in steps if (gap <= -t).sum() <= 0.05 * max(1, (gap >= t).sum())), math.inf)
    return gap, gap >= least


SELECTORS: dict[str, Callable[[Array, Array, int], Selected]] = {
    "ockham": _by_inclusion,
    "lasso": _lasso,
    "permutation": _permutation,
    "knockoffs": _knockoffs,
    "boruta": _boruta,
}


def run_known(args: argparse.Namespace) -> None:
    """S1, S2 and Friedman's function: inputs found, one replicate of each unless seeds are given."""
    for problem, (make, rows, test) in PROBLEMS.items():
        for seed in args.seed or (0,):
            if _there(f"known.{problem}.{seed}"):
                continue
            x, y = make(seed, rows + test)
            before, began = reference(), time.process_time()
            model = SparseBNNRegressor(random_state=seed).fit(x[:rows], y[:rows])
            cpu = time.process_time() - began
            chosen = set((model.inclusion_ > 0.5).nonzero()[0].tolist())
            record = {
                "problem": problem,
                "seed": seed,
                "false_inputs": len(chosen - set(range(TRUE))),
                "missed_inputs": TRUE - len(chosen & set(range(TRUE))),
                "rmse": float(np.sqrt(np.mean((y[rows:] - model.predict(x[rows:])) ** 2))),
                "weights": model.n_weights_,
                "cpu": cpu,
                "reference": [before, reference()],
            }
            _write(f"known.{problem}.{seed}", record)


# ---------------------------------------------------------------- records and tables


def _installed(method: str) -> bool:
    return method not in ("catboost", "ngboost", "boruta") or importlib.util.find_spec(method) is not None


def _there(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


def _write(name: str, record: dict) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    stamp = origin() | {"scikit-learn": version("scikit-learn")}
    (RESULTS / f"{name}.json").write_text(json.dumps(record | stamp, indent=1) + "\n")
    print(name, "done", flush=True)


def _records(kind: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{kind}.*.json"))]


def _lines(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]) + "\n"


def _speed_table() -> str:
    rows = [
        [r["size"], f"{r['cpu']:.1f}", f"{np.mean(r['reference']):.3f}", f"{r['predict_cpu']:.2f}", f"{r['nll']:.3f}",
         f"{r['rmse']:.3f}", str(r["weights"]), f"{r['false_inputs']} / {r['missed_inputs']}"]
        for r in sorted(_records("speed"), key=lambda r: [int(v) for v in r["size"].split("x")])
    ]  # fmt: skip
    header = [
        "rows x columns",
        "CPU s",
        "reference s",
        "predict 10,000",
        "NLL",
        "RMSE",
        "weights",
        "false / missed",
    ]
    return _lines(header, rows)


def _uci_table() -> str:
    found: dict[tuple[str, str], list[dict]] = {}
    for r in _records("uci"):
        found.setdefault((r["set"], r["method"]), []).append(r)
    rows = []
    for name in UCI:
        for method in DENSITIES:
            mine = found.get((name, method))
            if mine:
                spread = {k: np.array([r[k] for r in mine]) for k in ("nll", "rmse", "coverage_95", "cpu")}
                weights, leaves = (
                    f"{np.mean([r[k] for r in mine]):.0f}" if k in mine[0] else "" for k in ("weights", "leaves")
                )
                rows.append([name, method, str(len(mine)), f"{spread['nll'].mean():.3f} ± {spread['nll'].std():.3f}",
                             f"{spread['rmse'].mean():.3f} ± {spread['rmse'].std():.3f}",
                             f"{spread['coverage_95'].mean():.3f}", weights, leaves,
                             f"{spread['cpu'].mean():.1f}"])  # fmt: skip
    return _lines(["set", "method", "splits", "NLL", "RMSE", "95 % coverage", "weights", "leaves", "CPU s"], rows)


def _summary_table(kind: str) -> str:
    """Mean of one measure over the splits, sets by methods; the best of those with all of ours' splits is bold."""
    found: dict[tuple[str, str], list[dict]] = {}
    for r in _records("uci"):
        found.setdefault((r["set"], r["method"]), []).append(r)
    rows = []
    for name in UCI:
        splits = sorted(r["split"] for r in found.get((name, "ockham"), []))
        means = {}
        for method in DENSITIES:
            mine = found.get((name, method), [])
            if splits and sorted(r["split"] for r in mine) == splits:
                means[method] = float(np.mean([r[kind] for r in mine]))
        if means:
            best = min(means.values())
            cells = [f"{means[m]:.3f}" if m in means else "–" for m in DENSITIES]
            cells = [
                f"**{c}**" if m in means and means[m] == best else c for m, c in zip(DENSITIES, cells, strict=True)
            ]
            rows.append([name, str(len(splits)), *cells])
    return _lines([f"{kind.upper()}", "splits", *DENSITIES], rows)


def _inputs_table() -> str:
    """A row a correlation and method, and for all correlations together."""
    rows, every = [], _records("inputs")
    ours = {(r["seed"], r["correlation"], r["truth"]): r["score"] for r in every if r["method"] == "ockham"}
    for correlation in (*CORRELATIONS, None):
        for method in SELECTORS:
            mine = [r for r in every if r["method"] == method and correlation in (None, r["correlation"])]
            if not mine:
                continue
            truth = np.array([[j in r["used"] for j in range(20)] for r in mine]).ravel()
            chosen = np.array([[j in r["chosen"] for j in range(20)] for r in mine]).ravel()
            score = np.array([r["score"] for r in mine]).ravel()
            false = (chosen & ~truth).sum() / max(1, chosen.sum())
            error = f"{_ece(score, truth):.3f}" if method == "ockham" else ""
            same = np.array([ours[r["seed"], r["correlation"], r["truth"]] for r in mine]).ravel()
            beside = "" if method == "ockham" else f"{_power(same, truth, false):.3f}"
            rows.append(["all" if correlation is None else str(correlation), method, str(len(mine)), error,
                         f"{false:.3f}", f"{(chosen & truth).sum() / truth.sum():.3f}", beside,
                         f"{_power(score, truth):.3f}",
                         f"{np.mean([r['cpu'] for r in mine]):.1f}"])  # fmt: skip
    head = ["correlation", "method", "tables", "ECE of inclusion", "false discovery", "power", "inclusion's there"]
    return _lines([*head, "power at 5 % false", "CPU s"], rows)


def _power(score: Array, truth: NDArray[np.bool_], false: float = 0.05) -> float:
    """Most power of a threshold on the score, one for all tables, at which so much of what is named is false."""
    order = np.argsort(-score, kind="stable")
    ends = np.append(np.diff(score[order]) != 0, True)  # equal scores are named together
    right, named = truth[order].cumsum(), np.arange(1, len(order) + 1)
    good = ends & (named - right <= false * named)
    return float(right[good].max() / truth.sum()) if good.any() else 0.0


def _ece(p: Array, z: NDArray[np.bool_]) -> float:
    bins = np.minimum((p * 10).astype(int), 9)
    return float(sum(abs(p[bins == k].mean() - z[bins == k].mean()) * (bins == k).mean() for k in set(bins.tolist())))


def _known_table() -> str:
    rows = [
        [r["problem"], str(r["seed"]), f"{r['false_inputs']} / {r['missed_inputs']}", f"{r['rmse']:.3f}",
         str(r["weights"]), f"{r['cpu']:.1f}", f"{np.mean(r['reference']):.3f}"]
        for r in _records("known")
    ]  # fmt: skip
    return _lines(["problem", "seed", "false / missed", "RMSE (noise 1)", "weights", "CPU s", "reference s"], rows)


def table() -> str:
    """The Markdown page of all records that there are."""
    parts = ["# Tables: measured\n\nWritten by `python benchmarks/tables.py --table`.\n"]
    text = (
        "Defaults, one thread, one fit at a time, nothing beside it. The reference is a fixed piece of work before\n"
        "and after each fit; another idle machine took .07 s for it, so it is half as fast.\n\n"
    )
    parts.append("## Seconds of a fit\n\n" + text + _speed_table())
    parts.append("## Known truth\n\n" + _known_table())
    text = (
        "Mean ± standard deviation over splits; rows are there for what was run. ockham: defaults; networks: without\n"
        "trees for what networks leave (`residual_trees=False`).\n"
        "Settings were chosen on held-out eighths of the training rows of splits 15 to 17, which are not shown; they\n"
        "divide the same rows anew, so some of the rows chosen on are test rows here. Rivals have their defaults.\n"
        "Densities of boosting and MLP: Student's t fitted to errors on a fifth held out; CatBoost, NGBoost and the\n"
        "Gaussian process say their own, by their defaults. Other jobs ran beside these. Published NLL, not\n"
        "run here: TabResFlow concrete 2.90, energy .77, kin8nm -1.29, power 2.60, yacht .67; TabPFN (unreviewed)\n"
        "concrete 2.21, energy .15, kin8nm -1.27, power 2.28, yacht -.73. Wine's targets are whole numbers: scored is\n"
        "the probability that a method gives the number, its density integrated over half a unit to both sides.\n\n"
    )
    summary = _summary_table("nll") + "\n" + _summary_table("rmse") + "\n"
    found = _records("repeats")
    if found:
        share = np.mean([r["repeated"] for r in found])
        (a, b), (c, d) = (np.mean([r[m] for r in found], 0) for m in ("ockham", "boosting"))
        summary += (
            f"In wine {share:.0%} of the test rows have the inputs of a training row. On these boosting has RMSE\n"
            f"{c:.3f} and ours {a:.3f}; on all others {d:.3f} and {b:.3f} ({len(found)} splits). Equal rows are one\n"
            "row of more weight here, so held-out rows never repeat one that was fitted, and memory wins nothing.\n\n"
        )
    parts.append("## Densities, the given splits\n\n" + text + summary + _uci_table())
    text = (
        "n = 200, p = 20, truths linear, kinked and products together; chosen: inclusion above one half, rivals by\n"
        "their own rules; inclusion's there: the power of our inclusion on the same tables at that share of false\n"
        "names. Power at 5 % false: with the best threshold on a method's score, known in hindsight.\n\n"
    )
    parts.append("## Inputs on simulated tables\n\n" + text + _inputs_table())
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = {"speed": run_speed, "uci": run_uci, "inputs": run_inputs, "known": run_known, "repeats": run_repeats}
    parser.add_argument("what", nargs="*", help=f"of {', '.join(runs)}")
    parser.add_argument("--data", type=Path, default=Path("."), help="folder of the UCI sets")
    parser.add_argument("--size", nargs="+", default=list(SIZES))
    parser.add_argument("--set", nargs="+", default=list(UCI), choices=UCI, help="only these of the UCI sets")
    parser.add_argument("--split", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--seed", nargs="+", type=int)
    parser.add_argument("--method", nargs="+", help="only these of the methods")
    parser.add_argument("--table", action="store_true", help="write the Markdown beside the records")
    args = parser.parse_args()
    if not set(args.what) <= set(runs):
        parser.error(f"{', '.join(args.what)}: choose from {', '.join(runs)}")
    torch.set_num_threads(1)
    for what in args.what:
        runs[what](args)
    if args.table:
        (RESULTS.parent / "tables.md").write_text(table())


if __name__ == "__main__":
    main()
