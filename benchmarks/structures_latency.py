"""Time at half of the multiply-accumulates: ResNet-20 and a small ViT, PyTorch and ONNX Runtime, one thread.

    python benchmarks/structures_latency.py --data PATH [--network resnet20 vit vit-ti16] [--widths 1 auto] [--seed 0]
    python benchmarks/structures_latency.py --table

The plan is that of `ockham prune --structure --macs 0.5`: a Kronecker Laplace posterior from 512 images of CIFAR-10
(64 for ViT-Ti/16 and ViT-S/16, which make 197 tokens of each),
units that cost the fewest nats per multiply-accumulate, widths in steps of 1 or (the default) of what is measured to
pay. ResNet-20 has its given weights. The ViTs are untrained, since only shapes count here: a small one (6 layers of
192, 3 heads, patches of 4), and ViT-Ti/16 and ViT-S/16 (12 layers of 192 and 384) on images enlarged to 224 by 224.
Dense and small networks run in turn; a ratio is the median of those of neighbouring runs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ockham
from cifar import given, parts
from harness import DATA, SEEDS, Benchmark, Option, Record, interleaved, section
from ockham.surgery.copies import with_rows
from ockham.surgery.costs import cost

IMAGES = 512
REPEATS = {64: 25, 1: 150}


class ViT(nn.Module):
    """A vision transformer for square images."""

    def __init__(self, width: int = 192, layers: int = 6, heads: int = 3, patch: int = 4, side: int = 32) -> None:
        super().__init__()
        self.side = side
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.place = nn.Parameter(0.02 * torch.randn(1, 1 + (side // patch) ** 2, width))
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, side, side] to [N, 10]."""
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.first.expand(len(h), -1, -1), h], 1) + self.place
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h)[:, 0])


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm and beside the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[N, tokens, width] to the same."""
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def vit(data: Path, seed: int, **sizes: int) -> nn.Module:
    torch.manual_seed(seed)
    return ViT(**sizes).eval()


NETWORKS: dict[str, Callable[[Path, int], nn.Module]] = {
    "resnet20": lambda data, seed: given(data, "resnet20"),
    "vit": vit,
    "vit-ti16": partial(vit, layers=12, patch=16, side=224),
    "vit-s16": partial(vit, width=384, layers=12, heads=6, patch=16, side=224),
}


def caller(model: nn.Module, runtime: str, x: Tensor) -> Callable[[], Any]:
    """A call of a network on a batch."""
    if runtime == "torch":
        return torch.inference_mode()(partial(model, x))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = ockham.export(model, Path(folder) / "network.onnx", x)
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {session.get_inputs()[0].name: x.numpy()})


def measured(name: str, widths: str, seed: int, data: Path) -> Record:
    (x, y), _ = parts(data, IMAGES, 1)
    model, rows, fewer = NETWORKS[name](data, seed), 128, 1
    if getattr(model, "side", 32) != 32:
        x, y = nn.functional.interpolate(x[:64], size=(model.side, model.side), mode="bilinear"), y[:64]
        rows, fewer = 16, 5
    loader = list(zip(x.split(rows), y.split(rows), strict=True))
    posterior = ockham.laplace(model, loader, structure="kronecker", seed=seed)
    groups, start = ockham.trace(model, x[:2]), time.perf_counter()
    options = {"budget": {"macs": "50%"}, "model": model, "example_inputs": x[:2]}
    plan = ockham.plan(groups, posterior, round_to="auto" if widths == "auto" else int(widths), **options)
    seconds = time.perf_counter() - start
    small = ockham.shrink(model, plan)
    ockham.verify(ockham.mask(model, plan), small, x[:2])
    ratios, dense_ms = {}, {}
    for batch, runtime in itertools.product(REPEATS, ("torch", "onnxruntime")):
        arms = [caller(m, runtime, with_rows(x[:2], batch)) for m in (model, small)]
        (dense, _), (less, _) = interleaved(arms, REPEATS[batch] // fewer, 5 // fewer + 1)
        case = f"{runtime}, batch {batch}"
        ratios[case] = statistics.median(b / a for a, b in zip(dense, less, strict=True))
        dense_ms[case] = statistics.median(dense)
    left = {key: width - len(plan.removed.get(key, ())) for key, width in plan.widths.items()}
    costs = [cost(m, x[:1]) for m in (model, small)]
    return {
        "network": name, "widths": widths, "seed": seed, "ratio": ratios, "dense_ms": dense_ms, "left": left,
        "macs": costs[1].macs / costs[0].macs, "parameters": costs[1].parameters / costs[0].parameters,
        "plan_seconds": seconds,
    }  # fmt: skip


def run(args: argparse.Namespace) -> None:
    for seed, name, widths in itertools.product(args.seed, args.network, args.widths):
        make = partial(measured, name, widths, seed, args.data)
        BENCH.record(f"{name}.{widths}.{seed}", make, network=name, widths=widths, seed=seed)


def pages() -> dict[str, list[str]]:
    title = "# Time at half of the multiply-accumulates"
    said = (
        "`python benchmarks/structures_latency.py`; time of the small network over that of the dense one, which runs "
        "in turn with it; one thread of a shared machine (AVX2). Widths in steps of 1, and as the command has it."
    )
    cases = [f"{runtime}, batch {batch}" for runtime in ("torch", "onnxruntime") for batch in (64, 1)]
    head = ["network", "widths", "seed", "MACs", "parameters", *cases]
    rows = [
        [r["network"], r["widths"], r["seed"], f"{r['macs']:.1%}", f"{r['parameters']:.1%}",
         *(f"{r['ratio'][c]:.2f}" for c in cases)]
        for r in BENCH.records().values()
    ]  # fmt: skip
    return {"structures_latency.md": section(title, said, head, rows)}


BENCH = Benchmark(
    __file__, __doc__, run, pages, data=DATA, seed=SEEDS,
    network=Option(["resnet20", "vit", "vit-ti16"], choices=NETWORKS),
    widths=Option(["1", "auto"], "steps of the widths: numbers, or auto", kind=str),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
