"""From evidence and prices to the units that stay: net worth, rounding to friendly widths, never an empty layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ockham.errors import OckhamError
from ockham.reduction.structures import StructureEvidence

__all__ = ["Choice", "choose_units"]


_IDLE = -1.0  # nats at most that a unit which nobody reads is worth: it goes, whatever its price
_MOST = 1e12  # nats; keeps sums exact where a worth is infinite


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Which units stay.

    Attributes:
        keep: group id to boolean ``(units,)``, True = stays.
        forced: ids of groups in which nothing was worth its price and the best was kept all the same.
    """

    keep: Mapping[str, Tensor]
    forced: tuple[str, ...]


def choose_units(evidence: StructureEvidence, prices: Mapping[str, Tensor], *, round_to: int = 1) -> Choice:
    """Keep the units with E_g >= price; remove those that nobody reads; keep at least one (or ``round_to``).

    With ``round_to`` the width of a group becomes a multiple of it (or stays whole): of all such widths the one whose
    best units are worth most in sum, sum (E_g - price).

    Args:
        evidence: of the units.
        prices: group id to nats ``(units,)``.
        round_to: hardware-friendly multiple, at least 1.

    Raises:
        OckhamError: ``round_to`` below 1.
    """
    if round_to < 1:
        raise OckhamError(f"round_to is a multiple of widths, at least 1; got {round_to}")
    keep, forced = {}, []
    for key, nats in evidence.items():
        worth = nats - prices[key]
        worth = torch.where(evidence.held[key] > 0, worth, worth.clamp(max=_IDLE)).clamp(-_MOST, _MOST)
        count = _width(worth, round_to)
        keep[key] = torch.zeros(len(worth), dtype=torch.bool)
        keep[key][torch.argsort(worth, descending=True, stable=True)[:count]] = True
        if not bool((worth >= 0).any()):
            forced.append(key)
    return Choice(keep, tuple(forced))


def _width(worth: Tensor, round_to: int) -> int:
    """The width whose best units are worth most in sum, among multiples of ``round_to`` and the whole group."""
    widths: list[int] = [*range(round_to, worth.numel(), round_to), worth.numel()]
    sums: list[float] = worth.sort(descending=True).values.cumsum(0)[torch.tensor(widths) - 1].tolist()
    return max(w for w, s in zip(widths, sums, strict=True) if s == max(sums))
