"""Files of plain values and tensors: written whole or not at all, read within limits."""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
import secrets
import shutil
import stat
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import lru_cache
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ockham.errors import OckhamError, ResultError

__all__ = [
    "TREE_SCHEMA",
    "Count",
    "Share",
    "StoredTensor",
    "afford",
    "checked_shape",
    "free_memory",
    "from_plain",
    "header",
    "inside",
    "open_regular",
    "printable",
    "read_json",
    "read_text",
    "read_toml",
    "read_tree",
    "rest",
    "sync_folder",
    "to_plain",
    "write_bytes",
    "write_json",
    "write_tree",
    "wrong",
]


_HUGE = 1e30  # a number beyond it is damage, and would overflow in a figure
_LONGEST_TEXT, _LONGEST_LIST = 100_000, 1_000_000
_DEEPEST = 8  # levels inside a value whose class says nothing


def wrong(at: str, expected: str, value: Any) -> ResultError:
    """The error of a field that is not what it should be.

    Args:
        at: path of the field, such as "rounds[0].delta_f"; empty for the whole value.
        expected: words for what should be there.
        value: what is there instead.
    """
    return ResultError(f"{at.lstrip('.') or 'the file'}: {expected} expected, got {reprlib.repr(value)[:60]}")


def rest() -> Any:
    """An attribute, a mapping, that takes the keys its class does not name."""
    return field(default_factory=dict, metadata={"rest": True})


def to_plain(value: Any) -> Any:
    """A value as what JSON can hold: objects, lists, texts, finite numbers, true, false and null.

    Raises:
        ResultError: something else lies inside.
    """
    if is_dataclass(value) and not isinstance(value, type):
        found: dict[str, Any] = {}
        for f in fields(value):
            content = getattr(value, f.name)
            if "rest" in f.metadata:
                found |= to_plain(content)
            elif f.default is MISSING or content != f.default:
                found[f.name] = to_plain(content)
        return found
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if abs(value) < _HUGE else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise wrong("", "numbers, texts, lists and tables", value)


def from_plain(kind: Any, value: Any, at: str = "") -> Any:
    """A value of a type, checked; keys that a class does not name are passed over unless it has a `rest`.

    Args:
        kind: a frozen class, or a type made of float, int, str, bool, Any, `Share`, `Count`, tuples, mappings, None.
        value: what `to_plain` made, or JSON.
        at: path of the value, for the error.

    Raises:
        ResultError: a field is missing or wrong; says which, what was expected and what was there.
    """
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return inside[1](value, at)
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in inside:
            return None
        lists = [k for k in inside if get_origin(k) is tuple]
        return from_plain(lists[0] if lists and isinstance(value, list) else inside[0], value, at)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) > _LONGEST_LIST:
            raise wrong(at, "a list", value)
        return tuple(from_plain(inside[0], v, f"{at}[{i}]") for i, v in enumerate(value))
    if origin is not None or is_dataclass(kind):
        if not isinstance(value, dict) or len(value) > _LONGEST_LIST:
            raise wrong(at, "an object", value)
        return (
            _record(kind, value, at)
            if is_dataclass(kind)
            else {_text(k, at): from_plain(inside[1], v, f"{at}.{k}") for k, v in value.items()}
        )
    return _LEAVES[kind](value, at)


