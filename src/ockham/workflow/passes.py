"""One pass over data for a curvature: in evaluation mode, checked batches, the gradients of a likelihood."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ockham.errors import DataError, OckhamError
from ockham.posterior.curvature import (
    Score,
    empirical_fisher,
    empirical_regression,
    monte_carlo_classification,
    monte_carlo_regression,
    outputs,
)
from ockham.workflow.likelihood import Classification, Likelihood, Regression
from ockham.workflow.trainer import Loader, seeded, to_device

__all__ = ["checked_batches", "evaluating", "score_for"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode inside, every module's own mode again after it; gives the model's device."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield next((p.device for p in model.parameters()), torch.device("cpu"))
    finally:
        for module, mode in modes.items():
            module.training = mode


def checked_batches(loader: Loader, likelihood: Likelihood, model: nn.Module) -> Iterator[Any]:
    """Pairs on the model's device, under a seed; the first is checked against the likelihood.

    Raises:
        DataError: the loader yields something else than pairs, or outputs and targets do not fit.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with seeded(0, 0, device):
        for i, batch in enumerate(loader):
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise DataError(f"the loader must yield pairs (inputs, targets); got {type(batch).__name__}")
            x, y = to_device(batch[0], device), to_device(batch[1], device)
            if i == 0:
                with torch.no_grad():
                    likelihood.check(outputs(model, x), y)
            yield x, y


def score_for(likelihood: Likelihood, empirical: bool = False) -> Score:
    """Which gradients the curvature is made of: of drawn targets (the GGN), or of the data's own.

    Raises:
        OckhamError: targets should be drawn, and the likelihood is a loss of one's own.
    """
    if empirical and isinstance(likelihood, Regression):
        return empirical_regression()
    if empirical:
        return empirical_fisher(lambda f, y: likelihood.nll(f, y) * likelihood.terms(y), likelihood.terms)
    if isinstance(likelihood, Classification):
        return monte_carlo_classification(likelihood.ignore_index)
    if isinstance(likelihood, Regression):
        return monte_carlo_regression()
    raise OckhamError(
        f"a Monte Carlo GGN needs a likelihood to draw targets from: classification or regression; got "
        f"{type(likelihood).__name__}. Pass fisher='empirical' for a loss of your own"
    )
