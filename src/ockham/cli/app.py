"""The command: its verbs, progress, and what the terminal shows."""

from __future__ import annotations

import difflib
import inspect as python_inspect
import math
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from ockham.cli.build import (
    METHODS,
    TARGETS,
    Basic,
    BlockOptions,
    Common,
    build_job,
    load_data,
    load_model,
    options_of,
)
from ockham.core import __version__
from ockham.core.files import printable, read_toml, to_plain
from ockham.core.network import PruneProgress, listening, parse_device
from ockham.core.posterior import load_posterior
from ockham.core.processes import ALONE, Processes
from ockham.core.seal import sealed
from ockham.errors import OckhamError, OckhamWarning, ResultError
from ockham.methods.blocks.job import PruneSettings
from ockham.methods.blocks.prune import prune_folder
from ockham.methods.gates.report import gate_sections
from ockham.methods.spike_slab.audit import audit as audit_network
from ockham.report.html import write_report
from ockham.run.engine import EpochInfo
from ockham.run.folder import layer_rows, load, resume_hint, terminated
from ockham.run.measure import mean_predictor, measures, posterior_predictor
from ockham.run.schema import RESULT, GateFacts, read_result
from ockham.zoo.data import Dataset

__all__ = ["Bars", "app", "audited", "contents", "evaluation", "main", "metrics", "tensorboard"]


_PIPED = 30.0  # seconds between two lines of progress where there is no terminal to draw bars on


