"""A feed is a lens on whatever is pushed to it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

import streamlens as sl
from streamlens.frame import Frame
from streamlens.sinks import Table
from streamlens.sources import Feed


def pushed(feed: Feed, steps: int = 6) -> tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    """Weights and updates of a walk, pushed step by step."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(4, 3))
    weights, updates = [], []
    for step in range(steps):
        dw = 0.1 * rng.normal(size=w.shape)
        w = w + dw
        feed.push(step, weights={"dense": w}, weight_updates={"dense": dw}, loss=float(step))
        weights.append(w)
        updates.append(dw)
    return weights, updates


def test_a_metric_over_pushed_arrays_is_what_numpy_says() -> None:
    feed = Feed()
    out: list[Frame] = []
    feed.pipe(sl.uw_ratio(), sl.ema(0.5, bias_correction=False)).subscribe(out.append)
    weights, updates = pushed(feed)
    expected: list[float] = []
    for w, dw in zip(weights, updates, strict=True):
        now = float(np.linalg.norm(dw) / np.linalg.norm(w))
        expected.append(now if not expected else 0.5 * expected[-1] + 0.5 * now)
    assert [f.step for f in out] == list(range(6))
    assert [f["dense"].item() for f in out] == pytest.approx(expected, rel=1e-5)


def test_arrays_are_read_where_they_lie() -> None:
    feed = Feed()
    seen: list[int] = []
    feed.pipe(sl.topic("weights")).subscribe(lambda f: seen.append(f["a"].data_ptr()))
    array = np.ones((2, 3), np.float32)
    feed.push(0, weights={"a": array})
    assert seen == [array.__array_interface__["data"][0]]


def test_raw_frames_expire_with_the_push() -> None:
    feed = Feed()
    kept: list[Frame] = []
    feed.pipe(sl.topic("weights")).subscribe(kept.append)
    feed.push(0, weights={"a": np.ones(3)})
    with pytest.raises(sl.ExpiredFrameError):
        _ = kept[0].values


def test_an_array_that_cannot_be_written_to_is_copied() -> None:
    feed = Feed()
    out: list[Frame] = []
    feed.pipe(sl.norm("weights")).subscribe(out.append)
    array = np.array([3.0, 4.0])
    array.flags.writeable = False
    feed.push(0, weights={"a": array})
    assert out[0]["a"].item() == 5.0


def test_layers_cadence_and_steps_are_narrowed() -> None:
    feed = Feed()
    out: list[Frame] = []
    narrowed = feed.pipe(sl.norm("weights"), sl.rename("n"))
    feed.pipe(sl.layers("a*"), sl.every(2), sl.between(2, 7), sl.norm("weights")).subscribe(out.append)
    for step in range(10):
        feed.push(step, weights={"a1": np.ones(1), "b": np.ones(2), "a2": np.full(4, step)})
    assert isinstance(narrowed, sl.Stream)
    assert [f.step for f in out] == [2, 4, 6]
    assert all(f.layers == ("a1", "a2") for f in out)
    assert [f["a2"].item() for f in out] == [4.0, 8.0, 12.0]


