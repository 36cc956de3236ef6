"""Reduction of a trained network at once: shares, compensation, the evidence's stop, what is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ockham import laplace, load_posterior, reduce, score
from ockham.choose.correlated import reduced, removed_in_rounds
from ockham.core.posterior import Gaussian, Posterior
from ockham.errors import OckhamError, OckhamWarning
from ockham.zoo.data import Batches


@pytest.fixture(scope="module")
def trained():
    """A network on two moons-like classes with inputs that are nearly copies of each other."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (600,), generator=g)
    base = torch.randn(600, 6, generator=g) + 1.2 * y[:, None]
    x = torch.cat([base, base + 0.1 * torch.randn(600, 6, generator=g)], 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 2))
    opt = torch.optim.Adam(net.parameters(), lr=5e-3, weight_decay=1e-4)
    for _ in range(150):
        opt.zero_grad()
        nn.functional.cross_entropy(net(x[:400]), y[:400]).backward()
        opt.step()
    return net.eval(), x, y


def posterior_of(trained, structure):
    net, x, y = trained
    return laplace(net, Batches(x[:400], y[:400], 100, shuffle=False), structure=structure)


@pytest.fixture(scope="module")
def kronecker(trained):
    return posterior_of(trained, "kronecker")


@pytest.fixture(scope="module")
def diagonal(trained):
    return posterior_of(trained, "diagonal")


def zeros(net):
    return sum(int((p == 0).sum()) for p in net.parameters() if p.ndim > 1)


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.25])
@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
def test_a_budget_is_met_to_the_weight(trained, diagonal, kronecker, structure, keep):
    net = trained[0]
    before = copy.deepcopy(net.state_dict())
    small = reduce(net, {"diagonal": diagonal, "kronecker": kronecker}[structure], keep=keep)
    total = 12 * 32 + 64
    assert zeros(small) == total - round(keep * total)
    assert small is not net and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(bool((p != 0).all()) for p in small.parameters() if p.ndim == 1)


def test_independent_survivors_stay_and_correlated_ones_move(trained, diagonal, kronecker):
    net = trained[0]
    still, moved = reduce(net, diagonal, keep=0.4), reduce(net, kronecker, keep=0.4)
    kept = still[0].weight != 0
    assert torch.equal(still[0].weight[kept], net[0].weight[kept]) and torch.equal(still[0].bias, net[0].bias)
    kept = moved[0].weight != 0
    assert float((moved[0].weight - net[0].weight).detach()[kept].abs().max()) > 0.01
    assert not torch.equal(moved[0].bias, net[0].bias)


def test_compensation_in_rounds_keeps_the_function(trained, kronecker):
    net, x, _ = trained
    want = net(x[400:]).detach()

    def error(small):
        return float((small(x[400:]).detach() - want).square().mean())

    masks = {n: g.keep for n, g in removed_in_rounds(kronecker, 0.3, protected=["0.bias", "2.bias"]).items()}
    plain = copy.deepcopy(net)
    for name, p in plain.named_parameters():
        p.data.mul_(masks[name])
    rounds = error(reduce(net, kronecker, keep=0.3))
    assert rounds < 0.3 * error(plain)
    assert rounds < error(reduce(net, kronecker, keep=0.3, rounds=1))


