r"""Posteriors of other libraries, read by attribute: nothing is imported, nothing of theirs is changed.

Evidence compares a posterior with the prior it was fitted under, so every adapter needs that prior. Weight decay w on a
*mean* loss is the prior precision N w; decoupled decay (AdamW) is none. Where a source does not hold its prior it must
be given, and where what it holds contradicts itself the adapter refuses. Share of undetermined weights and spread of
the precision are reported by `ockham.diagnose` on the result.

What is read, each checked against the library by sampling: docs/posteriors.md.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ockham.core.posterior import Gaussian, Posterior
from ockham.errors import OckhamError, OckhamWarning
from ockham.fit.optimizer import VariationalOptimizer
from ockham.fit.priors import Prior

__all__ = [
    "from_bayesian_torch",
    "from_ivon",
    "from_laplace",
    "from_moments",
    "from_posteriors",
    "from_pyro",
    "from_swag",
]

PriorPrecision = float | Tensor | Prior | Mapping[str, Any]
"""A precision for all weights, a `Prior` at its start, or one per parameter name."""

_NEGATIVE = 0.05


def from_moments(
    mean: Mapping[str, Tensor],
    std: Mapping[str, Tensor],
    prior: PriorPrecision,
    *,
    n_data: float = 1.0,
    temperature: float = 1.0,
    source: str = "moments",
) -> Posterior:
    """A posterior from means and standard deviations by parameter name.

    Args:
        mean: posterior means, shaped as the parameters.
        std: posterior standard deviations, the same names and shapes; positive.
        prior: *precision* of the zero-mean prior: a number, a tensor, `ockham.FixedPrior(variance)`, or a mapping.
        n_data: number of log-likelihood terms; only the NLL cost depends on it.
        temperature: T of a tempered posterior.
        source: name for people.

    Raises:
        OckhamError: names or shapes differ, moments are not finite, a std is not positive, or no prior is given.

    >>> from_moments({"w": torch.tensor([1.0])}, {"w": torch.tensor([0.1])}, 1.0)
    Posterior(moments, 1 tensors, 1 of 1 weights kept)
    """
    if mean.keys() != std.keys() or not mean:
        raise OckhamError(f"{source}: mean and std need the same names, at least one; got {list(mean)} and {list(std)}")
    moments = {name: _gaussian(source, name, m, std[name], prior) for name, m in mean.items()}
    if not (n_data > 0 and temperature > 0):
        raise OckhamError(f"{source}: n_data and temperature must be positive; got {n_data} and {temperature}")
    posterior = Posterior(moments, float(n_data), float(temperature), source)
    _warn_negative(posterior)
    return posterior


def from_ivon(optimizer: Any, model: nn.Module, *, n_data: float | None = None, prior: Any = None) -> Posterior:
    """The posterior of an `ivon.IVON` (package ivon-opt), or of an optimizer of this library.

    Read: the parameters (outside `sampled_params`) as means, precision ess (hess + weight_decay), prior precision
    ess weight_decay, all of the parameter groups.

    Args:
        optimizer: the optimizer after training, not inside its sampling block.
        model: network of these parameters; gives the names.
        n_data: number of log-likelihood terms; temperature n_data / ess is derived from it. Default: ess.
        prior: prior precision, only where the optimizer ran without weight decay.

    Raises:
        OckhamError: no such attributes, no prior, parameters that are not the model's, or no step taken.
    """
    if isinstance(optimizer, VariationalOptimizer):
        return optimizer.posterior()
    names: dict[Tensor, str] = {p: n for n, p in model.named_parameters()}
    mean: dict[str, Tensor] = {}
    std: dict[str, Tensor] = {}
    priors: dict[str, float] = {}
    ess: set[float] = set()
    for group in _attribute(optimizer, "param_groups", "from_ivon"):
        missing = [key for key in ("ess", "weight_decay", "hess") if key not in group]
        if missing:
            raise OckhamError(f"from_ivon: the parameter groups lack {missing}; this is no IVON optimizer that has run")
        scale, decay = float(group["ess"]), float(group["weight_decay"])
        if decay == 0 and prior is None:
            raise OckhamError("from_ivon: weight_decay is 0, so there was no prior: pass prior=")
        members = [p for p in group["params"] if p.requires_grad]
        for p, hess in zip(members, _flat_parts(group["hess"], members, "from_ivon: hess"), strict=True):
            if p not in names:
                raise OckhamError(
                    f"from_ivon: a parameter of shape {tuple(p.shape)} is not the model's; pass the right one"
                )
            name = names[p]
            mean[name], std[name] = p.detach(), _std(scale * (hess + decay), f"from_ivon: precision of {name!r}")
            priors[name] = scale * decay
        ess.add(scale)
    total = max(ess, default=1.0) if n_data is None else float(n_data)
    temperature = total / max(ess, default=total)
    return from_moments(mean, std, prior or priors, n_data=total, temperature=temperature, source="ivon-opt")


def from_laplace(la: Any, model: nn.Module) -> Posterior:
    """The posterior of a fitted laplace-torch object: diagonal, Kronecker, full, or of the last layer.

    Read: `mean`, `posterior_precision` (a diagonal, a matrix, or an object with ``diag``), `prior_precision_diag`,
    `params`, `n_data`, `temperature`. Kronecker and full posteriors bring marginal precisions as well; to compensate
    survivors use `ockham.laplace`, which keeps the factors.

    Args:
        la: a fitted object; its prior precision should be optimised first.
        model: the network; gives the names.

    Raises:
        OckhamError: it is not fitted, or its parameters are not the model's.
    """
    params = list(_attribute(la, "params", "from_laplace"))
    flat = _attribute(la, "mean", "from_laplace")
    last = getattr(getattr(la, "model", None), "last_layer", None)
    if isinstance(last, nn.Module) and isinstance(flat, Tensor) and flat.numel() < sum(p.numel() for p in params):
        params = list(last.parameters())
    names = _names_of(params, model, la)
    if not isinstance(flat, Tensor) or float(getattr(la, "n_data", 0) or 0) <= 0:
        raise OckhamError("from_laplace: not fitted; call la.fit(loader) first")
    precision = _attribute(la, "posterior_precision", "from_laplace")
    if not isinstance(precision, Tensor):
        conditional = _attribute(precision, "diag", "from_laplace")()
        marginal = 1 / precision.diag(exponent=-1)
    elif precision.ndim == 1:
        conditional, marginal = precision, None
    else:
        conditional = precision.diagonal()
        marginal = 1 / torch.linalg.inv(precision.double()).diagonal().to(precision.dtype)
    prior = _attribute(la, "prior_precision_diag", "from_laplace").detach().expand(flat.shape)
    split = [_flat_parts(v, params, "from_laplace") for v in (flat, conditional, prior)]
    rest = _flat_parts(marginal, params, "from_laplace") if marginal is not None else [None] * len(params)
    moments = {}
    for name, m, p, p0, q in zip(names, *split, rest, strict=True):
        moments[name] = _checked("from_laplace", name, m, p, p0, q)
    temperature = float(getattr(la, "temperature", 1.0))
    posterior = Posterior(moments, float(la.n_data), temperature, f"laplace-torch ({type(la).__name__})")
    _warn_negative(posterior)
    return posterior


def from_swag(swag: nn.Module | Mapping[str, Tensor], *, n_data: float, weight_decay: float) -> Posterior:
    """A SWAG posterior from running first and second moments, ``<name>_mean`` and ``<name>_sq_mean``.

    The variance is sq_mean - mean^2 (the diagonal part; deviations of low rank are left out), the prior precision
    n_data x weight_decay.

    Args:
        swag: a module or mapping with those buffers.
        n_data: number of log-likelihood terms.
        weight_decay: weight decay on the *mean* loss, not decoupled (not AdamW's).

    Raises:
        OckhamError: no such buffers, no weight decay, or fewer than two different snapshots.
    """
    tensors = dict(swag.named_buffers()) if isinstance(swag, nn.Module) else dict(swag)
    names = [key.removesuffix("_sq_mean") for key in tensors if key.endswith("_sq_mean")]
    if not names or any(f"{name}_mean" not in tensors for name in names):
        raise OckhamError(f"from_swag: buffers <name>_mean and <name>_sq_mean expected; got {sorted(tensors)[:6]}")
    if not (n_data > 0 and weight_decay > 0):
        raise OckhamError(
            f"from_swag: n_data x weight_decay is the prior precision, both positive; got {n_data}, {weight_decay}"
        )
    mean = {_swag_name(n): tensors[f"{n}_mean"].detach() for n in names}
    variance = {_swag_name(n): tensors[f"{n}_sq_mean"].detach() - tensors[f"{n}_mean"].detach().square() for n in names}
    dead = sum(int((v <= 0).sum()) for v in variance.values()) / sum(v.numel() for v in variance.values())
    if dead > 0.01:
        raise OckhamError(
            f"from_swag: {dead:.0%} of the weights have no variance: collect more snapshots, at a higher learning rate"
        )
    smallest = min(float(v[v > 0].min()) for v in variance.values() if bool((v > 0).any()))
    std = {name: v.clamp_min(smallest).sqrt() for name, v in variance.items()}
    return from_moments(mean, std, n_data * weight_decay, n_data=n_data, source="SWAG")


def from_bayesian_torch(model: nn.Module, *, n_data: float) -> Posterior:
    """The posterior of a network converted by bayesian-torch: ``mu_*`` and ``rho_*``, std = softplus(rho).

    Its attribute ``prior_variance`` holds a standard deviation, and is read as one. Note that its KL is an average over
    tensors unless you summed it: with an average the posterior was fitted under a far weaker prior than it states.

    Args:
        model: the converted network; names are those of the plain one ("fc1.weight").
        n_data: number of log-likelihood terms.

    Raises:
        OckhamError: no variational layers.
    """
    mean, std, prior = {}, {}, {}
    for path, module in model.named_modules():
        for local, mu in module.named_parameters(recurse=False):
            kind = local.removeprefix("mu_")
            rho = getattr(module, f"rho_{kind}", None)
            if kind == local or rho is None:
                continue
            name = f"{path}.{'weight' if kind == 'kernel' else kind}".lstrip(".")
            mean[name], std[name] = mu.detach(), softplus(rho.detach())
            prior[name] = float(_attribute(module, "prior_variance", "from_bayesian_torch")) ** -2
    if not mean:
        raise OckhamError("from_bayesian_torch: no mu_*/rho_* parameters; convert with dnn_to_bnn and train first")
    return from_moments(mean, std, prior, n_data=n_data, source="bayesian-torch")


def from_posteriors(state: Any, *, prior: PriorPrecision, n_data: float) -> Posterior:
    """The state of `posteriors.vi.diag` (or of its diagonal Laplace): ``params`` with ``log_sd_diag`` or ``prec_diag``.

    Args:
        state: the state after training.
        prior: precision of the prior in your log posterior; the state does not hold it.
        n_data: number of log-likelihood terms.

    Raises:
        OckhamError: no such attributes, or parameters that are no mapping.
    """
    params = _attribute(state, "params", "from_posteriors")
    if not isinstance(params, Mapping):
        raise OckhamError(f"from_posteriors: state.params must map names to tensors; got {type(params).__name__}")
    mean = {name: p.detach() for name, p in params.items()}
    if hasattr(state, "log_sd_diag"):
        std = {name: state.log_sd_diag[name].detach().exp() for name in params}
    else:
        precision = _attribute(state, "prec_diag", "from_posteriors")
        std = {name: _std(precision[name].detach(), f"from_posteriors: {name!r}") for name in params}
    return from_moments(mean, std, prior, n_data=n_data, source="posteriors")


def from_pyro(guide: Any, *, prior: PriorPrecision, n_data: float) -> Posterior:
    """A Pyro `AutoNormal` guide: ``locs.<site>`` and ``scales.<site>``; sites named as parameters.

    Args:
        guide: the guide after training.
        prior: precision of the prior of your model; the guide does not hold it.
        n_data: number of log-likelihood terms.

    Raises:
        OckhamError: no such attributes.
    """
    locs, scales = _attribute(guide, "locs", "from_pyro"), _attribute(guide, "scales", "from_pyro")
    sites = [name.removesuffix("_unconstrained") for name, _ in locs.named_parameters()]
    mean = {name: _deep(locs, name).detach() for name in sites}
    std = {name: _deep(scales, name).detach() for name in mean}
    return from_moments(mean, std, prior, n_data=n_data, source="Pyro")


def _attribute(owner: Any, name: str, adapter: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise OckhamError(f"{adapter}: {type(owner).__name__} has no {name!r}; is it the right object?") from error


def _deep(owner: Any, path: str) -> Any:
    for part in path.split("."):
        owner = _attribute(owner, part, "from_pyro")
    return owner


def _swag_name(name: str) -> str:
    """Some SWAG modules register buffers beside the weights, others under names with dots replaced."""
    return name.replace("-", ".")


def _names_of(params: list[Tensor], model: nn.Module, la: Any) -> list[str]:
    for owner in (model, getattr(la, "model", None)):
        if isinstance(owner, nn.Module):
            names: dict[Tensor, str] = {p: n for n, p in owner.named_parameters()}
            found = [names.get(p) for p in params]
            if all(found):
                known = dict(model.named_parameters())
                for prefix in ("", "model."):
                    short = [str(n).removeprefix(prefix) for n in found]
                    if all(n in known for n in short):
                        return short
                raise OckhamError(f"from_laplace: parameters {found[:4]} are not the model's")
    raise OckhamError("from_laplace: its parameters are not the model's; pass the network that it was made from")


def _flat_parts(flat: Any, params: list[Tensor], what: str) -> list[Tensor]:
    flat = torch.as_tensor(flat).detach().reshape(-1)
    sizes = [p.numel() for p in params]
    if flat.numel() != sum(sizes):
        raise OckhamError(f"{what}: {flat.numel()} numbers for parameters with {sum(sizes)}")
    return [part.view(p.shape) for part, p in zip(flat.split(sizes), params, strict=True)]


def _std(precision: Tensor, what: str) -> Tensor:
    if not bool((precision > 0).all()):
        raise OckhamError(f"{what} is not positive everywhere (minimum {float(precision.min()):g}): no posterior")
    return precision.rsqrt()


def _gaussian(source: str, name: str, mean: Tensor, std: Tensor, prior: PriorPrecision) -> Gaussian:
    own: Any = prior.start_precision if isinstance(prior, Prior) else prior
    if isinstance(prior, Mapping):
        if name not in prior:
            raise OckhamError(f"{source}: the prior has no entry for {name!r}")
        own = prior[name]
    elif prior is None:
        raise OckhamError(f"{source}: evidence compares with the prior it was fitted under; pass its precision")
    if mean.shape != std.shape:
        raise OckhamError(f"{source}: {name!r} has mean {tuple(mean.shape)} and std {tuple(std.shape)}")
    if not bool((std > 0).all()):
        raise OckhamError(f"{source}: std of {name!r} must be positive; its minimum is {float(std.min()):g}")
    precision = std.double().pow(-2).to(std.dtype)
    return _checked(source, name, mean, precision, torch.as_tensor(own, dtype=mean.dtype, device=mean.device), None)


def _checked(
    source: str, name: str, mean: Tensor, precision: Tensor, prior: Tensor, marginal: Tensor | None
) -> Gaussian:
    for what, values in (("mean", mean), ("precision", precision), ("prior precision", prior)):
        if not bool(values.isfinite().all()):
            raise OckhamError(f"{source}: {what} of {name!r} is not finite")
    for what, values in (("precision", precision), ("prior precision", prior)):
        if not bool((values > 0).all()):
            raise OckhamError(f"{source}: {what} of {name!r} must be positive; its minimum is {float(values.min()):g}")
    mean, prior = mean.detach().clone(), prior.to(mean.dtype)
    keep = torch.ones(mean.shape, dtype=torch.bool, device=mean.device)
    marginal = None if marginal is None else marginal.to(mean.dtype)
    return Gaussian(mean, precision.to(mean.dtype), prior, mean.new_zeros(()), keep, marginal)


def _warn_negative(posterior: Posterior) -> None:
    count = sum(int((g.precision < g.prior_precision * (1 - 1e-3)).sum()) for g in posterior.values())
    share = count / max(1, posterior.size())
    if share > _NEGATIVE:
        warnings.warn(
            f"{posterior.source}: {share:.0%} of the weights are known *less* well than under the stated prior: the "
            "prior is not the one it was fitted under, or the curvature is negative. Evidence from it is doubtful",
            OckhamWarning,
            stacklevel=3,
        )
    if not math.isclose(posterior.temperature, 1.0, rel_tol=1e-6):
        warnings.warn(
            f"{posterior.source}: tempered (T = {posterior.temperature:g}); its evidence is tempered evidence",
            OckhamWarning,
            stacklevel=3,
        )
