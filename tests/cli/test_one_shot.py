"""`ockham compress --weights ... --posterior kronecker`: a trained network in, a reduced one out."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import ockham as library
from ockham.zoo.data import Batches, digits
from ockham.zoo.networks import NETWORKS


@pytest.fixture(scope="module")
def trained():
    """The digits network after a few epochs of Adam: file content and data."""
    data = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NETWORKS["digits_mlp"]()
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, weight_decay=1e-4)
        for _ in range(12):
            for x, y in Batches(data.train_x, data.train_y, 64, shuffle=True):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(net(x), y).backward()
                optimizer.step()
    return net.state_dict()


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_kronecker_without_a_target(ockham, tmp_path, trained):
    save_file(trained, tmp_path / "w.safetensors")
    done = ockham("compress", "--weights", "w.safetensors", "--posterior", "kronecker", "--out", "r", "--quiet")
    assert done.returncode == 0, done.stderr
    m = metrics_of(tmp_path / "r")
    assert m["before_source"] == "given weights" and 0.02 < m["kept"] < 0.6
    assert m["after"]["accuracy"] > m["before"]["accuracy"] - 0.04
    assert m["after"] == m["mean_network"] or abs(m["after"]["nll"] - m["mean_network"]["nll"]) < 1e-6
    small = library.load(tmp_path / "r")
    assert int(sum((p != 0).sum() for p in small.parameters())) == round(m["kept"] * 50826)


def test_a_budget_and_fine_tuning(ockham, tmp_path, trained):
    save_file(trained, tmp_path / "w.safetensors")
    given = ("--weights", "w.safetensors", "--posterior", "laplace", "--keep-share", "0.2", "--epochs", "3")
    done = ockham("compress", "--out", "r", "--quiet", *given)
    assert done.returncode == 0, done.stderr
    m = metrics_of(tmp_path / "r")
    assert m["after"]["accuracy"] > 0.85
    before, after = trained, load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)
    history = json.loads((tmp_path / "r" / "history.json").read_text())
    assert [e["epoch"] for e in history["epochs"]] == [1, 2, 3]


def test_what_does_not_go_together_is_said(ockham, tmp_path, trained):
    save_file(trained, tmp_path / "w.safetensors")
    done = ockham("compress", "--posterior", "kronecker", "--out", "r")
    assert done.returncode != 0 and "--weights" in done.stderr and "Traceback" not in done.stderr
    given = ("--weights", "w.safetensors", "--posterior", "laplace", "--rule", "magnitude", "--keep-share", "0.1")
    done = ockham("compress", "--out", "r", *given)
    assert done.returncode != 0 and "removes by evidence" in done.stderr and "magnitude" in done.stderr
    given = ("--weights", "w.safetensors", "--posterior", "kronecker")
    done = ockham("compress", "--out", "r", *given, "--macs", "0.5")
    assert done.returncode != 0 and "--structure" in done.stderr
    done = ockham("compress", "--out", "r", *given, "--structure", "--macs", "1.5")
    assert done.returncode != 0 and "(0, 1]" in done.stderr
    done = ockham("compress", "--out", "r", *given, "--structure", "--params", "0.5", "--latency", "0.5")
    assert done.returncode != 0 and "one budget at a time" in done.stderr
    other = ("--weights", "w.safetensors", "--posterior", "laplace", "--structure")
    done = ockham("compress", "--out", "r", *other)
    assert done.returncode != 0 and "--posterior kronecker" in done.stderr
    done = ockham("compress", "--out", "r", *given, "--structure", "--keep-share", "0.5")
    assert done.returncode != 0 and "--keep-share" in done.stderr


@pytest.mark.slow
def test_kronecker_takes_units_to_a_budget_of_operations(ockham, tmp_path, trained):
    save_file(trained, tmp_path / "w.safetensors")
    given = (
        "--weights",
        "w.safetensors",
        "--posterior",
        "kronecker",
        "--structure",
        "--macs",
        "0.4",
        "--round-to",
        "4",
    )
    done = ockham("compress", "--out", "r", "--quiet", *given)
    assert done.returncode == 0, done.stderr
    m = metrics_of(tmp_path / "r")
    assert m["after"]["accuracy"] > m["before"]["accuracy"] - 0.03 and m["kept"] < 0.5
    small = library.load(tmp_path / "r")
    widths = [p.shape[0] for n, p in small.named_parameters() if n.endswith("weight")]
    assert all(w % 4 == 0 for w in widths[:-1]) and sum(widths) < 300
    assert sum(p.numel() for p in small.parameters() if p.ndim > 1) <= 0.4 * 50826
    plan = library.Plan.from_json((tmp_path / "r" / "plan.json").read_text())
    assert sum(len(v) for v in plan.removed.values()) > 50
    settings = json.loads((tmp_path / "r" / "result.json").read_text())["settings"]
    assert settings["one_shot"] == "kronecker" and settings["macs"] == 0.4 and "FlatPrice" in settings["structures"]
    assert not {"prior", "temperature", "rule"} & settings.keys()  # of a training that did not happen
    told = (tmp_path / "r" / "report.html").read_text()
    assert "down to the budget you set, at once, and the rest moved" in told and "without rounds of training" in told
    assert "While this network was trained" not in told


def test_kronecker_takes_units_while_the_evidence_pays_and_tunes_what_is_left(ockham, tmp_path, trained):
    save_file(trained, tmp_path / "w.safetensors")
    given = ("--weights", "w.safetensors", "--posterior", "kronecker", "--structure", "--epochs", "2")
    done = ockham("compress", "--out", "r", "--quiet", *given)
    assert done.returncode == 0, done.stderr
    m = metrics_of(tmp_path / "r")
    assert m["after"]["accuracy"] > m["before"]["accuracy"] - 0.02 and m["kept"] < 1


RESIDUAL = """
import torch

