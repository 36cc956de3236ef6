"""Whole units: the exact costs, the refit, and the law that the masked network is the shrunk one."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ockham
from ockham.errors import OckhamError
from ockham.methods.blocks import job
from ockham.methods.blocks.cases import Case, DenseRows, traced_inputs
from ockham.methods.blocks.prune import PruneSettings, prune
from ockham.methods.blocks.units import (
    UnitCurve,
    UnitReader,
    _steps,
    measured_curves,
    readers_of,
    refitted,
    unit_curve,
)
from ockham.surgery.costs import cost

from .networks import batches, ids, network
from .test_curvature import studied


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def mlp() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    data = [
        (torch.randn(40, 6, generator=generator), torch.randint(0, 6, (40,), generator=generator)) for _ in range(4)
    ]
    return nn.Sequential(Block(), Block()), data


def test_costs_of_units_are_those_of_brute_force(tmp_path: Path) -> None:
    model, data = mlp()
    found, _, cases = studied(model, data, tmp_path)
    reader = readers_of(ockham.trace(model, cases[0].args), found.dense.maps)[0]
    assert reader.keys == ("0.down.weight",) and tuple(reader.columns.shape) == (10, 1)
    curve = unit_curve(reader, found.dense, 0.05)
    b = found.dense.maps[0]
    a, g = found.dense.inputs(b, reader.keys[0])[0].double(), found.dense.outputs(reader.keys[0])[0].double()
    a = a + 0.05 * a.diagonal().mean() * torch.eye(10).double()
    h = torch.kron(g + 1e-12 * torch.eye(6), a) / found.dense.scale(b, reader.keys[0])
    w = model[0].down.weight.detach().double().flatten()

    def joint(gone: list[int]) -> float:
        stays = torch.ones(6, 10, dtype=torch.bool)
        stays[:, gone] = False
        s = stays.flatten()
        x = torch.zeros_like(w)
        x[s] = torch.linalg.solve(h[s][:, s], (h @ w)[s])
        return 0.5 * float((x - w) @ h @ (x - w))

    first = curve.order[0]
    assert curve.costs[0] == pytest.approx(joint([first]), rel=1e-3)
    assert joint([first]) == pytest.approx(min(joint([i]) for i in range(10)), rel=1e-3)
    assert len(curve.order) == 6  # two thirds of ten, and each once
    assert len(set(curve.order)) == 6


def test_refit_is_ridge_regression_on_the_whole_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 7, generator=generator, dtype=torch.float64) + 1
    w = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    keep = torch.tensor([True, False, True, True, False, True, True])
    ridge = float(0.3 * (x.T @ x).diagonal().mean()) ** 0.5
    design = torch.cat([x[:, keep], ridge * torch.eye(5).double()])
    wanted = torch.cat([x @ w.T, ridge * w[:, keep].T])
    expected = torch.linalg.lstsq(design, wanted).solution.T
    got = refitted(w, x.T @ x, keep, 0.3)
    torch.testing.assert_close(got[:, keep], expected)
    assert not bool(got[:, ~keep].any())
    assert torch.equal(refitted(w, torch.zeros(7, 7).double(), keep, 0.3), w * keep)  # nothing goes in


def in_old_widths(kind: str, done: Any) -> nn.Module:
    """A network of the old widths with the small one's weights in it, and zeros in what reads the rest."""
    zeroed = network(kind)
    for name, p in zeroed.named_parameters():
        value, view = done.model.get_parameter(name).detach(), torch.zeros_like(p)
        index = [done.plan.kept(name, d) for d in range(p.ndim)]
        view[torch.meshgrid(*index, indexing="ij")] = value
        p.detach().copy_(view)
    return zeroed


