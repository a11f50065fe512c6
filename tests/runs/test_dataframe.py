"""Runs as tidy tables."""

from __future__ import annotations

import tempfile
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
from torch import Tensor

from streamlens.errors import LayerNotFoundError, UnknownTopicError
from streamlens.frame import Frame
from streamlens.runs import Run, RunWriter, read_run
from streamlens.runs.selection import Steps
from streamlens.runs.tidy import merge_orders
from tests.runs.strategies import frames

Row = tuple[Any, ...]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "run.db"


def store(path: Path, sent: Sequence[Frame]) -> Run:
    run_id = uuid.uuid4().hex
    with RunWriter(path, run_id) as writer:
        writer.write(sent)
    return read_run(path, run_id)


def plain(value: Any) -> Any:
    """A value in a form that compares NaN as equal to itself; arrays with their type and shape."""
    array = np.asarray(value)
    numbers = [repr(x) for x in array.ravel().tolist()]
    return (str(array.dtype), array.shape, numbers) if array.ndim else numbers


def naive(sent: Sequence[Frame], wanted: set[str] | None = None) -> list[Row]:
    """The table by a loop over every single value."""
    rows: list[Row] = []
    for frame in sorted(sent, key=lambda f: (f.step, f.micro_step)):
        for layer, value in frame.items():
            if wanted is not None and layer not in wanted:
                continue
            if value.dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
                value = value.float()
            key = (frame.step, frame.micro_step, frame.epoch, layer)
            names = frame.components
            if names and value.ndim and len(value) == len(names):
                rows += [(*key, name, plain(cell.numpy())) for name, cell in zip(names, value, strict=True)]
            else:
                name = names[0] if len(names) == 1 and value.ndim == 0 else None
                rows.append((*key, name, plain(value.numpy())))
    return rows


def rows_of(table: pd.DataFrame) -> list[Row]:
    components = table["component"] if "component" in table else [None] * len(table)
    return [
        (step, micro_step, epoch, layer, None if pd.isna(component) else component, plain(value))
        for step, micro_step, epoch, layer, component, value in zip(
            table["step"].tolist(),
            table["micro_step"].tolist(),
            table["epoch"].tolist(),
            table["layer"],
            components,
            table["value"].to_numpy(),
            strict=True,
        )
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_the_table_is_that_of_a_loop_over_every_value(shared: Path, data: st.DataObject) -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool, torch.complex64)
    dtype = data.draw(st.sampled_from((*dtypes, torch.float8_e4m3fn)))
    some = frames(st.just("t"), st.sampled_from("abcde\ud800"), (dtype,))
    sent = [f.replace(meta={}) for f in data.draw(st.lists(some, min_size=1, max_size=6))]
    with store(shared, sent) as run:
        table = run.dataframe("t")
        assert rows_of(table) == naive(sent)
        if len(table) and table["value"].dtype != object:
            half = dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn)
            kept = torch.zeros(0, dtype=torch.float32 if half else dtype)
            assert table["value"].dtype == kept.numpy().dtype
        names = run.layers("t")
        if names:
            wanted = data.draw(st.lists(st.sampled_from(names), min_size=1))
            assert rows_of(run.dataframe("t", layers=wanted)) == naive(sent, set(wanted))


