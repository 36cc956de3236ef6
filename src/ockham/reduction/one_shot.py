"""A posterior with some of its weights gone: survivors where the rest of the posterior puts them, without the data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ockham.errors import OckhamError
from ockham.evidence.kronecker import compensated, delta_f_kronecker
from ockham.posterior.matrix import WeightMatrix
from ockham.posterior.posterior import Gaussian, Posterior
from ockham.reduction.rule import BudgetRule
from ockham.reduction.score import score

__all__ = ["COMPENSATION_DAMPING", "joint_delta_f", "reduced", "removed_in_rounds"]

_NEGLIGIBLE = 1e-3
_TOLERANCE = 1e-4
COMPENSATION_DAMPING = 1e-3
"""Ridge of the survivors' move, relative to the mean curvature of their matrix (docs/decisions.md has the table)."""


def reduced(
    posterior: Posterior, keep: Mapping[str, Tensor], damping: float | None = COMPENSATION_DAMPING
) -> Posterior:
    """The posterior given that some weights are zero.

    Independent weights stay where they are. The survivors of a weight matrix with correlations move to their
    conditional mean, all rows together; the bias moves with them.

    Args:
        posterior: of the full network.
        keep: parameter name to boolean tensor, True = stays. Names left out are kept.
        damping: see `ockham.evidence.kronecker.compensated`; None is the exact conditional mean, prior included.

    Returns:
        Means and masks of the survivors, removed weights exactly zero with infinite precision. Conditioning again is
        the same as conditioning once on both sets. Conditional precisions are exact; marginal ones stay those of the
        full posterior, a lower bound, since the exact ones need the inverse of every survivors' block.

    Raises:
        OckhamError: a mask of an unknown parameter, of another shape or not boolean.
    """
    masks = {name: _mask(name, g, keep) for name, g in posterior.items()}
    unknown = [name for name in keep if name not in posterior]
    if unknown:
        raise OckhamError(f"keep names {unknown[:6]}, which this posterior does not have")
    means = {name: g.mean.masked_fill(~masks[name], 0.0) for name, g in posterior.items()}
    for block in posterior.matrices:
        means |= _moved(block, posterior, masks, damping)
    moments = {name: _survivors(g, means[name], masks[name]) for name, g in posterior.items()}
    return replace(posterior, moments=moments)


def removed_in_rounds(
    posterior: Posterior, keep: float | None, protected: Collection[str] = (), rounds: int = 8
) -> Posterior:
    """Remove the least salient weights, let the survivors move, score again, until the budget or the evidence ends it.

    The order is P mean^2 (`by_snr`). With a budget the living weights fall geometrically over the rounds. Without one
    every round counts the weights with delta_f > 0 and removes as many, at most ``1 / rounds`` of the living; it ends
    where there are none, where the evidence of all that went *together* (`joint_delta_f`) falls (that round is taken
    back), and after ``4 * rounds`` rounds in any case. Where no weight can move (no correlations) one round does it.

    Args:
        posterior: of the full network.
        keep: share of the scored weights (those not protected) that stays; None: the evidence decides.
        protected: parameters from which nothing goes.
        rounds: how finely.

    Raises:
        OckhamError: a share outside (0, 1], rounds < 1, or a posterior outside the domain of delta_f.
    """
    if rounds < 1:
        raise OckhamError(f"rounds must be at least 1; got {rounds}")
    rounds = rounds if posterior.matrices else 1
    if keep is None:
        return _until_the_evidence_ends(posterior, protected, rounds)
    if not 0 < keep <= 1:
        raise OckhamError(f"keep is the share of the scored weights that stays, in (0, 1]; got {keep}")
    scored = sum(int(g.keep.sum()) for name, g in posterior.items() if name not in protected)
    for i in range(1, rounds + 1):
        gone = round(scored * (1 - keep ** (i / rounds)))
        posterior = _without(posterior, protected, scored - gone)
    return posterior


def joint_delta_f(posterior: Posterior, keep: Mapping[str, Tensor]) -> float:
    """Log evidence change of removing many weights together, nats, a lower bound.

    Weight matrices with correlations count as `ockham.evidence.kronecker.delta_f_kronecker` says, others by their sum.

    Args:
        posterior: of the full network.
        keep: parameter name to boolean tensor, True = stays. Names left out are kept.
    """
    masks = {name: _mask(name, g, keep) for name, g in posterior.items()}
    total = score(posterior).gain({n: m for n, m in masks.items() if all(n not in b.names for b in posterior.matrices)})
    for block in posterior.matrices:
        means = {name: posterior[name].mean for name in block.names}
        stays = block.pack({name: masks[name] for name in block.names})
        total += delta_f_kronecker(block.pack(means), block.precision, stays, _TOLERANCE)
    return total


def _until_the_evidence_ends(posterior: Posterior, protected: Collection[str], rounds: int) -> Posterior:
    if rounds == 1:
        return _round_of_evidence(posterior, protected, 1.0) or posterior
    full, highest = posterior, joint_delta_f(posterior, {})
    for _ in range(4 * rounds):
        smaller = _round_of_evidence(posterior, protected, 1 / rounds)
        if smaller is None:
            break
        joint = joint_delta_f(full, {name: g.keep for name, g in smaller.items()})
        if joint < highest:
            break
        posterior, highest = smaller, joint
    return posterior


def _round_of_evidence(posterior: Posterior, protected: Collection[str], cap: float) -> Posterior | None:
    """Without as many weights as have delta_f > 0, at most a share ``cap``; None where there are none to speak of."""
    evidence = score(posterior)
    alive = sum(d.numel() for name, d in evidence.items() if name not in protected)
    wanted = sum(int((d > 0).sum()) for name, d in evidence.items() if name not in protected)
    if wanted <= _NEGLIGIBLE * alive:
        return None
    return _without(posterior, protected, alive - min(wanted, max(1, int(cap * alive))))


def _without(posterior: Posterior, protected: Collection[str], scored_left: int) -> Posterior:
    """Down to so many living scored weights, the least salient first."""
    evidence = score(posterior)
    spared = sum(d.numel() for name, d in evidence.items() if name in protected)
    if scored_left + spared == 0:
        raise OckhamError("nothing would be left: keep at least one weight")
    return reduced(posterior, BudgetRule((scored_left + spared) / posterior.size()).decide(evidence, protected))


def _moved(
    block: WeightMatrix, posterior: Posterior, masks: Mapping[str, Tensor], damping: float | None
) -> dict[str, Tensor]:
    stays = block.pack({name: masks[name] for name in block.names})
    means = {name: posterior[name].mean for name in block.names}
    if bool((block.pack(means)[~stays] == 0).all()):
        return {}
    return block.unpack(compensated(block.pack(means), block.precision, stays, damping, _TOLERANCE), means)


def _survivors(g: Gaussian, mean: Tensor, keep: Tensor) -> Gaussian:
    marginal = None if g.marginal_precision is None else g.marginal_precision.masked_fill(~keep, torch.inf)
    precision = g.precision.masked_fill(~keep, torch.inf)
    return replace(g, mean=mean, precision=precision, keep=keep, marginal_precision=marginal)


def _mask(name: str, g: Gaussian, keep: Mapping[str, Tensor]) -> Tensor:
    mask = keep.get(name, g.keep)
    if mask.dtype is not torch.bool or mask.shape != g.mean.shape:
        raise OckhamError(
            f"keep[{name!r}] must be boolean (True = stays) of shape {tuple(g.mean.shape)}; "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    return mask.to(g.keep.device) & g.keep
