"""Residual branches that go as a whole: masked network = shrunk network, and the evidence of all weights together."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ockham
from ockham.choose.units import structures_from
from ockham.evidence.kronecker import covariance, delta_f_matrix, factorised
from ockham.surgery import PlanError, mask, random_plan, shrink, trace, verify
from ockham.surgery.groups import plan_masks

from .law import difference, outputs, randomise, saved_and_loaded


class Cell(nn.Module):
    """Two convolutions beside a stream, an activation that both share, and a scale that belongs to the cell."""

    def __init__(self, width, inner):
        super().__init__()
        self.one, self.two = nn.Conv2d(width, inner, 3, padding=1), nn.Conv2d(inner, width, 3, padding=1)
        self.norm, self.act = nn.BatchNorm2d(inner), nn.ReLU()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.act(x + self.scale * self.two(self.act(self.norm(self.one(x)))))


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 5, 3), nn.Linear(5, 3)
        self.cells = nn.Sequential(Cell(5, 8), Cell(5, 6), Cell(5, 8))

    def forward(self, x):
        return self.head(self.cells(self.stem(x)).mean((2, 3)))


class Cosine(nn.Linear):
    """Not zero where its weights are."""

    def forward(self, x):
        return super().forward(x).cos()


class Gated(nn.Module):
    """A branch with a norm and two readers; one that is no zero without weights; two that share theirs."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.gate, self.down = (
            nn.LayerNorm(6),
            *(nn.Linear(6, 9) for _ in range(2)),
            nn.Linear(9, 6),
        )
        self.cosine, self.first, self.last = Cosine(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.last.weight = self.first.weight

    def forward(self, x):
        h = self.norm(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        x = x + self.cosine(x)
        x = x + self.first(x)
        x = x + self.again(x).tanh() * 2
        return x + self.last(x).tanh()


IMAGES, ROWS = torch.randn(2, 1, 8, 8), torch.randn(3, 6)
NETS = {
    "cells": (Cells, IMAGES, {"cells.0", "cells.1", "cells.2"}),
    "gated": (Gated, ROWS, {"down", "again"}),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2),
        torch.randn(2, 4, 8),
        {"layers.0.self_attn", "layers.0", "layers.1.self_attn", "layers.1"},
    ),
}


def made(name):
    torch.manual_seed(0)
    build, x, wanted = NETS[name]
    net = build()
    randomise(net, torch.Generator().manual_seed(1))
    return net, x, wanted


@pytest.mark.parametrize("name", NETS)
def test_a_network_without_branches_is_the_masked_one(name):
    net, x, wanted = made(name)
    before = copy.deepcopy(net.state_dict())
    groups = trace(net, x, whole=["branches"])
    assert set(groups.branches) == wanted and not trace(net, x).branches
    tried = set()
    for seed in range(6):
        plan = random_plan(groups, 0.5, generator=torch.Generator().manual_seed(seed))
        plan = ockham.Plan.from_json(plan.to_json())
        masked, small = mask(net, plan), shrink(net, plan)
        tried |= {b.id for b in plan.dropped}
        for mode in (False, True):
            for rows in (x, torch.cat([x, x.flip(0), x[:1]])):
                a, b = (copy.deepcopy(m).train(mode) for m in (masked, small))
                for m in (*a.modules(), *b.modules()):
                    if isinstance(m, nn.Dropout):
                        m.p = 0.0
                    if isinstance(m, nn.MultiheadAttention):
                        m.dropout = 0.0
                assert difference(outputs(a, rows), outputs(b, rows)) < 1e-5
        assert not plan.lost & {n for n, _ in small.named_parameters()} and plan.dropped
        left = {n for n, _ in net.named_parameters()} - plan.lost
        assert {n for n, _ in small.named_parameters()} == left
    assert tried == wanted
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_what_zeros_do_not_silence_is_no_branch():
    net, x, _ = made("gated")
    assert set(trace(net, x, whole=["branches"], ignore=["up"]).branches) == {"again"}
    few = trace(net, x, whole=["branches"]).branches
    assert not {"cosine", "first", "last"} & set(few)  # a constant is left, or a weight that another branch uses
    assert set(few["down"].parameters) == {
        f"{m}.{n}" for m in ("norm", "up", "gate", "down") for n in ("weight", "bias")
    }


