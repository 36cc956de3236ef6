"""What of a network is there and takes part: training modes, names, what the user fixed; how far a pass over it is."""

from __future__ import annotations

import copy
import ctypes
import difflib
import os
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from ockham.core.processes import ALONE, Processes, whole
from ockham.errors import OckhamError, OckhamWarning, first_line

__all__ = [
    "Entry",
    "Ignore",
    "PruneProgress",
    "check_module",
    "check_network",
    "copied",
    "device_of",
    "evaluating",
    "fixed_entries",
    "frozen_modules",
    "ignored",
    "keeping_modes",
    "listening",
    "map_parameters_",
    "mapped",
    "parse_device",
    "protected_names",
    "release",
    "seeded",
    "teller",
    "train_",
    "trim",
    "unwrapped",
    "watched",
]


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter; the CPU for a network without parameters."""
    check_module(model)
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def check_module(model: Any) -> None:
    """Raise where something else than an instance of `torch.nn.Module` is given as a network.

    Raises:
        OckhamError: says what was got.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type):
        raise OckhamError(
            f"the network must be an instance; got the class {model.__name__}: call it, {model.__name__}(...)"
        )
    raise OckhamError(f"the network must be a torch.nn.Module; got {type(model).__name__}")


def check_network(model: nn.Module, *, meta: bool = False, values: bool = True) -> None:
    """Check that a network can be worked with at all, before anything is done with it.

    Args:
        model: the network, or what was given for one.
        meta: permission for tensors of the device "meta", which have no values.
        values: check of the values too: there are parameters, all are finite, and gradients can be taken.

    Raises:
        OckhamError: it is no `torch.nn.Module`, is TorchScript, lies on the device "meta", waits for its first input
            to know its sizes, has no parameters or such that are not finite, or runs in `torch.inference_mode`; says
            what to do instead.
    """
    check_module(model)
    scripted = next((n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise OckhamError(
            f"{repr(scripted) + ' in the network' if scripted else 'the network'} is TorchScript, whose parameters "
            "cannot be edited: put in the nn.Module that it was made from, and script the result"
        )
    states: tuple[tuple[Callable[[Any], bool], str], ...] = (
        (
            nn.parameter.is_lazy,
            "are of Lazy modules and have no sizes yet: call the network once with an example first",
        ),
        (
            lambda t: t.is_meta and not meta,
            "lie on the device 'meta', which holds shapes and no values: load the weights first "
            "(model.to_empty(device=...), then load_state_dict)",
        ),
    )
    for without, way_out in states:
        names = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if without(t)]
        if names:
            raise OckhamError(f"{names[0]!r} and {len(names) - 1} more tensors {way_out}")
    if not values:
        return
    if next(model.parameters(), None) is None:
        packed = [n for n, m in model.named_modules() if "quantized" in type(m).__module__]
        why = f": {packed[0]!r} is quantized; pass the network before that" if packed else ""
        raise OckhamError(f"the model has no parameters{why}")
    for name, p in model.named_parameters():  # one pass without a second tensor; exactly only where it is needed
        if not p.detach().sum().isfinite() and (bad := int((~p.detach().isfinite()).sum())):
            raise OckhamError(f"parameter {name!r} is NaN or infinite in {bad} of {p.numel()} places: load it again")
    if torch.is_inference_mode_enabled():
        raise OckhamError("gradients are needed and torch.inference_mode() is on: leave that block")


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a network, to be changed at will.

    Args:
        model: the network.
        memo: copies that are made already, by `id` of the original, as `copy.deepcopy` takes them; with them the
            network is not checked.

    Raises:
        OckhamError: it cannot be worked with (see `check_network`), or not be copied.
    """
    if memo is None:
        check_network(model)
    made = {} if memo is None else memo
    for module in model.modules() if isinstance(model, nn.Module) else ():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):  # its product is made anew before every call, and is no leaf
                weight = getattr(module, hook._tensor_name)
                made[id(weight)] = weight.detach().clone()
    try:
        return copy.deepcopy(model, made)
    except Exception as error:  # whatever a module of the user's raises
        raise OckhamError(
            f"the network cannot be copied ({type(error).__name__}: {first_line(error)}): it holds something "
            "else than parameters and buffers. After the old torch.nn.utils.weight_norm or spectral_norm, use those of "
            "torch.nn.utils.parametrizations, or take them off (torch.nn.utils.remove_weight_norm)"
        ) from error


@torch.no_grad()
def mapped(values: Tensor, folder: Path, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of a tensor of the CPU in a mapped file: memory holds it while it is used, the disk when it is not.

    The file has no name once it is mapped, so nothing is left of it after the process. On Windows, which does not allow
    that, the copy lies in memory.

    Args:
        values: the tensor.
        folder: place for the file.
        dtype: dtype of the copy; None: that of ``values``.

    Raises:
        OckhamError: there is no room on the disk, or the folder cannot be written.
    """
    dtype = dtype or values.dtype
    size = values.numel() * dtype.itemsize
    if not size or os.name == "nt":
        return values.to(dtype, copy=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_MAPPED, dir=folder)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size)  # to write where the disk has no room would end the process
            elif shutil.disk_usage(folder).free < size:
                raise OSError("no space left")
            storage = torch.UntypedStorage.from_file(name, True, size)
        finally:
            os.close(handle)
            with suppress(OSError):
                os.unlink(name)
    except (OSError, RuntimeError) as error:
        raise OckhamError(
            f"cannot lay {size / 2**20:,.0f} MiB into a file in {folder} ({first_line(error)}): make room there, or "
            "choose another folder"
        ) from error
    found = torch.empty(0, dtype=dtype)
    found.set_(storage, 0, values.shape)  # type: ignore[call-overload]
    release(found.copy_(values))
    return found


