"""A result folder, and the network and plan in it: written and read as one value."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from ockham.core.files import (
    inside,
    printable,
    read_text,
    read_tree,
    sync_folder,
    write_bytes,
    write_tree,
)
from ockham.core.posterior import POSTERIOR, Posterior, pack, unpack
from ockham.core.processes import Processes
from ockham.core.seal import (
    CHECKPOINTS,
    COMMITTED,
    MANIFEST,
    RESULT_FILES,
    FileFacts,
    FolderLock,
    Seal,
    file_facts,
    read_seal,
    sealed,
    settle_folder,
)
from ockham.errors import OckhamError, OckhamWarning, ResultError
from ockham.surgery.groups import Plan, PlanError
from ockham.surgery.shrinking import says_its_widths, shrink
from ockham.zoo.networks import constructor

__all__ = [
    "NETWORK",
    "PLAN",
    "POSTERIOR",
    "ResultFolder",
    "amend",
    "finite_error",
    "first_checkpoint",
    "fit_error",
    "layer_rows",
    "load",
    "load_state",
    "loading_lines",
    "resume_hint",
    "save_network",
    "save_plan",
    "save_pretrained",
    "stored_values",
    "terminated",
]


NETWORK = "network.safetensors"
PLAN = "plan.json"


def save_network(model: nn.Module, path: Path, *, builder: str) -> int:
    """Write a network, zeros as bits, tied tensors once.

    Args:
        model: any module with finite parameters.
        path: the file.
        builder: "zoo:name", or a label such as "package.module:function" for people; only zoo names are rebuilt.

    Returns:
        Bytes on disk.

    Raises:
        OckhamError: a parameter is not finite, or the folder cannot be written.
    """
    state: dict[str, Any] = {}
    tied: dict[str, str] = {}
    seen: dict[Any, str] = {}
    found = model.state_dict()
    problem = finite_error(found, {name for name, _ in model.named_parameters(remove_duplicate=False)})
    if problem:
        raise OckhamError(f"{printable(path)}: the network is not saved, {problem}")
    for name, tensor in found.items():
        place = (tensor.data_ptr(), tensor.shape) if tensor.numel() else (name, tensor.shape)
        if place in seen:
            tied[name] = seen[place]
        else:
            seen[place] = name
            state[name] = pack(tensor)
    write_tree(path, {"builder": builder, "state": state, "tied": tied}, kind="network")
    return path.stat().st_size


def save_plan(plan: Plan | None, path: Path) -> None:
    """Write what was taken out as a whole; a result without a plan takes an older plan away.

    Raises:
        OckhamError: the folder cannot be written.
    """
    if plan is not None and plan.removed:
        write_bytes(path, plan.to_json().encode())
    else:
        path.unlink(missing_ok=True)


def load_state(path: Path, *, verify: bool = True) -> tuple[str, dict[str, Tensor]]:
    """Builder label and dense state dict of a saved network.

    Args:
        path: the file.
        verify: whether its content is compared with the SHA-256 in it.

    Raises:
        ResultError: the file is missing, damaged, foreign or newer.
    """
    tree = read_tree(path, kind="network", verify=verify)
    try:
        state = {name: unpack(node) for name, node in tree["state"].items()}
        state |= {name: state[source] for name, source in tree["tied"].items()}
        return str(tree["builder"]), state
    except (KeyError, TypeError, AttributeError, RuntimeError, OckhamError) as error:
        raise ResultError(f"{printable(path)}: its network is damaged ({printable(error)})") from error


def load(folder: str | Path, model: nn.Module | None = None, *, verify: bool = True) -> nn.Module:
    """The reduced network of a result folder, in evaluation mode. Nothing in the folder is ever executed.

    Args:
        folder: what `ockham compress` or `Compressed.save` wrote, or a network file alone.
        model: an instance from your own constructor; it gets the weights. Networks of the zoo are built by name. A
            plan in the folder is replayed on it (a copy is returned then); an instance of the small sizes will do, too.
        verify: whether content is compared with the folder's seal; without, presence and sizes are.

    Returns:
        The network; removed weights are exactly zero.

    Raises:
        ResultError: a file is missing, damaged, foreign or newer, or the network is not of the zoo and no model given.
        OckhamError: the weights do not fit the model; names and shapes are listed.
    """
    path, plan, seal = Path(folder), None, None
    if path.is_dir():
        seal = sealed(path, NETWORK, PLAN, verify=verify)
        plan, path = _plan_in(path), inside(path, NETWORK)
    builder, state = load_state(path, verify=verify and seal is None)
    if model is None:
        name = builder.removeprefix("zoo:")
        build = None if name == builder else constructor(name)
        if build is None:
            raise ResultError(
                f"{printable(path)}: this network was built by {printable(repr(builder))}, which is your code and is "
                "not run from a file; pass an instance: ockham.load(folder, model=your_constructor())"
            )
        model = build()
    small = model if plan is None or not fit_error(model, state) else shrink(model, plan)
    names = {name for name, _ in small.named_parameters(remove_duplicate=False)}
    problem = fit_error(small, state) or finite_error(state, names)
    if problem:
        raise OckhamError(f"{printable(path)} does not fit the model: {problem}")
    small.load_state_dict(state)
    evaluated: nn.Module = small.eval()
    return evaluated


def _plan_in(folder: Path) -> Plan | None:
    if not os.path.lexists(folder / PLAN):
        return None
    try:
        return Plan.from_json(read_text(inside(folder, PLAN)))
    except (PlanError, RecursionError) as error:
        raise ResultError(f"{printable(folder / PLAN)}: its plan is damaged or foreign ({printable(error)})") from error


def fit_error(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """What keeps a state dict from fitting a model: names, shapes, dtypes that would lose digits; empty if it fits."""
    own = model.state_dict()
    missing, extra = [n for n in own if n not in state], [n for n in state if n not in own]
    both = [n for n in own if n in state]
    shapes = [f"{n}: {tuple(state[n].shape)} for {tuple(own[n].shape)}" for n in both if state[n].shape != own[n].shape]
    kinds = [
        f"{n}: {state[n].dtype} for {own[n].dtype}"
        for n in both
        if state[n].is_floating_point() is not own[n].is_floating_point()
        or torch.promote_types(state[n].dtype, own[n].dtype) is not own[n].dtype
    ]
    parts = [("missing", missing), ("unknown", extra), ("other shapes", shapes), ("other dtypes", kinds)]
    shown = ((what, [printable(n) for n in names]) for what, names in parts if names)
    return "; ".join(f"{what} {', '.join(names[:6])}{' ...' * (len(names) > 6)}" for what, names in shown)


def finite_error(state: Mapping[str, Tensor], parameters: Collection[str]) -> str:
    """Which tensors hold NaN, or, among the parameters, infinities; empty if none does.

    Args:
        state: tensors by name.
        parameters: names of those that must be finite; buffers may hold infinities (masks of attention do).
    """
    wrong = []
    for name, tensor in state.items():
        if not (tensor.is_floating_point() or tensor.is_complex()) or bool(tensor.sum().isfinite()):
            continue  # one pass without a second tensor; exactly only where it is needed
        bad = ~tensor.isfinite() if name in parameters else tensor.isnan()
        if bool(bad.any()):
            wrong.append(f"{printable(name)} ({int(bad.sum())} of {tensor.numel()})")
    return f"NaN or infinite numbers in {', '.join(wrong[:6])}: a finite network was expected" if wrong else ""


def stored_values(model: nn.Module) -> int:
    """Nonzero learnable values of a network, tied ones once."""
    return sum(int((p != 0).sum()) for p in model.parameters())


def layer_rows(posterior: Posterior, plan: Plan | None = None) -> list[dict[str, Any]]:
    """Per parameter tensor: name, shape and total as they were before the plan, weights kept.

    Where the posterior has inclusion probabilities, also ``expected``: their sum, the expected number of weights.
    """
    shapes = {n: tuple(g.mean.shape) for n, g in posterior.items()} | dict(plan.shapes if plan else {})
    return [
        {"name": n, "shape": list(shapes[n]), "total": math.prod(shapes[n]), "kept": int(g.keep.sum())}
        | ({} if g.inclusion is None else {"expected": float(g.inclusion.double().sum())})
        for n, g in posterior.items()
    ]


WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def save_pretrained(
    model: nn.Module, folder: str | Path, *, plan: Plan | None = None, facts: Mapping[str, Any] | None = None
) -> Path:
    """Write a folder that can be uploaded as it is, ``huggingface_hub.upload_folder(folder_path=folder, ...)``.

    ``model.safetensors`` holds the weights under their own names, dense, tied ones once; ``config.json`` the model's
    configuration, if it has one; ``plan.json`` what was taken out; ``README.md`` a model card.

    A transformers model whose configuration describes its shapes (see `shrink`) loads by its class's
    ``from_pretrained``; every other by its own constructor, ``ockham.shrink(model, ockham.Plan.from_json(text))`` and
    ``safetensors.torch.load_model``.

    Args:
        model: usually a shrunk one.
        folder: made where it is missing.
        plan: the plan it was shrunk by.
        facts: lines of the model card, such as accuracy before and after.

    Returns:
        The folder.

    Raises:
        OckhamError: it cannot be written.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        part = path / f".{WEIGHTS}.{secrets.token_hex(8)}.part"
        save_model(model, str(part), metadata={"format": "pt"})
        part.replace(path / WEIGHTS)
    except OSError as error:
        raise OckhamError(f"cannot write to {path}: {error}") from error
    config = getattr(model, "config", None)
    if config is not None and callable(getattr(config, "to_dict", None)):
        text = json.dumps(config.to_dict(), indent=2, default=str)
        write_bytes(path / CONFIG, text.encode())
    if plan is not None:
        write_bytes(path / PLAN, plan.to_json().encode())
    write_bytes(path / CARD, _card(model, plan, facts or {}).encode())
    return path


