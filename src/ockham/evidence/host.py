"""Constants of gates, one number each, as NumPy arrays on the host.

A network has hundreds of gates or thousands. Handling so few numbers costs what it costs to start the operations, and
NumPy starts them in a fraction of the time of tensors, on an accelerator all the more. What is as large as a batch
stays with the tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ockham.errors import OckhamError
from ockham.evidence import special

__all__ = ["Array", "Cut", "cut_of", "erf", "erfc", "erfcx", "excess", "log_mills", "tensors"]

Array = NDArray[np.float64]


class Cut(NamedTuple):
    """Normals of y = ln theta, cut off to [low, high], in units of their std.

    Attributes:
        mean: of the uncut normal, [gates].
        std: its standard deviation.
        alpha: (low - mean) / std.
        beta: (high - mean) / std.
        near: distance of the nearer end where the mode lies outside, else 0.
        far: distance of the end that is farther from the mode.
        power: (far^2 - near^2) / 2.
        low: lower end of y.
        high: upper end.
    """

    mean: Array
    std: Array
    alpha: Array
    beta: Array
    near: Array
    far: Array
    power: Array
    low: float
    high: float

    def chosen(self, index: NDArray[Any]) -> Cut:
        """Some of the gates."""
        mean, std, alpha, beta, near, far, power = (values[index] for values in self[:7])
        return Cut(mean, std, alpha, beta, near, far, power, self.low, self.high)


def cut_of(mean: Tensor, std: Tensor, low: float, high: float) -> Cut:
    """Bring [gates] to the host, in float64.

    Raises:
        OckhamError: a std that is not positive.
    """
    m, s = (t.detach().cpu().double().numpy() for t in (mean, std))
    if not (s > 0).all():
        raise OckhamError(f"std must be positive; smallest is {s.min():g}. Pass the exponential of a log_std")
    alpha, beta = (low - m) / s, (high - m) / s
    near = np.maximum(alpha, 0) - np.minimum(beta, 0)
    far = np.maximum(np.abs(alpha), np.abs(beta))
    return Cut(m, s, alpha, beta, near, far, 0.5 * (far - near) * (far + near), low, high)


def erf(x: Array) -> Array:
    """Error function."""
    found: Array = torch.erf(torch.from_numpy(x)).numpy()
    return found


def erfc(x: Array) -> Array:
    """1 - erf(x)."""
    found: Array = torch.erfc(torch.from_numpy(x)).numpy()
    return found


def erfcx(x: Array) -> Array:
    """exp(x^2) erfc(x)."""
    found: Array = torch.special.erfcx(torch.from_numpy(x)).numpy()
    return found


def log_mills(x: Array) -> Array:
    """`ockham.evidence.special.log_mills`."""
    found: Array = special.log_mills(torch.from_numpy(x)).numpy()
    return found


def excess(x: Array) -> Array:
    """`ockham.evidence.special.excess`."""
    found: Array = special.excess(torch.from_numpy(x)).numpy()
    return found


def tensors(like: Tensor, *arrays: Array) -> tuple[Tensor, ...]:
    """Arrays of one length as tensors of the dtype and device of ``like``, in one transfer."""
    return torch.from_numpy(np.stack(arrays)).to(like.device, like.dtype).unbind()
