"""The command's job for gates: train, remove, shrink, fold, measure; resumable at every epoch; a result folder."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ockham.core.files import SCHEMA, read_tree, write_json, write_tree
from ockham.core.likelihood import Regression
from ockham.errors import OckhamError
from ockham.methods.gates.attach import GATE_RULES, Gates
from ockham.methods.gates.curve import compression_curve
from ockham.methods.gates.report import GATES, write_gate_report
from ockham.methods.gates.rules import GateRule
from ockham.methods.gates.training import (
    Decision,
    GateCompression,
    GateTraining,
    ParameterBudget,
    by_threshold,
    gate_sensitivity,
)
from ockham.run.job import AdamStage, Recipe, StageInfo
from ockham.run.measure import mean_predictor, measures
from ockham.run.result import NETWORK, PLAN, save_network, save_plan
from ockham.run.trainer import OnStep
from ockham.surgery.cost import cost, latency
from ockham.version import __version__
from ockham.zoo.data import Batches

__all__ = [
    "CHECKPOINT",
    "GateJob",
]

CHECKPOINT = "checkpoint.safetensors"
_HELD_OUT = 0.1


@dataclass(slots=True, eq=False)
class GateJob:
    """Everything `ockham compress --method bmrs` does; iterate over `run` for progress.

    Attributes:
        recipe: network, data, batch size, likelihood, device (its posterior's settings are not used).
        training: of the gates.
        rule: a name of `ockham.methods.gates.attach.GATE_RULES`.
        out: result folder.
        builder: label of the network.
        keep_share: share of the parameters that stays; None: the rule stops by itself.
        command: as typed.
        baseline: train the same network by Adam, without gates, for comparison.
        resume: continue from the checkpoint in ``out``.
        on_step: called within epochs of the baseline.
    """

    recipe: Recipe
    training: GateTraining
    rule: str
    out: Path
    builder: str
    keep_share: float | None = None
    command: str = ""
    baseline: bool = True
    resume: bool = False
    on_step: OnStep | None = None
    _before: dict[str, Any] | None = None
    _curves: dict[str, Any] = field(default_factory=dict)
    _spent: float = 0.0

    def run(self) -> Iterator[StageInfo]:
        """Do the job, one epoch per item; at the end the folder is complete and the checkpoint gone.

        Raises:
            OckhamError: the folder cannot be written, or a checkpoint of another job.
        """
        started = time.monotonic()
        saved = self._begin()
        spent = self._spent
        if self.baseline and self._before is None:
            yield from self._adam()
        job = self._job()
        if saved.get("state"):
            job.load(saved["state"])
        full = self._full()
        for p in job:
            self._spent = spent + time.monotonic() - started
            self._checkpoint(job)
            yield StageInfo("gates", p.epoch, job.total, p.loss, p.accuracy, p.parameters / full)
        self._spent = spent + time.monotonic() - started
        self._finish(job)

    def _full(self) -> int:
        return sum(p.numel() for p in self.recipe.network().parameters())

    def _job(self) -> GateCompression:
        data, r = self.recipe.data, self.recipe
        x, y, held_x, held_y = self._split()
        decide: Decision = by_threshold
        full = self._full()
        if self.keep_share is not None:
            decide = ParameterBudget(round(self.keep_share * full), full)
        job = GateCompression(
            r.network(),
            data.train_x[:2].to(r.device),
            Batches(x, y, r.batch_size, shuffle=True),
            likelihood=r.likelihood(),
            training=self.training,
            rule=GATE_RULES[self.rule],
            decide=decide,
            ignore=tuple(r.ignore) if not isinstance(r.ignore, (str, type)) else (r.ignore,),
        )
        if not self.training.every:
            job.on_trained = lambda gates: self._draw_curves(gates, job, held_x, held_y)
        return job

    def _split(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All for training with gates that go on the way; after training, a tenth is held out for the curves."""
        x, y = self.recipe.data.train_x, self.recipe.data.train_y
        if self.training.every:
            return x, y, x[:0], y[:0]
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.training.seed))
        cut = len(x) - max(1, round(_HELD_OUT * len(x)))
        return x[order[:cut]], y[order[:cut]], x[order[cut:]], y[order[cut:]]

    def _draw_curves(self, gates: Gates, job: GateCompression, x: Tensor, y: Tensor) -> None:
        def measure(model: nn.Module) -> Mapping[str, float]:
            return self._measures(model, x, y, job)

        found = gate_sensitivity(gates, job.loader, job.likelihood, seed=self.training.seed)
        rules: dict[str, GateRule] = dict(GATE_RULES)
        curves = compression_curve(gates, rules, measure, sensitivity=found)
        self._curves = {name: asdict(curve) for name, curve in curves.items()}

    def _measures(self, model: nn.Module, x: Tensor, y: Tensor, job: GateCompression) -> dict[str, float]:
        noise = job.likelihood.noise_variance if isinstance(job.likelihood, Regression) else None
        return measures(mean_predictor(model, classify=noise is None), x, y, noise_variance=noise)

    def _adam(self) -> Iterator[StageInfo]:
        stage = AdamStage("adam", self.recipe, rate=self.training.learning_rate, epochs=self.training.epochs)
        stage.on_step = self.on_step
        yield from stage.run()
        data = self.recipe.data
        found = measures(
            mean_predictor(stage.model, classify=stage.noise_variance is None),
            data.test_x,
            data.test_y,
            noise_variance=stage.noise_variance,
        )
        self._before = {**found, **self._costs(stage.model)}

    def _costs(self, model: nn.Module) -> dict[str, float]:
        x = self.recipe.data.test_x[:1].to(self.recipe.device)
        found = cost(model, x)
        return {"parameters": found.parameters, "macs": found.macs, "latency_ms": 1e3 * latency(model, x)}

    # ------------------------------------------------------------------ files
    def _begin(self) -> Mapping[str, Any]:
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / CHECKPOINT
        if not (self.resume and path.exists()):
            return {}
        saved = read_tree(path, kind="gate-checkpoint")
        if saved["job"] != self._fingerprint():
            raise OckhamError(
                f"{path} belongs to another job: {saved['job']}, this is {self._fingerprint()}. Resume with the same "
                "settings, or start anew without --resume"
            )
        self._before, self._curves = json.loads(saved["before"]), json.loads(saved["curves"])
        self._spent = float(saved["spent"])
        return {"state": {**saved["state"], **json.loads(saved["plain"])}}

    def _settings(self) -> dict[str, Any]:
        t = asdict(self.training)
        shown = {k: getattr(v, "__name__", v) for k, v in t.items() if not isinstance(v, dict)}
        weight = self.training.kl_weight
        return {**shown, "kl_weight": getattr(weight, "__name__", str(weight)), "noise": self.training.noise.__name__}

    def _fingerprint(self) -> str:
        r = self.recipe
        names = {"network": self.builder, "data": r.data.name, "batch_size": r.batch_size, "rule": self.rule}
        return json.dumps({**self._settings(), **names, "keep_share": self.keep_share}, sort_keys=True)

    def _checkpoint(self, job: GateCompression) -> None:
        state = job.state()
        plain = {k: state.pop(k) for k in ("plans", "history", "layers")}
        tree = {
            "job": self._fingerprint(),
            "state": state,
            "plain": json.dumps(plain),
            "before": json.dumps(self._before),
            "curves": json.dumps(self._curves),
            "spent": self._spent,
        }
        write_tree(self.out / CHECKPOINT, tree, kind="gate-checkpoint", durable=False)

    def _finish(self, job: GateCompression) -> None:
        model, data = job.result(), self.recipe.data
        after = {**self._measures(model, data.test_x, data.test_y, job), **self._costs(model)}
        save_network(model, self.out / NETWORK, builder=self.builder)
        save_plan(job.plan, self.out / PLAN)
        kept = after["parameters"] / self._full()
        names = {"dataset": data.name, "network": self.builder, "method": "bmrs", "seed": self.training.seed}
        metrics = {
            "schema": SCHEMA,
            "before": self._before,
            "after": after,
            "mean_network": None,
            "kept": kept,
            **names,
        }
        write_json(self.out / "metrics.json", {**metrics, "seconds": round(self._spent, 2)})
        write_json(self.out / GATES, self._gates(job))
        write_json(self.out / "result.json", self._provenance())
        write_gate_report(self.out)
        (self.out / CHECKPOINT).unlink(missing_ok=True)

    def _gates(self, job: GateCompression) -> dict[str, Any]:
        start = {k: len(p) for k, p in job.first.items()}
        epochs = [{"start": start, "epoch": h.epoch, "widths": dict(h.widths)} for h in job.history]
        return {
            "schema": SCHEMA,
            "rule": self.rule,
            "kl_weight": self._settings()["kl_weight"],
            "epochs": epochs,
            "layers": job.layers,
            "curves": self._curves,
        }

    def _provenance(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "ockham": __version__,
            "command": self.command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {self.recipe.device}",
            "network": {"builder": self.builder},
            "dataset": {"name": self.recipe.data.name, "n_train": len(self.recipe.data.train_x)},
            "settings": {**self._settings(), "rule": self.rule, "batch_size": self.recipe.batch_size},
        }