def _card(model: nn.Module, plan: Plan | None, facts: Mapping[str, Any]) -> str:
    values = sum(p.numel() for p in model.parameters())
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    lines = ["---", "library_name: ockham", "tags:", "- pruning", "- model-compression", "---", ""]
    lines += [f"# {type(model).__name__}, reduced by evidence", ""]
    lines += [f"* parameters: {values:,}, {zeros / max(1, values):.1%} of them zero"]
    lines += [f"* {name}: {value}" for name, value in facts.items()]
    if plan is not None:
        lines += ["", f"Taken out of the original network (`{PLAN}` replays it):", "", "```", str(plan), "```"]
    lines += ["", "How to load it, in this folder:", "", "```python", *loading_lines(model, plan), "```"]
    return "\n".join(lines) + "\n"


def loading_lines(model: nn.Module, plan: Plan | None) -> list[str]:
    """Three lines of code at most that make the network of a folder of `save_pretrained` again, in that folder."""
    name, module = type(model).__name__, type(model).__module__
    if hasattr(model, "from_pretrained") and says_its_widths(model):
        package = "transformers" if module.startswith("transformers.") else module
        return [f"from {package} import {name}", f'model = {name}.from_pretrained(".")']
    made = f"{name}(...)"  # whose arguments nobody but the user knows
    first = f"import ockham, safetensors.torch; from {module} import {name}  # put its arguments for (...)"
    if plan is not None:
        made = f'ockham.shrink({made}, ockham.Plan.from_json(open("{PLAN}").read()))'
    return [first, f"model = {made}", f'safetensors.torch.load_model(model, "{WEIGHTS}")']


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
            settle_folder(self.out)
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
        if self._saved is not None:  # the run that left them had done all but this
            self._drop_checkpoints()
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

    def _drop_checkpoints(self) -> None:
        for name in CHECKPOINTS:
            (self.out / name).unlink(missing_ok=True)

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
        self._drop_checkpoints()
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
        settle_folder(self.out)
        return seal


