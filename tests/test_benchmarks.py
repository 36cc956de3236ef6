"""Every benchmark imports and has --help, every recorded page is what its records say; what the harness promises."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SHARED = {"harness", "cifar", "bmrs_networks", "pruning_rivals"}  # no scripts: what several of them use
NOT_YET = {"tables", "transformers", "trust"}  # scripts with a command line of their own
SCRIPTS = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in SHARED)


@pytest.fixture(scope="module", autouse=True)
def beside():
    """The folder at the end of the path, so that scripts find each other and hide no library of their name."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(FOLDER)])
        yield
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def script(name):
    """A script as a module, under a name that no library has."""
    label = f"benchmark_{name}"
    if label not in sys.modules:
        if str(FOLDER) not in sys.path:  # families and structures take it out, to find the library transformers
            sys.path.append(str(FOLDER))
        spec = importlib.util.spec_from_file_location(label, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[label] = module
        spec.loader.exec_module(module)
    return sys.modules[label]


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_and_has_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        script(name).main()
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize("name", SCRIPTS)
def test_recorded_pages_are_what_the_records_say(name):
    bench = getattr(script(name), "BENCH", None)
    for page, text in bench.pages().items() if bench else ():
        assert (FOLDER / "results" / page).read_text() == text, (
            f"python benchmarks/{name}.py --table writes {page} anew"
        )


@pytest.mark.parametrize("name", sorted(set(SCRIPTS) - NOT_YET))
def test_what_all_share_is_in_the_harness(name):
    """No command line, no look-up of the commit, no file written by hand."""
    text = (FOLDER / f"{name}.py").read_text()
    assert hasattr(script(name), "BENCH"), f"{name}.py is not on the harness: see its docstring"
    found = re.findall(r"ArgumentParser\(|rev-parse|add_argument\(|\.write_text\(|json\.dump\(|\| --- \|", text)
    assert not found, f"{name}.py does by itself what the harness does: {found}"


def test_pages_are_checked_at_all():
    """The test above would pass where nothing is on the harness."""
    found = [page for name in SCRIPTS if hasattr(script(name), "BENCH") for page in script(name).BENCH.pages()]
    assert len(found) >= 14
    assert {"bmrs.md", "main_job.md", "one_shot/resnet20-2000-10000.md", "spike_slab.md"} <= set(found)


# ------------------------------------------------------------------ the harness itself


@pytest.fixture
def squares(tmp_path):
    """A benchmark of a moment, and the calls it got."""
    harness, calls = script("harness"), []

    def run(args):
        for seed in args.seed:
            for word in args.word or ["plain"]:
                bench.record(f"{word}.{seed}", lambda s=seed: measured(s, args.power), seed=seed, power=args.power)

    def measured(seed, power):
        calls.append(seed)
        return {"value": seed**power, "seed": seed}

    def pages():
        rows = [[k, r["value"]] for k, r in bench.records().items()]
        return {"squares.md": ["# Squares", "", f"{bench.written()}.", "", *harness.markdown("run | value", rows)]}

    bench = harness.Benchmark(
        "squares.py", "Powers.", run, pages, threads=0, seed=harness.SEEDS, power=2,
        data=harness.DATA, word=harness.Option([], "kinds", choices=("plain", "odd"), word=True),
    )  # fmt: skip
    return bench, calls, ["--results", str(tmp_path)]


def test_a_record_says_where_it_comes_from(squares, tmp_path):
    bench, _, there = squares
    bench.main([*there, "--seed", "3", "--data", "/somewhere/private"])
    record = json.loads((tmp_path / "squares" / "plain.3.json").read_text())
    assert record["value"] == 9
    assert record["arguments"] == {"seed": 3, "power": 2}
    assert record["command"] == "python benchmarks/squares.py --results PATH --seed 3 --data PATH"
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", record["commit"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00", record["date"])
    assert set(record["versions"]) == {"ockham", "python", "torch"}
    assert "thread" in record["machine"]
    assert record["cpu_seconds"] >= 0 and record["peak_mb"] > 0


