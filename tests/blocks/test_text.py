"""A folder with a language model and its tokenizer, reduced on a text file."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from ockham.cli.app import app
from ockham.core.network import PruneProgress
from ockham.core.posterior import load_posterior
from ockham.core.seal import sealed
from ockham.errors import DataError, OckhamError, ResultError
from ockham.methods.blocks import prune as verb
from ockham.methods.blocks import reduction
from ockham.methods.blocks.job import PruneSettings
from ockham.methods.blocks.prune import prune_folder, read_calibration, token_measures, token_windows
from ockham.methods.blocks.solve import Damping
from ockham.report.page import seconds

from .networks import ids, network, text_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("model"))


def test_a_folder_becomes_a_smaller_one_that_loads_as_it_did(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    told: list[PruneProgress] = []
    settings = PruneSettings(damping=Damping(0.1, 0.5), folder=tmp_path / "out" / "work")
    options = {"windows": (12, 32), "progress": told.append, "settings": settings}
    metrics = prune_folder(source, source / "text.txt", tmp_path / "out", target={"keep_share": 0.5}, **options)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert metrics["kept"] == pytest.approx(0.5, abs=0.01)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.generate(tokenizer("w1 w2", return_tensors="pt").input_ids, max_new_tokens=3).shape[1] == 5
    for side in ("before", "after"):
        assert metrics[side]["perplexity"] == pytest.approx(math.exp(metrics[side]["nll"]))
        assert 0 <= metrics[side]["ece"] <= 1
    assert metrics["after"]["nonzero"] < metrics["before"]["nonzero"]
    assert {p.stage for p in told} == {"curvature", "reduction"}
    assert not (tmp_path / "out" / "work").exists()
    page = html.unescape((tmp_path / "out" / "report.html").read_text())
    for side in ("before", "after"):  # the tiles tell of the same text as the table
        assert f"{metrics[side]['nll']:.4f}" in page and f"{metrics[side]['perplexity']:.2f}" in page
    assert seconds(metrics["seconds"]) in page and "of mapped files happened" in page
    assert "nll_" not in page and "latency_" not in page and "time of a window" in page
    lines: dict[str, Any] = {}
    exec("\n".join(re.findall(r'<pre class="wrap">(.*?)</pre>', page, re.DOTALL)[-1:]), lines)
    assert lines["model"].num_parameters() == metrics["after"]["parameters"]


def test_measures_are_those_of_the_models_own_loss() -> None:
    model, windows = network("llama").eval(), ids(5, 20)
    found = token_measures(model, windows)
    with torch.no_grad():
        out = model(input_ids=windows, labels=windows)
        p = out.logits[:, :-1].softmax(-1)
    assert found["nll"] == pytest.approx(float(out.loss), rel=1e-5)
    confidence, guess = p.max(-1)
    right = (guess == windows[:, 1:]).double()
    assert found["accuracy"] == pytest.approx(float(right.mean()))
    inside = [(confidence * 15).long() == b for b in range(15)]
    gaps = [abs(float((confidence[m].double() - right[m]).sum())) for m in inside]
    assert found["ece"] == pytest.approx(sum(gaps) / right.numel(), abs=1e-6)


def test_text_and_windows(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    assert read_calibration(tmp_path) == "first\n\nsecond" and read_calibration(tmp_path / "a.txt") == "first"
    with pytest.raises(DataError, match="cannot read"):
        read_calibration(tmp_path / "none.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_calibration(tmp_path / "b.txt")
    found = token_windows(torch.arange(100), length=7, count=50)
    assert found.shape == (14, 7) and len(found[:, 0].unique()) == 14
    assert bool((found[:, 0] % 7 == 0).all())
    with pytest.raises(DataError, match="less than two windows"):
        token_windows(torch.arange(10), length=7, count=2)


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("text")
    with pytest.raises(OckhamError, match=r"config\.json"):
        prune_folder(tmp_path, tmp_path / "t.txt", tmp_path / "out")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OckhamError, match="architecture"):
        prune_folder(tmp_path, tmp_path / "t.txt", tmp_path / "out")
    network("t5").save_pretrained(tmp_path / "pairs")
    with pytest.raises(OckhamError, match="pairs of texts"):
        prune_folder(tmp_path / "pairs", tmp_path / "t.txt", tmp_path / "out")
    network("gpt2").save_pretrained(tmp_path / "wordless")
    with pytest.raises(OckhamError, match="tokenizer"):
        prune_folder(tmp_path / "wordless", tmp_path / "t.txt", tmp_path / "out")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["prune", *map(str, arguments)])


SHORT = ("--windows", 12, "--window", 32, "--threads", 1)


def test_the_command_writes_a_folder_that_loads_and_talks(source: Path, tmp_path: Path, monkeypatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("ockham.cli.app._PIPED", 0.0)  # every line of progress, not one in 30 seconds

    given = ("--model", f"hf:{source}", "--calibrate", source / "text.txt", "--out", tmp_path / "out", *SHORT)
    done = run(*given, "--keep-share", 0.5, "--reconstruct", 2)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "prune.json").read_text())["reconstruct"] == 2
    assert "trained for 2 epochs" in (tmp_path / "out" / "report.html").read_text()
    assert "reduction 3/3" in done.output and "s left" in done.output and "perplexity" in done.output
    out = tmp_path / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["kept"] == pytest.approx(0.5, abs=0.01)
    small = AutoModelForCausalLM.from_pretrained(out)
    posterior = load_posterior(out / "posterior.safetensors")
    names = {n for n, p in small.named_parameters() if ".layers." in n and p.ndim == 2}
    assert set(posterior) == names
    for name, g in posterior.items():
        assert torch.equal(g.keep, small.get_parameter(name) != 0)
        assert bool((g.precision >= g.prior_precision).all())
    page = (out / "report.html").read_text()
    assert "On text held out" in page and f"{metrics['after']['perplexity']:.4f}" in page
    assert "finished result" in str(run(*given, "--keep-share", 0.7).exception)
    again = run(*given, "--pattern", "2:4", "--overwrite", "--quiet")
    assert again.exit_code == 0 and "reduction" not in again.output
    w = AutoModelForCausalLM.from_pretrained(out).model.layers[0].mlp.up_proj.weight
    assert bool(((w != 0).reshape(-1, 4).sum(1) <= 2).all())
    files = sealed(out).files
    assert {"model.safetensors", "config.json", "posterior.safetensors", "metrics.json", "report.html"} < set(files)
    (out / "config.json").write_text("{}")
    with pytest.raises(ResultError, match=r"config\.json: damaged or changed"):
        sealed(out)


def test_a_failure_at_the_end_leaves_the_folder_that_was_there(source: Path, tmp_path: Path, monkeypatch) -> None:
    out, text = tmp_path / "out", source / "text.txt"
    settings = PruneSettings(damping=Damping(0.1, 0.5))
    prune_folder(source, text, out, target={"keep_share": 0.5}, windows=(12, 32), settings=settings)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.setattr(verb, "reduction_page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune_folder(source, text, out, target={"keep_share": 0.3}, windows=(12, 32), settings=settings, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.name != "work"} == before and sealed(out)
    monkeypatch.undo()
    prune_folder(source, text, out, target={"keep_share": 0.3}, windows=(12, 32), settings=settings, overwrite=True)
    assert sealed(out) and json.loads((out / "metrics.json").read_text())["kept"] == pytest.approx(0.3, abs=0.01)


def test_a_share_of_the_parameters_makes_a_narrower_folder(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    done = run(
        "--model", f"hf:{source}", "--calibrate", source / "text.txt", "--out", out, *SHORT, "--params", 0.9, "--quiet"
    )
    assert done.exit_code == 0, done.output
    small, metrics = AutoModelForCausalLM.from_pretrained(out), json.loads((out / "metrics.json").read_text())
    assert metrics["after"]["parameters"] == sum(p.numel() for p in small.parameters())
    assert 0.8 < metrics["after"]["parameters"] / metrics["before"]["parameters"] <= 0.9
    assert small.generate(torch.tensor([[4, 5]]), max_new_tokens=3).shape[1] == 5
    for name, g in load_posterior(out / "posterior.safetensors").items():
        assert g.mean.shape == small.get_parameter(name).shape
        assert torch.allclose(g.mean, small.get_parameter(name).float(), rtol=1e-2)


def test_a_budget_and_depth_make_a_folder_of_fewer_layers(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    given = ("--model", f"hf:{source}", "--calibrate", source / "text.txt", "--out", out, *SHORT, "--quiet")
    done = run(*given, "--params", 0.9, "--depth")
    assert done.exit_code == 0, done.output
    small, metrics = AutoModelForCausalLM.from_pretrained(out), json.loads((out / "metrics.json").read_text())
    assert small.config.num_hidden_layers == len(small.model.layers) == 2
    assert metrics["after"]["parameters"] == sum(p.numel() for p in small.parameters())
    assert small.generate(torch.tensor([[4, 5]]), max_new_tokens=3).shape[1] == 5
    left, posterior = dict(small.named_parameters()), load_posterior(out / "posterior.safetensors")
    assert all(torch.allclose(g.mean, left[n].float(), rtol=1e-2) for n, g in posterior.items())
    said = (out / "report.html").read_text()
    assert "Blocks that are gone" in said and json.loads((out / "prune.json").read_text())["dropped"][0] in said
    again = run(*given[:4], "--out", tmp_path / "no", *SHORT, "--depth")
    assert isinstance(again.exception, OckhamError) and "add --params" in str(again.exception)


@pytest.mark.parametrize("target", [{"keep_share": 0.5}, {}])
def test_a_stopped_job_on_a_folder_goes_on_at_its_last_block(
    source: Path, tmp_path: Path, target: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    def stop(p: PruneProgress) -> None:
        if p.stage == "reduction" and p.done == 2:
            raise Stopped

    # so little data that something may go of a random network
    settings = PruneSettings(damping=Damping(0.1, 0.5), n_data=100.0)
    options = {"windows": (12, 32), "target": target, "settings": settings}
    prune_folder(source, source / "text.txt", tmp_path / "whole", **options)
    with pytest.raises(Stopped):
        prune_folder(source, source / "text.txt", tmp_path / "out", progress=stop, **options)
    blocks = sorted(b for b in (tmp_path / "out" / "work").rglob("?.safetensors") if b.parent.name != "dense")
    written = [b.stat().st_mtime_ns for b in blocks]
    assert len(blocks) == 2
    (tmp_path / "out" / "work" / "notes.txt").write_text("not ours")

    def look(p: PruneProgress) -> None:
        assert p.stage != "curvature"
        if p.stage == "reduction" and p.done == 3:
            assert [b.stat().st_mtime_ns for b in blocks] == written

    reduced, keys = reduction._reduced, []
    monkeypatch.setattr(reduction, "_reduced", lambda key, *given: keys.append(key) or reduced(key, *given))
    prune_folder(source, source / "text.txt", tmp_path / "out", progress=look, **options)
    assert keys[0].startswith("model.layers.2.")  # what was reduced is read, not reduced again
    for name in ("model.safetensors", "posterior.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [p.name for p in (tmp_path / "out" / "work").iterdir()] == ["notes.txt"]


def test_an_encoder_is_judged_by_what_it_says(source: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertModel

    dense = network("bert")
    for p in dense.encoder.parameters():
        p.data.mul_(5 if p.ndim == 2 else 1)  # at its start a BERT says the same of everything
    dense.save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "bert")
    out = tmp_path / "out"
    metrics = prune_folder(tmp_path / "bert", source / "text.txt", out, target={"keep_share": 0.7}, windows=(12, 32))
    assert 0.5 < metrics["after"]["cosine"] < 1 == metrics["before"]["cosine"]
    small = BertModel.from_pretrained(out)
    assert sum(int((p == 0).sum()) for p in small.encoder.parameters() if p.ndim == 2) > 0


def test_what_the_command_refuses(source: Path, tmp_path: Path) -> None:
    hf, text, out = ("--model", f"hf:{source}"), ("--calibrate", source / "text.txt"), ("--out", tmp_path / "out")
    for given, match in [
        ((*hf, *text), "--out"),
        ((*text, *out), "--model hf:FOLDER"),
        ((*hf, *out), "--calibrate"),
        ((*hf, *text, *out, "--epochs", 3), "does not use --epochs"),
        ((*hf, *text, *out, "--params", 2), "--params"),
        ((*hf, *text, *out, "--reconstruct", -1), "reconstruct"),
        ((*hf, *text, *out, "--keep-share", 0.5, "--pattern", "2:4"), "not both"),
        ((*hf, *text, *out, "--keep-share", 1.5), "keep_share"),
        ((*hf, *text, "--out", source), "model itself"),
        ((*hf, *out, "--calibrate", tmp_path / "none.txt"), "cannot read"),
    ]:
        done = run(*given)
        assert isinstance(done.exception, OckhamError) and match in str(done.exception), (given, done.output)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_lacks_weights_is_refused(source: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OckhamError, match="would be random"):
        prune_folder(tmp_path / "model", source / "text.txt", tmp_path / "out", target={"keep_share": 0.5})


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")
def test_the_network_and_its_posterior_lie_in_files_while_they_are_worked_on(source: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def look(p: PruneProgress) -> None:
        seen.append(Path("/proc/self/maps").read_text().count(str(tmp_path / "out" / "work" / "ockham-mapped-")))

    settings = PruneSettings(damping=Damping(0.1, 0.5))
    given = {"windows": (12, 32), "progress": look, "settings": settings, "target": {"keep_share": 0.5}}
    prune_folder(source, source / "text.txt", tmp_path / "out", **given)
    assert min(seen) == max(seen) == len(list(network("llama").parameters()))
    reduced = load_posterior(tmp_path / "out")
    assert all(bool(torch.isfinite(g.precision[g.keep]).all()) for g in reduced.values())


def test_a_folder_of_the_users_keeps_what_is_in_it(source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "other").mkdir(parents=True)
    for name in ("other/job.json", "other/data.csv", "mapped-reads.bam"):
        (mine / name).write_text("{}")
    settings = PruneSettings(damping=Damping(0.1, 0.5), folder=mine)
    given = {"windows": (12, 32), "settings": settings, "target": {"keep_share": 0.5}}
    for overwrite in (False, True):
        prune_folder(source, source / "text.txt", tmp_path / "out", overwrite=overwrite, **given)
        assert {p.name for p in mine.iterdir()} == {"other", "mapped-reads.bam", "weights"}
        assert (mine / "other" / "data.csv").exists() and not (tmp_path / "out" / "work").exists()


def test_the_work_of_several_processes_goes_with_the_rest(source: Path, tmp_path: Path) -> None:
    for name in ("weights", "process-1/weights"):
        (tmp_path / "out" / "work" / name).mkdir(parents=True)
    (tmp_path / "out" / "work" / "process-1" / "weights" / "job.json").write_text("{}")
    given = {"windows": (12, 32), "settings": PruneSettings(damping=Damping(0.1, 0.5)), "target": {"keep_share": 0.5}}
    prune_folder(source, source / "text.txt", tmp_path / "out", **given)
    assert not (tmp_path / "out" / "work").exists()


def test_a_quantized_model_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = verb.huggingface_model

    def quantized(*given: Any, **named: Any) -> Any:
        model: Any = plain(*given, **named)
        model.is_quantized = True
        return model

    monkeypatch.setattr(verb, "huggingface_model", quantized)
    with pytest.raises(OckhamError, match="weights before that"):
        prune_folder(source, source / "text.txt", tmp_path / "out", target={"keep_share": 0.5})
