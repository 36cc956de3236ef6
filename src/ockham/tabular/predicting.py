"""What a fitted network says: which inputs it rests on, and its predictive distribution over draws."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.special import stdtr, stdtrit
from torch import Tensor

from ockham.choose.paths import NodeRule, by_path, node_inclusion
from ockham.core.posterior import Posterior
from ockham.tabular.columns import Floats
from ockham.tabular.draws import Draws
from ockham.tabular.likelihoods import student_nll

__all__ = [
    "claimed_inclusion",
    "input_inclusion",
    "interval",
    "log_density",
    "moments",
    "noise_std",
    "weights_by_input",
]

_HALVINGS = 25


def moments(draws: Draws, x: Tensor) -> tuple[Tensor, Tensor]:
    """Predictive mean and variance [n] of a regression: disagreement of the networks and noise together."""
    means, variances = [], []
    for location, scale, freedom in draws.with_scales(x):
        means.append(location.mean(0))
        noise = scale.square() * freedom / (freedom - 2)
        variances.append(location.var(0, correction=0) + noise.mean(0))
    return torch.cat(means), torch.cat(variances)


def noise_std(draws: Draws, x: Tensor, weight: Tensor) -> float:
    """Root mean square over rows of these weights, and draws, of the noise's standard deviation."""
    squares = [(scale.square() * freedom / (freedom - 2)).mean(0) for _, scale, freedom in draws.with_scales(x)]
    return float((torch.cat(squares) @ (weight / weight.sum()).double()).sqrt())


def log_density(draws: Draws, x: Tensor, y: Tensor) -> Tensor:
    r"""Ln 1/D sum_d t_f(y; location_d(x), scale_d(x)), nats; [n]."""
    found, begin = [], 0
    for location, scale, freedom in draws.with_scales(x):
        part = y[begin : begin + location.shape[1]]
        begin += len(part)
        each = -student_nll(part - location, scale.log(), freedom)
        found.append(each.logsumexp(0) - math.log(len(each)))
    return torch.cat(found)


def interval(draws: Draws, x: Tensor, coverage: float) -> tuple[Floats, Floats]:
    """Quantiles (1 - coverage) / 2 and (1 + coverage) / 2 of the predictive mixture, [n] each."""
    tail = 0.5 * (1 - coverage)
    parts = [tuple(t.numpy() for t in part) for part in draws.with_scales(x)]
    lower, upper = (np.concatenate([_quantile(q, *part) for part in parts]) for q in (tail, 1 - tail))
    return lower, upper


def _quantile(q: float, location: Floats, scale: Floats, freedom: Floats) -> Floats:
    """Of a mixture of t, by bisection: it lies between the least and the greatest of its components'."""
    each = location + scale * stdtrit(freedom, q)
    low, high = each.min(0), each.max(0)
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        below = stdtr(freedom, (middle - location) / scale).mean(0) < q
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    result: Floats = 0.5 * (low + high)
    return result


def input_inclusion(posterior: Posterior, rule: NodeRule = by_path) -> Tensor:
    """Inclusion of the inputs of a network by a path rule, the direct weights included; float64."""
    chain = {n: g.inclusion[0] for n, g in posterior.items() if _in_chain(n) and g.inclusion is not None}
    through = node_inclusion(chain, rule=rule).inputs.double()
    if "skip.weight" not in posterior:
        return through
    direct = posterior["skip.weight"].inclusion
    assert direct is not None
    return 1 - (1 - through) * (1 - direct[0].double()).prod(0)


def claimed_inclusion(before: Posterior, settled: Posterior, reduced: Posterior) -> Tensor:
    """Inclusion of the inputs before anything was removed; of those that went later no more than was said then."""
    found, after = input_inclusion(before), input_inclusion(settled)
    read = weights_by_input(reduced) > 0
    return torch.where(read, found, torch.minimum(found, after).clamp(max=0.5))


def weights_by_input(posterior: Posterior) -> Tensor:
    """How many living weights read each input of a reduced network."""
    first = next(n for n in posterior if _in_chain(n))
    count = posterior[first].keep[0].sum(0)
    return count + posterior["skip.weight"].keep[0].sum(0) if "skip.weight" in posterior else count


def _in_chain(name: str) -> bool:
    return name.endswith(".weight") and name != "skip.weight"
