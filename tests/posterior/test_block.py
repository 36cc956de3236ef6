"""The sampled block: what is perturbed, by what, and that nothing is left behind."""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack, nullcontext

import pytest
import torch

from ockham.errors import OckhamError
from ockham.fit import memory as pieces
from ockham.fit.mean_field import MeanField


def draws(net, opt, count, name="0.weight"):
    found = []
    for _ in range(count):
        with opt.sampled():
            found.append(dict(net.named_parameters())[name].detach().clone())
        opt.zero_grad()
    return torch.stack(found)


def test_mean_outside_draw_inside(toy, snapshot):
    net, opt = toy.make()
    before = snapshot(net)
    with opt.sampled():
        assert all(torch.equal(p, before[n]) != toy.contract.draws for n, p in net.named_parameters())
    assert snapshot.same(net, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_restores_the_mean_to_the_bit(toy, snapshot, error):
    net, opt = toy.train(3)
    before = snapshot(net)
    with pytest.raises(error), opt.sampled():
        toy.loss(net).backward()
        raise error("in the middle")
    assert snapshot.same(net, before)
    toy.step(net, opt)  # and the optimizer goes on


def test_exception_in_a_closure_restores_the_mean(toy, snapshot):
    net, opt = toy.make()
    before = snapshot(net)

    def closure():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        opt.step(closure)
    assert snapshot.same(net, before)


def test_blocks_do_not_nest_and_the_outer_one_still_restores(toy, snapshot):
    net, opt = toy.make()
    before = snapshot(net)
    with pytest.raises(OckhamError, match="cannot be nested"), opt.sampled(), opt.sampled():
        pass
    assert snapshot.same(net, before)
    with opt.sampled():
        pass


@pytest.mark.parametrize("call", ["step", "posterior", "remove", "start_from", "load_state_dict", "add_param_group"])
def test_calls_that_would_mix_mean_and_draw_are_refused_inside_the_block(toy, snapshot, call):
    net, opt = toy.train(2)
    extra = torch.nn.Parameter(torch.ones(2))
    arguments = {
        "remove": ({"2.bias": torch.tensor([True, False])},),
        "start_from": (opt.posterior(),),
        "load_state_dict": (opt.state_dict(),),
        "add_param_group": ({"params": [("extra", extra)]},),
    }.get(call, ())
    before = snapshot(net)
    with pytest.raises(OckhamError, match="inside sampled"), opt.sampled():
        getattr(opt, call)(*arguments)
    assert snapshot.same(net, before) and len(opt.param_groups) == 1
    toy.step(net, opt)


def test_global_random_state_is_untouched(toy):
    net, opt = toy.make()
    before = torch.get_rng_state()
    for _ in range(3):
        toy.step(net, opt)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_comes_from_the_seed_and_not_from_the_global_generator(toy):
    torch.manual_seed(1)
    one = draws(*toy.make(seed=0), 4)
    torch.manual_seed(2)
    assert torch.equal(one, draws(*toy.make(seed=0), 4))
    if toy.contract.draws:
        net = toy.net(0)
        assert not torch.equal(one, draws(net, toy.over(net.named_parameters(), seed=1), 4))


def test_draws_have_the_moments_of_the_posterior(toy):
    toy.needs_draws()
    net = torch.nn.Linear(40, 25, bias=False)
    opt = toy.over(net.named_parameters(), n_data=10, initial_std=0.3)
    with opt.sampled():
        (0 * net(torch.ones(1, 40))).sum().backward()
    opt.step()
    g = opt.posterior()["weight"]
    variance = 1 / g.precision
    if g.inclusion is not None:
        variance = g.inclusion * (variance + (1 - g.inclusion) * g.mean.square())
    z = (draws(net, opt, 200, "weight") - net.weight.detach()) / variance.sqrt()
    z = z[::2]  # the other half are mirrors
    n = z.numel()
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert abs(float(z.square().mean()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float(z.pow(3).mean())) < 4 * math.sqrt(15 / n)
    assert abs(float(z.pow(4).mean()) - 3) < 4 * math.sqrt(96 / n)
    per_weight = z.mean(0).flatten() * math.sqrt(len(z))  # no weight has a draw of its own kind
    assert abs(float(per_weight.square().mean()) - 1) < 4 * math.sqrt(2 / per_weight.numel())
    neighbours = (z[..., 1:] * z[..., :-1]).mean()
    assert abs(float(neighbours)) < 4 / math.sqrt(n)


def test_consecutive_draws_are_mirrored_in_pairs_and_pairs_are_new(toy64):
    toy64.needs_draws()
    net, opt = toy64.make()
    z = draws(net, opt, 6) - dict(net.named_parameters())["0.weight"].detach()
    torch.testing.assert_close(z[0], -z[1], rtol=0, atol=1e-15)
    torch.testing.assert_close(z[2], -z[3], rtol=0, atol=1e-15)
    assert float((z[0] - z[2]).abs().min()) > 0 and float((z[1] - z[2]).abs().min()) > 0


def test_blocks_before_the_same_step_share_a_draw(toy):
    net, opt = toy.make()
    seen = []
    for _ in range(3):
        with opt.sampled():
            seen.append(net[0].weight.detach().clone())
            toy.loss(net).backward()
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    opt.step()
    with opt.sampled():
        assert not torch.equal(seen[0], net[0].weight)


def test_frozen_parameters_are_left_alone(toy, snapshot):
    net, opt = toy.make()
    net[0].weight.requires_grad_(False)
    frozen = net[0].weight.clone()
    with opt.sampled():
        assert torch.equal(net[0].weight, frozen)
    for _ in range(3):
        toy.step(net, opt)
    assert torch.equal(net[0].weight, frozen)
    assert "0.weight" not in opt.posterior() and "0.weight" not in opt.keep()


def test_freezing_one_and_thawing_another_is_noticed(toy):
    toy.needs_draws()
    net = torch.nn.ModuleList([torch.nn.Linear(3, 3, bias=False) for _ in range(2)])
    net[1].weight.requires_grad_(False)
    opt = toy.over(net.named_parameters())
    for frozen, live in ((1, 0), (0, 1)):
        net[frozen].weight.requires_grad_(False)
        net[live].weight.requires_grad_(True)
        before = [p.weight.detach().clone() for p in net]
        opt.zero_grad()
        with opt.sampled():
            assert torch.equal(net[frozen].weight, before[frozen])
            assert not torch.equal(net[live].weight, before[live])
            net[live].weight.square().sum().backward()
        opt.step()
        assert torch.equal(net[frozen].weight, before[frozen])
        assert not torch.equal(net[live].weight, before[live])


def test_a_parameter_thawed_between_two_mirrored_draws_gets_a_real_draw(toy):
    toy.needs_draws()
    net, opt = toy.make()
    net[0].weight.requires_grad_(False)
    toy.step(net, opt)  # the first of a pair
    net[0].weight.requires_grad_(True)
    mean = net[0].weight.detach().clone()
    with opt.sampled():
        assert float((net[0].weight.detach() - mean).abs().min()) > 0


def test_unused_parameters_are_left_alone(toy):
    net, _ = toy.make()
    unused = torch.nn.Parameter(torch.full((3,), 2.0))
    opt = MeanField([*net.named_parameters(), ("unused", unused)], n_data=10, lr=0.1)
    for _ in range(3):
        toy.step(net, opt)
    assert unused.tolist() == [2.0, 2.0, 2.0] and "unused" not in opt.posterior()
    assert bool(opt.keep()["unused"].all())


def test_a_parameter_used_only_sometimes_steps_only_then(toy64):
    # its Adam count and moments are its own: equal to a run in which the other steps never happened to it
    spare = torch.nn.Parameter(torch.tensor([1.0, -1.0], dtype=torch.float64))
    net, _ = toy64.make()
    opt = MeanField([*net.named_parameters(), ("spare", spare)], n_data=50, lr=0.1, kl_warmup=10)
    for k in range(4):
        opt.zero_grad()
        before = spare.detach().clone()
        with opt.sampled():
            (toy64.loss(net) + (spare.sum() * 0.1 if k == 3 else 0)).backward()
        opt.step()
        assert torch.equal(before, spare) == (k != 3)
    # first own step of Adam: the sign of the gradient times lr
    torch.testing.assert_close(before - spare.detach(), torch.full((2,), 0.1, dtype=torch.float64), rtol=1e-3, atol=0)


def test_tied_weights_are_one_weight(toy):
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4, bias=False), "b": torch.nn.Linear(4, 4, bias=False)})
    net["b"].weight = net["a"].weight
    opt = toy.over(net.named_parameters())
    with opt.sampled():
        assert net["b"].weight is net["a"].weight
        net["b"](net["a"](torch.ones(2, 4))).square().mean().backward()
    opt.step()
    assert list(opt.posterior()) == ["a.weight"]


