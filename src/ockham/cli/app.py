"""The verbs: compress, prune, gate, evaluate, audit, inspect, report."""

from __future__ import annotations

import inspect as python_inspect
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ockham.cli import show
from ockham.cli.build import build_job, load_data, load_model
from ockham.cli.options import METHODS, Common, options_of, parse_device, read_config
from ockham.cli.progress import Bars, tensorboard
from ockham.core.files import printable
from ockham.core.seal import sealed
from ockham.errors import OckhamError, OckhamWarning
from ockham.methods.gates.report import gate_sections
from ockham.report.html import write_report
from ockham.run.schema import read_result
from ockham.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Smaller networks by model evidence.")
out_console, err_console = Console(), Console(stderr=True)

_Folder = Annotated[Path, typer.Argument(help="A result folder.")]
_Data = Annotated[str | None, typer.Option(help="Folder or package.module:function [default: digits].")]
_Model = Annotated[str | None, typer.Option(help="package.module:function for networks that are not of the zoo.")]


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


def _verb(name: str, text: str, *methods: str, shown: tuple[str, ...]) -> Callable[..., None]:
    """A command whose options are the fields of its methods; those of other methods are taken, to be refused well."""
    every: dict[str, Any] = {f.name: f for kind in METHODS.values() for f in fields(kind)}
    own = {f.name: f for m in reversed(shown) for f in fields(METHODS[m])}
    parameters = [_parameter(f, hidden=n not in own) for n, f in {**every, **own}.items()]
    for extra in ("method",) if name == "compress" else ():
        option = typer.Option(f"--{extra}", help="Old spelling: evidence, bmrs, spike-slab.", hidden=True)
        parameters.append(_keyword(extra, Annotated[str | None, option]))
    option = typer.Option("--config", help="TOML file with any of these options.", rich_help_panel="The run")
    parameters.append(_keyword("config", Annotated[Path | None, option]))

    def command(**given: Any) -> None:
        config = given.pop("config")
        typed = {k: v for k, v in given.items() if v is not None and v not in ([], ())}
        typed = {k: tuple(v) if isinstance(v, list) else v for k, v in typed.items()}
        merged = ({} if config is None else read_config(config)) | typed
        if merged.get("out") is None and merged.get("data") is None:
            merged["out"] = {"compress": "runs/digits", "gate": "runs/gates"}.get(name)
        options = options_of({k: v for k, v in merged.items() if v is not None}, *methods)
        _say_new_spelling(name, merged)
        _run(options)

    command.__signature__ = python_inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = text
    return app.command(name)(command)


def _parameter(option: Any, *, hidden: bool) -> python_inspect.Parameter:
    """A field of an options class as a parameter that typer reads; None means: not given."""
    kind = str(option.type).partition(" |")[0]
    types: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool, "tuple[str, ...]": list[str]}
    flag = option.name.replace("_", "-")
    spelt = f"--{flag}/--no-{flag}" if kind == "bool" and option.default else f"--{flag}"
    text = option.metadata["help"]
    if kind != "bool" and option.default not in (None, ()):
        text += f" [{option.default}]"
    made = typer.Option(spelt, help=text, hidden=hidden, rich_help_panel=option.metadata["group"], show_default=False)
    return _keyword(option.name, Annotated[types[kind] | None, made])


def _keyword(name: str, annotation: Any) -> python_inspect.Parameter:
    return python_inspect.Parameter(name, python_inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _say_new_spelling(name: str, given: dict[str, Any]) -> None:
    """Say the new verb once where an old spelling was used."""
    posterior = given.get("posterior")
    new = {"bmrs": "ockham gate", "spike-slab": "ockham compress --posterior spike-slab"}.get(given.get("method", ""))
    if name == "compress" and posterior in ("laplace", "kronecker"):
        new = f"ockham prune --posterior {posterior}"
    if name == "compress" and new is not None:
        err_console.print(
            f"note: this is now spelt `{new}`", style="dim", markup=False, highlight=False, soft_wrap=True
        )


compress = _verb(
    "compress",
    "Train and reduce: fit a posterior, remove what the evidence does not support, refit, report.",
    shown=("evidence",),
)
prune = _verb(
    "prune",
    "Reduce a trained network in one shot: a Laplace posterior, one removal, a short refit.",
    "one-shot",
    shown=("one-shot",),
)
gate = _verb("gate", "Train with gates on whole structures and remove those by a BMRS rule.", "gates", shown=("gates",))


def _run(options: Common) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    job = build_job(options, "ockham " + shlex.join(sys.argv[1:]))
    for note in job.notes:
        err_console.print(f"note: {note}", style="dim", markup=False, highlight=False)
    with Bars(err_console, quiet=options.quiet) as bars, tensorboard(options.log_dir) as log:
        job.on_step = bars.step
        for info in job.run():
            bars.epoch(info)
            log(info)
    show.metrics(out_console, job.out)
    typer.echo(f"Report: {job.out / 'report.html'}")


def _build(folder: Path, data: str | None, model: str | None) -> tuple[Any, Any]:
    """Data and network that a verb on a result folder was given, after a look at the folder's seal."""
    sealed(folder)
    known = read_result(folder).provenance.dataset
    if data is None and (known is None or known.name != "digits"):
        raise OckhamError(f"{folder} is not a result on the digits: say which data with --data")
    found, builder = load_data(data), read_result(folder).provenance.network
    if model is None and builder is not None and not str(builder.builder).startswith("zoo:"):
        raise OckhamError(
            f"the network of {folder} was built by {builder.builder!r}, which is your code and is not run from a file; "
            f"say it with --model package.module:function"
        )
    return found, load_model(model, found)[1]() if model else None


@app.command()
def evaluate(
    folder: _Folder,
    data: _Data = None,
    model: _Model = None,
    draws: Annotated[int, typer.Option(help="Posterior draws.")] = 20,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Measure a saved result on test data: posterior predictive and mean network."""
    found, network = _build(folder, data, model)
    show.evaluation(out_console, folder, found, network, draws=draws, device=parse_device(device))


@app.command()
def audit(
    folder: _Folder,
    data: _Data = None,
    model: _Model = None,
    log_odds: Annotated[float, typer.Option(help="ln P(keep)/P(remove), for posteriors without one.")] = 0.0,
) -> None:
    """Check inclusion probabilities: enumerate the last layer exactly on the training data, and compare."""
    found, network = _build(folder, data, model)
    show.audited(out_console, folder, found, network, log_odds=log_odds)


@app.command()
def inspect(folder: _Folder) -> None:
    """What is in a result, layer by layer."""
    sealed(folder)
    show.contents(out_console, folder)


@app.command()
def report(folder: _Folder) -> None:
    """Write report.html again from the numbers in a result folder."""
    sealed(folder, rewriting="report.html")
    typer.echo(f"Report: {write_report(folder, gate_sections)}")


def main() -> None:
    """Run the command; errors of Ockham end with one sentence and exit code 2."""
    warnings.showwarning = _show_warning
    try:
        app()
    except OckhamError as error:
        _say(f"ockham: {printable(error)}", "red")
        raise SystemExit(2) from None


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **_: Any) -> None:
    if issubclass(category, OckhamWarning):
        err_console.print(
            f"warning: {printable(message)}", style="yellow", markup=False, highlight=False, soft_wrap=True
        )


def _say(text: str, style: str) -> None:
    """One unbroken line on the error stream."""
    err_console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
