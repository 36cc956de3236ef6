"""From a table as it comes to one a network can be fitted on: scaled, columns that say something, canonical rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Scaling", "canonical", "duplicates"]

Floats = npt.NDArray[np.float64]

_CANONICAL_SIZE = 2_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """Weighted mean and standard deviation of columns (or of the target).

    Attributes:
        mean: [p].
        std: [p]; 1 where the column is constant.
        constant: [p].
    """

    mean: Floats
    std: Floats
    constant: npt.NDArray[np.bool_]

    @staticmethod
    def of(values: Floats, weight: Floats) -> Scaling:
        """From values [n, p] and weights [n]."""
        share = weight / weight.sum()
        mean = share @ values
        std = np.sqrt(share @ (values - mean) ** 2)
        present = values[weight > 0]
        constant = (present.max(0) == present.min(0)) | ~(std > 1e-12 * np.abs(mean))
        return Scaling(mean, np.where(constant, 1.0, std), constant)

    def apply(self, values: Floats) -> Tensor:
        """Standardised, float32."""
        return torch.from_numpy(((values - self.mean) / self.std).astype(np.float32))


def canonical(x: Floats, y: Floats, weight: Floats) -> tuple[Floats, Floats, Floats]:
    """Rows sorted, equal ones merged into one with the sum of their weights, rows of weight 0 dropped.

    Repeating a row and giving it a weight of two are then the same problem, to the bit. Left as it is where the table
    is large: sorting it would cost more than it is worth.
    """
    there = weight > 0
    x, y, weight = x[there], y[there], weight[there]
    if x.size > _CANONICAL_SIZE:
        return x, y, weight
    rows, where = np.unique(np.column_stack([x, y]), axis=0, return_inverse=True)
    summed = np.zeros(len(rows))
    np.add.at(summed, where.reshape(-1), weight)
    return np.ascontiguousarray(rows[:, :-1]), rows[:, -1].copy(), summed


def duplicates(x: Tensor) -> npt.NDArray[np.intp]:
    """For each standardised column the index of the first one that equals it, or its negative; [p]."""
    n, p = x.shape
    probe = torch.linspace(0, n - 1, min(n, 64)).long()
    keys: dict[bytes, list[int]] = {}
    first = np.arange(p)
    for j in range(p):
        column = x[:, j]
        sign = -1.0 if float(column[column.nonzero()[0]] if bool((column != 0).any()) else 1.0) < 0 else 1.0
        key = (column[probe] * sign + 0.0).numpy().round(4).tobytes()
        same = next((i for i in keys.get(key, []) if bool(((x[:, i].abs() - column.abs()).abs() < 1e-5).all())), None)
        if same is None:
            keys.setdefault(key, []).append(j)
        else:
            first[j] = same
    return first
