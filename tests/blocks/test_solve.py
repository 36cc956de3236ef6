"""A sparse matrix under a Kronecker curvature, against dense linear algebra."""

from __future__ import annotations

import itertools

import pytest
import torch

from ockham.errors import OckhamError
from ockham.methods.blocks import solve
from ockham.methods.blocks.solve import Damping, NofM, Quadratic, damped, loss_increase, quadratic
from ockham.methods.blocks.solve import sparse_matrix as sparse
from ockham.methods.blocks.stop import single_costs

OUT, IN = 5, 8


def factors(seed: int = 0, groups: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(groups, 40, IN, generator=generator, dtype=torch.float64)
    g = torch.randn(groups, 30, OUT, generator=generator, dtype=torch.float64)
    weight = torch.randn(groups, OUT, IN, generator=generator, dtype=torch.float64)
    return a.mT @ a, g.mT @ g, weight


def dense(q: Quadratic, group: int = 0) -> torch.Tensor:
    """The curvature of vec(W), rows behind each other."""
    outputs = torch.eye(OUT, dtype=torch.float64) if q.outputs is None else q.outputs[group]
    return torch.kron(outputs, q.inputs[group])


def constrained(h: torch.Tensor, target: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
    """argmin of (x - t)' H (x - t) over x that are zero where nothing stays, by one dense solve."""
    x = torch.zeros_like(target)
    x[stays] = torch.linalg.solve(h[stays][:, stays], (h @ target)[stays])
    return x


@pytest.mark.parametrize("tau", [0.3, 1.0])
@pytest.mark.parametrize("groups", [1, 2])
def test_survivors_are_the_constrained_minimum(tau: float, groups: int) -> None:
    a, g, weight = factors(groups=groups)
    q = quadratic(a, g, Damping(0.05, tau))
    small = sparse(weight, q, q.conditional(), keep=0.5, steps=(5, 400))
    assert int((small == 0).sum()) == small.numel() // 2
    for i in range(groups):
        expected = constrained(dense(q, i), weight[i].flatten(), (small[i] != 0).flatten())
        torch.testing.assert_close(small[i].flatten(), expected, rtol=0, atol=2e-4)


def test_order_is_the_cost_of_one_removal_with_all_others_free() -> None:
    a, g, weight = factors(1)
    q = quadratic(a, g, Damping(0.1, 0.4))
    h, t = dense(q), weight.flatten()
    brute = []
    for i in range(t.numel()):
        stays = torch.arange(t.numel()) != i
        d = constrained(h, t, stays) - t
        brute.append(float(d @ h @ d))
    torch.testing.assert_close(
        (weight.square() * q.conditional()).flatten(), torch.tensor(brute).double(), rtol=1e-6, atol=1e-9
    )


def test_damped_factors_are_as_the_formula_has_them() -> None:
    a, g, _ = factors(2)
    q = quadratic(a, g, Damping(0.2, 0.3))
    assert q.outputs is not None
    torch.testing.assert_close(q.inputs[0], a[0] / a[0].diagonal().mean() + 0.2 * torch.eye(IN).double())
    torch.testing.assert_close(q.outputs[0], 0.7 * g[0] / g[0].diagonal().mean() + 0.3 * torch.eye(OUT).double())
    assert quadratic(a, g, Damping(0.2, 1.0)).outputs is None
    assert torch.equal(damped(torch.zeros(1, 3, 3), 0.5)[0], 0.5 * torch.eye(3))


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
def test_pattern_holds_in_every_run(text: str) -> None:
    a, g, weight = factors(3)
    q, pattern = quadratic(a, g, Damping(0.1, 0.3)), NofM.parse(text)
    small = sparse(weight, q, q.conditional(), keep=pattern)
    assert set((small != 0).view(-1, pattern.m).sum(1).tolist()) == {pattern.n}


@pytest.mark.parametrize("text", ["2-4", "4:2", "0:4", "a:b", "2:4:8", ""])
def test_no_pattern(text: str) -> None:
    with pytest.raises(OckhamError, match="n:m"):
        NofM.parse(text)


def test_a_bias_stays_and_moves() -> None:
    a, g, weight = factors(4)
    q = quadratic(a, g, Damping(0.01, 0.5))
    small = sparse(weight, q, q.conditional(), keep=0.4, bias=True)
    assert bool((small[..., -1] != 0).all())
    assert not torch.allclose(small[..., -1], weight[..., -1])
    assert int((small[..., :-1] != 0).sum()) == round(0.4 * OUT * (IN - 1))


def test_rounds_do_not_lose_against_one() -> None:
    costs = []
    for rounds in (1, 6):
        total = 0.0
        for seed in range(8):
            a, g, weight = factors(seed)
            q = quadratic(a, g, Damping(0.02, 0.3))
            small = sparse(weight, q, q.conditional(), keep=0.4, rounds=rounds, steps=(40, 100))
            total += loss_increase(small - weight, q.inputs, q.outputs, 1.0)
        costs.append(total)
    assert costs[1] < costs[0]


def test_loss_increase_is_the_quadratic_form() -> None:
    a, g, weight = factors(5)
    d = weight.flatten()
    expected = 0.5 * float(d @ torch.kron(g[0], a[0]) @ d) / 7
    assert loss_increase(weight, a, g, 7.0) == pytest.approx(expected, rel=1e-12)


def test_single_costs_are_exact_where_rows_are_independent() -> None:
    a, g, weight = factors(6)
    g = torch.diag_embed(g.diagonal(dim1=-2, dim2=-1))
    mean = float(a[0].diagonal().mean())
    h = torch.kron(g[0], a[0] + 0.01 * mean * torch.eye(IN).double()) / 11
    expected = 0.5 * weight.flatten().square() / torch.linalg.inv(h).diagonal()
    torch.testing.assert_close(single_costs(weight, a, g, 11.0, 0.01).flatten(), expected)


def test_factors_that_are_not_finite_are_refused() -> None:
    a, g, _ = factors(7)
    a[0, 0, 0] = torch.nan
    with pytest.raises(OckhamError, match="not positive definite"):
        quadratic(a, g, Damping(0.1, 1.0)).conditional()


def cost_of(change: torch.Tensor, q: Quadratic) -> float:
    return float((q.apply(change) * change).sum())


def best_of_all(q: Quadratic, target: torch.Tensor, stay: int) -> float:
    """The least cost over every support of so many weights, each solved densely."""
    h, t = dense_of(q, target), target.flatten()
    costs = []
    for chosen in itertools.combinations(range(t.numel()), stay):
        stays = torch.zeros(t.numel(), dtype=torch.bool)
        stays[list(chosen)] = True
        d = constrained(h, t, stays) - t
        costs.append(float(d @ h @ d))
    return min(costs)


def dense_of(q: Quadratic, target: torch.Tensor) -> torch.Tensor:
    outputs = torch.eye(target.shape[1], dtype=torch.float64) if q.outputs is None else q.outputs[0]
    return torch.kron(outputs, q.inputs[0])


def correlated(seed: int, outputs: int, inputs: int, tau: float) -> tuple[Quadratic, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> torch.Tensor:
        x = torch.randn(1, n + 2, n, generator=generator, dtype=torch.float64)
        x = x + 2 * torch.randn(1, n + 2, 1, generator=generator, dtype=torch.float64)  # a direction common to all
        return x.mT @ x

    a, g = draw(inputs), draw(outputs)
    weight = torch.randn(1, outputs, inputs, generator=generator, dtype=torch.float64)
    return quadratic(a, g, Damping(0.02, tau)), weight


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_swapping_comes_nearer_to_the_best_support_than_rounds_do(tau: float) -> None:
    swapped = greedy = best = 0.0
    for seed in range(12):
        q, weight = correlated(seed, 2, 5, tau)
        given = {"keep": 0.5, "steps": (100, 100)}
        swapped += cost_of(sparse(weight, q, q.conditional(), **given) - weight, q)
        greedy += cost_of(sparse(weight, q, q.conditional(), rounds=4, **given) - weight, q)
        best += best_of_all(q, weight, 5)
    assert best <= swapped * (1 + 1e-9)
    assert swapped < greedy
    assert swapped < 1.25 * best


def test_without_correlation_the_largest_stay_as_they_are() -> None:
    generator = torch.Generator().manual_seed(8)
    a, g = (torch.rand(1, n, generator=generator, dtype=torch.float64) + 0.1 for n in (IN, OUT))
    weight = torch.randn(1, OUT, IN, generator=generator, dtype=torch.float64)
    q = Quadratic(torch.diag_embed(a), torch.diag_embed(g))
    small = sparse(weight, q, q.conditional(), keep=0.4)
    worth = weight.square() * g[..., None] * a[..., None, :]
    expected = torch.where(worth >= worth.flatten().topk(16).values.min(), weight, 0.0)
    torch.testing.assert_close(small, expected)


@pytest.mark.parametrize("swaps", [1, 3, 30])
def test_the_support_of_the_largest_weights_is_never_better(swaps: int) -> None:
    """Where the search is ended early it has found little, and the largest weights, solved to the end, win."""
    won = 0
    for seed in range(8):
        a, g, weight = factors(seed)
        q = quadratic(a, g, Damping(0.3, 0.5))
        found = cost_of(sparse(weight, q, keep=0.5, swaps=swaps, steps=(3, 60)) - weight, q)
        sizes = weight.abs() * q.inputs.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-2)
        assert q.outputs is not None
        sizes = sizes * q.outputs.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-1)
        largest = sizes >= sizes.flatten().kthvalue(sizes.numel() - sizes.numel() // 2 + 1).values
        assert int(largest.sum()) == sizes.numel() // 2
        top = solve._top(q.inputs)
        plain = cost_of(solve._on_support(weight, q, largest, weight, 60, top=top) - weight, q)
        assert found <= plain * (1 + 1e-6)
        won += found >= plain * (1 - 1e-6)
    assert won > 0 if swaps == 1 else won < 8


def test_units_of_inputs_and_outputs_do_not_decide_what_stays() -> None:
    q, weight = correlated(3, 4, 6, 0.3)
    assert q.outputs is not None
    generator = torch.Generator().manual_seed(4)
    c, r = (torch.rand(1, n, generator=generator, dtype=torch.float64) * 9 + 0.5 for n in (6, 4))
    other = Quadratic(q.inputs * c[..., None] * c[..., None, :], q.outputs * r[..., None] * r[..., None, :])
    moved = weight / c[..., None, :] / r[..., None]
    one = sparse(weight, q, q.conditional(), keep=0.5, steps=(50, 200))
    two = sparse(moved, other, other.conditional(), keep=0.5, steps=(50, 200))
    assert torch.equal(one == 0, two == 0)


@pytest.mark.parametrize("rounds", [None, 3])
@pytest.mark.parametrize("keep", [1.0, 0.0])
def test_all_or_nothing(keep: float, rounds: int | None) -> None:
    q, weight = correlated(5, 3, 4, 0.3)
    small = sparse(weight, q, q.conditional(), keep=keep, rounds=rounds)
    torch.testing.assert_close(small, weight * keep)


def test_a_row_of_zeros_is_no_trouble() -> None:
    q, weight = correlated(6, 3, 4, 0.3)
    weight[:, 1] = 0
    small = sparse(weight, q, q.conditional(), keep=0.5)
    assert bool(torch.isfinite(small).all())
    assert int((small != 0).sum()) == 6


@pytest.mark.parametrize("kind", ["plain", "ties", "one value", "sorted", "infinite", "bunched"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.97, 1.0])
def test_so_many_of_the_lowest_of_a_large_matrix(kind: str, share: float) -> None:
    n = 80_001
    values = torch.randn(n, generator=torch.Generator().manual_seed(0)).square()
    values = {
        "plain": values,
        "ties": (values * 3).round(),
        "one value": torch.ones(n),
        "sorted": values.sort().values,
        "infinite": values.masked_fill(torch.arange(n) % 4 > 1, torch.inf),
        "bunched": torch.where(torch.arange(n) % 61 == 0, values, values + 10),  # the sample sees other values only
    }[kind]
    count = round(share * n)
    found = solve.lowest_of(values, count)
    assert int(found.sum()) == count
    if 0 < count < n:
        assert float(values[found].max()) <= float(values[~found].min())
