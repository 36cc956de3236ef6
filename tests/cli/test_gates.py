"""`ockham compress --method bmrs`: a folder that is complete, resumable and loads."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import ockham
from ockham.cli.app import app
from ockham.cli.build import Options, build_job
from ockham.errors import OckhamError, ResultError
from ockham.methods.gates.report import gate_sections
from ockham.report.html import write_report
from ockham.run.schema import read_result

FAST = {"method": "bmrs", "epochs": 4, "baseline": False, "quiet": True, "temperature": 300.0, "learning_rate": 2e-2}


def run(folder, **options):
    job = build_job(Options(out=str(folder), **{**FAST, **options}), "test")
    return job, list(job.run())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gates")
    run(path, after_training=True, rule="l2", keep_share=0.3, baseline=True)
    return path


def test_the_folder_is_complete_and_loads(folder):
    names = {p.name for p in folder.iterdir()}
    told = {"metrics.json", "history.json", "analysis.json", "structure.json", "gates.json", "result.json"}
    assert names == {*told, "network.safetensors", "plan.json", "report.html", "manifest.json"}
    metrics = json.loads((folder / "metrics.json").read_text())
    small = ockham.load(folder)
    assert sum(p.numel() for p in small.parameters()) == metrics["after"]["parameters"]
    assert metrics["kept"] == pytest.approx(metrics["after"]["parameters"] / metrics["before"]["parameters"])
    assert small(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_the_report_shows_gates_evidence_widths_and_curves(folder):
    text = (folder / "report.html").read_text()
    for part in (
        "Widths over the epochs",
        "posterior",
        "evidence",
        "Accuracy against compression",
        "nothing by itself",
    ):
        assert part in text
    assert "<script" not in text and "http" not in text.replace("http-equiv", "")
    assert write_report(folder, gate_sections).read_text() == text
    assert "Tempered" in text
    out = CliRunner().invoke(app, ["report", str(folder)])
    assert out.exit_code == 0 and (folder / "report.html").read_text() == text


def test_the_folder_is_evaluated_and_inspected(folder):
    accuracy = json.loads((folder / "metrics.json").read_text())["after"]["accuracy"]
    out = CliRunner().invoke(app, ["evaluate", str(folder)])
    assert out.exit_code == 0 and f"{accuracy:.4f}" in out.output and "mean network" in out.output
    out = CliRunner().invoke(app, ["inspect", str(folder)], env={"COLUMNS": "140"})
    gates = json.loads((folder / "gates.json").read_text())
    left = gates["epochs"][-1]["widths"]["fc1.weight:0"]
    assert out.exit_code == 0 and "rule l2, KL weighted by Tempered" in out.output
    row = next(line for line in out.output.splitlines() if "fc1.weight:0" in line)
    assert [c.strip() for c in row.split("│")][2:4] == ["256", str(left)] and left < 256


def test_a_damaged_folder_is_refused(folder, tmp_path):
    for name in ("metrics.json", "history.json", "analysis.json", "structure.json", "gates.json", "result.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    (tmp_path / "gates.json").write_text('{"schema": 1, "rule": "n"}')
    with pytest.raises(ResultError, match=r"gates\.json"):
        read_result(tmp_path)


@pytest.mark.slow
def test_interrupted_and_resumed_ends_the_same(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole)
    job = build_job(Options(out=str(parts), **FAST), "test")
    for info in job.run():
        if info.epoch == 3:
            break
    assert (parts / "checkpoint.safetensors").exists()
    run(parts, resume=True)
    one, other = (ockham.load(p).state_dict() for p in (whole, parts))
    assert all(torch.equal(one[k], other[k]) for k in one)
    job = build_job(Options(out=str(parts), overwrite=True, **FAST), "test")
    next(iter(job.run()))
    with pytest.raises(OckhamError, match="belongs to another job"):
        run(parts, resume=True, rule="u8")


def test_names_and_budgets_are_checked(tmp_path):
    with pytest.raises(OckhamError, match="--rule there: unknown for --method bmrs; choose from n, n-printed"):
        run(tmp_path, rule="there")
    with pytest.raises(OckhamError, match="only orders"):
        run(tmp_path, rule="l2")
    with pytest.raises(OckhamError, match="--method gates: unknown"):
        run(tmp_path, method="gates")
    run(tmp_path, rule="l2", keep_share=0.3)
    assert json.loads((tmp_path / "metrics.json").read_text())["kept"] <= 0.3
