"""Units of trained networks of every kind go at once under a Kronecker posterior, and the survivors make good."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ockham
from ockham.surgery.costs import cost
from ockham.zoo.networks import CharTransformer


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(5, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.mix = nn.Linear(5, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm, self.up, self.down, self.out = (
            nn.LayerNorm(16),
            nn.Linear(16, 32),
            nn.Linear(32, 16),
            nn.Linear(16, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.mix(x, x, x, need_weights=False)[0]
        return self.out((x + self.down(torch.relu(self.up(self.norm(x))))).mean(1))


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(6, 5, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(5 * 25, 3),
    )  # fmt: skip


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], tuple[int, ...]]] = {
    "transformer": (lambda: CharTransformer(11, 8, 16, 1, 4), lambda: torch.randint(11, (40, 8)), (40, 8)),
    "LSTM": (Recurrent, lambda: torch.randn(40, 6, 5), (40,)),
    "packed attention": (Attending, lambda: torch.randn(40, 6, 5), (40,)),
    "depthwise": (depthwise, lambda: torch.randn(40, 3, 8, 8), (40,)),
    "transposed": (transposed, lambda: torch.randn(40, 1, 8, 8), (40,)),
}


@pytest.mark.parametrize("options", [{"budget": {"macs": "60%"}}, {"budget": {"params": "50%"}, "round_to": 2}, {}])
@pytest.mark.parametrize("case", CASES)
def test_less_is_lost_than_without_moving_survivors(case: str, options: dict) -> None:
    build, inputs, labels = CASES[case]
    torch.manual_seed(0)
    model, x, y = build(), inputs(), torch.randint(3, labels)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    posterior = ockham.laplace(model.eval(), [(x, y)], n_data=1000)
    groups = ockham.trace(model, x[:2])
    given = options or {"price": ockham.FlatPrice(0.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ockham.OckhamWarning)  # some layers are worth nothing here
        plan = ockham.plan(groups, posterior, model=model, example_inputs=x[:2], **given)
    moved = ockham.compensate(model, posterior, groups, plan)
    small = ockham.shrink(moved, plan)
    ockham.verify(ockham.mask(moved, plan), small, x[:2])
    with torch.no_grad():
        whole, left, plain = model(x), small(x), ockham.shrink(model, plan)(x)
    assert plan.removed and float((left - whole).square().mean()) < float((plain - whole).square().mean())
    if "macs" in options.get("budget", {}):
        assert cost(small, x[:1]).macs <= 0.6 * cost(model, x[:1]).macs
    if "params" in options.get("budget", {}):
        assert sum(p.numel() for p in small.parameters()) <= 0.5 * sum(p.numel() for p in model.parameters())
