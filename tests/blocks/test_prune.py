"""The verb as a whole: targets, originals, folders, work that goes on where it was stopped, and the evidence's stop."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ockham.core.batch import Batch
from ockham.core.likelihood import CausalLanguage, Loss
from ockham.core.network import PruneProgress
from ockham.errors import DataError, OckhamError, OckhamWarning
from ockham.methods.blocks import job
from ockham.methods.blocks.job import PruneSettings
from ockham.methods.blocks.prune import prune
from ockham.methods.blocks.solve import Damping
from ockham.methods.blocks.stop import (
    Shot,
    best_shot,
    cost_sample,
    passes_to,
    predicted,
    shares_for,
    shot_from,
    shots,
    typical_precision,
)

from .networks import KINDS, TOKENS, batches, ids, network

FIXED = PruneSettings(damping=Damping(0.05, 0.3))


def zeros(model: nn.Module, names: Any) -> float:
    values = [model.get_parameter(n) for n in names]
    return sum(int((v == 0).sum()) for v in values) / sum(v.numel() for v in values)


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_the_blocks_stays_and_the_original_is_untouched(kind: str, tmp_path: Path) -> None:
    model = network(kind).train()
    before = copy.deepcopy(model.state_dict())
    done = prune(model, batches(kind), keep_share=0.6, settings=FIXED)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert type(done.model) is type(model) and done.model.training
    names = {k.partition("[")[0] for k in done.evidence}
    assert zeros(done.model, names) == pytest.approx(0.4, abs=0.01)
    assert done.keep_share == pytest.approx(0.6, abs=0.01)
    assert set(done.evidence.blocks) == {m.block for m in done.evidence.matrices.values()}
    assert sum(done.evidence.blocks.values()) == pytest.approx(sum(done.evidence.values()))
    others = [n for n, p in model.named_parameters() if n not in names and p.ndim > 1]
    assert all(torch.equal(model.get_parameter(n), done.model.get_parameter(n)) for n in others)
    done.save(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out")
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in done.model.state_dict().items())


def test_two_of_four_in_every_orientation() -> None:
    for kind in ("llama", "gpt2"):
        done = prune(network(kind), batches(kind), pattern="2:4", settings=FIXED)
        for name in done.evidence:
            w = done.model.get_parameter(name).detach()
            w = w.mT if kind == "gpt2" else w
            assert bool(((w != 0).reshape(-1, 4).sum(1) == 2).all()), name


def test_matrices_whose_inputs_do_not_fit_a_pattern_stay_and_are_named() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.warns(match="do not fit the pattern"):
        done = prune(net, [(torch.randn(50, 6), torch.arange(50) % 3)], pattern="2:4", settings=FIXED)
    assert done.untouched == ("0.weight",) and torch.equal(done.model[0].weight, net[0].weight)


def trained() -> tuple[nn.Module, list[torch.Tensor]]:
    """A small language model that has learned a short cycle of tokens with noise."""
    torch.manual_seed(0)
    model = network("llama")
    generator = torch.Generator().manual_seed(0)

    def windows(n: int) -> torch.Tensor:
        start = torch.randint(0, 20, (n, 1), generator=generator)
        x = (start + torch.arange(16)) % 20
        noise = torch.randint(0, TOKENS, x.shape, generator=generator)
        return torch.where(torch.rand(x.shape, generator=generator) < 0.1, noise, x)

    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(100):
        x = windows(24)
        loss = model(input_ids=x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), [windows(16) for _ in range(12)]


@pytest.fixture(scope="module")
def cycle() -> tuple[nn.Module, list[torch.Tensor]]:
    return trained()


def nll(model: nn.Module, data: list[torch.Tensor]) -> float:
    with torch.no_grad():
        return sum(float(model(input_ids=x, labels=x).loss) for x in data) / len(data)


def test_survivors_make_good_for_what_went(cycle: tuple[nn.Module, list[torch.Tensor]]) -> None:
    model, data = cycle
    done = prune(model, data[:8], keep_share=0.5)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for name in done.evidence:
            plain.get_parameter(name).mul_(done.model.get_parameter(name) != 0)
    dense, moved, masked = (nll(m, data[8:]) for m in (model, done.model, plain))
    assert moved - dense < 0.5 * (masked - dense)
    assert done.before == pytest.approx(nll(model, [data[3], data[7]]), rel=1e-4)
    assert done.after == pytest.approx(nll(done.model, [data[3], data[7]]), rel=1e-4)
    assert done.trials and {d.kind for d in done.trials} == set(done.damping)


def test_one_threshold_costs_less_than_equal_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = {}
    for i, size in enumerate((40, 100, 300)):
        weight = torch.randn(1, size, 50, generator=generator)
        samples[str(i)] = cost_sample(weight, 10.0**-i * weight.square())
    total = sum(c.size for c in samples.values())
    for keep in (0.9, 0.5, 0.1):
        shares = shares_for(samples, keep)
        assert sum(shares[k] * c.size for k, c in samples.items()) == pytest.approx(keep * total, rel=1e-3)
        cost = sum(float(c.costs[: round((1 - shares[k]) * len(c.costs))].sum()) for k, c in samples.items())
        even = sum(float(c.costs[: round((1 - keep) * len(c.costs))].sum()) for c in samples.values())
        assert cost < 0.9 * even
    assert shares["0"] > shares["2"]
    cost, volume = predicted(samples, 0.5, 100.0)
    assert cost > 0 and volume > 0 and predicted(samples, 1.0, 100.0) == (0.0, 0.0)


def test_the_evidence_ends_the_removal(cycle: tuple[nn.Module, list[torch.Tensor]]) -> None:
    model, data = cycle
    done = prune(model, data, settings=FIXED)
    assert 0.05 < done.keep_share < 0.95
    kept = min(s.keep_share for s in done.shots if s.nats >= 0)
    assert done.keep_share == pytest.approx(kept, abs=0.01)
    assert math.exp(nll(done.model, data) - nll(model, data)) < 1.1
    surer = prune(model, data, settings=replace(FIXED, n_data=2e8))
    assert surer.keep_share > done.keep_share  # the more data stand behind the weights, the more of them stay


def test_shots_are_greedy_and_the_last_is_as_the_settings_say(
    cycle: tuple[nn.Module, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = cycle
    own, rounds = job.reduce_blocks_, []
    monkeypatch.setattr(job, "reduce_blocks_", lambda *a, **k: rounds.append(a[3].rounds) or own(*a, **k))
    done = prune(model, data, settings=FIXED)
    assert rounds == [4] * (len(done.shots) - 1) + [None]
    *tried, last = done.shots
    best = min((s for s in tried if s.nats >= 0), key=lambda s: s.keep_share)
    assert last.keep_share == best.keep_share
    assert last.volume == best.volume  # though the greedy ones have a damping of their own
    taken = min(best, last, key=lambda s: s.rise)
    judges = [x for i, x in enumerate(data) if i % 4 == 3]
    assert nll(done.model, judges) - nll(model, judges) == pytest.approx(taken.rise, abs=1e-5)
    rounds.clear()
    prune(model, data, settings=replace(FIXED, rounds=2))
    assert set(rounds) == {2}


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_stopped_job_goes_on_to_the_same_bits(epochs: int, tmp_path: Path) -> None:
    model, data = network("llama"), batches("llama")
    whole = prune(model, data, keep_share=0.5, settings=PruneSettings(reconstruct=epochs))

    class Stopped(Exception):
        pass

    seen: list[PruneProgress] = []

    def stop(p: PruneProgress) -> None:
        seen.append(p)
        if p.stage == "reduction" and p.done == 2:
            raise Stopped

    settings = PruneSettings(folder=tmp_path, reconstruct=epochs)
    with pytest.raises(Stopped):
        prune(model, data, keep_share=0.5, settings=settings, progress=stop)
    again: list[PruneProgress] = []
    done = prune(model, data, keep_share=0.5, settings=settings, progress=again.append)
    assert not any(p.stage == "curvature" for p in again) and any(p.stage == "curvature" for p in seen)
    assert all(torch.equal(t, done.model.state_dict()[n]) for n, t in whole.model.state_dict().items())
    assert dict(done.evidence) == pytest.approx(dict(whole.evidence))
    assert seen[0].left >= 0
    with pytest.raises(OckhamError, match="another job"):
        prune(network("llama", seed=1), data, keep_share=0.5, settings=settings)


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.2])
def test_every_pass_leaves_the_same_part(keep: float) -> None:
    assert passes_to(keep, 1) == [keep]
    assert passes_to(keep, 3) == pytest.approx([keep ** (1 / 3), keep ** (2 / 3), keep])


def test_passes_are_what_one_gets_by_calling_again() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(120, 12)
    data = list(zip(x.split(20), (x[:, 0] > 0).long().split(20), strict=True))
    with torch.no_grad():
        net(x)
    net.eval()
    both = prune(net, data, keep_share=0.2, settings=replace(FIXED, passes=2, n_data=5000.0))
    first = prune(net, data, keep_share=0.2**0.5, settings=replace(FIXED, passes=1, n_data=5000.0))
    second = prune(first.model, data, keep_share=0.2, settings=replace(FIXED, passes=1, n_data=5000.0))
    for name, value in second.model.state_dict().items():
        assert torch.equal(both.model.state_dict()[name], value), name
    for key, found in both.evidence.matrices.items():
        a, b = first.evidence.matrices[key], second.evidence.matrices[key]
        assert found.cost == pytest.approx(a.cost + b.cost) and found.kept == b.kept
        # the prior is that of the trained weights, and every weight that is gone is counted once
        assert found.prior_precision == pytest.approx(typical_precision(net.get_parameter(key).detach()))
        assert (
            b.volume
            < found.volume
            < b.volume + 0.5 * (1 - b.kept) * b.size * math.log(b.prior_precision / found.prior_precision)
        )
    assert both.before == first.before and both.after == second.after


@pytest.mark.parametrize(
    "target",
    [{}, {"pattern": "2:4"}, {"structure": "uneven", "budget": {"params": "80%"}}],
    ids=["stop", "pattern", "units"],
)
def test_passes_are_refused_where_no_share_is_asked_for(target: dict[str, Any]) -> None:
    with pytest.raises(OckhamError, match=r"passes=2.*pass keep_share"):
        prune(network("llama"), batches("llama"), settings=replace(FIXED, passes=2), **target)


def test_the_posterior_of_several_passes_is_made_once_and_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    own = job.surviving_posterior
    monkeypatch.setattr(job, "surviving_posterior", lambda *args: made.append(own(*args)) or made[-1])
    done = prune(network("llama"), batches("llama"), keep_share=0.25, settings=replace(FIXED, passes=2, posterior=True))
    assert made == [done.posterior] and done.posterior is not None
    for name, g in done.posterior.items():
        if name in done.shares:
            assert torch.equal(g.keep, done.model.get_parameter(name) != 0)


def test_two_jobs_in_one_folder_are_refused(tmp_path: Path) -> None:
    settings, refused = replace(FIXED, folder=tmp_path), list[str]()

    def second(progress: PruneProgress) -> None:
        if progress.stage in ("curvature", "reduction") and progress.done == 1:
            with pytest.raises(OckhamError, match="is being written by process") as caught:
                prune(network("llama"), batches("llama"), keep_share=0.5, settings=settings)
            refused.append(str(caught.value))

    found = prune(network("llama"), batches("llama"), keep_share=0.5, settings=settings, progress=second)
    alone = prune(network("llama"), batches("llama"), keep_share=0.5, settings=FIXED)
    assert len(refused) == 2 and "choose another folder" in refused[0]
    for (name, p), q in zip(found.model.named_parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert not list(tmp_path.rglob(".lock*"))


def test_a_second_pass_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    model, data = network("llama"), batches("llama")
    settings = replace(FIXED, passes=2)
    whole = prune(model, data, keep_share=0.5, settings=settings)
    seen: list[PruneProgress] = []

    class Stopped(Exception):
        pass

    def stop(p: PruneProgress) -> None:
        seen.append(p)
        if [q.stage for q in seen].count("reduction") == 4:  # two blocks of the first pass, and of the second
            raise Stopped

    settings = replace(settings, folder=tmp_path)
    with pytest.raises(Stopped):
        prune(model, data, keep_share=0.5, settings=settings, progress=stop)
    again: list[PruneProgress] = []
    done = prune(model, data, keep_share=0.5, settings=settings, progress=again.append)
    assert not any(p.stage == "curvature" for p in again)  # of either pass
    assert all(torch.equal(t, done.model.state_dict()[n]) for n, t in whole.model.state_dict().items())
    assert dict(done.evidence) == pytest.approx(dict(whole.evidence))


def test_report_and_facts(tmp_path: Path) -> None:
    done = prune(network("bert"), batches("bert"), keep_share=0.5)
    text = done.report(tmp_path / "report.html").read_text()
    assert "Kinds of matrices" in text and "<script" not in text
    assert done.before is None and done.likelihood == "own predictive"
    json.dumps(done.facts(), allow_nan=False)


def test_a_network_without_blocks_is_one_block() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    data = [(torch.randn(16, 3, 8, 8), torch.arange(16) % 4) for _ in range(4)]
    done = prune(net, data, keep_share=0.5)
    assert set(done.evidence) == {"0.weight", "4.weight"} and set(done.evidence.blocks) == {""}


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0},
        {"rounds": -1},
        {"rounds": 2.5},
        {"passes": 0},
        {"passes": 1.5},
        {"n_data": 0.0},
        {"n_data": -1.0},
        {"unit_damping": 0.0},
        {"reconstruct": -1},
        {"reconstruct": 1.5},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OckhamError, match=next(iter(wrong))):
        PruneSettings(**wrong)


@pytest.mark.parametrize("stale", [True, False])
def test_statistics_of_batch_norm_are_taken_anew_where_that_helps(stale: bool) -> None:
    """Calibration data may be unlike those of training (augmented): what they say of mean and variance is judged."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).eval()
    x = torch.randn(8, 64, 6)
    right = [x.flatten(0, 1) @ net[0].weight.T.detach() + net[0].bias.detach()]
    mean, var = right[0].mean(0), right[0].var(0)
    with torch.no_grad():
        net[1].running_mean.copy_(mean)
        net[1].running_var.copy_(var if stale else 4 * var)
        data = [(b, net(b)) for b in x]  # what the network says with the statistics that it has now
        if stale:
            net[1].running_var.copy_(9 * var)
    done = prune(net, data, keep_share=1.0)
    changed = not torch.equal(net[1].running_var, done.model[1].running_var)
    assert changed is stale