def test_a_tied_weight_listed_twice_is_refused():
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4, bias=False), "b": torch.nn.Linear(4, 4, bias=False)})
    net["b"].weight = net["a"].weight
    with pytest.raises((OckhamError, UserWarning), match="duplicate"):
        MeanField(net.named_parameters(remove_duplicate=False), n_data=10)


def convolutional_run(keep, *, channels_last):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2)).double()
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    net = net.to(memory_format=torch.channels_last) if channels_last else net
    opt = MeanField(net.named_parameters(), n_data=10, lr=0.05, initial_std=0.1)
    for k in range(5):
        opt.zero_grad()
        with opt.sampled():
            net(x).square().mean().backward()
        opt.step()
        if k == 1:
            opt.remove({"0.weight": keep})
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    return net, opt.posterior()


def test_memory_format_changes_nothing(monkeypatch):
    keep = torch.rand(4, 3, 3, 3, generator=torch.Generator().manual_seed(1)) > 0.3
    monkeypatch.setattr(pieces, "_CPU_SPAN", 50)
    monkeypatch.setattr(
        MeanField, "_draw_", lambda self, v: v.copy_(torch.sin(v.storage_offset() + torch.arange(len(v))))
    )
    (plain, want), (net, got) = (convolutional_run(keep, channels_last=c) for c in (False, True))
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    for name, g in got.items():
        torch.testing.assert_close(g.precision, want[name].precision, rtol=1e-10, atol=0)
        assert torch.equal(g.keep, want[name].keep)
    assert bool((net[0].weight[~keep] == 0).all()) and torch.equal(got["0.weight"].keep, keep)


