"""Posterior predictive: networks drawn from a posterior, their average, and what they disagree about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from ockham.core.batch import Loader, forward, to_device
from ockham.core.modes import seeded
from ockham.core.posterior import Posterior
from ockham.errors import OckhamError

__all__ = [
    "Prediction",
    "RegressionPrediction",
    "draw_outputs",
    "draw_parameters",
    "predict",
    "predict_regression",
    "refresh_batchnorm",
]


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """Averaged prediction of a classifier.

    Attributes:
        probabilities: [N, K, ...], mean over draws.
        total: entropy of the mean, nats, [N, ...].
        aleatoric: mean entropy of the draws, nats: noise in the data as the network sees it.
        epistemic: total - aleatoric >= 0 (mutual information): what more data could remove.
    """

    probabilities: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RegressionPrediction:
    """Averaged prediction of a regression.

    Attributes:
        mean: [N, ...], mean over draws, in units of the target.
        epistemic: [N, ...], variance over draws: what more data could remove.
        aleatoric: fitted noise variance of the likelihood.
    """

    mean: Tensor
    epistemic: Tensor
    aleatoric: float

    @property
    def std(self) -> Tensor:
        """Predictive standard deviation, sqrt(epistemic + aleatoric)."""
        return (self.epistemic + self.aleatoric).sqrt()


def draw_parameters(posterior: Posterior, generator: torch.Generator) -> dict[str, Tensor]:
    """One draw of all parameters, float tensors by name; removed weights are exactly zero.

    The draws of a point (`Posterior.is_point`) are the point.
    """
    if posterior.is_point:
        return {name: g.mean.clone() for name, g in posterior.items()}
    result = {}
    for name, g in posterior.items():
        flat, alive = g.mean.reshape(-1).clone(), g.keep.reshape(-1)
        noise = torch.randn(int(alive.sum()), generator=generator, dtype=flat.dtype, device=flat.device)
        flat[alive] += noise * g.std.reshape(-1)[alive]
        if g.inclusion is not None:
            flat[alive] *= torch.bernoulli(g.inclusion.reshape(-1)[alive], generator=generator)
        result[name] = flat.view(g.mean.shape)
    return result


@torch.no_grad()
def draw_outputs(
    model: nn.Module, posterior: Posterior, x: Tensor, *, draws: int, generator: torch.Generator, batch: int = 2048
) -> Iterator[Tensor]:
    """Outputs [N, ...] of one network after another, drawn from the posterior.

    The model is used in evaluation mode and left as it was. Parameters the posterior does not know stay as they are.

    Raises:
        OckhamError: the posterior names parameters the model does not have.
    """
    known = dict(model.named_parameters())
    unknown = [name for name in posterior if name not in known]
    if unknown:
        raise OckhamError(f"the posterior has parameters this model lacks: {unknown[:6]}; load the model it belongs to")
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        for _ in range(draws):
            parameters = draw_parameters(posterior, generator)
            yield torch.cat([_outputs(model, parameters, part) for part in x.split(batch)])
    finally:
        for module, mode in training.items():
            module.training = mode


def predict(
    model: nn.Module, posterior: Posterior, x: Tensor, *, draws: int = 20, generator: torch.Generator | None = None
) -> Prediction:
    r"""Posterior predictive of a classifier, with its uncertainty taken apart.

        p(y | x) = 1/S sum_s softmax f(x, w_s),   w_s ~ q

    Args:
        model: the network; its own parameter values are not used where the posterior has them.
        posterior: over its parameters.
        x: inputs, [N, ...].
        draws: S.
        generator: of the draws; default seed 0. Global random state is not touched.

    Returns:
        `Prediction`, entropies in nats.

    Raises:
        OckhamError: draws < 1, posterior and model do not fit, or the network has a single output (see
            `predict_regression`).
    """
    generator = _seeded(x, draws, generator)
    mean: Tensor | None = None
    entropy: Tensor | None = None
    for output in draw_outputs(model, posterior, x, draws=draws, generator=generator):
        if output.ndim < 2 or output.shape[1] == 1:
            raise OckhamError(
                f"predict averages class probabilities and needs outputs [N, K >= 2, ...]; got {tuple(output.shape)}. "
                "For a regression use predict_regression"
            )
        p = output.softmax(1)
        h = torch.special.entr(p).sum(1)  # 0 ln 0 = 0: masked classes have a logit of -inf
        mean = p if mean is None else mean.add_(p)
        entropy = h if entropy is None else entropy.add_(h)
    assert mean is not None and entropy is not None
    mean, entropy = mean / draws, entropy / draws
    total = torch.special.entr(mean).sum(1)
    return Prediction(mean, total, entropy, (total - entropy).clamp_min(0))


def predict_regression(
    model: nn.Module,
    posterior: Posterior,
    x: Tensor,
    *,
    noise_variance: float,
    draws: int = 20,
    generator: torch.Generator | None = None,
) -> RegressionPrediction:
    """Posterior predictive mean and variance of a regression network.

    Args:
        model: the network.
        posterior: over its parameters.
        x: inputs, [N, ...].
        noise_variance: of the likelihood, in squared units of the target.
        draws: how many networks.
        generator: of the draws; default seed 0.

    Returns:
        `RegressionPrediction`.

    Raises:
        OckhamError: draws < 1, or posterior and model do not fit.
    """
    outputs = torch.stack(list(draw_outputs(model, posterior, x, draws=draws, generator=_seeded(x, draws, generator))))
    return RegressionPrediction(outputs.mean(0), outputs.var(0, correction=0), noise_variance)


def _seeded(x: Tensor, draws: int, generator: torch.Generator | None) -> torch.Generator:
    if draws < 1:
        raise OckhamError(f"predict: draws must be at least 1; got {draws}")
    return generator if generator is not None else torch.Generator(x.device).manual_seed(0)


def _outputs(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    try:
        return functional_call(model, parameters, (x,), tie_weights=True)  # type: ignore[no-any-return]
    except RuntimeError as error:
        raise OckhamError(f"the network cannot take inputs of shape {tuple(x.shape)}: {error}") from error


@torch.no_grad()
def refresh_batchnorm(model: nn.Module, loader: Loader, *, batches: int = 100) -> int:
    """Replace running means and variances by averages over batches, under the weights the model now has.

    Args:
        model: changed in place; its modes are restored. Without BatchNorm nothing happens.
        loader: batches of (inputs, targets).
        batches: how many at most.

    Returns:
        Number of layers refreshed.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    modes = {m: m.training for m in model.modules()}
    momenta = {m: m.momentum for m in norms}
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # cumulative average
    try:
        _run(model, loader, batches)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in momenta.items():
            norm.momentum = momentum
    return len(norms)


def _run(model: nn.Module, loader: Loader, batches: int) -> None:
    device = next(model.parameters()).device
    with seeded(0, 0, device):
        for i, batch in enumerate(loader):
            if i == batches:
                break
            x: Any = to_device(batch[0], device)
            forward(model, x)
