"""Blocks, their matrices and the factors, against hooks and autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ockham.methods.blocks import curvature
from ockham.methods.blocks.cases import (
    Case,
    CaseObjective,
    add_gram_,
    cases_from,
    evaluating_blocks,
    held_out,
    objective_for,
    symmetric,
)
from ockham.methods.blocks.curvature import FactorStore, Stream, find_blocks, map_of, weights_of
from ockham.methods.blocks.prune import prune
from ockham.methods.blocks.reduction import Study, study
from ockham.methods.blocks.solve import Damping, Use, Using
from ockham.methods.blocks.stop import matrix_kind
from ockham.methods.blocks.units import surviving_posterior
from ockham.methods.laplace.curvature import DRAWS

from .networks import KINDS, batches, ids, network

CPU = torch.device("cpu")


def studied(
    model: nn.Module, data: Any, folder: Path, likelihood: Any = "auto"
) -> tuple[Study, CaseObjective, list[Case]]:
    with evaluating_blocks(model):
        cases = cases_from(data, None, model, CPU)
        objective = objective_for(model, cases[0], likelihood, None)
        found = study(model, cases, objective, folder=folder, seed=0, spared=(), on_case=lambda i, n: None)
    return found, objective, cases


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_matrix_of_a_block_has_factors(kind: str, tmp_path: Path) -> None:
    model = network(kind)
    found, _, _ = studied(model, batches(kind), tmp_path)
    assert len(found.dense.blocks) >= 2
    covered = {m.weight.name for b in found.dense.maps for m in b.matrices.values()}
    tables = {n for n, _ in model.named_parameters() if "relative_attention_bias" in n}
    for b, block in zip(found.dense.maps, found.dense.blocks, strict=True):
        inside = {n for n, p in weights_of(block, b.name).items() if p.ndim > 1} - tables
        assert inside <= covered
        for key in b.matrices:
            assert key in found.samples
            for factor in (found.dense.inputs(b, key), found.dense.outputs(key)):
                assert float(torch.linalg.eigvalsh(factor).min()) > -1e-3 * float(factor.abs().max())
                assert bool(factor.any())


def test_stages_follow_the_flow_of_a_block(tmp_path: Path) -> None:
    found, _, _ = studied(network("llama"), batches("llama"), tmp_path)
    names = [[k.split(".")[-2] for k in stage] for stage in found.dense.maps[1].stages]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


class Layers(nn.Module):
    """Products with weights of every kind, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.bare = nn.Parameter(torch.randn(5, 4))
        self.experts = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)) @ self.bare
        return torch.tanh(F.linear(h, self.experts[0]) + F.linear(h, self.experts[1]))


