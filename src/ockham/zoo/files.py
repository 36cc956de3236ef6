"""Readers of data folders: files in, `Part`s (numpy) out, one reader a layout. Nothing here unpickles."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ockham.errors import DataError

__all__ = ["LAYOUTS", "Array", "Part", "class_names", "npz_part"]

Array = npt.NDArray[Any]

_IMAGES_MAGIC, _LABELS_MAGIC = 2051, 2049
_UNREADABLE = Exception  # damaged files make gzip, zipfile, numpy and Pillow raise a dozen kinds, TokenError among them


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Raw inputs and targets of one half of a data set, and the file to blame.

    Attributes:
        x: inputs [N, ...].
        y: targets [N, ...].
        source: file names, for messages.
    """

    x: Array
    y: Array
    source: str

    def fail(self, why: str) -> NoReturn:
        """Raise a `DataError` that names the source."""
        raise DataError(f"{self.source}: {why}")


Parts = tuple[Part, Part | None]


def idx_folder(folder: Path) -> Parts | None:
    """MNIST's four files, gzipped or not; None where the folder has none of the training pair."""
    train = _idx_part(folder, "train")
    return None if train is None else (train, _idx_part(folder, "t10k"))


def npz_folder(folder: Path) -> Parts | None:
    """`train.npz` (and `test.npz`) with x and y, or `data.npz` with train_x, train_y (and test_x, test_y)."""
    train, test, whole = (folder / f"{stem}.npz" for stem in ("train", "test", "data"))
    if train.is_file():
        return npz_part(train, "x", "y"), npz_part(test, "x", "y") if test.is_file() else None
    if not whole.is_file():
        return None
    tested = bool(_read_npz(whole, ("test_x", "test_y")))
    return npz_part(whole, "train_x", "train_y"), npz_part(whole, "test_x", "test_y") if tested else None


def sheet_folder(folder: Path) -> Parts | None:
    """Square RGB images stacked vertically in lossless WebP sheets, labels in .npy files."""
    train = _sheet_part(folder, "train")
    return None if train is None else (train, _sheet_part(folder, "test"))


LAYOUTS: tuple[Callable[[Path], Parts | None], ...] = (idx_folder, npz_folder, sheet_folder)


def npz_part(file: Path, x: str, y: str) -> Part:
    """The arrays of these two names in one archive.

    Raises:
        DataError: unreadable, or without them.
    """
    arrays = _read_npz(file, (x, y))
    missing = [name for name in (x, y) if name not in arrays]
    if missing:
        raise DataError(f"{file}: no array {' and no array '.join(missing)}; save inputs as {x} and targets as {y}")
    return Part(arrays[x], arrays[y], str(file))


def class_names(folder: Path) -> tuple[str, ...] | None:
    """The lines of `classes.txt`, where there is one."""
    file = folder / "classes.txt"
    if not file.is_file():
        return None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error
    return tuple(line.strip() for line in lines if line.strip())


def _idx_part(folder: Path, stem: str) -> Part | None:
    images, labels = _find(folder, f"{stem}-images", "idx3"), _find(folder, f"{stem}-labels", "idx1")
    if images is None and labels is None:
        return None
    if images is None or labels is None:
        raise DataError(f"{images or labels}: its partner is missing; {stem}-images and {stem}-labels go together")
    return Part(_read_idx(images, _IMAGES_MAGIC), _read_idx(labels, _LABELS_MAGIC), f"{images} with {labels.name}")


def _find(folder: Path, stem: str, kind: str) -> Path | None:
    names = (f"{stem}{joint}{kind}-ubyte{end}" for joint in "-." for end in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_idx(file: Path, magic: int) -> Array:
    """Unsigned bytes of one IDX file: magic (its last byte counts the dimensions), sizes (big-endian int32), values."""
    dimensions = magic & 0xFF
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            got, *shape = np.frombuffer(stream.read(4 + 4 * dimensions), dtype=">u4").tolist() or [0]
            values = stream.read(math.prod(shape) + 1) if got == magic else b""
    except _UNREADABLE as error:
        raise _unreadable(file, error) from error
    if got != magic:
        raise DataError(f"{file}: starts with magic number {got}; an IDX file of this name starts with {magic}")
    if len(shape) != dimensions or len(values) != math.prod(shape):
        held = "more" if len(values) > math.prod(shape) else f"{len(values)} bytes"
        raise DataError(f"{file}: truncated or overlong; its header promises {shape}, it holds {held}. Fetch it anew")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def _read_npz(file: Path, names: tuple[str, ...]) -> dict[str, Array]:
    """Those of the named arrays that the archive holds."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {name: archive[name] for name in names if name in archive}
    except _UNREADABLE as error:  # a bare array, too: it is no context manager
        raise _unreadable(file, error) from error


def _sheet_part(folder: Path, split: str) -> Part | None:
    sheets, labels = sorted(folder.glob(f"{split}_[0-9]*.webp")), folder / f"{split}_labels.npy"
    if not sheets:
        return None
    try:
        y = np.load(labels, allow_pickle=False)
    except _UNREADABLE as error:
        raise _unreadable(labels, error) from error
    images = [_read_sheet(sheet) for sheet in sheets]
    if len({image.shape[1] for image in images}) > 1:
        raise DataError(f"{folder}/{split}_*.webp: sheets of different widths; all images must have one size")
    return Part(np.concatenate(images), np.asarray(y), f"{folder}/{split}_*.webp with {labels.name}")


def _read_sheet(file: Path) -> Array:
    """Images [N, W, W, 3] of one sheet."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{file}: WebP needs Pillow, which is not installed; pip install 'ockham[images]'") from error
    try:
        with Image.open(file, formats=["WEBP"]) as image:
            pixels = np.asarray(image.convert("RGB"))
    except _UNREADABLE as error:
        raise _unreadable(file, error) from error
    side = pixels.shape[1]
    if len(pixels) % side:
        raise DataError(f"{file}: a sheet stacks square images; got {len(pixels)} rows of {side} pixels")
    return pixels.reshape(-1, side, side, 3)


def _unreadable(file: Path, error: Exception) -> DataError:
    return DataError(f"{file}: missing, truncated, damaged or foreign ({type(error).__name__}: {error}). Fetch it anew")
