"""The Trainer under a posterior: rounds, logs, checkpoints, refusals; its weights are draws in and means out."""

from __future__ import annotations

import warnings

import pytest
import torch

import ockham
from ockham.errors import OckhamError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ockham.errors.OckhamWarning"),
]


class Texts(torch.utils.data.Dataset):
    """Twelve tokens, two classes: does token 2 come more often than token 3?"""

    def __init__(self, n, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(2, 12, (n, 12), generator=g)
        self.labels = ((self.ids == 2).sum(1) > (self.ids == 3).sum(1)).long()

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def network():
    config = transformers.BertConfig(vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=32, max_position_embeddings=16, num_labels=2,
                                     hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config)


def trainer(tmp_path, callback, *, net=None, optimizer=None, **arguments):
    from ockham.integrations.transformers import EvidenceCallback

    net, data = net or network(), Texts(192)
    given = {"num_train_epochs": 4, "learning_rate": 3e-3, "logging_steps": 6, "save_strategy": "no"} | arguments
    settings = transformers.TrainingArguments(str(tmp_path), per_device_train_batch_size=32, report_to=[], seed=1,
                                              use_cpu=True, disable_tqdm=True, **given)  # fmt: skip
    optimizer = optimizer or ockham.MeanField(net.named_parameters(), n_data=len(data), lr=3e-3)
    callback = callback or EvidenceCallback(ockham.Rounds(start=0.4, end=0.8, count=3), ignore="classifier")
    return transformers.Trainer(net, settings, train_dataset=data, eval_dataset=Texts(64, 1),
                                optimizers=(optimizer, None), callbacks=[callback]), callback  # fmt: skip


def test_rounds_remove_for_good_and_tell_the_log(tmp_path):
    job, callback = trainer(tmp_path, None, save_strategy="steps", save_steps=20)
    seen = []

    class Look(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            weight = kwargs["model"].classifier.weight.detach()
            seen.append(weight.clone())  # after EvidenceCallback: a draw

        def on_step_end(self, args, state, control, **kwargs):
            seen.append(kwargs["model"].classifier.weight.detach().clone())

    job.add_callback(Look())
    job.train()
    assert float((seen[-2] - seen[-1]).abs().max()) > 1e-3  # draw and mean differ by the noise, more than by a step
    assert len(callback.history) == 3 and callback.posterior.likelihood == "classification"
    keep = callback.posterior
    for name, p in job.model.named_parameters():
        if name in keep:
            assert bool((p[~keep[name].keep] == 0).all()) and torch.equal(p.detach(), keep[name].mean), name
    assert 0 < keep.kept() < keep.size() and bool(keep["classifier.weight"].keep.all())
    lines = [line for line in job.state.log_history if "kept_share" in line and "removed" in line]
    assert [line["step"] for line in lines] == [r.epoch for r in callback.history]
    assert lines[-1]["kept_share"] == pytest.approx(keep.kept() / keep.size())
    saved = ockham.load_posterior(tmp_path / "posterior.safetensors")
    assert saved.kept() == keep.kept() and (tmp_path / "checkpoint-20" / "posterior.safetensors").exists()
    p = ockham.predict(job.model, saved, {"input_ids": Texts(8, 2).ids}, draws=3)
    assert p.probabilities.shape == (8, 2)


def test_accumulated_microbatches_share_one_draw(tmp_path):
    job, _ = trainer(tmp_path, None, gradient_accumulation_steps=3, num_train_epochs=1)
    draws = []
    job.model.classifier.register_forward_pre_hook(
        lambda module, args: draws.append(module.weight.detach().clone()) if module.training else None
    )
    job.train()
    assert len(draws) == 6
    assert torch.equal(draws[0], draws[2]) and torch.equal(draws[3], draws[5]) and not torch.equal(draws[2], draws[3])


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path):
    whole, one = trainer(tmp_path / "a", None, save_strategy="steps", save_steps=12)
    whole.train()
    again, two = trainer(tmp_path / "b", None, save_strategy="steps", save_steps=12)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-12"))
    assert [r.epoch for r in one.history] == [r.epoch for r in two.history]
    for (name, p), q in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert all(torch.equal(g.precision, two.posterior[n].precision) for n, g in one.posterior.items())


def test_other_posteriors_train_too(tmp_path):
    from ockham.integrations.transformers import EvidenceCallback

    for make in (ockham.IVON, ockham.SpikeSlab):
        net = network()
        optimizer = make([(n, p) for n, p in net.named_parameters() if p.requires_grad], n_data=192)
        rounds = EvidenceCallback(ockham.Rounds(start=0.5, end=1.0, count=2))
        job, callback = trainer(tmp_path, rounds, net=net, optimizer=optimizer, num_train_epochs=1)
        job.train()
        assert len(callback.history) == 2, make


def test_what_cannot_go_well_is_refused_before_the_first_step(tmp_path):
    from ockham.integrations.transformers import EvidenceCallback

    net = network()
    job, _ = trainer(tmp_path, None, net=net, optimizer=torch.optim.AdamW(net.parameters()))
    with pytest.raises(OckhamError, match=r"needs a variational optimizer such as ockham.MeanField.*AdamW"):
        job.train()
    job, _ = trainer(tmp_path, None, save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True)
    with pytest.raises(OckhamError, match="load_best_model_at_end"):
        job.train()
    job, _ = trainer(tmp_path, EvidenceCallback(ignore=["clasifier"]))
    with pytest.raises(OckhamError, match="did you mean 'classifier'"):
        job.train()


def test_structures_go_in_place_and_the_smaller_model_computes_the_same(tmp_path):
    from ockham.integrations.transformers import EvidenceCallback

    net = network()
    first, whole = net, network()
    rounds = ockham.Rounds(start=0.3, end=0.9, count=3)
    callback = EvidenceCallback(rounds, structures=ockham.Structures(price=ockham.FlatPrice(30.0), wait=0))
    job, _ = trainer(tmp_path, callback, net=net, num_train_epochs=2)
    job.train()
    assert job.model is first and sum(callback.plan.removed.values(), ())
    small = dict(net.named_parameters())
    assert sum(p.numel() for p in small.values()) < sum(p.numel() for p in whole.parameters())
    assert {n: tuple(p.shape) for n, p in small.items()} == {n: callback.plan.shape(n) for n in small}
    for name, g in callback.posterior.items():
        assert torch.equal(g.mean, small[name].detach()) and bool((g.mean[~g.keep] == 0).all())
    assert callback.history[-1].kept_share == pytest.approx(
        callback.posterior.kept() / sum(p.numel() for n, p in whole.named_parameters() if n in callback.posterior)
    )
    again, ids = ockham.shrink(network(), callback.plan), Texts(8, 2).ids
    again.load_state_dict(net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits)
    assert (tmp_path / "plan.json").exists()


def test_a_spread_that_is_still_the_start_is_said_before_the_first_round(tmp_path):
    for rate, told in ((1.0, True), (300.0, False)):
        net = network()
        optimizer = ockham.MeanField(net.named_parameters(), n_data=192, lr=3e-3, std_rate=rate, temperature=0.1)
        job, _ = trainer(tmp_path, None, net=net, optimizer=optimizer, num_train_epochs=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            job.train()
        found = [str(w.message) for w in caught if "the evidence judges the start" in str(w.message)]
        assert len(found) == told and all("initial_std=0.01 before the first round" in text for text in found)


def test_structures_may_meet_a_budget_in_weights_before_the_weights_do(tmp_path):
    from ockham.integrations.transformers import EvidenceCallback

    cheap = ockham.Structures(price=ockham.FlatPrice(1e9), cap=0.5, wait=0)
    callback = EvidenceCallback(ockham.Rounds(start=0.3, end=0.9, count=4), structures=cheap,
                                rule=ockham.BudgetRule(0.9), ignore="re:embed|classifier")  # fmt: skip
    job, _ = trainer(tmp_path, callback)
    job.train()
    assert len(callback.history) == 4 and [r.removed for r in callback.history][1:] == [0, 0, 0]


def test_small_data_at_temperature_one_are_warned_about(tmp_path):
    for temperature, told in ((1.0, True), (0.1, False)):
        net = network()
        optimizer = ockham.MeanField(net.named_parameters(), n_data=192, lr=3e-3, temperature=temperature)
        job, _ = trainer(tmp_path, None, net=net, optimizer=optimizer, num_train_epochs=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            job.train()
        found = [str(w.message) for w in caught if "may empty whole layers" in str(w.message)]
        assert bool(found) is told and all("temperature=0.1" in text for text in found)


def test_a_callback_begins_anew_and_knows_its_model(tmp_path):
    """A second run with the same callback has its own rounds; an optimizer of another network is refused at once."""
    from ockham.integrations.transformers import EvidenceCallback

    callback = EvidenceCallback(ockham.Rounds(start=0.4, end=0.8, count=2), ignore="classifier")
    kept = []
    for _ in range(2):
        run, _ = trainer(tmp_path, callback, num_train_epochs=2)
        run.train()
        kept.append((len(callback.history), callback.posterior.kept()))
    assert kept[0] == kept[1] and kept[0][0] == 2
    other = ockham.MeanField(network().named_parameters(), n_data=192)
    with pytest.raises(OckhamError, match="no parameter of the model that is trained"):
        trainer(tmp_path, None, optimizer=other)[0].train()


@pytest.mark.parametrize("given", [{"rule": "snr"}, {"rounds": 5}, {"structures": True}, {"rule": ockham.BudgetRule}])
def test_settings_of_another_type_are_refused_where_they_are_given(given):
    from ockham.integrations.transformers import EvidenceCallback

    with pytest.raises(OckhamError, match=f"{next(iter(given))} must be such as ockham"):
        EvidenceCallback(**given)
