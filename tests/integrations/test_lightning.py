"""The Lightning callback: what it sees is what a plain loop does, and it changes nothing."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset

import streamlens as sl
from tests._runs import same
from tests.helpers.by_hand import Batch, HandStep, gradients, regression, update_by_hand
from tests.helpers.recording import assert_steps_equal, layer_sets, numbers, points
from tests.integrations.recorder import RESUMED, TOPICS, Recorder

pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning")
import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.precision import MixedPrecision

from streamlens.integrations.lightning import StreamlensCallback

pytestmark = [
    # Advice on workers, devices and intervals, which a test of seconds ignores.
    pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

BATCHES = regression(1, 4, (6, 5))


class Regressor(pl.LightningModule):
    """Calls a part of itself, as most modules do, and never itself."""

    def __init__(self, *, dropout: float = 0.0, learning_rate: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 3))
        self.learning_rate = learning_rate
        self.fails_at: int | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.global_step == self.fails_at:
            raise RuntimeError("the loop fails here")
        return mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        # With gradients, so that nothing but the callback tells it from training.
        with torch.enable_grad():
            self.log("validation_loss", mse_loss(self.net(batch[0]), batch[1]).detach())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


def fit(
    model: pl.LightningModule,
    callbacks: list[Any],
    *,
    batches: list[Batch] = BATCHES,
    validation: list[Batch] | None = None,
    checkpoint: Path | None = None,
    **options: Any,
) -> pl.Trainer:
    """Train with everything off that is not under test."""
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_epochs": 1,
            "callbacks": callbacks,
            **options,
        }
    )

    def loader(data: list[Batch]) -> Any:
        return DataLoader(cast("Dataset[Batch]", data), batch_size=None)

    trainer.fit(
        model,
        loader(batches),
        None if validation is None else loader(validation),
        ckpt_path=None if checkpoint is None else str(checkpoint),
    )
    return trainer


def by_hand(
    model: Regressor, *, epochs: int = 1, accumulate: int = 1, clip: float | None = None
) -> tuple[list[HandStep], list[dict[str, Tensor]]]:
    """The plain loop; and the gradients after each backward, before they are clipped."""
    optimizer = model.configure_optimizers()
    steps: list[HandStep] = []
    raw: list[dict[str, Tensor]] = []
    for _ in range(epochs):
        for i, (x, y) in enumerate(BATCHES):
            if i % accumulate == 0:
                optimizer.zero_grad()
                losses: list[float] = []
            loss = mse_loss(model.net(x), y)
            losses.append(loss.item())
            (loss / accumulate).backward()
            raw.append(gradients(model))
            if (i + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                steps.append(update_by_hand(model, optimizer, losses))
    return steps, raw


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_automatic_optimization_gives_the_values_of_a_plain_loop(accumulate: int, clip: float | None) -> None:
    steps, raw = by_hand(Regressor(), epochs=2, accumulate=accumulate, clip=clip)
    seen = Recorder(**{topic: sl.topic(topic) for topic in TOPICS}, activations=sl.norm("activations"))
    model = Regressor()
    callback = StreamlensCallback(seen, on_error="raise")
    options: dict[str, Any] = {
        "accumulate_grad_batches": accumulate,
        "gradient_clip_val": clip,
        "max_epochs": 2,
    }
    fit(model, [callback], **options)
    assert_steps_equal(seen["parameters"], [s.after for s in steps])
    assert_steps_equal(seen["parameter_gradients"], [s.gradients for s in steps])
    assert_steps_equal(seen["parameter_updates"], [s.updates() for s in steps])
    passes = [(k, m) for k in range(len(steps)) for m in range(accumulate)]
    assert_steps_equal(seen["raw_gradients"], raw, steps=[k for k, _ in passes])
    assert points(seen["raw_gradients"]) == points(seen["activations"]) == points(seen["loss"]) == passes
    assert numbers(seen["loss"]) == pytest.approx([loss for s in steps for loss in s.losses], rel=1e-6)
    assert layer_sets(seen["activations"])[0] == ("net.0", "net.1", "net.2", "net.3")
    assert [f.micro_step for f in seen["parameters"]] == [accumulate - 1] * len(steps)
    if clip is not None:
        assert not torch.equal(raw[-1]["net.0.weight"], steps[-1].gradients["net.0.weight"])


def test_micro_steps_are_counted_from_the_first_step_where_nothing_of_the_forward_is_wanted() -> None:
    """The module itself is never called, and only hooks on its parts know of forwards."""
    seen = Recorder(updates=sl.norm("weight_updates"))
    fit(Regressor(), [StreamlensCallback(seen, on_error="raise")], accumulate_grad_batches=2)
    assert points(seen["updates"]) == [(0, 1), (1, 1)]


@pytest.mark.parametrize("validation", [None, BATCHES[:2]])
def test_training_is_bit_identical_with_the_callback_and_without(validation: list[Batch] | None) -> None:
    def outcome(callbacks: list[Any]) -> dict[str, Any]:
        model = Regressor(dropout=0.4)
        trainer = fit(model, callbacks, validation=validation, max_epochs=2, gradient_clip_val=0.1)
        return {
            "model": model.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "metrics": dict(trainer.callback_metrics),
            "random": torch.get_rng_state(),
        }

    everything = Recorder(
        **{
            t: sl.topic(t)
            for t in (*TOPICS, "activations", "layer_gradients", "input_data", "network_output")
        },
        smoothed=(sl.uw_ratio(), sl.ema(0.9)),
    )
    assert same(outcome([StreamlensCallback(everything)]), outcome([]))
    assert all(everything.frames.values())


def test_validation_and_the_sanity_check_emit_nothing() -> None:
    """Even where forwards in eval mode count."""
    seen = Recorder(passes=sl.norm("activations"), updates=sl.norm("weight_updates"))
    callback = StreamlensCallback(seen, count="grad", on_error="raise")
    options: dict[str, Any] = {"num_sanity_val_steps": 2, "val_check_interval": 2, "inference_mode": False}
    fit(Regressor(), [callback], validation=BATCHES[:2], **options)
    assert points(seen["passes"]) == points(seen["updates"]) == [(k, 0) for k in range(4)]


class Adversaries(pl.LightningModule):
    """Two optimizers by hand: one part is trained through the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Linear(5, 5)
        self.discriminator = nn.Linear(5, 1)

    def losses(self, batch: Batch) -> Iterator[Tensor]:
        """First the generator's, then the discriminator's: the latter after the former's update."""
        yield -self.discriminator(self.generator(batch[0])).mean()
        fake = self.discriminator(self.generator(batch[0]).detach())
        yield fake.mean() - self.discriminator(batch[0]).mean()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        parts: Any = self.optimizers()
        for optimizer, loss in zip(parts, self.losses(batch), strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=0.01),
            torch.optim.SGD(self.discriminator.parameters(), lr=0.1),
        ]


