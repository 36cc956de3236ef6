"""`prune`: a trained network reduced block by block, given as a module or as a folder with text."""

from __future__ import annotations

import math
import resource
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ockham.core.files import write_bytes, write_json
from ockham.core.likelihood import Likelihood
from ockham.core.network import PruneProgress, copied, listening, map_parameters_
from ockham.core.posterior import POSTERIOR, Posterior
from ockham.errors import DataError, OckhamError
from ockham.methods.blocks.cases import answer_tensor, cases_from, dividing, evaluating_blocks, team
from ockham.methods.blocks.job import JOBS, BlockJob, PruneSettings, Removal
from ockham.methods.blocks.solve import Damping, NofM
from ockham.methods.blocks.stop import DampingTrial, MatrixEvidence, Shot, matrix_kind
from ockham.report.page import reduction_page
from ockham.run.folder import ResultFolder, loading_lines, save_pretrained
from ockham.run.weights import huggingface_model
from ockham.surgery import Plan
from ockham.surgery.copies import named_tensors
from ockham.surgery.costs import latencies

__all__ = ["BlockEvidence", "Pruned", "prune", "prune_folder", "read_calibration", "token_measures", "token_windows"]


_STRUCTURES = ("auto", "even", "uneven", "depth")
_TARGETS = ("keep_share", "pattern", "structure", "budget")


class BlockEvidence(Mapping[str, float]):
    """Change of the log evidence in nats, by matrix; positive where the data prefer what is left.

    Attributes:
        matrices: key of a matrix to what was removed from it.
    """

    def __init__(self, matrices: Mapping[str, MatrixEvidence]) -> None:
        self.matrices = dict(matrices)

    def __getitem__(self, key: str) -> float:
        return self.matrices[key].nats

    def __iter__(self) -> Iterator[str]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)

    @property
    def blocks(self) -> dict[str, float]:
        """Sum over the matrices of each block, nats."""
        found: dict[str, float] = {}
        for m in self.matrices.values():
            found[m.block] = found.get(m.block, 0.0) + m.nats
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Pruned:
    """A reduced network with what is known about it.

    Attributes:
        model: the new network, of the original's class.
        plan: units that were taken out for good; empty where only weights went.
        evidence: change of the log evidence, nats, by matrix and by block.
        keep_share: share that is left of the weights in the matrices that lost any, or of all in the blocks where whole
            blocks went (where single weights went as well: of what was then left).
        shares: key of a matrix to the share of its weights that is left.
        likelihood: name of what the loss was.
        damping: kind of matrix to how far its factors were trusted.
        trials: settings that were tried for it on data held out.
        shots: networks that were judged, where the evidence decided how far to go.
        before: mean NLL of the original on a quarter of the calibration data, nats per term; None without targets.
        after: the same of the new network. Data that a network was calibrated on flatter it a little.
        seconds: time it took.
        untouched: matrices of the blocks from which nothing could go, since no calibration data reach them.
        posterior: Gaussian of the weights that stay in the blocks' matrices, where `PruneSettings.posterior` asks.
        reconstruct: epochs for which blocks were trained after their reduction, which the evidence knows nothing of.
    """

    model: nn.Module
    plan: Plan
    evidence: BlockEvidence
    keep_share: float
    shares: Mapping[str, float]
    likelihood: str
    damping: Mapping[str, Damping] = field(default_factory=dict)
    trials: Sequence[DampingTrial] = ()
    shots: Sequence[Shot] = ()
    before: float | None = None
    after: float | None = None
    seconds: float = 0.0
    untouched: tuple[str, ...] = ()
    posterior: Posterior | None = None
    reconstruct: int = 0

    def facts(self) -> dict[str, Any]:
        """Everything but the network, as plain values for JSON."""
        kinds: dict[str, list[float]] = {}
        for key, share in self.shares.items():
            kinds.setdefault(matrix_kind(key), []).append(share)
        left: dict[str, list[float]] = {}  # weights kept and weights, by block
        for m in self.evidence.matrices.values():
            kept, size = left.get(m.block, [0.0, 0.0])
            left[m.block] = [kept + m.kept * m.size, size + m.size]
        return {
            "keep_share": self.keep_share,
            "likelihood": self.likelihood,
            "nll_before": self.before,
            "nll_after": self.after,
            "seconds": self.seconds,
            "evidence": {"matrices": dict(self.evidence), "blocks": self.evidence.blocks},
            "shares": {
                "matrices": dict(self.shares),
                "kinds": {k: sum(v) / len(v) for k, v in kinds.items()},
                "blocks": {k: kept / size for k, (kept, size) in left.items()},
            },
            "damping": {k: asdict(d) for k, d in self.damping.items()},
            "shots": [asdict(s) | {"nats": s.nats, "certainty": s.certainty} for s in self.shots],
            "units": {k: [w, w - len(self.plan.removed.get(k, ()))] for k, w in self.plan.widths.items()},
            "dropped": [b.id for b in self.plan.dropped],
            "untouched": list(self.untouched),
            "reconstruct": self.reconstruct,
        }

    def report(self, path: str | Path) -> Path:
        """Write one HTML file about the reduction; it needs no network and holds no scripts."""
        write_bytes(Path(path), reduction_page(self.facts()).encode())
        return Path(path)

    def save(self, folder: str | Path) -> Path:
        """Write a folder: a transformers model as its own class writes it, any other as `ockham.save_pretrained` does.

        ``plan.json``, ``prune.json`` and, where there is one, the posterior lie beside the weights. Where layers have
        become unlike each other no configuration of transformers describes them: load the original and
        ``ockham.shrink`` it by the plan, then load the weights; ``structure="uneven"`` does that.
        """
        path = Path(folder)
        own = getattr(self.model, "save_pretrained", None)
        if callable(own):
            own(str(path))
            write_bytes(path / "plan.json", self.plan.to_json().encode())
        else:
            save_pretrained(self.model, path, plan=self.plan)
        write_json(path / "prune.json", self.facts())
        if self.posterior is not None:
            self.posterior.save(path / POSTERIOR)
        return path


