"""The views by name: found, described truly, drawn from a run's topics."""

from __future__ import annotations

from typing import Any

import pytest

from streamlens import views
from tests.views.fakes import rows, tables

DATA = tables()


def texts(chart: Any) -> str:
    return str(chart.to_dict()["datasets"])


@pytest.mark.parametrize("name", views.VIEWS)
def test_a_view_draws_the_topics_that_it_names_and_needs_those_it_says_it_needs(name: str) -> None:
    view = views.by_name(name)
    there = {topic: DATA[topic] for topic in view.topics if topic in DATA}
    assert view.can_show(there)
    drawn = view.draw(there, limits=(0, 120))
    assert "recorded" not in texts(drawn)
    for lacking in view.needs:
        rest = {} if view.any_of else {topic: rows for topic, rows in there.items() if topic != lacking}
        assert not view.can_show(rest)
        assert "nothing was recorded of" in texts(view.draw(rest))
        assert lacking in texts(view.draw(rest))


def test_every_function_that_draws_a_topic_of_a_page_is_a_view_by_its_own_name() -> None:
    functions = {"loss", "learning_rate", "update_to_weight_ratio", "gradient_norms", "weight_norms"}
    assert functions | {"hessian_eigenvalues", "accuracy"} <= set(views.VIEWS)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("uw_ratio", "update_to_weight_ratio"),
        ("test_accuracy", "accuracy"),
        ("weights.norm2", "weight_norms"),
        ("loss", "loss"),
    ],
)
def test_a_topic_stands_for_the_view_that_draws_it(name: str, found: str) -> None:
    assert views.by_name(name).name == found


def test_any_topic_that_is_there_has_a_plain_view() -> None:
    view = views.by_name("weights.var", topics=["loss", "weights.var"])
    assert view.topics == ("weights.var",)
    assert "fc1" in texts(view.draw({"weights.var": rows({"fc1": [1.0, 2.0]})}))


def test_percentiles_are_drawn_of_the_layer_that_is_named() -> None:
    import pandas as pd

    table = pd.concat(
        [rows({"a": [i, i], "b": [i + 10, i + 10]}, component=f"p{p}") for i, p in enumerate((5, 50, 95))]
    )
    topic = "weights.percentile_bands"
    drawn = texts(views.by_name(topic).draw({topic: table}, layers={topic: ["b"]}))
    assert "12.0" in drawn
    assert "2.0," not in drawn.replace("12.0,", "")


def test_an_unknown_name_is_an_error_with_the_nearest_and_all_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"unknown view 'gradient_norm': did you mean 'gradient_norms'"
    ) as error:
        views.by_name("gradient_norm")
    assert "sl.views.data(topic)" in str(error.value)
    with pytest.raises(ValueError, match=r"did you mean 'weights\.var'"):
        views.by_name("weight.var", topics=["weights.var"])
