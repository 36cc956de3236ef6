"""Copies of a network, and comparisons of what two networks answer."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ockham.core.batch import arranged, inputs_of
from ockham.core.network import check_module, copied, keeping_modes
from ockham.core.processes import whole


def canonical_names(model: nn.Module) -> dict[int, str]:
    """Return ``id(tensor) -> first name`` over parameters and buffers; tied tensors have one name."""
    check_module(model)
    names: dict[int, str] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names.setdefault(id(tensor), name)
    return names


Moves = Mapping[str, Mapping[int, int]]
"""Path of a list of modules to {number before: number afterwards} of those that stay in it."""


def renumbered(held: Any, moves: Moves) -> Any:
    """Return the name of a tensor or module once modules of lists have moved up; or plain values with such names.

    >>> renumbered("layers.3.up.weight", {"layers": {0: 0, 2: 1, 3: 2}})
    'layers.2.up.weight'
    """
    if isinstance(held, dict):
        return {renumbered(key, moves): renumbered(value, moves) for key, value in held.items()}
    if isinstance(held, list):
        return [renumbered(value, moves) for value in held]
    for path, places in moves.items() if isinstance(held, str) else ():
        number, dot, rest = held.removeprefix(f"{path}.").partition(".")
        if held.startswith(f"{path}.") and number.isdecimal():
            return f"{path}.{places.get(int(number), int(number))}{dot}{rest}"
    return held


def moves_up(names: Collection[str]) -> Moves:
    """Return how the modules of every list move up where tensors of these names are all that is left."""
    moves: dict[str, dict[int, int]] = {}
    steps = [name.split(".") for name in names]
    found = {(".".join(s[:i]), int(s[i])) for s in steps for i in range(len(s)) if s[i].isdecimal()}
    for path, number in sorted(found):
        moves.setdefault(path, {})[number] = len(moves.get(path, ()))
    return moves


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by their first name, tied ones once."""
    names = canonical_names(model)
    every = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    return {name: every[name] for name in names.values()}