def prune(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    keep_share: float | None = None,
    pattern: str | None = None,
    structure: str | None = None,
    budget: Mapping[str, Any] | None = None,
    likelihood: str | Likelihood = "auto",
    batch: Callable[[Any], Any] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    progress: Callable[[PruneProgress], None] | None = None,
    settings: PruneSettings | None = None,
) -> Pruned:
    """Take weights or whole units out of a trained network, block by block, and let those that stay make good for it.

    One backward pass over the calibration data gives each weight matrix of the network's blocks its Kronecker
    curvature. It says what every weight is worth in nats of the loss, so one threshold over all matrices decides how
    much of each goes. Then the blocks are reduced one after the other, on what the reduced blocks before them make of
    the data: weights go in rounds, and the survivors move to where the loss rises least. Matrices outside of the
    blocks (embeddings, heads) stay as they are; a network without a list of like blocks counts as one block.

    With no target at all the evidence decides: the smallest network that calibration data held out still prefer to
    the dense one (`ockham.methods.blocks.stop`).

    Args:
        model: trained network. It is not changed.
        calibration: batches: tensors, (inputs, targets), or mappings of inputs with or without "labels"; a bare tensor
            is one batch. Some thousand tokens or a few hundred images.
        keep_share: share of the blocks' weights that stays, in (0, 1].
        pattern: "2:4", or another n:m along the inputs of each matrix, instead of a share.
        structure: whole units (neurons of MLPs, groups of heads, channels) go until the budget is met. "uneven" takes
            them where they cost least; "even" takes equally many from like layers, so that one configuration describes
            them; "auto" is "even" for transformers models, whose folders would not load otherwise; "depth" takes whole
            blocks (without a configuration, residual branches). With a share or pattern as well, weights go from what
            the units left.
        budget: ``{"params": "80%"}``, ``{"macs": "70%"}`` or ``{"latency": seconds}``, of the whole network.
        likelihood: "auto" (next tokens of a causal language model, else by the targets; without targets the network's
            own predictive), "next-token" or "causal-lm", "classification", "regression", "own", or a `Likelihood`.
        batch: function from an item of the calibration data to inputs, (inputs, targets) or an `ockham.Batch`.
        output: function from what the network returns to one tensor.
        progress: function called with a `PruneProgress` as it goes.
        settings: the finer ones.

    Returns:
        `Pruned`, with the new network as ``.model``.

    Raises:
        DataError: calibration data that are empty or do not fit the network.
        OckhamError: arguments that contradict each other or lie outside of their range; a budget that cannot be met.

    >>> import torch
    >>> net = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)], nn.Linear(8, 3))
    >>> data = [(torch.randn(64, 8), torch.randint(0, 3, (64,)))]
    >>> small = prune(net, data, keep_share=0.5).model
    """
    _check(keep_share, pattern, structure, budget)
    job = BlockJob(calibration, likelihood, batch, output, settings or PruneSettings())
    with listening(progress), dividing(job.settings.divided):
        return _pruned(model, copied(model), job, (keep_share, pattern, structure, budget))


