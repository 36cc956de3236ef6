"""What the terminal shows while a job runs: bars with time left, loss, share kept, accuracy; nothing off a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ockham.errors import OckhamError
from ockham.run.trainer import EpochInfo

__all__ = ["Bars", "tensorboard"]


class Bars:
    """A bar a stage; silent when the console is not a terminal or quiet is asked for."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<14}"),
            BarColumn(),
            TextColumn("{task.completed:.1f}/{task.total:.0f} epochs"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        silent = quiet or not console.is_terminal
        self._progress = Progress(*columns, console=console, transient=False, disable=silent)
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
        raise OckhamError("--log-dir needs tensorboard: pip install 'ockham[tensorboard]'") from error
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
