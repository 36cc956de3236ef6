"""How much goes, and how much is made up for: damping per kind of matrix, shares, drift, the stop by evidence."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ockham.errors import OckhamError
from ockham.methods.blocks.solve import (
    Damping,
    NofM,
    Quadratic,
    damped,
    quadratic,
    sparse_matrix,
)

__all__ = [
    "DEFAULT_DAMPING",
    "TERMS_PER_WEIGHT",
    "CostSample",
    "DampingProblem",
    "DampingTrial",
    "MatrixEvidence",
    "Shot",
    "best_shot",
    "chosen_damping",
    "cost_sample",
    "freed",
    "lowest",
    "matrix_kind",
    "passes_to",
    "predicted",
    "quick_matrix",
    "removed_cost",
    "sampled_blocks",
    "scaled_samples",
    "shares_for",
    "shares_under",
    "shot_from",
    "shots",
    "single_costs",
    "typical_precision",
]


_SAMPLE = 1 << 15
_LEAST_KEPT = 1 / 3  # of what would stay of a matrix at equal shares: costs of single weights say little beyond it
_STEPS = 60


@dataclass(frozen=True, slots=True)
class MatrixEvidence:
    """What the removal from one matrix did to the evidence.

    Attributes:
        block: name of the block.
        size: weights of the matrix.
        kept: share of its weights that stay.
        cost: rise of the loss, nats per term, by the matrix's curvature and with the survivors moved.
        volume: nats freed, 1/2 sum over the removed of ln(1 + n_data h / P0).
        n_data: terms that the cost counts for.
        prior_precision: P0, one over the mean square of the trained weights.
    """

    block: str
    size: int
    kept: float
    cost: float
    volume: float
    n_data: float
    prior_precision: float

    @property
    def nats(self) -> float:
        """Change of the log evidence, positive where the data prefer the reduced matrix."""
        return self.volume - self.n_data * self.cost


def typical_precision(weight: Tensor) -> float:
    """Precision of a prior under which a matrix's weights are typical: one over their mean square."""
    return 1 / max(float(weight.double().square().mean()), 1e-30)


def freed(
    worth: Tensor,
    factors: tuple[Tensor, Tensor],
    scale: float,
    *,
    gone: Tensor,
    n_data: float,
    prior_precision: float,
) -> float:
    """1/2 sum over removed weights of ln(1 + n_data h / P0), nats: what their freedom had cost.

    Args:
        worth: worth of `Quadratic.conditional`: h in units of the mean diagonal of the curvature.
        factors: A and G, summed.
        scale: rows x terms.
        gone: True where a weight went, ``[groups, outputs, inputs]`` without a bias.
        n_data: terms behind the trained weights.
        prior_precision: P0.
    """
    free = gone.shape[-1]
    unit = factors[0].diagonal(dim1=-2, dim2=-1).mean(-1) * factors[1].diagonal(dim1=-2, dim2=-1).mean(-1) / scale
    determined = worth[..., :free] * unit[:, None, None] / prior_precision
    return 0.5 * float((n_data * determined).log1p().expand_as(gone)[gone].sum(dtype=torch.float64))


def single_costs(weight: Tensor, inputs: Tensor, outputs: Tensor, scale: float, damping: float) -> Tensor:
    r"""What each weight costs by itself, its row making good for it: nats per term, ``[groups, outputs, inputs]``.

        s_rj = 1/2 w_rj^2 G_rr / [A_l^-1]_jj / scale,      A_l = A + damping mean(diag A) I

    Args:
        weight: the matrix.
        inputs: A, summed.
        outputs: G, summed.
        scale: rows x terms; the sums divided by it are the curvature of one term.
        damping: l.
    """
    mean = inputs.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None]
    conditional = mean * Quadratic(damped(inputs, damping), None).conditional().squeeze(-2)
    rows = outputs.diagonal(dim1=-2, dim2=-1).clamp_min(0)
    return 0.5 * weight.square() * (rows[:, :, None] * (conditional[:, None, :] / scale))


