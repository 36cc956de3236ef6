"""Rules for gated structures: functions from a table of gates to one score each; a structure goes where its score >= 0.

Every rule sees the same `GateTable` and ranks the same way, highest score first out, so that rules can be compared at
matched compression. Rules without a stopping point of their own (E[theta], norms, Taylor, random) have scores below
zero wherever there is anything left to lose: they order, and a budget must say how many go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ockham.errors import OckhamError
from ockham.methods.gates import lognormal

__all__ = [
    "GateEvidence",
    "GateRule",
    "GateTable",
    "bmrs_n",
    "bmrs_n_printed",
    "bmrs_u",
    "by_mean",
    "by_norm",
    "by_taylor",
    "gate_evidence",
    "in_random_order",
    "snr_below",
]

NO_EVIDENCE = 0.01
"""Nats: a gate whose posterior is closer than this to its prior was not asked by the data."""


@dataclass(frozen=True, slots=True, eq=False)
class GateTable:
    """What a rule sees, one entry per gate, float64.

    Attributes:
        mean: mean of the uncut normal posterior of ln theta.
        std: standard deviation of the uncut normal posterior.
        low: lower end of ln theta.
        high: upper end.
        layer: number of the group of structures that the gate belongs to.
        norm: L2 norm of the weights that make the structure, over the mean norm in its group.
        sensitivity: mean square of dL/d ln theta, a batch at a time; None where no gradients were given.
    """

    mean: Tensor
    std: Tensor
    low: float
    high: float
    layer: Tensor
    norm: Tensor
    sensitivity: Tensor | None = None


GateRule = Callable[[GateTable], Tensor]
"""Table to scores [gates]; a structure goes where its score is >= 0, the highest first."""


def bmrs_n(table: GateTable) -> Tensor:
    """BMRS_N as released: true delta_f + 1/2 ln 2 pi (the constant is missing in its code).

    Trained gates that are of no use sit where the posterior approaches the prior and the true delta_f approaches 0 from
    below; the threshold -1/2 ln 2 pi is what makes the published rule remove them.
    """
    return bmrs_n_printed(table) + 0.5 * math.log(2 * math.pi)


def bmrs_n_printed(table: GateTable) -> Tensor:
    """BMRS_N as printed: the true delta_f, nats."""
    return lognormal.delta_f_n(table.mean, table.std, low=table.low, high=table.high)


def bmrs_u(bits: float, reduced_low: float = -23.0 * math.log(2.0)) -> GateRule:
    """BMRS_U: the true delta_f of a uniform reduced prior on [reduced_low, -bits ln 2].

    With the published lower end, 2^-23, mass below it counts *against* removal: a gate at e^-18 stays. The lower end of
    the prior, -20, mends that.
    """

    def rule(table: GateTable) -> Tensor:
        given = {"reduced_low": reduced_low, "low": table.low, "high": table.high}
        return lognormal.delta_f_u(table.mean, table.std, bits, **given)

    return rule


def snr_below(limit: float) -> GateRule:
    """Signal-to-noise ratio: score ln limit - ln SNR."""

    def rule(table: GateTable) -> Tensor:
        return math.log(limit) - lognormal.snr(table.mean, table.std, low=table.low, high=table.high).log()

    return rule


def by_mean(table: GateTable) -> Tensor:
    """Order of E[theta], smallest first: score -E[theta] < 0; needs a budget."""
    return -lognormal.moment(table.mean, table.std, 1, low=table.low, high=table.high)


def by_norm(table: GateTable) -> Tensor:
    """Order of the weights' L2 norm within each layer, smallest first: score -norm; needs a budget."""
    return -table.norm


def by_taylor(table: GateTable) -> Tensor:
    """Order of the first-order Taylor importance, smallest first: score -E[(dL/d ln theta)^2]; needs a budget.

    Reference: Molchanov et al., Importance estimation for neural network pruning, CVPR 2019.

    Raises:
        OckhamError: the table has no gradients.
    """
    if table.sensitivity is None:
        raise OckhamError(
            "the Taylor rule needs gradients: call backward() on a loss before evidence('taylor'), or pass "
            "sensitivity=ockham.gate_sensitivity(...)"
        )
    return -table.sensitivity


