"""One network compressed by two processes, each with half of the data, and by one process with all of them."""

import os
import socket
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ockham
from ockham.zoo.data import digits
from ockham.zoo.networks import digits_mlp

TRAINING = ockham.Training(epochs=20, learning_rate=3e-3, prior=ockham.FixedPrior(1.0), temperature=0.1)


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_of_two, (port,), nprocs=2)
    torch.manual_seed(0)
    data = digits()
    loader = DataLoader(TensorDataset(data.train_x, data.train_y), 64, shuffle=True)
    tell("one process", ockham.compress(digits_mlp(), loader, training=TRAINING))


def one_of_two(rank: int, port: int) -> None:
    """What torchrun would start twice."""
    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = digits()
    # --8<-- [start:compress]
    examples = TensorDataset(data.train_x, data.train_y)
    loader = DataLoader(examples, 32, sampler=DistributedSampler(examples, seed=0))
    small = ockham.compress(DistributedDataParallel(digits_mlp()), loader, training=TRAINING)
    # --8<-- [end:compress]
    if rank == 0:
        tell("two processes", small)
    dist.destroy_process_group()


def tell(who: str, small: ockham.Compressed) -> None:
    """Accuracy and size of what came out."""
    data = digits()
    accuracy = (small.predict(data.test_x).probabilities.argmax(1) == data.test_y).float().mean()
    terms = small.posterior.n_data
    print(f"{who}: test accuracy {accuracy:.1%} with {small.keep_share:.1%} of the weights, N = {terms:g}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