def _record(kind: Any, given: Mapping[str, Any], at: str) -> Any:
    hints, found = _hints(kind), {}
    for f in fields(kind):
        if "rest" in f.metadata:
            others = {k: v for k, v in given.items() if k not in hints}
            found[f.name] = from_plain(hints[f.name], others, at)
        elif f.name in given or f.default is MISSING:  # what is missing fails where None does
            found[f.name] = from_plain(hints[f.name], given.get(f.name), f"{at}.{f.name}")
    try:
        return kind(**found)
    except ResultError as error:  # two attributes that do not fit each other
        text, place = str(error), at.lstrip(".")
        whole = text.startswith("the file: ") and place
        raise ResultError(f"{place}: {text[10:]}" if whole else f"{place}.{text}".lstrip(".")) from error


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _number(value: Any, at: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _HUGE:
        raise wrong(at, "a finite number", value)
    return float(value)


def _share(value: Any, at: str) -> float:
    if not -1e-6 <= _number(value, at) <= 1 + 1e-6:  # float32 sums end a little beyond
        raise wrong(at, "a number from 0 to 1", value)
    return min(1.0, max(0.0, float(value)))


def _count(value: Any, at: str) -> int:
    if _number(value, at) < 0 or value != int(value):
        raise wrong(at, "a whole number from 0 on", value)
    return int(value)


def _text(value: Any, at: str) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
        raise wrong(at, "a text", value)
    return value.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _flag(value: Any, at: str) -> bool:
    if not isinstance(value, bool):
        raise wrong(at, "true or false", value)
    return value


def _anything(value: Any, at: str, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise wrong(at, f"at most {_DEEPEST} levels", value)
    if isinstance(value, list):
        return [_anything(v, f"{at}[{i}]", depth + 1) for i, v in enumerate(value)]
    if isinstance(value, dict):
        return {_text(k, at): _anything(v, f"{at}.{k}", depth + 1) for k, v in value.items()}
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        _number(value, at)
        return value
    return _text(value, at)


_LEAVES: dict[Any, Callable[[Any, str], Any]] = {float: _number, int: _count, str: _text, bool: _flag, Any: _anything}

Share = Annotated[float, _share]
"""A number from 0 to 1."""

Count = Annotated[int, _count]
"""A whole number from 0 on."""


TREE_SCHEMA = 1
"""Version of all files that Ockham writes; newer files are refused, older ones read."""

TEXT_LIMIT = 2**28
"""Bytes of the largest JSON or TOML file that is read."""


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part.

    The content goes to a new file of a random name, which no other process and no link can have, and takes the place of
    the old one by one rename. ``durable`` waits for the disk, which also guards against loss of power.

    Raises:
        OckhamError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(temporary, flags | getattr(os, "O_BINARY", 0), 0o666), "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        raise OckhamError(
            f"cannot write {printable(path)}: {error.strerror or error}. Choose a folder you may write to"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can do that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write plain values as JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def printable(text: object) -> str:
    """Text that moves no cursor and sets no title: each control character is written as its escape."""
    shown = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in shown)


class WeighedReader(BufferedReader):
    """A file that asks for no more memory than it weighs, whatever length a header, and so a library, reads from it."""

    def __init__(self, raw: FileIO) -> None:
        super().__init__(raw)
        self.weight = os.fstat(raw.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """So many bytes, or all."""
        return super().read(size if size is None or size < 0 else min(size, self.weight))


def open_regular(path: Path, *, error: type[OckhamError] = ResultError) -> WeighedReader:
    """Open a regular file for reading; a pipe, a device or a folder is refused at once instead of waited for.

    Args:
        path: the file.
        error: class of what is raised.

    Raises:
        OckhamError: of class ``error``: it is something else, or cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as cause:
        raise error(f"{printable(path)}: missing, no such file") from cause
    except (OSError, ValueError) as cause:
        raise error(f"{printable(path)}: cannot be read ({printable(cause)})") from cause
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise error(f"{printable(path)}: is no regular file (a pipe, a device or a folder), and is not read")
    return WeighedReader(FileIO(handle))


def inside(folder: Path, name: str, *, error: type[OckhamError] = ResultError) -> Path:
    """The file of this name in a folder, after a look at where links lead.

    Args:
        folder: the folder.
        name: name of the file in it, or a path below it.
        error: class of what is raised.

    Raises:
        OckhamError: of class ``error``: a link leads out of the folder, or in a circle.
    """
    path = folder / name
    try:
        home, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as cause:
        raise error(f"{printable(path)}: cannot be found ({printable(cause)})") from cause
    if not target.is_relative_to(home):
        raise error(
            f"{printable(path)}: is a link out of its folder, to {printable(target)}; put the file itself there"
        )
    return path


def free_memory() -> float:
    """Bytes that this process could still take without swapping; infinite where the system does not say."""
    found = [math.inf]
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):
        most, used = (Path(f"/sys/fs/cgroup/memory.{n}").read_text(encoding="ascii") for n in ("max", "current"))
        found.append(float(most) - float(used))
    if len(found) == 1 and hasattr(os, "sysconf"):
        with suppress(OSError, ValueError):
            found.append(float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE"))
    return min(found)


def afford(size: int, what: object, *, max_bytes: float | None = None, error: type[OckhamError] = ResultError) -> None:
    """Check a size that a file states against what may be taken, before it is.

    Args:
        size: bytes that would be asked for.
        what: file and field, for the message.
        max_bytes: most that are granted; None: the memory that is free now.
        error: class of what is raised.

    Raises:
        OckhamError: of class ``error``, naming both numbers.
    """
    limit = free_memory() if max_bytes is None else max_bytes
    if size > limit:
        source = "free now" if max_bytes is None else "allowed by max_bytes"
        raise error(
            f"{printable(what)}: asks for {size / 2**20:,.0f} MiB, {limit / 2**20:,.0f} MiB are {source}; raise "
            "max_bytes if the file is right"
        )


def read_text(path: Path) -> str:
    """Text of a regular file of at most 256 MiB.

    Raises:
        ResultError: missing, no regular file, too long, or not UTF-8.
    """
    with open_regular(path) as file:
        content = file.read(TEXT_LIMIT + 1)
    if len(content) > TEXT_LIMIT:
        raise ResultError(f"{printable(path)}: longer than {TEXT_LIMIT >> 20} MiB, which no text of Ockham is")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ResultError(f"{printable(path)}: is not UTF-8 text ({error})") from error


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ResultError: the file is missing, is not JSON, or is nested too deep.
    """
    return _parsed(path, json.loads, "JSON")


def read_toml(path: Path) -> dict[str, Any]:
    """Read TOML.

    Raises:
        ResultError: the file is missing, is not TOML, or is nested too deep.
    """
    table: dict[str, Any] = _parsed(path, tomllib.loads, "TOML")
    return table


def _parsed(path: Path, parse: Callable[[str], Any], kind: str) -> Any:
    try:
        return parse(read_text(path))
    except (ValueError, RecursionError, MemoryError) as error:
        raise ResultError(f"{printable(path)}: not readable as {kind} ({printable(error)})") from error


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
    about = {"schema": TREE_SCHEMA, "kind": kind, "tree": _flatten(tree, "", tensors, set())}
    about["sha256"] = _digest(about, tensors)
    # the library writes a file of its own and renames it: both lie in a folder that is cleared, if not now then later
    room = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        room.mkdir()
        save_file(tensors, room / "new", metadata={"ockham": json.dumps(about)})
        with open(room / "like", "xb") as other:  # what is written by it is for its owner only
            os.chmod(room / "new", stat.S_IMODE(os.fstat(other.fileno()).st_mode))
        if durable:
            with open(room / "new", "r+b") as file:
                os.fsync(file.fileno())
        os.replace(room / "new", path)
        if durable:
            sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise OckhamError(f"cannot write {printable(path)}: {why}. Choose a folder you may write to") from error
    finally:
        shutil.rmtree(room, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a safetensors file that is read a part at a time; nothing of it stays in memory."""

    path: Path
    key: str
    shape: tuple[int, ...]

    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def flat(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Values in row-major order from one place to another, one-dimensional."""
        inner, stop = max(math.prod(self.shape[1:]), 1), self.numel() if stop is None else stop
        with safe_open(str(self.path), framework="pt") as file:  # anew each time: an open file keeps its pages
            if not self.shape:
                return torch.as_tensor(file.get_tensor(self.key)).reshape(1)[start:stop]
            first = start // inner
            rows: Tensor = file.get_slice(self.key)[first : -(-stop // inner)]
            return rows.reshape(-1)[start - first * inner : stop - first * inner]

    def parts(self, size: int = 1 << 20) -> Iterator[Tensor]:
        """All values, `size` of them at a time; one part at least."""
        return (self.flat(i, min(i + size, self.numel())) for i in range(0, max(self.numel(), 1), size))


def read_tree(path: Path, *, kind: str, verify: bool = True, stored: bool = False) -> dict[str, Any]:
    """Read what `write_tree` wrote.

    Args:
        path: the file.
        kind: what it must be.
        verify: compare the content with the SHA-256 in the header (files of earlier versions have none).
        stored: give a `StoredTensor` for every tensor and read none of them into memory.

    Raises:
        ResultError: missing, truncated, tampered with, foreign, of another kind or newer; names the file and why.
    """
    with open_regular(path) as opened:
        afford(0 if stored else os.fstat(opened.fileno()).st_size, path)
    get: Callable[[Any, str], Any] = lambda file, key: (  # noqa: E731
        StoredTensor(path, key, tuple(file.get_slice(key).get_shape())) if stored else file.get_tensor(key)
    )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = (file.metadata() or {}).get("ockham")
            tensors = {key: get(file, key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError, TypeError, OverflowError) as error:
        raise ResultError(f"{printable(path)}: truncated or not a safetensors file ({printable(error)})") from error
    if metadata is None:
        raise ResultError(f"{printable(path)}: a safetensors file, but not written by Ockham (no 'ockham' header)")
    try:
        about = json.loads(metadata)
        schema, found, skeleton = int(about["schema"]), about["kind"], about["tree"]
        strange = about.keys() - {"schema", "kind", "tree", "sha256"}
        if strange and schema <= TREE_SCHEMA:  # perhaps a name that was "sha256"
            raise ValueError(f"unknown field {min(strange)!r}")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise ResultError(f"{printable(path)}: its Ockham header is damaged ({printable(error)})") from error
    if schema > TREE_SCHEMA:
        raise ResultError(
            f"{printable(path)}: written by a newer Ockham (schema {schema}, this one reads up to "
            f"{TREE_SCHEMA}); upgrade"
        )
    if found != kind:
        raise ResultError(f"{printable(path)}: is a {printable(repr(found))} file, a {kind!r} file was expected")
    told = about.pop("sha256", None)
    try:
        tree = _restore(skeleton, tensors)
        intact = not verify or told is None or told == _digest(about, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ResultError(
            f"{printable(path)}: header and tensors do not fit ({printable(error)}); the file was changed"
        ) from error
    if not intact:
        raise ResultError(
            f"{printable(path)}: its content is not what was written (its SHA-256 is another): damaged or changed. "
            "Copy it again from where it is whole, or make it anew"
        )
    if not isinstance(tree, dict):
        raise ResultError(f"{printable(path)}: its header is not a tree")
    return tree


def _digest(about: Mapping[str, Any], tensors: Mapping[str, Tensor | StoredTensor]) -> str:
    """SHA-256 of kind, tree and the bytes of all tensors by name."""
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        parts = tensor.parts() if isinstance(tensor, StoredTensor) else (tensor.contiguous().reshape(-1),)
        for i, part in enumerate(parts):
            if not i:
                found.update(json.dumps([name, str(part.dtype), list(tensor.shape)]).encode())
            found.update(part.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _flatten(value: Any, at: str, tensors: dict[str, Tensor], written: set[int]) -> Any:
    if isinstance(value, Tensor):
        own = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        memory = own.untyped_storage()
        # a part of a memory, or one that is written already; and one number may have any stride
        if memory.nbytes() > own.nbytes or memory.data_ptr() in written or own.numel() == 1:
            own = own.clone(memory_format=torch.contiguous_format)
        written.add(own.untyped_storage().data_ptr())
        tensors[at] = own
        return {"tensor": at}
    if isinstance(value, Mapping):
        pairs = [[key, _flatten(v, f"{at}/{key}", tensors, written)] for key, v in value.items()]
        return {"mapping": pairs}
    if isinstance(value, (list, tuple)):
        return {"list": [_flatten(v, f"{at}/{i}", tensors, written) for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise OckhamError(f"cannot save {at or 'value'}: {type(value).__name__} is neither a tensor nor a plain value")


def _restore(skeleton: Any, tensors: Mapping[str, Any]) -> Any:
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


def checked_shape(sizes: Any) -> tuple[int, ...]:
    """Sizes from a file as a shape.

    Raises:
        ResultError: not a list of whole numbers from 0 on, or more elements than 2^62.
    """
    if not isinstance(sizes, (list, tuple)) or not all(type(n) is int and n >= 0 for n in sizes):
        raise ResultError(f"a shape is a list of whole numbers from 0 on; got {printable(str(sizes)[:60])}")
    if len(sizes) > 64 or math.prod(n or 1 for n in sizes) > 2**62:
        raise ResultError(f"no tensor can have the shape {printable(str(sizes)[:60])}")
    return tuple(sizes)
