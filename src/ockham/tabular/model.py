"""All that a sparse network of a table has to answer to: energy, Fisher metric, and the evidence of its structure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ockham.tabular.likelihoods import RowLikelihood
from ockham.tabular.network import Net, Pass

__all__ = ["Model", "Table", "which_inputs"]

_CHUNK = 8192
_SHAPE = 2.0  # of the inverse-gamma prior of slab variances
_BIAS_PRECISION = (1.0, 0.25)  # of the output biases: of the location, of the scale
_SLAB_OF_SCALE = 0.3  # a weight that moves ln scale by one half is large
_UNIT = math.log(0.5)  # ln prior probability of one unit more


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Standardised data: inputs [n, p] (those that entered), targets [n], example weights [n]; float64 or classes."""

    x: Tensor
    y: Tensor
    weight: Tensor

    def rows(self, index: Tensor | slice) -> Table:
        """Some of the rows."""
        return Table(self.x[index], self.y[index], self.weight[index])


@dataclass(frozen=True, eq=False)
class Passed:
    """One vector with its energy, nats, and per part of the table its passes and outputs [1, n, K]."""

    vector: Tensor
    energy: float
    passes: list[tuple[list[Pass], Tensor]]


@dataclass(frozen=True, eq=False)
class Model:
    """Networks of a table, their likelihood and priors. One vector [d] holds the weights of all, then the extras.

    Attributes:
        nets: network of the location or of class logits; of a regression the network of the scale, too.
        likelihood: likelihood of the targets.
        table: the data.
        slab_variance: centre of the prior of slab variances.
        precision: slab precision by tensor name, per network.
        centre: prior mean of the scale's bias.
        left_out: inputs that did not enter; they count as excluded.
    """

    nets: tuple[Net, ...]
    likelihood: RowLikelihood
    table: Table
    slab_variance: float
    precision: tuple[Mapping[str, float], ...]
    centre: float
    left_out: int

    # ------------------------------------------------------------------ energy
    @cached_property
    def starts(self) -> list[int]:
        """Where each network's weights begin in the vector, and where the extras do."""
        sizes = [len(net) for net in self.nets]
        return [sum(sizes[:t]) for t in range(len(sizes) + 1)]

    @cached_property
    def prior(self) -> tuple[Tensor, Tensor]:
        """Mean and precision of the Gaussian prior of the vector, [d] each."""
        means, precisions = [], []
        for t, net in enumerate(self.nets):
            for name, cells in net.cells.items():
                bias = name == "out.bias"
                means += [self.centre if bias and t else 0.0] * len(cells)
                precisions += [_BIAS_PRECISION[t] if bias else self.precision[t][name]] * len(cells)
        means += [self.likelihood.extra_mean] * self.likelihood.extras
        precisions += [1.0] * self.likelihood.extras
        return torch.tensor(means, dtype=torch.float64), torch.tensor(precisions, dtype=torch.float64)

    def split(self, vectors: Tensor) -> tuple[list[Tensor], Tensor]:
        """Weights of each network [C, d_t], and extras [C, e]."""
        *parts, extra = vectors.split([*(len(net) for net in self.nets), self.likelihood.extras], 1)
        return parts, extra

    def outputs(self, vectors: Tensor, x: Tensor) -> Tensor:
        """Outputs [C, n, K] of all networks of vectors [C, d]."""
        parts, _ = self.split(vectors)
        return torch.cat([net.run(part, x).output for net, part in zip(self.nets, parts, strict=True)], 2)

    def energy(self, vectors: Tensor) -> Tensor:
        """-ln p(vector, data) up to the constant of the prior, nats; [C]."""
        _, extra = self.split(vectors)
        total = self._pull(vectors)[0]
        for part in self.chunks:
            total = total + self.likelihood.nll(self.outputs(vectors, part.x), extra, part.y) @ part.weight
        return total

    def slopes(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Energy [C] and its gradient [C, d]."""
        parts, extra = self.split(vectors)
        total, pull = self._pull(vectors)
        for data in self.chunks:
            done = [net.run(part, data.x) for net, part in zip(self.nets, parts, strict=True)]
            output = torch.cat([d.output for d in done], 2)
            total = total + self.likelihood.nll(output, extra, data.y) @ data.weight
            of_output, of_extra = self.likelihood.slopes(output, extra, data.y)
            of_output = (of_output * data.weight.unsqueeze(1)).split([d.output.shape[2] for d in done], 2)
            back = [net.pullback(d, s, data.x) for net, d, s in zip(self.nets, done, of_output, strict=True)]
            pull = pull + torch.cat([*back, (of_extra * data.weight.unsqueeze(1)).sum(1)], 1)
        return total, pull

    def passed(self, vector: Tensor) -> Passed:
        """Forward passes and the energy of one vector [d]."""
        vectors = vector.unsqueeze(0)
        parts, extra = self.split(vectors)
        total, passes = self._pull(vectors)[0], []
        for data in self.chunks:
            done = [net.run(part, data.x) for net, part in zip(self.nets, parts, strict=True)]
            output = torch.cat([d.output for d in done], 2)
            total = total + self.likelihood.nll(output, extra, data.y) @ data.weight
            passes.append((done, output))
        return Passed(vector, float(total), passes)

    def expand(self, passed: Passed) -> tuple[Tensor, Tensor]:
        """Gradient [d] of the energy and metric [d, d] (Fisher information and prior precision) at a vector."""
        vectors = passed.vector.unsqueeze(0)
        extra, slope = self.split(vectors)[1], self._pull(vectors)[1][0]
        metric = self.prior[1].diag()
        for data, (done, output) in zip(self.chunks, passed.passes, strict=True):
            of_output, of_extra = self.likelihood.slopes(output, extra, data.y)
            information, own = self.likelihood.information(output[0], extra[0])
            begin, column = 0, 0
            for net, d in zip(self.nets, done, strict=True):
                end, after = begin + len(net), column + d.output.shape[2]
                moves = net.jacobian(d, data.x)
                block = information[:, column:after, column:after] * data.weight[:, None, None]
                cut = of_output[0, :, column:after] * data.weight.unsqueeze(1)
                slope[begin:end] += moves.flatten(0, 1).T @ cut.flatten()
                if moves.shape[1] == 1:
                    flat = moves[:, 0]
                    metric[begin:end, begin:end] += flat.T @ (flat * block[:, 0])
                else:  # sum_i J_i' L_i J_i
                    metric[begin:end, begin:end] += moves.flatten(0, 1).T @ (block @ moves).flatten(0, 1)
                begin, column = end, after
            if self.likelihood.extras:
                slope[begin:] += (of_extra[0] * data.weight.unsqueeze(1)).sum(0)
                metric[begin:, begin:] += (own * data.weight[:, None, None]).sum(0)
        return slope, metric

    def with_net(self, t: int, net: Net) -> Model:
        """The same with another network in one place."""
        return replace(self, nets=(*self.nets[:t], net, *self.nets[t + 1 :]))

    def pseudo_residuals(self, vector: Tensor, table: Table, t: int) -> tuple[Tensor, Tensor]:
        """What rows want of a network: information [n, K, K] and derivative of the log-likelihood in its outputs."""
        extra = self.split(vector.unsqueeze(0))[1]
        output = self.outputs(vector.unsqueeze(0), table.x)
        widths = [len(net.keep["out.bias"]) for net in self.nets]
        here = slice(sum(widths[:t]), sum(widths[: t + 1]))
        slope = self.likelihood.slopes(output, extra, table.y)[0][0, :, here]
        information = self.likelihood.information(output[0], extra[0])[0][:, here, here]
        return information * table.weight[:, None, None], -slope * table.weight.unsqueeze(1)

    def _pull(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Energy of the prior [C], and its gradient [C, d]."""
        mean, precision = self.prior
        away = vectors - mean
        return 0.5 * away.square() @ precision, away * precision

    @cached_property
    def chunks(self) -> list[Table]:
        """The table in parts of at most 8192 rows."""
        n = len(self.table.x)
        if n <= _CHUNK:
            return [self.table]
        return [self.table.rows(slice(i, i + _CHUNK)) for i in range(0, n, _CHUNK)]

    # ------------------------------------------------------------------ evidence
    def evidence(self, value: float, metric: Tensor) -> float:
        r"""Ln p(data, structure) by Laplace's method, nats.

            -E + 1/2 sum ln prior precision - 1/2 ln |metric| + ln p(structure) + ln p(slab variances)

        Args:
            value: energy of the mode.
            metric: [d, d] there.
        """
        volume = self.prior[1].log().sum() - torch.linalg.slogdet(metric)[1]
        return -value + 0.5 * float(volume) + self.belief()

    def belief(self) -> float:
        """Ln prior of the structure and of the slab variances, nats.

        An input more and a unit more are half as likely each (`which_inputs`); how many weights of a tensor live is
        uniform a priori, and which ones then is, too.
        """
        found = 0.0
        for t, net in enumerate(self.nets):
            active = int((net.used() > 0).sum())
            found += which_inputs(active, net.inputs + self.left_out)
            found += _UNIT * sum(net.units)
            for name, mask in net.keep.items():
                living = int(mask.sum())
                if name == "pair.weight":
                    found += _uniform(living, len(mask) * active * (active - 1) // 2)
                elif name in net.readers:
                    found += _uniform(living, len(mask) * active)
                elif name != "out.bias":
                    found += _uniform(living, mask.numel())
                if name != "out.bias":  # density of the slab variance by its posterior's width in ln v, about 0 where
                    scaled = _SHAPE * self.slab(t) * self.precision[t][name]  # none live
                    found += _SHAPE * math.log(scaled) - math.lgamma(_SHAPE) - scaled
                    found += 0.5 * math.log(2 * math.pi / (_SHAPE + 0.5 * living))
        return found

    def slab(self, t: int) -> float:
        """Centre of the prior of a network's slab variances."""
        return _SLAB_OF_SCALE * self.slab_variance if t else self.slab_variance

    def learned(self, vector: Tensor, variance: Tensor) -> Model:
        """The same with slab variances that fit weights [d] of these posterior variances [d]."""
        second = vector.square() + variance
        found = []
        for t, (net, begin) in enumerate(zip(self.nets, self.starts, strict=False)):
            own = {}
            for name, span in net.spans.items():
                part = second[begin + span.start : begin + span.stop]
                own[name] = (_SHAPE + 0.5 * len(part)) / (_SHAPE * self.slab(t) + 0.5 * float(part.sum()))
            found.append(own)
        return replace(self, precision=tuple(found))


def which_inputs(used: int, inputs: int) -> float:
    r"""Ln probability of one set of inputs, where each is used with a chance that is Beta(1, inputs) and shared by all.

        ln B(1 + used, 2 inputs - used) - ln B(1, inputs)

    How many are used is then near geometric, 2^-(used + 1). Were it uniform, the set of all inputs would be as likely
    as all sets of half of them together, and correlated inputs that each do little would all stay.

    References:
        Castillo & van der Vaart (2012), *Needles and straw in a haystack*, example 2.2.
    """
    if inputs == 0:
        return 0.0
    return math.lgamma(used + 1) + math.lgamma(2 * inputs - used) - math.lgamma(2 * inputs + 1) + math.log(inputs)


def _uniform(living: int, slots: int) -> float:
    """Ln probability of one set of so many where how many is uniform in 0..slots, and then which."""
    return math.lgamma(living + 1) + math.lgamma(slots - living + 1) - math.lgamma(slots + 2)
