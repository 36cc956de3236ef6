"""A trained ResNet made narrower: channels by evidence against Torch-Pruning, the same MACs and the same fine-tuning.

    pip install torch-pruning                                       # the rival, for this benchmark only
    python benchmarks/structured.py --data PATH [--epochs 1] [--seed 0] [--share 0.5] [--method ...]
    python benchmarks/structured.py --table

CIFAR-10, the given weights. Every method reads the same 2,000 training images of a seed (the first ones with seed 0,
drawn with another) and takes channels until the multiply-accumulates are at most the share asked for, and nearly there;
then SGD with momentum (0.01, cosine to 0, weight decay 5e-4, batch 128, crops and flips) for the same epochs, the same
seed. Accuracy on the test set right after removal, with BatchNorm re-estimated, and after fine-tuning: read once.

kronecker        `ockham.laplace`, `ockham.plan` (what reads a channel, jointly, in rounds), `ockham.compensate`,
                 `ockham.shrink`
blocks           `ockham.prune(structure="auto")`: units by evidence block by block, widths in multiples of 16 where a
                 group has 128 units or more, survivors refitted to the dense answers
magnitude        Torch-Pruning, L2 norm of coupled groups, global, 40 steps, the last of them cut in twenty
taylor           the same with first-order Taylor on the 2,000 images, read again at every step

Records of one epoch before December 2026 are of Torch-Pruning with 500 images for Taylor and no finer steps.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import ockham
from cifar import Part, accuracy, given, parts
from harness import DATA, SEEDS, Benchmark, Option, Record, section, span, step
from ockham.surgery.costs import cost, latencies
from ockham.zoo.data import Batches
from ockham.zoo.networks import NETWORKS

SHARES = (0.7, 0.5, 0.35)
N_DATA = 50_000
IMAGES = 2000


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


def by_evidence(model: nn.Module, images: Part, shares: tuple[float, ...], seed: int) -> list[nn.Module]:
    """One posterior, one trace, a plan for each budget."""
    x = images[0][:2]
    posterior = ockham.laplace(model, Batches(*images, batch_size=100, shuffle=False), n_data=N_DATA, seed=seed)
    groups = ockham.trace(model, x)
    found = []
    for share in shares:
        budget = {"budget": {"macs": f"{100 * share}%"}, "model": model, "example_inputs": x}
        plan = ockham.plan(groups, posterior, **budget)
        moved = ockham.compensate(model, posterior, groups, plan)
        small = ockham.shrink(moved, plan)
        ockham.verify(ockham.mask(moved, plan), small, x)
        found.append(small)
    return found


def by_blocks(model: nn.Module, images: Part, shares: tuple[float, ...], _: int) -> list[nn.Module]:
    """One call a budget."""
    batches = Batches(*images, batch_size=100, shuffle=False)
    return [ockham.prune(model, batches, structure="auto", budget={"macs": f"{100 * s}%"}).model for s in shares]


def by_torch_pruning(
    importance: str, model: nn.Module, images: Part, shares: tuple[float, ...], _: int
) -> list[nn.Module]:
    """Global pruning in small steps, the one that passes a budget in smaller ones: the first network at or below."""
    one, rest, found = images[0][:1], list(shares), []
    dense = cost(model, one).macs

    def stepping(net: nn.Module, ratio: float, steps: int) -> Iterator[nn.Module]:
        net = copy.deepcopy(net)
        measure = (
            tp.importance.MagnitudeImportance(p=2) if importance == "magnitude" else tp.importance.TaylorImportance()
        )
        last = [m for m in net.modules() if isinstance(m, nn.Linear)]
        options = {"global_pruning": True, "iterative_steps": steps, "pruning_ratio": ratio, "ignored_layers": last}
        pruner = tp.pruner.MetaPruner(net, one, importance=measure, **options)
        for _ in range(steps):
            if importance == "taylor":
                net.zero_grad()
                for x, y in zip(*(t.split(100) for t in images), strict=True):
                    nn.functional.cross_entropy(net(x), y).backward()
            pruner.step()
            yield net

    import torch_pruning as tp

    before = copy.deepcopy(model)
    for net in stepping(model, 0.9, 40):
        while rest and cost(net, one).macs <= rest[0] * dense:
            finer = (n for n in stepping(before, 0.045, 20) if cost(n, one).macs <= rest[0] * dense)
            found.append(copy.deepcopy(next(finer, net)))
            found[-1].zero_grad()
            rest.pop(0)
        if not rest:
            break
        before = copy.deepcopy(net)
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


def images_of(train: Part, seed: int) -> Part:
    """What a method reads to choose."""
    n = len(train[0])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)) if seed else torch.arange(n)
    return train[0][order[:IMAGES]], train[1][order[:IMAGES]]


@functools.cache
def smaller(
    network: str, method: str, shares: tuple[float, ...], seed: int, data: Path
) -> tuple[dict[float, nn.Module], float]:
    """The networks of these shares, and the processor seconds of their choice, all together."""
    (train, _), dense = start(network, data)
    began = time.process_time()
    found = METHODS[method](dense, images_of(train, seed), shares, seed)
    return dict(zip(shares, found, strict=False)), time.process_time() - began


def measured(
    network: str, method: str, share: float, shares: tuple[float, ...], seed: int, data: Path, epochs: float
) -> Record:
    (train, test), dense = start(network, data)
    found, chosen = smaller(network, method, shares, seed, data)
    small, one = copy.deepcopy(found[share]), test[0][:1]
    fresh, after = copy.deepcopy(small), cost(small, one)
    ockham.refresh_batchnorm(fresh, Batches(*images_of(train, seed), batch_size=250, shuffle=False))
    record = {
        "network": network, "method": method, "asked": share, "seed": seed, "epochs": epochs,
        "macs": after.macs / cost(dense, one).macs, "parameters": after.parameters, "dense": accuracy(dense, test),
        "at_once": accuracy(small, test), "refreshed": accuracy(fresh, test), "choice_seconds": chosen,
    }  # fmt: skip
    began = time.process_time()
    tuned = fine_tuned(small, train, epochs, seed)
    record |= {"tuning_seconds": time.process_time() - began, "fine_tuned": accuracy(tuned, test)}
    d, s = latencies([dense, tuned], one, batch=64, repeats=20, warmup=3)
    alone = latencies([dense, tuned], one, batch=1, repeats=50, warmup=5)
    return record | {"latency": s / d, "latency_1": alone[1] / alone[0]}


def run(args: argparse.Namespace) -> None:
    shares = tuple(sorted(args.share, reverse=True))
    for seed, method, share in itertools.product(args.seed, args.method, shares):
        make = functools.partial(measured, args.network, method, share, shares, seed, args.data, args.epochs)
        key = f"{args.network}.{method}.{share:g}.{seed}" + (f".epochs{args.epochs:g}" if args.epochs != 1 else "")
        BENCH.record(key, make, asked=share, seed=seed, epochs=args.epochs)


def pages() -> dict[str, list[str]]:
    said = (
        "`python benchmarks/structured.py`; CIFAR-10, given weights; one thread; what the columns mean is said there. "
        "Mean (range) over the seeds; latency on a machine with other work beside it."
    )
    head = (
        "network | method | seeds | MACs asked | MACs left | parameters | dense % | at once | BatchNorm anew | "
        "epochs | fine-tuned % | latency / dense, batch 64 | batch 1"
    )

    def key(r: Record) -> tuple:
        return r["network"], -r["asked"], r["epochs"], r["method"]

    rows = []
    for _, some in itertools.groupby(sorted(BENCH.records().values(), key=key), key=key):
        rs = list(some)
        r, of = rs[0], lambda name, digits=2, rs=rs: span([r[name] for r in rs if name in r], digits)
        rows.append(
            f"{r['network']} | {r['method']} | {len(rs)} | {r['asked']:.0%} | {of('macs', 3)} | "
            f"{of('parameters', 0)} | {r['dense']:.2f} | {of('at_once')} | {of('refreshed')} | {r['epochs']:g} | "
            f"{of('fine_tuned')} | "
            f"{of('latency')} | {of('latency_1') if 'latency_1' in r else '–'}"
        )
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
