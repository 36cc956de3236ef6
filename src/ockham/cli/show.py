"""Tables for people: metrics, contents, an evaluation."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from ockham.core.files import printable
from ockham.core.plain import to_plain
from ockham.core.posterior import load_posterior
from ockham.errors import OckhamError
from ockham.methods.spike_slab.audit import audit
from ockham.run.measure import mean_predictor, measures, posterior_predictor
from ockham.run.result import layer_rows, load
from ockham.run.schema import RESULT, GateFacts, read_result
from ockham.zoo.data import Dataset

__all__ = ["audited", "contents", "evaluation", "metrics"]


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
    classify = noise is None
    if classify is data.test_y.is_floating_point():
        wanted = "class labels" if classify else "numbers"
        raise OckhamError(
            f"{folder} was made for targets that are {wanted}; the data {data.name!r} have the other kind"
        )
    predictors = {"mean network": mean_predictor(network, classify=classify)}
    if result.gates is None:  # gates are folded into the weights: one network is left
        sampled = load_posterior(folder).to(device)
        drawn = posterior_predictor(network, sampled, classify=classify, draws=draws)
        predictors = {"posterior": drawn, **predictors}
    _table(console, {k: measures(p, data.test_x, data.test_y, noise_variance=noise) for k, p in predictors.items()})


def audited(console: Console, folder: Path, data: Dataset, model: nn.Module | None, *, log_odds: float) -> None:
    """Claims about the last layer against enumeration on the training part of a data set."""
    network, posterior = load(folder, model), load_posterior(folder)
    result = read_result(folder)
    said = result.metrics.noise_variance
    noise = None if said is None else torch.as_tensor(said).reshape(-1)
    found = audit(network, posterior, data.train_x, data.train_y, noise_variance=noise, log_odds=log_odds)
    console.print(str(found), markup=False, highlight=False, soft_wrap=True)


def _table(console: Console, columns: dict[str, dict[str, float]]) -> None:
    table = Table("measure", *columns)
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        table.add_row(_plain(name), *(_number(c.get(name)) for c in columns.values()))
    console.print(table)


def _plain(text: object) -> str:
    """Text from a file for the terminal: neither markup nor control characters."""
    return escape(printable(text))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
