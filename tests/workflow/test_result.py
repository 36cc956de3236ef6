"""Networks and posteriors on disk: the same outputs, small files, clear errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ockham
from ockham.core.posterior import Gaussian, Posterior
from ockham.errors import OckhamError, OckhamWarning, ResultError
from ockham.run.folder import save_network, stored_values
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


def test_a_result_of_an_earlier_version_must_hold_together(tmp_path: Path) -> None:
    def posterior(net: nn.Module) -> Posterior:
        moments = {}
        for name, p in net.named_parameters():
            keep = p.detach() != 0
            precision = torch.where(keep, 1.0, torch.inf)
            moments[name] = Gaussian(p.detach().clone(), precision, torch.tensor(1.0), torch.tensor(0.0), keep)
        return Posterior(moments, 10.0)

    def pruned(seed: int, width: int = 3) -> nn.Linear:
        torch.manual_seed(seed)
        net = nn.Linear(width, 8)
        with torch.no_grad():
            net.weight[torch.rand(8, width) < 0.5] = 0
        return net

    save_network(pruned(0), tmp_path / "network.safetensors", builder="user")
    posterior(pruned(0)).save(tmp_path / "posterior.safetensors")
    with pytest.warns(OckhamWarning, match="earlier versions"):
        assert torch.equal(ockham.load_posterior(tmp_path)["weight"].mean, pruned(0).weight)
    for other, why in ((pruned(1), "where the posterior removed"), (pruned(0, 4), r"\(8, 3\) there and \(8, 4\) here")):
        posterior(other).save(tmp_path / "posterior.safetensors")
        with pytest.warns(OckhamWarning), pytest.raises(ResultError, match=f"network beside it.*{why}"):
            ockham.load_posterior(tmp_path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"mean": torch.tensor([torch.nan, 1.0])}, "mean must be finite"),
        ({"precision": torch.tensor([-1.0, 1.0])}, "precision must be positive"),
        ({"precision": torch.tensor([torch.inf, 1.0])}, "precision must be positive and finite; got inf"),
        ({"prior_precision": torch.tensor(0.0)}, "prior_precision must be positive"),
        ({"inclusion": torch.tensor([0.5, 1.5])}, "inclusion must be a probability"),
        ({"n_data": 0.0}, "n_data must be a number, positive"),
        ({"temperature": float("nan")}, "temperature must be a number, positive"),
    ],
)
def test_numbers_that_are_no_posterior_are_not_saved(tmp_path: Path, change: dict, why: str) -> None:
    fields = {"mean": torch.ones(2), "precision": torch.ones(2), "prior_precision": torch.tensor(1.0)}
    more = {"prior_mean": torch.tensor(0.0), "keep": torch.tensor([True, True]), "inclusion": None}
    whole = {"n_data": 10.0, "temperature": 1.0}
    with pytest.raises(OckhamError, match=why):
        gaussian = Gaussian(**{**fields, **more, **{k: v for k, v in change.items() if k not in whole}})
        made = Posterior({"w": gaussian}, **{**whole, **{k: v for k, v in change.items() if k in whole}})
        made.save(tmp_path / "p.safetensors")


def test_the_card_of_a_network_loads_it_as_soon_as_its_arguments_are_put_in(tmp_path):
    """All names of the three lines are defined in them."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    folder = ockham.save_pretrained(net, tmp_path / "card")
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0].strip()
    assert len(code.splitlines()) == 3
    code = code.replace("(...)\n", "(4, 3)\n") + "\nassert model(torch.ones(1, 4)).shape == (1, 3)"
    code = f"import os, torch; os.chdir({str(folder)!r})\n{code}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, code + run.stderr
