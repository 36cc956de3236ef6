"""MeanField in your own training loop: fit, score, remove, refit.

Nothing about the network or the loop changes but three lines: the optimizer, the `sampled` block, the removal.
"""

import torch
from torch.nn.functional import cross_entropy

import ockham
from ockham.zoo.data import Batches, digits
from ockham.zoo.networks import digits_mlp

EPOCHS, WARMUP, EVERY = 60, 20, 5


def main() -> None:
    torch.manual_seed(0)
    data = digits()
    loader = Batches(data.train_x, data.train_y, batch_size=64, shuffle=True)
    network = digits_mlp()
    optimizer = ockham.MeanField(
        network.named_parameters(),
        n_data=len(data.train_x),
        lr=3e-3,
        prior=ockham.FixedPrior(0.3),
        kl_warmup=len(loader) * 10,
    )
    for epoch in range(1, EPOCHS + 1):
        for x, y in loader:
            optimizer.zero_grad()
            with optimizer.sampled():  # the weights are one posterior draw inside this block
                loss = cross_entropy(network(x), y)  # the mean over the batch; the optimizer adds the KL
                loss.backward()
            optimizer.step()
        if epoch >= WARMUP and epoch % EVERY == 0 and epoch < EPOCHS:  # the last epochs only refit
            reduce(optimizer, first=epoch == WARMUP)

    posterior = optimizer.posterior()
    prediction = ockham.predict(network, posterior, data.test_x)
    accuracy = (prediction.probabilities.argmax(1) == data.test_y).float().mean()
    print(f"test accuracy {accuracy:.1%} with {posterior.kept():,} of {posterior.size():,} weights")


def reduce(optimizer: ockham.MeanField, *, first: bool) -> None:
    """One round: where the evidence is better without a weight, remove the weight for good."""
    posterior = optimizer.posterior()
    if first:
        for warning in ockham.diagnose(posterior).warnings:  # can this posterior support pruning at all?
            print("warning:", warning)
    evidence = ockham.score(posterior)
    keep = ockham.EvidenceRule().decide(evidence, protected=(), progress=1.0)
    gain = evidence.gain(keep)
    removed = optimizer.remove(keep)
    print(f"removed {removed:6,} weights, predicted gain in log evidence {gain:9,.0f} nats")


if __name__ == "__main__":
    main()
