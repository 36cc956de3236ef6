"""Data sets held in memory: digits that travel with the package, and files as people have them.

A reader (`ockham.zoo.files`, `tables`) makes two parts of numpy arrays, this module checks and standardises
them into a `Dataset` of tensors, `Batches` cuts that into batches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ockham.core.batch import call, inputs_of
from ockham.core.files import printable
from ockham.core.network import evaluating
from ockham.errors import DataError, OckhamError
from ockham.zoo.files import (
    Array,
    Layout,
    Part,
    Reading,
    class_names,
    idx_folder,
    image_folder,
    npz_folder,
    npz_part,
    npz_whole,
    sheet_folder,
)
from ockham.zoo.tables import TABLE_ENDS, table_parts

__all__ = [
    "Batches",
    "Dataset",
    "Normalize",
    "data_fingerprint",
    "digits",
    "from_arrays",
    "inputs_as",
    "load_folder",
    "normalization",
]

LAYOUTS: tuple[Layout, ...] = (idx_folder, npz_folder, sheet_folder, image_folder)
"""Readers in the order in which they are asked."""

Normalize = tuple[Sequence[float], Sequence[float]] | str | None
"""Mean and std per channel, column or feature (of bytes: of pixel / 255); "none"; None: those of the training part."""

_HOLD_OUT = 0.2
_SPLIT_SEED = 0
_FAR = 30.0  # a mean, or a factor of the std, beyond which given means and stds of images are of another unit
_WHOLE = 100 * 10**6  # bytes up to which a fingerprint reads everything


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Training and test examples, inputs standardised by the training part alone.

    Attributes:
        name: name in reports.
        train_x: inputs, float32 [N, C, H, W], [N, T, F] or [N, F].
        train_y: integer labels [N] (classification) or float64 targets [N, ...] in their own units (regression), of
            which the spread may be a millionth of the mean.
        test_x: inputs of the test part, as train_x.
        test_y: targets of the test part, as train_y.
        classes: their names; None for regression.
        image_shape: (C, H, W); None where the inputs are no images.
        low: smallest input after standardisation; [C, 1, 1] where an image has several channels.
        high: largest input, likewise.
        mean: mean that was taken off the stored inputs, shaped to be broadcast over a batch; None where not known.
        std: standard deviation by which they were then divided, likewise.
        notes: sentences on what was decided in reading, for people.
        unit: stored value that counts as one where mean and std are given: 255 of bytes.
        target: name of the column that is predicted, of tables.
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
    mean: Tensor | None = None
    std: Tensor | None = None
    notes: tuple[str, ...] = ()
    unit: float = 1.0
    target: str | None = None


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
        seed: seed of the stratified split. It is no seed of a run: leave it, and all runs share one split.
    """
    whole = npz_part(Path(__file__).with_name("digits.npz"), "x", "y")
    return _build("digits", *_hold_out(whole, seed, _HOLD_OUT), None)


def from_arrays(
    name: str,
    train: tuple[Array, Array],
    test: tuple[Array, Array] | None = None,
    classes: tuple[str, ...] | None = None,
    *,
    series: bool | None = None,
    normalize: Normalize = None,
    targets: str | None = None,
) -> Dataset:
    """A data set from arrays (numpy's, tensors, lists), checked and standardised as `load_folder` does it.

    Args:
        name: name in reports.
        train: inputs and targets. Inputs are images [N, H, W], [N, C, H, W] or [N, H, W, C] with one or three channels,
            series [N, T, F], or a table [N, F]. Integer targets are labels, float targets regression.
        test: inputs and targets, likewise; without it a stratified fifth of `train` is held out.
        classes: names of the labels 0..K-1; without it each label up to the largest must occur.
        series: flag, True: three dimensions are steps and features, not rows and columns of grey images; None: they are
            where the numbers are no bytes and the dimensions differ.
        normalize: mean and std, one number per channel, feature or column each; "none"; or None: those of ``train``.
        targets: "classes" or "numbers", for whole numbers that are meant otherwise than their type says.

    Raises:
        DataError: shapes or numbers that do not fit, labels out of range or all the same, NaN or infinity.
    """
    held = None if test is None else Part(np.asarray(test[0]), np.asarray(test[1]), "test")
    reading = Reading(Part(np.asarray(train[0]), np.asarray(train[1]), "train"), held, classes)
    return _from_reading(name, reading, series, normalize, targets)


