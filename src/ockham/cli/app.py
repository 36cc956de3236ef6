"""The verbs: compress, evaluate, audit, inspect, report."""

from __future__ import annotations

import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
import typer
from rich.console import Console

from ockham.cli import show
from ockham.cli.build import build_job, load_data, load_model
from ockham.cli.options import Options, merged, parse_device
from ockham.cli.progress import Bars, tensorboard
from ockham.core.files import read_json
from ockham.errors import OckhamError, OckhamWarning
from ockham.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Smaller networks by model evidence.", rich_markup_mode=None
)
out_console, err_console = Console(), Console(stderr=True)

_Folder = Annotated[Path, typer.Argument(help="A result folder.")]
_Str: TypeAlias = str | None
_Int: TypeAlias = int | None
_Float: TypeAlias = float | None


def _version(value: bool) -> None:
    if value:
        typer.echo(f"ockham {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Smaller networks by model evidence."""


@app.command()
def compress(  # noqa: PLR0913 - the options of the verb, gathered into one dataclass below
    out: Annotated[_Str, typer.Option(help="Result folder [default: runs/digits without --data].")] = None,
    data: Annotated[
        _Str, typer.Option(help="Folder (IDX, npz, WebP sheets) or package.module:function [default: digits].")
    ] = None,
    model: Annotated[_Str, typer.Option(help="Zoo name or package.module:function [default: by the data].")] = None,
    weights: Annotated[_Str, typer.Option(help="Start from this safetensors file.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of these options.")] = None,
    epochs: Annotated[_Int, typer.Option(help="Passes over the data [default: 30; 80 for small data].")] = None,
    batch_size: Annotated[_Int, typer.Option(help="Examples a step [default: 128; 64 for small data].")] = None,
    learning_rate: Annotated[_Float, typer.Option(help="At first [default: 2e-3; 3e-3 for small data].")] = None,
    prior_variance: Annotated[_Float, typer.Option(help="Of every weight [default: 0.3; 1 for small data].")] = None,
    temperature: Annotated[
        _Float, typer.Option(help="Of the posterior; 1 is Bayes [default: 1; 0.1 for small data].")
    ] = None,
    posterior: Annotated[
        _Str, typer.Option(help="mean-field, ivon, map; with --weights laplace, kronecker [default: mean-field].")
    ] = None,
    method: Annotated[
        _Str, typer.Option(help="evidence: single weights; bmrs: gated structures; spike-slab: inclusion.")
    ] = None,
    after_training: Annotated[
        bool | None, typer.Option("--after-training", help="bmrs: remove once, after training, and draw the curves.")
    ] = None,
    rule: Annotated[
        _Str,
        typer.Option(
            help="evidence, learned-odds; with a budget: snr, delta-f, magnitude, random, gradual-snr (-magnitude). "
            "bmrs: n, n-printed, u8, u4, snr; with a budget: mean, l2, taylor, random."
        ),
    ] = None,
    log_odds: Annotated[
        _Float, typer.Option(help="Of the evidence rule: ln P(keep)/P(remove) before the data [default: 0].")
    ] = None,
    cap: Annotated[
        _Float, typer.Option(help="Of the evidence rule: share of the living a round may take [default: 1].")
    ] = None,
    keep_share: Annotated[_Float, typer.Option(help="Budget: share of the weights that stays [default: none].")] = None,
    structure: Annotated[
        bool | None, typer.Option("--structure/--no-structure", help="Take out whole channels, neurons, heads, too.")
    ] = None,
    macs: Annotated[
        _Float, typer.Option(help="Budget: share of multiply-accumulates; --posterior kronecker with --structure.")
    ] = None,
    unit_price: Annotated[_Float, typer.Option(help="With --structure: nats a unit must be worth.")] = None,
    round_to: Annotated[_Int, typer.Option(help="With --structure: widths in multiples of this [default: 1].")] = None,
    rounds: Annotated[_Int, typer.Option(help="Rounds of removal at most [default: 20; 11 for small data].")] = None,
    first_round: Annotated[
        _Float, typer.Option(help="Share of the epochs before the first [default: 0.125; 0.25 for small data].")
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Protect: parameter or module name, or re:pattern.")] = None,
    likelihood: Annotated[_Str, typer.Option(help="classification or regression [default: by the targets].")] = None,
    baseline: Annotated[
        bool | None, typer.Option("--baseline/--no-baseline", help="Train Adam for comparison.")
    ] = None,
    draws: Annotated[_Int, typer.Option(help="Posterior draws of a prediction [default: 20].")] = None,
    ood: Annotated[_Str, typer.Option(help="Foreign data for the out-of-distribution measure.")] = None,
    device: Annotated[_Str, typer.Option(help="cpu, cuda, cuda:1, mps [default: cpu].")] = None,
    threads: Annotated[_Int, typer.Option(help="CPU threads [default: torch's; 1 for small data].")] = None,
    seed: Annotated[_Int, typer.Option(help="Of everything random [default: 0].")] = None,
    resume: Annotated[bool | None, typer.Option("--resume", help="Continue an interrupted run.")] = None,
    log_dir: Annotated[_Str, typer.Option(help="Write TensorBoard scalars here.")] = None,
    quiet: Annotated[bool | None, typer.Option("--quiet", help="No progress bars.")] = None,
) -> None:
    """Make a network smaller: fit a posterior, remove what the evidence does not support, refit, report."""
    given: dict[str, Any] = {k: v for k, v in locals().items() if k != "config"}
    given["ignore"] = tuple(ignore or ())
    options = merged(config, given)
    if options.out is None and options.data is None:
        options = merged(config, given | {"out": "runs/digits"})
    _compress(options)


def _compress(options: Options) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    job = build_job(options, "ockham " + shlex.join(sys.argv[1:]))
    with Bars(err_console, quiet=options.quiet) as bars, tensorboard(options.log_dir) as log:
        job.on_step = bars.step
        for info in job.run():
            bars.epoch(info)
            log(info)
    show.metrics(out_console, job.out)
    typer.echo(f"Report: {job.out / 'report.html'}")


@app.command()
def evaluate(
    folder: _Folder,
    data: Annotated[_Str, typer.Option(help="Folder or package.module:function [default: digits].")] = None,
    model: Annotated[_Str, typer.Option(help="package.module:function for networks that are not of the zoo.")] = None,
    draws: Annotated[int, typer.Option(help="Posterior draws.")] = 20,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Measure a saved result on test data: posterior predictive and mean network."""
    if data is None and read_json(folder / "result.json")["dataset"]["name"] != "digits":
        raise OckhamError(f"{folder} is not a result on the digits: say which data with --data")
    found = load_data(data)
    build = load_model(model, found)[1] if model else None
    show.evaluation(out_console, folder, found, build() if build else None, draws=draws, device=parse_device(device))


@app.command()
def audit(
    folder: _Folder,
    data: Annotated[_Str, typer.Option(help="Folder or package.module:function [default: digits].")] = None,
    model: Annotated[_Str, typer.Option(help="package.module:function for networks that are not of the zoo.")] = None,
    log_odds: Annotated[float, typer.Option(help="ln P(keep)/P(remove), for posteriors without one.")] = 0.0,
) -> None:
    """Check inclusion probabilities: enumerate the last layer exactly on the training data, and compare."""
    if data is None and read_json(folder / "result.json")["dataset"]["name"] != "digits":
        raise OckhamError(f"{folder} is not a result on the digits: say which data with --data")
    found = load_data(data)
    build = load_model(model, found)[1] if model else None
    show.audited(out_console, folder, found, build() if build else None, log_odds=log_odds)


@app.command()
def inspect(folder: _Folder) -> None:
    """What is in a result, layer by layer."""
    show.contents(out_console, folder)


@app.command()
def report(folder: _Folder) -> None:
    """Write report.html again from the numbers in a result folder."""
    from ockham.methods.gates.report import GATES, write_gate_report
    from ockham.report.html import write_report

    write = write_gate_report if (folder / GATES).exists() else write_report
    typer.echo(f"Report: {write(folder)}")


def main() -> None:
    """Run the command; errors of Ockham end with one sentence and exit code 2."""
    warnings.showwarning = _show_warning
    try:
        app()
    except OckhamError as error:
        err_console.print(f"ockham: {error}", style="red", markup=False, highlight=False)
        raise SystemExit(2) from None


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **_: Any) -> None:
    if issubclass(category, OckhamWarning):
        err_console.print(f"warning: {message}", style="yellow", markup=False, highlight=False)
