"""Data sets held in memory: digits that travel with the package, and folders of IDX, npz or WebP-sheet files.

A reader (`ockham.zoo.files`) makes two parts of numpy arrays, this module checks and standardises them into a `Dataset`
of tensors, `Batches` cuts that into batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ockham.errors import DataError, OckhamError
from ockham.zoo.files import LAYOUTS, Array, Part, class_names, npz_part

__all__ = ["Batches", "Dataset", "digits", "from_arrays", "load_folder"]

_HOLD_OUT = 0.2
_SPLIT_SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Training and test examples, inputs standardised by the training part alone.

    Attributes:
        name: what reports call it.
        train_x: inputs, float32 [N, C, H, W] or [N, F].
        train_y: integer labels [N] (classification) or float32 targets [N, ...] in their own units (regression).
        test_x: as train_x.
        test_y: as train_y.
        classes: their names; None for regression.
        image_shape: (C, H, W); None where the inputs are no images.
        low: smallest input after standardisation; [C, 1, 1] where an image has several channels.
        high: largest input, likewise.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...] | None
    image_shape: tuple[int, int, int] | None
    low: float | Tensor
    high: float | Tensor


class Batches:
    """An in-memory loader, iterable many times; the last batch may be smaller.

    Each shuffled pass draws one permutation from the global CPU generator when it starts, and nothing else: whoever
    seeds that generator fixes the order. Batches come on the device of `x` and `y`.

    Args:
        x: inputs [N, ...].
        y: targets [N, ...].
        batch_size: examples in a batch.
        shuffle: a new order each pass, or the stored one.

    Raises:
        DataError: no examples, or inputs and targets of different number.
        OckhamError: a batch size below one.

    >>> [len(y) for _, y in Batches(torch.zeros(5, 2), torch.zeros(5), batch_size=2, shuffle=False)]
    [2, 2, 1]
    """

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, shuffle: bool) -> None:
        if len(x) == 0 or len(x) != len(y):
            raise DataError(f"batches need as many inputs as targets, and at least one; got {len(x)} and {len(y)}")
        if batch_size < 1:
            raise OckhamError(f"batch_size must be at least 1; got {batch_size}")
        self.x, self.y, self.batch_size, self.shuffle = x, y, batch_size, shuffle

    @property
    def n_examples(self) -> int:
        """Examples in one pass."""
        return len(self.x)

    def __len__(self) -> int:
        """Batches in one pass."""
        return math.ceil(self.n_examples / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass; the permutation is drawn now, not at the first batch."""
        parts = [slice(start, start + self.batch_size) for start in range(0, self.n_examples, self.batch_size)]
        if not self.shuffle:
            return ((self.x[part], self.y[part]) for part in parts)
        order = torch.randperm(self.n_examples, device="cpu").to(self.x.device)
        return ((self.x[order[part]], self.y[order[part]]) for part in parts)


def digits(seed: int = _SPLIT_SEED) -> Dataset:
    """The 1797 handwritten digits [N, 1, 8, 8] of scikit-learn, 1437 to train on and 360 to test on.

    The data are the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998; UCI Machine
    Learning Repository, CC BY 4.0), in the form scikit-learn ships them (BSD-3-Clause).

    Args:
        seed: of the stratified split. It is no seed of a run: leave it, and all runs share one split.
    """
    whole = npz_part(Path(__file__).with_name("digits.npz"), "x", "y")
    return _build("digits", *_hold_out(whole, seed), None)


def from_arrays(
    name: str,
    train: tuple[Array, Array],
    test: tuple[Array, Array] | None = None,
    classes: tuple[str, ...] | None = None,
) -> Dataset:
    """A data set from numpy arrays, checked and standardised as `load_folder` does it.

    Args:
        name: what reports call it.
        train: inputs and targets. Inputs are images [N, H, W], [N, C, H, W] or [N, H, W, C] with one or three channels,
            or a table [N, F]. Integer targets are labels, float targets regression.
        test: likewise; without it a stratified fifth of `train` is held out.
        classes: names of the labels 0..K-1; without it each label up to the largest must occur.

    Raises:
        DataError: shapes or numbers that do not fit, labels out of range, NaN or infinity.
    """
    return _from_parts(name, Part(*train, "train"), None if test is None else Part(*test, "test"), classes)


