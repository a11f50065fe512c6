"""Minima, means and maxima over stretches of steps, against a loop over every value."""

from __future__ import annotations

import math
import sqlite3
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamlens.errors import LayerNotFoundError, RunStoreError, UnknownTopicError
from streamlens.frame import Frame
from streamlens.runs import RunWriter, read_run
from streamlens.runs.rollups import LEVELS

Row = tuple[Any, ...]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "run.db"


def by_hand(sent: Sequence[Frame], width: int, first: int = 0, last: int = 2**60) -> list[Row]:
    """The rows of the envelope, by a loop: step, epoch, layer, component, min, mean, max, count, missing."""
    found: dict[tuple[int, str, str | None], list[tuple[int, int, float]]] = {}
    for frame in sent:
        if not first <= frame.step <= last:
            continue
        for layer, value in frame.items():
            names: Sequence[str | None] = frame.components or (None,)
            for name, number in zip(names, value.double().reshape(-1).tolist(), strict=True):
                key = (frame.step // width * width, layer, name)
                found.setdefault(key, []).append((frame.step, frame.epoch, number))
    rows: list[Row] = []
    for (start, layer, name), values in found.items():
        known = [value for _, _, value in values if not math.isnan(value)]
        low, high = (min(known), max(known)) if known else (math.nan, math.nan)
        mean = float(np.mean(known)) if known else math.nan
        epoch = min(e for (s, _, _), many in found.items() if s == start for _, e, _ in many)
        rows.append((start, epoch, layer, name, low, mean, high, len(known), len(values) - len(known)))
    return sorted(rows, key=lambda row: row[:1] + tuple(map(str, row[2:4])))


def rows_of(table: pd.DataFrame) -> list[Row]:
    if "component" not in table:
        table = table.assign(component=None)
    columns = ["step", "epoch", "layer", "component", "min", "mean", "max", "count", "missing"]
    rows = [
        (*row[:3], None if pd.isna(row[3]) else row[3], *row[4:])
        for row in table[columns].astype({"layer": object, "component": object}).itertuples(index=False)
    ]
    return sorted(rows, key=lambda row: row[:1] + tuple(map(str, row[2:4])))


def assert_same(table: pd.DataFrame, expected: list[Row]) -> None:
    rows = rows_of(table)
    assert [row[:4] for row in rows] == [row[:4] for row in expected]
    assert [row[7:] for row in rows] == [row[7:] for row in expected]
    for place, tolerance in ((4, 0.0), (5, 3e-6), (6, 0.0)):
        np.testing.assert_allclose(
            np.array([row[place] for row in rows], float),
            np.array([row[place] for row in expected], float),
            rtol=tolerance, atol=tolerance,
        )  # fmt: skip


numbers = st.sampled_from([0.0, -1.5, 2.25, 1e-3, 7.0]) | st.sampled_from([math.nan, math.inf])


@st.composite
def runs(draw: st.DrawFn) -> list[list[Frame]]:
    """Writes of frames of one topic: steps that come late, twice and with gaps; layers that go."""
    components = draw(st.sampled_from([(), ("low", "high")]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int32]))
    stride = draw(st.sampled_from([1, 1, 7, 150]))
    writes: list[list[Frame]] = []
    step = draw(st.sampled_from([0, 3, 995]))
    for _ in range(draw(st.integers(1, 5))):
        write: list[Frame] = []
        layers = draw(st.sampled_from([("a", "b"), ("a",), ("b", "c")]))
        for _ in range(draw(st.integers(1, 25))):
            shape = (len(layers), *([2] if components else []))
            values = torch.tensor([draw(numbers) for _ in range(math.prod(shape))], dtype=torch.float64)
            if dtype is torch.int32:
                values = values.nan_to_num(0, 0, 0)
            late = draw(st.sampled_from([0, 0, 0, 0, 12]))
            write.append(
                Frame(
                    "t",
                    max(step - late * stride, 0),
                    layers,
                    values.reshape(shape).to(dtype),
                    components=components,
                )
            )
            step += stride * draw(st.sampled_from([1, 1, 1, 0, 3]))
        writes.append(write)
    return writes


