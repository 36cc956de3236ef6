"""A folder as one value: its seal, and the lock that keeps a second writer out."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
import socket
import subprocess
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from ockham.core.files import TREE_SCHEMA, inside, open_regular, printable, read_json, sync_folder
from ockham.errors import OckhamError, OckhamWarning, ResultError

__all__ = [
    "CHECKPOINTS",
    "COMMITTED",
    "LOCK",
    "MANIFEST",
    "RESULT_FILES",
    "FileFacts",
    "FolderLock",
    "Holder",
    "Seal",
    "compare_surroundings",
    "file_facts",
    "holder_of",
    "network_fingerprint",
    "process_start",
    "read_seal",
    "sealed",
    "settle_folder",
    "surroundings",
    "weights_fingerprint",
]


MANIFEST = "manifest.json"
COMMITTED = ".committed"
"""Folder within a result folder: a new result that is whole and on its way into place."""

CHECKPOINTS = ("checkpoint.safetensors", "checkpoint.before.safetensors")
"""The newest checkpoint of a run, and the one before."""

RESULT_FILES = (
    "network.safetensors",
    "posterior.safetensors",
    "plan.json",
    "metrics.json",
    "history.json",
    "analysis.json",
    "structure.json",
    "gates.json",
    "result.json",
    "report.html",
)
"""Files that a run may leave; those that the manifest does not list belong to another one."""


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What the manifest says of a file.

    Attributes:
        size: bytes.
        sha256: hexadecimal digest of all bytes, as the program ``sha256sum`` prints it.
    """

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Seal:
    """What a manifest says of the result that it seals.

    Attributes:
        run: random name of the run that made it.
        made: time of sealing, ISO 8601.
        files: facts of every file of the result, by name.
        job: what tells this run from others (settings, data, weights), as the run wrote it; empty if it did not.
        replaces: names of files of an earlier result that leave when this one takes its place.
    """

    run: str
    made: str
    files: Mapping[str, FileFacts] = field(default_factory=dict)
    job: str = ""
    replaces: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        """Text of the manifest; its last field is the SHA-256 of all before."""
        content = {"schema": TREE_SCHEMA, "kind": "ockham-manifest"} | asdict(self)
        told = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return (json.dumps(content | {"sha256": told}, indent=1) + "\n").encode()


def file_facts(path: Path) -> FileFacts:
    """Size and SHA-256 of a file.

    Raises:
        ResultError: missing, or no regular file.
    """
    with open_regular(path) as file:
        size, found, buffer = os.fstat(file.fileno()).st_size, hashlib.sha256(), bytearray(2**18)
        while count := file.readinto(buffer):
            found.update(memoryview(buffer)[:count])
        return FileFacts(size, found.hexdigest())


def read_seal(path: Path) -> Seal:
    """Read a manifest.

    Raises:
        ResultError: missing, damaged, foreign, or newer.
    """
    content = read_json(path)
    try:
        told = content.pop("sha256")
        if content["kind"] != "ockham-manifest":
            raise ValueError(f"kind is {content['kind']!r}")
        if int(content["schema"]) > TREE_SCHEMA:
            raise ResultError(f"{printable(path)}: written by a newer Ockham (schema {content['schema']}); upgrade")
        if told != hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest():
            raise ValueError("its SHA-256 is another")
        files = {name: FileFacts(**facts) for name, facts in content["files"].items()}
        texts = [content["run"], content["made"], content["job"], *files, *content["replaces"]]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a name is no text")
        strange = [n for n in (*files, *content["replaces"]) if not n or Path(n).name != n or "\0" in n]
        if strange:
            raise ValueError(f"{strange[0][:60]!r} is no plain file name")
        return Seal(content["run"], content["made"], files, content["job"], tuple(content["replaces"]))
    except ResultError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ResultError(
            f"{printable(path)}: the manifest is damaged, foreign or changed ({printable(error)}); the folder cannot "
            "be checked. Copy it again from where it is whole, or run its command again"
        ) from error


def settle_folder(folder: Path) -> None:
    """Finish what a process began that died while its sealed result took its place; nothing to do as a rule.

    The new result counts from the moment that its folder got the name `COMMITTED`. What is left to do can be done by
    anyone, by several at once, and again.

    Raises:
        ResultError: the folder cannot be written, or the new result in it is damaged.
    """
    new = folder / COMMITTED
    if not new.is_dir():
        return
    try:
        if (new / MANIFEST).exists():
            seal = read_seal(new / MANIFEST)
            for name in seal.replaces:
                if name not in seal.files:
                    (folder / name).unlink(missing_ok=True)
            for name in (*seal.files, MANIFEST):
                with suppress(FileNotFoundError):
                    os.replace(new / name, folder / name)
        with suppress(FileNotFoundError):
            new.rmdir()
        sync_folder(folder)
    except OSError as error:
        raise ResultError(
            f"{printable(folder)}: a finished result is on its way into place, and cannot get there "
            f"({error.strerror or error}). Make the folder writable and try again"
        ) from error


