"""Folders: what is read equals what was written, numpy's statistics, and a message for every bad file."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import sys
import time
import warnings

import numpy as np
import pytest
import torch

from ockham.errors import DataError
from ockham.zoo import data

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 6, 5), dtype=np.uint8)
LABELS = (np.arange(40) % 4).astype(np.uint8)


def idx(array):
    return struct.pack(f">{array.ndim + 1}i", 2048 + array.ndim, *array.shape) + array.tobytes()


def write_idx(folder, stem="train", x=PIXELS, y=LABELS, joint="-", end=".gz"):
    squeeze = gzip.compress if end else bytes
    (folder / f"{stem}-images{joint}idx3-ubyte{end}").write_bytes(squeeze(idx(x)))
    (folder / f"{stem}-labels{joint}idx1-ubyte{end}").write_bytes(squeeze(idx(y)))


def write_sheets(folder, split, images, labels, per_sheet=4):
    image = pytest.importorskip("PIL.Image")
    for number, start in enumerate(range(0, len(images), per_sheet)):
        sheet = np.concatenate(list(images[start : start + per_sheet]))
        image.fromarray(sheet).save(folder / f"{split}_{number:03}.webp", lossless=True)
    np.save(folder / f"{split}_labels.npy", labels)


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def raw(dataset, x, low=0.0, high=255.0):
    """Undo the standardisation of one-channel pixels through the ends of the value range."""
    return low + (x - dataset.low) / (dataset.high - dataset.low) * (high - low)


def fails(folder, *words):
    with pytest.raises(DataError) as caught:
        data.load_folder(folder)
    for word in words:
        assert word in str(caught.value)


# ---- folders


@pytest.mark.parametrize("joint", ["-", "."])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_folder_comes_back(tmp_path, joint, end):
    write_idx(tmp_path, "train", joint=joint, end=end)
    write_idx(tmp_path, "t10k", PIXELS[:7], LABELS[:7], joint, end)
    got = data.load_folder(tmp_path)
    assert got.name == tmp_path.name and got.image_shape == (1, 6, 5) and got.classes == tuple("0123")
    assert torch.equal(raw(got, got.train_x).round(), torch.tensor(PIXELS[:, None]).float())
    assert torch.equal(got.test_x, got.train_x[:7]) and torch.equal(got.test_y, torch.tensor(LABELS[:7]).long())


def test_grey_images_share_one_mean_and_std_of_the_training_part(tmp_path):
    train, test = PIXELS // 2 + 60, PIXELS[:7]
    write_idx(tmp_path, x=train)
    write_idx(tmp_path, "t10k", test, LABELS[:7])
    got = data.load_folder(tmp_path)
    expected = (test - train.mean()) / train.std()
    np.testing.assert_allclose(got.test_x[:, 0], expected, rtol=1e-5, atol=1e-5)
    assert (got.low, got.high) == pytest.approx((expected.min(), expected.max()), rel=1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_npz_colour_images_by_channel_first_or_last(tmp_path, last):
    x = RNG.integers(0, 256, (30, 3, 8, 9), dtype=np.uint8) // np.array([1, 2, 4], dtype=np.uint8)[:, None, None]
    stored, y = (x.transpose(0, 2, 3, 1) if last else x), np.arange(30) % 3
    np.savez(tmp_path / "train.npz", x=stored, y=y)
    np.savez(tmp_path / "test.npz", x=stored[:5], y=y[:5])
    got = data.load_folder(tmp_path)
    expected = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(got.train_x, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.low, expected.min((0, 2, 3))[:, None, None], rtol=1e-5)
    np.testing.assert_allclose(got.high, expected.max((0, 2, 3))[:, None, None], rtol=1e-5)
    assert got.image_shape == (3, 8, 9) and len(got.test_x) == 5


def test_npz_regression_keeps_targets_and_standardises_columns(tmp_path):
    x = RNG.normal(size=(50, 6)) * [1, 10, 1e-3, 0, 0, 0] + [0, 5, 1e6, 0, 0.3, 7.7]
    y = RNG.normal(size=50)
    np.savez(tmp_path / "data.npz", train_x=x[:40], train_y=y[:40], test_x=x[40:], test_y=y[40:])
    got = data.load_folder(tmp_path)
    assert got.classes is None and got.image_shape is None and got.train_y.dtype == torch.float64
    np.testing.assert_allclose(got.test_y, y[40:], rtol=1e-6)
    varying = x[:, :3]
    expected = (varying[40:] - varying[:40].mean(0)) / varying[:40].std(0)
    np.testing.assert_allclose(got.test_x[:, :3], expected, rtol=1e-4, atol=1e-4)
    assert got.test_x[:, 3:].abs().max() < 1e-12  # a constant column says nothing, and is no NaN


@pytest.mark.parametrize("kind", ["idx", "two npz", "one npz"])
def test_without_a_test_part_a_stratified_fifth_is_held_out(tmp_path, kind):
    if kind == "idx":
        write_idx(tmp_path)
    elif kind == "two npz":
        np.savez(tmp_path / "train.npz", x=PIXELS, y=LABELS)
    else:
        np.savez(tmp_path / "data.npz", train_x=PIXELS, train_y=LABELS)
    torch.manual_seed(int(time.time()))
    got, again = data.load_folder(tmp_path), data.load_folder(tmp_path)
    assert torch.bincount(got.train_y).tolist() == [8] * 4 and torch.bincount(got.test_y).tolist() == [2] * 4
    assert torch.equal(got.test_x, again.test_x)
    together = raw(got, torch.cat([got.train_x, got.test_x])).round().flatten(1).int().tolist()
    assert sorted(together) == sorted(PIXELS.reshape(40, -1).tolist())


def test_sheets_come_back_in_order_with_class_names(tmp_path):
    images, y = RNG.integers(0, 256, (10, 8, 8, 3), dtype=np.uint8), np.arange(10) % 2
    write_sheets(tmp_path, "train", images, y)
    write_sheets(tmp_path, "test", images[:3], y[:3])
    (tmp_path / "classes.txt").write_text("cat\ndog\n\n")
    got = data.load_folder(tmp_path)
    expected = (images - images.mean((0, 1, 2))) / images.std((0, 1, 2))
    np.testing.assert_allclose(got.train_x.permute(0, 2, 3, 1), expected, rtol=1e-4, atol=1e-5)
    assert got.classes == ("cat", "dog") and torch.equal(got.test_x, got.train_x[:3])


# ---- bad files


def test_no_folder_empty_folder_foreign_folder(tmp_path):
    fails(tmp_path / "nowhere", "nowhere", "no such folder")
    fails(tmp_path, "it is empty", "train.npz")
    (tmp_path / "notes.txt").write_text("hello")
    fails(tmp_path, "notes.txt", "train-images-idx3-ubyte")


IMAGES, GOOD = "train-images-idx3-ubyte", idx(PIXELS)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        (IMAGES, idx(LABELS), "magic number 2049"),
        (IMAGES, b"", "magic number 0"),
        (IMAGES, GOOD[:6], "truncated"),
        (IMAGES, GOOD[:8], "promises [40]"),
        (IMAGES, GOOD[:-1], "holds 1199 bytes"),
        (IMAGES, GOOD + b"x", "holds more"),
        (IMAGES, GOOD[:4] + b"\xff" * 12, "train-images"),
        (IMAGES, idx(PIXELS[:39]), "as many inputs as targets"),
        (IMAGES, idx(PIXELS[:0]), "at least one"),
        (IMAGES + ".gz", gzip.compress(GOOD)[:-20], "EOFError"),
        (IMAGES + ".gz", GOOD, "BadGzipFile"),
        (IMAGES + ".gz", gzip.compress(GOOD)[:300] + bytes(1000), "truncated, damaged or foreign"),
        ("train-labels-idx1-ubyte", idx(np.where(np.arange(40) == 3, 255, LABELS).astype(np.uint8)), "0 to 255"),
    ],
)
def test_bad_idx_files(tmp_path, name, content, why):
    write_idx(tmp_path, end=".gz" if name.endswith(".gz") else "")
    (tmp_path / name).write_bytes(content)
    fails(tmp_path, str(tmp_path), name, why)


def test_idx_images_without_labels(tmp_path):
    write_idx(tmp_path, end="")
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    fails(tmp_path, IMAGES, "partner is missing")


def test_test_labels_unknown_to_training(tmp_path):
    write_idx(tmp_path)
    write_idx(tmp_path, "t10k", PIXELS, LABELS + 1)
    fails(tmp_path, "t10k-labels", "got 1..4, expected 0..3")


class Trap:
    """Unpickling this would say so."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_nothing_is_unpickled(tmp_path):
    (tmp_path / "train.npz").write_bytes(pickle.dumps(Trap()))
    fails(tmp_path, "train.npz", "foreign")
    np.savez(tmp_path / "train.npz", x=np.array([Trap()] * 40, dtype=object), y=LABELS)
    fails(tmp_path, "train.npz", "allow_pickle=False")


