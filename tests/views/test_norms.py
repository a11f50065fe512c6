"""Gradient norms with the dead units of each layer below: what stands where, and how it is drawn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from streamlens import views
from streamlens.views.theme import NOT_FINITE
from tests.views.fakes import count_pixels, draw, rows

GRADIENTS = rows({"conv": [1.0, 2.0, 3.0, 4.0], "fc": [4.0, 3.0, 2.0, 1.0]})
DEAD = rows({"relu1": [0.0, 0.25, 0.5, 1.0], "relu2": [0.0, 0.0, 0.0, 0.5]})


def shown(chart: Any, column: str) -> list[dict[str, Any]]:
    return [row for data in chart.to_dict()["datasets"].values() for row in data if column in row]


def test_each_layer_with_dead_units_has_a_row_of_their_share_in_model_order() -> None:
    chart = views.gradient_norms(GRADIENTS, DEAD, dead_layers=["relu2", "relu1"])
    cells = shown(chart, "bottom")
    shares = {name: [row["value"] for row in cells if row["layer"] == name] for name in ("relu1", "relu2")}
    assert shares == {"relu1": [0.0, 0.25, 0.5, 1.0], "relu2": [0.0, 0.0, 0.0, 0.5]}
    tops = {row["layer"]: row["top"] for row in cells}
    assert 240 < tops["relu2"] < tops["relu1"] < chart.to_dict()["height"]
    assert [row["name"] for row in shown(chart, "name")] == ["relu2", "relu1"]


def test_the_norms_stay_above_the_strip_and_both_have_one_step_axis() -> None:
    spec = views.gradient_norms(GRADIENTS, DEAD).to_dict()
    scales = [layer["encoding"]["y"].get("scale") for layer in spec["layer"]]
    assert scales[0]["range"] == [240, 0]
    assert {layer["encoding"]["x"]["field"] for layer in spec["layer"] if "x2" in layer["encoding"]} == {
        "step"
    }
    alone = draw(views.gradient_norms(GRADIENTS).to_dict())
    assert draw(spec).shape[0] > alone.shape[0] + 40


def test_nan_is_magenta_at_the_foot_of_the_norms_and_in_its_cell() -> None:
    gradients, dead = GRADIENTS.copy(), DEAD.copy()
    gradients.loc[1, "value"] = math.nan
    dead.loc[2, "value"] = math.nan
    chart = views.gradient_norms(gradients, dead)
    assert [(row["layer"], row["step"]) for row in shown(chart, "holds")] == [("relu1", 2)]
    feet = [layer["encoding"]["y"] for layer in chart.to_dict()["layer"] if "value" in layer["encoding"]["y"]]
    assert {"value": 240} in feet
    assert count_pixels(draw(chart.to_dict()), NOT_FINITE) > 500
    assert count_pixels(draw(views.gradient_norms(GRADIENTS, DEAD).to_dict()), NOT_FINITE) == 0


def test_a_share_of_many_steps_in_a_cell_is_their_mean() -> None:
    dead = rows({"relu": np.linspace(0, 1, 1000)})
    cells = shown(views.gradient_norms(GRADIENTS, dead, max_points=30), "bottom")
    assert len(cells) == 10
    assert cells[0]["value"] == pytest.approx(np.linspace(0, 1, 1000)[:100].mean(), abs=1e-3)


def test_many_layers_are_heatmaps_above_one_another_that_do_not_overlap() -> None:
    many = rows({f"conv{i}": np.linspace(1, 2, 60) for i in range(80)})
    dead = rows({f"relu{i}": np.linspace(0, 1, 60) for i in range(80)})
    chart = views.gradient_norms(many, dead)
    heat = chart.to_dict()["layer"][0]
    low, high = heat["encoding"]["y"]["scale"]["range"]
    assert low == 0
    assert high < min(row["top"] for row in shown(chart, "bottom"))
    names = [row["name"] for row in shown(chart, "name")]
    assert 5 < len(names) <= 20


@pytest.mark.parametrize("dead", [None, rows({"relu": []})])
def test_without_dead_units_the_norms_stand_alone(dead: pd.DataFrame | None) -> None:
    assert views.gradient_norms(GRADIENTS, dead).to_dict()["height"] == 240


def test_hostile_names_are_labels() -> None:
    name = "</script><b>'\"[0].x"
    chart = views.gradient_norms(rows({name: [1.0, 2.0]}), rows({name: [0.5, math.nan]}))
    assert {row["layer"] for row in shown(chart, "bottom")} == {name}
    assert draw(chart.to_dict()).size
