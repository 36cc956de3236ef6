"""Posterior predictive: networks drawn from a posterior, their average, and what they disagree about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ockham.errors import OckhamError
from ockham.posterior.posterior import Posterior

__all__ = ["Prediction", "draw_outputs", "draw_parameters", "predict"]


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


def draw_parameters(posterior: Posterior, generator: torch.Generator) -> dict[str, Tensor]:
    """One draw of all parameters, float tensors by name; removed weights are exactly zero."""
    result = {}
    for name, g in posterior.items():
        flat, alive = g.mean.reshape(-1).clone(), g.keep.reshape(-1)
        noise = torch.randn(int(alive.sum()), generator=generator, dtype=flat.dtype, device=flat.device)
        flat[alive] += noise * g.std.reshape(-1)[alive]
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
            yield torch.cat([functional_call(model, parameters, (part,), tie_weights=True) for part in x.split(batch)])
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
        OckhamError: draws < 1, or posterior and model do not fit.
    """
    if draws < 1:
        raise OckhamError(f"predict: draws must be at least 1; got {draws}")
    generator = generator if generator is not None else torch.Generator(x.device).manual_seed(0)
    mean: Tensor | None = None
    entropy: Tensor | None = None
    for output in draw_outputs(model, posterior, x, draws=draws, generator=generator):
        p = output.softmax(1)
        h = torch.special.entr(p).sum(1)  # 0 ln 0 = 0: masked classes have a logit of -inf
        mean = p if mean is None else mean.add_(p)
        entropy = h if entropy is None else entropy.add_(h)
    assert mean is not None and entropy is not None
    mean, entropy = mean / draws, entropy / draws
    total = torch.special.entr(mean).sum(1)
    return Prediction(mean, total, entropy, (total - entropy).clamp_min(0))
