"""Copies of a model with other tensors in it: the structure is copied, parameters and buffers are given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
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


def clone(
    model: nn.Module, replace: Callable[[str, Tensor], Tensor], *, others: Callable[[Tensor], Tensor] | None = None
) -> Any:
    """Return a deep copy of `model` in which every parameter and buffer is ``replace(name, tensor)``.

    Tensors which modules hold as plain attributes, or in lists and dictionaries, are ``others(tensor)`` where given.

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
            for tensor in tensors_in(held):
                if id(tensor) not in memo and (others is not None or not tensor.is_leaf):
                    memo[id(tensor)] = tensor.detach().clone() if others is None else others(tensor)
    return copy.deepcopy(model, memo)


def tensors_in(held: Any) -> Iterator[Tensor]:
    """Yield the tensors in an attribute: itself, or in lists, tuples and dictionaries."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, (list, tuple, Mapping)):
        for item in held.values() if isinstance(held, Mapping) else held:
            yield from tensors_in(item)


def caches_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return module path to attributes that are lists or dictionaries with tensors other than parameters and buffers.

    They may come from an earlier forward, as tables that are kept once they were computed do.
    """
    known = canonical_names(model)
    found: dict[str, tuple[str, ...]] = {}
    for path, module in model.named_modules():
        names = tuple(
            name
            for name, held in vars(module).items()
            if isinstance(held, (list, dict))
            and not name.startswith(("_parameters", "_buffers", "_modules", "_flat_weight"))
            and any(id(t) not in known for t in tensors_in(held))
        )
        if names:
            found[path] = names
    return found
