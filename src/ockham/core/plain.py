"""Frozen values to plain JSON values and back, checked field by field by the types of their classes.

A class says what its JSON looks like by its annotations alone: one key for each attribute, left out while the attribute
has its default. An attribute marked by `rest` takes all keys that the class does not name. Numbers that are not finite
become null, and null is read only where the type allows None.
"""

from __future__ import annotations

import reprlib
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from functools import lru_cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from ockham.errors import ResultError

__all__ = ["Count", "Share", "from_plain", "rest", "to_plain", "wrong"]

_HUGE = 1e30  # a number beyond it is damage, and would overflow in a figure
_LONGEST_TEXT, _LONGEST_LIST = 100_000, 1_000_000
_DEEPEST = 8  # levels inside a value whose class says nothing


def wrong(at: str, expected: str, value: Any) -> ResultError:
    """The error of a field that is not what it should be.

    Args:
        at: path of the field, such as "rounds[0].delta_f"; empty for the whole value.
        expected: words for what should be there.
        value: what is there instead.
    """
    return ResultError(f"{at.lstrip('.') or 'the file'}: {expected} expected, got {reprlib.repr(value)[:60]}")


def rest() -> Any:
    """An attribute, a mapping, that takes the keys its class does not name."""
    return field(default_factory=dict, metadata={"rest": True})


def to_plain(value: Any) -> Any:
    """A value as what JSON can hold: objects, lists, texts, finite numbers, true, false and null.

    Raises:
        ResultError: something else lies inside.
    """
    if is_dataclass(value) and not isinstance(value, type):
        found: dict[str, Any] = {}
        for f in fields(value):
            content = getattr(value, f.name)
            if "rest" in f.metadata:
                found |= to_plain(content)
            elif f.default is MISSING or content != f.default:
                found[f.name] = to_plain(content)
        return found
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if abs(value) < _HUGE else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise wrong("", "numbers, texts, lists and tables", value)


def from_plain(kind: Any, value: Any, at: str = "") -> Any:
    """A value of a type, checked; keys that a class does not name are passed over unless it has a `rest`.

    Args:
        kind: a frozen class, or a type made of float, int, str, bool, Any, `Share`, `Count`, tuples, mappings, None.
        value: what `to_plain` made, or JSON.
        at: path of the value, for the error.

    Raises:
        ResultError: a field is missing or wrong; says which, what was expected and what was there.
    """
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return inside[1](value, at)
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in inside:
            return None
        lists = [k for k in inside if get_origin(k) is tuple]
        return from_plain(lists[0] if lists and isinstance(value, list) else inside[0], value, at)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) > _LONGEST_LIST:
            raise wrong(at, "a list", value)
        return tuple(from_plain(inside[0], v, f"{at}[{i}]") for i, v in enumerate(value))
    if origin is not None or is_dataclass(kind):
        if not isinstance(value, dict) or len(value) > _LONGEST_LIST:
            raise wrong(at, "an object", value)
        return (
            _record(kind, value, at)
            if is_dataclass(kind)
            else {_text(k, at): from_plain(inside[1], v, f"{at}.{k}") for k, v in value.items()}
        )
    return _LEAVES[kind](value, at)


def _record(kind: Any, given: Mapping[str, Any], at: str) -> Any:
    hints, found = _hints(kind), {}
    for f in fields(kind):
        if "rest" in f.metadata:
            others = {k: v for k, v in given.items() if k not in hints}
            found[f.name] = from_plain(hints[f.name], others, at)
        elif f.name in given or f.default is MISSING:  # what is missing fails where None does
            found[f.name] = from_plain(hints[f.name], given.get(f.name), f"{at}.{f.name}")
    try:
        return kind(**found)
    except ResultError as error:  # two attributes that do not fit each other
        text, place = str(error), at.lstrip(".")
        whole = text.startswith("the file: ") and place
        raise ResultError(f"{place}: {text[10:]}" if whole else f"{place}.{text}".lstrip(".")) from error


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _number(value: Any, at: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _HUGE:
        raise wrong(at, "a finite number", value)
    return float(value)


def _share(value: Any, at: str) -> float:
    if not -1e-6 <= _number(value, at) <= 1 + 1e-6:  # float32 sums end a little beyond
        raise wrong(at, "a number from 0 to 1", value)
    return min(1.0, max(0.0, float(value)))


def _count(value: Any, at: str) -> int:
    if _number(value, at) < 0 or value != int(value):
        raise wrong(at, "a whole number from 0 on", value)
    return int(value)


def _text(value: Any, at: str) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
        raise wrong(at, "a text", value)
    return value.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _flag(value: Any, at: str) -> bool:
    if not isinstance(value, bool):
        raise wrong(at, "true or false", value)
    return value


def _anything(value: Any, at: str, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise wrong(at, f"at most {_DEEPEST} levels", value)
    if isinstance(value, list):
        return [_anything(v, f"{at}[{i}]", depth + 1) for i, v in enumerate(value)]
    if isinstance(value, dict):
        return {_text(k, at): _anything(v, f"{at}.{k}", depth + 1) for k, v in value.items()}
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        _number(value, at)
        return value
    return _text(value, at)


_LEAVES: dict[Any, Callable[[Any, str], Any]] = {float: _number, int: _count, str: _text, bool: _flag, Any: _anything}

Share = Annotated[float, _share]
"""A number from 0 to 1."""

Count = Annotated[int, _count]
"""A whole number from 0 on."""
