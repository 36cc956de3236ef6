"""Stop after any epoch, save, go on in another process: the same bits as a run that was never interrupted."""

import tempfile
from pathlib import Path

import torch

import ockham
from ockham.zoo.data import Batches, digits
from ockham.zoo.networks import digits_mlp

EPOCHS = 20


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint.pt"
        first = job()
        for progress in first:
            if progress.epoch == 15:
                torch.save(first.state(), checkpoint)  # tensors and plain values: loads with weights_only=True
                break  # killed here

        second = job()  # built with the same arguments; everything else comes from the file
        second.load(torch.load(checkpoint, weights_only=True))
        for progress in second:
            print(f"resumed: epoch {progress.epoch}, kept {progress.kept_share:.2%}")

    whole = job()
    for _ in whole:
        pass
    a, b = second.result().posterior, whole.result().posterior
    same = all(torch.equal(a[n].mean, b[n].mean) and torch.equal(a[n].precision, b[n].precision) for n in b)
    print("the same bits as without the interruption:", same)


def job() -> ockham.Compression:
    """A fresh job; iterate over it to train."""
    data = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = digits_mlp()
    loader = Batches(data.train_x, data.train_y, batch_size=64, shuffle=True)
    training = ockham.Training(epochs=EPOCHS, learning_rate=5e-3)
    return ockham.Compression(network, loader, training=training, rounds=ockham.Rounds(start=0.6))


if __name__ == "__main__":
    main()
