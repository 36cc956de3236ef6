"""The first paper's table: MAP, mean-field, horseshoe, and model reduction in four forms, on its networks.

    python benchmarks/bmr.py --data PATH [--preset lenet-fashion ...] [--method bmr ...] [--seed 0 1 2] [--table]

All methods get the same number of steps, the same schedule (constant, then linear to 0 over the last half) and the same
search: three learning rates, a tenth of the epochs each, chosen on the NLL of the last 10,000 training images, which no
run trains on. The test set is read once, at the end of a run. Predictions average 20 draws (MAP: none). "seconds" is
processor time of the final run, "peak MB" the largest resident set of its process. ECE has 20 bins of equal mass, as in
the paper.

map           Adam with the prior as weight decay
mean-field    MeanField, layer scales c^-2 ~ Gamma(2, 2), 1/10 in hidden layers, 1 in the last
horseshoe     MeanField on the non-centred regularised horseshoe ("Tiered")
bmr           MeanField, prior N(0, 0.3), rounds, removal where delta_f > 0 (`ockham.compress`)
bmr-capped    the same with the preset that held-out images chose for the main job on Fashion-MNIST: prior N(0, 0.4),
              first round after a twentieth of the epochs, at most half of the living weights a round
bmr-published mean-field's prior; every epoch of the second half, log-odds of the released code
bmr-rhs       mean-field's prior; rounds; the horseshoe as reduced prior, fitted on evidence
ivon-bmr      IVON, prior N(0, 0.3), rounds, removal where delta_f > 0
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ockham
from harness import DATA, SEEDS, Benchmark, Option, Record, section, span
from ockham.choose.rules import EvidenceRule, Rule
from ockham.core.likelihood import Classification
from ockham.core.posterior import Posterior
from ockham.evidence.gaussian import beta_log_odds_published, delta_f
from ockham.fit.optimizer import VariationalOptimizer
from ockham.fit.priors import FixedPrior, LayerScale
from ockham.methods.horseshoe import HorseshoeNetwork, fit_horseshoe
from ockham.run.compression import Training, WeightRounds
from ockham.run.engine import Engine, Task
from ockham.run.measure import classification_summary, ece_equal_mass, mean_predictor, posterior_predictor
from ockham.zoo.data import Batches, Dataset, load_folder
from ockham.zoo.networks import NETWORKS

HELD_OUT = 10_000
DRAWS = 20


@dataclass(frozen=True)
class Preset:
    """A network, its data and the length of a run."""

    network: str
    data: str
    epochs: int
    batch: int = 120
    device: str = "cpu"


PRESETS = {
    "lenet-fashion": Preset("lenet_tanh", "fashion-mnist", 20),
    "mlp-fashion": Preset("mlp_swish", "fashion-mnist", 20),
    **{
        f"{net}-{data}-paper": Preset(NETWORKS[name].__name__, folder, 50, device="cuda")
        for net, plain in (("lenet", "lenet_tanh"), ("mlp", "mlp_swish"), ("vit", "vit"), ("mixer", "mixer"))
        for data, folder, name in (("fashion", "fashion-mnist", plain), ("cifar10", "cifar10", f"{plain}_cifar"))
    },
}


class PublishedRule(Rule):
    """delta_f above the log-odds that the released code iterates, per tensor, removed weights in the sums."""

    def decide(self, evidence: Any, protected: Any = (), progress: float = 1.0) -> dict[str, Tensor]:
        """Masks."""
        masks = {}
        for name, delta in evidence.items():
            keep = evidence.posterior[name].keep
            every = torch.zeros(keep.shape, dtype=delta.dtype)
            every[keep] = delta
            masks[name] = keep & ~(every > beta_log_odds_published(every))
        return masks


class HorseshoeRule(Rule):
    """The spike against the horseshoe fitted to the matrix; vector parameters by delta_f > 0."""

    def decide(self, evidence: Any, protected: Any = (), progress: float = 1.0) -> dict[str, Tensor]:
        """Masks."""
        masks = {}
        for name, delta in evidence.items():
            g = evidence.posterior[name]
            gone = torch.zeros_like(g.keep)
            if g.mean.ndim < 2 or not bool(g.keep.any()):
                gone[g.keep] = delta > 0
            else:
                prior = g.prior_precision.expand(g.mean.shape)
                held = g.precision.where(g.keep, prior)  # a removed weight says nothing: its posterior is the prior
                fit = fit_horseshoe(g.mean, held, prior, steps=200)
                reduced = torch.maximum(fit.precision, prior - 0.999 * held)[g.keep]
                gone[g.keep] = delta > delta_f(g.mean[g.keep], g.precision[g.keep], prior[g.keep], reduced)
            masks[name] = g.keep & ~gone
        return masks


class WithEnergy(Classification):
    """Cross-entropy plus the energy of the horseshoe's scales per example."""

    def __init__(self, net: HorseshoeNetwork, n_data: int) -> None:
        super().__init__()
        self._net, self._n = [net], n_data  # a list, so that the network is no part of the likelihood

    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of the block."""
        plain = super().nll(output, target)
        return plain + self._net[0].energy() / self._n if torch.is_grad_enabled() else plain


@dataclass
class Arm:
    """What a method is made of."""

    network: nn.Module
    optimizer: VariationalOptimizer
    rule: Rule | None = None
    rounds: ockham.Rounds | None = None

    def optimizer_(self, network: nn.Module, training: Training, **_: Any) -> VariationalOptimizer:
        """The one that there is, as an estimator of `WeightRounds`."""
        return self.optimizer


def _scales(network: nn.Module) -> list[dict]:
    """Parameter groups of the first paper: scale 1/10 in hidden layers, 1 in the last."""
    named = list(network.named_parameters())
    last = [p for p in named if p[0].rpartition(".")[0] == named[-1][0].rpartition(".")[0]]
    hidden = [p for p in named if all(p[0] != q[0] for q in last)]
    return [{"params": hidden, "prior": LayerScale(0.1)}, {"params": last, "prior": LayerScale(1.0)}]


def _mean_field(network: nn.Module, lr: float, n: int, steps: int) -> ockham.MeanField:
    return ockham.MeanField(_scales(network), n_data=n, lr=lr, kl_warmup=steps // 10)


def build(method: str, network: nn.Module, lr: float, n: int, steps: int) -> Arm:  # noqa: PLR0911
    """Network, optimizer and rule of a method."""
    named, half = list(network.named_parameters()), ockham.Rounds(start=0.5, end=0.9, count=20, patience=99)
    fixed = FixedPrior(0.3)
    match method:
        case "map":
            return Arm(network, ockham.PointEstimate(named, n_data=n, lr=lr, prior_variance=0.3))
        case "mean-field":
            return Arm(network, _mean_field(network, lr, n, steps))
        case "horseshoe":
            net = ockham.horseshoe(network)
            return Arm(net, ockham.MeanField(net.groups(), n_data=n, lr=lr, kl_warmup=steps // 10))
        case "bmr":
            opt = ockham.MeanField(named, n_data=n, lr=lr, prior=fixed, kl_warmup=steps // 10)
            return Arm(network, opt, EvidenceRule(), ockham.Rounds())
        case "bmr-capped":
            opt = ockham.MeanField(named, n_data=n, lr=lr, prior=FixedPrior(0.4), kl_warmup=steps // 10)
            return Arm(network, opt, EvidenceRule(cap=0.5), ockham.Rounds(start=0.05))
        case "bmr-published":
            return Arm(network, _mean_field(network, lr, n, steps), PublishedRule(), half)
        case "bmr-rhs":
            return Arm(network, _mean_field(network, lr, n, steps), HorseshoeRule(), ockham.Rounds(count=5))
        case "ivon-bmr":
            opt = ockham.IVON(named, n_data=n, lr=lr, prior=fixed, steps=steps, kl_warmup=steps // 10)
            return Arm(network, opt, EvidenceRule(), ockham.Rounds(start=0.4))
    raise KeyError(method)


ADAM_RATES, IVON_RATES = (1e-3, 2e-3, 5e-3), (0.03, 0.1, 0.3)
METHODS = ("map", "mean-field", "horseshoe", "bmr", "bmr-capped", "bmr-published", "bmr-rhs", "ivon-bmr")


def train(method: str, preset: Preset, data: Dataset, lr: float, epochs: int, seed: int, *, reduce: bool) -> Arm:
    """One run on all but the held-out images."""
    torch.manual_seed(seed)
    network = NETWORKS[preset.network]().to(preset.device)
    x, y = (t[:-HELD_OUT].to(preset.device) for t in (data.train_x, data.train_y))
    loader = Batches(x, y, preset.batch, shuffle=True)
    arm = build(method, network, lr, len(x), len(loader) * epochs)
    horseshoe = isinstance(arm.network, HorseshoeNetwork)
    likelihood = WithEnergy(arm.network, len(x)) if horseshoe else Classification()
    task = Task.of(arm.network, loader, likelihood, epochs=epochs, n_data=len(x))
    training = Training(epochs=epochs, seed=seed)
    rounds = WeightRounds(training, arm.rule or EvidenceRule(), arm.rounds or ockham.Rounds(), estimator=arm.optimizer_)
    engine = Engine(rounds, arm.network, task, seed=seed)
    for _ in range(epochs):
        step = engine.epoch if reduce and arm.rule is not None else engine.trainer.epoch
        engine.state, info = step(engine.state)
        kept = f", kept {info.kept_share:.4f}" if info.round else ""
        print(f"  {method} lr {lr:g} epoch {info.epoch}: {info.loss:.4f} {info.accuracy:.4f}{kept}", flush=True)
    return arm


def predicted(arm: Arm, x: Tensor) -> Tensor:
    """Log probabilities of the posterior predictive."""
    if isinstance(arm.optimizer, ockham.PointEstimate):
        return mean_predictor(arm.network.eval(), likelihood="classification")(x)
    posterior, told = arm.optimizer.posterior(), {"likelihood": "classification", "draws": DRAWS}
    return posterior_predictor(arm.network.eval(), posterior, **told)(x)


def search(method: str, preset: Preset, data: Dataset, seed: int) -> Record:
    """The learning rate with the best NLL on the held-out images after a tenth of the epochs, without removal."""
    found = {}
    x, y = data.train_x[-HELD_OUT:], data.train_y[-HELD_OUT:]
    for rate in IVON_RATES if method == "ivon-bmr" else ADAM_RATES:
        try:
            arm = train(method, preset, data, rate, max(1, preset.epochs // 10), seed, reduce=False)
            nll = classification_summary(predicted(arm, x), y).nll
        except ockham.NonFiniteLossError:
            nll = math.inf
        found[f"{rate:g}"] = nll if math.isfinite(nll) else 1e9
    return {"lr": float(min(found, key=found.__getitem__)), "nll": found}


def run(args: argparse.Namespace) -> None:
    for seed in args.seed:
        for name in args.preset:
            for method in args.method:
                what = {"preset": name, "method": method, "seed": seed}
                BENCH.record(f"{name}.{method}.{seed}", partial(measured, args.data, *what.values()), **what)


def measured(folder: Path, name: str, method: str, seed: int) -> Record:
    preset = PRESETS[name]
    data = load_folder(folder / preset.data)
    lr = BENCH.record(f"{name}.{method}.rate", partial(search, method, preset, data, 0))["lr"]  # once, with seed 0
    began = time.process_time()
    arm = train(method, preset, data, lr, preset.epochs, seed, reduce=True)
    seconds = time.process_time() - began
    logs = predicted(arm, data.test_x)
    measures = classification_summary(logs, data.test_y).to_dict()
    return {
        "preset": name, "method": method, "seed": seed, "epochs": preset.epochs, "lr": lr, "removed": removed(arm),
        "seconds": round(seconds, 1),
        "measures": measures | {"ece_20_mass": ece_equal_mass(logs.exp(), data.test_y, bins=20)},
    }  # fmt: skip


def removed(arm: Arm) -> float:
    """Zeros over all parameters of the original network."""
    if arm.rule is None:
        return 0.0
    posterior: Posterior = arm.optimizer.posterior()
    return 1 - posterior.kept() / sum(p.numel() for p in arm.network.parameters())


def pages() -> dict[str, list[str]]:
    rows = [
        _cells(name, method, list(found.values()))
        for name in PRESETS
        for method in METHODS
        if (found := BENCH.records(f"{name}.{method}.[0-9]*"))
    ]
    head = (
        "preset | method | seeds | epochs | lr | accuracy % | NLL | ECE (20 bins of equal mass) | removed % | seconds "
        "| peak MB"
    )
    said = "`python benchmarks/bmr.py`; means (and ranges) over seeds, last epoch; what the columns mean is said there."
    return {"bmr.md": section("# The first paper's table", said, head, rows)}


def _cells(name: str, method: str, rows: list[Record]) -> list[str]:
    m = [r["measures"] for r in rows]
    return [
        name, method, " ".join(str(r["seed"]) for r in rows), str(rows[0]["epochs"]), f"{rows[0]['lr']:g}",
        span([v["accuracy"] for v in m], 2, 100), *(span([v[k] for v in m], 4) for k in ("nll", "ece_20_mass")),
        *(span([r[k] for r in rows], d, t) for k, d, t in (("removed", 2, 100), ("seconds", 0, 1), ("peak_mb", 0, 1))),
    ]  # fmt: skip


BENCH = Benchmark(
    __file__, __doc__, run, pages, data=DATA, seed=SEEDS,
    preset=Option(["lenet-fashion"], choices=PRESETS), method=Option(list(METHODS), choices=METHODS),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