@dataclass(frozen=True, slots=True, eq=False)
class CostSample:
    """Costs of some weights of a matrix, rising.

    Attributes:
        costs: s, nats per term.
        determined: h / P0 per term, in the same order.
        size: weights of the whole matrix.
    """

    costs: Tensor
    determined: Tensor
    size: int


def cost_sample(weight: Tensor, costs: Tensor) -> CostSample:
    """Evenly spaced weights of a matrix with their costs, both ``[groups, outputs, inputs]`` without a bias."""
    step = max(1, costs.numel() // _SAMPLE)
    step += step % 2 == 0  # an even step would see some columns only
    s, w = costs.flatten()[::step].double(), weight.flatten()[::step].double()
    square = weight.double().square().mean()
    determined = 2 * s / w.square().clamp_min(1e-30) * square
    order = s.argsort()
    return CostSample(s[order], determined[order], costs.numel())


def shares_under(samples: Mapping[str, CostSample], threshold: float, most: float = 1.0) -> dict[str, float]:
    """Share of each matrix that costs less than a threshold, and not more than ``most``."""
    at = torch.tensor(threshold, dtype=torch.float64)
    return {k: min(most, int(torch.searchsorted(c.costs, at)) / len(c.costs)) for k, c in samples.items()}


def shares_for(samples: Mapping[str, CostSample], keep_share: float) -> dict[str, float]:
    """Shares that stay, matrix by matrix, under the one threshold that leaves ``keep_share`` of all weights.

    No matrix is left with less than a third of ``keep_share``.
    """
    most = 1 - _LEAST_KEPT * keep_share
    total = sum(c.size for c in samples.values())
    low, high = -60.0, 20.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        gone = shares_under(samples, 10**middle, most)
        few = sum(gone[k] * c.size for k, c in samples.items()) < (1 - keep_share) * total
        low, high = (middle, high) if few else (low, middle)
    gone = shares_under(samples, 10**high, most)
    left = sum((1 - gone[k]) * c.size for k, c in samples.items())
    # what the grain of the samples leaves over, or the most that may go of a matrix, is shared by all
    return {k: min(1.0, (1 - gone[k]) * keep_share * total / left) for k in samples}


def passes_to(keep_share: float, passes: int) -> list[float]:
    """Shares that stay after each pass, each the same part of the one before.

    >>> passes_to(0.5, 1), [round(s, 3) for s in passes_to(0.2, 3)]
    ([0.5], [0.585, 0.342, 0.2])
    """
    return [*(keep_share ** (i / passes) for i in range(1, passes)), keep_share]


def predicted(samples: Mapping[str, CostSample], keep_share: float, n_data: float) -> tuple[float, float]:
    """What a reduction costs and frees by the sum over single weights.

    Returns:
        (cost in nats per term, volume in nats): delta_f = volume - n_data x cost.
    """
    cost = volume = 0.0
    for key, kept in shares_for(samples, keep_share).items():
        sample = samples[key]
        cost += removed_cost(sample, kept)
        gone = sample.determined[: round((1 - kept) * len(sample.costs))]
        volume += sample.size / len(sample.costs) * 0.5 * float((n_data * gone).log1p().sum())
    return cost, volume


def removed_cost(sample: CostSample, kept: float) -> float:
    """What the cheapest weights of a matrix cost by themselves, nats per term, where a share of them stays."""
    gone = round((1 - kept) * len(sample.costs))
    return sample.size / len(sample.costs) * float(sample.costs[:gone].sum())


def scaled_samples(
    samples: Mapping[str, CostSample], ratios: Mapping[str, float], power: float
) -> dict[str, CostSample]:
    """Samples with the costs of each kind of matrix times a power of its ratio; kinds without one as they are."""
    return {k: replace(c, costs=c.costs * ratios.get(matrix_kind(k), 1.0) ** power) for k, c in samples.items()}


DEFAULT_DAMPING = Damping(0.05, 0.3)
_INPUTS, _FIRST_INPUTS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0), 3
_OUTPUTS = (0.03, 0.1, 0.3, 0.6, 1.0)
_PER_LOOK = 3
_QUICK, _QUICK_SWAPS = (2, 4), 9