def clone(
    model: nn.Module, replace: Callable[[str, Tensor], Tensor], *, others: Callable[[Tensor], Tensor] | None = None
) -> Any:
    """Return a deep copy of `model` in which every parameter and buffer is ``replace(name, tensor)``.

    Tensors which modules hold as plain attributes, or in lists and dictionaries, are ``others(tensor)`` where given.

    A network divided by `fully_shard` is copied as it was before, with whole tensors; all its processes take part.

    Tied tensors stay tied, hooks and plain attributes are copied as `copy.deepcopy` does; the data of replaced tensors
    are not copied. Computed tensors held as attributes (``weight`` under `torch.nn.utils.prune`) are copied
    detached; the hook that made them makes them anew. Parameters stay parameters and keep ``requires_grad``.
    """
    memo: dict[int, Any] = {}
    for name, tensor in named_tensors(model).items():
        new = replace(name, whole(tensor))
        if isinstance(tensor, nn.Parameter) and not isinstance(new, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = new
    for module in model.modules():
        for held in vars(module).values():
            for tensor in tensors_in(held):
                if id(tensor) not in memo and (others is not None or not tensor.is_leaf):
                    memo[id(tensor)] = tensor.detach().clone() if others is None else others(tensor)
    with undivided(model):
        return copied(model, memo)


@contextlib.contextmanager
def undivided(model: nn.Module) -> Iterator[None]:
    """Inside, modules have the classes, hooks and attributes they had before `fully_shard`; tensors stay divided."""
    changed = []
    try:
        for module in [m for m in model.modules() if "_is_fsdp_managed_module" in vars(m)]:
            kind, own = type(module), dict(vars(module))
            changed.append((module, kind, own))
            for name, value in own.items():
                if name.startswith(("__composable_api_", "_is_fsdp", "_fsdp_")):
                    del vars(module)[name]
                elif name.endswith("_hooks"):
                    vars(module)[name] = type(value)((k, hook) for k, hook in value.items() if not _divides(hook))
            if hasattr(module, "_get_fsdp_state"):
                module.__class__ = next(base for base in kind.__bases__ if issubclass(base, nn.Module))
        yield
    finally:
        for module, kind, own in changed:
            module.__class__ = kind
            vars(module).update(own)


def _divides(hook: Any) -> bool:
    return str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith("torch.distributed.fsdp")


def divided_like(model: nn.Module, small: nn.Module) -> None:
    """Divide a network of whole tensors over the processes as `fully_shard` has divided another, module by module."""
    names = {module: name for name, module in model.named_modules()}
    blocks = [m for m in names if hasattr(m, "_get_fsdp_state")]
    states: dict[Any, list[str]] = {}
    for module in reversed(blocks):  # blocks before what they are part of
        states.setdefault(module._get_fsdp_state(), []).append(names[module])
    for state, own in states.items():
        from torch.distributed.fsdp import fully_shard

        modules = [small.get_submodule(name) for name in reversed(own)]
        group = state._fsdp_param_group
        options = {} if group is None else {"offload_policy": group.offload_policy}
        if not state._auto_reshard_after_forward and group is not None:
            options["reshard_after_forward"] = group.post_forward_mesh_info is not None
        first: Any = next(p for name in own for p in model.get_submodule(name).parameters())
        fully_shard(modules, mesh=first.device_mesh, mp_policy=state._mp_policy, **options)


def tensors_in(held: Any) -> Iterator[Tensor]:
    """Yield the tensors in an attribute: itself, or in lists, tuples and dictionaries."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, (list, tuple, Mapping)):
        for item in held.values() if isinstance(held, Mapping) else held:
            yield from tensors_in(item)


def caches_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return module path to attributes that are lists or dictionaries with tensors other than parameters and buffers.

    They may come from an earlier forward, as tables that are kept once they were computed do.
    """
    known = canonical_names(model)
    found: dict[str, tuple[str, ...]] = {}
    for path, module in model.named_modules():
        names = tuple(
            name
            for name, held in vars(module).items()
            if isinstance(held, (list, dict))
            and not name.startswith(("_parameters", "_buffers", "_modules", "_flat_weight"))
            and any(id(t) not in known for t in tensors_in(held))
        )
        if names:
            found[path] = names
    return found


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
CACHES = frozenset({"past_key_values", "cache_params", "past_key_value", "mems"})
"""Outputs of language models that hold what the next call may use again: they are no result."""
BESIDE_LOGITS = CACHES | {"state"}
"""Outputs that are no result where there are logits: what a recurrent network carries on."""


def as_arguments(model: nn.Module, example_inputs: Any) -> Arguments:
    """Return positional and keyword arguments of a model call, as training arranges the inputs of a batch.

    Args:
        model: network that is to be called.
        example_inputs: a tensor, a tuple or list, a mapping of names, or a named tuple.
    """
    return arranged(model, inputs_of(example_inputs))


def with_rows(example_inputs: Any, batch: int) -> Any:
    """Return example inputs in which every tensor is repeated or cut to `batch` rows; numbers stay as they are."""

    def rows(tensor: Tensor) -> Tensor:
        index = torch.arange(batch, device=tensor.device)
        return tensor.index_select(0, index % tensor.shape[0]) if tensor.ndim else tensor

    return pytree.tree_map_only(Tensor, rows, example_inputs)


def tensors_of(out: Any) -> list[Tensor]:
    """Return the tensors in what a network returned, without the caches of language models."""
    if isinstance(out, Tensor):
        return [out]
    if "Cache" in type(out).__name__:
        return []
    if isinstance(out, Mapping):
        inner = BESIDE_LOGITS if "logits" in out else CACHES
        return [t for key, part in out.items() if key not in inner for t in tensors_of(part)]
    if isinstance(out, (list, tuple)):
        return [t for part in out for t in tensors_of(part)]
    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        return [t for f in dataclasses.fields(out) for t in tensors_of(getattr(out, f.name))]
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]


