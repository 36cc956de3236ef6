"""The report of realistic results: all is there, nothing leaks through, it tells the truth, Chromium draws it."""

from __future__ import annotations

import copy
import html
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ockham.errors import ResultError
from ockham.methods.gates.report import gate_sections
from ockham.report import page as page_of
from ockham.report.html import render, write_report
from ockham.run.schema import read_result, write_result

DATA = Path(__file__).parent / "data"

SECTIONS = [
    "comparison",
    "layers",
    "evidence",
    "training",
    "calibration",
    "inputs",
    "shift",
    "ood",
    "sizes",
    "provenance",
    "load",
    "glossary",
]
LAYERS = [("fc1.weight", [300, 784], 3406), ("fc1.bias", [300], 61), ("fc2.weight", [100, 300], 921),
          ("fc2.bias", [100], 38), ("fc3.weight", [10, 100], 361), ("fc3.bias", [10], 8)]  # fmt: skip


def measures(accuracy, nll, ece, parameters, size):
    return {"accuracy": accuracy, "nll": nll, "ece": ece, "ece_equal_mass": 1.1 * ece, "brier": 1.5 * (1 - accuracy),
            "parameters": parameters, "bytes": size}  # fmt: skip


def histogram(rng, n, centre):
    gone = round(n * (1 - centre))
    sample = np.concatenate([rng.normal(1.6, 0.5, gone), -rng.gamma(1.2, 9, n - gone)])
    return [int(c) for c in np.histogram(np.clip(sample, -24.99, 4.99), 60, (-25, 5))[0]]


def reliability(sharpness):
    edges = [i / 15 for i in range(16)]
    count = [0, 0, 1, 6, 14, 22, 31, 40, 52, 61, 77, 104, 158, 313, 9121]
    confidence = [(edges[i] + edges[i + 1]) / 2 if n else None for i, n in enumerate(count)]
    accuracy = [
        None if c is None else min(1.0, max(0.0, c + sharpness * math.sin(5 * c) * (1 - c))) for c in confidence
    ]
    return {"edges": edges, "confidence": confidence, "accuracy": accuracy, "count": count}


def history(rng, epochs=30):
    rounds, rows, share, energy = [], [], 1.0, -61_500.0
    for epoch in range(1, epochs + 1):
        if epoch >= 4:
            new = 0.018 + (share - 0.018) * (0.35 if epoch < 8 else 0.8)
            gone, cost = round((share - new) * 266_610), 0.004 * (share - new)
            rounds.append({"epoch": epoch, "removed": gone, "kept_share": new, "delta_f": 1.4 * gone, "nll_cost": cost,
                           "free_energy": energy})  # fmt: skip
            share, energy = new, energy + 0.2 * (-14_800 - energy) + rng.normal(0, 60)
        accuracy = 0.986 - 0.08 * math.exp(-epoch / 3) - 0.004 * (1 - share)
        rows.append(
            {"epoch": epoch, "loss": 0.9 * math.exp(-epoch / 3) + 0.06, "accuracy": accuracy, "kept_share": share}
        )
    ends = [
        {"epoch": 4, "delta_f": histogram(rng, 266_610, 0.07)},
        {"epoch": 30, "delta_f": histogram(rng, 4_900, 0.96)},
    ]
    diagnosis = {"undetermined": 0.012, "spread": 0.83, "removable": 0.71, "warnings": []}
    return {"epochs": rows, "rounds": rounds, "histograms": ends, "diagnosis": diagnosis}


