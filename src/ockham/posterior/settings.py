"""Settings that all variational optimizers share, checked with the name of the one that was asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ockham.errors import OckhamError
from ockham.posterior.priors import Prior

__all__ = ["check_settings"]

_POSITIVE = ("n_data", "lr", "eps", "initial_std", "std_rate", "temperature", "prior_interval")


def check_settings(owner: str, s: Mapping[str, Any], kind: type = Prior, example: str = "FixedPrior(1.0)") -> None:
    """Numbers in their ranges, as far as the optimizer has them, and a prior of its kind.

    Raises:
        OckhamError: names the setting, what it was, and what it may be.
    """
    for name in _POSITIVE:
        if name in s and not 0 < s[name] < math.inf:
            raise OckhamError(f"{owner}: {name} must be positive and finite; got {s[name]}")
    if s["kl_warmup"] < 0:
        raise OckhamError(f"{owner}: kl_warmup counts steps and cannot be negative; got {s['kl_warmup']}")
    if not all(0 <= b < 1 for b in s["betas"] if b is not None):
        raise OckhamError(f"{owner}: betas must lie in [0, 1); got {s['betas']}")
    if not isinstance(s["prior"], kind):
        raise OckhamError(f"{owner}: prior must be a {kind.__name__} such as ockham.{example}; got {s['prior']!r}")
