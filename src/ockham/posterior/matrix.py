"""A weight matrix with its bias as one block of a correlated posterior: where it lies, and its Kronecker precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ockham.evidence.kronecker import KroneckerPrecision

__all__ = ["WeightMatrix"]


@dataclass(frozen=True, slots=True, eq=False)
class WeightMatrix:
    """A weight [outputs, ...] and, where it has one, its bias as last column, with their joint posterior precision.

    Attributes:
        weight: parameter name.
        bias: parameter name, or None.
        precision: of the matrix [groups, outputs / groups, inputs (+ 1 with a bias)].
    """

    weight: str
    bias: str | None
    precision: KroneckerPrecision

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that the matrix holds."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensors of the parameters' shapes as one [groups, outputs, inputs] tensor."""
        groups, outputs, inputs = self.precision.shape
        matrix = tensors[self.weight].reshape(groups, outputs, inputs - (self.bias is not None))
        if self.bias is None:
            return matrix
        return torch.cat([matrix, tensors[self.bias].reshape(groups, outputs, 1).to(matrix.dtype)], -1)

    def unpack(self, matrix: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The reverse of `pack`, in shape and dtype of ``like``."""
        width = matrix.shape[-1] - (self.bias is not None)
        found = {self.weight: matrix[..., :width].reshape(like[self.weight].shape).to(like[self.weight].dtype)}
        if self.bias is not None:
            found[self.bias] = matrix[..., width].reshape(like[self.bias].shape).to(like[self.bias].dtype)
        return found

    def to(self, device: torch.device | str) -> WeightMatrix:
        """The same block on a device."""
        return WeightMatrix(self.weight, self.bias, self.precision.to(device))
