"""`ockham compress --method spike-slab`: inclusion probabilities in the result, in inspect and in the report."""

from __future__ import annotations

import json

import pytest
import torch

import ockham as library
from ockham.zoo.data import digits


def test_digits_with_inclusion_probabilities(ockham, tmp_path):
    given = ("--method", "spike-slab", "--epochs", "40", "--no-baseline", "--quiet")
    done = ockham("compress", "--out", "r", *given)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert metrics["after"]["accuracy"] > 0.94 and metrics["kept"] < 0.06
    posterior, network = library.load_posterior(tmp_path / "r"), library.load(tmp_path / "r")
    inclusion = posterior["fc1.weight"].inclusion
    assert bool((inclusion[~posterior["fc1.weight"].keep] == 0).all()) and float(inclusion.max()) > 0.99
    assert sum(int((p != 0).sum()) for p in network.parameters()) == round(metrics["kept"] * 50826)
    assert not any(m._forward_hooks for m in network.modules())
    analysis = json.loads((tmp_path / "r" / "analysis.json").read_text())
    first = analysis["layers"][0]
    assert first["expected"] == pytest.approx(float(inclusion.sum()), rel=1e-4)
    blank = (digits().train_x.flatten(1).std(0) == 0).nonzero()[:, 0]
    assert len(analysis["input_inclusion"]) == 64 and max(analysis["input_inclusion"][int(j)] for j in blank) < 0.5
    shown = ockham("inspect", "r")
    assert "sum of inclusion" in shown.stdout, shown.stdout
    page = (tmp_path / "r" / "report.html").read_text()
    assert "likelier used than not" in page and "sum of inclusion probabilities" in page


@pytest.mark.slow
def test_structures_go_with_the_median_model(ockham, tmp_path):
    given = ("--method", "spike-slab", "--epochs", "40", "--no-baseline", "--quiet", "--structure")
    done = ockham("compress", "--out", "r", *given)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert metrics["after"]["accuracy"] > 0.94 and metrics["kept"] < 0.06
    posterior, network = library.load_posterior(tmp_path / "r"), library.load(tmp_path / "r")
    small = {n: p.shape for n, p in network.named_parameters()}
    assert small["fc1.weight"][0] < 200 and small["fc2.weight"][0] < 120 and small["fc3.weight"][0] == 10
    assert all(g.inclusion is not None and g.inclusion.shape == small[n] for n, g in posterior.items())
    assert json.loads((tmp_path / "r" / "structure.json").read_text())["after"]["parameters"] < 30_000


@pytest.mark.filterwarnings("ignore::ockham.errors.OckhamWarning")
def test_the_network_is_handed_out_without_hooks_and_training_goes_on():
    from ockham.methods.spike_slab.optimizer import spike_slab
    from ockham.run.compression import Compression, Training
    from ockham.zoo.data import Batches

    data = digits()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    job = Compression(
        model, Batches(data.train_x, data.train_y, 256, shuffle=True), training=Training(3), estimator=spike_slab
    )
    next(iter(job))
    early = job.result().model
    assert not early[1]._forward_hooks and job.network[1]._forward_hooks
    torch.save(early, "/dev/null")
    assert [p.epoch for p in job] == [2, 3]


@pytest.mark.slow
def test_log_odds_are_the_prior_and_a_budget_is_met(ockham, tmp_path):
    given = ("--method", "spike-slab", "--epochs", "12", "--no-baseline", "--quiet")
    done = ockham("compress", "--out", "r", *given, "--log-odds", "-4", "--keep-share", "0.02")
    assert done.returncode != 0 and "--log-odds" in done.stderr
    done = ockham("compress", "--out", "r", *given, "--log-odds", "-4")
    assert done.returncode == 0, done.stderr
    assert "FixedSpikeSlab(inclusion=0.0179862" in (tmp_path / "r" / "result.json").read_text()
    done = ockham("compress", "--out", "s", *given, "--keep-share", "0.02")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "s" / "metrics.json").read_text())["kept"] == pytest.approx(0.02, abs=1e-3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--posterior", "ivon"), "a posterior of its own"),
        (("--rule", "learned-odds"), "median model"),
        (("--log-odds", "1000"), "within 30 nats"),
    ],
)
def test_what_does_not_go_together_is_said(ockham, given, said):
    done = ockham("compress", "--method", "spike-slab", "--out", "r", *given)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
