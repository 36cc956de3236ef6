"""The evidence of a posterior, weight by weight, and the orders in which weights may go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ockham.evidence.gaussian import delta_f, expected_nll_cost
from ockham.posterior.posterior import Posterior

if TYPE_CHECKING:
    from ockham.reduction.structures import GroupLike, StructureEvidence

__all__ = ["Evidence", "Salience", "by_delta_f", "by_magnitude", "by_random", "by_snr", "score"]


@dataclass(frozen=True, slots=True, eq=False)
class Evidence(Mapping[str, Tensor]):
    """delta_f of every living weight against the spike at zero, with what a decision may want beside it.

    As a mapping it gives the delta_f of the living weights of a parameter as a flat tensor, in row-major order.

    Attributes:
        delta_f: name to flat tensor over living weights, nats, positive favours removal.
        posterior: what was scored.
    """

    delta_f: Mapping[str, Tensor]
    posterior: Posterior

    def __getitem__(self, name: str) -> Tensor:
        """delta_f of the living weights of one parameter."""
        return self.delta_f[name]

    def __iter__(self) -> Iterator[str]:
        """Parameter names in the order of the network."""
        return iter(self.delta_f)

    def __len__(self) -> int:
        """Number of parameter tensors."""
        return len(self.delta_f)

    def by_group(self, groups: Iterable[GroupLike], **options: Any) -> StructureEvidence:
        """E_g of the structures that ``groups`` names; options and formula: `ockham.reduction.structures`."""
        from ockham.reduction.structures import score_structures

        return score_structures(self, groups, **options)

    def gain(self, keep: Mapping[str, Tensor]) -> float:
        """Summed delta_f, float64 nats, of the living weights that ``keep`` removes (independent weights)."""
        total = 0.0
        for name, delta in self.delta_f.items():
            if name in keep:
                total += float(delta[~keep[name][self.posterior[name].keep]].double().sum())
        return total

    def nll_cost(self, keep: Mapping[str, Tensor]) -> float:
        """Expected rise of the mean NLL, nats per example, if ``keep`` is carried out (independent weights)."""
        total = 0.0
        for name in keep:
            g = self.posterior[name]
            gone = g.keep & ~keep[name]
            prior = torch.broadcast_to(g.prior_precision, g.mean.shape)[gone].double()
            cost = expected_nll_cost(g.mean[gone].double(), g.precision[gone].double(), prior, 1.0)
            total += float(cost.sum())
        return total / self.posterior.n_data


Salience = Callable[[Evidence], Mapping[str, Tensor]]
"""An order of removal: name to one number per living weight; the smallest go first."""


def score(posterior: Posterior) -> Evidence:
    """delta_f of every living weight alone (Savage-Dickey; see `ockham.evidence.gaussian.delta_f`).

    Where the posterior knows correlations the *marginal* precision is used: of two duplicates either one may go, and
    the scores of both do not add.

    Raises:
        OckhamError: the posterior is outside the domain of delta_f.
    """
    result = {}
    for name, g in posterior.items():
        prior = torch.broadcast_to(g.prior_precision, g.mean.shape)[g.keep]
        prior_mean = torch.broadcast_to(g.prior_mean, g.mean.shape)[g.keep]
        result[name] = delta_f(g.mean[g.keep], g.scored_precision[g.keep], prior, prior_mean=prior_mean)
    return Evidence(result, posterior)


def by_snr(evidence: Evidence) -> Mapping[str, Tensor]:
    """P mean^2 with the scored precision: squared signal-to-noise, never worse than delta_f where P is uncertain."""
    return {n: g.scored_precision[g.keep] * g.mean[g.keep].square() for n, g in evidence.posterior.items()}


def by_delta_f(evidence: Evidence) -> Mapping[str, Tensor]:
    """-delta_f: what the evidence likes least goes first."""
    return {name: -delta for name, delta in evidence.items()}


def by_magnitude(evidence: Evidence) -> Mapping[str, Tensor]:
    """|mean|, the usual baseline."""
    return {n: g.mean[g.keep].abs() for n, g in evidence.posterior.items()}


def by_random(seed: int) -> Salience:
    """A random order, the same for the same seed and the same set of living weights."""

    def order(evidence: Evidence) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {n: torch.rand(d.shape, generator=generator).to(d.device) for n, d in evidence.items()}

    return order
