"""The smallest of many numbers without sorting them: two to four counting passes, and no copy of the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

__all__ = [
    "smallest",
]

_AT_ONCE = 1 << 16
_DIGIT = 16  # bits that one pass decides


def smallest(order: Mapping[str, Tensor], candidates: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Which candidates are the ``count`` smallest of all tensors together.

    Of equal numbers those that come first go first, as in a stable sort; NaN comes last. Numbers are mapped to integers
    of the same order, and a histogram of their leading sixteen bits, then of the next ones inside the bin that holds
    the threshold, finds it exactly. Temporary memory is that of one piece of 65,536 numbers.

    Args:
        order: numbers by name, flat tensors; float32, or anything that float64 holds.
        candidates: boolean tensors of the same shapes by name, True = may be chosen; names left out are not looked at.
        count: number to choose, at most that of the candidates.

    Returns:
        Boolean tensors by name, True = chosen.

    >>> smallest({"a": torch.tensor([3.0, 1.0, 2.0])}, {"a": torch.tensor([True, False, True])}, 1)["a"]
    tensor([False, False,  True])
    """
    single = all(order[name].dtype is torch.float32 for name in candidates)
    whole = 32 if single else 64

    def pieces(name: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Places, keys and which of them are candidates, piece by piece."""
        values, free = order[name], candidates[name]
        size = _AT_ONCE if values.device.type == "cpu" else max(1, values.numel())
        for start in range(0, values.numel(), size):
            place = slice(start, start + size)
            yield place, _keys(values[place], single=single), free[place]

    threshold, left = 0, count  # the bits of the threshold so far; how many of those that share them are to be chosen
    for shift in range(whole - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for name in candidates:
            for _, keys, free in pieces(name):
                digits = ((keys >> shift) & 0xFFFF) if shift + _DIGIT < whole else (keys >> shift) + (1 << 15)
                inside = free if shift + _DIGIT == whole else free & ((keys >> (shift + _DIGIT)) == threshold)
                counts += torch.bincount(digits[inside].long(), minlength=1 << _DIGIT).cpu()
        sums = counts.cumsum(0)
        digit = int(torch.searchsorted(sums, left))
        left -= int(sums[digit - 1]) if digit else 0
        threshold = digit - (1 << 15) if shift + _DIGIT == whole else (threshold << _DIGIT) + digit
    return _chosen(candidates, pieces, threshold, left)


def _chosen(
    candidates: Mapping[str, Tensor],
    pieces: Callable[[str], Iterator[tuple[slice, Tensor, Tensor]]],
    threshold: int,
    equal: int,
) -> dict[str, Tensor]:
    """All below the threshold, and the first ``equal`` of those that lie on it."""
    found = {name: torch.zeros_like(mask) for name, mask in candidates.items()}
    for name in candidates:
        for place, keys, free in pieces(name):
            chosen = free & (keys < threshold)
            if equal:
                on = (free & (keys == threshold)).nonzero().squeeze(1)[:equal]
                chosen[on] = True
                equal -= on.numel()
            found[name][place] = chosen
    return found


def _keys(values: Tensor, *, single: bool) -> Tensor:
    """Integers in the order of the numbers: of a negative one all bits but the sign are turned round."""
    real, whole, most = (torch.float32, torch.int32, 0x7FFFFFFF) if single else (torch.float64, torch.int64, 2**63 - 1)
    keys = (values.to(real).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0).view(whole)
    return torch.where(keys < 0, keys ^ most, keys)