def test_manual_optimization_with_two_optimizers_gives_the_values_of_a_plain_loop() -> None:
    twin = Adversaries()
    optimizers = twin.configure_optimizers()
    steps: list[HandStep] = []
    for batch in BATCHES:
        for optimizer, loss in zip(optimizers, twin.losses(batch), strict=True):
            optimizer.zero_grad()
            loss.backward()
            steps.append(update_by_hand(twin, optimizer, [loss.item()]))
    seen = Recorder(updates=sl.topic("parameter_updates"), loss=sl.topic("loss"))
    model = Adversaries()
    fit(model, [StreamlensCallback(seen, on_error="raise")])
    assert_steps_equal(seen["updates"], [s.updates() for s in steps])
    assert numbers(seen["loss"]) == [s.losses[0] for s in steps]
    assert same(model.state_dict(), twin.state_dict())


def test_the_loss_of_mixed_precision_is_not_the_scaled_one() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seen = Recorder(loss=sl.topic("loss"))
    model, twin = Regressor(learning_rate=0.0), Regressor()
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit(model, [StreamlensCallback(seen, on_error="raise")], plugins=[plugin])
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        expected = [mse_loss(twin.net(x), y).item() for x, y in BATCHES]
    assert numbers(seen["loss"]) == pytest.approx(expected)


def test_a_loss_that_the_chains_watch_goes_before_that_of_training_step() -> None:
    watched: Callable[..., Tensor] | None = None
    frames: list[sl.Frame] = []

    class Doubled(Regressor):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            assert watched is not None
            return 2 * watched(self.net(batch[0]), batch[1])

    def chains(lens: sl.Lens) -> None:
        nonlocal watched
        watched = lens.watch_loss(mse_loss)
        lens.pipe(sl.topic("loss")).subscribe(frames.append)

    fit(Doubled(learning_rate=0.0), [StreamlensCallback(chains, on_error="raise")])
    twin = Regressor()
    assert numbers(frames) == [mse_loss(twin.net(x), y).item() for x, y in BATCHES]
    assert {f.components for f in frames} == {()}


