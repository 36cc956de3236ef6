"""The main loop on the user's own objects: any module, exact resume, untouched inputs, clear errors."""

from __future__ import annotations

import math
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ockham
from ockham.choose.rules import by_magnitude
from ockham.core.files import read_tree, write_tree
from ockham.core.network import protected_names
from ockham.errors import DataError, NonFiniteLossError, OckhamError, OckhamWarning
from ockham.run.compression import point_estimate

QUICK = ockham.Training(epochs=6, learning_rate=1e-2, prior=ockham.FixedPrior(1.0))


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore", OckhamWarning)


def blobs(n: int = 200) -> DataLoader:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (n,), generator=g)
    x = torch.randn(n, 8, generator=g)
    x[:, 0] += 6 * y
    return DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_it_removes_by_evidence_and_leaves_the_users_objects_alone() -> None:
    net = mlp()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    random = torch.get_rng_state()
    result = ockham.compress(net, blobs(), training=ockham.Training(epochs=30, learning_rate=1e-2))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert result.keep_share < 0.9
    zero = sum(int((p == 0).sum()) for p in result.model.parameters())
    assert zero == sum(int((~k).sum()) for k in result.keep.values())
    x, y = blobs().dataset.tensors
    assert (result.predict(x).probabilities.argmax(1) == y).float().mean() > 0.9


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    a, b = (ockham.compress(mlp(), blobs(), training=QUICK) for _ in range(2))
    c = ockham.compress(mlp(), blobs(), training=ockham.Training(epochs=6, learning_rate=1e-2, seed=1))
    assert same(a.model, b.model) and not same(a.model, c.model)


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Dropout(0.3), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path, stop: int) -> None:
    torch.manual_seed(3)
    net, loader = Dropped(), blobs()
    whole = ockham.Compression(net, loader, training=QUICK)
    states = [(p.epoch, whole.state()) for p in whole if p.epoch == stop and _write(tmp_path, whole)]
    assert len(states) == 1
    again = ockham.Compression(net, loader, training=QUICK)
    again.load(read_tree(tmp_path / "state", kind="checkpoint"))
    assert [p.epoch for p in again] == list(range(stop + 1, 7))
    one, two = whole.result(), again.result()
    assert same(one.model, two.model)
    assert all(torch.equal(one.posterior[n].precision, two.posterior[n].precision) for n in one.posterior)
    assert one.rounds == two.rounds


def _write(folder: Path, job: ockham.Compression) -> bool:
    write_tree(folder / "state", job.state(), kind="checkpoint")
    return True


