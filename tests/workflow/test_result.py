"""Networks and posteriors on disk: the same outputs, small files, clear errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import ockham
from ockham.core.posterior import Gaussian, Posterior
from ockham.errors import OckhamError, ResultError
from ockham.run.result import save_network, stored_values
from ockham.zoo.networks import NETWORKS


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x))


def test_a_zoo_network_loads_by_name(tmp_path: Path) -> None:
    net = NETWORKS["digits_mlp"]()
    with torch.no_grad():
        for p in net.parameters():
            p[torch.rand(p.shape) < 0.9] = 0
    size = save_network(net, tmp_path / "network.safetensors", builder="zoo:digits_mlp")
    back = ockham.load(tmp_path)
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(back(x), net.eval()(x)) and not back.training
    assert size < 0.25 * 4 * sum(p.numel() for p in net.parameters())
    assert stored_values(back) == sum(int((p != 0).sum()) for p in net.parameters())


def test_user_networks_need_the_users_constructor(tmp_path: Path) -> None:
    net = Tied()
    save_network(net, tmp_path / "network.safetensors", builder="os:system")
    with pytest.raises(ResultError, match=r"built by 'os:system'.*model=your_constructor"):
        ockham.load(tmp_path)
    back = ockham.load(tmp_path, model=Tied())
    x = torch.arange(11)
    assert torch.equal(back(x), net(x))
    assert back.head.weight is back.embed.weight


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    alone = nn.Embedding(1000, 64)
    size = save_network(alone, tmp_path / "one", builder="user")
    tied = nn.Linear(64, 1000, bias=False)
    tied.weight = alone.weight
    both = save_network(nn.ModuleList([alone, tied]), tmp_path / "two", builder="user")
    assert both < 1.05 * size


def test_weights_that_do_not_fit_list_names_and_shapes(tmp_path: Path) -> None:
    save_network(nn.Linear(3, 2), tmp_path / "network.safetensors", builder="user")
    with pytest.raises(OckhamError, match=r"weight: \(2, 3\) for \(2, 4\)"):
        ockham.load(tmp_path, model=nn.Linear(4, 2))
    with pytest.raises(OckhamError, match=r"missing 0.weight, 0.bias; unknown weight, bias"):
        ockham.load(tmp_path, model=nn.Sequential(nn.Linear(3, 2)))


def test_a_posterior_survives_and_holds_survivors_only(tmp_path: Path) -> None:
    keep = torch.rand(200, 50, generator=torch.Generator().manual_seed(1)) < 0.05
    mean = torch.randn(200, 50) * keep
    precision = torch.where(keep, torch.rand(200, 50) + 1, torch.inf)
    posterior = Posterior(
        {"w": Gaussian(mean, precision, torch.tensor(1.0), torch.tensor(0.0), keep)}, 100.0, 0.5, "test"
    )
    posterior.save(tmp_path / "p.safetensors")
    back = ockham.load_posterior(tmp_path / "p.safetensors")
    assert torch.equal(back["w"].mean, mean) and torch.equal(back["w"].precision, precision)
    assert torch.equal(back["w"].keep, keep)
    assert (back.n_data, back.temperature, back.source) == (100.0, 0.5, "test")
    assert (tmp_path / "p.safetensors").stat().st_size < 0.2 * 8 * keep.numel()


def test_a_network_file_is_no_posterior(tmp_path: Path) -> None:
    save_network(nn.Linear(2, 2), tmp_path / "posterior.safetensors", builder="user")
    with pytest.raises(ResultError, match="'network' file, a 'posterior' file"):
        ockham.load_posterior(tmp_path)


def test_a_missing_result_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="no such file"):
        ockham.load(tmp_path)
