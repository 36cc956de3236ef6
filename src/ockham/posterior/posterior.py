"""The seam of the house: a posterior is a frozen mapping from parameter name to Gaussian moments with their prior."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ockham.errors import OckhamError
from ockham.posterior.matrix import WeightMatrix

__all__ = ["Gaussian", "Posterior"]

POINT = "PointEstimate"
"""Source of a posterior whose spread is no statement of the data."""


@dataclass(frozen=True, slots=True, eq=False)
class Gaussian:
    """Independent Gaussian posterior and prior of one parameter tensor.

    Attributes:
        mean: posterior mean, shape of the parameter; exactly 0 where removed.
        precision: posterior (conditional) precision, same shape; ``inf`` where removed.
        prior_precision: precision of the full prior, broadcastable to ``mean``.
        prior_mean: mean of the full prior, broadcastable.
        keep: boolean, True = stays; same shape.
        marginal_precision: precision of the marginal where the source knows correlations, else None (= precision).
        inclusion: probability that the weight is not zero, same shape, 0 where removed; None where the source has no
            spike. Mean and precision are then those of the slab: of the weight given that it is included.
    """

    mean: Tensor
    precision: Tensor
    prior_precision: Tensor
    prior_mean: Tensor
    keep: Tensor
    marginal_precision: Tensor | None = None
    inclusion: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.mean.shape
        for name in ("precision", "keep"):
            got = getattr(self, name).shape
            if got != shape:
                raise OckhamError(f"Gaussian: {name} has shape {tuple(got)}, mean has {tuple(shape)}")
        if self.keep.dtype is not torch.bool:
            raise OckhamError(f"Gaussian: keep must be boolean (True = stays); got {self.keep.dtype}")

    def to(self, device: torch.device | str) -> Gaussian:
        """The same moments on a device."""
        optional = (self.marginal_precision, self.inclusion)
        marginal, inclusion = (None if t is None else t.to(device) for t in optional)
        prior = self.prior_precision.to(device), self.prior_mean.to(device)
        return Gaussian(
            self.mean.to(device), self.precision.to(device), *prior, self.keep.to(device), marginal, inclusion
        )

    @property
    def scored_precision(self) -> Tensor:
        """Precision of a weight with the others integrated out where that is known, else the conditional one."""
        return self.precision if self.marginal_precision is None else self.marginal_precision

    @property
    def std(self) -> Tensor:
        """Standard deviation 1/sqrt(precision); 0 where removed."""
        return self.precision.rsqrt()

    @property
    def expected(self) -> Tensor:
        """E[w]: the mean, times the inclusion probability where there is one."""
        return self.mean if self.inclusion is None else self.inclusion * self.mean


@dataclass(frozen=True, slots=True, eq=False)
class Posterior(Mapping[str, Gaussian]):
    """Posterior over the parameters of a network.

    Attributes:
        moments: parameter name to `Gaussian`.
        n_data: number of summed log-likelihood terms (examples; tokens for language models).
        temperature: tempering of the posterior; at values other than 1 evidence from it is *tempered* evidence.
        source: which method made it, for people.
        matrices: weight matrices whose posterior is correlated; empty where all weights are independent.
    """

    moments: Mapping[str, Gaussian]
    n_data: float
    temperature: float = 1.0
    source: str = "unknown"
    matrices: tuple[WeightMatrix, ...] = ()

    def __getitem__(self, name: str) -> Gaussian:
        """Moments of the parameter called ``name``."""
        try:
            return self.moments[name]
        except KeyError:
            known = ", ".join(list(self.moments)[:6])
            raise KeyError(f"no parameter {name!r} in this posterior; it has {known}, ...") from None

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the network."""
        return iter(self.moments)

    def __len__(self) -> int:
        """Number of parameter tensors."""
        return len(self.moments)

    def __repr__(self) -> str:
        """One line, no tensors."""
        return f"Posterior({self.source}, {len(self)} tensors, {self.kept():,} of {self.size():,} weights kept)"

    def kept(self) -> int:
        """Number of weights that stay."""
        return sum(int(g.keep.sum()) for g in self.moments.values())

    def size(self) -> int:
        """Number of weights of the full network that this posterior speaks of."""
        return sum(g.keep.numel() for g in self.moments.values())

    @property
    def is_point(self) -> bool:
        """Whether the source knew a point only (`PointEstimate`): its draws are the mean, its spread is the prior's."""
        return self.source == POINT

    def to(self, device: torch.device | str) -> Posterior:
        """The same posterior with its tensors on a device."""
        moments, matrices = {n: g.to(device) for n, g in self.items()}, tuple(m.to(device) for m in self.matrices)
        return Posterior(moments, self.n_data, self.temperature, self.source, matrices)

    def save(self, path: str | Path) -> None:
        """Write the survivors to one safetensors file (bitmask + values), atomically.

        Raises:
            OckhamError: the folder cannot be written.
        """
        from ockham.posterior import storage

        storage.save_posterior(self, Path(path))