def load_folder(
    path: str | Path,
    *,
    target: str | None = None,
    series: bool | None = None,
    normalize: Normalize = None,
    max_bytes: float | None = None,
    targets: str | None = None,
) -> Dataset:
    """The data set in a folder or a file; without a test part a stratified fifth is held out, always the same.

    Layouts: IDX, gzipped or not (`train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz`, `t10k-...`; a dot before
    `idx` will do) · `train.npz` and `test.npz` with arrays `x`, `y` · `data.npz` with `train_x`, `train_y`, `test_x`,
    `test_y`, or with `x`, `y` (an eighth is held out) · sheets of square RGB images stacked vertically
    (`train_000.webp` ..., `train_labels.npy`, `test_...`) · one directory of images per class, below `train` and
    `test` or at once · `train.csv` and `test.csv`, `data.csv`, or one CSV or Parquet file. Images need Pillow, tables
    pandas. A `classes.txt` beside them names the classes, one a line. Arrays as for `from_arrays`.

    Args:
        path: folder, or one .npz, .csv or .parquet file.
        target: name of the column of a table that is to be predicted.
        series: flag as for `from_arrays`.
        normalize: mean and std as for `from_arrays`.
        max_bytes: most bytes of an array, an image or a table; None: what the machine has free.
        targets: "classes" or "numbers" as for `from_arrays`; None: in tables texts and whole numbers of at most 20
            values are classes, in arrays all integers.

    Raises:
        DataError: no known layout, or a file at fault, with its name and why.
    """
    home = Path(path)
    reading: Reading | None = None
    if home.is_dir():
        readers = LAYOUTS if target is None else ()
        reading = next((found for read in readers if (found := read(home, max_bytes)) is not None), None)
        names = class_names(home)
    else:
        names = None
        if home.suffix.lower() == ".npz" and target is None:
            reading = npz_whole(home, max_bytes)
    if reading is None:
        reading = table_parts(home, target, max_bytes, targets)
    if reading is not None:
        reading = replace(reading, classes=names or reading.classes)
        data = _from_reading(home.resolve().name, reading, series, normalize, targets)
        return replace(data, target=reading.target)
    held = ", ".join(sorted(p.name for p in home.iterdir())[:8]) if home.is_dir() else f"a {home.suffix or 'bare'} file"
    held = held if home.exists() else "no such folder or file"
    if target is not None:
        raise DataError(
            f"{printable(home)}: target {printable(repr(target))} names a column of a table, and here is none "
            f"({printable(held) or 'it is empty'}); drop --target (target=)"
        )
    raise DataError(
        f"{printable(home)}: no data set recognised ({printable(held) or 'it is empty'}); expected "
        "train-images-idx3-ubyte(.gz) with its labels, train.npz, data.npz, train_000.webp with train_labels.npy, a "
        f"directory of images per class, or one of train{', data'.join(TABLE_ENDS)}"
    )


def inputs_as(foreign: Dataset, data: Dataset, model: nn.Module) -> Tensor:
    """Test inputs of foreign data, standardised as other data are where both say how; else as they come.

    Args:
        foreign: data set whose inputs are wanted.
        data: data set whose mean and std are used.
        model: network that is to take them.

    Raises:
        DataError: it does not.
    """
    x = foreign.test_x
    with evaluating(model) as device:
        try:
            call(model, inputs_of(x[:2].to(device)))
        except DataError as error:
            raise DataError(f"the foreign inputs of {printable(foreign.name)} do not suit: {error}") from error
    mean, std, own_mean, own_std = (foreign.mean, foreign.std, data.mean, data.std)
    if mean is None or std is None or own_mean is None or own_std is None or x.ndim != data.test_x.ndim:
        return x
    if x.ndim > 1 and x.shape[1] != data.test_x.shape[1]:
        return x
    stored = (x.double() * std + mean) * (data.unit / foreign.unit)
    return ((stored - own_mean) / own_std).float()


