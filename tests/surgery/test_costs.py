"""Multiply-accumulates against counts by hand, for every kernel that torch may choose on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import ockham
from ockham.choose.prices import Budget, Subject, macs_after, within
from ockham.choose.units import StructureEvidence
from ockham.errors import OckhamError
from ockham.surgery import costs
from ockham.surgery.costs import cost
from ockham.surgery.groups import Groups, Plan, plan_masks

N, T, D = 3, 5, 8
X = torch.randn(N, T, D, generator=torch.Generator().manual_seed(0))


class Calls(nn.Module):
    """A function of its input, and of the modules it holds."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)
        self.vector, self.matrix = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(7, D))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self)


def encoder(count: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True)
    return layer if count == 1 else nn.TransformerEncoder(layer, count)


def heads_attend(x: Tensor, _: Calls) -> Tensor:
    """Four heads of queries, two of keys and values."""
    q, k = x.unflatten(2, (4, -1)).transpose(1, 2), x[..., :4].unflatten(2, (2, -1)).transpose(1, 2)
    return scaled_dot_product_attention(q, k, k, enable_gqa=True)


ATTENDS = 2 * N * T * T * D  # queries with keys, and weights with values
PROJECTS = 4 * N * T * D * D
COUNTED = {
    "linear": (Calls(lambda x, m: m.parts[0](x), nn.Linear(D, 6)), N * T * D * 6),
    "attention": (Calls(lambda x, m: scaled_dot_product_attention(x, x, x)), ATTENDS),
    "causal attention": (Calls(lambda x, m: scaled_dot_product_attention(x, x, x, is_causal=True)), ATTENDS),
    "attention, few keys": (Calls(heads_attend), ATTENDS),
    "multihead": (
        Calls(lambda x, m: m.parts[0](x, x, x, need_weights=False)[0], nn.MultiheadAttention(D, 2, batch_first=True)),
        PROJECTS + ATTENDS,
    ),
    "multihead, weights": (
        Calls(lambda x, m: m.parts[0](x, x, x)[0], nn.MultiheadAttention(D, 2, batch_first=True)),
        PROJECTS + ATTENDS,
    ),
    "encoder layer": (encoder(1), PROJECTS + ATTENDS + 2 * N * T * D * 16),
    "encoder": (encoder(3), 3 * (PROJECTS + ATTENDS + 2 * N * T * D * 16)),
    "lstm": (Calls(lambda x, m: m.parts[0](x)[0], nn.LSTM(D, 6, batch_first=True)), N * T * 4 * 6 * (D + 6)),
    "lstm, two ways, two layers": (
        Calls(lambda x, m: m.parts[0](x)[0], nn.LSTM(D, 6, 2, batch_first=True, bidirectional=True)),
        2 * N * T * 4 * 6 * (D + 6 + 12 + 6),
    ),
    "gru": (Calls(lambda x, m: m.parts[0](x)[0], nn.GRU(D, 6, batch_first=True)), N * T * 3 * 6 * (D + 6)),
    "bilinear": (Calls(lambda x, m: m.parts[0](x, x), nn.Bilinear(D, D, 4)), N * T * 4 * D * D),
    "rows by a vector": (Calls(lambda x, m: x @ m.vector), N * T * D),
    "matrix by a vector": (Calls(lambda x, m: m.matrix @ m.vector), 7 * D),
    "inner product": (Calls(lambda x, m: m.vector @ m.vector), D),
    "convolution": (Calls(lambda x, m: m.parts[0](x), nn.Conv1d(T, 6, 3, padding=1)), N * D * T * 6 * 3),
}


@pytest.mark.parametrize("name", COUNTED)
def test_counts_are_those_by_hand_whatever_kernel_runs(name: str) -> None:
    model, expected = COUNTED[name]
    fast = torch.backends.mha.get_fastpath_enabled()
    assert cost(model, X).macs == expected
    assert torch.backends.mha.get_fastpath_enabled() == fast
    groups = Groups({}, {}, {n: tuple(t.shape) for n, t in model.state_dict().items()}, {})
    assert macs_after(model.eval(), plan_masks(groups, {}), X) == expected


