"""A tensor with zeros as one bit per element and the survivors' values: smaller than dense from 3.2 % zeros on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ockham.errors import ResultError

__all__ = ["pack", "pack_mask", "unpack", "unpack_mask"]


def pack_mask(keep: Tensor) -> Tensor:
    """Boolean tensor to uint8 bits, row-major, most significant bit first, padded with zeros."""
    return torch.from_numpy(np.packbits(keep.detach().cpu().contiguous().reshape(-1).numpy()))


def unpack_mask(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The boolean tensor of the given shape.

    Raises:
        ResultError: the number of bits does not fit the shape.
    """
    count = math.prod(shape)
    if bits.dtype is not torch.uint8 or bits.numel() != -(-count // 8):
        raise ResultError(f"a mask of shape {shape} needs {-(-count // 8)} bytes; the file has {bits.numel()}")
    flags = np.unpackbits(bits.numpy(), count=count).astype(bool)
    return torch.from_numpy(flags).view(shape)


def pack(tensor: Tensor, keep: Tensor | None = None) -> dict[str, Any]:
    """Plain tree of a tensor: dense, or shape, bits and values, whichever is smaller.

    Args:
        tensor: any floating tensor.
        keep: which elements to store; default: those that are not zero (a negative zero counts as a value).
    """
    dense = tensor.detach().cpu().contiguous()
    keep = (dense != 0) | torch.signbit(dense) if keep is None and dense.is_floating_point() else keep
    if keep is None:
        return {"dense": dense}
    values = dense[keep.cpu()]
    if values.numel() * dense.element_size() + -(-dense.numel() // 8) >= dense.numel() * dense.element_size():
        return {"dense": dense}
    return {"shape": list(dense.shape), "bits": pack_mask(keep), "values": values}


def unpack(node: Mapping[str, Any]) -> Tensor:
    """The dense tensor, zero where nothing was stored.

    Raises:
        ResultError: bits and values do not fit.
    """
    if "dense" in node:
        tensor = node["dense"]
        if not isinstance(tensor, Tensor):
            raise ResultError("a dense entry holds no tensor")
        return tensor
    keep = unpack_mask(node["bits"], tuple(node["shape"]))
    values: Tensor = node["values"]
    if int(keep.sum()) != values.numel():
        raise ResultError(f"the bitmask marks {int(keep.sum())} values, the file holds {values.numel()}")
    result = torch.zeros(keep.shape, dtype=values.dtype)
    result[keep] = values
    return result
