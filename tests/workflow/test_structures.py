"""Structures inside the main job: physically smaller while it trains, the same bits when resumed, constants folded."""

from __future__ import annotations

import json
import math
import warnings
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ockham
from ockham.core.files import read_tree, write_tree
from ockham.core.likelihood import Classification
from ockham.core.objective import Objective
from ockham.core.processes import Processes
from ockham.errors import DataError, OckhamError, OckhamWarning, TraceError
from ockham.methods.spike_slab.optimizer import spike_slab
from ockham.methods.spike_slab.priors import FixedSpikeSlab
from ockham.run.structures import Origin, Shrinking, example_of, fold_constants
from ockham.surgery.copies import as_arguments
from ockham.surgery.costs import cost

TRAINING = ockham.Training(epochs=40, learning_rate=2e-2, prior=ockham.FixedPrior(1.0), kl_warmup=0.1)
ROUNDS = ockham.Rounds(start=0.3, end=0.9, count=5)
STRUCTURES = ockham.Structures(price=ockham.FlatPrice(5.0), cap=0.5)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore", OckhamWarning)


def images(n: int = 256) -> DataLoader:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (n,), generator=g)
    x = 0.3 * torch.randn(n, 1, 8, 8, generator=g)
    for i, label in enumerate(y.tolist()):
        x[i, 0, 2 * label : 2 * label + 3, 1:7] += 1.0
    return DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)


