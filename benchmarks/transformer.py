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
import json
import math
import subprocess
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

import ockham
from ockham.choose.prices import Price, UnitCosts
from ockham.choose.units import StructureEvidence
from ockham.surgery.shrinking import cost
from ockham.zoo.paper import CharTransformer

RESULTS = Path(__file__).parent / "results" / "transformer"
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
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if i % 500 == 0:
            print(f"  adam {i} of {steps}", flush=True)
    return model.eval()


def reduced(model: nn.Module, codes: Tensor, args: argparse.Namespace) -> ockham.Compressed:
    """IVON from the network's own curvature, rounds, structures."""
    torch.manual_seed(args.seed)
    few = list(Windows(codes, 30))
    start = ockham.laplace(model, few, structure="diagonal", n_data=len(codes), prior=1 / args.variance)

    def warm(network: nn.Module, training: ockham.Training, *, n_data: float, steps: int) -> ockham.IVON:
        named, prior = list(network.named_parameters()), ockham.FixedPrior(args.variance)
        optimizer = ockham.IVON(named, n_data=n_data, lr=args.rate, steps=steps, prior=prior, seed=args.seed,
                                temperature=args.temperature, initial_std=1e-3, betas=(0.9, args.beta2))  # fmt: skip
        optimizer.start_from(start)
        return optimizer

    loader = Windows(codes, args.refit // EPOCHS)
    job = ockham.Compression(
        model, loader, training=ockham.Training(epochs=EPOCHS, seed=args.seed), estimator=warm, n_data=len(codes),
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


def run(args: argparse.Namespace) -> None:
    name = f"{args.blocks}x{args.heads}.{args.steps}.{args.seed}"
    path = RESULTS / f"{name}.json"
    if path.exists() and not args.validate:
        return
    (codes, valid, test), alphabet = corpus(args.data)
    part = valid if args.validate else test
    torch.manual_seed(args.seed)
    first = CharTransformer(alphabet, CONTEXT, 128, args.blocks, args.heads)
    kept = RESULTS.parent / f"transformer.dense.{name}.pt"
    if kept.exists():
        first.load_state_dict(torch.load(kept, weights_only=True))
        dense = first.eval()
    else:
        dense = trained(copy.deepcopy(first), Windows(codes, args.steps), args.seed)
        if args.validate:
            torch.save(dense.state_dict(), kept)
    print(f"dense {nll(dense, part):.4f}", flush=True)
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ockham.OckhamWarning)
        found = reduced(dense, codes, args)
    example = codes[:CONTEXT].view(1, -1)
    total = sum(p.numel() for p in dense.parameters())
    alive = sum(int((p != 0).sum()) for p in found.model.parameters())
    record = {
        "blocks": args.blocks, "heads": args.heads, "steps": args.steps, "refit": args.refit, "price": args.price,
        "heads_factor": args.heads_factor,
        "seed": args.seed, "variance": args.variance, "temperature": args.temperature, "rate": args.rate,
        "beta2": args.beta2, "weights": total, "removed": 1 - alive / total,
        "parameters": sum(p.numel() for p in found.model.parameters()), "widths": widths(found.model),
        "macs": cost(found.model, example).macs / cost(dense, example).macs,
        "dense": nll(dense, part), "reduced": nll(found.model, part),
        "predictive": predictive_nll(found.model, found.posterior, part), "seconds": time.process_time() - began,
    }  # fmt: skip
    record["loss"] = record["reduced"] / record["dense"] - 1
    print(record, flush=True)
    if args.validate:
        return
    total_steps = args.steps + args.refit
    record["longer"] = nll(trained(first, Windows(codes, total_steps), args.seed), part) if args.longer else None
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    record |= {"date": f"{datetime.now(UTC):%Y-%m-%d}", "torch": torch.__version__, "commit": git.stdout.strip()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def table() -> str:
    lines = [
        "# A small transformer made smaller",
        "",
        "`python benchmarks/transformer.py`; tiny Shakespeare, NLL in nats per character of the last twentieth; one "
        "thread.",
        "",
        "| blocks x heads | steps | seed | dense NLL | dense, all steps | reduced NLL | change | predictive NLL "
        "| weights removed | parameters left | MACs left | heads left | hidden left |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        r = json.loads(path.read_text())
        said = "–" if r["longer"] is None else f"{r['longer']:.4f}"
        lines.append(
            f"| {r['blocks']} x {r['heads']} | {r['steps']} + {r['refit']} | {r['seed']} | {r['dense']:.4f} | {said} | "
            f"{r['reduced']:.4f} | {r['loss']:+.2%} | {r['predictive']:.4f} | "
            f"{r['removed']:.1%} | {r['parameters'] / r['weights']:.1%} | {r['macs']:.1%} | "
            f"{r['widths']['heads']} | {r['widths']['hidden']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2000, help="of Adam")
    parser.add_argument("--refit", type=int, default=4500, help="steps of IVON")
    parser.add_argument("--longer", action="store_true", help="train Adam for all of them, too")
    parser.add_argument("--variance", type=float, default=0.1, help="of the prior")
    parser.add_argument("--temperature", type=float, default=0.13)
    parser.add_argument("--beta2", type=float, default=0.9999, help="of IVON; the curvature starts warm")
    parser.add_argument("--rate", type=float, default=0.1, help="of IVON")
    parser.add_argument("--price", type=float, default=2.0, help="nats per parameter that a unit must be worth")
    parser.add_argument("--heads-factor", type=float, default=5.0, help="times as many that a head must be worth")
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.table:
        run(args)
    if any(RESULTS.glob("*.json")):
        (RESULTS.parent / "transformer.md").write_text(table())


if __name__ == "__main__":
    main()
