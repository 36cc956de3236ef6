"""Mutated files to every reader, seeds fixed: an error of Ockham or the right value, soon, and for little memory.

``python tests/files/test_fuzz.py --inputs 10000 --seed 0`` is what ``tools/fuzz`` runs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ockham
from ockham.cli.app import read_config
from ockham.core.files import read_tree, write_tree
from ockham.core.posterior import Gaussian, Posterior
from ockham.core.seal import FolderLock, holder_of, sealed
from ockham.run.engine import Compressed
from ockham.run.folder import ResultFolder, save_network
from ockham.run.schema import read_result
from ockham.run.weights import read_weights
from ockham.zoo.data import load_folder

SECONDS, MEBIBYTES = 5, 256
"""Most time and memory that one mutated file may cost, memory beyond four times its size."""


class Reader(NamedTuple):
    """One reader.

    Attributes:
        make: writes whole files into an empty folder.
        read: reads the folder; the value is comparable.
        files: names of those to be mutated.
        exact: whether a mutated file must be refused, or give the very same value.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    exact: bool = False


# ---- readers


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    with torch.no_grad():
        net[0].weight[torch.rand(16, 6) < 0.7] = 0
    return net


def posterior(net: nn.Module) -> Posterior:
    moments = {}
    for name, p in net.named_parameters():
        keep = p.detach() != 0
        precision = torch.where(keep, 2.0, torch.inf)
        moments[name] = Gaussian(p.detach().clone(), precision, torch.tensor(1.0), torch.tensor(0.0), keep)
    return Posterior(moments, 100.0, 1.0, "test")


