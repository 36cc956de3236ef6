"""ockham.inclusion from any Gaussian posterior, the median model, the path rule, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

import ockham
from ockham.choose.units import by_max, by_product, chain_weights, living, node_inclusion
from ockham.core.posterior import Gaussian, Posterior
from ockham.errors import OckhamError
from ockham.evidence.exact import exact_inclusion as exact
from ockham.methods.spike_slab.priors import MedianRule

F64 = torch.float64


def gaussian(mean, precision, prior=1.0, prior_mean=0.0, **more):
    mean = torch.as_tensor(mean, dtype=F64)
    precision = torch.as_tensor(precision, dtype=F64).expand(mean.shape).clone()
    keep = more.pop("keep", torch.ones(mean.shape, dtype=torch.bool))
    return Gaussian(mean, precision, torch.tensor(prior, dtype=F64), torch.tensor(prior_mean, dtype=F64), keep, **more)


def test_orthogonal_linear_model_equals_enumeration():
    g = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(60, 12, generator=g, dtype=F64))
    x = q * 60**0.5
    y = x @ (0.3 * torch.randn(12, generator=g, dtype=F64)) + torch.randn(60, generator=g, dtype=F64)
    p = 60.0 + 1.0
    posterior = Posterior({"w": gaussian(x.T @ y / p, p)}, n_data=60)
    want = exact(x, y, prior_inclusion=0.2, slab_variance=1.0, noise_variance=1.0).probabilities
    torch.testing.assert_close(ockham.inclusion(posterior, math.log(0.25))["w"], want, atol=1e-10, rtol=0)


def test_marginal_precision_is_used_where_it_is_known():
    # two equal columns: each alone may go (marginal), both look indispensable by their conditional precision
    x = torch.randn(80, 1, generator=torch.Generator().manual_seed(1), dtype=F64).expand(80, 2)
    y = x[:, 0] + torch.randn(80, generator=torch.Generator().manual_seed(2), dtype=F64)
    lam = x.T @ x + torch.eye(2, dtype=F64)
    mean, marginal = torch.linalg.solve(lam, x.T @ y), 1 / torch.linalg.inv(lam).diagonal()
    posterior = Posterior({"w": gaussian(mean, lam.diagonal(), marginal_precision=marginal)}, n_data=80)
    blind = Posterior({"w": gaussian(mean, lam.diagonal())}, n_data=80)
    assert float(ockham.inclusion(posterior)["w"].max()) < 0.6
    assert float(ockham.inclusion(blind)["w"].min()) > 0.99


def test_removed_weights_have_probability_zero_and_odds_go_by_name():
    keep = torch.tensor([True, False])
    posterior = Posterior({"a": gaussian([0.1, 0.0], 50.0, keep=keep), "b": gaussian([0.1], 50.0)}, n_data=10)
    found = ockham.inclusion(posterior, {"b": 2.0})
    assert float(found["a"][1]) == 0.0
    odds = torch.logit(found["b"]) - torch.logit(found["a"][:1])
    assert float(odds) == pytest.approx(2.0, abs=1e-9)


@pytest.mark.parametrize("prior", [math.nan, 0.0, math.inf])
def test_an_unknown_prior_is_refused(prior):
    with pytest.raises(OckhamError, match=r"'w'.*prior is unknown"):
        ockham.inclusion(Posterior({"w": gaussian([0.1], 50.0, prior=prior)}, n_data=10))


@pytest.mark.parametrize("odds", [math.inf, math.nan, {"other": 0.0}])
def test_odds_out_of_range_are_refused(odds):
    with pytest.raises(OckhamError, match="log_odds"):
        ockham.inclusion(Posterior({"w": gaussian([0.1], 50.0)}, n_data=10), odds)
    with pytest.raises(OckhamError, match="centred"):
        ockham.inclusion(Posterior({"w": gaussian([0.1], 50.0, prior_mean=1.0)}, n_data=10))


def test_the_median_rule_keeps_what_is_likelier_in_than_out():
    inclusion = torch.tensor([0.9, 0.2, 0.51], dtype=F64)
    posterior = Posterior({"w": gaussian([1.0, 1.0, 1.0], 50.0, inclusion=inclusion), "b": gaussian([0.0], 50.0)}, 10)
    keep = MedianRule().decide(ockham.score(posterior))
    assert keep["w"].tolist() == [True, False, True] and keep["b"].tolist() == [False]
    assert MedianRule(0.6).decide(ockham.score(posterior))["w"].tolist() == [True, False, False]
    assert "b" not in MedianRule().decide(ockham.score(posterior), protected={"b"})
    with pytest.raises(OckhamError, match="least"):
        MedianRule(1.0)


def test_path_rule_equals_simulation_on_a_tree():
    # one output: paths are independent given the consumers, so the rule is exact
    g = torch.Generator().manual_seed(0)
    first, last = torch.rand(3, 4, generator=g, dtype=F64), torch.rand(1, 3, generator=g, dtype=F64)
    draws = 200_000
    up = torch.rand(draws, 3, generator=g, dtype=F64) < last[0]
    down = torch.rand(draws, 3, 4, generator=g, dtype=F64) < first
    simulated = (down & up.unsqueeze(2)).any(1).double().mean(0)
    nodes = node_inclusion({"fc1": first, "fc2": last})
    torch.testing.assert_close(nodes.inputs, simulated, atol=4e-3, rtol=0)
    torch.testing.assert_close(nodes.hidden["fc1"], last[0], atol=1e-12, rtol=0)


def test_the_floor_of_many_weak_weights_inflates_the_product_but_not_the_path():
    first, last = torch.full((400, 2), 0.035, dtype=F64), torch.full((1, 400), 1e-4, dtype=F64)
    weights = {"fc1": first, "fc2": last}
    assert float(node_inclusion(weights, rule=by_product).inputs[0]) > 0.99999
    assert float(node_inclusion(weights).inputs[0]) < 0.002
    assert float(node_inclusion(weights, rule=by_max).inputs[0]) == pytest.approx(0.035)


def test_convolutions_and_flattening_are_followed():
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(12, 2))
    opt = ockham.SpikeSlab(net.named_parameters(), n_data=10)
    with opt.sampled():
        net(torch.randn(4, 2, 3, 3)).square().mean().backward()
    opt.step()
    nodes = node_inclusion(chain_weights(net, opt.posterior()))
    assert nodes.inputs.shape == (2,) and nodes.hidden["0.weight"].shape == (3,)
    with pytest.raises(OckhamError, match="not a chain"):
        node_inclusion({"a": torch.ones(3, 2), "b": torch.ones(1, 4)})
    with pytest.raises(OckhamError, match="no inclusion"):
        chain_weights(net, Posterior({}, 1.0))


def test_living_weights_are_those_on_a_path():
    keep = {
        "a.weight": torch.tensor([[1, 0], [0, 0], [1, 1]], dtype=torch.bool),
        "a.bias": torch.tensor([1, 1, 1], dtype=torch.bool),
        "b.weight": torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=torch.bool),
        "b.bias": torch.tensor([1, 0], dtype=torch.bool),
        "c.weight": torch.tensor([[1, 0]], dtype=torch.bool),
    }
    found = living(keep)
    assert found["c.weight"].tolist() == [[True, False]]
    assert found["b.weight"].tolist() == [[False, False, True], [False, False, False]]  # b1 is unread, a1 unfed
    assert found["a.weight"].tolist() == [[False, False], [False, False], [True, True]]
    assert found["a.bias"].tolist() == [False, False, True] and found["b.bias"].tolist() == [True, False]
    assert keep["a.weight"].any(1).tolist() == [True, False, True]  # untouched
    image = {"conv": torch.ones(2, 1, 3, 3, dtype=torch.bool), "fc": torch.tensor([[0, 0, 1, 0]], dtype=torch.bool)}
    assert living(image)["conv"].flatten(1).any(1).tolist() == [False, True]
    with pytest.raises(OckhamError, match="no chain"):
        living({"a": torch.ones(3, 2, dtype=torch.bool), "b": torch.ones(1, 4, dtype=torch.bool)})
