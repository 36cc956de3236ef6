"""Long passes say how far they are: curvature, eigenvectors, planning; in a pipe one line every 30 seconds."""

from __future__ import annotations

import io
from itertools import groupby

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import ockham
from ockham.cli import app
from ockham.core.network import PruneProgress, listening, watched


def data():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(48, 6, generator=generator), torch.arange(48) % 3), batch_size=8)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def test_every_pass_of_one_shot_is_told_to_its_end(network):
    told: list[PruneProgress] = []
    with listening(told.append):
        posterior = ockham.laplace(network, data())
        ockham.reduce(network, posterior, keep=0.5, rounds=4)
        groups = ockham.trace(network, torch.randn(2, 6))
        budget = {"params": "50%"}
        ockham.plan(groups, posterior, budget=budget, model=network, example_inputs=torch.randn(2, 6))
    stages = [(name, [p.done for p in some]) for name, some in groupby(told, key=lambda p: p.stage)]
    assert stages[:2] == [("curvature", [1, 2, 3, 4, 5, 6]), ("eigenvectors", [1, 2])]
    name, done = stages[2]  # of reduce, then of the plan
    assert name == "planning" and done[:4] == [1, 2, 3, 4] and done[4:] == list(range(1, len(done) - 3))
    assert all(p.total >= p.done and p.left >= 0 for p in told)


def test_nobody_listens_after_the_block_and_a_stream_without_a_length_is_read_all_the_same(network):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(torch.randn(6), torch.tensor(0))] * 5)

    told: list[PruneProgress] = []
    with listening(told.append):
        ockham.laplace(network, DataLoader(Stream(), batch_size=2))
    assert {p.stage for p in told} == {"eigenvectors"}
    before = len(told)
    assert list(watched([1, 2], "planning", 2)) == [1, 2] and len(told) == before


def test_in_a_pipe_a_line_comes_every_thirty_seconds_and_says_what_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(app.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with app.Bars(Console(file=out, width=200), quiet=False) as bars:
        for second in range(1, 101):
            now[0] = float(second)
            bars.stage(PruneProgress("curvature", second, 200, float(second)))
    lines = out.getvalue().splitlines()
    assert lines == [f"curvature {n}/200, {n} s, about {200 - n} s left" for n in (30, 60, 90)]
