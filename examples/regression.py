"""Regression with learned noise: three of ten inputs matter, and the reduced network finds out which."""

import math

import torch
from torch import nn

import ockham
from ockham.fit.predict import draw_outputs
from ockham.run.measure import regression_summary
from ockham.zoo.data import Batches

NOISE = 0.3


def main() -> None:
    torch.manual_seed(0)
    x, y = make_data(1500, seed=1)
    test_x, test_y = make_data(500, seed=2)
    network = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
    # --8<-- [start:compress]
    result = ockham.compress(
        network,
        Batches(x, y, batch_size=64, shuffle=True),
        likelihood="regression",
        training=ockham.Training(epochs=100, learning_rate=1e-2),
    )

    print(f"kept {result.keep_share:.1%}; noise std {math.sqrt(result.noise_variance):.3f}, true {NOISE}")
    print("kept first-layer weights per input:", result.keep["0.weight"].sum(0).tolist())

    # `result.predict(x)` gives mean and variances; the scores below want the draws themselves, [draws, N, 1].
    generator = torch.Generator().manual_seed(0)
    outputs = torch.stack(list(draw_outputs(result.model, result.posterior, test_x, draws=20, generator=generator)))
    found = regression_summary(outputs, test_y, noise_variance=result.noise_variance)
    print(f"test RMSE {found.rmse:.3f}, NLL {found.nll:.3f} nats, 90 % interval covers {found.coverage_90:.1%}")
    # --8<-- [end:compress]


def make_data(n: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets sin(3 x0) + x1 x2 + noise; inputs 3..9 are irrelevant."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 10, generator=generator) * 2 - 1
    y = torch.sin(3 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    return x, y + NOISE * torch.randn(n, 1, generator=generator)


if __name__ == "__main__":
    main()
