"""Parameters by name: the one meaning of `ignore`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ockham.errors import OckhamError

__all__ = ["Entry", "Ignore", "ignored", "protected_names"]

Entry = str | type[nn.Module] | nn.Module | Tensor
"""A name of a parameter or module, a "re:" pattern on names, a module type, a module, or a parameter."""

Ignore = Iterable[Entry] | Entry
"""Parameters to protect: one `Entry`, or several."""


def ignored(model: nn.Module, entries: Ignore, *, buffers: bool = False) -> frozenset[str]:
    """Names of the parameters that ``entries`` cover.

    Args:
        model: whose parameters they are; names may be those of tied parameters or of modules inside it, "" is all.
        entries: one entry or several; a single string is one entry and not its letters.
        buffers: whether names and patterns cover buffers, too.

    Returns:
        Names as `named_parameters` has them: a tied parameter under its first name.

    Raises:
        OckhamError: an entry covers nothing (the nearest names are given), is of another type, or is a pattern that is
            no regular expression.

    >>> sorted(ignored(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "0"))
    ['0.bias', '0.weight']
    """
    first: dict[Tensor, str] = {}
    every: dict[str, str] = {}
    pairs = list(model.named_parameters(remove_duplicate=False))
    for name, p in [*pairs, *(model.named_buffers(remove_duplicate=False) if buffers else ())]:
        every[name] = first.setdefault(p, name)
    single = isinstance(entries, (str, type, nn.Module, Tensor))
    several: list[Any] = [entries] if single else list(entries)  # type: ignore[arg-type]
    found: set[str] = set()
    for entry in several:
        names = _covered(model, entry, every, first)
        if not names:
            raise OckhamError(f"ignore entry {_shown(entry)} matches no parameter{_near(model, entry, every)}")
        found |= names
    return frozenset(found)


def protected_names(model: nn.Module, ignore: Ignore) -> frozenset[str]:
    """The same as `ignored`, under its older name."""
    return ignored(model, ignore)


def _covered(model: nn.Module, entry: Any, every: dict[str, str], first: dict[Tensor, str]) -> set[str]:
    if isinstance(entry, Tensor):
        return {name for p, name in first.items() if p is entry}
    if isinstance(entry, nn.Module):
        inside = {first[p] for p in (*entry.parameters(), *entry.buffers()) if p in first}
        return inside if any(m is entry for m in model.modules()) else set()
    if isinstance(entry, type) and issubclass(entry, nn.Module):
        return {first[p] for m in model.modules() if isinstance(m, entry) for p in m.parameters()}
    if not isinstance(entry, str):
        raise OckhamError(
            f"ignore takes names, 're:' patterns, module types, modules and parameters; got {entry!r} "
            f"({type(entry).__name__})"
        )
    if entry.startswith("re:"):
        try:
            pattern = re.compile(entry[3:])
        except re.error as error:
            raise OckhamError(f"ignore pattern {entry!r} is not a regular expression: {error}") from error
        return {own for name, own in every.items() if pattern.search(name)}
    return {own for name, own in every.items() if entry in ("", name) or name.startswith(entry + ".")}


def _shown(entry: Any) -> str:
    if isinstance(entry, Tensor):
        return f"parameter of shape {tuple(entry.shape)}"
    return (
        entry.__name__ if isinstance(entry, type) else repr(entry) if isinstance(entry, str) else type(entry).__name__
    )


def _near(model: nn.Module, entry: Any, every: dict[str, str]) -> str:
    if isinstance(entry, str) and not entry.startswith("re:"):
        known = [*every, *(n for n, m in model.named_modules() if n and any(True for _ in m.parameters()))]
        close = difflib.get_close_matches(entry, known, n=3, cutoff=0.5)
        if close:
            return f"; did you mean {', '.join(map(repr, close))}?"
    return f"; there are {', '.join(list(every)[:8])}{', ...' if len(every) > 8 else ''}"
