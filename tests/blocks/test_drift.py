"""What a reduced network lacks, and the matrices that make up for it."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ockham.fit.predict import move_statistics_, norm_inputs, norms_of, refresh_batchnorm
from ockham.methods.blocks import dense
from ockham.methods.blocks.cases import Case, held_out
from ockham.methods.blocks.curvature import (
    answer_without,
    find_blocks,
    map_of,
    unheard,
    weights_of,
    writers_of,
)
from ockham.methods.blocks.dense import DenseAnswers, Drift, drifts_of, lacks_of_branch, lacks_of_products
from ockham.methods.blocks.job import PruneSettings
from ockham.methods.blocks.prune import prune
from ockham.methods.blocks.reduction import Orders, reduce_blocks_, seen_by
from ockham.methods.blocks.solve import Damping
from ockham.methods.blocks.stop import matrix_kind

from .networks import batches, ids, network
from .test_curvature import studied

G = torch.diag(torch.tensor([1.0, 3.0, 0.2, 1.0])) + 0.1


def sums(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return x.T @ x, r.T @ x


def drift(rows: int, noise: float, seed: int = 0) -> tuple[Drift, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Six inputs, four outputs: r = M x + noise."""
    g = torch.Generator().manual_seed(seed)
    mixing, truth = torch.randn(6, 6, generator=g), torch.randn(4, 6, generator=g)
    x, held = (torch.randn(n, 6, generator=g) @ mixing for n in (rows, rows // 3))
    r, lacks = (v @ truth.T + noise * torch.randn(len(v), 4, generator=g) for v in (x, held))
    return Drift(*sums(x, r), *sums(held, lacks)), (x, r, held, lacks)


@pytest.mark.parametrize(("rows", "noise"), [(30, 1.0), (30, 30.0), (300, 3.0)])
def test_the_correction_is_the_best_of_a_grid_on_held_out_rows(rows: int, noise: float) -> None:
    found, (x, r, held, lacks) = drift(rows, noise)
    best = (float(((lacks @ G) * lacks).sum()), torch.zeros(4, 6))
    for ridge in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0):
        penalty = (ridge * x.square().sum() / 6).sqrt() * torch.eye(6)  # ridge as six more rows of a least squares
        d = torch.linalg.lstsq(torch.cat([x, penalty]), torch.cat([r, torch.zeros(6, 4)])).solution.T
        every, wanted = torch.cat([x, held]), torch.cat([r, lacks])
        penalty = (ridge * every.square().sum() / 6).sqrt() * torch.eye(6)
        anew = torch.linalg.lstsq(torch.cat([every, penalty]), torch.cat([wanted, torch.zeros(6, 4)])).solution.T
        for share in torch.linspace(0, 1, 2001):
            rest = lacks - share * held @ d.T
            left = float(((rest @ G) * rest).sum())
            if left < best[0]:
                best = (left, share * anew)
    torch.testing.assert_close(found.correction(G), best[1], rtol=2e-3, atol=1e-3 * float(best[1].norm() + 1e-3))


def test_nothing_is_made_up_for_where_held_out_rows_speak_against_it() -> None:
    found, (_x, _r, _held, _lacks) = drift(300, 0.1)
    against = Drift(found.inputs, found.missing, found.held_inputs, -found.held_missing)
    assert not bool(against.correction(G).any())
    assert bool(found.correction(G).any())


def test_only_columns_that_stay_are_used() -> None:
    found, (x, r, held, lacks) = drift(300, 3.0)
    keep = torch.tensor([True, False, True, True, False, True])
    less = Drift(*sums(x[:, keep], r), *sums(held[:, keep], lacks)).correction(G)
    got = found.correction(G, keep)
    torch.testing.assert_close(got[:, keep], less)
    assert not bool(got[:, ~keep].any())


class Parallel(nn.Module):
    """A block of two branches side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.one(x) + self.three(torch.tanh(self.two(x)))


class Serial(Parallel):
    """A block of two branches one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x)
        return x + self.three(torch.tanh(self.two(x)))


