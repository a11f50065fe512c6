"""Files that an earlier version wrote: read as they are, brought up to date by the next writer.

`data/version1.db.gz` was written by the version that introduced the run store: two runs, "first" and
"second", of 25 steps each, without roll-ups.
"""

from __future__ import annotations

import gzip
import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from streamlens.errors import RunStoreError
from streamlens.frame import Frame, Kind
from streamlens.runs import Run, RunWriter, list_runs, migrations, read_run
from streamlens.runs.schema import SCHEMA_VERSION
from tests.runs.strategies import content

DATA = Path(__file__).parent / "data"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "run.db"
    path.write_bytes(gzip.decompress((DATA / "version1.db.gz").read_bytes()))
    return path


def sent(run: int) -> list[Frame]:
    """What was written into the old file."""
    frames: list[Frame] = []
    for step in range(25):
        epoch = step // 10
        frames.append(Frame("loss", step, ("",), torch.tensor([run + step / 4]), epoch=epoch))
        norms = torch.tensor([run + step * 2.0, -float(step)])
        frames.append(Frame("weights.norm2", step, ("a", "b"), norms, epoch=epoch))
        if step % 10 == 0:
            bins = torch.tensor([[float(step), 2.0]])
            frames.append(
                Frame("weights.histogram", step, ("a",), bins, epoch=epoch, components=("low", "high"))
            )
    frames.append(Frame("weights", 3, ("a",), (torch.arange(6.0).reshape(2, 3),)))
    text = {"text": "too large"}
    frames.append(Frame("alerts", 4, ("a",), torch.tensor([1.0]), meta=text, kind=Kind.EVENT))
    return frames


def check(run: Run, number: int, width: int) -> None:
    """What the file holds, with stretches of `width` steps: of ten where there are roll-ups."""
    assert [content(f) for f in run.frames()] == [content(f) for f in sent(number)]
    table = run.envelope("weights.norm2", max_points=3)
    steps = [np.arange(start, min(start + width, 25)) for start in range(0, 25, width)]
    expected = [
        row
        for s in steps
        for row in (
            (s[0], "a", number + 2.0 * s[0], number + 2.0 * s.mean(), number + 2.0 * s[-1]),
            (s[0], "b", -float(s[-1]), -s.mean(), -float(s[0])),
        )
    ]
    assert list(table[["step", "layer", "min", "mean", "max"]].itertuples(index=False, name=None)) == expected


def version(path: Path) -> int:
    with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True) as db:
        found = db.execute("PRAGMA user_version").fetchone()[0]
    db.close()
    return int(found)


def test_a_file_of_the_first_version_is_read_whole_and_not_changed(old: Path) -> None:
    before = old.read_bytes()
    assert [(run.id, run.name, run.metadata["rate"], dict(run.origin)) for run in list_runs(old)] == [
        ("first", "one", 0.0, {}),
        ("second", "two", 0.1, {}),
    ]
    for number, run_id in ((0, "first"), (100, "second")):
        with read_run(old, run_id) as run:
            check(run, number, 9)
    with read_run(old) as run:
        assert run.id == "second"
    assert old.read_bytes() == before


def test_the_next_writer_migrates_it_and_nothing_is_lost(old: Path) -> None:
    with read_run(old, "second") as before, RunWriter(old, "third") as writer:
        writer.write([Frame("loss", 0, ("",), torch.zeros(1))])
        check(before, 100, 10)  # also for who had it open
    assert version(old) == SCHEMA_VERSION
    for number, run_id in ((0, "first"), (100, "second")):
        with read_run(old, run_id) as run:
            check(run, number, 10)
    # When a run was last written is told by its last frame.
    assert [run.written for run in list_runs(old)][:2] == pytest.approx(
        [run.started for run in list_runs(old)][:2]
    )


def test_roll_ups_of_a_migrated_run_are_those_of_one_written_now(old: Path, tmp_path: Path) -> None:
    with RunWriter(old, "first") as writer:
        writer.write([Frame("loss", 25, ("",), torch.tensor([9.0]))])
    with RunWriter(tmp_path / "new.db", "first") as writer:
        writer.write(sent(0)[:10])
        writer.write(sent(0)[10:])
        writer.write([Frame("loss", 25, ("",), torch.tensor([9.0]))])
    with read_run(old, "first") as migrated, read_run(tmp_path / "new.db") as new:
        for topic in ("loss", "weights.norm2", "weights.histogram", "alerts"):
            for points in (1, 3, 100):
                one, other = (
                    run.envelope(topic, max_points=points).drop(columns="wall_time")
                    for run in (migrated, new)
                )
                pd.testing.assert_frame_equal(one, other)
        assert rolled(old, migrated) == rolled(tmp_path / "new.db", new)


def rolled(path: Path, run: Run) -> list[tuple[int, bytes | None]]:
    """Frames and bytes of all roll-ups of the file's first run."""
    db = sqlite3.connect(path)
    layouts = [
        db.execute(
            "SELECT layout FROM layouts JOIN topics USING (topic) WHERE run = 1 AND name = ?", (topic,)
        ).fetchone()[0]
        for topic in run.topics
    ]
    found = [
        row
        for layout in layouts
        for row in db.execute(
            "SELECT frames, data FROM rollups WHERE key >> 40 BETWEEN ? AND ? ORDER BY key",
            (3 * layout, 3 * layout + 2),
        )
    ]
    db.close()
    return found


def test_a_migration_that_fails_leaves_the_old_version(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = old.read_bytes()

    def fail(db: sqlite3.Connection) -> None:
        migrations._from_1_to_2(db)
        raise sqlite3.OperationalError("no more")

    monkeypatch.setattr(migrations, "_MIGRATIONS", {1: fail})
    with pytest.raises(RunStoreError, match="no more"):
        RunWriter(old, "third")
    assert version(old) == 1
    with read_run(old, "first") as run:
        check(run, 0, 9)
    assert len(before) == old.stat().st_size


def test_a_damaged_file_of_the_first_version_is_not_migrated(old: Path) -> None:
    value = np.array([24 * 2.0, -24.0], np.float32).tobytes()
    damaged = bytearray(old.read_bytes())
    assert damaged.count(value) == 1
    damaged[damaged.index(value)] ^= 1
    old.write_bytes(damaged)
    with pytest.raises(RunStoreError, match=r"damaged .*step 24 is not what was written"):
        RunWriter(old, "third")
    assert version(old) == 1
    assert [run.id for run in list_runs(old)] == ["first", "second"]