def test_plans_follow_each_other_and_carry_optimizer_and_posterior():
    net, x, _ = made("cells")
    optimizer = torch.optim.Adam(net.parameters())
    net(x).sum().backward()
    optimizer.step()
    groups = trace(net, x, whole=["branches"])
    first = plan_masks(groups, {"cells.1": torch.tensor([False]), "cells.0.one.weight:0": torch.arange(8) > 2})
    values = {n: p.detach() for n, p in net.named_parameters()}
    middle, carried, cut = shrink(net, first, optimizer=optimizer, posterior=values)
    assert set(cut) == {n for n, _ in middle.named_parameters()} == set(values) - first.lost
    assert sum(len(g["params"]) for g in carried.param_groups) == len(cut) == len(carried.state)
    middle(x).sum().backward()
    carried.step()
    again = trace(middle, x, whole=["branches"])
    assert set(again.branches) == {"cells.0", "cells.2"}
    second = plan_masks(again, {"cells.2": torch.tensor([False]), "cells.0.one.weight:0": torch.arange(5) != 1})
    both = ockham.Plan.from_json(first.then(second).to_json())
    assert [b.id for b in both.dropped] == ["cells.1", "cells.2"]
    small = shrink(net, both)
    with torch.no_grad():
        small.load_state_dict(shrink(shrink(net, first), second).state_dict())
    verify(mask(net, both), small, x)
    with pytest.raises(PlanError, match="another"):
        first.then(first)
    with pytest.raises(PlanError, match=r"expected torch\.bool of"):
        plan_masks(groups, {"cells.1": torch.tensor([0])})
    with pytest.raises(PlanError, match="damaged"):
        ockham.Plan.from_json(both.to_json().replace('"zero"', '"one"'))


def test_a_result_without_a_branch_loads_in_a_fresh_process_and_exports(tmp_path):
    net, x, _ = made("cells")
    net.eval()
    groups = trace(net, x, whole=["branches"])
    keep = {"cells.1": torch.tensor([False]), "cells.0.one.weight:0": torch.arange(8) > 2}
    plan = plan_masks(groups, keep | {"cells.2.one.weight:0": torch.arange(8) != 5})
    batches = {"x 0": x, "x 1": torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))}
    told = saved_and_loaded(shrink(net, plan), plan, (__name__, "Cells"), batches, tmp_path)
    assert {k.split()[0] for k in told} >= {"torch"}
    for key, out in told.items():
        expected = outputs(mask(net, plan), batches[f"x {key.split()[1]}"])
        assert difference(expected, [out]) < 1e-5, key


def test_a_variational_optimizer_refuses_to_lose_a_branch():
    net, x, _ = made("cells")
    groups = trace(net, x, whole=["branches"])
    optimizer = ockham.MeanField(net.named_parameters(), n_data=10)
    with pytest.raises(PlanError, match="cannot lose whole branches"):
        shrink(net, plan_masks(groups, {"cells.1": torch.tensor([False])}), optimizer=optimizer)


def dense_delta_f(mean, sigma, prior):
    """ln q(0) - ln p(0) of a Gaussian posterior with all its correlations: the Savage-Dickey ratio."""
    zero = torch.zeros_like(mean)
    posterior = torch.distributions.MultivariateNormal(mean, sigma)
    start = torch.distributions.MultivariateNormal(zero, torch.eye(len(mean), dtype=mean.dtype) / prior)
    return float(posterior.log_prob(zero) - start.log_prob(zero))


