"""Ctrl-C anywhere in and around a block, and gradients that are no numbers: the mean is back, the optimizer goes on."""

from __future__ import annotations

import copy
import math
import random
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import ockham
from ockham.errors import OckhamError
from ockham.methods.spike_slab.optimizer import SpikeSlab

SOURCE = str(Path(ockham.__file__).parent)


class Interrupt:
    """Raises KeyboardInterrupt at the n-th bytecode that runs in Ockham or in the function given; counts them all."""

    def __init__(self, work, at=-1):
        self.work, self.at, self.seen = work, at, 0

    def __call__(self):
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            self.work()
        finally:
            sys.settrace(before)

    def _call(self, frame, event, argument):
        if frame.f_code is self.work.__code__ or frame.f_code.co_filename.startswith(SOURCE):
            frame.f_trace_opcodes = True
            return self._opcode
        return None

    def _opcode(self, frame, event, argument):
        if event == "opcode":
            self.seen += 1
            if self.seen == self.at:
                raise KeyboardInterrupt
        return self._opcode


def block(toy, net, opt):
    def work():
        with opt.sampled():
            toy.loss(net).backward()

    return work


def interrupted_everywhere(toy, net, opt, count):
    """Whether the mean is back after interrupts at random places, or (count None) at all near both ends of the block.

    The traceback is alive while the weights are looked at, as in a notebook.
    """
    toy.step(net, opt)
    opt.zero_grad()
    mean = copy.deepcopy(net.state_dict())
    probe = Interrupt(block(toy, net, opt))
    probe()
    around = range(1, min(60, probe.seen)), range(max(1, probe.seen - 60), probe.seen + 1)  # its two ends: every place
    places = [*around[0], *around[1]] if count is None else random.Random(0).choices(range(1, probe.seen + 1), k=count)
    restored = 0
    for place in places:
        opt.zero_grad()
        with pytest.raises(KeyboardInterrupt) as caught:
            Interrupt(block(toy, net, opt), place)()
        restored += all(torch.equal(v, mean[n]) for n, v in net.state_dict().items())
        del caught
        assert torch.is_grad_enabled()
        opt.zero_grad()
        with opt.sampled():  # it draws again, and a real draw
            drawn = [p.detach() - mean[n] for n, p in net.named_parameters()]
            if toy.contract.draws and not getattr(opt, "_propagation", None):
                assert all(bool((d != 0).all()) for d in drawn)
    toy.step(net, opt)
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())
    return restored == len(places)


def test_five_hundred_interrupts_at_random_bytecodes(mean_field):
    net, opt = mean_field.make()
    assert interrupted_everywhere(mean_field, net, opt, 500)


def test_interrupts_where_a_block_begins_and_ends(mean_field):
    net, opt = mean_field.make()
    assert interrupted_everywhere(mean_field, net, opt, None)


def test_interrupts_of_every_method(toy):
    assert interrupted_everywhere(toy, *toy.make(), 60)


def test_interrupts_with_noise_in_pre_activations(mean_field):
    net = mean_field.net()
    opt = SpikeSlab(net.named_parameters(), n_data=200)
    opt.propagate(net)
    assert interrupted_everywhere(mean_field, net, opt, 100)
    assert torch.equal(net(mean_field.x), net(mean_field.x))  # no noise is left in the layers


def test_a_first_draw_that_was_interrupted_is_no_mirror_of_nothing(mean_field):
    """Interrupted before the noise was there, the next block must not take the negative of zeros for a draw."""
    net, opt = mean_field.make()
    mean = net[0].weight.detach().clone()

    def stop(noise):
        raise KeyboardInterrupt

    opt._draw_ = stop
    with pytest.raises(KeyboardInterrupt), opt.sampled():
        pass
    del opt._draw_
    with opt.sampled():
        assert float((net[0].weight.detach() - mean).abs().min()) > 0


def test_an_error_of_the_restoration_is_made_good(mean_field, monkeypatch):
    """The restoration itself stops half way, once: it is done again."""
    from ockham.fit import optimizer as module

    net, opt = mean_field.make()
    mean = copy.deepcopy(net.state_dict())
    real, calls = module.write, []

    def write(run, values):
        calls.append(run)
        if len(calls) == 2:  # the first is the draw
            raise KeyboardInterrupt
        real(run, values)

    monkeypatch.setattr(module, "write", write)
    with pytest.raises(KeyboardInterrupt), opt.sampled():
        pass
    assert all(torch.equal(v, mean[n]) for n, v in net.state_dict().items())


def test_blocks_work_in_an_exit_stack_and_a_dropped_one_is_left(toy, snapshot):
    net, opt = toy.make()
    before = snapshot(net)
    with ExitStack() as stack:
        stack.enter_context(opt.sampled())
    assert snapshot.same(net, before)
    entered = opt.sampled()
    entered.__enter__()
    del entered
    assert snapshot.same(net, before)
    toy.step(net, opt)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_is_refused_before_anything_moves(toy, snapshot, bad):
    net, opt = toy.train(2)
    before, precision = snapshot(net), opt.posterior()["0.weight"].precision
    for attempt in range(2):
        opt.zero_grad()
        with opt.sampled():
            toy.loss(net).backward()
        net[2].weight.grad[1, 0] = bad
        if attempt == 0:
            with pytest.raises(
                OckhamError, match=r"gradient of '2\.weight' is NaN or infinite in 1 of 12 places.*skip"
            ):
                opt.step()
            opt.skip_nonfinite = True
        else:
            opt.step()
    assert snapshot.same(net, before) and torch.equal(opt.posterior()["0.weight"].precision, precision)
    assert opt.skipped == 1
    toy.step(net, opt)
    assert not snapshot.same(net, before)


def test_a_norm_that_overflows_is_no_gradient_that_is_no_number(mean_field):
    net, opt = mean_field.make()
    with opt.sampled():
        mean_field.loss(net).backward()
    net[0].weight.grad.fill_(3e38)
    opt.step()
    assert opt.skipped == 0
    assert all(bool(p.isfinite().all()) for p in net.parameters())


def test_the_state_is_not_saved_from_inside_a_block(toy):
    _, opt = toy.train(1)
    with pytest.raises(OckhamError, match=r"state_dict\(\) inside sampled"), opt.sampled():
        opt.state_dict()


def test_nesting_says_that_a_closure_draws_already(toy, snapshot):
    net, opt = toy.make()
    before = snapshot(net)

    def closure():
        with opt.sampled():
            return toy.loss(net)

    with pytest.raises(OckhamError, match=r"cannot be nested.*closure.*inside a block already"):
        opt.step(closure)
    assert snapshot.same(net, before)


def test_a_step_that_was_interrupted_leaves_no_stale_spread_behind(mean_field, monkeypatch):
    """The memory of the draw's spread is overwritten by an update; a second step must not read it."""
    net, opt = mean_field.make()
    with opt.sampled():
        mean_field.loss(net).backward()
    real = type(opt)._update_

    def update(self, *arguments):
        real(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(opt), "_update_", update)
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    seen = []
    monkeypatch.setattr(type(opt), "_update_", lambda self, m, g, v, f, group: seen.append(v["first"].clone()))
    opt.step()
    expected = torch.cat([opt.state[p]["log_std"].exp() for p in net.parameters()])
    assert torch.equal(seen[0], expected)
