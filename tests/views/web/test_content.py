"""What the live page shows: numbers against the frames written, texts as texts, trouble in words."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import altair as alt
import pytest
import torch

from streamlens.frame import Frame
from streamlens.runs import RunWriter, remove_run
from streamlens.views import data
from streamlens.views.alerts import RULES
from tests.helpers.pages import Client, rows_of, serving
from tests.helpers.written_runs import LAYERS, action, alert, write_run, writing

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "\"'>&<!--",
    "../../etc",
    "\u2028🦄",
]


def points(content: Any, key: str, series: str) -> dict[int, float]:
    """The points of one line of a section, by step."""
    return {
        row["step"]: row["value"]
        for rows in rows_of(content, key).values()
        for row in rows
        if row.get("series") == series and "value" in row and row.get("kind", "each step") == "each step"
    }


# -- one run -----------------------------------------------------------------------------------------


def test_the_rows_of_a_short_run_are_the_frames_that_were_written(tmp_path: Path) -> None:
    write_run(tmp_path / "run.db", 60)
    with serving(tmp_path / "run.db") as client:
        content = client.charts()
    loss = points(content, "loss", "(model)")
    assert list(loss) == list(range(60))
    for step, value in loss.items():
        assert value == pytest.approx(2.3 * math.exp(-step / 80) + 0.1 + 0.02 * (step % 3), rel=1e-4)
    for i, layer in enumerate(LAYERS, 1):
        norms = points(content, "gradient-norms", layer)
        assert norms == {step: pytest.approx(i / (1 + step / 50), rel=1e-4) for step in range(60)}
    assert content["steps"] == [0, 60]
    assert not content["thinned"]


def test_without_a_choice_the_run_written_last_is_shown(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "run.db", 3, run="older")
    write_run(tmp_path / "b" / "run.db", 5, run="newer")
    with serving(tmp_path) as client:
        assert [run["title"] for run in client.runs()] == ["b", "a"]
        assert client.charts()["runs"] == [client.keys()["b"]]
        assert client.charts(client.keys()["a"])["steps"] == [0, 3]


def test_the_head_says_settings_and_numbers_and_the_list_what_each_run_is(tmp_path: Path) -> None:
    write_run(tmp_path / "run.db", 8, name="mine", metadata={"seed": 7})
    with serving(tmp_path / "run.db") as client:
        content = client.charts()
        (run,) = client.runs()
    assert content["title"] == "AlexNetMini on digits"
    assert ["seed", "7"] in content["settings"]
    assert {"label": "steps", "value": "8"}.items() <= content["tiles"][0].items()
    assert (run["title"], run["model"], run["steps"], run["live"]) == ("mine", "AlexNetMini", 8, False)


def test_a_form_stays_while_rows_come_and_changes_with_what_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    with RunWriter(path, "r", metadata={}) as writer, serving(path) as client:

        def write(step: int, value: float) -> Any:
            writer.write([Frame("loss", step, ("",), torch.tensor([value]))], [time.time()])
            time.sleep(0.02)
            client_forms = {section["key"]: section["form"] for section in asked(client)["sections"]}
            return client_forms["loss"]

        write(0, 1.0)  # one step alone is a dot and no line
        first = write(1, 0.5)
        assert write(2, 0.4) == first
        assert write(3, math.nan) != first


def test_the_form_of_the_loss_is_the_same_however_long_the_run_becomes(tmp_path: Path) -> None:
    forms = set()
    for steps in (60, 90, 400):
        write_run(tmp_path / f"{steps}.db", steps)
        with serving(tmp_path / f"{steps}.db") as client:
            forms |= {section["form"] for section in client.charts()["sections"] if section["key"] == "loss"}
    assert len(forms) == 1


def asked(client: Client, **question: str) -> Any:
    """What the page shows of the store as it stands now, however little time has passed."""
    # A question not asked before is answered afresh.
    asked.count += 1  # type: ignore[attr-defined]
    return client.charts(model=f"m{asked.count}", **question)  # type: ignore[attr-defined]


asked.count = 0  # type: ignore[attr-defined]


def test_alerts_and_actions_stand_in_every_chart_and_alerts_in_a_list(tmp_path: Path) -> None:
    extra = [alert(10, "The loss jumped."), action(20, "rate halved")]
    write_run(tmp_path / "run.db", 30, extra=extra)
    with serving(tmp_path / "run.db") as client:
        content = client.charts()
    (listed,) = content["alerts"]
    assert (listed["step"], listed["rule"], listed["text"]) == (10, "loss_spike", "The loss jumped.")
    keys = [section["key"] for section in content["sections"]]
    assert {"loss", "update-to-weight-ratio", "gradient-norms", "learning-rate"} <= set(keys)
    # What is drawn over the loss's decrease, say, has no place for a step.
    drawn = {section["key"]: str(section["spec"]["layer"]) for section in content["sections"]}
    over_steps = [key for key, layers in drawn.items() if "last_step" in layers]
    assert len(over_steps) >= 4
    for key in over_steps:
        rows = [row for found in rows_of(content, key).values() for row in found]
        assert [row["step"] for row in rows if row.get("text") == "The loss jumped."] == [10]
        assert [row["step"] for row in rows if row.get("text") == "rate halved"] == [20]


def test_a_run_with_rules_and_no_alert_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "run.db", 3, metadata={RULES: "loss_spike"})
    with serving(tmp_path / "run.db") as client:
        content = client.charts()
    assert content["quiet"].startswith("No alert in 3 steps. Rules asked for: loss spike;")


# -- layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("features.*", ["features.0", "features.3"]),
        ("class", ["classifier.2"]),
        ("*.0, *.2", ["features.0", "classifier.2"]),
        ("[", []),
        ("nothing", []),
    ],
)
def test_the_filter_leaves_the_layers_that_it_names_and_what_is_the_models(
    tmp_path: Path, pattern: str, left: list[str]
) -> None:
    write_run(tmp_path / "run.db", 5)
    with serving(tmp_path / "run.db") as client:
        content = client.charts(layers=pattern)
    drawn = {
        row["layer"]
        for section in content["sections"]
        for rows in rows_of(content, section["key"]).values()
        for row in rows
        if row.get("layer")
    }
    assert drawn == set(left)
    assert "loss" in [section["key"] for section in content["sections"]]
    assert content["layers"] == list(LAYERS)


def test_a_row_of_the_heatmap_is_that_layers_lines_in_every_metric(tmp_path: Path) -> None:
    write_run(tmp_path / "run.db", 40)
    with serving(tmp_path / "run.db") as client:
        detail = client.charts(row="features.3")["detail"]
        absent = client.charts(row="no such layer")["detail"]
    titles = [section["title"] for section in detail["sections"]]
    assert titles == [
        "Learning rate: features.3",
        "Update-to-weight ratio: features.3",
        "Gradient norms: features.3",
    ]
    ratio = points(detail, detail["sections"][1]["key"], "features.3")
    assert ratio == {step: pytest.approx(2e-3, rel=1e-4) for step in range(40)}
    assert absent["sections"] == []


def test_a_row_that_several_layers_share_is_the_lines_of_each(tmp_path: Path) -> None:
    write_run(tmp_path / "run.db", 4, layers=[f"l{i}" for i in range(9)])
    with serving(tmp_path / "run.db") as client:
        detail = client.charts(row="l2 … l4")["detail"]
    shown = [section["title"] for section in detail["sections"] if section["title"].startswith("Grad")]
    assert shown == ["Gradient norms: l2", "Gradient norms: l3", "Gradient norms: l4"]


def test_a_row_is_of_its_model_where_there_are_several(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    with RunWriter(path, "r", metadata={}) as writer:
        frames = [
            Frame(f"{model}/uw_ratio", step, (f"{model}.fc",), torch.tensor([float(place)]))
            for step in range(3)
            for place, model in enumerate("GD", 1)
        ]
        writer.write(frames, [0.0] * len(frames))
    with serving(path) as client:
        content = client.charts(row="fc", model="D")
        chosen = client.charts(row="D.fc")["detail"]
    assert [section["model"] for section in content["sections"]] == ["G", "D"]
    (section,) = content["detail"]["sections"]
    assert points(content["detail"], section["key"], "fc") == {0: 2.0, 1: 2.0, 2: 2.0}
    assert [section["model"] for section in chosen["sections"]] == ["D"]


# -- several runs ------------------------------------------------------------------------------------


def test_several_runs_are_a_line_each_in_one_chart(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "run.db", 12, run="1", metadata={"seed": 1})
    write_run(tmp_path / "b" / "run.db", 20, run="2", metadata={"seed": 2})
    with serving(tmp_path) as client:
        keys = client.keys()
        content = client.charts(keys["a"], keys["b"])
        layer = client.charts(keys["a"], keys["b"], row="classifier.2")
    assert list(points(content, "loss", "a")) == list(range(12))
    assert list(points(content, "loss", "b")) == list(range(20))
    # Of three layers, 1, 2 and 3 times the same, the median is the second.
    assert points(content, "uw-ratio", "a") == {step: pytest.approx(2e-3, rel=1e-4) for step in range(12)}
    assert points(layer, "uw-ratio", "b") == {step: pytest.approx(3e-3, rel=1e-4) for step in range(20)}
    assert content["differences"][""] == ["a", "b"]
    assert content["differences"]["seed"] == ["1", "2"]
    assert "model" not in content["differences"]


def test_a_run_has_one_colour_in_all_charts_also_where_another_lacks(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "run.db", 4, run="1", extra=[Frame("only", 1, ("",), torch.ones(1))])
    write_run(tmp_path / "b" / "run.db", 4, run="2")
    with serving(tmp_path) as client:
        content = client.charts(client.keys()["b"], client.keys()["a"])
    domains = [
        layer["encoding"]["color"]["scale"]["domain"]
        for section in content["sections"]
        for layer in section["spec"]["layer"]
        if "color" in layer.get("encoding", {})
    ]
    assert domains
    assert {tuple(domain) for domain in domains} == {("b", "a")}


def test_runs_of_one_name_are_told_apart_by_their_ids(tmp_path: Path) -> None:
    for run in ("aaaa1111bbbb", "cccc2222dddd"):
        write_run(tmp_path / "run.db", 3, run=run, name="same")
    with serving(tmp_path / "run.db") as client:
        titles = sorted(client.keys())
        content = client.charts(*client.keys().values())
    assert titles == ["same (aaaa1111)", "same (cccc2222)"]
    assert sorted(content["differences"][""]) == titles if content["differences"] else True
    assert set(points(content, "loss", titles[0])) == {0, 1, 2}


# -- charts of the user's own ----------------------------------------------------------------------------


def test_a_chart_of_ones_own_comes_first_with_the_rows_of_its_topic(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "run.db", 5, run="1")
    write_run(tmp_path / "b" / "run.db", 6, run="2")
    own: alt.Chart = alt.Chart(data("uw_ratio")).mark_line().encode(x="step:Q", y="value:Q", color="run:N")
    with serving(tmp_path, views={"my ratio": own}) as client:
        keys = client.keys()
        one = client.charts(keys["a"])
        both = client.charts(keys["a"], keys["b"])
    assert one["sections"][0]["title"] == "my ratio"
    (rows,) = rows_of(one, "own-my ratio").values()
    assert [(row["step"], row["layer"]) for row in rows] == [(s, layer) for s in range(5) for layer in LAYERS]
    (rows,) = rows_of(both, "own-my ratio").values()
    assert {run: len([row for row in rows if row["run"] == run]) for run in ("a", "b")} == {"a": 15, "b": 18}


# -- texts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_travel_as_data_and_stand_nowhere_in_the_page(tmp_path: Path, text: str) -> None:
    layers = [f"{text}{i}" for i in range(2)]
    write_run(
        tmp_path / "run.db", 3, name=text, layers=layers, extra=[alert(1, text)], metadata={"note": text}
    )
    with serving(tmp_path / "run.db") as client:
        page, reply = client.get("/"), client.get("/api/charts")
        assert text not in page.text
        assert client.runs()[0]["title"] == text
    assert reply.headers["content-type"] == "application/json"
    content = reply.json
    assert content["layers"] == layers
    assert content["alerts"][0]["text"] == text
    assert ["note", text] in content["settings"]


def test_a_name_that_is_no_valid_text_is_still_shown(tmp_path: Path) -> None:
    write_run(tmp_path / "run.db", 3, name="b\ud800", layers=["c\udfff"])
    with serving(tmp_path / "run.db") as client:
        assert client.runs()[0]["title"] == "b\ud800"
        assert client.charts()["layers"] == ["c\\udfff"]
        assert client.charts(row="c\\udfff")["detail"]["sections"]


# -- trouble -----------------------------------------------------------------------------------------


def test_a_damaged_store_is_named_and_the_others_are_shown(tmp_path: Path) -> None:
    write_run(tmp_path / "good" / "run.db", 5)
    bad = write_run(tmp_path / "bad" / "run.db", 5, run="r2")
    bad.write_bytes(bad.read_bytes()[:20_000])
    with serving(tmp_path) as client:
        listed = client.get("/api/runs").json
        assert [run["title"] for run in listed["runs"]] == ["good"]
        (problem,) = listed["problems"]
        assert "bad/run.db is damaged" in problem
        assert client.charts()["steps"] == [0, 5]


def test_a_run_damaged_while_it_is_shown_is_said_to_be(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a" / "run.db", 200)
    whole = path.read_bytes()
    with serving(tmp_path) as client:
        key = client.keys()["a"]
        half = len(whole) // 2
        path.write_bytes(whole[:half] + bytes(len(whole) - half))
        content = asked(client, run=key)
        assert content["problems"]
        assert "damaged" in content["problems"][0]


def test_a_run_removed_while_it_is_shown_is_said_to_be_gone(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a" / "run.db", 5, run="r1")
    write_run(tmp_path / "b" / "run.db", 5, run="r2")
    with serving(tmp_path) as client:
        keys = client.keys()
        remove_run(path, "r1")
        until(lambda: len(client.runs()) == 1)
        content = client.charts(keys["a"], keys["b"])
        assert (content["runs"], content["gone"]) == ([keys["b"]], 1)
        shutil.rmtree(tmp_path / "b")
        until(lambda: not client.runs())
        assert client.charts(keys["b"])["gone"] == 1


def test_a_folder_without_a_run_waits_for_one(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        assert client.charts()["sections"] == []
        write_run(tmp_path / "later" / "run.db", 4)
        until(lambda: bool(client.runs()))
        assert asked(client)["steps"] == [0, 4]


def test_a_store_that_another_process_writes_is_shown_as_it_grows_and_said_to_be_live(tmp_path: Path) -> None:
    with writing(tmp_path / "run.db") as writer, serving(tmp_path) as client:
        for steps in range(1, 4):
            writer.ask(1)
            assert writer.wait() == steps
            assert list(points(asked(client), "loss", "(model)")) == list(range(steps))
            if steps == 2:
                until(lambda: [run["live"] for run in client.runs()] == [True])
        writer.close()
        until(lambda: [run["live"] for run in client.runs()] == [False])
        assert json.loads(client.get("/api/charts").body)["steps"] == [0, 3]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
