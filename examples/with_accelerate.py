"""Accelerate under a posterior; with `accelerate launch --num_processes 2 --cpu` it runs on two processes."""

import warnings

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import ockham
from ockham.integrations.rounds import StepRounds, variational
from ockham.zoo.data import digits
from ockham.zoo.networks import digits_mlp

EPOCHS = 30


def main() -> None:
    torch.manual_seed(0)
    data, network = digits(), digits_mlp()
    loader = DataLoader(TensorDataset(data.train_x, data.train_y), 64, shuffle=True)
    # --8<-- [start:loop]
    optimizer = ockham.MeanField(network.named_parameters(), n_data=len(data.train_x), lr=3e-3, kl_warmup=200)
    accelerator = Accelerator(cpu=True)
    model, wrapped, loader = accelerator.prepare(network, optimizer, loader)
    optimizer = variational(wrapped, "this loop")  # the optimizer inside the wrapper
    rounds, step = StepRounds(ockham.Rounds(start=0.3, end=0.8, count=8)), 0
    rounds.plan(network, EPOCHS * len(loader))
    for _ in range(EPOCHS):
        for x, y in loader:
            step += 1
            wrapped.zero_grad()
            with optimizer.sampled():  # the same noise on every process: one network a step
                loss = cross_entropy(model(x), y)
                accelerator.backward(loss)
            wrapped.step()
            rounds.after_step(optimizer, step, float(loss.detach()))
    # --8<-- [end:loop]
    posterior = optimizer.posterior()
    found = ockham.predict(network, posterior, data.test_x)
    accuracy = (found.probabilities.argmax(1) == data.test_y).float().mean()
    accelerator.print(f"test accuracy {accuracy:.1%} with {posterior.kept() / posterior.size():.1%} of the weights")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
