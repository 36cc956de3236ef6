"""Likelihoods against torch.distributions and by hand: values, terms, weights, shapes, refusals."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributions as D
from torch import nn
from torch.nn import functional as F

from ockham.core.likelihood import (
    Binary,
    CausalLanguage,
    Classification,
    Loss,
    Poisson,
    Regression,
    likelihood_from,
)
from ockham.errors import DataError, OckhamError


def g(seed=0):
    return torch.Generator().manual_seed(seed)


LOGITS = torch.randn(8, 3, generator=g())
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def test_classification_with_weights_is_the_weighted_sum():
    weight, by_class = torch.rand(8, generator=g(1)), torch.tensor([1.0, 2.0, 0.5])
    each = -D.Categorical(logits=LOGITS).log_prob(LABELS)
    plain = Classification()
    torch.testing.assert_close(plain.nll(LOGITS, LABELS), each.mean())
    torch.testing.assert_close(plain.nll(LOGITS, LABELS, weight), (weight * each).sum() / 8)
    plain.mean_weight = 0.25
    torch.testing.assert_close(plain.nll(LOGITS, LABELS, weight), (weight * each).sum() / 2)
    both = Classification(class_weights=by_class)
    torch.testing.assert_close(both.nll(LOGITS, LABELS, weight), (weight * by_class[LABELS] * each).sum() / 8)
    assert both.terms(LABELS, weight) == pytest.approx(float((weight * by_class[LABELS]).sum()))
    assert both.terms(LABELS) == pytest.approx(float(by_class[LABELS].sum())) and plain.terms(LABELS) == 8


@pytest.mark.parametrize("weights", [[-1.0, 2.0], [math.nan, 1.0], [0.0, 0.0]])
def test_class_weights_that_weigh_nothing_sensible_are_refused(weights):
    with pytest.raises(OckhamError, match="not negative, not all zero"):
        Classification(class_weights=torch.tensor(weights))


def test_class_weights_come_as_people_have_them():
    want = Classification(class_weights=torch.tensor([1.0, 2.0, 0.5])).nll(LOGITS, LABELS)
    for given in ([1, 2, 0.5], np.array([1, 2, 0.5]), torch.tensor([1, 2, 0.5], dtype=torch.float64)):
        torch.testing.assert_close(Classification(class_weights=given).nll(LOGITS, LABELS), want)


def test_padding_is_no_data_with_and_without_weights():
    labels = LABELS.clone()
    labels[::2] = -100
    kept = slice(1, None, 2)
    want = F.cross_entropy(LOGITS[kept], LABELS[kept])
    likelihood = Classification()
    torch.testing.assert_close(likelihood.nll(LOGITS, labels), want)
    torch.testing.assert_close(likelihood.nll(LOGITS, labels, torch.ones(8)), want)
    assert likelihood.terms(labels) == likelihood.terms(labels, torch.ones(8)) == 4
    weighted = Classification(class_weights=torch.ones(3))
    assert weighted.terms(labels) == 4 and float(likelihood.right(LOGITS, labels)) == pytest.approx(
        float((LOGITS[kept].argmax(1) == LABELS[kept]).float().mean())
    )


def test_dense_classes_on_either_axis_and_refused_where_both_fit():
    logits, labels = torch.randn(2, 3, 5, generator=g()), torch.randint(0, 3, (2, 5), generator=g(2))
    want = F.cross_entropy(logits, labels)
    for likelihood, output in ((Classification(), logits), (Classification(), logits.movedim(1, -1))):
        likelihood.check(output, labels)
        torch.testing.assert_close(likelihood.nll(output, labels), want)
    # the axis found with the first batch holds for a batch in which both would fit
    last = Classification()
    last.check(logits.movedim(1, -1), labels)
    square, few = torch.randn(2, 3, 3, generator=g(3)), labels[:, :3]
    torch.testing.assert_close(last.nll(square, few), F.cross_entropy(square.movedim(-1, 1), few))
    plain, head = Classification(), Classification()
    plain.check(square, few)  # tensors are [N, K, ...] where both fit, as ever
    torch.testing.assert_close(plain.nll(square, few), F.cross_entropy(square, few))
    found = head.output_of(SimpleNamespace(logits=square))
    with pytest.raises(DataError, match=r"axis 1 or on the last.*Classification\(axis=1\)"):
        head.check(found, few)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int8])
def test_labels_of_other_integer_types_and_with_an_axis_too_many(dtype):
    want = F.cross_entropy(LOGITS, LABELS)
    likelihood = Classification()
    for labels in (LABELS.to(dtype), LABELS[:, None].to(dtype)):
        likelihood.check(LOGITS, labels)
        torch.testing.assert_close(likelihood.nll(LOGITS, labels), want)


@pytest.mark.parametrize(
    ("output", "target", "text"),
    [
        (LOGITS, LABELS.float(), r"integer labels; got torch.float32"),
        (LOGITS, F.one_hot(LABELS).float(), r"argmax"),
        (LOGITS, LABELS[:5], r"\(8, 3\) for \(5,\)"),
        (LOGITS, LABELS + 1, r"0\.\.2 .*got 1\.\.3"),
        (LOGITS[:, :1], LABELS, r"0\.\.0 .*likelihood='binary'"),
        (LOGITS, 3, r"no batch axis.*DataLoader"),
        (LOGITS, torch.tensor(1), r"no batch axis.*DataLoader"),
        (LOGITS.T, LABELS, r"\(3, 8\) for \(8,\)"),
    ],
)
def test_labels_that_cannot_be_are_named(output, target, text):
    with pytest.raises(DataError, match=text):
        Classification().check(output, target)


def test_binary_and_poisson_are_the_distributions():
    f = torch.randn(6, 2, generator=g())
    y = torch.randint(0, 2, (6, 2), generator=g(1))
    torch.testing.assert_close(Binary().nll(f, y), -D.Bernoulli(logits=f).log_prob(y.float()).mean())
    counts = torch.randint(0, 5, (6, 2), generator=g(2))
    torch.testing.assert_close(Poisson().nll(f, counts), -D.Poisson(f.exp()).log_prob(counts.float()).mean())
    assert Binary().terms(y) == Poisson().terms(counts) == 12
    torch.testing.assert_close(Binary().nll(f[:, :1], y[:, 0]), Binary().nll(f[:, 0], y[:, 0]))
    Binary().check(f, y.bool())
    for likelihood, bad in ((Binary(), y * 2), (Poisson(), counts - 1), (Poisson(), counts + 0.5)):
        with pytest.raises(DataError, match="must"):
            likelihood.check(f, bad)


@pytest.mark.parametrize("likelihood", [Binary(), Poisson(), Regression()])
def test_only_axes_of_size_one_may_differ(likelihood):
    target = torch.ones(4, 3)
    for output in (torch.zeros(3, 4), torch.zeros(12), torch.zeros(4, 1), torch.zeros(4, 4)):
        with pytest.raises(DataError, match=r"axis by axis.*outputs"):
            likelihood.check(output, target)
    likelihood.check(torch.zeros(4, 1, 3), target)
    likelihood.check(torch.zeros(4, 1), torch.ones(4))
    with pytest.raises(DataError):
        likelihood.check(torch.zeros(1, 4), torch.ones(4))


def test_regression_has_a_noise_for_every_output_and_counts_in_the_targets_unit():
    likelihood = Regression()
    location, scale = torch.tensor([5.0, -2000.0]), torch.tensor([0.01, 300.0])
    likelihood.set_units(location, scale, torch.tensor([0.5, 2.0]))
    f = torch.randn(7, 2, generator=g())
    y = location + scale * torch.randn(7, 2, generator=g(1))
    want = -D.Normal(location + scale * f, scale * torch.tensor([0.5, 2.0])).log_prob(y).mean()
    torch.testing.assert_close(likelihood.nll(f, y), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(likelihood.noise_variance, (scale * torch.tensor([0.5, 2.0])).double().square())
    with pytest.raises(OckhamError, match="noise variance must be positive"):
        likelihood.set_noise(torch.tensor([1.0, 0.0]))


def test_targets_in_double_lose_nothing_at_a_shift_of_many_spreads():
    y = torch.randn(50, 1, generator=g(), dtype=torch.float64)
    near, far = Regression(), Regression()
    near.set_units(torch.zeros(1), torch.ones(1), torch.ones(1))
    far.set_units(torch.full((1,), 1e10, dtype=torch.float64), torch.full((1,), 1e6), torch.ones(1))
    f = torch.zeros(50, 1)
    got, want = (one.nll(f, target).item() for one, target in ((far, 1e6 * y + 1e10), (near, y)))
    assert got - math.log(1e6) == pytest.approx(want, abs=1e-5)


def test_drawn_targets_have_the_likelihoods_own_moments():
    f = torch.tensor([[0.3], [-1.0]]).repeat(1, 20000)
    for likelihood, mean, variance in (
        (Binary(), f.sigmoid(), f.sigmoid() * (1 - f.sigmoid())),
        (Poisson(), f.exp(), f.exp()),
    ):
        drawn = likelihood.drawn(f, torch.zeros_like(f), g(5))
        torch.testing.assert_close(drawn.mean(1), mean[:, 0], rtol=0.05, atol=0.02)
        torch.testing.assert_close(drawn.var(1), variance[:, 0], rtol=0.05, atol=0.02)
    likelihood = Regression()
    likelihood.set_units(torch.tensor([10.0]), torch.tensor([3.0]), torch.tensor([0.5]))
    drawn = likelihood.drawn(f, torch.zeros_like(f), g(5))
    torch.testing.assert_close(drawn.mean(1), (10 + 3 * f[:, 0]).double(), rtol=0.05, atol=0.02)
    torch.testing.assert_close(drawn.var(1), torch.full((2,), 2.25, dtype=torch.float64), rtol=0.05, atol=0.02)


def test_causal_language_shifts_inside_and_counts_tokens():
    logits, ids = torch.randn(3, 6, 11, generator=g()), torch.randint(0, 11, (3, 6), generator=g(1))
    labels = ids.clone()
    labels[0, 4:] = -100
    likelihood = CausalLanguage()
    likelihood.check(logits, labels)
    want = F.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(likelihood.nll(logits, labels), want)
    assert likelihood.terms(labels) == 13
    weight = torch.tensor([1.0, 0.0, 2.0])
    assert likelihood.terms(labels, weight) == 3 + 2 * 5
    drawn = likelihood.drawn(logits, labels, g(2))
    assert torch.equal(drawn[:, 0], labels[:, 0]) and torch.equal(drawn == -100, labels == -100)
    with pytest.raises(DataError, match=r"same tokens.*\(3, 5, 11\) for \(3, 6\)"):
        likelihood.check(logits[:, :-1], labels)


def test_own_losses_take_anything_and_explain_what_they_cannot():
    output, target = {"a": torch.ones(4)}, {"b": torch.zeros(4)}
    loss = Loss(lambda o, t: (o["a"] - t["b"]).square().sum(), reduction="sum")
    assert float(loss.nll(output, target)) == 1.0 and loss.terms(target) == 4
    with pytest.raises(DataError, match=r"function of ockham.Loss cannot take dict .*KeyError: 'c'.*output="):
        Loss(lambda o, t: o["c"], reduction="mean").nll(output, target)
    with pytest.raises(OckhamError, match=r"scalar tensor; got float32 \(8,\)"):
        Loss(nn.CrossEntropyLoss(reduction="none"), reduction="mean").nll(LOGITS, LABELS)
    with pytest.raises(OckhamError, match="scalar tensor; got float"):
        Loss(lambda o, t: 0.5, reduction="mean").nll(LOGITS, LABELS)
    with pytest.raises(DataError, match="n_data="):
        Loss(lambda o, t: o.mean(), reduction="mean").terms(None)


def test_own_losses_take_weights_only_as_a_required_third_argument():
    def weighted(output, target, weight):
        return (weight * F.cross_entropy(output, target, reduction="none")).sum()

    loss, weight = Loss(weighted, reduction="sum"), torch.arange(8.0)
    torch.testing.assert_close(loss.nll(LOGITS, LABELS, weight), Classification().nll(LOGITS, LABELS, weight))
    assert loss.terms(LABELS, weight) == 28
    for function in (F.cross_entropy, nn.CrossEntropyLoss(), lambda o, t: o.sum()):  # torch's third is class weights
        with pytest.raises(OckhamError, match="third argument"):
            Loss(function, reduction="mean").nll(LOGITS, LABELS, weight)


def test_names_of_likelihoods():
    for name in ("classification", "binary", "poisson", "regression", "causal-lm"):
        assert likelihood_from(name).kind == name
    with pytest.raises(OckhamError, match=r"'binary'.*got 'gaussian'"):
        likelihood_from("gaussian")


@pytest.mark.parametrize("call", ["nll", "total", "each"])
def test_labels_out_of_range_in_a_later_batch_are_a_data_error(call):
    """`check` sees the first batch only."""
    with pytest.raises(DataError, match=r"labels must lie in 0\.\.2 .*got 0\.\.8"):
        getattr(Classification(), call)(torch.zeros(4, 3), torch.tensor([0, 1, 8, 2]))
