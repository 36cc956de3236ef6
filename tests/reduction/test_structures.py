"""The evidence of a structure against enumerated masks and exact marginal likelihoods, and what it is worth."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import scipy.optimize
import torch
from scipy.special import digamma
from torch import Tensor

import ockham
from ockham.choose.prices import FlatPrice, LearnedRate, PerMac, PerMillisecond, PerParameter, UnitCosts
from ockham.choose.units import (
    Account,
    StructureEvidence,
    all_masks,
    choose_units,
    held_weights,
    incoming,
    outgoing,
    structures_from,
    unit_evidence,
    units_of,
)
from ockham.errors import OckhamError

NOTHING = UnitCosts({}, {}, {})


@dataclass
class Pair:
    """Hidden units between ``a`` (units, 2) with bias and ``b`` (3, units)."""

    size: int = 4
    id: str = "a.weight:0"

    def incoming_cuts(self) -> list[tuple[str, Tensor]]:
        return [
            ("a.weight", torch.arange(2 * self.size).view(self.size, 2)),
            ("a.bias", torch.arange(self.size)[:, None]),
        ]

    def outgoing_cuts(self) -> list[tuple[str, Tensor]]:
        return [("b.weight", torch.arange(3 * self.size).view(3, self.size).T.contiguous())]


def posterior(size: int = 4, seed: int = 0) -> ockham.Posterior:
    g = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (size, 2), "a.bias": (size,), "b.weight": (3, size)}
    moments = {}
    for name, shape in shapes.items():
        mean, precision = torch.randn(shape, generator=g), 20 * torch.rand(shape, generator=g) + 2
        keep = torch.ones(shape, dtype=torch.bool)
        moments[name] = ockham.Gaussian(mean, precision, torch.tensor(1.0), torch.tensor(0.0), keep)
    return ockham.Posterior(moments, 100.0)


def without(source: ockham.Posterior, keep: dict[str, Tensor]) -> ockham.Posterior:
    moments = {}
    for name, g in source.items():
        k = keep.get(name, g.keep)
        mean, precision = g.mean.masked_fill(~k, 0.0), g.precision.masked_fill(~k, math.inf)
        moments[name] = ockham.Gaussian(mean, precision, g.prior_precision, g.prior_mean, k)
    return ockham.Posterior(moments, source.n_data)


def test_the_evidence_of_a_unit_is_the_average_over_all_masks_inside() -> None:
    delta, odds = torch.tensor([-6.0, 1.3, 0.2, -0.7], dtype=torch.float64), -1.1
    p0 = 1 / (1 + math.exp(-odds))
    total = 0.0
    for mask in itertools.product([0, 1], repeat=4):
        prior = math.prod(p0 if m else 1 - p0 for m in mask)
        total += prior * math.exp(sum(-float(d) for d, m in zip(delta, mask, strict=True) if m))
    assert float(unit_evidence(delta, odds).sum()) == pytest.approx(math.log(total), rel=1e-12)
    assert torch.allclose(unit_evidence(delta, 40.0), -delta)
    assert torch.isfinite(unit_evidence(torch.tensor([-1e4, 1e4]))).all()


def test_it_is_exact_for_a_linear_model_with_orthogonal_inputs() -> None:
    # y = X w + noise, X'X = d I: the marginal likelihood of each of the 2^4 models in closed form, dense algebra
    g = torch.Generator().manual_seed(1)
    d, noise, v = 30.0, 0.5, 2.0
    q, _ = torch.linalg.qr(torch.randn(40, 4, generator=g, dtype=torch.float64))
    x = q * math.sqrt(d)
    y = x @ torch.tensor([0.3, 0.0, -0.1, 0.5], dtype=torch.float64) + math.sqrt(noise) * torch.randn(40, generator=g)
    precision, mean = d / noise + 1 / v, (x.T @ y) / noise / (d / noise + 1 / v)

    def log_marginal(columns: list[int]) -> float:
        cov = noise * torch.eye(40, dtype=torch.float64) + v * x[:, columns] @ x[:, columns].T
        return float(torch.distributions.MultivariateNormal(torch.zeros(40, dtype=torch.float64), cov).log_prob(y))

    p0 = 0.3
    every = [[i for i in range(4) if mask >> i & 1] for mask in range(16)]
    on = math.log(
        sum(p0 ** len(c) * (1 - p0) ** (4 - len(c)) * math.exp(log_marginal(c) - log_marginal([])) for c in every)
    )
    gaussian = ockham.Gaussian(
        mean, torch.full((4,), precision).double(), torch.tensor(1 / v).double(), torch.tensor(0.0), torch.ones(4) > 0
    )
    delta = ockham.score(ockham.Posterior({"w": gaussian}, 40.0))["w"]
    assert float(unit_evidence(delta, math.log(p0 / (1 - p0))).sum()) == pytest.approx(on, rel=1e-9)


def test_each_cut_sums_its_own_weights() -> None:
    evidence = ockham.score(posterior())
    delta = {n: evidence[n].view(evidence.posterior[n].mean.shape) for n in evidence}
    out = evidence.by_group([Pair()])
    assert torch.allclose(out["a.weight:0"], unit_evidence(delta["b.weight"]).sum(0))
    made = evidence.by_group([Pair()], cut=incoming)
    expected = unit_evidence(delta["a.weight"]).sum(1) + unit_evidence(delta["a.bias"])
    assert torch.allclose(made["a.weight:0"], expected)
    assert torch.allclose(out.per_example("a.weight:0"), out["a.weight:0"] / 100)
    assert out.held["a.weight:0"].tolist() == [3] * 4 and out.made["a.weight:0"].tolist() == [2] * 4


def test_one_sufficient_cut_and_not_both_for_a_chain() -> None:
    # y = v u x + noise: u = 0 and v = 0 are the same event, so the sum over both sides counts it twice
    g = torch.Generator().manual_seed(0)
    noise = 0.09
    x = torch.randn(30, 1, generator=g, dtype=torch.float64)
    y = 0.5 * x + math.sqrt(noise) * torch.randn(30, 1, generator=g, dtype=torch.float64)
    s_xx, s_xy = float((x**2).sum()) / noise, float((x * y).sum()) / noise
    means, precisions = [0.7, 0.7], [1.0, 1.0]
    for _ in range(500):  # mean field by coordinate ascent, exact: E[(uv)^2] = E[u^2] E[v^2]
        for i, j in ((0, 1), (1, 0)):
            precisions[i] = 1 + (means[j] ** 2 + 1 / precisions[j]) * s_xx
            means[i] = means[j] * s_xy / precisions[i]
    moments = {
        name: ockham.Gaussian(
            *(torch.tensor([[n]]) for n in (m, p)), torch.tensor(1.0), torch.tensor(0.0), torch.ones(1, 1) > 0
        )
        for name, m, p in zip("uv", means, precisions, strict=True)
    }
    each = [-float(d) for d in ockham.score(ockham.Posterior(moments, 30.0)).values()]
    grid = torch.linspace(-6, 6, 1201, dtype=torch.float64)  # the truth by quadrature over both weights
    u, v = torch.meshgrid(grid, grid, indexing="ij")
    log_ratio = u * v * s_xy - 0.5 * (u * v).square() * s_xx  # against the model with u v = 0
    log_prior = -0.5 * (u**2 + v**2) - math.log(2 * math.pi)
    truth = float((log_ratio + log_prior).flatten().logsumexp(0) + 2 * math.log(12 / 1200))
    assert all(e == pytest.approx(truth, rel=0.06) for e in each), (each, truth)
    assert sum(each) > 1.85 * truth


def half(source: ockham.Posterior, share: float = 0.5) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    return {n: torch.rand(x.mean.shape, generator=g) > share for n, x in source.items()}


def test_all_masks_reads_removed_weights_from_the_ledger_and_held_weights_leaves_them_out() -> None:
    full = ockham.score(posterior())
    keep, ledger = half(full.posterior), Account()
    ledger.enter(full, keep)
    after = ockham.score(without(full.posterior, keep))
    whole = full.by_group([Pair()], inside=all_masks())["a.weight:0"]
    assert torch.allclose(after.by_group([Pair()], inside=all_masks(), ledger=ledger)["a.weight:0"], whole, rtol=1e-5)
    held = unit_evidence(full["b.weight"].view(3, 4), 0.4).masked_fill(~keep["b.weight"], 0).sum(0)
    found = after.by_group([Pair()], inside=held_weights(0.4), ledger=ledger)
    assert torch.allclose(found["a.weight:0"], held)
    assert found.held["a.weight:0"].tolist() == keep["b.weight"].sum(0).tolist()


def test_the_ledger_is_cut_with_the_network() -> None:
    full = ockham.score(posterior())
    keep = {"b.weight": torch.zeros(3, 4, dtype=torch.bool)}
    ledger = Account()
    ledger.enter(full, keep)
    small = ledger.cut(lambda name, values: values[:, 1:])
    assert torch.equal(small.delta_f["b.weight"], full["b.weight"].view(3, 4)[:, 1:].float())


def test_the_rate_of_all_masks_is_its_own_fixed_point() -> None:
    full = ockham.score(posterior(size=40))
    keep, ledger = half(full.posterior, 0.7), Account()
    ledger.enter(full, keep)
    delta = full["b.weight"].double()

    def gap(odds: float) -> float:
        on = float(torch.sigmoid(odds - delta).sum())
        return math.log((on + 2) / (len(delta) - on + 2)) - odds

    odds = scipy.optimize.brentq(gap, -8, 8)
    after = ockham.score(without(full.posterior, keep))
    found = after.by_group([Pair(size=40)], inside=all_masks(strength=2.0), ledger=ledger)["a.weight:0"]
    assert torch.allclose(found, unit_evidence(full["b.weight"], odds).view(3, 40).sum(0), atol=1e-3)
    # removed weights of which nothing is known count as off: they lower the rate, and add nothing themselves
    unknown = after.by_group([Pair(size=40)], inside=all_masks(strength=2.0))["a.weight:0"]
    living = unit_evidence(full["b.weight"], odds).view(3, 40).masked_fill(~keep["b.weight"], 0).sum(0)
    assert bool((unknown[living > 0] < living[living > 0]).all()) and int((living > 0).sum()) > 5


def test_a_weight_read_along_two_dimensions_counts_once() -> None:
    class Square:
        id, size = "w:0", 3

        def outgoing_cuts(self) -> list[tuple[str, Tensor]]:
            flat = torch.arange(9).view(3, 3)
            return [("w", flat.clone()), ("w", flat.T.contiguous())]

        def incoming_cuts(self) -> list[tuple[str, Tensor]]:
            return []

    g = ockham.Gaussian(
        torch.ones(3, 3), torch.full((3, 3), 9.0), torch.tensor(1.0), torch.tensor(0.0), torch.ones(3, 3) > 0
    )
    evidence = ockham.score(ockham.Posterior({"w": g}, 10.0))
    assert evidence.by_group([Square()]).held["w:0"].tolist() == [5, 5, 5]
    each = float(unit_evidence(evidence["w"][:1]))
    assert torch.allclose(evidence.by_group([Square()])["w:0"], torch.full((3,), 5 * each, dtype=torch.float64))


def test_units_that_read_frozen_parameters_stay() -> None:
    full = posterior()
    frozen = ockham.Posterior({n: g for n, g in full.items() if n != "b.weight"}, 100.0)
    found = ockham.score(frozen).by_group([Pair()])
    assert bool(found["a.weight:0"].isinf().all()) and (found.held["a.weight:0"] > 0).all()
    assert choose_units(found, FlatPrice(1e6).nats(found, NOTHING)).keep["a.weight:0"].all()


def test_groups_of_another_network_are_refused() -> None:
    with pytest.raises(OckhamError, match="trace the network"):
        ockham.score(posterior(size=3)).by_group([Pair()])


def test_structures_come_from_a_posterior_its_score_or_themselves() -> None:
    source = posterior()
    found = ockham.score(source).by_group([Pair()])
    for given in (source, ockham.score(source), found):
        assert torch.equal(structures_from(given, [Pair()])["a.weight:0"], found["a.weight:0"])
    with pytest.raises(OckhamError, match="got int"):
        structures_from(3, [Pair()])


# ------------------------------------------------------------------ prices
def evidence_of(nats: list[float], held: list[int] | None = None, gone: int = 0) -> StructureEvidence:
    values = torch.tensor(nats, dtype=torch.float64)
    ones = torch.ones(len(nats), dtype=torch.long)
    return StructureEvidence(
        {"g": values}, {"g": ones if held is None else torch.tensor(held)}, {"g": ones}, {"g": gone}, 10.0
    )


@pytest.mark.parametrize("gone", [0, 50])
def test_the_learned_rate_is_its_own_fixed_point(gone: int) -> None:
    found = evidence_of([-1.0, -0.5, 0.2, 1.0, -2.0, 3.0, -0.1], gone=gone)
    price = float(LearnedRate().nats(found, NOTHING)["g"][0])

    def gap(odds: float) -> float:
        q = float(torch.sigmoid(odds + found["g"]).sum())
        return digamma(1 + q) - digamma(1 + 7 - q + gone) - odds

    assert price == pytest.approx(max(0.0, -scipy.optimize.brentq(gap, -20, 20)), abs=1e-6)
    assert price > 3 if gone else price < 1.5


def test_a_learned_rate_is_worth_about_the_log_of_the_number_of_units() -> None:
    weak = evidence_of([5.0] * 3 + [-1.0] * 997)
    assert 3 < float(LearnedRate().nats(weak, NOTHING)["g"][0]) < math.log(1000) + 1


def test_where_all_units_are_wanted_the_learned_price_is_nothing_and_not_less() -> None:
    assert LearnedRate().nats(evidence_of([50.0] * 20), NOTHING)["g"].tolist() == [0.0] * 20


def test_stated_prices() -> None:
    found, costs = evidence_of([1.0, 2.0]), UnitCosts({"g": 30.0}, {"g": 200.0}, {"g": 0.5})
    assert FlatPrice(3).nats(found, costs)["g"].tolist() == [3, 3]
    assert PerParameter(0.1).nats(found, costs)["g"].tolist() == [3, 3]
    assert PerMac(0.1).nats(found, costs)["g"].tolist() == [20, 20]
    assert PerMillisecond(4).nats(found, costs)["g"].tolist() == [2, 2]
    with pytest.raises(OckhamError, match="example_inputs"):
        PerMac(0.1).nats(found, NOTHING)
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(OckhamError):
            FlatPrice(wrong)


# ------------------------------------------------------------------ choice
def test_units_below_their_price_go_and_those_nobody_reads_go_for_free() -> None:
    found = evidence_of([5.0, 2.0, 3.0, 0.0], held=[1, 1, 1, 0])
    assert choose_units(found, FlatPrice(3).nats(found, NOTHING)).keep["g"].tolist() == [True, False, True, False]
    assert choose_units(found, FlatPrice(0).nats(found, NOTHING)).keep["g"].tolist() == [True, True, True, False]


def test_a_layer_is_never_emptied_and_it_says_so() -> None:
    found = evidence_of([1.0, 2.0, 0.5])
    choice = choose_units(found, FlatPrice(100).nats(found, NOTHING))
    assert choice.keep["g"].tolist() == [False, True, False] and choice.forced == ("g",)
    idle = evidence_of([0.0, 0.0], held=[0, 0])
    assert int(choose_units(idle, FlatPrice(0).nats(idle, NOTHING)).keep["g"].sum()) == 1


@pytest.mark.parametrize("round_to", [1, 3, 4, 8])
def test_rounded_widths_are_worth_most(round_to: int) -> None:
    g = torch.Generator().manual_seed(round_to)
    for _ in range(40):
        nats = (6 * torch.randn(10, generator=g, dtype=torch.float64)).tolist()
        found = evidence_of(nats)
        keep = choose_units(found, FlatPrice(2.0).nats(found, NOTHING), round_to=round_to).keep["g"]
        count = int(keep.sum())
        assert count == 10 or count % round_to == 0
        worth = sorted((n - 2 for n in nats), reverse=True)
        best = max(sum(worth[:w]) for w in range(1, 11) if w == 10 or w % round_to == 0)
        assert sum(n - 2 for n, k in zip(nats, keep.tolist(), strict=True) if k) == pytest.approx(best)


def test_units_of_numbers_rows_and_their_bias_alike() -> None:
    shapes = {"a.weight": (4, 2), "a.bias": (4,), "b.weight": (3, 4)}
    found = units_of([Pair()], shapes)
    assert sorted(found) == ["a.bias", "a.weight"]
    assert found["a.weight"][0] == 0 and found["a.weight"][1].tolist() == found["a.bias"][1].tolist() == [0, 1, 2, 3]


def test_outgoing_is_the_default_cut() -> None:
    assert ockham.Structures().cut is outgoing


def test_a_cap_leaves_time_to_refit_but_not_for_idle_units() -> None:
    found = evidence_of([5.0, 1.0, 0.5, 0.2, 0.1, 0.3, 0.4, 0.6, 0.0, 0.0], held=[1] * 8 + [0] * 2)
    keep = choose_units(found, FlatPrice(3).nats(found, NOTHING), cap=0.25).keep["g"]
    assert keep.tolist() == [True, True, True, False, False, True, True, True, False, False]
    few = evidence_of([5.0, 1.0])
    assert choose_units(few, FlatPrice(3).nats(few, NOTHING), cap=0.1).keep["g"].tolist() == [True, False]
    with pytest.raises(OckhamError):
        choose_units(few, FlatPrice(3).nats(few, NOTHING), cap=0.0)