def test_columns_and_types_of_a_plain_topic(tmp_path: Path) -> None:
    sent = [Frame("loss", step, ("",), torch.tensor([step / 2]), epoch=step // 2) for step in range(4)]
    with RunWriter(tmp_path / "run.db", "a") as writer:
        writer.write(sent, [100.0, 101.0, 102.0, 103.0])
    with read_run(tmp_path / "run.db") as run:
        table = run.dataframe("loss")
    assert list(table.columns) == ["step", "micro_step", "epoch", "layer", "value", "wall_time"]
    assert table["value"].dtype == np.float32
    assert table["wall_time"].tolist() == [100.0, 101.0, 102.0, 103.0]
    assert table["epoch"].tolist() == [0, 0, 1, 1]
    table.loc[0, "value"] = 7.0  # the table is the reader's own
    assert table["value"].tolist() == [7.0, 0.5, 1.0, 1.5]


def test_an_empty_choice_of_steps_has_the_columns_of_a_full_one(tmp_path: Path) -> None:
    sent = [Frame("loss", 0, ("a",), torch.ones(1, 2), components=("x", "y"))]
    with store(tmp_path / "run.db", sent) as run:
        empty, full = run.dataframe("loss", steps=range(5, 9), max_points=10), run.dataframe("loss")
    assert len(empty) == 0
    assert list(empty.columns) == list(full.columns)
    assert list(empty["layer"].cat.categories) == ["a"]


def test_layers_that_come_and_go_keep_model_order(tmp_path: Path) -> None:
    sets = [("a", "d"), ("a", "b", "d"), ("c", "d"), ("e",), ("b", "c")]
    sent = [Frame("t", step, names, torch.arange(len(names))) for step, names in enumerate(sets)]
    with store(tmp_path / "run.db", sent) as run:
        assert run.layers("t") == ["a", "b", "c", "d", "e"]
        table = run.dataframe("t")
    assert list(table["layer"].cat.categories) == ["a", "b", "c", "d", "e"]
    assert table.groupby("step", observed=True)["layer"].agg(tuple).tolist() == sets


@given(st.permutations(list(range(8))), st.lists(st.sets(st.integers(0, 7)), max_size=5))
def test_merging_orders_keeps_the_order_of_a_list_that_has_everything(
    model: list[int], parts: list[set[int]]
) -> None:
    whole = [str(i) for i in model]
    lists = [[str(i) for i in model if i in part] for part in parts]
    assert merge_orders([whole, *lists]) == whole
    assert set(merge_orders(lists)) == {name for names in lists for name in names}
    for first in lists[:1]:
        merged = merge_orders(lists)
        assert [name for name in merged if name in first] == first


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (None, list(range(10))),
        (3, [3]),
        ((2, 4), [2, 3, 4]),
        ((None, 2), [0, 1, 2]),
        ((8, None), [8, 9]),
        (slice(2, 4), [2, 3]),
        (slice(None, None, 4), [0, 4, 8]),
        (slice(1, None, 4), [1, 5, 9]),
        (range(1, 9, 3), [1, 4, 7]),
        (range(7, 0, -3), [1, 4, 7]),
        (range(20, 10), []),
        ((5, 3), []),
        ([7, 2, 40], [2, 7]),
        ([], []),
    ],
)
def test_steps_are_chosen_as_python_would(tmp_path: Path, steps: Steps | None, expected: list[int]) -> None:
    sent = [Frame("t", step, ("a",), torch.ones(1)) for step in range(10)]
    with store(tmp_path / "run.db", sent) as run:
        assert run.dataframe("t", steps=steps)["step"].tolist() == expected


def test_an_envelope_of_a_list_of_steps_is_refused(tmp_path: Path) -> None:
    sent = [Frame("t", step, ("a",), torch.ones(1)) for step in range(3)]
    with store(tmp_path / "run.db", sent) as run, pytest.raises(ValueError, match="side by side"):
        run.envelope("t", steps=[0, 2])


