"""Charts of any metric and of histograms: what they draw is what was recorded."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from streamlens.reductions import Bins
from streamlens.views import histogram, metric
from streamlens.views.theme import NOT_FINITE
from tests.views.fakes import LAYERS, draw, rows


def data_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for rows in spec["datasets"].values() for row in rows]


def y_scale(spec: dict[str, Any]) -> str:
    return str(spec["layer"][0]["encoding"]["y"]["scale"].get("type", "linear"))


def test_a_metric_is_drawn_with_all_its_values() -> None:
    spec = metric(rows({"a": [1.0, 2.0, 1.5], "b": [-1.0, 0.0, 3.0]}), title="cosine").to_dict()
    drawn = {(row["series"], row["step"]): row["value"] for row in data_of(spec)}
    assert drawn == {
        ("a", 0): 1.0,
        ("a", 1): 2.0,
        ("a", 2): 1.5,
        ("b", 0): -1.0,
        ("b", 1): 0.0,
        ("b", 2): 3.0,
    }
    assert y_scale(spec) == "linear"
    assert draw(spec).std() > 0


def test_values_over_decades_have_a_logarithmic_axis() -> None:
    assert y_scale(metric(rows({"a": [1e-3, 1.0]}), title="x").to_dict()) == "log"
    assert y_scale(metric(rows({"a": [0.5, 1.0]}), title="x").to_dict()) == "linear"
    assert y_scale(metric(rows({"a": [0.0, 1e6]}), title="x").to_dict()) == "linear"


def test_each_component_of_a_layer_has_its_own_line_in_model_order() -> None:
    table = pd.concat([rows({"b": [1.0], "a": [2.0]}, component=name) for name in ("p5", "p95")])
    spec = metric(table, title="x", layers=["a", "b"]).to_dict()
    assert spec["layer"][0]["encoding"]["color"]["scale"]["domain"] == ["a p5", "a p95", "b p5", "b p95"]


def test_more_lines_than_there_is_room_for_are_a_heatmap_or_some_of_them() -> None:
    positive = rows({f"l{i}": np.linspace(1, 2, 100) for i in range(100)})
    assert metric(positive, title="x", max_points=1000).to_dict()["layer"][0]["mark"]["type"] == "rect"
    signed = positive.assign(value=-positive["value"])
    spec = metric(signed, title="x", max_points=1000).to_dict()
    assert "25 of 100 lines" in spec["layer"][0]["encoding"]["y"]["title"]
    assert len(data_of(spec)) <= 1000


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_a_value_that_no_line_can_show_is_marked(mode: str) -> None:
    spec = metric(rows({"a": [1.0, math.nan, 2.0]}), title="x").to_dict()
    assert [row["flag"] for row in data_of(spec) if "flag" in row] == ["NaN"]
    assert NOT_FINITE in str(spec)
    assert draw(spec, mode).std() > 0


def histogram_rows(values: np.ndarray[Any, Any], bins: Bins) -> pd.DataFrame:
    """Counted by hand: a row of values a step."""
    names = bins.components
    parts = []
    for step, row in enumerate(values):
        finite = row[np.isfinite(row)]
        inner, _ = np.histogram(finite, bins.edges)
        below, above = (finite < bins.low).sum(), (finite > bins.high).sum()
        ends = [(row == math.inf).sum(), np.isnan(row).sum()]
        counts = [(row == -math.inf).sum(), below, *inner, above, *ends]
        parts.append(
            pd.DataFrame({"step": step, "epoch": 0, "layer": "a", "component": names, "value": counts})
        )
    return pd.concat(parts, ignore_index=True)


def test_a_histogram_draws_the_share_of_each_bin_at_each_step() -> None:
    values = np.array([[0.1, 0.1, 0.6, 0.9], [0.1, 0.3, 0.3, 0.3]])
    spec = histogram(histogram_rows(values, Bins(0, 1, 4))).to_dict()
    cells = {(row["step"], row["from"], row["to"]): row["share"] for row in data_of(spec)}
    assert cells == {(0, 0, 0.25): 0.5, (0, 0.5, 0.75): 0.25, (0, 0.75, 1): 0.25, (1, 0, 0.25): 0.25} | {
        (1, 0.25, 0.5): 0.75
    }
    assert draw(spec).std() > 0
    assert draw(spec, "dark").std() > 0


def test_steps_and_bins_are_joined_until_there_is_room_and_shares_add_up() -> None:
    values = np.random.default_rng(0).normal(size=(100, 500))
    spec = histogram(histogram_rows(values, Bins(-5, 5, 200)), max_cells=480).to_dict()
    cells = data_of(spec)
    assert len(cells) <= 480
    assert len({row["bin"] for row in cells}) <= 48
    by_step = pd.DataFrame(cells).groupby("step")["share"].sum()
    np.testing.assert_allclose(by_step, 1.0, rtol=1e-2)


@pytest.mark.parametrize("number", [33, 44, 60, 110])
def test_logarithmic_bins_are_labelled_on_both_sides_of_zero_however_they_are_joined(number: int) -> None:
    names = Bins(1e-8, 1e3, number, log=True).components
    table = pd.DataFrame({"step": 0, "epoch": 0, "layer": "a", "component": names, "value": 1.0})
    axes = [layer["encoding"]["y"].get("axis", {}) for layer in histogram(table).to_dict()["layer"]]
    [expression] = [axis["labelExpr"] for axis in axes if "labelExpr" in axis]
    labels = list(json.loads(expression.removesuffix("[datum.value]")).values())
    negative = [label for label in labels if label.startswith("\u2212")]
    assert 3 <= len(negative) <= 6
    assert 3 <= len(labels) - len(negative) <= 6


def test_nan_and_infinities_in_a_histogram_are_marked_at_their_step() -> None:
    values = np.array([[0.5, 0.5, 0.5], [math.nan, math.inf, 0.5]])
    spec = histogram(histogram_rows(values, Bins(0, 1, 2))).to_dict()
    [mark] = [row for row in data_of(spec) if "flag" in row]
    assert (mark["step"], mark["flag"]) == (1, "+inf, NaN")


def test_values_that_are_no_histogram_are_refused() -> None:
    with pytest.raises(ValueError, match="components are no bins"):
        histogram(rows({LAYERS[0]: [1.0]}, component="1"))