def _pruned(model: nn.Module, small: nn.Module, job: BlockJob, target: tuple[Any, ...]) -> Pruned:
    """What a job makes of a network; ``small`` is changed: a copy of the network, or itself where it may go."""
    keep_share, pattern, structure, budget = target
    if job.settings.passes > 1 and keep_share is None:
        raise OckhamError(
            f"PruneSettings(passes={job.settings.passes}) reaches a share of weights in steps: pass keep_share, or "
            "leave passes out"
        )
    began, before = time.perf_counter(), job.mean_loss(model)
    plan = Plan({}, {}, {}, {n: tuple(t.shape) for n, t in named_tensors(model).items()})
    units: dict[str, MatrixEvidence] = {}
    if structure is not None and budget is not None:
        described = callable(getattr(getattr(model, "config", None), "to_dict", None))
        uniform = structure == "even" or (structure in ("auto", "depth") and described)
        small, plan, units = job.without_units(small, budget, uniform=uniform, depth=structure == "depth")
    if keep_share is not None or pattern is not None or structure is None:
        done = job.without_weights(small, NofM.parse(pattern) if pattern is not None else keep_share)
    else:
        done = Removal(units, {}, {}, (), (), ())
    size = sum(e.size for e in done.evidence.values())
    return Pruned(
        small,
        plan,
        BlockEvidence(done.evidence),
        sum(e.kept * e.size for e in done.evidence.values()) / size if size else 1.0,
        {k: e.kept for k, e in done.evidence.items()},
        job.likelihood,
        done.damping,
        done.trials,
        done.shots,
        before,
        job.mean_loss(small),
        time.perf_counter() - began,
        done.untouched,
        job.posterior,
        job.settings.reconstruct,
    )


def _check(
    keep_share: float | None, pattern: str | None, structure: str | None, budget: Mapping[str, Any] | None
) -> None:
    if keep_share is not None and not 0 < keep_share <= 1:
        raise OckhamError(f"keep_share is the share of the blocks' weights that stays, in (0, 1]; got {keep_share}")
    if keep_share is not None and pattern is not None:
        raise OckhamError(
            f"a pattern says what share stays: pass keep_share={keep_share} or pattern={pattern!r}, not both"
        )
    if structure is not None and structure not in _STRUCTURES:
        raise OckhamError(f"structure must be one of {', '.join(map(repr, _STRUCTURES))}; got {structure!r}")
    if (structure is None) != (budget is None):
        raise OckhamError(
            "structure and budget go together, as in structure='auto', budget={'params': '80%'}; got "
            f"structure={structure!r}, budget={budget!r}. For single weights pass keep_share"
        )


_WINDOW = 512
_BINS = 15
_CALIBRATION, _JUDGING = 32, 8


def read_calibration(path: str | Path) -> str:
    """A text file, or all ``*.txt`` files of a folder one after the other, in the order of their names.

    Raises:
        DataError: there is no such file, or no text in it.
    """
    place = Path(path)
    files = sorted(place.rglob("*.txt")) if place.is_dir() else [place]
    try:
        text = "\n\n".join(f.read_text(encoding="utf-8") for f in files)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read text from {place}: {error}. Pass a UTF-8 text file or a folder of .txt files"
        ) from error
    if not text.strip():
        raise DataError(f"{place} holds no text: pass a UTF-8 text file or a folder with .txt files")
    return text


def token_windows(ids: Tensor, *, length: int, count: int, seed: int = 0) -> Tensor:
    """Some of the windows that text falls into, drawn without repetition, ``[count, length]`` or fewer.

    Args:
        ids: tokens of the text, ``[tokens]``.
        length: tokens of a window.
        count: windows wanted.
        seed: seed of the draw.

    Raises:
        DataError: the text is shorter than two windows.
    """
    whole = len(ids) // length
    if whole < 2:
        raise DataError(f"the text has {len(ids)} tokens, less than two windows of {length}: pass more text")
    chosen = torch.randperm(whole, generator=torch.Generator().manual_seed(seed))[:count]
    return ids[: whole * length].view(whole, length)[chosen]


