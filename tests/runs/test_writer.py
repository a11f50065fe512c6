"""Runs in a file: which are begun, which go on, and what stands in the way of writing."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import time
import uuid
import warnings
from pathlib import Path

import pytest
import torch

from streamlens.errors import RunStoreError
from streamlens.frame import Frame
from streamlens.runs import RunWriter, list_runs, lock, read_run, schema
from streamlens.runs.lock import WriterLock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.db"


def loss(*steps: int, layer: str = "a") -> list[Frame]:
    return [Frame("loss", step, (layer,), torch.tensor([float(step)])) for step in steps]


def steps(path: Path, run: str | None = None, topic: str = "loss") -> list[int]:
    with read_run(path, run) as stored:
        return [frame.step for frame in stored.frames(topic)]


# -- runs ------------------------------------------------------------------------------------


def test_each_new_id_begins_a_run_of_its_own(path: Path) -> None:
    before = time.time()
    for i, run_id in enumerate(("first", "second")):
        with RunWriter(path, run_id, name=f"n{i}", metadata={"rate": i / 10}) as store:
            store.write(loss(i, i + 1))
    runs = list_runs(path)
    assert [(run.id, run.name, run.metadata) for run in runs] == [
        ("first", "n0", {"rate": 0.0}),
        ("second", "n1", {"rate": 0.1}),
    ]
    assert before <= runs[0].started <= runs[1].started <= time.time()
    assert steps(path, "first") == [0, 1]
    assert steps(path, "second") == steps(path) == [1, 2]


def test_runs_are_found_by_id_and_by_position(path: Path) -> None:
    for run_id in ("x", "y", "z"):
        RunWriter(path, run_id).close()
    assert [read_run(path, run).id for run in (None, 0, 1, -1, -3, "y")] == ["z", "x", "y", "z", "x", "y"]
    for unknown in ("w", 3, -4):
        with pytest.raises(RunStoreError, match=r"no run .* among its 3 runs: 'x', 'y', 'z'"):
            read_run(path, unknown)


def test_the_same_run_goes_on_where_it_was_closed_and_loses_nothing(path: Path) -> None:
    for part in (loss(0, 1), loss(2), loss(2, 3)):
        with RunWriter(path, "a") as store:
            store.write(part)
    assert len(list_runs(path)) == 1
    assert steps(path) == [0, 1, 2, 2, 3]


def test_a_resumed_run_drops_what_lies_beyond_its_snapshot_and_nothing_else(path: Path) -> None:
    with RunWriter(path, "other") as store:
        store.write(loss(0, 5, 9))
    with RunWriter(path, "a") as store:
        store.write(loss(0, 1, 2, 3, 4))
        store.write([*loss(1, 3, layer="early"), *loss(4, layer="late")])
        store.write([Frame("only late", 4, ("a",), torch.ones(1))])
    with RunWriter(path, "a", resumed_at=2) as store:
        with read_run(path, "a") as run:
            assert [f.step for f in run.frames()] == [0, 1, 2, 1]
            assert run.topics == ["loss"]
            assert run.layers("loss") == ["a", "early"]
        store.write(loss(3, 4))
    assert steps(path, "a") == [0, 1, 2, 1, 3, 4]
    assert steps(path, "other") == [0, 5, 9]
    assert [run.id for run in list_runs(path)] == ["other", "a"]


def test_a_resumed_run_that_opens_its_store_again_keeps_what_it_wrote_since(path: Path) -> None:
    with RunWriter(path, "a") as store:
        store.write(loss(0, 1, 2))
    for part in (loss(1), loss(2), loss(3)):
        with RunWriter(path, "a", resumed_at=0, resumption="x") as store:
            store.write(part)
    assert steps(path) == [0, 1, 2, 3]


def test_each_loading_of_one_snapshot_drops_what_lies_beyond_it(path: Path) -> None:
    for number, part in enumerate((loss(0, 1, 2), loss(1, 2, 3), loss(1))):
        with RunWriter(path, "a", resumed_at=0 if number else None, resumption=str(number)) as store:
            store.write(part)
    assert steps(path) == [0, 1]


def test_a_run_resumed_into_a_file_that_does_not_know_it_begins_there(path: Path) -> None:
    with RunWriter(path, "a", resumed_at=7) as store:
        store.write(loss(8))
    assert steps(path, "a") == [8]


def test_a_reader_opened_before_a_resume_never_confuses_old_and_new_layouts(path: Path) -> None:
    with RunWriter(path, "a") as store:
        store.write([*loss(0), *(Frame("t", s, ("old",), torch.ones(1)) for s in range(1, 4))])
    with read_run(path, "a") as run:
        replay = run.frames()
        assert next(replay).topic == "loss"
        assert run.layers("t") == ["old"]
        with RunWriter(path, "a", resumed_at=0) as store:
            store.write([Frame("t", s, ("new",), torch.zeros(1, dtype=torch.int32)) for s in range(1, 4)])
        assert list(replay) == []
        assert run.layers("t") == ["new"]
        assert run.dataframe("t")["layer"].tolist() == ["new"] * 3


def test_a_run_says_what_it_is(path: Path) -> None:
    with RunWriter(path, "abc", name="digits", metadata={"seed": 1}) as store:
        store.write(loss(0))
    with read_run(path) as run:
        assert (run.id, run.name, run.path, dict(run.metadata)) == ("abc", "digits", path, {"seed": 1})
        for part in ("'digits'", "'abc'", "topics=[loss]", str(path)):
            assert part in repr(run)
    assert "closed" in repr(run)


def test_a_reader_cannot_change_the_file(path: Path) -> None:
    with RunWriter(path, "a") as store:
        store.write(loss(0))
    with read_run(path) as run, pytest.raises(sqlite3.OperationalError, match="readonly"):
        run._db.execute("DELETE FROM frames")
    assert steps(path) == [0]


def test_a_file_without_a_run_says_so(path: Path) -> None:
    schema.open_for_writing(path).close()
    assert list_runs(path) == []
    with pytest.raises(RunStoreError, match="holds no run yet"):
        read_run(path)


def test_missing_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "deep" / "run.db"
    with RunWriter(path, "a") as store:
        store.write(loss(1))
    assert steps(path) == [1]


@pytest.mark.parametrize("name", ["run?mode=ro&x=1#y.db", "100%.db", "日本 語.db", "'; drop.db"])
def test_any_file_name_will_do(tmp_path: Path, name: str) -> None:
    with RunWriter(tmp_path / name, "a") as store:
        store.write(loss(1))
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert steps(tmp_path / name) == [1]


def test_a_closed_store_is_one_file(path: Path) -> None:
    with RunWriter(path, "a") as store:
        store.write(loss(1))
    with read_run(path) as run:
        run.dataframe("loss")
    assert [file.name for file in path.parent.iterdir()] == ["run.db"]


# -- one writer ------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_changes_nothing(path: Path) -> None:
    link = path.with_name("link.db")
    link.symlink_to(path)
    with RunWriter(path, "a") as store:
        store.write(loss(0))
        for same in (path, link):
            with pytest.raises(RunStoreError, match="already being written by another sink of this process"):
                RunWriter(same, "b")
        store.write(loss(1))
        assert [run.id for run in list_runs(path)] == ["a"]
    with RunWriter(path, "b") as store:
        store.write(loss(7))
    assert steps(path, "a") == [0, 1]
    assert steps(path, "b") == [7]


def test_the_lock_that_a_killed_process_left_is_taken_over(path: Path) -> None:
    left = Path(f"{path}-lock")
    left.write_text("4194304 elsewhere\n")
    RunWriter(path, "a").close()
    assert not left.exists()


def test_a_failed_opening_gives_the_lock_up(path: Path) -> None:
    path.write_bytes(b"no database" * 20)
    for _ in range(2):
        with pytest.raises(RunStoreError, match="not a run store"):
            RunWriter(path, "a")
    path.unlink()
    RunWriter(path, "a").close()


def test_a_lock_on_a_file_that_its_last_holder_removed_does_not_count(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = lock._lock, 0

    def late(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:  # between our opening the file and locking it
            Path(f"{path}-lock").unlink()
        real(descriptor)

    monkeypatch.setattr(lock, "_lock", late)
    held = WriterLock(path)
    with pytest.raises(RunStoreError, match="already being written"):
        WriterLock(path)
    held.release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_does_not_end_its_parents_lock(path: Path) -> None:
    held = WriterLock(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process with threads
        child = os.fork()
    if child == 0:
        held.release()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(RunStoreError, match="already being written"):
        WriterLock(path)
    held.release()
    WriterLock(path).release()


def test_without_locks_in_the_file_system_the_store_is_written_with_a_warning(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_lock", refuse)
    with RunWriter(path, "a") as store:
        store.write(loss(1))
    assert steps(path) == [1]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "has no locks" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for such a file system is Unix's")
def test_without_a_shared_log_in_the_file_system_the_store_is_written_with_one_warning(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    connect = schema._connect
    # SQLite's dot-file locking has no shared memory, as network file systems have none.
    monkeypatch.setattr(schema, "_connect", lambda uri: connect(f"{uri}&vfs=unix-dotfile"))
    with RunWriter(path, "a") as store:
        assert store._db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        for step in range(3):
            store.write(loss(step))
            assert steps(path) == list(range(step + 1))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "rollback journal" in caplog.text


# -- failed writes ---------------------------------------------------------------------------


def test_a_full_disk_is_one_clear_error_and_writing_goes_on_when_there_is_space(path: Path) -> None:
    big = torch.zeros(1, 500_000)
    with RunWriter(path, "a") as store:
        store.write(loss(0))
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages + 8}")
        lost = [Frame("weights", 0, ("a",), big), *loss(1)]
        for _ in range(3):
            with pytest.raises(RunStoreError, match=f"cannot write {path}: the disk is full"):
                store.write(lost)
        assert steps(path) == [0]
        store.write(loss(2))
        store._db.execute("PRAGMA max_page_count = 100000")
        store.write(lost)
        store.write(loss(3))
    with read_run(path) as run:
        assert [f.step for f in run.frames("loss")] == [0, 2, 1, 3]
        assert torch.equal(next(iter(run.frames("weights"))).values[0], big[0])


def test_a_batch_that_fails_leaves_no_trace_of_its_new_topics(path: Path) -> None:
    with RunWriter(path, "a") as store:
        bad = Frame("loss", 2**70, ("a",), torch.ones(1))  # no column holds this step
        with pytest.raises(OverflowError):
            store.write([Frame("new", 0, ("x",), torch.ones(1)), bad])
        with read_run(path) as run:
            assert run.topics == []
        store.write([Frame("later", 0, ("y",), torch.ones(1)), Frame("new", 0, ("x",), torch.ones(1))])
    with read_run(path) as run:
        assert [(f.topic, f.layers) for f in run.frames()] == [("later", ("y",)), ("new", ("x",))]


def test_a_frame_too_large_for_any_store_is_left_out_and_said_once_a_topic(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RunWriter(path, "a") as store:
        store._limit = 1000
        huge = [Frame("activations", s, ("a",), (torch.zeros(300),)) for s in range(3)]
        store.write([*loss(0), *huge, *loss(1)])
    assert steps(path) == [0, 1]
    (record,) = caplog.records
    assert "'activations'" in record.getMessage()
    assert "select layers" in record.getMessage()


def test_another_programs_lock_is_named_as_such(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "_BUSY_TIMEOUT", 0.05)
    with RunWriter(path, "a") as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RunStoreError, match="another program holds it locked"):
            store.write(loss(0))
        other.execute("ROLLBACK")
        other.close()
        store.write(loss(0))
    assert steps(path) == [0]


def test_ids_are_free_text(path: Path) -> None:
    run_id = uuid.uuid4().hex + "'\ud800\0"
    with RunWriter(path, run_id, name="\udfff") as store:
        store.write(loss(0))
    (run,) = list_runs(path)
    assert (run.id, run.name) == (run_id, "\udfff")
    assert steps(path, run_id) == [0]
