"""Networks of the transformers library, built from their configurations: nothing is downloaded."""

from __future__ import annotations

import warnings

import pytest
import safetensors as library
import torch
from safetensors import torch as safetensors

import ockham
from ockham import OckhamError, save_pretrained
from ockham.choose.planning import plan
from ockham.surgery import Plan, mask, random_plan, shrink, trace, verify

from .law import difference, outputs, randomise, size, uneven, worst_difference

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = torch.arange(18).reshape(2, 9) % 50
IMAGE = torch.linspace(-2, 2, 2 * 3 * 16 * 16).sin().reshape(2, 3, 16, 16)
TEXT = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
NETS = {
    "Bert": (
        {
            "vocab_size": 50,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        },
        "BertModel",
        {"input_ids": WORDS},
    ),
    "DistilBert": (
        {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
        "DistilBertModel",
        {"input_ids": WORDS},
    ),
    "GPT2": (
        {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False},
        "GPT2LMHeadModel",
        {"input_ids": WORDS},
    ),
    "Llama": (
        {
            **TEXT,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 64,
            "tie_word_embeddings": True,
            "use_cache": False,
        },
        "LlamaForCausalLM",
        {"input_ids": WORDS},
    ),
    "ViT": (
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "image_size": 16,
            "patch_size": 4,
        },
        "ViTModel",
        {"pixel_values": IMAGE},
    ),
    "T5": (
        {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "use_cache": False},
        "T5ForConditionalGeneration",
        {"input_ids": WORDS, "decoder_input_ids": WORDS},
    ),
    "Swin": (
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        "SwinModel",
        {"pixel_values": IMAGE},
    ),
    "ConvNext": (
        {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2, "patch_size": 2},
        "ConvNextModel",
        {"pixel_values": IMAGE},
    ),
    "ResNet": (
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2]},
        "ResNetForImageClassification",
        {"pixel_values": IMAGE},
    ),
}
MUST = {
    "Bert": {4: 2, 64: 2},
    "DistilBert": {4: 2, 64: 2},
    "GPT2": {4: 2, 128: 2},
    "Llama": {4: 2, 64: 2},
    "ViT": {4: 2, 64: 2},
    "T5": {4: 3, 64: 4},
    "Swin": {2: 2, 4: 2, 64: 2, 128: 2},
    "ConvNext": {32: 2, 64: 2},
    "ResNet": {8: 1, 16: 1, 32: 1, 4: 4},
}  # number of groups by number of units: heads and hidden widths of every layer


def build(name):
    config, kind, inputs = NETS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**config)).eval()
    randomise(model, torch.Generator().manual_seed(1))
    return model, inputs


@pytest.mark.parametrize("name", NETS)
def test_masked_equals_shrunk(name):
    model, inputs = build(name)
    groups = trace(model, inputs)
    found: dict[int, int] = {}
    for group in groups:
        found[group.size] = found.get(group.size, 0) + 1
    for units, number in MUST[name].items():
        assert found.get(units, 0) >= number, (units, found)
    for seed, ratio in enumerate((0.1, 0.3, 0.5, 0.7)):
        assert worst_difference(model, groups, inputs, ratio=ratio, seed=seed)[0] <= 1e-5, ratio


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_masked_equals_shrunk_twenty_seeds(name):
    model, inputs = build(name)
    groups = trace(model, inputs)
    for ratio in (0.1, 0.3, 0.5, 0.7):
        for seed in range(20):
            assert worst_difference(model, groups, inputs, ratio=ratio, seed=seed)[0] <= 1e-5, (ratio, seed)


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_tied_embeddings_stay_tied_and_the_plan_replays_on_a_fresh_model(name):
    model, inputs = build(name)
    plan = random_plan(trace(model, inputs), 0.5, generator=torch.Generator().manual_seed(0))
    small = shrink(model, plan)
    assert small.get_input_embeddings().weight is small.get_output_embeddings().weight
    assert size(small) < 0.8 * size(model)
    fresh = shrink(build(name)[0], Plan.from_json(plan.to_json()))
    fresh.load_state_dict(small.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert verify(mask(model, plan), fresh, inputs) <= 1e-5


def halved(groups, width, parts):
    """A plan that leaves of every group of one width the given numbers of units, group after group."""
    chosen = [g for g in groups if g.size == width]
    keep = {g.id: torch.arange(width) < parts[i % len(parts)] for i, g in enumerate(chosen)}
    return plan(groups, keep)


@pytest.mark.parametrize("name", ["Bert", "Llama", "ViT"])
def test_the_configuration_describes_widths_that_are_alike_in_all_layers(name, tmp_path):
    model, inputs = build(name)
    cut = halved(trace(model, inputs), 64, [40])
    small = shrink(model, cut)
    assert small.config.intermediate_size == 40 and model.config.intermediate_size == 64
    folder = save_pretrained(small, tmp_path / "hub", plan=cut, facts={"accuracy": "97.1 %"})
    again = type(model).from_pretrained(folder).eval()
    assert difference(outputs(small, inputs), outputs(again, inputs)) == 0
    card = (folder / "README.md").read_text()
    assert "accuracy: 97.1 %" in card and "64 -> 40" in card
    assert f'{type(model).__name__}.from_pretrained(".")' in card
    assert Plan.from_json((folder / "plan.json").read_text()).removed == cut.removed


@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_a_configuration_that_cannot_describe_the_widths_stays_that_of_the_model(name, tmp_path):
    model, inputs = build(name)
    cut = halved(trace(model, inputs), 64, [40, 24])
    small = shrink(model, cut)
    assert small.config.intermediate_size == 64
    folder = save_pretrained(small, tmp_path / "hub", plan=cut)
    fresh = shrink(build(name)[0], Plan.from_json((folder / "plan.json").read_text()))
    safetensors.load_model(fresh, folder / "model.safetensors")
    assert difference(outputs(small, inputs), outputs(fresh, inputs)) == 0
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) == 3 and "from_pretrained" not in code
    code = code.replace("(...)", "(config)").replace('"model', f'"{folder}/model').replace('"plan', f'"{folder}/plan')
    scope = {type(model).__name__: type(model), "config": model.config, "ockham": ockham, "safetensors": library}
    exec(code, scope)
    assert difference(outputs(small, inputs), outputs(scope["model"].eval(), inputs)) == 0


def test_a_hub_folder_without_configuration_or_plan(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 2))
    folder = save_pretrained(net, tmp_path / "plain")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "model.safetensors"]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OckhamError, match="cannot write"):
        save_pretrained(net, blocked / "folder")


def test_the_stream_of_an_encoder_stays_since_it_is_among_the_results():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(**TEXT, **sizes, **heads, max_position_embeddings=32, pad_token_id=2)
    given = {"input_ids": WORDS, "decoder_input_ids": WORDS[:, :4]}
    for kind in (transformers.BartModel, transformers.BartForConditionalGeneration):
        net = kind(config).eval()
        small = shrink(net, uneven(trace(net, given), 0.5, 0))
        assert small(**given).encoder_last_hidden_state.shape == net(**given).encoder_last_hidden_state.shape
