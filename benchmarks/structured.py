"""A trained ResNet made narrower: channels by evidence against Torch-Pruning, the same MACs and the same fine-tuning.

    pip install torch-pruning                                       # the rival, for this benchmark only
    python benchmarks/structured.py --data PATH [--epochs 1] [--seed 0] [--share 0.5] [--method ...]
    python benchmarks/structured.py --table

CIFAR-10, the given weights. Every method takes channels until the multiply-accumulates are at most the share asked for;
then SGD with momentum (0.01, cosine to 0, weight decay 5e-4, batch 128, crops and flips) for the same epochs, the
same seed. Accuracy on the test set right after removal, with BatchNorm re-estimated, and after fine-tuning: read once.

kronecker        `ockham.laplace` (2,000 training images), `ockham.plan` (what reads a channel, jointly, in rounds),
                 `ockham.compensate`, `ockham.shrink`
blocks           `ockham.prune(structure="auto")` (2,000 training images): units by evidence block by block, widths in
                 multiples of 16 where a group has 128 units or more, survivors refitted to the dense answers
magnitude        Torch-Pruning, L2 norm of coupled groups, global, 20 steps
taylor           Torch-Pruning, first-order Taylor on 5 batches of 100, global, 20 steps
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import ockham
from cifar import Part, accuracy, given, parts
from harness import DATA, SEEDS, Benchmark, Option, Record, section, step
from ockham.surgery.costs import cost, latencies
from ockham.zoo.data import Batches
from ockham.zoo.networks import NETWORKS

SHARES = (0.7, 0.5, 0.35)
CURVATURE_IMAGES = 2000


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop out of four pixels of zero padding, a flip for every other image."""
    wide = nn.functional.pad(x, (4, 4, 4, 4))
    n = len(x)
    top, left = (torch.randint(9, (n,), generator=generator) for _ in range(2))
    rows, columns = (p[:, None] + torch.arange(32) for p in (top, left))
    flip = torch.rand(n, generator=generator) < 0.5
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    return wide[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def fine_tuned(model: nn.Module, data: tuple[Tensor, Tensor], epochs: float, seed: int) -> nn.Module:
    """The same for every method."""
    generator = torch.Generator().manual_seed(seed)
    x, y = data
    steps = round(epochs * (len(x) // 128))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order, model = torch.randperm(len(x), generator=generator), model.train()
    for i in range(steps):
        at = (i * 128) % (len(x) - 127)
        if at < 128 and i:
            order = torch.randperm(len(x), generator=generator)
        picked = order[at : at + 128]
        step(model, optimizer, augmented(x[picked], generator), y[picked])
        schedule.step()
    return model.eval()


# ------------------------------------------------------------------ methods


def by_evidence(model: nn.Module, train: tuple[Tensor, Tensor], shares: tuple[float, ...]) -> list[nn.Module]:
    """One posterior, one trace, a plan for each budget."""
    part = tuple(t[:CURVATURE_IMAGES] for t in train)
    posterior = ockham.laplace(model, Batches(*part, batch_size=100, shuffle=False), n_data=len(train[0]))
    groups = ockham.trace(model, part[0][:2])
    found = []
    for share in shares:
        budget = {"budget": {"macs": f"{100 * share}%"}, "model": model, "example_inputs": part[0][:2]}
        plan = ockham.plan(groups, posterior, **budget)
        moved = ockham.compensate(model, posterior, groups, plan)
        small = ockham.shrink(moved, plan)
        ockham.verify(ockham.mask(moved, plan), small, part[0][:2])
        found.append(small)
    return found


def by_blocks(model: nn.Module, train: tuple[Tensor, Tensor], shares: tuple[float, ...]) -> list[nn.Module]:
    """One call a budget."""
    part = tuple(t[:CURVATURE_IMAGES] for t in train)
    images = Batches(*part, batch_size=100, shuffle=False)
    return [ockham.prune(model, images, structure="auto", budget={"macs": f"{100 * share}%"}).model for share in shares]


def by_torch_pruning(importance: str, model: nn.Module, train: tuple[Tensor, Tensor], shares: tuple) -> list[nn.Module]:
    """Global pruning in small steps; the first network at or below each budget."""
    import torch_pruning as tp

    net, example = copy.deepcopy(model), train[0][:1]
    measure = tp.importance.MagnitudeImportance(p=2) if importance == "magnitude" else tp.importance.TaylorImportance()
    last = [m for m in net.modules() if isinstance(m, nn.Linear)]
    options = {"global_pruning": True, "iterative_steps": 40, "pruning_ratio": 0.9, "ignored_layers": last}
    pruner = tp.pruner.MetaPruner(net, example, importance=measure, **options)
    dense, found = cost(net, example).macs, []
    for _ in range(40):
        if importance == "taylor":
            net.zero_grad()
            for i in range(5):
                picked = slice(100 * i, 100 * (i + 1))
                nn.functional.cross_entropy(net(train[0][picked]), train[1][picked]).backward()
        pruner.step()
        now = cost(net, example).macs
        while len(found) < len(shares) and now <= shares[len(found)] * dense:
            found.append(copy.deepcopy(net))
        if len(found) == len(shares):
            break
    net.zero_grad()
    return found


METHODS: dict[str, Callable[..., list[nn.Module]]] = {
    "kronecker": by_evidence,
    "blocks": by_blocks,
    "magnitude": lambda *a: by_torch_pruning("magnitude", *a),
    "taylor": lambda *a: by_torch_pruning("taylor", *a),
}


@functools.cache
def start(network: str, data: Path) -> tuple[tuple[Part, Part], nn.Module]:
    """Images and the given network."""
    return parts(data), given(data, network)


@functools.cache
def smaller(network: str, method: str, shares: tuple[float, ...], data: Path) -> tuple[dict[float, nn.Module], float]:
    """The networks of these shares, and the processor seconds of their choice, all together."""
    (train, _), dense = start(network, data)
    began = time.process_time()
    found = METHODS[method](dense, train, shares)
    return dict(zip(shares, found, strict=False)), time.process_time() - began


def measured(
    network: str, method: str, share: float, shares: tuple[float, ...], seed: int, data: Path, epochs: float
) -> Record:
    (train, test), dense = start(network, data)
    found, chosen = smaller(network, method, shares, data)
    small, one = copy.deepcopy(found[share]), test[0][:1]
    fresh, after = copy.deepcopy(small), cost(small, one)
    ockham.refresh_batchnorm(fresh, Batches(*(t[:CURVATURE_IMAGES] for t in train), batch_size=250, shuffle=False))
    record = {
        "network": network, "method": method, "asked": share, "seed": seed, "epochs": epochs,
        "macs": after.macs / cost(dense, one).macs, "parameters": after.parameters, "dense": accuracy(dense, test),
        "at_once": accuracy(small, test), "refreshed": accuracy(fresh, test), "choice_seconds": chosen,
    }  # fmt: skip
    began = time.process_time()
    tuned = fine_tuned(small, train, epochs, seed)
    record |= {"tuning_seconds": time.process_time() - began, "fine_tuned": accuracy(tuned, test)}
    d, s = latencies([dense, tuned], one, batch=64, repeats=20, warmup=3)
    return record | {"latency": s / d}


def run(args: argparse.Namespace) -> None:
    shares = tuple(sorted(args.share, reverse=True))
    for seed, method, share in itertools.product(args.seed, args.method, shares):
        make = functools.partial(measured, args.network, method, share, shares, seed, args.data, args.epochs)
        BENCH.record(f"{args.network}.{method}.{share:g}.{seed}", make, asked=share, seed=seed, epochs=args.epochs)


def pages() -> dict[str, list[str]]:
    said = (
        "`python benchmarks/structured.py`; CIFAR-10, given weights; one thread; what the columns mean is said there."
    )
    head = (
        "network | method | seed | MACs asked | MACs left | parameters | dense % | at once | BatchNorm anew | epochs | "
        "fine-tuned % | latency / dense, batch 64"
    )
    rows = [
        f"{r['network']} | {r['method']} | {r['seed']} | {r['asked']:.0%} | {r['macs']:.1%} | "
        f"{r['parameters']:,} | {r['dense']:.2f} | {r['at_once']:.2f} | {r['refreshed']:.2f} | {r['epochs']:g} | "
        f"{r['fine_tuned']:.2f} | {r['latency']:.2f}"
        for r in sorted(BENCH.records().values(), key=lambda r: (r["network"], -r["asked"], r["method"], r["seed"]))
    ]
    return {"structured.md": section("# A trained ResNet made narrower, short fine-tuning", said, head, rows)}


BENCH = Benchmark(
    __file__, __doc__, run, pages, data=DATA, seed=SEEDS,
    share=Option(list(SHARES), "shares of the MACs that stay"),
    network=Option("resnet56", choices=[n for n in NETWORKS if n.startswith("resnet")]),
    method=Option(list(METHODS), choices=METHODS), epochs=Option(1.0, "of fine-tuning"),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