@pytest.mark.parametrize(
    ("kind", "structure"), [("llama", "uneven"), ("llama", "auto"), ("gpt2", "auto"), ("vit", "even")]
)
def test_units_are_gone_and_the_network_is_the_masked_one(kind: str, structure: str, tmp_path: Path) -> None:
    model, data = network(kind), batches(kind)
    share = {"llama": "85%", "gpt2": "90%", "vit": "92%"}[kind]
    done = prune(model, data, structure=structure, budget={"params": share})
    count = sum(p.numel() for p in done.model.parameters()) / sum(p.numel() for p in model.parameters())
    assert 0.8 < count <= float(share.rstrip("%")) / 100
    assert type(done.model) is type(model) and done.plan.removed
    zeroed = in_old_widths(kind, done)
    inputs = {"pixel_values": data[0][0]} if kind == "vit" else {"input_ids": ids(3, 7, seed=9)}
    for mode in (True, False):
        for m in (zeroed, done.model):
            m.train(mode)
            for layer in (x for x in m.modules() if isinstance(x, nn.Dropout)):
                layer.p = 0.0  # it draws other numbers at other widths
        with torch.no_grad():
            torch.testing.assert_close(done.model(**inputs).logits, zeroed(**inputs).logits, rtol=1e-4, atol=1e-5)
    if structure != "uneven":
        done.save(tmp_path / "out")
        again = type(model).from_pretrained(tmp_path / "out").eval()
        with torch.no_grad():
            assert torch.equal(again(**inputs).logits, done.model.eval()(**inputs).logits)


