"""Networks, loaders and surroundings that cannot be worked with: one error of Ockham that says the way out."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ockham
from ockham.core.network import copied
from ockham.errors import OckhamError, OckhamWarning
from ockham.fit.mean_field import PointEstimate
from ockham.methods.gates.training import GateCompression, GateTraining
from ockham.methods.horseshoe import horseshoe

pytestmark = pytest.mark.filterwarnings("ignore")
torch.manual_seed(0)
X = torch.randn(33, 6)
Y = (X[:, 0] > 0).long()


def loader() -> DataLoader:
    return DataLoader(TensorDataset(X, Y), 16)


def mlp(norm: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), norm or nn.Identity(), nn.ReLU(), nn.Linear(8, 2))


def gates(net, data):
    made = GateCompression(net, X[:2], data, training=GateTraining(epochs=1, fine_tune=0))
    list(made)
    return made.result()


@pytest.mark.parametrize("given", [nn.Linear, lambda x: x, None])
def test_what_is_no_network_is_named(given):
    net, data = mlp(), loader()
    posterior, plan = ockham.laplace(net, data), ockham.random_plan(ockham.trace(net, X), 0.2)
    for call in (
        lambda: ockham.compress(given, data),
        lambda: ockham.laplace(given, data),
        lambda: ockham.predict(given, posterior, X),
        lambda: ockham.trace(given, X),
        lambda: ockham.shrink(given, plan),
        lambda: ockham.refresh_batchnorm(given, data),
    ):
        with pytest.raises(OckhamError, match=r"must be an instance; got the class Linear|got (function|None)"):
            call()


VERBS = {
    "compress": lambda net, data: ockham.compress(net, data, training=ockham.Training(epochs=2)),
    "structures": lambda net, data: ockham.compress(net, data, structure="auto", training=ockham.Training(epochs=2)),
    "gates": gates,
    "laplace": ockham.laplace,
}
POSTERIOR = ockham.laplace(mlp(), loader(), structure="diagonal")
OTHERS = {
    "trace": lambda net: ockham.trace(net, X[:2]),
    "reduce": lambda net: ockham.reduce(net, POSTERIOR),
    "prune": lambda net: ockham.prune(net, [X], keep_share=0.5),
    "predict": lambda net: ockham.predict(net, POSTERIOR, X),
    "refresh": lambda net: ockham.refresh_batchnorm(net, loader()),
    "MeanField": lambda net: ockham.MeanField(net, n_data=10),
}
TRAINING = ("compress", "structures", "gates")


def frozen():
    return mlp().requires_grad_(False)


def hollow():
    with torch.device("meta"):
        return mlp()


def scripted_inside():
    return nn.Sequential(torch.jit.script(nn.Linear(6, 8)), nn.Linear(8, 2))


def not_a_number():
    net = mlp()
    net[0].weight.data[2, 1] = torch.nan
    net[3].weight.data[:, 2] = 0  # so that no output shows it
    return net


def hooked(kind):
    net = mlp()
    kind(net[0])
    net(X)
    return net


NETWORKS = {
    "frozen": (frozen, r"requires? a gradient"),
    "meta": (hollow, r"'0\.weight'.*'meta'.*load"),
    "script": (lambda: torch.jit.script(mlp()), "TorchScript.*nn.Module"),
    "traced": (lambda: torch.jit.trace(mlp(), X), "TorchScript.*nn.Module"),
    "script inside": (scripted_inside, "TorchScript.*nn.Module"),
    "nan": (not_a_number, r"'0\.weight' is NaN or infinite in 1 of 48"),
    "empty": (lambda: nn.Sequential(nn.ReLU()), "no parameters"),
    "quantized": (lambda: torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear}), "'0' is quantized"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2)), "Lazy modules.*call the network"),
    "function": (lambda: torch.relu, r"must be a torch\.nn\.Module; got builtin"),
    "class": (lambda: nn.Linear, r"must be an instance; got the class Linear: call it"),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_that_cannot_be_worked_with_is_refused(kind, verb):
    make, said = NETWORKS[kind]
    with pytest.raises(OckhamError, match=said):
        VERBS[verb](make(), loader())


@pytest.mark.parametrize("verb", OTHERS)
@pytest.mark.parametrize("kind", ["script", "script inside", "lazy", "function", "class"])
def test_so_is_it_by_what_trains_nothing(kind, verb):
    make, said = NETWORKS[kind]
    with pytest.raises(OckhamError, match=said if verb != "MeanField" else ""):
        OTHERS[verb](make())


@pytest.mark.parametrize("verb", ["reduce", "prune", "predict", "refresh"])
def test_values_that_are_not_there_are_missed_where_they_are_needed(verb):
    with pytest.raises(OckhamError, match="'meta'"):
        OTHERS[verb](hollow())


def locked():
    net = mlp()
    net.lock = threading.Lock()
    return net


@pytest.mark.parametrize("verb", ["trace", "reduce", "prune"])
def test_what_cannot_be_copied_says_so(verb):
    with pytest.raises(OckhamError, match=r"cannot be copied.*something else than parameters"):
        OTHERS[verb](locked())


@pytest.mark.parametrize("verb", TRAINING)
@pytest.mark.parametrize("kind", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_the_old_weight_norm_is_refused_and_the_new_one_works(kind, verb):
    with pytest.raises(OckhamError, match=r"cannot be copied.*parametrizations"):
        VERBS[verb](hooked(kind), loader())
    if verb == "compress":
        VERBS[verb](hooked(getattr(nn.utils.parametrizations, kind.__name__)), loader())


def test_weights_go_only_where_zeros_pass_through_a_parametrisation():
    """A row of zeros under weight_norm is 0 / 0; orthogonal fills it again; one that scales leaves it alone."""

    class Doubled(nn.Module):
        def forward(self, w):
            return 2.0 * w

    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    nn.utils.parametrizations.weight_norm(net[0])
    nn.utils.parametrizations.orthogonal(net[2])
    nn.utils.parametrize.register_parametrization(net[4], "weight", Doubled())
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    with pytest.warns(OckhamWarning, match=r"2 parametrised tensors.*get_submodule\('0'\), 'weight'"):
        small = ockham.compress(net, loader(), keep_share=0.93, training=ockham.Training(epochs=4)).model
    gone = {n: int(((p == 0) & (before[n] != 0)).sum()) for n, p in small.named_parameters()}
    assert gone["0.parametrizations.weight.original1"] == gone["2.parametrizations.weight.original"] == 0
    assert sum(gone.values()) >= 7 and gone["4.parametrizations.weight.original"]
    assert small(X).isfinite().all()


@pytest.mark.parametrize("verb", TRAINING)
def test_a_last_batch_of_one_under_batch_norm_says_to_drop_it(verb):
    with pytest.raises(OckhamError, match="drop_last=True"):
        VERBS[verb](mlp(nn.BatchNorm1d(8)), loader())


class Once:
    def __init__(self):
        self.batches = iter(loader())

    def __len__(self):
        return 3

    def __iter__(self):
        return self.batches


@pytest.mark.parametrize("verb", TRAINING)
@pytest.mark.parametrize("made", [lambda: iter(loader()), Once, lambda: (b for b in loader())])
def test_a_loader_that_can_be_read_once_is_refused(made, verb):
    with pytest.raises(OckhamError, match="only once"):
        VERBS[verb](mlp(), made())


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
def test_without_gradients_around_it_says_so(block, verb):
    with block():
        if verb == "laplace" and block is torch.no_grad:  # takes its own gradients
            VERBS[verb](mlp(), loader())
            return
        with pytest.raises(OckhamError, match=rf"{block.__name__}\(\).*leave that block"):
            VERBS[verb](mlp(), loader())


@pytest.mark.parametrize("method", [ockham.MeanField, ockham.IVON, ockham.SpikeSlab, PointEstimate])
def test_an_optimizer_without_parameters_of_a_shape_says_so(method):
    nothing, results = [], [("0.weight", mlp()[0].weight * 2)]
    for given in (nothing, results):
        with pytest.raises(OckhamError, match=r"named_parameters\(\)"):
            method(given, n_data=10)
    with pytest.raises(OckhamError, match="Lazy"):
        method(nn.Sequential(nn.LazyLinear(3)).named_parameters(), n_data=10)
    with pytest.raises(OckhamError, match="Lazy"):
        ockham.laplace(nn.Sequential(nn.LazyLinear(2)), loader())


def test_a_horseshoe_over_what_cannot_be_copied_says_so():
    with pytest.raises(OckhamError, match="cannot be copied"):
        horseshoe(hooked(nn.utils.weight_norm))


def test_an_error_without_words_is_named_by_its_kind():
    class Sealed(nn.Linear):
        def __deepcopy__(self, memo):
            raise AssertionError

    with pytest.raises(OckhamError, match=r"cannot be copied \(AssertionError: AssertionError\)"):
        copied(Sealed(2, 2))
