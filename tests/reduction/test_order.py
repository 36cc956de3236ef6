"""The smallest of many numbers, against a stable sort of all of them."""

from __future__ import annotations

import pytest
import torch

from ockham.choose import rules as module
from ockham.choose.rules import smallest


def by_sorting(order, candidates, count):
    flat = torch.cat([order[n].double() for n in candidates])
    free = torch.cat(list(candidates.values()))
    places = free.nonzero().squeeze(1)
    chosen = torch.zeros(flat.shape, dtype=torch.bool)
    chosen[places[torch.argsort(flat[places].nan_to_num(nan=torch.inf), stable=True)[:count]]] = True
    return dict(zip(candidates, chosen.split([m.numel() for m in candidates.values()]), strict=True))


def numbers(kind, n, generator):
    values = {
        "normal": lambda: torch.randn(n, generator=generator),
        "ties": lambda: torch.randint(-3, 4, (n,), generator=generator).float() * 0.5,
        "equal": lambda: torch.full((n,), 2.5),
        "close": lambda: 1.0 + 1e-7 * torch.randint(0, 5, (n,), generator=generator),
        "odd": lambda: torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45])[
            torch.randint(0, 7, (n,), generator=generator)
        ],
    }
    return values[kind]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "close", "odd"])
def test_the_same_are_chosen_as_by_a_stable_sort(kind, dtype, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", 13)
    g = torch.Generator().manual_seed(0)
    order = {name: numbers(kind, n, g).to(dtype) for name, n in (("a", 40), ("none", 0), ("b", 57), ("left out", 9))}
    candidates = {name: torch.rand(len(order[name]), generator=g) < 0.8 for name in ("a", "none", "b")}
    total = sum(int(c.sum()) for c in candidates.values())
    for count in (0, 1, 2, total // 3, total - 1, total):
        got, want = smallest(order, candidates, count), by_sorting(order, candidates, count)
        assert list(got) == list(candidates) and sum(int(v.sum()) for v in got.values()) == count
        assert all(torch.equal(got[n], want[n]) for n in want), count


def test_single_and_double_precision_may_be_mixed():
    order = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([2.0, 0.5], dtype=torch.float64)}
    got = smallest(order, {n: torch.ones(2, dtype=torch.bool) for n in order}, 2)
    assert got["a"].tolist() == [True, False] and got["b"].tolist() == [False, True]
