"""A network sharded over two processes by fully_shard trains and loses weights as its twin in one process does."""

import os
import socket
import tempfile
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import ockham
from ockham.zoo.data import digits
from ockham.zoo.networks import digits_mlp

EPOCHS, BATCH = 12, 64


def main() -> None:
    torch.manual_seed(0)
    alone = trained(digits_mlp())
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        mp.spawn(one_of_two, (port, folder), nprocs=2)
        together = ockham.load_posterior(f"{folder}/posterior.safetensors")
    tell("one process", alone)
    tell("two processes", together)
    far = max(float((g.mean - together[name].mean).abs().max()) for name, g in alone.items())
    print(f"greatest difference of a weight: {far:.1g}")


def one_of_two(rank: int, port: int, folder: str) -> None:
    """What torchrun would start twice."""
    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # --8<-- [start:shard]
    model, mesh = digits_mlp(), init_device_mesh("cpu", (2,))
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    posterior = trained(model, rank, count=2, folder=folder)
    # --8<-- [end:shard]
    if rank == 0:
        posterior.save(f"{folder}/posterior.safetensors")
    dist.destroy_process_group()


def trained(model: nn.Module, rank: int = 0, count: int = 1, folder: str | None = None) -> ockham.Posterior:
    """The posterior after a training with two rounds; every process takes its rows of every batch."""
    data = digits()
    x, y = data.train_x.double(), data.train_y
    model.double()
    shuffle = torch.Generator().manual_seed(0)
    # --8<-- [start:loop]
    optimizer = ockham.MeanField(model.named_parameters(), n_data=len(x), lr=3e-3, temperature=0.1)
    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(x), generator=shuffle)[: len(x) // BATCH * BATCH].split(BATCH):
            mine = batch[rank::count]
            optimizer.zero_grad()
            with optimizer.sampled():
                cross_entropy(model(x[mine]), y[mine]).backward()
            optimizer.step()
        if epoch in (EPOCHS // 2, EPOCHS - 3):
            evidence = ockham.score(optimizer.posterior())  # gathered: the same in every process
            optimizer.remove(ockham.EvidenceRule().decide(evidence))
    if folder is not None:
        dcp.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=f"{folder}/checkpoint"
        )
    # --8<-- [end:loop]
    return optimizer.posterior()


def tell(who: str, posterior: ockham.Posterior) -> None:
    """Accuracy and size of what came out."""
    data, model = digits(), digits_mlp().double()
    found = ockham.predict(model, posterior, data.test_x.double())
    accuracy = (found.probabilities.argmax(1) == data.test_y).float().mean()
    print(f"{who}: test accuracy {accuracy:.1%} with {posterior.kept() / posterior.size():.1%} of the weights")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