class PostNorm(nn.Module):
    """A block that ends in a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.one(torch.tanh(x)))


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (Parallel(), [{"b.one.weight", "b.three.weight"}]),
        (Serial(), [{"b.three.weight"}, {"b.one.weight"}]),
        (PostNorm(), []),
        (nn.Sequential(nn.Linear(6, 6), nn.ReLU()), []),
        (nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), [{"b.2.weight"}]),
        (nn.Sequential(nn.ReLU(), nn.Linear(6, 6)), [{"b.1.weight"}]),
    ],
)
def test_writers_are_those_whose_products_are_added_as_they_are(block: nn.Module, expected: list[set[str]]) -> None:
    call = ((torch.randn(5, 6, generator=torch.Generator().manual_seed(0)),), {})
    before = {n: p.clone() for n, p in block.named_parameters()}
    assert writers_of(block, map_of("b", block, call), call) == tuple(expected)
    assert all(torch.equal(before[n], p) for n, p in block.named_parameters())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", [{"mlp.down_proj.weight"}, {"self_attn.o_proj.weight"}]),
        ("gpt2", [{"mlp.c_proj.weight"}, {"attn.c_proj.weight"}]),
        ("bert", []),
    ],
)
def test_writers_of_transformers(kind: str, expected: list[set[str]], tmp_path: Path) -> None:
    model = network(kind).eval()
    found, _, cases = studied(model, batches(kind), tmp_path)
    name, block = find_blocks(model, cases[0])[1]
    calls: list = []
    handle = block.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True)
    with torch.no_grad():
        model(*cases[0].args, **cases[0].kwargs)
    handle.remove()
    levels = writers_of(block, found.dense.maps[1], calls[0])
    assert [{k.removeprefix(name + ".") for k in level} for level in levels] == expected


class Gated(Serial):
    """An MLP with a gate, whose second matrix is heard by another way as well."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x)
        inner = self.two(x)
        return x + self.three(torch.tanh(inner)) + (0.0 if self.training else 1e-3 * inner[:, :6])


@pytest.mark.parametrize(
    ("block", "silent", "expected"),
    [
        (Serial(), {"b.three.weight"}, {"b.two.weight"}),
        (Serial(), set(), set()),
        (Serial(), {"b.one.weight"}, set()),
        (Parallel(), {"b.three.weight"}, {"b.two.weight"}),
        (Gated().train(), {"b.three.weight"}, {"b.two.weight"}),
        (Gated().eval(), {"b.three.weight"}, set()),
    ],
)
def test_unheard_is_what_changes_nothing_once_others_are_silent(
    block: nn.Module, silent: set[str], expected: set[str]
) -> None:
    call = ((torch.randn(5, 6, generator=torch.Generator().manual_seed(0)),), {})
    block_map = map_of("b", block, call)
    assert unheard(block, block_map, call, silent) == expected
    assert unheard(block, block_map, call, silent, {"b.two.weight"}) == expected
    assert unheard(block, block_map, call, silent, frozenset()) == frozenset()
    made = []
    handle = block.two.register_forward_hook(lambda m, a, out: made.append(float(out.detach().abs().sum())))
    parameters = weights_of(block, "b")
    quick = answer_without(block, parameters, call, silent | expected)
    handle.remove()
    assert (sum(made) == 0) == bool(expected)
    for name in silent:
        p = dict(block.named_parameters())[name.removeprefix("b.").replace("weight", "bias")]
        with torch.no_grad():  # the right answer: branches whose last matrix is zero
            p.zero_()
            dict(block.named_parameters())[name.removeprefix("b.")].zero_()
    assert quick is not None and torch.equal(quick, block(*call[0]))


def test_what_is_not_computed_leaves_every_bit_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [ids(2, 24, seed=i) for i in range(8)]
    settings = PruneSettings(damping=Damping(0.1, 0.5))
    quick = prune(network("llama"), windows, keep_share=0.5, settings=settings).model
    asked = []

    def all_is_heard(*given: object) -> frozenset[str]:
        asked.append(given)
        return frozenset()

    monkeypatch.setattr(dense, "unheard", all_is_heard)
    slow = prune(network("llama"), windows, keep_share=0.5, settings=settings).model
    assert asked
    for name, p in quick.named_parameters():
        assert torch.equal(p, slow.get_parameter(name)), name


