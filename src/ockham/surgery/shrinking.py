"""Plans applied: `mask` zeroes the removed structures, `shrink` takes them out for good."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ockham.errors import OckhamError
from ockham.surgery.cloning import canonical_names, clone
from ockham.surgery.groups import Plan, PlanError, check_model
from ockham.surgery.resizing import refit
from ockham.surgery.tracing import as_arguments

__all__ = []


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
    return out.clone(memory_format=_format(tensor))


def _format(tensor: Tensor) -> torch.memory_format:
    """Return the memory format `tensor` clearly has."""
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if tensor.ndim == 5 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def masked_tensor(plan: Plan, name: str, tensor: Tensor) -> Tensor:
    """Return a copy of `tensor` with zeros in all that the plan removes from it."""
    out = tensor.detach().clone()
    for dim, gone in plan.cuts.get(name, {}).items():
        out.index_fill_(dim, torch.tensor(gone, device=out.device), 0)
    return out


def mask(model: nn.Module, plan: Plan) -> Any:
    """Return a copy of `model` in which every weight of a removed structure is zero.

    Zeroed are the weights that make a unit (with bias and norm affine) and those which read it, so the copy computes
    the function of the network without the unit: whatever constant a norm or an activation would leave behind
    (bias -> BatchNorm -> ReLU) meets zero weights. No constant is ever left to fold. Running statistics stay.

    Raises:
        PlanError: when the plan is for another model.
    """
    check_model(plan, model)
    zeroed = {name for name, _ in model.named_parameters()} - set(plan.spared)
    return clone(model, lambda n, t: masked_tensor(plan, n, t) if n in zeroed else t.detach().clone())


def shrink(
    model: nn.Module,
    plan: Plan,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    posterior: Mapping[str, Any] | None = None,
) -> Any:
    """Return a smaller copy of `model`: ``f_small(x) = f_masked(x)``. The original is left as it is.

    Parameters keep dtype, device, memory format and ``requires_grad``, modules their mode, and their attributes
    (``out_channels``, ``num_heads``, ...) follow the new shapes; a transformers ``config`` does where it can describe
    them (all layers alike), and stays the old one where it cannot.

    Args:
        model: the model the plan was made for (a fresh instance will do).
        plan: the edits.
        optimizer: an optimizer over the parameters of `model`; a copy over those of the small model is returned too,
            its state sliced alike.
        posterior: parameter name to an object whose tensors of the parameter's shape are to be sliced, or to a tensor.

    Returns:
        The small model; with `optimizer` or `posterior` a tuple ``(small, optimizer, posterior)`` of what was given.

    Raises:
        PlanError: when the plan is for another model.
    """
    check_model(plan, model)
    small = clone(model, lambda n, t: slice_tensor(plan, n, t))
    refit(model, small, plan)
    settle_config(model, small, plan)
    extras: list[Any] = []
    if optimizer is not None:
        extras.append(shrink_optimizer(model, small, plan, optimizer=optimizer))
    if posterior is not None:
        extras.append({n: slice_values(plan, n, value) for n, value in posterior.items()})
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
    model: nn.Module, small: nn.Module, plan: Plan, *, optimizer: torch.optim.Optimizer
) -> torch.optim.Optimizer:
    """Return a copy of `optimizer` over the parameters of `small`, with its state (momenta, ...) sliced alike.

    An optimizer that knows how (it has ``sliced(parameters, take)``, as the variational ones do) does it itself.

    Raises:
        PlanError: when the optimizer holds a parameter the model does not have.
    """
    names = canonical_names(model)
    after = dict(small.named_parameters())
    if isinstance(optimizer, Sliceable):
        carried: torch.optim.Optimizer = optimizer.sliced(after, lambda name, tensor: slice_tensor(plan, name, tensor))
        if isinstance(carried, Follower):
            carried.follow(small)
        return carried
    twin = copy.copy(optimizer)
    twin.state = defaultdict(dict)
    twin.param_groups = []
    for group in optimizer.param_groups:
        if any(id(p) not in names for p in group["params"]):
            raise PlanError("the optimizer holds a parameter that is not one of this model")
        fresh = {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
        twin.param_groups.append({"params": [after[names[id(p)]] for p in group["params"]], **fresh})
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
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


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


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

    The difference of two outputs is ``max|a - b| / max|a|``. Both models are left as they are.

    Args:
        masked: result of `mask`.
        small: result of `shrink`, for the same plan.
        example_inputs: as for `trace`; used as they are and `draws` times with random values instead (floats of the
            same scale, integers and booleans reshuffled).
        draws: number of random inputs.
        tolerance: largest difference that counts as equal.
        generator: source of the random inputs; a fixed seed when None.

    Returns:
        The largest relative difference found.

    Raises:
        MismatchError: when it exceeds `tolerance`, when outputs are not finite, or when a network does not run.
    """
    generator = generator or torch.Generator().manual_seed(0)
    arguments = as_arguments(example_inputs)
    pair, cast = _doubled(masked, small, arguments)
    inputs = [arguments, *(_random(arguments, generator) for _ in range(draws))]
    worst = 0.0
    for given in inputs:
        difference = _difference(*(_outputs(m, cast(given)) for m in pair))
        if not difference <= tolerance:
            raise MismatchError(_explain(pair, cast(given), difference, tolerance=tolerance))
        worst = max(worst, difference)
    return worst


