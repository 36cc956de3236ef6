"""Nested plain values and tensors in one safetensors file, written atomically and read without executing anything."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ockham.errors import OckhamError, ResultError

__all__ = [
    "SCHEMA",
    "header",
    "pack",
    "pack_mask",
    "read_json",
    "read_tree",
    "unpack",
    "unpack_mask",
    "write_bytes",
    "write_json",
    "write_tree",
]

SCHEMA = 1
"""Version of all files that Ockham writes; newer files are refused, older ones read."""


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part.

    ``durable`` waits for the disk, which also guards against loss of power.

    Raises:
        OckhamError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OckhamError(
            f"cannot write {path}: {error.strerror or error}. Choose a folder you may write to"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write plain values as JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ResultError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultError(f"{path}: not readable as JSON ({error})") from error


def write_tree(path: Path, tree: Mapping[str, Any], *, kind: str, durable: bool = True) -> None:
    """Write a nested mapping of tensors, numbers, strings, booleans, None and lists.

    Args:
        path: the file.
        tree: string or integer keys.
        kind: what the file is ("checkpoint", "network", ...), checked on reading.
        durable: wait for the disk.

    Raises:
        OckhamError: an unsupported value, or the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _flatten(tree, "", tensors)
    header = {"ockham": json.dumps({"schema": SCHEMA, "kind": kind, "tree": skeleton})}
    write_bytes(path, save(tensors, metadata=header), durable=durable)


def read_tree(path: Path, *, kind: str) -> dict[str, Any]:
    """Read what `write_tree` wrote.

    Raises:
        ResultError: missing, truncated, tampered with, foreign, of another kind or newer; names the file and why.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = (file.metadata() or {}).get("ockham")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise ResultError(f"{path}: no such file") from error
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ResultError(f"{path}: truncated or not a safetensors file ({error})") from error
    return _checked(path, metadata, tensors, kind)


def _checked(path: Path, metadata: str | None, tensors: dict[str, Tensor], kind: str) -> dict[str, Any]:
    if metadata is None:
        raise ResultError(f"{path}: a safetensors file, but not written by Ockham (no 'ockham' header)")
    try:
        header = json.loads(metadata)
        schema, found, skeleton = int(header["schema"]), header["kind"], header["tree"]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ResultError(f"{path}: its Ockham header is damaged ({error})") from error
    if schema > SCHEMA:
        raise ResultError(
            f"{path}: written by a newer Ockham (schema {schema}, this one reads up to {SCHEMA}); upgrade"
        )
    if found != kind:
        raise ResultError(f"{path}: is a {found!r} file, a {kind!r} file was expected")
    try:
        tree = _restore(skeleton, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise ResultError(f"{path}: header and tensors do not fit ({error}); the file was changed") from error
    if not isinstance(tree, dict):
        raise ResultError(f"{path}: its header is not a tree")
    return tree


def _flatten(value: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[at] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": at}
    if isinstance(value, Mapping):
        pairs = [[key, _flatten(v, f"{at}/{key}", tensors)] for key, v in value.items()]
        return {"mapping": pairs}
    if isinstance(value, (list, tuple)):
        return {"list": [_flatten(v, f"{at}/{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise OckhamError(f"cannot save {at or 'value'}: {type(value).__name__} is neither a tensor nor a plain value")


def _restore(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    (kind, content), *rest = skeleton.items()
    if rest:
        raise ValueError("more than one entry in a node")
    match kind:
        case "tensor":
            return tensors[content]
        case "mapping":
            return {key: _restore(v, tensors) for key, v in content}
        case "list":
            return [_restore(v, tensors) for v in content]
        case "value":
            return content
    raise ValueError(f"unknown node {kind!r}")


def header(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file, empty if there is none.

    Raises:
        SafetensorError: not a safetensors file.
    """
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata() or {})


def pack_mask(keep: Tensor) -> Tensor:
    """Boolean tensor to uint8 bits, row-major, most significant bit first, padded with zeros."""
    return torch.from_numpy(np.packbits(keep.detach().cpu().contiguous().reshape(-1).numpy()))


def unpack_mask(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The boolean tensor of the given shape.

    Raises:
        ResultError: the number of bits does not fit the shape.
    """
    count = math.prod(shape)
    if bits.dtype is not torch.uint8 or bits.numel() != -(-count // 8):
        raise ResultError(f"a mask of shape {shape} needs {-(-count // 8)} bytes; the file has {bits.numel()}")
    flags = np.unpackbits(bits.numpy(), count=count).astype(bool)
    return torch.from_numpy(flags).view(shape)


def pack(tensor: Tensor, keep: Tensor | None = None) -> dict[str, Any]:
    """Plain tree of a tensor: dense, or shape, bits and values, whichever is smaller.

    Args:
        tensor: any floating tensor.
        keep: which elements to store; default: those that are not zero (a negative zero counts as a value).
    """
    dense = tensor.detach().cpu().contiguous()
    keep = (dense != 0) | torch.signbit(dense) if keep is None and dense.is_floating_point() else keep
    if keep is None:
        return {"dense": dense}
    values = dense[keep.cpu()]
    if values.numel() * dense.element_size() + -(-dense.numel() // 8) >= dense.numel() * dense.element_size():
        return {"dense": dense}
    return {"shape": list(dense.shape), "bits": pack_mask(keep), "values": values}


def unpack(node: Mapping[str, Any]) -> Tensor:
    """The dense tensor, zero where nothing was stored.

    Raises:
        ResultError: bits and values do not fit.
    """
    if "dense" in node:
        tensor = node["dense"]
        if not isinstance(tensor, Tensor):
            raise ResultError("a dense entry holds no tensor")
        return tensor
    keep = unpack_mask(node["bits"], tuple(node["shape"]))
    values: Tensor = node["values"]
    if int(keep.sum()) != values.numel():
        raise ResultError(f"the bitmask marks {int(keep.sum())} values, the file holds {values.numel()}")
    result = torch.zeros(keep.shape, dtype=values.dtype)
    result[keep] = values
    return result
