"""Parquet: what pyarrow and pandas read back, at any moment, is what was written."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import streamlens as sl
from streamlens.errors import SinkError
from streamlens.frame import Frame
from streamlens.sink import RunInfo
from streamlens.sinks.parquet import Parquet
from tests.helpers.sinks import Connected, norms, written


def points(path: Path) -> list[tuple[str, int, float]]:
    table = pd.read_parquet(path)
    return list(table[["run", "step", "value"]].itertuples(index=False, name=None))


def frames(*steps: int, value: float = 1.0) -> list[Frame]:
    return [norms(step, [value]) for step in steps]


def test_each_layer_of_a_frame_is_a_row(tmp_path: Path) -> None:
    frame = norms(7, [0.5, math.nan], epoch=3, micro_step=1, meta={"text": "look", "at": math.nan})
    loss = Frame("loss", 8, ("",), torch.tensor([[1.5, math.inf]]), components=("a", "b"))
    written(Parquet(tmp_path / "deep" / "run.parquet"), frame, loss)
    rows = pq.read_table(tmp_path / "deep" / "run.parquet").to_pylist()
    first = {
        "run": "f00d",
        "topic": "norm",
        "layer": "layer0",
        "step": 7,
        "epoch": 3,
        "micro_step": 1,
        "component": None,
        "value": 0.5,
        "elements": None,
        "shape": None,
        "wall_time": 100.0,
        "meta": '{"text":"look","at":"NaN"}',
    }
    assert rows[0] == first
    assert math.isnan(rows[1]["value"]), "a NaN is a value and not a null"
    assert [(row["layer"], row["component"], row["value"]) for row in rows[2:]] == [
        ("", "a", 1.5),
        ("", "b", math.inf),
    ]
    assert rows[2]["meta"] is None
    assert [row["wall_time"] for row in rows] == [100.0, 100.0, 101.0, 101.0]


def test_every_kind_of_value_is_stored(tmp_path: Path) -> None:
    values = (
        torch.arange(6.0).reshape(2, 3),
        torch.tensor([1 + 2j]),
        torch.zeros(0),
        torch.ones(2, 2, 3, dtype=torch.uint8),
        torch.tensor(0.1, dtype=torch.bfloat16),
        torch.tensor(3 - 1j),
        torch.tensor(True),
    )
    written(Parquet(tmp_path / "run"), Frame("w", 0, tuple("abcdefg"), values))
    rows = pq.read_table(tmp_path / "run").to_pylist()
    assert [(row["elements"], row["shape"], row["value"]) for row in rows[:5]] == [
        ([0, 1, 2, 3, 4, 5], [2, 3], None),
        ([1, 2], [1, 2], None),
        ([], [0], None),
        ([1] * 12, [2, 2, 3], None),
        (None, None, 0.10009765625),
    ]
    assert [(row["layer"], row["component"], row["value"]) for row in rows[5:]] == [
        ("f", "real", 3),
        ("f", "imag", -1),
        ("g", None, 1),
    ]


def test_names_that_utf8_lacks_do_no_harm(tmp_path: Path) -> None:
    written(Parquet(tmp_path / "run"), Frame("\ud800", 0, ("two\nlines",), torch.ones(1)))
    assert pd.read_parquet(tmp_path / "run")[["topic", "layer"]].to_numpy().tolist() == [
        ["\\ud800", "two\nlines"]
    ]


def test_the_whole_of_a_run_is_there_as_the_lens_gave_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    table = sl.sinks.Table()
    with sl.observe(model) as lens:
        for sink in (table, Parquet(tmp_path / "run")):
            lens.pipe(sl.histogram("weights", bins=4, range=(-1, 1))).subscribe(sink)
            lens.pipe(sl.topic("weight_gradients")).subscribe(sink)
        for _ in range(3):
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    got, expected = pd.read_parquet(tmp_path / "run"), table.dataframe
    counts = expected["component"].notna().to_numpy()
    names = ["topic", "layer", "step", "epoch", "micro_step"]
    pd.testing.assert_frame_equal(got[names], expected[names], check_dtype=False)
    assert got["component"][counts].tolist() == expected["component"][counts].tolist()
    assert got["value"][counts].tolist() == expected["value"][counts].tolist()
    for row in np.flatnonzero(~counts):
        array = np.reshape(got["elements"][row], got["shape"][row])
        np.testing.assert_array_equal(array, expected["value"][row])


def test_files_are_whole_at_every_moment_and_have_as_many_rows_as_asked(tmp_path: Path) -> None:
    sink = Parquet(tmp_path / "run", part_rows=4)
    sink.open(RunInfo("a"))
    for step in range(10):
        sink.write(frames(step))
        sink.flush()
        assert [s for _, s, _ in points(sink.path)] == list(range(step + 1))
    sink.close()
    parts = sorted(name for name in os.listdir(sink.path))
    assert parts == [f"part-{number:06d}.parquet" for number in range(3)]
    assert [pq.read_metadata(sink.path / part).num_rows for part in parts] == [4, 4, 2]


def test_under_load_rows_reach_the_disk_without_a_flush(tmp_path: Path) -> None:
    sink = Parquet(tmp_path / "run", part_rows=8)
    sink.open(RunInfo("a"))
    for step in range(20):
        sink.write(frames(step))
    assert len(points(sink.path)) >= 16
    sink.close()
    assert [step for _, step, _ in points(sink.path)] == list(range(20))


def test_a_fresh_run_takes_a_new_name_and_leaves_what_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.parquet"
    written(Parquet(path), *frames(0, 1), run=RunInfo("a"))
    (tmp_path / "run-2.parquet").write_text("a file")
    (tmp_path / "run-3.parquet").mkdir()
    (tmp_path / "run-4.parquet").mkdir()
    (tmp_path / "run-4.parquet" / "part-000000.parquet").write_text("no parquet")
    sink = Parquet(path)
    written(sink, *frames(0), run=RunInfo("b"))
    assert sink.path == tmp_path / "run-5.parquet"
    assert points(sink.path) == [("b", 0, 1.0)]
    assert points(path) == [("a", 0, 1.0), ("a", 1, 1.0)]
    assert list((tmp_path / "run-3.parquet").iterdir()) == []
    assert caplog.messages == [
        f"{path} is in use or holds something else: this run is written to {sink.path}"
    ]


def test_a_sink_that_is_subscribed_again_goes_on_in_its_folder(tmp_path: Path) -> None:
    sink = Parquet(tmp_path / "run")
    for step in range(3):
        written(sink, *frames(step), run=RunInfo("a"))
    assert points(tmp_path / "run") == [("a", step, 1.0) for step in range(3)]
    assert os.listdir(tmp_path) == ["run"]


def test_a_resumed_run_drops_what_its_folder_had_beyond_its_snapshot(tmp_path: Path) -> None:
    first = Parquet(tmp_path / "run", part_rows=2)
    written(first, *frames(0, 1), run=RunInfo("a"))
    written(first, *frames(3, 2), run=RunInfo("a"))
    written(first, *frames(4, 5), run=RunInfo("a"))
    (tmp_path / "run" / ".part-000003.parquet").write_text("cut off by a crash")
    sink = Parquet(tmp_path / "run")
    back = RunInfo("a", resumed_at=2, resumption="parquet")
    written(sink, *frames(3, value=2.0), run=back)
    expected = [("a", 0, 1.0), ("a", 1, 1.0), ("a", 2, 1.0), ("a", 3, 2.0)]
    assert points(tmp_path / "run") == expected
    written(sink, *frames(4, value=2.0), run=back)
    assert points(tmp_path / "run") == [*expected, ("a", 4, 2.0)]
    assert os.listdir(tmp_path) == ["run"]


def test_two_sinks_of_one_name_write_two_folders(tmp_path: Path) -> None:
    first, second = Parquet(tmp_path / "run"), Parquet(tmp_path / "run")
    for sink in (first, second):
        sink.open(RunInfo("a"))
        sink.write(frames(0))
        sink.flush()
    assert (first.path, second.path) == (tmp_path / "run", tmp_path / "run-2")
    first.close()
    second.close()


def full(monkeypatch: pytest.MonkeyPatch, sink: Parquet) -> None:
    """Fill the disk."""

    def write_table(table: Any, path: Path) -> None:
        path.write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    class Pq:
        def __getattr__(self, name: str) -> Any:
            return getattr(pq, name)

    disk = Pq()
    disk.write_table = write_table  # type: ignore[attr-defined]
    monkeypatch.setattr(sink, "_pq", disk)


def test_a_full_disk_costs_what_does_not_fit_in_memory_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sink = Parquet(tmp_path / "run", part_rows=8)
    sink.retries = 0
    chain = Connected(sink)
    assert chain.send(*frames(0))
    full(monkeypatch, sink)
    for step in range(1, 6):
        assert not chain.send(*frames(step))
    assert points(sink.path) == [("f00d", 0, 1.0)]
    monkeypatch.undo()
    assert chain.send(*frames(6))
    assert not chain.close()
    # Two rows, a quarter of a file's, were held; the others came when these could not be saved.
    assert [step for _, step, _ in points(sink.path)] == [0, 1, 2, 6]
    assert (chain.stats.written, chain.stats.failed) == (4, 3)
    assert [message for message in caplog.messages if "lost" in message] == [
        "sink Parquet lost 3 frames: 3 in writes that failed (the last: [Errno 28] No space left on device)"
    ]
    assert sorted(os.listdir(sink.path)) == ["part-000000.parquet"]


def test_frames_that_cannot_be_saved_in_the_end_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = Parquet(tmp_path / "run")
    sink.open(RunInfo("a"))
    sink.write(frames(0, 1))
    full(monkeypatch, sink)
    with pytest.raises(SinkError, match=r"the last 2 frames could not be saved: .* No space left"):
        sink.close()
    sink.close()


def test_frames_that_cannot_be_saved_in_the_end_count_as_lost_and_not_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sink = Parquet(tmp_path / "run")
    chain = Connected(sink)
    assert chain.send(*frames(0, 1))
    full(monkeypatch, sink)
    assert not chain.send(*frames(2, 3, 4))
    assert not chain.close()
    monkeypatch.undo()
    assert [step for _, step, _ in points(sink.path)] == [0, 1]
    stats = chain.stats
    assert (stats.emitted, stats.written, stats.dropped, stats.failed, stats.queued) == (5, 2, 3, 3, 0)
    (said,) = [message for message in caplog.messages if "lost" in message]
    assert said.startswith("sink Parquet lost 3 frames: 3 in writes that failed (the last: the last 3 frames")


def test_the_metadata_names_the_run(tmp_path: Path) -> None:
    written(Parquet(tmp_path / "run"), *frames(0), run=RunInfo("a", name="digits"))
    metadata = pq.read_schema(tmp_path / "run" / "part-000000.parquet").metadata
    assert (metadata[b"streamlens.run"], metadata[b"streamlens.run_name"]) == (b"a", b"digits")


def test_meta_is_json(tmp_path: Path) -> None:
    written(Parquet(tmp_path / "run"), norms(0, [1.0], meta={"text": "☹", "n": 3}))
    assert json.loads(pd.read_parquet(tmp_path / "run")["meta"][0]) == {"text": "☹", "n": 3}


def test_rows_of_a_file_are_checked() -> None:
    with pytest.raises(ValueError, match=r"Parquet\(part_rows=\) is the rows of a file, at least 1; got 0"):
        Parquet("run", part_rows=0)