class Either(Serial):
    """The same names, built in one of two ways."""

    def __init__(self, *, after: bool) -> None:
        super().__init__()
        self.after, self.norm = after, nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x if self.after else self.norm(x))
        return self.norm(x) if self.after else x


def test_blocks_of_the_same_names_are_each_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    branches: list[str] = []

    def noted(block: nn.Module, block_map: Any, key: str, *rest: Any, **more: Any) -> Any:
        branches.append(key)
        return lacks_of_branch(block, block_map, key, *rest, **more)

    monkeypatch.setattr(dense, "lacks_of_branch", noted)
    model = nn.Sequential(Either(after=False), Either(after=True), Either(after=False))
    data = [(torch.randn(20, 6), torch.arange(20) % 6) for _ in range(4)]
    found, _, cases = studied(model, data, tmp_path)
    answers, seen = DenseAnswers(model, cases, held_out(len(cases)), found.dense), list[str]()
    for j in range(3):
        answers.take()
        calls = [(c.args, {}) for c in cases]
        keys = [f"{j}.{n}.weight" for n in ("one", "two", "three")]
        seen += sorted(answers.drifts(keys, j, calls))
    assert seen == sorted(found.samples)  # each makes up for something
    # behind a norm no product comes out as it is, so none of block 1 is measured where its branch ends
    assert branches == ["0.one.weight", "0.three.weight", "2.one.weight", "2.three.weight"]