def data_fingerprint(data: Dataset) -> str:
    """What tells a data set from others: SHA-256 of its content, or of a sample and its size where it is large.

    Up to 100 MB all examples count; beyond, as many as make 100 MB, evenly spaced, with the first and the last.

    Returns:
        Shapes and the first 16 hexadecimal digits, such as ``1437x1x8x8+360 3f2a...``.
    """
    parts = (data.train_x, data.train_y, data.test_x, data.test_y)
    size = sum(t.numel() * t.element_size() for t in parts)
    found = hashlib.sha256(repr((data.classes, [(tuple(t.shape), str(t.dtype)) for t in parts])).encode())
    for tensor in parts:
        count = max(2, int(len(tensor) * _WHOLE / size)) if size > _WHOLE else len(tensor)
        rows = torch.linspace(0, len(tensor) - 1, min(count, len(tensor)), dtype=torch.float64).round().long()
        chosen = tensor.detach().cpu() if len(rows) == len(tensor) else tensor.detach().cpu()[rows]
        found.update(chosen.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    shape = "x".join(map(str, data.train_x.shape))
    return f"{shape}+{len(data.test_x)} {found.hexdigest()[:16]}"


def normalization(text: str | None) -> Normalize:
    """Means and stds of an option such as ``0.49,0.48,0.45:0.25,0.24,0.26``."""
    if text is None or text == "none":
        return text
    try:
        means, stds = ([float(v) for v in half.split(",")] for half in str(text).split(":"))
    except ValueError as error:
        raise OckhamError(f"--normalize {text}: expected none, or means:stds such as 0.49,0.48:0.25,0.24") from error
    return means, stds


def _from_reading(
    name: str, reading: Reading, series: bool | None, normalize: Normalize, targets: str | None
) -> Dataset:
    """Both parts checked, the second held out where there is none, standardised."""
    notes = reading.notes
    train = _checked(reading.train, targets)
    test = None if reading.test is None else _checked(reading.test, targets)
    if train.x.ndim == 3:
        guessed = train.x.dtype != np.uint8 and train.x.shape[1] != train.x.shape[2]
        chosen = guessed if series is None else series
        shape = f"{train.x.shape[1]} x {train.x.shape[2]}"
        kind = f"series, {shape} steps x features" if chosen else f"grey images of {shape}"
        if series is None and train.x.dtype != np.uint8:
            notes += (f"inputs {train.x.shape} are read as {kind}; series={not chosen} reads them the other way",)
        series = chosen
    if test is None:
        train, test = _hold_out(train, _SPLIT_SEED, reading.hold_out)
    return _build(name, train, test, reading.classes, series=bool(series), normalize=normalize, notes=notes)


def _checked(part: Part, targets: str | None) -> Part:
    """Targets of the kind that is asked for, labels [N]; raises where numbers, kinds or finiteness do not fit."""
    x, y = part.x, part.y
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y) or x.size == 0 or y.size == 0:
        part.fail(f"needs as many inputs as targets, and at least one; got inputs {x.shape} and targets {y.shape}")
    if x.dtype.kind not in "buif" or y.dtype.kind not in "buif":
        part.fail(f"inputs must be numbers, targets integer labels or floats; got {x.dtype} and {y.dtype}")
    for what, values in (("inputs", x), ("targets", y)):
        if values.dtype.kind == "f" and not np.isfinite([values.min(), values.max()]).all():
            part.fail(f"{what} hold NaN or infinity, first at example {np.argwhere(~np.isfinite(values))[0][0]}")
    single = y.ndim == 1 or y.shape[1:] == (1,)
    if targets == "numbers":
        return replace(part, y=y.astype(np.float64))
    if targets == "classes" and single and y.dtype.kind == "f":
        if bool((y != np.round(y)).any()):
            part.fail(f"targets are to be classes, and {y[y != np.round(y)][0]:g} is no whole number")
        y = y.astype(np.int64)
    if y.dtype.kind in "bui" and not single:
        part.fail(f"labels must be [N]; got {y.shape}. For one-hot rows save y.argmax(1)")
    return replace(part, y=y.reshape(-1) if y.dtype.kind in "bui" else y)


