"""Structured pruning by log-normal gates against the published numbers: every setting, every rule, some seeds.

    python benchmarks/bmrs.py --data PATH [--setting NAME ...] [--arm NAME ...] [--seed 0 1 2] [--epochs N] [--table]
    python benchmarks/bmrs.py --step-cost
    python benchmarks/bmrs.py --curves     # the collapse of the SNR rule, epoch by epoch: docs/images/snr_collapse.svg

A run that was interrupted goes on at its last epoch. `--validate` trains and measures without the test set (the last
10,000 training images take its place) and writes nothing but a line: that is how settings were chosen. The test set is
read once, at the end of a run.
Arms that only order (l2, mean, taylor, random) get the parameters that the arm `n` of the same seed has left.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ockham
from bmrs_networks import ViT, lenet5, load_weights, mlp, resnet50, vit_b16
from harness import DATA, SEEDS, Benchmark, Option, Record, interleaved, markdown, section, span, step, write
from ockham.methods.gates import lognormal
from ockham.methods.gates.attach import GATE_RULES
from ockham.methods.gates.noise import per_element
from ockham.methods.gates.training import (
    GateCompression,
    GateTraining,
    ParametersLeft,
    Tempered,
    by_threshold,
    mean_mean,
    true_elbo,
)
from ockham.run.job import Batches
from ockham.run.measure import mean_predictor, measures
from ockham.surgery.costs import latencies
from ockham.zoo.data import digits, load_folder
from ockham.zoo.networks import NETWORKS

SIDE = 32
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "snr_collapse.svg"
CURVES = {"published-snr": ("mean-mean KL", "#c2571a"), "snr-elbo": ("KL / N", "#2857b5")}


# ------------------------------------------------------------------ settings and data


@dataclass(frozen=True)
class Setting:
    """One row of the paper's table: network, data, how the paper trained it, what it found."""

    data: str
    build: Callable[[], nn.Module]
    batch: int
    rate: float
    epochs: int
    fine_tune: int
    published: dict[str, tuple[float, float]]
    ours: dict[str, Any]
    device: str = "cpu"


def published(*numbers: str) -> dict[str, tuple[float, float]]:
    """Parameters removed and accuracy, percent, of: none, snr, n, u8, u4."""
    rows = dict(zip(("none", "snr", "n", "u8", "u4"), numbers, strict=True))
    return {k: tuple(float(x) for x in v.split("/")) for k, v in rows.items()}  # type: ignore[misc]


# What was chosen on validation data; "temperature" weighs the KL, 1 is the ELBO.
MLP = {"batch": 128, "rate": 2e-3, "temperature": 20.0, "gate_rate": 3.0}
LENET = {"batch": 128, "rate": 3e-3, "temperature": 60.0, "gate_rate": 3.0}
# Never run to the end here (no GPU): the published rates, the ELBO, gates at a rate that reaches ln std = 3 in time.
PRETRAINED = {"batch": 64, "temperature": 1.0}
RESNET, VIT = {**PRETRAINED, "rate": 1e-4, "gate_rate": 30.0}, {**PRETRAINED, "rate": 1e-5, "gate_rate": 300.0}

SETTINGS: dict[str, Setting] = {
    "mlp-mnist": Setting(
        "mnist", lambda: mlp(7, 100, 1024), 128, 8.5e-4, 50, 10,
        published("0/97.43", "58.57/96.92", "48.86/96.95", "48.73/96.93", "54.47/96.99"), {**MLP, "temperature": 30.0},
    ),
    "mlp-fashion": Setting(
        "fashion-mnist", lambda: mlp(1, 150, 1024), 128, 1.5e-3, 50, 10,
        published("0/88.17", "99.83/10.00", "93.20/84.99", "93.02/85.01", "91.57/85.79"),
        {**MLP, "temperature": 200.0},
    ),
    "mlp-cifar10": Setting(
        "cifar10", lambda: mlp(5, 150, 3072), 32, 6.8e-4, 50, 10,
        published("0/44.94", "75.93/43.97", "76.36/43.59", "77.17/43.45", "76.63/44.06"), MLP,
    ),
    "lenet-mnist": Setting(
        "mnist", lenet5, 128, 1.4e-3, 50, 10,
        published("0/99.07", "92.66/62.70", "86.90/95.59", "86.11/95.27", "87.58/96.66"), LENET,
    ),
    "lenet-fashion": Setting(
        "fashion-mnist", lenet5, 32, 1.4e-3, 50, 10,
        published("0/89.16", "98.47/17.01", "88.02/77.90", "87.61/77.23", "88.72/81.10"),
        {**LENET, "temperature": 150.0},
    ),
    "lenet-cifar10": Setting(
        "cifar10", lambda: lenet5(3), 64, 1e-3, 50, 10,
        published("0/67.62", "70.29/67.68", "62.87/66.14", "62.54/66.28", "68.07/67.66"), LENET,
    ),
    "resnet50-cifar10": Setting(
        "cifar10", resnet50, 64, 1e-4, 50, 10,
        published("0/90.65", "91.73/89.24", "87.10/89.62", "88.18/89.29", "89.85/89.26"), RESNET, "cuda",
    ),
    "vit-cifar10": Setting(
        "cifar10", vit_b16, 64, 1e-5, 50, 10,
        published("0/94.80", "73.03/94.78", "57.74/94.60", "58.14/94.69", "67.16/94.83"), VIT, "cuda",
    ),
    "digits": Setting(
        "digits", NETWORKS["digits_mlp"], 64, 3e-3, 200, 40, {},
        {"batch": 64, "rate": 3e-3, "temperature": 1.0, "gate_rate": 5.0},
    ),
}  # fmt: skip

