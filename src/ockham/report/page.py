"""Numbers as people read them."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "code",
    "count",
    "details",
    "document",
    "escape",
    "figure",
    "grid",
    "note",
    "number",
    "paragraph",
    "percent",
    "reduction_page",
    "seconds",
    "section",
    "signed",
    "size",
    "table",
    "tile",
    "times",
]

_MINUS = "\N{MINUS SIGN}"
_NONE = "–"


def percent(share: float | None, digits: int | None = None) -> str:
    """A share as a percentage, with two significant digits of what is left or gone unless ``digits`` are asked for.

    >>> percent(0.0178), percent(0.98312, 2), percent(0.02), percent(0.9995), percent(1), percent(None)
    ('1.8 %', '98.31 %', '2.0 %', '99.950 %', '100 %', '–')
    """
    if share is None:
        return _NONE
    value = 100 * share
    if digits is not None:
        return f"{value:.{digits}f} %".replace("-", _MINUS)
    if value in (0, 100):
        return f"{value:.0f} %"
    small = min(abs(value), 100 - value) if 0 < value < 100 else abs(value)
    return f"{value:.{min(4, max(1, 1 - math.floor(math.log10(small))))}f} %".replace("-", _MINUS)


def count(value: float | None) -> str:
    """A whole number with separators.

    >>> count(266610), count(None)
    ('266,610', '–')
    """
    return _NONE if value is None else f"{value:,.0f}".replace("-", _MINUS)


def number(value: float | None) -> str:
    """A measure with four digits after the point.

    >>> number(0.01234), number(None)
    ('0.0123', '–')
    """
    return _NONE if value is None else f"{value:.4f}".replace("-", _MINUS)


def size(bytes_: float | None) -> str:
    """Bytes in the unit that reads best, decimal as disks are sold.

    >>> size(512), size(12_400), size(1_066_440), size(None)
    ('512 B', '12.4 kB', '1.07 MB', '–')
    """
    if bytes_ is None:
        return _NONE
    value = float(bytes_)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5 or unit == "GB":
            break
        value /= 1000
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"


def seconds(value: float | None) -> str:
    """A time span.

    >>> seconds(8.42), seconds(84), seconds(3720), seconds(None)
    ('8.4 s', '1 min 24 s', '1 h 2 min', '–')
    """
    if value is None:
        return _NONE
    whole = round(value)
    if whole < 60:
        return f"{value:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def signed(value: float, digits: int) -> str:
    """A number that always shows its sign, a true minus included; a rounded zero has none.

    >>> signed(-0.125, 2), signed(0.5, 1), signed(-0.001, 1)
    ('−0.12', '+0.5', '0.0')
    """
    text = f"{value:+,.{digits}f}"
    return text[1:] if not text.strip("+-0.") else text.replace("-", _MINUS)


def times(before: float | None, after: float | None) -> float | None:
    """How often ``after`` fits into ``before``; None where that makes no sense.

    >>> times(100, 4), times(None, 4), times(3, 0)
    (25.0, None, None)
    """
    return before / after if before and after else None


def escape(text: object) -> str:
    """Text for HTML, in content and attributes."""
    return html.escape(str(text).encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}"))


def unparted(text: str) -> str:
    """Text for HTML in which no number is parted from its unit."""
    return re.sub(r"(?<=\d) (?=(?:%|s|ms|min|h|B|kB|MB|GB|points)(?!\w))", "\N{NO-BREAK SPACE}", escape(text))


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{_class(kind)}>{unparted(text)}</p>"


def code(text: str) -> str:
    """Lines to copy."""
    return f'<pre class="wrap">{escape(text)}</pre>'


def note(title: str, lines: Iterable[str]) -> str:
    """A box that asks for attention."""
    return f'<div class="note" role="note"><strong>{escape(title)}</strong>{"".join(map(paragraph, lines))}</div>'


def tile(label: str, value: str, aside: str, tone: str = "") -> str:
    """One number of the header; the tone colours the line below it ("good", "bad" or none)."""
    parts = f"<dt>{escape(label)}</dt><dd>{escape(value)}</dd>"
    return f'<div class="tile">{parts}<dd{_class(f"aside {tone}".strip())}>{escape(aside)}</dd></div>'


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A table of plain texts.

    Args:
        caption: words on the content of the table.
        header: column names.
        rows: one text per column; a cell that starts with "better" or "worse" is coloured too.
        words: number of leading columns of text, aligned left; the others are numbers.
    """
    head = "".join(f'<th scope="col"{_class("" if i < words else "n")}>{escape(h)}</th>' for i, h in enumerate(header))
    body = ""
    for first, *rest in rows:
        body += f'<tr><th scope="row">{escape(first)}</th>'
        for i, text in enumerate(rest, start=1):
            tone = "good" if text.startswith("better") else "bad" if text.startswith("worse") else ""
            body += f"<td{_class(' '.join(filter(None, ('' if i < words else 'n', tone))))}>{unparted(text)}</td>"
        body += "</tr>\n"
    inside = f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>{inside}</table></div>'
    )


