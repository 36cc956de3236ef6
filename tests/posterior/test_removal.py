"""Removed weights: exactly zero for good, noiseless, free of KL, and no change for the survivors."""

from __future__ import annotations

import copy

import pytest
import torch

from ockham.errors import OckhamError
from ockham.fit.ivon import IVON
from ockham.fit.priors import FixedPrior

KEEP = torch.arange(30).view(6, 5) % 3 > 0


def test_removed_weights_are_zero_inside_and_outside_the_block_for_good(toy):
    net, opt = toy.train(3)
    assert opt.remove({"0.weight": KEEP}) == 10
    for _ in range(4):
        assert bool((net[0].weight[~KEEP] == 0).all())
        with opt.sampled():
            assert bool((net[0].weight[~KEEP] == 0).all()) and bool((net[0].weight[KEEP] != 0).all())
            toy.loss(net).backward()
        opt.step()
        opt.zero_grad()
    g = opt.posterior()["0.weight"]
    assert torch.equal(g.keep, KEEP) and bool((g.std[~KEEP] == 0).all()) and bool((g.mean[~KEEP] == 0).all())


def test_removed_weights_pay_no_kl(toy):
    """Removal takes exactly their own share off: twins of which one has only these weights, the other the rest."""
    _, opt = toy.train(3, prior=FixedPrior(0.2))
    twins = [copy.deepcopy(opt) for _ in range(2)]
    whole = opt.kl()
    for twin, mask in zip(twins, (KEEP, ~KEEP), strict=True):
        twin.remove({"0.weight": mask})
    rest = {n: torch.zeros_like(k) for n, k in opt.keep().items() if n != "0.weight"}
    twins[1].remove(rest)
    assert twins[0].kl() > 0 and twins[1].kl() > 0
    assert twins[0].kl() + twins[1].kl() == pytest.approx(whole, rel=1e-6)


def test_survivors_step_as_if_the_others_had_never_been(toy64, monkeypatch):
    if toy64.method is IVON:
        pytest.skip("its first step is scaled by the mean curvature of the whole tensor")
    # twin: a dense vector whose removed entries have no effect; elementwise updates must agree for equal noise
    noise = torch.linspace(-1.5, 1.7, 12).half()
    keep = torch.tensor([True, False, True] * 4)
    source = torch.linspace(-1, 1, 12, dtype=torch.float64)
    if toy64.contract.draws:
        draw = lambda self, v: v.copy_(noise if len(v) == 12 else noise[keep])  # noqa: E731
        monkeypatch.setattr(toy64.method, "_draw_", draw)

    def run(remove):
        w = torch.nn.Parameter(source.clone())
        opt = toy64.over([("w", w)], n_data=30, lr=0.001 if toy64.method.__name__ == "NaturalGradient" else 0.05)
        for k in range(6):
            opt.zero_grad()
            with opt.sampled():
                (w[keep] - 0.3).pow(4).mean().backward()
            opt.step()
            if remove and k == 2:
                opt.remove({"w": keep})
        return w.detach(), opt.posterior()["w"].precision

    (dense, want), (sparse, got) = run(False), run(True)
    torch.testing.assert_close(sparse[keep], dense[keep], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got[keep], want[keep], rtol=1e-12, atol=0)


def test_removal_in_two_rounds_adds_up_and_never_comes_back(toy):
    net, opt = toy.train(2)
    first, second = torch.rand(6, 5) > 0.3, torch.rand(6, 5) > 0.3
    one = opt.remove({"0.weight": first})
    toy.step(net, opt)
    two = opt.remove({"0.weight": second})
    assert one + two == int((~(first & second)).sum())
    assert opt.remove({"0.weight": torch.ones(6, 5, dtype=torch.bool)}) == 0
    assert torch.equal(opt.keep()["0.weight"], first & second)
    toy.step(net, opt)
    assert bool((net[0].weight[~(first & second)] == 0).all())
    assert opt.posterior().kept() == opt.posterior().size() - one - two


@pytest.mark.parametrize("after", [0, 2])
def test_everything_can_go_from_one_parameter_or_from_all(toy, after):
    net, opt = toy.train(after)
    opt.remove({"0.weight": torch.zeros(6, 5, dtype=torch.bool)})
    toy.step(net, opt)
    assert bool((net[0].weight == 0).all()) and opt.posterior()["0.weight"].keep.sum() == 0
    opt.remove({n: torch.zeros_like(p, dtype=torch.bool) for n, p in net.named_parameters()})
    toy.step(net, opt)
    assert opt.kl() == 0.0 and all(bool((p == 0).all()) for p in net.parameters())


def test_removal_between_block_and_step_keeps_the_draw_of_the_survivors(toy):
    net, opt = toy.make()
    with opt.sampled():
        toy.loss(net).backward()
        drawn = net[0].weight.detach().clone()
    opt.remove({"0.weight": KEEP})
    with opt.sampled():
        assert torch.equal(net[0].weight[KEEP], drawn[KEEP])
    opt.step()
    assert bool((net[0].weight[~KEEP] == 0).all())


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"nobody": KEEP}, "'nobody', which this optimizer does not hold"),
        ({"0.weight": KEEP.float()}, r"must be boolean.*got torch.float32"),
        ({"0.weight": KEEP[:3]}, r"of shape \(6, 5\).*got torch.bool of shape \(3, 5\)"),
    ],
)
def test_bad_masks_are_named_and_nothing_is_removed(toy, keep, message):
    _, opt = toy.train(1)
    with pytest.raises(OckhamError, match=message):
        opt.remove({"0.bias": torch.zeros(6, dtype=torch.bool), **keep})
    assert bool(opt.keep()["0.bias"].all())


def test_returned_masks_and_moments_are_copies(toy):
    net, opt = toy.train(2)
    opt.remove({"0.weight": KEEP})
    mask, g = opt.keep()["0.weight"], opt.posterior()["0.weight"]
    mask.fill_(True)
    g.keep.fill_(True), g.mean.fill_(9.0)
    assert torch.equal(opt.keep()["0.weight"], KEEP) and float(net[0].weight.detach().max()) < 9.0
    saved = opt.posterior()["0.weight"].mean.clone()
    old = opt.posterior()["0.weight"]
    toy.step(net, opt)
    assert torch.equal(old.mean, saved) and not old.mean.requires_grad
