"""One writer for a folder: a lock file that names the process that holds it, taken over when that process is gone."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from ockham.core.files import open_regular, printable
from ockham.errors import OckhamError, ResultError

__all__ = ["LOCK", "FolderLock", "Holder", "holder_of", "process_start"]

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
    except (ValueError, KeyError, TypeError, RecursionError):
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
            here = "wait for it, or choose another --out"
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
