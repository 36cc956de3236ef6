"""What the user fixed stays fixed: padding rows, pruning masks, tied weights that only look fixed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import ockham
from ockham.core.network import fixed_entries
from ockham.core.posterior import load_posterior
from ockham.fit.priors import FixedPrior
from ockham.methods.spike_slab.optimizer import spike_slab
from ockham.methods.spike_slab.priors import FixedSpikeSlab, MedianRule
from ockham.run.compression import ivon, mean_field

IDS = torch.tensor([[1, 2, 0, 0], [3, 1, 2, 0], [4, 0, 0, 0]])
Y = torch.tensor([0, 1, 0])


class Bag(nn.Module):
    def __init__(self, pad=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.out = nn.Embedding(5, 3, padding_idx=0), nn.Linear(3, 2)
        with torch.no_grad():
            self.words.weight[0] = pad

    def forward(self, ids):
        return self.out(self.words(ids).sum(1))


def step(net, opt):
    opt.zero_grad()
    with opt.sampled():
        row = net.words.weight[0].detach().clone()
        nn.functional.cross_entropy(net(IDS), Y).backward()
    opt.step()
    return row


@pytest.mark.parametrize("pad", [0.0, 0.7])
def test_a_padding_row_keeps_its_value_draws_nothing_and_has_no_posterior(toy, pad):
    net = Bag(pad)
    opt = toy.over(net.named_parameters())
    assert not bool(opt.keep()["words.weight"][0].any())  # from the start
    for _ in range(4):
        assert torch.equal(step(net, opt), torch.full((3,), pad))
    g = opt.posterior()["words.weight"]
    assert not bool(g.keep[0].any()) and bool(g.keep[1:].all())
    assert torch.equal(g.mean[0], torch.full((3,), pad)) and bool((g.std[0] == 0).all())
    assert opt.state[net.words.weight]["noise"].numel() == 12


def test_the_padding_row_pays_no_kl(toy):
    with_row, without = Bag(), Bag()
    opt = toy.over(with_row.named_parameters())
    other = toy.over([(n, p) for n, p in without.named_parameters()])  # a list: the network is not known
    other.remove({"words.weight": torch.arange(5).ne(0)[:, None].expand(5, 3)})
    assert opt.kl() == pytest.approx(other.kl(), rel=1e-9)


def test_hold_does_it_for_a_list_of_parameters_at_any_time(toy):
    net = Bag(0.7)
    opt = toy.over(list(net.named_parameters()))
    step(net, opt)
    with torch.no_grad():
        net.words.weight[0] = 0.7
    opt.hold(net)
    assert torch.equal(step(net, opt), torch.full((3,), 0.7))
    opt.remove({"words.weight": torch.ones(5, 3, dtype=torch.bool).index_fill(0, torch.tensor([2]), False)})
    assert torch.equal(step(net, opt), torch.full((3,), 0.7)) and bool((net.words.weight[2] == 0).all())


def test_fixed_values_go_through_files_predictions_and_reductions(toy, tmp_path):
    net = Bag(0.7)
    opt = toy.over(net.named_parameters())
    step(net, opt)
    opt.remove({"words.weight": torch.ones(5, 3, dtype=torch.bool).index_fill(0, torch.tensor([3]), False)})
    posterior = opt.posterior()
    posterior.save(tmp_path / "p.safetensors")
    back = load_posterior(tmp_path / "p.safetensors")["words.weight"]
    want = posterior["words.weight"]
    assert torch.equal(back.mean, want.mean) and torch.equal(back.keep, want.keep)
    assert torch.equal(back.expected, want.expected) and torch.equal(want.expected[0], torch.full((3,), 0.7))
    drawn = ockham.predict(net, posterior, torch.zeros(1, 4, dtype=torch.long), draws=5)
    assert float(drawn.epistemic) < 0.2  # of the layer behind it alone
    fresh = Bag(0.1)
    other = toy.over(list(fresh.named_parameters()))
    other.start_from(posterior)
    assert torch.equal(step(fresh, other), torch.full((3,), 0.7))


def test_states_and_copies_keep_what_is_fixed(toy, tmp_path):
    net = Bag(0.7)
    opt = toy.over(net.named_parameters())
    step(net, opt)
    torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, tmp_path / "s.pt")
    saved = torch.load(tmp_path / "s.pt", weights_only=True)
    new = Bag()
    new.load_state_dict(saved["net"])
    other = toy.over(new.named_parameters())
    other.load_state_dict(saved["opt"])
    twin, copied = copy.deepcopy((net, opt))
    for _ in range(3):
        rows = [step(n, o) for n, o in ((net, opt), (new, other), (twin, copied))]
    assert all(torch.equal(row, torch.full((3,), 0.7)) for row in rows)
    for n in (new, twin):
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), n.parameters(), strict=True))


def test_a_row_that_is_trained_elsewhere_is_no_fixed_row(toy):
    """The weight also makes the outputs (through functional, where nobody sees it): its gradient says so."""
    net = Bag(0.2)
    opt = toy.over(net.named_parameters())
    for _ in range(3):
        opt.zero_grad()
        with opt.sampled():
            h = net.words(IDS).sum(1)
            nn.functional.cross_entropy(h @ net.words.weight.T, Y).backward()
        opt.step()
    g = opt.posterior()["words.weight"]
    assert bool(g.keep.all()) and bool((g.mean[0] != 0.2).all()) and bool(torch.isfinite(g.precision).all())
    assert opt.state[net.words.weight]["noise"].numel() == 15


def test_a_shared_parameter_is_fixed_only_where_all_modules_say_so():
    net = Bag()
    net.head = nn.Linear(3, 5, bias=False)
    net.head.weight = net.words.weight
    assert fixed_entries(net) == {}
    net.head = nn.Embedding(5, 3, padding_idx=0)
    net.head.weight = net.words.weight
    assert fixed_entries(net)["words.weight"].sum() == 3


def test_pruned_entries_are_no_part_of_the_posterior(toy):
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    prune.random_unstructured(net[0], "weight", amount=0.5)
    mask = net[0].weight_mask.bool()
    opt = toy.over(net.named_parameters())
    before = net[0].weight_orig.detach().clone()
    for _ in range(3):
        toy.step(net, opt)
    assert torch.equal(opt.posterior()["0.weight_orig"].keep, mask)
    assert torch.equal(net[0].weight_orig[~mask], before[~mask])  # the user's to bring back
    assert bool((net[0].weight_orig[mask] != before[mask]).all())


def test_a_home_made_mask_counts_where_the_weights_are_zero():
    layer = nn.Linear(3, 2, bias=False)
    layer.register_buffer("weight_mask", torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
    assert fixed_entries(layer) == {}
    with torch.no_grad():
        layer.weight.mul_(layer.weight_mask)
    assert torch.equal(fixed_entries(layer)["weight"], layer.weight_mask == 0)
    layer.weight_mask[0, 0] = 0.5  # no mask but a scale
    assert fixed_entries(layer) == {}


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
@pytest.mark.parametrize("pad", [0.0, 0.7])
def test_laplace_knows_the_padding_row(structure, pad):
    net = Bag(pad)
    data = [(IDS, Y)] * 3
    posterior = ockham.laplace(net, data, structure=structure)
    g = posterior["words.weight"]
    assert not bool(g.keep[0].any()) and torch.equal(g.mean[0], torch.full((3,), pad))
    small = ockham.reduce(net, posterior, keep=0.6)
    assert torch.equal(small.words.weight[0], net.words.weight[0])
    # the prior is fitted to the rows that were trained
    square = float(net.words.weight[1:].detach().double().square().sum())
    assert float(g.prior_precision) < 12 / square * 1.0001


def test_sliced_optimizers_keep_the_row(toy):
    net = Bag(0.7)
    opt = toy.over(net.named_parameters())
    step(net, opt)
    small = Bag()
    small.words, small.out = nn.Embedding(5, 2, padding_idx=0), nn.Linear(2, 2)
    for (_, p), (n, q) in zip(net.named_parameters(), small.named_parameters(), strict=True):
        q.data = p.data[:, :2].clone() if n != "out.bias" else p.data.clone()
    twin = opt.sliced(dict(small.named_parameters()), lambda n, t: t[:, :2] if n != "out.bias" else t)
    for _ in range(2):
        assert torch.equal(step(small, twin), torch.full((2,), 0.7))
    twin.remove({"words.weight": torch.ones(5, 2, dtype=torch.bool).index_fill(0, torch.tensor([2]), False)})
    assert torch.equal(step(small, twin), torch.full((2,), 0.7))


@pytest.mark.filterwarnings("ignore::ockham.errors.OckhamWarning")
@pytest.mark.parametrize("estimator", [mean_field, ivon, spike_slab])
def test_what_the_user_fixed_comes_out_of_a_compression_as_it_went_in(estimator):
    """Padding rows, entries that torch prunes (whose weight is no leaf) and the statistics of a frozen norm."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(10, 6, padding_idx=0), nn.Flatten(), nn.Linear(18, 8), nn.BatchNorm1d(8),
                        nn.ReLU(), nn.Linear(8, 2))  # fmt: skip
    net[3].requires_grad_(False)
    prune.random_unstructured(net[2], "weight", amount=0.4)
    prune.random_structured(net[5], "weight", amount=0.3, dim=1)
    ids = torch.randint(0, 10, (64, 3))
    net(ids)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    prior = FixedSpikeSlab(inclusion=0.3, slab_variance=1.0) if estimator is spike_slab else FixedPrior(0.3)
    training = ockham.Training(epochs=6, temperature=0.1, prior=prior)
    rule = MedianRule() if estimator is spike_slab else ockham.EvidenceRule()
    found = ockham.compress(net, [(ids, (ids[:, 1] > 4).long())], training=training, estimator=estimator, rule=rule)
    after = found.model.state_dict()
    assert found.keep_share < 1 and not torch.equal(after["0.weight"][1:], before["0.weight"][1:])
    assert torch.equal(after["0.weight"][0], before["0.weight"][0])
    for name in ("running_mean", "running_var", "num_batches_tracked", "weight", "bias"):
        assert torch.equal(after[f"3.{name}"], before[f"3.{name}"]), name
    for name in ("2.weight", "5.weight"):
        held = after[f"{name}_mask"] == 0
        assert bool(held.any()) and torch.equal(after[f"{name}_orig"][held], before[f"{name}_orig"][held])
        assert bool((found.model[int(name[0])].weight[held] == 0).all())
