"""Adapters: moments as they are stored, refusals, and where a library is installed the library itself."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ockham import from_ivon, from_laplace, from_moments, from_swag, laplace, reduce, score
from ockham.errors import OckhamError, OckhamWarning
from ockham.evidence.gaussian import delta_f
from ockham.fit.ivon import IVON
from ockham.fit.priors import FixedPrior
from ockham.methods.adapters import from_bayesian_torch, from_posteriors, from_pyro


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def parts(net):
    return dict(net.named_parameters())


def spreads(net, low=0.05):
    g = torch.Generator().manual_seed(1)
    return {n: low + 0.1 * torch.rand(p.shape, generator=g) for n, p in net.named_parameters()}


def test_moments_score_and_reduce(net):
    mean, std = {n: p.detach() for n, p in parts(net).items()}, spreads(net)
    for prior in (4.0, FixedPrior(0.25), {n: 4.0 for n in mean}, torch.tensor(4.0)):
        posterior = from_moments(mean, std, prior, n_data=50)
        for name, delta in score(posterior).items():
            want = delta_f(mean[name].reshape(-1), std[name].reshape(-1).double().pow(-2).float(), 4.0)
            torch.testing.assert_close(delta, want)
    small = reduce(net, posterior, keep=0.5)
    assert sum(int((p == 0).sum()) for p in small.parameters() if p.ndim > 1) == 10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"std": {"0.weight": torch.ones(4, 3)}}, "same names"),
        ({"std": "zero"}, "positive"),
        ({"std": "nan"}, "positive|finite"),
        ({"std": "shape"}, "std"),
        ({"prior": None}, "pass its precision"),
        ({"prior": 0.0}, "prior precision"),
        ({"prior": {"0.weight": 1.0}}, "no entry"),
        ({"n_data": 0}, "n_data"),
    ],
)
def test_moments_that_are_none_are_refused(net, change, said):
    std = spreads(net)
    if change.get("std") == "zero":
        change = {"std": {**std, "0.bias": torch.zeros(4)}}
    elif change.get("std") == "nan":
        change = {"std": {**std, "0.bias": torch.full((4,), math.nan)}}
    elif change.get("std") == "shape":
        change = {"std": {**std, "0.bias": torch.ones(1)}}
    given = {"mean": {n: p.detach() for n, p in parts(net).items()}, "std": std, "prior": 1.0, **change}
    with pytest.raises(OckhamError, match=said):
        from_moments(given.pop("mean"), given.pop("std"), given.pop("prior"), **given)


def test_a_prior_that_cannot_be_the_one_is_announced(net):
    mean, std = {n: p.detach() for n, p in parts(net).items()}, spreads(net)
    with pytest.warns(OckhamWarning, match="less"):
        from_moments(mean, std, 1e6)
    with pytest.warns(OckhamWarning, match="tempered"):
        from_moments(mean, std, 1.0, temperature=0.5)


def ivon_like(net, **more):
    params = list(net.parameters())
    count = sum(p.numel() for p in params)
    group = {"params": params, "ess": 200.0, "weight_decay": 1e-2, "hess": torch.linspace(0.1, 2, count), **more}
    return SimpleNamespace(param_groups=[group])


def test_ivon_opt_by_its_attributes(net):
    posterior = from_ivon(ivon_like(net), net)
    flat = torch.cat([g.precision.reshape(-1) for g in posterior.values()])
    torch.testing.assert_close(flat, 200 * (torch.linspace(0.1, 2, 26) + 1e-2))
    assert float(posterior["2.bias"].prior_precision) == pytest.approx(2.0) and posterior.n_data == 200
    with pytest.warns(OckhamWarning, match="tempered"):
        assert from_ivon(ivon_like(net), net, n_data=100).temperature == 0.5
    for bad, said in (
        ({"weight_decay": 0.0}, "prior"),
        ({"hess": torch.ones(3)}, "numbers"),
        ({"hess": -torch.ones(26)}, "positive"),
    ):
        with pytest.raises(OckhamError, match=said):
            from_ivon(ivon_like(net, **bad), net)
    with pytest.raises(OckhamError, match="not the model's"):
        from_ivon(ivon_like(net), nn.Linear(3, 4))
    with pytest.raises(OckhamError, match="lack"):
        from_ivon(torch.optim.SGD(net.parameters(), lr=0.1), net)


def test_our_own_optimizers_need_no_adapter_but_have_one(net):
    opt = IVON(net.named_parameters(), n_data=20)
    with opt.sampled():
        net(torch.randn(5, 3)).square().mean().backward()
    opt.step()
    assert torch.equal(from_ivon(opt, net)["0.weight"].precision, opt.posterior()["0.weight"].precision)


def laplace_like(net, precision, **more):
    params = list(net.parameters())
    mean = torch.cat([p.detach().reshape(-1) for p in params])
    prior = torch.full((26,), 0.5)
    return SimpleNamespace(
        params=params, mean=mean, posterior_precision=precision, prior_precision_diag=prior, n_data=30, **more
    )


def test_laplace_by_its_attributes(net):
    diagonal = torch.linspace(1, 5, 26)
    posterior = from_laplace(laplace_like(net, diagonal), net)
    torch.testing.assert_close(posterior["2.bias"].precision, diagonal[-2:])
    assert posterior["0.weight"].marginal_precision is None and posterior.n_data == 30
    half = torch.randn(26, 26, generator=torch.Generator().manual_seed(0))
    full = half @ half.T + torch.eye(26)
    posterior = from_laplace(laplace_like(net, full), net)
    torch.testing.assert_close(posterior["0.weight"].precision.reshape(-1), full.diagonal()[:12])
    want = 1 / torch.linalg.inv(full.double()).diagonal()[:12].float()
    torch.testing.assert_close(posterior["0.weight"].marginal_precision.reshape(-1), want)
    with pytest.raises(OckhamError, match="not fitted"):
        from_laplace(SimpleNamespace(params=list(net.parameters()), mean=None), net)
    with pytest.raises(OckhamError, match="not the model's"):
        from_laplace(laplace_like(net, diagonal), nn.Linear(2, 2))


def test_swag_moments(net):
    g = torch.Generator().manual_seed(2)
    shots = [
        {n: p.detach() + 0.1 * torch.randn(p.shape, generator=g) for n, p in parts(net).items()} for _ in range(30)
    ]
    buffers = {}
    for name in parts(net):
        stack = torch.stack([s[name] for s in shots])
        buffers[f"{name}_mean"], buffers[f"{name}_sq_mean"] = stack.mean(0), stack.square().mean(0)
    posterior = from_swag(buffers, n_data=1000, weight_decay=1e-3)
    stack = torch.stack([s["0.weight"] for s in shots])
    torch.testing.assert_close(posterior["0.weight"].std, stack.std(0, correction=0), rtol=1e-3, atol=1e-4)
    assert float(posterior["0.weight"].prior_precision) == pytest.approx(1.0)
    with pytest.raises(OckhamError, match="snapshots"):
        from_swag({**buffers, "0.weight_sq_mean": buffers["0.weight_mean"] ** 2}, n_data=10, weight_decay=1.0)
    with pytest.raises(OckhamError, match="weight_decay"):
        from_swag(buffers, n_data=10, weight_decay=0.0)
    with pytest.raises(OckhamError, match="_sq_mean"):
        from_swag(net, n_data=10, weight_decay=1.0)


def test_bayesian_torch_by_its_attributes():
    layer = nn.Module()
    layer.mu_weight, layer.rho_weight = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.full((2, 3), -2.0))
    layer.mu_bias, layer.rho_bias = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.full((2,), -3.0))
    layer.prior_variance = 0.5
    posterior = from_bayesian_torch(nn.ModuleDict({"fc": layer}), n_data=10)
    assert list(posterior) == ["fc.weight", "fc.bias"]
    assert float(posterior["fc.weight"].std[0, 0]) == pytest.approx(math.log1p(math.exp(-2.0)))
    assert float(posterior["fc.weight"].prior_precision) == 4.0
    with pytest.raises(OckhamError, match="dnn_to_bnn"):
        from_bayesian_torch(nn.Linear(2, 2), n_data=1)


def test_posteriors_and_pyro_by_their_attributes(net):
    params, log_sd = {n: p for n, p in parts(net).items()}, {n: s.log() for n, s in spreads(net).items()}
    state = SimpleNamespace(params=params, log_sd_diag=log_sd)
    a = from_posteriors(state, prior=1.0, n_data=10)
    torch.testing.assert_close(a["0.weight"].std, spreads(net)["0.weight"])
    precise = SimpleNamespace(params=params, prec_diag={n: (-2 * s).exp() for n, s in log_sd.items()})
    torch.testing.assert_close(from_posteriors(precise, prior=1.0, n_data=10)["2.bias"].std, a["2.bias"].std)
    guide = SimpleNamespace(
        locs=nn.Linear(2, 2), scales=SimpleNamespace(weight=torch.full((2, 2), 0.1), bias=torch.ones(2))
    )
    b = from_pyro(guide, prior=1.0, n_data=10)
    torch.testing.assert_close(b["weight"].std, torch.full((2, 2), 0.1))
    with pytest.raises(OckhamError, match="prec_diag"):
        from_posteriors(SimpleNamespace(params=params), prior=1.0, n_data=10)
    with pytest.raises(OckhamError, match="locs"):
        from_pyro(net, prior=1.0, n_data=10)


# ------------------------------------------------------------------ the libraries themselves, where installed
def quietly(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


def sampled_std(draw, name, count=400):
    return torch.stack([draw()[name] for _ in range(count)]).std(0)


@pytest.mark.filterwarnings("ignore")
def test_ivon_opt_itself(net):
    package = quietly("ivon")
    opt = package.IVON(net.parameters(), lr=0.05, ess=200, weight_decay=1e-2, beta2=0.99, hess_init=0.5)
    x, y = torch.randn(20, 3), torch.randn(20, 2)
    for _ in range(5):
        with opt.sampled_params(train=True):
            opt.zero_grad()
            (net(x) - y).square().mean().backward()
        opt.step()

    def draw():
        with opt.sampled_params():
            return {n: p.detach().clone() for n, p in net.named_parameters()}

    posterior = from_ivon(opt, net)
    torch.testing.assert_close(sampled_std(draw, "0.weight"), posterior["0.weight"].std, rtol=0.2, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_laplace_torch_itself(net, structure):
    package = quietly("laplace")
    x, y = torch.randn(40, 3), torch.randint(0, 2, (40,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=20)
    la = package.Laplace(
        net, "classification", subset_of_weights="all", hessian_structure=structure, prior_precision=0.7
    )
    la.fit(loader)
    posterior = from_laplace(la, net)
    draws = la.sample(4000).std(0)
    g = posterior["0.weight"]
    torch.testing.assert_close(draws[:12].view(4, 3), g.scored_precision.rsqrt(), rtol=0.1, atol=0)
    assert float(g.prior_precision.reshape(-1)[0]) == pytest.approx(0.7)
    if structure == "diag":  # and our own pass over the same data agrees with it on average over sampled labels
        many = [(x.repeat(400, 1), y.repeat(400))]
        ours = laplace(net, many, structure="diagonal", prior=0.7, n_data=40)
        for name, g in posterior.items():
            torch.testing.assert_close(ours[name].precision, g.precision, rtol=0.15, atol=0.05)


@pytest.mark.filterwarnings("ignore")
def test_bayesian_torch_itself(net):
    package = quietly("bayesian_torch.models.dnn_to_bnn")
    settings = {"prior_mu": 0.0, "prior_sigma": 0.5, "posterior_mu_init": 0.0, "posterior_rho_init": -2.0}
    package.dnn_to_bnn(net, {**settings, "type": "Reparameterization", "moped_enable": False})
    posterior = from_bayesian_torch(net, n_data=10)
    assert list(posterior) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert float(posterior["0.weight"].prior_precision) == pytest.approx(4.0)


@pytest.mark.filterwarnings("ignore")
def test_posteriors_itself(net):
    package = quietly("posteriors")
    import torchopt

    params = {n: p.detach().clone() for n, p in parts(net).items()}
    transform = package.vi.diag.build(
        lambda p, batch: (-sum(v.square().sum() for v in p.values()), torch.tensor([])),
        torchopt.adam(lr=1e-2),
        init_log_sds=-2.0,
    )
    posterior = from_posteriors(transform.init(params), prior=1.0, n_data=10)
    assert float(posterior["0.weight"].std[0, 0]) == pytest.approx(math.exp(-2.0))


@pytest.mark.filterwarnings("ignore")
def test_pyro_itself():
    pyro = quietly("pyro")
    import pyro.distributions as dist
    from pyro.infer.autoguide import AutoNormal

    def model():
        pyro.sample("fc.weight", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))

    pyro.clear_param_store()
    guide = AutoNormal(model, init_scale=0.2)
    guide()
    posterior = from_pyro(guide, prior=1.0, n_data=10)
    assert list(posterior) == ["fc.weight"] and float(posterior["fc.weight"].std[0, 0]) == pytest.approx(0.2, rel=1e-4)
    draws = torch.stack([guide()["fc.weight"] for _ in range(600)]).std(0)
    torch.testing.assert_close(draws, posterior["fc.weight"].std, rtol=0.2, atol=0)
