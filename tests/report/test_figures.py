"""Figures: valid SVG, the page's colours, what a reader must be able to see, odd values."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from ockham.methods.gates import report as gates
from ockham.report import figures
from ockham.report.figures import drawing
from ockham.run.records import (
    EpochRecord,
    GateCurve,
    GateLayer,
    GatePoint,
    GateWidths,
    GroupRecord,
    LayerRecord,
    Measures,
    ReliabilityTable,
    RoundRecord,
    ShiftCurve,
)


def texts(svg):
    return [t for e in ET.fromstring(svg.replace("xlink:href", "href")).iter("text") for t in e.itertext()]


def row(name="fc.weight", total=1000, kept=10):
    return LayerRecord(name, (10, 100), total, kept)


def epoch(i, share, accuracy=0.9):
    return EpochRecord(i, 0.3, accuracy, share)


def a_round(i, gain=5.0, energy=-100.0):
    return RoundRecord(i, 5, 0.5, gain, 0.0, energy)


def of(parameters=None, size=None):
    return Measures(parameters=parameters, bytes=size, accuracy=0.95)


BINS = ReliabilityTable((0.0, 0.5, 1.0), (None, 0.9), (None, 0.8), (0, 10))
CURVE = ShiftCurve((1, 2), None, (0.9, 0.8), None, (0.1, 0.2))
LAYER = GateLayer("fc1.weight:0", (-1.0, -19.0, None), (0.1, 1.0, 0.2), (0.3, 0.0, None), (-50.0, 2.0, None),
                  (1.0, 2.0, 3.0), (0.0, 1.0, 2.0), (True, False, True), (False, False, True))  # fmt: skip
RULES = {
    f"rule {n}": GateCurve(tuple(GatePoint(i, i / 9, of()) for i in range(9)), GatePoint(n, n / 9, of()))
    for n in range(9)
}
WIDTHS = [GateWidths({"a": 9, "b": 5}, i, {"a": 9 - i, "b": 5}) for i in (1, 2)]

ALL = {
    "layers": lambda: figures.layers([row(), row("b", 3, 0)]),
    "histogram": lambda: figures.histogram("h", list(range(60)), line=0.0, label="x"),
    "evidence": lambda: figures.evidence([a_round(1), a_round(2, -3.0, None)]),
    "kept_share": lambda: figures.kept_share([epoch(1, 1.0), epoch(2, 0.01)], [a_round(2)]),
    "path": lambda: figures.path([epoch(1, 1.0), epoch(2, 0.01)], 0.95, (0.01, 0.94)),
    "reliability_diagram": lambda: figures.reliability_diagram("r", BINS, colour="#2f5fd0", label="x"),
    "coverage": lambda: figures.coverage([0.4, 0.8, 0.9], [0.5, 0.9, 0.95], [0.5, 0.9, 0.95]),
    "shift": lambda: figures.shift("s", "noise", CURVE, before=None, after=of()),
    "sizes": lambda: figures.sizes(of(1000, 4000), of(10, 200)),
    "speed": lambda: figures.speed([(1, 0.0002, 0.0001), (64, 0.004, 0.001)]),
    "width_bars": lambda: figures.width_bars(
        [GroupRecord("c.weight:0", 500, 3, 1.0), GroupRecord("d:0", 20, 20, None)]
    ),
    "pixel_map": lambda: figures.pixel_map([[0, 1], [3, 0]]),
    "gates_figure": lambda: gates.gates_figure("g", LAYER),
    "evidence_figure": lambda: gates.evidence_figure("e", LAYER),
    "widths_figure": lambda: gates.widths_figure(WIDTHS)[0],
    "curve_figure": lambda: gates.curve_figure(RULES)[0],
}


CANVAS = {"drawing", "integers", "percents", "show_the_rest", "thousands", "ylabel"}  # what figures are drawn with


def test_every_figure_is_tested():
    assert set(ALL) == {name for name in figures.__all__ if name.islower()} - CANVAS | {
        name for name in gates.__all__ if name.endswith("_figure")
    }


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
            "r", ReliabilityTable((0.0, 0.5, 1.0), (None, None), (None, None), (0, 0)), colour="#2f5fd0", label="x"
        ),
        lambda: figures.coverage(None, [0.0, 0.0, 0.0], [0.5, 0.9, 0.95]),
        lambda: figures.sizes(None, of(0)),
        lambda: figures.sizes(of(), of()),
        lambda: figures.pixel_map([[0]]),
        lambda: figures.pixel_map([[1] * 200] * 3),
    ],
)
def test_odd_values_draw_without_warnings(make):
    root = ET.fromstring(make().replace("xlink:href", "href"))
    assert root.tag.endswith("svg") and len(root) > 0


def test_ids_carry_the_key_and_labels_are_escaped():
    with drawing("one", '"><script>', 2.0) as sheet:
        sheet.figure.add_subplot().plot([0, 1], "o-")
    assert "<script" not in sheet.svg
    ids = re.findall(r' id="([^"]+)"', sheet.svg)
    assert ids and all(i.startswith("one-") for i in ids)


def test_one_colour_for_each_curve_and_all_in_the_legend():
    svg, legend = gates.curve_figure(RULES)
    assert legend == [(f"c{n}", f"rule {n}") for n in range(9)]
    assert set(re.findall(r"var\(--(c\d)\)", svg)) == {key for key, _ in legend}
    many = [GateWidths({f"layer{n}": 9 for n in range(14)}, 1, {f"layer{n}": 9 - n % 9 for n in range(14)})]
    svg, legend = gates.widths_figure(many)
    assert len(legend) == 10 and set(re.findall(r"var\(--(c\d)\)", svg)) == {key for key, _ in legend}
    assert ("layer8: 1 of 9" in [text for _, text in legend]) and not any("layer0:" in text for _, text in legend)
    long = "a.very.long.name." * 8
    assert gates.widths_figure([GateWidths({long: 2}, 1, {long: 1})])[1] == [("c0", f"{long}: 1 of 2")]


def test_many_gates_are_thinned_out_evenly():
    n = 5000
    columns = [tuple(map(float, range(-n, 0)))] * 2 + [tuple(map(float, range(n)))] * 4
    layer = GateLayer("x", *columns, (True,) * n, (False,) * n)
    for make in (gates.gates_figure, gates.evidence_figure):
        svg = make("g", layer)
        assert len(svg) < 200_000 and "5,000" not in svg
        assert any("4000" in t for t in texts(svg)), "places are those of all gates"
