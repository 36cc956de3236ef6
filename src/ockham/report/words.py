"""Numbers as people read them."""

from __future__ import annotations

import math

__all__ = ["count", "number", "percent", "seconds", "signed", "size", "times"]

_MINUS = "\N{MINUS SIGN}"
_NONE = "–"


def percent(share: float | None, digits: int | None = None) -> str:
    """A share as a percentage, with two significant digits of what is left or gone unless ``digits`` are asked for.

    >>> percent(0.0178), percent(0.98312, 2), percent(0.02), percent(0.9995), percent(1), percent(None)
    ('1.8 %', '98.31 %', '2.0 %', '99.950 %', '100 %', '–')
    """
    if share is None:
        return _NONE
    value = 100 * share
    if digits is not None:
        return f"{value:.{digits}f} %".replace("-", _MINUS)
    if value in (0, 100):
        return f"{value:.0f} %"
    small = min(abs(value), 100 - value) if 0 < value < 100 else abs(value)
    return f"{value:.{min(4, max(1, 1 - math.floor(math.log10(small))))}f} %".replace("-", _MINUS)


def count(value: float | None) -> str:
    """A whole number with separators.

    >>> count(266610), count(None)
    ('266,610', '–')
    """
    return _NONE if value is None else f"{value:,.0f}".replace("-", _MINUS)


def number(value: float | None) -> str:
    """A measure with four digits after the point.

    >>> number(0.01234), number(None)
    ('0.0123', '–')
    """
    return _NONE if value is None else f"{value:.4f}".replace("-", _MINUS)


def size(bytes_: float | None) -> str:
    """Bytes in the unit that reads best, decimal as disks are sold.

    >>> size(512), size(12_400), size(1_066_440), size(None)
    ('512 B', '12.4 kB', '1.07 MB', '–')
    """
    if bytes_ is None:
        return _NONE
    value = float(bytes_)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5 or unit == "GB":
            break
        value /= 1000
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"


def seconds(value: float | None) -> str:
    """A time span.

    >>> seconds(8.42), seconds(84), seconds(3720), seconds(None)
    ('8.4 s', '1 min 24 s', '1 h 2 min', '–')
    """
    if value is None:
        return _NONE
    whole = round(value)
    if whole < 60:
        return f"{value:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def signed(value: float, digits: int) -> str:
    """A number that always shows its sign, a true minus included; a rounded zero has none.

    >>> signed(-0.125, 2), signed(0.5, 1), signed(-0.001, 1)
    ('−0.12', '+0.5', '0.0')
    """
    text = f"{value:+,.{digits}f}"
    return text[1:] if not text.strip("+-0.") else text.replace("-", _MINUS)


def times(before: float | None, after: float | None) -> float | None:
    """How often ``after`` fits into ``before``; None where that makes no sense.

    >>> times(100, 4), times(None, 4), times(3, 0)
    (25.0, None, None)
    """
    return before / after if before and after else None
