"""Low-rank adapters over a frozen network: the evidence chooses the rank of each.

A network that reads digits is adapted to digits turned by 90 degrees. Adapters of rank 12 are trained under a
posterior, and ranks that the data do not ask for go. (Adapters of the library `peft` are modules of the same kind.)
"""

import warnings

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import ockham
from ockham.zoo.data import digits

RANK = 12


# --8<-- [start:adapter]
class LoRA(nn.Module):
    """A Linear that stays as it is, and a trained change of low rank."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Base and change."""
        return self.base(x) + self.up(self.down(x))


# --8<-- [end:adapter]


def main() -> None:
    torch.manual_seed(0)
    data = digits()
    upright, turned = data.train_x.flatten(1), data.train_x.rot90(1, (2, 3)).flatten(1)
    base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    adam = torch.optim.Adam(base.parameters(), 3e-3)
    for _ in range(20):
        for x, y in DataLoader(TensorDataset(upright, data.train_y), 64, shuffle=True):
            adam.zero_grad()
            cross_entropy(base(x), y).backward()
            adam.step()

    # --8<-- [start:compress]
    network = nn.Sequential(*(LoRA(m, RANK) if isinstance(m, nn.Linear) else m for m in base))
    loader = DataLoader(TensorDataset(turned, data.train_y), 64, shuffle=True)
    scales = ockham.GroupScale(0.3)  # one prior scale a rank: a rank fades as a whole
    training = ockham.Training(epochs=80, learning_rate=3e-3, prior=scales)
    small = ockham.compress(network, loader, training=training, structure="auto")
    ranks = [m.up.in_features for m in small.model if isinstance(m, LoRA)]
    # --8<-- [end:compress]

    x = data.test_x.rot90(1, (2, 3)).flatten(1)
    before = (base(x).argmax(1) == data.test_y).float().mean()
    after = (small.predict(x).probabilities.argmax(1) == data.test_y).float().mean()
    kept = all(torch.equal(a.weight, m.base.weight) for a, m in zip(base[::2], small.model[::2], strict=True))
    print(f"turned digits: {before:.1%} before, {after:.1%} with adapters of ranks {ranks} (of {RANK} each)")
    print(f"the base is as it was: {kept}; the posterior is over {small.posterior.size()} weights of the adapters")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
