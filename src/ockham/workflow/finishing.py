"""The last step of a run with structures: units that became constants fold into the next bias, posterior and all."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ockham.posterior.posterior import Gaussian, Posterior
from ockham.surgery.folding import Constant, constants, fold
from ockham.surgery.groups import Plan, plan_masks
from ockham.surgery.shrinking import shrink, verify
from ockham.surgery.tracing import trace
from ockham.workflow.origin import Origin

__all__ = ["fold_constants"]


def fold_constants(
    model: nn.Module,
    posterior: Posterior,
    origin: Origin,
    *,
    example_inputs: Any,
    ignore: tuple[Any, ...],
    round_to: int = 1,
) -> tuple[nn.Module, Posterior, Plan]:
    """Take out the units whose making weights are all gone; what they add moves into biases.

    The mean network computes the same function, which is proved on the example inputs. In the posterior a bias that
    takes a constant c over from weights w becomes b + sum c w: mean and variance add up, and it lives again if it was
    removed. Widths stay multiples of ``round_to`` where they are, and no group is emptied.

    Returns:
        The network, its posterior, and the plan from the first network to it.

    Raises:
        MismatchError: the folded network computes something else.
    """
    groups = trace(model, example_inputs, ignore=ignore)
    alive = {name: g.keep.reshape(-1) for name, g in posterior.items()}
    made = {}
    for group in groups:
        count = torch.zeros(group.size, dtype=torch.long)
        for name, at in group.incoming_cuts():
            if name not in alive or posterior[name].mean.ndim > 1:
                count += alive[name][at].sum(1).cpu() if name in alive else at.shape[1]
        made[group.id] = count
    found = constants(model, groups, example_inputs, {key: count == 0 for key, count in made.items()})
    found = _fitting(found, {g.id: g.size for g in groups}, round_to)
    if not found:
        return model, posterior, origin.plan()
    folded = fold(model, found)
    keep = {g.id: torch.ones(g.size, dtype=torch.bool) for g in groups}
    for constant in found:
        keep[constant.group][constant.unit] = False
    plan = plan_masks(groups, keep)
    moments = _folded(posterior, found)
    small, cut = shrink(folded, plan, posterior=moments)
    verify(model, small, example_inputs)
    after = copy.deepcopy(origin)
    after.follow(None, plan)
    left = Posterior(cut, posterior.n_data, posterior.temperature, posterior.source)
    options: dict[str, Any] = {"example_inputs": example_inputs, "ignore": ignore, "round_to": round_to}
    return fold_constants(small, left, after, **options)  # who read nothing but constants is a constant now


def _fitting(found: list[Constant], sizes: Mapping[str, int], round_to: int) -> list[Constant]:
    """As many as leave a multiple of ``round_to`` in every group, and at least that."""
    units: dict[str, list[int]] = {}
    for constant in found:
        units.setdefault(constant.group, []).append(constant.unit)
    chosen: dict[str, set[int]] = {}
    for key, several in units.items():
        gone = sorted(set(several))
        left = max(round_to, -(-(sizes[key] - len(gone)) // round_to) * round_to)
        chosen[key] = set(gone[: max(0, sizes[key] - left)])
    return [c for c in found if c.unit in chosen[c.group]]


def _folded(posterior: Posterior, found: list[Constant]) -> dict[str, Gaussian]:
    moments = dict(posterior)
    for constant in found:
        weight, bias = moments.get(f"{constant.layer}.weight"), moments.get(f"{constant.layer}.bias")
        if weight is not None and bias is not None:
            moments[f"{constant.layer}.bias"] = _sum(bias, weight, constant)
    return moments


def _sum(bias: Gaussian, weight: Gaussian, constant: Constant) -> Gaussian:
    """The Gaussian of b + sum_i c_i w_i, independent; kept wherever a living weight takes part, and then surely in."""
    shape = [1, -1] + [1] * (weight.mean.ndim - 2)
    value = constant.value.to(weight.mean).view(shape)
    taken = (weight.keep[:, constant.index] & (value != 0)).flatten(1).any(1)
    added = (value * weight.expected[:, constant.index]).flatten(1).sum(1)
    spread = (value.square() * _variance(weight)[:, constant.index]).flatten(1).sum(1)
    mean = torch.where(taken, bias.expected + added, bias.mean)
    variance = torch.where(taken, _variance(bias) + spread, bias.std.square())
    alive = bias.keep | taken
    inclusion = None if bias.inclusion is None else bias.inclusion.masked_fill(taken, 1.0)
    precision = torch.where(alive, 1 / variance, torch.inf)
    return Gaussian(mean, precision, bias.prior_precision, bias.prior_mean, alive, inclusion=inclusion)


def _variance(g: Gaussian) -> Tensor:
    """Of the weight as it enters: pi s^2 + pi (1 - pi) m^2 where it may be zero."""
    if g.inclusion is None:
        return g.std.square()
    return g.inclusion * (g.std.square() + (1 - g.inclusion) * g.mean.square())
