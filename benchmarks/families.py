"""Surgery on architectures nobody here wrote: trace, uneven random plans, shrink, and compare with the zeroed network.

The right answer never comes from Ockham: the original network runs at full size with zeros for all that a plan takes out.
Every network has run once before it is traced, as in use. For three plans, in which every group loses a share of its own
between 0 and 90 %, outputs are compared in evaluation and in training mode, on a second batch, and on padded masks.

    python benchmarks/families.py [NAME ...] [--list] [--limit 240] [--again]

What was recorded stays as it is unless it is named or ``--again`` is given, so that a run can be taken up where it ended.

Networks of transformers are built from small configurations; those of timm need the package ``timm`` (torchvision is not
needed: what timm imports of it is stood in for). Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import enum
import importlib.abc
import importlib.machinery
import json
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ockham
from harness import Benchmark, Option, Record, markdown, write
from ockham.choose.prices import macs_after
from ockham.surgery.copies import difference, still, tensors_of, to_double
from ockham.surgery.costs import cost
from ockham.surgery.groups import plan_masks

SEEDS = (0, 1, 2)
TOLERANCE = 1e-4
REPEATED = ("not built", "too slow", "raw exception", "wrong", "wrong count")
"""Verdicts that are not to last: such an architecture is tried again."""

TIMM = """
resnet10t resnet14t resnet18 resnetv2_18 resnext26ts seresnext26ts ecaresnet26t botnet26t_256 halonet26t lambda_resnet26t
res2net50_14w_8s res2next50 skresnet18 wide_resnet50_2 resnest14d cspresnet50 cspdarknet53 cs3darknet_s darknetaa53
densenet121 dla34 dpn48b dm_nfnet_f0 nf_resnet26 nf_regnet_b0 regnetx_002 regnety_002 repvgg_a0 mobileone_s0 vgg11_bn vgg11
mobilenetv1_100 mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small mnasnet_050 efficientnet_lite0 efficientnet_b0
tf_efficientnetv2_b0 tinynet_e fbnetc_100 fbnetv3_b spnasnet_100 hardcorenas_a mixnet_s rexnet_100 ghostnet_050 ghostnetv2_100
lcnet_035 semnasnet_050 hrnet_w18_small inception_v3 inception_v4 inception_resnet_v2 inception_next_atto xception41
hgnet_tiny hgnetv2_b0 selecsls42 vovnet39a ese_vovnet19b_dw convnext_atto convnextv2_atto convnext_femto_ols focalnet_tiny_srf
convmixer_768_32 poolformer_s12 poolformerv2_s12 convformer_s18 caformer_s18 edgenext_xx_small fastvit_t8
repvit_m0_9 starnet_s1 mambaout_femto rdnet_tiny shvit_s1 swiftformer_xs efficientformer_l1 efficientformerv2_s0 levit_128s
efficientvit_b0 efficientvit_m0 mobilevit_xxs mobilevitv2_050 tiny_vit_5m_224 vit_tiny_patch16_224 vit_relpos_small_patch16_224
vit_srelpos_small_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224 beit_base_patch16_224
eva02_tiny_patch14_224 cait_xxs24_224 xcit_nano_12_p16_224 crossvit_tiny_240 pit_ti_224 convit_tiny visformer_tiny coat_tiny
coatnet_pico_rw_224 maxvit_pico_rw_256 mvitv2_tiny pvt_v2_b0 twins_svt_small swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
swin_s3_tiny_224 nest_tiny gcvit_xxtiny davit_tiny hiera_tiny_224 volo_d1_224 tnt_s_legacy_patch16_224 mixer_s32_224
gmlp_ti16_224 resmlp_12_224 sequencer2d_s samvit_base_patch16_224 nextvit_small
""".split()

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "type_vocab_size": 2, "head_dim": 8,
}  # fmt: skip
IMAGE = {"image_size": 32, "patch_size": 4, "num_labels": 5, "num_channels": 3}
PAIR = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
ROUTED = {"n_routed_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}  # fmt: skip
DECODERS = {
    "llama": {}, "mistral": {"sliding_window": 6}, "qwen2": {}, "qwen3": {}, "gemma": {}, "gemma2": {}, "phi": {}, "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4}, "gpt_neox": {},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4}, "falcon": {}, "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "stablelm": {}, "olmo": {}, "olmo2": {}, "cohere": {}, "granite": {}, "starcoder2": {}, "persimmon": {}, "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "biogpt": {}, "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}, "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "smollm3": {}, "helium": {}, "glm": {}, "nemotron": {}, "exaone4": {},
    "mixtral": {"num_local_experts": 4}, "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}, "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4}, "phimoe": {"num_local_experts": 4}, "mamba": {"state_size": 4}, "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "falcon_mamba": {"state_size": 4}, "rwkv": {"attention_hidden_size": 32}, "recurrent_gemma": {"lru_width": 32, "num_hidden_layers": 3}, "jamba": {"num_experts": 4, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_state": 8, "mamba_n_groups": 1}, "gpt_oss": {"num_local_experts": 4}, "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 2, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}}, "lfm2": {},
    "glm4": {}, "olmo3": {}, "gemma3_text": {}, "seed_oss": {}, "arcee": {}, "ernie4_5": {}, "hunyuan_v1_dense": {}, "apertus": {}, "nanochat": {}, "cohere2": {}, "diffllama": {}, "bitnet": {},
    "vaultgemma": {}, "gpt_neox_japanese": {}, "doge": {}, "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2}, "dots1": {**ROUTED}, "ernie4_5_moe": {"moe_num_experts": 4, "moe_intermediate_size": 24, "moe_k": 2},
    "deepseek_v2": {**ROUTED, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}, "minimax": {"num_local_experts": 4}, "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 24}, "jetmoe": {"num_local_experts": 4, "kv_channels": 8}, "granitemoehybrid": {"num_local_experts": 4, "mamba_n_heads": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 24},
    "zamba2": {"mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 8, "num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid"], "attention_head_dim": 16, "attention_hidden_size": 64}, "lfm2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts_per_tok": 2, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
}  # fmt: skip
ENCODERS = {
    "bert": {}, "roberta": {}, "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}, "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16}, "deberta": {}, "deberta-v2": {}, "mpnet": {}, "camembert": {}, "xlm-roberta": {}, "funnel": {"d_model": 32, "d_inner": 48, "n_head": 4, "d_head": 8, "block_sizes": [1, 1]},
    "convbert": {"embedding_size": 32}, "squeezebert": {"embedding_size": 32}, "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32, "embedding_size": 32, "num_feedforward_networks": 2},
    "ernie": {}, "nystromformer": {}, "roformer": {}, "megatron-bert": {}, "layoutlm": {"max_2d_position_embeddings": 64}, "esm": {"mask_token_id": 3}, "modernbert": {}, "fnet": {}, "ibert": {}, "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "nomic_bert": {}, "eurobert": {}, "data2vec-text": {}, "rembert": {"input_embedding_size": 16, "output_embedding_size": 16}, "canine": {"num_hash_buckets": 128}, "lilt": {"hidden_size": 48, "max_2d_position_embeddings": 64},
    "longformer": {"attention_window": 4}, "big_bird": {"attention_type": "original_full"}, "splinter": {}, "luke": {"entity_vocab_size": 10, "entity_emb_size": 16}, "xmod": {"languages": ["en_XX"], "default_language": "en_XX"}, "roberta-prelayernorm": {},
    "flaubert": {"emb_dim": 32, "n_layers": 2, "n_heads": 4}, "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4}, "modernbert-decoder": {}, "bert-generation": {}, "mra": {}, "yoso": {}, "tapas": {}, "visual_bert": {}, "xlm-roberta-xl": {},
}  # fmt: skip
SEQUENCE = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, "bart": {}, "mbart": {}, "pegasus": {}, "marian": {}, "blenderbot": {},
    "m2m_100": {}, "longt5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, "umt5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, "plbart": {},
}  # fmt: skip
IMAGES = {
    "vit": {}, "deit": {"architectures": ["DeiTForImageClassification"]}, "beit": {}, "dinov2": {}, "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}, "swinv2": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, "convnextv2": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, "resnet": {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]},
    "regnet": {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "groups_width": 8}, "mobilenet_v1": {"depth_multiplier": 0.25}, "mobilenet_v2": {"depth_multiplier": 0.35}, "segformer": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_attention_heads": [1, 2], "num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]},
    "poolformer": {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}, "cvt": {"embed_dim": [8, 16, 16], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}, "pvt_v2": {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2]}, "levit": {"architectures": ["LevitForImageClassification"], "image_size": 64, "patch_size": 16, "hidden_sizes": [16, 24, 32], "key_dim": [4, 4, 4], "depths": [1, 1, 1], "num_attention_heads": [2, 3, 4]},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320}, "vit_msn": {}, "ijepa": {}, "focalnet": {"embed_dim": 16, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]}, "hiera": {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "num_query_pool": 1, "image_size": [64, 64], "patch_size": [7, 7]}, "bit": {"num_groups": 8, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}, "yolos": {"image_size": [32, 32], "num_detection_tokens": 4}, "dpt": {},
}  # fmt: skip


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for torchvision, whose transforms timm imports and never uses here."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Say that every module of torchvision is here."""
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None
        )

    def create_module(self, spec: Any) -> types.ModuleType:
        """Return a module each of whose names is an empty class."""
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: _nothing(name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing."""


def _nothing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name == "InterpolationMode":
        return enum.Enum(name, "NEAREST BILINEAR BICUBIC BOX HAMMING LANCZOS NEAREST_EXACT")
    return "0.99.0" if name == "version" else type(name, (nn.Module,), {})


Make = Callable[[], tuple[nn.Module, list[Any]]]


def architectures() -> Iterator[tuple[str, Make]]:
    """Yield name and a maker of (network, inputs: first for trace, the others to compare on)."""
    for kind, table in (("decoder", DECODERS), ("encoder", ENCODERS), ("seq2seq", SEQUENCE), ("image", IMAGES)):
        for name, own in table.items():
            yield f"{kind}:{name}", lambda k=kind, n=name, o=own: _transformer(k, n, o)
    for name in TIMM:
        yield f"timm:{name}", lambda n=name: _timm(n)


def _timm(name: str) -> tuple[nn.Module, list[Any]]:
    try:
        import torchvision  # noqa: F401
    except ImportError:
        sys.meta_path.append(_StandIn())
    import timm

    side = 64 if name.startswith(SMALL) else 224
    sized = {"img_size": 64} if name.startswith(SIZED) else {}
    side = 64 if sized else side
    net = timm.create_model(name, num_classes=7, **sized)
    if not sized and side != 64:
        side = net.pretrained_cfg.get("input_size", (3, 224, 224))[-1]
        if not net.pretrained_cfg.get("fixed_input_size"):
            side = net.pretrained_cfg.get("min_input_size", (3, side, side))[-1]
    return net, [(torch.randn(2, 3, side, side),), (torch.randn(3, 3, side, side),)]


MIXTURES = (
    "moe",
    "mixtral",
    "gpt_oss",
    "dbrx",
    "flex_olmo",
    "dots1",
    "deepseek",
    "minimax",
    "jamba",
    "granitemoehybrid",
)
HYBRIDS = ("recurrent_gemma", "bamba", "lfm2", "zamba2", "qwen3_next", "diffllama")
RECURRENT = ("mamba", "rwkv")
MIXED = (
    "botnet halonet lambda coat maxvit mobilevit efficientformer levit efficientvit edgenext fastvit repvit tiny_vit cvt "
    "nextvit caformer visformer convit shvit swiftformer mvit"
).split()
PLAIN = (
    "vit deit beit eva02 cait xcit crossvit pit_ twins swin nest gcvit davit hiera volo tnt mixer gmlp resmlp sequencer "
    "samvit pvt dinov2 segformer ijepa yolos dpt focalnet poolformer metaformer"
).split()


def family_of(name: str) -> str:
    """Return the family under which an architecture counts in the table of means."""
    kind, _, own = name.partition(":")
    if kind == "decoder":
        for family, names in (("mixture of experts", MIXTURES), ("hybrid", HYBRIDS), ("recurrent", RECURRENT)):
            if any(n in own for n in names):
                return family
        return "decoder"
    if kind in ("encoder", "seq2seq"):
        return kind
    for family, names in (("hybrid vision", MIXED), ("vision transformer", PLAIN)):
        if own.startswith(tuple(names)):
            return family
    return "convolutional"


SMALL = tuple(
    """resnet resnext seresnext ecaresnet res2ne skresnet wide_ resnest csp cs3 darknet densenet dla dpn dm_ nf_ regnet repvgg
    mobileone vgg mobilenet mnasnet efficientnet tf_eff tinynet fbnet spnas hardcore mixnet rexnet ghost lcnet semnas hrnet
    inception_next hgnet selec vovnet ese_ convnext convmixer poolformer starnet mambaout rdnet repvit fastvit edgenext
    convformer caformer metaformer efficientvit_b swiftformer""".split()
)
SIZED = ("vit_tiny", "deit3", "deit_", "swin_tiny", "mixer", "gmlp", "resmlp", "cait", "beit")


def _transformer(kind: str, name: str, own: dict[str, Any]) -> tuple[nn.Module, list[Any]]:
    here = Path(__file__).resolve().parent  # a benchmark beside this one is called transformers
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != here]
    if not hasattr(sys.modules.get("transformers"), "AutoConfig"):
        sys.modules.pop("transformers", None)
    import transformers as library

    config = library.AutoConfig.for_model(name)
    fixed = {k for k in TEXT if isinstance(getattr(type(config), k, None), property)}
    fixed |= {k for k, other in config.attribute_map.items() if other in own}
    sizes = {**TEXT, **(IMAGE if kind == "image" else {}), **(PAIR if kind == "seq2seq" else {})}
    known = {k: v for k, v in sizes.items() if hasattr(config, k) and k not in fixed}
    config = library.AutoConfig.for_model(name, **{**known, **own})
    if kind == "image":
        net = (
            library.AutoModelForImageClassification.from_config(config)
            if name not in ("yolos", "dpt")
            else library.AutoModel.from_config(config)
        )
        side = 64 if name in ("levit", "hiera") else 32
        return net, [{"pixel_values": torch.randn(n, 3, side, side)} for n in (2, 3)]
    makers = {
        "decoder": ["CausalLM"],
        "seq2seq": ["Seq2SeqLM"],
        "encoder": ["MaskedLM", "SequenceClassification", "QuestionAnswering", "CausalLM", "PreTraining"],
    }[kind]
    makers = [
        f"AutoModelFor{m}" for m in makers
    ]  # a network for a task: the hidden states of a bare one are its result
    maker = next(m for m in makers if type(config) in getattr(library, m)._model_mapping)
    net = getattr(library, maker).from_config(config)

    def ids(rows: int, length: int) -> dict[str, Tensor]:
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[-1, -3:] = 0
        given = {"input_ids": torch.randint(4, 60, (rows, length)), "attention_mask": mask}
        if name in ("mamba", "mamba2", "falcon_mamba", "rwkv", "fnet"):
            del given["attention_mask"]
        return given | ({"decoder_input_ids": torch.randint(4, 60, (rows, 6))} if kind == "seq2seq" else {})

    return net, [ids(2, 16), ids(3, 16), ids(2, 24)]


def call(net: nn.Module, inputs: Any, *, training: bool = False) -> list[Tensor]:
    """Return the outputs, without randomness."""
    net.train(training)
    with torch.no_grad(), still(net), torch.random.fork_rng():
        torch.manual_seed(0)
        return tensors_of(net(**inputs) if isinstance(inputs, dict) else net(*inputs))


def zeroed(net: nn.Module, plan: ockham.Plan) -> nn.Module:
    """Return the network at full size with zeros for all the plan takes out of its parameters."""
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            for dim, gone in plan.cuts.get(name, {}).items():
                parameter.index_fill_(dim, torch.tensor(sorted(gone)), 0.0)
            if name in plan.lost:  # with a whole branch
                parameter.zero_()
    return twin


def shaken(net: nn.Module) -> nn.Module:
    """Randomise what starts at zero or one: biases, scales, statistics of norms, whole matrices (heads of mixers)."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.copy_(0.3 * torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.is_floating_point() and (
                parameter.ndim < 2 or (parameter.numel() > 0 and bool(parameter.min() == parameter.max()))
            ):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net


