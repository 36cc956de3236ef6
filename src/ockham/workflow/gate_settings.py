"""Settings of training with gates: how the KL is weighted, what decides, when structures go."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ockham.errors import OckhamError
from ockham.evidence import lognormal
from ockham.posterior.gates import Noise, per_example
from ockham.reduction.gate_rules import GateEvidence
from ockham.workflow.gate_curve import parameters_left
from ockham.workflow.gating import Gates

__all__ = ["Budget", "Decision", "GateTraining", "KLWeight", "Tempered", "by_threshold", "mean_mean", "true_elbo"]

KLWeight = Callable[[Gates, float], Tensor]
"""(gates, n_data) to the term that joins the mean NLL of a batch."""

Decision = Callable[[Gates, GateEvidence, float], Mapping[str, Tensor]]
"""(gates, their evidence, share of the training done) to masks of what stays."""


def true_elbo(gates: Gates, n_data: float) -> Tensor:
    """Sum of the KL over N: the evidence lower bound, per example."""
    return gates.kl() / n_data


def mean_mean(gates: Gates, n_data: float) -> Tensor:
    """Mean over layers of the mean KL per gate, whatever the number of examples: what the released code of BMRS adds.

    N / (number of gates) times the true weight: 160 times on 48,000 images and 300 gates. Training then collapses
    gates that the data want, and rules with a fixed threshold remove whole layers.
    """
    noise = gates.noise
    each = lognormal.kl(noise.mean, noise.std, low=noise.low, high=noise.high)
    means = [each[p][noise.keep[p]].mean() for p in gates.places.values()]
    # a group of one unit is no group: with one left in every layer nothing more can go
    return torch.stack(means).mean() if means else 0 * gates.kl()


@dataclass(frozen=True, slots=True)
class Tempered:
    """A multiple of the true weight: the posterior of the data to the power 1/temperature, a price on structures.

    Attributes:
        temperature: 1 is `true_elbo`; above it more structures go, and delta_f is *tempered* evidence.
    """

    temperature: float

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise OckhamError(f"Tempered: temperature must be positive and finite; got {self.temperature}")

    def __call__(self, gates: Gates, n_data: float) -> Tensor:
        """Temperature times KL over N."""
        return self.temperature * gates.kl() / n_data


def by_threshold(gates: Gates, evidence: GateEvidence, progress: float) -> Mapping[str, Tensor]:
    """The rule's own stopping point: what has a score >= 0 goes."""
    return evidence.keep


@dataclass(frozen=True, slots=True)
class Budget:
    """A number of parameters left at the end, by order of score; on the way there in a cubic schedule.

    Attributes:
        parameters: learnable values of the network at the end, gates not counted.
        full: at the start.
    """

    parameters: int
    full: int

    def __call__(self, gates: Gates, evidence: GateEvidence, progress: float) -> Mapping[str, Tensor]:
        """The least removal that leaves no more than what is allowed now."""
        allowed = self.full - (self.full - self.parameters) * (1 - (1 - progress) ** 3)
        low, high = 0, sum(len(p) for p in gates.places.values())
        while low < high:
            middle = (low + high) // 2
            if parameters_left(gates, evidence.matched(middle)) <= allowed:
                high = middle
            else:
                low = middle + 1
        return evidence.matched(low)


@dataclass(frozen=True, slots=True)
class GateTraining:
    """Settings of a run.

    Attributes:
        epochs: with gates.
        fine_tune: epochs afterwards, of the plain network with E[theta] folded in.
        learning_rate: of Adam, for weights, at first.
        gate_rate: that of the gates over that of the weights.
        hold: share of the steps at full learning rate; it falls linearly to zero after them.
        kl_weight: `true_elbo`, `Tempered` for a price on structures, or `mean_mean` for reproduction.
        kl_warmup: share of the steps with gates over which the KL gets its weight.
        every: epochs between removals; 0 removes once, after the training with gates.
        start: share of the epochs before the first removal.
        shrink_every: removals between physical shrinking; 0 shrinks at the end only.
        noise: `per_example`, or ``per_element`` for reproduction.
        seed: of noise, shuffling and dropout.
    """

    epochs: int = 50
    fine_tune: int = 10
    learning_rate: float = 1e-3
    gate_rate: float = 1.0
    hold: float = 0.5
    kl_weight: KLWeight = true_elbo
    kl_warmup: float = 0.1
    every: int = 1
    start: float = 0.0
    shrink_every: int = 1
    noise: Noise = per_example
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or min(self.fine_tune, self.every, self.shrink_every) < 0:
            raise OckhamError(f"GateTraining: at least one epoch, nothing negative; got {self}")
        if not (0 < self.learning_rate < math.inf and 0 < self.gate_rate < math.inf):
            raise OckhamError(f"GateTraining: rates must be positive; got {self.learning_rate}, {self.gate_rate}")
        if not (0 <= self.hold <= 1 and 0 <= self.kl_warmup <= 1 and 0 <= self.start <= 1):
            raise OckhamError(f"GateTraining: hold, kl_warmup and start are shares in [0, 1]; got {self}")
