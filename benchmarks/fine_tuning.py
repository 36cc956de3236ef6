"""A small DistilBERT tells four kinds of text apart: Trainer with AdamW, and with MeanField and EvidenceCallback.

    python benchmarks/fine_tuning.py --data DATA --seeds 0 1 2 3 4
    chrt -r 5 python benchmarks/fine_tuning.py --data DATA --rows pace --seeds 0 1 2 3 4
    python benchmarks/fine_tuning.py --table

The texts are bytes of wikitext-2, tiny Shakespeare, two modules of the standard library and a table of numbers
(`examples/with_transformers.py`); training snippets are of the first halves, test snippets of the second. All rows see
the same training snippets, batches, epochs and schedule.

AdamW and MeanField have six settings each (`ADAMW`, `OURS`). Each is trained twice, without the first and the second
tenth of the training snippets, and the setting is taken that predicts those tenths best (mean NLL at a fitted softmax
temperature); MeanField's where the evidence decides, the best of those that remove half of the encoder, and the last
row takes it over. With a seed s the chosen setting is trained without tenth s, which gives the softmax temperature, and
then on everything; this network meets the test snippets. These, 1,000 of each kind, lie where no other of them and no
snippet lies that earlier settings were tested on.
"""

# ruff: noqa: E402  the path is mended before any import of the library of a neighbour's name

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from torch import Tensor

import ockham
from harness import DATA, SEEDS, Benchmark, Option, Record, interleaved, markdown, spread

HERE = Path(__file__).parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]  # transformers.py hides the library

from ockham.choose.prices import UnitShare
from ockham.integrations.transformers import EvidenceCallback
from ockham.run.measure import ece, fit_temperature

LENGTH, EACH, TEST, EPOCHS, BATCH, FOLDS = 48, 240, 1000, 16, 32, 10
ENDS = "re:embeddings|classifier"  # what stays: the encoder is what is to become smaller
DENSE, UNITS = "adamw", "units"
ROWS: dict[str, dict[str, Any]] = {
    DENSE: {"said": "AdamW"},
    "evidence": {"said": "MeanField, evidence decides", "removed": 0.5},
    UNITS: {
        "said": "MeanField, 60 % of the weights, a quarter of heads and units",
        "keep": 0.6,
        "share": 0.25,
        "as": "evidence",
    },
}
ADAMW = [{"lr": lr, "weight_decay": w} for lr, w in product((5e-4, 1e-3, 2e-3), (0.01, 0.1))]
OURS = [{"lr": lr, "temperature": t} for lr, t in product((1e-3, 2e-3, 4e-3), (0.1, 0.3))]
# The spread starts narrow and learns faster: 480 steps of 2e-3, falling, move ln std by .5 at the usual rate.
SPREAD = {"initial_std": 1e-3, "std_rate": 3.0, "kl_warmup": 100}

Rows = list[dict[str, Tensor]]


# ------------------------------------------------------------------ texts and network


def example(data: Path) -> Any:
    """The script whose texts these are."""
    os.environ["OCKHAM_DATA"] = str(data)
    found = importlib.util.spec_from_file_location("with_transformers", HERE.parent / "examples/with_transformers.py")
    assert found is not None and found.loader is not None
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    return script


