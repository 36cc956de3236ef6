"""Two CPU processes (gloo): Laplace of divided data is that of the joined data; Accelerate trains like one process."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import ockham

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.stack([X[:, 0] - X[:, 1], 100 * X[:, 2]], 1) + 0.3 * torch.randn(
    64, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64
)


def network(outputs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


CASES = {
    "kronecker": {"likelihood": "regression", "structure": "kronecker", "fisher": "empirical"},
    "diagonal": {"likelihood": "regression", "structure": "diagonal", "fisher": "empirical"},
    "classes": {"structure": "kronecker", "fisher": "empirical"},
}


def posterior_of(name, part, **more):
    classes = name == "classes"
    y = (Y[:, 0] > 0).long() if classes else Y
    loader = [(X[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8)][part]
    return ockham.laplace(network(2), loader, **CASES[name], **more)


def worker(rank, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name in CASES:
        posterior_of(name, slice(rank, None, 2), sharded=True).save(Path(folder) / f"{name}.{rank}.safetensors")
    dist.destroy_process_group()


def test_laplace_of_divided_data_is_that_of_the_joined_data():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder,), nprocs=2)
        for name in CASES:
            whole = posterior_of(name, slice(None))
            for rank in range(2):
                found = ockham.load_posterior(Path(folder) / f"{name}.{rank}.safetensors")
                assert found.n_data == whole.n_data
                for key, g in whole.items():
                    torch.testing.assert_close(found[key].precision, g.precision, rtol=1e-10, atol=1e-10)
                    torch.testing.assert_close(found[key].prior_precision, g.prior_precision, rtol=1e-8, atol=0)
                if whole.noise_variance is not None:
                    torch.testing.assert_close(found.noise_variance, whole.noise_variance, rtol=1e-12, atol=0)


def test_adding_up_needs_processes():
    with pytest.raises(ockham.OckhamError, match="init_process_group"):
        posterior_of("diagonal", slice(None), sharded=True)


def accelerated(rank, folder, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    from accelerate import Accelerator
    from torch.utils.data import DataLoader, TensorDataset

    torch.set_num_threads(1)
    save(train(Accelerator(cpu=True), DataLoader(TensorDataset(X.float(), (Y[:, 0] > 0).long()), 16)), folder, rank)
    dist.destroy_process_group()


def train(accelerator, loader):
    from ockham.integrations.rounds import StepRounds, variational

    net = network(2).float()
    optimizer = ockham.MeanField(net.named_parameters(), n_data=64, lr=1e-2)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    inner, rounds, step = variational(optimizer, "test"), StepRounds(ockham.Rounds(start=0.5, end=1.0, count=2)), 0
    rounds.plan(net, 10 * len(loader))
    for _ in range(10):
        for x, y in loader:
            step += 1
            optimizer.zero_grad()
            with inner.sampled():
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            rounds.after_step(inner, step, 0.0)
    return inner.posterior()


def save(posterior, folder, rank):
    posterior.save(Path(folder) / f"posterior.{rank}.safetensors")


@pytest.mark.filterwarnings("ignore")
def test_accelerate_on_two_processes_keeps_them_alike():
    pytest.importorskip("accelerate")
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(accelerated, (folder, port), nprocs=2)
        one, two = (ockham.load_posterior(Path(folder) / f"posterior.{r}.safetensors") for r in range(2))
        assert one.kept() == two.kept() < one.size()
        for name, g in one.items():
            assert torch.equal(g.mean, two[name].mean) and torch.equal(g.precision, two[name].precision)
