"""Modes of a network and global randomness, set inside a block and as they were after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["device_of", "evaluating", "keeping_modes", "seeded"]


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter; the CPU for a network without parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


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
