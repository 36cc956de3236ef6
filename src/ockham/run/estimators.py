"""Settings of a run, and the optimizers that they make."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from ockham.choose.rules import Rounds
from ockham.errors import OckhamError
from ockham.fit.ivon import IVON
from ockham.fit.mean_field import MeanField
from ockham.fit.optimizer import VariationalOptimizer
from ockham.fit.point import PointEstimate
from ockham.fit.priors import FixedPrior, Prior

__all__ = [
    "SMALL_DATA",
    "Estimator",
    "Training",
    "defaults_for",
    "ivon",
    "mean_field",
    "point_estimate",
]


@dataclass(frozen=True, slots=True)
class Training:
    """Settings of the variational training run.

    Attributes:
        epochs: passes over the data, reduction and refitting included.
        learning_rate: of mean and ln std, at first.
        hold: share of the steps at full learning rate; it falls linearly to zero after them.
        prior: over every weight.
        initial_std: starting standard deviation.
        temperature: of the posterior; 1 is Bayes.
        kl_warmup: share of the steps over which the KL gets its weight.
        seed: of noise, shuffling and dropout.
    """

    epochs: int = 30
    learning_rate: float = 2e-3
    hold: float = 0.5
    prior: Prior = field(default_factory=lambda: FixedPrior(0.3))
    initial_std: float = 1e-2
    temperature: float = 1.0
    kl_warmup: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise OckhamError(f"Training: epochs must be at least 1; got {self.epochs}")
        for name in ("learning_rate", "initial_std", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise OckhamError(f"Training: {name} must be positive and finite; got {getattr(self, name)}")
        if not isinstance(self.prior, Prior):
            raise OckhamError(f"Training: prior must be a Prior such as ockham.FixedPrior(0.3); got {self.prior!r}")
        if not (0 <= self.hold < 1 and 0 <= self.kl_warmup <= 1):
            raise OckhamError(f"Training: hold in [0, 1), kl_warmup in [0, 1]; got {self.hold}, {self.kl_warmup}")


SMALL_DATA = 10_000
"""Fewer training examples than this count as small."""


def defaults_for(examples: int) -> tuple[Training, Rounds, int]:
    """Training, rounds and batch size of the command for a number of training examples.

    Small data get more epochs and smaller batches, a wider prior, a longer warm-up of the KL and a later first round:
    a posterior that has not formed removes too much at once. Their posterior is tempered (T = 0.1), since posterior
    averages are underconfident there; what was measured is in docs/decisions.md.
    """
    if examples >= SMALL_DATA:
        return Training(), Rounds(), 128
    settings = {"temperature": 0.1, "kl_warmup": 0.15, "prior": FixedPrior(1.0)}
    return Training(epochs=80, learning_rate=3e-3, **settings), Rounds(start=0.25, end=0.9, count=11), 64  # type: ignore[arg-type]


Estimator = Callable[..., VariationalOptimizer]
"""(model, training, *, n_data, steps) to an optimizer over the model's parameters that require a gradient."""


def mean_field(model: nn.Module, training: Training, *, n_data: float, steps: int) -> VariationalOptimizer:
    """`ockham.MeanField` with the settings of the run; ``steps`` is its whole length."""
    optimizer = MeanField(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad],
        n_data=n_data,
        lr=training.learning_rate,
        prior=training.prior,
        initial_std=training.initial_std,
        temperature=training.temperature,
        kl_warmup=round(training.kl_warmup * steps),
        prior_interval=max(1, steps // (training.epochs * training.prior.updates_per_epoch)),
        seed=training.seed,
    )
    optimizer.hold(model)
    return optimizer


def point_estimate(model: nn.Module, training: Training, *, n_data: float, steps: int) -> VariationalOptimizer:
    """`ockham.PointEstimate`, for magnitude pruning through the same door."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = PointEstimate(named, n_data=n_data, lr=training.learning_rate)
    optimizer.hold(model)
    return optimizer


def ivon(model: nn.Module, training: Training, *, n_data: float, steps: int) -> VariationalOptimizer:
    """`ockham.IVON` with the settings of the run; its learning rate is 50 times that of Adam (decisions)."""
    optimizer = IVON(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad],
        n_data=n_data,
        lr=50 * training.learning_rate,
        steps=steps,
        prior=training.prior,
        initial_std=training.initial_std,
        temperature=training.temperature,
        kl_warmup=round(training.kl_warmup * steps),
        prior_interval=max(1, steps // training.epochs),
        seed=training.seed,
    )
    optimizer.hold(model)
    return optimizer


def as_plain(training: Training) -> dict[str, Any]:
    """Settings as JSON-able values, the prior by its type and numbers."""
    plain = {f.name: getattr(training, f.name) for f in fields(training)}
    shown = [f"{f.name}={getattr(training.prior, f.name):g}" for f in fields(training.prior) if f.repr]  # type: ignore[arg-type]
    return plain | {"prior": f"{type(training.prior).__name__}({', '.join(shown)})"}
