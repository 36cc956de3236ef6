"""Parameters by name: the one meaning of `ignore`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

from ockham.errors import OckhamError

__all__ = ["Ignore", "protected_names"]

Ignore = Sequence[str | type[nn.Module]]
"""Parameters to protect: names, "re:" patterns on names, module names, or module types."""


def protected_names(model: nn.Module, ignore: Ignore) -> frozenset[str]:
    """Parameter names that ``ignore`` covers.

    Raises:
        OckhamError: an entry matches nothing, or a pattern is not a regular expression.
    """
    names = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for entry in ignore:
        matches = {n for n in names if _predicate(model, entry)(n)}
        if not matches:
            raise OckhamError(f"ignore entry {entry!r} matches no parameter; there are {', '.join(names[:8])}, ...")
        found |= matches
    return frozenset(found)


def _predicate(model: nn.Module, entry: str | type[nn.Module]) -> Callable[[str], bool]:
    if isinstance(entry, type):
        owners = [m for m, module in model.named_modules() if isinstance(module, entry)]
        return lambda name: any(name.rpartition(".")[0] == o for o in owners)
    if entry.startswith("re:"):
        try:
            pattern = re.compile(entry[3:])
        except re.error as error:
            raise OckhamError(f"ignore pattern {entry!r} is not a regular expression: {error}") from error
        return lambda name: pattern.search(name) is not None
    return lambda name: name == entry or name.startswith(entry + ".")
