"""Modes of a network and global randomness, set inside a block and as they were after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["device_of", "evaluating", "frozen_modules", "keeping_modes", "seeded", "train_"]


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter; the CPU for a network without parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def frozen_modules(model: nn.Module) -> set[nn.Module]:
    """Modules that have parameters of which none requires a gradient, and all that is inside them."""
    found: set[nn.Module] = set()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            found.update(module.modules())
    return found


def train_(model: nn.Module) -> nn.Module:
    """Training mode, in place, but evaluation mode for what is wholly frozen: its dropout and statistics stay out."""
    model.train()
    for module in frozen_modules(model):
        module.training = False
    return model


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside the block, every module is in its own training or evaluation mode again after it."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode inside the block, every module's own mode again after it.

    Yields:
        The device of the network.
    """
    with keeping_modes(model):
        model.eval()
        yield device_of(model)


@contextmanager
def seeded(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Global randomness of (seed, epoch) inside the block, the old state after it."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((seed * 1_000_003 + epoch * 7919 + 17) % 2**63)
        yield