@given(st.sets(st.integers(0, 300), min_size=1, max_size=60), st.integers(2, 20))
@settings(max_examples=20, deadline=None)
def test_some_steps_are_few_recorded_ones_from_the_first_to_near_the_last(steps: set[int], most: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sent = [Frame("t", step, ("a",), torch.ones(1)) for step in sorted(steps)]
        with store(Path(folder) / "run.db", sent) as run:
            found = run.some_steps("t", most)
    assert len(found) <= most
    assert set(found) <= steps
    if len(steps) <= most:
        assert found == sorted(steps)
    else:
        assert (found[0], found[-1]) == (min(steps), max(steps))


def test_some_steps_are_at_least_two_and_of_a_topic_that_there_is(tmp_path: Path) -> None:
    with store(tmp_path / "run.db", [Frame("t", 0, ("a",), torch.ones(1))]) as run:
        with pytest.raises(ValueError, match="at least 2"):
            run.some_steps("t", 1)
        with pytest.raises(UnknownTopicError, match="unknown topic 'u'"):
            run.some_steps("u", 5)


@pytest.mark.parametrize("steps", [slice(-3, None), slice(0, -1), slice(0, 9, -1)])
def test_a_slice_that_would_count_from_the_end_is_refused(tmp_path: Path, steps: slice) -> None:
    with store(tmp_path / "run.db", [Frame("t", 0, ("a",), torch.ones(1))]) as run:
        with pytest.raises(ValueError, match="cannot be negative"):
            run.dataframe("t", steps=steps)
        with pytest.raises(TypeError, match="pass a step"):
            run.dataframe("t", steps="all")  # type: ignore[arg-type]


def test_layers_are_chosen_by_names_and_globs(tmp_path: Path) -> None:
    names = ("features.0", "features.3", "classifier", "odd[1]")
    with store(tmp_path / "run.db", [Frame("t", 0, names, torch.arange(4))]) as run:
        assert run.dataframe("t", layers="features.*")["value"].tolist() == [0, 1]
        assert run.dataframe("t", layers=["classifier", "*.0"])["value"].tolist() == [0, 2]
        assert run.dataframe("t", layers="odd[1]")["value"].tolist() == [3]
        with pytest.raises(LayerNotFoundError, match=r"'classifer': did you mean 'classifier'\? Layers: 'f"):
            run.dataframe("t", layers=["features.0", "classifer"])


def test_an_unknown_topic_is_named_with_what_was_meant(tmp_path: Path) -> None:
    with store(tmp_path / "run.db", [Frame("weights", 0, ("a",), torch.ones(1))]) as run:
        for ask in (run.dataframe, run.layers, run.frames):
            with pytest.raises(UnknownTopicError, match=r"'weight' .*you mean 'weights'\? Topics: weights"):
                ask("weight")


def test_meta_becomes_columns_and_hides_none(tmp_path: Path) -> None:
    sent = [
        Frame("alerts", 0, ("a", "b"), torch.ones(2), meta={"text": "too high", "value": 3}),
        Frame("alerts", 1, ("a",), torch.zeros(1)),
    ]
    with store(tmp_path / "run.db", sent) as run:
        table = run.dataframe("alerts")
    assert table["value"].tolist() == [1.0, 1.0, 0.0]
    assert table["text"].tolist()[:2] == ["too high", "too high"]
    assert pd.isna(table["text"].iloc[2])
    assert table["meta.value"].tolist()[:2] == [3, 3]


def test_a_topic_whose_type_changes_gets_a_type_that_holds_both(tmp_path: Path) -> None:
    sent = [Frame("t", 0, ("a",), torch.tensor([3])), Frame("t", 1, ("a",), torch.tensor([0.1]))]
    with store(tmp_path / "run.db", sent) as run:
        values = run.dataframe("t")["value"]
    assert values.tolist() == [3.0, float(np.float32(0.1))]


@settings(max_examples=30, deadline=None)
@given(
    layer_sets=st.lists(st.sets(st.sampled_from("abc"), min_size=1), min_size=1, max_size=40),
    max_points=st.integers(5, 12),
    spikes=st.data(),
)
def test_fewer_points_keep_each_layers_extremes_and_gaps(
    shared: Path, layer_sets: list[set[str]], max_points: int, spikes: st.DataObject
) -> None:
    number = st.floats(width=32) | st.just(float("nan"))
    sent = [
        Frame("t", step, sorted(names), torch.tensor([spikes.draw(number) for _ in names]))
        for step, names in enumerate(layer_sets)
    ]
    with store(shared, sent) as run:
        full, thin = run.dataframe("t"), run.dataframe("t", max_points=max_points)
    assert thin[["step", "layer"]].apply(tuple, axis=1).is_monotonic_increasing or len(thin) == 0
    for layer, series in full.groupby("layer", observed=True):
        kept = thin[thin["layer"] == layer]
        assert len(kept) <= max_points
        assert {series["step"].iloc[0], series["step"].iloc[-1]} <= set(kept["step"])
        for extreme in ("min", "max"):
            ours, all_values = kept["value"].agg(extreme), series["value"].agg(extreme)
            assert ours == all_values or (pd.isna(ours) and pd.isna(all_values))
        assert kept["value"].isna().any() == series["value"].isna().any()
        merged = kept.merge(series, on=["step", "layer"], suffixes=("", "_full"))
        assert len(merged) == len(kept)
        assert plain(merged["value"].to_numpy()) == plain(merged["value_full"].to_numpy())


def test_too_few_points_are_refused_with_the_least_number(tmp_path: Path) -> None:
    with (
        store(tmp_path / "run.db", [Frame("t", 0, ("a",), torch.ones(1))]) as run,
        pytest.raises(ValueError, match="at least 5"),
    ):
        run.dataframe("t", max_points=4)


def test_a_value_that_is_itself_a_tensor_stays_an_array(tmp_path: Path) -> None:
    values: Tensor = torch.arange(12.0).reshape(2, 2, 3)
    with store(tmp_path / "run.db", [Frame("w", s, ("a", "b"), values[:, s]) for s in range(2)]) as run:
        cells = run.dataframe("w")["value"].tolist()
        assert len(run.dataframe("w", max_points=5)) == 4
    assert [cell.tolist() for cell in cells] == [[0, 1, 2], [6, 7, 8], [3, 4, 5], [9, 10, 11]]
