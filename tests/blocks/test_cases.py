"""What the curvature is drawn from, and how far a changed network is from the dense one on data that judge."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ockham.core.likelihood import Classification
from ockham.errors import DataError
from ockham.methods.blocks.cases import DenseRows, cases_from, divergence, objective_for
from ockham.methods.blocks.job import BlockJob, PruneSettings
from ockham.methods.blocks.prune import prune
from ockham.methods.blocks.solve import Damping
from ockham.methods.blocks.stop import DampingProblem, chosen_damping, lowest
from ockham.methods.laplace.curvature import DRAWS

from .networks import batches, network


def first(found: Any) -> Tensor:
    return found


class Given(nn.Module):
    """Answers with a parameter, whatever is asked: gradients in it are those in the logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


@pytest.mark.parametrize("classes", [9, 4, 2])
def test_the_curvature_of_classes_is_the_fisher_information(classes: int) -> None:
    torch.manual_seed(0)
    draws = 20_000
    logits = 3 * torch.randn(5, classes, dtype=torch.float64)
    model, target = Given(logits.repeat(draws, 1)), torch.tensor([0, 1, -100, 1, 0]).repeat(draws)
    (case,) = cases_from([(torch.zeros(5 * draws, 1), target)], None, model, torch.device("cpu"))
    objective = objective_for(model, case, "classification", first)
    p = logits.softmax(-1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected[2] = 0  # padding
    answer, every = model(case.args[0]), list[Tensor]()
    for noise in objective.curvature(answer, case, torch.Generator().manual_seed(0)):
        (g,) = torch.autograd.grad(noise, model.logits, retain_graph=True)
        g = g.view(draws, 5, classes)
        across = torch.einsum("dnk,dml->nmkl", g, g) / draws
        assert across[~torch.eye(5, dtype=torch.bool)].abs().max() < 0.01  # rows know nothing of each other
        every.append(g)
    assert len(every) == objective.draws == DRAWS
    every_row = torch.einsum("sdnk,sdnl->dnkl", *[torch.stack(every)] * 2) / DRAWS
    assert torch.allclose(every_row.mean(0), expected, atol=0.01)
    if classes <= DRAWS:  # what is drawn together is exact for each row
        assert torch.allclose(every_row, expected.expand_as(every_row))


def test_the_curvature_of_next_tokens_counts_what_follows() -> None:
    model = network("llama")
    ids = batches("llama")[0]
    labels = ids.clone()
    labels[:, 5:] = -100
    (case, *_) = cases_from([{"input_ids": ids, "labels": labels}], None, model, torch.device("cpu"))
    objective = objective_for(model, case, "next-token", None)
    logits = case.answer(model, objective.output).detach().requires_grad_(True)
    noise = next(objective.curvature(logits, case, torch.Generator().manual_seed(1)))
    (g,) = torch.autograd.grad(noise, logits)
    assert (g.abs().sum(-1) > 0).sum() == 4 * len(case.target) == objective.terms(logits, case)
    assert not g[:, 4:].any() and g[:, :4].abs().sum(-1).all()
    assert g.sum(-1).abs().max() < 1e-5  # a softmax does not change with a constant
    assert objective.rows(logits, case).shape == (4 * len(case.target), logits.shape[-1])


@pytest.mark.parametrize("kind", ["classes", "positions", "weights of classes", "numbers", "own"])
def test_the_distance_is_the_divergence_from_the_dense_answers(kind: str) -> None:
    torch.manual_seed(1)
    dense = nn.Linear(6, 4)
    x = torch.randn(40, 6) if kind != "positions" else torch.randn(40, 7, 6)
    like: Any = {"numbers": "regression", "own": "own"}.get(kind, "classification")
    target: Any = torch.randint(0, 4, x.shape[:-1])
    target = torch.randn(40, 4) if kind == "numbers" else None if kind == "own" else target
    if kind == "weights of classes":
        like = Classification(class_weights=[1.0, 2.0, 1.0, 1.0])
    if kind in ("classes", "positions"):
        target[3] = -100
    cases = cases_from([(x, target) if target is not None else x], None, dense, torch.device("cpu"))
    objective = objective_for(dense, cases[0], like, first)
    rows = DenseRows(dense, cases, objective)
    assert rows.distance(dense) == pytest.approx(0, abs=1e-7)
    before = dense(x).detach()
    with torch.no_grad():
        dense.weight += 0.3 * torch.randn(4, 6)
    after = dense(x).detach()
    if objective.classes:
        far = F.kl_div(after.log_softmax(-1), before.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        expected = far[target != -100].mean()
    else:
        expected = 0.5 * (after - before).square().sum(-1).mean()
    assert rows.distance(dense) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 300.0])
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_divergence_is_exact_for_near_networks_and_for_far_ones(size: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    before = 4 * torch.randn(40, 3000, generator=generator)
    after = before + size * torch.randn(40, 3000, generator=generator) + shift
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum())
    # logits of float32 are rounded by some 1e-6, and so are their differences
    assert float(divergence(before, after)) == pytest.approx(expected, rel=1e-4 + 1e-6 / size, abs=1e-9)
    assert float(divergence(before, before.clone())) == 0.0


