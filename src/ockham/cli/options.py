"""Options of `ockham compress`: defaults, a TOML file over them, the command line over both."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ockham.errors import OckhamError

__all__ = ["Options", "merged", "parse_device"]


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for; None means: choose by the data."""

    out: str | None = None
    data: str | None = None
    model: str | None = None
    weights: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    prior_variance: float | None = None
    temperature: float | None = None
    method: str = "evidence"
    after_training: bool = False
    posterior: str = "mean-field"
    rule: str = "evidence"
    log_odds: float | None = None
    cap: float | None = None
    keep_share: float | None = None
    structure: bool = False
    macs: float | None = None
    unit_price: float | None = None
    round_to: int = 1
    rounds: int | None = None
    first_round: float | None = None
    ignore: tuple[str, ...] = ()
    likelihood: str | None = None
    baseline: bool = True
    draws: int = 20
    ood: str | None = None
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    resume: bool = False
    log_dir: str | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "draws", "rounds", "threads", "round_to"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OckhamError(f"--{name.replace('_', '-')} must be at least 1; got {value}")

    def refuse(self, owner: str, *names: str) -> None:
        """Raise where options were given that ``owner`` would not heed.

        Raises:
            OckhamError: names them.
        """
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]
        if given:
            raise OckhamError(f"{owner} does not use {', '.join(given)}: drop them")


def merged(config: Path | None, given: Mapping[str, Any]) -> Options:
    """Defaults, then the file, then what was typed.

    Raises:
        OckhamError: the file cannot be read, or has a key or a type that is not an option.
    """
    options = Options()
    if config is not None:
        options = replace(options, **_from_file(config))
    typed = {k: v for k, v in given.items() if v is not None and v != ()}
    return replace(options, **typed)


def _from_file(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OckhamError(f"--config {path}: not readable as TOML ({error})") from error
    known = {f.name: f for f in fields(Options)}
    table = {key.replace("-", "_"): value for key, value in table.items()}
    unknown = [key for key in table if key not in known]
    if unknown:
        raise OckhamError(f"--config {path}: unknown keys {', '.join(unknown)}; known are {', '.join(known)}")
    for key, value in table.items():
        if isinstance(value, list):
            table[key] = tuple(value)
        elif not _fits(value, str(known[key].type)):
            raise OckhamError(f"--config {path}: {key} should be {known[key].type}; got {value!r}")
    return table


def _fits(value: Any, annotation: str) -> bool:
    allowed = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    wanted = next((types for word, types in allowed.items() if word in annotation), (object,))
    return isinstance(value, wanted) and (bool in wanted or object in wanted or not isinstance(value, bool))


def parse_device(name: str) -> torch.device:
    """A torch device that is there.

    Raises:
        OckhamError: unknown, or not on this machine.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OckhamError(f"--device {name}: not on this machine ({str(error).splitlines()[0]}); try cpu") from error
    return device
