"""Configurations that describe a model's shapes (transformers), made true for the shrunk model where they can be."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ockham.errors import OckhamError, first_line
from ockham.surgery.copies import (
    Arguments,
    Moves,
    as_arguments,
    canonical_names,
    clone,
    difference,
    divided_like,
    first_different,
    named_tensors,
    outputs,
    renumbered,
    still,
    to_double,
    undivided,
)
from ockham.surgery.groups import Plan, PlanError
from ockham.surgery.refitting import EXPERTS, check_model, refit
from ockham.surgery.streams import idle_layers, take_out_layers

HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "num_kv_heads", "n_head_kv",
    "multi_query_group_num", "encoder_attention_heads", "decoder_attention_heads",
)  # fmt: skip
"""Fields that count heads, of queries or of keys and values."""
WIDTHS = (
    "intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "dff",
    "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size", "d_inner", *EXPERTS,
)  # fmt: skip
"""Fields that hold the inner width of feed-forward layers or experts, or the number of experts."""
LARGEST_VALUES = 2**28
"""Number of parameters up to which a model is built from a configuration to see what it computes."""


def settle_config(model: nn.Module, small: nn.Module, plan: Plan) -> bool:
    """Make ``small.config`` describe the shapes of `small`, so that its own constructor builds it again.

    A configuration has one number for all layers: it can describe a plan that leaves them all alike. Only fields whose
    role it is to hold a number of heads, experts or layers or an inner width are changed, as few as suffice; layers of
    which nothing is left go out of their list, and those after them move up in their names. It is kept only if the
    constructor then yields exactly the shapes of `small`, and the network it builds computes the same on random inputs
    with random weights. Otherwise the configuration stays that of `model`, which together with the plan rebuilds the
    network (`shrink` on a fresh instance).

    Returns:
        True when the configuration was changed and describes `small` now.
    """
    config = getattr(small, "config", None)
    if config is None or not callable(getattr(config, "to_dict", None)) or not (plan.removed or plan.dropped):
        return False
    if sum(t.numel() for t in named_tensors(small).values()) > LARGEST_VALUES:
        return False
    hollow = any(p.is_meta for p in small.parameters())  # shapes alone: nothing can be computed
    layers, moves = ({}, {}) if hollow or hasattr(small, "reshard") else idle_layers(small, config)
    if plan.dropped and not layers:
        return False
    wanted = {renumbered(n, moves): shape for n, shape in _shapes(small).items()}
    for widths in itertools.chain([{}] if layers else [], _candidates(config, plan)):
        fields: dict[str, Any] = {**layers, **widths}
        trial = copy.deepcopy(config)
        for name, value in fields.items():
            setattr(trial, name, value)
        if _built(type(model), trial) == wanted and (hollow or _same(type(model), trial, small, fields, moves)):
            take_out_layers(small, moves)
            counts = {getattr(config, name): fields[name] for name in EXPERTS & fields.keys()}
            for module in small.modules():  # the loss that balances experts asks the whole model for their number
                for name in EXPERTS & vars(module).keys():
                    setattr(module, name, counts.get(getattr(module, name), getattr(module, name)))
            for name, value in fields.items():
                setattr(config, name, value)
            return True
    return False


def says_its_widths(model: nn.Module) -> bool:
    """True when the model's own configuration builds a network of exactly its shapes."""
    return _built(type(model), getattr(model, "config", None)) == _shapes(model)


