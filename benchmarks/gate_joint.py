"""One step beyond the second paper: the joint evidence of a structure from its gate and its weights, and layer scales.

    python benchmarks/gate_joint.py [--data PATH] --setting digits lenet-mnist --seed 0 1 2

Structures have a log-normal gate, weights a Gaussian posterior: mean-field (`MeanField`), trained together with the
gates, or the diagonal Laplace posterior of a network whose weights Adam has trained with the gates. After training,
structures are taken out in the order of each score, without refitting, and accuracy is read on validation images at
the same shares of structures removed for all scores. The scores of a structure, with w its outgoing weights:

* gate:    delta_f of the gate, a spike at e^-20;
* rate:    the same + ln P(off)/P(on) of its layer, learned from the delta_f of the layer (Beta(1, 1), fixed point);
* weights: sum of delta_f of w, w = 0;
* masked:  the same averaged over masks inside the unit (`unit_evidence`, p0 = 1/2);
* joint:   delta_f of the product theta w = 0, its posterior and its prior matched by a Gaussian in mean and covariance:
           mean E[theta] m, covariance E[theta^2] diag(v) + Var[theta] m m', prior variance E0[theta^2] v0;
* sum:     gate + weights, which counts the data twice;
* mean:    -E[theta], and norm: -E[theta] |m| over the mean of the layer, as plain orders; random.

Priors of mean-field weights: a fixed one (variance 1), and a scale per layer that is learned with them: a hyper-prior
(`LayerScale`), and the variance of the highest evidence (`EmpiricalBayes`).
Digits: 60 epochs, the last 300 training images judge. LeNet-5 on 32 x 32 MNIST: 8 epochs on 20,000 images, 3,000 others
judge.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ockham
from bmrs_networks import lenet5
from harness import DATA, SEEDS, Benchmark, Option, Record, section
from ockham.choose.units import unit_evidence
from ockham.core.posterior import Posterior
from ockham.evidence.gaussian import delta_f
from ockham.methods.gates import lognormal
from ockham.methods.gates.attach import Gates
from ockham.methods.gates.report import gated_without
from ockham.zoo.data import Batches, digits
from ockham.zoo.networks import NETWORKS

SHARES = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95)
PRIORS: dict[str, Callable[[], Any]] = {
    "fixed 1": lambda: ockham.FixedPrior(1.0),
    "layer scale": ockham.LayerScale,
    "empirical scale": lambda: ockham.EmpiricalBayes(0.1),
    "laplace": lambda: None,
}
SCORES = ("gate", "rate", "weights", "masked", "joint", "sum", "mean", "norm", "random")


def held_out(setting: str, root: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and validation images; the test set is not read."""
    if setting == "digits":
        d = digits()
        return d.train_x[:-300], d.train_y[:-300], d.train_x[-300:], d.train_y[-300:]
    from bmrs import prepared

    x, y, _, _ = prepared(root, "mnist")
    return x[:20_000], y[:20_000], x[-3_000:], y[-3_000:]


