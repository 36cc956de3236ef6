r"""How much of each matrix goes: one threshold over the whole network on what a weight costs in nats of the loss.

Costs of different matrices are in one unit, nats per log-likelihood term (`solve.single_costs`), so a single number
says for all of them what is too little to stay. Only the *shares* are taken from it; which weights go is decided later,
matrix by matrix, with what the other removals did to the inputs. A sample of each matrix's costs is enough.

The same sample knows the other side of the evidence, what a weight's freedom costs: with n_data terms behind the
network and a prior of the matrix's mean square, removing one weight changes the log evidence by

    delta_f = -n_data s + 1/2 ln(1 + n_data h / P0),      h = 2 s / w^2  per term,   P0 = 1 / mean w^2
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CostSample", "cost_sample", "predicted", "shares_for", "shares_under"]

_SAMPLE = 1 << 15
_MOST_GONE = 0.95
_STEPS = 60


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


def shares_under(samples: Mapping[str, CostSample], threshold: float) -> dict[str, float]:
    """Share of each matrix that costs less than a threshold, at most 95 %."""
    at = torch.tensor(threshold, dtype=torch.float64)
    return {k: min(_MOST_GONE, int(torch.searchsorted(c.costs, at)) / len(c.costs)) for k, c in samples.items()}


def shares_for(samples: Mapping[str, CostSample], keep_share: float) -> dict[str, float]:
    """Shares that stay, matrix by matrix, under the one threshold that leaves ``keep_share`` of all weights."""
    total = sum(c.size for c in samples.values())
    low, high = -60.0, 20.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        gone = shares_under(samples, 10**middle)
        few = sum(gone[k] * c.size for k, c in samples.items()) < (1 - keep_share) * total
        low, high = (middle, high) if few else (low, middle)
    gone = shares_under(samples, 10**high)
    left = sum((1 - gone[k]) * c.size for k, c in samples.items())
    # what the grain of the samples leaves over, or the most that may go of a matrix, is shared by all
    return {k: min(1.0, (1 - gone[k]) * keep_share * total / left) for k in samples}


def predicted(samples: Mapping[str, CostSample], keep_share: float, n_data: float) -> tuple[float, float]:
    """What a reduction costs and frees by the sum over single weights.

    Returns:
        (cost in nats per term, volume in nats): delta_f = volume - n_data x cost.
    """
    cost = volume = 0.0
    for key, kept in shares_for(samples, keep_share).items():
        sample = samples[key]
        gone = round((1 - kept) * len(sample.costs))
        each = sample.size / len(sample.costs)
        cost += each * float(sample.costs[:gone].sum())
        volume += each * 0.5 * float((n_data * sample.determined[:gone]).log1p().sum())
    return cost, volume
