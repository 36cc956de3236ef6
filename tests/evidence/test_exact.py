"""Enumeration against the reference, brute force, the orthogonal closed form, and bad input."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from ockham.errors import OckhamError
from ockham.evidence.exact import exact_inclusion, inclusion_g_prior
from ockham.methods.spike_slab.formulas import inclusion_log_odds

SETTINGS = {"prior_inclusion": 0.2, "slab_variance": 1.0, "noise_variance": 1.0}


def orthogonal(n, p, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, p, generator=g, dtype=torch.float64))
    x = q * d**0.5
    y = x @ (torch.randn(p, generator=g, dtype=torch.float64) * (torch.arange(p) % 3 == 0)) * 0.5
    return x, y + torch.randn(n, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("case", [0, 1, 2])
def test_equals_the_reference(reference, case):
    c = reference("spike_slab")["linear_gaussian"][case]
    x, y = np.array(c["X"]), np.array(c["y"])
    rest = {k: c[k] for k in SETTINGS}
    found, evidence = exact_inclusion(x, y, **rest)
    assert isinstance(found, np.ndarray) and isinstance(evidence, float)
    np.testing.assert_allclose(found, c["inclusion"], atol=1e-12)
    base = -0.5 * (len(y) * math.log(2 * math.pi) + y @ y)
    assert evidence - base == pytest.approx(c["log_evidence_up_to_constant"], abs=1e-10)


def brute(x, y, rates, variances, noise, g=None):
    """Each subset's marginal likelihood by torch.distributions."""
    n, p = x.shape
    logs, table = [], list(itertools.product((0, 1), repeat=p))
    for bits in table:
        on = [j for j in range(p) if bits[j]]
        part = x[:, on]
        prior = torch.diag(variances[on]) if g is None else g * noise * torch.linalg.inv(part.T @ part)
        cov = noise * torch.eye(n, dtype=x.dtype) + (part @ prior @ part.T if on else 0.0)
        log = MultivariateNormal(torch.zeros(n, dtype=x.dtype), cov).log_prob(y)
        logs.append(log + sum(math.log(r if b else 1 - r) for r, b in zip(rates, bits, strict=True)))
    logs = torch.stack(logs)
    return torch.softmax(logs, 0) @ torch.tensor(table, dtype=x.dtype), torch.logsumexp(logs, 0)


def test_equals_brute_force_with_settings_per_column():
    x, y = orthogonal(15, 5, 3.0)
    x = x + 0.8 * x.roll(1, 1)
    rates, variances = [0.1, 0.3, 0.5, 0.7, 0.2], torch.tensor([0.5, 1.0, 2.0, 0.1, 4.0], dtype=torch.float64)
    want, evidence = brute(x, y, rates, variances, 0.7)
    got = exact_inclusion(x, y, prior_inclusion=rates, slab_variance=variances, noise_variance=0.7)
    torch.testing.assert_close(got.probabilities, want, atol=1e-10, rtol=0)
    assert float(got.log_evidence) == pytest.approx(float(evidence), abs=1e-9)


def test_g_prior_equals_brute_force():
    x, y = orthogonal(15, 4, 3.0, seed=3)
    x = x + 0.8 * x.roll(1, 1)
    want, evidence = brute(x, y, [0.3] * 4, None, 0.7, g=15.0)
    got = inclusion_g_prior(x, y, prior_inclusion=0.3, g=15.0, noise_variance=0.7)
    torch.testing.assert_close(got.probabilities, want, atol=1e-10, rtol=0)
    assert float(got.log_evidence) == pytest.approx(float(evidence), abs=1e-9)


def test_orthogonal_design_equals_the_closed_form_and_the_paired_optimum():
    d, v, s, p0 = 60.0, 1.5, 0.8, 0.2
    x, y = orthogonal(60, 12, d)
    got = exact_inclusion(x, y, prior_inclusion=p0, slab_variance=v, noise_variance=s).probabilities
    b = x.T @ y
    odds = math.log(p0 / (1 - p0)) - 0.5 * math.log1p(v * d / s) + b.square() / (2 * s * s * (d / s + 1 / v))
    torch.testing.assert_close(got, torch.sigmoid(odds), atol=1e-10, rtol=0)
    variance = 1 / (d / s + 1 / v)
    paired = inclusion_log_odds(variance * b / s, variance, math.log(p0 / (1 - p0)), v)
    torch.testing.assert_close(got, torch.sigmoid(paired), atol=1e-10, rtol=0)


def test_twenty_columns_and_order_of_columns_do_not_matter():
    x, y = orthogonal(30, 20, 10.0)
    x = x + 0.5 * x.roll(1, 1)
    got = exact_inclusion(x, y, **SETTINGS).probabilities
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        exact_inclusion(x[:, order], y, **SETTINGS).probabilities, got[order], atol=1e-10, rtol=0
    )


def test_duplicated_columns_share_their_probability():
    x, y = orthogonal(30, 3, 30.0)
    both = torch.cat([x, x[:, :1]], 1)
    got = exact_inclusion(both, y, **SETTINGS).probabilities
    assert float(got[0]) == pytest.approx(float(got[3]), abs=1e-12)
    with pytest.raises(OckhamError, match="independent columns"):
        inclusion_g_prior(both, y, prior_inclusion=0.2, g=10.0, noise_variance=1.0)


def test_same_kind_out():
    x, y = orthogonal(20, 3, 20.0)
    single = exact_inclusion(x.float(), y.float(), **SETTINGS)
    assert single.probabilities.dtype is torch.float32 and single.log_evidence.dtype is torch.float32
    empty = exact_inclusion(x[:, :0], y, **SETTINGS)
    assert empty.probabilities.shape == (0,)
    assert float(empty.log_evidence) == pytest.approx(float(-0.5 * (20 * math.log(2 * math.pi) + y @ y)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"prior_inclusion": 0.0}, "probability"),
        ({"prior_inclusion": 1.2}, "probability"),
        ({"slab_variance": -1.0}, "slab_variance"),
        ({"noise_variance": 0.0}, "noise_variance"),
    ],
)
def test_bad_settings_are_named(change, match):
    x, y = orthogonal(20, 3, 20.0)
    with pytest.raises(OckhamError, match=match):
        exact_inclusion(x, y, **{**SETTINGS, **change})


def test_bad_data_are_named():
    x, y = orthogonal(40, 21, 20.0)
    with pytest.raises(OckhamError, match="p = 20"):
        exact_inclusion(x, y, **SETTINGS)
    with pytest.raises(OckhamError, match=r"X \[n, p\]"):
        exact_inclusion(x[:, :3], y[:-1], **SETTINGS)
    x[0, 0] = math.nan
    with pytest.raises(OckhamError, match="NaN"):
        exact_inclusion(x[:, :3], y, **SETTINGS)