def test_equal_reductions_are_computed_once() -> None:
    calls: list[int] = []

    def count(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x.sum()

    feed = Feed()
    reduction = sl.reduce(count, "weights", name="summed")
    out: list[Frame] = []
    feed.pipe(reduction).subscribe(out.append)
    feed.pipe(reduction, sl.ema(0.5)).subscribe(out.append)
    feed.push(0, weights={"a": np.ones(2)})
    assert len(out) == 2
    assert len(calls) == 1


def test_losses_of_micro_steps_are_averaged_over_their_step() -> None:
    feed = Feed()
    out: list[Frame] = []
    feed.pipe(sl.topic("loss"), sl.window(1)).subscribe(out.append)
    for step in range(3):
        feed.push(step, loss=step)
        feed.push(step, micro_step=1, loss=step + 2.0)
    feed.close()
    assert [(f.step, f[""].item()) for f in out] == [(0, 1.0), (1, 2.0), (2, 3.0)]


def test_several_losses_are_components() -> None:
    feed = Feed()
    out: list[Frame] = []
    feed.pipe(sl.topic("loss")).subscribe(out.append)
    feed.push(0, loss={"content": 1.0, "style": 2.0})
    assert out[0].components == ("content", "style")
    assert out[0][""].tolist() == [1.0, 2.0]


def test_epochs_close_steps_and_are_counted() -> None:
    feed = Feed()
    means: list[Frame] = []
    ends: list[Frame] = []
    feed.pipe(sl.topic("loss"), sl.per_epoch()).subscribe(means.append)
    feed.pipe(sl.topic("epoch_finished")).subscribe(ends.append)
    step = 0
    for _ in range(2):
        for value in (1.0, 3.0):
            feed.push(step, loss=value + step)
            step += 1
        feed.epoch_finished()
    assert [(f.step, f.epoch, f[""].item()) for f in means] == [(1, 0, 2.5), (3, 1, 4.5)]
    assert [(f.step, f[""].item()) for f in ends] == [(1, 0.0), (3, 1.0)]
    assert feed.epoch == 2


def test_a_topic_of_ones_own_needs_its_name_before() -> None:
    with pytest.raises(sl.UnknownTopicError, match="unknown topic 'temperature'"):
        Feed().pipe(sl.topic("temperature"))
    feed = Feed(emits=["temperature"])
    out: list[Frame] = []
    feed.pipe(sl.topic("temperature")).subscribe(out.append)
    feed.push(0, temperature={"room": 20.0, "oven": 180.0})
    assert out[0].to_dict() == {"room": 20.0, "oven": 180.0}


def test_pushes_out_of_order_are_put_in_order() -> None:
    lateness = 3
    order = list(range(40))
    shuffle = random.Random(0)
    order.sort(key=lambda s: s + shuffle.uniform(0, lateness))
    assert order != sorted(order)
    feed = Feed(allowed_lateness=lateness)
    out: list[Frame] = []
    feed.pipe(sl.norm("weights"), sl.ema(0.9)).subscribe(out.append)
    reused = np.zeros(1)
    for step in order:
        reused[:] = step
        feed.push(step, weights={"a": reused})
    feed.close()
    plain = Feed()
    wanted: list[Frame] = []
    plain.pipe(sl.norm("weights"), sl.ema(0.9)).subscribe(wanted.append)
    for step in range(40):
        plain.push(step, weights={"a": np.full(1, float(step))})
    assert [(f.step, f["a"].item()) for f in out] == [(f.step, f["a"].item()) for f in wanted]
    assert feed.stats()["late"] == 0


@pytest.mark.parametrize("lateness", [0, 2])
def test_pushes_later_than_allowed_are_dropped_and_counted(lateness: int) -> None:
    feed = Feed(allowed_lateness=lateness)
    out: list[Frame] = []
    feed.pipe(sl.topic("loss")).subscribe(out.append)
    for step in (0, 5, 5 - lateness, 5 - lateness - 1, 6):
        feed.push(step, loss=1.0)
    feed.close()
    assert feed.stats()["late"] == 1
    assert [f.step for f in out] == sorted([0, 5, 5 - lateness, 6])


def test_a_push_for_a_closed_epoch_is_late() -> None:
    feed = Feed()
    feed.push(3, loss=1.0)
    feed.epoch_finished()
    feed.push(3, loss=1.0)
    assert feed.stats()["late"] == 1


@pytest.mark.parametrize(
    ("topics", "error", "message"),
    [
        ({"weights": {"a": [1.0, 2.0]}}, TypeError, r"weights\['a'\] is a list: pass an array"),
        ({"weights": {"a": "no"}}, TypeError, r"weights\['a'\] is a str"),
        ({"weights": {"a": np.array(["x"])}}, TypeError, r"weights\['a'\] cannot be read"),
        ({"weights": {1: np.ones(2)}}, TypeError, "layers are named by strings, got 1"),
        ({"weights": np.ones(2)}, TypeError, r"keyed by layer: pass \{layer: array\}, got ndarray"),
        ({"network_output": {"a": np.ones(2)}}, TypeError, "of the model itself"),
        ({"loss": np.ones(2)}, ValueError, r"loss is a number, got an array of shape \(2,\)"),
        ({"epoch_finished": 1}, sl.StreamlensError, "the feed gives it by itself"),
        ({}, TypeError, "was given nothing"),
        (
            {"weights": {"a": np.ones((2, 3))}, "weight_updates": {"a": np.ones((3, 2))}},
            ValueError,
            r"weight_updates\['a'\] has shape \(3, 2\), but weights\['a'\] had \(2, 3\)",
        ),
    ],
)
def test_a_wrong_push_is_an_error_at_the_call(
    topics: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Feed().push(0, **topics)


def test_a_layer_keeps_its_shape_over_the_steps() -> None:
    feed = Feed()
    feed.push(0, weights={"a": np.ones(2)})
    with pytest.raises(ValueError, match=r"push\(1\): weight_gradients\['a'\] has shape \(3,\)"):
        feed.push(1, weight_gradients={"a": np.ones(3)})


@pytest.mark.parametrize("step", [-1, 1.5, True])
def test_a_step_is_a_whole_number(step: Any) -> None:
    with pytest.raises(ValueError, match="a whole number from 0 on"):
        Feed().push(step, loss=1.0)


def test_a_closed_feed_takes_nothing() -> None:
    feed = Feed()
    feed.close()
    with pytest.raises(sl.ClosedLensError, match="this feed is closed"):
        feed.push(0, loss=1.0)


def test_metrics_of_the_model_say_what_to_pass() -> None:
    with pytest.raises(sl.StreamlensError, match=r"needs the model, and Feed\(\) has none"):
        Feed().pipe(sl.sharpness(batch=(torch.ones(1, 1), torch.ones(1)), loss=torch.nn.MSELoss()))
    with pytest.raises(sl.LayerNotFoundError, match="no model to tell module classes"):
        Feed().pipe(sl.layers(torch.nn.Linear))


def test_a_snapshot_goes_on_where_it_was_taken() -> None:
    whole, first, second = Feed(), Feed(), Feed()
    wanted: list[float] = []
    got: list[float] = []
    chain = (sl.topic("loss"), sl.ema(0.9))
    whole.pipe(*chain).subscribe(lambda f: wanted.append(f[""].item()))
    first.pipe(*chain).subscribe(lambda f: got.append(f[""].item()))
    second.pipe(*chain).subscribe(lambda f: got.append(f[""].item()))
    for step in range(8):
        whole.push(step, loss=step**2)
    for step in range(4):
        first.push(step, loss=step**2)
    first.push(4, loss=16)
    second.load_state_dict(first.state_dict())
    for step in range(5, 8):
        second.push(step, loss=step**2)
    whole.close()
    second.close()
    assert got == pytest.approx(wanted)


def test_derived_topics_sinks_and_explain_work() -> None:
    feed = Feed(name="jax")
    feed.derive("smooth", feed.pipe(sl.topic("loss"), sl.ema(0.5)))
    table = Table()
    feed.pipe(sl.topic("smooth")).subscribe(table)
    for step in range(3):
        feed.push(step, loss=1.0)
    assert "asks for loss" in feed.explain()
    assert feed.close()
    assert len(table.dataframe) == 3


def test_a_failing_chain_does_not_reach_the_loop() -> None:
    feed = Feed()
    feed.pipe(sl.topic("loss")).subscribe(lambda _: 1 / 0)
    out: list[Frame] = []
    feed.pipe(sl.topic("loss")).subscribe(out.append)
    feed.push(0, loss=1.0)
    assert feed.stats()["errors"] == 1
    assert len(out) == 1


def test_emit_and_paused_work_as_on_any_lens() -> None:
    feed = Feed(emits=["accuracy"])
    out: list[Frame] = []
    feed.pipe(sl.topic("accuracy", "loss")).subscribe(out.append)
    feed.push(4, loss=1.0)
    feed.emit("accuracy", 0.5)
    with feed.paused():
        feed.push(5, loss=1.0)
    assert [(f.topic, f.step) for f in out] == [("loss", 4), ("accuracy", 4)]


def test_rules_that_leave_out_layers_by_class_look_at_all_where_no_model_tells() -> None:
    feed = Feed()
    out: list[Frame] = []
    feed.pipe(sl.nonfinite_values(every=1)).subscribe(out.append)
    fine, broken = np.ones((2, 3)), np.full((2, 3), np.nan)
    for step, second in enumerate((fine, fine, broken)):
        feed.push(step, activations={"first": fine, "second": second}, loss=float(second.sum()))
    feed.close()
    assert [(f.step, f.layers, f.meta["phase"]) for f in out] == [(2, ("second",), "forward")]