def test_a_network_that_always_fills_a_cache() -> None:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.XLMConfig(vocab_size=TOKENS, emb_dim=24, n_layers=2, n_heads=4, n_langs=1, pad_index=0)
    done = prune(hf.XLMModel(config), [ids(seed=i).clamp_min(1) for i in range(4)], keep_share=0.5)
    assert done.keep_share == pytest.approx(0.5, abs=0.01)


def test_kinds_of_matrices_that_no_pattern_fits_stay_as_they_are() -> None:
    torch.manual_seed(0)

    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1), nn.ReLU())

    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(block(), block()), nn.Flatten(), nn.Linear(8 * 36, 4))
    data = [(torch.randn(16, 3, 6, 6), torch.arange(16) % 4) for _ in range(4)]
    with pytest.warns(OckhamWarning, match="do not fit the pattern"):
        done = prune(net, data, pattern="2:4")
    assert done.shares.keys() == {"1.0.1.weight", "1.1.1.weight"}
    assert set(done.shares.values()) == {0.5} and set(done.untouched) == {"1.0.0.weight", "1.1.0.weight"}


def test_one_step_of_words_for_every_bad_argument() -> None:
    net, data = network("llama"), batches("llama")
    for bad, match in [
        ({"keep_share": 0.0}, "keep_share"),
        ({"keep_share": 1.5}, "keep_share"),
        ({"keep_share": 0.5, "pattern": "2:4"}, "not both"),
        ({"pattern": "4:2"}, "n:m"),
        ({"structure": "auto"}, "go together"),
        ({"budget": {"params": "50%"}}, "go together"),
        ({"structure": "some", "budget": {"params": "50%"}}, "structure must be"),
        ({"keep_share": 0.5, "likelihood": "poisson"}, "likelihood"),
    ]:
        with pytest.raises(OckhamError, match=match):
            prune(net, data, **bad)
    with pytest.raises(DataError, match="empty"):
        prune(net, [], keep_share=0.5)
    with pytest.raises(DataError, match="cannot take"):
        prune(net, [{"pixels": ids()}], keep_share=0.5)
    with pytest.raises(DataError, match="4 batches"):
        prune(net, [ids(1)])
    with pytest.raises(OckhamError, match="matches no parameter"):
        prune(net, data, keep_share=0.5, settings=PruneSettings(ignore=["nothing"]))