def test_epochs_are_told() -> None:
    seen = Recorder(
        started=sl.topic("epoch_started"),
        finished=sl.topic("epoch_finished"),
        mean=(sl.norm("weights"), sl.per_epoch()),
        weights=sl.norm("weights"),
    )
    fit(Regressor(), [StreamlensCallback(seen, on_error="raise")], max_epochs=3)
    assert numbers(seen["started"]) == numbers(seen["finished"]) == [0, 1, 2]
    assert [f.epoch for f in seen["weights"]] == [e for e in range(3) for _ in BATCHES]
    by_epoch = [torch.stack([f["net.0"] for f in seen["weights"] if f.epoch == e]).mean() for e in range(3)]
    assert [f["net.0"].item() for f in seen["mean"]] == pytest.approx([m.item() for m in by_epoch])


class Bookmark(pl.Callback):
    """Notes how much had been seen when a checkpoint was written."""

    def __init__(self, seen: Recorder) -> None:
        self.seen = seen
        self.at: dict[int, dict[str, int]] = {}

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        self.at[trainer.global_step] = {name: len(frames) for name, frames in self.seen.frames.items()}


@pytest.mark.parametrize("at", [2, 3, 4, 5, 8, "validation", "epoch end"])
def test_interrupted_and_resumed_is_uninterrupted(at: int | str, tmp_path: Path) -> None:
    """In mid-epoch, at its end before it is announced, and after it; the data are the same each step."""
    options: dict[str, Any] = {"max_epochs": 3, "batches": BATCHES[:1] * 4}
    keep: dict[str, Any] = {"every_n_train_steps": at}
    if isinstance(at, str):
        options["validation"] = BATCHES[:1]
        keep = {"save_on_train_epoch_end": at == "epoch end"}

    def run(seen: Recorder, checkpoint: Path | None) -> tuple[Bookmark, dict[str, Tensor]]:
        bookmark, model = Bookmark(seen), Regressor()
        keeper = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, **keep)
        callbacks = [StreamlensCallback(seen, on_error="raise"), bookmark, keeper]
        fit(model, callbacks, checkpoint=checkpoint, **options)
        return bookmark, model.state_dict()

    whole, rest = Recorder(**RESUMED), Recorder(**RESUMED)
    bookmark, parameters = run(whole, None)
    step = 4 if isinstance(at, str) else at
    assert 0 < bookmark.at[step]["ratio"] == step
    _, resumed = run(rest, tmp_path / f"step={step}.ckpt")
    assert same(resumed, parameters)
    assert rest.rows() == {name: rows[bookmark.at[step][name] :] for name, rows in whole.rows().items()}


def test_without_its_state_a_resumed_run_goes_on_differently(tmp_path: Path) -> None:
    """The property above is no accident."""
    options: dict[str, Any] = {"max_epochs": 2, "batches": BATCHES[:1] * 4}
    whole, rest = Recorder(**RESUMED), Recorder(**RESUMED)
    keeper = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=4)
    fit(Regressor(), [StreamlensCallback(whole), keeper], **options)
    checkpoint = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    [key] = [key for key in checkpoint["callbacks"] if "Streamlens" in key]
    del checkpoint["callbacks"][key]
    torch.save(checkpoint, tmp_path / "without.ckpt")
    fit(Regressor(), [StreamlensCallback(rest), keeper], checkpoint=tmp_path / "without.ckpt", **options)
    assert [row[-1] for row in rest.rows()["ratio"]] != [row[-1] for row in whole.rows()["ratio"][4:]]
    assert [row[1] for row in rest.rows()["ratio"]] == [0, 1, 2, 3], "it counts from where it began"
    assert [row[2] for row in rest.rows()["passes"]] == [0, 0, 0, 0]


def test_the_lens_closes_at_the_end_and_leaves_no_hook(tmp_path: Path) -> None:
    model = Regressor()
    table = sl.sinks.Table()
    callback = StreamlensCallback(lambda lens: lens.pipe(sl.norm("weights")).subscribe(table))
    trainer = fit(model, [callback])
    assert callback.lens.closed
    assert len(table.dataframe) == 2 * len(BATCHES)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert saved["lens"]["clock"]["step"] == len(BATCHES)


