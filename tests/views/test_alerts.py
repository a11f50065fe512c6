"""Alerts in the report: a list with their sentences, and a mark in every chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from streamlens.views.alerts import RULES, Alert, alert_list, alerts, no_alerts, with_marks
from streamlens.views.heading import heading
from streamlens.views.loss import loss
from streamlens.views.report import _quiet, write_report
from streamlens.views.theme import ALERT
from tests.views.fakes import FakeRun, count_pixels, draw, rows, tables


def table(*events: tuple[int, str, Sequence[str]], rule: str = "dead_units", **fields: Any) -> pd.DataFrame:
    """Rows of a topic of alerts: (step, state, layers)."""
    return pd.DataFrame(
        [
            {
                "step": step,
                "micro_step": 0,
                "epoch": 0,
                "layer": layer,
                "value": 0.9,
                "wall_time": 1.7e9,
                "rule": rule,
                "severity": "warning",
                "state": state,
                "text": f"{rule} {state} at {step}.",
                **fields,
            }
            for step, state, layers in events
            for layer in layers
        ]
    )


def test_an_alert_lasts_from_its_start_until_all_its_layers_have_ended() -> None:
    found = alerts(
        {
            "alerts.dead_units": table(
                (10, "start", "ab"), (20, "end", "a"), (30, "start", "a"), (40, "end", "b"), (50, "end", "a")
            ),
            "alerts.loss_spike": table((5, "start", [""]), rule="loss_spike"),
        }
    )
    assert [(a.step, a.rule, a.layers, a.until) for a in found] == [
        (5, "loss_spike", ("",), None),
        (10, "dead_units", ("a", "b"), 40),
        (30, "dead_units", ("a",), 50),
    ]
    assert found[1].text == "dead_units start at 10."


def test_alerts_on_different_things_end_apart() -> None:
    both = pd.concat(
        [
            table((1, "start", "a"), of="size"),
            table((2, "start", "a"), of="history"),
            table((5, "end", "a"), of="history"),
        ]
    )
    assert [(a.step, a.until) for a in alerts({"alerts.dead_units": both})] == [(1, None), (2, 5)]


def test_topics_that_only_begin_like_alerts_are_no_alerts() -> None:
    assert alerts({"alerts.mine": rows({"": [1.0, 2.0]})}) == []


def test_the_list_has_rule_severity_steps_and_sentence_and_no_markup_from_the_run() -> None:
    found = [Alert(1200, "dead_units", "critical", ("a",), "<b>Units</b> are dead.", 1300)]
    page = alert_list(found, "G")
    assert "<b>dead units</b>" in page
    assert "critical · step 1,200 to 1,300" in page
    assert "&lt;b&gt;Units&lt;/b&gt; are dead." in page
    assert "Alerts of G" in page
    assert "not over" in alert_list([Alert(1, "r", "made up", ("",), "t")])
    assert 'class="warning"' in alert_list([Alert(1, "r", "made up", ("",), "t")])
    assert "And 40 more." in alert_list(found * 100)
    assert alert_list([]) == ""


def test_a_run_without_alerts_says_which_rules_were_on_and_for_how_long() -> None:
    page = no_alerts("dead_units, <b>", 1200)
    assert "No alert in 1,200 steps. Rules asked for: dead units, &lt;b&gt;;" in page
    assert _quiet({RULES: "loss_spike"}, 0) == no_alerts("loss_spike", 1)
    assert "1 step." in no_alerts("loss_spike", 1)
    assert _quiet({}, 99) == ""
    assert heading({"model": "m", RULES: "loss_spike", "seed": 1}) == ("m", [("seed", "1")])


def test_a_chart_is_marked_where_an_alert_started() -> None:
    chart = loss(rows({"": [1.0] * 100}), limits=(0.0, 100.0))
    marked = with_marks(chart, [Alert(50, "dead_units", "warning", ("a",), "Dead.")], (0.0, 100.0))
    assert count_pixels(draw(chart.to_dict()), ALERT) == 0
    assert count_pixels(draw(marked.to_dict()), ALERT) >= 20
    assert with_marks(chart, [], None) is chart


@pytest.mark.parametrize("name", ["", "G"])
def test_the_report_lists_the_alerts_of_each_model(tmp_path: Path, name: str) -> None:
    prefix = f"{name}/" if name else ""
    layer = f"{name}.features.0" if name else "features.0"
    told = {f"{prefix}alerts.dead_units": table((3, "start", [layer]), of=None)}
    run = FakeRun({**tables(prefix=name), **told})
    page = write_report(run, tmp_path / "report.html").read_text()
    assert "dead_units start at 3." in page
    assert page.count("dead_units start at 3.") > 1  # in the list, and at the marks
    assert '"layers":"features.0"' in page


def test_a_run_with_alerts_alone_has_a_report(tmp_path: Path) -> None:
    run = FakeRun({"alerts.dead_units": table((3, "start", "a"))})
    assert "dead_units start at 3." in write_report(run, tmp_path / "report.html").read_text()


def test_the_models_of_a_run_are_its_title_where_there_are_several() -> None:
    known = {"model": "Sequential", "parameters": 354, "torch": "2"}
    assert heading(known, ["G", "D"]) == ("G and D", [("torch", "2")])
    assert heading(known, ["G"])[0] == "Sequential"
