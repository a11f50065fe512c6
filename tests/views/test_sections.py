"""What holds for every chart of a page: marks of alerts and actions, and any names and lengths of runs."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest

from streamlens import views
from streamlens.views.others import title_of
from streamlens.views.sections import Section, read_models, sections
from streamlens.views.theme import ALERT, NOT_FINITE
from tests.views.fakes import FakeRun, count_pixels, draw, rows, tables

NAMES = ("</script><script>alert(1)</script>", "quo\"te's [0].x\\", "a.b.c", "datum.step", "")
SENTENCE = 'layer <b>a</b> "exploded"; try less'
DID = "RatioLR set learning_rate </script> from 1 to 2"


def everything(steps: int = 24, layers: tuple[str, ...] = ("a", "b")) -> dict[str, pd.DataFrame]:
    """A run with a topic for each kind of chart there is."""
    percentiles = [
        rows({layer: [float(p)] * steps for layer in layers}, component=f"p{p}") for p in (5, 50, 95)
    ]
    return {
        **tables(max(steps, 12), layers),
        "activations.dead_fraction": rows({layer: [0.5] * steps for layer in layers}),
        "weights.percentile_bands": pd.concat(percentiles, ignore_index=True),
        "weights.var": rows({layer: [1.0] * steps for layer in layers}),
        "mine": rows(
            {f"{layer}{i}": [1.0 + i] * steps for layer in layers for i in range(80 // len(layers))}
        ),
    }


def alert(step: int) -> pd.DataFrame:
    return rows({"a": [1.0]}).assign(
        step=step, rule="exploding_gradients", state="start", severity="critical", text=SENTENCE, of=""
    )


def made(data: dict[str, pd.DataFrame]) -> list[Section]:
    return sections(read_models(FakeRun(data)), (0.0, 30.0))


def spec_of(section: Section) -> dict[str, Any]:
    """The section's chart; that it fits Altair's schema, which takes long to check, other tests say."""
    spec: dict[str, Any] = section.chart.to_dict(validate=False)
    return spec


def texts(spec: dict[str, Any], column: str) -> list[str]:
    return [r[column] for d in spec["datasets"].values() for r in d if column in r]


def test_every_chart_over_steps_has_the_alerts_and_actions_as_marks_with_their_sentences() -> None:
    action = rows({"a": [1.0]}).assign(step=9, text=DID, cause="ratio 1e-5")
    data = {**everything(), "alerts.exploding_gradients": alert(6), "learning_rate.action": action}
    found = made(data)
    assert {"loss", "update-to-weight-ratio", "gradient-norms", "mine", "weights-percentile-bands-a"} <= {
        section.key for section in found
    }
    # One of each kind: lines, cells, areas, and lines with a strip of cells below.
    seen = {"loss", "update-to-weight-ratio", "weights-percentile-bands-a", "gradient-norms"}
    for section in found:
        spec = spec_of(section)
        over_steps = section.key != "ratio-against-loss"
        assert (sorted(set(texts(spec, "text"))) == sorted([SENTENCE, DID])) == over_steps, section.key
        if over_steps:
            tips = [
                {tip["field"] for tip in layer["encoding"]["tooltip"]}
                for layer in spec["layer"]
                if isinstance(layer["encoding"].get("tooltip"), list)
            ]
            assert sum("text" in fields for fields in tips) == 3, section.key
            if section.key in seen:
                assert count_pixels(draw(spec), ALERT) > 20, section.key


@pytest.mark.parametrize("steps", [1, 24])
def test_every_chart_is_drawn_of_a_run_of_any_length_and_of_any_names(steps: int) -> None:
    data = {topic: table[table["step"] < steps] for topic, table in everything(24, NAMES).items()}
    found = made({topic: table for topic, table in data.items() if len(table)})
    assert len(found) >= 6
    for section in found:
        assert draw(spec_of(section)).size, section.key


def test_every_chart_shows_nan() -> None:
    data = {topic: table.assign(value=math.nan) for topic, table in everything().items()}
    for section in made(data):
        assert count_pixels(draw(spec_of(section)), NOT_FINITE) > 10, section.key


def test_dead_units_without_gradient_norms_and_an_average_without_its_loss_are_drawn_plainly() -> None:
    data = everything()
    left = {topic: data[topic] for topic in ("activations.dead_fraction", "loss.ema")}
    assert sorted(section.key for section in made(left)) == ["activations-dead-fraction", "loss-ema"]


@pytest.mark.parametrize(
    ("topic", "title"),
    [
        ("effective_lr_median.biases.ema", "Effective learning rate median: biases, moving average"),
        ("weights.var", "Var of weights"),
        ("uw_ratio.ema", "Moving average of uw ratio"),
    ],
)
def test_a_topic_reads_naturally_as_a_heading(topic: str, title: str) -> None:
    assert title_of(topic) == title


def test_the_learning_rate_stands_right_under_the_loss() -> None:
    keys = [section.key for section in made(everything())]
    assert keys[:2] == ["loss", "learning-rate"]


@pytest.mark.parametrize("view", views.VIEWS.values(), ids=lambda view: str(view.name))
def test_a_view_of_empty_tables_says_in_words_what_was_not_recorded(view: views.View) -> None:
    chart: Any = view.draw({topic: rows({"": []}) for topic in view.topics})
    assert "nothing was recorded of" in str(chart.to_dict()["datasets"])
