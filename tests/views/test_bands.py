"""Bands between percentiles: what they draw is what was recorded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import streamlens as sl
from streamlens.frame import Frame
from streamlens.views import percentile_bands, vega_config
from streamlens.views.bands import are_percentiles
from streamlens.views.others import other_sections
from streamlens.views.theme import NOT_FINITE
from tests.operators.support import run
from tests.views.fakes import count_pixels, draw, rows


def table(values: dict[str, list[float]], layer: str = "a") -> pd.DataFrame:
    """Rows of one layer, a list over steps for each percentile."""
    parts = [rows({layer: series}, component=name) for name, series in values.items()]
    return pd.concat(parts, ignore_index=True)


def drawn(spec: dict[str, Any]) -> tuple[dict[tuple[str, int], tuple[Any, Any]], dict[int, dict[str, Any]]]:
    """The edges of each band and the row of each step."""
    every = [row for data in spec["datasets"].values() for row in data]
    bands = {(r["band"], r["step"]): (r["value"], r["upper"]) for r in every if "band" in r}
    return bands, {r["step"]: r for r in every if "p50" in r or "p5" in r}


FIVE = {"p95": [4.0, 5.0], "p5": [0.0, -1.0], "p50": [2.0, 2.5], "p25": [1.0, 1.0], "p75": [3.0, 3.5]}


def test_bands_are_nested_from_the_outermost_percentiles_to_the_median() -> None:
    spec = percentile_bands(table(FIVE), values="weights").to_dict()
    bands, steps = drawn(spec)
    assert bands == {
        ("p5 to p95", 0): (0.0, 4.0),
        ("p5 to p95", 1): (-1.0, 5.0),
        ("p25 to p75", 0): (1.0, 3.0),
        ("p25 to p75", 1): (1.0, 3.5),
    }
    assert steps[1]["value"] == steps[1]["p50"] == 2.5
    assert [layer["mark"]["type"] for layer in spec["layer"]] == ["area", "line", "point"]
    assert spec["layer"][0]["encoding"]["y"]["title"] == "weights"
    opacity = spec["layer"][0]["encoding"]["opacity"]["scale"]
    assert opacity["domain"] == ["p5 to p95", "p25 to p75"]
    assert opacity["range"][0] < opacity["range"][1]


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_picture_has_the_line_and_paler_areas_around_it(mode: Any) -> None:
    time = np.linspace(0, 1, 50)
    many = {f"p{p}": (time * (p - 50)).tolist() for p in (5, 25, 50, 75, 95)}
    pixels = draw(percentile_bands(table(many)).to_dict(), mode)
    hue = vega_config(mode)["range"]["category"][0]
    assert count_pixels(pixels, hue) > 300
    background = np.array([255] * 3 if mode == "light" else [13, 17, 23])
    painted = (np.abs(pixels - background).max(-1) > 10).mean()
    assert painted > 0.2


def test_an_even_number_of_percentiles_has_no_line() -> None:
    spec = percentile_bands(table({"p5": [0.0, 1.0], "p95": [1.0, 2.0]})).to_dict()
    assert [layer["mark"]["type"] for layer in spec["layer"]] == ["area", "point"]


def test_nan_and_infinity_are_marked_and_leave_a_gap_where_they_are_an_edge() -> None:
    values = {
        "p0": [0.0, math.nan, 0.0],
        "p25": [1.0, math.nan, 1.0],
        "p50": [2.0, math.nan, 2.0],
        "p75": [3.0, math.nan, 3.0],
        "p100": [4.0, math.nan, math.inf],
    }
    spec = percentile_bands(table(values)).to_dict()
    bands, steps = drawn(spec)
    assert bands["p0 to p100", 1] == bands["p0 to p100", 2] == (None, None)
    assert bands["p25 to p75", 2] == (1.0, 3.0)
    assert steps[1]["value"] is None
    every = [row for data in spec["datasets"].values() for row in data]
    assert [(r["step"], r["series"], r["flag"]) for r in every if "flag" in r] == [
        (1, "p0", "NaN"),
        (2, "p100", "+inf"),
    ]
    assert NOT_FINITE in str(spec)
    draw(spec)


def test_a_long_run_keeps_its_spikes_within_the_points_allowed() -> None:
    time = np.sin(np.arange(5000) / 300)
    spiked = time + 2
    spiked[1234] = 50
    spec = percentile_bands(
        table({"p5": (time - 2).tolist(), "p50": time.tolist(), "p95": spiked.tolist()}), max_points=300
    ).to_dict()
    bands, steps = drawn(spec)
    assert len(bands) + len(steps) <= 300
    assert bands["p5 to p95", 1234][1] == 50


def test_percentiles_that_were_thinned_each_by_itself_meet_on_all_of_their_steps() -> None:
    whole = table({"p5": [0.0, 1.0, 2.0], "p95": [5.0, 6.0, 7.0]})
    thinned = whole[~((whole["component"] == "p5") & (whole["step"] == 1))]
    bands, _ = drawn(percentile_bands(thinned).to_dict())
    assert bands["p5 to p95", 1] == (1.0, 6.0)


def test_what_the_operator_gives_is_what_the_view_takes() -> None:
    frames = [Frame("weights", k, ("a",), (torch.arange(101.0) * (k + 1),)) for k in range(2)]
    found = pd.concat([f.to_pandas() for f in run(sl.percentile_bands(), frames)])
    assert are_percentiles(found)
    bands, steps = drawn(percentile_bands(found).to_dict())
    assert bands["p0 to p100", 1] == (0.0, 200.0)
    assert bands["p25 to p75", 0] == (25.0, 75.0)
    assert steps[0]["p50"] == 50


def test_what_is_no_percentiles_is_refused_and_nothing_is_said_in_words() -> None:
    with pytest.raises(ValueError, match=r"sl\.percentile_bands\(\) made"):
        percentile_bands(table({"q0.5": [1.0], "q0.9": [1.0]}))
    assert not are_percentiles(table({"p50": [1.0]}))
    assert not are_percentiles(rows({"a": [1.0]}))
    assert "no percentiles were recorded" in str(percentile_bands(rows({"a": []})).to_dict())


def test_the_report_draws_a_chart_of_bands_for_some_layers_and_says_how_to_read_it() -> None:
    names = [f"layer{i}" for i in range(8)]
    found = pd.concat([table(FIVE, name) for name in names], ignore_index=True)
    topic = "weights.percentile_bands"
    made = list(other_sections({topic: found}, {topic: names}, limits=None, max_points=2000))
    assert len(made) == 6
    assert made[0].title == "Percentile bands of weights: layer0"
    assert "the line being the median" in made[0].reading
    assert made[-1].reading.endswith("2 more layers were recorded.")
    assert made[0].chart.to_dict()["layer"][0]["mark"]["type"] == "area"
