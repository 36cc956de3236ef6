"""What a variational optimizer is given, checked: groups, parameters, keep masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ockham.errors import OckhamError

__all__ = ["check_group", "check_keep"]


def check_group(group: Mapping[str, Any], taken: set[str]) -> None:
    """Named parameters, each once, of a dtype that can be perturbed.

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
        _check_parameter(name, p)


def _check_parameter(name: str, p: Tensor) -> None:
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
