"""Tables as numbers: encoding, scaling, and the inputs worth a start."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from datetime import UTC
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ockham.errors import OckhamError, OckhamWarning

__all__ = [
    "ColumnError",
    "Encoding",
    "Floats",
    "Scaling",
    "Screened",
    "columns_of",
    "counts_for",
    "dense",
    "duplicates",
    "in_order",
    "outlying",
    "screen",
]


Floats = npt.NDArray[np.float64]

_CANONICAL_SIZE = 2_000_000
_LEVELS = 10  # of a category that become columns of their own
_FOLDS = 5
_SHRINKAGE = 10.0  # rows that the mean of a level is worth before its own
_DENSE = 400_000_000  # numbers of a sparse matrix that are written out
_MOST_COUNT = 10.0  # mean weight up to which whole weights are repetitions
_FAR = 8.0  # robust standard deviations


@dataclass(frozen=True, slots=True, eq=False)
class _Column:
    """How one column becomes numbers.

    Attributes:
        levels: levels of a category; None for numbers, truth values and times.
        means: target means of each level, [levels, k], where there are more levels than columns for them.
        fill: number in the place of missing ones.
        missing: whether missing entries get a column of their own.
    """

    levels: tuple[Any, ...] | None
    means: Floats | None
    fill: float
    missing: bool


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """How the columns of a table become numbers.

    Numbers stay; truth values are 0 and 1; times are days; a category has a column for each level but the most frequent
    one, or with more than ten levels one column of its levels' shrunken target means (of the other folds for the rows
    of the fit). Missing numbers are the mean and have an indicator; a missing category is a level.

    Attributes:
        columns: one per column of the table.
        origin: column of the table that each column of numbers comes from, [q].
        names: names of the columns of numbers.
    """

    columns: tuple[_Column, ...]
    origin: npt.NDArray[np.intp]
    names: tuple[str, ...]

    @staticmethod
    def of(parts: list[Any], names: list[str], target: Floats, weight: Floats) -> tuple[Encoding, Floats]:
        """From columns (`columns_of`) and centred targets [n, k]; also the numbers [n, q] for the rows of the fit."""
        columns, numbers, origin, found = [], [], [], []
        for j, (part, name) in enumerate(zip(parts, names, strict=True)):
            column, values, labels = _fitted(part, target, weight)
            columns.append(column)
            numbers.append(values)
            origin += [j] * values.shape[1]
            found += [name if label is None else f"{name}={label}" for label in labels]
        return Encoding(tuple(columns), np.array(origin, dtype=np.intp), tuple(found)), np.concatenate(numbers, 1)

    def apply(self, parts: list[Any], names: list[str], wanted: npt.NDArray[np.intp] | None = None) -> Floats:
        """Numbers [n, q] of another table with the same columns; levels not seen are named in a warning.

        Args:
            parts: columns of the table.
            names: their names.
            wanted: columns of numbers that anybody reads, 0 in all others; None: all.
        """
        found = np.zeros((len(parts[0]), len(self.origin)), order="F")  # memory of columns nobody reads is not touched
        for j in np.unique(self.origin if wanted is None else self.origin[wanted]):
            found[:, self.origin == j] = _applied(parts[j], self.columns[j], names[j])
        return found


class ColumnError(OckhamError, TypeError):
    """A column cannot be read; a `TypeError`, too, as scikit-learn's contract has it."""


def columns_of(x: Any) -> list[Any] | None:
    """Columns of a data frame or an array of objects, numbers as float64, levels as objects; None for plain arrays.

    Raises:
        OckhamError: two columns have one name.
        ColumnError: a column holds neither numbers nor truth values, times or levels.
    """
    if hasattr(x, "dtypes") and hasattr(x, "columns"):
        names, count = list(x.columns), len(set(x.columns))
        if count < len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise OckhamError(
                f"several columns are called {twice!r}: rename them, since inputs are told by their names"
            )
        given = [(repr(name), x[name], str(x[name].dtype)) for name in names]
    elif isinstance(x, np.ndarray) and x.dtype.kind == "O" and x.ndim == 2:
        given = [(str(j), x[:, j], "object") for j in range(x.shape[1])]
    else:
        return None
    found = []
    for name, values, kind in given:
        try:
            found.append(_column(values, kind))
        except (TypeError, ValueError, OverflowError) as error:
            raise ColumnError(
                f"column {name} of type {kind} holds neither numbers nor truth values, times or levels ({error}): "
                "leave it out, or make numbers of it"
            ) from error
    return found


