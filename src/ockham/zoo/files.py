"""Readers of data folders: files in, `Part`s (numpy) out, one reader a layout. Images need Pillow.

Nothing here unpickles. What a header promises is compared with what the file weighs and with the memory that is free,
before it is asked for.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ockham.core.files import afford, inside, open_regular, printable
from ockham.errors import DataError, OckhamError

__all__ = [
    "IMAGE_ENDS",
    "UNREADABLE",
    "Array",
    "Layout",
    "Part",
    "Reading",
    "class_names",
    "idx_folder",
    "image_folder",
    "npy_array",
    "npz_folder",
    "npz_part",
    "read_image",
    "sheet_folder",
    "there",
    "unreadable",
]

Array = npt.NDArray[Any]

IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049
DEFLATE = 1032
"""Most bytes that one byte of a deflate stream can become."""

UNREADABLE = Exception
"""Damaged files make gzip, zipfile, numpy, Pillow and pandas raise a dozen kinds, TokenError among them."""

PIECE = 2**20


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
        raise DataError(f"{printable(self.source)}: {why}")


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What a reader found in a folder.

    Attributes:
        train: examples to train on.
        test: examples to test on; None: a share of ``train`` is held out.
        classes: names of the labels, where the files tell them.
        hold_out: share of ``train`` that becomes the test part where there is none.
        notes: sentences on what was decided in reading, for people.
        target: name of the column that is predicted, of tables.
    """

    train: Part
    test: Part | None = None
    classes: tuple[str, ...] | None = None
    hold_out: float = 0.2
    notes: tuple[str, ...] = ()
    target: str | None = None


Layout = Callable[[Path, float | None], Reading | None]
"""Takes a folder and the most bytes of an array (None: what is free); returns None for a folder of another kind."""


def there(folder: Path, name: str) -> Path | None:
    """The file of this name, checked for links out of the folder; None if there is none.

    Raises:
        DataError: a link leads out of the folder.
    """
    return inside(folder, name, error=DataError) if os.path.lexists(folder / name) else None


def unreadable(file: Path, error: BaseException) -> DataError:
    """The error for a file that its library cannot read."""
    why = printable(f"{type(error).__name__}: {error}")
    return DataError(f"{printable(file)}: missing, truncated, damaged or foreign ({why}). Fetch it anew")


def idx_folder(folder: Path, max_bytes: float | None) -> Reading | None:
    """MNIST's four files, gzipped or not; None where the folder has none of the training pair."""
    found: list[Part | None] = []
    for stem in ("train", "t10k"):
        pair: list[Path | None] = []
        for start, kind in ((f"{stem}-images", "idx3"), (f"{stem}-labels", "idx1")):
            names = (f"{start}{joint}{kind}-ubyte{end}" for joint in "-." for end in ("", ".gz"))
            pair.append(next((file for name in names if (file := there(folder, name))), None))
        images, labels = pair
        if images is None and labels is None:
            found.append(None)
        elif images is None or labels is None:
            alone = printable(images or labels)
            raise DataError(f"{alone}: its partner is missing; {stem}-images and {stem}-labels go together")
        else:
            x, y = idx_array(images, IMAGES_MAGIC, max_bytes), idx_array(labels, LABELS_MAGIC, max_bytes)
            found.append(Part(x, y, f"{images} with {labels.name}"))
    train, test = found
    return None if train is None else Reading(train, test)


