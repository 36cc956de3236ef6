"""The one error family: everything Ockham raises on purpose derives from `OckhamError`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields

__all__ = [
    "DataError",
    "NonFiniteLossError",
    "OckhamError",
    "OckhamWarning",
    "ResultError",
    "TraceError",
    "check_keywords",
    "first_line",
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


def check_keywords(owner: str, given: Mapping[str, object], known: type, *settings: type) -> None:
    """Refuse keywords that a `TypedDict` of options does not have, as Python does for a plain signature.

    Args:
        owner: name of the class or function that takes the keywords.
        given: keywords that came.
        known: TypedDict that declares them.
        settings: dataclasses of settings that the function takes as a whole, where the keyword may be sought.

    Raises:
        TypeError: a keyword is unknown; names the nearest one.
    """
    for name in given:
        if name not in known.__annotations__:
            homes = {field.name: kind.__name__ for kind in settings for field in fields(kind)}
            near = difflib.get_close_matches(
                {"lr": "learning_rate"}.get(name, name), [*known.__annotations__, *homes], 1
            )
            hint = f"; did you mean {near[0]!r}?" if near else ""
            if near and (home := homes.get(near[0])):
                hint = f"; it is a setting: {home.lower()}=ockham.{home}({near[0]}=...)"
            raise TypeError(f"{owner}() got an unexpected keyword argument {name!r}{hint}")


def first_line(error: BaseException) -> str:
    r"""The first line of what an error says, or its kind if it says nothing.

    >>> first_line(AssertionError()), first_line(ValueError("no such size\nsee above"))
    ('AssertionError', 'no such size')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
