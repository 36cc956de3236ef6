"""Small networks of the shapes that people prune, with batches for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

TOKENS = 64


def ids(examples: int = 4, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, TOKENS, (examples, length), generator=torch.Generator().manual_seed(seed))


def batches(kind: str, count: int = 5) -> list[Any]:
    found: list[Any] = []
    for i in range(count):
        tokens = ids(seed=i)
        if kind == "vit":
            generator = torch.Generator().manual_seed(i)
            found.append((torch.randn(6, 3, 16, 16, generator=generator), torch.arange(6) % 3))
        elif kind == "t5":
            found.append({"input_ids": tokens, "labels": tokens.flip(1)})
        elif kind == "bert":
            found.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
        else:
            found.append(tokens)
    return found


def network(kind: str, seed: int = 0) -> nn.Module:
    import transformers as hf

    torch.manual_seed(seed)
    small = {"vocab_size": TOKENS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    llama = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    llama |= {"num_key_value_heads": 2}
    narrow = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    if kind == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**small, **llama))
    if kind == "qwen3":
        return hf.Qwen3ForCausalLM(hf.Qwen3Config(**small, **llama, head_dim=8))
    if kind == "mixtral":
        return hf.MixtralForCausalLM(hf.MixtralConfig(**small, **llama, num_local_experts=4))
    if kind == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(**small, n_embd=24, n_layer=2, n_head=4))
    if kind == "t5":
        config = hf.T5Config(**small, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0)
        return hf.T5ForConditionalGeneration(config)
    if kind == "bert":
        return hf.BertModel(hf.BertConfig(**small, **narrow))
    if kind == "vit":
        return hf.ViTForImageClassification(hf.ViTConfig(**narrow, image_size=16, patch_size=4, num_labels=3))
    raise AssertionError(kind)


KINDS = ("llama", "qwen3", "mixtral", "gpt2", "t5", "bert", "vit")


WORDS = [f"w{i}" for i in range(TOKENS - 3)]


def text_folder(folder: Path) -> Path:
    """A language model in bfloat16 with a tokenizer, and text, ``text.txt``, beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    network("llama").to(torch.bfloat16).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, len(WORDS), (900,), generator=generator)
    (folder / "text.txt").write_text(" ".join(WORDS[i] for i in drawn.tolist()))
    return folder