def test_classes_that_both_networks_rule_out_count_for_nothing() -> None:
    before, after = torch.randn(5, 7), torch.randn(5, 7)
    expected = float(divergence(before[:, :4], after[:, :4]))
    before[:, 4:] = after[:, 4:] = -torch.inf
    assert float(divergence(before, after)) == pytest.approx(expected, rel=1e-5)
    after[0, 0] = -torch.inf  # and one that only the second rules out is infinitely far
    assert float(divergence(before, after)) == torch.inf


def test_long_answers_are_compared_in_some_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from ockham.methods.blocks import cases as module

    torch.manual_seed(0)
    model, x = nn.Linear(6, 4), torch.randn(300, 6)
    cases = cases_from(
        [(part, torch.zeros(len(part)).long()) for part in x.split(100)], None, model, torch.device("cpu")
    )
    objective = objective_for(model, cases[0], "classification", first)
    monkeypatch.setattr(module, "_JUDGED", 150)
    monkeypatch.setattr(module, "_KEPT_NUMBERS", 200)  # 50 rows of 4 classes
    rows = DenseRows(model, cases, objective)
    before = model(x).detach()
    with torch.no_grad():
        model.weight.mul_(0.5)
    some = torch.cat([torch.arange(0, 100, 3), torch.arange(100, 200, 3)])  # the third case is not needed
    far = F.kl_div(model(x).detach().log_softmax(-1), before.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert rows.distance(model) == pytest.approx(float(far[some].mean()), rel=1e-5)


def test_the_setting_is_the_nearest_of_those_tried_and_the_network_is_as_before() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1, 8, 12)
    a, g = torch.randn(1, 40, 12), torch.randn(1, 20, 8)
    state = {"w": weight.clone()}
    seen: list[Tensor] = []

    def write(value: Tensor) -> None:
        state["w"] = value
        seen.append(value)

    def distance() -> float:
        return abs(float(state["w"].square().sum()) - 40.0) + math.fabs(float(state["w"][0, 0, 0])) * 1e-3

    problem = DampingProblem(weight, False, lambda: (a.mT @ a, g.mT @ g), write, lambda: write(weight))
    trials = chosen_damping("w", [problem], 0.5, distance)
    costs = [t.cost for t in trials]
    assert costs == sorted(costs) and len({t.damping for t in trials}) == len(trials)
    assert torch.equal(state["w"], weight)
    for value in seen[:-1]:
        assert int((value == 0).sum()) == 48
    first = {t.damping.inputs: t.cost for t in trials if t.damping.outputs == 0.3}
    best = min(first, key=first.__getitem__)
    grid = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
    at = grid.index(best)
    assert set(grid[max(0, at - 1) : at + 2]) | {0.1} <= set(first)
    assert {t.damping.inputs for t in trials if t.damping.outputs != 0.3} == {best}
    then = {t.damping.outputs: t.cost for t in trials if t.damping.inputs == best}
    grid = [0.03, 0.1, 0.3, 0.6, 1.0]
    at = grid.index(min(then, key=then.__getitem__))
    assert set(grid[max(0, at - 1) : at + 2]) <= set(then)

    told = iter([math.nan, 4.0, 5.0, 3.9, 6.0])  # lambda .03, .1, .3; tau .1, .03
    trials = chosen_damping("w", [problem], 0.5, lambda: next(told))
    assert [t.damping for t in trials[:2]] == [Damping(0.1, 0.1), Damping(0.1, 0.3)] and math.isnan(trials[-1].cost)

    class Broken(Exception):
        pass

    def fails() -> float:
        raise Broken

    with pytest.raises(Broken):
        chosen_damping("w", [problem], 0.5, fails)
    assert torch.equal(state["w"], weight)


