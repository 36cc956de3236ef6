"""torch's own fused Adam on flat vectors; what the optimizers of this room step with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam

__all__ = [
    "adam_",
]

_FUSED = {"cpu", "cuda", "mps", "xpu"}


def adam_(
    value: Tensor,
    grad: Tensor,
    average: Tensor,
    square: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> None:
    """One step of Adam in place (Kingma & Ba 2015) on the gradient grad + decay * value.

    Args:
        value: vector to be updated.
        grad: gradient of the loss, left as it is.
        average: first moment.
        square: second moment.
        step: number of this step, from 1.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        decay: precision of a Gaussian pull towards zero, in the units of the gradient.
    """
    fused = value.device.type in _FUSED
    counter = torch.full((), step - 1.0, device=value.device if fused else "cpu")
    adam(
        [value],
        [grad],
        [average],
        [square],
        [],
        [counter],
        fused=fused,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=decay,
        eps=eps,
        maximize=False,
    )