_LEVEL = (str, bytes, int, float, np.generic)
_GONE = ("NAType", "NaTType")
_TIMES = {"date", "datetime", "Timestamp", "datetime64"}


def _column(values: Any, kind: str) -> Any:
    if kind == "category":  # as they are called, and not as an array with missing values would turn them
        called = [*map(str, values.cat.categories), None]
        return np.array([called[code] for code in values.cat.codes], dtype=object)
    if kind.startswith("period"):
        values, kind = values.dt.to_timestamp(), "datetime"
    if kind.startswith(("datetime", "timedelta")):
        plain = values.dt.tz_convert(None) if "," in kind else values
        time = np.asarray(plain, dtype="datetime64[ns]" if kind.startswith("datetime") else "timedelta64[ns]")
        return np.where(np.isnat(time), np.nan, time.astype(np.int64) / 86_400e9)
    if kind.endswith("[pyarrow]") and kind.startswith(("timestamp", "date", "dictionary")):
        kind = "object"
    if kind in ("object", "str") or kind.startswith(("string", "interval")):
        return _things(np.asarray(values, dtype=object).tolist(), levels=kind != "object")
    if "complex" in kind:
        raise TypeError("complex numbers have no order")
    given = {"na_value": np.nan} if hasattr(values, "to_numpy") else {}
    return (values.to_numpy if given else values.astype)(dtype=np.float64, **given)


def _things(raw: list[Any], *, levels: bool) -> Any:
    """Python's values as days, numbers or levels; what is missing is NaN, or None among levels."""
    gone = np.array([(isinstance(v, float) and math.isnan(v)) or v is None or type(v).__name__ in _GONE for v in raw])
    there = [v for v, g in zip(raw, gone, strict=True) if not g]
    if not levels:
        numbers = np.full(len(raw), np.nan)
        if there and all(type(v).__name__ in _TIMES for v in there):
            naive = [v.astimezone(UTC).replace(tzinfo=None) if getattr(v, "tzinfo", None) else v for v in there]
            numbers[~gone] = np.array(naive, dtype="datetime64[us]").astype(np.int64) / 86_400e6
            return numbers
        if not any(isinstance(v, (str, bytes)) for v in there):
            numbers[~gone] = [float(v) for v in there]
            return numbers
        if strange := [v for v in there if not isinstance(v, _LEVEL)]:
            raise TypeError(f"got {strange[0]!r:.60}")
    return np.array([None if g else str(v) for v, g in zip(raw, gone, strict=True)], dtype=object)


def _fitted(part: Any, target: Floats, weight: Floats) -> tuple[_Column, Floats, list[str | None]]:
    if part.dtype != object:
        gone = np.isnan(part)
        there = weight * ~gone
        mean = float(np.where(gone, 0.0, part) @ there / there.sum()) if there.sum() > 0 else 0.0
        column = _Column(None, None, mean, bool(gone.any()))
        return column, _applied(part, column, ""), [None, "missing"][: 1 + column.missing]
    filled = np.array(["(missing)" if v is None else v for v in part], dtype=object)
    levels, index = np.unique(filled.astype(str), return_inverse=True)
    size = np.bincount(index, weights=weight, minlength=len(levels))
    order = np.argsort(-size, kind="stable")
    if len(levels) <= _LEVELS + 1:
        column = _Column(tuple(levels[order].tolist()), None, 0.0, False)
        return column, _applied(part, column, ""), [str(v) for v in levels[order][1:]]
    member = (index[:, None] == np.arange(len(levels))) * weight[:, None]
    total, fold = member.T @ target, np.random.default_rng(len(part)).integers(_FOLDS, size=len(part))
    values = np.zeros_like(target)
    for k in range(_FOLDS):  # a row's own target must not be in its number
        mine = fold == k
        rest = (total - member[mine].T @ target[mine]) / (size - member[mine].sum(0) + _SHRINKAGE)[:, None]
        values[mine] = rest[index[mine]]
    column = _Column(tuple(levels.tolist()), total / (size + _SHRINKAGE)[:, None], 0.0, False)
    return column, values, [None] * target.shape[1]


