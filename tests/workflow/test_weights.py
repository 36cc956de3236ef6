"""Weights as people have them: every form gives the same numbers, and what was done to the names is said."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ockham
from ockham.core.seal import weights_fingerprint
from ockham.errors import OckhamError, ResultError
from ockham.run.folder import save_network
from ockham.run.weights import fitted, huggingface_model, read_weights
from ockham.zoo.networks import NETWORKS


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    made(torch.randn(5, 1, 8, 8))
    return made


def same(found: dict[str, torch.Tensor], expected: nn.Module) -> bool:
    own = expected.state_dict()
    return found.keys() == own.keys() and all(torch.equal(found[n], own[n]) for n in own)


FORMS = {
    "w.safetensors": lambda m, f: save_file(m.state_dict(), f),
    "w.npz": lambda m, f: np.savez(f, **{n: t.numpy() for n, t in m.state_dict().items()}),
    "deflated.npz": lambda m, f: np.savez_compressed(f, **{n: t.numpy() for n, t in m.state_dict().items()}),
    "w.pt": lambda m, f: torch.save(m.state_dict(), f),
    "no_ending": lambda m, f: torch.save(m.state_dict(), f),
    "checkpoint.ckpt": lambda m, f: torch.save({"epoch": 3, "state_dict": m.state_dict()}, f),
    "trainer.pth": lambda m, f: torch.save({"model_state_dict": m.state_dict(), "optimizer": {"lr": 0.1}}, f),
    "old.th": lambda m, f: torch.save(
        {"state_dict": m.state_dict(), "best": 91.7}, f, _use_new_zipfile_serialization=False
    ),
    "network.safetensors": lambda m, f: save_network(m, f, builder="user"),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_numbers(tmp_path: Path, name: str) -> None:
    FORMS[name](net(), tmp_path / name)
    state, notes = fitted(net(1), read_weights(tmp_path / name))
    assert same(state, net()) and notes == ()
    if name == "network.safetensors":
        assert same(read_weights(tmp_path), net())


def test_a_folder_of_hugging_face_whole_or_in_shards(tmp_path: Path) -> None:
    state = net().state_dict()
    for number in range(2):
        save_file(
            {n: t for i, (n, t) in enumerate(state.items()) if i % 2 == number}, tmp_path / f"{number}.safetensors"
        )
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: f"{i % 2}.safetensors" for i, n in enumerate(state)}}))
    assert same(read_weights(tmp_path), net())
    for wrong, why in (
        ("../0.safetensors", "damaged"),
        ("3.safetensors", "not there"),
        ("1.safetensors", "which lacks it"),
    ):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(state, "0.safetensors") | {"0.bias": wrong}}))
        if wrong == "1.safetensors":
            save_file({"else": torch.ones(1)}, tmp_path / wrong)
        with pytest.raises(ResultError, match=why):
            read_weights(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    assert same(read_weights(tmp_path), net())


@pytest.mark.parametrize("worn", ["module.", "model.", "_orig_mod.", "module._orig_mod.", "model.module.model."])
def test_prefixes_are_taken_off_or_put_on_and_said(worn: str) -> None:
    named = {worn + n: t for n, t in net().state_dict().items()}
    state, notes = fitted(net(1), named)
    assert same(state, net()) and f"prefix {worn!r} was taken off" in notes[0]
    wrapped = nn.ModuleDict({"model": net(1)})
    state, notes = fitted(wrapped, net().state_dict())
    assert same(state, nn.ModuleDict({"model": net()})) and "put before" in notes[0]


def test_what_lacks_the_prefix_is_named() -> None:
    named = {f"model.{n}": t for n, t in net().state_dict().items()} | {"loss.weight": torch.ones(2)}
    state, notes = fitted(net(1), named)
    assert same(state, net()) and "loss.weight" in notes[0]


def test_a_network_with_submodules_called_model_keeps_its_names() -> None:
    own = nn.ModuleDict({"model": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    state, notes = fitted(copy.deepcopy(own), own.state_dict())
    assert notes == () and same(state, own)


def test_missing_counts_of_batches_start_at_zero_and_nothing_else_may_be_missing() -> None:
    whole = net().state_dict()
    state, notes = fitted(net(), {n: t for n, t in whole.items() if "num_batches" not in n})
    assert int(state["1.num_batches_tracked"]) == 0 and "num_batches_tracked" in notes[0]
    with pytest.raises(OckhamError, match=r"missing 1\.running_mean"):
        fitted(net(), {n: t for n, t in whole.items() if "running_mean" not in n})
    with pytest.raises(OckhamError, match="unknown extra"):
        fitted(net(), whole | {"extra": torch.ones(1)})


def test_doubles_are_rounded_and_said_integers_are_not() -> None:
    doubles = {n: t.double() if t.is_floating_point() else t for n, t in net().state_dict().items()}
    state, notes = fitted(net(1), doubles)
    assert same(state, net()) and "rounded from torch.float64 to torch.float32" in notes[0]
    with pytest.raises(OckhamError, match=r"other dtypes 0\.weight: torch\.int64 for torch\.float32"):
        fitted(net(), net().state_dict() | {"0.weight": torch.ones(4, 1, 3, 3, dtype=torch.int64)})


def test_tied_weights_may_stand_once() -> None:
    tied = NETWORKS["digits_mlp"]()
    first, last = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    last.weight = first.weight
    tied = nn.ModuleDict({"first": first, "last": last})
    state, _ = fitted(tied, {"first.weight": torch.ones(5, 3)})
    assert torch.equal(state["last.weight"], torch.ones(5, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    state = net().state_dict()
    state["3.bias"] = torch.tensor([1.0, value])
    with pytest.raises(OckhamError, match=r"3\.bias \(1 of 2\)"):
        fitted(net(), state)


def test_buffers_may_be_infinite_but_not_nan() -> None:
    model = net()
    model.register_buffer("causal", torch.tensor([0.0, -torch.inf]))
    fitted(model, model.state_dict())
    with pytest.raises(OckhamError, match="causal"):
        fitted(model, model.state_dict() | {"causal": torch.tensor([0.0, torch.nan])})


class Bomb:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.place,))


def test_nothing_is_executed(tmp_path: Path) -> None:
    for name, write in (("a.pt", torch.save), ("b.pt", lambda x, f: f.write_bytes(pickle.dumps(x)))):
        write({"w": Bomb(tmp_path / "boom")}, tmp_path / name)
        with pytest.raises(ResultError, match=rf"{name}.*weights_only.*save_file"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "boom").exists()


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(10**12)}, tmp_path / "w.pt")
    with pytest.raises(ResultError, match="claims more"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize(("content", "why"), [({"w": 3}, "no dense tensor"), ([1], "no weights"), ({}, "no weights")])
def test_files_without_weights_are_refused(tmp_path: Path, content: object, why: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ResultError, match=why):
        read_weights(tmp_path / "w.pt")


def test_a_missing_file_an_empty_folder_and_too_much_are_named(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"nowhere.*no such file"):
        read_weights(tmp_path / "nowhere")
    with pytest.raises(ResultError, match=r"model\.safetensors"):
        read_weights(tmp_path)
    save_file(net().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ResultError, match="allowed by max_bytes"):
        read_weights(tmp_path / "w.safetensors", max_bytes=100)


def test_fingerprints_tell_weights_apart() -> None:
    state = net().state_dict()
    assert weights_fingerprint(state) == weights_fingerprint(dict(reversed(state.items())))
    other = {n: t.clone() for n, t in state.items()}
    other["0.bias"][0] = torch.nextafter(other["0.bias"][0], torch.tensor(9.0))
    assert len({weights_fingerprint(s) for s in (state, other, None)}) == 3
    bent = {n: t.reshape(-1) for n, t in state.items()}
    assert weights_fingerprint(bent) != weights_fingerprint(state)


def test_a_model_of_hugging_face_by_its_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    torch.manual_seed(0)
    made = transformers.BertForSequenceClassification(config).eval()
    made.save_pretrained(tmp_path)
    found = huggingface_model(tmp_path)
    assert type(found) is type(made) and same(found.state_dict(), made)
    settings = json.loads((tmp_path / "config.json").read_text())
    for name in ("os.system", "AutoModel", "__class__", 3):
        (tmp_path / "config.json").write_text(json.dumps(settings | {"architectures": [name]}))
        with pytest.raises(ResultError, match="architecture"):
            huggingface_model(tmp_path)


def test_loading_refuses_what_would_lose_digits_and_takes_what_does_not(tmp_path: Path) -> None:
    save_network(nn.Linear(3, 2).double(), tmp_path / "network.safetensors", builder="user")
    with pytest.raises(OckhamError, match=r"weight: torch\.float64 for torch\.float32"):
        ockham.load(tmp_path, model=nn.Linear(3, 2))
    half = nn.Linear(3, 2).half()
    save_network(half, tmp_path / "network.safetensors", builder="user")
    assert torch.equal(ockham.load(tmp_path, model=nn.Linear(3, 2)).weight, half.weight.float())


def test_a_network_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    made = nn.Linear(3, 2)
    with torch.no_grad():
        made.weight[0, 0] = torch.nan
    with pytest.raises(OckhamError, match=r"weight \(1 of 6\)"):
        save_network(made, tmp_path / "network.safetensors", builder="user")
    assert not list(tmp_path.iterdir())
