"""Accuracies of several runs: their mean and its 95% interval, against SciPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from streamlens import views
from streamlens.views.accuracy import _student
from tests.views.fakes import count_pixels, draw, rows


def runs(values: dict[str, list[float]], every: int = 10) -> pd.DataFrame:
    return pd.concat([rows({"": v}, every=every).assign(run=name) for name, v in values.items()])


def shown(chart: Any, column: str) -> list[dict[str, Any]]:
    return [row for data in chart.to_dict()["datasets"].values() for row in data if column in row]


def test_the_line_is_the_mean_over_runs_and_the_band_its_95_percent_interval() -> None:
    values = np.random.default_rng(0).uniform(0.6, 0.7, (5, 8))
    chart = views.accuracies({"test": runs({f"seed{i}": v.tolist() for i, v in enumerate(values)})})
    line = [row["value"] for row in shown(chart, "epoch") if "flag" not in row]
    assert line == pytest.approx(values.mean(0).tolist(), abs=1e-5)
    band = shown(chart, "upper")
    low, high = stats.t.interval(0.95, 4, values.mean(0), stats.sem(values))
    assert [row["value"] for row in band] == pytest.approx(low.tolist(), abs=1e-4)
    assert [row["upper"] for row in band] == pytest.approx(high.tolist(), abs=1e-4)
    assert "mean and 95% band of 5 runs" in chart.to_dict()["layer"][0]["encoding"]["y"]["title"]


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 6, 9, 19, 99, 10_000])
def test_the_quantile_of_students_t_is_scipys(freedom: int) -> None:
    assert _student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-3)


def test_the_band_stays_within_what_an_accuracy_can_be() -> None:
    band = shown(views.accuracies({"test": runs({"a": [0.2, 0.99], "b": [0.9, 1.0]})}), "upper")
    assert all(0 <= row["value"] <= row["upper"] <= 1 for row in band)


def test_runs_measured_at_other_steps_count_by_the_line_between_two_measurements() -> None:
    often, seldom = rows({"": [0.1, 0.2, 0.3, 0.4, 0.5]}, every=5), rows({"": [0.5, 0.7]}, every=10)
    chart = views.accuracies({"test": pd.concat([often.assign(run="a"), seldom.assign(run="b")])})
    line = {row["step"]: row["value"] for row in shown(chart, "epoch")}
    # From step 15 on there is one run alone.
    assert line == pytest.approx({0: 0.3, 5: 0.4, 10: 0.5, 15: 0.4, 20: 0.5})
    assert [row["step"] for row in shown(chart, "upper")] == [0, 5, 10]


def test_nan_of_a_run_is_marked_by_its_name_and_left_out_of_the_mean() -> None:
    chart = views.accuracies({"test": runs({"a": [0.5, math.nan], "b": [0.7, 0.9]})})
    assert [(r["series"], r["step"], r["flag"]) for r in shown(chart, "flag")] == [("test, a", 10, "NaN")]
    assert [row["value"] for row in shown(chart, "epoch") if "flag" not in row] == [0.6, 0.9]


def test_each_schedule_has_a_band_of_its_colour_and_a_single_run_none() -> None:
    spread = {"a": [0.5, 0.6, 0.7], "b": [0.7, 0.8, 0.9], "c": [0.6, 0.7, 0.8]}
    two = views.accuracies(
        {"constant": runs(spread), "ratio": runs({k: [x / 2 for x in v] for k, v in spread.items()})}
    )
    assert {row["series"] for row in shown(two, "upper")} == {"constant", "ratio"}
    palette = views.vega_config("light")["range"]["category"]
    pixels = draw(two.to_dict())
    assert all(count_pixels(pixels, palette[hue]) > 100 for hue in (0, 1))
    single = views.accuracies({"constant": runs({"a": [0.5, 0.6]})})
    assert not shown(single, "upper")
    assert "band" not in str(single.to_dict()["layer"][0]["encoding"]["y"]["title"])


def test_one_measurement_is_a_whole_point() -> None:
    palette = views.vega_config("light")["range"]["category"]
    alone = views.accuracies({"test": rows({"": [0.9]})}, limits=(0, 1))
    middle = views.accuracies({"test": rows({"": [0.9]})}, limits=(-1, 1))
    drawn = [count_pixels(draw(chart.to_dict()), palette[0]) for chart in (alone, middle)]
    assert drawn[0] == pytest.approx(drawn[1], rel=0.1)