def sealed(folder: str | Path, *names: str, verify: bool = True, rewriting: str = "") -> Seal | None:
    """Check that a result folder is whole and as its run sealed it.

    All files of the manifest must be there in their size, no file of another run may lie among them, and SHA-256 must
    be as written. What a dying process left undone is finished first.

    Args:
        folder: a result folder.
        names: files whose content is compared; none: all.
        verify: whether content is compared at all; without, presence and sizes are.
        rewriting: name of a file that is about to be written anew and may be missing.

    Returns:
        The seal; None for a folder without one, as earlier versions wrote them, with a warning if it has several files.

    Raises:
        ResultError: an unfinished, incomplete or changed folder; says which file and how to go on.
    """
    home = Path(folder)
    if not home.is_dir():
        raise ResultError(f"{printable(home)}: no such folder")
    settle_folder(home)
    if not (home / MANIFEST).exists():
        there = [name for name in RESULT_FILES if os.path.lexists(home / name)]
        if not there:
            raise ResultError(f"{printable(home)}: {_unfinished(home)}")
        if len(there) > 1:  # one file says itself whether it is whole
            warnings.warn(
                f"{printable(home)}: this result has no {MANIFEST}, as those of earlier versions; whether its files "
                "belong together cannot be checked",
                OckhamWarning,
                stacklevel=1,
            )
        return None
    while True:
        seal = read_seal(home / MANIFEST)
        problem = _difference(home, seal, names or tuple(seal.files), verify=verify, rewriting=rewriting)
        if not problem:
            return seal
        settle_folder(home)
        if read_seal(home / MANIFEST) == seal:  # else another result took its place while this one was looked at
            raise ResultError(problem)


def _difference(home: Path, seal: Seal, names: tuple[str, ...], *, verify: bool, rewriting: str) -> str:
    """What in a folder is not as the seal says, with the way out; empty if nothing is."""
    for name in RESULT_FILES:
        if name not in seal.files and os.path.lexists(home / name):
            return f"{printable(home / name)}: is no part of the result in this folder (run {seal.run}); take it away"
    for name, facts in seal.files.items():
        path = inside(home, name)
        if name == rewriting and not path.exists():
            continue
        size = path.stat().st_size if os.path.isfile(path) else None
        compare = verify and size == facts.size and name in names
        if size != facts.size or (compare and file_facts(path).sha256 != facts.sha256):
            state = "missing" if size is None else f"of {size} bytes" if size != facts.size else "of another SHA-256"
            return (
                f"{printable(path)}: damaged or changed since run {seal.run} sealed it on {seal.made} with "
                f"{facts.size} bytes: now it is {state}. Copy the folder again from where it is whole, or run its "
                "command again with --overwrite" + ("; verify=False reads it as it is" if size == facts.size else "")
            )
    return ""


def _unfinished(folder: Path) -> str:
    """Why there is no result in a folder, and the way to one."""
    holder = holder_of(folder)
    if holder is not None and not holder.gone:
        return f"no result yet: it is being made by {holder}"
    saved = [(folder / name).stat().st_mtime for name in CHECKPOINTS if (folder / name).is_file()]
    if saved:
        when = datetime.fromtimestamp(max(saved), UTC).isoformat(timespec="seconds")
        return (
            f"no finished result: {RESULT_FILES[0]} and {MANIFEST} are missing, the run was interrupted; its last "
            f"checkpoint is of {when}. Run the same command with --resume"
        )
    return f"no result of Ockham: {MANIFEST} and {RESULT_FILES[0]} are missing, no such file"


LOCK = ".lock"
"""Name of the lock file in a folder."""

_SETTLED = 2.0  # seconds after which an empty lock file is no longer just being written


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a folder.

    Attributes:
        pid: process id; 0 where the lock file says nothing.
        started: start of that process, as the system tells it; a later process of the same id has another.
        host: name of the machine.
        since: time of taking the lock, ISO 8601.
        key: random text, another for every taking.
    """

    pid: int
    started: str
    host: str
    since: str
    key: str

    @property
    def gone(self) -> bool:
        """Whether the process has certainly ended: it ran on this machine, and no such process runs now."""
        if self.host != socket.gethostname():
            return False
        now = process_start(self.pid)
        return now is not None and (not now or (bool(self.started) and now != self.started))

    def __str__(self) -> str:
        """For messages."""
        return printable(f"process {self.pid} on {self.host}, since {self.since}")


def process_start(pid: int) -> str | None:
    """When a process of this machine started, "" if there is none (or only its remains), None if that is not known."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        except OSError:
            return None
        boot = ""
        with suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return "" if fields[0] in "ZX" else f"{fields[19]} {boot}"
    try:
        shown = subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return shown.stdout.strip()