def test_the_lens_closes_when_training_raises_and_what_was_seen_is_written() -> None:
    model = Regressor()
    model.fails_at = 2
    table = sl.sinks.Table()
    callback = StreamlensCallback(lambda lens: lens.pipe(sl.norm("weights")).subscribe(table))
    with pytest.raises(RuntimeError, match="the loop fails here"):
        fit(model, [callback])
    assert callback.lens.closed
    assert set(table.dataframe["step"]) == {0, 1}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_second_fit_observes_again_and_goes_on_counting() -> None:
    model = Regressor()
    seen: list[tuple[int, int]] = []
    callback = StreamlensCallback(
        lambda lens: lens.pipe(sl.norm("weights")).subscribe(lambda f: seen.append((f.step, f.epoch))),
        on_error="raise",
    )
    for _ in range(2):
        fit(model, [callback])
    assert seen == [(k, k // len(BATCHES)) for k in range(2 * len(BATCHES))]


def test_a_named_part_has_layers_without_its_prefix() -> None:
    seen = Recorder(weights=sl.topic("parameters"), output=sl.topic("network_output"))
    model, twin = Regressor(), Regressor()
    steps, _ = by_hand(twin)
    fit(model, [StreamlensCallback(seen, module="net", on_error="raise")])
    after = [{name.removeprefix("net."): value for name, value in s.after.items()} for s in steps]
    assert_steps_equal(seen["weights"], after)
    assert torch.equal(seen["output"][0][""], Regressor().net(BATCHES[0][0]))


def test_callbacks_for_two_parts_keep_their_states_apart(tmp_path: Path) -> None:
    def chains(lens: sl.Lens) -> None:
        lens.pipe(sl.norm("weights"), sl.ema(0.9)).subscribe(lambda frame: None)

    callbacks = [StreamlensCallback(chains, module=name) for name in ("generator", "discriminator")]
    trainer = fit(Adversaries(), callbacks)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    states = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    assert {c.state_key for c in callbacks} <= set(states)


def test_an_unknown_part_is_refused_with_the_nearest_names() -> None:
    callback = StreamlensCallback(lambda lens: None, module="nett")
    with pytest.raises(sl.StreamlensError, match=r"module='nett'.*Regressor has no part.*did you mean 'net'"):
        fit(Regressor(), [callback])


def test_what_is_no_function_is_refused_with_an_example() -> None:
    with pytest.raises(TypeError, match=r"subscribes chains to a lens, got str.*StreamlensCallback\(lambda"):
        StreamlensCallback("chains")  # type: ignore[arg-type]


def test_before_training_there_is_no_lens() -> None:
    with pytest.raises(sl.StreamlensError, match="opened when training starts"):
        _ = StreamlensCallback(lambda lens: None).lens


def test_a_state_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no state of a lens"):
        StreamlensCallback(lambda lens: None).load_state_dict({"step": 3})


def test_a_chain_that_cannot_be_made_stops_the_run_before_it_begins() -> None:
    model = Regressor()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(sl.UnknownTopicError, match="did you mean 'weights'"):
        fit(model, [StreamlensCallback(lambda lens: lens.pipe(sl.norm("weigths")))])
    assert same(model.state_dict(), before)
    assert not model._forward_hooks


def test_importing_streamlens_loads_no_framework_and_a_missing_one_is_named() -> None:
    code = """
import sys
import streamlens, streamlens.integrations
assert not {"pytorch_lightning", "lightning", "transformers", "accelerate"} & set(sys.modules)
for framework, home in (("pytorch_lightning", "lightning"), ("transformers", "transformers")):
    sys.modules[framework] = None
    try:
        __import__(f"streamlens.integrations.{home}")
    except ImportError as error:
        assert f'pip install "streamlens[{home}]"' in str(error), error
    else:
        raise AssertionError(framework)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_stop_ends_fitting_after_its_batch() -> None:
    def chains(lens: sl.Lens) -> None:
        lens.pipe(sl.loss()).subscribe(sl.control.Stop(patience=0, threshold=1e6, threshold_mode="abs"))

    trainer = fit(Regressor(), [StreamlensCallback(chains, on_error="raise")], max_epochs=3)
    assert trainer.global_step == 2


def test_a_reason_of_the_validation_ends_fitting_with_its_epoch() -> None:
    class Validated(Regressor):
        def on_validation_end(self) -> None:
            if not self.trainer.sanity_checking:
                callback.lens.emit("validation_loss", 1.0)

    def chains(lens: sl.Lens) -> None:
        lens.pipe(sl.topic("validation_loss")).subscribe(sl.control.Stop(patience=0))

    callback = StreamlensCallback(chains, on_error="raise", emits=["validation_loss"])
    trainer = fit(Validated(), [callback], validation=BATCHES[:1], max_epochs=5)
    assert trainer.global_step == 2 * len(BATCHES)
