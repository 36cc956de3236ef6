import math

import torch

from ockham import MeanField
from ockham.fit.memory import CYCLE, renew_


def cycle(length, rounds=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.zeros(length)
    for phase in range(rounds * CYCLE):
        renew_(noise, phase % CYCLE, generator)
        yield noise.clone()


def test_a_cycle_is_new_mirrored_rotated_mirrored():
    one, two, three, four = cycle(5000)
    assert torch.equal(two, -one) and torch.equal(four, -three)
    assert torch.equal(three.sort().values, two.sort().values)  # the same numbers ...
    shifts = [s for s in range(5000) if torch.equal(three, two.roll(s))]
    assert len(shifts) == 1 and 1250 <= shifts[0] < 3750  # ... all moved by one distance, far from where they were


def test_short_vectors_get_new_noise_instead_of_a_rotation():
    one, _, three, _ = cycle(4000)
    assert not torch.equal(three.abs().sort().values, one.abs().sort().values)


def test_draws_of_a_cycle_are_uncorrelated_across_rotation_and_cycles():
    draws = torch.stack(list(cycle(1 << 14, rounds=8)))[::2]
    correlation = torch.corrcoef(draws)
    off = correlation[~torch.eye(len(draws), dtype=torch.bool)]
    assert float(off.abs().max()) < 5 / math.sqrt(1 << 14)
    assert abs(float(draws.square().mean()) - 1) < 5 * math.sqrt(2 / (8 << 14))


def test_the_std_of_the_step_is_the_one_of_now_and_not_of_the_draw():
    # small arenas keep the std from the draw; a posterior loaded in between must not be forgotten
    torch.manual_seed(0)
    nets = [torch.nn.Linear(3, 2, bias=False) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    opts = [MeanField(n.named_parameters(), n_data=10, initial_std=0.1, lr=0.1) for n in nets]
    wide = MeanField(nets[0].named_parameters(), n_data=10, initial_std=0.5)
    with wide.sampled():
        nets[0](torch.ones(1, 3)).sum().backward()
    wide.step()
    source = wide.posterior()
    nets[0].load_state_dict(nets[1].state_dict())
    for net, opt in zip(nets, opts, strict=True):
        opt.zero_grad()
        with opt.sampled():
            net(torch.ones(4, 3)).square().sum().backward()
        net.weight.grad.fill_(0.3)
    opts[0].start_from(source)
    opts[0].step()
    state = opts[0].state[nets[0].weight]
    std = source["weight"].std.flatten()
    noise = state["noise"].float()
    gradient = 0.3 * noise * std + (std.square() - 1) / 10
    torch.testing.assert_close(state["std_avg"], 0.1 * gradient, rtol=1e-3, atol=1e-6)