def idx_array(file: Path, magic: int, max_bytes: float | None = None) -> Array:
    """Unsigned bytes of one IDX file: magic (its last byte counts the dimensions), sizes (big-endian int32), values.

    Args:
        file: the file; gzipped if its name ends with .gz.
        magic: number that it must start with.
        max_bytes: most bytes that it may hold; None: the memory that is free.

    Raises:
        DataError: unreadable, of another kind, of another length than its header says, or too large.
    """
    dimensions, packed = magic & 0xFF, file.suffix == ".gz"
    with open_regular(file, error=DataError) as raw:
        weight = os.fstat(raw.fileno()).st_size
        values = bytearray()
        try:
            stream = gzip.GzipFile(fileobj=raw) if packed else raw
            got, *shape = np.frombuffer(stream.read(4 + 4 * dimensions), dtype=">u4").tolist() or [0]
            promised = math.prod(shape) if got == magic and len(shape) == dimensions else 0
            most = DEFLATE * weight if packed else weight - 4 - 4 * dimensions
            if promised <= most:
                afford(promised, f"{file} (sizes {shape} in its header)", max_bytes=max_bytes, error=DataError)
                while len(values) <= promised and (piece := stream.read(min(PIECE, promised + 1 - len(values)))):
                    values += piece
        except DataError:
            raise
        except UNREADABLE as error:
            raise unreadable(file, error) from error
    if got != magic:
        raise DataError(
            f"{printable(file)}: starts with magic number {got}; an IDX file of this name starts with {magic}"
        )
    if len(shape) != dimensions or len(values) != promised:
        size = most if promised > most else len(values)
        held = "more" if len(values) > promised else f"{'at most ' if packed and promised > most else ''}{size} bytes"
        raise DataError(
            f"{printable(file)}: truncated or overlong; its header promises {shape}, it holds {held}. Fetch it anew"
        )
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def npz_folder(folder: Path, max_bytes: float | None) -> Reading | None:
    """`train.npz` (and `test.npz`) with x and y; or `data.npz`, see `npz_whole`."""
    train, test, whole = (there(folder, f"{stem}.npz") for stem in ("train", "test", "data"))
    if train is not None:
        tested = None if test is None else npz_part(test, "x", "y", max_bytes)
        return Reading(npz_part(train, "x", "y", max_bytes), tested)
    return None if whole is None else npz_whole(whole, max_bytes)


def npz_whole(file: Path, max_bytes: float | None) -> Reading:
    """One archive: train_x, train_y with or without test_x, test_y; or x and y, of which an eighth is held out."""
    held = npz_names(file)
    if "x" in held and "train_x" not in held:
        said = f"{file.name} has no test part: an eighth of its examples is held out for testing"
        return Reading(npz_part(file, "x", "y", max_bytes), hold_out=1 / 8, notes=(said,))
    tested = bool(held & {"test_x", "test_y"})
    train = npz_part(file, "train_x", "train_y", max_bytes)
    return Reading(train, npz_part(file, "test_x", "test_y", max_bytes) if tested else None)


def npz_names(file: Path) -> set[str]:
    """Names of the arrays in an archive.

    Raises:
        DataError: it cannot be read.
    """
    with open_regular(file, error=DataError) as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                return {name.removesuffix(".npy") for name in archive.namelist()}
        except UNREADABLE as error:  # of a bare array, too: it is no archive
            raise unreadable(file, error) from error


def npz_part(file: Path, x: str, y: str, max_bytes: float | None = None) -> Part:
    """The arrays of these two names in one archive.

    Args:
        file: the archive.
        x: name of the inputs.
        y: name of the targets.
        max_bytes: most bytes of an array; None: the memory that is free.

    Raises:
        DataError: unreadable, without them, or too large.
    """
    missing = [name for name in (x, y) if name not in npz_names(file)]
    if missing:
        lack = " and no array ".join(missing)
        raise DataError(f"{printable(file)}: no array {lack}; save inputs as {x} and targets as {y}")
    with open_regular(file, error=DataError) as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                weight = os.fstat(stream.fileno()).st_size
                inputs, targets = (npz_array(archive, f"{name}.npy", file, weight, max_bytes) for name in (x, y))
        except OckhamError:
            raise
        except UNREADABLE as error:
            raise unreadable(file, error) from error
    return Part(inputs, targets, str(file))


def npz_array(archive: zipfile.ZipFile, name: str, file: Path, weight: int, max_bytes: float | None) -> Array:
    """One array of an archive, its sizes compared with the weight of the file first.

    Args:
        archive: the open archive.
        name: name of the member.
        file: path of the archive, for messages.
        weight: bytes of the file.
        max_bytes: most bytes of the array; None: the memory that is free.

    Raises:
        DataError: too large, or not what the archive's directory says.
    """
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
        raise DataError(f"{printable(file)}: {name} is encrypted or of an unusual compression; use numpy.savez")
    most = weight * (DEFLATE if info.compress_type == zipfile.ZIP_DEFLATED else 1)
    if info.file_size > most:
        raise DataError(
            f"{printable(file)}: truncated, damaged or foreign; {name} is to have {info.file_size} bytes, at most "
            f"{most} are there"
        )
    afford(info.file_size, f"{file}, array {name}", max_bytes=max_bytes, error=DataError)
    with archive.open(info) as member:
        return npy_array(member.read(), f"{file}, array {name}")


