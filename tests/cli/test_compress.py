"""The command from outside: what it leaves in the folder, what it says when something is wrong."""

from __future__ import annotations

import html
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ockham as library
from ockham.zoo.data import load_folder
from ockham.zoo.networks import NETWORKS

QUICK = ("--epochs", "4", "--quiet")

USER_CODE = """
import torch
from ockham.zoo.data import Dataset

def net():
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

def line():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(120, 3, generator=g)
    y = 2 * x[:, :1] + 0.1 * torch.randn(120, 1, generator=g)
    return Dataset("line", x[:90], y[:90], x[90:], y[90:], None, None, float(x.min()), float(x.max()))

def not_a_net():
    return 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eighty tiny grey images as npz, told apart by their left half."""
    rng = np.random.default_rng(0)
    y = np.arange(120) % 2
    x = rng.integers(0, 80, (120, 8, 8)).astype(np.uint8)
    x[y == 1, :, :4] += 150
    data = tmp_path / "images"
    data.mkdir()
    np.savez(data / "train.npz", x=x[:80], y=y[:80])
    np.savez(data / "test.npz", x=x[80:], y=y[80:])
    return data


def test_the_folder_it_leaves(ockham, tmp_path: Path) -> None:
    done = ockham("compress", "--out", "r", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr and "epochs" not in done.stderr
    names = {p.name for p in (tmp_path / "r").iterdir()}
    assert names == {
        "network.safetensors", "posterior.safetensors", "metrics.json", "history.json", "analysis.json",
        "result.json", "report.html", "manifest.json",
    }  # fmt: skip
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    for side in ("before", "after", "mean_network"):
        assert set(metrics[side]) >= {"accuracy", "nll", "ece", "parameters", "bytes"}
    assert 0 < metrics["kept"] <= 1 and metrics["seconds"] > 0 and metrics["seed"] == 0
    assert metrics["before_source"] == "adam"
    network = library.load(tmp_path / "r")
    assert metrics["after"]["parameters"] == sum(int((p != 0).sum()) for p in network.parameters())
    posterior = library.load_posterior(tmp_path / "r")
    assert metrics["kept"] == pytest.approx(posterior.kept() / posterior.size())


def test_verbs_on_a_result(ockham, tmp_path: Path) -> None:
    assert ockham("compress", "--out", "r", "--no-baseline", *QUICK).returncode == 0
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert metrics["before"] is None
    inspected = ockham("inspect", "r")
    assert inspected.returncode == 0 and "MeanField, N = 1437" in inspected.stdout
    evaluated = ockham("evaluate", "r")
    assert f"{metrics['after']['accuracy']:.4f}" in evaluated.stdout, evaluated.stderr
    (tmp_path / "r" / "report.html").unlink()
    done = ockham("report", "r")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r" / "report.html").stat().st_size > 10_000


def test_same_seed_same_bits(ockham, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert ockham("compress", "--out", name, "--no-baseline", *QUICK).returncode == 0
    assert (tmp_path / "a/network.safetensors").read_bytes() == (tmp_path / "b/network.safetensors").read_bytes()
    assert (tmp_path / "a/posterior.safetensors").read_bytes() == (tmp_path / "b/posterior.safetensors").read_bytes()


def test_a_folder_of_data_and_a_toml_file(ockham, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "c.toml").write_text('epochs = 9\nseed = 5\nrule = "magnitude"\nposterior = "map"\nkeep-share = 0.1\n')
    given = ("--config", "c.toml", "--data", folder, "--model", "digits_mlp", "--epochs", "3", "--quiet")
    done = ockham("compress", "--out", "r", *given)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "r/metrics.json").read_text())
    result = json.loads((tmp_path / "r/result.json").read_text())
    assert metrics["seed"] == 5 and result["settings"]["epochs"] == 3
    assert metrics["kept"] == pytest.approx(0.1, abs=1e-4)