def uneven(groups: ockham.Groups, generator: torch.Generator, most: float = 0.9) -> ockham.Plan:
    """Return a plan in which every group loses a share of its own."""
    keep = {}
    for group in groups:
        mask = torch.ones(group.size, dtype=torch.bool)
        count = int(float(torch.rand((), generator=generator)) * most * group.size)
        mask[torch.randperm(group.size, generator=generator)[: min(count, group.size - 1)]] = False
        keep[group.id] = mask
    return plan_masks(groups, keep)


def examine(make: Make) -> Record:
    """Return what happened to one architecture."""
    torch.manual_seed(0)
    try:
        net, inputs = make()
        shaken(net)
        call(net, inputs[0])
    except Exception as error:
        return {"verdict": "not built", "why": f"{type(error).__name__}: {str(error)[:200]}"}
    try:
        found = _examined(net, inputs)
        if found["verdict"] == "wrong":  # or rounded: float64 tells
            wide = [to_double(given) for given in inputs]
            found["worst_float64"] = _examined(net.double(), wide)["worst"]
            found["verdict"] = "ok" if found["worst_float64"] <= 1e-9 else "wrong"
        return found
    except ockham.OckhamError as error:
        return {"verdict": "refused", "why": str(error)[:300]}
    except Exception as error:
        return {"verdict": "raw exception", "why": f"{type(error).__name__}: {str(error)[:300]}"}