def as_bytes(value: Any) -> Any:
    """Tensors as bytes, the rest as it is, so that equal means equal to the bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {k: as_bytes(v) for k, v in value.items()}
    return [as_bytes(v) for v in value] if isinstance(value, (list, tuple)) else value


def moments(found: Posterior) -> Any:
    return as_bytes({n: [g.mean, g.precision, g.prior_precision, g.keep] for n, g in found.items()})


def make_network(folder: Path) -> None:
    save_network(network(), folder / "network.safetensors", builder="user")


def make_result(folder: Path) -> None:
    net = network()
    Compressed(net, posterior(net), (), (), None, None).save(folder)


def make_sealed(folder: Path) -> None:
    with ResultFolder(folder) as out:
        out.path("metrics.json").write_text('{"kept": 0.5}')
        out.path("network.safetensors").write_bytes(b"not looked into")
        out.commit(job="a job")


def make_checkpoint(folder: Path) -> None:
    tree = {"state": {0: {"step": 3, "noise": torch.ones(9, dtype=torch.half)}}, "list": [1, 2.5, None, "x", True]}
    write_tree(folder / "c.safetensors", tree, kind="checkpoint")


def replay(folder: Path) -> Any:
    plan = ockham.Plan.from_json((folder / "plan.json").read_text("latin1"))
    return as_bytes(list(ockham.shrink(network(), plan).state_dict().values()))


def make_plan(folder: Path) -> None:
    groups = ockham.trace(network(), torch.randn(4, 6))
    plan = ockham.random_plan(groups, 0.5, generator=torch.Generator().manual_seed(0))
    (folder / "plan.json").write_text(plan.to_json())


def make_records(folder: Path) -> None:
    shutil.copytree(Path(__file__).parents[1] / "report" / "data" / "structure", folder, dirs_exist_ok=True)


RNG = np.random.default_rng(0)
PIXELS, LABELS = RNG.integers(0, 256, (20, 8, 8), dtype=np.uint8), (np.arange(20) % 4).astype(np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{array.ndim + 1}i", 2048 + array.ndim, *array.shape) + array.tobytes()


def make_idx(folder: Path) -> None:
    (folder / "train-images-idx3-ubyte").write_bytes(idx(PIXELS))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(LABELS))


def make_idx_gz(folder: Path) -> None:
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(PIXELS)))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS)))


def make_sheets(folder: Path) -> None:
    from PIL import Image

    sheet = RNG.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8).reshape(-1, 8, 3)
    Image.fromarray(sheet).save(folder / "train_000.webp", lossless=True)
    np.save(folder / "train_labels.npy", LABELS)
    (folder / "classes.txt").write_text("a\nb\nc\nd\n")


def make_images(folder: Path) -> None:
    from PIL import Image

    for name, end in (("cat", "png"), ("dog", "jpg"), ("elk", "bmp"), ("fox", "tiff")):
        (folder / name).mkdir()
        for i in range(5):
            Image.fromarray(PIXELS[i]).save(folder / name / f"{i}.{end}")


def make_table(folder: Path) -> None:
    rows = [f"{i},{i * 0.5},{'red' if i % 2 else 'green'},{i % 3}" for i in range(20)]
    (folder / "data.csv").write_text("\n".join(["a,b,colour,target", *rows]) + "\n")


def make_weights(folder: Path) -> None:
    state = network().state_dict()
    save_file(state, folder / "w.safetensors")
    np.savez_compressed(folder / "w.npz", **{n: t.numpy() for n, t in state.items()})
    torch.save({"state_dict": state}, folder / "w.pt")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)


def make_huggingface(folder: Path) -> None:
    state = network().state_dict()
    save_file(state, folder / "shard-1.safetensors")
    index = {"weight_map": dict.fromkeys(state, "shard-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_config(folder: Path) -> None:
    (folder / "c.toml").write_text('epochs = 3\nignore = ["0.weight", "re:bias"]\nout = "o"\nlearning-rate = 1e-3\n')


def dataset(folder: Path) -> Any:
    found = load_folder(folder)
    return as_bytes([found.train_x, found.train_y, found.test_x, found.test_y])


READERS = {
    "network": Reader(
        make_network,
        lambda f: as_bytes(ockham.load(f, model=network()).state_dict()),
        ("network.safetensors",),
        exact=True,
    ),
    "posterior": Reader(
        lambda f: posterior(network()).save(f / "p.safetensors"),
        lambda f: moments(ockham.load_posterior(f / "p.safetensors")),
        ("p.safetensors",),
        exact=True,
    ),
    "result": Reader(
        make_result,
        lambda f: (as_bytes(ockham.load(f, model=network()).state_dict()), moments(ockham.load_posterior(f))),
        ("network.safetensors", "posterior.safetensors", "manifest.json"),
        exact=True,
    ),
    "seal": Reader(make_sealed, sealed, ("manifest.json", "metrics.json", "network.safetensors"), exact=True),
    "checkpoint": Reader(
        make_checkpoint,
        lambda f: as_bytes(read_tree(f / "c.safetensors", kind="checkpoint")),
        ("c.safetensors",),
        exact=True,
    ),
    "plan": Reader(
        make_plan,
        replay,
        ("plan.json",),
        exact=True,
    ),
    "records": Reader(
        make_records,
        read_result,
        ("metrics.json", "history.json", "analysis.json", "structure.json", "result.json"),
    ),
    "idx": Reader(make_idx, dataset, ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")),
    "idx.gz": Reader(make_idx_gz, dataset, ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")),
    "npz": Reader(lambda f: np.savez(f / "train.npz", x=PIXELS, y=LABELS), dataset, ("train.npz",)),
    "deflated npz": Reader(lambda f: np.savez_compressed(f / "data.npz", x=PIXELS, y=LABELS), dataset, ("data.npz",)),
    "sheets": Reader(make_sheets, dataset, ("train_000.webp", "train_labels.npy", "classes.txt")),
    "images": Reader(make_images, dataset, ("cat/1.png", "dog/2.jpg", "elk/3.bmp", "fox/4.tiff")),
    "table": Reader(make_table, dataset, ("data.csv",)),
    "safetensors": Reader(make_weights, lambda f: as_bytes(read_weights(f / "w.safetensors")), ("w.safetensors",)),
    "weights.npz": Reader(make_weights, lambda f: as_bytes(read_weights(f / "w.npz")), ("w.npz",)),
    "torch": Reader(make_weights, lambda f: as_bytes(read_weights(f / "w.pt")), ("w.pt",)),
    "old torch": Reader(make_weights, lambda f: as_bytes(read_weights(f / "old.pth")), ("old.pth",)),
    "shards": Reader(
        make_huggingface,
        lambda f: as_bytes(read_weights(f)),
        ("model.safetensors.index.json", "shard-1.safetensors"),
    ),
    "config": Reader(make_config, lambda f: read_config(f / "c.toml"), ("c.toml",)),
    "lock": Reader(
        lambda f: FolderLock(f).acquire(),
        holder_of,
        (".lock",),
    ),
}


# ---- mutations


def flipped(raw: bytes, chance: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(chance.choice((1, 1, 2, 8))):
        changed[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(raw: bytes, chance: random.Random) -> bytes:
    return raw[: chance.randrange(len(raw))]


def moved(raw: bytes, chance: random.Random) -> bytes:
    """A piece is left out, doubled, put elsewhere, or made of zeros or ones."""
    at, size, to = (chance.randrange(len(raw)) for _ in range(3))
    piece = raw[at : at + max(1, size % 64)]
    rest = raw[:at] + raw[at + len(piece) :]
    filled = bytes([chance.choice((0, 255))]) * len(piece)
    other = rest[:to] + piece + rest[to:]
    return chance.choice((rest, raw[:at] + piece + raw[at:], other, raw[:at] + filled + raw[at + len(piece) :]))


def lying(raw: bytes, chance: random.Random) -> bytes:
    """A number says more, less, or what no number says: in text, or in four or eight bytes of a header."""
    numbers = [m for m in re.finditer(rb"-?\d+(\.\d+)?", raw[:20000]) if chance.random() < 0.2]
    if numbers and chance.random() < 0.7:
        m = chance.choice(numbers)
        new = chance.choice((b"0", b"-1", b"99999999999", b"1e999", b"NaN", b"1" * 5000, b"2147483648", b"null", b"[]"))
        return raw[: m.start()] + new + raw[m.end() :]
    width = chance.choice((4, 8))
    at = chance.randrange(min(len(raw), 400))
    order, value = chance.choice(("big", "little")), chance.choice((0, 1, 2**16, 2**31 - 1, 2**32 - 1, 2**28))
    return raw[:at] + value.to_bytes(width, order) + raw[at + width :]


def deep(raw: bytes, chance: random.Random) -> bytes:
    """A value becomes ten thousand nested lists or tables."""
    at = max(raw.find(b"{"), raw.find(b"="), 0) + 1
    one, end = chance.choice(((b"[", b"]"), (b'{"a":', b"}")))
    count = chance.choice((500, 10_000, 100_000))
    nested = one * count + b"1" + end * count
    return chance.choice((nested, raw[:at] + nested + raw[at:], raw[:at] + b'"a":' + nested + b"," + raw[at:]))


def foreign(raw: bytes, chance: random.Random) -> bytes:
    noise = chance.randbytes(chance.choice((0, 1, 100, 5000)))
    return chance.choice((noise, b"\x80\x04" + noise, b"PK\x03\x04" + noise, raw[:8] + noise, b"\xff\xfe" + raw))


MUTATIONS = (flipped, flipped, cut, moved, moved, lying, lying, deep, foreign)


# ---- the run


class Late(BaseException):
    """An input took too long."""


def late(*_: Any) -> None:
    raise Late


def starved(error: BaseException | None) -> bool:
    """Whether an error was one of memory in the end, whatever it was turned into."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "not enough memory" in str(error):
            return True
        error = error.__cause__
    return False


