"""SpikeSlab: the optimizer's contract, the paired optimum, hyper-priors, propagation, bad settings."""

from __future__ import annotations

import copy

import pytest
import torch

import ockham
from ockham.core.posterior import load_posterior
from ockham.errors import OckhamError
from ockham.evidence.exact import exact_inclusion
from ockham.fit.mean_field import MeanField
from ockham.methods.spike_slab.optimizer import SpikeSlab, by_gradient, by_moments
from ockham.methods.spike_slab.priors import FixedSpikeSlab, LearnedSpikeSlab

F64 = torch.float64
KEEP = {"0.weight": torch.arange(30).view(6, 5) % 4 > 0, "2.bias": torch.tensor([True, False])}
LEARNED = {"prior": LearnedSpikeSlab(0.5, 1.0), "prior_interval": 2, "kl_warmup": 3}


@pytest.fixture
def toy(mean_field):
    return mean_field


@pytest.fixture
def toy64(mean_field):
    return type(mean_field)(mean_field.contract, F64)


def make(toy, seed=0, propagate=None, **options):
    net = toy.net(seed)
    opt = SpikeSlab(net.named_parameters(), **{"n_data": 200, "lr": 0.01, "initial_std": 0.1, **options})
    if propagate:
        opt.propagate(net, update=propagate)
    return net, opt


def same(one, two):
    for name in one:
        for field in ("mean", "precision", "inclusion", "keep", "prior_precision"):
            if not torch.equal(getattr(one[name], field), getattr(two[name], field)):
                return False
    return list(one) == list(two)


@pytest.mark.parametrize("propagate", [None, by_moments, by_gradient])
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 5])
def test_resumed_at_any_step_equals_never_stopped(toy, tmp_path, stop, propagate):
    def go_on(net, opt, steps):
        for k in steps:
            toy.step(net, opt)
            if k == 2:
                opt.remove(KEEP)
        return net, opt

    _, straight = go_on(*make(toy, propagate=propagate, **LEARNED), range(8))
    net, opt = go_on(*make(toy, propagate=propagate, **LEARNED), range(stop))
    torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, tmp_path / "s.pt")
    saved = torch.load(tmp_path / "s.pt", weights_only=True)
    new, other = make(toy, seed=9, propagate=propagate, **LEARNED)
    new.load_state_dict(saved["net"])
    other.load_state_dict(saved["opt"])
    go_on(new, other, range(stop, 8))
    assert same(straight.posterior(), other.posterior())


def test_a_propagated_state_needs_propagation(toy):
    net, opt = make(toy, propagate=by_moments)
    toy.step(net, opt)
    _, other = make(toy)
    with pytest.raises(OckhamError, match="propagate"):
        other.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("propagate", [None, by_moments, by_gradient])
def test_an_exception_restores_the_mean(toy, snapshot, propagate):
    net, opt = make(toy, propagate=propagate)
    toy.step(net, opt)
    before = snapshot(net)
    with pytest.raises(RuntimeError), opt.sampled():
        raise RuntimeError
    assert snapshot.same(net, before)
    with torch.no_grad():  # no noise is left behind
        assert torch.equal(net(toy.x), net(toy.x))


@pytest.mark.parametrize("propagate", [None, by_moments, by_gradient])
def test_removed_weights_are_zero_and_the_survivors_step_as_if_they_had_never_been(toy, propagate):
    net, opt = make(toy, propagate=propagate)
    toy.step(net, opt)
    opt.remove(KEEP)
    for _ in range(3):
        toy.step(net, opt)
    weight = net[0].weight
    assert bool((weight[~KEEP["0.weight"]] == 0).all())
    g = opt.posterior()["0.weight"]
    assert bool((g.inclusion[~g.keep] == 0).all()) and bool((g.inclusion[g.keep] > 0).all())
    assert opt.state[weight]["logit"].numel() == int(KEEP["0.weight"].sum())