def load_folder(path: str | Path) -> Dataset:
    """The data set in a folder; without a test part a stratified fifth is held out, always the same.

    Layouts: IDX, gzipped or not (`train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz`, `t10k-...`; a dot before
    `idx` will do) · `train.npz` and `test.npz` with arrays `x`, `y` · `data.npz` with `train_x`, `train_y`, `test_x`,
    `test_y` · sheets of square RGB images stacked vertically (`train_000.webp` ..., `train_labels.npy`, `test_...`;
    needs Pillow). A `classes.txt` beside them names the classes, one a line. Arrays as for `from_arrays`.

    Raises:
        DataError: no known layout, or a file at fault, with its name and why.
    """
    folder = Path(path)
    for read in LAYOUTS:
        parts = read(folder)
        if parts is not None:
            return _from_parts(folder.resolve().name, *parts, class_names(folder))
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
    raise DataError(
        f"{folder}: no data set recognised ({found or 'it is empty'}); expected train-images-idx3-ubyte(.gz) with its "
        "labels, train.npz, data.npz, or train_000.webp with train_labels.npy"
    )


def _from_parts(name: str, train: Part, test: Part | None, classes: tuple[str, ...] | None) -> Dataset:
    _check(train)
    if test is None:
        return _build(name, *_hold_out(train, _SPLIT_SEED), classes)
    _check(test)
    return _build(name, train, test, classes)


def _check(part: Part) -> None:
    """Numbers, kinds and finiteness of the targets; raises where they do not fit."""
    x, y = part.x, part.y
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y) or x.size == 0 or y.size == 0:
        part.fail(f"needs as many inputs as targets, and at least one; got inputs {x.shape} and targets {y.shape}")
    if x.dtype.kind not in "buif" or y.dtype.kind not in "buif":
        part.fail(f"inputs must be numbers, targets integer labels or floats; got {x.dtype} and {y.dtype}")
    if _labelled(part) and y.ndim != 1:
        part.fail(f"labels must be [N]; got {y.shape}. For one-hot rows save y.argmax(1)")
    if not np.isfinite(y).all():
        part.fail(f"targets hold NaN or infinity, first at example {np.argwhere(~np.isfinite(y))[0][0]}")


def _labelled(part: Part) -> bool:
    return part.y.dtype.kind in "bui"


def _hold_out(part: Part, seed: int) -> tuple[Part, Part]:
    """A fifth as test part, the same share of each label; numpy's frozen legacy generator keeps it for good."""
    n = len(part.y)
    order = np.random.RandomState(seed).permutation(n)
    labels = part.y[order] if _labelled(part) else np.zeros(n, dtype=np.int64)
    _, label, count = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.empty(n)
    rank[np.argsort(label, kind="stable")] = np.arange(n) - np.repeat(np.cumsum(count) - count, count)
    first = order[np.argsort((rank + 0.5) / count[label], kind="stable")]
    n_test = math.ceil(_HOLD_OUT * n)
    if n_test == n:
        part.fail(f"{n} example is too few to hold a test part out; add more, or a test part")
    test, train = np.sort(first[:n_test]), np.sort(first[n_test:])
    return replace(part, x=part.x[train], y=part.y[train]), replace(part, x=part.x[test], y=part.y[test])