@torch.no_grad()
def token_measures(model: nn.Module, windows: Tensor) -> dict[str, float]:
    """How well each token is foreseen from those before it in its window.

    Args:
        model: causal language model; left as it is.
        windows: token ids ``[windows, length]``.

    Returns:
        ``nll`` (nats a token), ``perplexity`` (its exp), ``accuracy`` and ``ece`` (of the likeliest token, 15 bins).
    """
    nll, chance, hit = [], [], []
    with evaluating_blocks(model) as device:
        for case in cases_from(windows, None, model, device):
            logits = case.answer(model, answer_tensor)[:, :-1].flatten(0, 1).float()
            target = case.args[0][:, 1:].flatten()
            log_p = logits.log_softmax(-1)
            best = log_p.max(-1)
            nll.append(-log_p.gather(1, target[:, None]).squeeze(1).double())
            chance.append(best.values.exp().double())
            hit.append((best.indices == target).double())
    p, right = torch.cat(chance), torch.cat(hit)
    bins = (p * _BINS).long().clamp(0, _BINS - 1)
    gaps = torch.zeros(_BINS, dtype=torch.float64, device=p.device).index_add_(0, bins, p - right)
    mean = float(torch.cat(nll).mean())
    ece = float(gaps.abs().sum()) / len(p)
    return {"nll": mean, "perplexity": math.exp(mean), "accuracy": float(right.mean()), "ece": ece}