def test_outside_the_block_parameters_hold_the_expected_weight(toy):
    net, opt = make(toy)
    for _ in range(5):
        toy.step(net, opt)
    g = opt.posterior()["0.weight"]
    torch.testing.assert_close(net[0].weight.detach(), g.expected)
    torch.testing.assert_close(g.expected, g.inclusion * g.mean)


@pytest.mark.parametrize("through", [False, True])
def test_draws_have_the_moments_of_the_mixture(toy64, through):
    # a linear network's outputs over many blocks: mean and variance from E[w] and V
    net = torch.nn.Linear(5, 2, dtype=F64)
    opt = SpikeSlab(net.named_parameters(), n_data=10, initial_std=0.3, initial_inclusion=0.6)
    if through:
        assert all("pre-activations" in said for said in opt.propagate(net).values())
    out = []
    for _ in range(1000):
        with opt.sampled(), torch.no_grad():
            out.append(net(toy64.x[:1]))
        opt.zero_grad()
    out = torch.stack(out)
    m, pi, s2 = net.weight.detach() / 0.6, 0.6, 0.09
    v = pi * (s2 + (1 - pi) * m.square())
    v_bias = pi * (s2 + (1 - pi) * (net.bias.detach() / 0.6).square())
    want = toy64.x[:1].square() @ v.T + v_bias
    torch.testing.assert_close(out.var(0), want, rtol=0.2, atol=0)
    torch.testing.assert_close(out.mean(0), net(toy64.x[:1]).detach(), rtol=0, atol=0.15)


def design(rho, seed=3, n=60, p=6):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, p, generator=g)
    for j in range(1, p):
        z[:, j] = rho * z[:, j - 1] + (1 - rho**2) ** 0.5 * z[:, j]
    y = z @ torch.tensor([0.8, 0.0, 0.25, 0.0, -0.4, 0.0]) + torch.randn(n, generator=g)
    return z, y


