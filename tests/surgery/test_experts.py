"""Whole experts: the network without one is that whose router never chooses it, by hand and by Ockham."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ockham
from ockham.choose.units import unit_evidence
from ockham.surgery import PlanError, mask, shrink, trace, verify
from ockham.surgery.groups import plan_masks
from ockham.surgery.refitting import plan_unread

from .law import difference, outputs, saved_and_loaded


class Router(nn.Module):
    def __init__(self, width, count, top_k, biased):
        super().__init__()
        self.top_k, self.num_experts = top_k, count
        self.weight = nn.Parameter(torch.randn(count, width))
        self.register_buffer("shift", torch.randn(count) if biased else None)

    def forward(self, x):
        logits = F.linear(x, self.weight)
        share = logits.sigmoid() if self.shift is not None else logits.softmax(-1)
        chosen = (share if self.shift is None else share + self.shift).topk(self.top_k, -1).indices
        share = share.gather(-1, chosen)
        return share / share.sum(-1, keepdim=True), chosen


class Experts(nn.Module):
    def __init__(self, width, inner, count):
        super().__init__()
        self.num_experts = count
        self.up_proj = nn.Parameter(torch.randn(count, inner, width))
        self.down_proj = nn.Parameter(torch.randn(count, width, inner))
        self.down_proj_bias = nn.Parameter(torch.randn(count, width))

    def forward(self, x, share, chosen):
        h = F.gelu(torch.einsum("nkiw,nw->nki", self.up_proj[chosen], x))
        each = torch.einsum("nkwi,nki->nkw", self.down_proj[chosen], h) + self.down_proj_bias[chosen]
        used = F.one_hot(chosen, self.num_experts).sum()  # breaks where the number is not corrected
        return (each * share[..., None]).sum(1) + 0 * used


class Block(nn.Module):
    def __init__(self, width, inner, count, top_k, biased):
        super().__init__()
        self.router, self.experts = Router(width, count, top_k, biased), Experts(width, inner, count)

    def forward(self, x):
        return x + self.experts(x, *self.router(x))


class Mixture(nn.Module):
    def __init__(self, top_k=2, biased=False):
        super().__init__()
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)
        self.blocks = nn.ModuleList(Block(7, 6, count, top_k, biased) for count in (5, 4))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
KEYS = ("blocks.0.experts.up_proj:0", "blocks.1.experts.up_proj:0")


def mixture(**options):
    torch.manual_seed(0)
    return Mixture(**options)


def without(net, gone, x):
    """The network by hand: what the router says to some experts is minus infinity."""
    twin = copy.deepcopy(net)

    def forward(self, x):
        logits = F.linear(x, self.weight)
        logits[:, self.gone] = -torch.inf
        share = logits.sigmoid() if self.shift is not None else logits.softmax(-1)
        by = share if self.shift is None else share + self.shift
        chosen = by.masked_fill(logits == -torch.inf, -torch.inf).topk(self.top_k, -1).indices
        share = share.gather(-1, chosen)
        return share / share.sum(-1, keepdim=True), chosen

    for block, lost in zip(twin.blocks, gone, strict=True):
        block.router.gone = list(lost)
        block.router.forward = forward.__get__(block.router)
    return outputs(twin, x)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_network_without_experts_is_that_whose_router_never_chooses_them(top_k, biased):
    net = mixture(top_k=top_k, biased=biased)
    before = copy.deepcopy(net.state_dict())
    groups = trace(net, X[:4], whole=["experts"])
    experts = [g for g in groups if g.kind == "expert"]
    assert [(g.id, g.size, g.least) for g in experts] == [(KEYS[0], 5, top_k), (KEYS[1], 4, top_k)]
    assert not any(g.kind == "expert" for g in trace(net, X[:4]))
    for gone in (((1,), (0, 3)), ((0, 2, 4) if top_k == 2 else (0, 1, 2, 4), (2,))):
        keep = {
            k: torch.tensor([i not in lost for i in range(n)]) for k, lost, n in zip(KEYS, gone, (5, 4), strict=True)
        }
        plan = ockham.Plan.from_json(plan_masks(groups, keep).to_json())
        masked, small = mask(net, plan), shrink(net, plan)
        for rows in (X, X[:7]):
            for mode in (False, True):
                expected = without(net, gone, rows)
                assert difference(expected, outputs(small.train(mode), rows)) < 1e-5
                assert difference(expected, outputs(masked.train(mode), rows)) < 1e-5
        verify(masked, small, X)
        for block, lost, n in zip(small.blocks, gone, (5, 4), strict=True):
            left = n - len(lost)
            assert (
                {p.shape[0] for p in block.parameters()}
                == {left}
                == {block.router.num_experts, block.experts.num_experts}
            )
    assert difference(without(net, ((1,), ()), X), outputs(net, X)) > 1e-3  # some token was its
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_experts_go_beside_widths_and_in_a_second_plan():
    net = mixture()
    groups = trace(net, X[:4], whole=["experts"])
    widths = [g for g in groups if g.kind != "expert"]
    keep = {g.id: torch.arange(g.size) % 3 > 0 for g in widths} | {
        KEYS[0]: torch.tensor([True, False, True, True, True])
    }
    first = plan_masks(groups, keep)
    assert widths and first.routers == ("blocks.0.router.weight",)
    middle = shrink(net, first)
    again = trace(middle, X[:4], whole=["experts"])
    second = plan_masks(again, {KEYS[0]: torch.tensor([False, True, True, False]), KEYS[1]: torch.arange(4) > 0})
    both = ockham.Plan.from_json(first.then(second).to_json())
    assert both.removed[KEYS[0]] == (0, 1, 4) and set(both.routers) == {f"blocks.{i}.router.weight" for i in (0, 1)}
    verify(mask(net, both), shrink(net, both), X)
    assert difference(outputs(shrink(net, both), X), outputs(shrink(middle, second), X)) < 1e-6


@pytest.mark.slow
def test_a_result_without_experts_loads_in_a_fresh_process_and_exports(tmp_path):
    net = mixture().eval()
    groups = trace(net, X[:4], whole=["experts"])
    gone = ((1, 3), (0,))
    keep = {k: torch.tensor([i not in g for i in range(n)]) for k, g, n in zip(KEYS, gone, (5, 4), strict=True)}
    plan = plan_masks(groups, keep)
    batches = {"x 0": X[:4], "x 1": X[4:].clone()}
    told = saved_and_loaded(shrink(net, plan), plan, (__name__, "mixture"), batches, tmp_path)
    for key, out in told.items():
        assert difference(without(net, gone, batches[f"x {key.split()[1]}"]), [out]) < 1e-5, key


def mixtral():
    """A small Mixtral, its weights large enough that routers decide."""
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=None, num_local_experts=5,
        num_experts_per_tok=2,
    )  # fmt: skip
    net = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.3)
    return net


@pytest.mark.slow
def test_a_mixtral_without_experts_and_a_branch_loads_in_a_fresh_process_and_exports(tmp_path):
    pytest.importorskip("transformers")
    net, ids = mixtral(), torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    groups = trace(net, {"input_ids": ids}, whole=["experts", "branches"])
    first, second = (g for g in groups if g.kind == "expert")
    keep = {first.id: torch.arange(5) != 1, second.id: torch.arange(5) > 2}
    plan = plan_masks(groups, keep | {"model.layers.1.self_attn": torch.tensor([False])})
    small, masked = shrink(net, plan), mask(net, plan)
    assert net.config.use_cache and net.config._experts_implementation == small.config._experts_implementation
    batches = {"input_ids 0": ids, "input_ids 1": (ids + 7).clamp(max=49)[[0, 1, 0]]}
    told = saved_and_loaded(small, plan, (__name__, "mixtral"), batches, tmp_path)
    for key, out in told.items():
        with torch.no_grad():
            expected = masked(batches[f"input_ids {key.split()[1]}"]).logits
        assert difference([expected], [out]) < 1e-4, key
    before = small.config.to_dict()
    ockham.export(small, tmp_path / "again.pt2", {"input_ids": ids})
    assert small.config.use_cache and small.config.to_dict() == before


def test_as_many_experts_stay_as_a_token_is_given_to():
    net = mixture()
    groups = trace(net, X[:4], whole=["experts"])
    with pytest.raises(PlanError, match="removes 4 of 5 units; at least 2 must stay"):
        plan_masks(groups, {KEYS[0]: torch.arange(5) == 3})
    for seed in range(4):
        plan = ockham.random_plan(groups, 0.95, generator=torch.Generator().manual_seed(seed))
        assert [len(plan.removed[key]) for key in KEYS] == [3, 2]
    posterior = ockham.laplace(net, [(X, torch.zeros(24, dtype=torch.long))], structure="diagonal", prior=1.0)
    with pytest.warns(ockham.OckhamWarning, match="worth its price"):
        plan = ockham.plan(groups, posterior, price=ockham.FlatPrice(1e6))
    assert [len(plan.removed[key]) for key in KEYS] == [3, 2]
    verify(mask(net, plan), shrink(net, plan), X)


def test_an_expert_is_worth_what_the_weights_are_by_which_it_speaks():
    net = mixture()
    groups = trace(net, X[:4], whole=["experts"])
    posterior = ockham.laplace(net, [(X, torch.arange(24) % 3)], structure="diagonal", prior=1.0)
    score = ockham.score(posterior)
    found = score.by_group(groups)
    assert all(bool(posterior[n].keep.all()) for n in posterior)
    for key in KEYS:
        block = key.removesuffix(".up_proj:0")
        parts = [score[f"{block}.{n}"].view_as(posterior[f"{block}.{n}"].mean) for n in ("down_proj", "down_proj_bias")]
        expected = sum(unit_evidence(p.flatten(1)).sum(1) for p in parts)
        assert torch.allclose(found[key], expected.double())
        assert found.least[key] == 2


def test_a_silent_expert_is_not_unread():
    """Its tokens would go to others: that is another function."""
    net = mixture()
    groups = trace(net, X[:4], whole=["experts"])
    keep = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in net.named_parameters()}
    for name in ("down_proj", "down_proj_bias"):
        keep[f"blocks.0.experts.{name}"][1] = False
    assert KEYS[0] not in plan_unread(groups, keep).removed
    with torch.no_grad():
        net.blocks[0].experts.down_proj[1], net.blocks[0].experts.down_proj_bias[1] = 0, 0
    gone = plan_masks(groups, {KEYS[0]: torch.arange(5) != 1})
    assert difference(outputs(shrink(net, gone), X), outputs(net, X)) > 1e-3


def test_only_what_can_be_asked_for_is():
    with pytest.raises(ockham.OckhamError, match="'branches' and 'experts'"):
        trace(mixture(), X[:4], whole=["layers"])
    with pytest.raises(ockham.OckhamError, match="'branches' and 'experts'"):
        trace(mixture(), X[:4], whole="experts")
    held = trace(mixture(), X[:4], whole=["experts"], ignore=["blocks.0.router"])
    assert [g.id for g in held if g.kind == "expert"] == [KEYS[1]]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "Olmoe"])
def test_a_configuration_says_how_many_experts_are_left(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    count = {"num_local_experts" if family == "Mixtral" else "num_experts": 5, "num_experts_per_tok": 2}
    own = {"moe_intermediate_size": 20} if family == "Qwen3Moe" else {}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=None, **count, **own,
    )  # fmt: skip
    net, ids = getattr(transformers, f"{family}ForCausalLM")(config).eval(), torch.randint(3, 50, (2, 7))
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.3)
    groups = trace(net, {"input_ids": ids}, whole=["experts"])
    experts = [g for g in groups if g.kind == "expert"]
    assert len(experts) == 2
    uneven = plan_masks(groups, {experts[0].id: torch.arange(5) != 1, experts[1].id: torch.arange(5) > 2})
    verify(mask(net, uneven), shrink(net, uneven), {"input_ids": ids})
    even = plan_masks(groups, {g.id: torch.arange(5) != i for i, g in enumerate(experts)})
    small = shrink(net, even)
    verify(mask(net, even), small, {"input_ids": ids})
    small.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path).eval()
    assert again.config.num_experts == 4 or again.config.num_local_experts == 4
    assert difference(outputs(small, {"input_ids": ids}), outputs(again, {"input_ids": ids})) < 1e-6
    assert bool(small(input_ids=ids, labels=ids, output_router_logits=True).loss.isfinite())
