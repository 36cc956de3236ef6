"""A folder with a language model and its tokenizer, reduced on a text file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from ockham.errors import DataError, OckhamError
from ockham.methods.blocks.job import PruneProgress, PruneSettings
from ockham.methods.blocks.prune import prune_folder, read_calibration, token_measures, token_windows
from ockham.methods.blocks.solve import Damping

from .networks import TOKENS, ids, network

WORDS = [f"w{i}" for i in range(TOKENS - 3)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    network("llama").to(torch.bfloat16).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, len(WORDS), (900,), generator=generator)
    (folder / "text.txt").write_text(" ".join(WORDS[i] for i in drawn.tolist()))
    return folder


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
    assert (tmp_path / "out" / "report.html").exists() and not (tmp_path / "out" / "work").exists()


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
    with pytest.raises(OckhamError, match="cannot be read"):
        prune_folder(tmp_path, tmp_path / "t.txt", tmp_path / "out")