def test_the_evidence_of_a_whole_matrix_is_the_dense_one():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, n, n + 2, generator=g, dtype=torch.float64) for n in (4, 3))
    k = factorised(a @ a.mT, b @ b.mT, 0.7)
    mean = 0.3 * torch.randn(2, 3, 4, generator=g, dtype=torch.float64)
    expected = sum(dense_delta_f(mean[i].flatten(), covariance(k, i), 0.7) for i in range(2))
    cost, found = delta_f_matrix(mean, k)
    assert found == pytest.approx(expected, rel=1e-10)
    quadratic = sum(float(m @ torch.linalg.inv(covariance(k, i)) @ m) / 2 for i, m in enumerate(mean.flatten(1)))
    assert cost == pytest.approx(quadratic, rel=1e-10)


def test_the_joint_evidence_of_a_branch_is_that_of_conjugate_regression():
    """y = W f(x) + noise, W Gaussian: evidence with and without all of W, in closed form, without any posterior."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=g, dtype=torch.float64)
    y = x @ torch.tensor([0.3, -0.2, 0.0], dtype=torch.float64) + torch.randn(40, generator=g, dtype=torch.float64)
    prior = 2.0
    eye = torch.eye(40, dtype=torch.float64)
    full = torch.distributions.MultivariateNormal(torch.zeros(40, dtype=torch.float64), eye + x @ x.T / prior)
    none = torch.distributions.MultivariateNormal(torch.zeros(40, dtype=torch.float64), eye)
    expected = float(none.log_prob(y) - full.log_prob(y))  # > 0 favours removal
    precision = x.T @ x + prior * torch.eye(3, dtype=torch.float64)
    mean = torch.linalg.solve(precision, x.T @ y)
    k = factorised((x.T @ x)[None], torch.ones(1, 1, 1, dtype=torch.float64), prior)
    assert delta_f_matrix(mean.view(1, 1, 3), k)[1] == pytest.approx(expected, rel=1e-8)


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), *(Beside(6, 8) for _ in range(3)), nn.Linear(6, 3))
    x = torch.randn(256, 4)
    y = net(x).argmax(1)
    return net, x, y


class Beside(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
def test_a_branch_goes_where_all_its_weights_are_worth_less_than_the_price(fitted, structure):
    net, x, y = fitted
    posterior = ockham.laplace(net, [(x, y)], structure=structure, prior=1.0, n_data=20_000)
    groups = trace(net, x[:2], whole=["branches"])
    names = {key: b.parameters for key, b in groups.branches.items()}
    found = structures_from(posterior, groups)
    assert found.whole == {"1", "2", "3"}
    for key, own in names.items():
        if structure == "diagonal":
            expected = -sum(float(values.sum()) for n, values in ockham.score(posterior).items() if n in own)
        else:
            mine = [m for m in posterior.matrices if m.weight in own]
            assert len(mine) == 2 and {n for m in mine for n in m.names} == set(own)
            means = [m.pack({n: posterior[n].mean for n in m.names})[0].double().flatten() for m in mine]
            pairs = zip(means, (m.precision for m in mine), strict=True)
            expected = -sum(dense_delta_f(w, covariance(k), k.prior_precision) for w, k in pairs)
        assert float(found[key]) == pytest.approx(expected, rel=1e-4)
    low, middle, _ = sorted(names, key=lambda key: float(found[key]))
    price = ockham.FlatPrice(float(found[low] + found[middle]) / 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ockham.OckhamWarning)  # of groups in which nothing is worth as much
        plan = ockham.plan(groups, posterior, price=price)
    assert [b.id for b in plan.dropped] == [low] and plan.nats[low][0] == pytest.approx(float(found[low]))
    assert low in str(plan)
    verify(mask(net, plan), shrink(net, plan), x[:3])


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
def test_a_budget_takes_branches_beside_units(fitted, structure):
    net, x, y = fitted
    posterior = ockham.laplace(net, [(x, y)], structure=structure, prior=1.0, n_data=20_000)
    groups = trace(net, x[:2], whole=["branches"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ockham.OckhamWarning)
        plan = ockham.plan(groups, posterior, budget={"params": 20}, model=net, example_inputs=x[:2])
    small = shrink(net, plan)
    assert plan.dropped and plan.removed
    assert sum(p.numel() for p in small.parameters()) <= 20  # 23 is the least with a unit of every branch left
    verify(mask(net, plan), small, x[:3])


def test_a_branch_with_a_weight_that_has_no_posterior_stays(fitted):
    net, x, y = fitted
    posterior = ockham.laplace(net, [(x, y)], structure="diagonal", prior=1.0)
    some = replace(posterior, moments={n: v for n, v in posterior.items() if n != "2.down.bias"})
    groups = trace(net, x[:2], whole=["branches"])
    found = structures_from(some, groups)
    assert math.isinf(float(found["2"])) and math.isfinite(float(found["1"]))


@pytest.mark.slow
def test_a_decoder_without_some_attention_generates_as_without_a_cache():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    net, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(3, 50, (2, 7))
    groups = trace(net, {"input_ids": ids}, whole=["branches"])
    assert "model.layers.0.self_attn" not in groups.branches  # a cache counts its tokens there
    gone = ("model.layers.1.self_attn", "model.layers.2.mlp", "model.layers.2.self_attn")
    plan = plan_masks(groups, dict.fromkeys(gone, torch.tensor([False])))
    small = shrink(net, plan)
    verify(mask(net, plan), small, {"input_ids": ids})
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(small.generate(ids, use_cache=True, **options), small.generate(ids, use_cache=False, **options))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_layers_of_which_nothing_is_left_go_out_of_the_list_and_the_configuration(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    net, ids = getattr(transformers, f"{family}ForCausalLM")(config).eval(), torch.randint(3, 50, (2, 7))
    given = {"input_ids": ids}
    groups = trace(net, given, whole=["branches"])
    gone = [f"model.layers.{i}.{part}" for i in (1, 2) for part in ("self_attn", "mlp")]
    keep = dict.fromkeys(gone, torch.tensor([False]))
    keep |= {g.id: torch.arange(24) % 3 > 0 for g in groups if g.size == 24}
    plan = plan_masks(groups, keep)
    optimizer = torch.optim.Adam(net.parameters())
    for number, p in enumerate(net.parameters()):
        optimizer.state[p] = {"exp_avg": torch.full_like(p, number)}
    values = {n: torch.full_like(p, i) for i, (n, p) in enumerate(net.named_parameters())}
    small, carried, cut = shrink(net, plan, optimizer=optimizer, posterior=values)
    assert len(small.model.layers) == 2 == small.config.num_hidden_layers and small.config.intermediate_size == 16
    assert net.config.num_hidden_layers == 4 and [m.self_attn.layer_idx for m in small.model.layers] == [0, 1]
    verify(mask(net, plan), small, given)
    order = list(values)
    for name, p in small.named_parameters():  # the last layer is the second now, and has what was the last one's
        before = name.replace("layers.1.", "layers.3.")
        assert float(cut[name].flatten()[0]) == order.index(before)
        assert bool((carried.state[p]["exp_avg"] == order.index(before)).all())
    small.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path).eval()
    assert difference(outputs(small, given), outputs(again, given)) < 1e-6
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(again.generate(ids, use_cache=True, **options), small.generate(ids, use_cache=False, **options))
    later = trace(small, given, whole=["branches"])
    second = plan_masks(later, {"model.layers.1.mlp": torch.tensor([False])})
    both = plan.then(second)
    assert [b.id for b in both.dropped] == [*gone, "model.layers.3.mlp"]
    verify(mask(net, both), shrink(net, both), given)
    one = shrink(net, plan_masks(groups, dict.fromkeys(gone[:3], torch.tensor([False]))))
    assert len(one.model.layers) == 4 == one.config.num_hidden_layers  # a branch is left of one of them
    uneven = keep | {"model.layers.0.mlp.gate_proj.weight:0": torch.arange(24) > 3}
    kept = shrink(net, plan_masks(groups, uneven))
    assert len(kept.model.layers) == 4 == kept.config.num_hidden_layers  # no configuration says the widths: all stay
