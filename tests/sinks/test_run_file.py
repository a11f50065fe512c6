"""What the sinks that write files share: runs never mix, and nothing that is there is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from streamlens.sink import RunInfo
from streamlens.sinks._line_sink import LineSink
from streamlens.sinks.csv import CSV
from streamlens.sinks.json_lines import JSONLines
from tests.helpers.sinks import Connected, norms, written

SINKS = pytest.mark.parametrize("make", [CSV, JSONLines])
Make = Callable[[Path], LineSink]


def points(path: Path) -> list[tuple[str, int, float]]:
    """(run, step, value) of each frame of one layer."""
    if path.is_dir():
        table = pd.read_parquet(path)
        return list(table[["run", "step", "value"]].itertuples(index=False, name=None))
    if path.read_bytes().startswith(b"run,"):
        table = pd.read_csv(path)
        return list(table[["run", "step", "value"]].itertuples(index=False, name=None))
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["run"], line["step"], line["values"]["layer0"]) for line in found]


def frames(*steps: int, value: float = 1.0) -> list[Any]:
    return [norms(step, [value]) for step in steps]


@SINKS
def test_what_is_written_can_be_read_at_once(tmp_path: Path, make: Make) -> None:
    sink = make(tmp_path / "run")
    sink.open(RunInfo("a"))
    for step in range(3):
        sink.write(frames(step))
        assert points(sink.path) == [("a", earlier, 1.0) for earlier in range(step + 1)]
    sink.close()


@SINKS
def test_a_fresh_run_takes_a_new_name_and_leaves_what_is_there(
    tmp_path: Path, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.txt"
    written(make(path), *frames(0, 1), run=RunInfo("a"))
    before = path.read_bytes()
    (tmp_path / "run-2.txt").write_text("my notes\n")
    (tmp_path / "run-3.txt").touch()
    (tmp_path / "run-4.txt").mkdir()
    sink = make(path)
    written(sink, *frames(0), run=RunInfo("b"))
    assert sink.path == tmp_path / "run-5.txt"
    assert points(sink.path) == [("b", 0, 1.0)]
    assert path.read_bytes() == before
    assert (tmp_path / "run-2.txt").read_text() == "my notes\n"
    assert caplog.messages == [
        f"{path} is in use or holds something else: this run is written to {sink.path}"
    ]


@SINKS
def test_a_sink_that_is_subscribed_again_goes_on_in_its_file(tmp_path: Path, make: Make) -> None:
    written(make(tmp_path / "run"), *frames(0), run=RunInfo("other"))
    sink = make(tmp_path / "run")
    for step in range(3):
        written(sink, *frames(step), run=RunInfo("a"))
    assert points(tmp_path / "run-2") == [("a", step, 1.0) for step in range(3)]
    written(sink, *frames(7), run=RunInfo("b"))
    assert points(tmp_path / "run-3") == [("b", 7, 1.0)]


@SINKS
def test_a_resumed_run_drops_what_its_file_had_beyond_its_snapshot(tmp_path: Path, make: Make) -> None:
    path = tmp_path / "run"
    written(make(path), *frames(9), run=RunInfo("other"))
    # Steps need not ascend: windows and alerts come late.
    written(make(path), *frames(0, 1, 3, 2, 4), run=RunInfo("a"))
    own = tmp_path / "run-2"
    with own.open("ab") as file:
        file.write(own.read_bytes().splitlines(keepends=True)[-1][:-5])  # cut off by a crash
    sink = make(path)
    written(sink, *frames(3, 4, value=2.0), run=RunInfo("a", resumed_at=2, resumption="first"))
    expected = [("a", 0, 1.0), ("a", 1, 1.0), ("a", 2, 1.0), ("a", 3, 2.0), ("a", 4, 2.0)]
    assert points(own) == expected
    # Once: what the resumed run has written since is not dropped when the sink opens again.
    written(sink, *frames(5), run=RunInfo("a", resumed_at=2, resumption="first"))
    assert points(own) == [*expected, ("a", 5, 1.0)]
    # But it is when the run goes back to the same snapshot again.
    written(sink, *frames(3, value=3.0), run=RunInfo("a", resumed_at=2, resumption="second"))
    assert points(own) == [*expected[:3], ("a", 3, 3.0)]
    assert points(path) == [("other", 9, 1.0)]
    assert sorted(os.listdir(tmp_path)) == ["run", "run-2"]


@SINKS
def test_a_resumption_that_drops_nothing_leaves_the_file_as_it_is(tmp_path: Path, make: Make) -> None:
    path = tmp_path / "run"
    written(make(path), *frames(0, 1), run=RunInfo("a"))
    inode = path.stat().st_ino
    written(make(path), *frames(2), run=RunInfo("a", resumed_at=1, resumption="a"))
    assert path.stat().st_ino == inode
    assert [step for _, step, _ in points(path)] == [0, 1, 2]


@SINKS
def test_a_resumed_run_whose_file_is_gone_begins_a_new_one(tmp_path: Path, make: Make) -> None:
    written(make(tmp_path / "run"), *frames(3), run=RunInfo("a", resumed_at=2))
    assert points(tmp_path / "run") == [("a", 3, 1.0)]


@SINKS
def test_two_sinks_of_one_name_write_two_files(tmp_path: Path, make: Make) -> None:
    first, second = make(tmp_path / "run"), make(tmp_path / "run")
    for sink in (first, second):
        sink.open(RunInfo("a"))
        sink.write(frames(0))
    assert (first.path, second.path) == (tmp_path / "run", tmp_path / "run-2")
    first.write(frames(1))
    assert [step for _, step, _ in points(first.path)] == [0, 1]
    assert [step for _, step, _ in points(second.path)] == [0]
    first.close()
    second.close()


@SINKS
def test_a_symbolic_link_stays_one(tmp_path: Path, make: Make) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    written(make(tmp_path / "run"), *frames(0, 1, 2), run=RunInfo("a"))
    written(make(tmp_path / "run"), *frames(1, value=2.0), run=RunInfo("a", resumed_at=0, resumption="b"))
    assert (tmp_path / "run").is_symlink()
    assert points(tmp_path / "disk" / "run") == [("a", 0, 1.0), ("a", 1, 2.0)]


@SINKS
def test_the_file_lies_where_the_program_stood_when_it_named_it(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sink = make(Path("run"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    written(sink, *frames(0))
    assert (tmp_path / "run").exists()
    assert repr(sink) == f"{type(sink).__name__}({str(tmp_path / 'run')!r})"


@SINKS
def test_writing_while_closed_says_so(tmp_path: Path, make: Make) -> None:
    sink = make(tmp_path / "run")
    sink.close()
    with pytest.raises(RuntimeError, match=r"given frames while it was closed: call open\(run\) first"):
        sink.write(frames(0))


class Full:
    """An open file on a disk that is full once some bytes are written, until there is space again."""

    def __init__(self, file: Any, room: int) -> None:
        self.file = file
        self.room = room

    def write(self, data: memoryview) -> int:
        if self.room == 0:
            raise OSError(28, "No space left on device")
        taken = int(self.file.write(data[: self.room]))
        self.room -= taken
        return taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@SINKS
def test_a_full_disk_leaves_whole_lines_and_what_was_lost_is_counted_and_said_once(
    tmp_path: Path, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    sink = make(tmp_path / "run")
    sink.back_off = 0.001
    chain = Connected(sink)
    assert chain.send(*frames(0))
    assert sink._file is not None
    disk = sink._file._file = Full(sink._file._file, 20)  # type: ignore[assignment]
    assert not chain.send(*frames(1, 2))
    assert not chain.send(*frames(3))
    disk.room = 1 << 20
    assert chain.send(*frames(4))
    assert not chain.close()
    assert [step for _, step, _ in points(tmp_path / "run")] == [0, 4]
    assert (chain.stats.written, chain.stats.failed, chain.stats.emitted) == (2, 3, 5)
    lost = f"sink {type(sink).__name__} lost 3 frames: 3 in writes that failed"
    assert caplog.messages == [f"{lost} (the last: [Errno 28] No space left on device)"]


@SINKS
def test_no_folder_no_file_until_it_can_be_made(tmp_path: Path, make: Make) -> None:
    (tmp_path / "folder").touch()
    sink = make(tmp_path / "folder" / "run")
    sink.retries = 0
    chain = Connected(sink)
    assert not chain.send(*frames(0))
    assert len(chain.reports) == 1
    (tmp_path / "folder").unlink()
    assert chain.send(*frames(1))
    chain.close()
    assert [step for _, step, _ in points(tmp_path / "folder" / "run")] == [1]
    assert (chain.stats.written, chain.stats.failed) == (1, 1)


def test_what_was_written_survives_the_death_of_the_process_without_a_flush(tmp_path: Path) -> None:
    program = f"""
import time, torch
import streamlens as sl
feed = sl.Feed()
stream = feed.pipe(sl.norm("weights"))
stream.subscribe(sl.sinks.CSV({str(tmp_path / "run.csv")!r}))
stream.subscribe(sl.sinks.JSONLines({str(tmp_path / "run.jsonl")!r}))
stream.subscribe(sl.sinks.Parquet({str(tmp_path / "run.parquet")!r}))
for step in range(50):
    feed.push(step, weights={{"layer0": torch.ones(1)}})
time.sleep(60)
"""
    last = tmp_path / "run.parquet" / "part-000000.parquet"
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        deadline = time.monotonic() + 50
        while not (last.exists() and all(len(points(path)) == 50 for path in tmp_path.glob("run.*"))):
            assert time.monotonic() < deadline, "a second after it was pushed, all should be there"
            time.sleep(0.1)
        process.kill()
    for name in ("run.csv", "run.jsonl", "run.parquet"):
        assert [step for _, step, _ in points(tmp_path / name)] == list(range(50))
