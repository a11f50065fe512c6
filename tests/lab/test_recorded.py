"""`streamlens runs` and `streamlens export`, run as people run them."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner, Result

from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.lab import recorded
from streamlens.lab.commands import app
from streamlens.runs import RunWriter, list_runs


def streamlens(*arguments: str | Path, say: str = "") -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=say)


def frames(offset: float = 0.0) -> list[Frame]:
    sent: list[Frame] = []
    for step in range(10):
        sent.append(Frame("loss", step, ("",), torch.tensor([offset + 10.0 - step]), epoch=step // 5))
        sent.append(Frame("norm", step, ("a", "b", "c"), torch.tensor([step, 2.0 * step, 9.0])))
    sent.append(Frame("weights", 9, ("a",), (torch.ones(2, 2),)))
    return sent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of a run each, and one of two."""
    for place, run_id, name, rate in (
        ("first", "aa11" * 8, "", 0.1),
        ("second", "aa22" * 8, "", 0.2),
        ("both", "bb33" * 8, "baseline", 0.3),
        ("both", "cc44" * 8, "[bold]better[/bold]", 0.3),
    ):
        metadata = {"model": "MLP", "optimizer": {"rate": rate, "name": "Adam"}}
        with RunWriter(tmp_path / place / "run.db", run_id, name=name, metadata=metadata) as writer:
            writer.write(frames(100 * rate), [1000.0 + i for i in range(21)])
    return tmp_path


def test_runs_are_listed_with_what_tells_them_apart(folder: Path) -> None:
    result = streamlens("runs", "list", folder)
    assert result.exit_code == 0, result.output
    head, *lines = result.output.splitlines()
    assert head.split() == ["Run", "Name", "Model", "Began", "Took", "Steps", "File"]
    assert [line.split()[0] for line in lines] == ["aa11aa11", "aa22aa22", "bb33bb33", "cc44cc44"]
    for line, part in zip(lines, ("first", "second", "baseline", "[bold]better[/bold]"), strict=True):
        assert part in line
        assert " MLP " in line
        assert line.split()[-2] == "10"
        assert line.rstrip().endswith("run.db")


def test_a_broken_file_among_runs_is_said_and_the_others_are_listed(folder: Path) -> None:
    store = folder / "first" / "run.db"
    store.write_bytes(store.read_bytes()[:20_000])
    result = streamlens("runs", "list", folder)
    assert result.exit_code == 1
    assert f"{store} is damaged" in result.output
    assert "aa22aa22" in result.output
    nothing = folder / "nothing"
    nothing.mkdir()
    assert streamlens("runs", "list", nothing).output == f"no run was recorded in {nothing}\n"
    missing = streamlens("runs", "list", folder / "missing")
    assert missing.exit_code == 1
    assert missing.output.startswith("streamlens: there is no run store at")


def test_a_comparison_shows_settings_that_differ_and_what_became_of_topics(folder: Path) -> None:
    result = streamlens("runs", "compare", "first", "baseline", "cc44", "--in", folder)
    assert result.exit_code == 0, result.output
    lines = [line.split("  ") for line in result.output.splitlines()]
    rows = {cells[0]: [cell.strip() for cell in cells[1:] if cell.strip()] for cells in lines if cells}
    assert rows["Settings"] == ["first", "baseline", "[bold]better[/bold]"]
    assert rows["optimizer.rate"] == ["0.1", "0.3", "0.3"]
    assert "optimizer.name" not in rows
    assert "model" not in rows
    assert rows["loss"] == ["11 (11 to 20)", "31 (31 to 40)", "31 (31 to 40)"]
    # The median over layers at the last step: of 9, 18 and 9.
    assert rows["norm"] == ["9 (0 to 18)"] * 3
    assert "weights" not in rows
    one = streamlens("runs", "compare", "first", "--in", folder).output
    assert "optimizer.name" in one


