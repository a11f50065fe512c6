"""Table: complete, tidy rows right after a step."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex import Subject

from streamlens.delivery import Delivery
from streamlens.frame import Frame
from streamlens.sink import RunInfo
from streamlens.sinks.table import Table


class Feed:
    """A delivery with one chain into a table."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.run = RunInfo(id="f00d")
        self.delivery = Delivery(lambda: self.run, self._fail)
        self.proxy = self.delivery.connect(table, "chain")

    def push(self, *frames: Frame) -> None:
        for frame in frames:
            self.proxy.on_next(frame)
        self.delivery.end_burst()

    @staticmethod
    def _fail(error: Exception, where: str) -> None:
        raise AssertionError(where) from error


@pytest.fixture
def feed() -> Iterator[Feed]:
    feed = Feed(Table())
    # Nothing may come from the worker waking by itself.
    feed.table.max_latency = 60.0
    yield feed
    assert feed.delivery.close(5)


def norms(step: int, values: Sequence[float] = (1.0, 2.0), topic: str = "norm", **fields: Any) -> Frame:
    return Frame(topic, step, [f"layer{i}" for i in range(len(values))], torch.tensor(values), **fields)


def test_the_dataframe_is_complete_right_after_a_step(feed: Feed) -> None:
    for step in range(5):
        feed.push(norms(step))
        assert feed.table.dataframe["step"].max() == step


def test_rows_are_those_of_the_frames(feed: Feed) -> None:
    frames = [norms(step, [0.5, float("nan")], epoch=1, micro_step=step % 2) for step in range(3)]
    feed.push(*frames)
    expected = pd.concat([frame.to_pandas() for frame in frames], ignore_index=True)
    pd.testing.assert_frame_equal(feed.table.dataframe, expected, check_dtype=False)
    assert feed.table.dataframe["value"].dtype == np.float64


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["norm", "loss"]),
            st.lists(st.floats(width=32), min_size=1, max_size=4),
            st.booleans(),
        ),
        max_size=12,
    )
)
@settings(max_examples=25, deadline=None)
def test_reading_in_between_changes_nothing(pushes: list[tuple[str, list[float], bool]]) -> None:
    read, unread = Table(), Table()
    expected = []
    for step, (topic, values, reads) in enumerate(pushes):
        frame = norms(step, values, topic)
        expected += [(topic, f"layer{i}", step, value) for i, value in enumerate(values)]
        for table in (read, unread):
            table.write([frame])
        if reads:
            _ = read.dataframe
    pd.testing.assert_frame_equal(read.dataframe, unread.dataframe)
    rows = unread.dataframe[["topic", "layer", "step", "value"]].itertuples(index=False, name=None)
    assert repr(list(rows)) == repr(expected)


def test_components_and_meta_are_columns_where_they_occur(feed: Feed) -> None:
    feed.push(norms(0))
    assert list(feed.table.dataframe) == ["topic", "layer", "step", "epoch", "micro_step", "value"]
    feed.push(
        Frame("quantiles", 1, ("a",), torch.tensor([[3.0, 4.0]]), components=("5%", "95%")),
        Frame("alerts", 2, ("a",), torch.tensor([1.0]), meta={"text": "look"}),
    )
    rows = feed.table.dataframe
    assert rows["component"].tolist()[2:4] == ["5%", "95%"]
    assert rows["value"].tolist() == [1, 2, 3, 4, 1]
    assert rows["text"].isna().tolist() == [True] * 4 + [False]


def test_vectors_without_names_stay_arrays(feed: Feed) -> None:
    feed.push(Frame("weights", 0, ("a", "b"), (torch.ones(2, 3), torch.zeros(2, 3))))
    values = feed.table.dataframe["value"].tolist()
    assert [value.shape for value in values] == [(2, 3), (2, 3)]


def test_a_topic_is_a_matrix_of_steps_and_layers_in_model_order(feed: Feed) -> None:
    frames = [
        Frame("norm", step, ("conv", "a", "fc"), torch.tensor([step, 10 + step, 20 + step]))
        for step in (3, 1)
    ]
    feed.push(*frames, norms(0, topic="other"))
    matrix = feed.table["norm"]
    assert matrix.columns.tolist() == ["conv", "a", "fc"]
    assert matrix.index.tolist() == [1, 3]
    assert matrix.to_numpy().tolist() == [[1, 11, 21], [3, 13, 23]]


def test_a_matrix_averages_micro_steps_and_leaves_gaps(feed: Feed) -> None:
    feed.push(norms(0, [1.0, 5.0]), norms(0, [3.0], micro_step=1), norms(1, [7.0]))
    matrix = feed.table["norm"]
    assert matrix["layer0"].tolist() == [2.0, 7.0]
    assert matrix["layer1"].tolist()[0] == 5.0
    assert np.isnan(matrix["layer1"].tolist()[1])


