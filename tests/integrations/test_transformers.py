"""The Hugging Face Trainer callback: what it sees is what a plain loop does, and it changes nothing."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import streamlens as sl
from tests._runs import same
from tests.helpers.by_hand import HandStep, gradients, norms, update_by_hand
from tests.helpers.recording import assert_steps_equal, numbers, points
from tests.integrations.recorder import RESUMED, TOPICS, Recorder

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from streamlens.integrations.transformers import StreamlensCallback

EXAMPLES, UPDATES = 16, 4
"""Examples in an epoch, and updates in it: two micro-steps of two examples each."""


class Sequences(Dataset[dict[str, Tensor]]):
    """Random tokens, to be predicted or classified."""

    def __init__(self, count: int = EXAMPLES, *, classify: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, 11, (count, 6), generator=generator)
        self.labels = torch.randint(0, 3, (count,), generator=generator) if classify else self.tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def language_model(dropout: float = 0.0) -> nn.Module:
    set_seed(0)
    rates: dict[str, Any] = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    sizes: dict[str, Any] = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, **rates, bos_token_id=0, eos_token_id=0))


def classifier() -> nn.Module:
    set_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 11,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_labels": 3,
    }
    sizes |= {"intermediate_size": 8, "max_position_embeddings": 8, "num_labels": 3}
    config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(config)


def train(
    model: nn.Module,
    out: Path,
    callbacks: list[Any],
    *,
    resume: str | bool | None = None,
    data: Dataset[dict[str, Tensor]] | None = None,
    **options: Any,
) -> Trainer:
    """Train with everything off that is not under test."""
    arguments = TrainingArguments(
        **{
            "output_dir": str(out),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "logging_strategy": "no",
            **options,
        }
    )
    data = data or Sequences()
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def calls_of_a_run(model: nn.Module, out: Path, **options: Any) -> list[Mapping[str, Any]]:
    """What the Trainer itself calls a model with in training: batches, and what it normalises by."""
    calls: list[Mapping[str, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if module.training:
            calls.append(dict(kwargs))

    model.register_forward_pre_hook(note, with_kwargs=True)
    train(model, out, [], **options)
    return calls


def by_hand(
    model: nn.Module, calls: list[Mapping[str, Any]], clip: float
) -> tuple[list[HandStep], list[dict[str, Tensor]]]:
    """The plain loop over the same calls, two an update; and the gradients before they are clipped."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    steps: list[HandStep] = []
    raw: list[dict[str, Tensor]] = []
    model.train()
    losses: list[float] = []
    for i, call in enumerate(calls):
        loss = model(**call).loss
        losses.append(loss.item())
        (loss if call.get("num_items_in_batch") is not None else loss / 2).backward()
        raw.append(gradients(model))
        if i % 2:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            steps.append(update_by_hand(model, optimizer, losses))
            model.zero_grad()
            losses = []
    return steps, raw


