"""Structures by evidence: prices compared, LeNets against the bars, continuous shrinking, latency, tracing.

    python benchmarks/structures.py --data PATH prices lenet5 lenet300 shrinking latency tracing [--seed 0 1 2]
    python benchmarks/structures.py --table

An interrupted run goes on at its last epoch. Settings were chosen on the last 10,000 training images (`prices`); the
test set is read once, at the end of `lenet5`, `lenet300` and `shrinking`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import ockham
from harness import DATA, SEEDS, Benchmark, Option, Record, markdown, step
from ockham.choose.units import all_masks
from ockham.run.compression import structures_name
from ockham.surgery.costs import cost, latencies
from ockham.surgery.exporting import sparse_linear
from ockham.zoo.data import Batches, load_folder
from ockham.zoo.networks import NETWORKS

FIXED, SCALE, HORSESHOE = ockham.FixedPrior(0.3), ockham.GroupScale(0.3), ockham.GroupHorseshoe(0.5)
AUTO = ockham.Structures()
MAC = ockham.Structures(price=ockham.PerMac(1e-3))

PRICES: dict[str, tuple[ockham.FixedPrior | ockham.GroupScale | ockham.GroupHorseshoe, ockham.Structures]] = {
    "learned rate": (FIXED, AUTO),
    "learned rate, all masks": (FIXED, ockham.Structures(inside=all_masks())),
    "learned rate, group scale": (SCALE, AUTO),
    "learned rate, group horseshoe": (HORSESHOE, AUTO),
    "100 nats a unit": (FIXED, ockham.Structures(price=ockham.FlatPrice(100.0))),
    "0.001 nats a MAC": (FIXED, MAC),
    "0.003 nats a MAC": (FIXED, ockham.Structures(price=ockham.PerMac(3e-3))),
    "0.003 nats a MAC, group scale": (SCALE, ockham.Structures(price=ockham.PerMac(3e-3))),
    "0.001 nats a MAC, all masks": (FIXED, ockham.Structures(price=ockham.PerMac(1e-3), inside=all_masks())),
    "0.01 nats a parameter": (FIXED, ockham.Structures(price=ockham.PerParameter(1e-2))),
}


def split(folder: Path, held_out: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and judging part: the last ``held_out`` training images, or the test set for 0."""
    data = load_folder(folder)
    if held_out:
        return data.train_x[:-held_out], data.train_y[:-held_out], data.train_x[-held_out:], data.train_y[-held_out:]
    return data.train_x, data.train_y, data.test_x, data.test_y


def train(
    key: str, network: str, data: Path, held_out: int, training: ockham.Training, structures: ockham.Structures | None
) -> Record:
    """One run, its measures on the judging part, and what the network costs; resumed where it was interrupted."""
    x, y, other_x, other_y = split(data / "mnist", held_out)
    torch.manual_seed(training.seed)
    dense = NETWORKS[network]()
    job = ockham.Compression(dense, Batches(x, y, 128, shuffle=True), training=training, structures=structures)
    seconds: list[float] = []
    widths: list[dict[str, int]] = []
    saved = BENCH.saved(key)
    if saved:
        job.load(saved["job"])
        seconds, widths = list(saved["seconds"]), list(saved["widths"])
    start = time.perf_counter()
    for progress in job:
        seconds.append(time.perf_counter() - start)
        widths.append(dict(progress.structures.widths) if progress.structures else {})
        print(f"  {progress.epoch}: {progress.loss:.4f} kept {progress.kept_share:.4f} {widths[-1]}", file=sys.stderr)
        BENCH.save(key, job=job.state(), seconds=seconds, widths=widths)
        start = time.perf_counter()
    return judged(job.result(), dense, other_x, other_y) | {"epoch_seconds": seconds, "widths": widths}