class Both(nn.Module):
    """Two inputs by position, by name, or both."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, left: Tensor, right: Tensor | None = None) -> Tensor:
        return self.out(torch.relu(self.fc(left if right is None else left - 2 * right)))


Pair = namedtuple("Pair", ["left", "right"])
A, B, LABEL = torch.randn(9, 3), torch.randn(9, 3), torch.arange(9) % 2


@pytest.mark.parametrize(
    ("raw", "batch"),
    [
        (((A, B), LABEL), None),
        ((Pair(A, B), LABEL), None),
        ({"left": A, "right": B, "labels": LABEL}, None),
        ({"a": A, "b": B}, lambda raw: ockham.Batch((raw["a"],), {"right": raw["b"]}, LABEL)),
    ],
)
def test_every_batch_that_trains_can_be_traced(raw: object, batch: object) -> None:
    net = Both()
    example = example_of([raw], Objective(Classification(), batch), net)
    args, kwargs = as_arguments(net, example)
    torch.testing.assert_close(net(*args, **kwargs), net(A[:2], B[:2]))
    small = ockham.compress(net, [raw], structure="auto", training=ockham.Training(epochs=1), batch=batch)
    assert small.plan is not None
    torch.testing.assert_close(cost(net, Pair(A, B)).macs, cost(net, (A, B)).macs)


def test_a_lone_keyword_and_inputs_without_a_name_can_be_traced_or_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    assert len(ockham.trace(net, {"features": A})) == 1

    class Rest(Both):
        def forward(self, *left: Tensor, right: Tensor) -> Tensor:
            return super().forward(left[0], right)

    objective = Objective(Classification(), lambda raw: ockham.Batch((A,), {"right": B}, LABEL))
    with pytest.raises(DataError, match=r"all by position or all by name.*Name them all in batch="):
        example_of([0], objective, Rest())
    packed = nn.utils.rnn.pack_sequence([A, B], enforce_sorted=False)
    with pytest.raises(TraceError, match="PackedSequence, whose lengths decide"):
        ockham.trace(nn.LSTM(3, 4), packed)


class Net(nn.Module):
    """Convolutions with a residual stream, a batch norm, and a view whose size is written in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.back = nn.Conv2d(12, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 4, 20)
        self.out = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        h = h + self.back(torch.relu(self.norm(self.inner(h))))
        h = nn.functional.adaptive_avg_pool2d(h, 2).view(-1, 32)
        return self.out(torch.relu(self.fc(h)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def run(**options) -> ockham.Compressed:
    settings = {"training": TRAINING, "rounds": ROUNDS, "structure": STRUCTURES, **options}
    return ockham.compress(net(), images(), **settings)


@pytest.fixture(scope="module")
def result() -> ockham.Compressed:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OckhamWarning)
        return run()


def test_the_network_is_physically_smaller_and_still_right(result: ockham.Compressed) -> None:
    x, y = images().dataset.tensors
    before, after = cost(net(), x[:1]), cost(result.model, x[:1])
    assert after.macs < 0.8 * before.macs and after.parameters < 0.8 * before.parameters
    assert (result.predict(x).probabilities.argmax(1) == y).float().mean() > 0.95
    assert {n: tuple(g.mean.shape) for n, g in result.posterior.items()} == {
        n: tuple(p.shape) for n, p in result.model.named_parameters()
    }
    kept = sum(int(k.sum()) for k in result.keep.values())
    assert result.keep_share == pytest.approx(kept / sum(p.numel() for p in net().parameters()))


def test_its_plan_replays_on_a_fresh_network(result: ockham.Compressed) -> None:
    assert result.plan is not None and result.plan.removed
    plan = ockham.Plan.from_json(result.plan.to_json())
    small = ockham.shrink(net(), plan)
    shapes = {n: t.shape for n, t in small.state_dict().items()}
    assert shapes == {n: t.shape for n, t in result.model.state_dict().items()}
    small.load_state_dict(result.model.state_dict())
    x = images().dataset.tensors[0]
    assert torch.equal(small.eval()(x), result.model(x))
    assert result.plan.widths == {g.id: g.size for g in ockham.trace(net(), x[:2])}
    assert all(math.isfinite(n) for nats in result.plan.nats.values() for n in nats)
    assert "nats" in str(result.plan)


def test_what_every_round_took_is_told(result: ockham.Compressed) -> None:
    assert result.structures and result.plan is not None
    gone = sum(info.removed for info in result.structures)
    folded = sum(len(u) for u in result.plan.removed.values()) - gone
    assert folded >= 0
    macs = [info.macs for info in result.structures]
    assert macs == sorted(macs, reverse=True) and len(set(macs)) == len(macs)
    assert result.structures[0].epoch > ROUNDS.epochs(TRAINING.epochs)[0]  # single weights went one round before


def test_it_loads_from_the_folder_by_the_ordinary_constructor(result: ockham.Compressed, tmp_path: Path) -> None:
    result.save(tmp_path)
    x = images().dataset.tensors[0]
    for given in (net(), ockham.shrink(net(), result.plan)):
        assert torch.equal(ockham.load(tmp_path, model=given)(x), result.model(x))
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ockham.ResultError, match="plan"):
        ockham.load(tmp_path, model=net())


PRIORS = {"fixed": ockham.FixedPrior(1.0), "group": ockham.GroupScale(1.0), "spike-slab": FixedSpikeSlab(0.1, 1.0)}


@pytest.mark.parametrize("kind", ["fixed", *(pytest.param(k, marks=pytest.mark.slow) for k in PRIORS if k != "fixed")])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path, kind: str) -> None:
    training = ockham.Training(epochs=12, learning_rate=2e-2, prior=PRIORS[kind])
    settings = {"training": training, "rounds": ROUNDS, "estimator": spike_slab if kind == "spike-slab" else None}
    structures = ockham.Structures(price=ockham.FlatPrice(60.0), cap=0.3)
    whole = ockham.Compression(net(), images(), structures=structures, **settings)
    for progress in whole:
        write_tree(tmp_path / f"state{progress.epoch}", whole.state(), kind="checkpoint")
    one = whole.result()
    assert one.structures
    middle = one.structures[0].epoch
    for stop in (middle - 1, middle, middle + 2):
        again = ockham.Compression(net(), images(), structures=structures, **settings)
        again.load(read_tree(tmp_path / f"state{stop}", kind="checkpoint"))
        assert [p.epoch for p in again] == list(range(stop + 1, 13))
        two = again.result()
        states = zip(one.model.state_dict().items(), two.model.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in states)
        assert all(torch.equal(g.precision, two.posterior[n].precision) for n, g in one.posterior.items())
        assert one.structures == two.structures and one.plan.to_json() == two.plan.to_json()
        assert one.rounds == two.rounds


