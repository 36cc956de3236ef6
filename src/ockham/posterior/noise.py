"""Standard normal noise from step to step: each draw exact, consecutive ones made cheaply from one another."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CYCLE", "renew_"]

CYCLE = 4
_SHORT = 1 << 12  # shorter vectors are never rotated: their elements would meet their old noise again


def renew_(noise: Tensor, phase: int, generator: torch.Generator) -> None:
    """Turn the noise e of the last draw into that of the next: new, -e, e rotated, -(e rotated), and again.

    Each is an exact draw, since neither sign nor order changes the distribution of independent normals. The mirrored
    draw of a pair cancels what is odd in the gradient noise; the rotated one gives each weight the noise of another,
    at a random distance, for a fraction of the price of the generator.

    Args:
        noise: a vector, changed in place.
        phase: 0 to 3, the place in the cycle.
        generator: of the noise's device.
    """
    if phase % 2:
        noise.neg_()
    elif phase == 0 or len(noise) < _SHORT:
        noise.copy_(torch.randn(noise.shape, generator=generator, device=noise.device))
    else:
        quarter = len(noise) // 4
        shift = quarter + int(torch.randint(2 * quarter, (), generator=generator, device=generator.device))
        noise.copy_(noise.roll(shift))
