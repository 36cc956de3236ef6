"""Two ranks under DistributedDataParallel equal one process on the whole batch."""

import os
import socket

import pytest
import torch
from torch import nn

from ockham import MeanField
from ockham.errors import OckhamError

STEPS = 6


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(8, 6, generator=generator, dtype=torch.double)
        yield x, torch.randint(0, 3, (8,), generator=generator)


def train(model, named, part):
    optimizer = MeanField(named, n_data=100, lr=0.05, initial_std=0.3, seed=7)
    for x, y in batches():
        optimizer.zero_grad()
        with optimizer.sampled():
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
        if optimizer.state[named[0][1]]["step"] == 3:
            keep = torch.ones_like(named[0][1], dtype=torch.bool)
            keep[:, 0] = False
            optimizer.remove({named[0][0]: keep})
    return {n: (g.mean, g.precision) for n, g in optimizer.posterior().items()}


def rank(index, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=index, world_size=2)
    model = nn.parallel.DistributedDataParallel(network())
    named = list(model.module.named_parameters())
    moments = train(model, named, slice(4 * index, 4 * index + 4))
    torch.save(moments, f"{folder}/{index}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_two_ranks_equal_one_process(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(rank, args=(port, str(tmp_path)), nprocs=2)
    zero, one = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2))
    alone = network()
    want = train(alone, list(alone.named_parameters()), slice(0, 8))
    for name, (mean, precision) in want.items():
        assert torch.equal(zero[name][0], one[name][0]) and torch.equal(zero[name][1], one[name][1])
        torch.testing.assert_close(zero[name][0], mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(zero[name][1], precision, rtol=1e-9, atol=1e-12)


def unlike(index, port, folder):
    """Steps of a rank with a seed, with data, with weights of its own; the errors, and a last step in agreement."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=index, world_size=2)
    said = []
    for seed, n_data, shift in ((index, 100, 0.0), (7, 50 + index, 0.0), (7, 100, float(index)), (7, 100, 0.0)):
        model = nn.parallel.DistributedDataParallel(network())
        with torch.no_grad():
            next(model.parameters()).add_(shift)
        optimizer = MeanField(list(model.module.named_parameters()), n_data=n_data, seed=seed)
        x, y = next(batches())
        with optimizer.sampled():
            nn.functional.cross_entropy(model(x), y).backward()
        before = [p.detach().clone() for p in model.parameters()]
        try:
            optimizer.step()
            said.append("")
        except OckhamError as error:
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
            said.append(str(error))
    alone = network()  # a network of its own in every process, and one that steps in one process only
    optimizer = MeanField(alone.named_parameters(), n_data=50 + index, seed=index)
    for _ in range(1 + index):
        optimizer.zero_grad()
        with optimizer.sampled():
            nn.functional.cross_entropy(alone(x), y).backward()
        optimizer.step()
    (folder / f"{index}.txt").write_text("\n".join(said))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_ranks_that_differ_are_told_at_the_first_step(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(unlike, args=(port, tmp_path), nprocs=2)
    zero, one = ((tmp_path / f"{i}.txt").read_text().split("\n") for i in range(2))
    assert zero == one and len(zero) == 4 and not zero[3]
    for said, (name, first, second) in zip(zero, (("seed", 0, 1), ("n_data", 50, 51)), strict=False):
        assert f"differ in {name}: process 0 has {first}, process 1 {second}." in said
    assert "differ in sum of the weights" in zero[2]
