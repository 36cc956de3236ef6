"""Plans are data: printable, JSON, replayable, and refused where they do not fit."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from ockham.choose.planning import plan
from ockham.errors import OckhamError
from ockham.surgery import Plan, PlanError, mask, random_plan, shrink, slice_tensor, trace


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


@pytest.fixture
def groups(model):
    return trace(model, torch.zeros(2, 4))


def keep(size, *gone):
    mask_ = torch.ones(size, dtype=torch.bool)
    mask_[list(gone)] = False
    return mask_


def test_the_cut_of_a_unit_is_its_row_and_its_column(groups):
    group = groups["0.weight:0"]
    assert {n: i.tolist() for n, i in group.incoming(1)} == {"0.weight": [4, 5, 6, 7], "0.bias": [1]}
    assert {n: i.tolist() for n, i in group.outgoing(1)} == {"2.weight": [1, 7, 13, 19, 25]}


def test_cuts_of_all_units_cover_the_tensors_once(groups):
    group = groups["2.weight:0"]
    flat = torch.cat([dict(group.outgoing(u))["4.weight"] for u in range(group.size)])
    assert sorted(flat.tolist()) == list(range(10))


def test_cuts_of_all_units_at_once_are_those_of_each():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    (group,) = trace(net, torch.zeros(1, 3, 4, 4))
    reads = dict(group.outgoing_cuts())
    assert reads["3.weight"].shape == (4, 8)
    for unit in range(4):
        zeroed = net[3].weight.detach().clone()
        zeroed.view(-1)[reads["3.weight"][unit]] = 0
        assert torch.equal(zeroed.view(2, 4, 4)[:, unit], torch.zeros(2, 4))
        assert int((zeroed == 0).sum()) == 8
        assert dict(group.outgoing(unit))["3.weight"].tolist() == sorted(reads["3.weight"][unit].tolist())
        assert dict(group.incoming(unit))["0.weight"].tolist() == list(range(27 * unit, 27 * unit + 27))


def test_a_tied_embedding_makes_and_reads():
    from .nets import ZOO

    make, inputs = ZOO["tied"]
    (group,) = trace(make().eval(), inputs())
    column = list(range(2, 240, 12))
    assert dict(group.incoming(2))["e.weight"].tolist() == column
    assert dict(group.outgoing(2))["e.weight"].tolist() == column
    assert set(dict(group.incoming(2))) == {"e.weight", "m.weight", "m.bias"}
    assert set(dict(group.outgoing(2))) == {"e.weight", "m.weight"}


def test_a_plan_removes_what_it_was_told(model, groups):
    made = plan(groups, {"0.weight:0": keep(6, 0, 4)})
    small = shrink(model, made)
    assert torch.equal(small[0].weight, model[0].weight[[1, 2, 3, 5]])
    assert torch.equal(small[2].weight, model[2].weight[:, [1, 2, 3, 5]])
    assert (small[0].out_features, small[2].in_features, small[2].out_features) == (4, 4, 5)
    masked = mask(model, made)
    assert masked[0].weight[[0, 4]].abs().sum() == 0 and masked[2].weight[:, [0, 4]].abs().sum() == 0
    assert torch.equal(masked[2].weight[:, 1], model[2].weight[:, 1])


def test_json_round_trip_and_print(groups):
    made = plan(groups, {"0.weight:0": keep(6, 0, 4, 5)}, nats={"0.weight:0": torch.arange(6.0)})
    again = Plan.from_json(made.to_json())
    assert again.to_json() == made.to_json()
    assert again.fingerprint == made.fingerprint
    assert "0.weight:0: 6 -> 3, without 0, 4-5 (9.0 nats)" in str(again)
    assert "nothing is removed" in str(plan(groups, {}))


def test_slice_tensor_takes_anything_of_the_shape(groups):
    made = plan(groups, {"2.weight:0": keep(5, 0)})
    x = torch.arange(30.0).reshape(5, 6)
    assert torch.equal(slice_tensor(made, "2.weight", x), x[1:])
    with pytest.raises(PlanError, match="expects"):
        slice_tensor(made, "2.weight", x.T)
    with pytest.raises(PlanError, match="no such tensor"):
        slice_tensor(made, "nobody", x)


def test_a_plan_for_another_model_is_refused_by_name_and_shape(groups):
    made = plan(groups, {"0.weight:0": keep(6, 0)})
    other = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2))
    for apply in (mask, shrink):
        with pytest.raises(
            PlanError, match=r"another model \(3 tensors differ\): 0.weight: plan \(6, 4\), model \(7, 4\)"
        ):
            apply(other, made)


@pytest.mark.parametrize(
    ("keep_", "text"),
    [
        ({"nobody": keep(6)}, "no group 'nobody'"),
        ({"0.weight:0": torch.ones(6)}, "expected torch.bool"),
        ({"0.weight:0": keep(5)}, r"expected torch.bool of \(6,\)"),
        ({"0.weight:0": ~keep(6)}, "removes all 6 units"),
    ],
)
def test_masks_that_do_not_fit(groups, keep_, text):
    with pytest.raises(PlanError, match=text):
        plan(groups, keep_)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_ratios_outside_zero_and_one(groups, ratio):
    with pytest.raises(PlanError, match="between 0 and 1"):
        random_plan(groups, ratio)


def test_a_random_plan_keeps_one_unit_and_follows_its_generator(groups):
    full = random_plan(groups, 1.0)
    assert {k: len(v) for k, v in full.removed.items()} == {"0.weight:0": 5, "2.weight:0": 4}
    one, two = (random_plan(groups, 0.5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.removed == two.removed
    state = torch.get_rng_state()
    random_plan(groups, 0.5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.update(kind="cake"), "not an Ockham plan"),
        (lambda d: d.update(schema=99), "upgrade"),
        (lambda d: d.pop("cuts"), "damaged"),
        (lambda d: d["cuts"]["0.weight"].update({"0": [77]}), "cannot lose"),
        (lambda d: d["cuts"]["0.weight"].update({"0": list(range(6))}), "cannot lose"),
        (lambda d: d["cuts"].update({"nobody": {"0": [1]}}), "damaged"),
        (lambda d: d["shapes"].update({"0.weight": [9, 9]}), "fingerprint"),
    ],
)
def test_damaged_plans(groups, change, text):
    data = json.loads(plan(groups, {"0.weight:0": keep(6, 0)}).to_json())
    data.pop("sha256", None)  # a change by hand takes it out
    change(data)
    with pytest.raises(PlanError, match=text):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"kind": "ockham-plan"}'])
def test_text_that_is_no_plan(text):
    with pytest.raises(OckhamError):
        Plan.from_json(text)
