"""Spike-and-slab inference in the main job on a deep convolutional network."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ockham
from ockham.methods.spike_slab.optimizer import spike_slab
from ockham.methods.spike_slab.priors import FixedSpikeSlab, MedianRule
from ockham.zoo.networks import NETWORKS


@pytest.mark.parametrize("name", ["vgg16_quarter", pytest.param("vgg16", marks=pytest.mark.slow)])
def test_an_epoch_of_vgg(name):
    """Every parameter gets an inclusion, the loss stays finite, the median model is cut out and can be shrunk."""
    torch.manual_seed(0)
    x, y = torch.randn(128, 3, 32, 32), torch.arange(128) % 10
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    training = ockham.Training(epochs=1, prior=FixedSpikeSlab(0.1, 1.0), kl_warmup=0.5)
    job = ockham.Compression(
        NETWORKS[name](),
        loader,
        training=training,
        rounds=ockham.Rounds(start=1, end=1, count=1),
        rule=MedianRule(),
        estimator=spike_slab,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ockham.OckhamWarning)
        losses = [p.loss for p in job]
    found = job.result()
    assert len(losses) == 1 and all(0 < loss < 10 for loss in losses)
    for parameter, g in found.posterior.items():
        assert g.inclusion is not None and g.inclusion.shape == g.mean.shape, parameter
        inside = g.inclusion[g.keep]
        assert bool(((inside > 0.5) & (inside <= 1)).all()), parameter
    groups = ockham.trace(found.model, x[:2])
    small = ockham.shrink(found.model, ockham.random_plan(groups, 0.3))
    assert small(x[:2]).shape == (2, 10)
    prediction = found.predict(x[:8], draws=2)
    assert bool(prediction.probabilities.isfinite().all())
