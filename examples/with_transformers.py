"""Hugging Face's Trainer under a posterior: a small DistilBERT tells four kinds of text apart and loses weights.

The texts are bytes of the corpora beside this repository (OCKHAM_DATA names their folder), or of Python's own manual
where those are not there; no tokenizer or weights are downloaded.
"""

import inspect
import os
import pydoc_data.topics
import random
import tarfile
import tempfile
import warnings
from pathlib import Path

import torch

import ockham
from ockham.integrations.transformers import EvidenceCallback
from transformers import DistilBertConfig, DistilBertForSequenceClassification, Trainer, TrainingArguments

LENGTH, EACH, EPOCHS = 48, 240, 6


def main() -> None:
    torch.manual_seed(0)
    train, test = corpus(EACH, seed=0), corpus(100, seed=1)
    model = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=256, max_position_embeddings=LENGTH, dim=64, hidden_dim=128, n_layers=2, n_heads=4,
                         num_labels=4, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0)
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=EPOCHS, per_device_train_batch_size=32, learning_rate=2e-3, warmup_steps=20,
            save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=100, use_cpu=True,
        )  # fmt: skip
        # --8<-- [start:trainer]
        optimizer = ockham.MeanField(model.named_parameters(), n_data=len(train), lr=2e-3, kl_warmup=100,
                                     temperature=0.1, initial_std=1e-3, std_rate=3)  # fmt: skip
        half = ockham.BudgetRule(0.6)  # of all weights; or no rule: then the evidence decides
        evidence = EvidenceCallback(rule=half, ignore="re:embeddings|classifier")
        trainer = Trainer(model, arguments, train_dataset=train, optimizers=(optimizer, None), callbacks=[evidence])
        trainer.train()

        posterior = ockham.load_posterior(f"{folder}/posterior.safetensors")
        # --8<-- [end:trainer]
    inputs = {"input_ids": torch.stack([row["input_ids"] for row in test])}
    labels = torch.tensor([row["labels"] for row in test])
    prediction = ockham.predict(model, posterior, inputs)
    accuracy = (prediction.probabilities.argmax(1) == labels).float().mean()
    encoder = [g for name, g in posterior.items() if ".transformer." in name and g.mean.ndim > 1]
    kept = sum(int(g.keep.sum()) for g in encoder) / sum(g.keep.numel() for g in encoder)
    print(f"test accuracy {accuracy:.1%} with {kept:.1%} of the encoder's weights, {len(evidence.history)} rounds")


def corpus(each: int, *, seed: int) -> list[dict[str, torch.Tensor]]:
    """Snippets of four kinds of text, ``each`` of a kind, in random order."""
    draw = random.Random(seed)
    rows = []
    for label, text in enumerate((encyclopedia(), play(), code(), numbers())):
        half = len(text) // 2  # the first half of every text is for training
        for _ in range(each):
            at = draw.randrange(half - LENGTH) + (half if seed else 0)
            snippet = torch.tensor(list(text[at : at + LENGTH]))
            rows.append({"input_ids": snippet, "labels": torch.tensor(label)})
    draw.shuffle(rows)
    return rows


def encyclopedia() -> bytes:
    """Articles of wikitext-2, or Python's manual."""
    return found("text/wikitext-2/valid.txt") or "\n".join(pydoc_data.topics.topics.values()).encode()


def play() -> bytes:
    """Shakespeare, or a dialogue made up of a few words."""
    words = "my thy good lord king speak love death night honour shall not the and of to is".split()  # noqa: SIM905
    draw, lines = random.Random(0), []
    for _ in range(2000):
        lines.append(f"{draw.choice(words).upper()}:\n{' '.join(draw.choices(words, k=8)).capitalize()}.\n\n")
    return found("text/tinyshakespeare/input.txt") or "".join(lines).encode()


def code() -> bytes:
    """Source of two modules of the standard library."""
    return "".join(inspect.getsource(module) for module in (tarfile, inspect)).encode()


def numbers() -> bytes:
    """A table."""
    draw = random.Random(1)
    return "\n".join(",".join(f"{draw.gauss(0, 10):.2f}" for _ in range(6)) for _ in range(4000)).encode()


def found(name: str) -> bytes | None:
    """A file of the corpora, without what is not ASCII; None where it is not there."""
    folder = Path(os.environ.get("OCKHAM_DATA") or Path(__file__).parents[2] / "shared" / "data")
    path = folder / name
    return path.read_text(encoding="utf-8").encode("ascii", "ignore") if path.exists() else None


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
