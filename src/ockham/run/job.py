"""Stages of the command's job: search a learning rate, train by Adam, compress. Each is resumable at every epoch."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ockham.choose.prices import Structures
from ockham.choose.rules import Rounds, Rule
from ockham.core.files import SCHEMA, read_tree, write_bytes, write_json, write_tree
from ockham.core.likelihood import Likelihood, Regression
from ockham.core.names import Ignore
from ockham.errors import OckhamError
from ockham.methods.laplace.stage import OneShotStage
from ockham.report.html import write_report
from ockham.run.engine import Compressed, Compression
from ockham.run.estimators import Estimator, Training, mean_field
from ockham.run.facts import STRUCTURE, NetworkFacts, compressed_facts, input_inclusion, network_facts, structure_facts
from ockham.run.measure import mean_predictor, measures
from ockham.run.result import NETWORK, PLAN, POSTERIOR, fit_error, layer_rows, save_network, save_plan
from ockham.run.trainer import OnStep, Trainer
from ockham.version import __version__
from ockham.zoo.data import Batches, Dataset

__all__ = [
    "CHECKPOINT",
    "SEARCH_RATES",
    "AdamStage",
    "CompressStage",
    "Job",
    "OneShot",
    "Recipe",
    "Stage",
    "StageInfo",
    "as_plain",
    "rule_name",
    "search_rates",
    "settings_of",
    "structures_name",
]

SEARCH_RATES = (3e-4, 1e-3, 3e-3)
"""Learning rates tried for the Adam network, on a tenth of the training data held out."""


@dataclass(frozen=True, slots=True)
class OneShot:
    """Settings of a job that prunes a trained network once.

    Attributes:
        structure: of the Laplace posterior, "diagonal" or "kronecker".
        keep: share of the scored weights that stays; None: the evidence decides.
        epochs: of fine-tuning afterwards, 0 for none.
        learning_rate: of fine-tuning.
        structures: take whole units at this price and of such widths instead of single weights; None: single weights.
        macs: with structures, share of the multiply-accumulates that stays; None: the evidence decides.
    """

    structure: str
    keep: float | None = None
    epochs: int = 0
    learning_rate: float = 3e-4
    structures: Structures | None = None
    macs: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """What the job is about: how to build the network, the data, and the settings.

    Attributes:
        build: makes a fresh network; called under the job's seed.
        likelihood: makes a fresh likelihood.
        data: training and test examples.
        batch_size: examples a step.
        training: settings of the variational run.
        rounds: when weights go.
        rule: which go; None = the evidence decides.
        ignore: protected parameters.
        estimator: makes the optimizer.
        device: where to compute.
        structures: how whole channels, neurons and heads go, too; None: single weights only.
        one_shot: prune given weights once instead of training a posterior; None: train.
    """

    build: Callable[[], nn.Module]
    likelihood: Callable[[], Likelihood]
    data: Dataset
    batch_size: int
    training: Training
    rounds: Rounds
    rule: Rule | None = None
    ignore: Ignore = ()
    estimator: Estimator = mean_field
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    structures: Structures | None = None
    one_shot: OneShot | None = None

    def network(self) -> nn.Module:
        """A fresh network with the job's own initial weights, on the device; global randomness untouched."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.training.seed)
            return self.build().to(self.device)


@dataclass(frozen=True, slots=True)
class StageInfo:
    """One epoch of a stage, for the progress bar.

    Attributes:
        stage: its name.
        epoch: epochs done.
        epochs: planned.
        loss: mean NLL of the epoch.
        accuracy: training accuracy, nan without classes.
        kept_share: living weights over all.
    """

    stage: str
    epoch: int
    epochs: int
    loss: float
    accuracy: float
    kept_share: float


class Stage(Protocol):
    """What the job runs, one after another."""

    name: str
    on_step: OnStep | None

    def run(self) -> Iterator[StageInfo]:
        """The epochs that are still to do."""

    def state(self) -> dict[str, Any]:
        """Plain values and tensors."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from them."""


