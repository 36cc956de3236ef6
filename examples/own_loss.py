"""Your own likelihood: event counts per example, a Poisson loss that sums over the batch, declared as a sum."""

import torch
from torch import Tensor, nn
from torch.nn.functional import poisson_nll_loss

import ockham
from ockham.zoo.data import Batches


def poisson(output: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood in nats of counts; outputs are log rates. Summed over the batch."""
    return poisson_nll_loss(output.squeeze(1), target, log_input=True, reduction="sum")


def main() -> None:
    torch.manual_seed(0)
    x, y = make_data(1500, seed=1)
    test_x, test_y = make_data(500, seed=2)
    network = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1))
    result = ockham.compress(
        network,
        Batches(x, y, batch_size=64, shuffle=True),
        # Without the declaration nobody could know how often the data count. Terms default to len(target).
        likelihood=ockham.Loss(poisson, reduction="sum"),
        training=ockham.Training(epochs=80, learning_rate=1e-2),
        ignore=["2.bias"],  # the overall rate: protected, whatever the evidence says
    )

    print(f"kept {result.posterior.kept()} of {result.posterior.size()} weights")
    print("kept first-layer weights per input:", result.keep["0.weight"].sum(0).tolist())
    with torch.no_grad():
        fitted = float(poisson(result.model(test_x), test_y)) / len(test_y)
        constant = float(poisson(torch.full((len(test_y), 1), float(y.mean().log())), test_y)) / len(test_y)
    print(f"test loss a case, without ln y!: {fitted:.3f} nats, of a constant rate {constant:.3f}")


def make_data(n: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Counts with rate exp(1 + x0 - x1); eighteen further inputs are irrelevant."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 20, generator=generator)
    rate = torch.exp(1 + 0.5 * x[:, 0] - 0.5 * x[:, 1])
    return x, torch.poisson(rate, generator=generator)


if __name__ == "__main__":
    main()