SHAPES = {
    "_cudnn_rnn": (((T, N, D), [(24, D), (24, 6), (24,), (24,)], 4), 2 * T * N * 24 * (D + 6)),
    "_grouped_mm": (((40, D), (4, D, 6), (4,)), 2 * 40 * D * 6),
    "_grouped_mm, of columns": (((4, 5, D), (D, 60), (4,)), 2 * 5 * D * 60),
    "_grouped_mm, of what is summed": (((5, 40), (40, 6), (4,)), 2 * 5 * 40 * 6),
    "_grouped_mm, all": (((4, 5, D), (4, D, 6)), 2 * 4 * 5 * D * 6),
    "addmv": (((7,), (7, D), (D,)), 2 * 7 * D),
    "vdot": (((D,), (D,)), 2 * D),
    "_scaled_dot_product_flash_attention": (((N, 4, T, 2), (N, 2, 9, 2), (N, 2, 9, 3)), 2 * N * 4 * T * 9 * 5),
}


@pytest.mark.parametrize("name", SHAPES)
def test_kernels_that_this_machine_may_not_have_are_counted_by_their_shapes(name: str) -> None:
    shapes, expected = SHAPES[name]
    assert costs._UNKNOWN[name.partition(",")[0]](*shapes) == expected


def experts(device: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    with torch.device(device):
        config = transformers.MixtralConfig(vocab_size=100, **sizes, **more)
        return transformers.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_experts_that_are_chosen_count_with_and_without_values(device: str) -> None:
    net, ids = experts(device), torch.ones(2, 7, dtype=torch.long, device=device)
    attends = 4 * 32 * 32 - 2 * 32 * 16 + 2 * 7 * 32
    whole = 14 * (attends + 32 * 4 + 2 * 3 * 32 * 64 + 32 * 100)
    groups = ockham.trace(net, {"input_ids": ids})
    assert cost(net, {"input_ids": ids}).macs == macs_after(net, plan_masks(groups, {}), {"input_ids": ids}) == whole
    key = next(g.id for g in groups if "down_proj" in g.id or "gate_up" in g.id)
    plan = plan_masks(groups, {key: torch.arange(64) < 32})
    assert macs_after(net, plan, {"input_ids": ids}) == whole - 14 * 2 * 3 * 32 * 32


class Asks(nn.Module):
    """Its forward asks for a value that is no decision about sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.asks = nn.Linear(D, 12), nn.Linear(12, 2), False

    def forward(self, x: Tensor) -> Any:
        h = self.a(x).relu()
        assert not self.asks or float(h.max()) >= 0
        return self.b(h)


def test_a_forward_that_asks_for_values_is_counted_as_it_runs() -> None:
    net = Asks()
    groups = ockham.trace(net, X)
    net.asks = True
    plan = plan_masks(groups, {"a.weight:0": torch.arange(12) < 5})
    assert macs_after(net, plan, X) == N * T * 5 * (D + 2)
    hollow = net.to("meta")
    with pytest.raises(OckhamError, match=r"Asks cannot be counted without values: .+ Way out: "):
        macs_after(hollow, plan, X.to("meta"))


class Attends(nn.Module):
    """Self-attention of four heads of eight."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out: Tensor = self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def test_a_budget_counts_what_attention_costs() -> None:
    """With 200 tokens it is most of the network."""
    torch.manual_seed(0)
    net, x = Attends().eval(), torch.randn(2, 200, 32)
    groups = ockham.trace(net, x)
    assert cost(net, x).macs == 2 * 200 * (4 * 32 * 32 + 2 * 200 * 32)
    source = ockham.laplace(net, [(x, torch.zeros(2, 200, 32))], likelihood="regression", structure="diagonal")
    plan = ockham.plan(groups, source, budget={"macs": "55%"}, model=net, example_inputs=x)
    small = ockham.shrink(net, plan)
    width = small.v.out_features
    rest = 2 * 200 * (2 * 32 * small.q.out_features + 2 * 32 * width + 200 * (small.q.out_features + width))
    assert cost(small, x).macs == rest <= 0.55 * cost(net, x).macs


class Steps(Budget):
    """What is left, by a table of the units of two groups; counts how often somebody asks."""

    unit = "steps"
    asked = 0

    def measure(self, subject: Subject, plan: Plan) -> float:
        type(self).asked += 1
        left = {key: width - len(plan.removed.get(key, ())) for key, width in plan.widths.items()}
        return float(left["0.weight:0"] * (left["2.weight:0"] + 3) + left["2.weight:0"] ** 2)

    def unit_costs(self, subject: Subject, groups: Groups) -> dict[str, float]:
        return {"0.weight:0": 7.0, "2.weight:0": 11.0}


class Cliff(Steps):
    """Hardly anything is left as soon as one unit goes, and that says nothing of the next."""

    def measure(self, subject: Subject, plan: Plan) -> float:
        type(self).asked += 1
        gone = sum(map(len, plan.removed.values()))
        return 1e9 if gone < 3 else 1.0 + 1e-9 * (158 - gone)


def test_no_search_takes_much_longer_than_halving() -> None:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 90), nn.ReLU(), nn.Linear(90, 70), nn.ReLU(), nn.Linear(70, 2))
    groups, budget = ockham.trace(net, torch.randn(2, 4)), Cliff(0.0, False)
    nats = {g.id: torch.rand(g.size, generator=generator).double() for g in groups}
    held = {key: torch.ones(len(e), dtype=torch.long) for key, e in nats.items()}
    prices = {key: torch.zeros(len(e)).double() for key, e in nats.items()}
    costs = {key: 1.0 for key in nats}
    for most in (1.0 + 1e-9 * 100, 1.0 + 1e-9 * 3, 5.0):
        Cliff.asked = 0
        options = {"limit": budget, "subject": Subject(net, None), "costs": costs, "round_to": 1, "most": most}
        found = within(groups, StructureEvidence(nats, held, held, {}, 1), prices, **options)  # type: ignore[arg-type]
        gone = sum(int((~k).sum()) for k in found.keep.values())
        assert Cliff.asked <= 11 and gone == {1.0 + 1e-7: 58, 1.0 + 3e-9: 155, 5.0: 3}[most]


