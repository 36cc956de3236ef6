"""Trained weights as people have them: safetensors, npz, torch files and Hugging Face folders, fitted to a model."""

from __future__ import annotations

import importlib
import io
import itertools
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ockham.core.files import afford, inside, open_regular, printable, read_json
from ockham.errors import OckhamError, ResultError
from ockham.run.folder import NETWORK, finite_error, fit_error, load_state
from ockham.zoo.files import npz_array, npz_names

__all__ = ["PREFIXES", "fitted", "huggingface_model", "read_weights"]

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What `DataParallel`, `torch.compile` and Lightning put before the names of weights."""

TORCH_ENDS = (".pt", ".pth", ".th", ".ckpt", ".bin")
NESTED = ("state_dict", "model_state_dict", "model")
"""Keys under which checkpoints keep the weights."""

HF_WEIGHTS, HF_INDEX = "model.safetensors", "model.safetensors.index.json"


def read_weights(path: str | Path, *, max_bytes: float | None = None) -> dict[str, Tensor]:
    """Weights by name from a file or folder; nothing in it is executed.

    Args:
        path: a .safetensors file (of Ockham, too), an .npz archive, a torch file (read by ``weights_only=True``; the
            weights themselves, or a checkpoint with ``state_dict`` in it), a result folder, or a folder of Hugging Face
            with ``model.safetensors`` or its index of shards.
        max_bytes: most bytes that are read; None: the memory that is free.

    Raises:
        ResultError: missing, damaged, of an unknown kind, too large, or without tensors.
    """
    home = Path(path)
    if home.is_dir():
        if (home / NETWORK).exists():
            return load_state(inside(home, NETWORK))[1]
        return _huggingface_weights(home, max_bytes)
    with open_regular(home) as file:
        afford(os.fstat(file.fileno()).st_size, home, max_bytes=max_bytes)
        start = file.read(8)
    end = home.suffix.lower()
    if end == ".npz":
        return _npz_weights(home, max_bytes)
    if end in TORCH_ENDS or start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return _torch_weights(home)
    return _safetensors_weights(home)


def _safetensors_weights(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(file), framework="pt") as opened:
            if "ockham" not in (opened.metadata() or {}):
                return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, OverflowError, MemoryError) as error:
        raise ResultError(
            f"{printable(file)}: not readable as weights ({printable(error)}); safetensors, npz and torch files are"
        ) from error
    return load_state(file)[1]


def _npz_weights(file: Path, max_bytes: float | None) -> dict[str, Tensor]:
    names = npz_names(file)
    try:
        with open_regular(file) as stream, zipfile.ZipFile(stream) as archive:
            weight = os.fstat(stream.fileno()).st_size
            arrays = {n: npz_array(archive, f"{n}.npy", file, weight, max_bytes) for n in names}
            return {n: torch.from_numpy(np.array(a)) for n, a in sorted(arrays.items())}
    except OckhamError:
        raise
    except Exception as error:  # damaged archives make zipfile, zlib and numpy raise a dozen kinds
        raise ResultError(f"{printable(file)}: not readable as npz ({printable(error)})") from error


def _torch_weights(file: Path) -> dict[str, Tensor]:
    """A torch file through the restricted unpickler, after a look at the sizes in its archive."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(i.compress_type != zipfile.ZIP_STORED for i in archive.infolist()):
                    raise ResultError(f"{printable(file)}: has compressed parts, which torch.save never writes")
            found = torch.load(file, map_location="cpu", weights_only=True)
        else:  # of torch before 1.6: its unpickler asks a file for any length, the bytes in memory for what is there
            with open_regular(file) as stream:
                found = torch.load(io.BytesIO(stream.read()), map_location="cpu", weights_only=True)
    except ResultError:
        raise
    except Exception as error:  # the unpickler passes on what damaged files make of it
        said = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).partition("\n")[0][:200]  # torch writes some words bold
        why = printable(f"{type(error).__name__}: {said}")
        raise ResultError(
            f"{printable(file)}: not readable by torch.load(weights_only=True) ({why}). Load it where you trust it, "
            "and save model.state_dict() by safetensors.torch.save_file"
        ) from error
    for key in NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(k, str) for k in found):
        raise ResultError(f"{printable(file)}: holds no weights by name, but a {type(found).__name__}")
    wrong = [k for k, v in found.items() if not isinstance(v, Tensor) or v.layout is not torch.strided]
    if wrong:
        kind = type(found[wrong[0]]).__name__
        raise ResultError(
            f"{printable(file)}: {printable(wrong[0])} is no dense tensor, but {kind}. Save the weights alone, by "
            "torch.save(model.state_dict(), file), or under 'state_dict'"
        )
    spread = [k for k, v in found.items() if v.numel() * v.element_size() > v.untyped_storage().nbytes()]
    if spread:
        raise ResultError(f"{printable(file)}: {printable(spread[0])} claims more numbers than the file holds")
    return dict(found)


