"""What a training step costs: ratios to `torch.optim.Adam(fused=True)` on the same network in one run, and memory.

    pip install --no-deps ivon-opt bayesian-torch      # optional rivals, for this benchmark only
    python benchmarks/step_cost.py [--rounds 30]
    python benchmarks/step_cost.py --arms slab         # spike-and-slab beside Adam; step_cost_slab.json and .md

Arms are interleaved: every round times a few steps of each, and the ratio of medians over rounds is reported, so that
a busy machine slows all arms alike. Memory is the growth of the peak resident set of a fresh process over five steps of
a wide network at batch 1 (activations are negligible there), in floats per weight, parameter and gradient included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import ockham
from harness import Benchmark, Option, Record, interleaved, peak, section, step
from ockham.zoo.networks import NETWORKS

SHAPES = {"lenet_300_100": (1, 28, 28), "lenet5_caffe": (1, 28, 28), "resnet20": (3, 32, 32)}
STEPS = {"lenet_300_100": 20, "lenet5_caffe": 4, "resnet20": 1}
N_DATA = 60_000

Step = Callable[[], object]
Build = Callable[[nn.Module, torch.Tensor, torch.Tensor], Step]


def built(make: Callable[[nn.Module], torch.optim.Optimizer]) -> Build:
    """Steps of a network under an optimizer."""
    return lambda net, x, y: partial(step, net, make(net), x, y)


def pruned(net: nn.Module) -> torch.optim.Optimizer:
    optimizer, generator = ockham.MeanField(net.named_parameters(), n_data=N_DATA), torch.Generator().manual_seed(0)
    optimizer.remove({n: torch.rand(p.shape, generator=generator) < 0.02 for n, p in net.named_parameters()})
    return optimizer


def propagated(net: nn.Module) -> torch.optim.Optimizer:
    optimizer = ockham.SpikeSlab(net.named_parameters(), n_data=N_DATA)
    optimizer.propagate(net)
    return optimizer


def ivon(net: nn.Module) -> torch.optim.Optimizer:
    import ivon as package

    optimizer = package.IVON(net.parameters(), lr=0.1, ess=N_DATA)
    optimizer.sampled = partial(optimizer.sampled_params, train=True)
    return optimizer


def bayesian_torch(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Step:
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

    prior = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -3.0}
    dnn_to_bnn(net, {**prior, "type": "Reparameterization", "moped_enable": False})
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def with_kl() -> None:
        optimizer.zero_grad()
        (nn.functional.cross_entropy(net(x), y) + (get_kl_loss(net) or 0.0) / N_DATA).backward()
        optimizer.step()

    return with_kl


SHARED: dict[str, Build] = {
    "Adam (fused)": built(lambda net: torch.optim.Adam(net.parameters(), fused=True)),
    "ockham.MeanField": built(lambda net: ockham.MeanField(net.named_parameters(), n_data=N_DATA)),
}
METHODS = SHARED | {
    "ockham.MeanField, 98 % removed": built(pruned),
    "ockham.IVON": built(lambda net: ockham.IVON(net.named_parameters(), n_data=N_DATA)),
    "ivon-opt": built(ivon),
    "bayesian-torch": bayesian_torch,
}
SLAB = SHARED | {
    "ockham.SpikeSlab, noise in weights": built(lambda net: ockham.SpikeSlab(net.named_parameters(), n_data=N_DATA)),
    "ockham.SpikeSlab, propagated": built(propagated),
}
ARMS = {"all": METHODS, "slab": SLAB}


def ratios(network: str, rounds: int, methods: dict[str, Callable]) -> dict[str, dict[str, float]]:
    x, y = torch.randn(128, *SHAPES[network]), torch.randint(0, 10, (128,))
    arms = {}
    for name, build in methods.items():
        try:
            torch.manual_seed(0)
            arms[name] = build(NETWORKS[network](), x, y)
            arms[name]()
        except ImportError:
            print(f"{name}: not installed, left out", file=sys.stderr)
    repeated = [lambda s=s: [s() for _ in range(STEPS[network])] for s in arms.values()]
    medians = [statistics.median(wall) / STEPS[network] for wall, _ in interleaved(repeated, rounds)]
    return {n: {"ms": t, "ratio": t / medians[0]} for n, t in zip(arms, medians, strict=True)}


def memory(name: str) -> float:
    """Floats per weight at the peak, median of three processes whose allocator gives freed memory back at once.

    Otherwise glibc keeps 0 to .9 floats of freed gradients, at random from run to run.
    """
    command = [sys.executable, __file__, "--memory-of", name]
    given = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    runs = [subprocess.run(command, capture_output=True, text=True, check=False, env=given) for _ in range(3)]
    return statistics.median(float(r.stdout) if r.returncode == 0 else float("nan") for r in runs)


def _memory_here(name: str) -> float:
    torch.set_num_threads(1)
    build = (METHODS | SLAB)[name]
    build(nn.Linear(8, 8), torch.randn(2, 8), torch.tensor([0, 1]))()
    before = peak()
    net = nn.Sequential(*(nn.Linear(2000, 2000) for _ in range(6)))
    weights = sum(p.numel() for p in net.parameters())
    one = build(net, torch.randn(1, 2000), torch.zeros(1, dtype=torch.long))
    for _ in range(5):
        one()
    return (peak() - before) * 1024 / 4 / weights


def measured(arms: str, rounds: int) -> Record:
    found = {network: ratios(network, rounds, ARMS[arms]) for network in SHAPES}
    return {"steps": found, "floats_per_weight": {name: memory(name) for name in found["lenet_300_100"]}}


def run(args: argparse.Namespace) -> None:
    if args.memory_of:
        print(_memory_here(args.memory_of))
        raise SystemExit(0)
    name = "step_cost" if args.arms == "all" else f"step_cost_{args.arms}"
    BENCH.record(name, partial(measured, args.arms, args.rounds), arms=args.arms, rounds=args.rounds)


def pages() -> dict[str, list[str]]:
    return {f"{name}.md": page(record) for name, record in BENCH.records("step_cost*").items()}


def page(record: Record) -> list[str]:
    steps = record["steps"]
    said = f"""{record["date"][:10]}, `{record["command"]}`, {record["machine"]},
torch {record["versions"]["torch"]}. Batch 128; ratio of medians over interleaved rounds to fused Adam; peak memory in \
floats per weight."""
    rows = [
        [name, *(f"{s[name]['ms']:.2f} ({s[name]['ratio']:.2f})" for s in steps.values()), f"{floats:.1f}"]
        for name, floats in record["floats_per_weight"].items()
    ]
    head = ["method", *(f"{n}: ms (ratio)" for n in steps), "floats per weight"]
    return section("# Cost of a training step", said, head, rows)


BENCH = Benchmark(
    __file__, __doc__, run, pages, folder="", threads=0, rounds=Option(30, "of all arms in turn"),
    arms=Option("all", choices=list(ARMS)), memory_of=Option("", "only the memory of one arm, in this process"),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