def outputs(model: nn.Module, arguments: Arguments, *, seed: int = 0) -> list[Tensor]:
    """Return the tensors that `model` computes, without gradients; its random numbers are those of `seed`.

    The global random state and the arguments are left as they are.
    """
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, arguments)
    devices = {t.device for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_cuda}
    with torch.no_grad(), warnings.catch_warnings(), torch.random.fork_rng(devices=sorted(devices, key=str)):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        return tensors_of(model(*args, **kwargs))


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest ``max|a - b| / max|a|`` over pairs of outputs.

    Equal infinities are equal, and so are two values that are not a number; a value that is finite on one side only,
    another shape or another number of outputs make the difference infinite.
    """
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf")
    worst = 0.0
    for a, b in zip(map(_real, one), map(_real, other), strict=True):
        same = (a == b) | (a.isnan() & b.isnan())
        finite = a[a.isfinite()].abs()
        scale = (
            finite.max()
            if finite.numel() and bool(finite.max() > 0)
            else torch.ones((), dtype=a.dtype, device=a.device)
        )
        gap = torch.where(same, 0.0, (a - b).abs() / scale).nan_to_num(nan=float("inf"))
        worst = max(worst, float(gap.max())) if gap.numel() else worst
    return worst


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor).double() if tensor.is_complex() else tensor.double()


DROPOUTS = frozenset(
    {
        F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
        torch.dropout_, torch.feature_dropout, torch.alpha_dropout,
    }
)  # fmt: skip
FILLED = frozenset(
    {
        torch.rand, torch.randn, torch.rand_like, torch.randn_like, torch.Tensor.normal_, torch.Tensor.uniform_,
        torch.Tensor.exponential_, torch.Tensor.log_normal_, torch.Tensor.cauchy_,
    }
)  # fmt: skip
COINS = frozenset({torch.bernoulli, torch.Tensor.bernoulli, torch.Tensor.bernoulli_})


class Still(TorchFunctionMode):
    """Inside, nothing is random: dropout passes everything, and noise is one half everywhere."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, or what stands for it where it is random."""
        kwargs = kwargs or {}
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            rest = dict(zip(("dropout_p", "is_causal"), args[4:], strict=False))
            return func(*args[:4], **{**rest, **kwargs, "dropout_p": 0.0})
        if func is F.rrelu:
            return F.leaky_relu(args[0] if args else kwargs["input"], 0.25)
        out = func(*args, **kwargs)
        fixed = 0.5 if func in FILLED else 1.0 if func in COINS else None
        if func is torch.normal:
            return self._normal(out, *args)
        return out if fixed is None else out.fill_(fixed)

    @staticmethod
    def _normal(out: Tensor, mean: Any = 0.0, std: Any = 1.0, *_: Any) -> Tensor:
        return torch.zeros_like(out) + mean + 0.5 * std if isinstance(std, (Tensor, float)) else out.fill_(0.5)


class Gradless(TorchFunctionMode):
    """Inside, a graph is written without the switches of gradients: there are none, and each costs two subgraphs."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`; a switch of gradients takes place, and nobody else hears of it."""
        if func is torch._C._set_grad_enabled:
            with torch._C.DisableTorchFunction():
                return func(*args)
        return func(*args, **(kwargs or {}))


