"""A small DistilBERT tells four kinds of text apart: Trainer with AdamW, and with MeanField and EvidenceCallback.

    python benchmarks/fine_tuning.py run --data DATA --seeds 0 1 2
    python benchmarks/fine_tuning.py table

The texts are bytes of wikitext-2, tiny Shakespeare, two modules of the standard library and a table of numbers
(`examples/with_transformers.py`); training snippets are of the first halves, test snippets of the second. All rows see
the same snippets, batches, epochs and schedule. AdamW's learning rate is the best of three on a tenth of the training
snippets held out, with seed 0. MeanField's settings (`SPREAD`) were chosen on a fifth of the training snippets, held
out, with seeds 0 and 1 (the epochs, too, with seed 0). A row and seed that is there is not run again.
"""

# ruff: noqa: E402  the first statement below must come before any import of the library of a neighbour's name

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent]  # transformers.py hides one

import torch
from torch import Tensor

import ockham
from ockham.choose.prices import UnitShare
from ockham.integrations.transformers import EvidenceCallback
from ockham.run.measure import ece

RESULTS = Path(__file__).parent / "results" / "fine_tuning"
EXAMPLE = Path(__file__).parents[1] / "examples" / "with_transformers.py"
LENGTH, EACH, TEST, EPOCHS, BATCH = 48, 240, 250, 16, 32
ADAM_RATES = (5e-4, 1e-3, 2e-3)
ENDS = "re:embeddings|classifier"  # what stays: the encoder is what is to become smaller

# The spread starts narrow and learns faster: 480 steps of 2e-3, falling, move ln std by .5 at the usual rate.
SPREAD = {"temperature": 0.1, "initial_std": 1e-3, "std_rate": 3.0}
ROWS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "MeanField, nothing removed": {"rounds": None},
    "MeanField, evidence decides": {},
    "MeanField, 60 % of the weights": {"keep": 0.6},
    "MeanField, 60 % of the weights, a quarter of heads and units": {"keep": 0.6, "share": 0.25},
}


def made(seed: int) -> Any:
    """The network, the same for a seed in all rows."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(seed)
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    size = {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4}
    config = DistilBertConfig(vocab_size=256, max_position_embeddings=LENGTH, num_labels=4, **size, **quiet)
    return DistilBertForSequenceClassification(config)


def fitted(model: Any, rows: list[dict[str, Tensor]], optimizer: Any, callbacks: list[Any], seed: int) -> list[float]:
    """Train by the Trainer; seconds of every epoch."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        """Notes when epochs begin and end."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Start."""
            self.began = time.process_time()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Stop."""
            self.seconds.append(time.process_time() - self.began)

    clock = Clock()
    rate = optimizer.param_groups[0]["lr"]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(folder, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, seed=seed,
                                     learning_rate=rate, warmup_steps=20, save_strategy="no", report_to=[],
                                     disable_tqdm=True, logging_steps=20, use_cpu=True)  # fmt: skip
        given = {"train_dataset": rows, "optimizers": (optimizer, None), "callbacks": [clock, *callbacks]}
        Trainer(model, settings, **given).train()
    return clock.seconds


def adamw(model: Any, rate: float) -> Any:
    """The yardstick."""
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)


def inputs(rows: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """All snippets, and their labels."""
    return {"input_ids": torch.stack([r["input_ids"] for r in rows])}, torch.stack([r["labels"] for r in rows])


def plain(model: Any, rows: list[dict[str, Tensor]]) -> Tensor:
    """Class probabilities of a network as it stands."""
    with torch.no_grad():
        probabilities: Tensor = model.eval()(**inputs(rows)[0]).logits.softmax(1)
    return probabilities


def facts(probabilities: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy, NLL in nats, ECE of 15 bins."""
    nll = -probabilities.double()[torch.arange(len(y)), y].clamp_min(1e-12).log().mean()
    right = (probabilities.argmax(1) == y).double().mean()
    return {"accuracy": float(right), "nll": float(nll), "ece": float(ece(probabilities, y))}


def encoder(model: Any) -> dict[str, Tensor]:
    """Weight matrices of the encoder."""
    return {n: p for n, p in model.named_parameters() if ".transformer." in n and p.ndim > 1}


