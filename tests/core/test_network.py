"""Parameters that lie in mapped files."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ockham.core.network import map_parameters_, mapped, release
from ockham.errors import OckhamError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight
        self.counts = nn.Parameter(torch.arange(3), requires_grad=False)
        self.none = nn.Parameter(torch.empty(0, 4))
        self.register_buffer("frequencies", torch.tensor([1.001, 2.003]), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body[:2](self.words(x).mean(1)))


def test_a_mapped_network_computes_and_changes_as_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randint(0, 7, (5, 3))
    before, state = model(x), {n: t.clone() for n, t in model.state_dict().items()}
    map_parameters_(model, tmp_path / "place", torch.float32)
    assert torch.equal(model(x), before)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert model.head.weight is model.words.weight and model.counts.dtype is torch.int64
    if os.name != "nt":
        assert not list((tmp_path / "place").iterdir())
    with torch.no_grad():
        model.words.weight.mul_(2)
    assert torch.equal(model.head.weight, 2 * state["head.weight"])
    model(x).sum().backward()
    assert model.words.weight.grad is not None
    # each has a storage of its own size, as files of weights want it
    for p in model.parameters():
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()


def test_dtypes_go_both_ways_and_what_no_file_holds_is_not_rounded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied().to(torch.bfloat16)
    model.frequencies = torch.tensor([1.001, 2.003])
    state = {n: t.clone() for n, t in model.state_dict().items()}
    map_parameters_(model, tmp_path, torch.float32)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    assert model.body[1].running_mean.dtype is torch.float32
    map_parameters_(model, tmp_path, torch.bfloat16)
    assert all(torch.equal(t, state[n]) and t.dtype is state[n].dtype for n, t in model.state_dict().items())
    assert torch.equal(model.frequencies, torch.tensor([1.001, 2.003]))


def test_views_of_one_memory_that_are_two_parameters_stay_one(tmp_path: Path) -> None:
    shared = torch.randn(3, 3)
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    for m in model:
        m.weight = nn.Parameter(shared)
    map_parameters_(model, tmp_path, torch.float32)
    with torch.no_grad():
        model[0].weight.zero_()
    assert not model[1].weight.any()


def test_what_does_not_fit_on_the_disk_is_said_before_anything_is_written(tmp_path: Path) -> None:
    values = torch.zeros(()).expand(2**27, 2**27)
    with pytest.raises(OckhamError, match="make room there"):
        mapped(values, tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OckhamError, match="another folder"):
        mapped(torch.zeros(3), tmp_path / "file")
    odd = torch.arange(6.0).view(2, 3).mT
    assert torch.equal(mapped(odd, tmp_path), odd) and mapped(odd, tmp_path, torch.float64).dtype is torch.float64


@pytest.mark.skipif(sys.platform != "linux", reason="memory is let go by a call of Linux")
def test_memory_of_a_mapped_tensor_is_let_go_and_nothing_lost(tmp_path: Path) -> None:
    def resident(address: int) -> int:
        """KiB in memory of the mapping that begins there."""
        found = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                found = int(line.split("-")[0], 16) == address
            elif found and line.startswith("Rss:"):
                return int(line.split()[1])
        raise AssertionError("no such mapping")

    values = torch.randn(1 << 20)
    there = mapped(values, tmp_path)
    assert resident(there.untyped_storage().data_ptr()) == 0
    there[5] = 7.0
    assert float(there.sum()) == pytest.approx(float(values.sum()) - float(values[5]) + 7, rel=1e-4)
    assert resident(there.untyped_storage().data_ptr()) == 4096
    release(there)
    assert resident(there.untyped_storage().data_ptr()) == 0
    values[5] = 7.0
    assert torch.equal(there, values)
    release(values)  # of an ordinary tensor nothing
    assert torch.equal(there, values)


def test_what_others_have_mapped_keeps_what_was_written_to_it(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(4096.0)}, tmp_path / "given.pt")
    given = torch.load(tmp_path / "given.pt", mmap=True, weights_only=True)["w"]
    given[7] = -1.0
    release(given)
    assert float(given[7]) == -1.0
    torch.arange(4096.0).numpy().tofile(tmp_path / "raw")
    private = torch.from_file(str(tmp_path / "raw"), shared=False, size=4096)
    private[7] = -1.0
    release(private)
    assert float(private[7]) == -1.0