class Reader(nn.Module):
    """Tied embedding, LSTM, attention: everything that layer-wise libraries break."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
        self.mix = nn.Linear(16, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(self.lstm(self.embed(x))[0])
        h = h + self.attend(h, h, h)[0]
        return self.head(h).transpose(1, 2)


def test_embeddings_lstm_attention_and_tied_weights() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 12, (64, 5), generator=g)
    y = x.clone()
    y[:, -1] = -100
    net = Reader()
    result = ockham.compress(net, DataLoader(TensorDataset(x, y), batch_size=16), training=QUICK)
    assert result.model.head.weight is result.model.embed.weight
    assert result.posterior.n_data == 64 * 4
    assert "embed.weight" in result.posterior and "head.weight" not in result.posterior
    assert set(result.posterior) == {n for n, _ in net.named_parameters()}
    assert result.posterior.kept() < result.posterior.size()


def test_regression_learns_its_noise() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4, generator=g)
    y = 2 * x[:, :1] + 0.3 * torch.randn(400, 1, generator=g)
    loader = DataLoader(TensorDataset(x, y), batch_size=50)
    training = ockham.Training(epochs=60, learning_rate=2e-2)
    result = ockham.compress(nn.Linear(4, 1), loader, likelihood="regression", training=training)
    assert result.noise_variance == pytest.approx(0.09, rel=0.25)
    assert result.keep["weight"].tolist() == [[True, False, False, False]]


def test_own_losses_as_mean_and_as_sum_agree() -> None:
    def total(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, reduction="sum")

    one = ockham.compress(mlp(), blobs(), training=QUICK, likelihood=ockham.Loss(total, reduction="sum"))
    two = ockham.compress(
        mlp(), blobs(), training=QUICK, likelihood=ockham.Loss(nn.functional.cross_entropy, reduction="mean")
    )
    assert one.epochs[-1].loss == pytest.approx(two.epochs[-1].loss, rel=1e-3)
    assert one.keep_share == pytest.approx(two.keep_share, abs=0.02)


def test_a_sum_declared_as_a_mean_is_noticed() -> None:
    def total(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, reduction="sum")

    with pytest.warns(OckhamWarning, match="it is a sum"):
        ockham.compress(mlp(), blobs(), training=QUICK, likelihood=ockham.Loss(total, reduction="mean"))


@pytest.mark.parametrize("keep", [0.25, 40])
def test_a_budget_is_met_exactly(keep: float) -> None:
    result = ockham.compress(mlp(), blobs(), training=QUICK, keep=keep)
    assert result.posterior.kept() == (40 if keep == 40 else round(0.25 * 195))


def test_magnitude_goes_through_the_same_door() -> None:
    job = ockham.Compression(
        mlp(), blobs(), training=QUICK, rule=ockham.BudgetRule(0.3, by_magnitude), estimator=point_estimate
    )
    list(job)
    assert job.result().posterior.kept() == round(0.3 * 195)


def test_protected_parameters_lose_nothing() -> None:
    result = ockham.compress(mlp(), blobs(), training=QUICK, ignore=["2", "re:0.bias$"])
    assert all(bool(result.keep[n].all()) for n in ("2.weight", "2.bias", "0.bias"))
    assert not bool(result.keep["0.weight"].all())


def test_ignore_entries() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert protected_names(net, [nn.BatchNorm1d]) == {"1.weight", "1.bias"}
    assert protected_names(net, ["0.bias"]) == {"0.bias"}
    with pytest.raises(OckhamError, match=r"'2' matches no parameter; there are 0\.weight"):
        protected_names(net, ["2"])
    with pytest.raises(OckhamError, match="not a regular expression"):
        protected_names(net, ["re:("])


def test_frozen_parameters_stay() -> None:
    net = mlp()
    net[0].requires_grad_(False)
    result = ockham.compress(net, blobs(), training=QUICK)
    assert torch.equal(result.model[0].weight, net[0].weight)
    assert "0.weight" not in result.posterior


def test_an_emptied_layer_is_said_aloud() -> None:
    with pytest.warns(OckhamWarning, match=r"every weight of '\d.weight' was removed.*ignore="):
        ockham.compress(mlp(), blobs(), training=QUICK, keep_share=2)


class Exploding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = mlp(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) * (math.nan if self.calls > 7 else 1.0)


def test_a_loss_that_becomes_nan_says_when() -> None:
    with pytest.raises(NonFiniteLossError, match="became nan at step 3 of epoch 2"):
        ockham.compress(Exploding(), blobs(), training=QUICK)


def test_bad_data_is_refused() -> None:
    x, y = blobs().dataset.tensors
    with pytest.raises(DataError, match=r"labels must lie in 0\.\.2 .*got 0\.\.5"):
        ockham.compress(mlp(), [(x, y + 3 * (y == 2).long())], training=QUICK)
    with pytest.raises(DataError, match="empty"):
        ockham.compress(mlp(), [], training=QUICK)
    with pytest.raises(DataError, match="read only once"):
        ockham.compress(mlp(), iter([(x, y)]), training=QUICK)
    with pytest.raises(DataError, match="integer labels"):
        ockham.compress(mlp(), [(x, y.float())], training=QUICK)
    with pytest.raises(DataError, match=r"floating weight"):
        ockham.compress(mlp(), [(x, y, y)], training=QUICK)


@pytest.mark.parametrize(
    ("n_data", "text"), [(0, "must be positive"), (-5, "must be positive"), (7, "smaller than one batch")]
)
def test_impossible_n_data_is_refused(n_data: float, text: str) -> None:
    with pytest.raises(DataError, match=text):
        ockham.compress(mlp(), blobs(), training=QUICK, n_data=n_data)


def test_rule_and_budget_exclude_each_other() -> None:
    with pytest.raises(OckhamError, match="either a rule or a budget"):
        ockham.compress(mlp(), blobs(), rule=ockham.EvidenceRule(), keep_share=0.5)


def test_batchnorm_statistics_are_those_of_the_reduced_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
    loader = blobs()
    result = ockham.compress(net, loader, training=QUICK)
    x, _ = loader.dataset.tensors
    first = result.model[0](x)
    assert torch.allclose(result.model[1].running_mean, first.mean(0), atol=1e-4)
    assert result.model[1].momentum == 0.1 and not result.model.training


def test_prediction_knows_regression_from_classification(tmp_path: Path) -> None:
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, x[:, :1] * 2), batch_size=20)
    result = ockham.compress(nn.Linear(4, 1), loader, likelihood="regression", training=QUICK)
    found = result.predict(x, draws=50)
    assert isinstance(found, ockham.RegressionPrediction)
    assert found.mean.shape == (60, 1) and torch.allclose(found.aleatoric.double(), result.noise_variance)
    spread = result.posterior["weight"].std.square() @ x.T.square() + result.posterior["bias"].std.square()
    assert torch.allclose(found.epistemic[:, 0], spread[0], rtol=0.8)
    with pytest.raises(OckhamError, match="use predict_regression"):
        ockham.predict(result.model, result.posterior, x)


def test_a_result_of_python_becomes_a_folder(tmp_path: Path) -> None:
    result = ockham.compress(mlp(), blobs(), training=QUICK)
    result.save(tmp_path / "r")
    back = ockham.load(tmp_path / "r", model=mlp())
    assert same(back, result.model)
    assert torch.equal(ockham.load_posterior(tmp_path / "r")["0.weight"].keep, result.keep["0.weight"])
    assert "weights kept" in repr(result) and len(repr(result)) < 200


def test_settings_are_checked_at_once() -> None:
    with pytest.raises(OckhamError, match="temperature must be positive"):
        ockham.Training(temperature=0)
    with pytest.raises(OckhamError, match="prior must be a Prior"):
        ockham.Training(prior=0.3)
    with pytest.raises(OckhamError, match="a whole number of weights"):
        ockham.BudgetRule(1.5)
    with pytest.raises(OckhamError, match="alias of keep_share"):
        ockham.compress(mlp(), blobs(), keep=0.1, keep_share=0.5)


def test_inputs_that_do_not_fit_the_network_are_named() -> None:
    x, y = blobs().dataset.tensors
    with pytest.raises(DataError, match=r"cannot take the data's inputs, float32 \(200, 5\)"):
        ockham.compress(mlp(), [(x[:, :5], y)], training=QUICK)


def _numpy_augmented(x, y):
    class Noisy(torch.utils.data.Dataset):
        def __init__(self):
            self.own, self.other = np.random.default_rng(5), random.Random(6)

        def __len__(self):
            return len(x)

        def __getitem__(self, i):
            shift = self.own.normal() + self.other.gauss(0, 1) + random.random() + np.random.normal()
            return x[i] + 0.1 * shift, y[i]

    return DataLoader(Noisy(), 16)


def _shuffled(x, y):
    data, order = TensorDataset(x, y), torch.Generator().manual_seed(3)
    return DataLoader(data, 16, shuffle=True, generator=order)


def _sampled(x, y):
    data, order = TensorDataset(x, y), torch.Generator().manual_seed(3)
    sampler = torch.utils.data.WeightedRandomSampler(x[:, 1].sigmoid(), 32, generator=order)
    return DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(sampler, 16, drop_last=False))


def _legacy(x, y):
    class Rows:
        def __init__(self):
            self.rows = np.random.RandomState(4)

        def __len__(self):
            return 3

        def __iter__(self):
            for _ in range(3):
                some = self.rows.permutation(len(x))[:16]
                yield x[some], y[some]

    return Rows()


@pytest.mark.parametrize("made", [_shuffled, _sampled, _numpy_augmented, _legacy])
def test_a_loaders_own_randomness_goes_on_where_it_was(made, tmp_path):
    """From a file; the global generators of torch, NumPy and Python are left as they were found."""
    torch.manual_seed(0)
    x, training = torch.randn(64, 5), ockham.Training(epochs=4)
    y = (x[:, 0] > 0).long()
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    whole = ockham.Compression(net, made(x, y), training=training)
    list(whole)
    half = ockham.Compression(net, made(x, y), training=training)
    epochs = iter(half)
    next(epochs), next(epochs)
    write_tree(tmp_path / "c", half.state(), kind="checkpoint")
    rest = ockham.Compression(net, made(x, y), training=training)
    rest.load(read_tree(tmp_path / "c", kind="checkpoint"))
    list(rest)
    for p, q in zip(whole.network.parameters(), rest.network.parameters(), strict=True):
        assert torch.equal(p, q)
    assert before[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(before[2], torch.get_rng_state())


def test_a_loader_with_other_generators_is_refused():
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    y = (x[:, 0] > 0).long()
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    job = ockham.Compression(net, _shuffled(x, y), training=ockham.Training(epochs=2))
    next(iter(job))
    for other in (_numpy_augmented, lambda x, y: [(x, y)]):
        with pytest.raises(DataError, match=r"generator.*torch\.Generator.*same generator="):
            ockham.Compression(net, other(x, y), training=ockham.Training(epochs=2)).load(job.state())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("epochs", r"training=ockham\.Training\(epochs=\.\.\.\)"),
        ("lr", r"training=ockham\.Training\(learning_rate="),
        ("start", r"rounds=ockham\.Rounds\(start="),
        ("bacth", "did you mean 'batch'"),
    ],
)
def test_a_setting_that_is_given_elsewhere_is_shown_its_place(given, said):
    with pytest.raises(TypeError, match=said):
        ockham.compress(nn.Linear(2, 2), [], **{given: 1})