@dataclass(frozen=True, slots=True)
class DampingTrial:
    """What one setting cost where it was tried.

    Attributes:
        kind: kind of matrix.
        damping: the setting.
        cost: nats a term between what the dense network says to the data held out and what it says with some matrices
            of this kind reduced.
    """

    kind: str
    damping: Damping
    cost: float


@dataclass(frozen=True, slots=True, eq=False)
class DampingProblem:
    """A matrix on which a setting is tried.

    Attributes:
        weight: the trained matrix.
        bias: whether its last column is one.
        factors: function to A and G of the data that decide.
        write: function that puts a value into the network.
        restore: function that puts the trained one back, to the bits.
    """

    weight: Tensor
    bias: bool
    factors: Callable[[], tuple[Tensor, Tensor]]
    write: Callable[[Tensor], None]
    restore: Callable[[], None]


def matrix_kind(key: str) -> str:
    """A matrix's name with N for its numbers: those that differ by depth or expert only are of one kind.

    >>> matrix_kind("model.layers.12.mlp.experts.down_proj[3]"), matrix_kind("layer2.0.conv1.weight")
    ('model.layers.N.mlp.experts.down_proj[N]', 'layer2.N.conv1.weight')
    """
    return re.sub(r"(?<![^.\[])\d+(?![^.\]])", "N", key)