@pytest.mark.parametrize("propagate", [None, by_moments, by_gradient])
def test_a_linear_model_ends_near_its_exact_inclusion(propagate):
    x, y = design(0.3)
    want = exact_inclusion(x, y, prior_inclusion=0.2, slab_variance=1.0, noise_variance=1.0).probabilities
    net = torch.nn.Linear(6, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    settings = {"prior": FixedSpikeSlab(0.2), "initial_std": 0.1, "initial_inclusion": 0.5, "inclusion_rate": 0.05}
    opt = SpikeSlab(net.named_parameters(), n_data=60, lr=0.03, betas=(0.9, 0.99), **settings)
    if propagate:
        opt.propagate(net, update=propagate)
    logits = []
    for k in range(900):
        opt.param_groups[0]["lr"] = 0.03 * 0.02 ** (k / 900)
        opt.zero_grad()
        with opt.sampled():
            (0.5 * (net(x)[:, 0] - y).square().mean()).backward()
        opt.step()
        if k >= 600:
            logits.append(opt.state[net.weight]["logit"].clone())
    got = torch.sigmoid(torch.stack(logits).mean(0))
    assert float((got - want).abs().max()) < 0.1
    assert float(torch.corrcoef(torch.stack([got, want]))[0, 1]) > 0.99


def test_updates_say_how_each_parameter_is_found():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words = torch.nn.Embedding(7, 8)
            self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
            self.rnn = torch.nn.LSTM(8, 4, batch_first=True)
            self.conv = torch.nn.Conv1d(4, 4, 3, padding=1)
            self.out = torch.nn.Linear(4, 3)

        def forward(self, x):
            h = self.words(x)
            h = self.rnn(self.attention(h, h, h, need_weights=False)[0])[0]
            return self.out(torch.relu(self.conv(h.transpose(1, 2)).transpose(1, 2)))

    net = Net()
    opt = SpikeSlab(net.named_parameters(), n_data=100)
    said = opt.propagate(net, update=by_gradient)
    driven = {n for n, text in said.items() if text.startswith("E3")}
    assert driven == {"conv.weight", "conv.bias", "out.weight", "out.bias"}
    before = opt.posterior
    x = torch.randint(0, 7, (3, 5), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        opt.zero_grad()
        with opt.sampled():
            net(x).square().mean().backward()
        opt.step()
    assert all(torch.isfinite(g.inclusion).all() for g in before().values())
    assert len(opt.posterior()) == len(dict(net.named_parameters()))
    opt.release()
    assert not any(text.startswith("E3") for text in opt.updates().values())


def test_scaled_and_clipped_gradients_reach_the_variance_too(toy):
    one, first = make(toy, propagate=by_moments)
    two, second = make(toy, propagate=by_moments)
    for net, opt, factor in ((one, first, 1.0), (two, second, 1024.0)):
        with opt.sampled():
            (toy.loss(net) * factor).backward()
        for p in net.parameters():
            p.grad /= factor
        opt.step()
    assert same(first.posterior(), second.posterior())


def test_learned_hyper_priors_are_the_closed_form_of_the_posterior(toy):
    net, opt = make(toy, prior=LearnedSpikeSlab(0.5, 1.0, shape=3.0), prior_interval=4)
    for _ in range(4):
        toy.step(net, opt)
    g, state = opt.posterior()["0.weight"], opt.state[net[0].weight]
    pi, m, v = (t.double() for t in (g.inclusion, g.mean, 1 / g.precision))
    a, b = 1 + pi.sum(), 1 + (1 - pi).sum()
    assert state["log_rate"] - state["log_rest"] == pytest.approx(float(torch.digamma(a) - torch.digamma(b)), abs=1e-5)
    c, d = 3 + 0.5 * pi.sum(), 3 + 0.5 * (pi * (m.square() + v)).sum()
    assert state["prior_precision"] == pytest.approx(float(c / d), rel=1e-5)
    assert state["log_slab_variance"] == pytest.approx(float(d.log() - torch.digamma(c)), abs=1e-5)


def test_kl_of_the_living_weights_against_a_sum_over_both_states(toy64):
    """The expectation of the log ratio over both states of inclusion, the slab's part by torch.distributions."""
    _, opt = make(toy64, prior=FixedSpikeSlab(0.1, 0.7))
    toy64.step(_, opt)
    opt.remove(KEEP)
    want = 0.0
    for g in opt.posterior().values():
        pi, normal = g.inclusion[g.keep], torch.distributions.Normal(g.mean[g.keep], g.std[g.keep])
        slab = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 0.7**0.5))
        want += float((pi * (slab + (pi / 0.1).log()) + (1 - pi) * ((1 - pi) / 0.9).log()).sum())
    assert opt.kl() == pytest.approx(want, rel=1e-9)


def test_start_from_takes_any_posterior(toy):
    net, opt = make(toy)
    for _ in range(3):
        toy.step(net, opt)
    _, other = make(toy, seed=5)
    other.start_from(opt.posterior())
    there, here = (o.state[o.param_groups[0]["params"][0]]["logit"] for o in (other, opt))
    torch.testing.assert_close(there, here, atol=1e-4, rtol=0)
    gaussian = MeanField(net.named_parameters(), n_data=10)
    with gaussian.sampled():
        toy.loss(net).backward()
    gaussian.step()
    other.start_from(gaussian.posterior())
    with pytest.raises(OckhamError, match="does not fit"):
        SpikeSlab([("x", torch.nn.Parameter(torch.zeros(2)))], n_data=10).start_from(opt.posterior())


def test_posterior_survives_a_file_and_predicts_by_bernoulli_draws(toy, tmp_path):
    from ockham.fit.predict import draw_parameters

    net, opt = make(toy, initial_inclusion=0.3)
    toy.step(net, opt)
    opt.remove(KEEP)
    opt.posterior().save(tmp_path / "p.safetensors")
    back = load_posterior(tmp_path / "p.safetensors")
    assert same(opt.posterior(), back)
    g = back["0.weight"]
    generator = torch.Generator().manual_seed(0)
    share = torch.stack([draw_parameters(back, generator)["0.weight"] != 0 for _ in range(400)]).float().mean(0)
    torch.testing.assert_close(share, g.inclusion, atol=0.12, rtol=0)


