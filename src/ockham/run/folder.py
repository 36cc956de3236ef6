"""A result folder as one value: made beside its place, sealed by a manifest, and put there by one rename."""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from ockham.core.files import printable, read_tree, sync_folder, write_bytes, write_tree
from ockham.core.lock import FolderLock
from ockham.core.seal import (
    CHECKPOINTS,
    COMMITTED,
    MANIFEST,
    RESULT_FILES,
    FileFacts,
    Seal,
    file_facts,
    read_seal,
    settle,
)
from ockham.errors import OckhamError, OckhamWarning, ResultError

__all__ = ["ResultFolder", "amend"]


class ResultFolder:
    """The only writer of a result folder; the result in it is the old one until `commit`, and the new one from then on.

    Files are written to `stage`, a hidden folder within; `commit` syncs them, seals them by a manifest (run id, size
    and SHA-256 of each) and makes them the result by one rename. Without it, only checkpoints remain.

        with ResultFolder("runs/digits", resume=True) as folder:
            saved = folder.checkpoint()
            ...
            folder.save_checkpoint({"state": state})
            ...
            write_json(folder.path("metrics.json"), metrics)
            folder.commit()

    Args:
        out: folder of the result; made where it is missing. Files in it that are not Ockham's stay.
        overwrite: whether a finished result in it may be replaced.
        resume: whether a checkpoint in it will be continued; without, it is discarded at the first new one. A finished
            result is then no error, but stands in `finished`.

    Attributes:
        out: the folder.
        stage: folder for the new files, within ``out``.
        run: random name of this run; a resumed run has the name it began with.
        finished: seal of the finished result that is there, for a caller who resumes; None while there is work to do.

    Raises:
        OckhamError: on entering: another process writes there, a finished result is there, or it cannot be written.
    """

    def __init__(self, out: str | Path, *, overwrite: bool = False, resume: bool = False) -> None:
        self.out, self.overwrite, self.resume = Path(out), overwrite, resume
        self.run = secrets.token_hex(8)
        self.stage = self.out / f".new-{self.run}"
        self.finished: Seal | None = None
        self._saved: dict[str, Any] | None = None
        self._old: tuple[str, ...] = ()

    def __enter__(self) -> ResultFolder:
        """Take the lock, finish or clear what a killed process left, and see what is there."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OckhamError(
                f"cannot write to {printable(self.out)}: {error.strerror or error}. Choose a folder you may write to"
            ) from error
        self._lock = FolderLock(self.out)
        self._lock.acquire()
        try:
            settle(self.out)
            for left in (*self.out.glob(".new-*"), *self.out.glob(".*.part")):
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            self._survey()
            self.stage.mkdir()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Remove what was not committed, and give the lock back."""
        with suppress(OSError):
            shutil.rmtree(self.stage, ignore_errors=True)
        self._lock.release()

    def _survey(self) -> None:
        """Decide between the checkpoint and the result that are there."""
        seal, known = None, [name for name in RESULT_FILES if os.path.lexists(self.out / name)]
        if (self.out / MANIFEST).exists():
            with suppress(ResultError):  # of a damaged manifest only the way to a new result matters
                seal = read_seal(self.out / MANIFEST)
                known = list(dict.fromkeys([*seal.files, *known]))
        self._old = tuple(known)
        self._saved = self._newest() if self.resume else None
        if not self.resume and any((self.out / name).exists() for name in CHECKPOINTS):
            warnings.warn(
                f"{printable(self.out)} holds the checkpoint of an interrupted run; without --resume this run starts "
                "anew and writes over it",
                OckhamWarning,
                stacklevel=2,
            )
        if self._saved is not None and (seal is None or self._saved["run"] != seal.run):
            self.run = str(self._saved["run"])
            return
        self._saved = None
        there = seal is not None or RESULT_FILES[0] in known or (self.out / MANIFEST).exists()
        if not there or self.overwrite:
            return
        if self.resume and seal is not None:
            self.finished = seal
            return
        told = f" (run {seal.run}, sealed on {seal.made})" if seal else ""
        raise OckhamError(
            f"{printable(self.out)} already holds a finished result{told}: choose another --out, or replace it with "
            "--overwrite (overwrite=True)"
        )

    def path(self, name: str) -> Path:
        """Where to write the file of this name; it is part of the result after `commit`.

        Raises:
            OckhamError: not a plain file name.
        """
        if not name or Path(name).name != name or name in (MANIFEST, *CHECKPOINTS) or name.startswith("."):
            raise OckhamError(f"a result holds plain files only; got the name {name!r}")
        return self.stage / name

    # ------------------------------------------------------------------ checkpoints
    def checkpoint(self) -> dict[str, Any] | None:
        """The newest whole checkpoint when resuming, as it was saved; None if there is none or the run has finished."""
        return self._saved

    def save_checkpoint(self, tree: Mapping[str, Any], *, durable: bool = False) -> None:
        """Write a checkpoint; the one before stays until the next.

        Args:
            tree: plain values and tensors as `ockham.core.files.write_tree` takes them, without a key "run".
            durable: wait for the disk; without, loss of power may cost the newest one or both.

        Raises:
            OckhamError: the folder cannot be written.
        """
        newest, before = (self.out / name for name in CHECKPOINTS)
        try:
            if self._saved is None:  # of another run: not to be mixed with ours
                before.unlink(missing_ok=True)
                newest.unlink(missing_ok=True)
            elif newest.exists():
                os.replace(newest, before)
        except OSError as error:
            raise OckhamError(f"cannot write to {printable(self.out)}: {error.strerror or error}") from error
        self._saved = {"run": self.run}
        write_tree(newest, {**tree, "run": self.run}, kind="checkpoint", durable=durable)

    def _newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole; a damaged one is said and passed over."""
        problems = []
        for path in (self.out / name for name in CHECKPOINTS):
            if not os.path.lexists(path):
                continue
            try:
                tree = read_tree(path, kind="checkpoint")
            except ResultError as error:
                problems.append(str(error))
                continue
            if problems:
                warnings.warn(f"{problems[0]}; going on from the checkpoint before it", OckhamWarning, stacklevel=2)
            return {"run": self.run} | tree
        if problems:
            raise ResultError(f"no checkpoint can be read: {'; '.join(problems)}. Start anew without --resume")
        return None

    # ------------------------------------------------------------------ the end
    def commit(self, *, job: str = "") -> Seal:
        """Make what lies in `stage` the result, and take the checkpoints away.

        Args:
            job: text that tells this job from others, for a later ``--resume``.

        Returns:
            The seal.

        Raises:
            OckhamError: nothing was written, a finished result must not be replaced, or the disk is full.
        """
        names = sorted(p.name for p in self.stage.iterdir())
        if not names or self.finished is not None:
            raise OckhamError(f"{printable(self.out)}: there is nothing to commit")
        seal = self._put(names, {}, job, tuple(n for n in self._old if n not in names))
        for name in CHECKPOINTS:
            (self.out / name).unlink(missing_ok=True)
        return seal

    def _put(self, names: Iterable[str], others: Mapping[str, FileFacts], job: str, replaces: tuple[str, ...]) -> Seal:
        made = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            files = dict(others)
            for name in names:
                handle = os.open(self.stage / name, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
                files[name] = file_facts(self.stage / name)
            seal = Seal(self.run, made, files, job, replaces)
            write_bytes(self.stage / MANIFEST, seal.to_json())
            os.rename(self.stage, self.out / COMMITTED)  # before it the old result counts, after it the new one
            sync_folder(self.out)
        except OSError as error:
            raise OckhamError(
                f"cannot write to {printable(self.out)}: {error.strerror or error}; the result before is untouched"
            ) from error
        settle(self.out)
        return seal


def amend(path: Path, content: bytes) -> None:
    """Write one file of a finished result anew, such as its report, and renew the seal with it.

    In a folder without a seal the file is written, and no more.

    Args:
        path: file within a result folder.
        content: bytes to write.

    Raises:
        OckhamError: another process writes there, the folder cannot be written, or its manifest is damaged.
    """
    home = path.parent
    settle(home)
    if not (home / MANIFEST).exists():
        write_bytes(path, content)
        return
    with ResultFolder(home, resume=True) as folder:
        old = read_seal(home / MANIFEST)
        write_bytes(folder.path(path.name), content)
        folder.run = old.run
        folder._put([path.name], old.files, old.job, ())
