"""Sparse networks as values: which weights live, and in closed form their outputs, gradients and Jacobians.

Hidden layers of units that are either rectifiers or hyperbolic tangents, and a linear map from the inputs, and from
products of two of them, straight to the outputs. Only living weights are numbers, one vector of them is one network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["REACH", "Net", "Pass", "matched_units", "random_units"]

REACH = 4.0
"""Value of a standardised input from which its products no longer grow."""


@dataclass(frozen=True, eq=False)
class Pass:
    """What a forward pass leaves for the passes back.

    Attributes:
        output: outputs [C, n, K] of C networks.
        tensors: dense weights [C, ...] by name.
        read: what each hidden layer and the output layer reads, [n, p] or [C, n, units].
        slopes: derivative of each hidden layer's activation, [C, n, units].
    """

    output: Tensor
    tensors: Mapping[str, Tensor]
    read: tuple[Tensor, ...]
    slopes: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Net:
    """Structure of a sparse network.

    Attributes:
        keep: masks of living weights by tensor name: hidden.i.weight [units, before], hidden.i.bias [units], out.weight
            [K, units], out.bias [K], skip.weight [K, p]; where there are products pair.weight [K, products].
        smooth: per hidden layer which units are hyperbolic tangents, [units]; the others are rectifiers.
        pairs: the two inputs of each product.
    """

    keep: Mapping[str, Tensor]
    smooth: tuple[Tensor, ...]
    pairs: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def linear(inputs: int, outputs: int, depth: int, *, reads: bool = True) -> Net:
        """Structure without hidden units, which reads every input directly (or none)."""
        keep: dict[str, Tensor] = {}
        before = inputs
        for i in range(depth):
            keep |= {f"hidden.{i}.weight": torch.zeros(0, before), f"hidden.{i}.bias": torch.zeros(0)}
            before = 0
        keep |= {"out.weight": torch.zeros(outputs, before if depth else 0), "out.bias": torch.ones(outputs)}
        keep["skip.weight"] = torch.full((outputs, inputs), float(reads))
        return Net({n: k.bool() for n, k in keep.items()}, (torch.zeros(0, dtype=torch.bool),) * depth)

    @cached_property
    def cells(self) -> dict[str, Tensor]:
        """Indices of living weights in each flattened tensor, in the order of the vector."""
        return {n: k.flatten().nonzero()[:, 0] for n, k in self.keep.items()}

    @cached_property
    def spans(self) -> dict[str, slice]:
        """Where each tensor's living weights lie in the vector."""
        found, begin = {}, 0
        for name, cells in self.cells.items():
            found[name] = slice(begin, begin + len(cells))
            begin += len(cells)
        return found

    @cached_property
    def places(self) -> Tensor:
        """Indices of living weights in all flattened tensors behind each other, [d]."""
        sizes = [k.numel() for k in self.keep.values()]
        offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        return torch.cat([c + o for c, o in zip(self.cells.values(), offsets, strict=True)])

    @cached_property
    def size(self) -> int:
        """Living weights."""
        return len(self.places)

    @cached_property
    def alike(self) -> tuple[bool | None, ...]:
        """Per hidden layer whether all units are hyperbolic tangents, none (False), or some (None)."""
        return tuple(bool(s.all()) or (None if bool(s.any()) else False) for s in self.smooth)

    @cached_property
    def reads(self) -> Tensor:
        """Inputs that each living weight reads, two of a product, -1 where it reads fewer; [d, 2]."""
        found = torch.full((len(self), 2), -1)
        for name in self.readers:
            found[self.spans[name], 0] = self.cells[name] % self.keep[name].shape[1]
        if self.pairs:
            found[self.spans["pair.weight"]] = torch.tensor(self.pairs)[self.cells["pair.weight"] % len(self.pairs)]
        return found

    @property
    def readers(self) -> tuple[str, ...]:
        """Tensors that read the inputs, one each."""
        return ("hidden.0.weight", "skip.weight") if self.smooth else ("skip.weight",)

    @property
    def inputs(self) -> int:
        """Columns of the table."""
        return self.keep["skip.weight"].shape[1]

    @property
    def units(self) -> tuple[int, ...]:
        """Living units of each hidden layer."""
        return tuple(len(s) for s in self.smooth)

    def __len__(self) -> int:
        """Living weights."""
        return self.size

    def used(self) -> Tensor:
        """Living weights that read each input, [p]."""
        found = sum((self.keep[n].sum(0) for n in self.readers), torch.zeros(self.inputs, dtype=torch.long))
        for pair, living in zip(self.pairs, self.keep["pair.weight"].sum(0) if self.pairs else (), strict=True):
            for j in set(pair):
                found[j] += living
        return found

    def products(self, x: Tensor) -> Tensor:
        """Products of inputs, [n, products]; each counts as at most four standard deviations away."""
        first, second = torch.tensor(self.pairs).unbind(1)
        return x[:, first].clamp(-REACH, REACH) * x[:, second].clamp(-REACH, REACH)

    def tensors(self, vectors: Tensor) -> dict[str, Tensor]:
        """Dense tensors [C, ...] of the networks with these weights [C, d]."""
        sizes = [k.numel() for k in self.keep.values()]
        flat = vectors.new_zeros(len(vectors), sum(sizes)).index_copy_(1, self.places, vectors)
        parts = zip(self.keep.items(), flat.split(sizes, 1), strict=True)
        return {name: part.view(len(vectors), *mask.shape) for (name, mask), part in parts}

    def run(self, vectors: Tensor, x: Tensor) -> Pass:
        """Forward pass of C networks [C, d] over a table [n, p]."""
        if self.size == len(self.keep["out.bias"]):  # nothing but biases
            return Pass(vectors[:, None, :].expand(-1, len(x), -1), {}, (), ())
        w = self.tensors(vectors)
        h, read, slopes = x, [], []
        for i in range(len(self.smooth)):
            if not self.units[i]:
                break
            read.append(h)
            z = affine(h, w[f"hidden.{i}.weight"], w[f"hidden.{i}.bias"])
            if self.alike[i]:
                h = torch.tanh(z)
                slope = 1 - h.square()
            else:
                slope = (z > 0).to(z.dtype)
                h = z * slope
            if self.alike[i] is None:
                smooth, tanh = self.smooth[i], torch.tanh(z)
                h, slope = torch.where(smooth, tanh, h), torch.where(smooth, 1 - tanh.square(), slope)
            slopes.append(slope)
        read.append(h)
        output = affine(x, w["skip.weight"], w["out.bias"])
        if self.pairs:
            output = output + self.products(x) @ w["pair.weight"].transpose(1, 2)
        if self.smooth and self.units[-1]:
            output = output + h @ w["out.weight"].transpose(1, 2)
        return Pass(output, w, tuple(read), tuple(slopes))

    def pullback(self, done: Pass, slope: Tensor, x: Tensor) -> Tensor:
        """Gradient [C, d] of a number whose derivative in the outputs is ``slope`` [C, n, K]."""
        if not done.tensors:
            return slope.sum(1)
        found = {"out.bias": slope.sum(1), "skip.weight": slope.transpose(1, 2) @ x}
        if self.pairs:
            found["pair.weight"] = slope.transpose(1, 2) @ self.products(x)
        if self.smooth and not self.units[-1]:
            found |= {n: slope.new_zeros(len(slope), k.numel()) for n, k in self.keep.items() if n not in found}
        elif self.smooth:
            found["out.weight"] = slope.transpose(1, 2) @ done.read[-1]
            back = slope @ done.tensors["out.weight"]
            for i in reversed(range(len(self.smooth))):
                back = back * done.slopes[i]
                found[f"hidden.{i}.bias"] = back.sum(1)
                found[f"hidden.{i}.weight"] = back.transpose(1, 2) @ done.read[i]
                if i:
                    back = back @ done.tensors[f"hidden.{i}.weight"]
        names = [n for n in self.keep if n in found]
        return torch.cat([found[n].flatten(1) for n in names], 1)[:, self.places]

    def jacobian(self, done: Pass, x: Tensor) -> Tensor:
        """Derivatives [n, K, d] of the outputs of the first network in its living weights."""
        n, outputs = done.output.shape[1:]
        if not done.tensors:
            return torch.eye(outputs, dtype=x.dtype).expand(n, -1, -1)
        cells, parts = self.cells, []
        products = self.products(x) if self.pairs else x
        for k in range(outputs):
            found: dict[str, Tensor] = {}
            if self.smooth and self.units[-1]:
                last = done.read[-1][0]
                found["out.weight"] = _of_output(last, cells["out.weight"], k, outputs)
                back = done.tensors["out.weight"][0, k] * done.slopes[-1][0]
                for i in reversed(range(len(self.smooth))):
                    read, here = x if i == 0 else done.read[i][0], cells[f"hidden.{i}.weight"]
                    columns = read[:, here % read.shape[1]]
                    found[f"hidden.{i}.weight"] = columns * back[:, here // read.shape[1]]
                    found[f"hidden.{i}.bias"] = back[:, cells[f"hidden.{i}.bias"]]
                    if i:
                        back = back @ done.tensors[f"hidden.{i}.weight"][0] * done.slopes[i - 1][0]
            found["out.bias"] = x.new_zeros(n, outputs)
            found["out.bias"][:, k] = 1.0
            found["skip.weight"] = _of_output(x, cells["skip.weight"], k, outputs)
            if self.pairs:
                found["pair.weight"] = _of_output(products, cells["pair.weight"], k, outputs)
            parts.append(torch.cat([found[name] for name in self.keep if name in found], 1))
        return torch.stack(parts, 1) if outputs > 1 else parts[0].unsqueeze(1)

    def without(self, gone: Tensor) -> tuple[Net, Tensor]:
        """Structure without some living weights (mask [d]) and without what is then on no path; positions that stay.

        A unit that reads nothing is a constant, one that nobody reads is nothing: both go with all their weights.
        """
        keep = {n: k.clone() for n, k in self.keep.items()}
        for name, span in self.spans.items():
            keep[name].view(-1)[self.cells[name][gone[span]]] = False
        layers = [f"hidden.{i}" for i in range(len(self.smooth))]
        alive = [torch.ones_like(s) for s in self.smooth]
        for _ in layers:
            for i, layer in enumerate(layers):
                after = "out.weight" if i + 1 == len(layers) else f"{layers[i + 1]}.weight"
                alive[i] = keep[f"{layer}.weight"].any(1) & keep[after].any(0)
                keep[f"{layer}.weight"][~alive[i]] = False
                keep[f"{layer}.bias"][~alive[i]] = False
                keep[after][:, ~alive[i]] = False
        stays = torch.cat([keep[n].view(-1)[c] for n, c in self.cells.items()]).nonzero()[:, 0]
        for i, layer in enumerate(layers):
            after = "out.weight" if i + 1 == len(layers) else f"{layers[i + 1]}.weight"
            keep[f"{layer}.weight"], keep[f"{layer}.bias"] = (
                keep[f"{layer}.weight"][alive[i]],
                keep[f"{layer}.bias"][alive[i]],
            )
            keep[after] = keep[after][:, alive[i]]
        pairs = self.pairs
        if pairs:
            living = keep["pair.weight"].any(0)
            pairs = tuple(pair for pair, lives in zip(pairs, living.tolist(), strict=True) if lives)
            keep["pair.weight"] = keep["pair.weight"][:, living]
            if not pairs:
                del keep["pair.weight"]
        return Net(keep, tuple(s[a] for s, a in zip(self.smooth, alive, strict=True)), pairs), stays

    def paired(self, vector: Tensor, more: Sequence[tuple[int, int]]) -> tuple[Net, Tensor]:
        """Structure and weights [d] with more products of two inputs, whose weights are zero yet."""
        outputs = len(self.keep["out.bias"])
        had = self.keep.get("pair.weight", torch.zeros(outputs, 0, dtype=torch.bool))
        mask = torch.cat([had, torch.ones(outputs, len(more), dtype=torch.bool)], 1)
        keep = {n: k for n, k in self.keep.items() if n != "pair.weight"} | {"pair.weight": mask}
        net = Net(keep, self.smooth, (*self.pairs, *more))
        dense = {n: t[0] for n, t in self.tensors(vector.unsqueeze(0)).items()}
        old = dense.get("pair.weight", vector.new_zeros(outputs, 0))
        dense["pair.weight"] = torch.cat([old, vector.new_zeros(outputs, len(more))], 1)
        return net, torch.cat([dense[n].flatten()[c] for n, c in net.cells.items()])

    def grown(self, vector: Tensor, fresh: Sequence[Mapping[str, Tensor]]) -> tuple[Net, Tensor]:
        """Structure and weights with more units in each hidden layer.

        Args:
            vector: weights [d].
            fresh: per hidden layer "weight" [m, before + new before], "bias" [m], "smooth" [m], and in the last layer
                "out" [K, m]; zeros of a weight are no weights.
        """
        dense = {n: t[0] for n, t in self.tensors(vector.unsqueeze(0)).items()}
        keep, wider = dict(self.keep), 0
        smooth = []
        for i, (new, old) in enumerate(zip(fresh, self.smooth, strict=True)):
            name, bias = f"hidden.{i}.weight", f"hidden.{i}.bias"
            for found, more in ((dense, new["weight"]), (keep, new["weight"] != 0)):
                padded = torch.cat([found[name], found[name].new_zeros(len(old), wider)], 1)
                found[name] = torch.cat([padded, more.to(padded.dtype)])
            dense[bias] = torch.cat([dense[bias], new["bias"]])
            keep[bias] = torch.cat([keep[bias], torch.ones_like(new["bias"], dtype=torch.bool)])
            smooth.append(torch.cat([old, new["smooth"]]))
            wider = len(new["bias"])
        dense["out.weight"] = torch.cat([dense["out.weight"], fresh[-1]["out"]], 1)
        keep["out.weight"] = torch.cat([keep["out.weight"], torch.ones_like(fresh[-1]["out"], dtype=torch.bool)], 1)
        net = Net(keep, tuple(smooth), self.pairs)
        return net, torch.cat([dense[n].flatten()[c] for n, c in net.cells.items()])


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """C affine maps: [n, in] or [C, n, in] to [C, n, out]; an input they share is multiplied once."""
    networks, outputs, _ = weight.shape
    if x.ndim == 2:
        flat = torch.nn.functional.linear(x, weight.flatten(0, 1), bias.flatten())
        return flat.view(len(x), networks, outputs).transpose(0, 1)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))