def _examined(net: nn.Module, inputs: list[Any]) -> dict[str, Any]:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    start = time.process_time()
    groups = ockham.trace(net, inputs[0])
    seconds = time.process_time() - start
    facts: dict[str, Any] = {
        "groups": len(groups),
        "units": sum(g.size for g in groups),
        "trace_cpu_s": round(seconds, 2),
    }
    if not len(groups):
        return {"verdict": "refused", "why": next(iter(groups.frozen.values()), "")[:300], **facts}
    total = sum(p.numel() for p in net.parameters())
    worst = 0.0
    for seed in SEEDS:
        plan = uneven(groups, torch.Generator().manual_seed(seed))
        small, full = ockham.shrink(net, ockham.Plan.from_json(plan.to_json())), zeroed(net, plan)
        for given in inputs:
            worst = max(worst, difference(call(full, given), call(small, given)))
        try:
            expected = call(copy.deepcopy(full), inputs[0], training=True)
        except Exception:
            continue
        worst = max(worst, difference(expected, call(small, inputs[0], training=True)))
    plan = ockham.random_plan(groups, 0.6, generator=torch.Generator().manual_seed(0))
    cut = ockham.shrink(net, plan)
    planned, counted = macs_after(net, plan, inputs[0]), cost(cut, inputs[0]).macs
    if planned != counted:
        return {"verdict": "wrong count", "why": f"{planned} multiply-accumulates planned, {counted} counted", **facts}
    facts["kept_at_60"] = round(sum(p.numel() for p in cut.parameters()) / total, 3)
    changed = [k for k, v in net.state_dict().items() if not torch.equal(v, before[k]) and "num_batches" not in k]
    facts["worst"] = float(f"{worst:.2g}")
    if changed:
        return {"verdict": "changed the original", "why": ", ".join(changed[:3]), **facts}
    return {"verdict": "ok" if worst <= TOLERANCE else "wrong", **facts}