def _applied(part: Any, column: _Column, name: str) -> Floats:
    if column.levels is None:
        if part.dtype == object:
            strange = next(v for v in part if v is not None)
            raise OckhamError(f"column {name!r} had numbers when the model was fitted; got {strange!r}")
        gone = np.isnan(part)
        filled = np.where(gone, column.fill, part)
        if gone.any() and not column.missing and name:
            warnings.warn(
                f"column {name!r} has {int(gone.sum())} missing entries and had none when the model was fitted: "
                f"they count as the mean, {column.fill:.6g}",
                OckhamWarning,
                stacklevel=5,
            )
        return np.column_stack([filled, gone]) if column.missing else filled[:, None]
    text = np.array(["(missing)" if v is None else str(v) for v in part.tolist()])
    place = {level: i for i, level in enumerate(column.levels)}
    index = np.array([place.get(t, -1) for t in text.tolist()])
    if (index < 0).any() and name:
        strange = sorted(set(text[index < 0].tolist()))
        most = f"as {column.levels[0]!r}" if column.means is None else "as the mean of all"
        warnings.warn(
            f"column {name!r} has levels that were not there when the model was fitted ({', '.join(strange[:4])}): "
            f"they count {most}",
            OckhamWarning,
            stacklevel=5,
        )
    if column.means is not None:
        coded: Floats = np.where(index[:, None] < 0, 0.0, column.means[index])
        return coded
    numbers: Floats = (index[:, None] == np.arange(1, len(column.levels))).astype(np.float64)
    return numbers


def dense(x: Any) -> Any:
    """A sparse matrix written out; anything else as it is."""
    if not hasattr(x, "toarray"):
        return x
    if x.shape[0] * x.shape[1] > _DENSE:
        raise OckhamError(
            f"a sparse matrix of {x.shape[0]} x {x.shape[1]} would take {8e-9 * x.shape[0] * x.shape[1]:.0f} GB when "
            "written out, which screening needs; select columns first (sklearn.feature_selection)"
        )
    return x.toarray()


def counts_for(weight: Floats, n_effective: float | None) -> tuple[Floats, float | None]:
    """Weights that count observations, and the number they were scaled to (None: they are as they came).

    Whole numbers of mean ten at most are repetitions, and so are weights whose mean is between one half and two.
    Anything else is relative: it counts for Kish's number of rows, (sum w)^2 / sum w^2, or for ``n_effective``.
    """
    total, rows = weight.sum(), int((weight > 0).sum())
    if n_effective is None:
        mean = total / rows
        whole = bool((weight == np.round(weight)).all())
        if 0.5 <= mean <= 2.0 or (whole and mean <= _MOST_COUNT):
            return weight, None
        n_effective = float(total**2 / (weight**2).sum())
    return weight * (n_effective / total), n_effective


def outlying(y: Floats, weight: Floats) -> npt.NDArray[np.bool_]:
    """Targets more than eight robust standard deviations from the median, where they are a twentieth at most; [n]."""
    order = np.argsort(y)
    share = np.cumsum(weight[order]) / weight.sum()
    low, middle, high = (y[order][np.searchsorted(share, q).clip(0, len(y) - 1)] for q in (0.25, 0.5, 0.75))
    far: npt.NDArray[np.bool_] = np.abs(y - middle) > _FAR * max((high - low) / 1.349, 0.0)
    few = high > low and weight[far].sum() <= 0.05 * weight.sum()
    return far if few else np.zeros(len(y), dtype=np.bool_)


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """Weighted mean and standard deviation of columns (or of the target).

    Attributes:
        mean: mean of each column, [p].
        std: standard deviation of each column, 1 where it is constant, [p].
        constant: mask of constant columns, [p].
    """

    mean: Floats
    std: Floats
    constant: npt.NDArray[np.bool_]

    @staticmethod
    def of(values: Floats, weight: Floats) -> Scaling:
        """From values [n, p] and weights [n]."""
        share = weight / weight.sum()
        mean = share @ values
        std = np.sqrt(share @ (values - mean) ** 2)
        present = values[weight > 0]
        constant = (present.max(0) == present.min(0)) | ~(std > 1e-12 * np.abs(mean))
        return Scaling(mean, np.where(constant, 1.0, std), constant)

    def apply(self, values: Floats, columns: npt.NDArray[np.intp] | None = None) -> Tensor:
        """Some columns (None: all), standardised, float32."""
        some = slice(None) if columns is None else columns
        scaled = (values[:, some] - self.mean[some]) / self.std[some]
        return torch.from_numpy(np.ascontiguousarray(scaled, dtype=np.float32))


