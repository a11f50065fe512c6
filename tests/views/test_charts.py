"""Each view: valid by Altair's schema, drawn by Vega-Lite, its numbers where they belong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import pytest

from streamlens import views
from streamlens.views.theme import NOT_FINITE, Mode
from tests.views.fakes import count_pixels, draw, rows, tables

DATA = tables()
VIEWS: dict[str, Callable[[], alt.LayerChart]] = {
    "loss": lambda: views.loss(DATA["loss"], DATA["loss.ema"]),
    "accuracies": lambda: views.accuracies(
        {"training": DATA["train_accuracy"], "test": DATA["test_accuracy"]}
    ),
    "learning_rate": lambda: views.learning_rate(DATA["learning_rate"]),
    "hessian_eigenvalues": lambda: views.hessian_eigenvalues(
        DATA["hessian_eigenvalues"], DATA["learning_rate"]
    ),
    "update_to_weight_ratio": lambda: views.update_to_weight_ratio(DATA["uw_ratio"]),
    "gradient_norms": lambda: views.gradient_norms(DATA["weight_gradients.norm2"]),
    "weight_norms": lambda: views.weight_norms(DATA["weights.norm2"]),
}
# Which of the first three hues of the palette the picture has; nothing but data has them.
HUES: dict[str, tuple[int, ...]] = {
    "loss": (0,),
    "accuracies": (0, 1),
    "learning_rate": (0,),
    "hessian_eigenvalues": (0, 1, 2),
    "gradient_norms": (0, 1, 2),
    "weight_norms": (0, 1, 2),
}


def datasets(spec: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return list(spec["datasets"].values())


def layer_marks(spec: dict[str, Any]) -> list[str]:
    return [layer["mark"]["type"] for layer in spec["layer"]]


def axis(spec: dict[str, Any], channel: str) -> dict[str, Any]:
    encoding: dict[str, Any] = spec["layer"][0]["encoding"][channel]
    return encoding


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_a_valid_specification_with_both_axes_named(name: str) -> None:
    spec = VIEWS[name]().to_dict()  # validates against the schema
    assert spec["$schema"].endswith(f"{alt.SCHEMA_VERSION}.json")
    assert axis(spec, "x")["title"] == "step (optimizer updates)"
    if name != "update_to_weight_ratio":  # its rows are the layers' own names
        assert axis(spec, "y")["title"]


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("name", HUES)
def test_a_view_draws_each_series_in_its_colour_in_both_modes(name: str, mode: Mode) -> None:
    palette = views.vega_config(mode)["range"]["category"]
    pixels = draw(VIEWS[name]().to_dict(), mode)
    for hue in range(3):
        drawn = count_pixels(pixels, palette[hue])
        assert (drawn > 100) == (hue in HUES[name]), (palette[hue], drawn)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_of_an_empty_table_says_so_in_words(name: str) -> None:
    empty = rows({"": []})
    chart = views.accuracies({"test": empty}) if name == "accuracies" else getattr(views, name)(empty)
    assert "was recorded" in datasets(chart.to_dict())[0][0]["message"]


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_pans_and_zooms_only_along_the_steps(name: str) -> None:
    (steps,) = [p for p in VIEWS[name]().to_dict()["params"] if p["name"] == "steps"]
    assert steps["bind"] == "scales"
    assert steps["select"]["encodings"] == ["x"]


def test_views_put_together_are_one_chart_that_zooms_together() -> None:
    spec = views.stack(*[make() for make in VIEWS.values()]).to_dict()
    (steps,) = [p for p in spec["params"] if p["name"] == "steps"]
    tied = [sum(layer.get("name") in steps["views"] for layer in view["layer"]) for view in spec["vconcat"]]
    assert tied == [1] * len(VIEWS)
    alone = [draw(make().to_dict()).shape[0] for make in VIEWS.values()]
    assert draw(spec).shape[0] >= 0.9 * sum(alone)


def test_a_themed_view_carries_the_colours_of_its_mode() -> None:
    chart = views.themed(VIEWS["loss"](), "dark")
    assert chart.to_dict()["config"]["mark"]["color"] == views.vega_config("dark")["mark"]["color"]


def test_an_unknown_mode_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'sepia': use 'light' or 'dark'"):
        views.vega_config("sepia")  # type: ignore[arg-type]


def test_a_positive_loss_has_a_logarithmic_axis_and_another_a_linear_one() -> None:
    assert axis(views.loss(rows({"": [3, 2, 1]})).to_dict(), "y")["scale"]["type"] == "log"
    assert "type" not in axis(views.loss(rows({"": [3, -2, 1]})).to_dict(), "y")["scale"]


def test_the_loss_draws_the_recorded_average_where_there_is_one() -> None:
    spec = views.loss(rows({"": [4, 4, 4]}), rows({"": [7, 7, 7]})).to_dict()
    drawn = [(r["kind"], r["value"]) for data in datasets(spec) for r in data]
    assert drawn == [("each step", 4.0)] * 3 + [("moving average", 7.0)] * 3


def test_each_of_several_losses_has_a_colour_of_its_own() -> None:
    both = pd.concat(
        [rows({"": [4, 3, 2]}, component="generator"), rows({"": [1, 2, 3]}, component="critic")]
    )
    spec = views.loss(both).to_dict()
    assert axis(spec, "color")["scale"]["domain"] == ["generator", "critic"]


def test_nan_in_a_line_is_a_magenta_mark_at_its_step_and_without_nan_there_is_none() -> None:
    values = [3.0, 2.0, math.nan, 1.0]
    spec = views.loss(rows({"": values})).to_dict()
    assert [r["step"] for data in datasets(spec) for r in data if "flag" in r] == [2]
    assert count_pixels(draw(spec), NOT_FINITE) > 10
    assert count_pixels(draw(views.loss(rows({"": [3.0, 2.0, 1.0]})).to_dict()), NOT_FINITE) == 0


def test_layers_with_one_schedule_share_a_line_and_others_have_their_own() -> None:
    shared = views.learning_rate(rows({"a": [0.1, 0.1], "b": [0.1, 0.1]})).to_dict()
    assert {r["series"] for r in datasets(shared)[0]} == {"all layers"}
    split = views.learning_rate(rows({"a": [0.1, 0.1], "b": [0.1, 0.1], "c": [0.1, 0.2]})).to_dict()
    assert list(dict.fromkeys(r["series"] for r in datasets(split)[0])) == ["a and 1 more", "c"]


def curvature(largest: list[float], rates: dict[str, list[float]] | None) -> dict[str, Any]:
    """The chart of one eigenvalue at the steps 0, 10, 20, ... with rates at every step."""
    values = rows({"": largest}, every=10, component="1")
    chart = views.hessian_eigenvalues(values, None if rates is None else rows(rates))
    return chart.to_dict()


def bound(spec: dict[str, Any]) -> dict[int, float]:
    """The dashed line: step to 2 / learning rate."""
    drawn = [r for data in datasets(spec) for r in data if r.get("series") == "2 / learning rate"]
    return {r["step"]: r["value"] for r in drawn}


def test_eigenvalues_stand_against_two_over_the_largest_rate_of_each_step() -> None:
    spec = curvature([10.0, 20.0, 30.0], {"a": [0.1] * 15 + [0.05] * 15, "b": [0.01] * 30})
    assert bound(spec) == {step: 20.0 if step < 15 else 40.0 for step in range(21)}
    assert axis(spec, "y")["title"] == "eigenvalue (dashed: 2 / learning rate)"
    assert [r["series"] for data in datasets(spec) for r in data if r["value"] == 30.0] == ["λ₁"]
    assert count_pixels(draw(spec), "#808080") > count_pixels(draw(curvature([10.0, 20.0], None)), "#808080")


def test_without_rates_the_eigenvalues_stand_alone() -> None:
    for rates in (None, {"a": [0.0] * 30}):
        spec = curvature([10.0, 20.0, 30.0], rates)
        assert bound(spec) == {}
        assert axis(spec, "y")["title"] == "eigenvalue"


def test_a_negative_eigenvalue_has_its_place_and_a_far_bound_does_not_flatten_it() -> None:
    near = curvature([-1.0, 2.0], {"a": [0.5] * 11})
    far = curvature([-1.0, 2.0], {"a": [0.01] * 11})
    for spec in (near, far):
        assert "type" not in axis(spec, "y")["scale"]
        assert not [r for data in datasets(spec) for r in data if "flag" in r]
    assert set(bound(near).values()) == {4.0}
    assert bound(far) == {}
    assert axis(curvature([1.0, 2.0], None), "y")["scale"]["type"] == "log"


def test_up_to_twelve_layers_have_a_legend_and_more_answer_to_the_pointer() -> None:
    def norms(n: int) -> dict[str, Any]:
        return views.gradient_norms(rows({f"layer{i}": [1.0 + i, 2.0] for i in range(n)})).to_dict()

    few, many = norms(12), norms(13)
    assert axis(few, "color")["legend"] is not None
    assert any(p.get("bind") == "legend" for p in few["params"])
    assert axis(many, "color")["legend"] is None
    assert not any(p.get("bind") == "legend" for p in many["params"])
    (hover,) = [p for p in many["params"] if p["name"] == "hover_series"]
    assert hover["select"]["fields"] == ["series"]
    # Thirteen lines have thirteen colours: a list of colours would begin again.
    lines = draw(many)
    assert len({tuple(c) for c in lines.reshape(-1, 3)[lines.reshape(-1, 3).std(axis=1) > 25]}) > 13


def test_more_layers_than_there_are_points_for_are_a_heatmap() -> None:
    many = rows({f"layer{i}": np.linspace(1, 2, 60).tolist() for i in range(80)})
    assert "rect" in layer_marks(views.gradient_norms(many).to_dict())
    assert "line" in layer_marks(views.gradient_norms(many, max_points=80 * 60).to_dict())


def test_zero_gradients_are_marked_since_a_logarithmic_axis_has_no_zero() -> None:
    spec = views.gradient_norms(rows({"a": [1.0, 0.0, 2.0]})).to_dict()
    assert [(r["step"], r["flag"]) for data in datasets(spec) for r in data if "flag" in r] == [(1, "0")]


def test_the_limits_given_are_those_of_the_step_axis() -> None:
    assert axis(views.loss(DATA["loss"], limits=(0, 500)).to_dict(), "x")["scale"]["domain"] == [0, 500]


@pytest.mark.parametrize("name", ["loss", "learning_rate", "gradient_norms"])
def test_a_single_step_is_a_dot_as_no_line_can_show_it(name: str) -> None:
    one = {topic: table[table["step"] == 0] for topic, table in DATA.items()}
    drawn = views.VIEWS[name].draw(one)
    hue = views.vega_config("light")["range"]["category"][0]
    # Its legend alone has fewer: the dot's pixels are those that the chart of no values lacks.
    legend = views.VIEWS[name].draw({t: table.assign(value=math.nan) for t, table in one.items()})
    dot = count_pixels(draw(drawn.to_dict()), hue) - count_pixels(draw(legend.to_dict()), hue)
    assert dot > 5


def test_a_loss_between_two_nan_is_seen() -> None:
    table = rows({"": [math.nan, 1.0, math.nan, math.nan]})
    chart = views.loss(table, rows({"": [math.nan, math.nan, math.nan, math.nan]}))
    faint = [layer["mark"] for layer in chart.to_dict()["layer"] if layer["mark"]["type"] == "line"]
    assert faint[0]["strokeCap"] == "round"


def test_the_average_of_a_loss_ends_where_the_loss_was_last_finite() -> None:
    table = rows({"": [3.0, 2.0, 1.0, math.nan, math.inf, math.nan]})
    for smoothed in (rows({"": [3.0, 2.5, 2.0, 2.0, 2.0, 2.0]}), None):
        found = [row for data in datasets(views.loss(table, smoothed).to_dict()) for row in data]
        steps = [row["step"] for row in found if row.get("kind") == "moving average"]
        assert max(steps) == 2


def test_long_names_keep_the_ends_that_tell_layers_apart() -> None:
    axis_of = views.update_to_weight_ratio(rows({"encoder.stages.0.convolution": [1e-3]})).to_dict()
    label = axis_of["layer"][0]["encoding"]["y"]["axis"]["labelExpr"]
    assert "slice(datum.label, 1 - " in label
    assert "containerSize()" in label  # a narrow page has room for fewer letters
