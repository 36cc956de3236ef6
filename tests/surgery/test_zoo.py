"""Every rule of tracing on a small network: masked = shrunk, nothing refused that must go, the original untouched."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from ockham.surgery import mask, random_plan, shrink, trace, verify

from .law import difference, outputs, randomise, worst_difference
from .nets import MUST, ZOO


@functools.cache
def traced(name):
    """The network, its inputs and its groups; nothing in these tests may change them."""
    model, x = build(name)
    return model, x, trace(model, x)


def build(name):
    torch.manual_seed(0)
    make, inputs = ZOO[name]
    model, x = make().eval(), inputs()
    randomise(model, torch.Generator().manual_seed(1))
    return model, x


@pytest.mark.parametrize("name", ZOO)
def test_masked_equals_shrunk(name):
    model, x, groups = traced(name)
    for ratio in (0.1, 0.3, 0.5, 0.7):
        for seed in range(3):
            gap, _ = worst_difference(model, groups, x, ratio=ratio, seed=seed)
            assert gap <= 1e-5, (ratio, seed)


@pytest.mark.filterwarnings("ignore:nothing of this network can be removed")
@pytest.mark.parametrize("name", ZOO)
def test_a_small_network_can_be_shrunk_again(name):
    model, x, groups = traced(name)
    small = shrink(model, random_plan(groups, 0.3, generator=torch.Generator().manual_seed(0)))
    left = {k: n - round(0.3 * n) for k, n in MUST[name].items()}
    again = trace(small, x)
    if name != "deconv_grouped":  # one channel per group left: depthwise now, which has finer units
        assert {g.id: g.size for g in again} == {k: n for k, n in left.items() if n > 1}
    assert worst_difference(small, again, x, ratio=0.3, seed=1)[0] <= 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:nothing of this network can be removed")
@pytest.mark.parametrize("name", ZOO)
def test_a_small_network_can_be_shrunk_again_and_again(name):
    model, x = build(name)
    for seed in range(3):
        groups = trace(model, x)
        if seed < 2:
            assert {g.id for g in groups} <= set(MUST[name])
        assert worst_difference(model, groups, x, ratio=0.3, seed=seed)[0] <= 1e-5
        model = shrink(model, random_plan(groups, 0.3, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_masked_equals_shrunk_twenty_seeds(name):
    model, x, groups = traced(name)
    for ratio in (0.1, 0.3, 0.5, 0.7):
        for seed in range(20):
            assert worst_difference(model, groups, x, ratio=ratio, seed=seed)[0] <= 1e-5, (ratio, seed)


@pytest.mark.parametrize("name", ZOO)
def test_what_must_be_prunable_is(name):
    _, _, groups = traced(name)
    assert {g.id: g.size for g in groups} == MUST[name]
    for ratio in (0.3, 0.5, 0.7):
        asked = sum(min(round(ratio * g.size), g.size - 1) for g in groups)
        plan = random_plan(groups, ratio, generator=torch.Generator().manual_seed(0))
        assert sum(map(len, plan.removed.values())) == asked


@pytest.mark.parametrize("name", ["mlp", "dense_cat", "lstm", "encoder", "tied", "chan_shuffle"])
def test_a_removal_changes_the_function_and_leaves_the_original(name):
    model, x, groups = traced(name)
    before = copy.deepcopy(model.state_dict())
    plan = random_plan(groups, 0.5, generator=torch.Generator().manual_seed(0))
    masked, small = mask(model, plan), shrink(model, plan)
    assert verify(masked, small, x) <= 1e-5
    assert difference(outputs(model, x), outputs(masked, x)) > 1e-3
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("name", ["nano", "encoder", "lstm", "split_parts", "vae"])
def test_the_small_network_takes_other_batches_and_trains(name):
    model, x, groups = traced(name)
    small = shrink(model, random_plan(groups, 0.5, generator=torch.Generator().manual_seed(0)))
    many = torch.cat([x, x, x])
    assert difference(outputs(small, many), [torch.cat([y] * 3) for y in outputs(small, x)]) <= 1e-5
    small.train()
    small(many).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())
