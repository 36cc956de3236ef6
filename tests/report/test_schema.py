"""The result folder: what is written is read back, older folders still load, what is damaged is named."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import typing
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ockham import shrink, trace
from ockham.choose.rules import RoundInfo
from ockham.core.files import from_plain, to_plain
from ockham.core.posterior import Gaussian, Posterior
from ockham.errors import ResultError
from ockham.run import records, schema
from ockham.run.engine import Compressed, EpochInfo
from ockham.run.job import NetworkFacts, analysis, history, provenance
from ockham.run.records import BINS, EpochRecord, HistogramRecord, Measures, ShiftCurve
from ockham.run.schema import (
    SCHEMA,
    DataSource,
    History,
    Metrics,
    NetworkSource,
    Provenance,
    Result,
    Settings,
    read_result,
    write_result,
)
from ockham.run.structures import structure
from ockham.surgery.groups import plan_masks
from ockham.zoo.data import Dataset

DATA = Path(__file__).parent / "data"  # folders as schema 1 wrote them, gates cut to 24 a layer
OLD = ["evidence", "structure", "oneshot", "bmrs"]
METRICS = Metrics("mean-field", None, Measures(accuracy=0.5), None, 0.25, 1.5, 0, None, "digits", "zoo:lenet")
MADE = Provenance(
    "0.1", "ockham compress", 0, "2026-01-01", 1.5, {"torch": "2"}, "x86_64", NetworkSource("zoo:lenet"),
    DataSource("digits", 10, 5, "digits"), Settings(rule="EvidenceRule", others={"ignore": []}),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    def put(name, **changes):
        target = tmp_path / name
        shutil.copytree(DATA / name, target, dirs_exist_ok=True)
        for part, change in changes.items():
            file = target / f"{part}.json"
            content = json.loads(file.read_text())
            change(content)
            file.write_text(json.dumps(content))
        return target

    return put


@pytest.mark.parametrize("name", OLD)
def test_folders_of_schema_1_and_0_say_the_same_after_they_are_written_anew(name, folder, tmp_path):
    first = read_result(DATA / name)
    write_result(tmp_path / "new", first)
    assert read_result(tmp_path / "new") == first
    assert all(json.loads(f.read_text())["schema"] == SCHEMA for f in (tmp_path / "new").glob("*.json"))
    without = {part: lambda c: c.pop("schema", None) for part in ("metrics", "result")}
    assert read_result(folder(name, **without)).metrics == first.metrics


def test_what_users_read_is_still_there(tmp_path):
    """Keys of metrics.json and their values are those of schema 1."""
    write_result(tmp_path, read_result(DATA / "evidence"))
    for name in ("metrics", "history", "analysis"):
        old, new = (json.loads((at / f"{name}.json").read_text()) for at in (DATA / "evidence", tmp_path))
        assert {k: new[k] for k in old if k != "schema"} == {k: v for k, v in old.items() if k != "schema"}


def test_old_folders_are_upgraded_to_what_they_meant():
    once, gates, plain = (read_result(DATA / name) for name in ("oneshot", "bmrs", "evidence"))
    assert (once.metrics.method, once.metrics.draws, once.provenance.settings.keep_share) == ("kronecker", 1, 0.3)
    assert gates.metrics.method == "bmrs" and gates.history is None and gates.analysis is None
    old = json.loads((DATA / "bmrs" / "metrics.json").read_text())["before"]["latency_ms"]
    assert gates.metrics.before.latency_1 == pytest.approx(old / 1000)
    assert plain.metrics.method == "evidence" and plain.provenance.settings.decision_line() == 0.0
    assert plain.provenance.settings.temperature == 0.1 and plain.history.diagnosis.warnings
    assert read_result(DATA / "structure").structure.after.latency_64 > 0
    for result in (once, gates, plain):
        network = result.provenance.load.splitlines()[1]
        assert network.startswith("network = ockham.load(") and network.endswith(")") and "model=" not in network


def test_the_rule_of_an_old_folder_says_where_its_decision_line_stood(folder):
    rule = "EvidenceRule(log_odds=-2.5e-1, cap=1.0)"
    found = read_result(folder("evidence", result=lambda c: c["settings"].update(rule=rule)))
    assert found.provenance.settings.decision_line() == -0.25
    assert Settings(rule=rule, log_odds=2.0).decision_line() == 2.0 and Settings().decision_line() == 0.0


# ------------------------------------------------------------------ the law: write, then read
def values_of(hint):
    """A strategy of values of a type, as the classes of the schema use them."""
    inside = get_args(hint)
    if get_origin(hint) is Annotated:
        return st.integers(0, 10**12) if inside[0] is int else st.floats(0, 1)
    if get_origin(hint) is tuple:
        return st.lists(values_of(inside[0]), max_size=3).map(tuple)
    if NoneType in inside:
        return st.one_of(st.none(), *(values_of(k) for k in inside if k is not NoneType))
    if dataclasses.is_dataclass(hint):
        return instances(hint)
    if inside:
        return st.dictionaries(TEXT, values_of(inside[1]), max_size=3)
    plain = {float: st.floats(-1e9, 1e9), int: st.integers(0, 9), str: TEXT, bool: st.booleans()}
    return st.sampled_from([None, 1, 2.5, "x", [1, ["y"]], {"a": True}]) if hint is Any else plain[hint]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5).map(lambda s: f"_{s}")


def parts_of(value):
    """A value and all values inside."""
    yield value
    if dataclasses.is_dataclass(value):
        value = [getattr(value, f.name) for f in dataclasses.fields(value)]
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ():
        yield from parts_of(inner)


def instances(kind):
    """Of any class; where attributes must fit each other, one that an old folder holds."""
    if hasattr(kind, "__post_init__"):
        return st.sampled_from(
            [v for name in OLD for v in parts_of(read_result(DATA / name)) if isinstance(v, kind)][:9]
        )
    return st.fixed_dictionaries({n: values_of(h) for n, h in hints_of(kind).items()}).map(lambda found: kind(**found))


def hints_of(kind):
    return typing.get_type_hints(kind, include_extras=True)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(instances(Result))
def test_any_result_is_read_back_as_it_was_written(tmp_path_factory, result):
    folder = tmp_path_factory.mktemp("law")
    write_result(folder, result)
    found = read_result(folder)
    assert dataclasses.replace(found, provenance=dataclasses.replace(found.provenance, load="")) == dataclasses.replace(
        result, provenance=dataclasses.replace(result.provenance, load="")
    )
    json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)


def test_every_record_is_part_of_the_law():
    """Reached from `Result` by the types alone, so that no class stays outside of reader and writer."""
    seen, todo = set(), [Result]
    while todo:
        kind = todo.pop()
        if dataclasses.is_dataclass(kind) and kind not in seen:
            seen.add(kind)
            todo += hints_of(kind).values()
        todo += get_args(kind)
    named = {getattr(m, n) for m in (records, schema) for n in m.__all__}
    assert seen == {kind for kind in named if isinstance(kind, type)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e40])
def test_numbers_that_are_not_finite_become_null(tmp_path, value):
    epoch = EpochRecord(1, value, None, 1.0)
    after = Measures(nll=value, others={"perplexity": value})
    metrics = dataclasses.replace(METRICS, after=after)
    write_result(tmp_path, Result(metrics, MADE, History((epoch,), (), (), None)))
    found = read_result(tmp_path)
    assert found.history.epochs[0].loss is None
    assert found.metrics.after == Measures(others={"perplexity": None})


def test_what_could_not_be_read_is_not_written_and_the_old_result_stays(tmp_path):
    write_result(tmp_path, Result(METRICS, MADE))
    tensor_like = Measures(nll=np.float32(1))
    for bad, words in (
        ({"kept": 1.5}, "kept: a number from 0 to 1"),
        ({"kept": math.nan}, "kept: a finite number"),
        ({"after": tensor_like}, "numbers, texts"),
        ({"seed": -1}, "seed: a whole number"),
    ):
        with pytest.raises(ResultError, match=words):
            write_result(tmp_path, Result(dataclasses.replace(METRICS, **bad), MADE))
        assert read_result(tmp_path).metrics == METRICS


def test_parts_of_an_earlier_result_do_not_stay(tmp_path):
    write_result(tmp_path, read_result(DATA / "structure"))
    write_result(tmp_path, read_result(DATA / "bmrs"))
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.json", "gates.json", "result.json"}
    shutil.copy(DATA / "structure" / "structure.json", tmp_path)  # somebody else's
    assert read_result(tmp_path).structure is None
    write_result(tmp_path, read_result(DATA / "evidence"))
    assert {p.name for p in tmp_path.iterdir()} == {f"{n}.json" for n in ("metrics", "history", "analysis", "result")}


def test_old_gates_that_another_run_left_behind_are_not_read(folder):
    found = folder("evidence")
    shutil.copy(DATA / "bmrs" / "gates.json", found)
    assert read_result(found).gates is None and read_result(found).history is not None


def test_three_lines_load_the_network(tmp_path):
    def lines(builder):
        made = dataclasses.replace(MADE, network=NetworkSource(builder))
        write_result(tmp_path / "a b", Result(METRICS, made))
        return json.loads((tmp_path / "a b" / "result.json").read_text())["load"]

    for builder in ("zoo:lenet", "pack.age:make", "user", "x; import os:y", None, "a:b()"):
        text = lines(builder)
        compile(text, "load", "exec")
        assert text.count("\n") == 2 and repr(str(tmp_path / "a b")) in text
        assert ("from pack.age import make" in text) is (builder == "pack.age:make") and "import os" not in text


@pytest.mark.filterwarnings("ignore:.*this result has no manifest")
def test_the_three_lines_really_load_a_network(tmp_path):
    from ockham.run.folder import NETWORK, save_network
    from ockham.zoo.networks import NETWORKS

    name = next(iter(NETWORKS))
    model = NETWORKS[name]()
    save_network(model, tmp_path / NETWORK, builder=f"zoo:{name}")
    write_result(tmp_path, Result(METRICS, dataclasses.replace(MADE, network=NetworkSource(f"zoo:{name}"))))
    place = {}
    exec("\n".join(read_result(tmp_path).provenance.load.splitlines()[:2]), place)
    assert place["network"].state_dict().keys() == model.state_dict().keys()


# ------------------------------------------------------------------ damage
@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("content", [None, "{", "[]", "7", "\x80", "[" * 100_000, '{"schema": 3}', '{"schema": "x"}'])
def test_a_damaged_foreign_or_newer_file_is_named(name, content, folder):
    for part in sorted(p.stem for p in (DATA / name).iterdir()):
        if part == "structure" and content is None:
            continue
        found = folder(name)
        file = found / f"{part}.json"
        file.unlink() if content is None else file.write_bytes(content.encode("latin-1"))
        with pytest.raises(ResultError, match=rf"{part}\.json: ."):
            read_result(found)
        shutil.rmtree(found)


def damage(tree, *path, value):
    *way, last = path
    for key in way:
        tree = tree[key]
    tree[last] = value


@pytest.mark.parametrize(
    "part, path, value, words",
    [
        ("metrics", ("after",), None, "after: an object expected, got None"),
        ("metrics", ("kept",), 1.5, "kept: a number from 0 to 1 expected, got 1.5"),
        ("metrics", ("after", "nll"), math.nan, r"after\.nll: a finite number"),
        ("metrics", ("after", "accuracy"), "high", r"after\.accuracy: a finite number expected, got 'high'"),
        ("metrics", ("after", "perplexity"), "low", r"after\.perplexity: a finite number"),
        ("metrics", ("after", "bytes"), 1.5, r"after\.bytes: a whole number"),
        ("metrics", ("noise_variance",), ["x"], r"noise_variance\[0\]: a finite number"),
        ("history", ("epochs",), {}, "epochs: a list"),
        ("history", ("rounds", 0, "delta_f"), True, r"rounds\[0\]\.delta_f: a finite number"),
        ("history", ("histograms", 0, "delta_f"), [1] * 59, r"histograms\[0\]\.delta_f: a list of 0 or 60"),
        ("analysis", ("layers", 0, "kept"), 10**9, r"layers\[0\]\.kept: at most 16384"),
        ("analysis", ("reliability", "after", "edges"), [0, 1], r"reliability\.after: 15 bins with 16 edges"),
        ("analysis", ("input_map",), [[1, 2], [3]], "input_map: a table of rows"),
        ("analysis", ("shift", "rotation", "after"), [0.5], r"shift\.rotation: as many values"),
        ("structure", ("groups", 0, "after"), -1, r"groups\[0\]\.after: a whole number"),
        ("structure", ("groups", 0, "after"), 257, r"groups\[0\]\.after: 0 to 256"),
        ("structure", ("rounds", 0, "widths"), [1], r"rounds\[0\]\.widths: an object"),
        ("result", ("settings",), [], "settings: an object"),
        ("result", ("settings", "deep"), json.loads("[" * 12 + "]" * 12), "at most 8 levels"),
        ("result", ("command",), "x" * 200_000, "command: a text"),
    ],
)
def test_a_damaged_field_is_named_with_what_was_expected(part, path, value, words, folder):
    found = folder("structure", **{part: lambda c: damage(c, *path, value=value)})
    with pytest.raises(ResultError, match=rf"{part}\.json: .*{words}"):
        read_result(found)


@pytest.mark.parametrize(
    "path, value, words",
    [
        (("layers", 0, "keep"), [True], r"layers\[0\]: 1 values in every list"),
        (("layers", 0, "keep", 3), 1, r"layers\[0\]\.keep\[3\]: true or false"),
        (("curves", "n", "stop"), None, r"curves\.n\.stop: an object"),
        (("epochs",), None, "epochs: a list"),
    ],
)
def test_damaged_gates_are_named(path, value, words, folder):
    with pytest.raises(ResultError, match=rf"gates\.json: .*{words}"):
        read_result(folder("bmrs", gates=lambda c: damage(c, *path, value=value)))


def walk(tree, path=()):
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from walk(value, (*path, key))
    yield path


@pytest.mark.parametrize("name", OLD)
def test_any_foreign_value_anywhere_is_read_or_refused_by_name(name, folder):
    """Never another kind of error, and never a value that could not be written."""
    rng, found = np.random.default_rng(1), folder(name)
    for file in sorted(found.iterdir()):
        text = file.read_text()
        paths = [p for p in walk(json.loads(text)) if p]
        for i in rng.permutation(len(paths))[:60]:
            broken = json.loads(text)
            values = [None, -1, "x", {}, [], [[]], 1e308, 0, True, {"a": {}}]
            damage(broken, *paths[i], value=values[int(rng.integers(10))])
            file.write_text(json.dumps(broken))
            try:
                json.dumps(to_plain(read_result(found)), allow_nan=False)
            except ResultError as error:
                assert file.name in str(error) or paths[i] == ("method",)  # by it gates were known
        file.write_text(text)


@pytest.mark.parametrize(
    "parts", [None, "metrics", [], ["history"], ["metrics", "../x"], ["metrics", []], {"metrics": 1}]
)
def test_a_list_of_parts_that_is_none_is_named(parts, tmp_path):
    write_result(tmp_path, Result(METRICS, MADE))
    head = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps(head | {"parts": parts}))
    with pytest.raises(ResultError, match=r"result\.json: .*parts: names of parts expected"):
        read_result(tmp_path)


def test_only_plain_files_of_a_bounded_size_are_opened(folder):
    found = folder("evidence")
    os.truncate(found / "history.json", 65 * 2**20)
    with pytest.raises(ResultError, match=r"history\.json: 68,157,440 bytes"):
        read_result(found)
    (found / "history.json").unlink()
    os.mkfifo(found / "history.json")
    with pytest.raises(ResultError, match=r"history\.json: no such file"):
        read_result(found)
    with pytest.raises(ResultError, match=r"result\.json: no such file"):
        read_result(found / "nowhere")


def test_values_that_do_not_fit_each_other_are_refused_at_once():
    with pytest.raises(ResultError, match="delta_f: a list of 0 or 60 expected"):
        HistogramRecord(1, (1, 2))


def test_keys_without_an_attribute_are_kept_where_there_is_room_and_passed_over_elsewhere(tmp_path):
    assert Measures.of({"accuracy": 1.0, "perplexity": 3.0}, bytes=7) == Measures(
        accuracy=1.0, bytes=7, others={"perplexity": 3.0}
    )
    assert to_plain(Measures.of({"perplexity": 3.0})) == {"perplexity": 3.0}
    assert from_plain(NetworkSource, {"builder": "x", "future": 1}) == NetworkSource("x")


def test_groups_that_old_gates_did_not_list_had_one_structure_left(folder):
    def forget(content):
        for epoch in content["epochs"][1:]:
            del epoch["widths"]["fc2.weight:0"]

    epochs = read_result(folder("bmrs", gates=forget)).gates.epochs
    assert [e.widths["fc2.weight:0"] for e in epochs] == [128, 1, 1]


# ------------------------------------------------------------------ from a run to its parts
def test_a_run_becomes_history_analysis_and_structure(tmp_path):
    """By a small network that lost a unit and two weights; every number is counted here by hand."""
    torch.manual_seed(0)
    old = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    groups = trace(old, torch.zeros(1, 3))
    plan = plan_masks(groups, {g.id: torch.arange(g.size) != 1 for g in groups})
    small = shrink(old, plan)
    with torch.no_grad():
        small[0].weight[0, :2] = 0
    moments = {}
    for name, p in small.named_parameters():
        ones = torch.ones_like(p)
        moments[name] = Gaussian(p.detach().clone(), ones, 0 * ones, ones, p.detach() != 0)
    epochs = (EpochInfo(1, 0.5, kept_share=0.9), EpochInfo(2, math.inf, 0.75, 0.8, kl=3.0, widths={"a": 2}, removed=1))
    rounds = (RoundInfo(2, 2, 0.8, 4.0, 0.1, -math.inf),)
    counts = ({"epoch": 2, "delta_f": [1] * BINS},)
    run = Compressed(small, Posterior(moments, 9.0), rounds, epochs, None, None, counts, plan, parameters=26)
    said = history(run)
    assert (said.epochs[0].accuracy, said.epochs[0].widths, said.epochs[0].removed) == (None, None, None)
    assert (said.epochs[1].accuracy, said.epochs[1].widths, said.epochs[1].removed, said.epochs[1].kl) == (
        0.75, {"a": 2}, 1, 3.0,
    )  # fmt: skip
    shape = structure(old, run, torch.zeros(1, 3))
    assert [(g.before, g.after) for g in shape.groups if g.before == 4] == [(4, 3)]
    assert (shape.before.parameters, shape.after.parameters) == (3 * 4 + 4 + 4 * 2 + 2, 3 * 3 + 3 + 3 * 2 + 2)
    assert (shape.before.macs, shape.after.macs) == (12 + 8, 9 + 6) and shape.after.latency_64 > 0
    after = NetworkFacts(
        Measures(accuracy=1.0), None, {"noise": {"accuracy": (0.9,) * 5, "ece": (0.1,) * 5}}, 0.5, "x", None
    )
    found = analysis(run, after.stored(77), None)
    assert [(r.shape, r.total, r.kept) for r in found.layers][:2] == [((4, 3), 12, 7), ((4,), 4, 3)]
    assert found.shift["noise"] == ShiftCurve((1, 2, 3, 4, 5), None, (0.9,) * 5, None, (0.1,) * 5)
    made = provenance(
        Dataset("toy", *(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)) * 2, None, None, 0.0, 1.0),
        {"rule": "r", "ignore": ("a",)}, Path("runs/x"), command="c", builder="m:f", seed=1, seconds=2.0,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert made.load.splitlines()[1] == "network = ockham.load('runs/x', model=f())"
    write_result(tmp_path, Result(METRICS, made, said, found, shape))
    back = read_result(tmp_path)
    assert back.provenance == made and back.analysis == found and back.structure == shape
    assert back.history.epochs[1].loss is None and back.history.rounds[0].free_energy is None
    assert from_plain(NetworkFacts, json.loads(json.dumps(to_plain(after)))) == after


def test_a_method_that_is_asked_for_no_units_has_no_structure():
    run = Compressed(nn.Linear(2, 2), Posterior({}, 1.0), (), (), None, None)
    assert structure(nn.Linear(2, 2), run, torch.zeros(1, 2)) is None and analysis_of_nothing(run).layers is None


def analysis_of_nothing(run):
    return analysis(run, NetworkFacts(Measures(), None, None, None, "", None), None)
