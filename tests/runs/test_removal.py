"""Runs are removed whole, and nothing else is."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import torch

from streamlens.errors import RunStoreError
from streamlens.frame import Frame
from streamlens.runs import RunWriter, list_runs, read_run, remove_run


def write(path: Path, run_id: str, layer: str, count: int = 300) -> None:
    with RunWriter(path, run_id) as writer:
        writer.write([Frame("t", step, (layer,), torch.full((1, 50), float(step))) for step in range(count)])
        writer.write([Frame("loss", step, (layer,), torch.tensor([float(step)])) for step in range(count)])


def held(path: Path) -> dict[str, int]:
    """How many rows each table has."""
    db = sqlite3.connect(path)
    tables = ("runs", "topics", "layouts", "name_lists", "frames", "rollups")
    counts = {table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}
    db.close()
    return counts


def test_a_removed_run_leaves_nothing_and_takes_nothing_of_the_others(tmp_path: Path) -> None:
    write(tmp_path / "alone.db", "b", "kept")
    path = tmp_path / "run.db"
    for run_id, layer in (("a", "gone"), ("b", "kept"), ("c", "gone too")):
        write(path, run_id, layer)
    before = path.stat().st_size
    remove_run(path, "a")
    remove_run(path, -1)
    assert [run.id for run in list_runs(path)] == ["b"]
    assert held(path) == held(tmp_path / "alone.db")
    assert path.stat().st_size < before
    with read_run(path) as run:
        assert run.layers("loss") == ["kept"]
        assert run.dataframe("loss")["value"].tolist() == [float(step) for step in range(300)]
        assert run.envelope("loss", max_points=3)["max"].tolist() == [99.0, 199.0, 299.0]
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["alone.db", "run.db"]


def test_the_last_run_goes_with_its_file(tmp_path: Path) -> None:
    write(tmp_path / "run.db", "a", "x", 3)
    (tmp_path / "report.html").write_text("kept")
    remove_run(tmp_path / "run.db", "a")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_run_that_is_being_written_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    write(path, "a", "x", 3)
    with RunWriter(path, "a"), pytest.raises(RunStoreError, match="is already being written"):
        remove_run(path, "a")
    assert [run.id for run in list_runs(path)] == ["a"]


def test_what_is_not_there_cannot_be_removed_and_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(RunStoreError, match="there is no run store at"):
        remove_run(tmp_path / "run.db", "a")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "text").write_text("precious")
    with pytest.raises(RunStoreError, match="there is no run store at"):
        remove_run(tmp_path / "text", "a")
    write(tmp_path / "run.db", "a", "x", 3)
    with pytest.raises(RunStoreError, match="no run 'b' in"):
        remove_run(tmp_path / "run.db", "b")
    assert [run.id for run in list_runs(tmp_path / "run.db")] == ["a"]
    assert (tmp_path / "text").read_text() == "precious"


def test_the_runs_of_a_folder_are_those_of_all_stores_in_it(tmp_path: Path) -> None:
    write(tmp_path / "b" / "run.db", "second", "x", 3)
    write(tmp_path / "a" / "deep" / "other.sqlite", "first", "x", 3)
    (tmp_path / "a" / "notes.db").write_text("no store")
    found = list_runs(tmp_path)
    assert [(run.id, run.path) for run in found] == [
        ("first", tmp_path / "a" / "deep" / "other.sqlite"),
        ("second", tmp_path / "b" / "run.db"),
    ]
    assert list_runs(tmp_path / "a" / "deep") == found[:1]


def test_the_run_written_last_is_the_one_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    for run_id in ("first", "second"):
        write(path, run_id, "x", 3)
    with read_run(path) as run:
        assert run.id == "second"
        assert run.steps == (0, 2)
    with RunWriter(path, "first", resumed_at=1) as writer:
        writer.write([Frame("loss", 7, ("x",), torch.ones(1))])
    with read_run(path) as run:
        assert run.id == "first"
        assert run.steps == (0, 7)
        assert run.started < run.written
    assert [run.id for run in list_runs(path)] == ["first", "second"]
    with read_run(path, -1) as run:
        assert run.id == "second"