def in_order(x: Floats, y: Floats, weight: Floats) -> tuple[Floats, Floats, Floats]:
    """Rows sorted, equal ones merged into one with the sum of their weights, rows of weight 0 dropped.

    Repeating a row and giving it a weight of two are then the same problem, to the bit. Left as it is where the table
    is large: sorting it would cost more than it is worth.
    """
    there = weight > 0
    x, y, weight = x[there], y[there], weight[there]
    if x.size > _CANONICAL_SIZE:
        return x, y, weight
    rows, where = np.unique(np.column_stack([x, y]), axis=0, return_inverse=True)
    summed = np.zeros(len(rows))
    np.add.at(summed, where.reshape(-1), weight)
    return np.ascontiguousarray(rows[:, :-1]), rows[:, -1].copy(), summed


def duplicates(x: Tensor) -> npt.NDArray[np.intp]:
    """For each standardised column the index of the first one that equals it, or its negative; [p]."""
    n, p = x.shape
    probe = torch.linspace(0, n - 1, min(n, 64)).long()
    keys: dict[bytes, list[int]] = {}
    signs, first = np.ones(p), np.arange(p)
    for j in range(p):
        column = x[:, j]
        there = column.nonzero()
        signs[j] = -1.0 if len(there) and float(column[there[0]]) < 0 else 1.0
        key = (column[probe] * signs[j] + 0.0).numpy().round(4).tobytes()
        mine, others = column * signs[j], keys.get(key, [])
        same = next((i for i in others if bool(((x[:, i] * signs[i] - mine).abs() < 1e-5).all())), None)
        if same is None:
            keys.setdefault(key, []).append(j)
        else:
            first[j] = same
    return first


_ROWS = 4000
_BLOCK = 512
_ALL_PAIRS = 512
_LEAST = 4


class Screened(NamedTuple):
    """Which inputs enter.

    Attributes:
        active: their indices, ascending.
        evidence: evidence of every input after what entered was explained away, nats; shape [p].
    """

    active: Tensor
    evidence: Tensor


def screen(x: Tensor, target: Tensor, weight: Tensor, *, most: int = 24) -> Screened:
    r"""Greedy search by evidence.

        t^2 / 2 - 1/2 ln n - ln(terms of that family),   t^2 = n mean(u e)^2 / (mean(u^2 e^2) - mean(u e)^2)

    with u a centred term and e what is not yet explained. The variance of u e is estimated, not assumed (White's):
    what a polynomial leaves is larger where inputs are extreme, and there the extremes of chance terms meet it.

    Args:
        x: standardised inputs [n, p].
        target: [n, k], several columns for several classes; the best counts.
        weight: weight of the examples [n].
        most: inputs that may enter by evidence; at least four do.
    """
    rows = torch.arange(len(x)) if len(x) <= _ROWS else torch.linspace(0, len(x) - 1, _ROWS).long()
    weight = weight[rows] / weight[rows].sum()
    first = _standardised(x[rows].clamp(-3, 3), weight)
    second = _standardised(first.square(), weight)
    terms = _Terms(first, second, weight)
    active: list[int] = []
    rest = _standardised(target[rows], weight)
    evidence = first.new_zeros(first.shape[1])
    everything = True
    while True:
        evidence, partner = terms.evidence(rest, active, everything=everything)
        evidence[active] = -math.inf
        best = int(evidence.argmax())
        if len(active) >= most or (everything and float(evidence[best]) <= 0):
            break
        if float(evidence[best]) <= 0:
            everything = True  # a product of two that nobody sees alone shows once what entered is explained away
            continue
        everything = first.shape[1] <= _ALL_PAIRS
        active += [j for j in dict.fromkeys((best, int(partner[best]))) if j not in active]
        rest = terms.unexplained(target[rows], active)
    spare = evidence.argsort(descending=True)[: max(0, min(_LEAST, first.shape[1]) - len(active))]
    chosen = torch.tensor(sorted({*active, *spare.tolist()}), dtype=torch.long)
    return Screened(chosen, evidence)


