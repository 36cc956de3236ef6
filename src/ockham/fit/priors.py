"""Priors over weights, as objects: one fixed, two learned per parameter tensor.

A prior answers two questions: its precision at the start, and, later, its new precision given the second moment of
the living weights. Learned priors start at a fixed value and move only after the ``kl_warmup`` steps of the optimizer.
So give it some: with the default 0 they move at once, and moved from the first step they collapse the network onto
the prior (measured; docs: gotchas).
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from ockham.errors import OckhamError

__all__ = [
    "VECTOR",
    "EmpiricalBayes",
    "FixedPrior",
    "GroupHorseshoe",
    "GroupPrior",
    "GroupScale",
    "LayerScale",
    "Prior",
    "Units",
    "check_settings",
    "learn_scales",
    "plain_prior",
    "prior_of",
    "restored_prior",
    "rows",
    "slice_scales",
    "start_scales",
]


def _positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise OckhamError(f"{owner}: {name} must be positive and finite; got {value}")


class Prior(ABC):
    """Zero-or-stated-mean Gaussian prior, one precision per parameter tensor."""

    updates_per_epoch: ClassVar[int] = 1

    @property
    @abstractmethod
    def start_precision(self) -> float:
        """Precision before anything is learned."""

    @abstractmethod
    def updated(self, precision: float, count: int, second_moment: float) -> float:
        """New precision, from the current one, the number of living weights and the sum of E[(w - prior mean)^2]."""


@dataclass(frozen=True, slots=True)
class FixedPrior(Prior):
    """N(prior_mean, variance), never changed. The default, variance 1."""

    variance: float = 1.0

    def __post_init__(self) -> None:
        _positive("FixedPrior", variance=self.variance)

    @property
    def start_precision(self) -> float:
        """1 / variance."""
        return 1.0 / self.variance

    def updated(self, precision: float, count: int, second_moment: float) -> float:
        """The same precision."""
        return precision


@dataclass(frozen=True, slots=True)
class EmpiricalBayes(Prior):
    """Variance that maximises the ELBO, per parameter tensor, smoothed.

        variance <- (1 - smoothing) variance + smoothing * mean E[w^2]

    Removed weights are left out. Reference: type-II maximum likelihood, MacKay 1992.
    """

    variance: float = 1.0
    smoothing: float = 0.3

    def __post_init__(self) -> None:
        _positive("EmpiricalBayes", variance=self.variance, smoothing=self.smoothing)
        if self.smoothing > 1:
            raise OckhamError(f"EmpiricalBayes: smoothing is a share in (0, 1]; got {self.smoothing}")

    @property
    def start_precision(self) -> float:
        """1 / variance."""
        return 1.0 / self.variance

    def updated(self, precision: float, count: int, second_moment: float) -> float:
        """Smoothed step towards the optimum; unchanged when nothing is left."""
        if count == 0 or second_moment <= 0:
            return precision
        return 1.0 / ((1 - self.smoothing) / precision + self.smoothing * second_moment / count)


@dataclass(frozen=True, slots=True)
class LayerScale(Prior):
    r"""The first paper's scale hyper-prior: w = scale * c * v, v ~ N(0, 1), c^-2 ~ Gamma(shape, rate).

    The variational factor of c^-2 is Gamma(shape + n/2, rate + sum E[w^2] / (2 scale^2)), and the weights feel its
    mean divided by scale^2. The paper uses Gamma(2, 2), scale 1/10 for hidden layers and 1 for the last.
    Evidence is scored with the expected precision.

    Reference: arXiv 2309.12095, section 3.
    """

    scale: float = 0.1
    shape: float = 2.0
    rate: float = 2.0

    def __post_init__(self) -> None:
        _positive("LayerScale", scale=self.scale, shape=self.shape, rate=self.rate)

    @property
    def start_precision(self) -> float:
        """E[c^-2] / scale^2 = shape / (rate scale^2)."""
        return self.shape / (self.rate * self.scale**2)

    def updated(self, precision: float, count: int, second_moment: float) -> float:
        """Closed-form variational update."""
        scaled = second_moment / self.scale**2
        return (self.shape + 0.5 * count) / (self.rate + 0.5 * scaled) / self.scale**2


def plain_prior(prior: Prior) -> dict[str, Any]:
    """A prior (a dataclass) as plain values, for a saved state."""
    return {"kind": type(prior).__name__, **asdict(prior)}  # type: ignore[call-overload]


def restored_prior(plain: dict[str, Any], current: Prior) -> Prior:
    """The prior that `plain_prior` described: one of this library, or of the type of the optimizer's ``current`` one.

    Raises:
        OckhamError: its kind is neither.
    """
    known: list[Any] = [Prior]
    kinds: dict[str, Any] = {}
    for kind in known:
        known += kind.__subclasses__()
        if kind.__module__.startswith("ockham.") and not inspect.isabstract(kind):
            kinds[kind.__name__] = kind
    kinds[type(current).__name__] = type(current)
    if plain["kind"] not in kinds:
        raise OckhamError(
            f"the saved prior is a {plain['kind']!r}; known are {sorted(kinds)}: build the optimizer with the saved "
            "kind of prior first"
        )
    found: Prior = kinds[plain["kind"]](**{k: v for k, v in plain.items() if k != "kind"})
    return found


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
    ``ockham.units_of(groups, shapes)``. Parameters that ``units`` does not name are divided by row.
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
        variance: variance of every structure at the start.
        smoothing: share of the way to the optimum that one update goes.
        floor: smallest variance, so that a structure without use stays a number.
        units: structures as in `GroupPrior`.

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
        units: structures as in `GroupPrior`.

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


_EACH = "unit_precision"  # state of a parameter: one number per index of the dimension that numbers its structures


VECTOR = "prior_each"
"""State vector with the prior precision of every living weight: what a step reads."""


def start_scales(p: Tensor, group: dict[str, Any], each: Tensor) -> dict[str, Tensor]:
    """State of a parameter seen for the first time; ``each`` holds its prior per weight."""
    if not isinstance(group["prior"], GroupPrior):
        return {}
    _, ids = _layout(group)[p]
    return {_EACH: each.new_full(ids.shape, group["prior"].start_precision)}


def prior_of(p: Tensor, group: dict[str, Any], state: Mapping[str, Any]) -> Tensor:
    """Prior precision of every weight, shape of the parameter (an expanded view of one number a structure)."""
    return _along(_layout(group)[p][0], state[_EACH].clone(), p.shape)


def slice_scales(
    p: Tensor, group: dict[str, Any], state: Mapping[str, Any], take: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """State of the same parameter in a smaller network; ``take`` cuts a tensor of the parameter's shape."""
    if _EACH not in state:
        return {}
    dim = _layout(group)[p][0]
    left = take(_along(dim, state[_EACH], p.shape))
    return {_EACH: left.movedim(dim, 0).reshape(left.shape[dim], -1)[:, 0].clone() if p.ndim else state[_EACH].clone()}


