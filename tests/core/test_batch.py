"""What loaders yield and networks return: every form is read, everything else is refused by name."""

from __future__ import annotations

import itertools
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from ockham.core.batch import Batch, call, described, read_batch, sized, tensor_of
from ockham.errors import DataError, OckhamError

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
Pair = namedtuple("Pair", ["left", "right"])


class Sum(nn.Module):
    """Adds what it is given, so that a wrong order or a lost input shows."""

    def __init__(self, returns="tensor"):
        super().__init__()
        self.returns = returns

    def forward(self, left, right=None):
        total = left if right is None else left - 2 * right
        return {"tensor": total, "tuple": (total, left), "dict": {"out": total}, "logits": Answer(total)}[self.returns]


class Answer:
    def __init__(self, logits):
        self.logits = logits


def test_every_form_of_inputs_reaches_the_network():
    want = X - 2 * (X + 1)
    for x in ((X, X + 1), [X, X + 1], {"left": X, "right": X + 1}, {"right": X + 1, "left": X}, Pair(X, X + 1)):
        assert torch.equal(call(Sum(), read_batch((x, Y))), want), type(x)
    mapped = read_batch({"left": X, "labels": Y, "right": X + 1})
    assert torch.equal(call(Sum(), mapped), want) and mapped.target is Y and mapped.size == 6
    assert torch.equal(call(Sum(), read_batch([X, Y])), X)


def test_a_named_tuple_is_handed_over_whole_where_the_network_wants_one_thing():
    class Whole(nn.Module):
        def forward(self, pair, extra=None):
            return pair.left - pair.right

    torch.testing.assert_close(call(Whole(), read_batch((Pair(X, X + 1), Y))), torch.full_like(X, -1))


def test_a_lone_keyword_goes_by_position_where_the_network_has_no_such_name():
    net = nn.Sequential(nn.Embedding(5, 2), nn.Flatten())
    ids = torch.ones(6, 3, dtype=torch.long)
    assert call(net, read_batch({"input_ids": ids, "labels": Y})).shape == (6, 6)
    with pytest.raises(DataError, match=r"input_ids=int64 \(6, 3\), mask=.*unexpected keyword"):
        call(net, read_batch({"input_ids": ids, "mask": ids, "labels": Y}))


def test_packed_sequences_stay_whole_on_every_way():
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(5, 2)], enforce_sorted=False)
    batch = read_batch((packed, torch.tensor([0, 1]))).to("cpu")
    assert isinstance(batch.args[0], nn.utils.rnn.PackedSequence) and batch.packed and batch.size == 2
    assert Batch((packed,)).size == 2 and not Batch((X,)).packed


def test_parts_of_packed_sequences_are_those_of_the_examples():
    series = [torch.randn(length, 2) for length in (3, 4, 1, 4)]
    whole = Batch((nn.utils.rnn.pack_sequence(series, enforce_sorted=False),))
    net = nn.GRU(2, 3)
    alone = [net(one[:, None])[1][0] for one in series]
    for rows in (slice(0, 1), slice(1, 4), torch.tensor([3, 0])):
        part = whole.part(rows).args[0]
        found, picked = net(part)[1][0], list(range(4))[rows] if isinstance(rows, slice) else rows.tolist()
        assert len(part.data) == sum(len(series[i]) for i in picked)
        torch.testing.assert_close(found, torch.cat([alone[i] for i in picked]))


