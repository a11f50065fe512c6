"""The heatmap of the update-to-weight ratio: what is in which cell, and in which colour."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from streamlens import views
from streamlens.views.theme import NOT_FINITE
from tests.views.fakes import count_pixels, draw, rows


def cells(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for data in spec["datasets"].values() for r in data]


def color_scale(spec: dict[str, Any]) -> dict[str, Any]:
    scale: dict[str, Any] = spec["layer"][0]["encoding"]["color"]["scale"]
    return scale


def test_each_cell_holds_the_logarithm_of_one_ratio() -> None:
    spec = views.update_to_weight_ratio(rows({"a": [1e-3, 1e-2], "b": [1e-4, 1e-3]})).to_dict()
    assert [(c["layer"], c["step"], c["end"], c["value"]) for c in cells(spec)] == [
        ("a", 0, 1, -3),
        ("a", 1, 2, -2),
        ("b", 0, 1, -4),
        ("b", 1, 2, -3),
    ]


def test_rows_stand_in_model_order_from_the_top_and_not_by_name() -> None:
    table = rows({"z.in": [1e-3], "a.mid": [1e-3], "m.out": [1e-3]})
    y = views.update_to_weight_ratio(table).to_dict()["layer"][0]["encoding"]["y"]
    assert y["scale"]["domain"] == ["z.in", "a.mid", "m.out"]
    given = views.update_to_weight_ratio(table, layers=["m.out", "z.in", "a.mid"])
    assert given.to_dict()["layer"][0]["encoding"]["y"]["scale"]["domain"] == ["m.out", "z.in", "a.mid"]


def test_a_long_run_is_drawn_as_means_of_logarithms_within_the_cells_allowed() -> None:
    rng = np.random.default_rng(1)
    ratios = {f"layer{i}": (10 ** rng.uniform(-4, -2, 3000)).tolist() for i in range(7)}
    drawn = cells(views.update_to_weight_ratio(rows(ratios), max_cells=700).to_dict())
    assert 350 < len(drawn) <= 700
    for cell in drawn[::37]:
        inside = [math.log10(v) for v in ratios[cell["layer"]][cell["step"] : cell["last"] + 1]]
        assert cell["value"] == pytest.approx(sum(inside) / len(inside), abs=1e-3)
    # Nothing is left out, nothing counted twice.
    one = [c for c in drawn if c["layer"] == "layer0"]
    assert one[0]["step"] == 0
    assert [a["end"] for a in one[:-1]] == [b["step"] for b in one[1:]]
    assert one[-1]["last"] == 2999


def test_a_cadence_leaves_no_holes_between_cells() -> None:
    drawn = cells(views.update_to_weight_ratio(rows({"a": [1e-3] * 5}, every=10)).to_dict())
    assert [(c["step"], c["end"]) for c in drawn] == [(0, 10), (10, 20), (20, 30), (30, 40), (40, 50)]


def test_more_layers_than_rows_share_rows_that_name_their_first_and_last() -> None:
    drawn = cells(views.update_to_weight_ratio(rows({f"l{i}": [1e-3, 1e-3] for i in range(500)})).to_dict())
    names = list(dict.fromkeys(c["layer"] for c in drawn))
    assert len(names) == 200
    assert names[0] == "l0 … l2"
    assert names[-1].endswith("l499")


def test_one_nan_or_infinity_among_many_makes_its_cell_magenta_and_no_other() -> None:
    values = [1e-3] * 100
    values[42] = math.nan
    values[77] = math.inf
    spec = views.update_to_weight_ratio(rows({"a": values, "b": [1e-3] * 100}), max_cells=40).to_dict()
    bad = [c for c in cells(spec) if "holds" in c]
    assert [(c["layer"], c["step"] <= step <= c["last"]) for c, step in zip(bad, (42, 77), strict=True)] == [
        ("a", True),
        ("a", True),
    ]
    magenta = count_pixels(draw(spec), NOT_FINITE)
    one_cell = 720 / 20 * 24 * 0.92
    assert 1.8 * one_cell < magenta < 2.2 * one_cell


def test_a_layer_that_does_not_change_has_the_lowest_colour_and_is_not_marked_as_bad() -> None:
    spec = views.update_to_weight_ratio(rows({"frozen": [0.0] * 50, "trained": [1e-3] * 50})).to_dict()
    assert not [c for c in cells(spec) if "holds" in c]
    pixels = draw(spec)
    lowest, *_, highest = views.vega_config("light")["range"]["diverging"]
    assert count_pixels(pixels, lowest) > 5000
    assert count_pixels(pixels, NOT_FINITE) == 0
    # The colour legend alone has a little of the highest.
    assert count_pixels(pixels, highest) < 500


@pytest.mark.parametrize("ratios", [[1e-3, 2e-3], [1e-7, 1e-1], [0.0, math.nan], [1e-5] * 4])
def test_the_middle_of_the_colours_is_one_in_a_thousand_whatever_the_ratios(ratios: list[float]) -> None:
    low, high = color_scale(views.update_to_weight_ratio(rows({"a": ratios})).to_dict())["domain"]
    assert low + high == -6
    assert 1 <= high + 3 <= 3


def test_ratios_below_at_and_above_the_middle_are_blue_neutral_and_orange() -> None:
    spec = views.update_to_weight_ratio(rows({"a": [1e-5] * 9, "b": [1e-3] * 9, "c": [1e-1] * 9})).to_dict()
    pixels = draw(spec)
    middle = len(views.vega_config("light")["range"]["diverging"]) // 2
    for color in (0, middle, -1):
        assert count_pixels(pixels, views.vega_config("light")["range"]["diverging"][color]) > 8000