def details(summary: str, content: str) -> str:
    """Content that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def figure(title: str, svg: str, caption: str = "", *, legend: Sequence[tuple[str, str]] = ()) -> str:
    """A drawn figure on its card.

    Args:
        title: words above it.
        svg: drawing from `ockham.report.figures`.
        caption: words below it.
        legend: pairs (class of the colour, meaning): "before", "after", "gone", "track", "mark", or "c0" to "c9".
    """
    keys = "".join(f'<span><i class="key {kind}"></i>{escape(meaning)}</span>' for kind, meaning in legend)
    legend_ = f'<div class="legend">{keys}</div>' if keys else ""
    below = f"<p>{escape(caption)}</p>" if caption else ""
    return f"<figure><figcaption><strong>{escape(title)}</strong>{legend_}{below}</figcaption>\n{svg}\n</figure>"


def grid(items: Iterable[str]) -> str:
    """Items side by side where there is room."""
    return f'<div class="grid">{"".join(items)}</div>'


def section(anchor: str, title: str, *content: str) -> str:
    """A part of the report; `document` lists it in the contents."""
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>\n{"".join(content)}\n</section>\n'


def document(title: str, head: str, sections: Iterable[str], foot: str) -> str:
    """The whole page."""
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    meta += '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
    start = (
        f'<!DOCTYPE html>\n<html lang="en"><head>{meta}<title>{escape(title)}</title>\n<style>{_CSS}</style></head>\n'
    )
    body = f"<header>{head}</header>\n<main>{''.join(sections)}</main>\n<footer>{foot}</footer>"
    return f"{start}<body>{body}</body></html>\n"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


_LIGHT = """--bg:#f5f6f8;--card:#fff;--ink:#1c2530;--muted:#5b6875;--line:#dfe5eb;--track:#edf0f4;--after:#2f5fd0;
--before:#b9601f;--gone:#b4bfcb;--good:#17703f;--bad:#b02f2a;--warn:#fff5dc;--warnline:#e2b84a;--c0:#3366cc;--c1:#d1495b;
--c2:#2a8c4a;--c3:#b07a00;--c4:#7b4fc9;--c5:#00848c;--c6:#d0669e;--c7:#7a5230;--c8:#5f6b7a;--c9:#86a800;"""
_DARK = """--bg:#11151b;--card:#191f28;--ink:#e5eaf0;--muted:#9ba8b6;--line:#2c3541;--track:#252d38;--after:#84a8ff;
--before:#eb9f64;--gone:#5a6776;--good:#6fd19a;--bad:#ff908a;--warn:#2b2513;--warnline:#8a6d1f;--c0:#7fa6ff;--c1:#ff8a94;
--c2:#6fd08c;--c3:#f0bd4f;--c4:#b99bff;--c5:#4fd0d6;--c6:#ff9fcb;--c7:#cfa27a;--c8:#a9b6c6;--c9:#c6e04f;"""
_CSS = f"""
:root{{color-scheme:light dark;--font:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;{_LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
@media print{{:root{{{_LIGHT}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--bg);color:var(--ink);font:16px/1.6 var(--font);-webkit-text-size-adjust:100%;
overflow-wrap:break-word}}
header,main,footer{{max-width:1080px;margin:0 auto;padding:0 clamp(14px,4vw,40px)}}
header{{padding-top:clamp(24px,5vw,56px)}}
.eyebrow{{margin:0;color:var(--muted);font-size:13px;letter-spacing:.06em;text-transform:uppercase}}
h1{{font-size:clamp(25px,4.4vw,38px);line-height:1.18;letter-spacing:-.018em;margin:.25em 0 .6em;text-wrap:balance}}
h2{{font-size:clamp(19px,2.6vw,23px);letter-spacing:-.01em;line-height:1.25;margin:0 0 .5em}}
p{{margin:.5em 0;max-width:74ch}}
.lead{{font-size:clamp(16px,2vw,18px)}}
.quiet{{color:var(--muted)}}
section{{margin:clamp(32px,5vw,56px) 0 0}}
dl.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(46%,146px),1fr));gap:12px;margin:24px 0 0}}
.tile,figure,.scroll,.note{{background:var(--card);border:1px solid var(--line);border-radius:12px}}
.tile{{padding:13px 14px}}
.tile dt{{color:var(--muted);font-size:13px}}
.tile dd{{margin:0;font-size:23px;white-space:nowrap;font-weight:650;letter-spacing:-.02em;line-height:1.3}}
.tile dd.aside{{font-size:13px;white-space:normal;font-weight:400;letter-spacing:0;color:var(--muted);line-height:1.4}}
.tile dd.good,td.good{{color:var(--good)}}.tile dd.bad,td.bad{{color:var(--bad)}}
.note{{background:var(--warn);border-color:var(--warnline);padding:12px 18px;margin:18px 0}}
.grid{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:16px;align-items:start;
margin:16px 0}}
figure{{margin:0;padding:14px 16px 12px;min-width:0;break-inside:avoid}}
figcaption{{font-size:14.5px;margin-bottom:8px}}
figcaption p{{margin:2px 0 0;color:var(--muted);font-size:13.5px}}
.chart{{display:block;width:100%;max-width:580px;height:auto;margin:0 auto}}
.chart *{{stroke-linejoin:round;stroke-linecap:butt}}
.legend{{display:flex;flex-wrap:wrap;gap:2px 16px;color:var(--muted);font-size:13.5px}}
.key{{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;background:var(--after)}}
.key.before{{background:var(--before)}}.key.gone{{background:var(--gone)}}.key.track{{background:var(--track);
outline:1px solid var(--gone)}}
{"".join(f".key.c{i}{{background:var(--c{i})}}" for i in range(10))}
.key.mark{{background:var(--ink);height:3px;width:14px;vertical-align:middle}}
.scroll{{overflow-x:auto;margin:16px 0;width:fit-content;max-width:100%;min-width:min(100%,520px)}}
.grid th,.grid td{{padding:7px 11px}}.grid caption{{padding:12px 11px 4px}}
.grid>.scroll{{margin:0;width:auto;min-width:0}}
.grid>div{{min-width:0}}.grid>div>p:first-child{{margin-top:0}}
table{{border-collapse:collapse;width:100%;font-size:14.5px;font-variant-numeric:tabular-nums}}
caption{{text-align:left;padding:12px 16px 4px;color:var(--muted);font-size:13.5px}}
th,td{{padding:7px 16px;text-align:left;border-top:1px solid var(--line);vertical-align:top}}
thead th{{border-top:0;color:var(--muted);font-weight:500;font-size:13.5px;vertical-align:bottom}}
tbody th{{font-weight:500;min-width:6.4em}}
.n{{text-align:right;white-space:nowrap}}
thead .n{{white-space:normal}}
details{{margin:12px 0}}
summary{{cursor:pointer;color:var(--after);font-size:14.5px}}
pre,code{{font-family:var(--mono);font-size:13px}}
pre{{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:12px 16px;overflow-x:auto;
margin:12px 0}}
pre.map{{font-size:10px;line-height:1.35;padding:12px}}
pre.wrap{{white-space:pre-wrap;overflow-wrap:anywhere}}
dl.words{{display:grid;grid-template-columns:minmax(110px,max-content) 1fr;gap:8px 20px;max-width:86ch}}
dl.words dt{{font-weight:600}}dl.words dd{{margin:0}}
footer{{color:var(--muted);font-size:13.5px;padding-top:40px;padding-bottom:48px}}
@media (max-width:520px){{.n{{white-space:normal}}dl.words{{display:block}}dl.words dd{{margin:0 0 10px}}
th,td{{padding:6px 7px}}caption{{padding:10px 10px 4px}}table{{font-size:13.5px}}figure{{padding:12px 10px 8px}}}}
@media print{{body{{background:#fff;font-size:10.5pt}}section{{margin-top:22px}}h2{{break-after:avoid}}
details::details-content{{content-visibility:visible;block-size:auto}}.scroll{{overflow:visible}}
.grid{{grid-template-columns:repeat(2,1fr)}}tr,.tile,.note{{break-inside:avoid}}}}
"""