def test_of_two_copies_one_goes_and_the_other_takes_over():
    # y = 2 (a + b) / 2 with a = b: the marginal lets either go, the survivor doubles
    net = nn.Linear(2, 1, bias=False).double()
    net.weight.data.fill_(1.0)
    a = torch.randn(200, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([a, a], 1)
    posterior = laplace(net, [(x, 2 * a)], likelihood="regression", prior=0.1, noise_variance=0.1)
    evidence = score(posterior)
    g = posterior["weight"]
    assert float(g.precision.max()) > 50 * float(g.marginal_precision.max())
    assert float(evidence["weight"].min()) > -1  # alone, either one
    small = reduce(net, posterior, keep=0.5)
    assert sorted(small.weight.detach().reshape(-1).tolist()) == pytest.approx([0.0, 2.0], rel=0.01)
    with pytest.warns(OckhamWarning):
        none = reduce(net, posterior)  # the evidence never takes both
    assert zeros(none) <= 1


def test_the_evidence_stops_by_itself(trained, kronecker, diagonal):
    net, x, y = trained

    def accuracy(model):
        return float(model(x[400:]).argmax(1).eq(y[400:]).float().mean())

    small = {s: reduce(net, p) for s, p in (("kronecker", kronecker), ("diagonal", diagonal))}
    share = {s: zeros(m) / 448 for s, m in small.items()}
    assert 0.02 < share["diagonal"] < share["kronecker"] < 0.98
    assert all(accuracy(m) > accuracy(net) - 0.03 for m in small.values())


def test_an_interpolating_optimum_is_announced_and_ranked_by_snr():
    # hardly any data, large weights: most weights are what initialisation left
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 2))
    x, y = torch.randn(4, 30), torch.tensor([0, 1, 0, 1])
    opt = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(300):
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
    posterior = laplace(net, [(x, y)], structure="diagonal")
    with pytest.warns(OckhamWarning, match="undetermined"):
        small = reduce(net, posterior)
    snr = torch.cat([(posterior[n].precision * posterior[n].mean ** 2).reshape(-1) for n in ("0.weight", "2.weight")])
    gone = torch.cat([(small[0].weight == 0).reshape(-1), (small[2].weight == 0).reshape(-1)])
    assert not gone.any() or float(snr[gone].max()) <= float(snr[~gone].min())


def test_protected_weights_stay_and_are_no_part_of_the_share(trained, kronecker):
    small = reduce(trained[0], kronecker, keep=0.5, ignore=["2"])
    assert int((small[0].weight == 0).sum()) == 192 and bool((small[2].weight != 0).all())


def test_weights_removed_before_stay_removed(trained, kronecker):
    net = trained[0]
    once = reduced(kronecker, {"0.weight": torch.rand(32, 12) < 0.8})
    gone = ~once["0.weight"].keep
    small = reduce(net, once, keep=0.5)
    assert bool((small[0].weight[gone] == 0).all())


def test_correlations_survive_the_disk(tmp_path, trained, kronecker):
    kronecker.save(tmp_path / "p.safetensors")
    again = load_posterior(tmp_path / "p.safetensors")
    assert [b.names for b in again.matrices] == [("0.weight", "0.bias"), ("2.weight", "2.bias")]
    a, b = reduce(trained[0], kronecker, keep=0.3), reduce(trained[0], again, keep=0.3)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_bad_input_is_named(trained, kronecker):
    net = trained[0]
    with pytest.raises(OckhamError, match="do not fit"):
        reduce(nn.Linear(3, 2), kronecker)
    for keep in (0.0, 1.5, -1.0):
        with pytest.raises(OckhamError, match="share"):
            reduce(net, kronecker, keep=keep)
    with pytest.raises(OckhamError, match="rounds"):
        reduce(net, kronecker, keep=0.5, rounds=0)
    with pytest.raises(OckhamError, match="nothing to remove"):
        reduce(net, kronecker, keep=0.5, ignore=["0", "2"])
    with pytest.raises(OckhamError, match="keep names"):
        reduced(kronecker, {"x": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(OckhamError, match="boolean"):
        reduced(kronecker, {"0.weight": torch.ones(32, 12)})


def test_any_mapping_of_moments_will_do():
    net = nn.Linear(4, 1, bias=False)
    mean, one = net.weight.detach().clone(), torch.ones(())
    g = Gaussian(mean, torch.tensor([[1e4, 1.0, 1.0, 1e4]]), one, 0 * one, torch.ones(1, 4, dtype=torch.bool))
    small = reduce(net, Posterior({"weight": g}, 10.0), keep=0.5)
    assert (small.weight != 0).tolist() == [[True, False, False, True]]