def analysis(rng):
    y, x = np.mgrid[:28, :28] - 13.5
    pixels = rng.poisson(13 * np.exp(-((x / 7) ** 2) - (y / 8) ** 2))
    pixels[x**2 + y**2 > 150] = 0
    shift = {}
    for k, (name, slope) in enumerate({"noise": 0.05, "blur": 0.03, "rotation": 0.11, "contrast": 0.02}.items()):
        after = [0.983 - slope * s * (1 + 0.2 * s) / 2 for s in range(1, 6)]
        shift[name] = {"severity": [1, 2, 3, 4, 5], "before": [a - 0.008 * (k + 1) for a in after], "after": after,
                       "before_ece": [0.03 + 0.9 * slope * s for s in range(1, 6)],
                       "after_ece": [0.01 + 0.3 * slope * s for s in range(1, 6)]}  # fmt: skip
    rows = [{"name": n, "shape": s, "total": math.prod(s), "kept": k} for n, s, k in LAYERS]
    diagrams = {"before": reliability(-0.35), "after": reliability(0.12)}
    return {"layers": rows, "reliability": diagrams, "input_map": pixels.tolist(), "shift": shift,
            "ood": {"name": "Fashion-MNIST", "before": 0.951, "after": 0.978}}  # fmt: skip


@pytest.fixture(scope="module")
def original():
    rng = np.random.default_rng(0)
    after = measures(0.9834, 0.0561, 0.0049, 4795, 54_912)
    return {
        "metrics": {"before": measures(0.9842, 0.0713, 0.0098, 266_610, 1_066_912), "after": after,
                    "kept": 4795 / 266_610,
                    "mean_network": measures(0.9829, 0.0583, 0.0067, 4795, 54_912), "seconds": 84.2, "seed": 0,
                    "dataset": "MNIST", "network": "LeNet-300-100", "before_source": "adam"},
        "history": history(rng),
        "analysis": analysis(rng),
        "result": {"schema": 1, "ockham": "0.1.0", "seed": 0,
                   "command": "ockham compress --data mnist --epochs 30 --seed 0 --out out",
                   "date": "2025-11-03T14:05:00+00:00", "seconds": 84.2, "machine": "x86_64, 2 cores",
                   "network": {"builder": "zoo:lenet_300_100"},
                   "versions": {"python": "3.11.7", "torch": "2.9.0", "numpy": "2.3.4"},
                   "dataset": {"name": "MNIST", "n_train": 60_000, "n_test": 10_000, "source": "IDX files"},
                   "settings": {"epochs": 30, "learning_rate": 0.001, "batch_size": 128, "prior": "layer",
                                "ignore": []}},
    }  # fmt: skip


@pytest.fixture
def files(original):
    return copy.deepcopy(original)


@pytest.fixture
def write(tmp_path):
    def put(files):
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return put


def shown(folder):
    """The page of a folder, as the command writes it."""
    return render(read_result(folder), gate_sections)


def text_of(page):
    return html.unescape(re.sub(r"<[^>]+>", " ", page[page.index("<body") :])).replace("\xa0", " ")


BLANK = '<svg viewBox="0 0 1 1"></svg>'


