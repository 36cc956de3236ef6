"""Tables as data: CSV and Parquet files with a target column. Needs pandas (and pyarrow for Parquet)."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from ockham.core.files import afford, open_regular, printable
from ockham.errors import DataError, OckhamError
from ockham.zoo.files import UNREADABLE, Array, Part, Reading, there, unreadable

__all__ = ["TABLE_ENDS", "read_table", "table_parts"]

TABLE_ENDS = (".csv", ".parquet")
USUAL_TARGETS = ("target", "label", "y")
MOST_LEVELS, MOST_CLASSES = 100, 20
SEPARATORS = ",;\t|"
GROWTH = 8
"""Memory that a table takes while it is read, in sizes of its file."""


def table_parts(path: Path, target: str | None, max_bytes: float | None, targets: str | None = None) -> Reading | None:
    """A table and its test part: the file itself, or `train` and `test`, or `data`, or the only table of a folder.

    Args:
        path: file or folder.
        target: name of the column to predict; None: "target", "label" or "y".
        max_bytes: most bytes of a file; None: an eighth of the memory that is free.
        targets: "classes" or "numbers", where the values leave it open.

    Returns:
        Numbers as they are, texts as one column of 0 and 1 per level. Text targets, and whole numbers of at most 20
        values, are classes; others are regression. None where there is no table.

    Raises:
        DataError: unreadable, no such column, empty cells, texts of too many levels, or targets of another kind.
    """
    train_file, test_file = _files(path)
    if train_file is None:
        return None
    train = read_table(train_file, max_bytes)
    name = target or next((n for n in USUAL_TARGETS if n in train), None)
    if name is None or name not in train:
        raise DataError(
            f"{printable(train_file)}: no column {printable(repr(target)) if target else 'named target, label or y'}; "
            f"there are {printable(', '.join(list(train)[:12]))}. Say which is to be predicted with --target (target=)"
        )
    first = "Unnamed: 0"  # as pandas calls a column without a name: that of DataFrame.to_csv counts the rows
    counted = name != first and first in train and np.array_equal(train[first], np.arange(len(train[first])))
    train = {n: c for n, c in train.items() if n != first or not counted}
    levels = {n: sorted({str(v) for v in c}) for n, c in train.items() if c.dtype.kind not in "buif" and n != name}
    rows = len(train[name])
    wide = [n for n, known in levels.items() if len(known) > min(MOST_LEVELS, max(MOST_CLASSES, rows // 2))]
    if wide:
        raise DataError(
            f"{printable(train_file)}: column {printable(wide[0])} holds {len(levels[wide[0]])} different texts in "
            f"{rows} rows, such as {printable(repr(levels[wide[0]][0]))}; too many to become columns. Leave it out, or "
            "give numbers"
        )
    classes = _classes(f"{printable(train_file)}: column {printable(name)}", train[name], targets)
    kind = "regression" if classes is None else f"{len(classes)} classes"
    said = [f"column {printable(name)} is the target: {kind}"]
    if counted:
        said.append("the first column, without a name, only counts the rows and is left out")
    if levels:
        said.append(f"texts became columns of 0 and 1: {printable(', '.join(levels))}")
    columns = [n for n in train if n != name]
    parts = []
    for file, table in ((train_file, train), (test_file, read_table(test_file, max_bytes) if test_file else None)):
        if table is not None and file is not None:
            lack = [n for n in (*columns, name) if n not in table]
            if lack:
                raise DataError(f"{printable(file)}: no column {printable(lack[0])}, which the training table has")
            parts.append(_part(file, {n: table[n] for n in columns}, table[name], levels, classes))
    return Reading(parts[0], parts[1] if len(parts) > 1 else None, classes, notes=tuple(said), target=name)


def _classes(source: str, y: Array, targets: str | None) -> tuple[str, ...] | None:
    """Names of the classes of a column, in order; None where it holds numbers to be predicted as such."""
    y = _whole(y) if targets == "classes" else y
    texts, whole = y.dtype.kind not in "buif", y.dtype.kind in "bui"
    few = targets == "classes" or (whole and len(np.unique(y)) <= MOST_CLASSES)
    if (targets == "numbers" and texts) or (targets == "classes" and not (texts or whole)):
        held = "texts" if texts else "numbers that are not whole"
        raise DataError(
            f"{source} is to be {targets}, and holds {held}. Choose another --likelihood (targets=), or another column"
        )
    coded = targets != "numbers" and (texts or (whole and few))
    return tuple(str(v) for v in np.unique(y)) if coded else None


def read_table(file: Path, max_bytes: float | None = None) -> dict[str, Array]:
    """Columns of a CSV or Parquet file by name, numbers or texts, without empty cells.

    Args:
        file: the table.
        max_bytes: most bytes of the file; None: an eighth of the memory that is free.

    Raises:
        DataError: unreadable, too large, of no rows or columns, or with an empty cell, which is named.
    """
    try:
        pandas = importlib.import_module("pandas")
    except ImportError as error:
        raise DataError(f"{printable(file)}: tables need pandas, which is not installed; pip install pandas") from error
    with open_regular(file, error=DataError) as stream:
        weight = os.fstat(stream.fileno()).st_size
        if max_bytes is None:
            afford(GROWTH * weight, file, error=DataError)
        else:
            afford(weight, file, max_bytes=max_bytes, error=DataError)
        try:
            if file.suffix.lower() == ".csv":
                first = stream.read(2**16).decode("utf-8", "replace").partition("\n")[0]
                stream.seek(0)
                separator = max(SEPARATORS, key=re.sub('"[^"]*"', "", first).count)
                table = pandas.read_csv(stream, low_memory=False, sep=separator, skipinitialspace=True)
            else:
                _check_parquet(file, max_bytes)
                table = pandas.read_parquet(stream)
            table.columns = [str(c).strip() for c in table.columns]
            if table.shape[0] == 0 or table.shape[1] < 2 or table.columns.has_duplicates:
                raise DataError(
                    f"{printable(file)}: a table needs rows, two columns and names that differ; got {table.shape[0]} "
                    f"rows and {table.shape[1]} columns"
                )
            empty = table.isna().to_numpy()
            if empty.any():
                row, column = (int(i) for i in np.argwhere(empty)[0])
                raise DataError(
                    f"{printable(file)}: column {printable(table.columns[column])} is empty in row {row + 1} "
                    f"({int(empty.sum())} empty cells in all). Fill or drop them; ockham.tabular takes gaps"
                )
            return {n: _column(f"{printable(file)}: column {printable(n)}", table[n].to_numpy()) for n in table.columns}
        except OckhamError:
            raise
        except UnicodeDecodeError as error:
            raise DataError(f"{printable(file)}: is no UTF-8 text ({error}). Save it as UTF-8") from error
        except ImportError as error:
            raise DataError(
                f"{printable(file)}: Parquet needs pyarrow, which is not installed; pip install pyarrow"
            ) from error
        except UNREADABLE as error:
            raise unreadable(file, error) from error


def _column(source: str, values: Array) -> Array:
    """Numbers as they are, texts as an array of texts; dates, lists and numbers with commas are refused."""
    if values.dtype.kind in "buif":
        return values
    kinds = {type(v) for v in values}
    if kinds <= {Decimal, int, float}:
        return values.astype(np.float64)
    if not kinds <= {str, bool, np.str_, np.bool_}:
        held = ", ".join(sorted(k.__name__ for k in kinds))
        raise DataError(f"{source} holds {held}; numbers and texts are read. Leave it out, or give numbers")
    texts = np.array([str(v) for v in values])
    if all(re.fullmatch(r"[+-]?\d+(,\d+)*", text) for text in texts) and any("," in text for text in texts):
        raise DataError(
            f"{source} holds numbers with commas in them, such as {printable(repr(str(values[0])))}: write 1.5 and "
            "1200 (pandas.read_csv takes decimal=',' and thousands=',')"
        )
    return texts


def _whole(values: Array) -> Array:
    """Floats that are whole numbers as integers, everything else as it is."""
    return values.astype(np.int64) if values.dtype.kind == "f" and bool((values == np.round(values)).all()) else values


def _files(path: Path) -> tuple[Path | None, Path | None]:
    """The training table and the test table of a folder, or the file itself."""
    if not path.is_dir():
        return (path if path.suffix.lower() in TABLE_ENDS else None), None
    found = [p.name for p in sorted(path.iterdir()) if p.suffix.lower() in TABLE_ENDS]
    named = [n for stem in ("train", "data") for end in TABLE_ENDS if (n := f"{stem}{end}") in found]
    if not named and len(found) != 1:
        return None, None
    tests = [n for end in TABLE_ENDS if (n := f"test{end}") in found]
    return there(path, (named or found)[0]), there(path, tests[0]) if tests else None


def _check_parquet(file: Path, max_bytes: float | None) -> None:
    """Compare the sizes in the footer with the memory, before a column is read."""
    footer = importlib.import_module("pyarrow.parquet").read_metadata(file)
    sizes = [footer.row_group(i).total_byte_size for i in range(footer.num_row_groups)]
    afford(max(sum(sizes), footer.num_rows * footer.num_columns), file, max_bytes=max_bytes, error=DataError)


def _part(
    file: Path,
    columns: Mapping[str, Array],
    target: Array,
    levels: Mapping[str, Sequence[str]],
    classes: tuple[str, ...] | None,
) -> Part:
    """Columns as floats [N, F], texts as one column per level; targets as labels 0..K-1 or as numbers."""
    found: list[Any] = []
    for name, column in columns.items():
        if name not in levels:
            if column.dtype.kind not in "buif":
                raise DataError(f"{printable(file)}: column {printable(name)} holds texts, in training it held numbers")
            found.append(column.astype(np.float64)[:, None])
            continue
        texts = np.array([str(v) for v in column])
        strange = sorted(set(texts) - set(levels[name]))
        if strange:
            raise DataError(
                f"{printable(file)}: column {printable(name)} holds {printable(repr(strange[0]))}, unknown in training"
            )
        found.append((texts[:, None] == np.array(levels[name])).astype(np.float64))
    x = np.concatenate(found, axis=1)
    if classes is None:
        if target.dtype.kind not in "buif":
            raise DataError(f"{printable(file)}: the target holds texts, in training it held numbers")
        return Part(x, target.astype(np.float64), str(file))
    target = _whole(target)
    codes = {name: i for i, name in enumerate(classes)}
    unknown = sorted({str(v) for v in target} - codes.keys())
    if unknown:
        raise DataError(f"{printable(file)}: class {printable(repr(unknown[0]))} is unknown in training")
    return Part(x, np.array([codes[str(v)] for v in target]), str(file))
