"""`ockham.prune` on architectures nobody here wrote: a share, a pattern and whole units, each checked from outside.

The right answer never comes from Ockham: zeros are counted in the parameters, and a network that lost units is compared
with one of the old widths that holds its weights, and zeros elsewhere.

    python benchmarks/prune_families.py [NAME ...] [--limit 240] [--again]

Architectures are those of `families.py`, five batches each. Weights are as they are initialised: nothing is learned
about quality here.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import ockham
from families import Make, call, tried, zeroed
from harness import Benchmark, Option, Record, markdown
from ockham.surgery.copies import difference

TARGETS: dict[str, dict[str, Any]] = {
    "half": {"keep_share": 0.5},
    "2:4": {"pattern": "2:4"},
    "units": {"structure": "uneven", "budget": {"params": "90%"}},
    "depth": {"structure": "depth", "budget": {"params": "95%"}},
}


def calibration(inputs: Any, count: int = 5) -> list[Any]:
    """Batches like the given one: tokens in another order, numbers with noise."""

    def like(t: Any, generator: torch.Generator) -> Any:
        if not isinstance(t, Tensor):
            return t
        if t.is_floating_point():
            return t + 0.1 * torch.randn(t.shape, generator=generator)
        return t[:, torch.randperm(t.shape[1], generator=generator)] if t.ndim == 2 and int(t.max()) > 1 else t

    found: list[Any] = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        if isinstance(inputs, dict):
            found.append({k: like(v, generator) for k, v in inputs.items()})
        else:
            made = tuple(like(v, generator) for v in (inputs if isinstance(inputs, (tuple, list)) else (inputs,)))
            found.append(made[0] if len(made) == 1 else ockham.Batch(made))
    return found


def examine(make: Make) -> Record:
    """Return what happened to one architecture under every target."""
    torch.manual_seed(0)
    try:
        net, inputs = make()
        net.eval()
        call(net, inputs[0])
    except Exception as error:
        return {"verdict": "not built", "why": f"{type(error).__name__}: {str(error)[:200]}"}
    facts: dict[str, Any] = {}
    before = {k: v.clone() for k, v in net.state_dict().items()}
    verdict = "ok"
    for name, target in TARGETS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                done = ockham.prune(net, calibration(inputs[0]), **target)
            wrong = fault(net, done, inputs, name)
            facts[name] = wrong or "ok"
            verdict = "wrong" if wrong else verdict
        except ockham.OckhamError as error:
            facts[name] = f"refused: {str(error)[:200]}"
            verdict = "refused" if verdict == "ok" else verdict
        except Exception as error:
            facts[name] = f"raw {type(error).__name__}: {str(error)[:200]}"
            verdict = "raw exception"
    if any(not torch.equal(v, net.state_dict()[k]) for k, v in before.items()):
        verdict = "wrong"
        facts["why"] = "the original was changed"
    return {"verdict": verdict, **facts}


def fault(net: nn.Module, done: Any, inputs: list[Any], name: str) -> str:
    """What is wrong with a reduced network; nothing where it is right."""
    found = call(done.model, inputs[0])
    if not all(bool(torch.isfinite(f).all()) for f in found):
        return "answers are not finite"
    if name in ("units", "depth"):
        if not (done.plan.removed or done.plan.dropped):
            return "nothing went"
        worst = max(difference(call(widened(net, done), given), call(done.model, given)) for given in inputs)
        return "" if worst <= 1e-4 else f"masked and shrunk differ by {worst:.2g}"
    matrices = {k.partition("[")[0] for k in done.shares}
    if not matrices:
        raise ockham.OckhamError("no calibration data reach its matrices, which said so in a warning")
    zeros = sum(int((done.model.get_parameter(k) == 0).sum()) for k in matrices)
    share = 1 - zeros / sum(done.model.get_parameter(k).numel() for k in matrices)
    allowed = 0.02 if name == "half" else 0.0
    return "" if share <= 0.5 + allowed and share >= 0.4 else f"{share:.3f} of the weights are left"


def widened(net: nn.Module, done: Any) -> nn.Module:
    """A network of the old widths with the small one's weights, and zeros for what went."""
    full = zeroed(net, done.plan)
    small = {**dict(done.model.named_parameters()), **dict(done.model.named_buffers())}  # BatchNorm's are taken anew
    if done.plan.dropped:  # layers move up where a list is shortened: numbers for names say from where
        names = [n for n, _ in net.named_parameters()]
        _, now = ockham.shrink(net, done.plan, posterior={n: torch.tensor([i, i]) for i, n in enumerate(names)})
        small = {names[int(i[0])]: small[n] for n, i in now.items()}
    with torch.no_grad():
        for name, p in [*full.named_parameters(), *full.named_buffers()]:
            if name in small and small[name].shape != p.shape:
                index = [done.plan.kept(name, d) for d in range(p.ndim)]
                p.zero_()[torch.meshgrid(*index, indexing="ij")] = small[name]
            elif name in small:
                p.copy_(small[name])
    return full.eval()


def pages() -> dict[str, list[str]]:
    """Return the results as a table in Markdown."""
    rows = dict(sorted(BENCH.records("prune_families").get("prune_families", {}).items()))
    counts: dict[str, int] = {}
    for row in rows.values():
        counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
    said = ", ".join(f"{n} {v}" for v, n in sorted(counts.items(), key=lambda c: -c[1]))
    cells = ("verdict", *TARGETS, "why")
    every = [
        [name, *(str(row.get(k, "")).replace("|", "/").replace("\n", " ") for k in cells)] for name, row in rows.items()
    ]
    head = "architecture | verdict | half of the weights | 2:4 | units, 90 % of the parameters | blocks, 95 % | why"
    lines = ["# `ockham.prune` on families", "", f"{BENCH.written()}.", "", f"{len(rows)} architectures: {said}.", ""]
    return {"prune_families.md": [*lines, *markdown(head, every)]}


def run(args: argparse.Namespace) -> None:
    """Run what is asked for; fail where a network came out wrong or an error was no message of ours."""
    tried(BENCH, "prune_families", args, examine)
    rows = BENCH.records("prune_families").get("prune_families", {})
    bad = [f"{n}: {row['verdict']}" for n, row in rows.items() if row["verdict"] in ("wrong", "raw exception")]
    if bad:
        sys.exit("prune_families: " + ", ".join(bad))


BENCH = Benchmark(
    __file__, __doc__, run, pages, folder="",
    names=Option([], "architectures to try again", word=True),
    limit=Option(240, "seconds of CPU time for one network"),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