class _Terms(NamedTuple):
    first: Tensor
    second: Tensor
    weight: Tensor

    def evidence(self, y: Tensor, active: list[int], *, everything: bool) -> tuple[Tensor, Tensor]:
        """Evidence of each input's best term, and the input that the best term shares it with (itself if none)."""
        n, p = self.first.shape
        best = torch.full((p,), -math.inf, dtype=self.first.dtype)
        partner = torch.arange(p)
        for terms in (self.first, self.second):
            weighted = self.weight.unsqueeze(1)
            spread = terms.square().T @ (y.square() * weighted)
            best = torch.maximum(best, _nats((terms.T @ (y * weighted)).square(), spread, n).amax(1) - math.log(p))
        others = torch.arange(p) if everything else torch.tensor(active, dtype=torch.long)
        if not len(others):
            return best, partner
        with_k, price = self.first[:, others], math.log(p * len(others))
        for rest, terms, start in product(y.T, (self.first, self.second), range(0, p, _BLOCK)):
            block = terms[:, start : start + _BLOCK]  # products terms_j first_k, k in others
            spread = (block.square() * (self.weight * rest.square()).unsqueeze(1)).T @ with_k.square()
            along = ((block * (self.weight * rest).unsqueeze(1)).T @ with_k).square()
            j = torch.arange(start, start + len(along))
            along[j.unsqueeze(1) == others] = 0.0
            found = _nats(along, spread, n) - price
            _raise(best, partner, j, *found.max(1), others)
            _raise(best, partner, others, *found.max(0), j)
        return best, partner

    def unexplained(self, target: Tensor, active: list[int]) -> Tensor:
        """What a ridge regression on all terms of the active inputs leaves of the target, standardised."""
        a, b = self.first[:, active], self.second[:, active]
        i, j = torch.tril_indices(len(active), len(active), -1)
        pairs = [a, b, a[:, i] * a[:, j], (b.unsqueeze(2) * a.unsqueeze(1)).flatten(1)]
        root = self.weight.sqrt().unsqueeze(1) * math.sqrt(len(a))
        basis = torch.cat([_standardised(t, self.weight) for t in pairs if t.shape[1]], 1).double()
        y = _standardised(target, self.weight).double()
        left, right = basis * root, y * root
        if basis.shape[1] <= len(basis):
            ridge = torch.eye(basis.shape[1], dtype=left.dtype)
            coefficient = torch.linalg.solve(left.T @ left + ridge, left.T @ right)
        else:
            ridge = torch.eye(len(basis), dtype=left.dtype)
            coefficient = left.T @ torch.linalg.solve(left @ left.T + ridge, right)
        return _standardised((y - basis @ coefficient).to(self.first.dtype), self.weight)


def _raise(best: Tensor, partner: Tensor, index: Tensor, value: Tensor, at: Tensor, other: Tensor) -> None:
    better = value > best[index]
    best[index[better]] = value[better]
    partner[index[better]] = other[at[better]]


def _standardised(columns: Tensor, weight: Tensor) -> Tensor:
    centred = columns - weight @ columns
    return centred / (weight @ centred.square()).sqrt().clamp_min(1e-9)


def _nats(along: Tensor, spread: Tensor, n: int) -> Tensor:
    """Half t^2 less its price, from the square of a mean and the mean of squares."""
    return 0.5 * n * along / (spread - along).clamp_min(1e-9) - 0.5 * math.log(n)