@torch.no_grad()
def learn_scales(
    group: dict[str, Any],
    moments: Mapping[Tensor, Tensor],
    index: Mapping[Tensor, Tensor | None],
    states: Mapping[Tensor, dict[str, Any]],
) -> None:
    """One update of all structures of a group.

    Args:
        group: the parameter group.
        moments: parameter to E[(w - m0)^2] of its living weights, flat.
        index: parameter to the flat positions of its living weights; missing or None where all live.
        states: states of the optimizer.
    """
    known = _layout(group)
    layout = {p: known[p] for p in moments}
    total = 1 + max(int(ids.max()) for _, ids in layout.values())
    device = next(iter(moments.values())).device
    second, count, precision = (torch.zeros(total, dtype=torch.float64, device=device) for _ in range(3))
    numbers = {}
    for p, (dim, ids) in layout.items():
        flat, alive = _along(dim, ids, p.shape).reshape(-1), index.get(p)
        numbers[p] = flat if alive is None else flat[alive]
    for p, moment in moments.items():
        second.index_add_(0, numbers[p], moment)
        count.index_add_(0, numbers[p], torch.ones_like(moment))
        precision[layout[p][1]] = states[p][_EACH].double()
    new = group["prior"].updated_each(precision, count, second)
    for p, (_, ids) in layout.items():
        states[p][_EACH] = new[ids].to(states[p][_EACH].dtype)  # a new tensor: a loaded state may be shared
        states[p][VECTOR].copy_(new[numbers[p]])


def _layout(group: dict[str, Any]) -> dict[Tensor, tuple[int, Tensor]]:
    """Parameter to the dimension that numbers its structures, and their numbers."""
    named = dict(zip(group["param_names"], group["params"], strict=True))
    found = group["prior"].layout({n: tuple(p.shape) for n, p in named.items()})
    return {p: (found[n][0], found[n][1].to(p.device)) for n, p in named.items()}


def _along(dim: int, values: Tensor, shape: torch.Size) -> Tensor:
    """Values per index of a dimension, as a view of a whole shape."""
    if not shape:
        return values.reshape(())
    return values.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)


_POSITIVE = ("n_data", "lr", "eps", "initial_std", "std_rate", "temperature", "prior_interval")


def check_settings(owner: str, s: Mapping[str, Any], kind: type = Prior, example: str = "FixedPrior(1.0)") -> None:
    """Numbers in their ranges, as far as the optimizer has them, and a prior of its kind.

    Raises:
        OckhamError: names the setting, what it was, and what it may be.
    """
    for name in _POSITIVE:
        value = s.get(name, 1.0)
        number = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
        if not (number and 0 < value < math.inf):
            raise OckhamError(f"{owner}: {name} must be a number, positive and finite; got {value!r}")
    mean = s.get("prior_mean", 0.0)
    if not (isinstance(mean, Real) and math.isfinite(mean)):
        got = f"a tensor of shape {tuple(mean.shape)}" if isinstance(mean, Tensor) else repr(mean)
        raise OckhamError(
            f"{owner}: prior_mean must be one finite number for all weights of a group; got {got}. For a mean "
            "per weight, train the difference from it"
        )
    if not s.get("kl_warmup", 0) >= 0:
        raise OckhamError(f"{owner}: kl_warmup counts steps and cannot be negative; got {s['kl_warmup']}")
    if not all(0 <= b < 1 for b in s.get("betas", ()) if b is not None):
        raise OckhamError(f"{owner}: betas must lie in [0, 1); got {s['betas']}")
    if "prior" in s and not isinstance(s["prior"], kind):
        raise OckhamError(f"{owner}: prior must be a {kind.__name__} such as ockham.{example}; got {s['prior']!r}")