def one(name: str, folder: Path, seed: int, whole: Any) -> str:
    """Mutate one file, read, put the file back; what went wrong, or empty."""
    reader, chance = READERS[name], random.Random(f"{name} {seed}")
    file = folder / chance.choice(reader.files)
    raw, mutate = file.read_bytes(), chance.choice(MUTATIONS)
    changed = mutate(raw, chance)
    file.write_bytes(changed)
    where = f"{name}, seed {seed}, {mutate.__name__} {file.name}"
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of work, as a loaded machine is no fault of the reader
    signal.setitimer(signal.ITIMER_REAL, 12 * SECONDS)  # of waiting
    try:
        value = reader.read(folder)
        if reader.exact and value != whole:
            return f"{where}: read in silence, with another value"
    except ockham.OckhamError as error:
        if starved(error):
            return f"{where}: out of memory ({error})"
        if file.name.partition(".")[0] not in str(error) and "plan" not in name:
            return f"{where}: the message does not name the file ({error})"
        if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", str(error)):
            return f"{where}: control characters in the message"
    except Late:
        return f"{where}: more than {SECONDS} s"
    except Exception as error:
        return f"{where}: raw {type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        file.write_bytes(raw)
    return ""


def fuzz(inputs: int, seed: int, home: Path, readers: tuple[str, ...] = tuple(READERS)) -> list[str]:
    """So many inputs, spread over the readers; the list of what went wrong."""
    wrong = []
    before = [signal.signal(s, late) for s in (signal.SIGALRM, signal.SIGPROF)]
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        for number, name in enumerate(readers):
            folder = home / str(number)
            folder.mkdir()
            READERS[name].make(folder)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                whole = READERS[name].read(folder)
                taken = 2**10 * int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1])
                heaviest = max((folder / f).stat().st_size for f in READERS[name].files)
                most = taken + 4 * heaviest + MEBIBYTES * 2**20
                resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
                count = inputs // len(readers) + (number < inputs % len(readers))
                wrong += [problem for i in range(count) if (problem := one(name, folder, seed + i, whole))]
            resource.setrlimit(resource.RLIMIT_AS, limits)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        for number, handler in zip((signal.SIGALRM, signal.SIGPROF), before, strict=True):
            signal.signal(number, handler)
    return wrong


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits on memory as Linux has them")


@linux
def test_a_thousand_mutated_files(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    wrong = fuzz(1000, 0, tmp_path)
    assert not wrong, "\n".join(wrong[:20])


@linux
@pytest.mark.slow
def test_ten_thousand_mutated_files(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    wrong = fuzz(10_000, 10**6, tmp_path)
    assert not wrong, "\n".join(wrong[:20])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", nargs="*", default=tuple(READERS))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = fuzz(given.inputs, given.seed, Path(place), tuple(given.readers))
    print("\n".join(found))
    kinds = Counter(line.partition(",")[0] for line in found)
    print(f"{given.inputs} inputs, {len(found)} problems {dict(kinds)}")
    sys.exit(bool(found))
