"""Ockham: smaller PyTorch networks by model evidence, with no threshold to tune."""

from __future__ import annotations

from ockham.errors import DataError, NonFiniteLossError, OckhamError, OckhamWarning, ResultError, TraceError

__version__ = "0.1.0"
__all__ = ["DataError", "NonFiniteLossError", "OckhamError", "OckhamWarning", "ResultError", "TraceError"]