_MEASURES = {
    "nll": "NLL, nats a token",
    "ece": "calibration error of the likeliest token",
    "accuracy": "accuracy of the likeliest token",
    "cosine": "cosine to the dense answers",
    "nonzero": "parameters that are not zero",
    "latency_seconds": "time of a window, seconds",
}


def reduction_page(facts: Mapping[str, Any]) -> str:
    """The page about a reduction.

    Args:
        facts: facts of `Pruned.facts`; under "text", where it is there, what `prune_folder` measured on text held out,
            and under "load" lines that load the folder.
    """
    text = facts.get("text")
    before, after = (text[k].get("nll") if text else facts[f"nll_{k}"] for k in ("before", "after"))
    total = sum(facts["evidence"]["matrices"].values())
    tiles = [tile("Weights kept", percent(facts["keep_share"]), "of the matrices in the blocks")]
    if before is not None and after is not None:
        tiles.append(tile("NLL, nats a term", number(after), f"was {number(before)}"))
        if facts["likelihood"] == "next-token":
            tiles.append(tile("Perplexity", f"{math.exp(after):.2f}", f"was {math.exp(before):.2f}"))
    unit, nats = ("million nats", signed(total / 1e6, 1)) if abs(total) >= 1e6 else ("nats", signed(total, 0))
    tiles.append(tile("Evidence", nats, f"{unit} against the dense network, by the curvature"))
    # of a folder: what metrics.json and the terminal say, loading and measuring included
    tiles.append(tile("Time", seconds((text or facts)["seconds"]), "the whole job"))
    head = paragraph("Ockham · a trained network reduced", "eyebrow") + "<h1>What went, and what it cost</h1>"
    head += f'<dl class="tiles">{"".join(tiles)}</dl>'
    parts = []
    if text:
        pairs = {k: (value, text["after"][k]) for k, value in text["before"].items()}
        rows = [
            [_MEASURES.get(k, k), *(f"{v:,}" if isinstance(v, int) else f"{v:.4f}" for v in pair)]
            for k, pair in pairs.items()
        ]
        told = f"Measured on {text['judged_on']}. Most memory used: {size(text['peak_bytes'])}, with what of mapped "
        told += "files happened to stay in it."
        lines = table("Before and after", ["measure", "before", "after"], rows)
        parts.append(section("text", "On text held out", paragraph(told), lines))
    if facts["shots"]:
        rows = [
            [
                percent(s["keep_share"], 1),
                f"{s['rise']:.4f} ± {s['rise_error']:.4f}",
                signed(s["nats"], 0),
                percent(s["certainty"], 0),
            ]
            for s in facts["shots"]
        ]
        told = (
            "No target was given. Networks of several sizes were judged on data that took no part in their reduction; "
            "the smallest whose evidence is not below that of the dense network was taken. Where a share stands twice, "
            "the network was reduced to it the fast way first, and then with more care."
        )
        header = ["weights kept", "rise of the NLL, nats a term", "evidence, nats", "certainty"]
        lines = table("Networks judged", header, rows, words=0)
        parts.append(section("stop", "How far the evidence goes", paragraph(told), lines))
    parts += _gone(facts)
    if facts["shares"]["kinds"]:
        rows = []
        for kind, share in facts["shares"]["kinds"].items():
            trust = facts["damping"].get(kind, {"inputs": None, "outputs": None})
            rows.append([kind, percent(share, 1), *("–" if v is None else f"{v:g}" for v in trust.values())])
        header = ["kind of matrix", "weights kept", "damping of inputs", "of outputs"]
        parts.append(section("kinds", "Kinds of matrices", table("Shares", header, rows)))
    if facts["evidence"]["blocks"]:
        rows = [
            [name or "the network", percent(facts["shares"]["blocks"][name], 1), signed(nats, 0)]
            for name, nats in facts["evidence"]["blocks"].items()
        ]
        lines = table("Blocks", ["block", "weights kept", "evidence, nats"], rows)
        epochs = facts.get("reconstruct", 0)
        told = f"Each block was then trained for {epochs} epochs to answer as the dense one; the evidence is of before."
        more = [paragraph(told)] if epochs else []
        parts.append(section("blocks", "Blocks", *more, lines))
    if facts.get("load"):
        parts.append(section("load", "How to load this", code(facts["load"])))
    foot = paragraph("Written by Ockham. This file needs no network and contains no scripts.")
    return document("A trained network reduced · Ockham", head, parts, foot)


def _gone(facts: Mapping[str, Any]) -> list[str]:
    """Sections about what has gone as a whole."""
    parts = []
    rows = [[k, count(w), count(left)] for k, (w, left) in facts["units"].items() if left < w]
    if rows:
        parts.append(section("units", "Units that are gone", table("Units", ["group", "before", "after"], rows)))
    if facts.get("dropped"):
        said = f"Gone as a whole, numbered as in the original: {', '.join(facts['dropped'])}."
        parts.append(section("depth", "Blocks that are gone", paragraph(said)))
    return parts