@pytest.mark.slow
def test_masked_only_and_shrunk_training_go_the_same_way() -> None:
    # with a price of 0 only units go that nobody reads: training them on or not changes nothing that matters
    def train(structures: ockham.Structures | None) -> list[float]:
        job = ockham.Compression(net(), images(), training=TRAINING, rounds=ROUNDS, structures=structures)
        losses = [p.loss for p in job]
        assert structures is None or any(i.removed == i.free for i in job.result().structures)
        return losses

    free = ockham.Structures(price=ockham.FlatPrice(0.0), cap=0.01)
    masked, shrunk = train(None), train(free)
    assert masked[:12] == shrunk[:12]
    assert masked[-1] == pytest.approx(shrunk[-1], abs=0.1)


def test_ignored_layers_keep_their_width() -> None:
    found = run(ignore=["inner"])
    assert found.model.inner.out_channels == 12 and found.model.inner.in_channels == 8


def test_friendly_widths() -> None:
    found = run(structure=ockham.Structures(price=ockham.FlatPrice(50.0), round_to=4, cap=1.0))
    sizes = [found.model.first.out_channels, found.model.inner.out_channels, found.model.fc.out_features]
    assert all(n % 4 == 0 for n in sizes) and sum(sizes) < 40


def test_a_budget_of_weights_beside_structures_means_the_first_network() -> None:
    total = sum(p.numel() for p in net().parameters())
    found = run(keep_share=0.2)
    assert found.keep_share <= 0.2 + 1 / total


def test_the_name_auto_and_names_that_mean_nothing() -> None:
    assert run(structure="auto").plan is not None
    with pytest.raises(OckhamError, match="'auto'"):
        run(structure="heads")


def test_an_untraceable_network_says_so_before_it_trains() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.fc(x.flatten(1))
            return out if out.sum() > 0 else -out

    with pytest.raises(ockham.TraceError, match="masks only"):
        ockham.compress(Branch(), images(), training=TRAINING, structure="auto")