@pytest.mark.parametrize("limit", [1, 7, 31, 1000])
def test_the_size_of_a_span_changes_nothing_but_the_noise(toy64, monkeypatch, limit):
    def noise(self, vector):  # torch's own depends on how many are asked for at once
        at = torch.arange(vector.storage_offset(), vector.storage_offset() + len(vector))
        vector.copy_(torch.sin(at * 12.9898 + 1))

    def run():
        net, opt = toy64.make()
        for k in range(5):
            toy64.step(net, opt)
            if k == 2:
                opt.remove({"0.weight": torch.arange(30).view(6, 5) % 3 > 0})
        return [p.detach().clone() for p in net.parameters()] + [g.precision for g in opt.posterior().values()]

    monkeypatch.setattr(toy64.method, "_draw_", noise)
    whole = run()
    monkeypatch.setattr(pieces, "_CPU_SPAN", limit)
    net, opt = toy64.make()
    toy64.step(net, opt)
    if limit < 50:
        assert max(s.stop - s.start for s in opt._arena(opt.param_groups[0]).spans) <= limit  # the patch is felt
    for a, b in zip(whole, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast_around_a_block_is_autocast_within_it(toy, kind):
    """In either order, and around step, posterior, kl and state as well: the very same bits."""
    moments = []
    for outside in (True, False):
        net, opt = toy.make()
        for _ in range(3):
            opt.zero_grad()
            autocast = torch.autocast("cpu", dtype=kind)
            with ExitStack() as stack:
                for context in (autocast, opt.sampled())[:: 1 if outside else -1]:
                    stack.enter_context(context)
                toy.loss(net).backward()
            opt.step()
        with torch.autocast("cpu", dtype=kind) if outside else nullcontext():
            first, kl = opt.posterior(), opt.kl()
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
            opt.zero_grad()
            with opt.sampled(), torch.autocast("cpu", enabled=False):
                toy.loss(net).backward()
            opt.step()
        moments.append((kl, [(g.mean, g.precision) for g in (*first.values(), *opt.posterior().values())]))
    assert moments[0][0] == moments[1][0]
    for (m, p), (n, q) in zip(moments[0][1], moments[1][1], strict=True):
        assert torch.equal(m, n) and torch.equal(p, q)


def test_a_draw_within_an_autocast_is_no_cast_that_was_kept(toy):
    """Autocast keeps its casts of weights; those of the mean are no draw, and those of the draw no mean."""
    toy.needs_draws()
    net, opt = toy.make(initial_std=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = net(toy.x)
        with opt.sampled():
            drawn = net(toy.x)
        opt.zero_grad()
        with opt.sampled():
            other = net(toy.x)
        again = net(toy.x)
    assert torch.equal(mean, again)
    assert not torch.equal(mean, drawn) and not torch.equal(drawn, other)
