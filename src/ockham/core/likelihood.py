"""Likelihoods: how outputs and targets become a mean negative log-likelihood in nats."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ockham.core.batch import PYTHON_ERRORS, described, tensor_of
from ockham.core.scaling import aligned, check_target, spread_weight
from ockham.errors import DataError, OckhamError

__all__ = [
    "Binary",
    "CausalLanguage",
    "Classification",
    "Likelihood",
    "Loss",
    "Poisson",
    "Regression",
    "TermLikelihood",
    "likelihood_from",
]


class Likelihood(nn.Module, ABC):
    """The data's part of the free energy. It may hold parameters of its own (a learned noise).

    Attributes:
        kind: name of the likelihood, as a posterior remembers it.
        mean_weight: mean sample weight of a term over the data, by which the losses of weighted batches are divided.
    """

    kind: ClassVar[str] = "loss"

    def __init__(self) -> None:
        super().__init__()
        self.mean_weight = 1.0

    @abstractmethod
    def nll(self, output: Any, target: Any, weight: Tensor | None = None) -> Tensor:
        """Mean negative log-likelihood per term, in nats, a scalar."""

    @abstractmethod
    def terms(self, target: Any, weight: Tensor | None = None) -> float:
        """How many log-likelihood terms a batch of targets sums, weights added up (`n_data` counts these)."""

    @property
    def noise_variance(self) -> Tensor | None:
        """The fitted noise variance of a regression, one number an output; None for other likelihoods."""
        return None

    def check(self, output: Any, target: Any) -> None:
        """Raise a `DataError` when outputs and targets do not fit; called on the first batch."""

    def right(self, output: Any, target: Any) -> Tensor:
        """Share of right classes in a batch, a scalar; nan where there are no classes."""
        return torch.tensor(math.nan)

    def output_of(self, found: Any) -> Any:
        """What is compared with the targets, out of what the network returned."""
        return tensor_of(found)


class TermLikelihood(Likelihood):
    """A likelihood that is a sum of terms which can be looked at one by one."""

    @abstractmethod
    def each(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """NLL of every term in nats, and which of them count (padding does not); of one shape."""

    @abstractmethod
    def drawn(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Targets drawn from the likelihood at these outputs, of the targets' shape; padding stays padding."""

    def nll(self, output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean over the terms that count; with weights sum w nll / (terms x mean weight over the data)."""
        values, counts = self.each(output, target)
        weights = self.term_weights(target, weight)
        if weights is None:
            return values.sum() / counts.sum().clamp_min(1)
        return (values * weights).sum() / (counts.sum().clamp_min(1) * self.mean_weight)

    def total(self, output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Summed NLL, each term times its weight (of the shape of `each`, or broadcastable)."""
        values, _ = self.each(output, target)
        return values.sum() if weights is None else (values * weights).sum()

    def terms(self, target: Tensor, weight: Tensor | None = None) -> float:
        """Terms that count, or the sum of their weights."""
        counts, weights = self.counted(target), self.term_weights(target, weight)
        return float(counts.sum() if weights is None else (counts * weights).double().sum())

    def counted(self, target: Tensor) -> Tensor:
        """Which terms of the targets count, boolean, of the shape of `each`."""
        return torch.ones_like(target, dtype=torch.bool)

    def term_weights(self, target: Tensor, weight: Tensor | None) -> Tensor | None:
        """Weights of examples as weights of terms, broadcastable to `each`; None where every term counts once."""
        return None if weight is None else spread_weight(weight, self.counted(target))


class Classification(TermLikelihood):
    """Softmax likelihood: outputs are logits [N, K, ...] or [N, ..., K], targets [N, ...] integer classes.

    Args:
        ignore_index: target value that is no data (padding).
        class_weights: weight of every class [K]; `n_data` is then the sum of the weights of all targets.
        axis: axis of the outputs that holds the classes, 1 or -1; by default found from the shapes (1 where both fit).
    """

    kind = "classification"

    def __init__(
        self,
        ignore_index: int = -100,
        *,
        class_weights: Tensor | Sequence[float] | None = None,
        axis: Literal[1, -1] | None = None,
    ) -> None:
        super().__init__()
        if axis not in (None, 1, -1):
            raise OckhamError(f"Classification: axis is 1, -1 or None (found from the shapes); got {axis!r}")
        self.ignore_index, self.axis = ignore_index, axis
        self._of_object = False
        self.class_weights: Tensor | None
        weights = None if class_weights is None else torch.as_tensor(class_weights).float()
        if weights is not None and not bool((weights.isfinite() & (weights >= 0)).all() and weights.any()):
            raise OckhamError(
                f"Classification: class_weights are finite, not negative, not all zero; got {weights.tolist()}"
            )
        self.register_buffer("class_weights", weights, persistent=False)

    def nll(self, output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean cross-entropy over the targets that count."""
        if weight is None and self.class_weights is None:
            return self._cross_entropy(output, target, "mean")[0]
        return super().nll(output, target, weight)

    def total(self, output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Summed cross-entropy."""
        if weights is None:
            return self._cross_entropy(output, target, "sum")[0]
        return super().total(output, target, weights)

    def output_of(self, found: Any) -> Tensor:
        """The logits; those of transformers' heads have their classes last, and where that is unclear it is asked."""
        self._of_object = not isinstance(found, Tensor)
        return tensor_of(found)

    def each(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every target, 0 for padding."""
        values, labels = self._cross_entropy(output, target, "none")
        return values, labels != self.ignore_index

    def drawn(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Labels drawn from softmax(outputs)."""
        logits, labels = self.fitted(output, target)
        p = logits.softmax(1).movedim(1, -1)
        label = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).view(labels.shape)
        return torch.where(labels == self.ignore_index, labels, label).view(target.shape)

    def counted(self, target: Tensor) -> Tensor:
        """Targets that are not padding."""
        return target != self.ignore_index

    def term_weights(self, target: Tensor, weight: Tensor | None) -> Tensor | None:
        """Weights of examples times those of their classes."""
        weights = super().term_weights(target, weight)
        if self.class_weights is None:
            return weights
        counts = self.counted(target)
        of_class = self.class_weights.to(target.device)[torch.where(counts, target, 0).long()]
        return of_class if weights is None else weights * of_class

    def right(self, output: Tensor, target: Tensor) -> Tensor:
        """Share of the targets that count whose class has the largest logit."""
        logits, labels = self.fitted(output.detach(), target)
        counts = labels != self.ignore_index
        return ((logits.argmax(1) == labels) & counts).float().sum() / counts.sum()

    def check(self, output: Tensor, target: Tensor) -> None:
        """Integer labels in range, shapes that fit; keeps in mind which axis holds the classes.

        Raises:
            DataError: with the labels or shapes at fault.
        """
        check_target(target, "classification")
        if target.is_floating_point() or target.is_complex():
            raise DataError(
                f"classification needs integer labels; got {target.dtype}. Use labels.long() (argmax(1) of one-hot "
                "rows), or likelihood='regression', 'binary' or ockham.Loss"
            )
        if self.axis is None and output.ndim == target.ndim + 1 and output.ndim > 2:
            first, last = output.shape[:1] + output.shape[2:] == target.shape, output.shape[:-1] == target.shape
            if first and last and self._of_object:
                raise DataError(
                    f"outputs {tuple(output.shape)} for labels {tuple(target.shape)} may have their classes on axis 1 "
                    "or on the last: say which by likelihood=ockham.Classification(axis=1) or axis=-1"
                )
            self.axis = 1 if first else -1 if last else None
        logits, labels = self.fitted(output, target)
        real, classes = labels[labels != self.ignore_index], logits.shape[1]
        if real.numel() and (int(real.min()) < 0 or int(real.max()) >= classes):
            hint = ". For one logit use likelihood='binary'" if classes == 1 else ""
            raise DataError(
                f"labels must lie in 0..{classes - 1} (the network has {classes} outputs); "
                f"got {int(real.min())}..{int(real.max())}{hint}"
            )
        if self.class_weights is not None and self.class_weights.shape != (classes,):
            raise DataError(f"class_weights needs one number a class, ({classes},); got {self.class_weights.numel()}")

    def _cross_entropy(self, output: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and the labels that it was taken of."""
        fitted = self.fitted(output, target)
        try:
            found = nn.functional.cross_entropy(*fitted, ignore_index=self.ignore_index, reduction=reduction)
        except IndexError:  # of a later batch: `check` saw the first
            self.check(output, target)
            raise
        return found, fitted[1]

    def fitted(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits with the classes on axis 1, and labels as int64 without an axis of size 1 too many."""
        labels = target if target.dtype == torch.int64 else target.long()
        if output.ndim == labels.ndim == 2 and labels.shape[1] == 1 != output.shape[1]:
            labels = labels[:, 0]
        first = output.shape[:1] + output.shape[2:] == labels.shape
        logits = output.movedim(-1, 1) if output.ndim > 2 and (self.axis or (1 if first else -1)) == -1 else output
        if output.ndim < 2 or logits.shape[:1] + logits.shape[2:] != labels.shape:
            one_hot = ". For one-hot rows yield labels.argmax(1)" if output.shape == target.shape else ""
            raise DataError(
                f"classification needs logits [N, K, ...] (or [N, ..., K]) for labels [N, ...]; got "
                f"{tuple(output.shape)} for {tuple(target.shape)}{one_hot}"
            )
        return logits, labels


class CausalLanguage(Classification):
    """Next-token likelihood: logits [N, T, K] and labels [N, T], shifted inside; label -100 is ignored.

    The logits at position t are compared with the label at t + 1, so labels are the input ids themselves, as data
    collators of language models make them. `n_data` counts the tokens that are predicted.
    """

    kind = "causal-lm"

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(ignore_index, axis=1)

    def counted(self, target: Tensor) -> Tensor:
        """Tokens that are predicted."""
        return target[:, 1:] != self.ignore_index

    def drawn(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Labels with every predicted token drawn from softmax(outputs); the first one stays."""
        logits, labels = self.fitted(output, target)
        flat = logits.softmax(1).movedim(1, -1).reshape(-1, logits.shape[1])
        label = torch.multinomial(flat, 1, generator=generator).view(labels.shape)
        return torch.cat([target[:, :1], torch.where(labels == self.ignore_index, labels, label).to(target.dtype)], 1)

    def fitted(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the predicted tokens with the words on axis 1, and these tokens."""
        if output.ndim != 3 or target.ndim != 2 or output.shape[:2] != target.shape:
            raise DataError(
                "causal-lm needs logits [N, T, K] for labels [N, T] of the same tokens (the shift is made inside); got "
                f"{tuple(output.shape)} for {tuple(target.shape)}"
            )
        return output[:, :-1].movedim(-1, 1), target[:, 1:].long()

    def term_weights(self, target: Tensor, weight: Tensor | None) -> Tensor | None:
        """Weights of examples, or of tokens, as weights of the predicted tokens."""
        return super().term_weights(
            target, weight[:, 1:] if weight is not None and weight.shape == target.shape else weight
        )


class Binary(TermLikelihood):
    """Bernoulli likelihood of one logit a label: outputs and targets of one shape, targets 0 or 1 (or between)."""

    kind = "binary"

    def each(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every label."""
        logits = aligned(output, target, self.kind)
        values = nn.functional.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
        return values, self.counted(target)

    def drawn(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Labels drawn from sigmoid(outputs)."""
        return torch.bernoulli(aligned(output, target, self.kind).sigmoid(), generator=generator)

    def right(self, output: Tensor, target: Tensor) -> Tensor:
        """Share of the labels on whose side of one half the probability lies."""
        return ((aligned(output.detach(), target, self.kind) > 0) == (target > 0.5)).float().mean()

    def check(self, output: Tensor, target: Tensor) -> None:
        """Targets in [0, 1], of the outputs' shape.

        Raises:
            DataError: with the targets or shapes at fault.
        """
        check_target(target, self.kind)
        aligned(output, target, self.kind)
        if target.numel() and not (float(target.min()) >= 0 and float(target.max()) <= 1):
            raise DataError(
                f"binary targets must lie in 0..1; got {float(target.min()):g}..{float(target.max()):g}. For several "
                "exclusive classes use likelihood='classification'"
            )


class Poisson(TermLikelihood):
    """Poisson likelihood of counts: outputs are logarithms of rates, targets counts, of one shape."""

    kind = "poisson"

    def each(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """NLL = exp(f) - y f + ln y!."""
        log_rate = aligned(output, target, self.kind)
        counts = target.to(log_rate.dtype)
        return log_rate.exp() - counts * log_rate + torch.lgamma(counts + 1), self.counted(target)

    def drawn(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Counts drawn at the rates."""
        return torch.poisson(aligned(output, target, self.kind).exp(), generator=generator)

    def check(self, output: Tensor, target: Tensor) -> None:
        """Counts, of the outputs' shape.

        Raises:
            DataError: with the targets or shapes at fault.
        """
        check_target(target, self.kind)
        aligned(output, target, self.kind)
        if target.numel() and not (float(target.min()) >= 0 and bool((target == target.round()).all())):
            raise DataError(f"poisson targets must be counts 0, 1, 2, ...; got values from {float(target.min()):g}")


class Regression(TermLikelihood):
    r"""Gaussian likelihood with one learned noise per output; outputs and targets of one shape, in any unit.

        NLL = (y - c - s f)^2 / (2 s^2 v) + 1/2 ln(2 pi s^2 v)    per number, f the output of the network

    Location c and scale s are those of the targets once `ockham.core.objective.Objective.prepare` has read them (0 and
    1 before): the network learns standardised targets, and gets back into the user's units when it is done. The noise v
    is fitted together with it.

    Args:
        initial_noise_std: noise standard deviation to start from, in the targets' unit; by default the targets' spread.
        axis: axis of the targets that counts the outputs; each has its own location, scale and noise.
    """

    kind = "regression"

    def __init__(self, initial_noise_std: float | None = None, *, axis: Literal[1, -1] = 1) -> None:
        super().__init__()
        if initial_noise_std is not None and not 0 < initial_noise_std < math.inf:
            raise OckhamError(f"Regression: the noise must be positive and finite; got {initial_noise_std}")
        self.initial_noise_std, self.axis = initial_noise_std, axis
        self.log_noise_std = nn.Parameter(torch.tensor([math.log(initial_noise_std or 1.0)]))
        self.location: Tensor
        self.scale: Tensor
        self.register_buffer("location", torch.zeros(1, dtype=torch.float64), persistent=False)
        self.register_buffer("scale", torch.ones(1, dtype=torch.float64), persistent=False)

    @property
    def noise_variance(self) -> Tensor:
        """The fitted noise variance of every output, float64, in the targets' unit squared, broadcastable to them."""
        return ((2 * self.log_noise_std.detach().double()).exp() * self.scale.double().square()).cpu()

    def set_units(self, location: Tensor, scale: Tensor, noise_std: Tensor) -> None:
        """Location, scale and starting noise (standardised) of the outputs, one number each, broadcastable to targets.

        Args:
            location: c.
            scale: s, positive.
            noise_std: sqrt(v), the start of what is learned.
        """
        device = self.log_noise_std.device
        kind = torch.float32 if device.type == "mps" else torch.float64
        self.location, self.scale = location.to(device, kind), scale.to(device, kind)
        start = noise_std.double() if self.initial_noise_std is None else self.initial_noise_std / scale.double().cpu()
        self.log_noise_std = nn.Parameter(start.log().to(device, self.log_noise_std.dtype))

    def set_noise(self, variance: Tensor) -> None:
        """Fix the noise variance of every output, in the targets' unit squared.

        Raises:
            OckhamError: it is not positive.
        """
        if not bool(((variance > 0) & variance.isfinite()).all()):
            raise OckhamError(
                f"the noise variance must be positive; got {variance.reshape(-1).tolist()[:6]}. A network that fits "
                "its data exactly says nothing about the noise: pass noise_variance="
            )
        start = 0.5 * variance.double().cpu().log() - self.scale.double().cpu().log()
        self.log_noise_std = nn.Parameter(start.to(self.location))

    def standard(self, target: Tensor) -> Tensor:
        """Targets as the network learns them, (y - c) / s, at the precision of the targets or better."""
        return (target.to(self.location.dtype) - self.location) / self.scale

    def outputs_of(self, target: Tensor) -> int:
        """How many outputs a batch of targets has."""
        return 1 if target.ndim < 2 else target.shape[self.axis]

    def each(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """NLL of every number of the targets."""
        found = aligned(output, target, self.kind)
        log_std = self.log_noise_std.to(found.dtype)
        residual = (self.standard(target).to(found.dtype) - found) * (-log_std).exp()
        rest = log_std + (self.scale.log() + 0.5 * math.log(2 * math.pi)).to(found.dtype)
        return 0.5 * residual.square() + rest, self.counted(target)

    def drawn(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Targets one noise deviation from the outputs, of random sign: for one output its curvature is exact."""
        sign = torch.randint(0, 2, target.shape, generator=generator, device=output.device).to(output.dtype)
        found = aligned(output, target, self.kind)
        standard = found + (2 * sign - 1) * self.log_noise_std.detach().exp().to(found.dtype)
        return standard.to(self.location.dtype) * self.scale + self.location

    def check(self, output: Tensor, target: Tensor) -> None:
        """Floating targets of the outputs' shape.

        Raises:
            DataError: with both shapes.
        """
        check_target(target, self.kind)
        if not target.is_floating_point():
            raise DataError(
                f"regression needs floating targets; got {target.dtype}. Use targets.float(), or "
                "likelihood='classification' for classes, 'poisson' for counts"
            )
        aligned(output, target, self.kind)


class Loss(Likelihood):
    """The user's own negative log-likelihood, of any output and target that the function understands.

    Args:
        function: (output, target) to scalar, in nats; with a third argument it also takes the weights of the examples.
        reduction: what it does over the batch, "mean" or "sum".
        terms: function that counts the log-likelihood terms of a batch of targets; by default the examples.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *,
        reduction: Literal["mean", "sum"],
        terms: Callable[[Any], float] | None = None,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise OckhamError(
                f"Loss: reduction says what your loss does over the batch, 'mean' or 'sum'; got {reduction!r}"
            )
        self._function = function
        self._terms = terms
        self.reduction = reduction

    def nll(self, output: Any, target: Any, weight: Tensor | None = None) -> Tensor:
        """The user's loss as a mean per term."""
        value = self._value(output, target, weight)
        return value / (max(1, self.terms(target)) * self.mean_weight) if self.reduction == "sum" else value

    def terms(self, target: Any, weight: Tensor | None = None) -> float:
        """As declared, or the number of examples; the sum of the weights where there are some."""
        if weight is not None:
            return float(weight.sum())
        if self._terms is None:
            sizes = [len(leaf) for leaf in pytree.tree_leaves(target) if isinstance(leaf, Tensor) and leaf.ndim]
            if not sizes:
                raise DataError(
                    f"the examples of a batch cannot be counted from targets of {described(target)}: pass n_data=, or "
                    "ockham.Loss(..., terms=) that counts the log-likelihood terms of a batch"
                )
            return float(sizes[0])
        return float(self._guarded(self._terms, target))

    def output_of(self, found: Any) -> Any:
        """Whatever the network returned."""
        return found

    def looks_summed(self, output: Any, target: Any, weight: Tensor | None = None) -> bool:
        """True when a loss declared as a mean doubles as the batch is doubled: it is plainly a sum."""
        if self.reduction == "sum" or not (isinstance(output, Tensor) and isinstance(target, Tensor)):
            return False
        if target.shape[:1] != output.shape[:1]:
            return False
        with torch.no_grad():
            once = float(self._value(output, target, weight))
            doubled = None if weight is None else torch.cat([weight, weight])
            twice = float(self._value(torch.cat([output, output]), torch.cat([target, target]), doubled))
        return abs(once) > 1e-12 and abs(twice / once - 2) < 1e-3

    def learns(self, output: Any, target: Any, weight: Tensor | None) -> bool:
        """False when the loss does not depend on the output: it was detached, or turned into a number and back."""
        probes = []

        def probe(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                return leaf
            probes.append(leaf.detach().requires_grad_())
            return probes[-1].clone()

        with torch.enable_grad():
            value = self._value(pytree.tree_map(probe, output), target, weight)
        return value.requires_grad or not probes  # an object that only the function understands cannot be probed

    def _value(self, output: Any, target: Any, weight: Tensor | None) -> Tensor:
        value = self._guarded(self._function, output, target, *(() if weight is None else (weight,)))
        if not isinstance(value, Tensor) or value.ndim != 0:
            raise OckhamError(f"the loss must return a scalar tensor; got {described(value)}")
        return value

    def _guarded(self, function: Callable[..., Any], *given: Any) -> Any:
        if len(given) == 3:  # a third argument must be required: optional ones are class weights and such
            try:
                found = inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
            except (TypeError, ValueError):
                found = {}  # type: ignore[assignment]
            takes = [p for p in found.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
            if len(takes) < 3 or takes[2].default is not inspect.Parameter.empty:
                raise OckhamError(
                    "the loader yields sample weights, and the function of ockham.Loss takes none: give it a third "
                    "argument, function(output, target, weight)"
                )
        try:
            return function(*given)
        except (OckhamError, torch.OutOfMemoryError):
            raise
        except PYTHON_ERRORS as error:
            got = ", ".join(described(v) for v in given)
            raise DataError(
                f"the function of ockham.Loss cannot take {got}: {type(error).__name__}: {error}. With output= it gets "
                "another part of the network's answer"
            ) from error


LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    cls.kind: cls for cls in (Classification, Binary, Poisson, Regression, CausalLanguage)
}


def likelihood_from(spec: str | Likelihood) -> Likelihood:
    """The façade's choice by name.

    Raises:
        OckhamError: an unknown name.
    """
    if isinstance(spec, Likelihood):
        return spec
    if spec not in LIKELIHOODS:
        shown = repr(spec) if isinstance(spec, str) else described(spec)
        hint = ". Wrap a loss: ockham.Loss(function, reduction='mean')" if callable(spec) else ""
        raise OckhamError(f"likelihood must be {', '.join(map(repr, LIKELIHOODS))} or a Likelihood; got {shown}{hint}")
    return LIKELIHOODS[spec]()
