"""Figures: valid SVG, the page's colours, what a reader must be able to see, odd values."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from ockham.report import figures
from ockham.report.figures import draw


def texts(svg):
    return [t for e in ET.fromstring(svg.replace("xlink:href", "href")).iter("text") for t in e.itertext()]


def row(name="fc.weight", total=1000, kept=10):
    return {"name": name, "shape": [10, 100], "total": total, "kept": kept}


def epoch(i, share, accuracy=0.9):
    return {"epoch": i, "loss": 0.3, "accuracy": accuracy, "kept_share": share}


def a_round(i, gain=5.0, energy=-100.0):
    return {"epoch": i, "removed": 5, "kept_share": 0.5, "delta_f": gain, "nll_cost": 0.0, "free_energy": energy}


BINS = {"edges": [0.0, 0.5, 1.0], "confidence": [None, 0.9], "accuracy": [None, 0.8], "count": [0, 10]}
CURVES = {"severity": [1, 2], "before": None, "after": [0.9, 0.8], "before_ece": None, "after_ece": [0.1, 0.2]}

ALL = {
    "layers": lambda: figures.layers([row(), row("b", 3, 0)]),
    "histogram": lambda: figures.histogram("h", list(range(60)), line=0.0, label="x"),
    "evidence": lambda: figures.evidence([a_round(1), a_round(2, -3.0, None)]),
    "kept_share": lambda: figures.kept_share([epoch(1, 1.0), epoch(2, 0.01)], [a_round(2)]),
    "path": lambda: figures.path([epoch(1, 1.0), epoch(2, 0.01)], 0.95, (0.01, 0.94)),
    "reliability_diagram": lambda: figures.reliability_diagram("r", BINS, colour="#2f5fd0", label="x"),
    "coverage": lambda: figures.coverage([0.4, 0.8, 0.9], [0.5, 0.9, 0.95], [0.5, 0.9, 0.95]),
    "shift": lambda: figures.shift("s", "noise", CURVES, clean={"after": 0.95}),
    "sizes": lambda: figures.sizes({"parameters": 1000, "bytes": 4000}, {"parameters": 10, "bytes": 200}),
    "width_bars": lambda: figures.width_bars(
        [{"id": "c.weight:0", "before": 500, "after": 3}, {"id": "d:0", "before": 20, "after": 20}]
    ),
    "input_map": lambda: figures.input_map([[0, 1], [3, 0]]),
}


def test_every_figure_is_tested():
    assert set(ALL) == set(figures.__all__)


@pytest.mark.parametrize("name", sorted(ALL))
def test_svg_is_well_formed_deterministic_and_follows_the_page(name):
    svg = ALL[name]()
    assert svg == ALL[name]()
    root = ET.fromstring(svg.replace("xlink:href", "href"))
    assert root.get("role") == "img" and root.get("aria-label")
    assert len(list(root.iter("path"))) + len(list(root.iter("image"))) > 2
    assert not set(re.findall(r"#[0-9a-f]{6}", svg)) - {"#000000"}, "colours must be the page's variables"
    assert "var(--" in svg and "<style" not in svg and "DejaVu" not in svg
    assert len(svg) < 60_000


@pytest.mark.parametrize("name", sorted(ALL))
def test_no_text_leaves_its_figure(name):
    root = ET.fromstring(ALL[name]().replace("xlink:href", "href"))
    wide, high = map(float, root.get("viewBox").split()[2:])
    for element in root.iter("text"):
        style, where = element.get("style"), element.get("transform") or ""
        width = 0.62 * float(re.search(r"([\d.]+)px", style)[1]) * len("".join(element.itertext()))
        at = re.search(r"translate\(([-\d.]+) ([-\d.]+)\)", where)
        x, y = map(float, at.groups()) if at else (float(element.get("x", 0)), float(element.get("y", 0)))
        shift = {"middle": 0.5, "end": 1.0}.get((re.search("text-anchor: (\\w+)", style) or [0, ""])[1], 0.0)
        start, size = (high - y, high) if "rotate(-90" in where else (x, wide)
        assert start - shift * width >= -2 and start + (1 - shift) * width <= size + 2, "".join(element.itertext())
        assert 0 <= x <= wide and 0 <= y <= high


def test_bars_carry_their_numbers():
    assert "1.0 %  ·  10 of 1,000" in texts(figures.layers([row(), row("b", 3, 0)]))
    assert {"1,000", "10", "4 kB", "200 B"} <= set(texts(ALL["sizes"]()))
    assert {"500 → 3", "20 → 20", "c.weight:0"} <= set(texts(ALL["width_bars"]()))


@pytest.mark.parametrize("rows", [[row(kept=0)], [row(kept=1000)], [row(total=0, kept=0)], [row(total=10**9, kept=1)]])
def test_layers_at_the_ends_of_the_scale(rows):
    assert figures.layers(rows).count("<path") > 2


def test_a_first_round_far_below_the_others_does_not_flatten_the_curve():
    rounds = [a_round(1, 5.0, -54_000.0), *(a_round(i, 5.0, -2000.0 + 10 * i) for i in range(2, 8))]
    shown = texts(figures.evidence(rounds))
    assert any("first round: −54,000" in t for t in shown) and any(t.startswith("−1,9") for t in shown)


def test_names_are_shortened_and_not_read_as_mathematics():
    shown = texts(figures.layers([row("$x_$" + "long." * 30 + "end"), row("网络"), row("a\x07b<&")]))
    assert any(t.startswith("$x_$long") and t.endswith("end") and "…" in t for t in shown)
    assert {"网络", "a\N{REPLACEMENT CHARACTER}b<&"} <= set(shown)


@pytest.mark.parametrize(
    "make",
    [
        lambda: figures.evidence([a_round(1)]),
        lambda: figures.evidence([a_round(1, 0.0, None)]),
        lambda: figures.evidence([a_round(i, 10.0**i, -(10.0**9)) for i in range(1, 8)]),
        lambda: figures.kept_share([epoch(1, 0.0)], []),
        lambda: figures.path([epoch(1, 0.0)], None, None),
        lambda: figures.path([epoch(1, 1.0, None)], None, None),
        lambda: figures.histogram("h", [7] + [0] * 59, line=2.5, label="x"),
        lambda: figures.reliability_diagram(
            "r", {**BINS, "confidence": [None, None], "count": [0, 0]}, colour="#2f5fd0", label="x"
        ),
        lambda: figures.coverage(None, [0.0, 0.0, 0.0], [0.5, 0.9, 0.95]),
        lambda: figures.sizes(None, {"parameters": 0}),
        lambda: figures.sizes({}, {}),
        lambda: figures.input_map([[0]]),
        lambda: figures.input_map([[1] * 200] * 3),
    ],
)
def test_odd_values_draw_without_warnings(make):
    root = ET.fromstring(make().replace("xlink:href", "href"))
    assert root.tag.endswith("svg") and len(root) > 0


def test_ids_carry_the_key_and_labels_are_escaped():
    svg = draw("one", '"><script>', 2.0, lambda figure: figure.add_subplot().plot([0, 1], "o-") and None)
    assert "<script" not in svg
    ids = re.findall(r' id="([^"]+)"', svg)
    assert ids and all(i.startswith("one-") for i in ids)
