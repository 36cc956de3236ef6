"""The JSON files of a result, read and checked field by field before anything is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ockham.core.files import SCHEMA, read_json
from ockham.errors import ResultError

__all__ = [
    "BINS",
    "Results",
    "read_results",
]

BINS = 60
"""Bins of a delta_f histogram, equally wide over [-25, 5] nats."""

_HUGE = 1e15  # beyond it, and for nan, a number is damage

Check = Callable[[Any, str], Any]
"""Takes a value and where it stands; returns it cleaned, or raises ValueError."""


@dataclass(frozen=True, slots=True)
class Results:
    """What a result folder says, checked; every optional field is there, None where it was missing.

    Attributes:
        metrics: measures before and after.
        history: epochs, rounds, histograms of delta_f, diagnosis.
        analysis: layers, reliability, input map, corruption shift, out-of-distribution detection.
        result: how it was made.
        structure: what the removal of whole structures changed; None where none was asked for.
    """

    metrics: dict[str, Any]
    history: dict[str, Any]
    analysis: dict[str, Any]
    result: dict[str, Any]
    structure: dict[str, Any] | None = None


def read_results(folder: Path) -> Results:
    """Read and check ``metrics.json``, ``history.json``, ``analysis.json``, ``result.json``, and ``structure.json``.

    Raises:
        ResultError: a file is missing or damaged, or was made by a newer version; names the file and the field.
    """
    result = _read(folder / "result.json", _RESULT)
    if result["schema"] > SCHEMA:
        path = folder / "result.json"
        raise ResultError(
            f"{path}: written by a newer Ockham (schema {result['schema']:g}, this one reads up to {SCHEMA}); upgrade"
        )
    metrics = _read(folder / "metrics.json", _METRICS)
    history = _read(folder / "history.json", _HISTORY)
    structure = _read(folder / "structure.json", _STRUCTURE) if (folder / "structure.json").exists() else None
    return Results(metrics, history, _read(folder / "analysis.json", _ANALYSIS), result, structure)


def _read(path: Path, check: Check) -> dict[str, Any]:
    try:
        checked: dict[str, Any] = check(read_json(path), "")
    except ResultError:
        raise
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{path}: damaged or foreign ({error})") from error
    return checked


def _wrong(at: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"{at.lstrip('.') or 'the file'}: {expected} expected, got {str(value)[:40]!r}")


def _number(value: Any, at: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _HUGE:
        raise _wrong(at, "a finite number", value)
    return value


def _share(value: Any, at: str) -> float:
    if not -1e-6 <= _number(value, at) <= 1 + 1e-6:  # float32 sums end a little beyond
        raise _wrong(at, "a number from 0 to 1", value)
    return min(1.0, max(0.0, float(value)))


def _count(value: Any, at: str) -> int:
    if _number(value, at) < 0 or value != int(value):
        raise _wrong(at, "a whole number from 0 on", value)
    return int(value)


def _text(value: Any, at: str) -> str:
    if not isinstance(value, str):
        raise _wrong(at, "a text", value)
    return value.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _anything(value: Any, at: str) -> Any:
    return value


def _maybe(check: Check) -> Check:
    return lambda value, at: None if value is None else check(value, at)


def _list(check: Check, lengths: tuple[int, ...] = ()) -> Check:
    def checked(value: Any, at: str) -> list[Any]:
        if not isinstance(value, list) or (lengths and len(value) not in lengths):
            raise _wrong(at, f"a list{' of ' + ' or '.join(map(str, lengths)) if lengths else ''}", value)
        return [check(v, f"{at}[{i}]") for i, v in enumerate(value)]

    return checked


def _table(check: Check) -> Check:
    def checked(value: Any, at: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _wrong(at, "an object", value)
        return {_text(k, at): check(v, f"{at}.{k}") for k, v in value.items()}

    return checked


def _record(**fields: Check) -> Check:
    def checked(value: Any, at: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _wrong(at, "an object", value)
        return {k: check(value.get(k), f"{at}.{k}") for k, check in fields.items()}

    return checked


def _reliability(value: Any, at: str) -> dict[str, Any]:
    bins = _list(_maybe(_share))
    r: dict[str, Any] = _record(edges=_list(_share), confidence=bins, accuracy=bins, count=_list(_count))(value, at)
    n = len(r["count"])
    if [len(r[k]) for k in ("edges", "confidence", "accuracy")] != [n + 1, n, n]:
        raise _wrong(at, f"{n} bins with {n + 1} edges", value)
    return r


def _corruption(value: Any, at: str) -> dict[str, Any]:
    curve = _list(_share)
    fields = {"before": _maybe(curve), "after": curve, "before_ece": _maybe(curve), "after_ece": _maybe(curve)}
    c: dict[str, Any] = _record(severity=_list(_number), **fields)(value, at)
    if any(c[k] is not None and len(c[k]) != len(c["severity"]) for k in fields):
        raise _wrong(at, "as many values as severities", value)
    return c


def _map(value: Any, at: str) -> list[list[int]]:
    rows: list[list[int]] = _list(_list(_count))(value, at)
    if not rows or not rows[0] or any(len(r) != len(rows[0]) for r in rows):
        raise _wrong(at, "a table of rows of one length", value)
    return rows


def _layer(value: Any, at: str) -> dict[str, Any]:
    layer: dict[str, Any] = _record(
        name=_text, shape=_list(_count), total=_count, kept=_count, expected=_maybe(_number)
    )(value, at)
    if layer["kept"] > layer["total"]:
        raise _wrong(f"{at}.kept", f"at most {layer['total']}", layer["kept"])
    return layer


def _width(value: Any, at: str) -> dict[str, Any]:
    group: dict[str, Any] = _record(id=_text, before=_count, after=_count, nats=_number)(value, at)
    if not 0 < group["after"] <= group["before"]:
        raise _wrong(f"{at}.after", f"1 to {group['before']}", group["after"])
    return group


def _measures(value: Any, at: str) -> dict[str, Any]:
    found: dict[str, Any] = _table(_maybe(_number))(value, at)
    kinds = dict.fromkeys(("accuracy", "ece", "coverage_50", "coverage_90", "coverage_95"), _share)
    kinds |= dict.fromkeys(("parameters", "bytes"), _count)
    return {k: v if v is None else kinds.get(k, _number)(v, f"{at}.{k}") for k, v in found.items()}


_METRICS = _record(
    before=_maybe(_measures), after=_measures, mean_network=_maybe(_measures), kept=_share, seconds=_maybe(_number),
    seed=_maybe(_count), dataset=_maybe(_text), network=_maybe(_text), before_source=_maybe(_text),
)  # fmt: skip
_EPOCH = _record(epoch=_count, loss=_maybe(_number), accuracy=_maybe(_share), kept_share=_share)
_ROUND = _record(
    epoch=_count,
    removed=_count,
    kept_share=_share,
    delta_f=_number,
    nll_cost=_maybe(_number),
    free_energy=_maybe(_number),
)
_HISTORY = _record(
    epochs=_list(_EPOCH),
    rounds=_list(_ROUND),
    histograms=_maybe(_list(_record(epoch=_count, delta_f=_list(_count, (0, BINS))))),
    diagnosis=_maybe(
        _record(
            undetermined=_share,
            spread=_number,
            removable=_share,
            noise_cost=_maybe(_number),
            nll=_maybe(_number),
            warnings=_list(_text),
        )
    ),
)
_ANALYSIS = _record(
    layers=_maybe(_list(_layer)),
    reliability=_maybe(_record(before=_maybe(_reliability), after=_reliability)),
    input_map=_maybe(_map),
    input_inclusion=_maybe(_list(_share)),
    shift=_maybe(_table(_corruption)),
    ood=_maybe(_record(name=_text, before=_maybe(_share), after=_maybe(_share))),
)
_COST = _record(parameters=_count, bytes=_count, macs=_count, latency_1=_number, latency_64=_number)
_STRUCTURE = _record(groups=_list(_width), before=_COST, after=_COST)
_RESULT = _record(
    schema=_count, ockham=_maybe(_text), command=_maybe(_text), seed=_maybe(_count), date=_maybe(_text),
    seconds=_maybe(_number), versions=_maybe(_table(_text)), machine=_maybe(_text),
    network=_maybe(_record(builder=_maybe(_text))),
    dataset=_maybe(_record(name=_maybe(_text), n_train=_maybe(_count), n_test=_maybe(_count), source=_maybe(_text))),
    settings=_maybe(_table(_anything)),
)  # fmt: skip