def prune_folder(
    source: str | Path,
    text: str | Path,
    out: str | Path,
    *,
    target: Mapping[str, Any] | None = None,
    windows: tuple[int, int] = (_CALIBRATION, _WINDOW),
    progress: Callable[[PruneProgress], None] | None = None,
    settings: PruneSettings | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Reduce the model in a transformers folder on a text, and write a folder that loads as it did.

    A language model is judged by how it foresees a part of the text that it was not calibrated on; a text encoder by
    how close what it says of that part stays to what the dense one says.

    Args:
        source: folder of the model with its tokenizer.
        text: calibration text, a file or a folder of .txt files.
        out: folder to write: the model, its tokenizer, ``posterior.safetensors`` (of the weights that stay),
            ``metrics.json``, ``report.html``, ``plan.json``, ``prune.json``, sealed. Work is in ``out/work`` until the
            end, and the same call after a stop goes on there, at the last block that was done.
        target: arguments of `prune` that say how far to go, such as ``{"keep_share": 0.5}``; none lets the evidence
            decide.
        windows: number of calibration windows, and tokens in each.
        progress: function called with a `PruneProgress`.
        settings: the finer ones; its ``folder`` is ``out/work`` unless it is given.
        overwrite: whether a finished result in ``out`` may be replaced; other work in ``out/work`` is dropped then.

    Returns:
        What ``metrics.json`` holds: ``before`` and ``after`` with ``nll`` (nats a token), ``perplexity``,
        ``accuracy``, ``ece`` (encoders: ``cosine`` to the dense answers), ``parameters``, ``nonzero``,
        ``latency_seconds`` (a window); ``kept``, ``seconds``, ``peak_bytes``, ``calibration_tokens``.

    Raises:
        OckhamError: transformers is missing, the folder holds no model that reads text, arguments contradict each
            other, ``out`` holds a finished result, or another process writes there.
        DataError: the text is missing or too short.
    """
    began, path, target = time.perf_counter(), Path(out), dict(target or {})
    _check(*(target.get(k) for k in _TARGETS))
    if path.resolve() == Path(source).resolve():
        raise OckhamError(f"{out} holds the model itself: pass another folder for the result")
    settings = settings or PruneSettings()
    model, tokenizer, stored = _loaded(Path(source))
    every = _text_windows(model, tokenizer, read_calibration(text), windows, settings.seed)
    judges = max(1, min(_JUDGING, len(every) // 5))
    with dividing(settings.divided), ExitStack() as held:
        processes, folder, work = team(), None, path / "work"
        with processes.together():
            if processes.rank == 0:
                folder = held.enter_context(ResultFolder(path, overwrite=overwrite))
                if overwrite:
                    _cleared(work)
        settings = replace(settings, folder=settings.folder or work, posterior=folder is not None)
        with processes.together():
            map_parameters_(model, work, torch.float32)
        job = BlockJob(every[judges:], "auto", None, None, settings)
        with listening(progress if processes.rank == 0 else None):
            # in place, since two copies beside the factors are one too many; the folder has the dense one
            found = _pruned(model, model, job, tuple(target.get(k) for k in _TARGETS))
        job.posterior = None
        with processes.together():
            metrics: dict[str, Any] = {}
            if folder is not None:
                _save(found, folder, (path, work), tokenizer, stored)
                found = replace(found, posterior=None)
                sides = _compared(Path(source), found, every[:judges], work)
                metrics = sides | {
                    "kept": found.keep_share,
                    "judged_on": f"{judges} windows of the text that took no part in the calibration",
                    "seconds": time.perf_counter() - began,
                    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                    "calibration_tokens": int(every[judges:].numel()),
                }
                lines = "\n".join(loading_lines(found.model, found.plan)).replace('"."', repr(str(path)))
                page = reduction_page(found.facts() | {"text": metrics, "load": lines})
                write_bytes(folder.path("report.html"), page.encode())
                write_json(folder.path("metrics.json"), metrics)
                folder.commit()
        if folder is not None:
            _cleared(work)
    return metrics


def _save(found: Pruned, folder: ResultFolder, places: tuple[Path, Path], tokenizer: Any, stored: torch.dtype) -> None:
    """The network as it was stored, its tokenizer and posterior; the numbers are those of the files from here on."""
    if stored is not torch.float32:
        map_parameters_(found.model, places[1], stored)
    found.save(folder.stage)
    tokenizer.save_pretrained(str(folder.stage))
    parts = [p for p in folder.stage.iterdir() if p.is_dir()]  # templates beside a tokenizer; a seal has files only
    for part in parts:
        shutil.copytree(part, places[0] / part.name, dirs_exist_ok=True)
        shutil.rmtree(part)


def _compared(source: Path, found: Pruned, windows: Tensor, work: Path) -> dict[str, Any]:
    """Measures of the dense and the reduced network, and how large and fast they are."""
    model, _, _ = _loaded(source)
    for network in (model, found.model):
        map_parameters_(network, work, torch.float32)
    times = latencies([model, found.model], windows[:1], repeats=3, warmup=1)
    sides = _measured(model, found, windows)
    for side, network, seconds in zip(sides.values(), (model, found.model), times, strict=True):
        parameters = list(network.parameters())
        side |= {"parameters": sum(p.numel() for p in parameters), "latency_seconds": seconds}
        side["nonzero"] = sum(int(p.count_nonzero()) for p in parameters)
    return dict(sides)


def _loaded(source: Path) -> tuple[Any, Any, torch.dtype]:
    """The model as it is stored, its tokenizer, and the dtype of its files."""
    if not (source / "config.json").is_file():
        raise OckhamError(f"{source} is no model folder: it has no config.json. Pass a folder of save_pretrained")
    model: Any = huggingface_model(source, max_bytes=math.inf)  # the files are mapped
    if getattr(model.config, "is_encoder_decoder", False):
        raise OckhamError(
            f"{source} holds an encoder-decoder ({type(model).__name__}), which needs pairs of texts, not one: call "
            "ockham.prune with batches of input_ids and labels"
        )
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    except Exception as error:  # missing or damaged files make tokenizers raise a dozen kinds
        raise OckhamError(
            f"{source}: its tokenizer cannot be read ({error}). Save it beside the model by tokenizer.save_pretrained"
        ) from error
    if getattr(model, "is_quantized", False):
        raise OckhamError(f"{source} holds a quantized model: pass the folder of the weights before that")
    stored = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return model, tokenizer, stored


def _text_windows(model: Any, tokenizer: Any, text: str, windows: tuple[int, int], seed: int) -> Tensor:
    """Windows of the text: some to judge on, then those to calibrate on; shorter where the text or the model is."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    if not len(ids):
        raise DataError("the folder's tokenizer makes no tokens of the text: save the model's own tokenizer beside it")
    words = getattr(model.config, "vocab_size", None) or model.get_input_embeddings().num_embeddings
    if len(ids) and int(ids.max()) >= words:
        raise DataError(f"the tokenizer gives the token {int(ids.max())}, and the model knows {words}: not its own")
    count, length = windows
    length = min(length, int(getattr(model.config, "max_position_embeddings", length) or length), len(ids) // 8)
    return token_windows(ids, length=max(2, length), count=count + max(1, min(_JUDGING, count // 4)), seed=seed)


@torch.no_grad()
def _measured(model: Any, found: Pruned, windows: Tensor) -> dict[str, dict[str, float]]:
    """Dense and reduced network on the windows that judge."""
    if found.likelihood == "next-token":
        return {"before": token_measures(model, windows), "after": token_measures(found.model, windows)}
    answers = []
    for network in (model, found.model):
        with evaluating_blocks(network) as device:
            cases = cases_from(windows, None, network, device)
            answers.append(torch.cat([case.answer(network, answer_tensor).flatten(0, 1).double() for case in cases]))
    close = float(torch.cosine_similarity(answers[0], answers[1], dim=-1).mean())
    return {"before": {"cosine": 1.0}, "after": {"cosine": close}}


def _cleared(folder: Path) -> None:
    """Work that is done with: the folders that a reduction made, of every process; nothing else."""
    for place in (*folder.glob("process-*"), folder):
        for name in JOBS:
            if (place / name / "job.json").exists():
                shutil.rmtree(place / name)
        with suppress(OSError):
            place.rmdir()
