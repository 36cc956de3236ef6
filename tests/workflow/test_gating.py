"""Gates on networks: one per structure, true ELBO, state, removal for good, surgery and folding agree."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import ockham
from ockham.errors import OckhamError
from ockham.methods.gates import lognormal
from ockham.methods.gates.attach import GATE_RULES
from ockham.methods.gates.noise import per_element
from ockham.zoo.networks import NETWORKS


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(5 * 9, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3),
    )  # fmt: skip


class Attention(nn.Module):
    """A block with torch's own attention, whose output projection is never called as a module."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, x):
        y = self.embed(x)
        z = self.norm(y)
        y = y + self.attention(z, z, z, need_weights=False)[0]
        return self.head(y + self.down(torch.nn.functional.gelu(self.up(y))))


NETS = {
    "lenet": (lenet, (6, 1, 12, 12)),
    "resnet20": (NETWORKS["resnet20"], (2, 3, 32, 32)),
    "attention": (Attention, (3, 7, 6)),
}


def gated(name="lenet", seed=0, **options):
    torch.manual_seed(seed)
    build, shape = NETS[name]
    model, x = build(), torch.randn(shape)
    gates = ockham.attach_gates(model, x, **options)
    with torch.no_grad():  # anything but the start
        gates.noise.mean.uniform_(-4, 0.5)
        gates.noise.log_std.uniform_(-4, 2)
    return model, gates, x


def half(gates, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keep = {k: torch.rand(len(p), generator=generator) > 0.5 for k, p in gates.places.items()}
    for mask in keep.values():
        mask[0] = True
    return keep


def outputs(model, x):
    with torch.no_grad():
        return model.eval()(x)


# ------------------------------------------------------------------ wiring


def test_one_gate_per_structure_shared_by_all_its_readers():
    _, gates, _ = gated("resnet20")
    assert {k: len(p) for k, p in gates.places.items()} == {g.id: g.size for g in gates.groups}
    stream = gates.groups["conv1.weight:0"]
    readers = {m.name for m in stream.members if m.consumes}
    assert len(readers) > 8
    for i, (path, weight, _, _) in enumerate(gates.noise.readers):
        if f"{path}.{weight}" in readers:
            assert set(gates.places["conv1.weight:0"].tolist()) <= set(gates.noise.positions(i).tolist())


@pytest.mark.parametrize("name", NETS)
def test_evaluation_is_the_network_with_columns_times_the_expected_gate(name):
    model, gates, x = gated(name)
    expected = lognormal.moment(gates.noise.mean, gates.noise.std, 1)
    plain = NETS[name][0]()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("ockham_gates")})
    with torch.no_grad():
        for group in gates.groups:
            for parameter, positions in group.outgoing_cuts():
                if group.id in gates.places:
                    flat = plain.get_parameter(parameter).view(-1)
                    flat[positions] = flat[positions] * expected[gates.places[group.id]].unsqueeze(1)
    torch.testing.assert_close(outputs(model, x), outputs(plain, x), rtol=1e-4, atol=1e-5)


def test_attention_heads_are_gated_through_the_weight():
    _, gates, _ = gated("attention")
    axes = {path: axis for path, _, _, axis in gates.noise.readers}
    assert axes["attention.out_proj"] is None and axes["down"] == -1
    assert "block" in {gates.groups[k].kind for k in gates.places}


def test_named_layers_only_and_why_not():
    torch.manual_seed(0)
    model, x = lenet(), torch.randn(2, 1, 12, 12)
    gates = ockham.attach_gates(model, x, layers=["0", "6"])
    assert list(gates.places) == ["0.weight:0", "6.weight:0"] and gates.noise.mean.shape == (16,)
    with pytest.raises(OckhamError, match="is an output of the network"):
        ockham.attach_gates(lenet(), x, layers=["9"])
    with pytest.raises(OckhamError, match="no such layer"):
        ockham.attach_gates(lenet(), x, layers=["nothing"])
    with pytest.raises(OckhamError, match="has gates already"):
        ockham.attach_gates(model, x)
    with pytest.raises(OckhamError, match="can have a gate"):
        ockham.attach_gates(nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3))


