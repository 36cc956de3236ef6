"""Shares of kinds of matrices: the curvature's costs, corrected where data held out clearly ask for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ockham.methods.blocks import job
from ockham.methods.blocks.prune import PruneSettings, prune
from ockham.methods.blocks.reduction import study_shares
from ockham.methods.blocks.solve import Damping
from ockham.methods.blocks.stop import DampingTrial, matrix_kind, removed_cost, shares_for

from .networks import batches, network
from .test_curvature import studied

DAMPING = Damping(0.1, 0.3)


@pytest.fixture(name="given")
def _given(tmp_path: Path) -> tuple[Any, Any, Any, Any]:
    model, data = network("llama"), batches("llama")
    found, _, _ = studied(model, data, tmp_path)
    keep = shares_for(found.samples, 0.5)
    kinds = dict.fromkeys(matrix_kind(k) for k in found.samples)
    trials = [DampingTrial(k, DAMPING, 0.1 * (i + 1)) for i, k in enumerate(kinds)]
    return model, found, keep, ({k: DAMPING for k in kinds}, [*trials, DampingTrial(next(iter(kinds)), DAMPING, 9.0)])


@pytest.mark.parametrize(
    ("distances", "power"), [((1.0, 0.96, 0.97), 0.0), ((1.0, 0.9, 0.95), 0.5), ((1.0, 0.9, 0.8), 1.0), ((1, 2, 2), 0)]
)
def test_costs_of_a_kind_are_corrected_where_that_clearly_helps(given: Any, distances: Any, power: float) -> None:
    model, found, keep, damping = given
    before = {n: t.clone() for n, t in model.state_dict().items()}
    seen: list[dict[str, float]] = []

    def distance() -> float:
        places = [k for j in found.tried for k in found.dense.maps[j].matrices]
        weights = {k: model.get_parameter(k) for k in places}
        seen.append({k: float((w != 0).float().mean()) for k, w in weights.items()})
        return float(distances[len(seen) - 1])

    samples = study_shares(found, keep, damping, distance)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    sizes = {k: found.samples[k].size for k in seen[0]}
    total = [sum(share[k] * n for k, n in sizes.items()) / sum(sizes.values()) for share in seen]
    assert len(seen) == 3 and max(total) - min(total) < 0.01  # equally many weights in all
    for key, sample in samples.items():
        kind, place = matrix_kind(key), [k for k in sizes if matrix_kind(k) == matrix_kind(key)][:3]
        said = sum(removed_cost(found.samples[k], keep[k]) for k in place)
        measured = min(t.cost for t in damping[1] if t.kind == kind)
        torch.testing.assert_close(sample.costs, found.samples[key].costs * (measured / said) ** power)
        assert sample.size == found.samples[key].size


def test_kinds_that_cost_more_than_was_said_keep_more(given: Any) -> None:
    _, found, keep, damping = given
    dear = next(k for k in damping[0] if "down_proj" in k)
    said = {}
    for kind in damping[0]:
        place = [k for j in found.tried for k in found.dense.maps[j].matrices if matrix_kind(k) == kind][:3]
        said[kind] = sum(removed_cost(found.samples[k], keep[k]) for k in place)
    trials = [DampingTrial(kind, DAMPING, cost * (10 if kind == dear else 1)) for kind, cost in said.items()]
    values = iter((1.0, 0.9, 0.5))
    after = shares_for(study_shares(found, keep, (damping[0], trials), lambda: next(values)), 0.5)
    assert all(after[k] > keep[k] if matrix_kind(k) == dear else after[k] < keep[k] + 0.01 for k in keep)


def test_a_call_heeds_it_and_equal_shares_do_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(found: Any, keep: Any, *more: Any) -> Any:
        asked.append(dict(keep))
        return {
            k: type(c)(c.costs * (50.0 if "down_proj" in k else 1.0), c.determined, c.size) for k, c in found.items()
        }

    monkeypatch.setattr(job, "study_shares", lambda found, keep, *more: fake(found.samples, keep))
    model, data = network("llama"), batches("llama")
    plain = prune(model, data, keep_share=0.5, settings=PruneSettings(rounds=2))
    assert len(asked) == 1
    assert all(plain.shares[k] > asked[0][k] + 0.05 for k in plain.shares if "down_proj" in k)
    assert plain.keep_share == pytest.approx(0.5, abs=0.01)
    for options in ({"pattern": "2:4"}, {"keep_share": 0.5}):
        prune(model, data, **options, settings=PruneSettings(rounds=2, even=True))
    assert len(asked) == 1
