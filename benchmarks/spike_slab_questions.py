"""Open questions about spike-and-slab, each answered by a run of modest size: JSON and a figure in docs/images.

    python benchmarks/spike_slab_questions.py prior                            # digits; and a linear model, exactly
    python benchmarks/spike_slab_questions.py shift                            # digits under corruption
    python benchmarks/spike_slab_questions.py lstm transformer --data PATH     # PATH/text/tinyshakespeare/input.txt
    python benchmarks/spike_slab_questions.py depth --data PATH                # ResNet-110 on PATH/cifar10 at 8 x 8
    python benchmarks/spike_slab_questions.py                                 # draw again from the records

Sizes are stated in every record; none of them is a full-scale study.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

import ockham
from harness import DATA, Benchmark, Option, step
from ockham.choose.rules import BudgetRule, Rounds, score
from ockham.choose.units import chain_weights, node_inclusion
from ockham.errors import OckhamWarning
from ockham.evidence.exact import exact_inclusion as exact
from ockham.methods.spike_slab.optimizer import SpikeSlab, spike_slab
from ockham.methods.spike_slab.priors import FixedSpikeSlab, LearnedSpikeSlab, MedianRule
from ockham.run.compression import Compression, Training, mean_field, point_estimate
from ockham.run.engine import Compressed
from ockham.run.measure import mean_predictor, measures, posterior_predictor
from ockham.run.shift import corrupt, corruption_shift
from ockham.zoo.data import Batches, Dataset, digits, load_folder
from ockham.zoo.networks import CharTransformer, digits_mlp, resnet110

IMAGES = Path(__file__).parents[1] / "docs" / "images"

RATES, SLABS = (1e-4, 1e-3, 1e-2, 0.1, 0.5), (0.01, 0.1, 1.0, 10.0)
REFERENCE = (0.1, 1.0)

# ---------------------------------------------------------------- prior sensitivity


def prior(args: argparse.Namespace) -> dict:
    rows = [{"prior": [r, v], **fit_digits(FixedSpikeSlab(r, v), args.epochs)} for r in RATES for v in SLABS]
    learned = fit_digits(LearnedSpikeSlab(slab_variance=0.3), args.epochs)
    again = [fit_digits(FixedSpikeSlab(*REFERENCE), args.epochs, seed=s) for s in (1, 2)]
    at = next(r for r in rows if tuple(r["prior"]) == REFERENCE)
    for row in [*rows, learned, *again]:
        row["inputs_flipped"] = sum(a != b for a, b in zip(row["inputs"], at["inputs"], strict=True))
    return {
        "network": "digits, 64-256-128-10, T = 0.1",
        "epochs": args.epochs,
        "reference": list(REFERENCE),
        "rows": rows,
        "learned": learned,
        "other_seeds": again,
        "linear": linear(),
    }


def fit_digits(prior: FixedSpikeSlab | LearnedSpikeSlab, epochs: int, seed: int = 0) -> dict:
    result = digits_job(spike_slab, prior, epochs, seed)
    data = digits()
    found = measures(
        mean_predictor(result.model, likelihood="classification"), data.test_x, data.test_y, noise_variance=None
    )
    inputs = node_inclusion(chain_weights(result.model, result.posterior)).inputs
    said = {"weights": result.posterior.kept(), "accuracy": found["accuracy"], "nll": found["nll"]}
    print(prior, seed, said, flush=True)
    return {**said, "inputs": (inputs > 0.5).int().tolist(), "input_inclusion": inputs.round(decimals=4).tolist()}


def digits_job(estimator: Callable, prior: object, epochs: int, seed: int, data: Dataset | None = None) -> Compressed:
    data = digits() if data is None else data
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = digits_mlp()
    settings = {"temperature": 0.1, "kl_warmup": 0.15, "prior": prior, "seed": seed}
    job = Compression(
        model,
        Batches(data.train_x, data.train_y, 64, shuffle=True),
        training=Training(epochs, 3e-3, **settings),
        rounds=Rounds(0.5, 0.9, 5),
        rule=MedianRule() if estimator is spike_slab else None,
        estimator=estimator,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OckhamWarning)
        for _ in job:
            pass
    return job.result()


def linear() -> dict:
    """The same question where the answer is exact: 12 correlated columns, 60 rows, 100 tables."""
    rng = np.random.default_rng(0)
    flips = {f"{r} {v}": 0 for r in RATES for v in SLABS}
    wrong = dict(flips)
    for _ in range(100):
        x = rng.normal(size=(60, 12))
        for j in range(1, 12):
            x[:, j] = 0.5 * x[:, j - 1] + math.sqrt(0.75) * x[:, j]
        z = rng.uniform(size=12) < 0.25
        y = x @ (z * rng.normal(size=12)) + rng.normal(size=60)

        def decided(rate: float, slab: float, x: np.ndarray = x, y: np.ndarray = y) -> np.ndarray:
            return exact(x, y, prior_inclusion=rate, slab_variance=slab, noise_variance=1.0).probabilities > 0.5

        at = decided(*REFERENCE)
        for r in RATES:
            for v in SLABS:
                flips[f"{r} {v}"] += int((decided(r, v) != at).sum())
                wrong[f"{r} {v}"] += int((decided(r, v) != z).sum())
    share = {k: n / 1200 for k, n in flips.items()}
    return {
        "tables": 100,
        "columns": 12,
        "rows": 60,
        "flipped": share,
        "wrong": {k: n / 1200 for k, n in wrong.items()},
    }


def draw_prior(record: dict) -> plt.Figure:
    figure, axes = plt.subplots(1, 4, figsize=(12.5, 3.1), layout="constrained")
    grids = [np.array([[f(r, v) for v in SLABS] for r in RATES]) for f in _prior_values(record)]
    titles = (
        "digits: weights kept",
        "digits: accuracy, %",
        "digits: inputs flipped, of 64",
        "linear, exact: flipped, %",
    )
    for ax, grid, title, form in zip(axes, grids, titles, ("{:.0f}", "{:.1f}", "{:.0f}", "{:.1f}"), strict=True):
        shade = np.log(grid) if "kept" in title else np.sqrt(grid) if "flipped" in title else grid
        ax.imshow(shade, cmap="Blues", aspect="auto")
        for i, j in np.ndindex(*grid.shape):
            dark = shade[i, j] > 0.5 * (shade.min() + shade.max())
            ax.text(j, i, form.format(grid[i, j]), ha="center", va="center", color="w" if dark else "k", fontsize=8)
        ax.set(title=title, xticks=range(len(SLABS)), yticks=range(len(RATES)), xlabel="slab variance")
        ax.set_xticklabels([f"{v:g}" for v in SLABS])
        ax.set_yticklabels([f"{r:g}" for r in RATES])
    axes[0].set_ylabel("prior inclusion")
    return figure


def _prior_values(record: dict) -> list[Callable[[float, float], float]]:
    by = {tuple(r["prior"]): r for r in record["rows"]}
    return [
        lambda r, v: by[r, v]["weights"],
        lambda r, v: 100 * by[r, v]["accuracy"],
        lambda r, v: by[r, v]["inputs_flipped"],
        lambda r, v: 100 * record["linear"]["flipped"][f"{r} {v}"],
    ]


# ---------------------------------------------------------------- domain shift


def shift(args: argparse.Namespace) -> dict:
    data = digits()
    kinds = {
        "Adam, dense": (point_estimate, ockham.FixedPrior(1.0)),
        "mean field, evidence": (mean_field, ockham.FixedPrior(1.0)),
        "spike and slab": (spike_slab, FixedSpikeSlab(0.1, 1.0)),
    }
    record: dict = {"network": "digits, 64-256-128-10, 360 test images", "epochs": args.epochs, "curves": {}}
    for name, (estimator, p) in kinds.items():
        dense = estimator is point_estimate
        result = adam_digits(args.epochs) if dense else digits_job(estimator, p, args.epochs, 0)
        predict = (
            mean_predictor(result, likelihood="classification")
            if dense
            else posterior_predictor(result.model, result.posterior, likelihood="classification", draws=20)
        )
        curve = corruption_shift(predict, data.test_x, data.test_y, low=data.low, high=data.high)
        kept = 50826 if dense else result.posterior.kept()
        clean = measures(predict, data.test_x, data.test_y, noise_variance=None)
        record["curves"][name] = {"kept": kept, "clean": {k: clean[k] for k in ("accuracy", "ece")}, **curve}
        print(name, kept, clean["accuracy"], flush=True)
        if estimator is spike_slab:
            record["inclusion"] = under_corruption(data, result, args.epochs)
    return record


def adam_digits(epochs: int) -> nn.Module:
    data = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = digits_mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(epochs):
            for x, y in Batches(data.train_x, data.train_y, 64, shuffle=True):
                step(model, optimizer, x, y)
    return model.eval()


def under_corruption(data: Dataset, clean: Compressed, epochs: int) -> dict:
    """Inclusion of inputs when the training images themselves are corrupted: fitted again, same start, same seed."""
    base = node_inclusion(chain_weights(clean.model, clean.posterior)).inputs
    again = digits_job(spike_slab, FixedSpikeSlab(0.1, 1.0), epochs, 1)
    rows = {"clean, another seed": _moved(base, again)}
    for name in ("gaussian_noise", "gaussian_blur", "contrast", "rotation"):
        generator = torch.Generator().manual_seed(0)
        x = corrupt(data.train_x, name, 3, generator=generator, low=data.low, high=data.high)
        other = replace(data, train_x=x)
        rows[name] = _moved(base, digits_job(spike_slab, FixedSpikeSlab(0.1, 1.0), epochs, 0, other))
        print(name, {k: v for k, v in rows[name].items() if k != "inclusion"}, flush=True)
    return {"clean": base.tolist(), **rows}


def _moved(base: Tensor, other: Compressed) -> dict:
    now = node_inclusion(chain_weights(other.model, other.posterior)).inputs
    return {
        "flipped": int(((now > 0.5) != (base > 0.5)).sum()),
        "used": int((now > 0.5).sum()),
        "weights": other.posterior.kept(),
        "inclusion": now.tolist(),
    }


def draw_shift(record: dict) -> plt.Figure:
    names = ("gaussian_noise", "gaussian_blur", "contrast", "rotation")
    figure, axes = plt.subplots(3, 4, figsize=(11, 7.2), layout="constrained")
    for column, name in enumerate(names):
        for kind, curve in record["curves"].items():
            for row, key in enumerate(("accuracy", "ece")):
                values = [curve["clean"][key], *curve[name][key]]
                axes[row, column].plot(range(6), values, marker="o", markersize=3, label=kind)
        axes[0, column].set(title=name.replace("_", " "), ylim=(0, 1.02))
        axes[1, column].set(xlabel="severity", ylim=(0, 0.8))
        image = np.array(record["inclusion"][name]["inclusion"]).reshape(8, 8)
        axes[2, column].imshow(image, cmap="Blues", vmin=0, vmax=1)
        flipped = record["inclusion"][name]["flipped"]
        axes[2, column].set(title=f"inclusion after training on it: {flipped} flip", xticks=[], yticks=[])
        axes[2, column].title.set_fontsize(9)
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("calibration error")
    axes[0, 0].legend(fontsize=8)
    return figure


# ---------------------------------------------------------------- text


class CharLSTM(nn.Module):
    """Characters to logits of the next: embedding, one LSTM, a linear layer."""

    def __init__(self, vocabulary: int, dim: int = 128) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(vocabulary, 32), nn.LSTM(32, dim, batch_first=True)
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, symbols: Tensor) -> Tensor:
        """[N, T] to [N, vocabulary, T]."""
        return self.head(self.lstm(self.embed(symbols))[0]).transpose(1, 2)


def text(args: argparse.Namespace, build: Callable[[int], nn.Module], rate: float) -> dict:
    """One training run with a budget that shrinks by steps; bits per character are read before every step down."""
    raw = (args.data / "text" / "tinyshakespeare" / "input.txt").read_text()
    symbols = sorted(set(raw))
    codes = torch.tensor([symbols.index(c) for c in raw])
    train, valid = codes[: int(0.9 * len(codes))], codes[int(0.9 * len(codes)) :]
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = build(len(symbols))
    options = SpikeSlab(
        model.named_parameters(), n_data=len(train), lr=rate, prior=FixedSpikeSlab(0.1, 1.0),
        initial_std=5e-3, std_rate=5.0, kl_warmup=args.steps // 4, prior_interval=20, inclusion_rate=0.05,
    )  # fmt: skip
    options.propagate(model)
    budgets = {
        round(args.steps * s): k
        for s, k in zip((0.4, 0.5, 0.6, 0.7, 0.8, 0.9), (1, 0.5, 0.25, 0.12, 0.06, 0.03), strict=True)
    }
    rows = []
    for i, (x, y) in enumerate(windows(train, args.steps + 1, generator)):
        if i in budgets or i == args.steps:
            rows.append({"step": i, "weights": options.posterior().kept(), "bits": bits(model, valid)})
            print(rows[-1], flush=True)
        if i in budgets:
            posterior = options.posterior()
            median = MedianRule().decide(score(posterior))
            alive = sum(int(k.sum()) for k in median.values())
            keep = budgets[i]
            rule = MedianRule() if alive < keep * posterior.size() else BudgetRule(keep)
            options.remove(rule.decide(score(posterior)))
            rows[-1] |= {"median_model": alive, "budget": keep}
        for group in options.param_groups:
            group["lr"] = rate * min(1.0, 2 * (1 - i / args.steps) + 0.05)
        step(model, options, x, y)
    layers = {n: [int(g.keep.sum()), g.keep.numel()] for n, g in options.posterior().items()}
    torch.manual_seed(0)
    plain = build(len(symbols))
    optimizer = torch.optim.Adam(plain.parameters(), lr=rate)
    for x, y in windows(train, args.steps, torch.Generator().manual_seed(0)):
        step(plain, optimizer, x, y)
    dense = {"weights": sum(p.numel() for p in plain.parameters()), "bits": bits(plain, valid)}
    print("adam", dense, flush=True)
    return {"steps": args.steps, "batch": "32 windows of 64", "rows": rows, "layers": layers, "adam": dense}


def windows(codes: Tensor, steps: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(steps):
        at = torch.randint(len(codes) - 65, (32, 1), generator=generator) + torch.arange(65)
        yield codes[at[:, :-1]], codes[at[:, 1:]]


@torch.no_grad()
def bits(model: nn.Module, codes: Tensor) -> float:
    """Bits per character of the mean network on 25,600 characters of the held-out tenth, windows of 64."""
    at = (torch.arange(400) * 250).unsqueeze(1) + torch.arange(65)
    total = nn.functional.cross_entropy(model.eval()(codes[at[:, :-1]]), codes[at[:, 1:]])
    model.train()
    return float(total) / math.log(2)


def lstm(args: argparse.Namespace) -> dict:
    return {"network": "embedding 32, LSTM 128, linear", **text(args, CharLSTM, 4e-3)}


def transformer(args: argparse.Namespace) -> dict:
    return {"network": "CharTransformer, 64 dims, 2 blocks, 4 heads", **text(args, _small_transformer, 2e-3)}


def _small_transformer(vocabulary: int) -> nn.Module:
    return CharTransformer(vocabulary, 64, 64, 2, 4)


def draw_text(records: dict[str, dict]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    for (name, record), colour in zip(records.items(), ("#3b5b7a", "#b5482a"), strict=False):
        rows = record["rows"]
        axes.plot([r["weights"] for r in rows], [r["bits"] for r in rows], marker="o", color=colour, label=name)
        axes.plot(record["adam"]["weights"], record["adam"]["bits"], marker="*", markersize=11, color=colour, ls="")
    axes.set(xscale="log", xlabel="weights kept (star: Adam, dense, same steps)", ylabel="bits per character")
    axes.legend()
    return figure


# ---------------------------------------------------------------- depth


def depth(args: argparse.Namespace) -> dict:
    """ResNet-110, 8 x 8 images: does removal work through 109 layers, and where?"""
    data = load_folder(args.data / "cifar10")
    x, y = nn.functional.avg_pool2d(data.train_x, 4), data.train_y
    test_x, test_y = nn.functional.avg_pool2d(data.test_x[:2000], 4), data.test_y[:2000]
    torch.manual_seed(0)
    model = resnet110()
    adam = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(args.steps):
        at = torch.randint(len(x), (64,), generator=generator)
        step(model, adam, x[at], y[at])
    dense = _accuracy(model, x, test_x, test_y)
    print(f"Adam {dense:.4f}", flush=True)
    options = SpikeSlab(
        model.named_parameters(), n_data=len(x), lr=5e-4, prior=FixedSpikeSlab(0.1, 1.0), initial_inclusion=0.98,
        initial_std=1e-3, std_rate=20.0, kl_warmup=args.steps // 3, prior_interval=20, inclusion_rate=0.05,
        temperature=args.temperature,
    )  # fmt: skip
    options.propagate(model)
    generator, losses = torch.Generator().manual_seed(0), []
    for i in range(args.steps):
        at = torch.randint(len(x), (64,), generator=generator)
        losses.append(float(step(model, options, x[at], y[at])))
        if i % 20 == 0:
            print(i, losses[-1], flush=True)
    posterior = options.posterior()
    before = _accuracy(model, x, test_x, test_y)
    rows = [
        {
            "name": n,
            "expected": float(g.inclusion.sum()),
            "median": int((g.inclusion > 0.5).sum()),
            "size": g.mean.numel(),
            "median_log_ratio": float((g.precision / g.prior_precision).log().median()),
        }
        for n, g in posterior.items()
        if g.mean.ndim == 4
    ]
    options.remove(MedianRule().decide(score(posterior)))
    return {
        "network": "ResNet-110, CIFAR-10 at 8 x 8, 50,000 images, batches of 64",
        "steps": args.steps,
        "temperature": args.temperature,
        "accuracy_adam": dense,
        "losses": losses,
        "layers": rows,
        "weights": posterior.size(),
        "kept": options.posterior().kept(),
        "accuracy_before": before,
        "accuracy_median": _accuracy(model, x, test_x, test_y),
    }


@torch.no_grad()
def _accuracy(model: nn.Module, train: Tensor, x: Tensor, y: Tensor) -> float:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    for part in train[:2048].split(256):
        model(part)
    model.eval()
    found = torch.cat([model(part).argmax(1) for part in x.split(500)])
    model.train()
    return float((found == y).double().mean())


def draw_depth(record: dict) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.2), layout="constrained")
    share = [r["expected"] / r["size"] for r in record["layers"]]
    kept = [r["median"] / r["size"] for r in record["layers"]]
    axes[0].plot(share, lw=1, label="mean inclusion")
    axes[0].plot(kept, lw=1, label="median model")
    axes[0].set(xlabel="layer, from the input", ylabel="share of weights", ylim=(0, 1.02))
    axes[0].legend()
    smooth = np.convolve(record["losses"], np.ones(10) / 10, "valid")
    axes[1].plot(smooth, color="#3b5b7a")
    axes[1].set(xlabel="step", ylabel="training NLL, nats")
    return figure


# ---------------------------------------------------------------- records

QUESTIONS: dict[str, Callable[[argparse.Namespace], dict]] = {
    "prior": prior,
    "shift": shift,
    "lstm": lstm,
    "transformer": transformer,
    "depth": depth,
}


def figures() -> None:
    mpl.rcParams.update(
        {"svg.hashsalt": "ockham", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    found = BENCH.records()
    drawn = {"prior": draw_prior, "shift": draw_shift, "depth": draw_depth}
    made = {name: draw(found[name]) for name, draw in drawn.items() if name in found}
    spoken = {name: found[name] for name in ("lstm", "transformer") if name in found}
    if spoken:
        made["text"] = draw_text(spoken)
    IMAGES.mkdir(exist_ok=True)
    for name, figure in made.items():
        figure.savefig(IMAGES / f"slab_{name}.svg", metadata={"Date": None})
        plt.close(figure)


def run(args: argparse.Namespace) -> None:
    sizes = {"prior": ["epochs"], "shift": ["epochs"], "depth": ["steps", "temperature"]}
    for what in args.what:
        BENCH.record(what, partial(QUESTIONS[what], args), **{k: vars(args)[k] for k in sizes.get(what, ["steps"])})
    figures()


BENCH = Benchmark(
    __file__, __doc__, run, data=DATA, what=Option([], "questions", choices=QUESTIONS, word=True),
    epochs=40, steps=600, temperature=Option(0.05, "of the depth question"),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
