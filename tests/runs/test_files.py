"""Files that are no run store, or no longer one: refused with a reason, never changed."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamlens.errors import RunStoreError, UnknownTopicError
from streamlens.frame import Frame
from streamlens.runs import RunWriter, list_runs, read_run
from streamlens.runs.schema import SCHEMA_VERSION

_LAYERS = ("a", "b", "c")


def sent() -> list[Frame]:
    return [
        Frame(topic, step, _LAYERS, torch.tensor([step + 0.25, -step, float(len(topic))]))
        for step in range(200)
        for topic in ("loss", "weights.norm2")
    ]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("intact") / "run.db"
    with RunWriter(path, "a") as store:
        store.write(sent())
    return path


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE precious (x)")
    db.close()


def newer(path: Path) -> None:
    RunWriter(path, "a").close()
    with sqlite3.connect(path, isolation_level=None) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.execute("PRAGMA journal_mode = DELETE")
    db.close()


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (
        lambda path: path.write_text("step,loss\n" * 9),
        "not a run store .*no SQLite file.*another path",
    ),
    "short text": (lambda path: path.write_text("x"), "not a run store .*no SQLite file.*another path"),
    "foreign": (foreign, "not a run store .*another program.*another path"),
    "newer": (newer, f"newer streamlens .*version {SCHEMA_VERSION + 1}.*upgrade"),
    "folder": (lambda path: path.mkdir(), "(cannot read|no run store is in) .*choose the path of a file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_run_store_is_refused_and_left_as_it_is(tmp_path: Path, kind: str) -> None:
    make, message = BAD[kind]
    path = tmp_path / "file"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    uses: list[Callable[[], object]] = [lambda: RunWriter(path, "a"), lambda: read_run(path)]
    if kind != "folder":  # of which the stores inside are listed
        uses.append(lambda: list_runs(path))
    for use in uses:
        with pytest.raises(RunStoreError, match=message) as caught:
            use()
        assert str(path) in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert before is None or path.read_bytes() == before


def test_reading_where_there_is_nothing_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(RunStoreError, match="there is no run store at"):
        read_run(tmp_path / "run.db")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_becomes_a_run_store(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    path.touch()
    with pytest.raises(RunStoreError, match="there is no run store"):
        read_run(path)
    with RunWriter(path, "a") as store:
        store.write(sent()[:2])
    assert [run.id for run in list_runs(path)] == ["a"]


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_file_cut_off_is_damaged_for_reader_and_writer(tmp_path: Path, intact: Path, share: float) -> None:
    path = tmp_path / "run.db"
    whole = intact.read_bytes()
    cut = whole[: int(len(whole) * share)]
    path.write_bytes(cut)
    for use in (lambda: read_run(path), lambda: RunWriter(path, "b")):
        with pytest.raises(RunStoreError, match=r"is damaged .*move it away"):
            use()
    assert path.read_bytes() == cut


def test_a_flipped_bit_in_a_value_is_damage_and_not_a_wrong_number(tmp_path: Path, intact: Path) -> None:
    path = tmp_path / "run.db"
    value = torch.tensor([123 + 0.25, -123, 4.0]).numpy().tobytes()
    damaged = bytearray(intact.read_bytes())
    assert damaged.count(value) == 1
    damaged[damaged.index(value) + 2] ^= 1
    path.write_bytes(damaged)
    with read_run(path) as run:
        for use in (lambda: list(run.frames()), lambda: run.dataframe("loss")):
            with pytest.raises(RunStoreError, match=r"damaged .*'loss' at step 123 is not what was written"):
                use()
        assert len(run.dataframe("weights.norm2")) == 600
        assert run.dataframe("loss", steps=(0, 122))["value"].iloc[-1] == len("loss")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "run.db"


flipped = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255))


@settings(max_examples=60, deadline=None)
@given(flips=st.lists(flipped, min_size=1, max_size=4))
def test_whatever_byte_is_wrong_values_are_right_or_the_file_is_damaged(
    scratch: Path, intact: Path, flips: list[tuple[float, int]]
) -> None:
    damaged = bytearray(intact.read_bytes())
    for place, flip in flips:
        # Squared, so that half of the flips hit the tables by which all else is found.
        damaged[int(place**2 * len(damaged))] ^= flip
    scratch.write_bytes(damaged)
    # A damaged name shows as such; a number would not. Values tell the topic by their last.
    right = {(f.step, f["c"].item()): f["a"].item() for f in sent()}
    with contextlib.suppress(RunStoreError, UnknownTopicError), read_run(scratch) as run:
        for topic in run.topics:
            run.layers(topic)
            run.dataframe(topic, max_points=50)
        for frame in run.frames():
            first, _, last = cast("Tensor", frame.values).tolist()
            assert first == right[frame.step, last]


@settings(max_examples=40, deadline=None)
@given(flips=st.lists(flipped, min_size=1, max_size=4))
def test_a_writer_that_refuses_a_damaged_file_has_not_changed_it(
    scratch: Path, intact: Path, flips: list[tuple[float, int]]
) -> None:
    damaged = bytearray(intact.read_bytes())
    for place, flip in flips:
        # To the fourth power: most flips hit what is read when the file is opened.
        damaged[int(place**4 * len(damaged))] ^= flip
    scratch.write_bytes(damaged)
    refusal = ""
    try:
        RunWriter(scratch, "b").close()
    except RunStoreError as error:
        refusal = str(error)
    if refusal:
        assert str(scratch) in refusal
        assert scratch.read_bytes() == damaged
        assert [file.name for file in scratch.parent.iterdir()] == [scratch.name]