def test_long_texts_are_traced_by_their_first_tokens(monkeypatch) -> None:
    traced = []
    monkeypatch.setattr(job, "trace", lambda model, given, **more: traced.append(given) or ockham.trace(model, given))
    model, windows = network("llama"), [ids(2, 80, seed=i) for i in range(4)]
    done = prune(model, windows, structure="uneven", budget={"macs": "85%"})
    assert [tuple(t.shape) for (t,) in traced] == [(2, 32)]  # one text, twice
    left = {name: tuple(p.shape) for name, p in done.model.named_parameters()}
    layers = sum(math.prod(s) for n, s in left.items() if "layers" in n and len(s) == 2) + 24 * 64
    heads = sum(left[f"model.layers.{i}.self_attn.q_proj.weight"][0] for i in range(3))
    assert cost(done.model, windows[0]).macs == 2 * 80 * (layers + 2 * 80 * heads)  # windows as they are
    assert cost(done.model, windows[0]).macs <= 0.85 * cost(model, windows[0]).macs
    with torch.no_grad():
        found, expected = done.model.eval()(windows[0]).logits, in_old_widths("llama", done).eval()(windows[0]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Anything(nn.Module):
    """Takes inputs of every size."""

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> None:
        """Nothing."""


def test_only_numbers_and_masks_of_texts_are_cut() -> None:
    long, mask = ids(2, 80), torch.ones(2, 80, dtype=torch.bool)
    cut = traced_inputs(Anything(), Case((), {"input_ids": long, "attention_mask": mask, "labels": long[:, :20]}, None))
    assert {k: tuple(t.shape) for k, t in cut.items()} == {
        "input_ids": (2, 32), "attention_mask": (2, 32), "labels": (2, 20)
    }  # fmt: skip
    assert torch.equal(cut["input_ids"], long[:, :32])
    for other in (torch.randn(2, 80), torch.randn(2, 3, 80, 80), torch.ones(2, 80, 80, dtype=torch.bool)):
        given = {"input_ids": long, "other": other}
        assert traced_inputs(Anything(), Case((), given, None)) == given
    (image,) = traced_inputs(Anything(), Case((torch.randn(2, 3, 80, 80),), {}, None))
    assert image.shape == (2, 3, 80, 80)
    one = torch.randn(1, 3, 8, 8)
    (image,) = traced_inputs(Anything(), Case((one,), {}, None))
    assert torch.equal(image, torch.cat([one, one]))


@pytest.mark.parametrize("share", ["90%", "80%", "70%"])
def test_a_single_example_does_not_make_heads_of_examples(share: str) -> None:
    import transformers as hf

    torch.manual_seed(0)  # its attention counts examples and heads in one number
    sizes = {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "vocab_size": 64}
    model = hf.XGLMForCausalLM(hf.XGLMConfig(**sizes, max_position_embeddings=64)).eval()
    data = [{"input_ids": ids(1, 16, seed=i), "attention_mask": torch.ones(1, 16, dtype=torch.long)} for i in range(5)]
    small = prune(model, data, structure="uneven", budget={"params": share})
    for count in (2, 3, 4):  # two examples and two heads left are four again
        together = {k: torch.cat([x[k] for x in data[:count]]) for k in data[0]}
        with torch.no_grad():
            alone = torch.cat([small.model(**x).logits for x in data[:count]])
            torch.testing.assert_close(small.model(**together).logits, alone, rtol=1e-4, atol=1e-5)


class Columns(nn.Module):
    """A table of forty columns of numbers, each with its vector: it takes no fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.body, self.last = nn.Embedding(9, 2), nn.Linear(80, 6), mlp()[0], nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(self.first(self.table(x).flatten(1))) * scale)


def test_columns_of_a_table_are_not_cut_and_both_kinds_of_inputs_are_given() -> None:
    torch.manual_seed(0)
    model = Columns()
    batches = [
        ockham.Batch((torch.randint(0, 9, (20, 40)),), {"scale": torch.full((20, 1), 2)}, torch.arange(20) % 3)
        for _ in range(4)
    ]
    done = prune(model, batches, structure="uneven", budget={"params": "90%"})
    assert done.plan.removed and done.model(*batches[0].args, **batches[0].kwargs).shape == (20, 3)


def test_units_of_which_nothing_is_known_stay(tmp_path: Path) -> None:
    model, data = mlp()
    found, _, cases = studied(model, data, tmp_path)
    readers = readers_of(ockham.trace(model, cases[0].args), found.dense.maps)
    assert unit_curve(replace(readers[0], keys=("0.nowhere",)), found.dense, 0.05).order == ()


def test_refit_makes_good_for_what_went() -> None:
    model, data = mlp()
    groups = ockham.trace(model, data[0][0])
    small = prune(model, data, structure="uneven", budget={"params": "70%"})
    plain = ockham.shrink(model, small.plan)
    x = torch.cat([x for x, _ in data])
    with torch.no_grad():
        errors = [float((m(x) - model(x)).square().mean()) for m in (small.model, plain)]
    assert errors[0] < 0.5 * errors[1]
    assert set(small.plan.removed) <= {g.id for g in groups}


def test_units_and_weights_together() -> None:
    model, data = mlp()
    done = prune(model, data, structure="uneven", budget={"params": "80%"}, keep_share=0.5)
    assert done.keep_share == pytest.approx(0.5, abs=0.02)
    weights = [p for p in done.model.parameters() if p.ndim > 1]
    assert sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights) == pytest.approx(0.5, abs=0.02)


def test_budgets_that_cannot_be_met_say_what_can() -> None:
    model, data = mlp()
    with pytest.raises(OckhamError, match="cannot be met"):
        prune(model, data, structure="uneven", budget={"params": "10%"})
    with pytest.raises(OckhamError, match="no unit"):
        prune(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), data, structure="uneven", budget={"params": "90%"})


def test_width_inside_experts_goes_by_the_cost_over_all_of_them(tmp_path: Path) -> None:
    model, data = network("mixtral"), batches("mixtral")
    groups = ockham.trace(model, data[0])
    found, _, _ = studied(model, data, tmp_path)
    readers = [r for r in readers_of(groups, found.dense.maps) if "experts" in r.group]
    assert [len(r.keys) for r in readers] == [4, 4, 4]
    b, reader = found.dense.maps[1], readers[1]
    curve = unit_curve(reader, found.dense, 0.05)
    total = torch.zeros(40, dtype=torch.float64)
    for key in reader.keys:  # the first unit that goes costs least over the experts
        a, g = found.dense.inputs(b, key)[0].double(), found.dense.outputs(key)[0].double()
        h = torch.linalg.inv(a + 0.05 * a.diagonal().mean() * torch.eye(40).double())
        w = b.matrices[key].read(dict(model.named_parameters()))[0].double()
        total += 0.5 * (w * (g @ w)).sum(0) / h.diagonal() / found.dense.scale(b, key)
    first = int(total.argmin())
    assert curve.order[0] == first and curve.costs[0] == pytest.approx(float(total[first]), rel=1e-4)

    done = prune(model, data, structure="uneven", budget={"params": "85%"})
    widths = [e.down_proj.shape[2] for e in (layer.mlp.experts for layer in done.model.model.layers)]
    assert min(widths) < 40
    ockham_input = ids(3, 9, seed=50)
    with torch.no_grad():
        wanted = in_old_widths("mixtral", done).eval()(ockham_input).logits
        torch.testing.assert_close(done.model.eval()(ockham_input).logits, wanted, rtol=1e-4, atol=1e-5)


class Written(nn.Module):
    """A residual MLP that multiplies by a transposed parameter of its own, as Falcon does."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Parameter(torch.randn(6, 10) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.up(x)) @ self.down.T


def test_units_read_by_a_transposed_parameter_go(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Written(), Written())
    data = mlp()[1]
    found, _, cases = studied(model, data, tmp_path)
    readers = readers_of(ockham.trace(model, cases[0].args), found.dense.maps)
    assert [r.keys for r in readers] == [("0.down",), ("1.down",)]
    done = prune(model, data, structure="uneven", budget={"params": "80%"})
    full = nn.Sequential(Written(), Written())
    with torch.no_grad():
        for name, p in full.named_parameters():
            kept = [done.plan.kept(name, d) for d in range(p.ndim)]
            p.zero_()[torch.meshgrid(*kept, indexing="ij")] = done.model.get_parameter(name)
        x = torch.randn(7, 6)
        torch.testing.assert_close(done.model(x), full(x), rtol=1e-5, atol=1e-6)


def without_layers(kind: str, done: Any) -> nn.Module:
    """A network of all layers with the small one's weights, and zeros in the layers that went."""
    full, prefix = network(kind), {"llama": "model.layers", "gpt2": "transformer.h", "vit": "vit.layers"}[kind]
    count = len(full.get_submodule(prefix))
    gone = {int(b.id.removeprefix(f"{prefix}.").partition(".")[0]) for b in done.plan.dropped}
    kept = [i for i in range(count) if i not in gone]
    state = {}
    for name, value in done.model.state_dict().items():
        at, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        state[f"{prefix}.{kept[int(at)]}.{rest}" if name.startswith(f"{prefix}.") else name] = value
    lost = {n: torch.zeros_like(t) for n, t in full.state_dict().items() if n not in state}
    full.load_state_dict(state | lost)
    return full


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit"])
def test_whole_blocks_go_and_the_network_is_the_one_with_zeros_there(kind: str, tmp_path: Path) -> None:
    model, data = network(kind), batches(kind)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    done = prune(model, data, structure="depth", budget={"params": "85%"}, settings=PruneSettings(posterior=True))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    count = sum(p.numel() for p in done.model.parameters()) / sum(p.numel() for p in model.parameters())
    assert 0.5 < count <= 0.85 and type(done.model) is type(model)
    full = without_layers(kind, done).eval()
    inputs = {"pixel_values": data[0][0]} if kind == "vit" else {"input_ids": ids(3, 7, seed=9)}
    with torch.no_grad():
        said = done.model.eval()(**inputs).logits
        torch.testing.assert_close(said, full(**inputs).logits, rtol=1e-4, atol=1e-5)
    done.save(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, said)
        if kind != "vit":
            assert again.generate(ids(1, 5), max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 9)
    left = dict(done.model.named_parameters())
    assert done.posterior is not None and set(done.posterior) <= set(left)
    assert all(g.mean.shape == left[n].shape and torch.equal(g.mean, left[n]) for n, g in done.posterior.items())
    gone = {k for k, e in done.evidence.matrices.items() if e.kept == 0}
    layers = {"llama": 3, "gpt2": 2, "vit": 2}[kind]
    assert done.keep_share == pytest.approx(1 - len(done.plan.dropped) / 2 / layers)  # of all blocks, not of those gone
    assert all(e.nats == 0 for k, e in done.evidence.matrices.items() if k not in gone)
    assert gone and all(done.evidence.matrices[k].volume > 0 and done.evidence.matrices[k].cost > 0 for k in gone)


def test_the_branch_that_goes_is_the_one_whose_absence_is_measured_least() -> None:
    model, data = mlp()
    model = nn.Sequential(*model, Block(), Block())
    with torch.no_grad():
        for i, size in enumerate((1.0, 0.2, 0.6, 0.4)):
            model[i].down.weight *= size

    def distance(gone: list[int]) -> float:
        zeroed = copy.deepcopy(model)
        for i in gone:
            zeroed[i].down.weight.detach().zero_()
        with torch.no_grad():
            p, q = model(data[3][0]).log_softmax(-1), zeroed(data[3][0]).log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    first = min(range(4), key=lambda i: distance([i]))
    second = min((i for i in range(4) if i != first), key=lambda i: distance([first, i]))
    done = prune(model, data, structure="depth", budget={"params": "50%"})
    assert {b.id.partition(".")[0] for b in done.plan.dropped} == {str(first), str(second)}
    costs = {k.partition(".")[0]: v[0] for k, v in done.plan.nats.items()}
    assert costs[str(first)] == pytest.approx(distance([first]), rel=1e-4)
    assert sum(costs.values()) == pytest.approx(distance([first, second]), rel=1e-4)
    small = ockham.shrink(model, done.plan)
    with torch.no_grad():
        x = torch.cat([x for x, _ in data])
        errors = [float((m(x) - model(x)).square().mean()) for m in (done.model, small)]
    assert errors[0] < errors[1]  # those that stay make up for what went


def test_blocks_that_cannot_go_are_refused_with_the_way_out() -> None:
    model, data = mlp()
    with pytest.raises(OckhamError, match="cannot be met: with every block gone"):
        prune(nn.Sequential(*model, nn.Linear(6, 6)), data, structure="depth", budget={"params": "10%"})
    with pytest.raises(OckhamError, match="no block of Sequential can go"):
        prune(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), data, structure="depth", budget={"params": "90%"})
    spared = PruneSettings(ignore=["0.down"])
    done = prune(model, data, structure="depth", budget={"params": "60%"}, settings=spared)
    assert [b.id.partition(".")[0] for b in done.plan.dropped] == ["1"]