def fresh_snippets(data: Path) -> Rows:
    """Test snippets of the second halves, in slots that no earlier test snippet touches; of numbers, a fresh table."""
    script, seen = example(data), [random.Random(1), random.Random(1)]
    draw, rows = random.Random(2), []
    table = "\n".join(",".join(f"{draw.gauss(0, 10):.2f}" for _ in range(6)) for _ in range(4000)).encode()
    for label, text in enumerate((script.encyclopedia(), script.play(), script.code(), table)):
        half = len(text) // 2
        places = [r.randrange(half - LENGTH) for r, each in zip(seen, (250, 100), strict=True) for _ in range(each)]
        taken = {(at + end) // LENGTH for at in places for end in (0, LENGTH - 1)} if text is not table else set()
        free = [slot for slot in range(half // LENGTH) if slot not in taken]
        for slot in draw.sample(free, TEST):
            at = half + slot * LENGTH
            snippet = torch.tensor(list(text[at : at + LENGTH]))
            rows.append({"input_ids": snippet, "labels": torch.tensor(label)})
    return rows


def made(seed: int) -> Any:
    """The network, the same for a seed in all rows."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(seed)
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    size = {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4}
    config = DistilBertConfig(vocab_size=256, max_position_embeddings=LENGTH, num_labels=4, **size, **quiet)
    return DistilBertForSequenceClassification(config)


def inputs(rows: Rows) -> tuple[dict[str, Tensor], Tensor]:
    """All snippets, and their labels."""
    return {"input_ids": torch.stack([r["input_ids"] for r in rows])}, torch.stack([r["labels"] for r in rows])


def encoder(model: Any) -> dict[str, Tensor]:
    """Weight matrices of the encoder."""
    return {n: p for n, p in model.named_parameters() if ".transformer." in n and p.ndim > 1}


# ------------------------------------------------------------------ training


def optimizer_for(row: str, model: Any, setting: dict[str, float], n_data: int, seed: int) -> torch.optim.Optimizer:
    """AdamW, or MeanField."""
    if row == DENSE:
        return torch.optim.AdamW(model.parameters(), **setting)
    return ockham.MeanField(model.named_parameters(), n_data=n_data, seed=seed, **SPREAD, **setting)


def trained(row: str, setting: dict[str, float], train: Rows, seed: int) -> tuple[Any, Any, list[float]]:
    """Network, callback (None for AdamW) and CPU seconds of every epoch."""
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

    model, options, clock = made(seed), ROWS[row], Clock()
    rule = ockham.BudgetRule(options["keep"]) if "keep" in options else None
    structures = ockham.Structures(price=UnitShare(options["share"])) if "share" in options else None
    evidence = None if row == DENSE else EvidenceCallback(rule=rule, ignore=ENDS, structures=structures)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(folder, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, seed=seed,
                                     learning_rate=setting["lr"], warmup_steps=20, save_strategy="no", report_to=[],
                                     disable_tqdm=True, logging_steps=20, use_cpu=True)  # fmt: skip
        optimizer = optimizer_for(row, model, setting, len(train), seed)
        callbacks = [clock, *([evidence] if evidence else [])]
        Trainer(model, settings, train_dataset=train, optimizers=(optimizer, None), callbacks=callbacks).train()
    return model, evidence, clock.seconds


def predicted(model: Any, evidence: Any, rows: Rows) -> Tensor:
    """Log-probabilities of the classes: of the network as it stands, or of 20 draws from the posterior."""
    x = inputs(rows)[0]
    if evidence is not None:
        return ockham.predict(model, evidence.posterior, x, draws=20).probabilities.double().log()
    with torch.no_grad():
        logs: Tensor = model.eval()(**x).logits.double().log_softmax(1)
    return logs


def facts(logs: Tensor, y: Tensor, temperature: float) -> dict[str, float]:
    """Accuracy; NLL in nats and ECE of 15 bins, as they come and at a softmax temperature."""
    found = {"accuracy": float((logs.argmax(1) == y).double().mean()), "temperature": temperature}
    for name, at in (("", 1.0), ("tempered ", temperature)):
        probabilities = (logs / at).softmax(1)
        told = probabilities[torch.arange(len(y)), y].clamp_min(1e-12)
        found |= {f"{name}nll": float(-told.log().mean()), f"{name}ece": float(ece(probabilities, y))}
    return found


def removed(evidence: Any, seed: int) -> float:
    """Share of the encoder's weights that went."""
    if evidence is None:
        return 0.0
    before = encoder(made(seed))
    left = sum(int(evidence.posterior[n].keep.sum()) for n in before)
    return 1 - left / sum(p.numel() for p in before.values())


def held_out(row: str, setting: dict[str, float], train: Rows, fold: int) -> Record:
    """What a setting makes of a tenth of the training snippets that it has not seen."""
    size = len(train) // FOLDS
    kept, judged = train[: fold * size] + train[(fold + 1) * size :], train[fold * size : (fold + 1) * size]
    model, evidence, _ = trained(row, setting, kept, fold)
    logs, y = predicted(model, evidence, judged), inputs(judged)[1]
    return facts(logs, y, fit_temperature(logs, y)) | {"removed": removed(evidence, fold)}


def judged(row: str, setting: dict[str, float], train: Rows, fold: int) -> Record:
    """The record of `held_out`."""
    name = "-".join(f"{k}-{v:g}" for k, v in setting.items())
    make = partial(held_out, row, setting, train, fold)
    return BENCH.record(f"choice/{row}-{name}-{fold}", make, setting=setting, fold=fold)


def chosen(row: str, train: Rows) -> dict[str, float]:
    """The setting that predicts two held-out tenths best, of those that remove what the row asks for."""
    row = ROWS[row].get("as", row)
    tried = [
        (setting, [judged(row, setting, train, fold) for fold in (0, 1)])
        for setting in (ADAMW if row == DENSE else OURS)
    ]
    enough = [t for t in tried if mean(r["removed"] for r in t[1]) >= ROWS[row].get("removed", 0.0)]
    return min(enough or tried, key=lambda t: mean(r["tempered nll"] for r in t[1]))[0]


def tested(row: str, setting: dict[str, float], train: Rows, data: Path, seed: int) -> Record:
    """The chosen setting trained on everything, on the test snippets; softmax temperature from a held-out tenth."""
    temperature = judged(row, setting, train, seed)["temperature"]
    model, evidence, seconds = trained(row, setting, train, seed)
    test = fresh_snippets(data)
    logs, y = predicted(model, evidence, test), inputs(test)[1]
    plan = None if evidence is None else evidence.plan
    return facts(logs, y, temperature) | {
        "removed": removed(evidence, seed),
        "widths": {} if plan is None else {k: [v, v - len(plan.removed.get(k, ()))] for k, v in plan.widths.items()},
        "plan": None if plan is None else plan.to_json(),
        "epoch_seconds": seconds,
        "rounds": 0 if evidence is None else len(evidence.history),
        "reloaded": reloaded(model, plan, seed, test),
    }


# ------------------------------------------------------------------ a fresh process


def reloaded(model: Any, plan: Any, seed: int, test: Rows) -> float:
    """Greatest difference of a log-probability in a fresh process that loads the folder of the network."""
    code = "import runpy, sys; sys.path.append(sys.argv[1]); runpy.run_path(sys.argv[2])['load'](*sys.argv[3:])"
    with tempfile.TemporaryDirectory() as folder:
        ockham.save_pretrained(model, folder, plan=plan)
        torch.save(inputs(test)[0]["input_ids"], Path(folder) / "ids.pt")
        subprocess.run([sys.executable, "-c", code, str(HERE), __file__, folder, str(seed)], check=True)
        again: Tensor = torch.load(Path(folder) / "out.pt", weights_only=True)
    return float((again - predicted(model, None, test)).abs().max())


def load(folder: str, seed: str) -> None:
    """What a fresh process does with the folder: a new network, the plan, the weights."""
    from safetensors.torch import load_model

    torch.set_num_threads(1)
    model, plan = made(int(seed) + 100), Path(folder) / "plan.json"
    if plan.exists():
        model = ockham.shrink(model, ockham.Plan.from_json(plan.read_text()))
    load_model(model, Path(folder) / "model.safetensors")
    ids = torch.load(Path(folder) / "ids.pt", weights_only=True)
    torch.save(predicted(model, None, [{"input_ids": i, "labels": torch.tensor(0)} for i in ids]), f"{folder}/out.pt")


# ------------------------------------------------------------------ time of an epoch


def pace(seed: int, train: Rows, repeats: int) -> Record:
    """Wall and CPU milliseconds of an epoch, dense and reduced, with either optimizer, all in turn in one process."""
    plan = ockham.Plan.from_json(BENCH.records(f"{UNITS}-seed{seed}")[f"{UNITS}-seed{seed}"]["plan"])
    batches = [inputs(train[i : i + BATCH]) for i in range(0, len(train), BATCH)]
    arms = {}
    for size, row in product(("dense", "reduced"), (DENSE, UNITS)):
        model = made(seed) if size == "dense" else ockham.shrink(made(seed), plan)
        optimizer = optimizer_for(row, model, {"lr": 1e-3}, len(train), seed)
        arms[f"{size}, {ROWS[row]['said'].split(',')[0]}"] = partial(epoch, model.train(), optimizer, batches)
    times = interleaved(list(arms.values()), repeats, warmup=1)
    return {"arms": {name: {"wall": wall, "cpu": cpu} for name, (wall, cpu) in zip(arms, times, strict=True)}}


def epoch(model: Any, optimizer: torch.optim.Optimizer, batches: list[tuple[dict[str, Tensor], Tensor]]) -> None:
    """One pass of training steps, without the Trainer's own work."""
    for x, y in batches:
        optimizer.zero_grad()
        with getattr(optimizer, "sampled", contextlib.nullcontext)():
            model(**x, labels=y).loss.backward()
        optimizer.step()


# ------------------------------------------------------------------ runs and page


def run(args: argparse.Namespace) -> None:
    train = example(args.data).corpus(EACH, seed=0)
    for row in (r for r in ROWS if r in args.rows):
        setting = chosen(row, train)
        for seed in args.seeds:
            make = partial(tested, row, setting, train, args.data, seed)
            BENCH.record(f"{row}-seed{seed}", make, setting=setting, seed=seed)
    for seed in args.seeds if "pace" in args.rows else ():
        BENCH.record(f"pace-seed{seed}", partial(pace, seed, train, args.repeats), seed=seed, repeats=args.repeats)


def units_left(record: Record) -> str:
    """Heads and units of the MLPs that stay, of how many."""
    told = []
    for word, part in (("heads", "attention"), ("MLP", "ffn")):
        widths = [w for k, w in record["widths"].items() if part in k]
        told += [f"{word} {sum(left for _, left in widths)}/{sum(whole for whole, _ in widths)}"] if widths else []
    return "; ".join(told) or "-"


def paces(kind: str) -> list[list[str]]:
    """Median time of an epoch over that of the dense network with the same optimizer, a seed each."""
    rows = []
    for name in ("AdamW", "MeanField"):
        times = [[median(r["arms"][f"{size}, {name}"][kind]) for size in ("dense", "reduced")]
                 for r in BENCH.records("pace-seed*").values()]  # fmt: skip
        if times:
            rows.append([name, kind, *(f"{mean(t):.0f}" for t in zip(*times, strict=True)),
                         ", ".join(f"{reduced / dense:.2f}" for dense, reduced in times)])  # fmt: skip
    return rows


def pages() -> dict[str, list[str]]:
    found = {row: list(BENCH.records(f"{row}-seed*").values()) for row in ROWS}
    if not all(found.values()):
        return {}
    scales = {"accuracy": 100, "ece": 100, "tempered ece": 100, "nll": 1, "tempered nll": 1, "removed": 100}
    table, settings, margins = [], [], []
    for row, own in found.items():
        said = ROWS[row]["said"]
        cells = [spread([k * r[m] for r in own], 2 if k > 1 else 3) for m, k in scales.items()]
        table.append([said, *cells, " · ".join(dict.fromkeys(map(units_left, own)))])
        setting = ", ".join(f"{k} {v:g}" for k, v in own[0]["arguments"]["setting"].items())
        settings.append([said, setting, spread([r["temperature"] for r in own], 2)])
        for name in ("accuracy", "ece", "tempered ece") if row != DENSE else ():
            apart = [100 * (a[name] - b[name]) for a, b in zip(own, found[DENSE], strict=True)]
            margins.append([said, name, f"{mean(apart):+.2f}", f"{stdev(apart) / math.sqrt(len(apart)):.2f}"])
    text = f"""# Fine-tuning by the Trainer

{BENCH.written()}: {len(found[DENSE])} seeds a row, mean ± standard deviation over them.
960 training snippets of 48 bytes, 4 classes, DistilBERT from a configuration (dim 64, 2 layers, 4 heads, MLP 128), 16
epochs in all rows; 4,000 test snippets that no setting had been tested on, read once (standard error of one accuracy .4
points). AdamW had six settings to choose from on held-out training snippets, and MeanField six (`ADAMW` and `OURS` of
the script; chosen where the evidence decides, and taken for the last row, too); all rows were then trained on
everything. "Tempered" divides the log-probabilities by one softmax temperature, fitted on a held-out tenth. Asked for:
accuracy within one point of AdamW and ECE not worse where half of the encoder's weights are gone; within one point, and
an epoch that takes less time, where a quarter of heads and units is gone.
"""
    greatest = max(r["reloaded"] for own in found.values() for r in own)
    head = "accuracy % | ECE % | ECE %, tempered | NLL, nats | NLL, tempered | encoder's weights removed % | units left"
    lines = [text, *markdown(f"row | {head}", table), "", "Differences from AdamW with the same seed, in points:", ""]
    lines += [*markdown("row | of | mean | its standard error over seeds", margins), "", "What was chosen:", ""]
    lines += [*markdown("row | setting | softmax temperature", settings), ""]
    if any(BENCH.records("pace-seed*")):
        lines += [
            "Time of an epoch of 30 steps, in turn in one process (median; a ratio a seed, real-time priority):",
            "",
        ]
        lines += [*markdown("optimizer | clock | dense, ms | reduced, ms | ratios", paces("wall") + paces("cpu")), ""]
    lines += [f"Every folder (`ockham.save_pretrained`) loaded in a fresh process: differences up to {greatest:.1g}."]
    lines += [
        "",
        "Earlier settings, and why units hardly go at a learned price: `benchmarks/results/fine_tuning_found.md`.",
    ]
    return {"fine_tuning.md": lines}


BENCH = Benchmark(
    __file__, __doc__, run, pages, data=DATA, seeds=SEEDS, repeats=Option(15, "epochs of every arm of `pace`"),
    rows=Option(list(ROWS), "what is run", choices=[*ROWS, "pace"]),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