def holder_of(folder: Path) -> Holder | None:
    """Who holds a folder, by its lock file; None if there is no lock.

    Raises:
        ResultError: the lock file cannot be read.
    """
    path = folder / LOCK
    if not path.exists() and not path.is_symlink():
        return None
    with open_regular(path) as file:
        written, content = os.fstat(file.fileno()).st_mtime, file.read(4096)
    try:
        found = json.loads(content)
        return Holder(int(found["pid"]), *(str(found[k]) for k in ("started", "host", "since", "key")))
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        fresh = time.time() - written < _SETTLED  # perhaps between creation and content
        return Holder(0, "", "?" if fresh else socket.gethostname(), "?", "")


class FolderLock:
    """The right to write into a folder, for one process at a time.

    The lock is a file made exclusively. Where its holder has ended (no process of that id, or one that started at
    another time), it is taken over; only who makes the file named after the dead holder's key may remove the lock, so
    that two processes cannot take it over both.

    Args:
        folder: the folder, which must exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LOCK
        me = (os.getpid(), process_start(os.getpid()) or "", socket.gethostname())
        self.mine = Holder(*me, datetime.now(UTC).isoformat(timespec="seconds"), secrets.token_hex(8))

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            OckhamError: another process holds it, who is named; or the folder cannot be written.
        """
        for _ in range(100):
            try:
                self._create(self.path, json.dumps(asdict(self.mine)).encode())
                return
            except FileExistsError:
                self._take_over()
            except OSError as error:
                raise OckhamError(
                    f"cannot write to {printable(self.folder)}: {error.strerror or error}. "
                    "Choose a folder you may write to"
                ) from error
        raise OckhamError(f"{printable(self.path)}: others take and leave this lock all the time; try again")

    def __enter__(self) -> FolderLock:
        """Take the lock, as `acquire`."""
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lock back."""
        self.release()

    def release(self) -> None:
        """Give the lock back; one that another process has taken over in the meantime stays."""
        with suppress(OSError, ResultError):
            found = holder_of(self.folder)
            if found is not None and found.key == self.mine.key:
                self.path.unlink()

    def _create(self, path: Path, content: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        with open(os.open(path, flags, 0o644), "wb", buffering=0) as file:
            file.write(content)

    def _take_over(self) -> None:
        """Remove the lock of a process that has ended; wait where it is just being written."""
        other = holder_of(self.folder)
        if other is None:
            return
        if not other.gone:
            if other.host == "?":
                time.sleep(0.05)
                return
            here = "wait for it, or choose another folder (--out of a command)"
            away = f"if that machine or process is gone, remove {printable(self.path)}"
            advice = here if other.host == socket.gethostname() else away
            raise OckhamError(f"{printable(self.folder)} is being written by {other}: {advice}")
        guard = self.path.with_name(f"{LOCK}.{other.key}")
        try:
            self._create(guard, b"")
        except FileExistsError:
            time.sleep(0.05)
            with suppress(OSError):
                if time.time() - guard.stat().st_mtime > _SETTLED:
                    guard.unlink()
            return
        try:
            found = holder_of(self.folder)
            if found is not None and found.key == other.key:
                self.path.unlink()
        finally:
            guard.unlink()


def network_fingerprint(model: nn.Module) -> str:
    """What tells a network's code from others: parameters, and 16 digits of a SHA-256 of its modules and shapes."""
    shown = re.sub(r"\b0x[0-9a-f]+", "", repr(model))  # places in memory
    shapes = [(name, str(t.dtype), tuple(t.shape)) for name, t in model.state_dict().items() if isinstance(t, Tensor)]
    digest = hashlib.sha256(repr((shown, shapes)).encode()).hexdigest()
    return f"{sum(p.numel() for p in model.parameters())} parameters {digest[:16]}"


def weights_fingerprint(state: Mapping[str, Tensor] | None) -> str:
    """What tells given weights from others: 16 hexadecimal digits of a SHA-256 of names and bytes; "none" for None."""
    if state is None:
        return "none"
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        found.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def surroundings() -> str:
    """What else than the job decides about the last bits of a result."""
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}"


def compare_surroundings(before: str, folder: Path) -> None:
    """Warn where a run goes on under other `surroundings` than it began with; "" is not known."""
    if before and before != surroundings():
        warnings.warn(
            f"{printable(folder)}: the run began with {before} and goes on with {surroundings()}; it ends with a "
            "result as good, and not with the same bits",
            OckhamWarning,
            stacklevel=2,
        )
