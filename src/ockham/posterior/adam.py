"""torch's own fused Adam on flat vectors; what the optimizers of this room step with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam

__all__ = ["adam_"]

_FUSED = {"cpu", "cuda", "mps", "xpu"}


def adam_(
    values: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of Adam in place (Kingma & Ba 2015), no weight decay.

    Args:
        values: to be updated.
        grads: their gradients.
        averages: first moments.
        squares: second moments.
        step: number of this step, from 1.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment.
    """
    fused = values[0].device.type in _FUSED
    counters = [torch.full((), step - 1.0, device=values[0].device if fused else "cpu") for _ in values]
    adam(
        values,
        grads,
        averages,
        squares,
        [],
        counters,
        fused=fused,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=0.0,
        eps=eps,
        maximize=False,
    )
