"""Is this posterior informative enough to prune from? Asked before the first round."""

from __future__ import annotations

from dataclasses import dataclass

from ockham.posterior.posterior import Posterior
from ockham.reduction.score import score

__all__ = ["Diagnosis", "diagnose"]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the spread of a posterior's precision says.

    Attributes:
        undetermined: share of living weights with P / P0 < 1.05: the data never touched them.
        spread: coefficient of variation of P inside a parameter tensor, averaged over weights; near zero the
            "evidence" is magnitude pruning under another name.
        removable: share of living weights with delta_f > 0.
        noise_cost: what the spread of the posterior should cost in mean NLL, nats per example (to second order),
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
        posterior: before its first reduction.
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
