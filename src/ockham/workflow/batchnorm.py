"""Statistics of BatchNorm, taken again from the data after weights went."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ockham.workflow.trainer import Loader, forward, seeded, to_device

__all__ = ["refresh_batchnorm"]


@torch.no_grad()
def refresh_batchnorm(model: nn.Module, loader: Loader, *, batches: int = 100) -> int:
    """Replace running means and variances by averages over batches, under the weights the model now has.

    Args:
        model: changed in place; its modes are restored. Without BatchNorm nothing happens.
        loader: batches of (inputs, targets).
        batches: how many at most.

    Returns:
        Number of layers refreshed.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    modes = {m: m.training for m in model.modules()}
    momenta = {m: m.momentum for m in norms}
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # cumulative average
    try:
        _run(model, loader, batches)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in momenta.items():
            norm.momentum = momentum
    return len(norms)


def _run(model: nn.Module, loader: Loader, batches: int) -> None:
    device = next(model.parameters()).device
    with seeded(0, 0, device):
        for i, batch in enumerate(loader):
            if i == batches:
                break
            x: Any = to_device(batch[0], device)
            forward(model, x)
