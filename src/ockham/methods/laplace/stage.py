"""The command's stage for a trained network: a Laplace posterior, one reduction, fine-tuning if asked for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ockham.choose.correlated import removed_in_rounds
from ockham.choose.planning import plan
from ockham.choose.score import Diagnosis, diagnose
from ockham.core.likelihood import Regression
from ockham.core.posterior import POINT, Gaussian, Posterior
from ockham.errors import OckhamError, OckhamWarning
from ockham.fit.point import PointEstimate
from ockham.fit.predict import refresh_batchnorm
from ockham.methods.laplace.one_shot import compensated, laplace, unscored, with_means
from ockham.run.engine import Compressed
from ockham.run.job import Recipe, StageInfo
from ockham.run.measure import mean_predictor, measures
from ockham.run.trainer import EpochInfo, OnStep, Trainer
from ockham.surgery import Plan, shrink, trace
from ockham.zoo.data import Batches

__all__ = [
    "OneShotStage",
]


@dataclass(slots=True, eq=False)
class _Result:
    """What a `CompressStage` keeps under ``job``."""

    compressed: Compressed | None = None

    def result(self) -> Compressed:
        """After the run."""
        assert self.compressed is not None
        return self.compressed


class OneShotStage:
    """Laplace posterior of given weights, reduction, and fine-tuning of the survivors by Adam.

    The result is a point: its stored posterior has the means and masks only, and predictions are those of the network.
    (Draws from a Laplace posterior of a whole network predict worse than its mean.)

    Args:
        recipe: the job, with ``one_shot`` set; its training epochs are those of fine-tuning.
        start: the trained weights.

    Raises:
        OckhamError: no weights were given.
    """

    def __init__(self, recipe: Recipe, start: Mapping[str, Tensor] | None) -> None:
        if start is None:
            raise OckhamError("a Laplace posterior is one of a trained network: pass its --weights file.safetensors")
        assert recipe.one_shot is not None
        self.name = "compress"
        self.on_step: OnStep | None = None
        self.recipe, self.settings, self.job = recipe, recipe.one_shot, _Result()
        self.kept: list[float] = []
        self._model = recipe.network()
        self._model.load_state_dict(dict(start))

    def run(self) -> Iterator[StageInfo]:
        """Reduce, then one item per epoch of fine-tuning; without any a single one for the reduced network."""
        r, likelihood = self.recipe, self.recipe.likelihood()
        loader = Batches(r.data.train_x, r.data.train_y, r.batch_size, shuffle=False)
        posterior = laplace(self._model, loader, structure=self.settings.structure, likelihood=likelihood)
        found = diagnose(posterior)
        if found.warnings:
            warnings.warn(" ".join(found.warnings), OckhamWarning, stacklevel=2)
        model, small, plan = self._reduced(posterior)
        epochs: list[EpochInfo] = []
        before = posterior.size()
        for info in self._tuned(model, small) if self.settings.epochs else [self._looked_at(model)]:
            epochs.append(info)
            self.kept.append(small.kept() / before)
            yield StageInfo(
                self.name, info.epoch, max(1, self.settings.epochs), info.loss, info.accuracy, self.kept[-1]
            )
        self.job.compressed = self._compressed(model, small, epochs, found, plan)

    def _reduced(self, posterior: Posterior) -> tuple[nn.Module, Posterior, Plan | None]:
        """Network and posterior without weights, or without units and then with the plan."""
        r, s = self.recipe, self.settings
        if s.structures is None:
            small = removed_in_rounds(posterior, s.keep, unscored(self._model, r.ignore))
            return with_means(self._model, small), small, None
        example = r.data.train_x[:2].to(next(self._model.parameters()).device)
        groups = trace(self._model.eval(), example, ignore=r.ignore)
        budget = None if s.macs is None else {"macs": f"{100 * s.macs}%"}
        options = {"price": s.structures.price, "round_to": s.structures.round_to, "budget": budget}
        chosen = plan(groups, posterior, model=self._model, example_inputs=example, **options)  # type: ignore[arg-type]
        moved = compensated(self._model, posterior, groups, chosen)
        model, cut = shrink(with_means(self._model, moved), chosen, posterior=moved)
        return model, Posterior(cut, posterior.n_data, posterior.temperature, posterior.source), chosen

    def state(self) -> dict[str, Any]:
        """Nothing: one pass is quickly done again."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Start over."""

    def _tuned(self, model: nn.Module, small: Posterior) -> Iterator[EpochInfo]:
        r = self.recipe
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        settings = self.settings
        optimizer = PointEstimate(named, n_data=len(r.data.train_y), lr=settings.learning_rate)
        optimizer.remove({n: g.keep for n, g in small.items()})
        loader = Batches(r.data.train_x, r.data.train_y, r.batch_size, shuffle=True)
        trainer = Trainer(
            model, r.likelihood(), optimizer, loader, epochs=settings.epochs, hold=0.0, seed=r.training.seed
        )
        for _ in range(settings.epochs):
            yield trainer.epoch(self.on_step)

    def _looked_at(self, model: nn.Module) -> EpochInfo:
        r = self.recipe
        classify = not isinstance(r.likelihood(), Regression)
        noise = None if classify else 1.0
        found = measures(mean_predictor(model, classify=classify), r.data.train_x, r.data.train_y, noise_variance=noise)
        return EpochInfo(1, found["nll"], found.get("accuracy", float("nan")))

    def _compressed(
        self, model: nn.Module, small: Posterior, epochs: list[EpochInfo], found: Diagnosis, chosen: Plan | None
    ) -> Compressed:
        r = self.recipe
        loader = Batches(r.data.train_x, r.data.train_y, r.batch_size, shuffle=False)
        if self.settings.epochs:
            refresh_batchnorm(model, loader)
        noise = None
        if isinstance(r.likelihood(), Regression):
            noise = _mean_square(model, r.data.train_x, r.data.train_y)
        parameters = sum(p.numel() for p in self._model.parameters())
        point = _point(model, small)
        return Compressed(model.eval(), point, (), tuple(epochs), found, noise, plan=chosen, parameters=parameters)


def _point(model: nn.Module, small: Posterior) -> Posterior:
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    moments: dict[str, Gaussian] = {}
    for name, g in small.items():
        prior = g.prior_precision.expand(g.mean.shape).masked_fill(~g.keep, torch.inf)
        moments[name] = replace(g, mean=values[name], precision=prior, marginal_precision=None)
    return Posterior(moments, small.n_data, 1.0, POINT)


@torch.no_grad()
def _mean_square(model: nn.Module, x: Tensor, y: Tensor) -> float:
    device = next(model.parameters()).device
    answer = torch.cat([model(part.to(device)).cpu() for part in x.split(2048)])
    return float((answer.reshape(y.shape) - y).square().mean())
