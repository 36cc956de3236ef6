"""What a reduction did, as one HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ockham.report import page

__all__ = ["page_of"]


def page_of(facts: Mapping[str, Any]) -> str:
    """The page.

    Args:
        facts: of `Pruned.facts`.
    """
    before, after = facts["nll_before"], facts["nll_after"]
    total = sum(facts["evidence"]["matrices"].values())
    tiles = [page.tile("Weights kept", page.percent(facts["keep_share"]), "of the matrices in the blocks")]
    if before is not None and after is not None:
        tiles.append(page.tile("NLL, nats a term", page.number(after), f"was {page.number(before)}"))
        if facts["likelihood"] == "next-token":
            tiles.append(page.tile("Perplexity", f"{math.exp(after):.2f}", f"was {math.exp(before):.2f}"))
    tiles.append(page.tile("Evidence", f"{page.signed(total, 0)} nats", "by the curvature, dense network 0"))
    tiles.append(page.tile("Time", page.seconds(facts["seconds"]), "the whole job"))
    head = page.paragraph("Ockham · a trained network reduced", "eyebrow") + "<h1>What went, and what it cost</h1>"
    head += f'<dl class="tiles">{"".join(tiles)}</dl>'
    parts = [_shots(facts), _units(facts), _kinds(facts), _blocks(facts)]
    foot = page.paragraph("Written by Ockham. This file needs no network and contains no scripts.")
    return page.document("A trained network reduced · Ockham", head, [p for p in parts if p], foot)


def _shots(facts: Mapping[str, Any]) -> str:
    rows = [
        [
            page.percent(s["keep_share"], 1),
            f"{s['rise']:.4f} ± {s['rise_error']:.4f}",
            page.signed(s["nats"], 0),
            page.percent(s["certainty"], 0),
        ]
        for s in facts["shots"]
    ]
    if not rows:
        return ""
    text = page.paragraph(
        "No target was given. Networks of several sizes were judged on data that took no part in their reduction; the "
        "smallest whose evidence is not below that of the dense network was taken."
    )
    header = ["weights kept", "rise of the NLL, nats a term", "evidence, nats", "certainty"]
    return page.section("stop", "How far the evidence goes", text, page.table("Networks judged", header, rows, words=0))


def _units(facts: Mapping[str, Any]) -> str:
    rows = [[k, page.count(w), page.count(left)] for k, (w, left) in facts["units"].items() if left < w]
    table = page.table("Units", ["group", "before", "after"], rows)
    return page.section("units", "Units that are gone", table) if rows else ""


def _kinds(facts: Mapping[str, Any]) -> str:
    rows = []
    for kind, share in facts["shares"]["kinds"].items():
        trust = facts["damping"].get(kind, {"inputs": None, "outputs": None})
        rows.append([kind, page.percent(share, 1), *("–" if v is None else f"{v:g}" for v in trust.values())])
    header = ["kind of matrix", "weights kept", "damping of inputs", "of outputs"]
    return page.section("kinds", "Kinds of matrices", page.table("Shares", header, rows)) if rows else ""


def _blocks(facts: Mapping[str, Any]) -> str:
    rows = [[name or "the network", page.signed(nats, 0)] for name, nats in facts["evidence"]["blocks"].items()]
    return page.section("blocks", "Blocks", page.table("Evidence", ["block", "nats"], rows)) if rows else ""
