r"""One pass over the data: the curvature of the summed negative log-likelihood, for any layer.

Two estimates, both positive semidefinite. With g the gradient of one example's NLL,

    Monte Carlo GGN     E g g',  targets drawn from the network's own predictive (= Fisher for these likelihoods)
    empirical Fisher    E g g',  targets as the data have them

kept either as a diagonal (any parameter, by `torch.func.vmap` over examples) or as Kronecker factors A and G (`taps`).
The network is in evaluation mode: no dropout, statistics of BatchNorm as they are.

Reference: Martens 2020, New insights and perspectives on the natural gradient method, arXiv 1412.1193; Kunstner,
Hennig & Balles 2019, arXiv 1905.12558 (what the empirical Fisher is not).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree

from ockham.errors import DataError, OckhamError

__all__ = [
    "ExampleGradients",
    "Score",
    "empirical_fisher",
    "empirical_regression",
    "monte_carlo_classification",
    "monte_carlo_regression",
    "outputs",
]

_CHUNK_NUMBERS = 1 << 24


@dataclass(frozen=True, slots=True)
class Score:
    """Which gradients a curvature is made of.

    Attributes:
        targets: (outputs, the data's targets, generator) to the targets that gradients are taken at.
        nll: (outputs, targets) to the *summed* negative log-likelihood, nats.
        terms: how many log-likelihood terms the data's targets hold.
        residual: (outputs, the data's targets) to a summed squared residual, for a noise variance; 0 where there is
            none to estimate.
    """

    targets: Callable[[Tensor, Tensor, torch.Generator], Tensor]
    nll: Callable[[Tensor, Tensor], Tensor]
    terms: Callable[[Tensor], int]
    residual: Callable[[Tensor, Tensor], float] = lambda output, target: 0.0


def monte_carlo_classification(ignore_index: int = -100) -> Score:
    """Labels drawn from softmax(outputs), [N, K, ...]; padding (``ignore_index``) stays padding."""

    def draw(output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        p = output.softmax(1).movedim(1, -1)
        label = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).view(target.shape)
        return torch.where(target == ignore_index, target, label)

    def nll(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, ignore_index=ignore_index, reduction="sum")

    return Score(draw, nll, lambda y: int((y != ignore_index).sum()))


def monte_carlo_regression() -> Score:
    """Unit-variance Gaussian likelihood; residuals of random sign, which is exact for a single output.

    Curvature scales with 1/noise variance, which is applied afterwards.
    """

    def draw(output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        sign = torch.randint(0, 2, output.shape, generator=generator, device=output.device).to(output.dtype)
        return (output + 2 * sign - 1).view(target.shape)

    return Score(draw, _half_square, lambda y: y.numel(), _residual)


def empirical_regression() -> Score:
    """The data's own targets under a unit-variance Gaussian; its curvature scales with 1/noise variance squared."""
    return Score(lambda output, target, generator: target, _half_square, lambda y: y.numel(), _residual)


def empirical_fisher(nll: Callable[[Tensor, Tensor], Tensor], terms: Callable[[Tensor], int]) -> Score:
    """The data's own targets under any *summed* negative log-likelihood."""
    return Score(lambda output, target, generator: target, nll, terms)


class ExampleGradients:
    """Gradients of single examples with respect to some parameters of a network, by vmap or, failing that, one by one.

    Args:
        model: in evaluation mode; it is not changed.
        names: parameters to differentiate; all others are constants.
        nll: (outputs, targets) to the summed NLL.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], nll: Callable[[Tensor, Tensor], Tensor]) -> None:
        every = dict(model.named_parameters())
        self._model, self._nll = model, nll
        self.parameters = {name: every[name].detach() for name in names}
        self._rest = {n: p.detach() for n, p in every.items() if n not in self.parameters}
        self._rest |= {n: b.detach() for n, b in model.named_buffers()}
        self._one_by_one = False
        size = max(1, sum(p.numel() for p in self.parameters.values()))
        self.chunk = max(1, min(64, _CHUNK_NUMBERS // size))

    def chunks(self, x: Any, target: Tensor) -> Iterator[dict[str, Tensor]]:
        """Gradients [examples, *shape of the parameter] by name, for some examples of the batch at a time."""
        for start in range(0, len(target), self.chunk):
            part = slice(start, start + self.chunk)
            yield self._of(_at(x, part), target[part])

    def _of(self, x: Any, target: Tensor) -> dict[str, Tensor]:
        if not self._one_by_one:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a missing batching rule costs time, nothing else
                    return vmap(grad(self._loss), in_dims=(None, 0, 0))(self.parameters, x, target)  # type: ignore[no-any-return]
            except RuntimeError:
                self._one_by_one = True
        examples = [grad(self._loss)(self.parameters, _at(x, i), target[i]) for i in range(len(target))]
        return {name: torch.stack([e[name] for e in examples]) for name in self.parameters}

    def _loss(self, parameters: Mapping[str, Tensor], x: Any, target: Tensor) -> Tensor:
        one = pytree.tree_map(lambda t: t.unsqueeze(0), x)
        output = _call(self._model, {**self._rest, **parameters}, one)
        return self._nll(output, target.unsqueeze(0))


def _half_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (target - output.reshape(target.shape)).square().sum()


def _residual(output: Tensor, target: Tensor) -> float:
    return float((target - output.reshape(target.shape)).double().square().sum())


def outputs(model: nn.Module, x: Any) -> Tensor:
    """What the network answers; one tensor [N, ...].

    Raises:
        DataError: the network cannot take these inputs, or answers with something else.
    """
    try:
        found = model(**x) if isinstance(x, Mapping) else model(*x) if isinstance(x, (tuple, list)) else model(x)
    except RuntimeError as error:
        raise DataError(f"the network cannot take the data's inputs: {error}") from error
    if not isinstance(found, Tensor):
        raise OckhamError(f"a Laplace posterior needs a network with one output tensor; got {type(found).__name__}")
    return found


def _call(model: nn.Module, tensors: dict[str, Tensor], x: Any) -> Tensor:
    if isinstance(x, Mapping):
        return functional_call(model, tensors, (), dict(x))  # type: ignore[no-any-return]
    return functional_call(model, tensors, tuple(x) if isinstance(x, (tuple, list)) else (x,))  # type: ignore[no-any-return]


def _at(x: Any, part: Any) -> Any:
    return pytree.tree_map(lambda t: t[part], x)