def npy_array(content: bytes, source: str) -> Array:
    """The array of a .npy file's bytes, on those bytes.

    Args:
        content: all bytes of the file.
        source: name for messages.

    Raises:
        DataError: no array of plain numbers or texts, or of another length than its header says.
    """
    head = io.BytesIO(content[: 2**16])
    version = np.lib.format.read_magic(head)
    if version not in {(1, 0), (2, 0)}:
        raise DataError(
            f"{printable(source)}: truncated, damaged or foreign; .npy of version {version}, 1 and 2 are known"
        )
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(head)
    if dtype.hasobject:
        raise DataError(
            f"{printable(source)}: truncated, damaged or foreign; it holds Python objects, and nothing is unpickled "
            "(allow_pickle=False). Save numbers"
        )
    held, promised = len(content) - head.tell(), math.prod(shape) * dtype.itemsize
    if held != promised or min(shape, default=0) < 0:
        raise DataError(
            f"{printable(source)}: truncated, damaged or foreign; its header promises {shape} of {dtype}, {promised} "
            f"bytes, it holds {held}. Fetch it anew"
        )
    values = np.frombuffer(content, dtype=dtype, offset=head.tell())
    return values.reshape(shape, order="F" if fortran else "C")


def class_names(folder: Path) -> tuple[str, ...] | None:
    """The lines of `classes.txt`, where there is one.

    Raises:
        DataError: it is no text of at most a mebibyte.
    """
    file = there(folder, "classes.txt")
    if file is None:
        return None
    with open_regular(file, error=DataError) as stream:
        content = stream.read(PIECE + 1)
    try:
        if len(content) > PIECE:
            raise ValueError("longer than a mebibyte")
        lines = content.decode("utf-8").splitlines()
    except ValueError as error:
        raise unreadable(file, error) from error
    return tuple(line.strip() for line in lines if line.strip())


IMAGE_ENDS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
FORMATS = ["PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF"]
USUAL_PIXELS, PIXELS_PER_BYTE = 2**24, 50
"""An image of more pixels than the first, and than so many per byte of its file, is no picture but a bomb."""

TEST_NAMES = ("test", "val", "valid", "validation")