def test_a_run_that_is_there_is_not_made_again(squares, tmp_path):
    bench, calls, there = squares
    bench.main([*there, "--seed", "1", "2"])
    bench.main([*there, "--seed", "1", "2", "3"])
    assert calls == [1, 2, 3]
    bench.main([*there, "--table"])
    assert calls == [1, 2, 3]
    bench.main([*there, "--seed", "2", "--again"])
    assert calls == [1, 2, 3, 2]
    assert "| plain.3 | 9 |" in (tmp_path / "squares.md").read_text()


def test_a_page_keeps_its_date_until_something_else_changes(squares, tmp_path):
    bench, _, there = squares
    bench.main([*there, "--seed", "2"])
    page = tmp_path / "squares.md"
    page.write_text(re.sub(r"Written \S+", "Written 2001-01-01", page.read_text()))
    bench.main([*there, "--table"])
    assert "Written 2001-01-01 by `python benchmarks/squares.py --table`." in page.read_text()
    bench.main([*there, "--seed", "3"])
    assert "2001" not in page.read_text()


def test_other_settings_are_refused_and_replaced_only_on_request(squares, tmp_path):
    bench, calls, there = squares
    bench.main([*there, "--seed", "2"])
    with pytest.raises(SystemExit, match=r"plain\.2\.json .* made with \{'power': 2\}, now \{'power': 3\}.*--again"):
        bench.main([*there, "--seed", "2", "--power", "3"])
    assert json.loads((tmp_path / "squares" / "plain.2.json").read_text())["value"] == 4
    bench.main([*there, "--seed", "2", "--power", "3", "--again"])
    assert json.loads((tmp_path / "squares" / "plain.2.json").read_text())["value"] == 8
    assert calls == [2, 2]


def test_records_of_before_the_harness_are_compared_by_what_they_tell(squares, tmp_path):
    bench, calls, there = squares
    (tmp_path / "squares").mkdir()
    (tmp_path / "squares" / "plain.2.json").write_text('{"value": 7, "seed": 2}')
    bench.main([*there, "--seed", "2"])
    assert calls == []
    (tmp_path / "squares" / "plain.2.json").write_text('{"value": 7, "seed": 2, "power": 5}')
    with pytest.raises(SystemExit, match="'power': 5"):
        bench.main([*there, "--seed", "2"])


def test_rows_of_one_file_are_runs_of_their_own(squares, tmp_path):
    bench, _, there = squares
    bench.main([*there, "--table"])
    made = []
    for row in ("a", "b", "a"):
        bench.record("whole", lambda r=row: made.append(r) or {"value": len(made)}, row=row, n=1)
    assert made == ["a", "b"]
    assert {k: v["value"] for k, v in bench.records()["whole"].items()} == {"a": 1, "b": 2}
    with pytest.raises(SystemExit, match="whole: b"):
        bench.record("whole", dict, row="b", n=2)


def test_a_run_to_choose_settings_by_leaves_no_record(squares, tmp_path):
    bench, _, there = squares
    bench.main([*there, "--table"])
    assert bench.record("trial", lambda: {"value": 1}, keep=False)["value"] == 1
    assert not bench.path("trial").exists()


def test_a_state_is_kept_until_the_record_is_made(squares):
    bench, _, there = squares
    bench.main([*there, "--table"])
    assert bench.saved("long, 0") == {}
    bench.save("long, 0", epoch=3, losses=[0.5, 0.25])
    assert bench.saved("long, 0") == {"epoch": 3, "losses": [0.5, 0.25]}
    bench.record("long, 0", lambda: {"epoch": bench.saved("long, 0")["epoch"]})
    assert bench.saved("long, 0") == {}


def test_words_are_checked(squares, capsys):
    bench, calls, there = squares
    bench.main([*there, "odd", "plain"])
    assert calls == [0, 0]
    with pytest.raises(SystemExit):
        bench.main([*there, "even"])
    assert "'even' is none of: plain, odd" in capsys.readouterr().err


def test_spans_and_spreads():
    harness = script("harness")
    assert harness.span([0.5], 1, 100) == "50.0"
    assert harness.span([1.0, 2.0, 6.0], 2) == "3.00 (1.00–6.00)"
    assert harness.spread([1.0, 3.0]) == "2.000 ± 1.414"
    assert harness.markdown("a | b", [[1, "x"], "2 | y"]) == ["| a | b |", "| --- | --- |", "| 1 | x |", "| 2 | y |"]
