"""What each rule looks at and where its threshold lies, on frames whose values are written down here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import streamlens as sl
from streamlens.frame import Frame
from streamlens.operators.alerts import Rule
from streamlens.operators.alerts._rule import Look
from tests.operators.support import frame, run

ONCE: dict[str, Any] = {"every": 1, "start": (1, 1), "end": 1}


def frames(topic: str, *values: Mapping[str, float]) -> list[Frame]:
    """One frame a step."""
    return [frame(step, layers, topic) for step, layers in enumerate(values)]


def events(rule: Rule, items: Iterable[Frame]) -> list[tuple[int, str, tuple[str, ...]]]:
    """(step, state, layers) of each alert."""
    return [(f.step, f.meta["state"], f.layers) for f in run(rule, items)]


def losses(*values: float) -> list[Frame]:
    return frames("loss", *({"": value} for value in values))


def test_vanishing_gradients_are_a_small_share_of_the_largest_layers() -> None:
    items = frames(
        "weight_gradients.norm2",
        {"a": 1e-5, "b": 1.0},
        {"a": 0.9e-4, "b": 1.0},
        {"a": 1.1e-4, "b": 1.0},
        {"a": 1e-9, "b": 1e-9},
        {"a": 0.0, "b": 0.0},
        {"a": math.nan, "b": 1.0},
        {"a": 0.0, "b": 2.0},
    )
    assert events(sl.vanishing_gradients(**ONCE), items) == [
        (0, "start", ("a",)),
        (2, "end", ("a",)),
        (6, "start", ("a",)),
    ]


@given(st.floats(1e-20, 1e20))
def test_vanishing_gradients_do_not_depend_on_the_scale_of_the_loss(scale: float) -> None:
    values = [{"a": 1e-5, "b": 1.0}, {"a": 1e-3, "b": 1.0}]
    scaled = [{k: v * scale for k, v in layers.items()} for layers in values]
    rule = sl.vanishing_gradients(**ONCE)
    topic = "weight_gradients.norm2"
    assert events(rule, frames(topic, *values)) == events(rule, frames(topic, *scaled))


def test_exploding_gradients_exceed_their_own_history_and_a_share_of_the_weights() -> None:
    rule = sl.exploding_gradients(**{**ONCE, "factor": 10.0, "floor": 0.5})
    weights = frame(0, {"a": 3.0, "b": 4.0}, "weights.norm2")
    usual = [frame(step, {"a": 0.5, "b": 0.1}, "weight_gradients.norm2") for step in range(25)]
    large = [
        frame(25, {"a": 2.4, "b": 0.1}, "weight_gradients.norm2"),
        frame(26, {"a": 6.0, "b": 2.4}, "weight_gradients.norm2"),
        frame(27, {"a": 6.0, "b": 2.6}, "weight_gradients.norm2"),
        frame(28, {"a": 0.5, "b": 0.1}, "weight_gradients.norm2"),
    ]
    assert events(rule, [weights, *usual, *large]) == [
        (26, "start", ("a",)),
        (27, "start", ("b",)),
        (28, "end", ("a", "b")),
    ]


def test_gradients_that_had_become_small_may_grow_back_to_where_they_began() -> None:
    values = [1.0] * 20 + [1e-4] * 200 + [5.0, 1e-4]
    items = frames("weight_gradients.norm2", *({"a": v} for v in values))
    assert events(sl.exploding_gradients(**{**ONCE, "factor": 10.0}), items) == []


def test_exploding_gradients_may_be_too_large_from_the_first_step_on() -> None:
    rule = sl.exploding_gradients(**{**ONCE, "above": 10.0})
    items = [frame(0, {"a": 3.0, "b": 4.0}, "weights.norm2")]
    items += frames("weight_gradients.norm2", {"a": 49.0, "b": 51.0}, {"a": 1.0, "b": math.inf})
    (first, second) = run(rule, items)[:2]
    assert (first.step, first.layers, first.meta["of"]) == (0, ("b",), "size")
    assert first.to_dict()["b"] == pytest.approx(10.2)
    assert (second.step, second.layers, second.meta["of"]) == (1, ("b",), "history")


@pytest.mark.parametrize(
    ("rule", "topic"),
    [
        (sl.dead_units(share=0.6, **ONCE), "activations.dead_fraction"),
        (sl.saturated_units(share=0.6, **ONCE), "activations.unit_saturation"),
    ],
)
def test_shares_of_units_are_bad_above_their_threshold(rule: Rule, topic: str) -> None:
    items = frames(topic, {"a": 0.6, "b": 0.61}, {"a": 0.7, "b": 0.0}, {"a": math.nan, "b": 0.0})
    assert events(rule, items) == [(0, "start", ("b",)), (1, "start", ("a",)), (1, "end", ("b",))]


def test_a_ratio_leaves_the_absolute_band() -> None:
    rule = sl.ratio_out_of_band(band=(1e-6, 0.1), **ONCE)
    items = frames("uw_ratio", {"a": 1e-3}, {"a": 0.2}, {"a": 1e-7}, {"a": 1e-3}, {"a": math.nan})
    assert events(rule, items) == [(1, "start", ("a",)), (3, "end", ("a",))]


def rated(ratios: Sequence[float], rates: Sequence[float]) -> list[Frame]:
    """Ratios, each followed by the rate of its step."""
    items: list[Frame] = []
    for step, (ratio, rate) in enumerate(zip(ratios, rates, strict=True)):
        items += [frame(step, {"a": ratio}, "uw_ratio"), frame(step, {"a": rate}, "learning_rate")]
    return items


def test_a_ratio_leaves_its_own_history() -> None:
    rule = sl.ratio_out_of_band(decades=1.0, **ONCE)
    items = frames("uw_ratio", *({"a": 1e-3} for _ in range(20)), {"a": 0.9e-2}, {"a": 1.5e-2}, {"a": 1e-3})
    assert events(rule, items) == [(21, "start", ("a",)), (22, "end", ("a",))]


def test_a_schedule_is_no_reason_for_a_ratio_to_leave_its_history() -> None:
    rates = [1.0] * 20 + [1e-3] * 20
    ratios = [1e-3 * rate for rate in rates]
    rule = sl.ratio_out_of_band(decades=1.0, every=1, start=(2, 2), end=1)
    assert events(rule, rated(ratios, rates)) == []
    assert events(rule, frames("uw_ratio", *({"a": r} for r in ratios))) != []


def test_a_schedule_that_has_come_to_its_end_makes_small_ratios_that_are_meant() -> None:
    rule = sl.ratio_out_of_band(band=(1e-6, 0.1), decades=10.0, **ONCE)
    assert events(rule, rated([1e-3, 1e-3, 1e-9, 1e-9], [1.0, 1.0, 1e-6, 1e-6])) == [
        (2, "start", ("a",)),
        (3, "end", ("a",)),
    ]
    assert events(rule, rated([1e-3, 1e-3, 1e-9, 1e-9], [1.0, 1.0, 1.0, 1.0])) == [(2, "start", ("a",))]


def test_weights_with_a_gradient_that_do_not_change_are_unchanged() -> None:
    gradient = {"a": 1.0, "b": 0.5, "c": 0.1}
    items: list[Frame] = []
    for step, updates in enumerate([{"a": 0.1, "b": 0.0}, {"a": 0.1, "b": 0.1, "c": 0.1}]):
        items += [
            frame(step, gradient, "weight_gradients.norm2"),
            frame(step, updates, "weight_updates.norm2"),
        ]
    assert events(sl.unchanged_weights(**ONCE), items) == [(0, "start", ("b", "c")), (1, "end", ("b", "c"))]


def test_optimizers_that_take_turns_leave_no_weights_unchanged() -> None:
    items: list[Frame] = []
    for step in range(6):
        mover = "ab"[step % 2]
        items += [
            frame(step, {"a": 1.0, "b": 1.0}, "weight_gradients.norm2"),
            frame(step, {"a": 1.0 + step, "b": 2.0 + step}, "weights.norm2"),
            frame(step, {mover: 0.1}, "weight_updates.norm2"),
        ]
    assert events(sl.unchanged_weights(**ONCE), items) == []


def test_the_loss_must_have_fallen_once_patience_is_over() -> None:
    rule = sl.loss_not_decreasing(patience=20, fall=0.1, every=1)
    assert events(rule, losses(*[2.0] * 30, *[1.0] * 20)) == [(19, "start", ("",)), (30, "end", ("",))]
    assert events(rule, losses(*[2.0] * 10, *[1.0] * 5, *[2.0] * 50)) == []


def test_a_spike_is_above_the_losses_before_it_by_share_and_factor() -> None:
    rule = sl.loss_spike(share=0.5, factor=2.0, end=2)
    calm = [1.0, 0.8] * 15
    assert events(rule, losses(*calm, 1.5, 0.9, 0.9, 0.9)) == [(30, "start", ("",)), (32, "end", ("",))]
    assert events(rule, losses(*calm, 1.35, 0.9)) == []
    # Losses that scatter this much are no spikes, however large.
    assert events(rule, losses(*[0.1, 4.0, 0.1, 0.1] * 10, 7.0)) == []


def test_small_losses_whose_batches_differ_by_factors_are_no_spikes() -> None:
    assert events(sl.loss_spike(), losses(*[2.0] * 20, *[1e-3] * 120, 0.3, 1e-3)) == []


def test_a_loss_that_stays_up_is_in_time_how_it_is_now() -> None:
    rule = sl.loss_spike(window=30)
    assert events(rule, losses(*[1.0] * 40, *[3.0] * 80)) == [(40, "start", ("",)), (94, "end", ("",))]


def test_diverging_is_a_loss_that_rises_and_stays_up() -> None:
    rule = sl.diverging(rise=0.5, start=(5, 5), end=5)
    (start, _) = events(rule, losses(*[2.0] * 10, *[5.0] * 20, *[1.0] * 60))
    assert start[:2] == (15, "start") or 14 <= start[0] <= 17
    assert events(rule, losses(*[2.0] * 10, 20.0, *[2.0] * 3)) == []
    # From the least it has been, too.
    assert events(rule, losses(*[2.0] * 6, *[0.1] * 60, *[1.5] * 20))[0][1] == "start"


def test_an_infinite_loss_diverges_and_nan_is_left_to_another_rule() -> None:
    rule = sl.diverging(start=(3, 3))
    assert events(rule, losses(*[1.0] * 6, *[math.inf] * 3)) == [(8, "start", ("",))]
    assert events(rule, losses(*[1.0] * 6, *[math.nan] * 9)) == []


def test_several_losses_are_judged_each_by_itself() -> None:
    items = [
        frame(step, {"": [1.0, 1.0 if step < 30 else 9.0]}, "loss", components=("generator", "critic"))
        for step in range(32)
    ]
    (alert,) = run(sl.loss_spike(), items)
    assert (alert.step, alert.meta["of"]) == (30, "critic")


def evaluations(topic: str, values: Sequence[float], training: Sequence[float]) -> list[Frame]:
    items: list[Frame] = []
    for i, (value, loss) in enumerate(zip(values, training, strict=True)):
        items += [frame(step, {"": loss}, "loss") for step in range(100 * i, 100 * i + 100)]
        items.append(frame(100 * i + 99, {"": value}, topic))
    return items


def test_overfitting_is_a_validation_loss_that_rises_while_the_training_loss_falls() -> None:
    rule = sl.overfitting(rise=0.2, share=0.1, start=(2, 2), end=1)
    values = [2.0, 1.0, 1.15, 1.25, 1.3, 1.0]
    falling, rising = [2.0, 1.0, 0.8, 0.6, 0.5, 0.4], [2.0, 1.0, 1.1, 1.2, 1.3, 1.4]
    assert events(rule, evaluations("validation_loss", values, falling)) == [
        (499, "start", ("",)),
        (599, "end", ("",)),
    ]
    assert events(rule, evaluations("validation_loss", values, rising)) == []


def test_a_small_validation_loss_may_vary_by_a_share_of_what_it_has_fallen() -> None:
    values, falling = [2.0, 0.05, 0.2, 0.2, 0.3, 0.3], [2.0, 1.0, 0.8, 0.6, 0.5, 0.4]
    found = events(sl.overfitting(start=(1, 1)), evaluations("validation_loss", values, falling))
    assert found == [(499, "start", ("",))]


def test_overfitting_is_a_test_accuracy_that_falls() -> None:
    rule = sl.overfitting(drop=0.03, start=(1, 1))
    values, falling = [0.5, 0.9, 0.88, 0.86], [2.0, 1.0, 0.8, 0.6]
    assert events(rule, evaluations("test_accuracy", values, falling)) == [(399, "start", ("",))]


def test_outputs_and_gradients_must_keep_their_size_at_step_0() -> None:
    rule = sl.poor_initialisation(forward=(1e-2, 1e2), backward=(1e-2, 1e2))
    items = [
        frame(0, {"a": 2.0, "b": 0.021, "c": 0.019, "d": 0.0}, "activations.std"),
        frame(0, {"a": 201.0, "b": 199.0, "c": 0.0, "d": 2.0}, "layer_gradients.norm2"),
        frame(1, {"a": 2.0, "b": 1e-9, "c": 1e-9, "d": 1e-9}, "activations.std"),
    ]
    found = [(f.layers, f.meta["phase"]) for f in run(rule, items)]
    assert found == [(("c",), "forward"), (("a",), "backward")]


def test_a_network_that_begins_with_zeros_everywhere_is_poorly_initialised() -> None:
    items = [frame(0, {"a": 1.0, "b": 0.0, "c": 0.0}, "activations.std")]
    assert events(sl.poor_initialisation(), items) == [(0, "start", ("b", "c"))]


def nonfinite(items: Iterable[Frame]) -> list[tuple[int, str, str, str]]:
    found = run(sl.nonfinite_values(phases=("forward", "loss", "backward", "update")), items)
    return [(f.step, f.meta["state"], f.layers[0], f.meta["phase"]) for f in found]


def step_of(step: int, **bad: str) -> list[Frame]:
    """The frames of a step, in their order; `phase="b"` makes layer b not finite there."""
    topics = {
        "forward": "activations.norm2",
        "loss": "loss",
        "backward": "weight_gradients.norm2",
        "update": "weights.norm2",
    }
    return [
        frame(
            step,
            {
                layer: math.nan if (layer and layer in bad.get(phase, "")) or bad.get(phase) == layer else 1.0
                for layer in ([""] if phase == "loss" else ["a", "b", "c"])
            },
            topic,
        )
        for phase, topic in topics.items()
    ]


def test_nonfinite_values_are_told_once_with_the_first_layer_and_phase() -> None:
    assert nonfinite(
        [*step_of(0), *step_of(1, forward="bc", loss="", backward="abc"), *step_of(2, forward="abc")]
    ) == [(1, "start", "b", "forward")]
    assert nonfinite(step_of(0, loss="", backward="abc")) == [(0, "start", "", "loss")]
    # Backwards the last layer comes first.
    assert nonfinite(step_of(0, backward="ab", update="ab")) == [(0, "start", "b", "backward")]
    assert nonfinite(step_of(0, update="c")) == [(0, "start", "c", "update")]


def test_nonfinite_values_end_with_a_step_in_which_everything_is_finite() -> None:
    items = [*step_of(0, forward="a"), *step_of(1), *step_of(2), *step_of(3, backward="c")]
    assert nonfinite(items) == [
        (0, "start", "a", "forward"),
        (2, "end", "a", "forward"),
        (3, "start", "c", "backward"),
    ]


def looked_at_on_a_device(*steps: dict[str, list[float]]) -> list[tuple[int, str, str]]:
    """What is found in steps of a GPU run: the values of each phase, of layers a and b."""
    topics = {"forward": "activations.norm2", "backward": "weight_gradients.norm2"}
    judge = sl.nonfinite_values().judge()
    return [
        (step, verdict.layers[0], verdict.group)
        for step, phases in enumerate(steps)
        for phase, values in phases.items()
        for verdict in judge.look(Look(topics[phase], step, ("a", "b"), np.array(values), (), True))
        if verdict.bad.all()
    ]


def test_an_overflow_that_only_the_device_knows_of_is_told_only_if_it_reaches_the_next_forward() -> None:
    fine, bad = [1.0, 1.0], [math.nan, math.nan]
    overflow = {"forward": fine, "backward": bad}
    assert looked_at_on_a_device(overflow, {"forward": fine, "backward": fine}, overflow) == []
    assert looked_at_on_a_device(overflow, {"forward": bad, "backward": bad}) == [(1, "b", "backward")]
    assert looked_at_on_a_device({"forward": fine, "backward": [math.nan, 1.0]}) == [(0, "a", "backward")]


def progress(ratio: float, loss: float, *, until: int = 60) -> list[Frame]:
    items: list[Frame] = []
    for step in range(until):
        items.append(frame(step, {"": 2.0 if step < 10 else loss}, "loss"))
        items.append(frame(step, {"a": ratio, "b": ratio, "c": 1.0}, "uw_ratio"))
    return items


@pytest.mark.parametrize(
    ("ratio", "loss", "found"),
    [(0.2, 2.0, True), (0.2, 1.0, False), (0.05, 2.0, False), (0.5, 1.0, True)],
)
def test_a_rate_is_too_high_where_large_updates_achieve_nothing(
    ratio: float, loss: float, found: bool
) -> None:
    items = [item for item in progress(ratio, loss) if item.step > 30 or item.topic == "loss"]
    assert bool(events(sl.learning_rate_too_high(), items)) is found


@pytest.mark.parametrize(
    ("ratio", "loss", "found"), [(1e-7, 2.0, True), (1e-7, 1.0, False), (1e-5, 2.0, False)]
)
def test_a_rate_is_too_low_where_small_updates_achieve_nothing(
    ratio: float, loss: float, found: bool
) -> None:
    items = [item for item in progress(ratio, loss) if item.step > 30 or item.topic == "loss"]
    assert bool(events(sl.learning_rate_too_low(every=1), items)) is found


def sized(saturation: float, ranks: Sequence[float]) -> list[Frame]:
    """A rank at the beginning of each window of a hundred steps, and a saturation at its end."""
    items: list[Frame] = []
    for window, rank in enumerate(ranks):
        items += [
            frame(100 * window, {"a": rank}, "weights.effective_rank"),
            frame(100 * window + 99, {"a": saturation}, "activations.saturation"),
        ]
    return items


@pytest.mark.parametrize(
    ("rule", "saturation", "ranks", "found"),
    [
        (sl.layer_oversized(start=(1, 1), end=1), 0.04, [10.0, 10.0], True),
        (sl.layer_oversized(start=(1, 1), end=1), 0.06, [10.0, 10.0], False),
        (sl.layer_undersized(start=(1, 1), end=1), 0.96, [10.0, 9.5], True),
        (sl.layer_undersized(start=(1, 1), end=1), 0.94, [10.0, 9.5], False),
    ],
)
def test_a_layers_size_is_judged_by_its_saturation(
    rule: Rule, saturation: float, ranks: list[float], found: bool
) -> None:
    assert bool(events(rule, sized(saturation, ranks))) is found


def test_a_layer_whose_effective_rank_still_moves_is_not_judged() -> None:
    later: dict[str, Any] = {"start": (2, 2), "end": 1}
    assert events(sl.layer_oversized(**later), sized(0.01, [10.0, 12.0, 12.0])) == []
    assert events(sl.layer_undersized(**later), sized(0.99, [10.0, 5.0, 5.0])) == []


def test_looks_fall_on_steps_divisible_by_the_cadence() -> None:
    rule = sl.dead_units(every=5, start=(2, 2))
    items = frames("activations.dead_fraction", *({"a": 1.0} for _ in range(12)))
    assert events(rule, items) == [(5, "start", ("a",))]