def trained(setting: str, prior: str, seed: int, data: tuple[Tensor, ...]) -> tuple[Gates, Posterior]:
    """Weights by MeanField (or Adam) and gates by Adam, together; the posterior means are in the network."""
    torch.manual_seed(1000 + seed)
    model: nn.Module = NETWORKS["digits_mlp"]() if setting == "digits" else lenet5()
    epochs, batch, rate, gate_rate = (60, 64, 5e-3, 10.0) if setting == "digits" else (8, 128, 3e-3, 5.0)
    x, y = data[:2]
    gates, n = ockham.attach_gates(model, x[:2]), len(x)
    loader = Batches(x, y, batch, shuffle=True)
    steps = epochs * len(loader)
    weights = [(k, p) for k, p in model.named_parameters() if not k.startswith("ockham_gates")]
    if prior == "laplace":
        optimizer: Any = torch.optim.Adam([p for _, p in weights], rate)
    else:
        given = {"prior": PRIORS[prior](), "kl_warmup": steps // 4, "prior_interval": max(1, len(loader) // 2)}
        optimizer = ockham.MeanField(weights, n_data=n, lr=rate, seed=seed, **given)
    sampled = getattr(optimizer, "sampled", contextlib.nullcontext)
    adam = torch.optim.Adam(gates.parameters(), rate * gate_rate)
    torch.manual_seed(seed)
    model.train()
    for step, (bx, by) in enumerate(b for _ in range(epochs) for b in loader):
        fall = min(1.0, 2 * (1 - step / steps))
        for part, lr in ((optimizer, rate), (adam, rate * gate_rate)):
            part.zero_grad()
            for group in part.param_groups:
                group["lr"] = lr * fall
        with sampled():
            loss = nn.functional.cross_entropy(model(bx), by)
            (loss + min(1.0, 4 * step / steps) * gates.kl() / n).backward()
        optimizer.step()
        adam.step()
    if prior != "laplace":
        return gates, optimizer.posterior()
    for parameter in gates.parameters():
        parameter.requires_grad_(False)
    return gates, ockham.laplace(model, Batches(x[:5000], y[:5000], 500, shuffle=False), structure="diagonal", n_data=n)


def dense(values: Tensor, keep: Tensor) -> Tensor:
    """Values of the living weights, flat over the whole parameter."""
    wide = torch.zeros(keep.numel(), dtype=torch.float64)
    wide[keep.reshape(-1)] = values.double().reshape(-1)
    return wide


@torch.no_grad()
def scores(gates: Gates, posterior: Posterior, seed: int) -> dict[str, Tensor]:
    """Each score of all gates, positive or larger: goes."""
    noise, count = gates.noise, gates.noise.mean.numel()
    mean, std = noise.mean.double(), noise.std.double()
    found = {k: torch.zeros(count, dtype=torch.float64) for k in SCORES}
    found["gate"] = lognormal.delta_f_n(mean, std)
    found["mean"] = -lognormal.moment(mean, std, 1)
    found["random"] = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    prior_second = lognormal.moment(torch.tensor([-10.0], dtype=torch.float64), torch.tensor([1e6]), 2)
    for group, places in gates.places.items():
        rows = [_row(posterior, name, at) for name, at in gates.groups[group].outgoing_cuts()]
        m, p, p0 = (torch.cat([r[i] for r in rows], 1) for i in range(3))
        each = delta_f(m, p, p0)
        found["weights"][places] = each.sum(1)
        found["masked"][places] = -unit_evidence(each).sum(1)
        first, second = (lognormal.moment(mean[places], std[places], k).unsqueeze(1) for k in (1, 2))
        found["joint"][places] = product_delta_f(m, 1 / p, prior_second / p0, first, second)
        size = (first * m).norm(dim=1)
        found["norm"][places] = -size / size.mean()
        found["rate"][places] = found["gate"][places] + log_odds_off(found["gate"][places])
    found["sum"] = found["gate"] + found["weights"]
    return found


def log_odds_off(delta: Tensor, strength: float = 1.0) -> float:
    """Ln P(off)/P(on) of a layer: the fixed point of the mean posterior probability of being off."""
    odds = 0.0
    for _ in range(300):
        off = float(torch.sigmoid(odds + delta).sum())
        odds = math.log(off + strength) - math.log(len(delta) - off + strength)
    return odds


def product_delta_f(m: Tensor, v: Tensor, prior: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Savage-Dickey at theta w = 0 of the Gaussian with the moments of theta w, over the prior's; [units]."""
    diagonal, centre = second * v, first * m
    spread = (second - first.square()).clamp_min(0.0)
    inner = (m.square() / diagonal).sum(1)
    log_det = diagonal.log().sum(1) + torch.log1p(spread.squeeze(1) * inner)
    # Sherman-Morrison: centre = first m lies along the rank-one part
    power = first.squeeze(1).square() * inner / (1 + spread.squeeze(1) * inner)
    assert centre.shape == m.shape
    return 0.5 * (prior.log().sum(1) - log_det - power)


def _row(posterior: Posterior, name: str, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    g = posterior[name]
    prior = g.prior_precision if isinstance(g.prior_precision, Tensor) else torch.tensor(float(g.prior_precision))
    wide = [dense(v.expand_as(g.mean), g.keep)[at] for v in (g.mean, g.precision, prior)]
    return wide[0], wide[1], wide[2]


def keep_of(gates: Gates, score: Tensor, removed: int) -> dict[str, Tensor]:
    """The highest scores go, one structure of a group stays."""
    keep = {k: torch.ones(len(p), dtype=torch.bool) for k, p in gates.places.items()}
    where = {int(p): (k, i) for k, places in gates.places.items() for i, p in enumerate(places)}
    for place in score.argsort(descending=True).tolist():
        group, unit = where[place]
        if removed and int(keep[group].sum()) > 1:
            keep[group][unit] = False
            removed -= 1
    return keep


@torch.no_grad()
def accuracy(gates: Gates, keep: Mapping[str, Tensor], x: Tensor, y: Tensor) -> float:
    with gated_without(gates, keep) as model:
        return float(torch.cat([model(part).argmax(1) for part in x.split(1000)]).eq(y).double().mean())


def measured(setting: str, prior: str, seed: int, root: Path) -> Record:
    data = held_out(setting, root)
    gates, posterior = trained(setting, prior, seed, data)
    found, total = scores(gates, posterior, seed), gates.noise.mean.numel()

    def left(score: Tensor, gone: int) -> float:
        return accuracy(gates, keep_of(gates, score, gone), *data[2:])

    released = {"gate as released": found["gate"] + 0.9189385}
    stops = {k: found[k] for k in ("gate", "rate", "weights", "masked", "joint", "sum")} | released
    gone = {k: int((score >= 0).sum()) for k, score in stops.items()}
    return {
        "setting": setting, "prior": prior, "seed": seed, "gates": total,
        "whole": accuracy(gates, gates.keep, *data[2:]),
        "accuracy": {k: [left(score, round(s * total)) for s in SHARES] for k, score in found.items()},
        "stop": {k: [gone[k] / total, left(score, gone[k])] for k, score in stops.items()},
    }  # fmt: skip


def run(args: argparse.Namespace) -> None:
    for seed, setting, prior in itertools.product(args.seed, args.setting, args.prior):
        what = {"setting": setting, "prior": prior, "seed": seed}
        BENCH.record(f"{setting}.{prior}.{seed}", partial(measured, root=args.data, **what), **what)


def pages() -> dict[str, list[str]]:
    records = list(BENCH.records().values())
    said = """\
`python benchmarks/gate_joint.py`; validation accuracy, percent, mean over seeds, after taking structures out
in the order of each score without refitting; last column: what the score removes by itself (>= 0)."""
    rows = []
    for setting, prior in sorted({(r["setting"], r["prior"]) for r in records}):
        found = [r for r in records if (r["setting"], r["prior"]) == (setting, prior)]
        whole = statistics.mean(100 * r["whole"] for r in found)
        for name in (*SCORES, "gate as released"):
            at = [f"{100 * statistics.mean(r['accuracy'][name][i] for r in found):.2f}" if name in SCORES else "–"
                  for i in range(len(SHARES))]  # fmt: skip
            stop = "–"
            if name in found[0]["stop"]:
                gone, left = (100 * statistics.mean(r["stop"][name][i] for r in found) for i in (0, 1))
                stop = f"{gone:.1f} % gone, {left:.2f}"
            rows.append([f"{setting} (nothing removed: {whole:.2f})", prior, len(found), name, *at, stop])
    heads = [f"{100 * s:.0f} % removed" for s in SHARES]
    head = ["setting", "prior", "seeds", "score", *heads, "by itself"]
    return {"gate_joint.md": section("# Joint evidence of gate and weights", said, head, rows)}


BENCH = Benchmark(
    __file__, __doc__, run, pages, data=DATA, seed=SEEDS,
    setting=Option(["digits"], choices=("digits", "lenet-mnist")), prior=Option(list(PRIORS), choices=PRIORS),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