EVIDENCE = ("n", "n-printed", "u8", "u4", "snr")
ORDERS = ("mean", "l2", "taylor", "random")
ARMS: dict[str, str] = {
    "none": "no gates: Adam, same epochs",
    **{f"{r}-elbo": f"rule {r}, KL / N" for r in EVIDENCE},
    **{r: f"rule {r}, tempered KL" for r in EVIDENCE},
    **{r: f"order {r}, at the parameters of n" for r in ORDERS},
    "published-n": "rule n, the paper's KL weight and noise per element",
    "published-snr": "rule snr, the paper's KL weight and noise per element",
}


@functools.cache
def prepared(root: Path, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images as the paper has them: resized, (x - 127) / 255; the last dimension of size one where grey."""
    if name == "digits":
        d = digits()
        return d.train_x, d.train_y, d.test_x, d.test_y
    d = load_folder(root / name)
    low, high = torch.as_tensor(d.low), torch.as_tensor(d.high)
    pixels = [((x - low) / (high - low) * 255 - 127) / 255 for x in (d.train_x, d.test_x)]
    if pixels[0].shape[-1] != SIDE:
        grow = {"size": SIDE, "mode": "bilinear", "antialias": True}
        pixels = [torch.cat([nn.functional.interpolate(p, **grow) for p in x.split(5000)]) for x in pixels]
    return pixels[0], d.train_y, pixels[1], d.test_y


# ------------------------------------------------------------------ a run


@dataclass(frozen=True)
class Plan:
    """What a run does, beyond its setting and arm."""

    seed: int
    epochs: int
    fine_tune: int
    validate: bool
    data: Path
    overrides: dict[str, Any]
    weights: Path | None = None

    def key(self, name: str, arm: str) -> str:
        """Name of the record."""
        return f"{name}.{arm}.{self.seed}" + (".validated" if self.validate else "")


def training_of(setting: Setting, arm: str, plan: Plan) -> tuple[GateTraining, int]:
    """Settings of an arm, and its batch size."""
    shared = {"epochs": plan.epochs, "fine_tune": plan.fine_tune, "seed": plan.seed}
    if arm.startswith("published"):
        paper = GateTraining(learning_rate=setting.rate, kl_weight=mean_mean, kl_warmup=0.0, hold=1.0, **shared)
        return replace(paper, noise=per_element), setting.batch
    ours = {**setting.ours, **plan.overrides}
    temperature = 1.0 if arm.endswith("-elbo") else ours["temperature"]
    weight = true_elbo if temperature == 1.0 else Tempered(temperature)
    start = ours.get("start", 0.15)
    given = {"learning_rate": ours["rate"], "gate_rate": ours["gate_rate"], "kl_weight": weight, "start": start}
    return GateTraining(kl_warmup=ours.get("kl_warmup", 0.2), **given, **shared), int(ours["batch"])


def network(setting: Setting, seed: int) -> nn.Module:
    """The same initial weights for every arm of a seed."""
    torch.manual_seed(1000 + seed)
    return setting.build()


def recorded(name: str, arm: str, plan: Plan) -> Record:
    settings = {k: v for k, v in asdict(plan).items() if k not in ("data", "weights")}
    make = functools.partial(measured, name, arm, plan)
    return BENCH.record(plan.key(name, arm), make, keep=not plan.validate, **settings)


def measured(name: str, arm: str, plan: Plan) -> Record:
    setting = SETTINGS[name]
    x, y, test_x, test_y = prepared(plan.data, setting.data)
    if plan.validate:
        x, y, test_x, test_y = x[:-10_000], y[:-10_000], x[-10_000:], y[-10_000:]
    model = network(setting, plan.seed).to(setting.device)
    if plan.weights is not None:
        print(f"left at first values: {load_weights(model, plan.weights)}", file=sys.stderr)
    full = sum(p.numel() for p in model.parameters())
    training, batch = training_of(setting, arm, plan)
    label = plan.key(name, arm)
    if arm == "none":
        record, small = adam(model, (x, y), training, batch, label)
    else:
        budget = None
        if arm in ORDERS:
            budget = ParametersLeft(recorded(name, "n", plan)["parameters"], full)
        record, small = gated(model, (x, y), training, batch, arm=arm, budget=budget, label=label)
    before, after = latencies([network(setting, plan.seed).to(setting.device), small], test_x[:1].to(setting.device))
    found = measures(mean_predictor(small, likelihood="classification"), test_x, test_y, noise_variance=None)
    left = sum(p.numel() for p in small.parameters())
    return record | {
        "setting": name, "arm": arm, "what": ARMS[arm], "seed": plan.seed, "batch": batch,
        "training": shown(training), "parameters": left, "parameters_before": full,
        "removed": 1 - left / full, "latency_ms": 1e3 * after,
        "latency_before_ms": 1e3 * before, **found, "validated": plan.validate,
    }  # fmt: skip


def shown(training: GateTraining) -> dict[str, Any]:
    plain = {k: getattr(v, "__name__", v) for k, v in asdict(training).items()}
    weight = training.kl_weight
    return plain | {"kl_weight": getattr(weight, "__name__", str(weight))}


def adam(
    model: nn.Module, data: tuple[Tensor, Tensor], training: GateTraining, batch: int, label: str
) -> tuple[dict, nn.Module]:
    """Plain Adam for all epochs, the same schedule."""
    optimizer = torch.optim.Adam(model.parameters(), training.learning_rate, fused=True)
    total, device = training.epochs + training.fine_tune, next(model.parameters()).device
    loader, seconds = Batches(*data, batch, shuffle=True), []
    torch.manual_seed(training.seed)
    for epoch in range(total):
        start = time.process_time()
        for i, pair in enumerate(loader):
            x, y = (part.to(device) for part in pair)
            progress = (epoch + i / len(loader)) / total
            optimizer.param_groups[0]["lr"] = training.learning_rate * min(
                1.0, (1 - progress) / (1 - training.hold + 1e-9)
            )
            step(model, optimizer, x, y)
        seconds.append(time.process_time() - start)
        print(f"{label}: epoch {epoch + 1}", file=sys.stderr, flush=True)
    return {"epochs": [{"epoch": i + 1, "cpu_seconds": s} for i, s in enumerate(seconds)]}, model.eval()


def gated(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    training: GateTraining,
    batch: int,
    *,
    arm: str,
    budget: ParametersLeft | None,
    label: str,
) -> tuple[dict, nn.Module]:
    """Training with gates; after every epoch a checkpoint, from which an interrupted run goes on."""
    rule = GATE_RULES[arm.removeprefix("published-").removesuffix("-elbo")]
    example = data[0][:2].to(next(model.parameters()).device)
    job = GateCompression(
        model, example, Batches(*data, batch, shuffle=True), training=training, rule=rule,
        decide=budget or by_threshold, n_data=len(data[0]),
    )  # fmt: skip
    given = {**shown(training), "batch": batch, "examples": len(data[0]), "budget": str(budget)}
    settings, cpu = json.dumps(given, sort_keys=True, default=str), list[float]()
    saved = BENCH.saved(label)
    if saved.get("settings") == settings:
        job.load(saved["state"])
        cpu = list(saved["cpu"])
    start = time.process_time()
    for p in job:
        cpu.append(time.process_time() - start)
        print(f"{label}: {p.epoch} nll {p.loss:.4f} kl {p.kl:.0f} acc {p.accuracy:.4f} left {p.parameters} "
              f"{list(p.widths.values())} {cpu[-1]:.1f} s", file=sys.stderr, flush=True)  # fmt: skip
        BENCH.save(label, settings=settings, state=job.state(), cpu=cpu)
        start = time.process_time()
    fields = {"epoch": "epoch", "loss": "loss", "kl": "kl", "training_accuracy": "accuracy", "parameters": "parameters"}
    history = [{k: getattr(h, f) for k, f in fields.items()} | {"widths": dict(h.widths)} for h in job.history]
    epochs = [{**h, "cpu_seconds": s} for h, s in zip(history, cpu, strict=True)]
    count = papers_count(model, example, job.history[-1].widths)
    return {"epochs": epochs, "removed_by_the_papers_count": count}, job.result()


def papers_count(model: nn.Module, example: Tensor, left: Mapping[str, int]) -> float:
    """The published count: zeros in weights, columns only where sizes match, gates counted, over everything.

    Rows of removed units count, columns of the next layer only where its inputs are the units themselves; biases
    count as never removed; mean and ln std of every gate are in both sums.
    """
    groups = ockham.trace(model, example)
    share: dict[tuple[str, int], float] = {}
    gone = 0
    for group in groups:
        stays = left.get(group.id, 1)
        gone += 2 * (group.size - stays)
        for member in group.members:
            if member.index.shape[1] == 1:
                share[member.name, member.dim] = stays / group.size
    total = sum(p.numel() for p in model.parameters()) + 2 * sum(g.size for g in groups)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            gone += p.numel() * (1 - share.get((name, 0), 1.0) * share.get((name, 1), 1.0))
    return gone / total


# ------------------------------------------------------------------ table


def pages() -> dict[str, list[str]]:
    found = [(n, a, list(r.values())) for n in SETTINGS for a in ARMS if (r := BENCH.records(f"{n}.{a}.*"))]
    said = f"""{BENCH.written()}; torch {torch.__version__}.
Mean (range) over seeds; last epoch, test set read once, parameters counted on what is physically gone (the
paper's own count in brackets). Published: mean of 10 seeds, 50 + 10 epochs. `-elbo`: KL / N; without it the
KL is weighted by the temperature given, chosen on 10,000 held-out training images (`--validate`): evidence
is tempered there. CPU seconds of the whole run on one thread of a shared machine."""
    head = (
        "setting | arm | seeds | epochs | temperature | removed % | accuracy % | NLL | ECE "
        "| latency before → after, ms | CPU s | published: removed / accuracy"
    )
    return {"bmrs.md": section("# Structured pruning by log-normal gates", said, head, [cells(*f) for f in found])}


def cells(name: str, arm: str, found: list[Record]) -> list[str]:
    there = SETTINGS[name].published.get(arm.removeprefix("published-").removesuffix("-elbo"))
    weight = found[0]["training"]["kl_weight"]
    temperature = {"true_elbo": "1", "mean_mean": "mean-mean"}.get(
        weight, weight.removeprefix("Tempered(temperature=").rstrip(")")
    )
    epochs = f"{found[0]['training']['epochs']} + {found[0]['training']['fine_tune']}"
    before, after = (statistics.mean(r[k] for r in found) for k in ("latency_before_ms", "latency_ms"))
    removed = span([r["removed"] for r in found], 2, 100)
    if "removed_by_the_papers_count" in found[0]:
        removed += f" [{statistics.mean(100 * r['removed_by_the_papers_count'] for r in found):.1f}]"
    return [
        name, arm, " ".join(str(r["seed"]) for r in found), epochs,
        "–" if arm == "none" else temperature, removed, span([r["accuracy"] for r in found], 2, 100),
        span([r["nll"] for r in found], 4), span([r["ece"] for r in found], 4),
        f"{before:.2f} → {after:.2f}",
        span([sum(e["cpu_seconds"] for e in r["epochs"]) for r in found], 0),
        f"{there[0]:.2f} / {there[1]:.2f}" if there else "–",
    ]  # fmt: skip


# ------------------------------------------------------------------ the collapse of the SNR rule


def picture(setting: str = "mlp-fashion") -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm, (label, colour) in CURVES.items():
        for n, run in enumerate(BENCH.records(f"{setting}.{arm}.*").values()):
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
    figure.savefig(PICTURE, metadata={"Date": None})


def curves(setting: str = "mlp-fashion") -> list[str]:
    """The numbers of the picture."""
    runs = [list(BENCH.records(f"{setting}.{arm}.*").values()) for arm in CURVES]

    def cell(found: list[Record], epoch: int) -> str:
        at = [(r["epochs"][epoch - 1], r["parameters_before"]) for r in found]
        accuracy = statistics.mean(100 * e["training_accuracy"] for e, _ in at)
        return f"{accuracy:.1f} / {statistics.mean(100 * e['parameters'] / n for e, n in at):.2f}"

    last = len(runs[0][0]["epochs"])
    epochs = [e for e in (1, 2, 3, 4, 5, 7, 10, 15, 20, 25, 50, 60) if e <= last]
    head = ["after epoch", *(f"{label}: accuracy / left, %" for label, _ in CURVES.values())]
    return markdown(head, [[epoch, *(cell(found, epoch) for found in runs)] for epoch in epochs])


# ------------------------------------------------------------------ the cost of a step


COSTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, float]] = {
    "LeNet-5, batch 128": (lenet5, (128, 1, 32, 32), 60, 1.3),
    "ResNet-20, batch 128": (NETWORKS["resnet20"], (128, 3, 32, 32), 6, 1.3),
    "ViT dim 256 depth 6, batch 32": (ViT, (32, 3, 32, 32), 6, 1.1),
}


def steps_of(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[list[Callable[[], object]], int]:
    """A training step without gates and one with; the number of gates."""
    torch.manual_seed(0)
    x, y = torch.randn(shape), torch.randint(0, 10, (shape[0],))
    plain = build()
    wide = copy.deepcopy(plain)
    gates = ockham.attach_gates(wide, x[:2])

    optimizers = [torch.optim.Adam(m.parameters(), 1e-3, fused=True) for m in (plain, wide)]

    def gated_step() -> None:
        optimizers[1].zero_grad()
        (nn.functional.cross_entropy(wide(x), y) + gates.kl() / 50_000).backward()
        optimizers[1].step()

    return [functools.partial(step, plain, optimizers[0], x, y), gated_step], gates.noise.mean.numel()


def step_cost(repeats: float) -> Iterator[str]:
    """A training step with gates over one without, interleaved in one process; delta_f of a million gates."""
    yield "# Cost of a training step with gates"
    yield ""
    yield f"`python benchmarks/bmrs.py --step-cost`; torch {torch.__version__}, {torch.get_num_threads()} thread(s), "
    yield f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores. Medians; steps of both in turn."
    yield ""
    rows = []
    for name, (build, shape, steps, bar) in COSTS.items():
        arms, count = steps_of(build, shape)
        (w0, c0), (w1, c1) = (
            [statistics.median(t) for t in side] for side in interleaved(arms, round(steps * repeats), 3)
        )
        rows.append(f"{name} | {count} | {w0:.1f} | {w1:.1f} | {w1 / w0:.2f} | {c1 / c0:.2f} | {bar}")
    yield from markdown("network | gates | plain, ms | gated, ms | ratio, wall | ratio, processor | bar", rows)
    yield ""
    generator = torch.Generator().manual_seed(0)
    mean = 30 * torch.rand(1_000_000, generator=generator) - 25  # all parts of their range among them
    std = (13 * torch.rand(1_000_000, generator=generator) - 8).exp()
    scores = {
        "delta_f_n": functools.partial(lognormal.delta_f_n, mean, std),
        "delta_f_u, 8 bits": functools.partial(lognormal.delta_f_u, mean, std, 8),
    }
    rows = []
    for name, score in scores.items():
        (times,) = interleaved([score], round(10 * repeats), 2)
        rows.append([name, *(f"{statistics.median(t):.0f} ({min(t):.0f})" for t in times), 100])
    head = "score of 10^6 gates, float32 | wall, ms: median (least) | processor, ms: median (least) | bar"
    yield from markdown(head, rows)
    yield ""


def run(args: argparse.Namespace) -> None:
    if args.step_cost:
        text = "\n".join(line for _ in range(2) for line in step_cost(args.repeats))
        write(BENCH.results / "bmrs_step_cost.md", text + "\n")
        print(text)
        return
    if args.curves:
        picture()
        print("\n".join(curves()))
        return
    overrides = {k: float(v) for k, v in (pair.split("=") for pair in args.set)}
    for seed, name, arm in itertools.product(args.seed, args.setting, args.arm):
        s = SETTINGS[name]
        fine = s.fine_tune if args.fine_tune is None else args.fine_tune
        plan = Plan(seed, args.epochs or s.epochs, fine, args.validate, args.data, overrides, args.weights)
        recorded(name, arm, plan)


BENCH = Benchmark(
    __file__, __doc__, run, pages, data=DATA, seed=SEEDS,
    setting=Option(["digits"], choices=SETTINGS), arm=Option(["n"], choices=ARMS),
    epochs=Option(None, "with gates; default as published", kind=int),
    fine_tune=Option(None, "epochs after them; default as published", kind=int),
    set=Option([], "NAME=NUMBER: temperature, rate, batch, gate_rate, start"),
    weights=Option(None, "safetensors in the names of timm, for resnet50 and vit", kind=Path),
    validate=False, step_cost=False, curves=False, repeats=Option(1.0, "times the usual steps of --step-cost"),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
