"""A small character transformer, trained, then IVON from its own curvature, rounds by evidence, heads and neurons gone.

    python benchmarks/transformer.py --data PATH [--seed 0] [--validate] [--longer] [--table]

Tiny Shakespeare: first nine tenths to train on, then a twentieth to choose settings on (`--validate`) and a twentieth
that a run reads once, at its end. `CharTransformer`, 128 dims, `--blocks` of `--heads`; batches of 32 windows of 64.
Dense: Adam, 2e-3, constant, then linear to 0 over the second half, `--steps` steps; with `--longer` also for as many
as both phases have. Reduced: IVON from a diagonal Laplace of the dense network for `--refit` steps in 20 "epochs",
tempered, removal where delta_f > 0 from the second on, whole heads and neurons at a price per parameter. NLL in nats
per character of the mean network; "predictive" averages 10 draws.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import ockham
from harness import DATA, SEEDS, Benchmark, Option, Record, section, step
from ockham.choose.prices import Price, UnitCosts
from ockham.choose.units import StructureEvidence
from ockham.surgery.costs import cost
from ockham.zoo.networks import CharTransformer

EPOCHS, CONTEXT, BATCH = 20, 64, 32


@dataclass(frozen=True, slots=True)
class HeadsAndUnits(Price):
    """Nats per parameter, of heads ``factor`` times as many: they also cost cache and the attention itself."""

    nats_each: float
    factor: float

    def nats(self, evidence: StructureEvidence, costs: UnitCosts) -> dict[str, Tensor]:
        """Group id to price."""
        found = ockham.PerParameter(self.nats_each).nats(evidence, costs)
        return {key: price * (self.factor if "attention" in key else 1.0) for key, price in found.items()}


class Windows:
    """An epoch of batches of random windows."""

    def __init__(self, codes: Tensor, batches: int) -> None:
        self._codes, self._batches = codes, batches

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self._batches):
            at = torch.randint(len(self._codes) - CONTEXT - 1, (BATCH, 1)) + torch.arange(CONTEXT + 1)
            yield self._codes[at[:, :-1]], self._codes[at[:, 1:]]


def corpus(data: Path) -> tuple[list[Tensor], int]:
    """Codes of the parts to train on, to choose on and to test on, and the size of the alphabet."""
    raw = (data / "text" / "tinyshakespeare" / "input.txt").read_text()
    symbols = {c: i for i, c in enumerate(sorted(set(raw)))}
    codes = torch.tensor([symbols[c] for c in raw])
    ends = [0, int(0.9 * len(codes)), int(0.95 * len(codes)), len(codes)]
    return [codes[a:b] for a, b in itertools.pairwise(ends)], len(symbols)


@torch.no_grad()
def nll(model: nn.Module, codes: Tensor) -> float:
    """Nats per character, windows of 64 without overlap, each from an empty context."""
    whole = codes[: (len(codes) - 1) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    after = codes[1 : whole.numel() + 1].view(-1, CONTEXT)
    losses = [
        nn.functional.cross_entropy(model.eval()(x), y, reduction="sum")
        for x, y in zip(whole.split(64), after.split(64), strict=True)
    ]
    return float(torch.stack(losses).sum()) / whole.numel()


@torch.no_grad()
def predictive_nll(model: nn.Module, posterior: ockham.Posterior, codes: Tensor, draws: int = 10) -> float:
    """The same of the average of some draws."""
    whole = codes[: (len(codes) - 1) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    after, total = codes[1 : whole.numel() + 1].view(-1, CONTEXT), 0.0
    copies = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        one = copy.deepcopy(model)
        for name, p in one.named_parameters():
            g = posterior[name]
            noise = torch.randn(p.shape, generator=generator) * g.precision.rsqrt()
            p.copy_(g.mean + noise.masked_fill(~g.keep, 0.0))
        copies.append(one.eval())
    for x, y in zip(whole.split(64), after.split(64), strict=True):
        logs = torch.stack([m(x).log_softmax(1) for m in copies]).logsumexp(0) - math.log(draws)
        total -= float(logs.gather(1, y.unsqueeze(1)).sum())
    return total / whole.numel()


def trained(model: nn.Module, loader: Windows, seed: int, rate: float = 2e-3) -> nn.Module:
    """Adam for one pass of the loader."""
    torch.manual_seed(seed)
    optimizer, steps = torch.optim.Adam(model.parameters(), rate, fused=True), len(loader)
    for i, (x, y) in enumerate(loader):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - i / steps))
        step(model, optimizer, x, y)
        if i % 500 == 0:
            print(f"  adam {i} of {steps}", flush=True)
    return model.eval()


def reduced(model: nn.Module, codes: Tensor, args: argparse.Namespace, seed: int) -> ockham.Compressed:
    """IVON from the network's own curvature, rounds, structures."""
    torch.manual_seed(seed)
    few = list(Windows(codes, 30))
    start = ockham.laplace(model, few, structure="diagonal", n_data=len(codes), prior=1 / args.variance)

    def warm(network: nn.Module, training: ockham.Training, *, n_data: float, steps: int) -> ockham.IVON:
        named, prior = list(network.named_parameters()), ockham.FixedPrior(args.variance)
        optimizer = ockham.IVON(named, n_data=n_data, lr=args.rate, steps=steps, prior=prior, seed=seed,
                                temperature=args.temperature, initial_std=1e-3, betas=(0.9, args.beta2))  # fmt: skip
        optimizer.start_from(start)
        return optimizer

    loader = Windows(codes, args.refit // EPOCHS)
    job = ockham.Compression(
        model, loader, training=ockham.Training(epochs=EPOCHS, seed=seed), estimator=warm, n_data=len(codes),
        rounds=ockham.Rounds(start=0.1, end=0.8, count=15, patience=99),
        structures=ockham.Structures(price=HeadsAndUnits(args.price, args.heads_factor)),
    )  # fmt: skip
    for progress in job:
        print(f"  ivon {progress.epoch}: {progress.loss:.4f}, kept {progress.kept_share:.4f}", flush=True)
    return job.result()


def widths(model: nn.Module) -> dict[str, list[int]]:
    """Heads and hidden units of every block."""
    heads = [b.attention.query.out_features // b.attention.size for b in model.blocks]  # type: ignore[union-attr]
    return {"heads": heads, "hidden": [b.fc1.out_features for b in model.blocks]}  # type: ignore[union-attr]


def measured(args: argparse.Namespace, seed: int, key: str) -> Record:
    (codes, valid, test), alphabet = corpus(args.data)
    part = valid if args.validate else test
    torch.manual_seed(seed)
    first = CharTransformer(alphabet, CONTEXT, 128, args.blocks, args.heads)
    dense, known = copy.deepcopy(first), BENCH.saved(key)
    if known:
        dense.load_state_dict(known["dense"])
    else:
        dense = trained(dense, Windows(codes, args.steps), seed)
        BENCH.save(key, dense=dense.state_dict())
    print(f"dense {nll(dense.eval(), part):.4f}", flush=True)
    began = time.process_time()
    found = reduced(dense, codes, args, seed)
    example = codes[:CONTEXT].view(1, -1)
    total = sum(p.numel() for p in dense.parameters())
    alive = sum(int((p != 0).sum()) for p in found.model.parameters())
    record = {
        "weights": total, "removed": 1 - alive / total,
        "parameters": sum(p.numel() for p in found.model.parameters()), "widths": widths(found.model),
        "macs": cost(found.model, example).macs / cost(dense, example).macs,
        "dense": nll(dense, part), "reduced": nll(found.model, part),
        "predictive": predictive_nll(found.model, found.posterior, part), "seconds": time.process_time() - began,
    }  # fmt: skip
    record["loss"] = record["reduced"] / record["dense"] - 1
    longer = args.longer and not args.validate
    steps = Windows(codes, args.steps + args.refit)
    return record | {"longer": nll(trained(first, steps, seed), part) if longer else None}


def run(args: argparse.Namespace) -> None:
    left_out = ("data", "seed", "longer", "validate", "threads", "again", "results", "table")
    settings = {k: v for k, v in vars(args).items() if k not in left_out}
    for seed in args.seed:
        key = f"{args.blocks}x{args.heads}.{args.steps}.{seed}"
        make = partial(measured, args, seed, key)
        BENCH.record(key, lambda m=make, s=seed: settings | {"seed": s} | m(), keep=not args.validate, **settings)


def pages() -> dict[str, list[str]]:
    said = (
        "`python benchmarks/transformer.py`; tiny Shakespeare, NLL in nats per character of the last twentieth; one "
        "thread."
    )
    head = (
        "blocks x heads | steps | seed | dense NLL | dense, all steps | reduced NLL | change | predictive NLL "
        "| weights removed | parameters left | MACs left | heads left | hidden left"
    )
    rows = [
        f"{r['blocks']} x {r['heads']} | {r['steps']} + {r['refit']} | {r['seed']} | {r['dense']:.4f} | "
        f"{'–' if r['longer'] is None else format(r['longer'], '.4f')} | "
        f"{r['reduced']:.4f} | {r['loss']:+.2%} | {r['predictive']:.4f} | "
        f"{r['removed']:.1%} | {r['parameters'] / r['weights']:.1%} | {r['macs']:.1%} | "
        f"{r['widths']['heads']} | {r['widths']['hidden']}"
        for r in BENCH.records().values()
    ]
    return {"transformer.md": section("# A small transformer made smaller", said, head, rows)}


BENCH = Benchmark(
    __file__, __doc__, run, pages, data=DATA, seed=SEEDS, blocks=2, heads=16, steps=Option(2000, "of Adam"),
    refit=Option(4500, "steps of IVON"), longer=Option(False, "train Adam for all of them, too"),
    variance=Option(0.1, "of the prior"), temperature=0.13,
    beta2=Option(0.9999, "of IVON; the curvature starts warm"), rate=Option(0.1, "of IVON"),
    price=Option(2.0, "nats per parameter that a unit must be worth"),
    heads_factor=Option(5.0, "times as many that a head must be worth"),
    validate=Option(False, "measure on the part to choose settings on; no record"),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
