"""The one error family: everything Ockham raises on purpose derives from `OckhamError`."""

from __future__ import annotations

__all__ = ["DataError", "NonFiniteLossError", "OckhamError", "OckhamWarning", "ResultError", "TraceError"]


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