def _build(name: str, train: Part, test: Part, classes: tuple[str, ...] | None) -> Dataset:
    names = _classes(train, test, classes)
    train_x, test_x = _inputs(train), _inputs(test)
    if train_x.shape[1:] != test_x.shape[1:]:
        test.fail(f"inputs must look like the training ones, {tuple(train_x.shape[1:])}; got {tuple(test_x.shape[1:])}")
    train_x, test_x = _standardised(train, train_x, test_x)
    low, high = _value_range(train_x, test_x)
    shape = (train_x.shape[1], train_x.shape[2], train_x.shape[3]) if train_x.ndim == 4 else None
    return Dataset(name, train_x, _targets(train), test_x, _targets(test), names, shape, low, high)


def _classes(train: Part, test: Part, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Names of the classes, labels checked against them; None for regression."""
    if _labelled(train) != _labelled(test) or train.y.shape[1:] != test.y.shape[1:]:
        got = f"{test.y.dtype} {test.y.shape}"
        test.fail(f"targets must be like the training ones, {train.y.dtype} {train.y.shape}; got {got}")
    if not _labelled(train):
        return None
    known = np.unique(train.y)
    if names is None and not np.array_equal(known, np.arange(len(known))):
        train.fail(
            f"labels out of range: got {len(known)} different ones from {known[0]} to {known[-1]}; expected each of "
            "0..K-1. Renumber them, or name all K classes in classes.txt, one a line"
        )
    names = names or tuple(str(label) for label in known)
    for part in (train, test):
        if part.y.min() < 0 or part.y.max() >= len(names):
            part.fail(f"labels out of range: got {part.y.min()}..{part.y.max()}, expected 0..{len(names) - 1}")
    return names


def _targets(part: Part) -> Tensor:
    return torch.from_numpy(part.y.astype(np.int64 if _labelled(part) else np.float32))


def _inputs(part: Part) -> Tensor:
    """A tensor of our own, [N, C, H, W] or [N, F]: float32 for bytes and short floats, float64 for what needs it."""
    x = part.x
    if x.ndim > 4:
        part.fail(f"inputs must be images [N, H, W], [N, C, H, W], [N, H, W, C] or a table [N, F]; got {x.shape}")
    if x.ndim in (1, 3):
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    enough = np.float32 if x.dtype.itemsize <= 2 or x.dtype == np.float32 else np.float64
    inputs = torch.from_numpy(x.astype(enough, order="C"))
    if not bool(torch.stack(torch.aminmax(inputs)).isfinite().all()):
        part.fail(f"inputs hold NaN or infinity, first at example {int((~inputs.isfinite()).nonzero()[0, 0])}")
    return inputs


def _standardised(part: Part, train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both less the training mean, over the training std, per channel or column; flat rows of bytes share one."""
    flat_pixels = train.ndim == 2 and part.x.dtype == np.uint8
    dims = [d for d in range(train.ndim) if d != 1 or flat_pixels]
    mean = _mean(train, dims)
    train, test = train.sub_(mean), test.sub_(mean)
    std = _mean(train, dims, power=2).sqrt_()
    if not bool(std.isfinite().all()):
        part.fail("inputs are too large to standardise; scale them")
    std[std <= 8 * torch.finfo(train.dtype).eps * mean.abs()] = 1.0
    return train.div_(std).float(), test.div_(std).float()


def _mean(values: Tensor, dims: list[int], power: int = 1) -> Tensor:
    """Mean of powers, by pieces: no second copy of the data, and sums of millions stay exact to 1e-6."""
    sums = [piece.pow(power).sum(dims, keepdim=True).double() for piece in torch.split(values, 256)]
    return (torch.stack(sums).sum(0) / math.prod(values.shape[d] for d in dims)).to(values.dtype)


def _value_range(train: Tensor, test: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """The ends over both parts, as `Dataset.low` and `high` have them."""
    colour = train.ndim == 4 and train.shape[1] > 1
    dims = (0, 2, 3) if colour else tuple(range(train.ndim))
    low, high = torch.minimum(train.amin(dims), test.amin(dims)), torch.maximum(train.amax(dims), test.amax(dims))
    return (low.view(-1, 1, 1), high.view(-1, 1, 1)) if colour else (float(low), float(high))