@pytest.mark.parametrize(
    ("costs", "found", "seen"),
    [
        ([1, 2, 3, 4, 5], 0, {0, 1, 2}),
        ([9, 1, 3, 4, 5], 1, {0, 1, 2}),
        ([9, 4, 3, 4, 0], 2, {1, 2, 3}),  # down to where it grows, no further
        ([9, 4, 3, 2, 5], 3, {1, 2, 3, 4}),
        ([9, 4, 3, 2, 1], 4, {1, 2, 3, 4}),
        ([0, 3, 3, 3, 0], 2, {1, 2, 3}),
        ([0, math.nan, 3, math.nan, 0], 2, {1, 2, 3}),
    ],
)
def test_a_setting_is_followed_down_to_where_the_distance_grows(costs: list[float], found: int, seen: set[int]) -> None:
    asked: set[int] = set()

    def cost(damping: Damping) -> float:
        asked.add(int(damping.inputs))
        return costs[int(damping.inputs)]

    assert lowest([Damping(float(i), 1.0) for i in range(5)], 2, cost).inputs == found
    assert asked == seen


def test_where_the_data_that_judge_are_padding_nothing_is_chosen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)], nn.Linear(8, 3))
    data = [(torch.randn(32, 8), torch.randint(0, 3, (32,))) for _ in range(8)]
    some = [(x, torch.full_like(y, -100) if i == 3 else y) for i, (x, y) in enumerate(data)]
    none = [(x, torch.full_like(y, -100) if i % 4 == 3 else y) for i, (x, y) in enumerate(data)]
    assert prune(model, some, keep_share=0.5, likelihood="classification").trials
    done = prune(model, none, keep_share=0.5, likelihood="classification")
    assert not done.trials and done.keep_share == pytest.approx(0.5, abs=1e-3)
    real = [F.cross_entropy(model(x), y).item() for i, (x, y) in enumerate(none) if i % 4 != 3]
    assert done.before == pytest.approx(sum(real) / len(real), rel=1e-5)  # there are no others
    with pytest.raises(DataError, match="every target is padding: shuffle"):
        prune(model, none, likelihood="classification")


def test_trying_settings_leaves_every_bit_of_the_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)], nn.Linear(8, 3)).double()
    for p in model.parameters():
        p.detach().add_(1e-9 * torch.randn(p.shape, dtype=torch.float64))  # what float32 cannot hold
    data = [(torch.randn(32, 8).double(), torch.randint(0, 3, (32,))) for _ in range(8)]
    job = BlockJob(data, "auto", None, None, PruneSettings())
    trained = {n: t.clone() for n, t in model.state_dict().items()}
    with job._studied(model, "weights") as (cases, found, _):
        chosen, trials = job._damping(model, cases[3::4], found, dict.fromkeys(found.samples, 0.5), None)
    assert trials and chosen
    assert all(torch.equal(t, trained[n]) for n, t in model.state_dict().items())  # float64 is more than what is solved