def test_what_lacks_at_a_branch_is_measured_where_it_ends() -> None:
    torch.manual_seed(0)
    block, dense = Serial(), Serial()
    cases = [Case((torch.randn(5, 6),), {}) for _ in range(4)]
    calls = [(c.args, {}) for c in cases]
    block_map = map_of("b", block, calls[0])
    answers = [answer_without(dense, weights_of(dense, "b"), c, {"b.three.weight"}) for c in calls]
    lacks = lacks_of_branch(block, block_map, "b.one.weight", calls, dense=answers, silent={"b.three.weight"})
    found = drifts_of(block_map, ["b.one.weight"], lacks, cases, held={3})["b.one.weight"]
    x, held = torch.cat([c.args[0] for c in cases[:3]]), cases[3].args[0]
    with torch.no_grad():
        r, lacks = (dense.one(v) - block.one(v) for v in (x, held))
    x, held = (torch.cat([v, torch.ones(len(v), 1)], 1) for v in (x, held))
    for got, wanted in zip((found.inputs, found.missing), sums(x, r), strict=True):
        torch.testing.assert_close(got, wanted)
    for got, wanted in zip((found.held_inputs, found.held_missing), sums(held, lacks), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_reduced_network_lacks_less_where_its_blocks_make_up_for_it(tmp_path: Path) -> None:
    windows = [ids(2, 48, seed=i) for i in range(24)]
    far = {}
    for mend in (True, False):
        model = network("llama")
        dense = copy.deepcopy(model)
        found, _, cases = studied(model, windows, tmp_path / str(mend))
        damping = {matrix_kind(k): Damping(0.1, 1.0) for k in found.samples}
        reduce_blocks_(model, cases, found.dense, Orders(dict.fromkeys(found.samples, 0.3), damping, 1e4, mend=mend))
        fresh = [ids(2, 48, seed=100 + i) for i in range(6)]
        with torch.no_grad():
            pairs = [(model.model(w)[0], dense.model(w)[0]) for w in fresh]
        far[mend] = sum(float((a - b).square().mean()) for a, b in pairs)
    assert far[True] < 0.97 * far[False]


def test_what_is_to_be_left_alone_makes_up_for_nothing() -> None:
    model = network("llama")
    windows = [ids(2, 32, seed=i) for i in range(8)]
    done = prune(model, windows, keep_share=0.4, settings=PruneSettings(ignore=["re:down_proj"]))
    for name, p in model.named_parameters():
        if "down_proj" in name:
            assert torch.equal(done.model.get_parameter(name), p), name
    done = prune(
        model,
        windows,
        structure="uneven",
        budget={"params": "93%"},
        settings=PruneSettings(ignore=["re:down_proj"]),
    )
    for name, p in model.named_parameters():
        if "down_proj" in name:
            assert torch.equal(done.model.get_parameter(name), p), name


class Normed(nn.Module):
    """A block with BatchNorm behind each product."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two, self.after = (
            nn.Linear(6, 9),
            nn.BatchNorm1d(9),
            nn.Linear(9, 6),
            nn.BatchNorm1d(6),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.after(self.two(torch.relu(self.norm(self.one(x))))))


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_statistics_of_batch_norm_follow_what_goes_into_them(share: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(Normed(), Normed()), nn.Linear(6, 3)).eval()
    data = [(torch.randn(n, 6) + 1, torch.arange(n) % 3) for n in (64, 64, 64, 32, 64, 64, 64, 1)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    for m in norms:  # of data unlike these
        torch.nn.init.normal_(m.running_mean)
        m.running_var.copy_(torch.rand(m.num_features) + 0.5)
    model[0][1].after.requires_grad_(False)  # a frozen layer keeps what it knows
    assert norms_of(model) == (norms[0], norms[1], norms[2])
    old = {n: t.clone() for n, t in model.named_buffers()}

    def moments() -> list[tuple[Tensor, Tensor]]:
        seen: dict[nn.Module, list[Tensor]] = {m: [] for m in norms}
        hooks = [m.register_forward_pre_hook(lambda m, args: seen[m].append(args[0])) for m in norms]
        with torch.no_grad():
            for x, _ in data:
                model(x)
        for h in hooks:
            h.remove()
        rows = [torch.cat(seen[m]) for m in norms]
        return [(r.mean(0), r.var(0, correction=0)) for r in rows]

    before = moments()
    statistics = [(m.running_mean.clone(), m.running_var.clone()) for m in norms]
    found, _, cases = studied(model, data, tmp_path)
    damping = {matrix_kind(k): Damping(0.1, 1.0) for k in found.samples}
    orders = Orders(dict.fromkeys(found.samples, share), damping, 1e4, norms=norms_of(model))
    reduce_blocks_(model, cases, found.dense, orders)
    if share == 1:
        assert all(torch.equal(t, old[n]) for n, t in model.named_buffers())
        return
    for i, (m, (mean, var), (mean_now, var_now)) in enumerate(zip(norms, before, moments(), strict=True)):
        had, had_var = statistics[i]
        if i == 3:
            assert torch.equal(m.running_mean, had) and torch.equal(m.running_var, had_var)
            continue
        torch.testing.assert_close(m.running_mean, had + mean_now - mean, rtol=1e-4, atol=1e-5)
        ratio = torch.where(var > 0, var_now / var.clamp_min(1e-30), 1.0)
        torch.testing.assert_close(m.running_var, had_var * ratio, rtol=1e-4, atol=1e-5)
        assert float((mean_now - mean).abs().max()) > 1e-3


def test_what_a_product_lacks_is_measured_at_the_product() -> None:
    torch.manual_seed(0)
    dense, other = Normed().eval(), [Case((torch.randn(5, 6),), {}) for _ in range(4)]
    block = copy.deepcopy(dense)
    with torch.no_grad():
        block.one.weight.mul_(0.5)
    cases = [Case((torch.randn(5, 6),), {}) for _ in range(4)]
    calls, whole = ([(c.args, {}) for c in some] for some in (cases, other))
    block_map = map_of("b", block, calls[0])
    lacks = lacks_of_products(block, block_map, ["b.two.weight"], calls, (dense, whole))
    found = drifts_of(block_map, ["b.two.weight"], lacks, cases, held={3})["b.two.weight"]

    def read(net: Normed, x: Tensor) -> Tensor:
        return torch.relu(net.norm(net.one(x)))

    with torch.no_grad():
        x = [read(block, c.args[0]) for c in cases]
        r = [dense.two(read(dense, o.args[0])) - block.two(v) for o, v in zip(other, x, strict=True)]
    x = [torch.cat([v, torch.ones(5, 1)], 1) for v in x]
    for part, (a, c) in (
        (slice(0, 3), (found.inputs, found.missing)),
        (slice(3, 4), (found.held_inputs, found.held_missing)),
    ):
        for got, wanted in zip((a, c), sums(torch.cat(x[part]), torch.cat(r[part])), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


class Convolved(nn.Module):
    """A residual block of a CNN: nothing comes out of it as it went in."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.two, self.after = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.after(self.two(torch.relu(self.norm(self.one(x))))))


def test_matrices_of_a_cnn_make_up_for_what_their_products_lack(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Convolved() for _ in range(4)))
    dense = nn.Sequential(blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    data = [(torch.randn(16, 8, 8, 8).cumsum(-1), torch.arange(16) % 5) for _ in range(9)]
    refresh_batchnorm(dense, data)
    dense.eval()
    far = {}
    for mend in (True, False):
        model = copy.deepcopy(dense)
        found, _, cases = studied(model, data[:8], tmp_path / str(mend))
        damping = {matrix_kind(k): Damping(0.1, 1.0) for k in found.samples}
        orders = Orders(dict.fromkeys(found.samples, 0.3), damping, 1e4, mend=mend, norms=norms_of(model))
        reduce_blocks_(model, cases, found.dense, orders)
        with torch.no_grad():
            far[mend] = float((model[0](data[8][0]) - dense[0](data[8][0])).square().mean())
    assert far[True] < 0.9 * far[False]


def test_statistics_of_a_channel_without_variance_stay_and_no_variance_runs_away() -> None:
    norm = nn.BatchNorm1d(3).eval()
    x = torch.randn(500, 3)
    x[:, 0] = 1000.1  # constant on these data, whatever it was in training; its variance is rounding
    y = torch.stack([x[:, 0] + 1e-4 * torch.randn(500), 1e-6 * x[:, 1], 2 * x[:, 2] + 1], 1)
    before, after = (norm_inputs([norm], [partial(norm, input=v)])[norm] for v in (x, y))
    assert move_statistics_(norm, before, after)
    expected = [1.0, 0.01, 4.0]
    torch.testing.assert_close(norm.running_var, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert float(norm.running_mean[2]) == pytest.approx(float(y[:, 2].mean() - x[:, 2].mean()), rel=1e-4)


def test_networks_without_batch_norm_are_not_run_for_its_sake() -> None:
    assert seen_by((), [lambda: pytest.fail("nothing asks for this pass")]) == {}


def test_taking_statistics_anew_builds_no_graph() -> None:
    net, graph = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), []
    net[0].register_forward_hook(lambda m, args, out: graph.append(out.requires_grad))
    refresh_batchnorm(net, [(torch.randn(8, 4), torch.zeros(8))])
    assert graph == [False]


class Gated(nn.Module):
    """Two matrices read the same, one reads their product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.sigmoid(self.gate(x)) * self.up(x))


def test_products_that_read_the_same_lack_together_what_each_lacks_alone() -> None:
    torch.manual_seed(0)
    dense = Gated().eval()
    block = copy.deepcopy(dense)
    cases = [Case((torch.randn(7, 6),), {}) for _ in range(4)]
    whole = [(torch.randn(7, 6),) for _ in range(4)]
    calls = [(c.args, {}) for c in cases]
    block_map, keys = map_of("b", block, calls[0]), ["b.gate.weight", "b.up.weight"]

    def found(which: list[str]) -> dict[str, Drift]:
        lacks = lacks_of_products(block, block_map, which, calls, (dense, [(x, {}) for x in whole]))
        return drifts_of(block_map, which, lacks, cases, held={1})

    both, alone = found(keys), [found([k])[k] for k in keys]
    for key, one in zip(keys, alone, strict=True):
        for name in ("inputs", "missing", "held_inputs", "held_missing"):
            torch.testing.assert_close(getattr(both[key], name), getattr(one, name))
    assert block_map.source[keys[0]] == block_map.source[keys[1]]  # A is summed once
    x = torch.cat([c.args[0] for i, c in enumerate(cases) if i != 1])
    r = torch.cat(
        [dense.up(w[0]) - block.up(c.args[0]) for i, (w, c) in enumerate(zip(whole, cases, strict=True)) if i != 1]
    )
    torch.testing.assert_close(both["b.up.weight"].missing[:, :6], (r.mT @ x).detach(), rtol=1e-4, atol=1e-5)