@pytest.mark.parametrize("seed", range(12))
def test_the_search_finds_the_smallest_price_that_fits_with_few_measurements(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 90), nn.ReLU(), nn.Linear(90, 70), nn.ReLU(), nn.Linear(70, 2))
    groups, budget = ockham.trace(net, torch.randn(2, 4)), Steps(0.0, False)
    nats = {g.id: torch.randn(g.size, generator=generator).double().exp() ** (1 + seed % 3) for g in groups}
    held = {key: torch.ones(len(e), dtype=torch.long) for key, e in nats.items()}
    evidence = StructureEvidence(nats, held, held, {}, 1)
    prices = {key: torch.zeros(len(e)).double() for key, e in nats.items()}
    costs = budget.unit_costs(Subject(net, None), groups)
    worths = sorted(float(v) for key, e in nats.items() for v in e / costs[key])
    most = (0.1, 0.5, 0.9)[seed % 3] * budget.measure(Subject(net, None), plan_masks(groups, {}))

    def left(rate: float) -> float:
        keep = {key: e / costs[key] > rate for key, e in nats.items()}
        keep = {key: k if k.any() else torch.arange(len(k)) == int(nats[key].argmax()) for key, k in keep.items()}
        return budget.measure(Subject(net, None), plan_masks(groups, keep))

    expected = next(value for value in map(left, worths) if value <= most)
    Steps.asked = 0
    options = {"limit": budget, "subject": Subject(net, None), "costs": costs, "round_to": 1, "most": most}
    found = within(groups, evidence, prices, **options)  # type: ignore[arg-type]
    assert Steps.asked <= 11  # halving 160 prices takes 8; one more, and the two ends
    assert budget.measure(Subject(net, None), plan_masks(groups, found.keep)) == expected