_MAPPED = "ockham-mapped-"  # how the names of their files begin
_DONTNEED = 4  # of Linux's madvise


def release(values: Tensor) -> None:
    """Let memory go that holds a tensor of `mapped`: the file has it, and it is read again where it is used.

    The system would take that memory when it needs it, but until then it counts for the process.
    """
    storage = values.untyped_storage()
    if sys.platform == "linux" and storage.nbytes() and Path(storage.filename or "").name.startswith(_MAPPED):
        # those are shared mappings, of which pages that were written stay with the file; private ones would lose them
        ctypes.CDLL(None).madvise(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), _DONTNEED)


def trim() -> None:
    """Give memory back that was freed and that the C library keeps between what is still in use (glibc)."""
    found = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if found is not None:
        found(0)


def map_parameters_(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Let the parameters lie in mapped files, in place, so that a network need not fit into memory (`mapped`).

    Args:
        model: network on the CPU; parameters that are one memory seen the same way stay so, others than floating ones
            stay as they are.
        folder: place for the files.
        dtype: dtype of the parameters afterwards, and of the floating buffers, which stay in memory; those that are
            made anew with a network, such as frequencies, are not rounded to it.

    Raises:
        OckhamError: there is no room on the disk, or the folder cannot be written.
    """
    placed: dict[tuple[Any, ...], Tensor] = {}
    for p in model.parameters():
        if p.is_floating_point():
            place = p.data_ptr(), p.shape, p.stride(), p.dtype
            if place not in placed:
                placed[place] = mapped(p.detach(), folder, dtype)
            p.data = placed[place]
    kept = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and (name in kept or dtype.itemsize > buffer.dtype.itemsize):
            buffer.data = buffer.data.to(dtype)


def frozen_modules(model: nn.Module) -> set[nn.Module]:
    """Modules that have parameters of which none requires a gradient, and all that is inside them."""
    check_module(model)
    found: set[nn.Module] = set()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            found.update(module.modules())
    return found


def train_(model: nn.Module) -> nn.Module:
    """Training mode, in place, but evaluation mode for what is wholly frozen: its dropout and statistics stay out."""
    model.train()
    for module in frozen_modules(model):
        module.training = False
    return model


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside the block, every module is in its own training or evaluation mode again after it."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode inside the block, every module's own mode again after it.

    Yields:
        The device of the network.
    """
    with keeping_modes(model):
        model.eval()
        yield device_of(model)


@contextmanager
def seeded(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Global randomness of (seed, epoch) inside the block, the old state after it: torch's, NumPy's and Python's."""
    devices = [device] if device.type == "cuda" else []
    number, others = (seed * 1_000_003 + epoch * 7919 + 17) % 2**63, (random.getstate(), np.random.get_state())
    with torch.random.fork_rng(devices=devices):
        try:
            torch.manual_seed(number)
            random.seed(number)
            np.random.seed(number % 2**32)
            yield
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])


