"""The benchmark's networks are what the table says; the two large presets take two steps with random weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ockham.methods.gates.attach import GATE_RULES
from ockham.methods.gates.training import GateCompression
from ockham.run.job import Batches

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZES = {  # learnable values of the networks in the paper's table, by hand
    "mlp-mnist": (1024 + 1) * 100 + 7 * 101 * 100 + 101 * 10,
    "mlp-fashion": (1024 + 1) * 150 + 151 * 150 + 151 * 10,
    "mlp-cifar10": (3072 + 1) * 150 + 5 * 151 * 150 + 151 * 10,
    "lenet-mnist": 61_706,
    "lenet-fashion": 61_706,
    "lenet-cifar10": 76 * 18 + (18 * 25 + 1) * 48 + 1201 * 360 + 361 * 252 + 253 * 10,
    "resnet50-cifar10": 23_508_032 + 2049 * 10,
    "vit-cifar10": 85_798_656 + 769 * 10,
}


@pytest.fixture
def bmrs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bmrs

    yield bmrs
    for name in ("bmrs", "bmrs_networks"):
        sys.modules.pop(name, None)


def test_networks_have_the_published_sizes(bmrs):
    for name, size in SIZES.items():
        with torch.device("meta"):
            model = bmrs.SETTINGS[name].build()
        assert sum(p.numel() for p in model.parameters()) == size, name


def test_weights_load_by_name_and_what_does_not_fit_is_refused(bmrs, tmp_path):
    model = bmrs.ViT(dim=32, depth=1)
    state = {k: torch.full_like(v, 0.5) for k, v in model.state_dict().items()}
    state["head.weight"], state["head.bias"] = torch.zeros(1000, 32), torch.zeros(1000)
    save_file(state, tmp_path / "whole.safetensors")
    assert bmrs.load_weights(model, tmp_path / "whole.safetensors") == ["head.bias", "head.weight"]
    assert float(model.blocks[0].mlp.fc1.weight.detach().min()) == 0.5 != float(model.head.weight.detach().max())
    del state["blocks.0.attn.qkv.weight"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(SystemExit, match=r"lacks blocks\.0\.attn\.qkv\.weight"):
        bmrs.load_weights(model, tmp_path / "part.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gates"), [("resnet50-cifar10", 11_456), ("vit-cifar10", 12 * (3072 + 12))])
def test_large_presets_take_two_steps(bmrs, name, gates):
    """Random weights, an epoch is a step; gates are removed, folded and the small network still runs."""
    torch.manual_seed(0)
    setting = bmrs.SETTINGS[name]
    training, _ = bmrs.training_of(setting, "n-elbo", bmrs.Plan(0, 2, 0, False, Path(), {}))
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 7])
    job = GateCompression(setting.build(), x, Batches(x, y, 2, shuffle=False), training=training, rule=GATE_RULES["n"])
    assert job.gates is not None and job.gates.noise.mean.numel() == gates
    head = next(k for k in job.model.state_dict() if k.endswith(("fc.bias", "head.bias")))
    before = job.model.state_dict()[head].clone()
    infos = list(job)
    assert [i.epoch for i in infos] == [1, 2] and all(0 < i.loss < 30 for i in infos)
    assert infos[0].kl > 0 and sum(infos[1].widths.values()) == gates
    assert not torch.equal(before, job.model.state_dict()[head])
    keep = {k: torch.arange(len(p)) % 4 > 0 for k, p in job.gates.places.items()}
    job.gates.remove(keep)
    small = job.result()
    assert small(x).shape == (2, 10) and sum(p.numel() for p in small.parameters()) < infos[0].parameters