def _labelled(part: Part) -> bool:
    return part.y.dtype.kind in "bui"


def _hold_out(part: Part, seed: int, share: float) -> tuple[Part, Part]:
    """A share as test part, the same of each label; numpy's frozen legacy generator keeps it for good."""
    n = len(part.y)
    order = np.random.RandomState(seed).permutation(n)
    labels = part.y[order] if _labelled(part) else np.zeros(n, dtype=np.int64)
    _, label, count = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.empty(n)
    rank[np.argsort(label, kind="stable")] = np.arange(n) - np.repeat(np.cumsum(count) - count, count)
    first = order[np.argsort((rank + 0.5) / count[label], kind="stable")]
    n_test = math.ceil(share * n)
    if n_test == n:
        part.fail(f"{n} example is too few to hold a test part out; add more, or a test part")
    test, train = np.sort(first[:n_test]), np.sort(first[n_test:])
    return replace(part, x=part.x[train], y=part.y[train]), replace(part, x=part.x[test], y=part.y[test])


def _build(
    name: str,
    train: Part,
    test: Part,
    classes: tuple[str, ...] | None,
    *,
    series: bool = False,
    normalize: Normalize = None,
    notes: tuple[str, ...] = (),
) -> Dataset:
    names = _classes(train, test, classes)
    train_x, test_x = _inputs(train, series), _inputs(test, series)
    if train_x.shape[1:] != test_x.shape[1:]:
        test.fail(f"inputs must look like the training ones, {tuple(train_x.shape[1:])}; got {tuple(test_x.shape[1:])}")
    if normalize is None:  # per channel, feature or column; flat rows of bytes share one mean and one std
        flat_pixels = train_x.ndim == 2 and train.x.dtype == np.uint8
        own = train_x.ndim - 1 if train_x.ndim == 3 else 1
        dims = [d for d in range(train_x.ndim) if d != own or flat_pixels]
        mean = _mean(train_x, dims)
        std = _mean(train_x, dims, power=2, off=mean).sqrt_()
        if not bool(std.isfinite().all()):
            train.fail("inputs are too large to standardise; scale them")
        std[std <= 8 * torch.finfo(train_x.dtype).eps * mean.abs()] = 1.0
    else:
        mean, std = _given(train, train_x, normalize)
    train_x, test_x = (x.sub_(mean).div_(std).float() for x in (train_x, test_x))
    if not bool(torch.stack([torch.stack(torch.aminmax(x)) for x in (train_x, test_x)]).isfinite().all()):
        train.fail("inputs are too large to standardise; scale them")
    colour = train_x.ndim == 4 and train_x.shape[1] > 1
    each = (0, 2, 3) if colour else tuple(range(train_x.ndim))
    low = torch.minimum(train_x.amin(each), test_x.amin(each))
    high = torch.maximum(train_x.amax(each), test_x.amax(each))
    ends: tuple[float | Tensor, float | Tensor]
    ends = (low.view(-1, 1, 1), high.view(-1, 1, 1)) if colour else (float(low), float(high))
    shape = (train_x.shape[1], train_x.shape[2], train_x.shape[3]) if train_x.ndim == 4 else None
    y, test_y = _targets(train), _targets(test)
    kept = (ends[0], ends[1], mean, std, notes, _unit(train))
    return Dataset(name, train_x, y, test_x, test_y, names, shape, *kept)


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
    if len(names) < 2 and len(known) < 2:
        train.fail(
            f"all {len(train.y)} training examples are of one class, {printable(names[0][:40])}: nothing is to be told "
            "apart. Add examples of another class, and its name where classes.txt names them"
        )
    for part in (train, test):
        if part.y.min() < 0 or part.y.max() >= len(names):
            part.fail(
                f"labels out of range: got {part.y.min()}..{part.y.max()}, expected 0..{len(names) - 1} by the "
                f"{len(names)} names of classes (classes.txt)"
            )
    return names