def _of_output(read: Tensor, cells: Tensor, k: int, outputs: int) -> Tensor:
    """Derivatives [n, cells] of output k in living weights of a last layer that reads [n, units]."""
    columns = read[:, cells % read.shape[1]]
    return columns if outputs == 1 else columns * (cells // read.shape[1] == k)


def random_units(
    below: Tensor, likely: Tensor, count: int, weight: Tensor, generator: torch.Generator, kinds: float
) -> dict[str, Tensor]:
    """Weights, biases and kinds of units that bend at rows of the data.

    They read one, two, three or many columns; three in four read only those that are likely to matter.
    """
    p = below.shape[1]
    reads = torch.tensor([1, 2, 3, p])[torch.randint(4, (count,), generator=generator)].clamp(max=p)
    rank = torch.rand(count, p, generator=generator)
    if bool(likely.any()):
        narrow = torch.rand(count, 1, generator=generator) < 0.75
        rank = torch.where(narrow & ~likely, rank + 1, rank)
        reads = torch.where(narrow[:, 0], reads.clamp(max=int(likely.sum())), reads)
    order = rank.argsort(1).argsort(1)
    direction = torch.randn(count, p, generator=generator, dtype=below.dtype) * (order < reads.unsqueeze(1))
    scale = torch.exp2(torch.randint(-1, 2, (count, 1), generator=generator).to(below.dtype))
    direction = direction * scale / direction.norm(dim=1, keepdim=True).clamp_min(1e-9)
    at = below[torch.multinomial(weight, count, replacement=True, generator=generator)]
    smooth = torch.rand(count, generator=generator) < kinds
    return {"weight": direction, "bias": -(direction * at).sum(1), "smooth": smooth}


def matched_units(units: Tensor, basis: Tensor, weight: Tensor, wanted: Tensor, count: int) -> Tensor:
    """Indices of units [n, M] that explain most of what is wanted [n, K], one after the other, beyond a basis."""
    eye = torch.eye(basis.shape[1], dtype=basis.dtype)
    root = torch.linalg.cholesky(basis.T @ (basis * weight.unsqueeze(1)) + eye)
    cross = torch.linalg.solve_triangular(root, (basis * weight.unsqueeze(1)).T @ units, upper=False)
    gram = (units * weight.unsqueeze(1)).T @ units
    size = gram.diagonal().clone()
    gram = gram - cross.T @ cross
    aim = units.T @ wanted - cross.T @ torch.linalg.solve_triangular(root, basis.T @ wanted, upper=False)
    picked: list[int] = []
    for _ in range(count):
        own = gram.diagonal()
        gain = aim.square().sum(1) / (own.clamp_min(0) + 1)
        gain[own < 1e-3 * size] = -1.0
        gain[picked] = -2.0
        best = int(gain.argmax())
        picked.append(best)
        column = gram[:, best] / own[best].clamp_min(1e-9)
        aim = aim - torch.outer(column, aim[best])
        gram = gram - torch.outer(column, gram[best])
    return torch.tensor(picked)