def test_a_recurrent_reader_is_named_and_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.j, self.o = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(5, 2)
            self.r = nn.LSTM(6, 5, batch_first=True)

        def forward(self, x):
            return self.o(self.r(self.j(self.i(x).relu()).relu())[0])

    gates = ockham.attach_gates(Net(), torch.zeros(2, 3, 4))
    assert list(gates.places) == ["i.weight:0"]
    assert all("recurrent kernel" in why for why in gates.skipped.values()) and len(gates.skipped) == 2
    assert "no gates" in str(gates)


# ------------------------------------------------------------------ noise


def test_noise_is_per_example_and_structure_and_one_draw_reaches_all_readers():
    model, gates, x = gated("resnet20")
    same = x[:1].expand(4, -1, -1, -1)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
    seen = []
    noise = gates.noise.noise

    def watch(module, y, axis, reader):
        out = noise(module, y, axis, reader)
        seen.append(module.draw(4)[0])
        return out

    gates.noise.noise = watch
    gates.noise.train()
    out = model.eval() and gates.noise.train() and model(same)
    assert len(seen) == len(gates.noise.readers) and all(s is seen[0] for s in seen)
    assert seen[0].shape == (4, gates.noise.mean.numel())
    assert not torch.equal(out[0], out[1])
    assert not torch.equal(model(same), out)


def test_noise_averages_to_the_expected_gate():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False)).double()
    gates = ockham.attach_gates(model, torch.zeros(1, 3, dtype=torch.float64))
    with torch.no_grad():
        gates.noise.mean.copy_(torch.tensor([-0.1, -2.0, -5.0, 0.2, -0.5]))
        gates.noise.log_std.copy_(torch.tensor([-2.0, 0.0, 2.0, -1.0, -3.0]))
    x = torch.ones(1, 3, dtype=torch.float64)
    mean = outputs(model, x)
    with torch.no_grad():
        drawn = model.train()(x.expand(40_000, -1))
    error = (drawn.mean(0) - mean[0]).abs() / (drawn.std(0) / 200)
    assert float(error.max()) < 4


def test_noise_comes_from_the_generator_and_leaves_the_global_state_alone():
    draws = []
    for _ in range(2):
        model, _, x = gated(generator=torch.Generator().manual_seed(5))
        state = torch.get_rng_state()
        model[7].eval()
        draws.append(model(x))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*draws)


def test_per_element_noise_differs_between_pixels_and_costs_the_same_kl():
    model, gates, x = gated(noise=per_element)
    module = model[3]
    seen = []
    module.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model[0].weight.data.zero_()
    model[0].bias.data.fill_(1.0)
    model(x)
    pixels = seen[0][0, 0].flatten()
    assert pixels.unique().numel() > pixels.numel() // 2
    torch.testing.assert_close(gates.kl(), lognormal.kl(gates.noise.mean, gates.noise.std).sum())
    torch.testing.assert_close(outputs(model, x), outputs(copy.deepcopy(model), x))


def test_gradients_reach_gates_and_weights():
    model, gates, x = gated()
    (model(x).square().mean() + gates.kl() / 100).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    assert bool((gates.noise.mean.grad != 0).all())


