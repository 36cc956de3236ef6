"""What a variational optimizer is given, checked: groups, parameters, settings, keep masks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ockham.errors import OckhamError
from ockham.fit.priors import Prior

__all__ = ["check_group", "check_keep", "check_settings"]


def check_group(group: Mapping[str, Any], taken: set[str]) -> None:
    """Named parameters, each once, of a kind that can be perturbed.

    Raises:
        OckhamError: otherwise; says which and what to do.
    """
    if "param_names" not in group:
        raise OckhamError("parameters need names: pass model.named_parameters(), not model.parameters()")
    names, params = group["param_names"], group["params"]
    if len(set(params)) != len(params):
        raise OckhamError("duplicate parameters: name a tied weight once, as named_parameters() does")
    again = sorted({n for n in names if n in taken or names.count(n) > 1})
    if again:
        raise OckhamError(f"parameter names must differ, also between groups; twice: {again[:6]}")
    for name, p in zip(names, params, strict=True):
        if hasattr(p, "device_mesh"):
            raise OckhamError(
                f"parameter {name!r} is a DTensor, sharded over processes (FSDP2): this optimizer needs whole tensors. "
                "Train with DistributedDataParallel instead, or build the optimizer before fully_shard"
            )
        if p.dtype not in (torch.float32, torch.float64):
            raise OckhamError(
                f"parameter {name!r} is {p.dtype}: variational inference needs float32 or float64 parameters, since a "
                "perturbation is lost in a shorter format. Keep float32 weights and use torch.autocast for speed; "
                "freeze parameters of other types (requires_grad_(False)) and leave them out"
            )


def check_keep(name: str, mask: Tensor, by_name: Mapping[str, Tensor]) -> None:
    """A boolean mask of a known parameter's shape.

    Raises:
        OckhamError: otherwise; says what was got.
    """
    if name not in by_name:
        raise OckhamError(f"keep names {name!r}, which this optimizer does not hold")
    if mask.dtype is not torch.bool or mask.shape != by_name[name].shape:
        raise OckhamError(
            f"keep[{name!r}] must be boolean (True = stays) of shape {tuple(by_name[name].shape)}; "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )


_POSITIVE = ("n_data", "lr", "eps", "initial_std", "std_rate", "temperature", "prior_interval")


def check_settings(owner: str, s: Mapping[str, Any], kind: type = Prior, example: str = "FixedPrior(1.0)") -> None:
    """Numbers in their ranges, as far as the optimizer has them, and a prior of its kind.

    Raises:
        OckhamError: names the setting, what it was, and what it may be.
    """
    for name in _POSITIVE:
        value = s.get(name, 1.0)
        number = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
        if not (number and 0 < value < math.inf):
            raise OckhamError(f"{owner}: {name} must be a number, positive and finite; got {value!r}")
    mean = s.get("prior_mean", 0.0)
    if not (isinstance(mean, Real) and math.isfinite(mean)):
        got = f"a tensor of shape {tuple(mean.shape)}" if isinstance(mean, Tensor) else repr(mean)
        raise OckhamError(
            f"{owner}: prior_mean must be one finite number for all weights of a group; got {got}. For a mean "
            "per weight, train the difference from it"
        )
    if not s.get("kl_warmup", 0) >= 0:
        raise OckhamError(f"{owner}: kl_warmup counts steps and cannot be negative; got {s['kl_warmup']}")
    if not all(0 <= b < 1 for b in s.get("betas", ()) if b is not None):
        raise OckhamError(f"{owner}: betas must lie in [0, 1); got {s['betas']}")
    if "prior" in s and not isinstance(s["prior"], kind):
        raise OckhamError(f"{owner}: prior must be a {kind.__name__} such as ockham.{example}; got {s['prior']!r}")
