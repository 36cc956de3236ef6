"""Data as people have them: image folders, tables, one archive, series; what lies in a header costs nothing."""

from __future__ import annotations

import gzip
import io
import os
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ockham.errors import DataError
from ockham.zoo import data, tables
from ockham.zoo.files import read_image

RNG = np.random.default_rng(0)


def assert_refused(path: Path, *words: str, **reading: object) -> None:
    """Loading fails, names all that, and asks for less than 64 MiB on the way."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            data.load_folder(path, **reading)
        asked = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert all(word in str(caught.value) for word in words), caught.value
    assert asked < 64 * 2**20, asked


# ---- image folders


def draw(folder: Path, name: str, pixels: np.ndarray) -> None:
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True, exist_ok=True)
    image.fromarray(pixels).save(folder / name)


@pytest.mark.parametrize("split", [False, True])
def test_one_directory_per_class(tmp_path: Path, split: bool) -> None:
    pixels = RNG.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
    home = tmp_path / "train" if split else tmp_path
    for i in range(12):
        draw(home / ("cat", "dog", "elk")[i % 3], f"{i:02}.png", pixels[i])
    if split:
        draw(tmp_path / "val" / "dog", "x.png", pixels[1])
    (tmp_path / ".cache").mkdir()
    (tmp_path / "notes").mkdir()
    got = data.load_folder(tmp_path)
    assert got.classes == ("cat", "dog", "elk") and got.image_shape == (3, 6, 5)
    assert "cat, dog, elk" in got.notes[0]
    x, y = (got.train_x, got.train_y) if split else (torch.cat([got.train_x, got.test_x]), None)
    raw = (x * got.std + got.mean).round()
    if split:
        order = [i for c in range(3) for i in range(c, 12, 3)]
        assert torch.equal(raw, torch.tensor(pixels[order]).permute(0, 3, 1, 2).float())
        assert y.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and got.test_y.tolist() == [1]
    else:
        assert sorted(raw.flatten(1).tolist()) == sorted(
            torch.tensor(pixels).permute(0, 3, 1, 2).float().flatten(1).tolist()
        )


def test_grey_images_stay_grey_unless_one_has_colour(tmp_path: Path) -> None:
    for i in range(8):
        draw(tmp_path / "ab"[i % 2], f"{i}.png", RNG.integers(0, 256, (4, 4), dtype=np.uint8))
    assert data.load_folder(tmp_path).image_shape == (1, 4, 4)
    draw(tmp_path / "a", "colour.png", RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    assert data.load_folder(tmp_path).image_shape == (3, 4, 4)
    draw(tmp_path / "b", "large.png", RNG.integers(0, 256, (9, 4), dtype=np.uint8))
    assert_refused(tmp_path, "large.png", "4 x 9", "Resize")


def test_an_unknown_class_in_the_test_part_is_named(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "test/c"):
        draw(tmp_path / name, "x.png", np.zeros((3, 3), dtype=np.uint8))
    assert_refused(tmp_path, "class c is not among")


# ---- tables


def table(path: Path, rows: int = 40, target: str = "target", kind: str = "text") -> None:
    lines = [f"a,colour,flag,{target}"]
    for i in range(rows):
        y = {"text": ("yes", "no")[i % 2], "whole": i % 3, "price": 100 * i + 0.5, "many": i}[kind]
        lines.append(f"{i},{('red', 'green', 'blue')[i % 3]},{i % 2 == 0},{y}")
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("kind", "classes"), [("text", ("no", "yes")), ("whole", ("0", "1", "2")), ("price", None), ("many", None)]
)
def test_csv_with_numbers_texts_and_a_target(tmp_path: Path, kind: str, classes: tuple | None) -> None:
    table(tmp_path / "data.csv", kind=kind)
    got = data.load_folder(tmp_path)
    assert got.classes == classes and got.train_x.shape == (32, 5) and len(got.test_x) == 8
    assert ("regression" if classes is None else f"{len(classes)} classes") in got.notes[0]
    assert "colour" in got.notes[1]
    rows = (torch.cat([got.train_x, got.test_x]) * got.std + got.mean).round().int()
    targets = torch.cat([got.train_y, got.test_y])
    for row, y in zip(rows.tolist(), targets.tolist(), strict=True):
        i = row[0]
        assert row[1:] == [int(i % 3 == 2), int(i % 3 == 1), int(i % 3 == 0), int(i % 2 == 0)]
        assert y == {"text": 1 - i % 2, "whole": i % 3, "price": 100 * i + 0.5, "many": i}[kind]
    again = data.load_folder(tmp_path / "data.csv")
    assert torch.equal(again.train_x, got.train_x)


def test_the_target_can_be_named_and_must_be_there(tmp_path: Path) -> None:
    table(tmp_path / "houses.csv", target="price", kind="price")
    assert_refused(tmp_path, "a, colour, flag, price", "--target")
    assert_refused(tmp_path, "no column 'cost'", target="cost")
    got = data.load_folder(tmp_path, target="price")
    assert got.classes is None and float(torch.cat([got.train_y, got.test_y]).max()) == 3900.5


def test_train_and_test_tables_share_levels_and_classes(tmp_path: Path) -> None:
    table(tmp_path / "train.csv")
    table(tmp_path / "test.csv", rows=6)
    got = data.load_folder(tmp_path)
    assert len(got.train_x) == 40 and torch.allclose(got.test_x, got.train_x[:6], atol=1e-6)
    text = (tmp_path / "test.csv").read_text()
    for old, new, why in (("red", "pink", "'pink'"), ("yes", "perhaps", "'perhaps'"), ("flag", "flug", "flag")):
        (tmp_path / "test.csv").write_text(text.replace(old, new))
        assert_refused(tmp_path, "test.csv", why)


def test_empty_cells_and_endless_texts_are_named(tmp_path: Path) -> None:
    table(tmp_path / "data.csv")
    text = (tmp_path / "data.csv").read_text()
    (tmp_path / "data.csv").write_text(text.replace("5,blue,False", ",blue,False"))
    assert_refused(tmp_path, "data.csv", "column a is empty in row 6")
    lines = ["name,target", *(f"person {i},{i % 2}" for i in range(300))]
    (tmp_path / "data.csv").write_text("\n".join(lines))
    assert_refused(tmp_path, "column name holds 300 different texts")


def test_tables_without_pandas_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(tmp_path / "data.csv")
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert_refused(tmp_path, "pip install pandas")


def test_parquet_reads_as_csv_does(tmp_path: Path) -> None:
    pandas, _ = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    table(tmp_path / "one.csv", kind="price")
    pandas.read_csv(tmp_path / "one.csv").to_parquet(tmp_path / "two.parquet")
    one, two = data.load_folder(tmp_path / "one.csv"), data.load_folder(tmp_path / "two.parquet")
    assert torch.equal(one.train_x, two.train_x) and torch.equal(one.train_y, two.train_y)


# ---- archives and series


def test_one_archive_with_x_and_y_gives_an_eighth_to_the_test_part_and_says_so(tmp_path: Path) -> None:
    x, y = RNG.normal(size=(80, 6)), np.arange(80) % 4
    np.savez(tmp_path / "data.npz", x=x, y=y)
    got = data.load_folder(tmp_path)
    assert len(got.test_x) == 10 and "an eighth" in got.notes[0]
    counts = torch.bincount(got.test_y, minlength=4)
    assert int(counts.sum()) == 10 and int(counts.min()) >= 2
    assert torch.equal(data.load_folder(tmp_path / "data.npz").test_x, got.test_x)


def test_series_keep_their_steps_and_are_standardised_by_feature(tmp_path: Path) -> None:
    x = RNG.normal(size=(40, 12, 3)) * [1, 10, 100] + [5, 0, -3]
    np.savez(tmp_path / "train.npz", x=x, y=np.arange(40) % 2)
    np.savez(tmp_path / "test.npz", x=x[:5], y=np.arange(5) % 2)
    got = data.load_folder(tmp_path)
    expected = (x - x.mean((0, 1))) / x.std((0, 1))
    np.testing.assert_allclose(got.train_x, expected, rtol=1e-4, atol=1e-5)
    assert got.image_shape is None and "12 x 3 steps x features" in got.notes[0]
    images = data.load_folder(tmp_path, series=False)
    assert images.image_shape == (1, 12, 3) and images.notes == ()


def test_bytes_and_squares_are_images_unless_told_otherwise(tmp_path: Path) -> None:
    for x in (RNG.integers(0, 256, (20, 6, 5), dtype=np.uint8), RNG.normal(size=(20, 6, 6))):
        np.savez(tmp_path / "train.npz", x=x, y=np.arange(20) % 2)
        assert data.load_folder(tmp_path).image_shape == (1, *x.shape[1:])
        assert data.load_folder(tmp_path, series=True).train_x.shape == (16, *x.shape[1:])


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_told_means_and_stds_are_used_as_torchvision_has_them(tmp_path: Path, kind: type) -> None:
    x = RNG.integers(0, 256, (20, 3, 4, 4)).astype(np.uint8)
    x = x if kind is np.uint8 else (x / 255).astype(kind)
    np.savez(tmp_path / "train.npz", x=x, y=np.arange(20) % 2)
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    got = data.load_folder(tmp_path, normalize=(mean, std))
    pixels = torch.tensor(x / 255 if kind is np.uint8 else x)
    expected = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    together = torch.cat([got.train_x, got.test_x]).flatten(1)
    assert torch.allclose(together.sum(0), expected.flatten(1).sum(0).float(), atol=1e-3)
    plain = data.load_folder(tmp_path, normalize="none")
    stored = torch.cat([plain.train_x, plain.test_x]).flatten(1).sum(0)
    assert torch.allclose(stored, torch.tensor(x.reshape(20, -1).astype(float)).sum(0).float(), rtol=1e-5)
    for wrong in (((1.0,) * 2, (1.0,) * 2), ((0.0,), (0.0,)), ((0.0,), (float("nan"),)), "all"):
        assert_refused(tmp_path, "normalize", normalize=wrong)


def test_stored_inputs_come_back_from_mean_and_std() -> None:
    got = data.digits()
    pixels = torch.cat([got.train_x, got.test_x]) * got.std + got.mean
    assert torch.allclose(pixels, pixels.round(), atol=1e-4) and float(pixels.max().round()) == 16


# ---- fingerprints


def test_a_fingerprint_is_of_every_number_below_a_hundred_megabytes() -> None:
    x, y = RNG.normal(size=(40, 6)), np.arange(40) % 2
    first = data.data_fingerprint(data.from_arrays("a", (x, y)))
    assert first == data.data_fingerprint(data.from_arrays("another name", (x, y)))
    for at in range(0, 40, 7):
        changed, labels = x.copy(), y.copy()
        changed[at, 3] += 1e-3
        labels[at] = 1 - labels[at]
        assert data.data_fingerprint(data.from_arrays("a", (changed, y))) != first
        assert data.data_fingerprint(data.from_arrays("a", (x, labels))) != first


def test_a_large_data_set_is_told_by_a_sample_and_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = RNG.normal(size=(400, 6)), np.arange(400) % 2
    whole = data.from_arrays("a", (x, y))
    monkeypatch.setattr(data, "_WHOLE", 1000)
    seen = data.data_fingerprint(whole)
    assert seen.startswith("320x6+80 ")
    other = data.from_arrays("a", (x, y))
    other.train_x[-1, 0] += 1
    assert data.data_fingerprint(other) != seen
    assert data.data_fingerprint(data.from_arrays("a", (x[:396], y[:396]))) != seen


# ---- what files from outside may cost


def idx_header(*sizes: int) -> bytes:
    return struct.pack(f">{len(sizes) + 1}I", 2048 + len(sizes), *sizes)


@pytest.mark.parametrize("end", ["", ".gz"])
def test_an_idx_header_that_lies_costs_nothing(tmp_path: Path, end: str) -> None:
    pack = gzip.compress if end else bytes
    (tmp_path / f"train-images-idx3-ubyte{end}").write_bytes(pack(idx_header(60000, 300, 300) + bytes(2000)))
    (tmp_path / f"train-labels-idx1-ubyte{end}").write_bytes(pack(idx_header(60000) + bytes(60000)))
    assert_refused(tmp_path, "train-images", "promises [60000, 300, 300]", "at most" if end else "2000 bytes")


def zipped(file: Path, name: str, content: bytes, *, claims: int | None = None) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
        archive.writestr("y.npy", npy(np.arange(4)))
    if claims is not None:
        raw, old = bytearray(file.read_bytes()), struct.pack("<I", len(content))
        at = raw.rfind(b"PK\x01\x02", 0, raw.rfind(b"y.npy"))
        at = raw.find(b"PK\x01\x02") if at < 0 else at
        where = raw.find(old, raw.find(b"PK\x01\x02"))
        raw[where : where + 4] = struct.pack("<I", claims)
        file.write_bytes(raw)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_an_npz_that_lies_costs_nothing(tmp_path: Path) -> None:
    lie = npy(np.zeros(4)).replace(b"(4,)", b"(4000000000,)")
    zipped(tmp_path / "train.npz", "x.npy", lie)
    assert_refused(tmp_path, "train.npz", "x.npy", "promises (4000000000,)")
    zipped(tmp_path / "train.npz", "x.npy", npy(np.zeros(4)), claims=2**31)
    assert_refused(tmp_path, "train.npz", "x.npy", str(2**31))


def test_sizes_beyond_the_limit_are_refused_with_both_numbers(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "train.npz", x=np.zeros((100, 2**15)), y=np.arange(100) % 2)
    assert_refused(tmp_path, "train.npz", "25 MiB", "allowed by max_bytes", max_bytes=2**20)
    table(tmp_path / "big.csv")
    assert_refused(tmp_path / "big.csv", "allowed by max_bytes", max_bytes=100)
    draw(tmp_path, "x.png", np.zeros((40, 40), dtype=np.uint8))
    with pytest.raises(DataError, match=r"x\.png.*max_bytes"):
        read_image(tmp_path / "x.png", 100)


def test_more_than_is_free_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "train.npz", x=np.zeros((100, 2**15)), y=np.arange(100) % 2)
    monkeypatch.setattr("ockham.core.files.free_memory", lambda: 2.0**20)
    assert_refused(tmp_path, "25 MiB", "1 MiB are free now", "max_bytes")


def test_a_picture_that_is_a_bomb_is_not_opened(tmp_path: Path) -> None:
    draw(tmp_path, "x.png", np.zeros((4200, 4200), dtype=np.uint8))
    with pytest.raises(DataError, match="4200 x 4200 pixels in"):
        read_image(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", 2**30).shape == (4200, 4200)


@pytest.mark.parametrize(
    "name", ["train-images-idx3-ubyte", "train.npz", "data.csv", "train_000.webp", "classes.txt", "a/x.png"]
)
def test_pipes_devices_and_links_out_of_the_folder_are_refused_at_once(tmp_path: Path, name: str) -> None:
    home = tmp_path / "data"
    (home / "a").mkdir(parents=True)
    (home / "train-labels-idx1-ubyte").touch() if "idx" in name else np.save(home / "train_labels.npy", np.arange(4))
    if name == "classes.txt":
        np.savez(home / "train.npz", x=np.zeros((20, 2)), y=np.arange(20) % 2)
    os.mkfifo(home / name)
    assert_refused(home, Path(name).name, "no regular file")
    (home / name).unlink()
    (tmp_path / "elsewhere").write_bytes(b"x")
    (home / name).symlink_to(tmp_path / "elsewhere")
    assert_refused(home, Path(name).name, "link out of its folder")


def test_names_of_files_move_no_cursor(tmp_path: Path) -> None:
    (tmp_path / "\x1b[2Jx").touch()
    with pytest.raises(DataError) as caught:
        data.load_folder(tmp_path)
    assert "\x1b" not in str(caught.value) and "\\x1b[2Jx" in str(caught.value)
    table(tmp_path / "data.csv", target="\x1b]0;t\x07")
    with pytest.raises(DataError) as caught:
        data.load_folder(tmp_path, target="none")
    assert "\x1b" not in str(caught.value)


def test_parquet_without_pyarrow_says_so(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match=r"x\.parquet"):
        tables.read_table(tmp_path / "x.parquet")


def test_images_deeper_than_bytes_keep_their_values(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    deep = RNG.integers(0, 60_000, (8, 4, 6)).astype(np.uint16)
    for i, pixels in enumerate(deep):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        image.fromarray(pixels).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    got = data.load_folder(tmp_path)
    stored = torch.cat([got.train_x, got.test_x]) * got.std + got.mean
    assert got.image_shape == (1, 4, 6)  # no series of 4 steps
    assert torch.equal(
        stored.round().flatten(1).sort(0).values, torch.from_numpy(deep.astype(float)).float().flatten(1).sort(0).values
    )
    draw(tmp_path / "a", "9.png", np.zeros((4, 6), dtype=np.uint8))
    assert_refused(tmp_path, "9.png", "one depth")


def test_one_class_and_empty_folders_of_classes_are_said(tmp_path: Path) -> None:
    for i in range(6):
        draw(tmp_path / "cat", f"{i}.png", RNG.integers(0, 256, (4, 4), dtype=np.uint8))
    (tmp_path / "dog").mkdir()
    assert_refused(tmp_path, "of one class, cat")
    for i in range(6):
        draw(tmp_path / "elk", f"{i}.png", RNG.integers(0, 256, (4, 4), dtype=np.uint8))
    assert "left out: dog" in data.load_folder(tmp_path).notes[0]


# ---- tables as other programs write them


def plain_rows(separator: str, header: str = "a,b,target") -> str:
    rows = [f"{a:.3f},{b:.3f},{int(a > b)}" for a, b in np.random.default_rng(1).normal(size=(30, 2))]
    return "\n".join([header, *rows]).replace(",", separator)


@pytest.mark.parametrize("separator", [";", "\t", "|", ", "])
def test_any_separator_reads_as_a_comma_does(tmp_path: Path, separator: str) -> None:
    (tmp_path / "comma.csv").write_text(plain_rows(","))
    (tmp_path / "other.csv").write_text(plain_rows(separator))
    one, other = (data.load_folder(tmp_path / f"{n}.csv") for n in ("comma", "other"))
    assert torch.equal(one.train_x, other.train_x) and torch.equal(one.test_y, other.test_y)


def test_a_column_that_only_counts_the_rows_is_no_input(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    (tmp_path / "plain.csv").write_text(plain_rows(","))
    pandas.read_csv(tmp_path / "plain.csv").to_csv(tmp_path / "counted.csv")  # with its index, as by default
    one, other = (data.load_folder(tmp_path / f"{n}.csv") for n in ("plain", "counted"))
    assert torch.equal(one.train_x, other.train_x) and "counts the rows" in " ".join(other.notes)


def test_numbers_with_commas_dates_and_foreign_letters_are_named(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    file = tmp_path / "t.csv"
    file.write_text("a;target\n" + "\n".join(f"{i % 3},5;{i % 2}" for i in range(30)))
    assert_refused(file, "column a", "numbers with commas", "0,5")
    file.write_text("a,target\n" + "\n".join(f"2024-01-{i + 1},{i % 2}" for i in range(30)))
    assert_refused(file, "column a", "30 different texts in 30 rows")
    file.write_bytes("größe,target\n1,0\n2,1\n".encode("latin-1"))
    assert_refused(file, "is no UTF-8 text", "Save it as UTF-8")
    table = pandas.DataFrame({"d": pandas.date_range("2024", periods=30), "target": [0, 1] * 15})
    table.to_parquet(tmp_path / "t.parquet")
    assert_refused(tmp_path / "t.parquet", "column d holds datetime64")


def test_the_likelihood_decides_what_whole_numbers_are(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    counts = [0, 1, 2, 5, 9] * 6
    file.write_text("a,target\n" + "\n".join(f"{i},{y}" for i, y in enumerate(counts)))
    numbers = data.load_folder(file, targets="numbers")
    assert numbers.classes is None and sorted({*numbers.train_y.tolist()}) == [0, 1, 2, 5, 9]
    assert data.load_folder(file).classes == ("0", "1", "2", "5", "9")
    file.write_text("a,target\n" + "\n".join(f"{i},{i % 2}.0" for i in range(30)))
    assert data.load_folder(file).classes is None and data.load_folder(file, targets="classes").classes == ("0", "1")
    file.write_text("a,target\n" + "\n".join(f"{i},{i}.5" for i in range(30)))
    assert_refused(file, "to be classes", "not whole", targets="classes")
    x = RNG.normal(size=(20, 2))
    assert data.from_arrays("n", (x, np.arange(20) % 3), targets="numbers").train_y.is_floating_point()
    assert data.from_arrays("c", (x, np.arange(20.0) % 2), targets="classes").classes == ("0", "1")


def test_labels_in_a_column_are_labels_and_the_example_at_fault_is_the_stored_one(tmp_path: Path) -> None:
    x, y = RNG.normal(size=(20, 2)), (np.arange(20) % 2)[:, None]
    assert data.from_arrays("column", (x, y)).train_y.ndim == 1
    x[13, 1] = np.inf
    with pytest.raises(DataError, match="first at example 13"):
        data.from_arrays("far", (x, y))


def test_means_of_another_unit_are_refused() -> None:
    pixels = RNG.integers(0, 256, (20, 3, 4, 4))
    told = ([0.5] * 3, [0.25] * 3)
    data.from_arrays("bytes", (pixels.astype(np.uint8), np.arange(20) % 2), normalize=told)
    for x, moments in ((pixels.astype(np.uint8), ([127.0], [60.0])), (pixels.astype(np.float32), told)):
        with pytest.raises(DataError, match="in that unit"):
            data.from_arrays("other", (x, np.arange(20) % 2), normalize=moments)


def test_a_target_without_a_table_is_no_riddle(tmp_path: Path) -> None:
    draw(tmp_path / "a", "1.png", RNG.integers(0, 256, (4, 4), dtype=np.uint8))
    assert_refused(tmp_path, "column of a table", "drop --target", target="a")
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 2)), y=np.arange(4) % 2)
    assert_refused(tmp_path / "d.npz", "column of a table", target="y")


def test_foreign_inputs_are_standardised_as_the_data_of_the_run() -> None:
    pixels = RNG.integers(0, 256, (20, 1, 4, 4), dtype=np.uint8)
    own = data.from_arrays("own", (pixels, np.arange(20) % 2), normalize=([0.2], [0.1]))
    bright = data.from_arrays("bright", (pixels[:, :, :, ::-1] / 255.0, np.arange(20) % 2))
    found = data.inputs_as(bright, own, torch.nn.Flatten())
    stored = torch.from_numpy(pixels[:, :, :, ::-1].copy() / 255.0)
    expected = ((stored - 0.2) / 0.1).flatten(1).sum(1)
    assert all(bool(((expected - value).abs() < 1e-3).any()) for value in found.flatten(1).double().sum(1))
    with pytest.raises(DataError, match="foreign inputs of bright"):
        data.inputs_as(bright, own, torch.nn.Linear(3, 2))
