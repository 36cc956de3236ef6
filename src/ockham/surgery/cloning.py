"""Copies of a model with other tensors in it: the structure is copied, parameters and buffers are given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def canonical_names(model: nn.Module) -> dict[int, str]:
    """Return ``id(tensor) -> first name`` over parameters and buffers; tied tensors have one name."""
    names: dict[int, str] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names.setdefault(id(tensor), name)
    return names


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by their first name, tied ones once."""
    names = canonical_names(model)
    every = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    return {name: every[name] for name in names.values()}


def clone(model: nn.Module, replace: Callable[[str, Tensor], Tensor]) -> Any:
    """Return a deep copy of `model` in which every parameter and buffer is ``replace(name, tensor)``.

    Tied tensors stay tied, hooks and plain attributes are copied as `copy.deepcopy` does; the data of replaced tensors
    are not copied. Computed tensors held as attributes (``weight`` under `torch.nn.utils.prune`) are copied
    detached; the hook that made them makes them anew. Parameters stay parameters and keep ``requires_grad``.
    """
    memo: dict[int, Any] = {}
    for name, tensor in named_tensors(model).items():
        new = replace(name, tensor)
        if isinstance(tensor, nn.Parameter) and not isinstance(new, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = new
    for module in model.modules():
        for held in vars(module).values():
            if isinstance(held, Tensor) and not held.is_leaf:
                memo[id(held)] = held.detach().clone()
    return copy.deepcopy(model, memo)
