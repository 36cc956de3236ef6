"""How structures go inside the main job: what is scored, at which price, to which widths."""

from __future__ import annotations

from dataclasses import dataclass, field

from ockham.errors import OckhamError
from ockham.reduction.prices import LearnedRate, Price
from ockham.reduction.structures import Cut, Inside, held_weights, outgoing

__all__ = ["Structures"]


@dataclass(frozen=True, slots=True)
class Structures:
    """Structures go by evidence after the single weights of a round, and the network shrinks at once.

    Attributes:
        price: what a unit must be worth, nats.
        cut: the side of a unit that is scored, `outgoing` or `incoming` of `ockham.reduction.structures`.
        inside: which weights of the cut count, `held_weights()` or `all_masks()` of the same module.
        round_to: widths become multiples of it.
        cap: largest share of the units of a group that one round takes, those that nobody reads aside.
        wait: rounds of single weights before the first structures go.
    """

    price: Price = field(default_factory=LearnedRate)
    cut: Cut = outgoing
    inside: Inside = field(default_factory=held_weights)
    round_to: int = 1
    cap: float = 0.25
    wait: int = 1

    def __post_init__(self) -> None:
        if self.round_to < 1:
            raise OckhamError(f"Structures: round_to is a multiple of widths, at least 1; got {self.round_to}")
        if not 0 < self.cap <= 1 or self.wait < 0:
            raise OckhamError(f"Structures: cap is a share in (0, 1], wait at least 0; got {self.cap} and {self.wait}")
