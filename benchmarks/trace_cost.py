"""What trace and plan cost: networks of real size without values, deep ones, and large activations.

    python benchmarks/trace_cost.py [--network resnet50 vit bert llama convolutions pixelshuffle] [--runs 3]
    python benchmarks/trace_cost.py --table

Every run is a fresh process. The first four networks are on the device `meta`, in the sizes people know (ResNet-50,
ViT-B/16, BERT-base, Llama-3.2-1B), built by transformers, nothing downloaded. `convolutions` is a chain of 400, and
`pixelshuffle` makes an image of 1024 by 1024; both have values, so that the trial by values is part of the time.

Time is that of the first call, which loads `torch.export`, and of a second one; memory is how much higher the peak of
the process is than with the network alone; medians.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ockham
from harness import Benchmark, Option, Record, section
from ockham.surgery.copies import tensors_of

BOUNDS = {
    "resnet50": "5 s, 150 MB", "vit": "5 s, 150 MB", "bert": "5 s, 150 MB", "llama": "5 s, 150 MB",
    "convolutions": "20 s", "pixelshuffle": "10 times the activations",
}  # fmt: skip


def built(name: str) -> tuple[nn.Module, Any]:
    """A network and example inputs."""
    if name == "convolutions":
        layers = [layer for _ in range(400) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
        return nn.Sequential(nn.Conv2d(3, 8, 1), *layers, nn.Conv2d(8, 3, 1)), torch.randn(2, 3, 8, 8)
    if name == "pixelshuffle":
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 32, 3, padding=1), nn.PixelShuffle(2)]
        return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)), torch.randn(1, 3, 512, 512)
    sys.path[:] = [p for p in sys.path if p != str(Path(__file__).parent)]  # a script there has the library's name
    import transformers as tf

    with torch.device("meta"):
        image, words = torch.zeros(2, 3, 224, 224), {"input_ids": torch.zeros(2, 32, dtype=torch.long)}
        if name == "resnet50":
            return tf.ResNetForImageClassification(tf.ResNetConfig()), image
        if name == "vit":
            return tf.ViTForImageClassification(tf.ViTConfig()), image
        if name == "bert":
            return tf.BertModel(tf.BertConfig()), words
        llama = tf.LlamaConfig(
            vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
        )  # fmt: skip
        return tf.LlamaForCausalLM(llama), words


def child(name: str) -> Record:
    """Trace and plan twice in this process."""
    model, inputs = built(name)
    model.eval()
    found: Record = {"parameters": sum(p.numel() for p in model.parameters())}
    if name == "pixelshuffle":
        sizes: list[int] = []
        hooks = [m.register_forward_hook(lambda *a: sizes.extend(t.nbytes for t in tensors_of(a[-1]))) for m in model]
        with torch.no_grad():
            model(inputs)
        for hook in hooks:
            hook.remove()
        found["activations_mb"] = sum(sizes) / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for call in ("first", "again"):
        start, cpu = time.perf_counter(), time.process_time()
        groups = ockham.trace(model, inputs)
        plan = ockham.random_plan(groups, 0.5, generator=torch.Generator().manual_seed(0))
        found |= {f"{call}_s": time.perf_counter() - start, f"{call}_cpu_s": time.process_time() - cpu}
        if call == "first":
            found["peak_growth_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    units = sum(group.size for group in groups)
    return found | {"groups": len(groups), "units": units, "units_removed": sum(map(len, plan.removed.values()))}


def measured(name: str, runs: int) -> Record:
    rows = []
    for _ in range(runs):
        done = subprocess.run([sys.executable, __file__, "--child", name], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
    return {"network": name, "runs": rows} | {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def run(args: argparse.Namespace) -> None:
    if args.child:
        print(json.dumps(child(args.child)))
        raise SystemExit(0)
    for name in args.network:
        BENCH.record(name, partial(measured, name, args.runs), network=name, count=args.runs)


def pages() -> dict[str, list[str]]:
    records = BENCH.records()
    rows = []
    for r in (records[name] for name in BOUNDS if name in records):
        memory = f"{r['peak_growth_mb']:.0f}"
        if "activations_mb" in r:
            memory += f" ({r['peak_growth_mb'] / r['activations_mb']:.1f} times the activations)"
        seconds = [f"{r[f'{call}_s']:.1f} ({r[f'{call}_cpu_s']:.1f})" for call in ("first", "again")]
        rows.append([r["network"], f"{r['parameters'] / 1e6:.2f}", r["groups"], *seconds, memory, BOUNDS[r["network"]]])
    said = (
        "`python benchmarks/trace_cost.py`; medians of fresh processes, one thread of a shared machine; seconds of the "
        "clock (of the processor)."
    )
    head = ["network", "million parameters", "groups", "first call, s", "second call, s", "peak above the model, MB"]
    return {"trace_cost.md": section("# What trace and plan cost", said, [*head, "bound"], rows)}


BENCH = Benchmark(
    __file__, __doc__, run, pages, network=Option(list(BOUNDS), "what to trace", choices=BOUNDS),
    runs=Option(3, "processes for each network"), child=Option("", "trace one network in this process"),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    main()
