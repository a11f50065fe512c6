"""The numbers at the head of a page."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from streamlens.views.sections import read_models
from streamlens.views.summary import Tile, scientific, tiles
from tests.views.fakes import FakeRun, rows, tables


def tile(label: str, data: dict[str, object] | None = None, **replaced: object) -> Tile:
    run = FakeRun({**tables(), **replaced} if data is None else data)  # type: ignore[arg-type,dict-item]
    (found,) = [t for t in tiles(read_models(run)) if t.label == label]
    return found


def test_steps_count_from_zero_and_epochs_are_those_finished() -> None:
    assert tile("steps").value == "120"
    assert (tile("epochs").value, tile("epochs").note) == ("10", "12 steps each")


def test_one_step_is_not_called_steps() -> None:
    assert tile("epochs", {"loss": rows({"": [1.0]})}).note == "1 step each"


def test_the_duration_is_from_the_first_frame_to_the_last() -> None:
    assert tile("duration").value == "1.2 s"
    assert tile("duration").note == "100 steps a second"


def test_the_final_loss_is_the_average_where_recorded_else_the_last() -> None:
    both = {"loss": rows({"": [3.0, 1.5]}), "loss.ema": rows({"": [3.0, 2.25]})}
    assert tile("final loss", dict(both)).value == "2.25"
    assert tile("final loss", {"loss": both["loss"]}).value == "1.5"


def test_a_loss_that_ended_as_nan_says_so() -> None:
    ended = tile("final loss", {"loss": rows({"": [3.0, math.nan]})})
    assert (ended.value, ended.verdict) == ("NaN", "watch")


def test_an_average_that_skips_nan_does_not_hide_that_the_run_ended_in_it() -> None:
    loss = rows({"": [3.0, math.nan, 2.0, math.inf, math.nan]})
    ended = tile("final loss", {"loss": loss, "loss.ema": rows({"": [3.0, 3.0, 2.5, 2.5, 2.5]})})
    assert (ended.value, ended.verdict) == ("NaN", "watch")
    assert ended.note == "not finite from step 3 on; moving average before it 2.5"


def test_a_loss_that_recovered_from_nan_shows_its_average() -> None:
    loss = rows({"": [3.0, math.nan, 2.0]})
    found = tile("final loss", {"loss": loss, "loss.ema": rows({"": [3.0, 3.0, 2.5]})})
    assert (found.value, found.verdict) == ("2.5", "")


def test_one_of_several_losses_that_ended_as_infinity_is_named() -> None:
    both = pd.concat(
        [
            rows({"": [1.0, 1.0]}).assign(component="a"),
            rows({"": [1.0, math.inf]}).assign(component="b"),
        ]
    )
    found = tile("final loss", {"loss": both})
    assert (found.value, found.verdict) == ("∞", "watch")


def test_a_test_accuracy_that_ended_as_nan_says_so() -> None:
    found = tile("test accuracy", {"test_accuracy": rows({"": [0.5, math.nan]}, every=10)})
    assert (found.value, found.verdict) == ("NaN", "watch")
    assert found.note == "best 50.0%, at step 0"


def test_a_ratio_whose_layers_ended_as_nan_says_how_many() -> None:
    some = tile("update-to-weight ratio", {"uw_ratio": rows({"a": [1e-3, math.nan], "b": [1e-3, 1e-3]})})
    assert some.note.endswith("; NaN or infinity in 1 layer at the end")
    assert some.verdict == "watch"
    every = tile("update-to-weight ratio", {"uw_ratio": rows({"a": [1e-3, math.nan]})})
    assert every.note.endswith("; NaN or infinity in every layer at the end")


def test_test_accuracy_is_the_last_and_names_the_best() -> None:
    table = rows({"": [0.5, math.nan, 0.9, 0.8]}, every=10)
    found = tile("test accuracy", {"test_accuracy": table})
    assert (found.value, found.note) == ("80.0%", "best 90.0%, at step 20")


@pytest.mark.parametrize(
    ("ratios", "value", "place", "verdict"),
    [
        ([1e-3, 2e-3, 9e-1], "2.0 × 10⁻³", "around", "good"),
        ([1e-2, 1e-2, 1e-2], "1.0 × 10⁻²", "above", "watch"),
        ([1e-5, math.nan, 3e-5], "2.0 × 10⁻⁵", "below", "watch"),
        ([0.0, 0.0, 1e-3], "0", "do not change", "watch"),
        ([math.nan, math.inf], "NaN", "no finite value", "watch"),
    ],
)
def test_the_median_ratio_is_judged_against_one_in_a_thousand(
    ratios: list[float], value: str, place: str, verdict: str
) -> None:
    found = tile("update-to-weight ratio", {"uw_ratio": rows({"a": ratios})})
    assert found.value.replace("\u202f", " ") == value
    assert place in found.note
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "1.0 × 10⁰"), (9.99e-4, "1.0 × 10⁻³"), (2.5e12, "2.5 × 10¹²"), (5e-324, "4.9 × 10⁻³²⁴")],
)
def test_numbers_are_written_with_one_digit_and_a_power_of_ten(value: float, text: str) -> None:
    assert scientific(value).replace("\u202f", " ") == text
