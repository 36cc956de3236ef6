"""Networks that predict, as a value: stacked compact tensors, and of a regression the scales of its noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ockham.core.posterior import Posterior
from ockham.tabular.likelihoods import log_scale
from ockham.tabular.network import mean_output
from ockham.tabular.noise import Noise
from ockham.tabular.survivors import Survivors

__all__ = ["Draws", "ScaleDraws", "factorised"]

_ROWS = 8192


@dataclass(frozen=True, slots=True, eq=False)
class ScaleDraws:
    """Scales of the noise, of as many draws.

    Attributes:
        network: compact tensors [D, ...] of the network that moves the scale.
        base: [D, 1].
        freedom: degrees of freedom, [D, 1].
        floor: ln of the least scale.
    """

    network: dict[str, Tensor]
    base: Tensor
    freedom: Tensor
    floor: float


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """Networks drawn from the posterior over the survivors.

    Attributes:
        network: compact tensors [D, ...], float64.
        scales: of the noise; None for classes.
        acceptance: of the chain; None where the draws are of the factorised posterior.
    """

    network: dict[str, Tensor]
    scales: ScaleDraws | None
    acceptance: float | None

    def outputs(self, x: Tensor) -> Iterator[Tensor]:
        """Outputs [D, rows, outputs] for parts of x [n, p], float64."""
        for part in x.split(_ROWS):
            yield mean_output(self.network, part)

    def with_scales(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Location, scale [D, rows] and degrees of freedom [D, 1] for parts of x [n, p], float64."""
        scales = self.scales
        assert scales is not None
        for part in x.split(_ROWS):
            moved = scales.base + mean_output(scales.network, part)[..., 0]
            yield mean_output(self.network, part)[..., 0], log_scale(moved, scales.floor).exp(), scales.freedom


def factorised(posterior: Posterior, noise: Noise | None, draws: int, generator: torch.Generator) -> Draws:
    """Networks drawn weight by weight; the noise's with them, its base and freedom as they are."""
    network = _drawn(posterior, draws, generator)
    if noise is None:
        return Draws(network, None, None)
    base = torch.full((draws, 1), noise.base, dtype=torch.float64)
    freedom = 2 + torch.full_like(base, noise.log_freedom).exp()
    return Draws(network, ScaleDraws(_drawn(noise.posterior, draws, generator), base, freedom, noise.floor), None)


def _drawn(posterior: Posterior, draws: int, generator: torch.Generator) -> dict[str, Tensor]:
    survivors = Survivors.of(posterior)
    return survivors.tensors(survivors.drawn(posterior, draws, generator))
