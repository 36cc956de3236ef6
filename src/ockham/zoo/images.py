"""Images as data: sheets of square images, and folders with one directory per class. Needs Pillow."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np

from ockham.core.files import afford, inside, open_regular, printable
from ockham.errors import DataError, OckhamError
from ockham.zoo.files import UNREADABLE, Array, Part, Reading, npy_array, unreadable

__all__ = ["IMAGE_ENDS", "image_folder", "read_image", "sheet_folder"]

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