def _targets(part: Part) -> Tensor:
    return torch.from_numpy(part.y.astype(np.int64 if _labelled(part) else np.float64))


def _inputs(part: Part, series: bool) -> Tensor:
    """A tensor of our own, float32 for bytes and short floats, float64 for what needs it: images, series or a table."""
    x = part.x
    if x.ndim > 4:
        part.fail(
            "inputs must be images [N, H, W], [N, C, H, W] or [N, H, W, C], series [N, T, F] or a table [N, F]; got "
            f"{x.shape}"
        )
    if x.ndim == 1 or (x.ndim == 3 and not series):
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    enough = np.float32 if x.dtype.itemsize <= 2 or x.dtype == np.float32 else np.float64
    inputs = torch.from_numpy(x.astype(enough, order="C"))
    return inputs


def _unit(part: Part) -> float:
    return 255.0 if part.x.dtype == np.uint8 else 1.0


def _given(
    part: Part, train: Tensor, normalize: tuple[Sequence[float], Sequence[float]] | str
) -> tuple[Tensor, Tensor]:
    """Mean and std as told, in the units of the stored inputs; of bytes they are told of pixel / 255."""
    own = train.ndim - 1 if train.ndim == 3 else 1
    shape = [train.shape[d] if d == own else 1 for d in range(train.ndim)]
    if isinstance(normalize, str):
        if normalize != "none":
            part.fail(f'normalize must be (means, stds), "none" or None; got {normalize!r}')
        return torch.zeros([1] * train.ndim), torch.ones([1] * train.ndim)
    found = [torch.tensor([float(v) for v in values], dtype=train.dtype) * _unit(part) for values in normalize]
    if len(found) != 2 or any(len(v) not in (1, train.shape[own]) or not bool(v.isfinite().all()) for v in found):
        part.fail(f"normalize needs {train.shape[own]} means and as many stds, or one each, finite; got {normalize!r}")
    if bool((found[1] <= 0).any()):
        part.fail(f"normalize needs positive stds; got {list(normalize[1])}")
    mean, std = (v.view(shape) if len(v) > 1 else v.view([1] * train.ndim) for v in found)
    pixels = (train[:256] - mean) / std
    if train.ndim == 4 and not (abs(float(pixels.mean())) < _FAR and 1 / _FAR < float(pixels.std()) < _FAR):
        low, high = (float(v) / _unit(part) for v in torch.aminmax(train[:256]))
        part.fail(
            f"normalize would leave pixels of mean {float(pixels.mean()):.3g} and std {float(pixels.std()):.3g}, far "
            f"from 0 and 1: they run from {low:g} to {high:g}{' (as byte / 255)' * (_unit(part) > 1)}. Give means and "
            "stds in that unit"
        )
    return mean, std


def _mean(values: Tensor, dims: list[int], power: int = 1, off: Tensor | None = None) -> Tensor:
    """Mean of powers of what is left after ``off``, by pieces: no second copy, sums of millions exact to 1e-6."""
    pieces = (piece if off is None else piece - off for piece in torch.split(values, 256))
    sums = [piece.pow(power).sum(dims, keepdim=True).double() for piece in pieces]
    return (torch.stack(sums).sum(0) / math.prod(values.shape[d] for d in dims)).to(values.dtype)
