"""MNIST with few hundred weights: 784-400-400-10, spike-and-slab, a budget reached gradually.

    python benchmarks/spike_slab_mnist.py --data PATH/mnist --validate --tag .a [--epochs 28 ...]   # settings
    python benchmarks/spike_slab_mnist.py --data PATH/mnist --seed 0                                # the row

A run is resumable: with --minutes it stops at the next epoch and goes on where it was. Settings were chosen on the last
10,000 training images (--validate trains on the others); a row reads the test set once, at its end.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from ockham.choose.prices import FlatPrice, Structures
from ockham.choose.rules import BudgetRule, Evidence, Rounds, Rule
from ockham.choose.units import living
from ockham.core.files import read_tree, write_tree
from ockham.methods.laplace.posterior import Correlated
from ockham.methods.spike_slab.optimizer import spike_slab
from ockham.methods.spike_slab.priors import FixedSpikeSlab, LearnedSpikeSlab, MedianRule
from ockham.run.compression import Compression, Training
from ockham.run.folder import stored_values
from ockham.run.measure import mean_predictor, measures, posterior_predictor
from ockham.zoo.data import Batches, load_folder

RESULTS = Path(__file__).parent / "results" / "spike_slab"


def network(hidden: list[int]) -> nn.Module:
    """Rectifiers between fully connected layers."""
    sizes = [784, *hidden, 10]
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(a, b)] + ([nn.ReLU()] if i + 2 < len(sizes) else [])
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class LivingBudget(Rule):
    """A budget of weights on living paths, ordered by signal to noise.

    The way there: ``first`` weights at once, then the same share every round.
    """

    count: int
    first: int

    def decide(self, evidence: Evidence, protected: Collection[str] = (), progress: float = 1.0) -> dict:
        """The most salient weights that make ``count`` on living paths."""
        alive = evidence.posterior.kept()
        target = min(alive, round(self.count * (self.first / self.count) ** (1 - progress)))
        low, high = target, alive
        best = living(BudgetRule(target).decide(evidence))
        while high - low > 1:
            middle = (low + high) // 2
            found = living(BudgetRule(middle).decide(evidence))
            if sum(int(m.sum()) for m in found.values()) <= target:
                low, best = middle, found
            else:
                high = middle
        return best


def job_of(args: argparse.Namespace, x: torch.Tensor, y: torch.Tensor) -> Compression:
    p0 = args.inclusion
    prior = LearnedSpikeSlab(slab_variance=args.slab) if not p0 else FixedSpikeSlab(p0, args.slab)
    training = Training(
        args.epochs,
        args.lr,
        hold=args.hold,
        prior=prior,
        kl_warmup=args.warmup,
        seed=args.seed,
        temperature=args.temperature,
    )
    torch.manual_seed(args.seed)
    return Compression(
        network(args.hidden),
        Batches(x, y, args.batch, shuffle=True),
        training=training,
        rounds=Rounds(args.start, args.end, args.count),
        rule=LivingBudget(args.keep, args.first) if args.keep else MedianRule(),
        n_data=len(x),
        estimator=spike_slab,
        structures=Structures(price=FlatPrice(0.0), cap=0.01, wait=0),  # units that nobody reads
        correlated=Correlated(args.correlated) if args.correlated else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, nargs="+", default=[400, 400])
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--hold", type=float, default=0.6)
    parser.add_argument("--warmup", type=float, default=0.2)
    parser.add_argument("--slab", type=float, default=0.3)
    parser.add_argument("--inclusion", type=float, default=0.01, help="fixed prior inclusion; 0: learned")
    parser.add_argument("--keep", type=int, default=899, help="weights that stay; 0: the median model")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--start", type=float, default=0.06)
    parser.add_argument("--end", type=float, default=0.67)
    parser.add_argument("--count", type=int, default=23)
    parser.add_argument("--first", type=int, default=9600, help="weights that the first round leaves")
    parser.add_argument("--correlated", type=int, default=5000, help="so many living weights are scored together")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--work", type=Path, default=Path("runs/spike_slab_mnist"), help="folder of checkpoints")
    parser.add_argument("--tag", default="")
    args = parser.parse_args()
    began, cpu = time.monotonic(), time.process_time()
    name = f"mnist{'.validate' if args.validate else ''}{args.tag}.{args.seed}"
    if (RESULTS / f"{name}.json").exists():
        return
    data = load_folder(args.data)
    cut = len(data.train_x) - 10_000 if args.validate else len(data.train_x)
    job = job_of(args, data.train_x[:cut], data.train_y[:cut])
    checkpoint, spent = args.work / f"{name}.safetensors", 0.0
    if checkpoint.exists():
        saved = read_tree(checkpoint, kind="benchmark")
        spent = saved["spent"]
        job.load({**saved["state"], **json.loads(saved["plain"])})
    for p in job:
        print(f"epoch {p.epoch} loss {p.loss:.4f} acc {p.accuracy:.4f} kept {p.kept_share * 478410:.0f}", flush=True)
        if time.monotonic() - began > 60 * args.minutes and p.epoch < args.epochs:
            state = job.state()
            plain = json.dumps({k: state.pop(k) for k in ("reducer", "epochs", "structures")})
            tree = {"state": state, "plain": plain, "spent": spent + time.process_time() - cpu}
            args.work.mkdir(parents=True, exist_ok=True)
            write_tree(checkpoint, tree, kind="benchmark")
            return
    result = job.result()
    x, y = (data.train_x[cut:], data.train_y[cut:]) if args.validate else (data.test_x, data.test_y)
    found = {
        "mean_network": measures(mean_predictor(result.model, classify=True), x, y, noise_variance=None),
        "posterior": measures(
            posterior_predictor(result.model, result.posterior, classify=True, draws=50), x, y, noise_variance=None
        ),
    }
    record = {
        "hidden": args.hidden,
        "seed": args.seed,
        "weights": stored_values(result.model),
        "inputs": int(result.posterior["1.weight"].keep.any(0).sum()),
        "error": {k: 100 * (1 - v["accuracy"]) for k, v in found.items()},
        **found,
        "free_energy": [r.free_energy for r in result.rounds],
        "settings": {k: str(v) for k, v in vars(args).items() if k not in ("data", "work", "minutes", "tag")},
        "cpu_seconds": spent + time.process_time() - cpu,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(name, record["weights"], record["inputs"], record["error"], flush=True)
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