def test_factors_are_the_sums_over_examples(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Layers(), nn.Linear(3, DRAWS))
    x, y = torch.randn(9, 6), torch.randn(9, DRAWS)
    found, _, _ = studied(model, [(x, y)], tmp_path, "regression")
    store = found.dense.store
    a = F.pad(x, (0, 1), value=1.0)
    torch.testing.assert_close(store.get("A:0.first.weight")[0], a.T @ a)
    hidden = model[0].first(x).detach().requires_grad_()
    inner = (torch.tanh(hidden) @ model[0].bare).detach().requires_grad_()
    h = torch.tanh(hidden) @ model[0].bare
    out = model[1](torch.tanh(F.linear(h, model[0].experts[0]) + F.linear(h, model[0].experts[1])))
    # as many numbers a row as draws: no scatter within a row, and none between rows of a network that mixes none
    every = [torch.autograd.grad(out[:, i].sum(), hidden, retain_graph=True)[0] for i in range(DRAWS)]
    torch.testing.assert_close(store.get("G:0.first.weight")[0], sum(g.T @ g for g in every))
    b = found.dense.maps[0]
    torch.testing.assert_close(found.dense.inputs(b, "0.experts[1]")[0], (inner.T @ inner).detach())
    assert found.dense.scale(b, "0.experts[1]") == 9 * 9 * DRAWS  # rows x terms
    torch.testing.assert_close(b.matrices["0.bare"].read(weights_of(model, ""))[0], model[0].bare.T.detach())


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 7, 7)),
        (lambda: nn.Conv2d(4, 6, (5, 3), dilation=(1, 2), padding="same", bias=False), (3, 4, 5, 6)),
        (lambda: nn.Conv1d(4, 5, 3, padding=2, padding_mode="circular"), (2, 4, 9)),
        (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 3, 3)),
        (lambda: nn.Linear(4, 5), (3, 2, 4)),
    ],
)
def test_rows_times_the_matrix_are_the_product(make: Any, size: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    module, x = make().double(), torch.randn(size).double()
    parameters, seen = dict(module.named_parameters()), []

    def note(use: Use, result: Tensor) -> None:
        seen.append((use, result))

    with torch.no_grad(), Using(parameters, note):
        module(x)
    ((use, result),) = seen
    product = use.rows() @ use.matrix.read(parameters).double().mT
    torch.testing.assert_close(product, use.gradients(result), rtol=1e-5, atol=1e-6)
    value = torch.randn_like(use.matrix.read(parameters))
    use.matrix.write(parameters, value)
    torch.testing.assert_close(use.matrix.read(parameters), value)


def test_multihead_attention_is_seen_through() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    block_map = map_of("", layer, ((torch.randn(2, 3, 8),), {}))
    assert {m.weight.name for m in block_map.matrices.values()} == {
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    }


@pytest.mark.parametrize("groups", [1, 2])
def test_gram_matrices_in_strips(groups: int) -> None:
    x = torch.randn(groups, 20, 900, dtype=torch.float64)
    sums = torch.zeros(groups, 900, 900, dtype=torch.float64)
    add_gram_(sums, x[:, :12])
    add_gram_(sums, x[:, 12:])
    torch.testing.assert_close(symmetric(sums), x.mT @ x)


def test_padding_takes_no_part(tmp_path: Path) -> None:
    tokens, model = ids(2, 10), network("llama")
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    padded, _, _ = studied(model, [{"input_ids": tokens, "attention_mask": mask}], tmp_path / "a")
    short = [{"input_ids": tokens[:1]}, {"input_ids": tokens[1:, :6]}]
    apart, _, _ = studied(model, short, tmp_path / "b")
    assert padded.dense.terms == apart.dense.terms == 9 + 5
    other, _, _ = studied(model, [{"input_ids": tokens + 3 * (1 - mask), "attention_mask": mask}], tmp_path / "c")
    inputs, outputs = (f"{side}:model.layers.1.mlp.down_proj.weight" for side in "AG")
    for name, same in ((inputs, apart), (inputs, other), (outputs, other)):
        torch.testing.assert_close(padded.dense.store.get(name), same.dense.store.get(name), rtol=1e-3, atol=1e-6)
    traces = [f.dense.store.get(outputs).diagonal(dim1=1, dim2=2).sum() for f in (padded, apart)]
    torch.testing.assert_close(*traces, rtol=0.5, atol=0)  # of other draws, and of as many tokens


@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_gives_a_block_what_the_whole_network_gives_it(kind: str) -> None:
    model = network(kind)
    with evaluating_blocks(model), torch.no_grad():
        cases = cases_from(batches(kind, 2), None, model, CPU)
        blocks = [b for _, b in find_blocks(model, cases[0])]
        stream = Stream(model, cases, blocks)
        generator = torch.Generator().manual_seed(3)
        for j, block in enumerate(blocks):
            calls = stream.calls()
            expected: list[Any] = []
            handle = block.register_forward_pre_hook(lambda m, a, k, e=expected: e.append((a, k)), with_kwargs=True)
            model(*cases[1].args, **cases[1].kwargs)
            handle.remove()
            torch.testing.assert_close(calls[1], expected[0], rtol=1e-5, atol=1e-5)
            for p in block.parameters():  # from here on the network is another one
                p.mul_(1 + 0.3 * torch.rand(p.shape, generator=generator))
            stream.advance(calls)
            assert "forward" not in block.__dict__ and j + 1 == stream.at


def test_preparation_is_undone() -> None:
    model = network("mixtral").train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    before = (model.config.use_cache, model.config._experts_implementation)
    with evaluating_blocks(model):
        assert not any(m.training for m in model.modules()) and model.config.use_cache is False
    assert (model.config.use_cache, model.config._experts_implementation) == before
    assert model.training and not model.model.layers[0].training
    assert not model.lm_head.weight.requires_grad and model.model.embed_tokens.weight.requires_grad


def test_a_matrix_that_others_use_too_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]
    blocks[2][0].weight = blocks[0][0].weight
    model = nn.Sequential(nn.Sequential(*blocks), nn.Linear(6, 3))
    data = [(torch.randn(30, 6), torch.arange(30) % 3)]
    found, _, _ = studied(model, data, tmp_path)
    assert [list(b.matrices) for b in found.dense.maps] == [[], ["0.1.0.weight"], []]


