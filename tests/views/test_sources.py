"""Charts of people's own over `sl.views.data(topic)`: found, filled, and safe with any name."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import altair as alt
import pandas as pd
import pytest

import streamlens as sl
from streamlens import views
from streamlens.views.sources import source_name
from tests.views.fakes import count_pixels, draw, rows, tables

HOSTILE = ["</script><script>alert(1)</script>", "quo\"te's", "a.b[0].c", "\\u003c", "topic:topic:x"]


def lines(topic: str) -> alt.Chart:
    chart: alt.Chart = alt.Chart(sl.views.data(topic)).mark_line()
    return chart.encode(x="step:Q", y="value:Q", color="layer:N")


def test_a_chart_over_a_topic_is_drawn_with_its_rows() -> None:
    empty = views.filled(lines("uw_ratio"), {})
    full = views.filled(lines("uw_ratio"), {"uw_ratio": rows({"a": [1, 2, 1], "b": [3, 1, 2]})})
    blue = views.vega_config("light")["range"]["category"][0]
    assert count_pixels(draw(empty), blue) == 0
    assert count_pixels(draw(full), blue) > 20
    assert [row["value"] for row in full["datasets"][source_name("uw_ratio")]] == [1, 2, 1, 3, 1, 2]


def test_the_topics_of_layers_concatenations_and_lookups_are_found_once_each_in_order() -> None:
    looked: alt.Chart = lines("b").transform_lookup(
        lookup="step", from_=alt.LookupData(data=views.data("d"), key="step", fields=["value"])
    )
    chart = (lines("a") + looked) & (lines("c") | lines("a"))
    assert views.topics_of(chart) == ("a", "b", "d", "c")
    assert views.topics_of(chart.to_dict()) == ("a", "b", "d", "c")


def test_data_that_is_not_a_topic_is_left_as_it_is() -> None:
    own = alt.Chart(pd.DataFrame({"x": [1]})).mark_point().encode(x="x:Q")
    named = alt.Chart(alt.NamedData("loss")).mark_point().encode(x="x:Q")
    assert views.topics_of(own + named) == ()
    spec = views.filled(own + lines("loss"), {"loss": rows({"": [2.0]})})
    assert [{"x": 1}] in spec["datasets"].values()


def test_a_row_has_the_columns_that_are_promised() -> None:
    table = rows({"fc": [0.5]}, component="p5")
    (row,) = views.records(table, run="first")
    assert row == {
        "step": 0,
        "epoch": 0,
        "layer": "fc",
        "component": "p5",
        "value": 0.5,
        "flag": "",
        "run": "first",
    }
    (plain,) = views.records(rows({"": [1.0]}))
    assert (plain["layer"], plain["component"], plain["run"]) == ("", "", "")


def test_what_is_not_finite_is_null_and_flagged_and_the_rest_is_json() -> None:
    found = views.records(rows({"a": [math.nan, math.inf, -math.inf, 0.0]}))
    assert [(row["value"], row["flag"]) for row in found] == [
        (None, "NaN"),
        (None, "+inf"),
        (None, "-inf"),
        (0.0, ""),
    ]
    json.dumps(found, allow_nan=False)


def test_the_sentences_of_alerts_and_actions_come_along() -> None:
    table = pd.DataFrame(
        {"step": [3], "layer": ["a"], "value": [1.0], "text": ["it <b>grew</b>"], "since": [math.nan]}
    )
    (row,) = views.records(table)
    assert (row["text"], row["since"]) == ("it <b>grew</b>", None)


def test_a_long_topic_is_thinned_with_its_extremes_and_its_nan() -> None:
    values = [1.0] * 4000
    values[1234], values[2345], values[3456] = 50.0, math.nan, -50.0
    found = views.records(rows({"a": values, "b": [2.0] * 4000}), max_points=200)
    assert len(found) <= 200
    of_a = [row["value"] for row in found if row["layer"] == "a"]
    assert {50.0, -50.0, None} <= set(of_a)
    assert {row["layer"] for row in found} == {"a", "b"}


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_of_a_topic_or_layer_comes_through_unchanged(name: str) -> None:
    spec = views.filled(lines(name), {name: rows({name: [1.0, 2.0]})})
    assert views.topics_of(spec) == (name,)
    assert {row["layer"] for row in spec["datasets"][source_name(name)]} == {name}
    assert draw(spec).size > 0


def test_a_topic_without_a_name_is_an_error_that_says_what_a_name_is() -> None:
    wrong: Any
    for wrong in ("", None, ["loss"]):
        with pytest.raises(ValueError, match="a topic is a name, such as 'loss'"):
            views.data(wrong)


def test_a_view_taken_apart_differs_in_its_rows_alone_as_the_run_grows() -> None:
    def apart(steps: int) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
        table = tables(120)["uw_ratio"]
        return views.taken_apart(views.gradient_norms(table[table["step"] < steps], limits=(0, 120)))

    (before, few), (after, more) = apart(60), apart(90)
    assert before == after
    assert list(few) == list(more) == ["data-0"]
    assert len(few["data-0"]) < len(more["data-0"])
    whole = {**after, "datasets": more}
    assert (
        draw(whole)
        == draw(views.gradient_norms(tables(120)["uw_ratio"].query("step < 90"), limits=(0, 120)).to_dict())
    ).all()


def test_the_views_are_imported_when_they_are_asked_for() -> None:
    code = (
        "import sys, streamlens as sl; assert 'altair' not in sys.modules; "
        "sl.views.data('loss'); assert 'altair' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
