"""Posterior predictive: networks drawn from a posterior, their average, and what they disagree about."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ockham.core.batch import (
    READ_ONCE,
    Batch,
    ReadBatch,
    ReadOutput,
    Substituted,
    batches_of,
    call,
    inputs_of,
    tensor_of,
)
from ockham.core.network import check_network, device_of, evaluating, frozen_modules, seeded
from ockham.core.objective import blame
from ockham.core.posterior import Posterior
from ockham.errors import DataError, OckhamError

__all__ = [
    "Prediction",
    "RegressionPrediction",
    "draw_outputs",
    "draw_parameters",
    "move_statistics_",
    "norm_inputs",
    "norms_of",
    "predict",
    "predict_regression",
    "refresh_batchnorm",
]


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """Averaged prediction of a classifier.

    Attributes:
        probabilities: mean over draws; of classes [N, K, ...] (where the outputs have them), and after the likelihood
            "binary" of every label, in the shape of the outputs.
        total: entropy of the mean, nats, [N, ...]; of every label in the shape of the outputs.
        aleatoric: mean entropy of the draws, nats: noise in the data as the network sees it.
        epistemic: total - aleatoric >= 0 (mutual information): what more data could remove.
    """

    probabilities: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RegressionPrediction:
    """Averaged prediction of a regression, or of counts.

    Attributes:
        mean: [N, ...], mean over draws, in units of the target.
        epistemic: [N, ...], variance over draws: what more data could remove.
        aleatoric: noise variance of the likelihood, broadcastable to the mean (one number an output); for counts the
            mean rate.
    """

    mean: Tensor
    epistemic: Tensor
    aleatoric: Tensor

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
    model: nn.Module,
    posterior: Posterior,
    x: Any,
    *,
    draws: int,
    generator: torch.Generator,
    batch: int = 2048,
    output: ReadOutput | None = None,
) -> Iterator[Tensor]:
    """Outputs [N, ...] of one network after another, drawn from the posterior.

    The model is used in evaluation mode and left as it was. Parameters the posterior does not know stay as they are.

    Args:
        model: the network.
        posterior: distribution of its parameters.
        x: inputs: a tensor, a tuple or list (positional), a mapping (keywords), a PackedSequence, or a `Batch`.
        draws: number of networks.
        generator: source of the draws.
        batch: examples that go through the network together.
        output: function that takes the output tensor out of what the network returns; `.logits` are found without.

    Raises:
        DataError: the network cannot take the inputs, or returns no tensor.
        OckhamError: the posterior names parameters the model does not have.
    """
    known = dict(model.named_parameters())
    unknown = [name for name in posterior if name not in known]
    if unknown:
        bare = [name.removeprefix(prefix) for name in unknown for prefix in WRAPPERS if name.startswith(prefix)]
        hint = "load the model it belongs to"
        if bare and all(name in known for name in bare):
            wrapper = unknown[0].removesuffix(bare[0])
            hint = f"its names begin with the prefix {wrapper!r} of a wrapper: pass the wrapped model, or rename them"
        raise OckhamError(f"the posterior has parameters this model lacks: {unknown[:6]}; {hint}")
    whole = x if isinstance(x, Batch) else inputs_of(x)
    rows = [slice(i, i + batch) for i in range(0, max(whole.size, 1), batch)]
    with evaluating(model) as device:
        parts = [whole.part(r).to(device) for r in rows]
        for _ in range(draws):
            drawn = draw_parameters(posterior, generator)
            yield torch.cat([tensor_of(call(Substituted(model, drawn), part, output)) for part in parts])


WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Prefixes that DataParallel, DistributedDataParallel, torch.compile and trainers put before parameter names."""


