"""What a unit must be worth: its price in nats, ln P(off)/P(on) before the data. Where it comes from is an object."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ockham.errors import OckhamError
from ockham.evidence.hyper import beta_log_odds
from ockham.reduction.structures import StructureEvidence

__all__ = ["FlatPrice", "LearnedRate", "PerMac", "PerMillisecond", "PerParameter", "Price", "UnitCosts"]


@dataclass(frozen=True, slots=True)
class UnitCosts:
    """What one unit of each group costs as the network stands (group id to a number).

    Attributes:
        parameters: learnable values that go with it.
        macs: multiply-accumulates of one example.
        milliseconds: of the measured latency of a batch; empty where nobody measured.
    """

    parameters: Mapping[str, float]
    macs: Mapping[str, float]
    milliseconds: Mapping[str, float]


class Price(ABC):
    """Decides what the units of each group must be worth.

    ``measured`` names the costs it asks for beside parameters: "macs", "milliseconds".
    """

    measured: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def nats(self, evidence: StructureEvidence, costs: UnitCosts) -> dict[str, Tensor]:
        """Group id to price, float64 nats ``(units,)``: a unit is removed where E_g < price.

        Raises:
            OckhamError: the price is per something that ``costs`` does not know.
        """


@dataclass(frozen=True, slots=True)
class LearnedRate(Price):
    """The rate of living units, learned per group: Beta(on, off) and the evidence of its units; nothing to set.

    ln P(on)/P(off) = psi(on + sum q) - psi(off + sum (1 - q) + gone), q = sigma(log-odds + E_g), to the fixed point;
    units removed before count as off. It moves by about ln(number of units) nats only, and never below a price of 0:
    a unit that the data do not want at all goes.

    Attributes:
        on: pseudo-count of living units.
        off: pseudo-count of removed ones.
    """

    on: float = 1.0
    off: float = 1.0

    def __post_init__(self) -> None:
        if not (self.on > 0 and self.off > 0):
            raise OckhamError(f"LearnedRate: pseudo-counts must be positive; got on={self.on}, off={self.off}")

    def nats(self, evidence: StructureEvidence, costs: UnitCosts) -> dict[str, Tensor]:
        """The same price for all units of a group."""
        return {key: torch.full_like(e, self._price(e, evidence.gone.get(key, 0))) for key, e in evidence.items()}

    def _price(self, nats: Tensor, gone: int) -> float:
        every = torch.ones_like(nats, dtype=torch.bool)
        log_odds = beta_log_odds(-nats, every, keep_count=self.on, remove_count=self.off + gone)
        return max(0.0, -float(log_odds))


@dataclass(frozen=True, slots=True)
class FlatPrice(Price):
    """The same stated price for every unit.

    Attributes:
        per_unit: nats, not negative.
    """

    per_unit: float

    def __post_init__(self) -> None:
        _check("FlatPrice", self.per_unit)

    def nats(self, evidence: StructureEvidence, costs: UnitCosts) -> dict[str, Tensor]:
        """``per_unit`` everywhere."""
        return {key: torch.full_like(e, self.per_unit) for key, e in evidence.items()}


@dataclass(frozen=True, slots=True)
class PerParameter(Price):
    """A price per learnable value that goes with a unit, removed single weights included: what a dense unit stores.

    Attributes:
        per_parameter: nats, not negative.
    """

    per_parameter: float

    def __post_init__(self) -> None:
        _check("PerParameter", self.per_parameter)

    def nats(self, evidence: StructureEvidence, costs: UnitCosts) -> dict[str, Tensor]:
        """``per_parameter`` times the parameters of a unit."""
        return _each(evidence, costs.parameters, self.per_parameter, "parameters")


@dataclass(frozen=True, slots=True)
class PerMac(Price):
    """A price per multiply-accumulate of one example.

    Attributes:
        per_mac: nats, not negative.
    """

    measured: ClassVar[tuple[str, ...]] = ("macs",)

    per_mac: float

    def __post_init__(self) -> None:
        _check("PerMac", self.per_mac)

    def nats(self, evidence: StructureEvidence, costs: UnitCosts) -> dict[str, Tensor]:
        """``per_mac`` times the multiply-accumulates of a unit."""
        return _each(evidence, costs.macs, self.per_mac, "multiply-accumulates")


@dataclass(frozen=True, slots=True)
class PerMillisecond(Price):
    """A price per millisecond of measured latency.

    Attributes:
        per_millisecond: nats, not negative.
    """

    measured: ClassVar[tuple[str, ...]] = ("milliseconds",)

    per_millisecond: float

    def __post_init__(self) -> None:
        _check("PerMillisecond", self.per_millisecond)

    def nats(self, evidence: StructureEvidence, costs: UnitCosts) -> dict[str, Tensor]:
        """``per_millisecond`` times the measured time of a unit."""
        return _each(evidence, costs.milliseconds, self.per_millisecond, "milliseconds")


def _each(evidence: StructureEvidence, cost: Mapping[str, float], rate: float, what: str) -> dict[str, Tensor]:
    missing = [key for key in evidence if key not in cost]
    if missing:
        raise OckhamError(
            f"a price per {what} needs the cost of a unit of {missing[:3]}: pass model= and example_inputs="
        )
    return {key: torch.full_like(e, rate * cost[key]) for key, e in evidence.items()}


def _check(owner: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise OckhamError(f"{owner}: a price is a finite number of nats, 0 or more; got {value}")