def test_experts_that_the_first_batch_never_chose_are_known(tmp_path: Path) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(3, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            for i in x[:, 0].gt(0).long().unique().tolist():
                x = x + torch.tanh(F.linear(x, self.weights[i]))
            return x

    torch.manual_seed(0)
    model = nn.Sequential(Experts(), Experts())
    x = torch.randn(20, 4)
    x[:, 0] = x[:, 0].abs() + 5
    found, _, _ = studied(model, [(x, torch.arange(20) % 4), (-x, torch.arange(20) % 4)], tmp_path)
    assert set(found.samples) == {"0.weights[0]", "0.weights[1]", "1.weights[0]", "1.weights[1]"}
    assert len(found.dense.maps[0].matrices) == 3  # the third is there, and no data reach it


def test_the_posterior_is_the_conditional_one_under_the_damped_factors(tmp_path: Path) -> None:
    model = network("gpt2")
    found, _, _ = studied(model, batches("gpt2"), tmp_path)
    block, key = found.dense.maps[1], "transformer.h.1.mlp.c_fc.weight"
    kinds = {matrix_kind(k): Damping(0.1, 0.4) for k in found.samples}
    model.get_parameter(key).data[3, 5] = 0.0
    posterior = surviving_posterior(found, {}, kinds, 1e5, "next-token")
    a, g = (f[0].double() for f in (found.dense.inputs(block, key), found.dense.outputs(key)))
    weight = model.get_parameter(key).detach().double().mT  # [outputs, inputs], as the factors have it
    p0 = 1 / weight.square().mean()
    mean_a, mean_g = a.diagonal().mean(), g.diagonal().mean()
    inverse_a = torch.linalg.inv(a / mean_a + 0.1 * torch.eye(len(a)))
    inverse_g = torch.linalg.inv(0.6 * g / mean_g + 0.4 * torch.eye(len(g)))
    h = mean_a * mean_g / found.dense.scale(block, key) / torch.outer(inverse_g.diagonal(), inverse_a.diagonal())
    expected = (p0 + 1e5 * h[:, :-1]).mT
    got = posterior[key]
    assert not bool(got.keep[3, 5]) and int((~got.keep).sum()) == 1 and bool(got.precision[3, 5].isinf())
    torch.testing.assert_close(got.precision[got.keep].double(), expected[got.keep], rtol=2e-3, atol=0.0)
    bias = posterior[key.replace("weight", "bias")]  # zero at the start, and no less alive
    torch.testing.assert_close(bias.precision.double(), p0 + 1e5 * h[:, -1], rtol=2e-3, atol=0.0)


class Beside(nn.Module):
    """Two layers that read one tensor, one of them with a bias (GPT-J's attention and MLP)."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.biased, self.last = nn.Linear(6, 6, bias=False), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.plain(x) + self.last(torch.tanh(self.biased(x)))


def test_layers_with_and_without_a_bias_share_no_factor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Beside(), Beside())
    data = [(torch.randn(20, 6), torch.arange(20) % 6) for _ in range(4)]
    found, _, cases = studied(model, data, tmp_path)
    b = found.dense.maps[0]
    x = torch.cat([c.args[0] for c in cases])
    for key, columns in (("0.plain.weight", x), ("0.biased.weight", torch.cat([x, torch.ones(80, 1)], 1))):
        torch.testing.assert_close(found.dense.inputs(b, key)[0], columns.T @ columns)
    assert b.stages[0] == ("0.plain.weight", "0.biased.weight")
    done = prune(model, data, keep_share=0.5)
    assert done.keep_share == pytest.approx(0.5, abs=0.02)


def test_sums_that_are_forgotten_are_not_found_again(tmp_path: Path) -> None:
    """A job that dies while it takes them anew would otherwise go on from half of them."""
    store = FactorStore(tmp_path, torch.device("cpu"))
    store.add("A:x", torch.ones(1, 3, 2))
    store.close([3, 0])
    assert FactorStore(tmp_path, torch.device("cpu")).terms == [3, 0]
    store.clear()
    again = FactorStore(tmp_path, torch.device("cpu"))
    assert not again.terms and not again.has("A:x")
    again.add("A:x", torch.ones(1, 1, 2))
    assert torch.equal(again.get("A:x"), torch.ones(1, 2, 2))


@pytest.mark.parametrize(
    ("kind", "limit", "runs"), [("llama", 1 << 29, 3), ("llama", 0, 3 + 2 * DRAWS), ("mixtral", 0, 3 + 2 * DRAWS)]
)
def test_blocks_beyond_the_room_for_activations_run_again(
    kind: str, limit: int, runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, objective, cases = studied(network(kind), batches(kind), tmp_path / "once")
    model, ran = network(kind), list[int]()
    with evaluating_blocks(model):
        pairs = [(b, m) for (_, b), m in zip(find_blocks(model, cases[0]), found.dense.maps, strict=True)]
        monkeypatch.setattr(curvature, "_KEPT", limit)
        for block, _ in pairs:
            norm = next(m for n, m in block.named_modules() if n == "input_layernorm")
            norm.register_forward_pre_hook(lambda *_: ran.append(1))
        store = FactorStore(tmp_path / "again", CPU)
        part = {k: ".held" for j in found.tried for k in found.dense.maps[j].matrices}
        for i, case in enumerate(cases):
            generator = torch.Generator().manual_seed(i)  # as `study` does with seed 0
            own = part if i in held_out(len(cases)) else {}
            curvature.add_curvature_(store, model, case, objective, pairs, generator=generator, part=own)
    assert len(ran) == runs * len(cases)
    for block_map in found.dense.maps:
        for key in block_map.matrices:
            for name in (f"A:{block_map.source[key]}", f"G:{key}"):
                if found.dense.store.has(name):
                    assert torch.equal(store.get(name), found.dense.store.get(name)), name


def test_what_blocks_keep_is_counted_once() -> None:
    net = nn.Linear(8, 8)
    kept, x = curvature._Kept(net), torch.randn(16, 8, requires_grad=True)
    with kept.counting():
        h = torch.tanh(net(x))  # keeps its own answer; of the product only the input, and the weight, which is no cost
        h = h.square()  # keeps the same tensor again
    assert kept.bytes == kept.most == 4 * (16 * 8 + 16 * 8) and not kept.full and bool(h.requires_grad)


class Shortcut(nn.Module):
    """A residual block of convolutions whose shortcut reads the same tensor by other windows."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, kernel, padding=kernel // 2, bias=False), nn.Conv2d(6, 8, 3, 2, 1)
        self.shortcut = nn.Conv2d(4, 8, 1, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x))) + self.shortcut(x)


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_that_read_one_tensor_by_other_windows_have_their_own_factors(kernel: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Shortcut(kernel), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    data = [(torch.randn(6, 4, 8, 8), torch.arange(6) % 3) for _ in range(4)]
    found, _, _ = studied(model, data, tmp_path)
    (block,) = found.dense.maps
    images = torch.cat([x for x, _ in data])
    for key, conv in (("0.first.weight", model[0].first), ("0.shortcut.weight", model[0].shortcut)):
        rows = torch.nn.functional.unfold(images, conv.kernel_size, padding=conv.padding, stride=conv.stride)
        rows = rows.mT.flatten(0, 1)
        torch.testing.assert_close(found.dense.inputs(block, key)[0], rows.mT @ rows, rtol=1e-4, atol=1e-3)
        assert found.dense.scale(block, key) == len(rows) * found.dense.terms
    done = prune(model, data, keep_share=0.5)
    assert done.keep_share == pytest.approx(0.5, abs=0.02)