class _TooSlowError(BaseException):
    """The limit of CPU time is over; not an Exception, so that nobody takes it for one of the network."""


def _stop(*_: Any) -> None:
    raise _TooSlowError


def networks(args: argparse.Namespace) -> None:
    """Try the architectures that are named, or all that have no lasting verdict."""
    if args.list:
        print(*(name for name, _ in architectures()), sep="\n")
    else:
        tried(BENCH, "families", args, examine, seeds=list(SEEDS), most=0.9)


def tried(
    bench: Benchmark, stem: str, args: argparse.Namespace, look: Callable[[Make], Record], **arguments: Any
) -> None:
    """Look at the architectures that are named, or at all that have no lasting verdict; one row each."""
    signal.signal(signal.SIGPROF, _stop)
    rows = bench.records(stem).get(stem, {})
    for name, make in architectures():
        if name in args.names or not args.names:
            if name in rows and (args.names or args.again or rows[name]["verdict"] in REPEATED):
                rest = {k: v for k, v in bench.records(stem)[stem].items() if k != name}
                write(bench.path(stem), json.dumps(rest, indent=1) + "\n")
            bench.record(stem, lambda m=make: limited(lambda: look(m), args.limit), row=name, **arguments)


def limited(look: Callable[[], Record], seconds: int) -> Record:
    """Return what happened to one architecture within some seconds of CPU time."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return look()
    except _TooSlowError:
        return {"verdict": "too slow"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def pages() -> dict[str, list[str]]:
    """Return the results as tables in Markdown."""
    rows = dict(sorted(BENCH.records("families").get("families", {}).items()))
    counts: dict[str, int] = {}
    kept: dict[str, list[float]] = {}
    for name, row in rows.items():
        counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
        if "kept_at_60" in row:
            kept.setdefault(family_of(name), []).append(row["kept_at_60"])
    said = ", ".join(f"{n} {v}" for v, n in sorted(counts.items(), key=lambda c: -c[1]))
    means = [
        [family, len(own), f"{sum(own) / len(own):.3f}", f"{max(own):.3f}"] for family, own in sorted(kept.items())
    ]
    cells = ("verdict", "groups", "kept_at_60", "worst", "trace_cpu_s", "why")
    every = [
        [name, *(str(row.get(k, "")).replace("|", "/").replace("\n", " ") for k in cells)] for name, row in rows.items()
    ]
    return {
        "families.md": [
            "# Families", "", f"{BENCH.written()}.", "", f"{len(rows)} architectures: {said}.", "",
            *markdown("family | architectures | parameters kept at a 60 % cut, mean | largest", means), "",
            *markdown("architecture | verdict | groups | kept at a 60 % cut | worst difference | trace, CPU s | why", every),
        ]
    }  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Run what is asked for; fail where a network came out wrong or an error was no message of ours."""
    networks(args)
    rows = {} if args.list else BENCH.records("families").get("families", {})
    bad = [
        f"{name}: {row['verdict']}"
        for name, row in rows.items()
        if row["verdict"] in ("wrong", "wrong count", "raw exception")
    ]
    if bad:
        sys.exit("families: " + ", ".join(bad))


BENCH = Benchmark(
    __file__, __doc__, run, pages, folder="",
    names=Option([], "architectures to try again", word=True), list=Option(False, "only say their names"),
    limit=Option(240, "seconds of CPU time for one network"),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
