"""Data sets: digits, splits and statistics, batches, and the real ones."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
import sklearn.datasets
import torch

from ockham.errors import DataError, OckhamError
from ockham.zoo import data

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 6, 5), dtype=np.uint8)
LABELS = (np.arange(40) % 4).astype(np.uint8)


def raw(dataset, x, low=0.0, high=255.0):
    """Undo the standardisation of one-channel pixels through the ends of the value range."""
    return low + (x - dataset.low) / (dataset.high - dataset.low) * (high - low)


# ---- digits


def test_digits_are_scikit_learns_in_a_split_that_never_moves():
    got, (x, y) = data.digits(), sklearn.datasets.load_digits(return_X_y=True)
    both = torch.cat([got.train_x, got.test_x])
    rows = torch.cat([raw(got, both, 0, 16).round().flatten(1), torch.cat([got.train_y, got.test_y])[:, None]], 1)
    assert sorted(map(tuple, rows.int().tolist())) == sorted(map(tuple, np.c_[x, y].astype(int).tolist()))
    assert (len(got.train_x), len(got.test_x), got.image_shape) == (1437, 360, (1, 8, 8))
    assert torch.bincount(got.test_y).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert got.test_y[:12].tolist() == [4, 5, 6, 9, 4, 7, 8, 9, 9, 6, 9, 9]
    assert got.classes == tuple("0123456789") and got.train_x.dtype == torch.float32


def test_digits_split_has_nothing_to_do_with_the_seed_of_a_run():
    torch.manual_seed(1)
    np.random.seed(1)
    one = data.digits()
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(one.test_x, data.digits().test_x)
    assert not torch.equal(one.test_y, data.digits(seed=1).test_y)


# ---- arrays


def test_flat_pixels_share_one_scale():
    flat = PIXELS.reshape(40, 30)
    got = data.from_arrays("flat", (flat, LABELS), (flat, LABELS))
    np.testing.assert_allclose(got.train_x, (flat - flat.mean()) / flat.std(), rtol=1e-5, atol=1e-6)


def test_named_classes_may_lack_examples():
    got = data.from_arrays("some", (PIXELS, LABELS * 2), (PIXELS, LABELS), classes=tuple("abcdefgh"))
    assert len(got.classes) == 8 and int(got.train_y.max()) == 6


@pytest.mark.parametrize(
    ("test", "why"),
    [
        ((PIXELS[:, :5], LABELS), "(1, 6, 5); got (1, 5, 5)"),
        ((PIXELS, LABELS.astype(float)), "got float64"),
    ],
)
def test_a_test_part_unlike_the_training_part(test, why):
    with pytest.raises(DataError, match=re.escape(why)):
        data.from_arrays("pair", (PIXELS, LABELS), test)


def test_one_example_cannot_be_split():
    with pytest.raises(DataError, match="too few"):
        data.from_arrays("one", (PIXELS[:1], LABELS[:1]))


# ---- batches


def test_batches_cover_the_data_once_and_again():
    x = torch.arange(10)
    for shuffle in (False, True):
        batches = data.Batches(x[:, None], -x, batch_size=4, shuffle=shuffle)
        for _ in range(2):
            parts = list(batches)
            assert [len(y) for _, y in parts] == [4, 4, 2] and len(batches) == 3 and batches.n_examples == 10
            seen = torch.cat([a for a, _ in parts])[:, 0]
            assert torch.equal(seen, -torch.cat([b for _, b in parts]))
            assert torch.equal(seen.sort().values, x) and torch.equal(seen, x) == (not shuffle)


def test_one_shuffled_pass_is_one_permutation_of_the_global_generator():
    x = torch.arange(100)
    torch.manual_seed(3)
    expected, state = torch.randperm(100), torch.get_rng_state()
    torch.manual_seed(3)
    passing = iter(data.Batches(x, x, 7, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)  # drawn by iter(), not by the first batch
    assert torch.equal(torch.cat([a for a, _ in passing]), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_ordered_pass_draws_nothing():
    state = torch.get_rng_state()
    list(data.Batches(torch.zeros(5), torch.zeros(5), 2, shuffle=False))
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_batches():
    with pytest.raises(DataError, match="got 0 and 0"):
        data.Batches(torch.zeros(0, 2), torch.zeros(0), 4, shuffle=True)
    with pytest.raises(DataError, match="got 3 and 2"):
        data.Batches(torch.zeros(3, 2), torch.zeros(2), 4, shuffle=True)
    with pytest.raises(OckhamError, match="batch_size"):
        data.Batches(torch.zeros(3, 2), torch.zeros(3), 0, shuffle=True)


# ---- the real ones


@pytest.mark.data
def test_real_mnist(real_data):
    start = time.process_time()
    got = data.load_folder(real_data / "mnist")
    assert time.process_time() - start < 3  # 0.5 s of work; the rest is for a slow machine
    assert (got.train_x.shape, got.test_x.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    mean, std = 0.1306604762738429, 0.30810780717887876  # of the pixels in 0..1, as widely published
    assert (got.low, got.high) == pytest.approx((-mean / std, (1 - mean) / std), rel=1e-5)
    assert got.train_y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]


@pytest.mark.data
def test_real_cifar(real_data):
    got = data.load_folder(real_data / "cifar10")
    std = torch.tensor([0.2470, 0.2435, 0.2616])
    torch.testing.assert_close(1 / (got.high - got.low).flatten(), std, rtol=0, atol=1e-4)
    assert got.classes[3] == "cat" and torch.bincount(got.test_y).tolist() == [1000] * 10
