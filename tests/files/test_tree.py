"""Trees and masks on disk: what goes in comes out, and a damaged file is named, never executed."""

from __future__ import annotations

import json
import os
import pickle
import stat
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ockham.core import files
from ockham.core.files import (
    TREE_SCHEMA,
    read_json,
    read_tree,
    write_bytes,
    write_json,
    write_tree,
)
from ockham.core.posterior import pack, pack_mask, unpack, unpack_mask
from ockham.errors import OckhamError, ResultError


@pytest.fixture
def tree() -> dict:
    return {
        "weights": {"a": torch.arange(6.0).view(2, 3), "mask": torch.tensor([True, False])},
        "state": {0: {"step": 3, "noise": torch.ones(2, dtype=torch.half)}},
        "list": [1, 2.5, None, "text", True],
        "empty": {},
    }


def test_a_tree_survives(tmp_path: Path, tree: dict) -> None:
    write_tree(tmp_path / "x", tree, kind="test")
    back = read_tree(tmp_path / "x", kind="test")
    assert torch.equal(back["weights"]["a"], tree["weights"]["a"])
    assert back["weights"]["mask"].dtype is torch.bool
    assert back["state"][0]["noise"].dtype is torch.half and back["state"][0]["step"] == 3
    assert back["list"] == tree["list"] and back["empty"] == {}


def test_tensors_that_share_memory_are_stored_apart(tmp_path: Path) -> None:
    base = torch.arange(4.0)
    write_tree(tmp_path / "x", {"a": base, "b": base[1:3], "c": base.view(2, 2).T}, kind="test")
    back = read_tree(tmp_path / "x", kind="test")
    assert torch.equal(back["b"], torch.tensor([1.0, 2.0]))
    assert torch.equal(back["c"], torch.tensor([[0.0, 2.0], [1.0, 3.0]]))


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_truncated_file_is_named(tmp_path: Path, tree: dict, cut: int) -> None:
    path = tmp_path / "cut.safetensors"
    write_tree(path, tree, kind="test")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ResultError, match=r"cut\.safetensors.*truncated or not"):
        read_tree(path, kind="test")


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "boom").touch, ())

    path = tmp_path / "bad.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ResultError, match=r"bad\.safetensors"):
        read_tree(path, kind="test")
    assert not (tmp_path / "boom").exists()


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(ResultError, match="not written by Ockham"):
        read_tree(tmp_path / "foreign", kind="test")


def test_kind_and_schema_are_checked(tmp_path: Path, tree: dict) -> None:
    path = tmp_path / "x"
    write_tree(path, tree, kind="network")
    with pytest.raises(ResultError, match="'network' file, a 'posterior' file was expected"):
        read_tree(path, kind="posterior")
    _edit_header(path, '\\"schema\\": 1', f'\\"schema\\": {TREE_SCHEMA + 1}')
    with pytest.raises(ResultError, match=f"newer Ockham \\(schema {TREE_SCHEMA + 1}"):
        read_tree(path, kind="network")


def test_a_header_that_does_not_fit_its_tensors_is_refused(tmp_path: Path, tree: dict) -> None:
    path = tmp_path / "x"
    write_tree(path, tree, kind="test")
    _edit_header(path, '\\"tensor\\": \\"/weights/a\\"', '\\"tensor\\": \\"/weights/b\\"')
    with pytest.raises(ResultError, match="do not fit"):
        read_tree(path, kind="test")


def test_objects_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(OckhamError, match="cannot save /thing: object"):
        write_tree(tmp_path / "x", {"thing": object()}, kind="test")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kept.json"
    write_json(path, {"old": 1})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OckhamError, match=r"cannot write .*kept\.json: No space left"):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["kept.json"]


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OckhamError, match="Choose a folder you may write to"):
        write_bytes(tmp_path / "file" / "x", b"")


def test_damaged_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(ResultError, match=r"m\.json: not readable as JSON"):
        read_json(tmp_path / "m.json")


@given(st.lists(st.sampled_from([0.0, -0.0, 1.5, float("inf")]), max_size=40))
def test_sparse_tensors_survive_to_the_bit(values: list[float]) -> None:
    tensor = torch.tensor(values)
    back = unpack(pack(tensor))
    assert torch.equal(back, tensor) and torch.equal(torch.signbit(back), torch.signbit(tensor))


@pytest.mark.parametrize(("zeros", "smaller"), [(0.02, False), (0.04, True)])
def test_bits_pay_from_about_three_percent_zeros(zeros: float, smaller: bool) -> None:
    tensor = torch.ones(10_000)
    tensor[: int(zeros * 10_000)] = 0
    assert ("bits" in pack(tensor)) is smaller


def test_masks_survive_and_wrong_lengths_are_refused() -> None:
    keep = torch.rand(7, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(unpack_mask(pack_mask(keep), (7, 5)), keep)
    with pytest.raises(ResultError, match="needs 5 bytes"):
        unpack_mask(torch.zeros(4, dtype=torch.uint8), (7, 5))
    node = pack(torch.tensor([0.0] * 40 + [1.0]))
    with pytest.raises(ResultError, match="marks 1 values, the file holds 2"):
        unpack({**node, "values": torch.ones(2)})


def _edit_header(path: Path, old: str, new: str) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + length].decode()
    assert old in header, header
    changed = header.replace(old, new, 1).rstrip()
    json.loads(changed)
    changed += " " * (-len(changed) % 8)
    path.write_bytes(struct.pack("<Q", len(changed)) + changed.encode() + raw[8 + length :])


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_a_tree_is_for_those_that_other_new_files_are_for(tmp_path: Path, tree: dict) -> None:
    before = os.umask(0o027)
    try:
        write_tree(tmp_path / "tree.safetensors", tree, kind="network")
        write_bytes(tmp_path / "plain", b"x")
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("tree.safetensors", "plain")} == {0o640}
    assert {p.name for p in tmp_path.iterdir()} == {"tree.safetensors", "plain"}


def test_parts_of_one_memory_are_written_whole_and_only_they(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tree = {"whole": whole, "same": whole, "row": whole[1], "column": whole[:, 2], "one": torch.ones(1).expand(5)}
    tree["single"] = torch.ones(()).expand(1)
    tree |= {"conjugate": torch.tensor([1 + 2j, 3j]).conj(), "negative": torch.tensor([1 + 2j, 3j]).conj().imag}
    write_tree(tmp_path / "a", tree, kind="network")
    for name, value in read_tree(tmp_path / "a", kind="network").items():
        assert torch.equal(value, tree[name])
    write_tree(tmp_path / "b", {"row": torch.zeros(1000, 4)[5]}, kind="network")
    assert (tmp_path / "b").stat().st_size < 1000


def test_what_ends_the_writing_of_a_tree_leaves_the_old_one_alone(tmp_path: Path, tree: dict, monkeypatch) -> None:
    write_tree(tmp_path / "a", tree, kind="network")
    before = (tmp_path / "a").read_bytes()

    def ends(tensors: object, file: Path, metadata: object) -> None:
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_file", ends)
    with pytest.raises(KeyboardInterrupt):
        write_tree(tmp_path / "a", tree, kind="network")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == before
