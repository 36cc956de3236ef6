"""Gradients of one process: finite or not, in every dtype, and whose."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ockham.core.processes import finite_gradients, rows_here
from ockham.errors import OckhamError


def with_gradients(dtype: torch.dtype, *gradients: Tensor) -> dict[str, Tensor]:
    found = {}
    for i, g in enumerate(gradients):
        p = nn.Parameter(torch.zeros(g.shape, dtype=dtype))
        p.grad = g.to(dtype)
        found[f"p{i}"] = p
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_among_many_is_found(dtype: torch.dtype, bad: float) -> None:
    wrong = torch.ones(3, 4)
    wrong[1, 2] = bad
    gradients = with_gradients(dtype, torch.ones(5), wrong, torch.ones(()), torch.ones(0))
    assert not finite_gradients(gradients, skip=True)
    with pytest.raises(OckhamError, match="'p1' is NaN or infinite in 1 of 12 places"):
        finite_gradients(gradients, skip=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_large_numbers_are_finite(dtype: torch.dtype) -> None:
    """Their squares overflow, they do not."""
    large = torch.full((4, 6), 0.9 * torch.finfo(dtype).max, dtype=dtype)
    assert finite_gradients(with_gradients(dtype, large, large.T), skip=False)
    assert finite_gradients({}, skip=False)


def test_strided_gradients() -> None:
    p = nn.Parameter(torch.zeros(6, 4))
    p.grad = torch.ones(4, 6).T
    assert finite_gradients({"p": p}, skip=False)
    p.grad[5, 3] = math.nan
    assert not finite_gradients({"p": p}, skip=True)


def test_rows_of_what_is_not_divided_are_the_tensor() -> None:
    class Own(Tensor):
        pass

    for tensor in (torch.ones(3), nn.Parameter(torch.ones(3)), torch.ones(3).as_subclass(Own)):
        assert rows_here(tensor) is tensor
