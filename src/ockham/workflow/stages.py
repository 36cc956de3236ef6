"""Stages of the command's job: search a learning rate, train by Adam, compress. Each is resumable at every epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from ockham.reduction.rounds import Rounds
from ockham.reduction.rule import Rule
from ockham.reduction.structure_rule import Structures
from ockham.workflow.compression import Compression
from ockham.workflow.estimators import Estimator, Training, mean_field
from ockham.workflow.evaluate import mean_predictor, measures
from ockham.workflow.likelihood import Likelihood, Regression
from ockham.workflow.reducer import Ignore
from ockham.workflow.trainer import OnStep, Trainer
from ockham.zoo.data import Batches, Dataset

__all__ = [
    "SEARCH_RATES",
    "AdamStage",
    "CompressStage",
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
