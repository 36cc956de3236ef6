r"""One pass over the data: the curvature of the summed negative log-likelihood, for any layer.

Two estimates, both positive semidefinite. With g the gradient of one example's NLL,

    Monte Carlo GGN     E g g',  targets drawn from the network's own predictive (= Fisher for these likelihoods)
    empirical Fisher    E g g',  targets as the data have them

kept either as a diagonal (any parameter, by `torch.func.vmap` over examples) or as Kronecker factors A and G (`taps`).
The network is in evaluation mode: no dropout, statistics of BatchNorm as they are. Weights of examples multiply g g'.

Reference: Martens 2020, New insights and perspectives on the natural gradient method, arXiv 1412.1193; Kunstner,
Hennig & Balles 2019, arXiv 1905.12558 (what the empirical Fisher is not).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from ockham.core.batch import Batch, Substituted
from ockham.core.likelihood import TermLikelihood
from ockham.core.objective import Objective, blame
from ockham.errors import DataError, OckhamError

__all__ = ["ExampleGradients", "Score"]

_CHUNK_NUMBERS = 1 << 24


@dataclass(frozen=True, slots=True)
class Score:
    """Which gradients a curvature is made of.

    Attributes:
        objective: how the network is called, and the likelihood.
        empirical: whether gradients are taken at the data's own targets, or at targets drawn from the network.

    Raises:
        OckhamError: targets should be drawn, and the likelihood is a loss of one's own.
    """

    objective: Objective
    empirical: bool = False

    def __post_init__(self) -> None:
        if not self.empirical and not isinstance(self.objective.likelihood, TermLikelihood):
            raise OckhamError(
                f"a Monte Carlo GGN needs a likelihood to draw targets from, such as classification or regression; got "
                f"{type(self.objective.likelihood).__name__}. Pass fisher='empirical' for a loss of your own"
            )

    def drawn(self, output: Any, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with the targets that gradients are taken at, and roots of the weights of its terms.

        Raises:
            DataError: inputs or outputs are not finite, or there are weights and the likelihood is a loss of one's own.
        """
        likelihood = self.objective.likelihood
        if isinstance(output, Tensor) and bool(output.isnan().any()):
            raise DataError(blame(batch, output))
        if not isinstance(likelihood, TermLikelihood):
            if batch.weight is not None:
                raise DataError("a curvature takes no sample weights with ockham.Loss: put them into the likelihood")
            return batch
        weights = likelihood.term_weights(batch.target, batch.weight)
        target = batch.target if self.empirical else likelihood.drawn(output, batch.target, generator)
        return replace(batch, target=target, weight=None if weights is None else weights.sqrt())

    def nll(self, output: Any, batch: Batch) -> Tensor:
        """Summed negative log-likelihood of a drawn batch, nats."""
        likelihood = self.objective.likelihood
        if isinstance(likelihood, TermLikelihood):
            return likelihood.total(output, batch.target, batch.weight)
        return self.objective.nll(output, batch) * self.objective.terms(batch)


class ExampleGradients:
    """Gradients of single examples with respect to some parameters of a network, by vmap or, failing that, one by one.

    Args:
        model: in evaluation mode; it is not changed.
        names: parameters to differentiate; all others are constants.
        score: which gradients.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], score: Score) -> None:
        every = dict(model.named_parameters())
        self._model, self._score = model, score
        self.parameters = {name: every[name].detach() for name in names}
        self._rest = {n: p.detach() for n, p in every.items() if n not in self.parameters}
        self._rest |= {n: b.detach() for n, b in model.named_buffers()}
        self._one_by_one = False
        size = max(1, sum(p.numel() for p in self.parameters.values()))
        self.chunk = max(1, min(64, _CHUNK_NUMBERS // size))

    def chunks(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """Gradients [examples, *shape of the parameter] by name, for some examples of a drawn batch at a time."""
        for start in range(0, batch.size, self.chunk):
            yield self._of(batch.part(slice(start, start + self.chunk)))

    def _of(self, batch: Batch) -> dict[str, Tensor]:
        size = batch.size
        leaves, spec = pytree.tree_flatten((batch.args, dict(batch.kwargs), batch.target, batch.weight))
        each = [isinstance(v, Tensor) and v.ndim > 0 and len(v) == size for v in leaves]
        moving = [v for v, moves in zip(leaves, each, strict=True) if moves]

        def loss(parameters: Mapping[str, Tensor], *parts: Tensor) -> Tensor:
            rest = iter(parts)
            whole = [next(rest).unsqueeze(0) if moves else v for v, moves in zip(leaves, each, strict=True)]
            one = Batch(*pytree.tree_unflatten(whole, spec))
            tensors = {**self._rest, **parameters}
            return self._score.nll(self._score.objective.answer(Substituted(self._model, tensors), one), one)

        if not self._one_by_one:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a missing batching rule costs time, nothing else
                    return vmap(grad(loss), in_dims=(None, *[0] * len(moving)))(self.parameters, *moving)  # type: ignore[no-any-return]
            except (RuntimeError, DataError):
                self._one_by_one = True
        examples = [grad(loss)(self.parameters, *(v[i] for v in moving)) for i in range(size)]
        return {name: torch.stack([e[name] for e in examples]) for name in self.parameters}