def judged(result: ockham.Compressed, dense: nn.Module, x: Tensor, y: Tensor) -> dict:
    """Error by 20 posterior draws and of the mean network, costs, latencies interleaved with the dense network's."""
    outputs = result.predict(x, draws=20, generator=torch.Generator().manual_seed(0)).probabilities
    with torch.no_grad():
        mean = torch.cat([result.model(part) for part in x.split(1000)])
    one = x[:1]
    sparse, layers = sparse_linear(result.model, x[:64])
    before, after = cost(dense, one), cost(result.model, one)
    record = {
        "error": 1 - float((outputs.argmax(1) == y).double().mean()),
        "error_mean_network": 1 - float((mean.argmax(1) == y).double().mean()),
        "nll": float(-outputs.gather(1, y[:, None]).log().mean()),
        "kept": result.keep_share,
        "macs": [before.macs, after.macs],
        "parameters": [before.parameters, after.parameters],
        "units": {k: w - len(result.plan.removed.get(k, ())) for k, w in result.plan.widths.items()}
        if result.plan
        else {},
        "csr": {name: entry.used for name, entry in layers.items()},
    }
    for batch in (1, 64):
        record[f"latency_{batch}"] = latencies([dense, result.model, sparse], one, batch=batch, repeats=300, warmup=20)
    return record


def recorded(name: str, make: Callable[[], Record], settings: str) -> None:
    BENCH.record(name, lambda: {"run": name, "settings": settings, "threads": torch.get_num_threads()} | make(),
                 settings=settings)  # fmt: skip


def shown(training: ockham.Training, structures: ockham.Structures | None) -> str:
    """Settings of a run as text."""
    return f"{training}, {structures_name(structures)}"


def prices(args: argparse.Namespace) -> None:
    """Priors and prices on LeNet-5-Caffe, judged on validation images."""
    for label, (prior, structures) in PRICES.items():
        for seed in args.seed:
            training = ockham.Training(epochs=args.epochs, prior=prior, seed=seed)
            name = f"prices.{label}.{seed}"
            make = partial(train, name, "lenet5_caffe", args.data, 10_000, training, structures)
            recorded(name, make, shown(training, structures))


FINAL = {
    "lenet5": ("lenet5_caffe", ockham.Training(epochs=40, prior=SCALE), ockham.Structures(price=ockham.PerMac(5e-4))),
    "lenet300": ("lenet_300_100", ockham.Training(epochs=30), ockham.Structures()),
}


def final(which: str, args: argparse.Namespace) -> None:
    """The chosen settings on the test set."""
    network, training, structures = FINAL[which]
    for seed in args.seed:
        own, name = replace(training, seed=seed), f"{which}.{seed}"
        recorded(name, partial(train, name, network, args.data, 0, own, structures), shown(own, structures))


def shrinking(args: argparse.Namespace) -> None:
    """Continuous shrinking against masks only: two jobs, epoch by epoch in turn, so that both meet the same machine."""
    structures = FINAL["lenet5"][2]
    for seed in args.seed:
        training, name = ockham.Training(epochs=30, prior=SCALE, seed=seed), f"shrinking.{seed}"
        recorded(name, partial(_interleaved, name, args.data, training, structures), shown(training, structures))


def _interleaved(key: str, data: Path, training: ockham.Training, structures: ockham.Structures) -> Record:
    x, y, test_x, test_y = split(data / "mnist", 0)
    torch.manual_seed(training.seed)
    dense = NETWORKS["lenet5_caffe"]()
    arms = {"masks only": None, "shrinking": structures}
    jobs = {
        k: ockham.Compression(dense, Batches(x, y, 128, shuffle=True), training=training, structures=s)
        for k, s in arms.items()
    }
    seconds: dict[str, list[float]] = {k: [] for k in arms}
    saved = BENCH.saved(key)
    if saved:
        seconds = {k: list(v) for k, v in saved["seconds"].items()}
        for k, job in jobs.items():
            job.load(saved["jobs"][k])
    loops = {k: iter(job) for k, job in jobs.items()}
    while len(seconds["shrinking"]) < training.epochs:
        for k, loop in loops.items():
            start = time.perf_counter()
            info = next(loop)
            seconds[k].append(time.perf_counter() - start)
            print(f"  {k} {info.epoch}: {seconds[k][-1]:.1f} s, {info.kept_share:.4f}", file=sys.stderr, flush=True)
        BENCH.save(key, jobs={k: job.state() for k, job in jobs.items()}, seconds=seconds)
    found = {k: judged(job.result(), dense, test_x, test_y) | {"epoch_seconds": seconds[k]} for k, job in jobs.items()}
    return {"arms": found, "ratio": sum(seconds["shrinking"]) / sum(seconds["masks only"])}