class AdamStage:
    """The same network trained by Adam, the yardstick.

    Args:
        name: of the stage.
        recipe: the job.
        rate: learning rate.
        epochs: how many.
        held_out: share of the training examples left out (for `score`), 0 for none.
    """

    def __init__(self, name: str, recipe: Recipe, *, rate: float, epochs: int, held_out: float = 0.0) -> None:
        self.name = name
        self.on_step: OnStep | None = None
        data, count = recipe.data, len(recipe.data.train_x)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(recipe.training.seed))
        cut = count - int(held_out * count)
        self._valid = order[cut:]
        x, y = (data.train_x, data.train_y) if not held_out else (data.train_x[order[:cut]], data.train_y[order[:cut]])
        self.model, self.likelihood = recipe.network(), recipe.likelihood().to(recipe.device)
        self._data = data
        fused = recipe.device.type in ("cpu", "cuda")
        optimizer = torch.optim.Adam(self.model.parameters(), lr=rate, fused=fused)
        loader = Batches(x, y, recipe.batch_size, shuffle=True)
        t = recipe.training
        self.trainer = Trainer(self.model, self.likelihood, optimizer, loader, epochs=epochs, hold=t.hold, seed=t.seed)

    @property
    def noise_variance(self) -> float | None:
        """Of a regression, else None."""
        return self.likelihood.noise_variance if isinstance(self.likelihood, Regression) else None

    def run(self) -> Iterator[StageInfo]:
        """Train."""
        while self.trainer.done < self.trainer.epochs:
            info = self.trainer.epoch(self.on_step)
            yield StageInfo(self.name, info.epoch, self.trainer.epochs, info.loss, info.accuracy, 1.0)

    def score(self) -> float:
        """NLL on the held-out examples."""
        x, y = self._data.train_x[self._valid], self._data.train_y[self._valid]
        noise = self.noise_variance
        return measures(mean_predictor(self.model, classify=noise is None), x, y, noise_variance=noise)["nll"]

    def state(self) -> dict[str, Any]:
        """Of the trainer."""
        return {"trainer": self.trainer.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue."""
        self.trainer.load(state["trainer"])


class CompressStage:
    """Variational training and reduction in rounds.

    Args:
        recipe: the job.
        start: weights to start from, or None.
    """

    def __init__(self, recipe: Recipe, start: Mapping[str, torch.Tensor] | None) -> None:
        self.name = "compress"
        self.on_step: OnStep | None = None
        model = recipe.network()
        if start is not None:
            model.load_state_dict(dict(start))
        loader = Batches(recipe.data.train_x, recipe.data.train_y, recipe.batch_size, shuffle=True)
        self.job = Compression(
            model,
            loader,
            likelihood=recipe.likelihood(),
            training=recipe.training,
            rounds=recipe.rounds,
            rule=recipe.rule,
            ignore=recipe.ignore,
            estimator=recipe.estimator,
            structures=recipe.structures,
        )
        self.kept: list[float] = []

    def run(self) -> Iterator[StageInfo]:
        """Train and reduce."""
        self.job.on_step = self.on_step
        for p in self.job:
            self.kept.append(p.kept_share)
            yield StageInfo(self.name, p.epoch, p.epochs, p.loss, p.accuracy, p.kept_share)

    def state(self) -> dict[str, Any]:
        """Of the job."""
        return {"job": self.job.state(), "kept": list(self.kept)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue."""
        self.job.load(state["job"])
        self.kept = list(state["kept"])


def search_rates(recipe: Recipe) -> Iterator[AdamStage]:
    """One short stage per learning rate of `SEARCH_RATES`: a tenth of the epochs, a tenth of the examples held out."""
    for rate in SEARCH_RATES:
        epochs = max(1, round(recipe.training.epochs / 10))
        yield AdamStage(f"search {rate:g}", recipe, rate=rate, epochs=epochs, held_out=0.1)


def as_plain(training: Training) -> dict[str, Any]:
    """Settings as JSON-able values, the prior by its type and numbers."""
    plain = {f.name: getattr(training, f.name) for f in fields(training)}
    shown = [f"{f.name}={getattr(training.prior, f.name):g}" for f in fields(training.prior) if f.repr]  # type: ignore[arg-type]
    return plain | {"prior": f"{type(training.prior).__name__}({', '.join(shown)})"}


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What the result folder says of a job's settings: those that had a part in it."""
    if recipe.one_shot is None:
        own = as_plain(recipe.training) | {"rule": rule_name(recipe.rule), **asdict(recipe.rounds)}
    else:
        own = asdict(replace(recipe.one_shot, structures=None))
        own = {"one_shot": own.pop("structure"), "seed": recipe.training.seed, **own}
    return own | {"batch_size": recipe.batch_size, "structures": structures_name(recipe.structures)}


def structures_name(structures: Structures | None) -> str:
    """How structures go, with its numbers, for the record and for telling jobs apart."""
    if structures is None:
        return "none"
    shown = f"{structures.price!r}, {structures.cut.__name__} cut, widths in steps of {structures.round_to}"
    inside = structures.inside.__qualname__.partition(".")[0]
    return f"{shown}, {inside}, cap {structures.cap:g}, after {structures.wait} round(s)"


def rule_name(rule: Rule | None) -> str:
    """A rule with its numbers and its order, for the record and for telling jobs apart."""
    if rule is None:
        return "EvidenceRule()"
    found: dict[str, Any] = {f.name: getattr(rule, f.name) for f in fields(rule)} if is_dataclass(rule) else {}
    shown = {k: getattr(v, "__qualname__", v) for k, v in found.items()}
    return f"{type(rule).__name__}({', '.join(f'{k}={v}' for k, v in shown.items())})"


CHECKPOINT = "checkpoint.safetensors"


@dataclass(slots=True, eq=False)
class Job:
    """Everything `ockham compress` does; iterate over `run` for progress.

    Attributes:
        recipe: network, data, settings.
        out: result folder.
        builder: label of the network, "zoo:name" or the user's "module:function".
        command: as typed, for the record.
        weights: start from these instead of from scratch; they are then also the network "before".
        baseline: train the same network by Adam for comparison (skipped when weights are given).
        draws: posterior draws of a prediction.
        ood: foreign inputs for the out-of-distribution measure; None: the test images with their pixels permuted.
        resume: continue from the checkpoint in ``out``.
        on_step: called within epochs.
    """

    recipe: Recipe
    out: Path
    builder: str
    command: str = ""
    weights: Mapping[str, Tensor] | None = None
    baseline: bool = True
    draws: int = 20
    ood: Tensor | None = None
    resume: bool = False
    on_step: Callable[[int, int, float], None] | None = None
    _facts: dict[str, Any] = field(default_factory=dict)
    _spent: float = 0.0

    def run(self) -> Iterator[StageInfo]:
        """Do the job, one epoch per item; at the end the folder is complete and the checkpoint gone.

        Raises:
            OckhamError: weights do not fit, the folder cannot be written, a checkpoint of another job.
        """
        started = time.monotonic()
        saved = self._begin()
        before = self._spent
        self._clock = lambda: before + time.monotonic() - started
        if self.weights is not None:
            yield from self._given(self.weights)
        elif self.baseline:
            yield from self._adam(saved)
        one_shot = self.recipe.one_shot is not None
        stage = (OneShotStage if one_shot else CompressStage)(self.recipe, self.weights)
        yield from self._go(stage, saved)
        self._finish(stage)

    # ------------------------------------------------------------------ stages
    def _adam(self, saved: Mapping[str, Any]) -> Iterator[StageInfo]:
        for stage in search_rates(self.recipe):
            if stage.name not in self._facts:
                yield from self._go(stage, saved)
                self._done(stage.name, {"nll": stage.score(), "rate": stage.trainer.optimizer.defaults["lr"]})
        if "adam" not in self._facts:
            rates = [f for name, f in self._facts.items() if name.startswith("search ")]
            best = min(rates, key=lambda f: f["nll"])["rate"]
            stage = AdamStage("adam", self.recipe, rate=best, epochs=self.recipe.training.epochs)
            yield from self._go(stage, saved)
            self._done("adam", self._before(stage.model, stage.noise_variance) | {"rate": best, "source": "adam"})

    def _given(self, weights: Mapping[str, Tensor]) -> Iterator[StageInfo]:
        model = self.recipe.network()
        problem = fit_error(model, weights)
        if problem:
            raise OckhamError(f"the weights do not fit the model: {problem}")
        model.load_state_dict(dict(weights))
        if "adam" not in self._facts:
            self._done("adam", self._before(model, None) | {"source": "given weights"})
        yield from ()

    def _before(self, model: nn.Module, noise: float | None) -> dict[str, Any]:
        size = save_network(model, self.out / f".{NETWORK}.before", builder=self.builder)
        (self.out / f".{NETWORK}.before").unlink()
        classify = not self.recipe.data.test_y.is_floating_point()
        facts = network_facts(model, self.recipe.data, None if classify else (noise or 1.0), self._foreign())
        return asdict(facts) | {"bytes": size, "noise_variance": None if classify else noise}

    def _go(self, stage: Stage, saved: Mapping[str, Any]) -> Iterator[StageInfo]:
        stage.on_step = self.on_step
        if saved.get("stage") == stage.name:
            stage.load(saved["state"])
        for info in stage.run():
            self._checkpoint(stage.name, stage.state())
            yield info

    # ------------------------------------------------------------------ checkpoint
    def _begin(self) -> Mapping[str, Any]:
        self._clear_probe()
        path = self.out / CHECKPOINT
        if not (self.resume and path.exists()):
            self._facts, self._spent = {}, 0.0
            return {}
        saved = read_tree(path, kind="checkpoint")
        if saved["job"] != self._fingerprint():
            theirs, ours = json.loads(saved["job"]), json.loads(self._fingerprint())
            other = [k for k in ours if ours[k] != theirs.get(k)]
            raise OckhamError(
                f"{path} belongs to another job: {', '.join(f'{k} was {theirs.get(k)}, is {ours[k]}' for k in other)}. "
                "Resume with the same settings, or start anew without --resume"
            )
        self._facts, self._spent = json.loads(saved["facts"]), float(saved["spent"])
        return saved

    def _clear_probe(self) -> None:
        """Fail early if the folder cannot be written, and drop what a killed run left half-written."""
        write_bytes(self.out / ".probe", b"")
        (self.out / ".probe").unlink()
        for leftover in self.out.glob(".*.part"):
            leftover.unlink()

    def _fingerprint(self) -> str:
        r = self.recipe
        settings = as_plain(r.training) | {
            "batch_size": r.batch_size,
            "rounds": repr(r.rounds),
            "ignore": repr(r.ignore),
        }
        names = {
            "data": r.data.name,
            "examples": len(r.data.train_x),
            "network": self.builder,
            "baseline": self.baseline,
        }
        rules = {"rule": rule_name(r.rule), "structures": structures_name(r.structures), "one_shot": repr(r.one_shot)}
        return json.dumps(settings | names | rules, sort_keys=True)

    def _checkpoint(self, stage: str, state: Mapping[str, Any]) -> None:
        tree = {"job": self._fingerprint(), "stage": stage, "state": state, "spent": self._clock()}
        write_tree(self.out / CHECKPOINT, tree | {"facts": json.dumps(self._facts)}, kind="checkpoint", durable=False)

    def _done(self, name: str, facts: dict[str, Any]) -> None:
        self._facts[name] = facts
        self._checkpoint("between", {})

    # ------------------------------------------------------------------ the end
    def _finish(self, stage: CompressStage | OneShotStage) -> None:
        result = stage.job.result()
        facts = compressed_facts(
            result, self.recipe.data, self._foreign(), draws=self.draws, seed=self.recipe.training.seed
        )
        self.out.mkdir(parents=True, exist_ok=True)
        size = save_network(result.model, self.out / NETWORK, builder=self.builder)
        result.posterior.save(self.out / POSTERIOR)
        self._write(result, facts, size, stage.kept)
        write_report(self.out)
        (self.out / CHECKPOINT).unlink(missing_ok=True)

    def _write(
        self, result: Compressed, facts: tuple[NetworkFacts, NetworkFacts], size: int, kept: list[float]
    ) -> None:
        after, mean = ({**f.measures, "parameters": f.parameters, "bytes": size} for f in facts)
        old = self._facts.get("adam")
        before = {**old["measures"], "parameters": old["parameters"], "bytes": old["bytes"]} if old else None
        seconds, seed = round(self._clock(), 2), self.recipe.training.seed
        common = {"kept": result.keep_share, "seconds": seconds, "seed": seed, "noise_variance": result.noise_variance}
        names = {"dataset": self.recipe.data.name, "network": self.builder}
        source = {"before_source": old["source"] if old else "none", "before_rate": (old or {}).get("rate")}
        metrics = {"schema": SCHEMA, "before": before, "after": after, "mean_network": mean} | common | names | source
        write_json(self.out / "metrics.json", metrics)
        write_json(self.out / "history.json", _history(result, kept))
        write_json(self.out / "analysis.json", _analysis(result, facts[0], old))
        self._structures(result)
        write_json(self.out / "result.json", self._provenance(seconds))

    def _structures(self, result: Compressed) -> None:
        """The plan, and what it changed; what an earlier run left is taken away."""
        save_plan(result.plan, self.out / PLAN)
        if result.plan is None:
            (self.out / STRUCTURE).unlink(missing_ok=True)
            return
        facts = structure_facts(self.recipe.network(), result, self.recipe.data.test_x[:1].to(self.recipe.device))
        write_json(self.out / STRUCTURE, {"schema": SCHEMA} | facts)

    def _provenance(self, seconds: float) -> dict[str, Any]:
        data = self.recipe.data
        sizes = {"name": data.name, "n_train": len(data.train_x), "n_test": len(data.test_x), "source": data.name}
        return {
            "schema": SCHEMA,
            "ockham": __version__,
            "command": self.command,
            "seed": self.recipe.training.seed,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": seconds,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {self.recipe.device}",
            "network": {"builder": self.builder},
            "dataset": sizes,
            "settings": settings_of(self.recipe),
        }

    def _foreign(self) -> Tensor:
        if self.ood is not None:
            return self.ood
        x = self.recipe.data.test_x
        order = torch.randperm(x[0].numel(), generator=torch.Generator().manual_seed(0))
        return x.reshape(len(x), -1)[:, order].reshape(x.shape)

    _clock: Callable[[], float] = field(default=lambda: 0.0)


def _history(result: Compressed, kept: list[float]) -> dict[str, Any]:
    epochs = [
        {
            "epoch": e.epoch,
            "loss": e.loss,
            "accuracy": e.accuracy if e.accuracy == e.accuracy else None,
            "kept_share": k,
        }
        for e, k in zip(result.epochs, kept, strict=True)
    ]
    diagnosis = asdict(result.diagnosis) if result.diagnosis else None
    rounds = [asdict(r) for r in result.rounds]
    return {"epochs": epochs, "rounds": rounds, "histograms": list(result.histograms), "diagnosis": diagnosis}


def _analysis(result: Compressed, after: NetworkFacts, before: Mapping[str, Any] | None) -> dict[str, Any]:
    shift = None
    if after.shift is not None:
        old = (before or {}).get("shift") or {}
        shift = {
            name: {
                "severity": [1, 2, 3, 4, 5],
                "before": old.get(name, {}).get("accuracy"),
                "after": row["accuracy"],
                "before_ece": old.get(name, {}).get("ece"),
                "after_ece": row["ece"],
            }
            for name, row in after.shift.items()
        }
    reliability = {"before": (before or {}).get("reliability"), "after": after.reliability}
    ood = (
        None if after.ood is None else {"name": after.ood_name, "before": (before or {}).get("ood"), "after": after.ood}
    )
    return {
        "layers": layer_rows(result.posterior, result.plan),
        "reliability": reliability if after.reliability else None,
        "input_map": after.input_map,
        "input_inclusion": input_inclusion(result.model, result.posterior),
        "shift": shift,
        "ood": ood,
    }
