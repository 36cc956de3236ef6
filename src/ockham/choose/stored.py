"""Decisions about posteriors that lie in files and need not fit into memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ockham.choose.rules import (
    BudgetRule,
    Evidence,
    EvidenceRule,
    Limit,
    LowestRule,
    Rule,
    mask_without,
    order_keys,
    score,
)
from ockham.core.files import checked_shape, printable, read_tree, write_tree
from ockham.core.network import trim
from ockham.core.posterior import PosteriorPiece, pack_mask, posterior_pieces, unpack_mask
from ockham.errors import OckhamError, ResultError

__all__ = ["StoredMasks", "decide_files"]

_TRIMMED = 16  # pieces after which freed memory is given back


class StoredMasks(Mapping[str, Tensor]):
    """Keep masks by parameter name (True = stays), a bit a weight.

    Attributes:
        size: weights they speak of.
        kept: weights that stay.
        gain: summed delta_f of what goes, nats (independent weights).
    """

    def __init__(self) -> None:
        self.size, self.kept, self.gain = 0, 0, 0.0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._bits: dict[str, list[Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        """The mask of one parameter, boolean."""
        return unpack_mask(torch.cat(self._bits[name]), self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the files."""
        return iter(self._shapes)

    def __len__(self) -> int:
        """Number of parameters."""
        return len(self._shapes)

    def save(self, path: Path) -> None:
        """Write them to one safetensors file; `load` reads it."""
        masks = {n: {"shape": list(s), "keep": torch.cat(self._bits[n])} for n, s in self._shapes.items()}
        write_tree(path, {"kept": self.kept, "size": self.size, "gain": self.gain, "masks": masks}, kind="masks")

    @classmethod
    def load(cls, path: Path) -> StoredMasks:
        """Read what `save` wrote."""
        found, tree = cls(), read_tree(path, kind="masks")
        try:
            found.size, found.kept, found.gain = int(tree["size"]), int(tree["kept"]), float(tree["gain"])
            for name, node in tree["masks"].items():
                found._shapes[name], found._bits[name] = checked_shape(node["shape"]), [node["keep"]]
            counts = [(mask.numel(), int(mask.sum())) for mask in found.values()]
            if (found.size, found.kept) != (sum(n for n, _ in counts), sum(n for _, n in counts)):
                raise ValueError("other counts than masks")
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ResultError(f"{printable(path)}: its masks are damaged ({printable(error)})") from error
        return found

    def _add(self, piece: PosteriorPiece, evidence: Evidence, gone: Tensor) -> None:
        if not piece.start:
            if piece.name in self._shapes:
                raise OckhamError(f"{printable(piece.name)} is in two of the files; every parameter may be in one")
            self._shapes[piece.name], self._bits[piece.name] = piece.shape, []
        keep = mask_without(piece.posterior[piece.name].keep, gone)
        self._bits[piece.name].append(pack_mask(keep))
        self.size, self.kept = self.size + keep.numel(), self.kept + int(keep.sum())
        self.gain += float(evidence[piece.name][gone].sum(dtype=torch.float64))


def decide_files(
    files: str | Path | Iterable[str | Path], rule: Rule | None = None, *, protected: Collection[str] = ()
) -> StoredMasks:
    """What a rule removes from a posterior that lies in one or several files, without reading any of them whole.

    Weights are scored a piece of a million at a time; a budget over all files is met exactly, by a pass over them
    for every sixteen bits of the order. What stays in memory is one bit a weight.

    Args:
        files: file of `save_posterior` (or result folder) with independent weights, or several, each parameter in one.
        rule: `EvidenceRule` (the default) or `BudgetRule`; an order of theirs sees one piece at a time.
        protected: parameter names from which nothing goes.

    Raises:
        OckhamError: no file, a rule that needs whole tensors, a parameter in two files, files of different posteriors,
            a protected name that none of them has.
        ResultError: a file that is damaged or is no posterior.
    """
    rule = EvidenceRule() if rule is None else rule
    if not isinstance(rule, EvidenceRule | BudgetRule) or type(rule).decide is not LowestRule.decide:
        raise OckhamError(
            f"{type(rule).__name__} may need whole tensors; files are decided by EvidenceRule or BudgetRule as they are"
        )
    paths = [files] if isinstance(files, str | Path) else list(files)  # they are gone through several times
    if not paths:
        raise OckhamError("decide_files: got no file; name the posterior's files")
    scored = partial(_scored, paths, rule, protected)
    found, alive, candidates, single = StoredMasks(), 0, 0, True
    for piece, evidence, go in scored(verify=True):
        alive, candidates = alive + piece.posterior.kept(), candidates + int(go.sum())
        single = single and rule.salience(evidence)[piece.name].dtype is torch.float32
        found._add(piece, evidence, go)
    if strangers := sorted(set(protected) - set(found)):
        raise OckhamError(f"protected names that are in none of the files: {printable(', '.join(strangers[:6]))}")
    count = rule.number(found.size, alive, candidates) if set(found) - set(protected) else 0  # all is protected
    if count < candidates:
        keys = lambda: ((order_keys(rule.salience(e)[p.name], single), go) for p, e, go in scored())  # noqa: E731
        limit, found = Limit.of(keys, count, single), StoredMasks()
        for piece, evidence, go in scored():
            found._add(piece, evidence, limit.below(order_keys(rule.salience(evidence)[piece.name], single), go))
    return found


def _scored(
    paths: Sequence[str | Path], rule: LowestRule, protected: Collection[str], *, verify: bool = False
) -> Iterator[tuple[PosteriorPiece, Evidence, Tensor]]:
    """Pieces of all files, their evidence, and which of their living weights may go."""
    known = None
    for path in paths:
        for i, piece in enumerate(posterior_pieces(path, verify=verify)):
            if i % _TRIMMED == 0:
                trim()  # between bits that stay the C library keeps what pieces leave, without end
            facts = piece.posterior.n_data, piece.posterior.temperature
            known = known or facts
            if facts != known:
                raise OckhamError(
                    f"the files are of different posteriors: (n_data, temperature) is {facts} in {printable(path)} and "
                    f"{known} before"
                )
            evidence = score(piece.posterior)
            nothing = torch.zeros(len(evidence[piece.name]), dtype=torch.bool)
            yield piece, evidence, rule.candidates(evidence, protected).get(piece.name, nothing)
