"""A trained ResNet made narrower: channels by evidence against Torch-Pruning, the same MACs and the same fine-tuning.

    pip install torch-pruning                                       # the rival, for this benchmark only
    python benchmarks/structured.py --data PATH [--network resnet56] [--epochs 1] [--seed 0] [--method NAME ...]
    python benchmarks/structured.py --table

CIFAR-10, the given weights. Every method takes channels until the multiply-accumulates are at most the share asked for;
then SGD with momentum (0.01, cosine to 0, weight decay 5e-4, batch 128, crops and flips) for the same epochs, the
same seed. Accuracy on the test set right after removal, with BatchNorm re-estimated, and after fine-tuning: read once.

kronecker        `ockham.laplace` (2,000 training images), `ockham.plan` (what reads a channel, jointly, in rounds),
                 `ockham.compensate`, `ockham.shrink`
magnitude        Torch-Pruning, L2 norm of coupled groups, global, 20 steps
taylor           Torch-Pruning, first-order Taylor on 5 batches of 100, global, 20 steps
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

import ockham
from cifar import accuracy, given, parts
from ockham.surgery.shrinking import cost, latencies
from ockham.zoo.data import Batches
from ockham.zoo.networks import NETWORKS

RESULTS = Path(__file__).parent / "results" / "structured"
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
    for step in range(steps):
        at = (step * 128) % (len(x) - 127)
        if at < 128 and step:
            order = torch.randperm(len(x), generator=generator)
        picked = order[at : at + 128]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(augmented(x[picked], generator)), y[picked]).backward()
        optimizer.step()
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
    "magnitude": lambda *a: by_torch_pruning("magnitude", *a),
    "taylor": lambda *a: by_torch_pruning("taylor", *a),
}


def run(network: str, method: str, data: Path, epochs: float, seed: int) -> None:
    paths = {s: RESULTS / f"{network}.{method}.{s:g}.{seed}.json" for s in SHARES}
    if all(p.exists() for p in paths.values()):
        return
    (train, test), dense = parts(data), given(data, network)
    began = time.process_time()
    smaller = METHODS[method](dense, train, SHARES)
    chosen = time.process_time() - began
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for share, small in zip(SHARES, smaller, strict=False):
        if paths[share].exists():
            continue
        one, macs = test[0][:1], cost(dense, test[0][:1]).macs
        after = cost(small, one)
        record = {
            "network": network, "method": method, "asked": share, "seed": seed, "epochs": epochs,
            "macs": after.macs / macs, "parameters": after.parameters, "dense": accuracy(dense, test),
            "at_once": accuracy(small, test),
        }  # fmt: skip
        fresh = copy.deepcopy(small)
        ockham.refresh_batchnorm(fresh, Batches(*(t[:CURVATURE_IMAGES] for t in train), batch_size=250, shuffle=False))
        record["refreshed"] = accuracy(fresh, test)
        start = time.process_time()
        record["fine_tuned"] = accuracy(fine_tuned(small, train, epochs, seed), test)
        d, s = latencies([dense, small], one, batch=64, repeats=20, warmup=3)
        record |= {"latency": s / d, "choice_seconds": chosen, "tuning_seconds": time.process_time() - start}
        record |= {"date": f"{datetime.now(UTC):%Y-%m-%d}", "torch": torch.__version__, "commit": git.stdout.strip()}
        paths[share].write_text(json.dumps(record, indent=1) + "\n")
        print(record, flush=True)


def table() -> str:
    lines = [
        "# A trained ResNet made narrower, short fine-tuning",
        "",
        "`python benchmarks/structured.py`; CIFAR-10, given weights; one thread; what the columns mean is said there.",
        "",
        "| network | method | seed | MACs asked | MACs left | parameters | dense % | at once | BatchNorm anew "
        "| epochs | fine-tuned % | latency / dense, batch 64 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    records = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))]
    for r in sorted(records, key=lambda r: (r["network"], -r["asked"], r["method"], r["seed"])):
        lines.append(
            f"| {r['network']} | {r['method']} | {r['seed']} | {r['asked']:.0%} | {r['macs']:.1%} | "
            f"{r['parameters']:,} | {r['dense']:.2f} | {r['at_once']:.2f} | {r['refreshed']:.2f} | {r['epochs']:g} | "
            f"{r['fine_tuned']:.2f} | {r['latency']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--network", default="resnet56", choices=[n for n in NETWORKS if n.startswith("resnet")])
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.table:
        for method in args.method:
            run(args.network, method, args.data, args.epochs, args.seed)
    (RESULTS.parent / "structured.md").write_text(table())


if __name__ == "__main__":
    main()
