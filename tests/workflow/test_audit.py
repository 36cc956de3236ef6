"""Claims about the last layer against enumeration: exact for orthogonal columns, a warning where they correlate."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ockham.core.posterior import Gaussian, Posterior
from ockham.errors import OckhamError
from ockham.evidence.exact import exact_inclusion as exact
from ockham.methods.spike_slab.audit import audit
from ockham.methods.spike_slab.correlated import inclusion_paired

F64 = torch.float64


def design(rho, n=50, p=10, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, p, generator=g, dtype=F64)
    for j in range(1, p):
        x[:, j] = rho * x[:, j - 1] + (1 - rho**2) ** 0.5 * x[:, j]
    beta = torch.zeros(p, dtype=F64)
    beta[torch.tensor([0, 3, 7])] = torch.tensor([1.0, -0.7, 0.4], dtype=F64)
    return x, x @ beta + torch.randn(n, generator=g, dtype=F64)


def claimed(x, y):
    """A linear network whose posterior is the paired fixed point."""
    odds = math.log(0.25)
    pi = inclusion_paired(x.T @ x, x.T @ y, log_odds=odds, slab_variance=1.0).probabilities
    variance = 1 / (x.square().sum(0) + 1)
    mean = (2 * variance * (torch.logit(pi) - odds - 0.5 * variance.log()).clamp_min(0)).sqrt()
    mean = mean * torch.sign(x.T @ (y - x @ (pi * mean)) + mean)
    net = torch.nn.Linear(x.shape[1], 1, bias=False, dtype=F64)
    with torch.no_grad():
        net.weight.copy_((pi * mean).unsqueeze(0))
    keep = torch.ones(1, x.shape[1], dtype=torch.bool)
    one = torch.ones((), dtype=F64)
    g = Gaussian(mean.unsqueeze(0), (1 / variance).unsqueeze(0), one, 0 * one, keep, inclusion=pi.unsqueeze(0))
    return net, Posterior({"weight": g}, n_data=len(x))


def test_orthogonal_features_are_claimed_exactly():
    x, y = design(0.0, n=60)
    x = torch.linalg.qr(x)[0] * 60**0.5
    net, posterior = claimed(x, y)
    found = audit(net, posterior, x, y, noise_variance=1.0)
    assert found.max_error < 1e-6 and found.correlation < 1e-6 and found.warnings == () and found.flips == 0
    assert [w.unit for w in found.weights][:1] and len(found.weights) == 10


def test_correlated_features_are_warned_of_and_the_full_covariance_is_closer():
    x, y = design(0.9)
    net, posterior = claimed(x, y)
    found = audit(net, posterior, x, y, noise_variance=1.0)
    want = exact(x, y, prior_inclusion=0.2, slab_variance=1.0, noise_variance=1.0).probabilities
    for w in found.weights:
        assert w.exact == pytest.approx(float(want[w.unit]), abs=1e-6)
    assert found.correlation > 0.8 and found.correlated_error < 0.15 < found.max_error
    assert "correlate" in str(found) and len(found.warnings) >= 2


def test_only_the_sixteen_most_doubtful_of_many_are_enumerated():
    x, y = design(0.3, n=80, p=24)
    net, posterior = claimed(x, y)
    found = audit(net, posterior, x, y, noise_variance=1.0)
    assert len(found.weights) == 16
    doubt = [abs(w.claimed - 0.5) for w in found.weights]
    rest = (posterior["weight"].inclusion[0] - 0.5).abs()
    assert doubt == sorted(doubt) and max(doubt) <= float(rest.sort().values[16]) + 1e-12


def test_a_classifier_and_a_plain_gaussian_posterior():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=g, dtype=F64)
    y = (x[:, 0] + 0.3 * torch.randn(300, generator=g, dtype=F64) > 0).long()
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double()
    opt = torch.optim.LBFGS(net.parameters(), max_iter=40)

    def closure():
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), y) + 0.002 * sum(p.square().sum() for p in net.parameters())
        loss.backward()
        return loss

    opt.step(closure)
    w = net[2].weight.detach().clone()
    one = torch.ones((), dtype=F64)
    keep = torch.ones_like(w, dtype=torch.bool)
    posterior = Posterior({"2.weight": Gaussian(w, torch.full_like(w, 20.0), one, 0 * one, keep)}, n_data=300)
    found = audit(net.train(), posterior, x, y)
    assert len(found.weights) == 10 and all(0 <= v.exact <= 1 for v in found.weights)
    assert net.training and "claimed" in str(found)


def test_networks_that_do_not_end_in_a_linear_layer_are_refused():
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()).double()
    torch.nn.init.ones_(net[0].weight)
    w = net[0].weight.detach()
    one = torch.ones((), dtype=F64)
    g = Gaussian(w, torch.ones_like(w), one, 0 * one, torch.ones_like(w, dtype=torch.bool))
    with pytest.raises(OckhamError, match="last Linear layer"):
        audit(net, Posterior({"0.weight": g}, 10), -torch.ones(4, 3, dtype=F64), torch.zeros(4, dtype=torch.long))
    with pytest.raises(OckhamError, match="none that the posterior knows"):
        audit(net, Posterior({}, 10), torch.ones(4, 3, dtype=F64), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("kind", ["binary", "poisson"])
def test_labels_and_counts_are_audited_by_their_own_curvature(kind):
    """The working response of iteratively reweighted least squares, enumerated by hand."""
    x = design(0.3, n=80)[0][:, :4]
    net = torch.nn.Linear(4, 1, bias=False, dtype=F64)
    net.weight.data = torch.tensor([[0.5, 0.0, -0.2, 0.0]], dtype=F64)
    f = (x @ net.weight.T).detach()
    mean = f.sigmoid() if kind == "binary" else f.exp()
    curvature = mean * (1 - mean) if kind == "binary" else mean
    y = (torch.bernoulli if kind == "binary" else torch.poisson)(mean, generator=torch.Generator().manual_seed(0))
    one = torch.ones((), dtype=F64)
    g = Gaussian(net.weight.detach(), torch.full((1, 4), 30.0, dtype=F64), one, 0 * one, torch.ones(1, 4).bool())
    found = audit(net, Posterior({"weight": g}, n_data=80, likelihood=kind), x, y[:, 0])
    root = curvature.sqrt()
    working = (f + (y - mean) / curvature) * root
    want = exact(x * root, working[:, 0], prior_inclusion=0.5, slab_variance=1.0, noise_variance=1.0).probabilities
    assert len(found.weights) == 4
    for w in found.weights:
        assert w.exact == pytest.approx(float(want[w.unit]), abs=1e-6)


def test_targets_that_cannot_be_audited_are_named():
    x, y = design(0.0)
    net, posterior = claimed(x, y)
    wrong = {"example 3": y.clone(), "(49,)": y[1:], "no batch axis": y[0], "NoneType": None}
    wrong["example 3"][3] = math.nan
    for words, targets in wrong.items():
        with pytest.raises(OckhamError) as caught:
            audit(net, posterior, x, targets, noise_variance=1.0)
        assert words in str(caught.value), words
    broken = x.clone()
    broken[7, 2] = math.nan
    with pytest.raises(OckhamError, match="outputs of the network are NaN or infinite, first at example 7"):
        audit(net, posterior, broken, y, noise_variance=1.0)
    two = torch.nn.Linear(10, 2, dtype=F64)
    g = Gaussian(two.weight.detach(), torch.full((2, 10), 30.0, dtype=F64), torch.ones((), dtype=F64),
                 torch.zeros((), dtype=F64), torch.ones(2, 10).bool())  # fmt: skip
    classes = Posterior({"weight": g}, n_data=50)
    labels = (y > 0).int()
    assert len(audit(two, classes, x, labels).weights) == len(audit(two, classes, x, labels.long()).weights) == 20
    with pytest.raises(OckhamError, match=r"labels must lie in 0\.\.1"):
        audit(two, classes, x, labels + 4)


def test_a_regression_in_its_own_unit_can_be_audited():
    """Back in the targets' unit the prior of the last bias has a mean; the weights of the layer do not."""
    x, y = design(0.0)
    net, posterior = claimed(x, y)
    one = torch.ones(1, dtype=F64)
    biased = torch.nn.Linear(10, 1, dtype=F64)
    biased.load_state_dict({"weight": net.weight.detach(), "bias": 5 * one})
    g = Gaussian(5 * one, 30 * one, one, 5 * one, torch.ones(1).bool())
    plain = {"weight": replace(posterior["weight"], inclusion=None), "bias": g}
    found = audit(biased, Posterior(plain, n_data=len(x)), x, y + 5, noise_variance=1.0)
    unbiased = audit(net, Posterior({"weight": plain["weight"]}, n_data=len(x)), x, y, noise_variance=1.0)
    assert [w.exact for w in found.weights] == pytest.approx([w.exact for w in unbiased.weights], abs=1e-9)