def sampled_blocks(kinds: Sequence[frozenset[str]]) -> list[int]:
    """Blocks to try settings on: of every set of kinds up to three, evenly spaced, not the ends."""
    found: list[int] = []
    for look in dict.fromkeys(kinds):
        alike = [i for i, k in enumerate(kinds) if k == look]
        count = min(_PER_LOOK, len(alike))
        found += [alike[(2 * i + 1) * len(alike) // (2 * count)] for i in range(count)]
    return sorted(set(found))


def chosen_damping(
    kind: str,
    problems: Sequence[DampingProblem],
    keep: float | NofM,
    distance: Callable[[], float],
    rounds: int | None = None,
) -> list[DampingTrial]:
    """Go down in lambda at the usual tau, then in tau at the best lambda, on all problems at once.

    Each way leads along its grid from a usual value to where the distance grows. The network is as before then.

    Args:
        kind: kind of matrix.
        problems: some matrices of it.
        keep: share or pattern that stays.
        distance: function to how far the network is from the dense one on data held out.
        rounds: rounds of `sparse_matrix`.

    Returns:
        Every trial, the best first; those without a distance (NaN) last.
    """
    found: dict[Damping, DampingTrial] = {}

    def cost(damping: Damping) -> float:
        if damping not in found:
            for p in problems:
                p.write(quick_matrix(p, quadratic(*p.factors(), damping), keep, rounds))
            found[damping] = DampingTrial(kind, damping, distance())
        return found[damping].cost

    try:
        tau = DEFAULT_DAMPING.outputs
        best = lowest([Damping(v, tau) for v in _INPUTS], _FIRST_INPUTS, cost).inputs
        lowest([Damping(best, v) for v in _OUTPUTS], _OUTPUTS.index(tau), cost)
    finally:
        for p in problems:
            p.restore()
    return sorted(found.values(), key=lambda t: (math.isnan(t.cost), t.cost))


def quick_matrix(problem: DampingProblem, curvature: Quadratic, keep: float | NofM, rounds: int | None) -> Tensor:
    """A matrix reduced with fewer steps than in the end: enough to tell settings apart."""
    options: dict[str, Any] = {"rounds": rounds and min(2, rounds), "swaps": _QUICK_SWAPS, "steps": _QUICK}
    return sparse_matrix(problem.weight, curvature, keep=keep, bias=problem.bias, **options)


def lowest(line: Sequence[Damping], start: int, cost: Callable[[Damping], float]) -> Damping:
    """Where the cost ends to fall along a line, from the start to one side, and to the other if that brings nothing."""
    at = start
    for step in (-1, 1):
        while 0 <= at + step < len(line) and cost(line[at + step]) < cost(line[at]):
            at += step
        if at != start:
            break
    return line[at]


TERMS_PER_WEIGHT = 20
_SHOTS = 4
_NEAR = 0.015
_LEAST, _MOST = 0.02, 0.98


@dataclass(frozen=True, slots=True)
class Shot:
    """One reduced network, judged.

    Attributes:
        keep_share: weights that stay.
        rise: mean held-out NLL minus that of the dense network, nats per term.
        rise_error: standard error of it over held-out cases, paired.
        volume: nats freed.
        n_data: terms that the rise counts for.
    """

    keep_share: float
    rise: float
    rise_error: float
    volume: float
    n_data: float

    @property
    def nats(self) -> float:
        """Change of the log evidence against the dense network."""
        return self.volume - self.n_data * self.rise

    @property
    def certainty(self) -> float:
        """Probability that the evidence is not below the dense network's, over the draw of held-out data."""
        if self.rise_error == 0:
            return float(self.nats >= 0)
        return 0.5 * math.erfc(-self.nats / (self.n_data * self.rise_error) / math.sqrt(2))


def shot_from(
    keep_share: float, dense: tuple[Tensor, Tensor], reduced: tuple[Tensor, Tensor], volume: float, n_data: float
) -> Shot:
    """Judge a reduced network by its and the dense network's NLL and terms on the same cases (`study.loss_of`)."""
    rises, terms = reduced[0] - dense[0], dense[1]
    mean = float(rises.sum() / terms.sum())
    # of a ratio: the residuals of the cases about the common rise, over the terms
    spread = (rises - mean * terms).square().sum() * len(terms) / max(1, len(terms) - 1)
    return Shot(keep_share, mean, math.sqrt(float(spread)) / float(terms.sum()), volume, n_data)


def shots(
    samples: Mapping[str, CostSample], n_data: float, fire: Callable[[float], Shot], most: int = _SHOTS
) -> list[Shot]:
    """Reduce again and again until the share at which delta_f is zero is known to about 1.5 points.

    Args:
        samples: samples of the costs of single weights.
        n_data: terms behind the trained weights.
        fire: function from a share that stays to a network reduced to it, judged.
        most: shots at most.

    Returns:
        The shots in order.

    Raises:
        OckhamError: there are no samples.
    """
    if not samples:
        raise OckhamError("there is nothing that may go")
    found: list[Shot] = []
    scale = 1.0
    while len(found) < most:
        low, share = _LEAST, _MOST
        for _ in range(30):  # where volume = n_data x scale x cost
            middle = (low + share) / 2
            cost, volume = predicted(samples, middle, n_data)
            low, share = (low, middle) if volume >= n_data * scale * cost else (middle, share)
        good = [s.keep_share for s in found if s.nats >= 0]
        bad = [s.keep_share for s in found if s.nats < 0]
        if good and bad and not max(bad) < share < min(good):
            share = (max(bad) + min(good)) / 2
        if bad and not good and share < max(bad) + _NEAR:  # the prediction knows nothing: halve what goes
            share = (max(bad) + 1) / 2
        if any(abs(share - s.keep_share) < _NEAR for s in found):
            break
        shot = fire(share)
        found.append(shot)
        scale = max(shot.rise, 1e-9) / max(predicted(samples, share, n_data)[0], 1e-30)
    return found


def best_shot(found: Sequence[Shot]) -> Shot | None:
    """The smallest network whose evidence is not below the dense one's; None where there is none."""
    good = [s for s in found if s.nats >= 0]
    return min(good, key=lambda s: s.keep_share, default=None)