class Beside(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, inner), torch.nn.Linear(inner, 16)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))

def network():
    first, last = torch.nn.Linear(64, 16), torch.nn.Linear(16, 10)
    return torch.nn.Sequential(torch.nn.Flatten(), first, *map(Beside, (12, 10, 8)), last)
"""
FRESH = """
import json, sys, torch, ockham, residual
from ockham.zoo.data import digits
x, y = digits().test_x, digits().test_y
model, plan = residual.network(), ockham.Plan.from_json(open("r/plan.json").read())
small, replayed = ockham.load("r", model=model), ockham.shrink(model, plan)
assert {n: p.shape for n, p in small.named_parameters()} == {n: p.shape for n, p in replayed.named_parameters()}
ockham.export(small, "small.onnx", x[:3])
right = float((small(x).argmax(1) == y).double().mean())
print(json.dumps({"accuracy": right, "left": list(small.state_dict()), "logits": small(x[:7]).tolist()}))
"""


def test_depth_takes_a_branch_that_is_worth_nothing(ockham, tmp_path, environment):
    (tmp_path / "residual.py").write_text(RESIDUAL)
    scope, data = {}, digits()
    exec(RESIDUAL, scope)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = scope["network"]()
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(5):
            for x, y in Batches(data.train_x, data.train_y, 64, shuffle=True):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(net(x), y).backward()
                optimizer.step()
    with torch.no_grad():
        net[3].down.weight.mul_(1e-4)
        net[3].down.bias.zero_()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    given = ("--weights", "w.safetensors", "--model", "residual:network", "--structure", "--round-to", "1", "--quiet")
    done = ockham("prune", *given, "--depth", "--out", "r")
    assert done.returncode == 0, done.stderr
    plan = library.Plan.from_json((tmp_path / "r" / "plan.json").read_text())
    assert [b.id for b in plan.dropped] == ["3"]
    rows = {g["id"]: g for g in json.loads((tmp_path / "r" / "structure.json").read_text())["groups"]}
    assert (rows["3"]["before"], rows["3"]["after"]) == (1, 0) and rows["3"]["nats"] == plan.nats["3"][0] < 0
    assert rows["3.up.weight:0"]["after"] == 0 and rows["2.up.weight:0"]["after"] > 0
    assert "residual branches went as a whole" in (tmp_path / "r" / "report.html").read_text()
    m = metrics_of(tmp_path / "r")
    command = [sys.executable, "-c", FRESH]
    fresh = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert fresh.returncode == 0, fresh.stderr
    said = json.loads(fresh.stdout.splitlines()[-1])
    assert said["accuracy"] == pytest.approx(m["after"]["accuracy"], abs=2e-3)
    assert m["after"]["accuracy"] > m["before"]["accuracy"] - 0.02
    assert "2.up.weight" in said["left"] and not any(n.startswith("3.") for n in said["left"])
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    told = session.run(None, {session.get_inputs()[0].name: data.test_x[:7].numpy()})[0]
    assert told == pytest.approx(numpy.array(said["logits"]), abs=1e-4)


def test_depth_is_refused_where_branches_cannot_go(ockham, tmp_path, trained):
    save_file(trained, tmp_path / "w.safetensors")
    done = ockham("compress", "--structure", "--depth", "--out", "r")
    assert done.returncode == 2 and "compress does not use --depth" in done.stderr and "ockham prune" in done.stderr
    done = ockham("gate", "--depth", "--out", "r")
    assert done.returncode == 2 and "--depth" in done.stderr
    done = ockham("prune", "--weights", "w.safetensors", "--depth", "--out", "r")
    assert done.returncode == 2 and "add --structure" in done.stderr
    done = ockham("prune", "--weights", "w.safetensors", "--structure", "--depth", "--out", "r", "--quiet")
    assert done.returncode == 0 and "no residual branch" in done.stderr  # digits_mlp is a plain chain