def predict(
    model: nn.Module,
    posterior: Posterior,
    x: Any,
    *,
    draws: int = 20,
    generator: torch.Generator | None = None,
    likelihood: str | None = None,
    output: ReadOutput | None = None,
) -> Prediction:
    r"""Posterior predictive of a classifier, with its uncertainty taken apart.

        p(y | x) = 1/S sum_s softmax f(x, w_s),   w_s ~ q

    Args:
        model: the network; its own parameter values are not used where the posterior has them.
        posterior: distribution of its parameters.
        x: inputs, [N, ...], or what else `draw_outputs` takes.
        draws: S.
        generator: source of the draws; default seed 0. Global random state is not touched.
        likelihood: "classification", "binary" (sigmoid of every output) or "causal-lm" (classes on the last axis);
            default what the posterior was fitted under.
        output: function that takes the logits out of what the network returns.

    Returns:
        `Prediction`, entropies in nats.

    Raises:
        OckhamError: draws < 1, posterior and model do not fit, or the network has a single output (see
            `predict_regression`).
    """
    kind = likelihood or posterior.likelihood or "classification"
    if kind in ("regression", "poisson"):
        raise OckhamError(f"predict averages class probabilities; for a likelihood {kind!r} use predict_regression")
    generator = _seeded(model, draws, generator)
    axis = -1 if kind == "causal-lm" else 1
    mean: Tensor | None = None
    entropy: Tensor | None = None
    for found in draw_outputs(model, posterior, x, draws=draws, generator=generator, output=output):
        if kind != "binary" and (found.ndim < 2 or found.shape[axis] == 1):
            raise OckhamError(
                f"predict averages class probabilities and needs outputs [N, K >= 2, ...]; got {tuple(found.shape)}. "
                "For a regression use predict_regression, for one logit a label likelihood='binary'"
            )
        p = found.sigmoid() if kind == "binary" else found.softmax(axis)
        h = _entropy(p, axis, kind)
        mean = p if mean is None else mean.add_(p)
        entropy = h if entropy is None else entropy.add_(h)
    assert mean is not None and entropy is not None
    mean, entropy = mean / draws, entropy / draws
    total = _entropy(mean, axis, kind)
    return Prediction(mean, total, entropy, (total - entropy).clamp_min(0))


def predict_regression(
    model: nn.Module,
    posterior: Posterior,
    x: Any,
    *,
    noise_variance: float | Tensor | None = None,
    draws: int = 20,
    generator: torch.Generator | None = None,
    output: ReadOutput | None = None,
) -> RegressionPrediction:
    """Posterior predictive mean and variance of a regression network, or of one that predicts counts.

    Args:
        model: the network.
        posterior: distribution of its parameters; after the likelihood "poisson" the outputs are logarithms of rates.
        x: inputs, [N, ...], or what else `draw_outputs` takes.
        noise_variance: noise of the likelihood, in squared units of the target; default what the posterior knows.
        draws: number of networks.
        generator: source of the draws; default seed 0.
        output: function that takes the output tensor out of what the network returns.

    Returns:
        `RegressionPrediction`.

    Raises:
        OckhamError: draws < 1, posterior and model do not fit, or nobody knows the noise.
    """
    generator = _seeded(model, draws, generator)
    noise = posterior.noise_variance if noise_variance is None else torch.as_tensor(noise_variance)
    if noise is None and posterior.likelihood != "poisson":
        raise OckhamError(
            "the posterior knows no noise: pass noise_variance= (of the likelihood, in squared units of the target)"
        )
    found = torch.stack(list(draw_outputs(model, posterior, x, draws=draws, generator=generator, output=output)))
    if posterior.likelihood == "poisson" and noise is None:
        rates = found.exp()
        return RegressionPrediction(rates.mean(0), rates.var(0, correction=0), rates.mean(0))
    assert noise is not None
    return RegressionPrediction(found.mean(0), found.var(0, correction=0), noise.to(found))


def _entropy(p: Tensor, axis: int, kind: str) -> Tensor:
    """Entropy in nats, 0 ln 0 = 0: masked classes have a logit of -inf."""
    one: Tensor = torch.special.entr(p)
    return one + torch.special.entr(1 - p) if kind == "binary" else one.sum(axis)


def _seeded(model: nn.Module, draws: int, generator: torch.Generator | None) -> torch.Generator:
    check_network(model, values=False)
    if draws < 1:
        raise OckhamError(f"predict: draws must be at least 1; got {draws}")
    return generator if generator is not None else torch.Generator(device_of(model)).manual_seed(0)


def norms_of(model: nn.Module) -> tuple[_BatchNorm, ...]:
    """BatchNorm layers with running statistics, less those inside wholly frozen modules."""
    frozen = frozen_modules(model)
    every = (m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats)
    return tuple(m for m in every if m not in frozen)