@contextmanager
def terminated() -> Iterator[None]:
    """Within, SIGTERM stops as Ctrl-C does (KeyboardInterrupt), so that locks and half-written files are cleared.

    A handler that someone else has set stays, and so does everything outside of the main thread.
    """
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def resume_hint(out: str | Path) -> str:
    """What to say to someone who stopped a run, after its folder was left."""
    if any((Path(out) / name).exists() for name in CHECKPOINTS):
        return f"stopped; the last whole epoch is kept in {printable(out)}. Run the same command with --resume to go on"
    return f"stopped before an epoch was whole; nothing of this run is left in {printable(out)}"


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
    settle_folder(home)
    if not (home / MANIFEST).exists():
        write_bytes(path, content)
        return
    with ResultFolder(home, resume=True) as folder:
        old = read_seal(home / MANIFEST)
        write_bytes(folder.path(path.name), content)
        folder.run = old.run
        folder._put([path.name], old.files, old.job, ())


def first_checkpoint(saved: dict[str, Any] | None, processes: Processes) -> dict[str, Any] | None:
    """The checkpoint that process 0 has, in all processes; they need not see its disk.

    Args:
        saved: what this process has; None where there is none.
        processes: those that go on together.
    """
    if processes.count == 1:
        return saved
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint"
        if saved is not None:
            write_tree(file, saved, kind="checkpoint", durable=False)
        file.write_bytes(processes.told_bytes(b"" if saved is None else file.read_bytes()))
        return read_tree(file, kind="checkpoint") if file.stat().st_size else None