def test_gaussian_spike_keeps_its_width(toy):
    net, opt = make(toy, prior=FixedSpikeSlab(0.2, 1.0, spike_variance=0.01))
    for _ in range(5):
        toy.step(net, opt)
    assert all(torch.isfinite(g.inclusion).all() for g in opt.posterior().values())
    net, opt = make(toy, propagate=by_moments, prior=FixedSpikeSlab(0.2, 1.0, spike_variance=0.01))
    for _ in range(5):
        toy.step(net, opt)
    assert all(torch.isfinite(g.inclusion).all() for g in opt.posterior().values())


def test_unused_and_frozen_parameters_are_left_alone(toy):
    net = toy.net()
    net[0].bias.requires_grad_(False)
    before = copy.deepcopy(net[0].bias)
    opt = SpikeSlab(net.named_parameters(), n_data=10)
    opt.propagate(net)
    toy.step(net, opt)
    assert torch.equal(before, net[0].bias) and "0.bias" not in opt.posterior()
    assert opt.updates()["0.weight"].startswith("E4")  # its layer is frozen in part


@pytest.mark.parametrize(
    "bad",
    [
        {"n_data": 0},
        {"initial_inclusion": 1.0},
        {"inclusion_rate": 0.0},
        {"kl_warmup": -1},
        {"betas": (0.9, 1.0)},
        {"prior": 0.1},
    ],
)
def test_settings_out_of_range_are_named(toy, bad):
    with pytest.raises(OckhamError, match=next(iter(bad))):
        make(toy, **bad)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"inclusion": 0.0}, "inclusion"),
        ({"slab_variance": -1.0}, "slab_variance"),
        ({"spike_variance": 2.0}, "spike_variance"),
    ],
)
@pytest.mark.parametrize("kind", [FixedSpikeSlab, LearnedSpikeSlab])
def test_priors_out_of_range_are_named(kind, bad, match):
    with pytest.raises(OckhamError, match=match):
        kind(**bad)


@pytest.mark.parametrize("update", [by_moments, by_gradient])
def test_noise_stays_in_pre_activations_when_the_network_shrinks(update):
    torch.manual_seed(0)
    net, x = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2)), torch.randn(16, 4)
    opt = SpikeSlab(net.named_parameters(), n_data=50, lr=0.01, initial_std=0.1)
    opt.propagate(net, update=update)
    plan = ockham.random_plan(ockham.trace(net, x), 0.5)
    small, carried = ockham.shrink(net, plan, optimizer=opt)
    assert carried.updates() == opt.updates()
    before = [p.clone() for p in small.parameters()]
    with carried.sampled():
        assert all(torch.equal(p, q) for p, q in zip(small.parameters(), before, strict=True))
        one, two = small(x), small(x)
        assert not torch.equal(one, two)  # each pass its own noise, once a layer
        one.square().mean().backward()
    assert sum(len(m._forward_hooks) for m in small.modules()) == 2
    assert all(bool((carried.state[p]["variance_grad"] != 0).any()) for p in small.parameters())
    carried.step()


@pytest.mark.parametrize("propagate", [None, by_moments, by_gradient])
def test_a_copy_of_network_and_optimizer_goes_on_alike(toy, propagate):
    net, opt = make(toy, propagate=propagate)
    for _ in range(3):
        toy.step(net, opt)
    opt.remove(KEEP)
    twin, other = copy.deepcopy((net, opt))
    if propagate:
        with pytest.raises(OckhamError, match="follow"), other.sampled():
            pass
        other.zero_grad()
        other.follow(twin)
    for _ in range(4):
        toy.step(net, opt)
        toy.step(twin, other)
    assert same(opt.posterior(), other.posterior())
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(net.parameters(), twin.parameters(), strict=True))
