"""The sequence of blocks of a network, and what comes into each of them when earlier ones have been reduced.

A block is an element of the list of like modules that most networks consist of. To see what comes into block j, the
network's own forward runs with the blocks before j replaced by what they answered last, and ends at j; the code between
the blocks (embeddings, masks, norms, the way from an encoder to a decoder) is the network's own. An answer is kept as
long as something later reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ockham.errors import OckhamError
from ockham.methods.blocks.cases import Case

__all__ = ["BlockCall", "Stream", "find_blocks", "prepared"]

BlockCall = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with."""


class _Reached(BaseException):
    """A block was reached; nothing after it is wanted."""

    def __init__(self, call: BlockCall) -> None:
        super().__init__()
        self.call = call


def find_blocks(model: nn.Module, case: Case) -> list[tuple[str, nn.Module]]:
    """The blocks in the order in which they run, with their names; the network itself where it has none.

    A list of blocks is an outermost `ModuleList` or `Sequential` of at least two modules of one class that hold weight
    matrices. A network whose lists are not run once through, in the forward pass of ``case``, counts as one block.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name == f or name.startswith(f + ".") for f in found)
        if not inside and isinstance(module, (nn.ModuleList, nn.Sequential)) and _alike(list(module)):
            found |= {f"{name}.{i}" if name else str(i): child for i, child in enumerate(module)}
    names = {id(m): n for n, m in found.items()}
    order: list[str] = []

    def note(module: nn.Module, args: Any) -> None:
        order.append(names[id(module)])

    with ExitStack() as stack:
        for m in found.values():
            stack.callback(m.register_forward_pre_hook(note).remove)
        with torch.no_grad():
            model(*case.args, **case.kwargs)
    if len(order) < 2 or len(set(order)) < len(order):
        return [("", model)]
    return [(n, found[n]) for n in order]


def _alike(children: Sequence[nn.Module]) -> bool:
    kinds = {type(c) for c in children}
    return len(children) > 1 and len(kinds) == 1 and all(any(p.ndim > 1 for p in c.parameters()) for c in children)


@contextmanager
def prepared(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode, no gradients for parameters, no cache of past tokens, experts one by one; undone after it."""
    modes = {m: m.training for m in model.modules()}
    wanted = {p: p.requires_grad for p in model.parameters()}
    settings = []
    for m in model.modules():
        config = getattr(m, "config", None)
        for field, value in (("use_cache", False), ("_experts_implementation_internal", "eager")):
            if field in getattr(config, "__dict__", {}):
                settings.append((config, field, getattr(config, field)))
                setattr(config, field, value)
    model.eval().requires_grad_(False)
    try:
        yield next((p.device for p in model.parameters()), torch.device("cpu"))
    finally:
        for module, mode in modes.items():
            module.training = mode
        for p, need in wanted.items():
            p.requires_grad_(need)
        for config, field, old in reversed(settings):
            setattr(config, field, old)


@contextmanager
def answering(blocks: Sequence[nn.Module], answers: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Blocks whose forward is another function inside this context."""
    with ExitStack() as stack:
        for block, answer in zip(blocks, answers, strict=True):
            own = block.__dict__.get("forward")
            block.forward = answer
            stack.callback(
                block.__dict__.pop if own is None else block.__dict__.__setitem__, "forward", *([own] if own else [])
            )
        yield


class Stream:
    """What comes into block after block; `calls` gives it for one block, `advance` runs the block and goes on.

    Args:
        model: the network, in evaluation mode; its weights may change between calls.
        cases: what it is run on.
        blocks: of `find_blocks`.
    """

    def __init__(self, model: nn.Module, cases: Sequence[Case], blocks: Sequence[nn.Module]) -> None:
        self._model, self._cases, self._blocks = model, cases, list(blocks)
        self._last = self._last_readers()
        self._answers: list[dict[int, Any]] = [{} for _ in cases]
        self.at = 0

    def __len__(self) -> int:
        return len(self._blocks)

    @torch.no_grad()
    def calls(self) -> list[BlockCall]:
        """What the block at hand is called with, for each case."""
        if self._blocks[0] is self._model:
            return [(case.args, dict(case.kwargs)) for case in self._cases]
        return [self._call(i) for i in range(len(self._cases))]

    @torch.no_grad()
    def advance(self, calls: Sequence[BlockCall]) -> None:
        """Run the block at hand as it is now and go on to the next."""
        for answers, (args, kwargs) in zip(self._answers, calls, strict=True):
            answers[self.at] = self._blocks[self.at](*args, **kwargs)
            for i in [i for i in answers if self._last[i] <= self.at]:
                answers[i] = pytree.tree_map(_hollow, answers[i])
        self.at += 1

    def _call(self, case: int) -> BlockCall:
        answers = self._answers[case]

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise _Reached((args, kwargs))

        given = [lambda *_, i=i, **__: answers[i] for i in range(self.at)]
        with answering(self._blocks[: self.at + 1], [*given, stop]):
            try:
                self._model(*self._cases[case].args, **self._cases[case].kwargs)
            except _Reached as reached:
                return reached.call
        raise OckhamError(
            f"block {self.at} is not reached on some calibration data: the order of blocks depends on them"
        )

    def _last_readers(self) -> list[int]:
        """For each block the last one that reads its answer, directly or through code between them.

        Answers are cut out of the graph, so that a gradient of what a block is called with ends at those it reads.
        """
        last = list(range(len(self._blocks)))
        shown: list[tuple[int, Tensor]] = []

        def before(j: int, call: BlockCall) -> None:
            for leaf in pytree.tree_leaves(call):
                if isinstance(leaf, Tensor) and leaf.requires_grad and shown:
                    tensors = [t for _, t in shown]
                    reached = torch.autograd.grad(leaf.sum(), tensors, allow_unused=True, retain_graph=True)
                    for i in {i for (i, _), g in zip(shown, reached, strict=True) if g is not None}:
                        last[i] = max(last[i], j)

        def after(j: int, output: Any) -> Any:
            def cut(leaf: Tensor) -> Tensor:
                fresh = leaf.detach()
                if leaf.is_floating_point():
                    shown.append((j, fresh.requires_grad_(True)))
                return fresh

            return pytree.tree_map_only(Tensor, cut, output)

        with ExitStack() as stack, torch.enable_grad():
            for j, b in enumerate(self._blocks if len(self._blocks) > 1 else []):
                watch = b.register_forward_pre_hook(lambda m, a, k, j=j: before(j, (a, k)), with_kwargs=True)
                stack.callback(watch.remove)
                stack.callback(b.register_forward_hook(lambda m, a, out, j=j: after(j, out)).remove)
            self._model(*self._cases[0].args, **self._cases[0].kwargs)
        return last


def _hollow(leaf: Any) -> Any:
    """A tensor of the same shape without memory: nothing reads it, and what did would read NaN."""
    if not isinstance(leaf, Tensor):
        return leaf
    value = float("nan") if leaf.is_floating_point() else 0
    return leaf.new_full((), value).expand(leaf.shape)
