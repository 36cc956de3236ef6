"""Gaussian variational inference in the shape of torch's optimizers: what all methods share, and are given."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ockham.core.network import fixed_entries
from ockham.core.posterior import Gaussian, Posterior, gaussian_kl
from ockham.core.processes import (
    compare_processes,
    dividers,
    finite_gradients,
    holders,
    own_rows,
    rows_here,
    sharded_as,
    whole,
)
from ockham.errors import OckhamError
from ockham.fit.memory import (
    CYCLE,
    Arena,
    Block,
    Divided,
    RunFacts,
    Span,
    alive_index,
    check_group,
    check_keep,
    fitted_state,
    read,
    read_state,
    renew_,
    saved_state,
    sliced,
    spans,
    write,
)
from ockham.fit.priors import Prior, check_settings

__all__ = ["VariationalOptimizer"]


class VariationalOptimizer(torch.optim.Optimizer, ABC):
    """Gaussian variational inference in the shape of a `torch.optim.Optimizer`.

    Outside `sampled` the parameters hold the posterior mean, so evaluation, saving and editing work as always.
    Consecutive draws are made from one another (noise e, -e, e rotated, its mirror, then new noise): each is an exact
    draw, four cost one, and the odd terms of the gradient noise cancel in pairs (docs/decisions.md).
    """

    _vectors: tuple[str, ...] = ()  # names of the state vectors, one number per living weight
    _divisible: ClassVar[bool] = False  # whether it steps on the rows of parameters that are sharded over processes
    _prior_kind: ClassVar[tuple[type, str]] = (Prior, "FixedPrior(1.0)")  # what the option ``prior`` must be, as shown

    skip_nonfinite = False
    """Whether a step with NaN or infinite gradients is left out, as `torch.amp.GradScaler` does, or refused."""
    skipped = 0
    """Number of steps left out."""

    def __init__(self, params: Any, defaults: dict[str, Any], *, seed: int) -> None:
        """Check all options, here and in every group, and leave alone what the network itself holds fixed.

        Args:
            params: named parameters or groups of them. From ``model.named_parameters()`` itself the network is known,
                and `hold` is called with it; after a list of pairs call `hold`.
            defaults: options of every group that has none of its own.
            seed: number that starts the noise.
        """
        owner = inspect.getgeneratorlocals(params).get("self") if inspect.isgenerator(params) else None
        self._check({**defaults})
        defaults = {k: float(v) if k in ("n_data", "prior_mean") else v for k, v in defaults.items()}
        self._seed = seed
        self._held: dict[Tensor, Tensor] = {}  # flat positions of weights that are not living and keep their values
        self._generators: dict[torch.device, torch.Generator] = {}
        self._index: dict[Tensor, Tensor | None] = {}
        self._arenas: dict[int, Arena] = {}
        self._backup: list[tuple[Span, Tensor]] | None = None
        self._pending = False
        self._compared = False  # whether other processes of the same network are known to hold the same
        self._phase = -1  # place of the current draw in the cycle of the noise
        self._names: dict[Tensor, str] = {}
        self._dividers: list[Any] = []  # modules divided by fully_shard, which may hold whole weights of an old draw
        self._came = True  # whether gradients were there when the block ended
        try:
            super().__init__(params, defaults)
        except OckhamError:
            raise
        except (ValueError, TypeError) as error:  # torch's: nothing to train, results of operations, no tensors
            raise OckhamError(
                f"{type(self).__name__}: {error}. Pass model.named_parameters() of a network that has parameters to "
                "train"
            ) from error
        if isinstance(owner, nn.Module):
            self.hold(owner)

    # ------------------------------------------------------------------ what a method supplies
    @abstractmethod
    def _start(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """State of a parameter: the vectors named in `_vectors`, and scalars; ``prior_precision`` among them."""

    @abstractmethod
    def _std_(self, out: Tensor, vectors: Mapping[str, Tensor], facts: RunFacts, group: dict[str, Any]) -> Tensor:
        """Write the posterior standard deviation of a run of weights into ``out``, and return it."""

    @abstractmethod
    def _update_(self, mean: Tensor, grad: Tensor, vectors: Mapping[str, Tensor], facts: RunFacts, group: Any) -> None:
        """One step on a run of weights: changes ``mean`` and the vectors in place, but not ``grad``.

        ``vectors["first"]`` holds the standard deviation; it and ``["second"]`` may be overwritten.
        """

    def _check_options(self, group: Mapping[str, Any]) -> None:
        """Raise on an option of its own that is out of range; those of `check_settings` are checked already."""

    def _after_step(self, group: dict[str, Any]) -> None:
        """Anything slower than a step, such as learning the prior; nothing by default."""

    def _prior_of(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Precision of the prior as the posterior reports it, broadcastable to the parameter."""
        return torch.tensor(self.state[p]["prior_precision"], dtype=p.dtype, device=p.device)

    def _kl_of(self, p: Tensor, group: dict[str, Any]) -> float:
        """KL(posterior || prior) of the living weights of a parameter, nats."""
        return gaussian_kl(self._gaussian(p, group))

    def _take_over(self, given: Mapping[Tensor, Gaussian], posterior: Posterior, group: dict[str, Any]) -> None:
        """Called by `start_from` once means and removal are in place: take the spreads; nothing by default."""

    def _facts_of(self, state: Mapping[str, Any]) -> RunFacts:
        """What the weights of a run share; parameters that differ in it step apart."""
        return RunFacts(state["step"], state["prior_precision"])

    def _perturbs(self, run: Span) -> bool:
        return True

    def _block_began(self, new: bool) -> None:
        """Called in a `sampled` block with the draw in place; ``new`` where no gradient belongs to it yet."""

    def _block_ended(self) -> None:
        """Called when the mean is back."""

    def _before_step(self) -> None:
        """Called with the final gradients in place, before anything moves."""

    # ------------------------------------------------------------------ the loop's three calls
    def sampled(self) -> AbstractContextManager[None]:
        """Parameters hold one posterior draw inside the block and the mean again after it.

        They do so after any exception, Ctrl-C at any moment included. Blocks before the same `step` share one draw;
        `step` and `zero_grad` end it.

        Raises:
            OckhamError: blocks are nested.
        """

        def block() -> Generator[None]:
            if self._backup is not None:
                raise OckhamError(
                    "sampled() blocks cannot be nested: leave the first before entering another. A closure given to "
                    "step(closure) runs inside a block already, and so does a training step under Lightning: take this "
                    "one away there"
                )
            try:
                try:
                    self._backup = []
                    self._perturb()
                    yield
                finally:
                    self._restore()
            finally:
                self._restore()  # all of it again where an interrupt hit the first

        return Block(block())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and outside a `sampled` block end the current draw."""
        super().zero_grad(set_to_none)
        if self._backup is None:
            self._pending = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the posterior from the gradients at the drawn weights.

        Args:
            closure: recomputes the loss and its gradients; it is run inside `sampled`.

        Returns:
            What the closure returned, else None.

        Raises:
            OckhamError: no draw belongs to these gradients (the backward pass ran outside `sampled`), or one is NaN or
                infinite (`skip_nonfinite` leaves such a step out instead); or, at the first step, another process that
                trains the same network has another seed or other weights. Nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad(), self.sampled():
                loss = closure()
        self._outside("step")
        if not self._pending or (self._dividers and not self._came):  # fully_shard gathers the mean after the block
            raise OckhamError(
                "step() without a draw: run forward and backward inside `with optimizer.sampled():`, "
                "call zero_grad() before that block and not between it and step()"
            )
        ready = {n: p for p, n in self._names.items() if p.grad is not None and p.requires_grad}
        if not finite_gradients(ready, skip=self.skip_nonfinite):
            self._pending, self.skipped = False, self.skipped + 1
            return loss
        self._free_what_is_trained()
        if not self._compared:
            held, first = list(self._names), self.param_groups[0]
            compare_processes(held, {"seed": self._seed, "n_data": first["n_data"], "draws so far": self._phase})
            self._compared = True
        self._before_step()
        for group in self.param_groups:
            arena = self._arena(group)
            for p in group["params"]:
                if p.requires_grad and p.grad is not None:
                    self.state[p]["step"] += 1
            for run in (run for span in arena.spans for run in self._runs(span, ready=True)):
                vectors, facts = arena.at(run), self._facts(run)
                mean = read(run, [x.parameter for x in run.pieces], vectors["mean"])
                grad = read(run, [x.parameter.grad for x in run.pieces], vectors["third"])  # type: ignore[misc]
                if (run.start, run.stop) not in arena.drawn:
                    self._std_(vectors["first"], vectors, facts, group)
                arena.drawn.discard((run.start, run.stop))  # an update may overwrite it
                self._update_(mean, grad, vectors, facts, group)
                write(run, mean)
            self._after_step(group)
        self._pending = False
        return loss

    # ------------------------------------------------------------------ the posterior, and removal
    def posterior(self) -> Posterior:
        """The posterior of all parameters that ever had a gradient, detached copies, in the order of the groups.

        Raises:
            OckhamError: called inside `sampled`.
        """
        self._outside("posterior")
        moments = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and self.state.get(p, {}).get("step", 0) > 0:
                    moments[self._names[p]] = self._gaussian(p, group)
        first = self.param_groups[0]
        return Posterior(moments, first["n_data"], first["temperature"], type(self).__name__)

    @torch.no_grad()
    def kl(self) -> float:
        """KL(posterior || prior) of all living weights, a sum in nats (float64), at the temperature 1.

        Removed and frozen weights are no part of the model and pay nothing.

        Raises:
            OckhamError: called inside `sampled`.
        """
        self._outside("kl")
        return sum((self._kl_of(p, g) for g in self.param_groups for p in self._arena(g).parameters), 0.0)

    @torch.no_grad()
    def start_from(self, posterior: Posterior) -> None:
        """Take means, spreads and removed weights from any posterior over (some of) the same parameters.

        What a method reads besides the mean: `MeanField` the standard deviation, `IVON` the curvature beyond the
        posterior's own prior, `SpikeSlab` standard deviation and inclusion.

        Args:
            posterior: posterior of any source.

        Raises:
            OckhamError: a name or a shape does not fit, or called inside `sampled`.
        """
        self._outside("start_from")
        by_name = {name: p for p, name in self._names.items()}
        unknown = [name for name in posterior if name not in by_name]
        wrong = [n for n in posterior if n in by_name and posterior[n].mean.shape != by_name[n].shape]
        if unknown or wrong:
            raise OckhamError(f"the posterior does not fit: unknown names {unknown[:6]}, other shapes {wrong[:6]}")
        for name, g in posterior.items():
            p = by_name[name]
            self._ensure(p, self._group_of(p))
            fixed = ~g.keep & (g.mean != 0)
            if bool(fixed.any()):
                self._held[p] = alive_index(own_rows(p, fixed.to(p.device)))
            if not bool(g.keep.all()):
                self._remove_from(p, g.keep)
            rows_here(p).copy_(own_rows(p, g.mean))
        for group in self.param_groups:
            held = [p for p in group["params"] if self._names[p] in posterior]
            given = {p: posterior[self._names[p]].map(partial(own_rows, p)) for p in held}
            if given:
                self._take_over(given, posterior, group)
        self._arenas.clear()  # they may remember standard deviations

    def plain(self, model: nn.Module) -> nn.Module:
        """Take off a network, in place, whatever this optimizer has put on it: for copies that are handed out."""
        return model

    @torch.no_grad()
    def remove(self, keep: Mapping[str, Tensor]) -> int:
        """Remove weights for good: exactly zero, no noise, no KL, no state.

        Args:
            keep: parameter name to boolean tensor of the parameter's shape, True = stays. Names left out are kept.

        Returns:
            How many weights were newly removed.

        Raises:
            OckhamError: an unknown name, a wrong shape or a tensor that is not boolean; nothing is removed then. Or
                called inside `sampled`.
        """
        self._outside("remove")
        by_name = {name: p for p, name in self._names.items()}
        for name, mask in keep.items():
            check_keep(name, mask, by_name)
        return sum(self._remove_from(by_name[name], mask) for name, mask in keep.items())

    def hold(self, model: nn.Module) -> None:
        """Leave alone for good what the network's own modules hold fixed: no noise, no KL, no posterior.

        That is the padding row of embeddings and what pruning masks hold at zero; see
        `ockham.core.network.fixed_entries`. The weights keep their values; `keep` and `posterior` count them as not
        living. Needed only where the optimizer was given a list of parameters: from ``model.named_parameters()`` itself
        it knows the network. A row that gets a gradient after all (its weight is used in another place as well) is
        trained from then on.

        Args:
            model: network whose parameters this optimizer holds.

        Raises:
            OckhamError: called inside `sampled`.
        """
        self._outside("hold")
        by_name = dict(model.named_parameters())
        for name, fixed in fixed_entries(model).items():
            if (p := by_name[name]) in self._names:
                self._held[p] = alive_index(own_rows(p, fixed))
                if self.state.get(p):
                    self._remove_from(p, ~fixed)

    def keep(self) -> dict[str, Tensor]:
        """Boolean masks, True = alive, of every parameter that requires a gradient."""
        return {n: whole(sharded_as(p, self._keep_of(p))) for p, n in self._names.items() if p.requires_grad}

    def sliced(self, parameters: Mapping[str, Tensor], take: Callable[[str, Tensor], Tensor]) -> VariationalOptimizer:
        """A copy over the parameters of a smaller network; see `ockham.fit.memory.sliced`."""
        return sliced(self, parameters, take)

    # ------------------------------------------------------------------ state
    def __getstate__(self) -> dict[str, Any]:
        """All a copy needs: `copy.deepcopy((network, optimizer))` gives a pair that goes on alike.

        Left out are memory to work in, and the ``step`` that a scheduler puts around the original's.
        """
        return {**{k: v for k, v in self.__dict__.items() if k != "step"}, "_arenas": {}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as (name, parameter) pairs like everywhere here.

        Raises:
            OckhamError: parameters without names or with names in use, of a type that cannot be perturbed, listed
                twice, or an option out of range; the group is not added then. Or called inside `sampled`.
        """
        self._outside("add_param_group")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group, self._names, self._divisible)
            self._check(group)
        except OckhamError:
            self.param_groups.pop()
            raise
        self._names.update(zip(group["params"], group["param_names"], strict=True))
        self._pending, self._phase = False, -1
        if hasattr(
            group["params"][0], "device_mesh"
        ):  # torch.distributed.checkpoint wants a state before the first step
            self._dividers = dividers(self._names)
            for p in (p for p in group["params"] if p.requires_grad):
                self._ensure(p, group)

    def state_dict(self) -> dict[str, Any]:
        """Torch's state plus that of the noise, all of it tensors and plain values (`torch.load` needs no pickle).

        Raises:
            OckhamError: called inside `sampled`.
        """
        self._outside("state_dict")
        return saved_state(self, super().state_dict())

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where the saved optimizer was.

        Raises:
            OckhamError: the state was not saved by an optimizer of this family, or names a prior that neither this
                library nor this optimizer has. Or called inside `sampled`.
        """
        self._outside("load_state_dict")
        sampler, groups, states = read_state(type(self).__name__, state_dict, self.param_groups, self._vectors)
        super().load_state_dict({"state": states, "param_groups": groups})
        self._pending, self._phase, self._seed = sampler["pending"], sampler["phase"], sampler["seed"]
        self._compared = False
        self._generators = {}
        for device, saved in sampler["generators"].items():
            self._generator(torch.device(device)).set_state(saved.cpu())
        self._index.clear()
        self._arenas.clear()
        every, vectors = (p for group in self.param_groups for p in group["params"]), (*self._vectors, "noise")
        keys = [key for group in groups for key in group["params"]]
        for p, given in ((p, states[key]) for key, p in zip(keys, every, strict=True) if key in states):
            state = self.state[p]  # torch cast it to the parameter's dtype; masks and noise have their own
            state.update({k: state[k].to(v.dtype) for k, v in given.items() if isinstance(v, Tensor)})
            if self._dividers or hasattr(state["noise"], "device_mesh"):
                self.state[p] = state = fitted_state(p, state, vectors)
            if "keep" in state:
                self._index[p] = alive_index(state["keep"])

    # ------------------------------------------------------------------ inside
    def _check(self, options: Mapping[str, Any]) -> None:
        check_settings(type(self).__name__, options, *self._prior_kind)
        self._check_options(options)

    def _outside(self, call: str) -> None:
        if self._backup is not None:
            raise OckhamError(f"{call}() inside sampled(): the weights are a draw there; leave the block first")

    def _arena(self, group: dict[str, Any]) -> Arena:
        alive = [p for p in group["params"] if p.requires_grad]
        found = self._arenas.get(id(group))
        if found is not None and found.holds(alive):
            return found
        for p in alive:
            self._ensure(p, group)
        vectors = {}
        for name in (*self._vectors, "noise") if alive else ():
            parts = [self.state[p][name] for p in alive]
            sizes = [part.numel() for part in parts]
            vectors[name] = torch.cat(parts, out=parts[0].new_empty(sum(sizes)))  # out=: autocast would cast the noise
            for p, part in zip(alive, vectors[name].split(sizes), strict=True):
                self.state[p][name] = part
        divided = Divided.of(alive, [self.state[p]["noise"].numel() for p in alive])
        arena = Arena(tuple(alive), vectors, tuple(spans([(p, self._index.get(p)) for p in alive])), divided)
        self._arenas[id(group)] = arena
        return arena

    def _ensure(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            state.update(self._start(rows_here(p), group))
            state["step"] = 0
            state["noise"] = torch.zeros(rows_here(p).numel(), dtype=torch.half, device=p.device)
            self._phase = -1  # there is no noise to go on from: the next draw is a new one
            if p in self._held:
                self._remove_from(p, self._keep_of(p))
        return state

    def _free_what_is_trained(self) -> None:
        """Entries held fixed that get a gradient after all are weights as any other, from this step on."""
        for p, at in tuple(self._held.items()):
            if p.grad is None or not holders(p).summed(rows_here(p.grad).reshape(-1)[at].any().double()):
                continue
            state, group = self.state[p], self._group_of(p)
            old = self._keep_of(p).reshape(-1)
            new = old.index_fill(0, self._held.pop(p), True)
            noise = torch.zeros(len(old), dtype=torch.half, device=p.device)
            fresh = self._start(rows_here(p), group) | {"noise": noise}
            for name in (*self._vectors, "noise"):
                fresh[name][old] = state[name]
                state[name] = fresh[name][new]
            state["keep"] = new.view(rows_here(p).shape)
            self._index[p] = alive_index(new)
            self._arenas.pop(id(group), None)

    def _facts(self, span: Span) -> RunFacts:
        return self._facts_of(self.state[span.pieces[0].parameter])

    def _runs(self, span: Span, *, ready: bool = False) -> list[Span]:
        """The span whole where its parameters agree in everything scalar, else piece by piece; only ready ones."""
        states = [self.state[x.parameter] for x in span.pieces]
        there = [not ready or x.parameter.grad is not None for x in span.pieces]
        if all(there) and len({self._facts_of(s) for s in states}) == 1:
            return [span]
        return [part for part, ok in zip(span.split(), there, strict=True) if ok]

    def _perturb(self) -> None:
        assert self._backup is not None
        new = not self._pending
        for module in self._dividers:
            module.reshard()
        arenas = [self._arena(group) for group in self.param_groups]
        try:
            self._phase = (self._phase + 1) % CYCLE if new else self._phase
            for group, arena in zip(self.param_groups, arenas, strict=True):
                if new and arena.divided is not None:
                    self._draw_(arena.vectors["noise"], arena.divided)
                for span in arena.spans:
                    runs = [run for run in self._runs(span) if self._perturbs(run)]
                    if new and runs and arena.divided is None:
                        self._draw_(arena.at(span)["noise"])
                    for run in runs:  # mean + std * noise, once the mean is in the backup
                        vectors = arena.at(run)
                        mean = vectors["mean"]
                        place = read(run, [x.parameter for x in run.pieces], mean)
                        if place is not mean:
                            mean.copy_(place)
                        self._backup.append((run, mean))
                        std = self._std_(vectors["first"], vectors, self._facts(run), group)
                        noise = vectors["second"].copy_(vectors["noise"])  # first: products of mixed dtypes are slow
                        write(run, torch.addcmul(mean, std, noise, out=noise))
                        if arena.small:
                            arena.drawn.add((run.start, run.stop))
            torch.clear_autocast_cache()  # an autocast around the block may hold casts of the mean
            self._block_began(new)
            self._pending = True
        except BaseException:
            self._phase = -1 if new else self._phase  # this noise is half made: the next draw is a new one
            raise

    def _draw_(self, noise: Tensor, divided: Divided | None = None) -> None:
        (divided.renew_ if divided else renew_)(noise, self._phase, self._generator(noise.device))

    def _restore(self) -> None:
        """Put the mean back; repeatable, since an interrupt may stop it anywhere."""
        if self._backup is None:
            return
        for run, mean in self._backup:
            write(run, mean)
        torch.clear_autocast_cache()
        for module in self._dividers:
            module.reshard()
        self._came = any(p.grad is not None for p in self._names)
        self._block_ended()
        self._backup = None

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    def _keep_of(self, p: Tensor) -> Tensor:
        keep: Tensor | None = self.state.get(p, {}).get("keep")
        if keep is not None:
            return keep.clone()
        every: Tensor = torch.ones(rows_here(p).shape, dtype=torch.bool, device=p.device)
        if p in self._held:
            every.view(-1)[self._held[p]] = False
        return every

    @torch.no_grad()
    def _gaussian(self, p: Tensor, group: dict[str, Any]) -> Gaussian:
        state, keep = self.state[p], self._keep_of(p)
        facts = self._facts_of(state)
        mean = rows_here(p).detach().clone(memory_format=torch.contiguous_format)
        precision = torch.full_like(mean, torch.inf)
        std = self._std_(mean.new_empty(state["noise"].numel()), state, facts, group)
        precision[keep] = std.double().pow(-2).to(p.dtype)
        mean, precision, keep = (whole(sharded_as(p, rows)) for rows in (mean, precision, keep))
        prior_mean = torch.tensor(group["prior_mean"], dtype=p.dtype)
        return Gaussian(mean, precision, self._prior_of(p, group).to(mean.device), prior_mean.to(mean.device), keep)

    @torch.no_grad()
    def _remove_from(self, p: Tensor, keep: Tensor) -> int:
        group = self._group_of(p)
        state, old = self._ensure(p, group), self._index.get(p)
        flat = own_rows(p, keep).to(p.device).reshape(-1)
        stays = flat if old is None else flat[old]
        gone = int(holders(p).summed((~stays).sum()))
        if not gone:
            return 0
        for name in (*self._vectors, "noise"):
            state[name] = state[name][stays]
        state["keep"] = flat.view(rows_here(p).shape) & self._keep_of(p)
        self._index[p] = alive_index(state["keep"])
        self._arenas.pop(id(group), None)
        zero = ~state["keep"]
        if p in self._held:
            zero.view(-1)[self._held[p]] = False
        rows_here(p).masked_fill_(zero, 0.0)
        return gone

    def _group_of(self, p: Tensor) -> dict[str, Any]:
        return next(g for g in self.param_groups if any(q is p for q in g["params"]))
