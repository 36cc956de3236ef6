"""A job from start to result folder: a yardstick, a method, a checkpoint after every epoch, measures, files."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ockham.core.files import SCHEMA, read_tree, write_bytes, write_json, write_tree
from ockham.core.likelihood import Likelihood
from ockham.core.posterior import Posterior
from ockham.errors import OckhamError
from ockham.run.engine import Compressed, Engine, Method, Task
from ockham.run.facts import STRUCTURE, NetworkFacts, compressed_facts, input_inclusion, network_facts, structure_facts
from ockham.run.measure import mean_predictor, measures
from ockham.run.result import NETWORK, PLAN, POSTERIOR, fit_error, layer_rows, save_network, save_plan
from ockham.run.trainer import EpochInfo, OnStep, RunState
from ockham.version import __version__
from ockham.zoo.data import Batches, Dataset

__all__ = ["CHECKPOINT", "SEARCH_RATES", "Job", "PlainTraining", "Recipe"]

CHECKPOINT = "checkpoint.safetensors"
SEARCH_RATES = (3e-4, 1e-3, 3e-3)
"""Learning rates tried for the Adam network, on a tenth of the training data held out."""


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """What a job is about: how to build the network, the data, the method and its schedule.

    Attributes:
        build: makes a fresh network; called under the job's seed.
        likelihood: makes a fresh likelihood.
        data: training and test examples.
        batch_size: examples a step.
        method: way to make the network smaller.
        epochs: number of epochs of the method.
        hold: share of the steps at full learning rate.
        seed: of everything random.
        device: place of the computation.
        held_out: share of the training examples that the method does not train on, for its own curves.
    """

    build: Callable[[], nn.Module]
    likelihood: Callable[[], Likelihood]
    data: Dataset
    batch_size: int
    method: Method
    epochs: int
    hold: float = 0.5
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    held_out: float = 0.0

    def network(self) -> nn.Module:
        """A fresh network with the job's own initial weights, on the device; global randomness untouched."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.build().to(self.device)

    def split(self, share: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Training examples, and a share of them held out; in the given order where nothing is held out."""
        x, y = self.data.train_x, self.data.train_y
        if not share:
            return (x, y), (x[:0], y[:0])
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))
        cut = len(x) - int(share * len(x))
        return (x[order[:cut]], y[order[:cut]]), (x[order[cut:]], y[order[cut:]])

    def engine(
        self, method: Method, *, epochs: int, held_out: float = 0.0, weights: Mapping[str, Tensor] | None = None
    ) -> Engine:
        """A run of a method on a fresh network, or on given weights."""
        network, (x, y) = self.network(), self.split(held_out)[0]
        if weights is not None:
            network.load_state_dict(dict(weights))
        loader = Batches(x, y, self.batch_size, shuffle=method.shuffle)
        task = Task.of(network, loader, self.likelihood(), epochs=epochs)
        return Engine(method, network, task, hold=self.hold, seed=self.seed)


@dataclass(frozen=True, slots=True, eq=False)
class PlainTraining(Method):
    """Train by Adam and remove nothing: the yardstick.

    Attributes:
        rate: learning rate at first.
        stage: name, for the progress bar and the checkpoint.
    """

    rate: float
    stage: str = "adam"

    def start(self, network: nn.Module, task: Task) -> RunState:
        """Adam over all parameters."""
        fused = next(network.parameters()).device.type in ("cpu", "cuda")
        optimizer = torch.optim.Adam(network.parameters(), lr=self.rate, fused=fused)
        return RunState.start(network, task.likelihood, optimizer, task)

    def result(self, state: RunState) -> Compressed:
        """The network as it is."""
        none, parameters = Posterior({}, state.own.n_data), state.own.parameters
        noise = state.likelihood.noise_variance
        return Compressed(state.network, none, (), state.history, None, noise, parameters=parameters)

    def settings(self) -> dict[str, Any]:
        """The rate."""
        return {"rate": self.rate}


@dataclass(slots=True, eq=False)
class Job:
    """Everything that `ockham compress`, `prune` and `gate` do; iterate over `run` for progress.

    Attributes:
        recipe: network, data, method.
        out: result folder.
        builder: label of the network, "zoo:name" or the user's "module:function".
        command: line as typed, for the record.
        weights: tensors to start from instead of from scratch; they are then also the network "before".
        baseline: whether the same network is trained by Adam for comparison (skipped when weights are given).
        draws: posterior draws of a prediction.
        ood: foreign inputs for the out-of-distribution measure; None: the test images with their pixels permuted.
        resume: whether to continue from the checkpoint in ``out``.
        on_step: function called within epochs.
        report: function that writes the report of a folder.
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
    on_step: OnStep | None = None
    report: Callable[[Path], Any] | None = None
    _facts: dict[str, Any] = field(default_factory=dict)
    _spent: float = 0.0
    _started: float = 0.0

    def run(self) -> Iterator[EpochInfo]:
        """Do the job, one epoch per item; at the end the folder is complete and the checkpoint gone.

        Raises:
            OckhamError: weights do not fit, the folder cannot be written, a checkpoint of another job.
        """
        self._started, r = time.monotonic(), self.recipe
        saved = self._begin()
        if self.weights is not None:
            problem = fit_error(r.network(), self.weights)
            if problem:
                raise OckhamError(f"the weights do not fit the model: {problem}")
            if "adam" not in self._facts:
                model = r.network()
                model.load_state_dict(dict(self.weights))
                self._done("adam", self._before(model, None) | {"source": "given weights"})
        elif self.baseline:
            yield from self._adam(saved)
        engine = r.engine(r.method, epochs=r.epochs, held_out=r.held_out, weights=self.weights)
        yield from self._go(engine, saved)
        self._finish(engine)

    # ------------------------------------------------------------------ stages
    def _adam(self, saved: Mapping[str, Any]) -> Iterator[EpochInfo]:
        r = self.recipe
        for rate in SEARCH_RATES:
            method = PlainTraining(rate, f"search {rate:g}")
            if method.stage not in self._facts:
                engine = r.engine(method, epochs=max(1, round(r.epochs / 10)), held_out=0.1)
                yield from self._go(engine, saved)
                model, noise = engine.state.network, engine.state.likelihood.noise_variance
                predictor = mean_predictor(model, classify=noise is None)
                nll = measures(predictor, *r.split(0.1)[1], noise_variance=noise)["nll"]
                self._done(method.stage, {"nll": nll, "rate": rate})
        if "adam" not in self._facts:
            rates = [f for name, f in self._facts.items() if name.startswith("search ")]
            best = min(rates, key=lambda f: f["nll"])["rate"]
            engine = r.engine(PlainTraining(best), epochs=r.epochs)
            yield from self._go(engine, saved)
            before = self._before(engine.state.network, engine.state.likelihood.noise_variance)
            self._done("adam", before | {"rate": best, "source": "adam"})

    def _before(self, model: nn.Module, noise: float | None) -> dict[str, Any]:
        probe = self.out / f".{NETWORK}.before"
        size = save_network(model, probe, builder=self.builder)
        probe.unlink()
        classify = not self.recipe.data.test_y.is_floating_point()
        facts = network_facts(model, self.recipe.data, None if classify else (noise or 1.0), self._foreign())
        return asdict(facts) | {"bytes": size, "noise_variance": None if classify else noise}

    def _go(self, engine: Engine, saved: Mapping[str, Any]) -> Iterator[EpochInfo]:
        engine.on_step = self.on_step
        if saved.get("stage") == engine.method.stage:
            engine.load(saved["state"])
        for info in engine:
            self._checkpoint(engine.method.stage, engine.saved())
            yield info

    # ------------------------------------------------------------------ checkpoint
    def _begin(self) -> Mapping[str, Any]:
        write_bytes(self.out / ".probe", b"")  # fail early if the folder cannot be written
        (self.out / ".probe").unlink()
        for leftover in self.out.glob(".*.part"):
            leftover.unlink()
        path = self.out / CHECKPOINT
        if not (self.resume and path.exists()):
            self._facts, self._spent = {}, 0.0
            return {}
        saved = read_tree(path, kind="checkpoint")
        theirs, ours = json.loads(saved["job"]), json.loads(self._fingerprint())
        other = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
        if other:
            changed = ", ".join(f"{k} was {theirs.get(k)}, is {ours.get(k)}" for k in other)
            raise OckhamError(
                f"{path} belongs to another job: {changed}. Resume with the same settings, or start anew "
                "without --resume"
            )
        self._facts, self._spent = json.loads(saved["facts"]), float(saved["spent"])
        return saved

    def _fingerprint(self) -> str:
        names = {"data": self.recipe.data.name, "examples": len(self.recipe.data.train_x), "network": self.builder}
        return json.dumps(self._settings() | names | {"baseline": self.baseline}, sort_keys=True)

    def _settings(self) -> dict[str, Any]:
        r = self.recipe
        return {"method": r.method.stage, **r.method.settings(), "batch_size": r.batch_size, "seed": r.seed}

    def _clock(self) -> float:
        return self._spent + time.monotonic() - self._started

    def _checkpoint(self, stage: str, state: Mapping[str, Any]) -> None:
        tree = {"job": self._fingerprint(), "stage": stage, "state": state, "spent": self._clock()}
        write_tree(self.out / CHECKPOINT, tree | {"facts": json.dumps(self._facts)}, kind="checkpoint", durable=False)

    def _done(self, name: str, facts: dict[str, Any]) -> None:
        self._facts[name] = facts
        self._checkpoint("between", {})

    # ------------------------------------------------------------------ the end
    def _finish(self, engine: Engine) -> None:
        result, r = engine.result(), self.recipe
        facts = compressed_facts(result, r.data, self._foreign(), draws=self.draws, seed=r.seed)
        self.out.mkdir(parents=True, exist_ok=True)
        size = save_network(result.model, self.out / NETWORK, builder=self.builder)
        if result.posterior:
            result.posterior.save(self.out / POSTERIOR)
        else:
            (self.out / POSTERIOR).unlink(missing_ok=True)
        save_plan(result.plan, self.out / PLAN)
        self._write(result, facts, size)
        for name, values in engine.method.record(engine.state).items():
            write_json(self.out / name, {"schema": SCHEMA} | dict(values))
        if self.report is not None:
            self.report(self.out)
        (self.out / CHECKPOINT).unlink(missing_ok=True)

    def _write(self, result: Compressed, facts: tuple[NetworkFacts, NetworkFacts], size: int) -> None:
        after, mean = ({**f.measures, "parameters": f.parameters, "bytes": size} for f in facts)
        old = self._facts.get("adam")
        before = {**old["measures"], "parameters": old["parameters"], "bytes": old["bytes"]} if old else None
        seconds = round(self._clock(), 2)
        metrics = {
            "schema": SCHEMA,
            "before": before,
            "after": after,
            "mean_network": mean if result.posterior else None,
            "kept": result.keep_share,
            "seconds": seconds,
            "seed": self.recipe.seed,
            "noise_variance": result.noise_variance,
            "dataset": self.recipe.data.name,
            "network": self.builder,
            "method": self.recipe.method.stage,
            "before_source": old["source"] if old else "none",
            "before_rate": (old or {}).get("rate"),
        }
        write_json(self.out / "metrics.json", metrics)
        write_json(self.out / "history.json", _history(result))
        write_json(self.out / "analysis.json", _analysis(result, facts[0], old))
        if result.plan is None or not result.plan.removed:
            (self.out / STRUCTURE).unlink(missing_ok=True)
        else:
            example = self.recipe.data.test_x[:1].to(self.recipe.device)
            found = structure_facts(self.recipe.network(), result, example)
            write_json(self.out / STRUCTURE, {"schema": SCHEMA} | found)
        write_json(self.out / "result.json", self._provenance(seconds))

    def _provenance(self, seconds: float) -> dict[str, Any]:
        data = self.recipe.data
        sizes = {"name": data.name, "n_train": len(data.train_x), "n_test": len(data.test_x), "source": data.name}
        return {
            "schema": SCHEMA,
            "ockham": __version__,
            "command": self.command,
            "seed": self.recipe.seed,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": seconds,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {self.recipe.device}",
            "network": {"builder": self.builder},
            "dataset": sizes,
            "settings": self._settings(),
        }

    def _foreign(self) -> Tensor:
        if self.ood is not None:
            return self.ood
        x = self.recipe.data.test_x
        order = torch.randperm(x[0].numel(), generator=torch.Generator().manual_seed(0))
        return x.reshape(len(x), -1)[:, order].reshape(x.shape)


def _history(result: Compressed) -> dict[str, Any]:
    whole = [e.plain() for e in result.epochs]
    epochs = [{k: e[k] for k in ("epoch", "loss", "accuracy", "kept_share")} for e in whole]
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