class Wide(nn.Module):
    """A residual MLP of 200 units."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 200), nn.Linear(200, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def test_widths_become_multiples_and_small_groups_have_any() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(Wide(), Wide(), Block()), mlp()[1]
    for settings, multiple in ((PruneSettings(), 16), (PruneSettings(round_to=25), 25), (PruneSettings(round_to=1), 1)):
        done = prune(model, data, structure="uneven", budget={"params": "71%"}, settings=settings)
        widths = [b.up.out_features for b in done.model]
        assert all(w % multiple == 0 or w == 200 for w in widths[:2]) and min(widths) < 200
        share = sum(p.numel() for p in done.model.parameters()) / sum(p.numel() for p in model.parameters())
        assert 0.71 - 2 * 13 * multiple / 5500 < share <= 0.71
    # of 200 units 67 may be left, the nearest multiple of 25 is 75: a budget comes before friendly widths
    tight = prune(model, data, structure="uneven", budget={"params": "37%"}, settings=PruneSettings(round_to=25))
    assert sum(p.numel() for p in tight.model.parameters()) <= 0.37 * sum(p.numel() for p in model.parameters())
    with pytest.raises(OckhamError, match="round_to is a whole number from 1"):
        PruneSettings(round_to=0)


def test_a_step_of_several_units_costs_what_they_cost_together() -> None:
    reader = UnitReader("a", 0, ("k",), torch.arange(35)[:, None])
    curve = UnitCurve(reader, tuple(range(30)), tuple(float(i) for i in range(30)))
    steps = _steps([curve], {"a": 2.0}, uniform=False, round_to=4)
    assert [(upto, units) for _, _, upto, units in steps][:3] == [(3, 3), (7, 4), (11, 4)]
    assert [rate for rate, *_ in steps][:2] == [pytest.approx(3 / 6), pytest.approx((3 + 4 + 5 + 6) / 8)]
    assert len(_steps([curve], {"a": 2.0}, uniform=False, round_to=5)) == 30  # too few units for multiples of five


def test_a_kind_of_units_costs_what_is_measured_on_data_held_out(tmp_path: Path) -> None:
    model, data = mlp()
    found, objective, cases = studied(model, data, tmp_path)
    assert found.tried
    readers = readers_of(ockham.trace(model, cases[0].args), found.dense.maps)
    curves = [unit_curve(r, found.dense, 0.01) for r in readers]
    judge = DenseRows(model, [cases[3]], objective)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    scaled = measured_curves(curves, found, lambda: judge.distance(model), 0.4)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    other, said = copy.deepcopy(model), 0.0
    with torch.no_grad():
        for j in found.tried:
            curve, key = curves[j], f"{j}.down.weight"
            stays = torch.ones(10, dtype=torch.bool)
            stays[list(curve.order[:2])] = False
            said += sum(curve.costs[:2])
            weight = other.get_parameter(key)
            weight.copy_(refitted(weight, found.dense.store.get(f"A:{key}")[0], stays, 0.4))
        p, q = (m(data[3][0]).log_softmax(-1).double() for m in (model, other))
    measured = float((p.exp() * (p - q)).sum(-1).mean())
    for old, new in zip(curves, scaled, strict=True):
        assert new.order == old.order
        assert sum(new.costs) == pytest.approx(sum(old.costs) * measured / said, rel=1e-3)