def test_a_run_is_found_by_path_folder_name_and_beginning_of_its_id(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for name, expected in (
        ("first", "aa11"),
        (str(folder / "second" / "run.db"), "aa22"),
        (str(folder / "both"), "cc44"),  # the one written last
        ("baseline", "bb33"),
        ("bb", "bb33"),
        ("cc44" * 8, "cc44"),
    ):
        assert recorded.find(name, folder).record.id == expected * 8
    with pytest.raises(StreamlensError, match=r"several runs in .* called 'aa'.*aa11aa11.*give more"):
        recorded.find("aa", folder)
    with pytest.raises(
        StreamlensError,
        match=r"no run 'basline' in .*: did you mean .*baseline.*\? Runs: .*--in looks elsewhere",
    ):
        recorded.find("basline", folder)


def test_a_run_is_removed_only_once_it_was_confirmed(folder: Path) -> None:
    store = folder / "both" / "run.db"
    kept = streamlens("runs", "remove", "baseline", "--in", folder, say="n\n")
    assert kept.exit_code == 0
    assert "Remove baseline (bb33bb33)" in kept.output
    assert len(list_runs(store)) == 2
    unanswered = streamlens("runs", "remove", "baseline", "--in", folder)
    assert unanswered.exit_code == 1
    assert len(list_runs(store)) == 2
    assert streamlens("runs", "remove", "baseline", "--in", folder, say="y\n").exit_code == 0
    assert [run.id for run in list_runs(store)] == ["cc44" * 8]


def test_runs_are_removed_without_a_question_by_yes(folder: Path) -> None:
    result = streamlens("runs", "remove", "aa11", "cc44", "--yes", "--in", folder)
    assert result.exit_code == 0, result.output
    assert not (folder / "first" / "run.db").exists()
    assert {run.id[:4] for run in list_runs(folder)} == {"aa22", "bb33"}
    again = streamlens("runs", "remove", "aa11", "--yes", "--in", folder)
    assert again.exit_code == 1
    assert again.output.startswith("streamlens: no run 'aa11' in")


def test_a_run_that_is_being_written_is_kept(folder: Path) -> None:
    with RunWriter(folder / "first" / "run.db", "aa11" * 8):
        result = streamlens("runs", "remove", "aa11", "--yes", "--in", folder)
    assert result.exit_code == 1
    assert "already being written" in result.output
    assert (folder / "first" / "run.db").exists()


def test_an_export_to_csv_has_every_number_with_its_time_and_says_what_has_no_place_there(
    folder: Path,
) -> None:
    result = streamlens("export", folder / "first" / "run.db", "--to", "csv")
    assert result.exit_code == 0, result.output
    target = folder / "first" / "run.csv"
    assert f"exported 20 frames of 2 topics to {target}" in result.output
    assert "left out weights: " in result.output
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(r["topic"], r["layer"], int(r["step"]), int(r["epoch"]), float(r["value"])) for r in rows]
    expected = [
        (frame.topic, layer, frame.step, frame.epoch, value.item())
        for frame in frames(100 * 0.1)[:20]
        for layer, value in frame.items()
    ]
    assert found == expected
    assert [float(r["wall_time"]) for r in rows if r["topic"] == "loss"] == [
        1000.0 + 2 * i for i in range(10)
    ]


def test_an_export_to_parquet_holds_tensors_too_and_is_what_pandas_reads(folder: Path) -> None:
    result = streamlens("export", folder / "second" / "run.db", "--to", "parquet", "--out", folder / "out")
    assert result.exit_code == 0, result.output
    assert "exported 21 frames of 3 topics" in result.output
    table = pd.read_parquet(folder / "out")
    losses = table[table["topic"] == "loss"]
    assert losses["value"].tolist() == [20 + 10.0 - step for step in range(10)]
    assert losses["wall_time"].tolist() == [1000.0 + 2 * step for step in range(10)]
    (weights,) = table.loc[table["topic"] == "weights", "elements"]
    assert list(weights) == [1.0] * 4


def test_a_format_that_lacks_its_package_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = streamlens("export", folder / "first" / "run.db", "--to", "parquet")
    assert result.exit_code == 1
    assert "pip install 'streamlens[parquet]'" in result.output


def test_an_export_to_tensorboard_is_what_tensorboard_reads(folder: Path) -> None:
    out = folder / "events"
    result = streamlens(
        "export", folder / "both" / "run.db", "--to", "tensorboard", "--run", "bb33" * 8, "--topic", "loss",
        "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    events = EventAccumulator(str(out))
    events.Reload()
    (tag,) = events.Tags()["scalars"]
    read = [(event.step, event.value, event.wall_time) for event in events.Scalars(tag)]
    assert read == [(step, pytest.approx(30 + 10.0 - step), 1000.0 + 2 * step) for step in range(10)]


def test_an_export_overwrites_nothing_and_says_what_it_does_not_know(folder: Path) -> None:
    store = folder / "first" / "run.db"
    (folder / "first" / "run.csv").write_text("precious")
    result = streamlens("export", store, "--to", "csv")
    assert result.exit_code == 1
    assert "is there already: remove it, or choose another place with --out" in result.output
    assert (folder / "first" / "run.csv").read_text() == "precious"
    result = streamlens("export", store, "--to", "csv", "--topic", "los", "--out", folder / "x.csv")
    assert result.exit_code == 1
    assert "no topic 'los'" in result.output
    assert "Topics: loss, norm, weights" in result.output
    assert not (folder / "x.csv").exists()
    assert "no run store at" in streamlens("export", folder / "none.db", "--to", "csv").output


def test_nan_and_infinity_are_compared_as_what_they_are(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run.db", "a") as writer:
        values = [1.0, math.inf, math.nan]
        writer.write([Frame("loss", step, ("",), torch.tensor([v])) for step, v in enumerate(values)])
    output = streamlens("runs", "compare", tmp_path / "run.db").output
    assert "NaN (1 to inf)" in output
