"""A result folder is one value: old or new and whole, whatever dies when; one writer; nothing of another run."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ockham.core import seal as lock
from ockham.core.files import read_tree, write_bytes, write_json
from ockham.core.seal import CHECKPOINTS, COMMITTED, MANIFEST, read_seal, sealed
from ockham.errors import OckhamError, OckhamWarning, ResultError
from ockham.run.folder import ResultFolder, amend

CALLS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "open")
"""Functions of `os` that change a folder; a process is stopped before each of their calls."""


def write(out: Path, tag: str, names: tuple[str, ...], *, overwrite: bool = False, resume: bool = False) -> None:
    """A result whose files all hold the same tag, after two checkpoints."""
    with ResultFolder(out, overwrite=overwrite, resume=resume) as folder:
        for step in range(2):
            folder.save_checkpoint({"tag": tag, "step": step, "state": torch.full((3,), float(step))})
        for name in names:
            write_bytes(folder.path(name), f"{tag} {name}".encode())
        folder.commit(job=tag)


OLD = ("network.safetensors", "gates.json", "report.html")
NEW = ("network.safetensors", "posterior.safetensors", "metrics.json")


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is not waited for; the calls stay."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def tags(out: Path) -> set[str]:
    """The tags of all files of the result."""
    seal = sealed(out)
    assert seal is not None
    return {(out / name).read_text().split()[0] for name in seal.files} | {seal.job}


def dies(work: Callable[[], None], calls: int) -> bool:
    """Run `work` in a process that ends without a word before the given call that changes a folder."""
    pid = os.fork()
    if pid == 0:
        left = [calls]

        def counted(real: Callable) -> Callable:
            def call(*args: object, **kwargs: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(77)
                return real(*args, **kwargs)

            return call

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 77), code
    return code == 77


@pytest.mark.filterwarnings("ignore:.*fork", "ignore:.*holds the checkpoint")
def test_died_before_every_change_over_an_old_result_it_is_old_or_new_and_whole(tmp_path: Path, fast: None) -> None:
    seen: list[str] = []
    for calls in range(1000):
        out = tmp_path / str(calls)
        write(out, "old", OLD)
        (out / "notes.txt").write_text("the user's")
        stopped = dies(lambda out=out: write(out, "new", NEW, overwrite=True), calls)
        found = tags(out)
        assert len(found) == 1, (calls, found)
        seen += found
        known = {"notes.txt", ".lock", MANIFEST, *CHECKPOINTS, *(OLD if found == {"old"} else NEW)}
        assert {p.name for p in out.iterdir() if not p.name.startswith((".new-", ".checkpoint"))} <= known
        assert (out / "notes.txt").read_text() == "the user's"
        write(out, "next", NEW, overwrite=True)
        assert tags(out) == {"next"} and {p.name for p in out.iterdir()} == {"notes.txt", MANIFEST, *NEW}
        if not stopped:
            break
    assert calls > 40 and seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}


@pytest.mark.filterwarnings("ignore:.*fork")
def test_died_before_every_change_the_first_result_is_absent_or_whole_and_a_checkpoint_is_left(
    tmp_path: Path, fast: None
) -> None:
    for calls in range(1000):
        out = tmp_path / str(calls)
        stopped = dies(lambda out=out: write(out, "new", NEW), calls)
        saved = out.exists() and any((out / name).exists() for name in CHECKPOINTS)
        try:
            assert tags(out) == {"new"}
            with ResultFolder(out, resume=True) as folder:
                assert folder.finished is not None and folder.checkpoint() is None
            assert {p.name for p in out.iterdir()} == {MANIFEST, *NEW}
        except ResultError as error:
            assert "--resume" in str(error) or not saved, (calls, error)
            if out.exists():
                with ResultFolder(out, resume=True) as folder:
                    tree = folder.checkpoint()
                    assert (tree is not None) == saved and (tree is None or tree["tag"] == "new")
        if not stopped:
            break
    assert calls > 30


def test_the_manifest_can_be_checked_by_other_programs(tmp_path: Path) -> None:
    write(tmp_path / "r", "x", NEW)
    content = json.loads((tmp_path / "r" / MANIFEST).read_text())
    for name in NEW:
        raw = (tmp_path / "r" / name).read_bytes()
        assert content["files"][name] == {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def test_every_flipped_byte_of_a_sealed_folder_is_found_and_named(tmp_path: Path) -> None:
    out = tmp_path / "r"
    write(out, "x", NEW)
    for name in (*NEW, MANIFEST):
        whole = (out / name).read_bytes()
        for at in range(0, len(whole), 7):
            (out / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(ResultError, match=name):
                sealed(out)
        (out / name).write_bytes(whole)
    sealed(out)


def test_only_named_files_are_compared_and_none_without_verify(tmp_path: Path) -> None:
    out = tmp_path / "r"
    write(out, "x", NEW)
    (out / "metrics.json").write_bytes(b"y metrics.json")
    sealed(out, "network.safetensors")
    sealed(out, verify=False)
    with pytest.raises(ResultError, match=r"metrics\.json.*another SHA-256.*verify=False"):
        sealed(out)
    (out / "metrics.json").unlink()
    with pytest.raises(ResultError, match=r"metrics\.json.*missing.*--overwrite"):
        sealed(out, verify=False)


def test_files_of_another_run_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "r"
    write(out, "x", NEW)
    (out / "plan.json").write_text("{}")
    with pytest.raises(ResultError, match=r"plan\.json: is no part of the result"):
        sealed(out)


def test_links_and_pipes_in_a_folder_are_refused_at_once(tmp_path: Path) -> None:
    out = tmp_path / "r"
    write(out, "x", NEW)
    (out / "metrics.json").rename(tmp_path / "elsewhere")
    (out / "metrics.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ResultError, match="link out of its folder"):
        sealed(out)
    (out / "metrics.json").unlink()
    os.mkfifo(out / "metrics.json")
    with pytest.raises(ResultError, match=r"metrics\.json"):
        sealed(out)


def test_a_finished_result_is_kept_unless_overwriting_is_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "r"
    write(out, "old", OLD)
    with pytest.raises(OckhamError, match=r"already holds a finished result.*--overwrite"):
        write(out, "new", NEW)
    assert tags(out) == {"old"}
    write(out, "new", NEW, overwrite=True)
    assert tags(out) == {"new"} and not (out / "gates.json").exists()


def test_results_of_earlier_versions_are_results_too(tmp_path: Path) -> None:
    for name in OLD:
        (tmp_path / name).write_text("ancient")
    with pytest.warns(OckhamWarning, match="as those of earlier versions"):
        assert sealed(tmp_path) is None
    with pytest.raises(OckhamError, match="already holds"):
        write(tmp_path, "new", NEW)
    write(tmp_path, "new", NEW, overwrite=True)
    assert tags(tmp_path) == {"new"} and not (tmp_path / "report.html").exists()


def test_resuming_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    write(tmp_path / "r", "x", NEW)
    with ResultFolder(tmp_path / "r", resume=True) as folder:
        assert folder.finished == read_seal(tmp_path / "r" / MANIFEST) and folder.checkpoint() is None
        with pytest.raises(OckhamError, match="nothing to commit"):
            folder.commit()


def test_a_failure_leaves_checkpoints_and_the_old_result(tmp_path: Path) -> None:
    out = tmp_path / "r"
    write(out, "old", OLD)
    with pytest.raises(RuntimeError), ResultFolder(out, overwrite=True) as folder:
        run = folder.run
        folder.save_checkpoint({"step": 7})
        write_json(folder.path("metrics.json"), {})
        raise RuntimeError
    assert tags(out) == {"old"} and not list(out.glob(".*"))
    with ResultFolder(out, resume=True) as folder:  # the permission to overwrite goes with the checkpoint
        assert folder.checkpoint() == {"step": 7, "run": run} and folder.run == run
        write_json(folder.path("metrics.json"), {})
        assert folder.commit().run == run


def test_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    with ResultFolder(tmp_path) as folder:
        for step in range(3):
            folder.save_checkpoint({"step": step, "state": torch.full((50,), float(step))})
    assert [read_tree(tmp_path / name, kind="checkpoint")["step"] for name in CHECKPOINTS] == [2, 1]
    newest = tmp_path / CHECKPOINTS[0]
    raw = bytearray(newest.read_bytes())
    raw[-30] ^= 4
    newest.write_bytes(raw)
    told = pytest.warns(OckhamWarning, match=r"SHA-256.*going on from the checkpoint before")
    with told, ResultFolder(tmp_path, resume=True) as folder:
        assert folder.checkpoint()["step"] == 1
        folder.save_checkpoint({"step": 2})
    for name in CHECKPOINTS:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ResultError, match=r"no checkpoint can be read.*checkpoint\.before"):
        ResultFolder(tmp_path, resume=True).__enter__()
    with pytest.warns(OckhamWarning, match="without --resume this run starts"), ResultFolder(tmp_path) as folder:
        assert folder.checkpoint() is None
        folder.save_checkpoint({"step": 0})
    assert not (tmp_path / CHECKPOINTS[1]).exists()


def test_a_report_is_renewed_with_its_seal(tmp_path: Path) -> None:
    write(tmp_path / "r", "x", OLD)
    before = read_seal(tmp_path / "r" / MANIFEST)
    amend(tmp_path / "r" / "report.html", b"x again")
    after = sealed(tmp_path / "r")
    assert after.run == before.run and after.job == "x"
    assert {n: f for n, f in after.files.items() if n != "report.html"} == {
        n: f for n, f in before.files.items() if n != "report.html"
    }
    (tmp_path / "r" / "gates.json").write_text("y")
    amend(tmp_path / "r" / "report.html", b"x")
    with pytest.raises(ResultError, match=r"gates\.json"):
        sealed(tmp_path / "r")
    amend(tmp_path / "report.html", b"no seal here")
    assert (tmp_path / "report.html").read_bytes() == b"no seal here" and not (tmp_path / MANIFEST).exists()


@pytest.mark.parametrize("name", ["../x", "a/b", MANIFEST, CHECKPOINTS[0], ".hidden", ""])
def test_only_plain_names_are_part_of_a_result(tmp_path: Path, name: str) -> None:
    with ResultFolder(tmp_path) as folder, pytest.raises(OckhamError, match="plain file"):
        folder.path(name)


# ---- one writer


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_second_writer_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    ready, tell = os.pipe()
    other = os.fork()
    if other == 0:
        with ResultFolder(tmp_path) as folder:
            folder.save_checkpoint({"step": 1})
            os.write(tell, b"x")
            signal.pause()
    os.read(ready, 1)
    with pytest.raises(OckhamError, match=f"being written by process {other} on {socket.gethostname()}"):
        ResultFolder(tmp_path).__enter__()
    with pytest.raises(ResultError, match=f"it is being made by process {other}"):
        sealed(tmp_path)
    os.kill(other, signal.SIGKILL)
    while lock.process_start(other):  # not waited for: only its remains are left
        pass
    with pytest.raises(ResultError, match=r"interrupted.*--resume"):
        sealed(tmp_path)
    with ResultFolder(tmp_path, resume=True) as folder:
        assert folder.checkpoint()["step"] == 1
    os.waitpid(other, 0)


def test_a_lock_of_a_reused_process_id_is_stale_and_one_of_another_machine_is_not(tmp_path: Path) -> None:
    mine = lock.FolderLock(tmp_path).mine
    facts = {"pid": os.getpid(), "host": mine.host, "since": "then", "key": "k", "started": mine.started}
    (tmp_path / lock.LOCK).write_text(json.dumps(facts | {"started": "before the last boot"}))
    with ResultFolder(tmp_path):
        assert lock.holder_of(tmp_path).started == mine.started
    for other in ({}, {"host": "elsewhere"}, {"host": "\x1b[2J"}):
        (tmp_path / lock.LOCK).write_text(json.dumps(facts | other))
        with pytest.raises(OckhamError, match="is being written by process") as caught:
            ResultFolder(tmp_path).__enter__()
        assert "\x1b" not in str(caught.value)
    (tmp_path / lock.LOCK).write_text("")
    os.utime(tmp_path / lock.LOCK, (0, 0))
    with ResultFolder(tmp_path):
        pass


@pytest.mark.filterwarnings("ignore:.*fork")
def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    for trial in range(3):
        folder = tmp_path / str(trial)
        folder.mkdir()
        gone = {"pid": 2**22 + 5, "started": "x", "host": socket.gethostname(), "since": "then", "key": "k"}
        (folder / lock.LOCK).write_text(json.dumps(gone))
        (go, start), (hold, leave), (said, say) = os.pipe(), os.pipe(), os.pipe()
        children = []
        for _ in range(8):
            children.append(os.fork())
            if children[-1] == 0:
                os.close(start)
                os.close(leave)
                os.read(go, 1)  # until the parent closes its end
                try:
                    lock.FolderLock(folder).acquire()
                    os.write(say, b"+")
                    os.read(hold, 1)
                except OckhamError:
                    os.write(say, b"-")
                finally:
                    os._exit(0)
        os.close(start)
        answers = b"".join(os.read(said, 1) for _ in children)
        os.close(leave)
        for pid in children:
            os.waitpid(pid, 0)
        assert sorted(answers) == sorted(b"+-------"), answers
    assert not list(tmp_path.glob("*/.lock.k"))


def test_part_files_are_exclusive_and_follow_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda n: "known")
    (tmp_path / "victim").write_text("safe")
    (tmp_path / ".x.known.part").symlink_to(tmp_path / "victim")
    with pytest.raises(OckhamError, match="cannot write"):
        write_bytes(tmp_path / "x", b"y")
    assert (tmp_path / "victim").read_text() == "safe"
    assert COMMITTED.startswith(".")