def _huggingface_weights(folder: Path, max_bytes: float | None) -> dict[str, Tensor]:
    if os.path.lexists(folder / HF_WEIGHTS):
        return read_weights(inside(folder, HF_WEIGHTS), max_bytes=max_bytes)
    index = inside(folder, HF_INDEX)
    if not index.exists():
        raise ResultError(f"{printable(folder)}: no weights; expected {NETWORK}, {HF_WEIGHTS} or {HF_INDEX}")
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(v, str) and Path(v).name == v for v in shards.values()):
        raise ResultError(f"{printable(index)}: damaged; weight_map must name the file of each tensor")
    state: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        if not os.path.exists(folder / shard):
            raise ResultError(f"{printable(index)}: names {printable(shard)}, which is not there")
        state |= _safetensors_weights(inside(folder, shard))
    lack = [name for name in shards if name not in state]
    if lack:
        raise ResultError(f"{printable(index)}: names {printable(lack[0])} in {shards[lack[0]]}, which lacks it")
    return state


def fitted(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Weights under the model's own names, complete, with what had to be done to them.

    A prefix that all names share with what a wrapper puts there (`PREFIXES`) is taken off, or put on where the model is
    the wrapped one; missing counts of batches (``num_batches_tracked``, in files from before torch 0.4.1) become zero;
    tied tensors that the file holds once are given to all their names.

    Args:
        model: the model that shall get the weights.
        state: tensors by name.

    Returns:
        The state dict for ``model.load_state_dict``, and sentences on what was done.

    Raises:
        OckhamError: they do not fit; names, shapes and dtypes are listed. Or they are not finite.
    """
    own, found, notes = model.state_dict(), dict(state), list[str]()
    chains = ["".join(parts) for depth in range(1, 4) for parts in itertools.product(PREFIXES, repeat=depth)]
    bare = {c: {n.removeprefix(c): t for n, t in state.items() if n.startswith(c)} for c in chains}
    worn = {c: {c + n: t for n, t in state.items()} for c in chains}
    off, on = (max(chains, key=lambda c: len(own.keys() & named[c].keys())) for named in (bare, worn))
    here, without, under = (len(own.keys() & names.keys()) for names in (found, bare[off], worn[on]))
    if without > max(here, under):
        lost = [n for n in state if not n.startswith(off)]
        said = f"; left out, as they lack it: {printable(', '.join(lost[:6]))}" if lost else ""
        notes.append(f"the prefix {off!r} was taken off {len(bare[off])} names{said}")
        found = bare[off]
    elif under > here:
        notes.append(f"the prefix {on!r} was put before {len(state)} names")
        found = worn[on]
    counts = [n for n in own if n not in found and n.endswith("num_batches_tracked")]
    if counts:
        found |= {n: torch.zeros_like(own[n]) for n in counts}
        notes.append(f"{len(counts)} counts of batches (num_batches_tracked) are not in the file and start at 0")
    homes = {(t.data_ptr(), t.shape): n for n, t in own.items() if n in found and t.numel()}
    places = {n: (t.data_ptr(), t.shape) for n, t in own.items() if n not in found}
    found |= {n: found[homes[place]] for n, place in places.items() if place in homes}
    rounded = [
        n for n, t in found.items() if n in own and t.is_floating_point() and own[n].is_floating_point()
        and torch.promote_types(t.dtype, own[n].dtype) is not own[n].dtype
    ]  # fmt: skip
    if rounded:
        kinds = f"{found[rounded[0]].dtype} to {own[rounded[0]].dtype}"
        notes.append(f"{len(rounded)} tensors are rounded from {kinds}, as the model has it")
        found |= {n: found[n].to(own[n].dtype) for n in rounded}
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    problem = fit_error(model, found) or finite_error(found, names)
    if problem:
        raise OckhamError(f"the weights do not fit the model: {problem}")
    return {name: found[name] for name in own}, tuple(notes)


def huggingface_model(folder: str | Path, *, max_bytes: float | None = None) -> nn.Module:
    """The model of a folder that ``save_pretrained`` of transformers wrote, by the class that its configuration names.

    Only classes of the installed transformers, weights of safetensors, and files of the folder are used.

    Args:
        folder: the folder.
        max_bytes: most bytes of a file of weights; None: the memory that is free.

    Raises:
        ResultError: no configuration, an unknown class, or weights that do not fit.
        OckhamError: transformers is not installed.
    """
    home = Path(folder)
    content = read_json(inside(home, "config.json"))
    names = content.get("architectures") if isinstance(content, dict) else None
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else "none"
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise OckhamError(f"hf:{printable(home)} needs transformers; pip install transformers") from error
    kind = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ResultError(
            f"{printable(home)}/config.json: names the architecture {printable(repr(name))}, which transformers "
            f"{transformers.__version__} does not have"
        )
    read_weights(home, max_bytes=max_bytes)
    try:
        model, read = getattr(transformers, name).from_pretrained(
            home, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        raise ResultError(
            f"{printable(home)}: transformers cannot build {name} from it ({printable(error)})"
        ) from error
    if read["missing_keys"]:
        lack = ", ".join(sorted(read["missing_keys"])[:6])
        raise ResultError(f"{printable(home)}: lacks weights of {name}, which would be random ({printable(lack)})")
    found: nn.Module = model
    return found