def in_random_order(seed: int = 0) -> GateRule:
    """Any order: scores in (-1, 0), the same for the same seed and number of gates; needs a budget."""

    def rule(table: GateTable) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(table.mean.numel(), generator=generator, dtype=torch.float64) - 1 - 1e-9
        return drawn.to(table.mean.device)

    return rule


@dataclass(frozen=True, slots=True, eq=False)
class GateEvidence:
    """What a rule says of every structure.

    Attributes:
        score: group id to scores [units]; a structure goes where its score is >= 0.
        delta_f: group id to the true delta_f_n [units], nats, whatever the rule; positive favours removal.
        kl: group id to the KL of posterior from prior [units], nats.
        mean: group id to E[theta] [units].
        alive: group id to booleans [units], False where removed before.
    """

    score: Mapping[str, Tensor]
    delta_f: Mapping[str, Tensor]
    kl: Mapping[str, Tensor]
    mean: Mapping[str, Tensor]
    alive: Mapping[str, Tensor]

    @property
    def keep(self) -> dict[str, Tensor]:
        """Booleans [units] by group id, True = stays. The last structure of a group always stays."""
        found = {}
        for key, score in self.score.items():
            alive = self.alive[key]
            found[key] = alive & (score < 0)
            if bool(alive.any()) and not bool(found[key].any()):
                best = int(torch.where(alive, score, math.inf).argmin())
                found[key] = torch.arange(score.numel(), device=score.device) == best
        return found

    @property
    def no_evidence(self) -> dict[str, Tensor]:
        """Booleans [units] by group id: alive, and posterior = prior to within 0.01 nats. delta_f says nothing then."""
        return {k: self.alive[k] & (v < NO_EVIDENCE) for k, v in self.kl.items()}

    def matched(self, removed: int) -> dict[str, Tensor]:
        """Keep masks with a given number of structures removed in all, by order of score.

        Args:
            removed: number of structures, those removed before included.

        Returns:
            As `keep`; fewer go where every group is down to one structure.
        """
        masks = {k: a.clone() for k, a in self.alive.items()}
        gone = sum(int((~a).sum()) for a in self.alive.values())
        flat = [(float(s[i]), k, i) for k, s in self.score.items() for i in self.alive[k].nonzero().flatten().tolist()]
        for _, key, unit in sorted(flat, key=lambda entry: -entry[0]):
            if gone >= removed:
                break
            if int(masks[key].sum()) > 1:
                masks[key][unit] = False
                gone += 1
        return masks

    def __str__(self) -> str:
        lines = []
        for key, keep in self.keep.items():
            alive, undecided = int(self.alive[key].sum()), int(self.no_evidence[key].sum())
            said = f", {undecided} with posterior = prior (no evidence)" if undecided else ""
            best = self.delta_f[key][self.alive[key]]
            spread = f"delta_f from {float(best.min()):.3g} to {float(best.max()):.3g} nats" if alive else ""
            lines.append(f"{key}: {int(keep.sum())} of {keep.numel()} stay ({alive} before; {spread}{said})")
        return "\n".join(lines)


def gate_evidence(table: GateTable, rule: GateRule, groups: Mapping[str, Tensor], alive: Tensor) -> GateEvidence:
    """Score all gates by a rule.

    Args:
        table: facts of all gates.
        rule: function from a table to scores.
        groups: group id to places [units] in the table.
        alive: booleans [gates].

    Raises:
        OckhamError: the rule returns something else than one number per gate.
    """
    score = rule(table)
    if score.shape != table.mean.shape or bool(score.isnan().any()):
        raise OckhamError(f"a rule must return one number per gate, {tuple(table.mean.shape)}; got {score}")
    ends = {"low": table.low, "high": table.high}
    columns = (
        score,
        lognormal.delta_f_n(table.mean, table.std, **ends),
        lognormal.kl(table.mean, table.std, **ends),
        lognormal.moment(table.mean, table.std, 1, **ends),
        alive,
    )
    return GateEvidence(*({k: column[places].cpu() for k, places in groups.items()} for column in columns))
