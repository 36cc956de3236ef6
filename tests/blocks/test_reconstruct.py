"""Blocks that are trained, once they are reduced, to answer as the dense ones do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ockham
from ockham.errors import DataError
from ockham.methods.blocks.cases import held_out
from ockham.methods.blocks.curvature import Stream, map_of, weights_of
from ockham.methods.blocks.dense import DenseAnswers, _Trained
from ockham.methods.blocks.job import PruneSettings
from ockham.methods.blocks.prune import prune
from ockham.methods.blocks.solve import Damping

from .networks import KINDS, batches, ids, network
from .test_curvature import studied
from .test_drift import PostNorm

PLAIN = Damping(0.05, 0.3)


class Added(nn.Module):
    """A block that is linear: what it answers best on a support is known exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.one(x)


def linear(noise: float = 0.0) -> tuple[nn.Module, list[Any]]:
    """Three blocks and a head, and rows whose inputs are correlated; ``noise`` is in the batches that judge."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(Added(), Added(), Added()), nn.Linear(6, 9))
    mixing, held = torch.randn(6, 6, generator=g), held_out(12)
    data = []
    for i in range(12):
        x = torch.randn(31, 6, generator=g) @ mixing
        x = x + noise * torch.randn(31, 6, generator=g) if i in held else x
        data.append((x, torch.arange(31) % 9))
    return net, data


def reduced(net: nn.Module, data: list[Any], folder: Path, epochs: int, dtype: torch.dtype = torch.float32) -> Any:
    """The first block with an uneven support, reconstructed: (its calls, answers of the dense one, G, cases)."""
    found, _, cases = studied(net, data, folder)
    net.requires_grad_(False)
    held = held_out(len(cases))
    stream, whole = Stream(net, cases, found.dense.blocks), DenseAnswers(net, cases, held, found.dense)
    whole.take()
    block, key = found.dense.blocks[0], "0.0.one.weight"
    calls = stream.calls()
    wanted = [block(*args, **kwargs) for args, kwargs in calls]
    keep = torch.rand(6, 6, generator=torch.Generator().manual_seed(1)) < torch.linspace(0.2, 0.9, 6)[:, None]
    block.one.weight.mul_(keep)
    before = {n: p.clone() for n, p in block.named_parameters()}
    whole.reconstruct_([key], 0, calls, epochs)
    return block, keep, before, calls, wanted, found.dense.outputs(key)[0], held


def error(block: nn.Module, calls: Any, wanted: Any, g: Tensor, which: Any) -> float:
    rows = torch.cat([block(*calls[i][0]) - wanted[i] for i in which]).double()
    return float(((rows @ g.double()) * rows).sum())


def best_on_support(block: Any, keep: Tensor, calls: Any, wanted: Any, g: Tensor, fit: Any) -> nn.Module:
    """Weighed least squares over the weights that may be something, and the bias: one dense linear system."""
    x = torch.cat([calls[i][0][0] for i in fit]).double()
    r = torch.cat([wanted[i] - calls[i][0][0] for i in fit]).double()
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    free = torch.cat([keep, torch.ones(6, 1, dtype=torch.bool)], 1).flatten()
    system = torch.kron(g.double(), x.T @ x)[free][:, free]
    found = torch.zeros(42, dtype=torch.float64)
    found[free] = torch.linalg.solve(system, (g.double() @ r.T @ x).flatten()[free])
    best = copy.deepcopy(block).double()
    best.one.weight.copy_(found.view(6, 7)[:, :6])
    best.one.bias.copy_(found.view(6, 7)[:, 6])
    return best


def doubled(calls: Any, wanted: Any) -> Any:
    return [((args[0].double(),), kwargs) for args, kwargs in calls], [w.double() for w in wanted]


@torch.no_grad()
def test_a_linear_block_comes_to_the_weighed_least_squares_of_its_support(tmp_path: Path) -> None:
    net, data = linear()
    block, keep, before, calls, wanted, g, held = reduced(net, data, tmp_path, 400)
    fit = [i for i in range(12) if i not in held]
    best = best_on_support(block, keep, *doubled(calls, wanted), g, fit)
    least, found = (error(net, *doubled(calls, wanted), g, range(12)) for net in (best, copy.deepcopy(block).double()))
    started = copy.deepcopy(block).double()
    started.load_state_dict(before)
    first = error(started, *doubled(calls, wanted), g, range(12))
    assert found - least <= 0.05 * (first - least)
    # the metric counts: unweighed least squares are farther
    plain = best_on_support(block, keep, *doubled(calls, wanted), torch.eye(6), fit)
    assert error(plain, *doubled(calls, wanted), g, range(12)) - least > 0.3 * (first - least)
    assert torch.equal(block.one.weight != 0, keep)


@torch.no_grad()
def test_held_out_data_that_speak_against_it_leave_every_bit(tmp_path: Path) -> None:
    net, data = linear()
    found, _, cases = studied(net, data, tmp_path)
    net.requires_grad_(False)
    held = held_out(len(cases))
    stream, whole = Stream(net, cases, found.dense.blocks), DenseAnswers(net, cases, held, found.dense)
    whole.take()
    block, calls = found.dense.blocks[0], stream.calls()
    # the data that decide ask for an answer twice as large, those that judge for the one that is given
    whole._answers[0] = [a if i in held else 2 * a for i, a in enumerate(whole._answers[0])]  # type: ignore[operator]
    before = {n: p.clone() for n, p in block.named_parameters()}
    whole.reconstruct_(["0.0.one.weight"], 0, calls, 5)
    assert all(torch.equal(before[n], p) for n, p in block.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_and_only_what_was_reduced_moves(kind: str) -> None:
    model, data = network(kind), batches(kind, 40)
    ignore = [next(n for n, p in model.named_parameters() if p.ndim == 2 and ".1." in n)]
    done = [
        prune(model, data, keep_share=0.4, settings=PruneSettings(ignore=ignore, damping=PLAIN, reconstruct=epochs))
        for epochs in (0, 8)
    ]
    plain, moved = ({n: p.detach() for n, p in d.model.named_parameters()} for d in done)
    inside = {k.partition("[")[0] for k in done[0].evidence}
    assert ignore[0] not in inside and torch.equal(moved[ignore[0]], dict(model.named_parameters())[ignore[0]])
    share = sum(int((moved[n] == 0).sum()) for n in inside) / sum(moved[n].numel() for n in inside)
    assert share == pytest.approx(
        sum(int((plain[n] == 0).sum()) for n in inside) / sum(plain[n].numel() for n in inside)
    )
    biases = {n.removesuffix("weight") + "bias" for n in inside}
    for n, p in plain.items():
        if n not in inside | biases:
            assert torch.equal(p, moved[n]), n
    assert any(not torch.equal(plain[n], moved[n]) for n in inside)
    assert all(bool(p.isfinite().all()) for p in moved.values())


@pytest.mark.parametrize(
    "target",
    [
        {"pattern": "2:4"},
        {"structure": "uneven", "budget": {"params": "80%"}},
        {"structure": "depth", "budget": {"params": "80%"}},
    ],
)
def test_every_target_can_be_followed_by_it(target: dict[str, Any]) -> None:
    model, data = network("llama"), batches("llama", 8)
    plain, moved = (prune(model, data, settings=PruneSettings(reconstruct=n), **target).model for n in (0, 3))
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in moved.named_parameters()}
    assert any(not torch.equal(p, q) for p, q in zip(plain.parameters(), moved.parameters(), strict=True))
    if "pattern" in target:
        groups = moved.get_parameter("model.layers.0.mlp.up_proj.weight").reshape(-1, 4)
        assert int((groups != 0).sum(1).max()) == 2


def test_a_block_without_a_last_matrix_takes_plain_squares(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(PostNorm(), PostNorm(), PostNorm()), nn.Linear(6, 3))
    data = [(torch.randn(40, 6), torch.arange(40) % 3) for _ in range(8)]
    x = torch.cat([d[0] for d in data])
    apart = []
    for epochs in (0, 30):
        small = prune(net, data, keep_share=0.5, settings=PruneSettings(reconstruct=epochs)).model
        with torch.no_grad():
            apart.append(float((small[0](x) - net[0](x)).square().mean()))
    assert apart[1] < 0.9 * apart[0]


@pytest.mark.parametrize("kind", ["bert", "llama"])  # plain squares, and those that G weighs
def test_what_is_padding_does_not_decide(kind: str) -> None:
    model, found = network(kind), []
    for junk in (None, 5, 9):
        data = []
        for i in range(40):
            tokens, mask = ids(seed=i), torch.ones(4, 12, dtype=torch.long)
            mask[:, 7:] = 0
            tokens = tokens if junk is None else torch.where(mask > 0, tokens, junk)
            data.append({"input_ids": tokens, "attention_mask": mask})
        epochs = 0 if junk == 9 else 6
        done = prune(model, data, keep_share=0.5, settings=PruneSettings(damping=PLAIN, reconstruct=epochs))
        found.append(list(done.model.parameters()))
    assert any(not torch.equal(p, q) for p, q in zip(found[1], found[2], strict=True))
    for p, q in zip(*found[:2], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_steps_finer_than_half_precision_add_up() -> None:
    block = Added().to(torch.bfloat16).requires_grad_(False)
    call = ((torch.randn(5, 6, dtype=torch.bfloat16),), {})
    matrix = map_of("b", block, call).matrices["b.one.weight"]
    before, trained = block.one.weight.clone(), _Trained(weights_of(block, "b"), [matrix])
    for _ in range(100):
        trained.step_([torch.ones_like(v) for v in trained.values], 0.1)
    moved = (before - block.one.weight).float() / before.float().square().mean().sqrt()
    torch.testing.assert_close(moved, torch.full((6, 6), 0.02), rtol=0.2, atol=0)


def test_half_precision_is_trained_in_full(tmp_path: Path) -> None:
    model, data = network("llama").to(torch.bfloat16), batches("llama", 40)
    settings = [PruneSettings(damping=PLAIN, reconstruct=n) for n in (0, 8)]
    plain, moved = (prune(model, data, keep_share=0.5, settings=s).model for s in settings)
    assert all(p.dtype is torch.bfloat16 for p in moved.parameters())
    pairs = list(zip(plain.parameters(), moved.parameters(), strict=True))
    assert any(not torch.equal(p, q) for p, q in pairs)
    assert sum(int((p == 0).sum()) for p, _ in pairs) == sum(int((q == 0).sum()) for _, q in pairs)


def test_too_few_batches_are_refused() -> None:
    with pytest.raises(DataError, match="there are 3"):
        prune(
            network("llama"), [ids(1, seed=i) for i in range(3)], keep_share=0.5, settings=PruneSettings(reconstruct=2)
        )


def test_the_evidence_stop_reconstructs_its_last_network(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    whole = DenseAnswers.reconstruct_
    monkeypatch.setattr(DenseAnswers, "reconstruct_", lambda *a: (asked.append(a[-1]), whole(*a))[1])
    net, data = linear()
    found = ockham.prune(net, data, settings=PruneSettings(n_data=2e3, reconstruct=2))
    assert found.shots and len(asked) <= 4  # of one network at most