def _doubled(
    masked: nn.Module, small: nn.Module, arguments: Arguments
) -> tuple[tuple[nn.Module, nn.Module], Callable[[Arguments], Arguments]]:
    """Return copies in float64 and evaluation mode with a cast for inputs; in the models' own dtype if that fails."""
    own = (copy.deepcopy(masked).eval(), copy.deepcopy(small).eval())
    double = (copy.deepcopy(masked).double().eval(), copy.deepcopy(small).double().eval())
    try:
        for model in double:
            _outputs(model, _to_double(arguments))
        return double, _to_double
    except (RuntimeError, TypeError, ValueError):
        return own, lambda given: given


def _to_double(arguments: Arguments) -> Arguments:
    result: Arguments = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, arguments)
    return result


def _random(arguments: Arguments, generator: torch.Generator) -> Arguments:
    def draw(tensor: Tensor) -> Tensor:
        flat = tensor.detach().cpu()
        if flat.is_floating_point():
            scale = float(flat.double().pow(2).mean().sqrt()) if flat.numel() else 1.0
            new = torch.randn(flat.shape, generator=generator, dtype=torch.float64) * (scale or 1.0)
            return new.to(tensor.dtype).to(tensor.device)
        order = torch.randint(flat.numel(), flat.shape, generator=generator) if flat.numel() else flat.long()
        return flat.flatten()[order].to(tensor.device)

    result: Arguments = pytree.tree_map_only(Tensor, draw, arguments)
    return result


def _outputs(model: nn.Module, arguments: Arguments) -> list[Tensor]:
    args, kwargs = arguments
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(*args, **kwargs)
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]


def _difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest ``max|a - b| / max|a|``; infinite for other shapes, NaN for values that are not finite."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf")
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.numel():
            gap, scale = (a.double() - b.double()).abs().max(), a.double().abs().max()
            worst = max(worst, float(gap / scale)) if float(gap) != 0.0 else worst
            if not bool(torch.isfinite(gap)):
                return float("nan")
    return worst


def _explain(pair: tuple[nn.Module, nn.Module], arguments: Arguments, difference: float, *, tolerance: float) -> str:
    traces = [_intermediate(model, arguments) for model in pair]
    for name, values in traces[0].items():
        twin = traces[1].get(name)
        if twin is not None and values.shape == twin.shape and not _difference([values], [twin]) <= tolerance:
            gap = _difference([values], [twin])
            return (
                f"masked and shrunk outputs differ by {difference:.2e} (tolerance {tolerance:.0e}); the first layer "
                f"that differs is {name!r} (by {gap:.2e}). Add it to ignore, and please report the model."
            )
    return (
        f"masked and shrunk outputs differ by {difference:.2e} (tolerance {tolerance:.0e}); no single module differs "
        "in a comparable output, so the forward of the root does. Are both from the same plan?"
    )


def _intermediate(model: nn.Module, arguments: Arguments) -> dict[str, Tensor]:
    """Return the first output of every submodule, in the order they ran."""
    found: dict[str, Tensor] = {}
    handles = []

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            first = next((t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)), None)
            if first is not None:
                found.setdefault(name, first)

        return hook

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(keep(name)))
    try:
        _outputs(model, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return found


_MOST_FIELDS = 5


def settle_config(model: nn.Module, small: nn.Module, plan: Plan) -> bool:
    """Make ``small.config`` describe the shapes of `small`, so that its own constructor builds it again.

    A configuration has one number for all layers: it can describe a plan that leaves them all alike. Fields whose value
    is the old width of a group take the new one, and the change is kept only if the constructor, run without memory for
    weights, then yields exactly the shapes of `small`. Otherwise the configuration stays that of `model`, which
    together with the plan rebuilds the network (`shrink` on a fresh instance).

    Returns:
        True when the configuration was changed and describes `small` now.
    """
    config = getattr(small, "config", None)
    if config is None or not callable(getattr(config, "to_dict", None)):
        return False
    wanted = _shapes(small)
    for fields in _candidates(config, plan):
        trial = copy.deepcopy(config)
        for name, value in fields.items():
            setattr(trial, name, value)
        if _built(type(model), trial) == wanted:
            for name, value in fields.items():
                setattr(config, name, value)
            return True
    return False


def _candidates(config: Any, plan: Plan) -> Iterator[dict[str, int]]:
    """Changes to try: all fields with an old width first, then fewer."""
    widths: dict[int, set[int]] = {}
    for key, width in plan.widths.items():
        widths.setdefault(width, set()).add(width - len(plan.removed.get(key, ())))
    uniform = {old: new.copy().pop() for old, new in widths.items() if len(new) == 1 and new != {old}}
    held = {n: v for n, v in config.to_dict().items() if isinstance(v, int) and not isinstance(v, bool)}
    fields = {n: uniform[v] for n, v in held.items() if v in uniform}
    names = sorted(fields)[:_MOST_FIELDS]
    for size in range(len(names), 0, -1):
        for chosen in itertools.combinations(names, size):
            yield {n: fields[n] for n in chosen}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def _built(kind: type[nn.Module], config: Any) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the model that a configuration describes; None where it describes none."""
    try:
        with torch.device("meta"):
            return _shapes(kind(config))
    except Exception:  # a constructor may refuse a trial configuration in any way: then it describes no model
        return None