def _candidates(config: Any, plan: Plan) -> Iterator[dict[str, int]]:
    """Changes to try by the role of a field, the smallest sets first."""
    widths: dict[int, set[int]] = {}
    for key, width in plan.widths.items():
        widths.setdefault(width, set()).add(width - len(plan.removed.get(key, ())))
    uniform = {old: new.copy().pop() for old, new in widths.items() if len(new) == 1 and new != {old}}
    held = {n: v for n, v in config.to_dict().items() if isinstance(v, int) and not isinstance(v, bool)}
    changes: list[tuple[str, int]] = []
    for name in HEADS:
        if name in held:
            kept = {held[name] * new // old for old, new in uniform.items() if held[name] * new % old == 0}
            changes += [(name, n) for n in sorted(kept) if 0 < n < held[name]]
    changes += [(name, uniform[held[name]]) for name in WIDTHS if held.get(name) in uniform]
    if getattr(config, "n_inner", 0) is None and 4 * config.n_embd in uniform:
        changes.append(("n_inner", uniform[4 * config.n_embd]))
    heads, hidden = held.get("num_attention_heads"), held.get("hidden_size")
    if heads and hidden and hasattr(config, "head_dim") and config.head_dim is None:
        changes.append(("head_dim", hidden // heads))
    for size in range(1, 5):
        for chosen in itertools.combinations(changes, size):
            if len({name for name, _ in chosen}) == size:
                yield dict(chosen)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def _built(kind: type[nn.Module], config: Any) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the model that a configuration describes; None where it describes none."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _shapes(kind(copy.deepcopy(config)))
    except Exception:  # a constructor may refuse a trial configuration in any way: then it describes no model
        return None


def _same(kind: type[nn.Module], config: Any, small: nn.Module, fields: dict[str, Any], moves: Moves) -> bool:
    """Does the model built from `config` compute what `small` does, before and after its own configuration changes?"""
    generator = torch.Generator().manual_seed(0)

    def noisy(_: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
            return tensor.detach().clone()
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        return 1 + 0.2 * noise if tensor.ndim < 2 else noise * (1.3 / max(1, math.prod(tensor.shape[1:])) ** 0.5)

    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = clone(small, noisy).eval()
            fresh = kind(copy.deepcopy(config)).to(next(small.parameters())).eval()
            fresh.load_state_dict({renumbered(n, moves): t for n, t in twin.state_dict().items()})
        inputs = _inputs(small)
        if inputs is None:
            return False
        expected = outputs(twin, ((), inputs))
        take_out_layers(twin, moves)
        for name, value in fields.items():
            setattr(twin.config, name, value)
        return max(difference(expected, outputs(m, ((), inputs))) for m in (twin, fresh)) < 1e-4
    except Exception:  # whatever keeps the comparison from being made: the configuration stays as it is
        return False


def _inputs(small: Any) -> dict[str, Tensor] | None:
    """Return random inputs by what the model says it takes: longer than any window of its attention, or None."""
    config, generator = small.config, torch.Generator().manual_seed(1)
    device, dtype = next(small.parameters()).device, next(small.parameters()).dtype
    kind = getattr(small, "main_input_name", None)
    if kind == "input_ids":
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        window = getattr(text, "sliding_window", None) or 0
        longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 64
        length = max(2, min(max(48, 3 * window), longest - 4, 512))
        ids = torch.randint(min(3, text.vocab_size - 1), text.vocab_size, (2, length), generator=generator).to(device)
        decoder = (
            {"decoder_input_ids": ids[:, : length // 2 + 1]} if getattr(config, "is_encoder_decoder", False) else {}
        )
        return {"input_ids": ids, **decoder}
    if kind == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
        shape = (2, getattr(config, "num_channels", 3), *size)
        return {"pixel_values": torch.randn(shape, generator=generator).to(device, dtype)}
    return None


@runtime_checkable
class Sliceable(Protocol):
    """An optimizer that carries its own state over to a smaller network."""

    def sliced(self, parameters: Mapping[str, Tensor], take: Callable[[str, Tensor], Tensor]) -> Any:
        """A copy over ``parameters`` (by name); ``take`` cuts a tensor shaped like the named parameter."""


@runtime_checkable
class Follower(Protocol):
    """An optimizer that reads its network, not only its parameters."""

    def follow(self, network: nn.Module) -> None:
        """Use ``network`` from now on, which holds its parameters."""


def slice_tensor(plan: Plan, name: str, tensor: Tensor) -> Tensor:
    """Return what stays of `tensor`, which is shaped as parameter (or buffer) `name` was before.

    Works for anything of that shape: weights, gradients, optimizer state, posterior means and precisions. The result
    owns its memory and keeps dtype, device and memory format.

    Raises:
        PlanError: when the shape is another one.
    """
    if name not in plan.shapes or tuple(tensor.shape) != plan.shapes[name]:
        expected = plan.shapes.get(name, "no such tensor in the plan")
        raise PlanError(f"{name}: got shape {tuple(tensor.shape)}, the plan expects {expected}")
    out = tensor.detach()
    for dim in plan.cuts.get(name, {}):
        out = out.index_select(dim, plan.kept(name, dim).to(out.device))
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim, torch.contiguous_format)
    own = not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last)
    return out.clone(memory_format=last if own else torch.contiguous_format)


def masked_tensor(plan: Plan, name: str, tensor: Tensor) -> Tensor:
    """Return a copy of `tensor` with zeros in all that the plan removes from it."""
    if name in plan.lost:
        return torch.zeros_like(tensor)
    out = tensor.detach().clone()
    for dim, gone in plan.cuts.get(name, {}).items():
        out.index_fill_(dim, torch.tensor(gone, device=out.device), 0)
    return out


def mask(model: nn.Module, plan: Plan) -> Any:
    """Return a copy of `model` in which every weight of a removed structure is zero.

    Zeroed are the weights that make a unit (with bias and norm affine) and those which read it, so the copy computes
    the function of the network without the unit: whatever constant a norm or an activation would leave behind
    (bias -> BatchNorm -> ReLU) meets zero weights. No constant is ever left to fold. Running statistics stay. Of a
    branch that goes as a whole every parameter is zero. Experts that go are never chosen: their logits are minus
    infinity in the copy, so that the others share the tokens as they do once the rows of the router are gone.

    Raises:
        PlanError: when the plan is for another model.
    """
    check_model(plan, model)
    return masked_copy(model, plan)


class Closing(TorchFunctionMode):
    """Inside, some rows of a router's weight yield minus infinity: what they stand for is never chosen.

    Args:
        weight: the router's weight.
        closed: numbers of the rows.
    """

    def __init__(self, weight: Tensor, closed: Sequence[int]) -> None:
        super().__init__()
        self.weight, self.closed = weight, list(closed)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`; products with the weight lose the rows."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = (*args, *kwargs.values())
        if func is not F.linear or not any(a is self.weight for a in given):
            return out
        return out.index_fill(-1, torch.tensor(self.closed, device=out.device), -math.inf)


@functools.cache
def closed_class(base: Any) -> type[nn.Module]:
    """Return the subclass of a router's class whose forward runs under `Closing`."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        leaf, closed = self.__dict__["_closed"]
        with Closing(getattr(self, leaf), closed):
            return base.forward(self, *args, **kwargs)

    kind: type[nn.Module] = type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})
    return kind


def masked_copy(model: nn.Module, plan: Plan) -> Any:
    """Return what `mask` does; the model is known to be the plan's."""
    zeroed = {name for name, _ in model.named_parameters()} - set(plan.spared)
    twin = clone(model, lambda n, t: masked_tensor(plan, n, t) if n in zeroed else t.detach().clone())
    for name in plan.routers:
        path, _, leaf = name.rpartition(".")
        router = twin.get_submodule(path)
        router.__dict__["_closed"] = (leaf, plan.cuts[name][0])
        for other, t in (*router.named_parameters(), *router.named_buffers()):
            if other not in (leaf, "bias") and f"{path}.{other}" in plan.cuts:  # a bias for choosing alone
                t.data[list(plan.cuts[name][0])] = -math.inf
        kind: Any = type(router)
        router.__class__ = closed_class(kind)
    return twin


def shrink(
    model: nn.Module,
    plan: Plan,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    posterior: Mapping[str, Any] | None = None,
    scheduler: Any = None,
) -> Any:
    """Return a smaller copy of `model`: ``f_small(x) = f_masked(x)``. The original is left as it is.

    Of a model that `fully_shard` has divided over processes the copy is divided alike, and so is what is carried over
    into its optimizer; all processes call this, and each holds the whole network for a moment.

    Parameters keep dtype, device, memory format and ``requires_grad``, modules their mode, and their attributes
    (``out_channels``, ``num_heads``, ...) follow the new shapes; a transformers ``config`` does where it can describe
    them (all layers alike), and stays the old one where it cannot.

    Args:
        model: the model the plan was made for (a fresh instance will do).
        plan: the edits.
        optimizer: an optimizer over the parameters of `model`; a copy over those of the small model is returned too,
            its state sliced alike.
        posterior: parameter name to an object whose tensors of the parameter's shape are to be sliced, or to a tensor.
        scheduler: learning-rate scheduler of `optimizer`; a copy that schedules the copy of the optimizer is returned.

    Returns:
        The small model; with `optimizer`, `posterior` or `scheduler` a tuple of it and what was given, in this order.

    Raises:
        PlanError: when the plan is for another model, or a scheduler comes without its optimizer.
    """
    check_model(plan, model)
    if scheduler is not None and getattr(scheduler, "optimizer", None) is not optimizer:
        raise PlanError("the scheduler is for another optimizer than the one given; pass optimizer=scheduler.optimizer")
    divided: list[Any] = [m for m in model.modules() if hasattr(m, "reshard")]
    for module in divided:  # parameters may still be gathered after a forward pass
        module.reshard()
    small = clone(model, lambda n, t: slice_tensor(plan, n, t))
    with undivided(model):
        refit(model, small, plan)
        held = dict(small.named_parameters())  # by their names before: layers may move up
        settle_config(model, small, plan)
    if divided:
        now = canonical_names(small)
        divided_like(model, small)
        sharded = dict(small.named_parameters())  # new parameters in the place of the whole ones
        held = {name: sharded[now[id(p)]] for name, p in held.items() if id(p) in now}
    extras: list[Any] = []
    if optimizer is not None:
        extras.append(shrink_optimizer(model, small, plan, optimizer=optimizer, after=held))
    if posterior is not None:
        names = canonical_names(small)
        cut = {n: slice_values(plan, n, value) for n, value in posterior.items() if n not in plan.lost}
        extras.append({names.get(id(held.get(n)), n): value for n, value in cut.items()})
    if scheduler is not None:
        follower = copy.copy(scheduler)
        follower.optimizer = extras[0]
        extras.append(follower)
    return (small, *extras) if extras else small


def slice_values(plan: Plan, name: str, value: Any) -> Any:
    """Return `value` with every tensor shaped like parameter `name` sliced: tensors, mappings, dataclasses, objects."""
    if isinstance(value, Tensor):
        return slice_tensor(plan, name, value) if tuple(value.shape) == plan.shapes[name] else value.detach().clone()
    if isinstance(value, Mapping):
        return {k: slice_values(plan, name, v) for k, v in value.items()}
    names = getattr(value, "__dataclass_fields__", None) or getattr(value, "__dict__", None)
    if not names:
        return copy.deepcopy(value)
    twin = copy.copy(value)
    for field in names:
        object.__setattr__(twin, field, slice_values(plan, name, getattr(value, field)))
    return twin


def shrink_optimizer(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    *,
    optimizer: torch.optim.Optimizer,
    after: Mapping[str, nn.Parameter] | None = None,
) -> torch.optim.Optimizer:
    """Return a copy of `optimizer` over the parameters of `small`, with its state (momenta, ...) sliced alike.

    An optimizer that knows how (it has ``sliced(parameters, take)``, as the variational ones do) does it itself.
    ``after`` has the parameters of `small` by their names in `model`, where these are others.

    Raises:
        PlanError: when the optimizer holds a parameter the model does not have.
    """
    names = canonical_names(model)
    after = dict(small.named_parameters()) if after is None else after
    if isinstance(optimizer, Sliceable):
        if plan.dropped:
            raise PlanError(
                f"a {type(optimizer).__name__} cannot lose whole branches ({plan.dropped[0].id}, ...). Shrink without "
                "the optimizer, with posterior=, and start a new one from what that returns"
            )
        carried: torch.optim.Optimizer = optimizer.sliced(after, lambda name, tensor: slice_tensor(plan, name, tensor))
        if isinstance(carried, Follower):
            carried.follow(small)
        return carried
    memo: dict[int, Any] = {id(p): after.get(names[id(p)]) for p in model.parameters()}
    twin = object.__new__(type(optimizer))
    own = {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups", "step") and "hook" not in k}
    twin.__dict__.update(copy.deepcopy(own, memo))
    twin.__dict__.update({k: v for k, v in vars(optimizer).items() if "hook" in k})
    twin.state = defaultdict(dict)
    twin.param_groups = []
    for group in optimizer.param_groups:
        if any(id(p) not in names for p in group["params"]):
            raise PlanError("the optimizer holds a parameter that is not one of this model")
        fresh = {k: copy.deepcopy(v, memo) for k, v in group.items() if k != "params"}
        kept = [after[names[id(p)]] for p in group["params"] if names[id(p)] in after]
        twin.param_groups.append({"params": kept, **fresh})
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        if name not in after:  # it went with a branch
            continue
        twin.state[after[name]] = {k: _state(plan, name, v) for k, v in state.items()}
    return twin


def _state(plan: Plan, name: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim and tuple(value.shape) != plan.shapes[name]:
        raise PlanError(
            f"the optimizer's state for {name} has shape {tuple(value.shape)}, the parameter {plan.shapes[name]}: it "
            "cannot be sliced. Make a new optimizer over the small model"
        )
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        raise PlanError(f"the optimizer's state for {name} is not one tensor per parameter; make a new optimizer")
    return slice_values(plan, name, value) if isinstance(value, (Tensor, Mapping)) else copy.deepcopy(value)


class MismatchError(OckhamError):
    """The shrunk network computes something else than the masked one; the text names the first layer that differs."""


def verify(
    masked: nn.Module,
    small: nn.Module,
    example_inputs: Any,
    *,
    draws: int = 2,
    tolerance: float = 1e-5,
    generator: torch.Generator | None = None,
) -> float:
    """Compare the outputs of two networks in evaluation mode, in float64 where the model allows it.

    The difference of two outputs is ``max|a - b| / max|a|``; equal infinities are equal, and so are two values that are
    not a number. Random numbers in the forward are the same for both networks, or switched off where their shapes
    differ. Both models are left as they are.

    Args:
        masked: result of `mask`.
        small: result of `shrink`, for the same plan.
        example_inputs: inputs as for `trace`; used as they are, and `draws` times with random values (floats of the
            same scale, integers reshuffled; masks stay as they are).
        draws: number of random inputs; one on which the masked network does not run is left out.
        tolerance: largest difference that counts as equal.
        generator: source of the random inputs; a fixed seed when None.

    Returns:
        The largest relative difference found.

    Raises:
        MismatchError: when it exceeds `tolerance`, or when a network does not run.
    """
    generator = generator or torch.Generator().manual_seed(0)
    arguments = as_arguments(masked, example_inputs)
    cast: Callable[[Arguments], Arguments] = to_double
    pair = [clone(m, lambda _, t: t.detach().clone()).eval() for m in (masked, small)]
    try:
        for model in pair:
            outputs(model.double(), to_double(arguments))
    except Exception:  # in the models' own dtype, then
        pair = [clone(m, lambda _, t: t.detach().clone()).eval() for m in (masked, small)]
        cast = copy.copy
    worst = 0.0
    for number in range(draws + 1):
        given = cast(arguments if number == 0 else _drawn(arguments, generator))
        expected = _run(pair[0], given, "masked", optional=number > 0)
        if expected is not None:
            gap = difference(expected, _run(pair[1], given, "shrunk") or [])
            worst = max(worst, gap if gap <= tolerance else _without_noise(pair, given, gap, tolerance=tolerance))
    return worst


def _run(model: nn.Module, arguments: Arguments, which: str, *, optional: bool = False) -> list[Tensor] | None:
    try:
        return outputs(model, arguments)
    except Exception as error:
        if optional:
            return None
        said = first_line(error)
        raise MismatchError(
            f"the {which} network does not run on these inputs: {type(error).__name__}: {said}. Give inputs it takes; "
            "if only the shrunk one fails, name the layer in ignore when you trace, and please report the model."
        ) from error


def _without_noise(pair: Sequence[nn.Module], arguments: Arguments, gap: float, *, tolerance: float) -> float:
    """Return the difference with randomness switched off, if the forward is random; else say what differs."""
    masked, small = pair
    random = difference(outputs(masked, arguments, seed=0), outputs(masked, arguments, seed=1)) > 0
    if random:
        with still(masked):
            expected = outputs(masked, arguments)
        with still(small):
            gap = difference(expected, outputs(small, arguments))
        if gap <= tolerance:
            return gap
    where = first_different(masked, small, arguments, tolerance)
    layer = (
        f"the first layer that differs is {where[0]!r} (by {where[1]:.2e}). Add it to ignore, and report it."
        if where is not None
        else "no single module differs in a comparable output: the forward of the root does. Are both from one plan?"
    )
    noise = " The forward is random (two runs of the masked network differ): switch sampling off." if random else ""
    raise MismatchError(f"masked and shrunk outputs differ by {gap:.2e} (tolerance {tolerance:.0e}); {layer}{noise}")


def _drawn(arguments: Arguments, generator: torch.Generator) -> Arguments:
    """Return random values instead of `arguments`; masks (two values only, or infinities) stay as they are."""

    def draw(tensor: Tensor) -> Tensor:
        flat = tensor.detach().cpu()
        if flat.numel() == 0 or flat.dtype == torch.bool or len(flat.unique()) <= 2 or not bool(flat.isfinite().all()):
            return tensor
        if flat.is_complex():
            return torch.randn(flat.shape, generator=generator, dtype=flat.dtype).to(tensor.device)
        if flat.is_floating_point():
            scale = float(flat.double().pow(2).mean().sqrt())
            new = torch.randn(flat.shape, generator=generator, dtype=torch.float64) * (scale or 1.0)
            return new.to(tensor.dtype).to(tensor.device)
        order = torch.randint(flat.numel(), flat.shape, generator=generator)
        return flat.flatten()[order].to(tensor.device)

    result: Arguments = pytree.tree_map_only(Tensor, draw, arguments)
    return result