def test_weights_come_third_and_parts_keep_all_that_belongs_together():
    batch = read_batch((X, Y, torch.arange(6.0)))
    part = batch.part(slice(2, 4))
    assert part.weight.tolist() == [2, 3] and torch.equal(part.args[0], X[2:4]) and torch.equal(part.target, Y[2:4])
    nested = Batch(({"a": X, "constant": torch.ones(3)},), {}, Y).part(slice(0, 2))
    assert nested.args[0]["a"].shape == (2, 4) and nested.args[0]["constant"].shape == (3,)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (X, r"pairs .*got float32 \(6, 4\).*batch="),
        ((X,), r"tuple of 1 \(float32 \(6, 4\)\).*batch="),
        ((X, X, X, Y), r"tuple of 4"),
        ((X, None), r"targets of a batch are None"),
        ((X, X, Y), r"floating weight.*int64 \(6,\).*\(\(x, z\), y\)"),
        ({"x": X, "y": Y}, r"'labels'; got dict \{x: float32 \(6, 4\), y: int64 \(6,\)\}.*batch="),
        (object(), r"got object"),
        ("text", r"got str"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_way_out(raw, text):
    with pytest.raises(DataError, match=text):
        read_batch(raw)


def test_a_function_of_the_users_reads_everything_else():
    assert read_batch({"x": X, "y": Y}, lambda raw: Batch((raw["x"],), {}, raw["y"])).target is Y
    with pytest.raises(DataError, match=r"batch= cannot read .*KeyError: 'z'"):
        read_batch({"x": X}, lambda raw: Batch((raw["z"],)))
    with pytest.raises(DataError, match=r"batch= must return ockham.Batch.*got tuple of 2"):
        read_batch({"x": X}, lambda raw: (raw["x"], None))


def test_outputs_are_tensors_logits_or_what_output_takes_out():
    batch = read_batch((X, Y))
    assert tensor_of(call(Sum("logits"), batch)) is X
    assert tensor_of(call(Sum("tuple"), batch, lambda found: found[0])) is X
    for returns, text in (("tuple", "tuple of 2"), ("dict", "dict {out")):
        with pytest.raises(DataError, match=rf"{text}.*output="):
            tensor_of(call(Sum(returns), batch))
    with pytest.raises(DataError, match=r"output= cannot read .*tuple of 2.*IndexError"):
        call(Sum("tuple"), batch, lambda found: found[7])


def test_errors_of_the_network_say_what_it_was_given():
    with pytest.raises(DataError, match=r"float32 \(6, 4\): RuntimeError"):
        call(nn.Linear(5, 2), read_batch((X, Y)))
    with pytest.raises(DataError, match="TypeError"):
        call(nn.Linear(4, 2), read_batch(((X, X, X), Y)))


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.embed = nn.Conv2d(3, 2, 3), nn.Embedding(5, 2)

    def forward(self, x):
        return self.embed(x) if x.ndim == 2 else self.conv(x)


@pytest.mark.parametrize(
    ("x", "way"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"x\.to\(torch\.float32\) / 255"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.float64), r"x\.to\(torch\.float32\)$"),
        (torch.zeros(2, 8, 8, 3), r"x\.permute\(0, 3, 1, 2\)"),
        (torch.full((2, 4), 7), "Embedding has no row"),
        (np.zeros((2, 3, 8, 8), dtype=np.float32), r"torch\.as_tensor\(x\)"),
    ],
)
def test_what_a_network_cannot_take_is_said_with_what_mends_it(x, way):
    with pytest.raises(DataError, match=way) as found:
        call(Image(), read_batch((x, Y[:2])))
    assert str(found.value).count("\n") == 0


def test_loaders_without_length_need_the_number_of_steps():
    class Stream(IterableDataset):
        def __iter__(self):
            return ((X, Y) for _ in itertools.count())

    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    with pytest.raises(DataError, match="steps_per_epoch="):
        sized(loader)
    finite = sized(loader, 3)
    assert len(finite) == 3 and len(list(finite)) == 3 and len(list(finite)) == 3
    short = sized([(X, Y)] * 2, 3)
    with pytest.raises(DataError, match="ends after 2 batches"):
        list(short)
    for bad, text in ((iter([(X, Y)]), "read only once"), ([], "empty"), (3, r"got int\. .*DataLoader")):
        with pytest.raises(DataError, match=text):
            sized(bad)
    with pytest.raises(OckhamError, match="at least 1"):
        sized(loader, 0)
    plain = [(X, Y)]
    assert sized(plain) is plain


def test_descriptions_are_short():
    many = {f"k{i}": torch.zeros(1) for i in range(20)}
    assert described(many).count("float32") == 6 and described([X] * 9).count("float32") == 4