class Bars:
    """A bar a stage; a line every 30 seconds where the console is no terminal; silent when quiet is asked for.

    Args:
        console: where the bars go.
        quiet: True shows none.
        unit: what is counted.
    """

    def __init__(self, console: Console, *, quiet: bool, unit: str = " epochs") -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<14}"),
            BarColumn(),
            TextColumn(f"{{task.completed:{'.1f' if unit else '.0f'}}}/{{task.total:.0f}}{unit}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._began: dict[str, float] = {}
        self._spoke = time.monotonic()
        silent = quiet or not console.is_terminal
        self._progress = Progress(*columns, console=console, transient=False, disable=silent)
        self._lines = None if quiet or console.is_terminal else console
        self._tasks: dict[str, TaskID] = {}
        self._current: tuple[str, int] | None = None

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def epoch(self, info: EpochInfo) -> None:
        """Show a finished epoch."""
        if info.stage not in self._tasks:
            self._tasks[info.stage] = self._progress.add_task(info.stage, total=info.epochs, note="")
        note = f"loss {info.loss:.4f}"
        if info.accuracy == info.accuracy:
            note += f"  train acc. {info.accuracy:.2%}"
        if info.stage in ("compress", "prune", "gates"):
            note += f"  kept {info.kept_share:.2%}"
        self._progress.update(self._tasks[info.stage], completed=info.epoch, note=note)
        self._current = (info.stage, info.epoch)
        began = self._began.setdefault(info.stage, time.monotonic() - info.seconds)
        if self._lines is not None and time.monotonic() - self._spoke >= _PIPED:
            self._spoke = time.monotonic()
            left = (self._spoke - began) / info.epoch * (info.epochs - info.epoch)
            line = f"{info.stage}: epoch {info.epoch} of {info.epochs}, {note}, about {left:.0f} s left"
            self._lines.print(line, markup=False, highlight=False, soft_wrap=True)

    def stage(self, told: PruneProgress) -> None:
        """Show a step of a long pass: a bar, or a line with the time left where there is no terminal."""
        if told.stage not in self._tasks:
            self._tasks[told.stage] = self._progress.add_task(told.stage, total=told.total, note="")
        self._progress.update(self._tasks[told.stage], completed=told.done, total=told.total)
        if self._lines is not None and time.monotonic() - self._spoke >= _PIPED:
            self._spoke = time.monotonic()
            self._lines.print(
                f"{told.stage} {told.done}/{told.total}, {told.seconds:.0f} s, about {told.left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )

    def step(self, step: int, steps: int, loss: float) -> None:
        """Show a step inside an epoch of the stage that runs."""
        if self._current is not None:
            stage, epoch = self._current
            task = self._progress.tasks[self._tasks[stage]]
            if epoch < (task.total or 0):
                self._progress.update(self._tasks[stage], completed=epoch + step / steps)


@contextmanager
def tensorboard(log_dir: str | None) -> Iterator[Any]:
    """A function (EpochInfo) that writes TensorBoard scalars, or one that does nothing.

    Raises:
        OckhamError: tensorboard is not installed.
    """
    if log_dir is None:
        yield lambda info: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise OckhamError("--log-dir needs tensorboard: pip install -e '.[tensorboard]'") from error
    writer = SummaryWriter(log_dir)

    def write(info: EpochInfo) -> None:
        for name in ("loss", "accuracy", "kept_share"):
            value = getattr(info, name)
            if not math.isnan(value):
                writer.add_scalar(f"{info.stage}/{name}", value, info.epoch)

    try:
        yield write
    finally:
        writer.close()


def metrics(console: Console, folder: Path) -> None:
    """Before, after and mean network, one row a measure."""
    found = read_result(folder).metrics
    columns = {"before": found.before, "after": found.after, "mean network": found.mean_network}
    _table(console, {k: to_plain(v) for k, v in columns.items() if v is not None})
    line = f"kept {found.kept:.2%} of the weights in {found.seconds or 0:.1f} s, seed {found.seed}"
    console.print(line, highlight=False)


def contents(console: Console, folder: Path) -> None:
    """Per layer: shape, weights, kept, prior, median P/P0, sum of inclusion if any; of gates what became of them."""
    if (folder / RESULT).exists() and (gates := read_result(folder).gates) is not None:
        return _gates(console, gates)
    posterior = load_posterior(folder)
    rows = layer_rows(posterior)
    table = Table("parameter", "shape", "weights", "kept", "share", "prior std", "median P/P0")
    said = all("expected" in row for row in rows)
    if said:
        table.add_column("sum of inclusion")
    for row in rows:
        g = posterior[row["name"]]
        ratio = (g.precision / g.prior_precision)[g.keep]
        middle = f"{float(ratio.median()):.3g}" if ratio.numel() else "-"
        share = row["kept"] / max(1, row["total"])
        shape = "x".join(map(str, row["shape"]))
        prior = f"{float(g.prior_precision.median()) ** -0.5:.3g}"
        more = [f"{row['expected']:,.1f}"] if said else []
        table.add_row(
            _plain(row["name"]), shape, f"{row['total']:,}", f"{row['kept']:,}", f"{share:.2%}", prior, middle, *more
        )
    console.print(table)
    line = f"{_plain(posterior.source)}, N = {posterior.n_data:g}, temperature {posterior.temperature:g}, "
    console.print(line + f"{posterior.kept():,} of {posterior.size():,} weights kept", highlight=False)


def _gates(console: Console, found: GateFacts) -> None:
    table = Table("structures", "at first", "left", "before the last decision", "posterior = prior", "KL, nats")
    before = {layer.id: layer for layer in found.layers}
    for name, first in found.epochs[0].start.items() if found.epochs else ():
        layer, left = before.get(name), found.epochs[-1].widths.get(name, first)
        facts = ("0", "0", "0")
        if layer is not None:
            facts = (str(len(layer.keep)), str(sum(layer.no_evidence)), f"{sum(v or 0 for v in layer.kl):.4g}")
        table.add_row(_plain(name), str(first), str(left), *facts)
    console.print(table)
    console.print(_plain(f"rule {found.rule}, KL weighted by {found.kl_weight}"), highlight=False)


def evaluation(
    console: Console, folder: Path, data: Dataset, model: nn.Module | None, *, draws: int, device: torch.device
) -> None:
    """Measures on the test part of a data set."""
    network = load(folder, model).to(device)
    result = read_result(folder)
    said = result.metrics.noise_variance
    noise = None if said is None else torch.as_tensor(said).reshape(-1)
    likelihood = result.metrics.likelihood or ("classification" if noise is None else "regression")
    classify = likelihood == "classification"
    if classify is data.test_y.is_floating_point() and likelihood != "binary":
        wanted = "class labels" if classify else "numbers"
        raise OckhamError(
            f"{folder} was made for targets that are {wanted}; the data {data.name!r} have the other kind"
        )
    predictors = {"mean network": mean_predictor(network, likelihood=likelihood)}
    if result.gates is None:  # gates are folded into the weights: one network is left
        sampled = load_posterior(folder).to(device)
        drawn = posterior_predictor(network, sampled, likelihood=likelihood, draws=draws)
        predictors = {"posterior": drawn, **predictors}
    told: dict[str, Any] = {"noise_variance": noise, "likelihood": likelihood}
    _table(console, {k: measures(p, data.test_x, data.test_y, **told) for k, p in predictors.items()})


def audited(console: Console, folder: Path, data: Dataset, model: nn.Module | None, *, log_odds: float) -> None:
    """Claims about the last layer against enumeration on the training part of a data set."""
    network, posterior = load(folder, model), load_posterior(folder)
    result = read_result(folder)
    said = result.metrics.noise_variance
    noise = None if said is None else torch.as_tensor(said).reshape(-1)
    found = audit_network(network, posterior, data.train_x, data.train_y, noise_variance=noise, log_odds=log_odds)
    console.print(str(found), markup=False, highlight=False, soft_wrap=True)


def _table(console: Console, columns: dict[str, dict[str, float]]) -> None:
    table = Table("measure", *columns)
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        values = (column.get(name) for column in columns.values())
        shown = (
            "-"
            if v is None
            else f"{v:,}"
            if isinstance(v, int)
            else f"{v:{'.4f' if abs(v) >= 0.01 or not v else '.3g'}}"
            for v in values
        )
        table.add_row(_plain(name), *shown)
    console.print(table)


def _plain(text: object) -> str:
    """Text from a file for the terminal: neither markup nor control characters."""
    return escape(printable(text))


def read_config(path: Path) -> dict[str, Any]:
    """Options from a TOML file.

    Raises:
        OckhamError: the file cannot be read, or has a key or a type that is not an option.
    """
    try:
        table = read_toml(path)
    except ResultError as error:
        raise OckhamError(f"--config {error}") from error
    known: dict[str, Field[Any]] = {f.name: f for kind in METHODS.values() for f in fields(kind)}
    table = {key.replace("-", "_"): value for key, value in table.items()}
    unknown = [key for key in table if key not in known and key != "method"]
    if unknown:
        near = [n for key in unknown for n in difflib.get_close_matches(key, known, 1)]
        meant = f" (did you mean {', '.join(near)}?)" if near else ""
        raise OckhamError(f"--config {path}: unknown keys {', '.join(unknown)}{meant}; known are {', '.join(known)}")
    allowed = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    for key, value in table.items():
        if isinstance(value, list):
            table[key] = tuple(value)
        elif key in known:
            words = str(known[key].type).split(" | ")
            kinds = tuple(kind for word in words for kind in allowed.get(word, ())) or (object,)
            if not isinstance(value, kinds) or (isinstance(value, bool) and not {bool, object} & {*kinds}):
                raise OckhamError(f"--config {path}: {key} should be {known[key].type}; got {value!r}")
    return table


app = typer.Typer(add_completion=False, no_args_is_help=True, help="Smaller networks by model evidence.")
out_console, err_console = Console(emoji=False), Console(stderr=True, emoji=False)  # "a:b:c" is no picture

_Folder = Annotated[Path, typer.Argument(help="A result folder.")]
_Data = Annotated[str | None, typer.Option(help=escape("Folder or package.module:function. [digits]"))]
_Target = Annotated[str | None, typer.Option(help=escape("Column of a table to predict. [the result's]"))]
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
        posterior, old = merged.get("posterior"), merged.get("method", "")
        new = {"bmrs": "ockham gate", "spike-slab": "ockham compress --posterior spike-slab"}.get(old)
        if posterior in ("laplace", "kronecker"):
            new = f"ockham prune --posterior {posterior}"
        if name == "compress" and new is not None:
            _say(f"note: this is now spelt `{new}`", "dim")
        _run_blocks(options) if isinstance(options, BlockOptions) else _run(options)

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
    text = escape(option.metadata["help"])
    if kind != "bool" and option.default not in (None, ()):
        text += escape(f" [{option.default}]")
    made = typer.Option(spelt, help=text, hidden=hidden, rich_help_panel=option.metadata["group"], show_default=False)
    return _keyword(option.name, Annotated[types[kind] | None, made])


def _keyword(name: str, annotation: Any) -> python_inspect.Parameter:
    return python_inspect.Parameter(name, python_inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


_verb(
    "compress",
    "Train and reduce: fit a posterior, remove what the evidence does not support, refit, report.",
    shown=("evidence",),
)
_verb(
    "prune",
    "Reduce a trained network in one shot: by its Laplace posterior, or (--calibrate) a transformers folder by blocks.",
    "one-shot",
    shown=("one-shot", "blocks"),
)
_verb("gate", "Train with gates on whole structures and remove those by a BMRS rule.", "gates", shown=("gates",))


def _run_blocks(o: BlockOptions) -> None:
    """Reduce a transformers folder on a text, as the options of `ockham prune --calibrate` say."""
    if o.out is None:
        raise OckhamError("--out FOLDER is needed: where shall the result go?")
    if o.model is None or not o.model.startswith("hf:"):
        raise OckhamError(f"--calibrate is for transformers folders: add --model hf:FOLDER; got --model {o.model}")
    if o.params is not None and not 0 < o.params <= 1:
        raise OckhamError(f"--params is the share of all parameters that stays, in (0, 1]; got {o.params}")
    if o.threads is not None:
        torch.set_num_threads(o.threads)
    target: dict[str, Any] = {"keep_share": o.keep_share, "pattern": o.pattern}
    if o.params is not None:
        target |= {"structure": "depth" if o.depth else "auto", "budget": {"params": f"{100 * o.params}%"}}
    elif o.depth:
        raise OckhamError("--depth takes whole blocks until a budget is met: add --params SHARE")
    with _beside("cpu") as processes:
        first = processes.rank == 0
        several = processes.count > 1
        settings = PruneSettings(ignore=o.ignore, seed=o.seed, divided=several, reconstruct=o.reconstruct)
        try:
            with terminated(), Bars(err_console, quiet=o.quiet or not first, unit="") as bars:
                found = prune_folder(
                    o.model.removeprefix("hf:"),
                    str(o.calibrate),
                    o.out,
                    target=target,
                    windows=(o.windows, o.window),
                    progress=bars.stage,
                    settings=settings,
                    overwrite=o.overwrite,
                )
        except KeyboardInterrupt:
            if first:
                kept = f"finished blocks are kept in {printable(o.out)}"
                _say(f"ockham: stopped; {kept}. Run the same command to go on", "")
            raise typer.Exit(130) from None
    if not first:
        return
    _table(out_console, {side: found[side] for side in ("before", "after")})
    line = f"kept {found['kept']:.2%} of the weights of its blocks in {found['seconds']:.1f} s, seed {o.seed}"
    out_console.print(line, highlight=False)
    typer.echo(f"Report: {Path(o.out) / 'report.html'}")


def _run(options: Basic) -> None:
    assert isinstance(options, Common)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with _beside(options.device) as processes:
        job = build_job(options, "ockham " + shlex.join(sys.argv[1:]), processes)
        first = processes.rank == 0
        for note in job.notes if first else ():
            err_console.print(f"note: {note}", style="dim", markup=False, highlight=False)
        quiet, log_dir = options.quiet or not first, options.log_dir if first else None
        try:
            bars = Bars(err_console, quiet=quiet)
            with terminated(), bars, listening(bars.stage), tensorboard(log_dir) as log:
                job.on_step = bars.step
                for info in job.run():
                    bars.epoch(info)
                    log(info)
        except KeyboardInterrupt:
            if first:
                err_console.print(f"ockham: {resume_hint(job.out)}", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(130) from None
    if first:
        metrics(out_console, job.out)
        typer.echo(f"Report: {job.out / 'report.html'}")


@contextmanager
def _beside(device: str) -> Iterator[Processes]:
    """The processes that torchrun started, joined for the time of the block; this one alone without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_torchelastic_launched():
        yield ALONE
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # the first may write and measure for long while the others wait
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(days=7))
    try:
        yield Processes.world()
    finally:
        dist.destroy_process_group()


def _build(folder: Path, data: str | None, model: str | None, target: str | None) -> tuple[Any, Any]:
    """Data and network that a verb on a result folder was given, after a look at the folder's seal.

    Files are read as the result says its own were: standardised by its mean and std, the same column predicted.
    """
    sealed(folder)
    result = read_result(folder)
    known, builder = result.provenance.dataset, result.provenance.network
    if data is None and (known is None or known.name != "digits"):
        raise OckhamError(f"{folder} is not a result on the digits: say which data with --data")
    reading: dict[str, Any] = {"targets": TARGETS.get(result.metrics.likelihood or "")}
    if data is not None and Path(data).exists() and known is not None:
        reading |= {"target": target or known.target}
        if known.mean is not None and known.std is not None:
            reading |= {"normalize": (known.mean, known.std)}
    found = load_data(data, **reading)
    if known is not None and known.classes and found.classes and found.classes != known.classes[: len(found.classes)]:
        theirs = printable(", ".join(found.classes or ()))
        raise OckhamError(
            f"{folder} tells the classes {printable(', '.join(known.classes or ()))} apart; the data "
            f"{found.name!r} have {theirs}. Name the same classes in the same order (classes.txt)"
        )
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
    target: _Target = None,
    draws: Annotated[int, typer.Option(help="Posterior draws.", min=1)] = 20,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Measure a saved result on test data: posterior predictive and mean network."""
    found, network = _build(folder, data, model, target)
    evaluation(out_console, folder, found, network, draws=draws, device=parse_device(device))


@app.command("audit")
def audit_folder(
    folder: _Folder,
    data: _Data = None,
    model: _Model = None,
    target: _Target = None,
    log_odds: Annotated[float, typer.Option(help="ln P(keep)/P(remove), for posteriors without one.")] = 0.0,
) -> None:
    """Check inclusion probabilities: enumerate the last layer exactly on the training data, and compare."""
    found, network = _build(folder, data, model, target)
    audited(out_console, folder, found, network, log_odds=log_odds)


@app.command()
def inspect(folder: _Folder) -> None:
    """What is in a result, layer by layer."""
    sealed(folder)
    contents(out_console, folder)


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
        _say(f"warning: {printable(message)}", "yellow")


def _say(text: str, style: str) -> None:
    """One unbroken line on the error stream."""
    err_console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