def measured(row: str, seed: int, train: list[dict[str, Tensor]], test: list[dict[str, Tensor]]) -> dict[str, Any]:
    """One row and seed."""
    options, (_, y) = ROWS[row], inputs(test)
    before = sum(p.numel() for p in encoder(made(seed)).values())
    if row == "AdamW":
        cut, tried = len(train) // 10, {}
        known = RESULTS / "adamw-seed0.json"
        rates = (json.loads(known.read_text())["rate"],) if known.exists() else ADAM_RATES
        for rate in rates if len(rates) > 1 else ():
            model = made(seed)
            fitted(model, train[cut:], adamw(model, rate), [], seed)
            tried[rate] = facts(plain(model, train[:cut]), inputs(train[:cut])[1])["nll"]
        best = min(tried, key=tried.__getitem__) if tried else rates[0]
        model = made(seed)
        seconds = fitted(model, train, adamw(model, best), [], seed)
        return facts(plain(model, test), y) | {"removed": 0.0, "rate": best, "tried": tried, "seconds": seconds}
    model = made(seed)
    optimizer = ockham.MeanField(model.named_parameters(), n_data=len(train), lr=2e-3, kl_warmup=100, seed=seed,
                                 **options.get("spread", SPREAD))  # fmt: skip
    structures = ockham.Structures(price=UnitShare(options["share"])) if "share" in options else None
    none = ockham.Rounds(start=0.99, end=1.0, count=1) if "rounds" in options else None
    stays = "" if "rounds" in options else ENDS  # with everything protected a round removes nothing
    rule = ockham.BudgetRule(options["keep"]) if "keep" in options else None
    evidence = EvidenceCallback(none, rule=rule, ignore=stays, structures=structures)
    seconds = fitted(model, train, optimizer, [evidence], seed)
    posterior = evidence.posterior
    assert posterior is not None
    found = ockham.predict(model, posterior, inputs(test)[0], draws=20)
    left = sum(int(posterior[n].keep.sum()) for n in encoder(model))
    widths = {} if evidence.plan is None else {k: [v, v - len(evidence.plan.removed.get(k, ()))]
                                               for k, v in evidence.plan.widths.items()}  # fmt: skip
    means = {f"mean network {k}": v for k, v in facts(plain(model, test), y).items()}
    return facts(found.probabilities, y) | means | {
        "removed": 1 - left / before, "widths": widths, "seconds": seconds, "rounds": len(evidence.history),
        "fresh": loaded(model, evidence.plan, seed, test),
    }  # fmt: skip


def loaded(model: Any, plan: Any, seed: int, test: list[dict[str, Tensor]]) -> float:
    """Greatest difference of a probability in a fresh process that loads the folder of the reduced network."""
    with tempfile.TemporaryDirectory() as folder:
        ockham.save_pretrained(model, folder, plan=plan)
        torch.save(inputs(test)[0]["input_ids"], Path(folder) / "ids.pt")
        subprocess.run([sys.executable, __file__, "load", folder, str(seed)], check=True)
        again: Tensor = torch.load(Path(folder) / "out.pt", weights_only=True)
    return float((again - plain(model, test)).abs().max())


def load(folder: Path, seed: int) -> None:
    """What a fresh process does with the folder: a new network, the plan, the weights."""
    from safetensors.torch import load_model

    model, plan = made(seed + 100), folder / "plan.json"
    if plan.exists():
        model = ockham.shrink(model, ockham.Plan.from_json(plan.read_text()))
    load_model(model, folder / "model.safetensors")
    rows = [{"input_ids": ids, "labels": torch.tensor(0)} for ids in torch.load(folder / "ids.pt", weights_only=True)]
    torch.save(plain(model, rows), folder / "out.pt")


def run(args: argparse.Namespace) -> None:
    """Every row and seed that is not there."""
    os.environ["OCKHAM_DATA"] = str(args.data)
    found = importlib.util.spec_from_file_location("with_transformers", EXAMPLE)
    assert found is not None and found.loader is not None
    example = importlib.util.module_from_spec(found)
    found.loader.exec_module(example)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        train, test = example.corpus(EACH, seed=0), example.corpus(TEST, seed=1)
        for row in args.rows or ROWS:
            words = row.lower().replace(",", "").replace("%", "percent").split()
            path = RESULTS / f"{'-'.join(words)}-seed{seed}.json"
            if path.exists():
                continue
            began = time.process_time()
            made_of = measured(row, seed, train, test) | {"row": row, "seed": seed}
            made_of["cpu_seconds"] = time.process_time() - began
            path.write_text(json.dumps(made_of, indent=1) + "\n")
            print({k: v for k, v in made_of.items() if k not in ("seconds", "tried")}, flush=True)


def table() -> None:
    """Means over the seeds, as Markdown."""
    rows = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))]
    head = (
        "row | seeds | accuracy % | NLL, nats | ECE % | encoder's weights removed % | units left | CPU s, last / first"
    )
    lines = [f"| {head} epoch |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name in ROWS:
        own = [r for r in rows if r["row"] == name]
        if not own:
            continue
        accuracy = ", ".join(f"{100 * r['accuracy']:.1f}" for r in own)
        nll, wrong, gone = (sum(r[k] for r in own) / len(own) for k in ("nll", "ece", "removed"))
        kinds = {"heads": "attention", "MLP": "ffn"}
        widths = [
            f"{kind} "
            + ", ".join(
                "/".join(str(sum(w[i] for k, w in r["widths"].items() if part in k)) for i in (1, 0)) for r in own
            )
            for kind, part in kinds.items()
            if own[0].get("widths")
        ]
        pace = sum(r["seconds"][-1] / r["seconds"][0] for r in own) / len(own)
        lines.append(f"| {name} | {len(own)} | {accuracy} | {nll:.3f} | {100 * wrong:.1f} | {100 * gone:.1f} | "
                     f"{'; '.join(widths) or '-'} | {pace:.2f} |")  # fmt: skip
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(required=True)
    does = verbs.add_parser("run")
    does.add_argument("--data", type=Path, required=True)
    does.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    does.add_argument("--rows", nargs="+")
    does.set_defaults(do=run)
    fresh = verbs.add_parser("load")
    fresh.add_argument("folder", type=Path)
    fresh.add_argument("seed", type=int)
    fresh.set_defaults(do=lambda args: load(args.folder, args.seed))
    verbs.add_parser("table").set_defaults(do=lambda args: table())
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    args.do(args)


if __name__ == "__main__":
    main()