def test_damaged_npz(tmp_path):
    file = tmp_path / "train.npz"
    np.savez_compressed(file, x=PIXELS, y=LABELS)
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:400] + b"\0" * 40 + whole[440:]):
        file.write_bytes(content)
        fails(tmp_path, "train.npz", "truncated, damaged or foreign")
    with file.open("wb") as stream:
        np.save(stream, PIXELS)
    fails(tmp_path, "train.npz", "foreign")
    np.savez(file, images=PIXELS, y=LABELS)
    fails(tmp_path, "train.npz", "no array x")


@pytest.mark.parametrize(
    ("x", "y", "why"),
    [
        (np.where(np.arange(40) == 7, np.nan, 1.0), LABELS, "NaN or infinity, first at example 7"),
        (PIXELS, np.where(np.arange(40) == 9, np.inf, 1.0), "targets hold NaN or infinity, first at example 9"),
        (PIXELS, LABELS.astype(int) - 1, "-1 to 2"),
        (PIXELS, LABELS * 2, "0 to 6"),
        (PIXELS[:0], LABELS[:0], "at least one"),
        (PIXELS, np.eye(4, dtype=int)[LABELS], "argmax"),
        (PIXELS, np.array(["cat"] * 40), "<U3"),
        (PIXELS[..., None, None], LABELS, "got (40, 6, 5, 1, 1)"),
        (np.full((40, 2), 1e300) * [1, -1] * np.arange(40)[:, None], LABELS, "too large"),
    ],
)
def test_bad_arrays(tmp_path, x, y, why):
    np.savez(tmp_path / "train.npz", x=x, y=y)
    np.savez(tmp_path / "test.npz", x=x, y=y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fails(tmp_path, "train.npz", why)


def test_bad_sheets(tmp_path, monkeypatch):
    write_sheets(tmp_path, "train", RNG.integers(0, 256, (10, 8, 8, 3), dtype=np.uint8), np.arange(9) % 2)
    fails(tmp_path, "train_labels.npy", "(10, 8, 8, 3)", "(9,)")
    file = tmp_path / "train_001.webp"
    picture = pytest.importorskip("PIL.Image").new("RGB", (8, 32))
    picture.save(tmp_path / "picture.png")
    for content in (file.read_bytes()[:50], (tmp_path / "picture.png").read_bytes()):
        file.write_bytes(content)
        fails(tmp_path, "train_001.webp", "truncated, damaged or foreign")
    picture.resize((9, 27)).save(file)
    fails(tmp_path, "train_*.webp", "different widths")
    write_sheets(tmp_path, "train", RNG.integers(0, 256, (2, 9, 8, 3), dtype=np.uint8), np.arange(2), per_sheet=1)
    fails(tmp_path, "train_000.webp", "9 rows of 8")
    for content in (npy(np.array([Trap()] * 2, dtype=object)), npy(LABELS)[:40], npy(LABELS).replace(b"}", b"(")):
        (tmp_path / "train_labels.npy").write_bytes(content)
        fails(tmp_path, "train_labels.npy", "truncated, damaged or foreign")
    (tmp_path / "train_labels.npy").unlink()
    fails(tmp_path, "train_labels.npy", "missing")
    np.save(tmp_path / "train_labels.npy", np.arange(2))
    monkeypatch.setitem(sys.modules, "PIL", None)
    fails(tmp_path, "Pillow", "ockham[images]")