@pytest.mark.parametrize(("make", "classify"), [(language_model, False), (classifier, True)])
def test_the_values_are_those_of_a_plain_loop(make: Any, classify: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_grad_norm": 0.1, "data": Sequences(classify=classify)}
    calls = calls_of_a_run(make(), tmp_path, **options)
    steps, raw = by_hand(make(), calls, clip=0.1)
    seen = Recorder(**{t: sl.topic(t) for t in TOPICS}, labels=sl.topic("input_labels"))
    seen.chains["norms"] = sl.norm("parameter_updates")
    train(make(), tmp_path, [StreamlensCallback(seen, on_error="raise")], **options)
    assert_steps_equal(seen["parameters"], [s.after for s in steps])
    assert_steps_equal(seen["parameter_gradients"], [s.gradients for s in steps])
    assert_steps_equal(seen["parameter_updates"], [s.updates() for s in steps])
    assert_steps_equal(seen["norms"], [norms(s.updates()) for s in steps], rtol=1e-5)
    passes = [(k, m) for k in range(2 * UPDATES) for m in range(2)]
    assert_steps_equal(seen["raw_gradients"], raw, steps=[k for k, _ in passes])
    assert points(seen["raw_gradients"]) == points(seen["loss"]) == passes
    assert numbers(seen["loss"]) == [loss for s in steps for loss in s.losses]
    assert all(torch.equal(f[""], c["labels"]) for f, c in zip(seen["labels"], calls, strict=True))


def test_training_is_bit_identical_with_the_callback_and_without(tmp_path: Path) -> None:
    def outcome(callbacks: list[Any]) -> dict[str, Any]:
        model = language_model(dropout=0.3)
        options: dict[str, Any] = {
            "eval_strategy": "steps",
            "eval_steps": 3,
            "logging_strategy": "steps",
            "logging_steps": 1,
        }
        trainer = train(model, tmp_path, callbacks, **options)
        assert trainer.optimizer is not None
        timeless = [
            {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
            for entry in trainer.state.log_history
        ]
        return {
            "model": model.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "log": timeless,
            "random": (torch.get_rng_state(), np.random.get_state(), random.getstate()),  # noqa: NPY002
        }

    topics = (*TOPICS, "activations", "layer_gradients", "input_data", "network_output", "learning_rate")
    everything = Recorder(**{t: sl.topic(t) for t in topics}, smoothed=(sl.uw_ratio(), sl.ema(0.9)))
    assert same(outcome([StreamlensCallback(everything)]), outcome([]))
    assert all(everything.frames.values())


def test_evaluation_emits_nothing_and_epochs_are_told(tmp_path: Path) -> None:
    seen = Recorder(
        passes=sl.norm("activations"),
        started=sl.topic("epoch_started"),
        finished=sl.topic("epoch_finished"),
        weights=sl.norm("weights"),
    )
    callback = StreamlensCallback(seen, on_error="raise", count="grad")
    train(language_model(), tmp_path, [callback], eval_strategy="steps", eval_steps=2)
    assert points(seen["passes"]) == [(k, m) for k in range(2 * UPDATES) for m in range(2)]
    assert numbers(seen["started"]) == numbers(seen["finished"]) == [0, 1]
    assert [f.epoch for f in seen["weights"]] == [0] * UPDATES + [1] * UPDATES


class Bookmark(TrainerCallback):
    """Notes how much had been seen when a checkpoint was written."""

    def __init__(self, seen: Recorder) -> None:
        self.seen = seen
        self.at: dict[int, dict[str, int]] = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at[state.global_step] = {name: len(frames) for name, frames in self.seen.frames.items()}


@pytest.mark.parametrize(("at", "strategy"), [(3, "steps"), (4, "steps"), (5, "steps"), (4, "epoch")])
def test_interrupted_and_resumed_is_uninterrupted(at: int, strategy: str, tmp_path: Path) -> None:
    """In mid-epoch, and in an epoch's last step before its end is announced and after."""
    options: dict[str, Any] = {"save_strategy": strategy, "save_steps": at, "num_train_epochs": 3}

    def run(seen: Recorder, resume: str | None) -> tuple[Bookmark, dict[str, Tensor]]:
        bookmark, model = Bookmark(seen), language_model(dropout=0.2)
        callbacks = [StreamlensCallback(seen, on_error="raise"), bookmark]
        train(model, tmp_path, callbacks, resume=resume, **options)
        return bookmark, model.state_dict()

    whole, rest = Recorder(**RESUMED), Recorder(**RESUMED)
    bookmark, parameters = run(whole, None)
    assert bookmark.at[at]["ratio"] == at
    _, resumed = run(rest, str(tmp_path / f"checkpoint-{at}"))
    assert same(resumed, parameters)
    assert rest.rows() == {name: rows[bookmark.at[at][name] :] for name, rows in whole.rows().items()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of a run of one epoch, in its third step."""
    callback = StreamlensCallback(lambda lens: lens.pipe(sl.norm("weights"), sl.ema(0.5)).subscribe(print))
    train(language_model(), tmp_path / "first", [callback], save_strategy="steps", save_steps=3)
    return tmp_path / "first" / "checkpoint-3"


def resumed_steps(callback_options: dict[str, Any], checkpoint: Path, out: Path) -> list[int]:
    """The steps that a resumed run counts."""
    seen = Recorder(ratio=sl.uw_ratio())
    callback = StreamlensCallback(seen, on_error="raise", **callback_options)
    train(language_model(), out, [callback], resume=str(checkpoint))
    return [f.step for f in seen["ratio"]]


def test_a_checkpoint_elsewhere_is_named_to_the_callback(checkpoint: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"resume_from_checkpoint": checkpoint}
    assert resumed_steps(options, checkpoint, tmp_path / "second") == [3, 4, 5, 6, 7]


def test_a_checkpoint_that_is_not_found_is_said_so(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "streamlens"):
        assert resumed_steps({}, checkpoint, tmp_path / "second") == [0, 1, 2, 3, 4]
    assert "resume_from_checkpoint=" in caplog.text


def test_the_state_of_another_run_is_not_taken(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the output folder is a checkpoint of the same step, from a run with another history."""
    other = tmp_path / "second" / "checkpoint-3"
    shutil.copytree(checkpoint, other)
    state = (other / "trainer_state.json").read_text()
    changed = state.replace('"log_history": []', '"log_history": [{"loss": 1.0, "step": 1}]')
    assert changed != state
    (other / "trainer_state.json").write_text(changed)
    assert resumed_steps({}, checkpoint, tmp_path / "second") == [0, 1, 2, 3, 4]
    assert resumed_steps({}, other, tmp_path / "second") == [3, 4, 5, 6, 7]


def test_a_named_checkpoint_without_a_state_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "streamlens.pt").unlink()
    with pytest.raises(sl.StreamlensError, match=r"checkpoint-3.*no streamlens\.pt.*leave the option out"):
        resumed_steps({"resume_from_checkpoint": checkpoint}, checkpoint, tmp_path / "second")


def test_a_state_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    seen = Recorder(weights=sl.norm("weights"))
    train(language_model(), tmp_path, [StreamlensCallback(seen)], save_strategy="steps", save_steps=3)
    assert len(seen["weights"]) == 2 * UPDATES
    assert "no space left" in caplog.text


def test_the_lens_closes_at_the_end_and_leaves_no_hook(tmp_path: Path) -> None:
    model = language_model()
    table = sl.sinks.Table()
    callback = StreamlensCallback(lambda lens: lens.pipe(sl.norm("weights")).subscribe(table))
    train(model, tmp_path, [callback])
    assert callback.lens.closed
    assert set(table.dataframe["step"]) == set(range(2 * UPDATES))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_after_an_exception_close_writes_what_was_seen(tmp_path: Path) -> None:
    class Failure(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise RuntimeError("the loop fails here")

    table = sl.sinks.Table()
    callback = StreamlensCallback(lambda lens: lens.pipe(sl.norm("weights")).subscribe(table))
    model = language_model()  # with the model the lens would go too
    with pytest.raises(RuntimeError, match="the loop fails here"):
        train(model, tmp_path, [callback, Failure()])
    assert set(table.dataframe["step"]) <= {0, 1}
    callback.close()
    assert callback.lens.closed
    assert set(table.dataframe["step"]) == {0, 1}
    callback.close()


def test_a_chain_that_cannot_be_made_stops_the_run_before_it_begins(tmp_path: Path) -> None:
    model = language_model()
    with pytest.raises(sl.UnknownTopicError, match="did you mean 'weights'"):
        train(model, tmp_path, [StreamlensCallback(lambda lens: lens.pipe(sl.norm("weigths")))])
    assert same(model.state_dict(), language_model().state_dict())
    assert not model._forward_hooks


def test_a_stop_ends_training_after_its_step(tmp_path: Path) -> None:
    def chains(lens: sl.Lens) -> None:
        lens.pipe(sl.loss()).subscribe(sl.control.Stop(patience=0, threshold=1e6, threshold_mode="abs"))

    trainer = train(language_model(), tmp_path, [StreamlensCallback(chains, on_error="raise")])
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("event", ["on_epoch_end", "on_evaluate"])
def test_a_reason_between_two_epochs_ends_training_there(event: str, tmp_path: Path) -> None:
    class Validate(TrainerCallback):
        """Says the same at the end of every epoch."""

    def told(self: TrainerCallback, *args: Any, **kwargs: Any) -> None:
        callback.lens.emit("validation_loss", 1.0)

    def chains(lens: sl.Lens) -> None:
        lens.pipe(sl.topic("validation_loss")).subscribe(sl.control.Stop(patience=0))

    setattr(Validate, event, told)
    callback = StreamlensCallback(chains, on_error="raise", emits=["validation_loss"])
    options: dict[str, Any] = {"num_train_epochs": 5, "eval_strategy": "epoch"}
    trainer = train(language_model(), tmp_path, [Validate(), callback], **options)
    assert trainer.state.global_step == 2 * UPDATES