_GROUPED = {f for f in (getattr(torch.nn.functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f}


class Valueless(TorchFunctionMode):
    """Inside, grouped matrix products of tensors without values are plain ones of as much work.

    Some versions of torch know no sizes of theirs but for bfloat16, whatever the kernel takes.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, or the plain product: a group has all rows, or (two matrices) is summed over all columns."""
        kwargs = kwargs or {}
        if func not in _GROUPED or not (args[0].is_meta or isinstance(args[0], FakeTensor)):
            return func(*args, **kwargs)
        one, other = args[:2]
        if one.ndim == other.ndim == 2:
            ends = kwargs["offs"] if "offs" in kwargs else args[2]
            return (one @ other).expand(len(ends), -1, -1)
        if one.ndim == other.ndim:
            return one @ other
        return one @ other[0] if one.ndim == 2 else one[0] @ other


@contextlib.contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Run without randomness, also in layers that drop out inside of an op of their own (recurrent ones, attention)."""
    found = [
        (module, name, held)
        for module in model.modules()
        for name, held in vars(module).items()
        if "drop" in name and isinstance(held, float) and held > 0
    ]
    try:
        for module, name, _ in found:
            module.__dict__[name] = 0.0
        with Still():
            yield
    finally:
        for module, name, held in found:
            module.__dict__[name] = held


def to_double(arguments: Arguments) -> Arguments:
    """Return the arguments with floating-point tensors in float64."""
    result: Arguments = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, arguments)
    return result


def layers_of(model: nn.Module, arguments: Arguments) -> dict[str, Tensor]:
    """Return the first output of every submodule, in the order in which they were done."""
    found: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            for first in tensors_of(out)[:1]:
                found.setdefault(name, first.clone())

        return hook

    handles = [m.register_forward_hook(keeper(n)) for n, m in model.named_modules() if n]
    try:
        outputs(model, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return found


def given_to(model: nn.Module, layers: Collection[str], arguments: Arguments) -> dict[str, list[Tensor]]:
    """Return the tensor that each of some submodules is given first, call by call, in a forward in evaluation mode."""
    seen: dict[str, list[Tensor]] = {}

    def keeper(name: str) -> Any:
        def keep(_module: nn.Module, args: Any) -> None:
            if args and isinstance(args[0], Tensor):
                seen.setdefault(name, []).append(args[0].detach())

        return keep

    handles = [model.get_submodule(name).register_forward_pre_hook(keeper(name)) for name in layers]
    try:
        with keeping_modes(model):
            outputs(model.eval(), arguments)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def place_of_failure(model: nn.Module, arguments: Arguments) -> str:
    """Return the path of the innermost module in whose forward the network fails ("" for its own)."""
    stack: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(lambda *_: stack.pop() and None))
    try:
        outputs(model, arguments)
    except Exception:
        return stack[-1] if stack else ""
    finally:
        for handle in handles:
            handle.remove()
    return ""


def first_different(
    one: nn.Module, other: nn.Module, arguments: Arguments, tolerance: float
) -> tuple[str, float] | None:
    """Return the first submodule whose outputs can be compared and differ, and by how much."""
    traces = [layers_of(model, arguments) for model in (one, other)]
    for name, values in traces[0].items():
        twin = traces[1].get(name)
        if twin is not None and values.shape == twin.shape and not difference([values], [twin]) <= tolerance:
            return name, difference([values], [twin])
    return None


Caches = Mapping[str, tuple[str, ...]]


def refilled(model: nn.Module, arguments: Arguments) -> Caches:
    """Return the attributes with tensors of a forward which the network fills again when they are empty."""
    if any(p.is_meta for p in model.parameters()):
        return {}
    held = caches_of(model)

    def run(empty: bool) -> tuple[list[Tensor], nn.Module]:
        twin = clone(model, lambda _, t: t.detach().clone()).eval()
        if empty:
            emptied(twin, held)
        with still(twin):
            return outputs(twin, arguments), twin

    try:
        out, after = run(True)
        if not held or difference(out, run(False)[0]) <= 1e-4:
            return {
                path: tuple(dict.fromkeys([*held.get(path, ()), *names])) for path, names in caches_of(after).items()
            }
    except Exception:  # it does not run without them: they are no caches
        return {}
    return {}


def emptied(model: nn.Module, caches: Caches) -> None:
    """Empty these attributes."""
    for path, names in caches.items():
        for name in names:
            getattr(model.get_submodule(path), name).clear()


@contextlib.contextmanager
def configured(model: nn.Module, **fields: Any) -> Iterator[None]:
    """Set fields of the configurations inside a model, such as ``use_cache``, where they are; undone after it."""
    before = []
    for module in model.modules():
        config = getattr(module, "config", None)
        for name in fields.keys() & getattr(config, "__dict__", {}).keys():
            before.append((config, name, getattr(config, name)))
            setattr(config, name, fields[name])
    try:
        yield
    finally:
        for config, name, old in reversed(before):
            setattr(config, name, old)


def trial_masks(sizes: Mapping[str, int]) -> list[dict[str, Tensor]]:
    """Return masks of the units that stay in three trials; between them every group loses a part.

    Args:
        sizes: id of a group to its number of units.
    """
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(len(sizes), generator=generator)
    few = torch.rand(len(sizes), generator=generator) < 0.5
    # a share of its own for each; as many in all that are alike; hardly anything left of about half of them
    losses = (0.2 + 0.5 * shares, torch.full_like(shares, 0.35), torch.where(few, 1.0, 0.3 * shares))
    pairs = [name for name, size in sizes.items() if size == 2]
    masks: list[dict[str, Tensor]] = []
    for k, lost in enumerate(losses):
        masks.append({})
        for (name, size), share in zip(sizes.items(), lost.tolist(), strict=True):
            count = min(max(round(share * size), 1), size - 1)
            if size == 2:  # pairs that lose one each in every trial may be right only together
                r = pairs.index(name)
                count = (r >> 1 & 1, r & 1, 1 - (r & 1))[k]
            masks[k][name] = torch.ones(size, dtype=torch.bool)
            masks[k][name][torch.randperm(size, generator=generator)[:count]] = False
    return masks
