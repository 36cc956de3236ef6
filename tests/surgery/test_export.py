"""Shrunk networks leave Python: ONNX agrees, `torch.export` agrees, `torch.compile` accepts them."""

from __future__ import annotations

import pytest
import torch

from ockham.surgery import ExportError, export, random_plan, shrink, trace

from .law import difference, outputs, randomise
from .nets import ZOO

pytestmark = pytest.mark.filterwarnings("ignore")


def small_of(name):
    torch.manual_seed(0)
    make, inputs = ZOO[name]
    model, x = make().eval(), inputs()
    randomise(model, torch.Generator().manual_seed(1))
    return shrink(model, random_plan(trace(model, x), 0.5, generator=torch.Generator().manual_seed(0))), x


@pytest.mark.parametrize("name", ["depthwise", "encoder", "nano", "split_parts", "vae"])
def test_onnx_runtime_agrees(name, tmp_path):
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    small, x = small_of(name)
    small.train()
    path = export(small, tmp_path / "small.onnx", x)
    assert small.training
    small.eval()
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (x, torch.cat([x, x, x])):
        (have,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        assert difference(outputs(small, batch), [torch.from_numpy(have)]) <= 1e-4


@pytest.mark.parametrize("name", ["depthwise", "encoder", "nano", "split_parts", "lstm"])
def test_exported_programs_agree(name, tmp_path):
    small, x = small_of(name)
    path = export(small, tmp_path / "small.pt2", x)
    program = torch.export.load(path)
    assert difference(outputs(small, x), outputs(program.module(), x)) <= 1e-5


def test_other_endings_are_refused(tmp_path):
    small, x = small_of("mlp")
    with pytest.raises(ExportError, match=r"\.onnx or \.pt2"):
        export(small, tmp_path / "small.h5", x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["depthwise", "nano", "split_parts"])
def test_torch_compile_agrees(name):
    small, x = small_of(name)
    compiled = torch.compile(small, backend="eager")
    assert difference(outputs(small, x), outputs(compiled, x)) <= 1e-5
