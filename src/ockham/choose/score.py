"""The evidence of a posterior, weight by weight, and the orders in which weights may go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ockham.core.posterior import Gaussian, Posterior
from ockham.evidence.gaussian import delta_f, expected_nll_cost

if TYPE_CHECKING:
    from ockham.choose.units import GroupLike, StructureEvidence

__all__ = [
    "Diagnosis",
    "Evidence",
    "Salience",
    "by_delta_f",
    "by_magnitude",
    "by_random",
    "by_snr",
    "diagnose",
    "score",
]


@dataclass(frozen=True, slots=True, eq=False)
class Evidence(Mapping[str, Tensor]):
    """delta_f of every living weight against the spike at zero, with what a decision may want beside it.

    As a mapping it gives the delta_f of the living weights of a parameter as a flat tensor, in row-major order.

    Attributes:
        delta_f: name to flat tensor over living weights, nats, positive favours removal.
        posterior: the posterior that was scored.
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
        """E_g of the structures that ``groups`` names; options and formula: `ockham.choose.units`."""
        from ockham.choose.units import score_structures

        return score_structures(self, groups, **options)

    def gain(self, keep: Mapping[str, Tensor]) -> float:
        """Summed delta_f, float64 nats, of the living weights that ``keep`` removes (independent weights)."""
        total = 0.0
        for name, delta in self.delta_f.items():
            if name in keep:
                total += float(delta[~keep[name][self.posterior[name].keep]].sum(dtype=torch.float64))
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
        alive = _living(g)
        prior, prior_mean = alive(g.prior_precision), alive(g.prior_mean)
        result[name] = delta_f(alive(g.mean), alive(g.scored_precision), prior, prior_mean=prior_mean)
    return Evidence(result, posterior)


def _living(g: Gaussian) -> Callable[[Tensor], Tensor]:
    """Values of the living weights, flat: a view where all live; one number for all stays one number."""
    if bool(g.keep.all()):
        return lambda t: t if t.ndim == 0 and g.mean.ndim else t.expand(g.mean.shape).reshape(-1)
    return lambda t: t if t.ndim == 0 and g.mean.ndim else t.expand(g.mean.shape)[g.keep]


def by_snr(evidence: Evidence) -> Mapping[str, Tensor]:
    """P mean^2 with the scored precision: squared signal-to-noise, never worse than delta_f where P is uncertain."""
    found = {}
    for name, g in evidence.posterior.items():
        alive = _living(g)
        found[name] = alive(g.mean).square().mul_(alive(g.scored_precision))
    return found


def by_delta_f(evidence: Evidence) -> Mapping[str, Tensor]:
    """-delta_f: what the evidence likes least goes first."""
    return {name: -delta for name, delta in evidence.items()}


def by_magnitude(evidence: Evidence) -> Mapping[str, Tensor]:
    """|mean|, the usual baseline."""
    return {n: _living(g)(g.mean).abs() for n, g in evidence.posterior.items()}


def by_random(seed: int) -> Salience:
    """A random order, the same for the same seed and the same set of living weights."""

    def order(evidence: Evidence) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {n: torch.rand(d.shape, generator=generator).to(d.device) for n, d in evidence.items()}

    return order


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the spread of a posterior's precision says.

    Attributes:
        undetermined: share of living weights with P / P0 < 1.05: the data never touched them.
        spread: coefficient of variation of P inside a parameter tensor, averaged over weights; near zero the
            "evidence" is magnitude pruning under another name.
        removable: share of living weights with delta_f > 0.
        noise_cost: price of the posterior's spread in mean NLL, nats per example (to second order),
            (T/N) sum 1/2 (1 - P0/P). A settled posterior cannot pay more for its spread than its whole loss.
        nll: the mean NLL that was measured under the posterior, nats per example; None where it was not given.
        warnings: sentences for people; empty when the posterior can support pruning.
    """

    undetermined: float
    spread: float
    removable: float
    warnings: tuple[str, ...]
    noise_cost: float = 0.0
    nll: float | None = None

    @property
    def settled(self) -> bool | None:
        """Whether the standard deviations agree with the loss (noise_cost <= nll); None where no loss was given.

        Standard deviations that are still growing are too small, their Occam factors too large: evidence is inflated.
        """
        return None if self.nll is None else self.noise_cost <= self.nll


def diagnose(posterior: Posterior, nll: float | None = None) -> Diagnosis:
    """Share of undetermined weights, relative spread of the precision, and what follows from them.

    Args:
        posterior: the posterior before its first reduction.
        nll: mean negative log-likelihood under its draws, nats per example, to see whether it has settled.

    Reference: the noise cost is the second-order term of `expected_nll_cost` with all means in place.
    """
    alive = max(1, posterior.kept())
    undetermined = spread = noise = 0.0
    for g in posterior.values():
        ratio = (g.precision / g.prior_precision)[g.keep].double()
        undetermined += float((ratio < 1.05).sum())
        noise += 0.5 * float((1 - 1 / ratio).sum())
        if ratio.numel() > 1:
            spread += float(ratio.std() / ratio.mean()) * ratio.numel()
    removable = sum(float((d > 0).sum()) for d in score(posterior).values())
    shares = undetermined / alive, spread / alive, removable / alive
    cost = noise * posterior.temperature / posterior.n_data
    return Diagnosis(*shares, _warnings(posterior, *shares), cost, nll)


def _warnings(posterior: Posterior, undetermined: float, spread: float, removable: float) -> tuple[str, ...]:
    found = []
    if undetermined > 0.5:
        found.append(
            f"{undetermined:.0%} of the weights are undetermined (posterior = prior): for them delta_f is no evidence. "
            "Train longer, use a wider prior, or rank by P mean^2 with a budget."
        )
    if spread < 0.02:
        found.append(
            f"the posterior precision hardly varies inside a layer (relative spread {spread:.1%}): delta_f is "
            "magnitude pruning here. Train the posterior longer or warm-start its precision."
        )
    if removable == 0.0:
        found.append("no weight has evidence for removal; a wider prior asks a stronger question, a budget forces one.")
    if posterior.temperature != 1.0:
        found.append(f"the posterior is tempered (T = {posterior.temperature:g}): its evidence is tempered evidence.")
    return tuple(found)
