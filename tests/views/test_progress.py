"""Ratio against loss decrease, and the loss's marks, against loops in plain Python."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pandas as pd
import pytest

from streamlens import views
from streamlens.views.theme import NOT_FINITE
from tests.views.fakes import count_pixels, draw, rows, tables


def datasets(chart: Any) -> list[list[dict[str, Any]]]:
    return list(chart.to_dict()["datasets"].values())


def points(ratio: pd.DataFrame, loss: pd.DataFrame, **options: Any) -> list[dict[str, Any]]:
    chart = views.ratio_against_loss(ratio, loss, **options)
    return [row for data in datasets(chart) for row in data if "ratio" in row]


def test_each_point_is_the_fall_of_the_mean_loss_a_step_and_the_median_ratio_of_its_stretch() -> None:
    rng = np.random.default_rng(3)
    losses, every = rng.uniform(1, 2, 40).tolist(), 5
    ratios = {name: rng.uniform(1e-4, 1e-2, 40).tolist() for name in "ab"}
    found = points(rows(ratios, every=every), rows({"": losses}, every=every), max_points=9)
    assert len(found) == 9
    for k, point in enumerate(found, start=1):
        before, here = losses[4 * k - 4 : 4 * k], losses[4 * k : 4 * k + 4]
        fall = (statistics.mean(before) - statistics.mean(here)) / (4 * every)
        middle = statistics.median(ratios["a"][4 * k : 4 * k + 4] + ratios["b"][4 * k : 4 * k + 4])
        assert point["decrease"] == pytest.approx(fall, rel=1e-4)
        assert point["ratio"] == pytest.approx(middle, rel=1e-4)
        assert (point["step"], point["last"]) == (4 * k * every, (4 * k + 3) * every)


@pytest.mark.parametrize("n", range(2, 14))
def test_runs_of_a_few_steps_have_a_point_where_two_stretches_differ(n: int) -> None:
    found = points(rows({"a": [1e-3] * n}), rows({"": [float(n - i) for i in range(n)]}))
    assert found
    assert all(point["decrease"] == pytest.approx(1) for point in found)
    assert found[-1]["last"] == n - 1


def test_a_stretch_that_is_not_finite_is_a_magenta_mark_that_says_why() -> None:
    losses, ratios = [2.0] * 40, [1e-3] * 40
    losses[17] = math.nan
    ratios[36:40] = [0.0] * 4
    chart = views.ratio_against_loss(rows({"a": ratios}), rows({"": losses}))
    said = [(row["step"], row["holds"]) for data in datasets(chart) for row in data if "holds" in row]
    lost = "a loss that is not finite"
    assert said == [(16, lost), (20, lost), (36, "no ratio above zero")]
    assert count_pixels(draw(chart.to_dict()), NOT_FINITE) > 10


@pytest.mark.parametrize(
    ("ratio", "loss", "said"),
    [
        (rows({"a": []}), rows({"": [1.0, 2.0]}), "recorded together"),
        (rows({"a": [1e-3]}), rows({"": [1.0]}), "one loss alone"),
    ],
)
def test_what_has_no_decrease_is_said_in_words(ratio: pd.DataFrame, loss: pd.DataFrame, said: str) -> None:
    assert said in str(datasets(views.ratio_against_loss(ratio, loss)))


def test_a_run_of_nan_alone_is_drawn_all_the_same() -> None:
    nan = rows({"": [math.nan] * 20})
    assert draw(views.ratio_against_loss(nan, nan).to_dict()).size


def test_both_axes_say_what_they_are_and_colour_is_time() -> None:
    data = tables()
    spec = views.ratio_against_loss(data["uw_ratio"], data["loss"]).to_dict()
    encoding = spec["layer"][1]["encoding"]
    assert encoding["x"]["title"] == "decrease of the loss (a step)"
    assert encoding["y"]["title"] == "update-to-weight ratio (median of layers)"
    assert encoding["color"]["field"] == "step"


def changes(rates: dict[str, list[float]], steps: int = 12) -> list[tuple[int, str]]:
    chart = views.loss(rows({"": [2.0] * steps}), learning_rate=rows(rates))
    return [(row["step"], row["change"]) for data in datasets(chart) for row in data if "change" in row]


def test_the_loss_marks_the_steps_at_which_the_rate_changes() -> None:
    stairs = [0.1] * 4 + [0.01] * 4 + [0.001] * 4
    assert changes({"a": stairs, "b": [1e-4] * 12}) == [
        (4, "learning rate from 0.1 to 0.01"),
        (8, "learning rate from 0.01 to 0.001"),
    ]


@pytest.mark.parametrize("rates", [[0.1] * 40, [0.1 * 0.9**i for i in range(40)], [math.nan] * 40, []])
def test_a_rate_that_stands_still_or_bends_all_the_time_leaves_no_marks(rates: list[float]) -> None:
    assert changes({"a": rates}, 40) == []