_CONSTANT, _FACTOR = 1e-10, 100.0
ChannelMoments = Tensor
"""Number, sum and sum of squares of what goes into each channel of a layer, float64, ``[3, channels]``."""


@torch.no_grad()
def norm_inputs(norms: Collection[nn.Module], runs: Iterable[Callable[[], object]]) -> dict[nn.Module, ChannelMoments]:
    """What goes into BatchNorm layers in the course of some runs; layers that none of them reaches are left out.

    Args:
        norms: the layers.
        runs: functions that run them, in the mode in which the network is.
    """
    found: dict[nn.Module, ChannelMoments] = {}

    def note(norm: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        rows = (args[0] if args else kwargs["input"]).detach().transpose(0, 1).flatten(1).double()
        count = torch.full((len(rows),), float(rows.shape[1]), dtype=torch.float64, device=rows.device)
        seen = torch.stack([count, rows.sum(1), rows.square().sum(1)])
        found[norm] = found[norm] + seen if norm in found else seen

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(note, with_kwargs=True).remove)
        for run in runs if norms else ():
            run()
    return found


@torch.no_grad()
def move_statistics_(norm: _BatchNorm, before: ChannelMoments, after: ChannelMoments) -> bool:
    """Move a layer's running mean and variance as far as what goes into it has moved; False where it has not.

        mean + (mean of after - mean of before),    variance x (variance of after / variance of before)

    The data need not be like those of the training, and with nothing changed the layer stays as it is, to the bits. A
    variance moves a hundredfold at most, and not at all where the data had none.
    """
    (mean, var), (new_mean, new_var) = (_mean_and_variance(m) for m in (before, after))
    # a channel that says the same to all of the data tells nothing of its variance elsewhere
    known = var > _CONSTANT * (var + mean.square())
    shift, ratio = new_mean - mean, (new_var / var).where(known, 1.0).clamp(1 / _FACTOR, _FACTOR)
    if bool((shift.abs() <= 1e-6 * var.sqrt()).all() and ((ratio - 1).abs() <= 1e-6).all()):
        return False
    if norm.running_mean is not None and norm.running_var is not None:
        norm.running_mean += shift.to(norm.running_mean)
        norm.running_var *= ratio.to(norm.running_var)
    return True


def _mean_and_variance(moments: ChannelMoments) -> tuple[Tensor, Tensor]:
    count, total, squares = moments
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0.0)


@torch.no_grad()
def refresh_batchnorm(
    model: nn.Module, loader: Iterable[Any], *, batches: int = 100, batch: ReadBatch | None = None
) -> int:
    """Replace running means and variances by averages over batches, under the weights the model now has.

    Layers inside wholly frozen modules keep theirs.

    Args:
        model: changed in place; its modes are restored. Without BatchNorm nothing happens.
        loader: batches, as everywhere; only their inputs are read.
        batches: number of batches at most.
        batch: function that reads batches of another form.

    Returns:
        Number of layers refreshed.

    Raises:
        DataError: the network cannot take the inputs, they are not finite, or there are none; the statistics are then
            those of before.
    """
    check_network(model, values=False)
    norms = norms_of(model)
    if not norms:
        return 0
    momenta, count = {m: m.momentum for m in norms}, None
    kept = [{n: t.clone() for n, t in m.named_buffers(recurse=False)} for m in norms]
    running = [t for m in norms for t in (m.running_mean, m.running_var) if t is not None]
    with evaluating(model) as device, seeded(0, 0, device):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.train()
                norm.momentum = None  # cumulative average
            for count, one in enumerate(itertools.islice(batches_of(loader, device, batch), batches)):
                call(model, one)
                if not bool(torch.stack([t.sum().to(device) for t in running]).isfinite().all()):
                    wrong = blame(one) or "the inputs of a BatchNorm are not finite"
                    raise DataError(f"batch {count} (counted from 0): {wrong}. The statistics are as they were before")
            if count is None:
                raise DataError(READ_ONCE)
        except BaseException:
            for norm, buffers in zip(norms, kept, strict=True):
                norm.load_state_dict(buffers, strict=False)
            raise
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum
    return len(norms)