def test_the_users_own_network_data_and_regression(ockham, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(USER_CODE)
    done = ockham("compress", "--model", "mine:net", "--data", "mine:line", "--out", "r", "--epochs", "5", "--quiet")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "r/metrics.json").read_text())
    assert set(metrics["after"]) >= {"rmse", "nll", "crps", "coverage_90", "parameters", "bytes"}
    assert metrics["network"] == "mine:net"
    missing = ockham("evaluate", "r", "--data", "mine:line")
    assert missing.returncode == 2 and "built by 'mine:net'" in missing.stderr
    assert ockham("evaluate", "r", "--data", "mine:line", "--model", "mine:net").returncode == 0


UNITS = """
def in_units(scale, shift):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=g)
    y = 2 * x[:, :1] + x[:, 1:2] ** 2 + 0.5 * torch.randn(400, 1, generator=g)
    y = (y.double() * scale + shift).float()
    return Dataset("line", x[:300], y[:300], x[300:], y[300:], None, None, float(x.min()), float(x.max()))

def plain():
    return in_units(1.0, 0.0)

def dollars():
    return in_units(9188.0, 225328.0)

def decay():
    return in_units(1e-3, 0.97)
"""


@pytest.mark.parametrize(("name", "scale"), [("dollars", 9188.0), ("decay", 1e-3)])
def test_a_regression_is_reported_in_the_targets_own_units(ockham, tmp_path: Path, name: str, scale: float) -> None:
    (tmp_path / "mine.py").write_text(USER_CODE + UNITS)
    found = {}
    for data in ("plain", name):
        done = ockham("compress", "--model", "mine:net", "--data", f"mine:{data}", "--out", data, "--epochs", "30",
                      "--quiet")  # fmt: skip
        assert done.returncode == 0, done.stderr
        found[data] = json.loads((tmp_path / data / "metrics.json").read_text())
    for side in ("before", "after", "mean_network"):
        plain, own = found["plain"][side], found[name][side]
        assert plain["rmse"] < 1.5
        assert own["rmse"] == pytest.approx(scale * plain["rmse"], rel=2e-3)
        assert own["nll"] == pytest.approx(plain["nll"] + math.log(scale), abs=2e-3)
        assert own["crps"] == pytest.approx(scale * plain["crps"], rel=2e-3)
        for share in ("coverage_50", "coverage_90", "coverage_95"):
            assert own[share] == pytest.approx(plain[share], abs=0.011)  # one example of a hundred
    assert found[name]["kept"] == pytest.approx(found["plain"]["kept"], abs=1e-9) and found["plain"]["kept"] < 1
    variances = [library.load_posterior(tmp_path / data).noise_variance for data in ("plain", name)]
    torch.testing.assert_close(variances[1], variances[0] * scale**2, rtol=4e-3, atol=0)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_house_prices_in_every_unit_are_one_result(ockham, tmp_path: Path, real_data: Path, seed: int) -> None:
    """Boston housing as a user has it: in its own unit, in dollars, and with a spread of a thousandth around one."""
    home = real_data / "uci" / "bostonHousing"
    table, split = np.loadtxt(home / "data.txt"), np.load(home / "splits.npz")
    rows, tested = split[f"train_{seed}"], split[f"test_{seed}"]
    x, y = table[:, split["index_features"]], table[:, split["index_target"][0]]
    tiny = 1e-3 / y[rows].std()
    units = {"own": (1.0, 0.0), "dollars": (1000.0, 0.0), "tiny": (tiny, 1 - tiny * y[rows].mean())}
    found = {}
    for name, (scale, shift) in units.items():
        (tmp_path / name).mkdir()
        target = scale * y + shift
        arrays = {"train_x": x[rows], "train_y": target[rows], "test_x": x[tested], "test_y": target[tested]}
        np.savez(tmp_path / name / "data.npz", **arrays)
        given = ("--data", name, "--seed", str(seed), "--out", f"r/{name}", "--epochs", "60", "--quiet")
        done = ockham("compress", *given)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads((tmp_path / "r" / name / "metrics.json").read_text())
    assert found["own"]["network"] == "zoo:mlp_13_50_50_1" and found["own"]["after"]["rmse"] < 5
    for name, (scale, _) in units.items():
        assert found[name]["kept"] == pytest.approx(found["own"]["kept"], abs=1e-3)  # one or two weights of 3,301
        for side in ("before", "after", "mean_network"):
            own, here = found["own"][side], found[name][side]
            for measure in ("rmse", "crps"):
                assert here[measure] == pytest.approx(scale * own[measure], rel=5e-3)
            assert here["nll"] == pytest.approx(own["nll"] + math.log(scale), abs=1e-2)
            for share in ("coverage_50", "coverage_90", "coverage_95"):
                assert here[share] == pytest.approx(own[share], abs=0.021)  # one example of 51