def write(path: Path, writes: Sequence[Sequence[Frame]], *, reopen: bool) -> str:
    run_id = uuid.uuid4().hex
    if reopen:
        for frames in writes:
            with RunWriter(path, run_id) as writer:
                writer.write(frames)
        return run_id
    with RunWriter(path, run_id) as writer:
        for frames in writes:
            writer.write(frames)
    return run_id


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(writes=runs(), reopen=st.booleans(), max_points=st.sampled_from([1, 2, 3, 5, 20, 1000]))
def test_the_envelope_is_that_of_a_loop_over_every_value(
    shared: Path, writes: list[list[Frame]], reopen: bool, max_points: int
) -> None:
    sent = [frame for frames in writes for frame in frames]
    with read_run(shared, write(shared, writes, reopen=reopen)) as run:
        table = run.envelope("t", max_points=max_points)
    starts = sorted(set(table["step"]))
    assert len(starts) <= max_points
    first = min(frame.step for frame in sent)
    steps = np.array([frame.step for frame in sent])
    for width in sorted({level * k for level in (1, *LEVELS) for k in range(1, 1000)}):
        if np.unique(np.maximum(steps // width * width, first)).tolist() == starts:
            assert_same(table, [(max(row[0], first), *row[1:]) for row in by_hand(sent, width)])
            return
    raise AssertionError(f"no width of stretches gives {starts}")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(writes=runs(), back=st.integers(0, 60), more=runs())
def test_a_resumed_run_has_the_envelope_of_what_it_kept_and_wrote_since(
    shared: Path, writes: list[list[Frame]], back: int, more: list[list[Frame]]
) -> None:
    run_id = write(shared, writes, reopen=False)
    sent = [frame for frames in writes for frame in frames]
    snapshot = max(frame.step for frame in sent) - back
    again = [frame for frames in more for frame in frames if frame.components == sent[0].components]
    with RunWriter(shared, run_id, resumed_at=snapshot) as writer:
        writer.write(again)
    kept = [frame for frame in sent if frame.step <= snapshot] + again
    if not kept:
        return
    with RunWriter(shared, uuid.uuid4().hex) as writer:
        writer.write(kept)
    with read_run(shared, run_id) as resumed, read_run(shared) as anew:
        for max_points in (1, 7, 1000):
            one, other = (
                r.envelope("t", max_points=max_points).drop(columns="wall_time").astype({"layer": object})
                for r in (resumed, anew)
            )
            pd.testing.assert_frame_equal(one, other)


def long_run(path: Path, count: int = 2500) -> list[Frame]:
    values = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    values[1234, 0] = math.nan
    sent = [Frame("t", step, ("a", "b"), values[step], epoch=step // 1000) for step in range(count)]
    with RunWriter(path, "a") as writer:
        for start in range(0, count, 333):
            writer.write(sent[start : start + 333])
    return sent


@pytest.mark.parametrize(
    ("max_points", "width"),
    [(2500, 1), (1000, 3), (500, 10), (300, 10), (250, 10), (84, 30), (5, 1000), (1, 3000)],
)
def test_stretches_are_as_short_as_the_points_allow(tmp_path: Path, max_points: int, width: int) -> None:
    sent = long_run(tmp_path / "run.db")
    with read_run(tmp_path / "run.db") as run:
        table = run.envelope("t", max_points=max_points)
        assert_same(table, by_hand(sent, width))
        assert table["step"].nunique() <= max_points


def test_long_runs_are_read_from_roll_ups_alone(tmp_path: Path) -> None:
    sent = long_run(tmp_path / "run.db")
    with read_run(tmp_path / "run.db") as run:
        read: list[str] = []
        run._db.set_trace_callback(read.append)
        table = run.envelope("t", max_points=100)
        assert_same(table, by_hand(sent, 30))
        assert not [text for text in read if "data" in text and "FROM frames" in text]


def test_a_sparse_topic_pays_for_no_roll_up_of_single_frames(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    sent = [Frame("t", step, ("a",), torch.tensor([float(step)])) for step in range(0, 20_000, 100)]
    with RunWriter(path, "a") as writer:
        writer.write(sent)
    db = sqlite3.connect(path)
    held = [
        db.execute("SELECT count(*), count(data) FROM rollups WHERE (key >> 40) % 3 = ?", (i,)).fetchone()
        for i in range(3)
    ]
    db.close()
    assert held == [(200, 0), (200, 0), (20, 20)]
    with read_run(path) as run:
        assert_same(run.envelope("t", max_points=40), by_hand(sent, 1000))
        assert_same(run.envelope("t", max_points=10), by_hand(sent, 2000))


def test_a_range_of_steps_is_drawn_finer(tmp_path: Path) -> None:
    sent = long_run(tmp_path / "run.db")
    with read_run(tmp_path / "run.db") as run:
        table = run.envelope("t", steps=(1200, 1299), max_points=100)
        assert_same(table, by_hand(sent, 1, 1200, 1299))
        assert_same(run.envelope("t", steps=slice(1200, 1300), max_points=10), by_hand(sent, 10, 1200, 1299))
        assert len(run.envelope("t", steps=(5000, None))) == 0
        with pytest.raises(ValueError, match="without a stride"):
            run.envelope("t", steps=slice(0, 100, 2))


def test_layers_are_chosen_by_name_and_glob(tmp_path: Path) -> None:
    sent = long_run(tmp_path / "run.db")
    only = [Frame("t", f.step, ("b",), torch.stack([f["b"]]), epoch=f.epoch) for f in sent]
    with read_run(tmp_path / "run.db") as run:
        table = run.envelope("t", layers="b", max_points=100)
        assert_same(table, by_hand(only, 30))
        assert list(table["layer"].cat.categories) == ["b"]
        with pytest.raises(LayerNotFoundError, match="no layer of 't' matches 'x'"):
            run.envelope("t", layers="x")


def test_what_has_no_envelope_says_so(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run.db", "a") as writer:
        writer.write([Frame("weights", 0, ("a",), (torch.ones(2, 3),)), Frame("t", 0, ("a",), torch.ones(1))])
    with read_run(tmp_path / "run.db") as run:
        with pytest.raises(ValueError, match=r"'weights' holds .* norm\(\)"):
            run.envelope("weights")
        with pytest.raises(UnknownTopicError, match="unknown topic 'x'"):
            run.envelope("x")
        with pytest.raises(ValueError, match="max_points must be at least 1, got 0"):
            run.envelope("t", max_points=0)


def test_a_damaged_roll_up_is_damage_and_not_a_wrong_number(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    long_run(path)
    with sqlite3.connect(path) as db:
        db.execute(
            "UPDATE rollups SET data = zeroblob(length(data)) WHERE key = (SELECT max(key) FROM rollups)"
        )
    db.close()
    with read_run(path) as run, pytest.raises(RunStoreError, match="roll-up of 1000 steps from step 2000"):
        run.envelope("t", max_points=1)
    with RunWriter(path, "a") as writer, pytest.raises(RunStoreError, match="is damaged"):
        writer.write([Frame("t", 2500, ("a", "b"), torch.ones(2))])


def test_steps_beyond_any_roll_up_are_drawn_from_their_frames(tmp_path: Path) -> None:
    sent = [Frame("t", 2**58 + step, ("a",), torch.tensor([float(step)])) for step in range(60)]
    with RunWriter(tmp_path / "run.db", "a") as writer:
        writer.write(sent)
    with read_run(tmp_path / "run.db") as run:
        table = run.envelope("t", max_points=6)
    assert (table["min"].min(), table["max"].max(), table["count"].sum()) == (0, 59, 60)
    assert table["step"].nunique() <= 6
