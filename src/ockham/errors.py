"""The one error family: everything Ockham raises on purpose derives from `OckhamError`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

__all__ = [
    "DataError",
    "NonFiniteLossError",
    "OckhamError",
    "OckhamWarning",
    "ResultError",
    "TraceError",
    "check_keywords",
]


class OckhamError(ValueError):
    """Base of all errors raised on purpose; the text says what was got, what was expected and what to do."""


class DataError(OckhamError):
    """The data do not fit: empty loader, labels out of range, unreadable or foreign files."""


class NonFiniteLossError(OckhamError):
    """The loss became NaN or infinite; the text says at which step."""


class ResultError(OckhamError):
    """A saved file is truncated, tampered with, foreign, or made by a newer version."""


class TraceError(OckhamError):
    """A model cannot be traced; the text says why and names the way out."""


class OckhamWarning(UserWarning):
    """Something the user should know before trusting a result."""


def check_keywords(owner: str, given: Mapping[str, object], known: type) -> None:
    """Refuse keywords that a `TypedDict` of options does not have, as Python does for a plain signature.

    Args:
        owner: name of the class or function that takes the keywords.
        given: keywords that came.
        known: TypedDict that declares them.

    Raises:
        TypeError: a keyword is unknown; names the nearest one.
    """
    for name in given:
        if name not in known.__annotations__:
            near = difflib.get_close_matches(name, known.__annotations__, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{owner}() got an unexpected keyword argument {name!r}{hint}")
