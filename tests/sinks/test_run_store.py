"""`RunStore`: the run store as the end of a chain."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from streamlens.errors import RunStoreError
from streamlens.frame import Frame
from streamlens.runs import list_runs, read_run
from streamlens.sink import RunInfo
from streamlens.sinks.run_store import RunStore


def loss(*steps: int) -> list[Frame]:
    return [Frame("loss", step, ("",), torch.tensor([float(step)])) for step in steps]


def stored(path: Path, run: str) -> list[int]:
    with read_run(path, run) as reader:
        return [frame.step for frame in reader.frames()]


def test_what_is_written_can_be_read_at_once_and_after_closing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.db"
    store = RunStore(str(path))
    assert not path.parent.exists()
    store.open(RunInfo(id="a", name="digits", metadata={"epochs": 3}))
    for step in range(3):
        store.write(loss(step))
        assert stored(path, "a") == list(range(step + 1))
    store.close()
    assert stored(path, "a") == [0, 1, 2]
    with read_run(path) as run:
        assert (run.id, run.name, run.metadata) == ("a", "digits", {"epochs": 3})


def test_wall_times_are_those_at_which_frames_were_emitted(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run.db")
    store.open(RunInfo(id="a"))
    store.received = [1000.5, 1001.5]
    store.write(loss(0, 1))
    store.close()
    with read_run(tmp_path / "run.db") as run:
        assert run.dataframe("loss")["wall_time"].tolist() == [1000.5, 1001.5]


def test_a_store_that_is_subscribed_again_goes_on_with_its_run_and_a_new_lens_begins_one(
    tmp_path: Path,
) -> None:
    store = RunStore(tmp_path / "run.db")
    for run, step in (("a", 0), ("a", 1), ("b", 0)):
        store.open(RunInfo(id=run))
        store.write(loss(step))
        store.close()
    assert [run.id for run in list_runs(store.path)] == ["a", "b"]
    assert stored(store.path, "a") == [0, 1]
    assert stored(store.path, "b") == [0]


def test_a_resumed_run_replaces_what_it_had_beyond_its_snapshot(tmp_path: Path) -> None:
    first = RunStore(tmp_path / "run.db")
    first.open(RunInfo(id="a"))
    first.write(loss(0, 1, 2, 3))
    first.close()
    resumed = RunStore(tmp_path / "run.db")
    resumed.open(RunInfo(id="a", resumed_at=1))
    resumed.write(loss(2))
    resumed.close()
    assert stored(tmp_path / "run.db", "a") == [0, 1, 2]


def test_a_store_that_could_not_be_opened_is_tried_again_at_each_write(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    path.write_text("in the way\n")
    store = RunStore(path)
    with pytest.raises(RunStoreError, match="not a run store"):
        store.open(RunInfo(id="a"))
    with pytest.raises(RunStoreError, match="not a run store"):
        store.write(loss(0))
    assert path.read_text() == "in the way\n"
    path.unlink()
    store.write(loss(1))
    store.close()
    assert stored(path, "a") == [1]


def test_two_stores_on_one_file_are_an_error_and_not_a_mixture(tmp_path: Path) -> None:
    first, second = RunStore(tmp_path / "run.db"), RunStore(tmp_path / "run.db")
    first.open(RunInfo(id="a"))
    with pytest.raises(RunStoreError, match=r"another sink of this process.*one another path"):
        second.open(RunInfo(id="b"))
    first.write(loss(0))
    first.close()
    second.write(loss(5))
    second.close()
    assert stored(tmp_path / "run.db", "a") == [0]
    assert stored(tmp_path / "run.db", "b") == [5]


def test_the_file_lies_where_the_program_stood_when_it_named_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = RunStore("run.db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.open(RunInfo(id="a"))
    store.close()
    assert (tmp_path / "run.db").exists()
    assert repr(store) == f"RunStore('{tmp_path / 'run.db'}')"


def test_closing_twice_is_fine_and_writing_while_closed_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = RunStore(tmp_path / "run.db")
    store.close()
    store.open(RunInfo(id="a"))
    store.close()
    store.close()
    with pytest.raises(RunStoreError, match=r"call open\(run\) first"):
        store.write(loss(0))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