def test_gradient_of_the_noise_is_that_of_the_quantile():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    gates = ockham.attach_gates(model, torch.zeros(1, 3, dtype=torch.float64))
    with torch.no_grad():
        gates.noise.mean.uniform_(-1, 0)
        gates.noise.log_std.uniform_(-1, 0)
    x = torch.randn(5, 3, dtype=torch.float64)

    def loss():
        torch.manual_seed(1)
        return model(x).square().sum()

    loss().backward()
    for parameter in gates.parameters():
        for i in range(4):
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter[i] += step
                    values.append(float(loss()))
                    parameter[i] -= step
            assert float(parameter.grad[i]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


# ------------------------------------------------------------------ state


def test_state_resumes_to_the_bit():
    def run(steps, state=None):
        model, gates, x = gated(seed=3)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            (model(x).square().mean() + gates.kl() / 100).backward()
            optimizer.step()
            if step == 2:
                gates.remove(half(gates))
        return copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    whole, parts = run(range(6)), run(range(3, 6), run(range(3)))
    assert all(torch.equal(whole[0][k], parts[0][k]) for k in whole[0])


def test_a_deep_copy_has_gates_of_its_own():
    model, gates, x = gated()
    twin = copy.deepcopy(model)
    others = ockham.Gates.of(twin, x)
    before = outputs(model, x)
    torch.testing.assert_close(outputs(twin, x), before, rtol=0, atol=0)
    others.remove(half(others))
    assert torch.equal(outputs(model, x), before) and not torch.equal(outputs(twin, x), before)
    assert bool(gates.noise.keep.all())


def test_modes_dtype_and_device_follow_the_model():
    model, gates, x = gated()
    model.eval()
    assert not gates.noise.training
    model.double()
    assert gates.noise.mean.dtype is torch.float64 and outputs(model, x.double()).dtype is torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(torch.isfinite(model.float().train()(x)).all())


def test_a_forward_that_fails_leaves_the_weights_alone():
    model, _, x = gated("attention")
    weight = model.attention.out_proj.weight
    with pytest.raises(RuntimeError):
        model(x[..., :3])
    assert model.attention.out_proj.weight is weight
    assert isinstance(weight, nn.Parameter)


def test_a_gated_network_has_a_laplace_posterior():
    """Evaluation mode goes through torch.func; the curvature of what reads a gate is the folded one times E squared."""
    model, gates, x = gated()
    for parameter in gates.parameters():
        parameter.requires_grad_(False)
    loader = [(x, torch.arange(len(x)) % 2)]
    expected = gates.noise.expected()[gates.places["0.weight:0"]]
    found = ockham.laplace(model, loader, structure="diagonal", fisher="empirical", prior=1.0)["3.weight"]
    folded = ockham.laplace(gates.fold(), loader, structure="diagonal", fisher="empirical", prior=1.0)["3.weight"]
    scale = expected.double().square().view(1, -1, 1, 1)
    torch.testing.assert_close(
        found.precision.double() - 1, (folded.precision.double() - 1) * scale, rtol=1e-3, atol=1e-6
    )


# ------------------------------------------------------------------ KL, evidence


def test_the_kl_is_a_sum_over_living_gates():
    _, gates, _ = gated()
    keep = half(gates)
    mean, std = gates.noise.mean.detach(), gates.noise.std.detach()
    exact = sum(float(lognormal.kl(mean[p][keep[k]], std[p][keep[k]]).sum()) for k, p in gates.places.items())
    gates.remove(keep)
    assert float(gates.kl().detach()) == pytest.approx(exact, rel=1e-6)
    gates.kl().backward()
    assert bool((gates.noise.mean.grad[~gates.noise.keep] == 0).all())


def test_rules_by_name_and_by_function_say_the_same():
    _, gates, _ = gated()
    for name in ("n", "n-printed", "u8", "u4", "snr", "mean", "l2", "random"):
        one, other = gates.evidence(name), gates.evidence(GATE_RULES[name])
        assert all(torch.equal(one.score[k], other.score[k]) for k in gates.places)
    printed, released = gates.evidence("n-printed"), gates.evidence("n")
    for key in gates.places:
        assert torch.equal(printed.score[key], released.delta_f[key])
        gap = released.score[key] - printed.score[key]
        assert float(gap.min()) == pytest.approx(0.5 * math.log(2 * math.pi)) == float(gap.max())
    with pytest.raises(OckhamError, match="no rule 'evidence'; choose from n, n-printed"):
        gates.evidence("evidence")


def test_taylor_is_the_squared_derivative_by_ln_theta():
    model, gates, x = gated()
    with pytest.raises(OckhamError, match="needs gradients"):
        gates.evidence("taylor")
    model.eval()
    model(x).square().mean().backward()
    found = gates.evidence("taylor").score["0.weight:0"]

    def loss(unit, factor):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin[3].weight[:, unit] *= factor
            return float(twin.double()(x.double()).square().mean())

    for unit in range(4):
        slope = (loss(unit, 1 + 1e-4) - loss(unit, 1 - 1e-4)) / 2e-4
        assert float(found[unit]) == pytest.approx(-(slope**2), rel=1e-2)


def test_norms_are_relative_to_the_layer():
    model, gates, _ = gated()
    model[0].weight.data *= 100
    table = gates.table()
    for places in gates.places.values():
        assert float(table.norm[places].mean()) == pytest.approx(1.0)
    exact = (model[6].weight.square().sum(1) + model[6].bias ** 2 + model[7].weight ** 2 + model[7].bias ** 2).sqrt()
    torch.testing.assert_close(table.norm[gates.places["6.weight:0"]], (exact / exact.mean()).double().detach())


# ------------------------------------------------------------------ removal, surgery, folding


@pytest.mark.parametrize("name", NETS)
def test_removed_is_masked_is_shrunk_is_folded(name):
    model, gates, x = gated(name)
    keep = half(gates)
    gates.remove(keep)
    out = outputs(model, x)
    small = ockham.shrink(model, gates.plan)
    torch.testing.assert_close(outputs(small, x), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs(ockham.Gates.of(small, x).fold(), x), out, rtol=1e-4, atol=1e-5)
    folded = gates.fold()
    assert folded is model and not any("ockham" in k for k in model.state_dict())
    torch.testing.assert_close(outputs(model, x), out, rtol=1e-4, atol=1e-5)
    plan = ockham.plan(gates.groups, keep)
    bare = ockham.shrink(model, plan)
    assert sum(p.numel() for p in bare.parameters()) < sum(p.numel() for p in model.parameters())
    assert ockham.verify(ockham.mask(model, plan), bare, x) < 1e-5
    torch.testing.assert_close(outputs(bare, x), out, rtol=1e-4, atol=1e-5)


def test_training_goes_on_in_the_smaller_network_as_if_nothing_had_been_cut():
    model, gates, x = gated()
    model.double()
    x = x.double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def step(network, opt):
        opt.zero_grad()
        (network.eval()(x).square().mean() + ockham.Gates.of(network, x).kl() / 10).backward()
        opt.step()

    step(model, optimizer)
    gates.remove(half(gates))
    small, other = ockham.shrink(model, gates.plan, optimizer=optimizer)
    for _ in range(3):
        step(model, optimizer)
        step(small, other)
    torch.testing.assert_close(outputs(small, x), outputs(model, x), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(small.ockham_gates.mean, model.ockham_gates.mean[gates.noise.keep])
    again = ockham.Gates.of(small, x)
    assert {k: len(p) for k, p in again.places.items()} == {k: int(m.sum()) for k, m in gates.keep.items()}
    again.remove(half(again, seed=1))
    twice = ockham.shrink(small, again.plan)
    torch.testing.assert_close(outputs(twice, x), outputs(small, x), rtol=1e-9, atol=1e-10)


def test_removal_is_for_good_and_refuses_to_empty_a_group():
    _, gates, _ = gated()
    keep = half(gates)
    assert gates.remove(keep) == sum(int((~m).sum()) for m in keep.values())
    assert gates.remove({k: torch.ones_like(m) for k, m in keep.items()}) == 0
    assert all(torch.equal(gates.keep[k], m) for k, m in keep.items())
    with pytest.raises(OckhamError, match="at least one must stay"):
        gates.remove({"0.weight:0": torch.zeros(4, dtype=torch.bool)})
    with pytest.raises(OckhamError, match="no gates on 'there'"):
        gates.remove({"there": torch.zeros(4, dtype=torch.bool)})


def test_a_removed_gate_is_zero_and_draws_nothing():
    model, gates, x = gated()
    gates.remove(half(gates))
    alive = int(gates.noise.keep.sum())
    assert gates.noise.draw(3)[0].shape == (3, alive)
    before = model[3].weight.detach().clone()
    model(x).square().mean().backward()
    gone = ~gates.keep["0.weight:0"]
    assert bool((model[3].weight.grad[:, gone] == 0).all()) and bool((model[0].weight.grad[gone] == 0).all())
    gates.fold()
    assert bool((model[3].weight[:, gone] == 0).all()) and bool((before[:, gone] != 0).any())


def test_tied_readers_fold_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.d = nn.Linear(6, 2)
            self.d.weight = self.c.weight

        def forward(self, x):
            y = self.a(x).relu()
            return self.c(y) + self.d(y + self.b(y))

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(4, 3)
    gates = ockham.attach_gates(model, x)
    with torch.no_grad():
        gates.noise.mean.uniform_(-2, 0)
    before = outputs(model, x)
    torch.testing.assert_close(outputs(gates.fold(), x), before, rtol=1e-5, atol=1e-6)
