"""Priors with one scale per structure, learned while training: relevance determination and the group horseshoe.

All weights that make a unit (its row, its bias, the affine of its norm) share a prior variance v_g. Where the data do
not need the unit, v_g falls and takes all of its weights with it; a price set afterwards cannot do that.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ockham.errors import OckhamError
from ockham.posterior.priors import Prior

__all__ = ["GroupHorseshoe", "GroupPrior", "GroupScale", "Units", "rows"]

Units = Mapping[str, tuple[int, Tensor]]
"""Parameter name to (dimension, number of the structure of each index of that dimension)."""


def rows(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, Tensor]]:
    """Structures by row: index i of dimension 0 is one structure for all parameters of a module of that length.

    >>> {name: ids.tolist() for name, (_, ids) in rows({"a.weight": (2, 5), "a.bias": (2,), "b.bias": (1,)}).items()}
    {'a.weight': [0, 1], 'a.bias': [0, 1], 'b.bias': [2]}
    """
    found: dict[str, tuple[int, Tensor]] = {}
    first: dict[tuple[str, int], int] = {}
    count = 0
    for name, shape in shapes.items():
        size = shape[0] if shape else 1
        key = (name.rpartition(".")[0], size)
        if key not in first:
            first[key], count = count, count + size
        found[name] = (0, torch.arange(first[key], first[key] + size))
    return found


class GroupPrior(Prior):
    """Zero-or-stated-mean Gaussian prior with one precision per structure.

    ``units`` says which weights a structure holds; None: the rows of every module (`rows`). From a traced network:
    ``ockham.units_of(groups)``. Parameters that ``units`` does not name are divided by row.
    """

    updates_per_epoch: ClassVar[int] = 10
    units: Units | None

    @abstractmethod
    def updated_each(self, precision: Tensor, count: Tensor, second_moment: Tensor) -> Tensor:
        """New precision of every structure, from its precision, living weights and sum of E[(w - prior mean)^2]."""

    def updated(self, precision: float, count: int, second_moment: float) -> float:
        """`updated_each` of a single structure."""
        one = (torch.tensor([float(x)], dtype=torch.float64) for x in (precision, count, second_moment))
        return float(self.updated_each(*one))

    def layout(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, Tensor]]:
        """The structure of every index of one dimension of every parameter, numbered from 0.

        Raises:
            OckhamError: ``units`` does not fit the shapes.
        """
        given = {name: self.units[name] for name in shapes if name in self.units} if self.units else {}
        for name, (dim, ids) in given.items():
            if dim >= max(1, len(shapes[name])) or ids.numel() != (shapes[name][dim] if shapes[name] else 1):
                raise OckhamError(
                    f"units[{name!r}] numbers {ids.numel()} indices of dimension {dim}; the parameter has shape "
                    f"{shapes[name]}. Trace the network that is trained, or leave units out"
                )
        start = 1 + max((int(ids.max()) for _, ids in given.values()), default=-1)
        rest = rows({name: shape for name, shape in shapes.items() if name not in given})
        return {name: given[name] if name in given else (0, rest[name][1] + start) for name in shapes}

    def sliced(self, cut: Callable[[str, Tensor], Tensor], shapes: Mapping[str, tuple[int, ...]]) -> GroupPrior:
        """The same prior for a smaller network.

        Args:
            cut: (parameter name, tensor of the parameter's old shape) to what stays of it.
            shapes: parameter name to its old shape.
        """
        if self.units is None:
            return self
        new = {}
        for name, (dim, ids) in self.units.items():
            wide = ids.view([-1 if d == dim else 1 for d in range(len(shapes[name]))]).expand(shapes[name])
            left = cut(name, wide)
            new[name] = (dim, left.movedim(dim, 0).reshape(left.shape[dim], -1)[:, 0].clone())
        return self._with(new)

    @abstractmethod
    def _with(self, units: Units) -> GroupPrior:
        """The same prior over other units."""


@dataclass(frozen=True, slots=True)
class GroupScale(GroupPrior):
    """Group relevance determination: v_g maximises the ELBO, approached in smoothed steps.

        v_g <- (1 - smoothing) v_g + smoothing * mean over the living weights of g of E[w^2]

    The fixed point is the maximum: d ELBO / d v_g = 0 where v_g = mean E[w^2]. Removed weights are left out.

    Attributes:
        variance: of every structure at the start.
        smoothing: share of the way to the optimum that one update goes.
        floor: smallest variance, so that a structure without use stays a number.
        units: see `GroupPrior`.

    Reference: MacKay 1994 (automatic relevance determination); Louizos et al. 2017, arXiv 1705.08665, section 3.
    """

    variance: float = 1.0
    smoothing: float = 0.3
    floor: float = 1e-8
    units: Units | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        _positive("GroupScale", variance=self.variance, smoothing=self.smoothing, floor=self.floor)
        if self.smoothing > 1:
            raise OckhamError(f"GroupScale: smoothing is a share in (0, 1]; got {self.smoothing}")

    @property
    def start_precision(self) -> float:
        """1 / variance."""
        return 1.0 / self.variance

    def updated_each(self, precision: Tensor, count: Tensor, second_moment: Tensor) -> Tensor:
        """Smoothed step towards the optimum; unchanged where nothing is left."""
        best = second_moment / count.clamp(min=1)
        new = ((1 - self.smoothing) / precision + self.smoothing * best).clamp(min=self.floor)
        return torch.where(count > 0, 1 / new, precision)

    def _with(self, units: Units) -> GroupScale:
        return GroupScale(self.variance, self.smoothing, self.floor, units)


@dataclass(frozen=True, slots=True)
class GroupHorseshoe(GroupPrior):
    r"""Half-Cauchy scale per structure: w ~ N(0, scale^2 l_g^2), l_g ~ C+(0, 1), in its inverse-gamma form.

    With l^2 | a ~ InvGamma(1/2, 1/a), a ~ InvGamma(1/2, 1) both factors of q are inverse gammas and the updates closed,

        E[1/a] = 1 / (1 + E[1/l^2]),    E[1/l^2] = (n_g + 1)/2 / (E[1/a] + sum E[w^2] / (2 scale^2))

    and the weights feel E[1/l^2] / scale^2, with which the evidence is scored as well. Against `GroupScale` the heavy
    tail leaves large structures alone and the pole at 0 pulls small ones further.

    Attributes:
        scale: typical size of a weight of a structure that is needed.
        sweeps: rounds of the two updates each time.
        floor: smallest variance.
        units: see `GroupPrior`.

    Reference: Wand et al. 2011, eq. 5 (the mixture); Louizos et al. 2017, arXiv 1705.08665, section 3.2 (for groups).
    """

    scale: float = 1.0
    sweeps: int = 3
    floor: float = 1e-8
    units: Units | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        _positive("GroupHorseshoe", scale=self.scale, sweeps=self.sweeps, floor=self.floor)

    @property
    def start_precision(self) -> float:
        """Of a half-Cauchy scale at its median, 1."""
        return 1.0 / self.scale**2

    def updated_each(self, precision: Tensor, count: Tensor, second_moment: Tensor) -> Tensor:
        """`sweeps` rounds of closed-form updates; unchanged where nothing is left."""
        inverse = precision * self.scale**2
        for _ in range(self.sweeps):
            auxiliary = 1 / (1 + inverse)
            inverse = 0.5 * (count + 1) / (auxiliary + 0.5 * second_moment / self.scale**2)
        return torch.where(count > 0, (inverse / self.scale**2).clamp(max=1 / self.floor), precision)

    def _with(self, units: Units) -> GroupHorseshoe:
        return GroupHorseshoe(self.scale, self.sweeps, self.floor, units)


def _positive(owner: str, **values: Any) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise OckhamError(f"{owner}: {name} must be positive and finite; got {value}")
