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


def choose_units(
    evidence: StructureEvidence, prices: Mapping[str, Tensor], *, round_to: int = 1, cap: float = 1.0
) -> Choice:
    """Keep the units with E_g >= price; remove those that nobody reads; keep at least one (or ``round_to``).

    With ``round_to`` the width of a group becomes a multiple of it (or stays whole): of all such widths the one whose
    best units are worth most in sum, sum (E_g - price).

    Args:
        evidence: of the units.
        prices: group id to nats ``(units,)``.
        round_to: hardware-friendly multiple, at least 1.
        cap: largest share of the units of a group that goes at once, those that nobody reads aside: units that stand
            in for each other look dispensable one by one, so leave time to refit.

    Raises:
        OckhamError: ``round_to`` below 1 or ``cap`` no share.
    """
    if round_to < 1 or not 0 < cap <= 1:
        raise OckhamError(f"round_to is at least 1 and cap a share in (0, 1]; got {round_to} and {cap}")
    keep, forced = {}, []
    for key, nats in evidence.items():
        worth = nats - prices[key]
        worth = torch.where(evidence.held[key] > 0, worth, worth.clamp(max=_IDLE)).clamp(-_MOST, _MOST)
        read = int((evidence.held[key] > 0).sum())
        count = _width(worth, round_to, least=read - max(1, int(cap * read)) if cap < 1 else 1)
        keep[key] = torch.zeros(len(worth), dtype=torch.bool)
        keep[key][torch.argsort(worth, descending=True, stable=True)[:count]] = True
        if not bool((worth >= 0).any()):
            forced.append(key)
    return Choice(keep, tuple(forced))


def _width(worth: Tensor, round_to: int, least: int) -> int:
    """The width whose best units are worth most in sum, among multiples of ``round_to`` and the whole group."""
    every: list[int] = [*range(round_to, worth.numel(), round_to), worth.numel()]
    widths = [w for w in every if w >= least]
    sums: list[float] = worth.sort(descending=True).values.cumsum(0)[torch.tensor(widths) - 1].tolist()
    return max(w for w, s in zip(widths, sums, strict=True) if s == max(sums))
