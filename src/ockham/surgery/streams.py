"""Residual streams: the branches beside them, which can go as a whole, and their rotation.

A rotation makes coordinates of the directions that matter, so that the others can go.
RMSNorm(x Q) = RMSNorm(x) Q for an orthogonal Q once the gains are folded into what reads them (Ashkboos et al. 2024,
"SliceGPT", eq. 2 and section 3.2); LayerNorm is RMSNorm of a stream whose mean is zero, which the writers can see to.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ockham.errors import OckhamError
from ockham.surgery.copies import (
    Arguments,
    Moves,
    as_arguments,
    canonical_names,
    clone,
    difference,
    outputs,
    still,
    to_double,
)
from ockham.surgery.groups import Group, Groups, Member
from ockham.surgery.resizing import Branch, Skipped

TOLERANCE = 1e-5


_ATEN = torch.ops.aten
ADDITIONS = frozenset({_ATEN.add.Tensor, _ATEN.add_.Tensor})
SAME = frozenset({_ATEN.to.dtype, _ATEN.to.dtype_layout, _ATEN.to.device, _ATEN.contiguous.default})
"""Operators that return their input where it is what they should make of it."""


def residual_branches(model: nn.Module, graph: fx.Graph, arguments: Arguments) -> dict[str, Branch]:
    """Find what is computed from a stream and added to it by modules that do nothing else; by `Branch.id`.

    These are candidates: whether the network without one computes what it does with zeros in its weights, is tried by
    `ockham.trace`. Of attention that keeps keys and values (modules with a ``layer_idx``) the first stays, since a
    cache counts its tokens there. Of nested branches the innermost are found.

    Args:
        model: network that was exported.
        graph: graph of its export.
        arguments: arguments of a call: what a module returns is looked at.
    """
    nodes = list(graph.nodes)
    bit = {node: 1 << i for i, node in enumerate(nodes)}
    before: dict[fx.Node, int] = {}  # bits of what a node is computed from
    after = dict.fromkeys(nodes, 0)
    for node in nodes:
        before[node] = 0
        for given in node.all_input_nodes:
            before[node] |= before[given] | bit[given]
    for node in reversed(nodes):
        for user in node.users:
            after[node] |= after[user] | bit[user]
    fed = sum(bit[n] for n in nodes if n.op == "placeholder" and not n.name.startswith(("p_", "b_", "c_")))
    ends = sum(bit[n] for n in nodes if n.op == "output")
    live = sum(bit[n] for n in nodes if after[n] & ends)  # the others are checks of shapes and types
    modules = {p: m for p, m in model.named_modules(remove_duplicate=False) if _held(m)}
    own: dict[str, int] = {}  # nodes of modules that depend on the inputs of the network
    for node in (n for n in nodes if before[n] & fed and bit[n] & live):
        for place, _ in (node.meta.get("nn_module_stack") or {}).values():
            path = str(place).partition("@")[0]
            own[path] = own.get(path, 0) | bit[node]
    found: list[tuple[int, dict[str, int]]] = []
    for node, stream, added in itertools.chain.from_iterable(map(_additions, nodes)):
        region = after[stream] & (before[added] | bit[added])
        users = sum(bit[n] for n in nodes if any(bit[given] & region for given in n.all_input_nodes))
        closed = region & bit[added] and not users & (live | ends) & ~(region | bit[node])
        parts = {p: at for p, at in own.items() if p in modules and at & region == at}
        if closed and parts and not any(region & other == other for other, _ in found):
            found.append((region, {p: at for p, at in parts.items() if p.rpartition(".")[0] not in parts}))
    return _as_branches(model, [parts for _, parts in found], arguments)


def _additions(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
    """Yield an addition of two tensors of one shape, with either as the stream and the other as what is added."""
    pair = [a for a in node.args[:2] if isinstance(a, fx.Node)]
    if node.target in ADDITIONS and len(pair) == 2 and not node.kwargs and _value(pair[0])[0] == _value(pair[1])[0]:
        for one, added in (pair, pair[::-1]):
            stream: Any = one
            while stream.target in SAME and _value(stream.args[0]) == _value(stream):
                stream = stream.args[0]  # the same tensor, which export knows by its last name
            yield node, stream, added


def _value(node: Any) -> tuple[tuple[int, ...], torch.dtype | None]:
    """Return shape and type of what a node computes."""
    value = node.meta.get("val")
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else ((), None)


def _as_branches(model: nn.Module, found: list[dict[str, int]], arguments: Arguments) -> dict[str, Branch]:
    """Return branches of the modules with tensors among those found, in the order in which they run."""
    names = canonical_names(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    results = _results(model, {p for parts in found for p in parts}, arguments)
    first: dict[type[nn.Module], int] = {}
    for module in modules.values():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int):
            first[type(module)] = min(number, first.get(type(module), number))
    places = Counter(names[id(t)] for module in modules.values() for t in _held(module, deep=False))
    commons = [_common(list(parts)) for parts in found]
    branches = {}
    for parts, common in zip(found, commons, strict=True):
        last = max(parts, key=lambda p: parts[p].bit_length(), default="")
        inside = [m for p in parts for m in modules[p].modules()]
        counted = any(getattr(m, "layer_idx", None) == first.get(type(m), -1) for m in inside)
        if not parts or counted or not parts.keys() <= results.keys():
            continue
        here = Counter(names[id(t)] for m in dict.fromkeys(inside) for t in _held(m, deep=False))
        lost = tuple(name for name, count in here.items() if count == places[name])  # not tied to one that stays
        key = common if common and commons.count(common) == 1 else last
        words = {p: f"{'zero' if p == last else 'same'}{results[p]}" for p in sorted(parts, key=lambda p: parts[p])}
        if key not in branches:
            learned = {n for n, p in model.named_parameters()}
            two = tuple(n for n in lost if n in learned), tuple(n for n in lost if n not in learned)
            branches[key] = Branch(key, *two, words)
    return {key: branch for key, branch in branches.items() if branch.parameters}


def _common(paths: Sequence[str]) -> str:
    """Return the path of the innermost module that holds all of these."""
    steps = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*(p.split(".") for p in paths), strict=False))
    return ".".join(parts[0] for parts in steps)


def _held(module: nn.Module, *, deep: bool = True) -> list[Tensor]:
    return [*module.parameters(recurse=deep), *module.buffers(recurse=deep)]


def _results(model: nn.Module, paths: set[str], arguments: Arguments) -> dict[str, str]:
    """Return for modules that return a tensor, or a tuple that starts with one: " " and how many there are, or ""."""
    found: dict[str, str] = {}
    twin: nn.Module = clone(model, lambda _, t: t.detach().clone()).eval()

    def keeper(path: str) -> Any:
        def keep(_module: nn.Module, _args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                found[path] = ""
            elif type(out) is tuple and isinstance(out[0], Tensor):
                found[path] = f" {len(out)}"

        return keep

    for path in paths:
        twin.get_submodule(path).register_forward_hook(keeper(path))
    outputs(twin, arguments)
    return found


LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
"""Fields of a configuration that count the layers of a list."""


def idle_layers(network: nn.Module, config: Any) -> tuple[dict[str, Any], Moves]:
    """Find layers of which every branch is gone in a list that a configuration counts.

    Returns:
        Fields of the configuration without them (lists with an entry a layer are shortened), and where the others go.
    """
    for path, held in network.named_modules():
        if not isinstance(held, nn.ModuleList):
            continue
        left = [any(True for _ in m.parameters()) or all(type(x) is not Skipped for x in m.modules()) for m in held]
        field = next((n for n in LAYERS if getattr(config, n, None) == len(left)), None)
        if field is not None and not all(left) and any(left):
            told = {n: v for n, v in config.to_dict().items() if isinstance(v, (list, tuple)) and len(v) == len(left)}
            short = {n: list(itertools.compress(v, left)) for n, v in told.items()}
            kept = itertools.compress(range(len(left)), left)
            return {field: sum(left), **short}, {path: {before: now for now, before in enumerate(kept)}}
    return {}, {}


def take_out_layers(network: nn.Module, moves: Moves) -> None:
    """Take layers out of their lists; the numbers by which the others know their place in a cache follow."""
    for path, places in moves.items():
        parent, _, leaf = path.rpartition(".")
        held: Any = network.get_submodule(path)
        for before, now in places.items():
            for module in held[before].modules():
                if vars(module).get("layer_idx") == before:
                    module.layer_idx = now
        left = nn.ModuleList(held[before] for before in places).train(held.training)
        setattr(network.get_submodule(parent), leaf, left)


def expert_groups(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[Group]:
    """Find experts that a router chooses among: its rows and slices of the batched tensors of experts go together.

    Sought are blocks with a child whose tensors all count experts first, some of them of three dimensions, and a child
    with ``top_k`` and one weight of a row an expert. As many experts as a token is given to have to stay. Without an
    expert, the network is one whose router never chooses it, *not* one in which it adds zero: its tokens go to others.

    Args:
        model: network as it is traced.
        shapes: shape of every tensor of it.
    """
    names, found = canonical_names(model), []
    for block in model.modules():
        for experts in block.children():
            held = {names[id(t)]: t for t in _held(experts)}
            counts = {t.shape[0] for t in held.values() if t.ndim}
            if len(counts) != 1 or not any(t.ndim == 3 for t in held.values()):
                continue
            size = counts.pop()
            for router in block.children():
                rows = {names[id(t)]: t for t in _held(router) if t.ndim and t.shape[0] == size}
                weights = [n for n, t in rows.items() if t.ndim == 2 and getattr(router, "weight", None) is t]
                top = getattr(router, "top_k", getattr(block, "top_k", None))
                apart = max(int(getattr(m, "n_group", 1) or 1) for m in (block, router))  # experts by fixed groups
                if (
                    router is experts
                    or len(weights) != 1
                    or not isinstance(top, int)
                    or not 0 < top < size
                    or apart > 1
                ):
                    continue
                down = {n for n in held if any(word in n.rpartition(".")[2] for word in ("down", "w2"))}  # they speak
                index = torch.arange(size)[:, None]
                members = tuple(
                    Member(n, 0, index, n in (down or held), n not in down, isinstance(t, nn.Parameter))
                    for n, t in {**held, **rows}.items()
                )
                own = {m.name: shapes[m.name] for m in members}
                found.append(Group(f"{next(iter(held))}:0", "expert", size, members, own, top, weights[0]))
    return found


class RotationError(OckhamError):
    """A stream cannot be rotated; the text says what stands in the way."""


def rotate(model: nn.Module, groups: Groups, posterior_or_inputs: Any) -> Any:
    """Return a copy of `model` with the same outputs whose streams and low-rank pairs lie along principal directions.

    A stream is a group whose units pass RMS or layer norms. The gains of the norms move into the weights that read them
    (layer norms become `torch.nn.RMSNorm`: their bias moves too, and the weights that write the stream lose their
    mean), and then every weight of the group is multiplied by Q, the eigenvectors of the second moment of the
    normalised stream z, largest first: the last coordinates are those that matter least. Tied weights come apart where
    a gain is between them. Trace the copy to plan what goes; a posterior or optimizer of `model` does not describe it.

    From inputs the moment is E[z z'], every norm alike. From a posterior with Kronecker factors A (of what a reader is
    given, x = g z + b) and G (of its outputs) it is the sum over the readers W of tr(W g G g W') E[z z'], with E[z z']
    out of A: a reader counts as much as the loss feels what it says. No data are needed then. (Where a norm adds b, a
    reader without a bias of its own is left out: its factor cannot tell b from z.)

    Low-rank pairs, too: where one `torch.nn.Linear` makes fewer numbers than it reads and other Linears read them with
    nothing but sums and factors between (the adapters of LoRA), training spreads what has rank k over all coordinates.
    Maker A (its bias a column of it) and readers B, one above the other, become S^1/2 V' and U S^1/2 of the singular
    value decomposition B A = U S V': the last coordinates add least, and evidence finds which add nothing. Only where
    all of these weights are trained.

    Args:
        model: network with residual streams behind norms whose readers are `torch.nn.Linear`; left as it is.
        groups: result of `ockham.trace` for `model`.
        posterior_or_inputs: example inputs as for `trace`, a batch of data, which say along which directions the stream
            varies; or a posterior of `model` with Kronecker factors of its readers (`ockham.laplace`).

    Raises:
        RotationError: when no group is a stream or a low-rank pair, when something other than linear layers reads it,
            when the posterior has no factors of any reader, or when the outputs would change by more than 1e-5.
    """
    matrices = getattr(posterior_or_inputs, "matrices", None)
    arguments = as_arguments(model, posterior_or_inputs) if matrices is None else groups.arguments
    known = None if matrices is None else {m.weight: m for m in matrices if m.precision.shape[0] == 1}
    twin: nn.Module = clone(model, lambda _, t: t.detach().clone()).eval()
    streams = [group for group in groups if any(_is_norm(twin, m) for m in group.members)]
    for group in streams:
        _rotate_(twin, group, arguments, known)
    pairs = [group for group in groups if _balance_(twin, group, arguments)]
    if not streams and not pairs:
        raise RotationError(
            "no group of this network passes a norm or is a trained low-rank pair, so there is nothing to rotate: "
            "print(groups)"
        )
    doubled = [clone(m, lambda _, t: t.detach().clone()).double().eval() for m in (model, twin)]
    with still(doubled[0]), still(doubled[1]):
        gap = difference(*(outputs(m, to_double(arguments)) for m in doubled))
    if gap > TOLERANCE:
        raise RotationError(
            f"rotating {', '.join(g.id for g in (*streams, *pairs))} would change the outputs by {gap:.1e}: something "
            "else than linear layers behind norms reads the stream. Prune its coordinates as they are"
        )
    return twin.train(model.training)


def _rotate_(twin: nn.Module, group: Group, arguments: Arguments, known: Mapping[str, Any] | None) -> None:
    """Fold the norms of one stream and multiply its weights by Q, in place."""
    parts = [m for m in group.members if not _is_norm(twin, m)]
    for member in parts:
        _check(twin, group, member)
    norms = dict.fromkeys(_owner(m) for m in group.members if _is_norm(twin, m))
    read = {id(twin.get_parameter(m.name)) for m in parts if m.consumes}
    linear = [n for n, m in twin.named_modules() if isinstance(m, nn.Linear) and id(m.weight) in read]
    given, made = _seen(twin, [*norms, *linear], arguments)
    layered = {isinstance(twin.get_submodule(n), nn.LayerNorm) for n in norms}
    if len(layered) > 1 or not set(norms) <= set(given):
        raise RotationError(f"{group.id}: its norms are of several kinds, or are not called with a tensor")
    centred = layered.pop()
    apart: list[Tensor] = []
    moment = torch.zeros(group.size, group.size, dtype=torch.float64)  # of the normalised stream, over all norms
    names = canonical_names(twin)
    for name in norms:
        own = made[name].untyped_storage().data_ptr()
        readers = [n for n in linear if n in given and given[n].untyped_storage().data_ptr() == own]
        layers = {names[id(twin.get_parameter(f"{n}.weight"))]: twin.get_submodule(n) for n in readers}
        norm = twin.get_submodule(name)
        if known is None:
            moment += _varied(given[name], centred=centred) / len(norms)
        else:
            moment += _felt({known[n]: layer for n, layer in layers.items() if n in known}, norm, moment)
        apart += _fold_(twin, name, readers)
    if not bool(moment.any()):
        raise RotationError(f"{group.id}: the posterior has no Kronecker factors of any weight that reads the stream")
    q = torch.linalg.eigh(moment)[1].flip(1)
    done: set[tuple[int, int]] = set()
    for member in parts:
        tensor: Tensor = twin.get_parameter(member.name)
        if (id(tensor), member.dim) not in done:
            done.add((id(tensor), member.dim))
            rows = tensor.data.double().movedim(member.dim, -1)
            rows = rows - rows.mean(-1, keepdim=True) if centred and member.makes else rows
            tensor.data.copy_((rows @ q.to(rows.device)).movedim(-1, member.dim))
    for tensor in apart:
        tensor.data.copy_(tensor.data.double() @ q.to(tensor.device))


@torch.no_grad()
def _balance_(twin: nn.Module, group: Group, arguments: Arguments) -> bool:
    """Put the directions of a low-rank pair in the order of their singular values, in place; whether it is one."""
    linear = {n: m for n, m in twin.named_modules() if isinstance(m, nn.Linear) and "weight" in m._parameters}
    makers, readers = ({_owner(m) for m in group.members if m.makes}, {_owner(m) for m in group.members if m.consumes})
    if len(makers) != 1 or not readers or not makers | readers <= linear.keys():
        return False
    maker, *layers = (linear[n] for n in (*makers, *sorted(readers)))
    trained = all(p.requires_grad for layer in (maker, *layers) for p in layer.parameters())
    if {maker.out_features, *(n.in_features for n in layers)} != {group.size} or not trained:
        return False
    given, made = _seen(twin, [*makers, *readers], arguments)
    there = made.keys() == makers | readers and group.size < maker.in_features
    said = nn.functional.linear(given[next(iter(makers))], maker.weight, maker.bias).flatten() if there else None
    if said is None or not all(torch.equal(given[n].flatten(), said) for n in readers):  # something is between them
        return False
    a = maker.weight if maker.bias is None else torch.cat([maker.weight, maker.bias[:, None]], 1)
    (left, lower), (right, upper) = (torch.linalg.qr(t.double()) for t in (torch.cat([n.weight for n in layers]), a.mT))
    u, s, v = torch.linalg.svd(lower @ upper.mT, full_matrices=False)
    b, a = (left @ u * s.sqrt(), (right @ v.mT * s.sqrt()).mT)
    for part, layer in zip(b.split([n.out_features for n in layers]), layers, strict=True):
        layer.weight.zero_()[:, : len(s)] = part.to(layer.weight.dtype)
    maker.weight.zero_()[: len(s)] = a[:, : maker.in_features].to(maker.weight.dtype)
    if maker.bias is not None:
        maker.bias.zero_()[: len(s)] = a[:, -1].to(maker.bias.dtype)
    return True


def _owner(member: Member) -> str:
    return member.name.rpartition(".")[0]


def _is_norm(model: nn.Module, member: Member) -> bool:
    module = model.get_submodule(_owner(member))
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or type(module).__name__.endswith("RMSNorm")


def _check(model: nn.Module, group: Group, member: Member) -> None:
    """Refuse what a rotation would not carry through."""
    module, shape = model.get_submodule(_owner(member)), group.shapes[member.name]
    if not member.learned or member.index.shape[1] != 1 or group.size != shape[member.dim]:
        raise RotationError(f"{group.id}: {member.name} holds only a part of the stream, several times, or in a buffer")
    if member.consumes and not isinstance(module, (nn.Linear, nn.Embedding)):
        raise RotationError(f"{group.id}: {member.name} of {type(module).__name__} reads the stream; only Linear may")
    if not member.consumes and len(shape) == 1 and "bias" not in member.name.rpartition(".")[2]:
        raise RotationError(f"{group.id}: {member.name} scales each coordinate of the stream for itself")


def _seen(model: nn.Module, names: list[str], arguments: Arguments) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what the modules `names` were given and returned in one forward."""
    given: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(_module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                given[name], made[name] = args[0], out

        return keep

    handles = [model.get_submodule(n).register_forward_hook(keeper(n)) for n in dict.fromkeys(names)]
    try:
        outputs(model, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return given, made


def _gain(norm: nn.Module) -> Tensor:
    """Return by what a norm multiplies: its weight, or one plus it."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        return weight.detach().clone()
    with torch.no_grad():
        made: Tensor = norm(100 * torch.ones_like(weight)[None])[0]
    return made.detach().to(weight.dtype)


def _varied(x: Tensor, *, centred: bool) -> Tensor:
    """Return the second moment of the normalised stream, from what a norm is given."""
    flat = x.detach().double().flatten(0, -2)
    rows = flat - flat.mean(-1, keepdim=True) if centred else flat
    z = rows / (rows.square().mean(-1, keepdim=True).sqrt() + 1e-12)
    return (z.T @ z / len(z)).cpu()


def _felt(readers: Mapping[Any, nn.Module], norm: nn.Module, nothing: Tensor) -> Tensor:
    """Return the second moment out of the readers' factors A, each times what the loss feels of that reader."""
    shift, gain, total = getattr(norm, "bias", None), _gain(norm).double().cpu(), torch.zeros_like(nothing)
    safe = torch.where(gain.abs() > 1e-6 * gain.abs().max(), gain, torch.inf)  # a gain of zero: nobody reads it
    for matrix, layer in readers.items():
        if shift is not None and matrix.bias is None:
            continue
        k, weight = matrix.precision, layer.weight
        assert isinstance(weight, Tensor)
        whole, cut = k.input_vectors[0].double(), weight.shape[1]
        a = ((whole * k.input_values[0].double()) @ whole.T).cpu()
        second = a[:cut, :cut]
        if shift is not None:  # the last column is that of the ones
            b, mean = shift.detach().double().cpu()[:, None], a[:cut, cut:]
            second = second - mean @ b.T - b @ mean.T + a[cut, cut] * (b @ b.T)
        turned = k.output_vectors[0].double().T @ (weight.detach().double().cpu() * gain).to(whole.device)
        felt = float((k.output_values[0].double()[:, None] * turned.square()).sum())
        total += felt * second / (safe[:, None] * safe)
    return total


def _fold_(twin: nn.Module, path: str, readers: list[str]) -> list[Tensor]:
    """Move gain and bias of a norm into its readers; returns weights that were tied to others and now are not."""
    norm = twin.get_submodule(path)
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is None:
        raise RotationError(f"{path} has no gain of its own")
    gain = _gain(norm)
    apart: list[Tensor] = []
    held = [id(p) for m in twin.modules() for p in m._parameters.values() if p is not None]
    for name in readers:
        layer = twin.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if held.count(id(layer.weight)) > 1:
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.weight.requires_grad)
            apart.append(layer.weight)
            for owner in (twin, *twin.children()):
                config: Any = getattr(owner, "config", None)
                if getattr(config, "tie_word_embeddings", False):
                    config.tie_word_embeddings = False
        if bias is not None:
            more = (layer.weight.data.double() @ bias.data.double()).to(layer.weight.dtype)
            layer.bias = nn.Parameter(more if layer.bias is None else layer.bias.data + more)
        layer.weight.data.mul_(gain)
    if isinstance(norm, nn.LayerNorm):
        plain = nn.RMSNorm(norm.normalized_shape, eps=norm.eps, device=weight.device, dtype=weight.dtype)
        parent, _, leaf = path.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, plain.train(norm.training))
    else:
        weight.data.sub_(gain - 1)  # a gain of one, whether the norm multiplies by its weight or by one plus it
    return apart
