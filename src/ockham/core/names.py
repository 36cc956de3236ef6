"""Parameters by name: the one meaning of `ignore`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ockham.errors import OckhamError

__all__ = ["Ignore", "covered_names", "protected_names"]

Ignore = Iterable[str | type[nn.Module] | nn.Module | Tensor]
"""Parameters to protect: names of parameters or modules, "re:" patterns on parameter names, module types, modules, or
parameters themselves; `covered_names` also takes one of them alone."""


def protected_names(model: nn.Module, ignore: Ignore) -> frozenset[str]:
    """Parameter names that ``ignore`` covers.

    Raises:
        OckhamError: an entry matches nothing, or a pattern is not a regular expression.
    """
    return covered_names(model, ignore)


def covered_names(model: nn.Module, ignore: Ignore, *, buffers: bool = False) -> frozenset[str]:
    """Names of parameters (and buffers) that ``ignore`` covers; a tensor with several names goes by the first.

    Raises:
        OckhamError: an entry matches nothing, or a pattern is not a regular expression.
    """
    pairs: list[tuple[str, Tensor]] = list(model.named_parameters(remove_duplicate=False))
    pairs += list(model.named_buffers(remove_duplicate=False)) if buffers else []
    first: dict[int, str] = {}
    for name, tensor in pairs:
        first.setdefault(id(tensor), name)
    found: set[str] = set()
    single: Any = ignore
    for entry in [single] if isinstance(single, (str, type, nn.Module, Tensor)) else ignore:
        modules = [
            name
            for name, module in model.named_modules(remove_duplicate=False)
            if name == entry or module is entry or (isinstance(entry, type) and isinstance(module, entry))
        ]
        pattern = _pattern(entry)
        covered = {
            first[id(tensor)]
            for name, tensor in pairs
            if name == entry
            or tensor is entry
            or (pattern is not None and pattern.search(name))
            or any(m == "" or name.startswith(m + ".") for m in modules)
        }
        if not covered:
            said = f"{type(entry).__name__} object" if isinstance(entry, (nn.Module, Tensor)) else repr(entry)
            raise OckhamError(
                f"ignore entry {said} matches no parameter of the model. It takes names of parameters or modules, "
                f"patterns on parameter names as 're:...', module types, modules and parameters; there are "
                f"{', '.join(name for name, _ in pairs[:8])}, ..."
            )
        found |= covered
    return frozenset(found)


def _pattern(entry: Any) -> re.Pattern[str] | None:
    if not isinstance(entry, str) or not entry.startswith("re:"):
        return None
    try:
        return re.compile(entry[3:])
    except re.error as error:
        raise OckhamError(f"ignore pattern {entry!r} is not a regular expression: {error}") from error
