"""Decisions about posteriors in files: the same as in memory, to the weight, a piece at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ockham
from ockham.choose.rules import BudgetRule, EvidenceRule, LearnedOddsRule, Rule, by_delta_f, by_magnitude, score
from ockham.choose.stored import StoredMasks, decide_files
from ockham.core.files import StoredTensor, read_tree, write_tree
from ockham.core.posterior import POSTERIOR, Gaussian, Posterior, load_posterior, posterior_pieces, save_posterior
from ockham.errors import OckhamError, ResultError


def tensor(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=g, dtype=dtype)


@pytest.fixture
def whole() -> Posterior:
    """Priors of one number, of rows, of columns and of every weight; weights that are gone, others that are fixed."""
    g = torch.Generator().manual_seed(0)
    priors = {
        "one": (torch.tensor(2.0), (37, 11)),
        "rows": (tensor(g, 23, 1).exp(), (23, 9)),
        "columns": (tensor(g, 13).exp(), (5, 7, 13)),
        "each": (tensor(g, 19, 21).exp(), (19, 21)),
        "bias": (torch.tensor(0.5), (8,)),
    }
    found = {}
    for name, (prior, shape) in priors.items():
        keep = torch.rand(shape, generator=g) < (0.7 if name in ("rows", "each", "bias") else 1.1)
        mean = (tensor(g, *shape) * 2).masked_fill(~keep, 0.0)
        precision = (prior + tensor(g, *shape).exp()).masked_fill(~keep, torch.inf)
        marginal = precision / 1.25 if name == "columns" else None
        found[name] = Gaussian(mean, precision, prior, 0.1 * torch.ones_like(prior), keep, marginal)
    fixed = found["each"]
    found["each"] = replace(fixed, mean=torch.where(fixed.keep, fixed.mean, torch.tensor(0.25)))
    return Posterior(found, 1000.0)


def parts(whole: Posterior, folder: Path) -> list[Path]:
    """Two files."""
    names, files = list(whole), []
    for i, some in enumerate((names[:3], names[3:])):
        files.append(folder / f"part-{i}.safetensors")
        save_posterior(replace(whole, moments={n: whole[n] for n in some}), files[-1])
    return files


RULES: dict[str, Rule] = {
    "evidence": EvidenceRule(),
    "odds": EvidenceRule(log_odds=-0.5),
    "capped": EvidenceRule(cap=0.1),
    "capped by delta_f": EvidenceRule(cap=0.2, salience=by_delta_f),
    "share": BudgetRule(0.3),
    "number": BudgetRule(100, by_magnitude),
    "all": BudgetRule(1.0),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [8, 64, 1 << 22])
def test_as_in_memory(whole: Posterior, rule: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ockham.choose.stored.posterior_pieces", lambda *a, **k: posterior_pieces(*a, size=size, **k))
    found = decide_files(parts(whole, tmp_path), RULES[rule])
    expected = RULES[rule].decide(evidence := score(whole))
    assert list(found) == list(whole)
    for name, mask in expected.items():
        assert torch.equal(found[name], mask), name
    assert found.kept == sum(int(m.sum()) for m in expected.values()) and found.size == whole.size()
    assert found.gain == pytest.approx(evidence.gain(expected), rel=1e-6, abs=1e-9)


def test_protected_stay_and_ties_go_first_come(tmp_path: Path) -> None:
    flat = Gaussian(
        torch.full((40,), 0.1), torch.full((40,), 3.0), torch.tensor(1.0), torch.tensor(0.0), torch.ones(40).bool()
    )
    whole = Posterior({"a": flat, "b": flat, "c": flat}, 10.0)
    save_posterior(whole, tmp_path / "p.safetensors")
    found = decide_files([tmp_path / "p.safetensors"], BudgetRule(0.5), protected=["a"])
    assert found["a"].all() and not found["b"].any() and int(found["c"].sum()) == 20 and not found["c"][:20].any()
    with pytest.raises(OckhamError, match="protected parameters alone hold 80"):
        decide_files([tmp_path / "p.safetensors"], BudgetRule(0.5), protected=["a", "b"])
    assert decide_files(tmp_path / "p.safetensors", BudgetRule(0.5), protected=["a", "b", "c"]).kept == 120


def test_float64_orders_beyond_single_precision(tmp_path: Path) -> None:
    """Numbers that are equal in single precision are told apart, and all eight digits of the key are used."""
    mean = 1 + torch.arange(64, dtype=torch.float64).flip(0) * 1e-12
    one = Gaussian(mean, torch.full_like(mean, 3.0), torch.tensor(1.0), torch.tensor(0.0), torch.ones(64).bool())
    save_posterior(Posterior({"w": one}, 10.0), tmp_path / "p.safetensors")
    found = decide_files([tmp_path / "p.safetensors"], BudgetRule(0.25, by_magnitude))
    assert torch.equal(found["w"], torch.arange(64) < 16)


def test_a_folder_a_generator_and_a_parameter_of_no_weights(whole: Posterior, tmp_path: Path) -> None:
    none = Gaussian(
        *(torch.zeros(0, 3) for _ in range(2)), torch.tensor(1.0), torch.tensor(0.0), torch.ones(0, 3).bool()
    )
    save_posterior(replace(whole, moments={**whole, "none": none}), tmp_path / POSTERIOR)
    found = decide_files(tmp_path, BudgetRule(0.3))
    expected = BudgetRule(0.3).decide(score(whole))
    assert found["none"].shape == (0, 3) and all(torch.equal(found[n], m) for n, m in expected.items())
    again = decide_files((p for p in [str(tmp_path / POSTERIOR)]), BudgetRule(0.3))
    assert again.kept == found.kept


def test_saved_masks(whole: Posterior, tmp_path: Path) -> None:
    found = decide_files(parts(whole, tmp_path), BudgetRule(0.3))
    found.save(tmp_path / "masks.safetensors")
    again = StoredMasks.load(tmp_path / "masks.safetensors")
    assert all(torch.equal(again[n], found[n]) for n in found) and len(again) == len(found) == 5
    assert (again.kept, again.size, again.gain) == (found.kept, found.size, found.gain)
    tree = read_tree(tmp_path / "masks.safetensors", kind="masks")
    write_tree(tmp_path / "wrong.safetensors", tree | {"kept": found.kept + 1}, kind="masks")
    with pytest.raises(ResultError, match="its masks are damaged"):
        StoredMasks.load(tmp_path / "wrong.safetensors")


def test_what_is_refused(whole: Posterior, tmp_path: Path) -> None:
    files = parts(whole, tmp_path)
    with pytest.raises(OckhamError, match="LearnedOddsRule may need whole tensors"):
        decide_files(files, LearnedOddsRule())
    with pytest.raises(OckhamError, match="got no file"):
        decide_files([])
    with pytest.raises(OckhamError, match="in none of the files: baas, rwos"):
        decide_files(files, protected=["rwos", "baas", "rows"])

    class Own(EvidenceRule):
        def decide(self, *_: object, **__: object) -> dict[str, Tensor]:
            return {}

    with pytest.raises(OckhamError, match="Own may need"):
        decide_files(files, Own())
    with pytest.raises(OckhamError, match="one is in two of the files"):
        decide_files([files[0], files[0]])
    save_posterior(Posterior({"other": whole["bias"]}, 5.0), tmp_path / "other.safetensors")
    with pytest.raises(OckhamError, match="different posteriors"):
        decide_files([files[0], tmp_path / "other.safetensors"])
    with pytest.raises(ResultError, match="no such file"):
        decide_files([tmp_path / "none.safetensors"])
    data = bytearray(files[0].read_bytes())
    data[-40] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(data)
    with pytest.raises(ResultError, match="SHA-256"):
        decide_files([tmp_path / "damaged.safetensors"])
    model = torch.nn.Linear(3, 2)
    batches = [(torch.randn(8, 3), torch.randint(2, (8,)))]
    save_posterior(ockham.laplace(model, batches, n_data=8), tmp_path / "correlated.safetensors")
    with pytest.raises(ResultError, match="weights of weight are correlated"):
        decide_files([tmp_path / "correlated.safetensors"])


@pytest.mark.parametrize("fault", ["few", "many", "bits", "negative"])
def test_files_that_lie(whole: Posterior, fault: str, tmp_path: Path) -> None:
    save_posterior(whole, tmp_path / "p.safetensors")
    tree = read_tree(tmp_path / "p.safetensors", kind="posterior")
    node = tree["moments"]["rows"]
    match fault:
        case "few":
            node["mean"], node["precision"] = node["mean"][:-1], node["precision"][:-1]
        case "many":
            node["mean"], node["precision"] = (torch.cat([node[k], node[k][:1]]) for k in ("mean", "precision"))
        case "bits":
            node["keep"] = node["keep"][:-1]
        case "negative":
            node["prior_precision"] = -node["prior_precision"]
    write_tree(tmp_path / "p.safetensors", tree, kind="posterior")
    with pytest.raises(ResultError, match="its posterior is damaged"):
        decide_files([tmp_path / "p.safetensors"])


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 4), (2, 3, 4)])
def test_parts_of_a_stored_tensor(shape: tuple[int, ...], tmp_path: Path) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    write_tree(tmp_path / "t.safetensors", {"a": values, "b": torch.arange(3)}, kind="some")
    found = read_tree(tmp_path / "t.safetensors", kind="some", stored=True)["a"]
    assert isinstance(found, StoredTensor) and found.shape == shape and found.numel() == values.numel()
    flat = values.reshape(-1)
    for start in range(len(flat) + 1):
        for stop in range(start, len(flat) + 1):
            assert torch.equal(found.flat(start, stop), flat[start:stop])
    assert torch.equal(torch.cat(list(found.parts(5))), flat)


def test_pieces_are_the_posterior(whole: Posterior, tmp_path: Path) -> None:
    save_posterior(whole, tmp_path / "p.safetensors")
    loaded = load_posterior(tmp_path / "p.safetensors")
    found = list(posterior_pieces(tmp_path / "p.safetensors", size=16))
    assert max(p.posterior.size() for p in found) == 16
    for name, g in loaded.items():
        mine = [p.posterior[name] for p in found if p.name == name]
        for what in ("precision", "keep", "scored_precision"):
            joined = torch.cat([getattr(p, what) for p in mine])
            assert torch.equal(joined, getattr(g, what).reshape(-1)), (name, what)
        for what in ("prior_precision", "prior_mean"):
            joined = torch.cat([getattr(p, what).expand(p.mean.shape) for p in mine])
            assert torch.equal(joined, getattr(g, what).expand(g.mean.shape).reshape(-1)), (name, what)