def test_starting_from_given_weights(ockham, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(NETWORKS["digits_mlp"]().state_dict(), tmp_path / "w.safetensors")
    done = ockham("compress", "--weights", "w.safetensors", "--out", "r", *QUICK)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "r/metrics.json").read_text())
    assert metrics["before_source"] == "given weights" and metrics["before"]["accuracy"] < 0.3
    save_file({"other": torch.ones(2)}, tmp_path / "wrong.safetensors")
    wrong = ockham("compress", "--weights", "wrong.safetensors", "--out", "r", *QUICK)
    assert wrong.returncode == 2 and "missing" in wrong.stderr and "unknown other" in wrong.stderr


def test_tensorboard_scalars(ockham, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    done = ockham("compress", "--no-baseline", "--out", "r", "--log-dir", "logs", *QUICK)
    assert done.returncode == 0, done.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert [e.step for e in events.Scalars("compress/kept_share")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--data", "nowhere"), "--data nowhere: no such folder"),
        (("--model", "resnext"), "--model resnext: unknown; choose from"),
        (("--model", "os:path"), "is a module, a function is expected"),
        (("--model", "nothing.here:net"), "cannot import it"),
        (("--epochs", "0"), "--epochs must be at least 1; got 0"),
        (("--rule", "magnitude"), "needs a budget: add --keep-share"),
        (("--rule", "guess"), "--rule guess: unknown"),
        (("--keep-share", "1.5"), "a share in (0, 1] or a whole number of weights; got 1.5"),
        (("--prior-variance", "-1"), "variance must be positive"),
        (("--device", "cuda:7"), "not on this machine"),
        (("--device", "toaster"), "--device toaster"),
        (("--ignore", "nope"), "ignore entry 'nope' matches no parameter"),
        (("--weights", "missing.safetensors"), "missing.safetensors: missing, no such file"),
        (("--config", "missing.toml"), "--config missing.toml: not readable"),
        (("--learning-rate", "-1"), "--learning-rate must be positive"),
        (("--log-odds", "1", "--keep-share", "0.1"), "--log-odds and --cap need --rule evidence"),
        (("--cap", "0.5", "--rule", "learned-odds"), "--log-odds and --cap need --rule evidence"),
        (("--cap", "1.5"), "cap is a share of the living weights"),
        (("--method", "bmrs", "--cap", "0.5"), "--method bmrs does not use --cap: drop it"),
        (("--method", "spike-slab", "--cap", "0.5"), "--method spike-slab does not use --cap"),
        (("--first-round", "1.5"), "--first-round is a share of the epochs, 0 to 0.9; got 1.5"),
        (("--round-to", "8"), "add --structure"),
    ],
)
def test_mistakes_end_in_one_sentence(ockham, arguments: tuple[str, ...], text: str) -> None:
    done = ockham("compress", "--out", "r", "--no-baseline", "--epochs", "2", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert text in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.stderr


def test_the_first_round_and_what_it_may_take_can_be_set(ockham, tmp_path: Path) -> None:
    settings = ("--epochs", "4", "--first-round", "0.5", "--cap", "0.3")
    assert ockham("compress", "--out", "r", "--no-baseline", *settings).returncode == 0
    first = json.loads((tmp_path / "r" / "history.json").read_text())["rounds"][0]
    assert first["epoch"] == 2 and first["kept_share"] >= 0.7


def test_an_unwritable_folder_fails_before_training(ockham, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    done = ockham("compress", "--out", "taken/r", *QUICK)
    assert done.returncode == 2 and "Choose a folder you may write to" in " ".join(done.stderr.split())


def test_unknown_keys_of_a_toml_file_are_listed(ockham, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("epoch = 3\n")
    done = ockham("compress", "--config", "c.toml", "--out", "r")
    assert done.returncode == 2 and "unknown keys epoch (did you mean epochs?); known are" in " ".join(
        done.stderr.split()
    )
    (tmp_path / "c.toml").write_text('epochs = "3"\n')
    done = ockham("compress", "--config", "c.toml", "--out", "r")
    assert done.returncode == 2 and "epochs should be" in done.stderr


def test_version_and_help(ockham) -> None:
    assert ockham("--version").stdout.strip() == f"ockham {library.__version__}"
    assert "compress" in ockham("--help").stdout


def test_what_cannot_work_is_said_before_any_work(ockham, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def net():\n    return {}['no']\n")
    for given, said in [
        (("--seed", "-1"), "--seed is a whole number from 0 on"),
        (("--out", ""), "--out names a folder"),
        (("--max-bytes", "0"), "--max-bytes must be at least 1"),
        (("--normalize", "a:b"), "--normalize a:b: expected none"),
        (("--model", "mine:net"), "--model mine:net, called without arguments, raises KeyError: 'no' ("),
        (("--data", "mine:net"), "--data mine:net, called without arguments, raises KeyError"),
    ]:
        done = ockham("compress", "--out", "r", *QUICK, *given)
        assert done.returncode == 2 and said in done.stderr.replace("\n", " "), done.stderr
        assert not list((tmp_path / "r").glob("*"))


def test_the_help_shows_what_is_taken_where_nothing_is_typed(ockham) -> None:
    said = " ".join(ockham("compress", "--help").stdout.split())
    for default in ("[by the data]", "[the evidence decides]", "[digits]", "[20]"):
        assert default in said


@pytest.mark.parametrize("likelihood", ["binary", "poisson"])
def test_labels_and_counts_of_a_table_go_all_the_way(ockham, tmp_path: Path, likelihood: str) -> None:
    """From the CSV to the report, and back by every verb; the NLL is that of torch.distributions."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(200, generator=g)
    yes = torch.bernoulli((3 * a).sigmoid(), generator=g)
    y = [("no", "yes")[int(v)] for v in yes] if likelihood == "binary" else torch.poisson(a.exp(), generator=g).tolist()
    (tmp_path / "t.csv").write_text("a,what\n" + "\n".join(f"{1000 + v:.5f},{w}" for v, w in zip(a, y, strict=True)))
    given = ("--data", "t.csv", "--target", "what", "--likelihood", likelihood, "--epochs", "10")
    done = ockham("compress", *given, "--out", "r", "--quiet")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "r/metrics.json").read_text())
    data = load_folder(tmp_path / "t.csv", target="what", targets=None if likelihood == "binary" else "numbers")
    f = library.load(tmp_path / "r")(data.test_x)[:, 0].detach().double()
    law = torch.distributions.Bernoulli(logits=f) if likelihood == "binary" else torch.distributions.Poisson(f.exp())
    expected = -float(law.log_prob(data.test_y.double()).mean())
    assert metrics["mean_network"]["nll"] == pytest.approx(expected, abs=1e-5)
    assert metrics["before"]["nll"] > 0 and metrics["likelihood"] == likelihood
    if likelihood == "binary":
        assert metrics["mean_network"]["accuracy"] == float(((f > 0) == (data.test_y > 0.5)).double().mean())
    else:
        error = float((f.exp() - data.test_y).square().mean().sqrt())
        assert metrics["mean_network"]["rmse"] == pytest.approx(error, rel=1e-5)
    evaluated = ockham("evaluate", "r", "--data", "t.csv")
    assert f"{metrics['after']['nll']:.4f}" in evaluated.stdout, evaluated.stderr
    assert ockham("audit", "r", "--data", "t.csv").returncode == 0
    assert ockham("report", "r").returncode == 0


def test_verbs_read_the_data_as_the_result_did(ockham, tmp_path: Path) -> None:
    """Evaluation on other rows uses the mean and std of the training, not those of the rows; classes are compared."""
    g = torch.Generator().manual_seed(0)
    x = 1e6 + 1e3 * torch.randn(120, 2, generator=g, dtype=torch.float64)
    rows = [f"{a:.3f},{b:.3f},{int(a > b)}" for a, b in x.tolist()]
    (tmp_path / "t.csv").write_text("a,b,kind\n" + "\n".join(rows))
    done = ockham("compress", "--data", "t.csv", "--target", "kind", "--out", "r", *QUICK)
    assert done.returncode == 0, done.stderr
    source = json.loads((tmp_path / "r/result.json").read_text())["dataset"]
    train = load_folder(tmp_path / "t.csv", target="kind")
    assert source["mean"] == train.mean.flatten().tolist() and source["classes"] == ["0", "1"]
    assert source["target"] == "kind" and source["inputs"] == [2]
    moved = [f"{a + 3e3:.3f},{b - 3e3:.3f},{int(i % 2)}" for i, (a, b) in enumerate(x.tolist())]
    (tmp_path / "moved.csv").write_text("a,b,kind\n" + "\n".join(moved))
    told = load_folder(tmp_path / "moved.csv", target="kind", normalize=(source["mean"], source["std"]))
    logits = library.load(tmp_path / "r")(told.test_x)
    expected = float((logits.argmax(1) == told.test_y).double().mean())
    evaluated = ockham("evaluate", "r", "--data", "moved.csv")
    accuracy = next(line for line in evaluated.stdout.splitlines() if "accuracy" in line)
    assert f"{expected:.4f}" in accuracy.split("│")[3], evaluated.stdout + evaluated.stderr
    (tmp_path / "other.csv").write_text("a,b,kind\n" + "\n".join(r[:-1] + "xy"[int(r[-1])] for r in rows))
    refused = ockham("evaluate", "r", "--data", "other.csv")
    assert refused.returncode == 2 and "tells the classes 0, 1 apart" in refused.stderr


def test_how_to_load_runs_as_it_is_pasted(ockham, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(USER_CODE)
    for given in ((), ("--data", "mine:line", "--model", "mine:net")):
        done = ockham("compress", "--out", "r", "--overwrite", "--no-baseline", *given, *QUICK)
        assert done.returncode == 0, done.stderr
        lines = json.loads((tmp_path / "r/result.json").read_text())["load"]
        assert html.escape(lines.splitlines()[1]) in (tmp_path / "r/report.html").read_text()
        code = f"{lines}\nassert len(outputs) == 1 and network is not None"
        run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert run.returncode == 0, lines + run.stderr


def test_foreign_data_that_do_not_suit_are_refused_before_training(ockham, tmp_path: Path) -> None:
    np.savez(tmp_path / "six.npz", x=np.random.default_rng(0).normal(size=(20, 6)), y=np.arange(20) % 2)
    refused = ockham("compress", "--out", "r", "--ood", "six.npz", "--epochs", "1000")
    assert refused.returncode == 2 and "foreign inputs of six.npz" in refused.stderr and not (tmp_path / "r").exists()
    np.savez(tmp_path / "noise.npz", x=np.random.default_rng(0).integers(0, 16, (40, 1, 8, 8)), y=np.arange(40) % 2)
    assert ockham("compress", "--out", "r", "--ood", "noise.npz", "--no-baseline", *QUICK).returncode == 0
    assert json.loads((tmp_path / "r/analysis.json").read_text())["ood"]["name"] == "foreign inputs"