class Residual(nn.Module):
    """A ResNet-style CNN with 64, 128, 256 channels at 32 x 32, two blocks a stage, option-B shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        sizes = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)]
        self.blocks = nn.Sequential(*(Block(*s) for s in sizes))
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 32, 32] to logits."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))
        self.two = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        same = inputs == outputs and stride == 1
        skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.skip = nn.Identity() if same else skip

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        return torch.relu(self.two(torch.relu(self.one(x))) + self.skip(x))


def latency(args: argparse.Namespace) -> None:
    """Half the multiply-accumulates of a ResNet-style CNN by evidence, widths in steps of 16 and of 1."""
    said = "budget macs 50%, posterior of 20 steps on noise, std 1e-3 at first: the shapes count here"
    recorded("latency", _latency, said)


def _latency() -> dict:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(64, 3, 32, 32)
    groups = ockham.trace(model, x[:2])
    optimizer = ockham.MeanField(
        model.named_parameters(), n_data=640, initial_std=1e-3
    )  # the budget decides, not E_g < 0
    for _ in range(20):
        step(model, optimizer, x[:16], torch.randint(10, (16,)))
    evidence = ockham.score(optimizer.posterior()).by_group(groups)
    networks, macs = {"dense": model}, {"dense": cost(model, x[:1]).macs}
    for unit in (16, 1):
        budget = {"budget": {"macs": "50%"}, "round_to": unit, "model": model, "example_inputs": x[:2]}
        plan = ockham.plan(groups, evidence, **budget)
        small = ockham.shrink(model, plan)
        ockham.verify(ockham.mask(model, plan), small, x[:2])
        networks[f"round_to={unit}"], macs[f"round_to={unit}"] = small, cost(small, x[:1]).macs
    times = dict(zip(networks, latencies(list(networks.values()), x[:1], batch=64, repeats=30), strict=True))
    return {"macs": macs, "latency_64": times, "ratio": {k: t / times["dense"] for k, t in times.items()}}


def tracing(args: argparse.Namespace) -> None:
    """Time and peak memory of trace and plan for models of real size, each in a process of its own."""
    for name in ("resnet50", "bert", "swin"):
        recorded(f"tracing.{name}", partial(_fresh_process, name), f"{name}, random weights, batch 2")


def _fresh_process(name: str) -> Record:
    command = [sys.executable, __file__, "--one-trace", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def one_trace(name: str) -> dict:
    """Trace and plan once, measured after the imports; a small network is traced before, to load torch.export."""
    model, inputs = _large(name)
    ockham.trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), torch.randn(2, 3))
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start, cpu = time.perf_counter(), time.process_time()
    groups = ockham.trace(model, inputs)
    traced, traced_cpu = time.perf_counter() - start, time.process_time() - cpu
    plan = ockham.random_plan(groups, 0.5, generator=torch.Generator().manual_seed(0))
    planned = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    gone = sum(len(units) for units in plan.removed.values())
    return {
        "trace_seconds": traced, "trace_cpu_seconds": traced_cpu, "trace_and_plan_seconds": planned,
        "cpu_seconds": time.process_time() - cpu, "groups": len(groups), "units_removed": gone,
        "model_mb": size, "rss_growth_mb": peak - before,
    }  # fmt: skip


def _large(name: str) -> tuple[nn.Module, object]:
    sys.path[:] = [p for p in sys.path if p != str(Path(__file__).parent)]  # a script there has the library's name
    import transformers as tf

    torch.manual_seed(0)
    if name == "resnet50":
        return tf.ResNetForImageClassification(tf.ResNetConfig()).eval(), {"pixel_values": torch.randn(2, 3, 224, 224)}
    if name == "swin":
        return tf.SwinForImageClassification(tf.SwinConfig()).eval(), {"pixel_values": torch.randn(2, 3, 224, 224)}
    config = tf.BertConfig(num_labels=3)
    return tf.BertForSequenceClassification(config).eval(), {"input_ids": torch.randint(1, 1000, (2, 16))}


def pages() -> dict[str, list[str]]:
    records = BENCH.records()

    def some(kind: str) -> list[Record]:
        return [r for n, r in records.items() if n.startswith(f"{kind}.")]

    lines = [
        "# Structures by evidence", "",
        f"{BENCH.written()}.",
        "One thread of a shared machine: latencies are medians of networks measured in turn, read their ratios.",
        "Error: 20 posterior draws.",
    ]  # fmt: skip
    runs = sorted(some("prices"), key=lambda r: r["macs"][1])
    if runs:
        lines += ["", "## Where the price comes from: LeNet-5-Caffe, MNIST, validation images", "", *_runs(runs)]
    for which, title in (("lenet5", "LeNet-5-Caffe, MNIST, test"), ("lenet300", "LeNet-300-100, MNIST, test")):
        runs = some(which)
        if runs:
            lines += ["", f"## {title}", "", f"`{runs[0]['settings']}`", "", *_runs(runs)]
    lines += _shrinking_lines(some("shrinking")) + _latency_lines(records) + _tracing_lines(some("tracing"))
    return {"structures.md": lines}


def _runs(runs: list[Record]) -> list[str]:
    rows = []
    for r in runs:
        (d64, s64, c64), (d1, s1, _) = r["latency_64"], r["latency_1"]
        rows.append(
            f"{r['run'].removeprefix('prices.')} | {100 * r['error']:.2f} | {100 * r['error_mean_network']:.2f} | "
            f"{'-'.join(map(str, r['units'].values()))} | {100 * r['kept']:.2f} | {r['macs'][1]:,} | "
            f"{r['parameters'][1]:,} | {s64 / d64:.2f} | {s1 / d1:.2f} | {c64 / d64:.2f} | "
            f"{sum(r['epoch_seconds']):.0f}"
        )
    head = (
        "run | error % | mean network | units | kept % | MACs | parameters | latency / dense, batch 64 | batch 1 | "
        "with CSR, 64 | s"
    )
    return markdown(head, rows)


def _shrinking_lines(runs: list[Record]) -> list[str]:
    rows = []
    for r in runs:
        a, b = r["arms"]["masks only"], r["arms"]["shrinking"]
        times = [a["epoch_seconds"], b["epoch_seconds"]]
        rows.append(
            f"{r['run']} | {sum(times[0]):.0f} | {sum(times[1]):.0f} | {r['ratio']:.2f} | "
            f"{times[1][-1] / times[0][-1]:.2f} | {100 * a['error']:.2f} | {100 * b['error']:.2f} | "
            f"{'-'.join(map(str, b['units'].values()))}"
        )
    head = "run | seconds masks only | shrinking | ratio | last epoch | error % masks only | shrinking | units"
    title = "## Continuous shrinking: LeNet-5-Caffe, 30 epochs, both arms epoch by epoch in turn"
    return ["", title, "", *markdown(head, rows)] if runs else []


def _latency_lines(records: Mapping[str, Record]) -> list[str]:
    if "latency" not in records:
        return []
    r = records["latency"]
    rows = [
        f"{name} | {macs:,} | {macs / r['macs']['dense']:.2f} | {1e3 * r['latency_64'][name]:.1f} | "
        f"{r['ratio'][name]:.2f}"
        for name, macs in r["macs"].items()
    ]
    title = "## Latency against multiply-accumulates: a ResNet-style CNN, batch 64"
    return ["", title, "", *markdown("network | MACs | share | latency ms | share", rows)]


def _tracing_lines(runs: list[Record]) -> list[str]:
    rows = [
        f"{r['run'].removeprefix('tracing.')} | {r['trace_seconds']:.1f} ({r['trace_cpu_seconds']:.1f}) | "
        f"{r['trace_and_plan_seconds']:.1f} ({r['cpu_seconds']:.1f}) | {r['groups']} | {r['model_mb']:.0f} | "
        f"{r['rss_growth_mb']:.0f}"
        for r in runs
    ]
    head = "network | trace s (CPU s) | with plan s (CPU s) | groups | model MB | growth of the peak MB"
    return ["", "## Tracing and planning, random weights", "", *markdown(head, rows)] if runs else []


JOBS: dict[str, Callable[[argparse.Namespace], None]] = {
    "prices": prices, "lenet5": partial(final, "lenet5"), "lenet300": partial(final, "lenet300"),
    "shrinking": shrinking, "latency": latency, "tracing": tracing,
}  # fmt: skip


def run(args: argparse.Namespace) -> None:
    if args.one_trace:
        print(json.dumps(one_trace(args.one_trace)))
        raise SystemExit(0)
    for what in args.what:
        JOBS[what](args)


BENCH = Benchmark(
    __file__, __doc__, run, pages, data=DATA, seed=SEEDS, what=Option([], "what to measure", choices=JOBS, word=True),
    epochs=Option(16, "of the comparison of prices"), one_trace=Option("", "trace one network in this process"),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