def read_image(file: Path, max_bytes: float | None = None, *, formats: list[str] = FORMATS) -> Array:
    """Pixels of one image: [H, W] if it is grey, else [H, W, 3]; bytes, or the file's own deeper grey values.

    Args:
        file: the image.
        max_bytes: most bytes of its pixels; None: the memory that is free, and a picture's usual compression.
        formats: names of formats as Pillow has them.

    Raises:
        DataError: unreadable, of another format, or too large.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"{printable(file)}: images need Pillow, which is not installed; pip install 'ockham[images]'"
        ) from error
    with open_regular(file, error=DataError) as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = os.fstat(stream.fileno()).st_size
        try:
            with Image.open(stream, formats=formats) as image:
                pixels = image.width * image.height
                if max_bytes is None and pixels > max(USUAL_PIXELS, PIXELS_PER_BYTE * weight):
                    raise DataError(
                        f"{printable(file)}: {image.width} x {image.height} pixels in {weight} bytes; give max_bytes "
                        "if the file is right"
                    )
                afford(4 * pixels, file, max_bytes=max_bytes, error=DataError)
                if image.mode[0] in "IF":  # 16 and 32 bits, floats: Pillow would cut them off at 255
                    deep = np.asarray(image)
                    return deep.astype(deep.dtype.newbyteorder("="))
                return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
        except OckhamError:
            raise
        except UNREADABLE as error:
            raise unreadable(file, error) from error


def sheet_folder(folder: Path, max_bytes: float | None) -> Reading | None:
    """Square RGB images stacked vertically in lossless WebP sheets, labels in .npy files."""
    found = [_sheet_part(folder, split, max_bytes) for split in ("train", "test")]
    return None if found[0] is None else Reading(found[0], found[1])


def _sheet_part(folder: Path, split: str, max_bytes: float | None) -> Part | None:
    sheets, labels = sorted(folder.glob(f"{split}_[0-9]*.webp")), folder / f"{split}_labels.npy"
    if not sheets:
        return None
    with open_regular(inside(folder, labels.name, error=DataError), error=DataError) as stream:
        afford(os.fstat(stream.fileno()).st_size, labels, max_bytes=max_bytes, error=DataError)
        content = stream.read()
    try:
        y = npy_array(content, str(labels))
    except OckhamError:
        raise
    except UNREADABLE as error:
        raise unreadable(labels, error) from error
    images = []
    for sheet in sheets:
        pixels = read_image(inside(folder, sheet.name, error=DataError), max_bytes, formats=["WEBP"])
        side = pixels.shape[1]
        if len(pixels) % side:
            raise DataError(
                f"{printable(sheet)}: a sheet stacks square images; got {len(pixels)} rows of {side} pixels"
            )
        images.append(pixels.reshape(-1, side, side, 3))
    if len({image.shape[1] for image in images}) > 1:
        raise DataError(
            f"{printable(folder)}/{split}_*.webp: sheets of different widths; all images must have one size"
        )
    return Part(np.concatenate(images), y, f"{folder}/{split}_*.webp with {labels.name}")


def image_folder(folder: Path, max_bytes: float | None) -> Reading | None:
    """One directory of images per class, at once or below `train` and `test` (or `val`).

    The directories' names are those of the classes. All images must have one size. Grey ones stay grey if all are.
    """
    if not folder.is_dir():
        return None
    split = (folder / "train").is_dir() and not _images_in(folder / "train")
    train = folder / "train" if split else folder
    classes = tuple(sorted(d.name for d in train.iterdir() if d.is_dir() and not d.name.startswith(".")))
    classes = tuple(name for name in classes if _images_in(train / name))
    if not classes:
        return None
    tests = [folder / name for name in TEST_NAMES if split and (folder / name).is_dir()]
    said = f"{len(classes)} classes by the names of their directories: {', '.join(classes[:8])}"
    empty = sorted(d.name for d in train.iterdir() if d.is_dir() and d.name[0] != "." and d.name not in classes)
    said += f"; without images and left out: {', '.join(empty[:8])}" if empty else ""
    test = _image_part(folder, tests[0], classes, max_bytes) if tests else None
    return Reading(_image_part(folder, train, classes, max_bytes), test, classes, notes=(printable(said),))


def _images_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_ENDS and not p.name.startswith("."))


def _image_part(home: Path, folder: Path, classes: tuple[str, ...], max_bytes: float | None) -> Part:
    """All images below a folder, in the order of classes and names."""
    unknown = sorted(
        d.name for d in folder.iterdir() if d.is_dir() and d.name not in classes and _images_in(d) and d.name[0] != "."
    )
    if unknown:
        raise DataError(f"{printable(folder)}: class {printable(unknown[0])} is not among the training classes")
    files = [
        (p, label) for label, name in enumerate(classes) if (folder / name).is_dir() for p in _images_in(folder / name)
    ]
    if not files:
        raise DataError(f"{printable(folder)}: no images of the classes {printable(', '.join(classes[:8]))}")
    images: list[Array] = []
    for file, _ in files:
        image = read_image(inside(home, str(file.relative_to(home)), error=DataError), max_bytes)
        if not images:
            afford(
                3 * image.shape[0] * image.shape[1] * image.itemsize * len(files),
                folder,
                max_bytes=max_bytes,
                error=DataError,
            )
        elif image.shape[:2] != images[0].shape[:2]:
            (h, w), (first_h, first_w) = image.shape[:2], images[0].shape[:2]
            raise DataError(
                f"{printable(file)}: {w} x {h} pixels, {printable(files[0][0].name)} has {first_w} x {first_h}; all "
                "images must have one size. Resize them first"
            )
        elif image.dtype != images[0].dtype:
            raise DataError(
                f"{printable(file)}: pixels are {image.dtype}, those of {printable(files[0][0].name)} "
                f"{images[0].dtype}; all images must have one depth. Convert them first"
            )
        images.append(image)
    if any(image.ndim == 3 for image in images):
        images = [image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2) for image in images]
    pixels = np.stack([image.transpose(2, 0, 1) if image.ndim == 3 else image[None] for image in images])
    return Part(pixels, np.array([label for _, label in files]), str(folder))
