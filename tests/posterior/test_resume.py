"""Resumed = never stopped, to the bit, from a file that needs no pickle."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch

import ockham
from ockham.errors import OckhamError
from ockham.fit.priors import EmpiricalBayes, FixedPrior, LayerScale

KEEP = {"0.weight": torch.arange(30).view(6, 5) % 4 > 0, "2.bias": torch.tensor([True, False])}


def restart(toy, net, opt, path, **options):
    """Everything through files, into a new network and optimizer."""
    torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, path)
    saved = torch.load(path, weights_only=True)
    new, other = toy.make(seed=99, **options)
    new.load_state_dict(saved["net"])
    other.load_state_dict(saved["opt"])
    return new, other


def assert_same_bits(net, opt, other_net, other_opt):
    for p, q in zip(net.parameters(), other_net.parameters(), strict=True):
        assert torch.equal(p, q)
    one, two = opt.posterior(), other_opt.posterior()
    assert list(one) == list(two)
    for name in one:
        for field in ("mean", "precision", "prior_precision", "prior_mean", "keep"):
            assert torch.equal(getattr(one[name], field), getattr(two[name], field)), (name, field)


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 5, 6])
def test_resumed_at_any_step_equals_never_stopped(toy, tmp_path, stop):
    # odd stops fall between the two draws of a mirrored pair; removal happens after step 2, learning of priors every 2
    options = {"prior": EmpiricalBayes(0.5), "prior_interval": 2, "kl_warmup": 3}

    def go_on(net, opt, steps):
        for k in steps:
            toy.step(net, opt)
            if k == 2:
                opt.remove(KEEP)
        return net, opt

    straight = go_on(*toy.make(**options), range(8))
    stopped = go_on(*toy.make(**options), range(stop))
    resumed = go_on(*restart(toy, *stopped, tmp_path / "state.pt", **options), range(stop, 8))
    assert_same_bits(*straight, *resumed)


def test_resumed_between_microbatches_keeps_the_draw(toy, tmp_path):
    net, opt = toy.train(2)
    with opt.sampled():
        drawn = net[0].weight.detach().clone()
    new, other = restart(toy, net, opt, tmp_path / "state.pt")
    with other.sampled():
        assert torch.equal(drawn, new[0].weight)


def test_state_survives_float64_and_a_scheduler(toy64, tmp_path):
    net, opt = toy64.train(3)
    opt.param_groups[0]["lr"] = 1e-4
    new, other = restart(toy64, net, opt, tmp_path / "state.pt")
    assert other.param_groups[0]["lr"] == 1e-4
    for pair in ((net, opt), (new, other)):
        for _ in range(3):
            toy64.step(*pair)
    assert_same_bits(net, opt, new, other)


@pytest.mark.parametrize("prior", [FixedPrior(0.3), LayerScale(0.5, 3.0, 2.0), EmpiricalBayes(0.4, 0.2)])
def test_priors_are_part_of_the_state(toy, tmp_path, prior):
    ((option, value),) = toy.contract.translated({"prior": prior}).items()
    net, opt = toy.train(2, prior=prior)
    _, other = restart(toy, net, opt, tmp_path / "state.pt", prior=FixedPrior(7.0))
    assert other.param_groups[0][option] == value
    assert isinstance(opt.param_groups[0][option], type(value))  # saving changes nothing here


@dataclass(frozen=True)
class Own(FixedPrior):
    """A user's prior."""


def test_a_users_prior_is_restored_by_an_optimizer_that_has_it_and_refused_by_others(toy, tmp_path):
    if toy.contract.prior is not None:
        pytest.skip("takes no such prior")
    net, opt = toy.train(2, prior=Own(0.2))
    _, other = restart(toy, net, opt, tmp_path / "state.pt", prior=Own())
    assert other.param_groups[0]["prior"] == Own(0.2)
    with pytest.raises(OckhamError, match=r"saved prior is a 'Own'; known are"):
        restart(toy, net, opt, tmp_path / "state.pt")


def test_loading_does_not_share_memory_with_the_source(toy):
    net, opt = toy.train(3)
    new, other = toy.make(seed=1)
    new.load_state_dict(net.state_dict())
    other.load_state_dict(opt.state_dict())
    before = {n: g.precision.clone() for n, g in opt.posterior().items()}
    toy.step(new, other)
    assert all(torch.equal(before[n], g.precision) for n, g in opt.posterior().items())


def test_a_foreign_state_is_refused(toy):
    net, opt = toy.train(1)
    with pytest.raises(OckhamError, match="no 'sampler' entry"):
        opt.load_state_dict(torch.optim.Adam(net.parameters()).state_dict())


def test_start_from_takes_mean_std_and_removal(toy):
    _, opt = toy.train(4)
    opt.remove(KEEP)
    posterior = opt.posterior()
    new, other = toy.make(seed=5)
    other.start_from(posterior)
    for name, p in new.named_parameters():
        torch.testing.assert_close(p.detach(), posterior[name].expected, rtol=1e-5, atol=1e-6)
    toy.step(new, other)
    assert all(torch.equal(other.keep()[n], g.keep) for n, g in posterior.items())
    net, fresh = toy.make(3, lr=1e-9)
    fresh.start_from(posterior)
    with fresh.sampled():
        (0 * toy.loss(net)).backward()
    fresh.step()
    if toy.contract.takes_spread:
        for name, g in fresh.posterior().items():
            tolerance = 1e-5 if toy.contract.spread_is_stepped else 2e-2
            torch.testing.assert_close(g.std, posterior[name].std, rtol=tolerance, atol=0)


def test_start_from_refuses_what_does_not_fit(toy):
    _, opt = toy.train(1)
    other = toy.over([("0.weight", torch.nn.Parameter(torch.ones(2, 2)))])
    with pytest.raises(OckhamError, match=r"unknown names \['0.bias'.*other shapes \['0.weight'\]"):
        other.start_from(opt.posterior())


@pytest.mark.parametrize("how", ["deepcopy", "sliced"])
def test_a_copy_under_a_scheduler_steps_itself_and_keeps_what_a_subclass_added(toy, how):
    """A scheduler puts its own ``step`` on the optimizer, bound to it: a copy must not step the original."""
    net, opt = toy.train(2)
    opt.remark = {"of": "a subclass"}
    torch.optim.lr_scheduler.StepLR(opt, 1)
    if how == "deepcopy":
        new, other = copy.deepcopy((net, opt))
    else:
        new = copy.deepcopy(net)
        other = opt.sliced(dict(new.named_parameters()), lambda name, tensor: tensor)
    assert other.remark == {"of": "a subclass"}
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    toy.step(new, other)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert all(not torch.equal(p, before[n]) for n, p in new.named_parameters())


def test_the_state_of_another_optimizer_is_refused_by_name():
    """Not by a KeyError at the next step."""
    net = torch.nn.Linear(3, 2)
    first = ockham.MeanField(net.named_parameters(), n_data=10)
    with first.sampled():
        net(torch.ones(4, 3)).sum().backward()
    first.step()
    with pytest.raises(OckhamError, match=r"state of another optimizer, without .*hessian.*IVON"):
        ockham.IVON(net.named_parameters(), n_data=10).load_state_dict(first.state_dict())
