"""Units nobody reads go, the function stays."""

from __future__ import annotations

import pytest
import torch

import ockham
from ockham.surgery.groups import PlanError
from ockham.surgery.refitting import plan_unread


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 5), torch.nn.Sigmoid(), torch.nn.Linear(5, 3)
    )


def zeroed(model, keep):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in keep:
                p.masked_fill_(~keep[name], 0.0)
    return model


def test_unread_units_go_upstream_too_and_the_function_stays():
    model = net()
    keep = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    keep["4.weight"][:, 1:] = False  # only unit 0 of the second hidden layer is read
    keep["2.weight"][0, 3:] = False  # which reads units 0, 1, 2 of the first
    zeroed(model, keep)
    x = torch.randn(7, 6)
    plan = plan_unread(ockham.trace(model, x), keep)
    small = ockham.shrink(model, plan)
    assert [tuple(p.shape) for p in small.parameters()] == [(3, 6), (3,), (1, 3), (1,), (3, 1), (3,)]
    torch.testing.assert_close(small(x), model(x), atol=1e-6, rtol=0)


def test_one_unit_stays_where_nothing_is_read_and_unnamed_weights_stay():
    model = net()
    keep = {"4.weight": torch.zeros(3, 5, dtype=torch.bool)}
    zeroed(model, keep)
    x = torch.randn(7, 6)
    small = ockham.shrink(model, plan_unread(ockham.trace(model, x), keep))
    assert small[4].weight.shape == (3, 1) and small[0].weight.shape == (8, 6)
    torch.testing.assert_close(small(x), model(x), atol=1e-6, rtol=0)


def test_a_wrong_mask_is_refused():
    model = net()
    with pytest.raises(PlanError, match=r"4\.weight"):
        plan_unread(ockham.trace(model, torch.randn(2, 6)), {"4.weight": torch.ones(3, 4, dtype=torch.bool)})