_PADDED = (nn.Embedding, nn.EmbeddingBag)


def fixed_entries(model: nn.Module) -> dict[str, Tensor]:
    """Which weights the network itself never trains, as boolean masks (True = fixed).

    Fixed are the row ``padding_idx`` of `torch.nn.Embedding` and `torch.nn.EmbeddingBag`, and the entries where a mask
    of `torch.nn.utils.prune` is zero: a buffer ``<name>_mask`` beside the parameter ``<name>_orig``. A buffer
    ``<name>_mask`` of zeros and ones beside the parameter ``<name>`` itself, the usual form of home-made masks, counts
    where the weights are zero already. A parameter that several modules share is fixed only where all of them say so.

    Args:
        model: any network; it is not changed.

    Returns:
        Mask of the parameter's shape by parameter name; parameters without a fixed entry are left out.

    Raises:
        OckhamError: a parameter of a Lazy module has no shape yet.

    >>> fixed_entries(nn.Sequential(nn.Embedding(4, 2, padding_idx=3)))["0.weight"].tolist()
    [[False, False], [False, False], [False, False], [True, True]]
    """
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise OckhamError(f"parameter {name!r} has no shape yet (a Lazy module): call the network on a batch first")
    claims: dict[Tensor, list[Tensor | None]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                claims.setdefault(parameter, []).append(_claim(module, name, parameter))
    found = {}
    for name, parameter in model.named_parameters():
        masks = [mask for mask in claims[parameter] if mask is not None]
        if len(masks) == len(claims[parameter]) and bool((fixed := torch.stack(masks).all(0)).any()):
            found[name] = fixed
    return found


@torch.no_grad()
def _claim(module: nn.Module, name: str, parameter: Tensor) -> Tensor | None:
    """What one module says of its parameter; None where it fixes nothing."""
    if isinstance(module, _PADDED) and name == "weight" and module.padding_idx is not None:
        fixed = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
        fixed[module.padding_idx] = True
        return fixed
    mask = module._buffers.get(f"{name.removesuffix('_orig')}_mask")
    if mask is None or mask.shape != parameter.shape or not bool(((mask == 0) | (mask == 1)).all()):
        return None
    fixed = (mask == 0).to(parameter.device)
    return fixed if name.endswith("_orig") else fixed & (whole(parameter.detach()) == 0).to(fixed.device)


Entry = str | type[nn.Module] | nn.Module | Tensor
"""A name of a parameter or module, a "re:" pattern on names, a module type, a module, or a parameter."""

Ignore = Iterable[Entry] | Entry
"""Parameters to protect: one `Entry`, or several."""


def ignored(model: nn.Module, entries: Ignore, *, buffers: bool = False) -> frozenset[str]:
    """Names of the parameters that ``entries`` cover.

    Args:
        model: whose parameters they are; names may be those of tied parameters or of modules inside it, "" is all.
        entries: one entry or several; a single string is one entry and not its letters.
        buffers: whether names and patterns cover buffers, too.

    Returns:
        Names as `named_parameters` has them: a tied parameter under its first name.

    Raises:
        OckhamError: an entry covers nothing (the nearest names are given), is of another type, or is a pattern that is
            no regular expression; or the network cannot be worked with (see `check_network`).

    >>> sorted(ignored(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "0"))
    ['0.bias', '0.weight']
    """
    check_network(model, meta=True, values=False)
    first: dict[Tensor, str] = {}
    every: dict[str, str] = {}
    pairs = list(model.named_parameters(remove_duplicate=False))
    for name, p in [*pairs, *(model.named_buffers(remove_duplicate=False) if buffers else ())]:
        every[name] = first.setdefault(p, name)
    single = isinstance(entries, (str, type, nn.Module, Tensor))
    several: list[Any] = [entries] if single else list(entries)  # type: ignore[arg-type]
    found: set[str] = set()
    for entry in several:
        names = _covered(model, entry, every, first)
        if not names:
            kind = entry if isinstance(entry, type) else type(entry)
            shown = repr(entry) if isinstance(entry, str) else kind.__name__
            if isinstance(entry, Tensor):
                shown = f"parameter of shape {tuple(entry.shape)}"
            raise OckhamError(f"ignore entry {shown} matches no parameter{_near(model, entry, every)}")
        found |= names
    return frozenset(found)


def protected_names(model: nn.Module, ignore: Ignore) -> frozenset[str]:
    """Names of the parameters that lose no single weights.

    They are what ``ignore`` covers, and what stands behind a parametrisation (`torch.nn.utils.parametrize`) through
    which zeros do not pass: a row of zeros under ``weight_norm`` is 0 / 0, and ``orthogonal`` fills it again.

    Args:
        model: whose parameters they are.
        ignore: what else to protect.

    Raises:
        OckhamError: as `ignored`.

    Warns:
        OckhamWarning: a parametrisation keeps its parameters whole; names the first and the way out.
    """
    held = ignored(model, ignore)
    names = [
        f"{where}.parametrizations.{tensor}".lstrip(".")
        for where, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for tensor, parts in module.parametrizations.items()
        if not _passes_zeros(parts)
    ]
    inside = {n for n, _ in model.named_parameters() if n.rpartition(".")[0] in names}
    if inside - held:
        module, _, tensor = names[0].rpartition(".parametrizations.")
        warnings.warn(
            f"{len(names)} parametrised tensors keep all their weights ({names[0]}, ...), since zeros do not pass "
            "through their parametrisation. To remove weights of them, take it off first: "
            f"torch.nn.utils.parametrize.remove_parametrizations(model.get_submodule({module!r}), {tensor!r})",
            OckhamWarning,
            stacklevel=3,
        )
    return held | inside


@torch.no_grad()
def _passes_zeros(parts: nn.Module) -> bool:
    """Whether zeros of the parameters behind one parametrised tensor are zeros of the tensor."""
    twin = copy.deepcopy(parts).eval()
    made = twin()
    originals = [p for p in twin.parameters(recurse=False) if p.shape == made.shape]
    for p in originals:
        p[:1] = 0.0
        p.view(-1)[::2] = 0.0
    made = twin()
    return bool(made.isfinite().all()) and all(not bool(made[p == 0].any()) for p in originals)


def _covered(model: nn.Module, entry: Any, every: dict[str, str], first: dict[Tensor, str]) -> set[str]:
    if isinstance(entry, Tensor):
        return {name for p, name in first.items() if p is entry}
    if isinstance(entry, nn.Module):
        inside = {first[p] for p in (*entry.parameters(), *entry.buffers()) if p in first}
        return inside if any(m is entry for m in model.modules()) else set()
    if isinstance(entry, type) and issubclass(entry, nn.Module):
        return {first[p] for m in model.modules() if isinstance(m, entry) for p in m.parameters()}
    if not isinstance(entry, str):
        raise OckhamError(
            f"ignore takes names, 're:' patterns, module types, modules and parameters; got {entry!r} "
            f"({type(entry).__name__})"
        )
    if entry.startswith("re:"):
        try:
            pattern = re.compile(entry[3:])
        except re.error as error:
            raise OckhamError(f"ignore pattern {entry!r} is not a regular expression: {error}") from error
        return {own for name, own in every.items() if pattern.search(name)}
    return {own for name, own in every.items() if entry in ("", name) or name.startswith(entry + ".")}


def _near(model: nn.Module, entry: Any, every: dict[str, str]) -> str:
    if isinstance(entry, str) and not entry.startswith("re:"):
        known = [*every, *(n for n, m in model.named_modules() if n and any(True for _ in m.parameters()))]
        close = difflib.get_close_matches(entry, known, n=3, cutoff=0.5)
        if close:
            return f"; did you mean {', '.join(map(repr, close))}?"
    return f"; there are {', '.join(list(every)[:8])}{', ...' if len(every) > 8 else ''}"


def unwrapped(model: nn.Module) -> tuple[nn.Module, Processes]:
    """The network inside `DistributedDataParallel` and the processes that hold it; any other network and `ALONE`.

    Raises:
        OckhamError: the parameters are sharded over processes (FSDP), or it is no network.
    """
    check_network(model, meta=True, values=False)
    for name, p in model.named_parameters():
        if hasattr(p, "device_mesh") or type(p).__name__ == "FlatParameter":
            raise OckhamError(
                f"parameter {name!r} is sharded over processes (FSDP): whole tensors are needed here. Wrap the network "
                "in DistributedDataParallel instead"
            )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module, Processes(model.process_group)
    return model, ALONE


def parse_device(name: str) -> torch.device:
    """A torch device that is there.

    Raises:
        OckhamError: unknown, or not on this machine.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OckhamError(f"--device {name}: not on this machine ({first_line(error)}); try cpu") from error
    return device


_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class PruneProgress:
    """How far a long piece of work is.

    Attributes:
        stage: name of what is being done: "curvature", "eigenvectors", "planning", "damping", "units" or "reduction".
        done: number of steps done of it: batches, cases, matrices, rounds or blocks.
        total: number of its steps.
        seconds: time since the stage began.
    """

    stage: str
    done: int
    total: int
    seconds: float

    @property
    def left(self) -> float:
        """Seconds until the stage ends, at the pace so far."""
        return self.seconds / max(1, self.done) * (self.total - self.done)


_LISTENER: ContextVar[Callable[[PruneProgress], None] | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Callable[[PruneProgress], None] | None) -> Iterator[None]:
    """Long passes inside (curvature, eigenvectors, planning) tell `listener` how far they are; None changes nobody."""
    token = _LISTENER.set(listener or _LISTENER.get())
    try:
        yield
    finally:
        _LISTENER.reset(token)


def teller(stage: str) -> Callable[[int, int], None]:
    """A function (done, total) that tells who is `listening` how far a stage is that begins now."""
    listener, began = _LISTENER.get(), time.perf_counter()

    def tell(done: int, total: int) -> None:
        if listener is not None:
            listener(PruneProgress(stage, min(done, total), total, time.perf_counter() - began))

    return tell


def watched(items: Iterable[_Item], stage: str, of: object) -> Iterator[_Item]:
    """Yield the items, and tell who is `listening` when each is done.

    Args:
        items: steps of the work.
        stage: name of the work.
        of: number of steps, or what has a length; without one (an `IterableDataset`) nothing is told.
    """
    tell, total = teller(stage), of if isinstance(of, int) else None
    if total is None and isinstance(of, Sized):
        with suppress(TypeError):  # a DataLoader of an IterableDataset
            total = len(of)
    for done, item in enumerate(items, 1):
        yield item
        if total is not None:
            tell(done, total)
