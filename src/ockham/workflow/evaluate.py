"""Measuring a network and a posterior on test data: predictive quality, shift, out of distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ockham.posterior.posterior import Posterior
from ockham.posterior.predict import draw_outputs
from ockham.report.measure import auroc, classification_summary, ece, regression_summary, reliability
from ockham.report.shift import CORRUPTIONS, corrupt

__all__ = [
    "Predictor",
    "corruption_shift",
    "mean_predictor",
    "measures",
    "ood_auroc",
    "posterior_predictor",
    "reliability_of",
]

Predictor = Callable[[Tensor], Tensor]
"""Inputs [N, ...] to outputs of draws: classification log-probabilities [N, K, ...], regression means [S, N, ...]."""


@dataclass(frozen=True, slots=True, eq=False)
class _Draws:
    """Posterior predictive of a model."""

    model: nn.Module
    posterior: Posterior
    draws: int
    seed: int
    classify: bool

    def __call__(self, x: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        generator = torch.Generator(device).manual_seed(self.seed)
        outputs = draw_outputs(self.model, self.posterior, x.to(device), draws=self.draws, generator=generator)
        if not self.classify:
            return torch.stack([o.cpu() for o in outputs])
        total: Tensor | None = None
        for output in outputs:
            logs = output.log_softmax(1).double()
            total = logs if total is None else torch.logaddexp(total, logs)
        assert total is not None
        return (total - math.log(self.draws)).cpu()


def posterior_predictor(
    model: nn.Module, posterior: Posterior, *, classify: bool, draws: int = 20, seed: int = 0
) -> Predictor:
    """Ln 1/S sum_s p(y | x, w_s) of a classifier, or the S means of a regression; the same draws at every call."""
    return _Draws(model, posterior, draws, seed, classify)


def mean_predictor(model: nn.Module, *, classify: bool) -> Predictor:
    """Prediction of the network as it stands, in evaluation mode."""
    return _Draws(model, Posterior({}, 1.0), 1, 0, classify)


def measures(predictor: Predictor, x: Tensor, y: Tensor, *, noise_variance: float | None) -> dict[str, float]:
    """Accuracy, NLL, ECE, Brier of a classifier (``noise_variance`` None), or RMSE, NLL, CRPS, coverage."""
    if noise_variance is None:
        return classification_summary(predictor(x), y).to_dict()
    means = predictor(x)
    target = y.reshape(means.shape[1:])
    return regression_summary(means, target, noise_variance=noise_variance).to_dict()


def reliability_of(predictor: Predictor, x: Tensor, y: Tensor) -> dict[str, Any]:
    """15 equal-width bins: confidence, accuracy, count; empty bins are None."""
    table = asdict(reliability(predictor(x).exp(), y))
    plain = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in table.items()}
    return {k: [None if isinstance(e, float) and math.isnan(e) else e for e in v] for k, v in plain.items()}


def corruption_shift(
    predictor: Predictor, x: Tensor, y: Tensor, *, low: float | Tensor, high: float | Tensor, seed: int = 0
) -> dict[str, dict[str, list[float]]]:
    """Accuracy and ECE of an image classifier under every corruption at severities 1..5.

    Args:
        predictor: a classifier.
        x: images [N, C, H, W].
        y: labels [N].
        low: smallest pixel value, per channel or for all.
        high: largest.
        seed: of the noise.
    """
    table: dict[str, dict[str, list[float]]] = {}
    for name in CORRUPTIONS:
        rows: dict[str, list[float]] = {"accuracy": [], "ece": []}
        for severity in range(1, 6):
            shifted = corrupt(x, name, severity, generator=torch.Generator().manual_seed(seed), low=low, high=high)
            p = predictor(shifted).exp()
            rows["accuracy"].append(float((p.argmax(1) == y).double().mean()))
            rows["ece"].append(ece(p, y))
        table[name] = rows
    return table


def ood_auroc(predictor: Predictor, inside: Tensor, outside: Tensor) -> float:
    """How well predictive entropy tells foreign inputs from the test inputs: AUROC, 1 is perfect, .5 is chance."""

    def entropy(x: Tensor) -> Tensor:
        logs = predictor(x)
        return -(logs.exp() * logs.clamp_min(-1e3)).sum(1).reshape(len(x), -1).mean(1)

    return auroc(entropy(inside), entropy(outside))