def read(folder):
    """The page's text; its figures are painted, but not drawn, which takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, buffer, **how: buffer.write(BLANK))
        return text_of(shown(folder))


@pytest.fixture(scope="module")
def page(original, tmp_path_factory):
    """The page of the made-up result, drawn once."""
    folder = tmp_path_factory.mktemp("page")
    for name, content in original.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return write_report(folder).read_text(encoding="utf-8").replace(str(folder), "FOLDER")


def test_everything_is_there(page):
    assert re.findall(r'<section id="(\w+)"', page) == SECTIONS
    assert page.count("<svg") == page.count("</svg>") == page.count('role="img" aria-label="') == 14
    text = text_of(page)
    for words in ("LeNet-300-100 on MNIST: 98.2 % of its weights removed", "4,795 of its 266,610 weights",
                  "19.4 times smaller", "fell from 98.42 % to 98.34 % (−0.08 points)", "may be chance", "0.0098",
                  "3,406", "Fashion-MNIST", "0.978",
                  "ockham compress --data mnist", "2.9.0", "1 min 24 s", "ΔF (delta_f)", "(ECE)"):  # fmt: skip
        assert words in text, words


def test_numbers_of_the_figures_are_in_tables(files, write):
    text = read(write(files))
    for row in files["history"]["rounds"]:
        assert f"{row['removed']:,}" in text
    for curves in files["analysis"]["shift"].values():
        assert all(f"{100 * a:.1f} %" in text for a in curves["after"])
    assert all(f"{n:,}" in text for h in files["history"]["histograms"] for n in h["delta_f"])


def test_one_file_no_network_no_script(page):
    assert not re.search(r"<script|<link(?! rel=\"icon\" href=\"data:,\")|@import|\bsrc=|url\((?!#)|\son\w+=\"", page)
    outside = set(re.findall(r"https?://[^\"' <]+", page))
    assert outside == set()
    assert len(page.encode()) < 1_500_000


def test_ids_are_unique_and_resolve(page):
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([\w-]+)', page)) <= set(ids)


def test_another_render_with_another_style_is_equal_and_leaves_no_trace(files, write, page):
    import matplotlib

    folder = write(files)
    with matplotlib.rc_context({"font.size": 30, "text.parse_math": True, "axes.grid": False, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert shown(folder).replace(str(folder), "FOLDER") == page
        assert dict(matplotlib.rcParams) == before
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".json") == []


HOSTILE = '<script>alert("1")</script>&\'$x_$--><img src=x onerror=alert(2)>\u4f60\ud800\0'


def test_hostile_strings_are_escaped(files, write):
    m, a, r = files["metrics"], files["analysis"], files["result"]
    m["dataset"] = m["network"] = m["before_source"] = HOSTILE
    r.update(command=HOSTILE, machine=HOSTILE, ockham=HOSTILE, date=HOSTILE, versions={HOSTILE: HOSTILE},
             network={"builder": HOSTILE}, settings={HOSTILE: HOSTILE, "list": [HOSTILE]},
             dataset={"name": HOSTILE, "n_train": 1, "n_test": 1, "source": HOSTILE})  # fmt: skip
    a["layers"][0]["name"] = HOSTILE
    a["layers"][0]["kept"] = 0
    a["ood"]["name"] = HOSTILE
    a["shift"] = {HOSTILE: a["shift"]["noise"]}
    files["history"]["diagnosis"]["warnings"] = [HOSTILE]
    page = shown(write(files))
    assert page.count("alert(2)") > 15
    assert "<script" not in page and "<img" not in page and "onerror" in page and "\0" not in page


def test_no_before(files, write):
    files["metrics"]["before"] = files["metrics"]["before_source"] = None
    files["analysis"]["reliability"]["before"] = None
    files["analysis"]["ood"]["before"] = None
    for curves in files["analysis"]["shift"].values():
        curves["before"] = curves["before_ece"] = None
    text = read(write(files))
    assert "No network to compare with was measured" in text
    assert "nothing to compare with" in text
    assert "There is no diagram of the network before" in text


def test_optional_parts_missing(files, write):
    files["analysis"] = {"layers": None, "reliability": None, "input_map": None, "shift": None, "ood": None}
    files["history"] = {"epochs": [], "rounds": [], "histograms": [], "diagnosis": None}
    files["metrics"].update(mean_network=None, kept=1.0)
    files["result"] = {"schema": 1}
    page = shown(write(files))
    assert re.findall(r'<section id="(\w+)"', page) == SECTIONS
    text = text_of(page)
    for words in ("does not list its layers", "No round of removal took place", "does not list its epochs",
                  "Calibration was not measured", "no map of input pixels", "corrupted inputs was not measured",
                  "another kind was not measured", "no weight was removed"):  # fmt: skip
        assert words in text, words


@pytest.mark.parametrize("part", ["layers", "reliability", "input_map", "shift", "ood"])
def test_each_analysis_may_be_missing(files, write, part):
    del files["analysis"][part]
    assert "not" in shown(write(files))


def test_regression(files, write):
    m = {
        "rmse": 2.91,
        "nll": 2.44,
        "crps": 1.5,
        "coverage_50": 0.47,
        "coverage_90": 0.91,
        "coverage_95": 0.97,
        "parameters": 400,
        "bytes": 3000,
    }
    files["metrics"].update(before={**m, "rmse": 2.8, "coverage_50": 0.36, "parameters": 4000}, after=m, mean_network=m)
    files["analysis"].update(reliability=None, input_map=None, shift=None, ood=None)
    for e in files["history"]["epochs"]:
        e["accuracy"] = None
    page = shown(write(files))
    text = text_of(page)
    assert (
        "Coverage of prediction intervals" in text and "typical error (RMSE) went from 2.8000 to 2.9100 (worse" in text
    )
    assert (
        "better (+11.00 points)" in text and "Loss as the network shrinks" in text and "Accuracy on unseen" not in text
    )


def test_a_real_loss_of_accuracy_is_said_plainly(files, write):
    files["metrics"]["after"]["accuracy"] = 0.951
    text = read(write(files))
    assert "Accuracy fell by 3.32 points, more than chance explains" in text
    assert "worse (−3.32 points)" in text


def test_warnings_and_negative_evidence_are_said_plainly(files, write):
    files["history"]["diagnosis"] |= {"undetermined": 0.99, "warnings": ["99 % of the weights are undetermined."]}
    files["analysis"]["layers"][2]["kept"] = 0
    for r in files["history"]["rounds"]:
        r["delta_f"] = -3.0
    text = read(write(files))
    assert "Before you rely on this result" in text and "For 99.0 % of the weights the data had said nothing" in text
    assert "Every weight of fc2.weight was removed" in text and "more was removed than the data ask for" in text


def test_a_fall_of_the_expected_loss_is_not_called_a_cost(files, write):
    for r in files["history"]["rounds"]:
        r["nll_cost"] = -0.001
    assert "was expected to fall by 0.0270 nats per example" in read(write(files))
    for r in files["history"]["rounds"]:
        r["nll_cost"] = -1.0
    assert "the spread of the posterior had not settled" in read(write(files))


def test_many_layers_and_one_round(files, write):
    names = [f"blocks.{i}.convolution_with_a_long_name.weight" for i in range(66)]
    layers = [{"name": name, "shape": [16, 16, 3, 3], "total": 2304, "kept": i} for i, name in enumerate(names)]
    files["analysis"]["layers"] = layers
    files["history"]["rounds"] = files["history"]["rounds"][:1]
    files["history"]["histograms"] = files["history"]["histograms"][:1]
    text = read(write(files))
    assert "The 30 largest of 66" in text and "In 1 round," in text and "Last round" not in text


@pytest.mark.parametrize("content", [None, "{", "[" * 100_000])
def test_a_damaged_folder_gets_no_report(files, write, content):
    folder = write(files)
    path = folder / "history.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ResultError, match=r"history\.json"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_import_loads_no_matplotlib():
    code = "import sys, ockham.report.html; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


PROBE = """<script>addEventListener("load", () => { const out = [...document.querySelectorAll("svg")].map(s => {
const box = s.getBoundingClientRect(), inside = s.getBBox();
return [box.width, box.height, inside.width, inside.height, s.querySelectorAll("path,image,use,text").length]; });
const wide = document.documentElement.scrollWidth - innerWidth;
parent.postMessage(JSON.stringify({out, wide, inner: innerWidth, errors: window.failed || 0}), "*"); });
addEventListener("error", () => { window.failed = 1; }, true);</script></head>"""
LISTEN = """<script>addEventListener("message", e => { document.title = e.data; });</script>"""


@pytest.mark.parametrize("name, wide", [("made up", 1280), ("made up", 400), ("bmrs", 400), ("structure", 400)])
def test_chromium_draws_every_figure(files, write, tmp_path_factory, name, wide):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium or google-chrome on the path")
    text = shown(write(files) if name == "made up" else DATA / name)
    profile = tmp_path_factory.mktemp("chromium")
    page, frame = profile / "probe.html", profile / "frame.html"
    page.write_text(text.replace("</head>", PROBE, 1), encoding="utf-8")
    frame.write_text(f"<!DOCTYPE html><title>-</title><iframe src=probe.html width={wide} height=900></iframe>{LISTEN}")
    quiet = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    quiet += "--disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=20000"
    command = [browser, "--headless", "--no-sandbox", *quiet.split(), f"--user-data-dir={profile}",
               "--window-size=1400,900", "--dump-dom", frame.as_uri()]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in run.stderr, run.stderr
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", run.stdout, re.DOTALL)[1]))
    assert found["errors"] == 0 and found["inner"] == wide
    assert found["wide"] <= 0, "the page scrolls sideways"
    assert len(found["out"]) == text.count("<svg")
    assert all(size > 20 for figure in found["out"] for size in figure[:4])
    assert all(figure[4] > 5 for figure in found["out"])


def test_a_baseline_does_not_claim_evidence(files, write):
    files["result"]["settings"]["rule"] = "magnitude"
    text = read(write(files))
    assert "by the baseline rule “magnitude”, for comparison" in text and "asked of each weight" not in text


COST = {"parameters": 266_610, "bytes": 1_066_440, "macs": 266_200, "latency_1": 0.0002, "latency_64": 0.0040}
STRUCTURE = {
    "schema": 1,
    "groups": [
        {"id": "fc1.weight:0", "before": 300, "after": 61, "nats": 812.4},
        {"id": "fc2.weight:0", "before": 100, "after": 100, "nats": 0.0},
    ],
    "before": COST,
    "after": {**COST, "macs": 58_000, "parameters": 58_123, "latency_64": 0.0010},
}


def test_structures_have_a_section_with_widths_and_costs(files, write):
    page = shown(write(files | {"structure": STRUCTURE}))
    assert re.findall(r'<section id="(\w+)"', page) == [SECTIONS[0], "structures", *SECTIONS[1:]]
    text = text_of(page)
    for words in ("239 channels, neurons or heads", "22 % of the multiply-accumulates", "25 % of the measured time",
                  "812.4", "58,123", "4.000", "1.000", "300 → 61"):  # fmt: skip
        assert words in text, words


def test_structures_that_all_stay_say_so(files, write):
    stay = copy.deepcopy(STRUCTURE)
    stay["groups"] = stay["groups"][1:]
    assert "each was worth its price" in read(write(files | {"structure": stay}))


# ------------------------------------------------------------------ what became faster
def structured(files, before, after):
    costs = {"before": {**COST, "latency_64": before}, "after": {**STRUCTURE["after"], "latency_64": after}}
    return files | {"structure": {**STRUCTURE, **costs}}


@pytest.mark.parametrize(
    "before, after, title, warned",
    [
        (0.004, 0.001, "LeNet-300-100 on MNIST: 4 times faster", False),
        (0.004, 0.0039, "LeNet-300-100 on MNIST: 239 units removed, as fast as before", True),
        (0.004, 0.0050, "LeNet-300-100 on MNIST: 239 units removed, slower than before", True),
    ],
)
def test_a_structured_result_is_titled_by_what_was_measured(files, write, before, after, title, warned):
    page = shown(write(structured(files, before, after)))
    text = text_of(page)
    assert f"<h1>{title}</h1>" in page and ("not faster on this machine" in text) is warned
    assert f"64 examples at once take {1e3 * after:.3g} ms instead of 4 ms, measured on this machine" in text
    assert "Speed, batch 64" in text and f"{before / after:.3g} ×" in text and f"4 → {1e3 * after:.3g} ms" in text
    assert "Single weights went" not in text


def test_single_weights_do_not_claim_speed(files, write):
    text = read(write(files))
    assert "smaller on disk but takes as long to run as before" in text and "Speed" not in text


# ------------------------------------------------------------------ words that a manager understands
@pytest.mark.parametrize(
    "temperature, n_train, words",
    [
        (0.1, 1437, "The posterior was sharpened ten times because the data are few: treat the nats as a ranking"),
        (0.4, 10**6, "The posterior was sharpened 2.5 times as the settings ask: treat the nats as a ranking"),
        (2.0, 10**6, "The posterior was flattened two times as the settings ask: treat the nats as a ranking"),
    ],
)
def test_a_tempered_posterior_is_explained(files, write, temperature, n_train, words):
    files["result"]["settings"]["temperature"] = temperature
    files["result"]["dataset"]["n_train"] = n_train
    files["history"]["diagnosis"]["warnings"] = [f"the posterior is tempered (T = {temperature}): its evidence is ..."]
    text = read(write(files))
    assert words in text and "tempered" not in text[: text.index("Before and after")]


def test_every_warning_of_the_diagnosis_has_plain_words(files, write):
    """`diagnose` speaks to those who know its words; none of its sentences reaches the top of the page as it is."""
    import torch

    from ockham import Posterior
    from ockham.choose.rules import diagnose
    from ockham.core.posterior import Gaussian

    ones = torch.ones(4)
    keep = torch.ones(4, dtype=torch.bool)
    weights = Gaussian(mean=3 * ones, precision=ones, prior_mean=0 * ones, prior_precision=ones, keep=keep)
    told = diagnose(Posterior({"w": weights}, 10.0, temperature=0.5)).warnings
    assert len(told) == 4
    files["history"]["diagnosis"]["warnings"] = list(told)
    files["result"]["settings"]["temperature"] = 0.5
    page = shown(write(files))
    note = text_of("<body" + page[page.index('<div class="note"') : page.index("<dl")])
    assert not any(warning in note for warning in told) and note.count("Train longer") == 2


# ------------------------------------------------------------------ one page for every method
def test_gates_add_their_sections_to_the_same_page(tmp_path):
    page = shown(DATA / "bmrs")
    sections = re.findall(r'<section id="(\w+)"', page)
    assert sections[:4] == ["comparison", "widths", "gates", "curve"] and sections[-3:] == [
        "provenance",
        "load",
        "glossary",
    ]
    text = text_of(page)
    for words in ("gates report", "by the rule “n”", "one ordinary network", "Accuracy against compression",
                  "removes nothing by itself", "of 256", "learning_rate"):  # fmt: skip
        assert words in text, words
    assert "one draw" not in text and "No round of removal" not in text
    for name in ("evidence", "structure", "oneshot"):
        assert gate_sections(read_result(DATA / name)).sections == ()


def test_a_number_is_not_parted_from_its_unit():
    assert page_of.paragraph("98.2 % in 1 min 3 s, 5 steps") == "<p>98.2\xa0% in 1\xa0min 3\xa0s, 5 steps</p>"


def test_gates_that_never_moved_say_so_and_why():
    text = read(DATA / "bmrs")
    assert "no structure was removed" in text
    assert "No structure went, because the gates hardly moved: in 46 steps at a learning rate of 0.003" in text
    reach = f"{math.exp(46 * 0.003):.2g}"
    assert f"the spread of a gate can grow {reach}-fold at most, and about 150-fold is needed" in text


def gates_with(files, write, *, mean=-0.01, log_std=-5.0, delta_f=-8.0, epochs=100, rate=0.01, keep=True):
    n = 4
    layer = {"id": "fc1.weight:0", "mean": [mean] * n, "std": [math.exp(log_std)] * n, "theta": [0.9] * n,
             "delta_f": [delta_f] * n, "kl": [1.0] * n, "score": [delta_f] * n, "keep": [keep, *[True] * (n - 1)],
             "no_evidence": [False] * n}  # fmt: skip
    left = n if keep else n - 1
    ends = [
        {"start": {"fc1.weight:0": n}, "epoch": e, "widths": {"fc1.weight:0": n if e == 1 else left}} for e in (1, 2)
    ]
    files["gates"] = {"rule": "n", "kl_weight": "true_elbo", "epochs": ends, "layers": [layer], "curves": {}}
    files["metrics"] |= {"method": "bmrs", "mean_network": None}
    files["result"]["settings"] = {"epochs": epochs, "batch_size": 100, "learning_rate": rate, "gate_rate": 1.0}
    return write(files)


def test_gates_that_settled_and_stayed_are_not_called_too_slow(files, write):
    text = read(gates_with(files, write, log_std=-4.0))
    assert (
        "although the gates had settled: the data ask for every one of them (the least needed is worth 8.0 nats)"
        in text
    )
    text = read(gates_with(files, write, log_std=-5.0))
    assert "stayed where they started: nothing pushed them" in text
    text = read(gates_with(files, write, log_std=-4.6, epochs=1, rate=0.001))
    assert "hardly moved: in 600 steps at a learning rate of 0.001" in text
    text = read(gates_with(files, write, keep=False))
    assert "No structure went" not in text and "gates report" in text


def test_one_shot_does_not_claim_draws_or_rounds():
    text = read(DATA / "oneshot")
    for words in ("one-shot report", "One pass over the training data", "down to the budget you set",
                  "at once, without rounds",
                  "The training afterwards", "one ordinary network", "2 more epochs"):  # fmt: skip
        assert words in text, words
    assert "mean network only" not in text and "one draw" not in text and "While this network was trained" not in text


@pytest.mark.parametrize("name", ["evidence", "oneshot", "bmrs"])
def test_how_to_load_it_stands_at_the_end(name, tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, buffer, **how: buffer.write(BLANK))
    folder = tmp_path / name
    shutil.copytree(DATA / name, folder)
    page = write_report(folder, gate_sections).read_text()
    lines = read_result(folder).provenance.load
    assert f'<pre class="wrap">{html.escape(lines)}</pre>' in page
    assert page.index("How to load this") > page.index("How to get this again")
    assert lines.splitlines()[1] == f"network = ockham.load({str(folder)!r})"


def test_lines_that_ockham_did_not_write_are_not_offered_for_copying(tmp_path):
    write_result(tmp_path, read_result(DATA / "bmrs"))
    head = json.loads((tmp_path / "result.json").read_text())
    own, where = head["load"].splitlines(), "load('path/of/this/folder')"
    system = "__import__('os').system('x')"
    for load, path in (
        ("\n".join([*own[:2], system, own[2]]), own[1]),
        ("\n".join([*own[:2], system]), own[1]),
        ("import ockham; from os import system\nnetwork = ockham.load('x', model=system('y'))", "load('x')"),
        ("rm -rf", where),
        (head["load"].replace("'", '"', 1), where),
        ("network = ockham.load('a\\'); system('y", where),
        ("", where),
    ):
        (tmp_path / "result.json").write_text(json.dumps(head | {"load": load}))
        text = read(tmp_path)
        assert "system" not in text and "rm -rf" not in text and path in text


@pytest.mark.parametrize("name", ["made up", "evidence", "bmrs"])
def test_every_colour_of_a_figure_stands_in_its_legend(files, write, name):
    page = shown(write(files | {"structure": STRUCTURE}) if name == "made up" else DATA / name)
    several = 0
    for figure in re.findall(r"<figure>.*?</figure>", page, re.DOTALL):
        head, svg = figure.split("<svg", 1)
        used = set(re.findall(r"var\(--(before|after|c\d)\)", svg))
        said = set(re.findall(r'class="key (\w+)"', head))
        several += len(used) > 1
        assert len(used) < 2 or used <= said, (head, used, said)
    assert several > 0
    curve = [f for f in re.findall(r"<figure>.*?</figure>", page, re.DOTALL) if "against compression" in f]
    for figure in curve:
        assert len(set(re.findall(r"var\(--(c\d)\)", figure))) == 9, "nine rules, nine colours"