class Tiny(nn.Module):
    """A transformer block: what LayerNorm couples stays, the hidden units between need not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.before = nn.LayerNorm(16)
        self.attend = nn.MultiheadAttention(16, 4, batch_first=True)
        self.between = nn.LayerNorm(16)
        self.up, self.down, self.out = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.squeeze(1))
        n = self.before(h)
        h = h + self.attend(n, n, n, need_weights=False)[0]
        h = h + self.down(torch.relu(self.up(self.between(h))))
        return self.out(h.mean(1))


def test_a_transformer_block_loses_hidden_units_and_keeps_its_stream() -> None:
    torch.manual_seed(0)
    training = ockham.Training(epochs=10, learning_rate=1e-2, prior=ockham.FixedPrior(1.0))
    structures = ockham.Structures(price=ockham.FlatPrice(20.0))
    found = ockham.compress(Tiny(), images(), training=training, structure=structures)
    assert found.model.up.out_features < 32 and found.model.embed.out_features == 16
    x = images().dataset.tensors[0]
    assert found.model(x).shape == (256, 3)


# ------------------------------------------------------------------ constants
def constant_net(padding: int = 0) -> nn.Module:
    torch.manual_seed(1)
    made = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=padding), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip
    with torch.no_grad():
        made[0].weight[1] = 0  # constant after norm and ReLU
        made[1].bias.fill_(0.3)
        made[1].running_mean.fill_(-0.4)
        made[7].weight[2] = 0
        made[7].bias[2] = 0.7
    return made.double().eval()


def posterior_of(model: nn.Module) -> ockham.Posterior:
    moments = {}
    for name, p in model.named_parameters():
        keep = p.detach() != 0
        precision = torch.full_like(p, 25.0).masked_fill(~keep, math.inf)
        moments[name] = ockham.Gaussian(p.detach().clone(), precision, torch.tensor(1.0), torch.tensor(0.0), keep)
    return ockham.Posterior(moments, 100.0)


def test_constants_fold_into_the_next_bias_exactly() -> None:
    model, x = constant_net(), torch.randn(5, 1, 8, 8).double()
    posterior = posterior_of(model)
    origin = Origin(ockham.trace(model, x[:2]))
    small, left, plan = fold_constants(model, posterior, origin, example_inputs=x[:2], ignore=())
    assert torch.allclose(small(x), model(x), rtol=1e-10)
    assert small[0].out_channels == 3 and small[7].out_features == 5
    assert {k: u for k, u in plan.removed.items()} == {"0.weight:0": (1,), "7.weight:0": (2,)}
    # the posterior of the bias: b + c w with independent b and w
    bias, value = posterior["9.bias"], 0.7
    expected = 1 / bias.precision + value**2 / posterior["9.weight"].precision[:, 2]
    assert torch.allclose(1 / left["9.bias"].precision, expected)
    assert torch.allclose(left["9.bias"].mean, small[9].bias)


def test_constants_fold_into_a_bias_that_may_be_zero() -> None:
    # the network holds E[w] = pi m; what b + c w adds up to is no longer uncertain to be there
    model, x = constant_net(), torch.randn(5, 1, 8, 8).double()
    plain = posterior_of(model)
    pi = {n: torch.linspace(0.6, 1, g.mean.numel()).double().view(g.mean.shape) * g.keep for n, g in plain.items()}
    slabs = {n: replace(g, mean=torch.where(g.keep, g.mean / pi[n], 0), inclusion=pi[n]) for n, g in plain.items()}
    origin = Origin(ockham.trace(model, x[:2]))
    small, left, _ = fold_constants(model, replace(plain, moments=slabs), origin, example_inputs=x[:2], ignore=())
    assert torch.allclose(small(x), model(x), rtol=1e-10)
    assert all(torch.allclose(left[n].expected, p) for n, p in small.named_parameters())
    assert bool((left["9.bias"].inclusion == 1).all()) and left["7.bias"].inclusion is not None

    def variance(g: ockham.Gaussian) -> Tensor:
        draws = g.mean + torch.randn(200_000, *g.mean.shape, dtype=torch.float64) * g.std
        return (draws * (torch.rand(draws.shape) < g.inclusion)).var(0)

    torch.manual_seed(0)
    expected = variance(slabs["9.bias"]) + 0.7**2 * variance(slabs["9.weight"])[:, 2]
    assert torch.allclose(1 / left["9.bias"].precision, expected, rtol=0.02)


def test_a_constant_that_padding_would_cut_does_not_fold() -> None:
    model, x = constant_net(padding=1), torch.randn(5, 1, 8, 8).double()
    origin = Origin(ockham.trace(model, x[:2]))
    small, _, plan = fold_constants(model, posterior_of(model), origin, example_inputs=x[:2], ignore=())
    assert small[0].out_channels == 4 and small[7].out_features == 5 and list(plan.removed) == ["7.weight:0"]
    assert torch.allclose(small(x), model(x), rtol=1e-10)


def test_a_removed_bias_lives_again_when_it_takes_a_constant() -> None:
    model, x = constant_net(), torch.randn(5, 1, 8, 8).double()
    with torch.no_grad():
        model[9].bias.zero_()
    origin = Origin(ockham.trace(model, x[:2]))
    small, left, _ = fold_constants(model, posterior_of(model), origin, example_inputs=x[:2], ignore=())
    assert bool(left["9.bias"].keep.all()) and torch.allclose(small(x), model(x), rtol=1e-10)


def test_origin_follows_many_plans_as_one() -> None:
    model, x = net(), images().dataset.tensors[0][:2]
    first = ockham.trace(model, x)
    origin, small = Origin(first), model
    generator = torch.Generator().manual_seed(0)
    places = {g.id: torch.arange(g.size) for g in first}
    worth = {g.id: torch.zeros(g.size, dtype=torch.float64) for g in first}
    for _ in range(3):
        groups = ockham.trace(small, x)
        keep = {g.id: torch.rand(g.size, generator=generator) > 0.3 for g in groups}
        keep = {k: m | (torch.arange(len(m)) == 0) for k, m in keep.items()}
        nats = {k: torch.arange(len(m)).double() for k, m in keep.items()}
        plan = ockham.plan(groups, keep, nats=nats)
        for key, mask in keep.items():
            worth[key][places[key][~mask]] = nats[key][~mask]
            places[key] = places[key][mask]
        origin.follow(groups, plan)
        small = ockham.shrink(small, plan)
    whole = ockham.shrink(model, origin.plan())
    assert torch.equal(whole.eval()(x), small.eval()(x))
    assert origin.widths() == {key: len(left) for key, left in places.items()}
    for key, units in origin.plan().removed.items():
        assert list(origin.plan().nats[key]) == worth[key][list(units)].tolist() and sum(worth[key]) > 0


# ------------------------------------------------------------------ the command
def test_the_command_writes_plan_widths_and_costs(tmp_path: Path) -> None:
    from ockham.cli.build import Options, build_job

    settings = {"epochs": 24, "baseline": False, "structure": True, "unit_price": 10.0, "draws": 3}
    job = build_job(Options(out=str(tmp_path), **settings), "test")
    assert sum(1 for _ in job.run()) == 24
    found = json.loads((tmp_path / "structure.json").read_text())
    assert found["after"]["macs"] < found["before"]["macs"] and found["after"]["latency_64"] > 0
    plan = ockham.Plan.from_json((tmp_path / "plan.json").read_text())
    assert {g["id"]: g["after"] for g in found["groups"]} == {
        k: w - len(plan.removed.get(k, ())) for k, w in plan.widths.items()
    }
    text = (tmp_path / "report.html").read_text()
    assert 'id="structures"' in text and "fc1.weight:0" in text and "multiply-accumulates" in text
    small = ockham.load(tmp_path)
    assert small.fc1.out_features < 256
    totals = json.loads((tmp_path / "analysis.json").read_text())["layers"]
    assert {r["name"]: r["total"] for r in totals}["fc1.weight"] == 64 * 256
    # the same folder without structures: nothing of the old result stays
    job = build_job(Options(out=str(tmp_path), epochs=3, baseline=False, draws=3, overwrite=True), "test")
    assert sum(1 for _ in job.run()) == 3
    assert not (tmp_path / "structure.json").exists() and not (tmp_path / "plan.json").exists()


def test_a_price_without_structures_is_refused(tmp_path: Path) -> None:
    from ockham.cli.build import Options, build_job

    with pytest.raises(OckhamError, match="add --structure"):
        build_job(Options(out=str(tmp_path), unit_price=3.0), "test")


def test_all_processes_round_to_what_the_first_measured(monkeypatch):
    class Second(Processes):
        count = 2

        def told_bytes(self, content: bytes) -> bytes:
            assert json.loads(content) == {"0.weight:0": 4}
            return json.dumps({"0.weight:0": 8}).encode()

    monkeypatch.setattr("ockham.run.structures.multiples_that_pay", lambda *given: {"0.weight:0": 4})
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    rule = ockham.Structures(round_to="auto")
    second = Shrinking(rule, torch.randn(2, 4), processes=Second())
    assert second.start(net).round_to == {"0.weight:0": 8}
    assert Shrinking(rule, torch.randn(2, 4)).start(net).round_to == {"0.weight:0": 4}