def test_what_is_ignored_stays() -> None:
    net = network("llama")
    done = prune(net, batches("llama"), keep_share=0.5, settings=PruneSettings(ignore=["re:down_proj"]))
    assert not any("down_proj" in k for k in done.evidence) and len(done.evidence) == 18
    for name, p in net.named_parameters():
        if "down_proj" in name:
            assert torch.equal(p, done.model.get_parameter(name))


def test_batches_and_outputs_as_people_have_them() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(2)])
            self.head = nn.Linear(5, 3)

        def forward(self, features: torch.Tensor) -> dict[str, Any]:
            for layer in self.layers:
                features = layer(features)
            return {"state": features, "scores": self.head(features)}

    items = [{"x": torch.randn(20, 5), "y": torch.arange(20) % 3, "name": "a"} for _ in range(4)]
    torch.manual_seed(0)
    net = Model()

    def error(f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(f, y, reduction="sum")

    done = prune(
        net,
        items,
        keep_share=0.5,
        batch=lambda item: (item["x"], item["y"]),
        output=lambda out: out["scores"],
        likelihood=Loss(error, reduction="sum"),
    )
    assert set(done.evidence) == {"layers.0.0.weight", "layers.1.0.weight"} and done.before is not None
    again = prune(
        net,
        items,
        keep_share=0.5,
        batch=lambda item: Batch((), {"features": item["x"]}, item["y"]),
        output=lambda out: out["scores"],
        likelihood=Loss(error, reduction="sum"),
    )
    assert all(torch.equal(t, again.model.state_dict()[n]) for n, t in done.model.state_dict().items())


X, Y = torch.randn(32, 6, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 2
NAN = X.clone()
NAN[3, 1] = math.nan


@pytest.mark.parametrize(
    ("data", "given", "said"),
    [
        (None, {}, "iterable of batches, or a tensor; got NoneType"),
        ("text", {}, r"a tensor, .* or a mapping of inputs; got str"),
        ([(X, Y.numpy())], {}, "tensor or None; got ndarray"),
        ([(X, Y.tolist())], {}, "tensor or None; got list"),
        ([(X, Y), (NAN, Y)], {}, r"batch 1 .*: input 0 holds NaN"),
        ([(X, X[:, 0]), (X, NAN[:, 1])], {"likelihood": "regression"}, "batch 1 .* not finite: nan in example 3"),
        ([(X, Y)], {"batch": lambda item: item["x"]}, "batch= cannot read the calibration data, tuple of 2"),
        ([(X, Y)], {"output": lambda found: found.scores}, "output= cannot read what the network returns"),
        ([(X, Y)], {"output": lambda found: "a"}, "output= must take a tensor .* got str"),
        ([(X, Y)], {"likelihood": "causal-lm"}, r"causal-lm needs .* got \(32, 2\)"),
        ([(X, Y, Y + 0.5)], {}, "examples count once each, and these have weights"),
        ([Batch((X,), target=Y, weight=Y + 0.5)], {}, "examples count once each, and these have weights"),
        (
            [(X, Y)],
            {"likelihood": Loss(lambda f, y: nn.functional.cross_entropy(f, y).detach(), reduction="mean")},
            "does not depend on the network's output",
        ),
    ],
)
def test_data_that_cannot_be_read_are_named(data: Any, given: dict[str, Any], said: str) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(DataError, match=said):
        prune(net, data, keep_share=0.5, **given)


def test_weights_of_one_are_no_weights() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    want = prune(net, [(X, Y)], keep_share=0.5, settings=FIXED).model.state_dict()
    found = prune(net, [(X, Y, torch.ones(32))], keep_share=0.5, settings=FIXED).model.state_dict()
    assert all(torch.equal(t, want[n]) for n, t in found.items())


def test_a_causal_language_model_by_either_name_is_the_same() -> None:
    model, data = network("llama"), [{"input_ids": w, "labels": w} for w in (ids(seed=s) for s in range(4))]
    want = prune(model, data, keep_share=0.5, settings=FIXED, likelihood="next-token").model.state_dict()
    for likelihood in ("causal-lm", CausalLanguage()):
        found = prune(model, data, keep_share=0.5, settings=FIXED, likelihood=likelihood).model.state_dict()
        assert all(torch.equal(t, want[n]) for n, t in found.items())


def test_the_rise_is_that_of_the_pooled_mean_with_its_paired_error() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = torch.full((400,), 10.0, dtype=torch.float64)
    dense = torch.rand(400, generator=generator, dtype=torch.float64) * 100
    rises = torch.randn(400, generator=generator, dtype=torch.float64) + 2
    shot = shot_from(0.5, (dense, terms), (dense + rises, terms), volume=3.0, n_data=10.0)
    assert shot.rise == pytest.approx(float(rises.mean()) / 10)
    assert shot.rise_error == pytest.approx(float(rises.std()) / 20 / 10, rel=1e-6)
    assert shot.nats == pytest.approx(3 - 10 * shot.rise)
    z = shot.nats / (10 * shot.rise_error)
    assert shot.certainty == pytest.approx(float(torch.special.ndtr(torch.tensor(z).double())), rel=1e-6)


def test_shots_find_the_share_at_which_the_evidence_is_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 300, 100, generator=generator)
    samples = {"m": cost_sample(weight, 1e-7 * weight.square())}
    n_data = 20.0 * weight.numel()

    def fire(share: float) -> Shot:
        return Shot(share, 0.2 * (1 - share) ** 3, 0.0, 2.0 * (1 - share) * weight.numel(), n_data)

    fired = shots(samples, n_data, fire, most=8)
    exact = 1 - math.sqrt(0.5)  # 2 s n = 20 n 0.2 s^3 gives s = sqrt(1/2)
    best = best_shot(fired)
    assert best is not None and best.keep_share == pytest.approx(exact, abs=0.05)
    assert best_shot([Shot(0.9, 1.0, 0.0, 0.0, 1.0)]) is None


def test_shots_go_on_where_the_prediction_says_that_everything_may_go() -> None:
    weight = torch.randn(1, 300, 100, generator=torch.Generator().manual_seed(0))
    samples = {"m": cost_sample(weight, 1e-12 * weight.square())}  # a hundredth of a nat in all, it says
    n_data = 20.0 * weight.numel()

    def fire(share: float) -> Shot:  # as predicted, and a hair too much of it
        cost = predicted(samples, share, n_data)[0]
        return Shot(share, cost if share < 0.4 else 0.0, 0.0, 0.999999 * n_data * cost, n_data)

    fired = shots(samples, n_data, fire)
    best = best_shot(fired)
    assert fired[0].keep_share < 0.1 and fired[0].nats < 0
    assert best is not None and 0.4 <= best.keep_share < 0.6 and len(fired) <= 4