def test_a_matrix_of_components_has_both_in_its_columns(feed: Feed) -> None:
    feed.push(Frame("loss", 0, ("",), torch.tensor([[3.0, 4.0]]), components=("b", "a")))
    assert feed.table["loss"].columns.equals(pd.MultiIndex.from_tuples([("", "b"), ("", "a")]))
    assert feed.table["loss"]["", "a"].tolist() == [4.0]


def test_a_matrix_of_vectors_holds_arrays(feed: Feed) -> None:
    feed.push(Frame("weights", 0, ("a",), (torch.ones(3),)))
    assert feed.table["weights"].loc[0, "a"].tolist() == [1, 1, 1]  # type: ignore[union-attr]


def test_an_unknown_topic_names_the_near_ones(feed: Feed) -> None:
    feed.push(norms(0, topic="uw_ratio"))
    with pytest.raises(KeyError, match="did you mean 'uw_ratio'"):
        feed.table["uw_ration"]
    with pytest.raises(KeyError, match=r"no topic 'x' in the table; it has \['uw_ratio'\]"):
        feed.table["x"]


def test_a_limit_keeps_the_newest_frames_and_counts_the_rest() -> None:
    table = Table(limit=3)
    for step in range(10):
        table.write([norms(step)])
        _ = table.dataframe
    assert table.dataframe["step"].tolist() == [7, 7, 8, 8, 9, 9]
    assert (len(table), table.dropped) == (3, 7)
    assert repr(table) == "Table(3 frames of norm; steps 7 to 9, 7 dropped)"


def test_clear_forgets_what_was_received_also_what_is_still_queued(feed: Feed) -> None:
    feed.push(norms(0))
    feed.table.clear()
    assert len(feed.table) == 0
    assert feed.table.dataframe.empty
    feed.push(norms(1))
    assert feed.table.dataframe["step"].tolist() == [1, 1]


def test_an_empty_table_has_its_columns_and_is_no_false_value() -> None:
    table = Table()
    assert list(table.dataframe) == ["topic", "layer", "step", "epoch", "micro_step", "value"]
    assert table
    assert (len(table), table.topics, repr(table)) == (0, (), "Table(empty)")


def test_the_dataframe_is_the_callers_own(feed: Feed) -> None:
    feed.push(norms(0))
    mine = feed.table.dataframe
    mine["value"] = 0.0
    del mine["layer"]
    assert feed.table.dataframe["value"].tolist() == [1.0, 2.0]


def test_runs_are_told_apart_once_there_are_several(feed: Feed) -> None:
    feed.push(norms(0, [1.0]))
    feed.proxy.dispose()
    feed.run = RunInfo(id="beef")
    feed.proxy = feed.delivery.connect(feed.table, "chain")
    feed.push(norms(0, [3.0]))
    assert feed.table.dataframe["run"].tolist() == [0, 1]
    assert feed.table["norm"]["layer0"].tolist() == [3.0], "not the mean of two runs"


def test_a_resumed_run_is_the_same_run(feed: Feed) -> None:
    feed.push(norms(0))
    feed.proxy.dispose()
    feed.run = RunInfo(id="f00d", resumed_at=0)
    feed.proxy = feed.delivery.connect(feed.table, "chain")
    feed.push(norms(1))
    assert "run" not in feed.table.dataframe


def test_reading_while_another_thread_emits_is_safe() -> None:
    feed = Feed(Table())

    def emit() -> None:
        for step in range(300):
            feed.push(norms(step))

    thread = threading.Thread(target=emit)
    thread.start()
    while thread.is_alive():
        steps = feed.table.dataframe["step"].to_numpy()[::2]
        assert np.array_equal(steps, np.arange(len(steps)))
        assert len(feed.table["norm"]) >= len(steps) if len(steps) else True
    thread.join()
    assert len(feed.table) == 300
    assert feed.delivery.close(5)


def test_a_table_ends_a_plain_observable() -> None:
    table, subject = Table(), Subject[Frame]()
    subject.subscribe(table)
    subject.on_next(norms(4))
    assert table.dataframe["step"].tolist() == [4, 4]
    assert [frame.step for frame in table] == [4]
    subject.on_completed()


def test_named_lenses_are_told_apart_by_topic_and_layer(feed: Feed) -> None:
    feed.push(norms(0, source="G"), norms(0, source="D"))
    assert feed.table.topics == ("G/norm", "D/norm")
    assert feed.table["D/norm"].columns.tolist() == ["D.layer0", "D.layer1"]


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match="limit="):
        Table(limit=limit)
