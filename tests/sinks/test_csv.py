"""CSV: what pandas reads back is what was written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import streamlens as sl
from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.sinks.csv import CSV
from tests.helpers.sinks import RUN, Connected, norms, written

COLUMNS = ["run", "topic", "layer", "step", "epoch", "micro_step", "component", "value", "wall_time", "meta"]


def read(path: Path) -> pd.DataFrame:
    """As the documentation says."""
    return pd.read_csv(path, dtype={"layer": str}, na_filter=False)


def rows(path: Path) -> list[tuple[Any, ...]]:
    return list(
        read(path)[["topic", "layer", "step", "component", "value"]].itertuples(index=False, name=None)
    )


def test_each_layer_of_a_frame_is_a_row(tmp_path: Path) -> None:
    frame = norms(7, [0.5, 2.0], epoch=3, micro_step=1, meta={"text": 'says "hi",\nand more', "at": math.nan})
    written(CSV(tmp_path / "deep" / "run.csv"), frame, Frame("loss", 8, ("",), torch.tensor([1.5])))
    table = read(tmp_path / "deep" / "run.csv")
    assert list(table.columns) == COLUMNS
    assert table["run"].tolist() == ["f00d"] * 3
    assert table["topic"].tolist() == ["norm", "norm", "loss"]
    assert table["layer"].tolist() == ["layer0", "layer1", ""]
    assert table[["step", "epoch", "micro_step"]].to_numpy().tolist() == [[7, 3, 1], [7, 3, 1], [8, 0, 0]]
    assert table["value"].tolist() == [0.5, 2.0, 1.5]
    assert table["wall_time"].tolist() == [100.0, 100.0, 101.0]
    assert json.loads(table["meta"][1]) == {"text": 'says "hi",\nand more', "at": "NaN"}
    assert table["meta"][2] == ""


@given(st.lists(st.floats(width=64), min_size=1, max_size=5))
def test_every_bit_of_a_number_comes_back(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[float]
) -> None:
    path = tmp_path_factory.mktemp("csv") / "run.csv"
    frame = norms(0, []).replace(
        layers=["a"] * len(numbers), values=torch.tensor(numbers, dtype=torch.float64)
    )
    written(CSV(path), frame)
    np.testing.assert_array_equal(read(path)["value"].to_numpy(np.float64), np.array(numbers))


def test_a_histogram_is_one_row_a_bin_and_named_components_one_each(tmp_path: Path) -> None:
    counted: list[Frame] = []
    source = sl.Feed()
    source.pipe(sl.histogram("weights", bins=2, range=(0, 1))).subscribe(counted.append)
    source.push(3, weights={"fc": np.array([0.25, 0.75, 0.8, 9.0, math.nan], dtype=np.float32)})
    source.close()
    quantiles = Frame("q", 4, ("a",), (torch.tensor([3, 4]),), components=("5%", "95%"))
    written(CSV(tmp_path / "run.csv"), *counted, quantiles)
    found = rows(tmp_path / "run.csv")
    assert [(layer, component, value) for _, layer, _, component, value in found[:7]] == [
        ("fc", "-inf", 0.0),
        ("fc", "(-inf,0)", 0.0),
        ("fc", "[0,0.5)", 1.0),
        ("fc", "[0.5,1]", 2.0),
        ("fc", "(1,inf)", 1.0),
        ("fc", "inf", 0.0),
        ("fc", "nan", 1.0),
    ]
    assert found[7:] == [("q", "a", 4, "5%", 3.0), ("q", "a", 4, "95%", 4.0)]


def test_truth_values_are_numbers_and_complex_ones_two(tmp_path: Path) -> None:
    frames = [
        Frame("b", 0, ("x",), torch.tensor([True])),
        Frame("c", 0, ("x",), torch.tensor([1 - 2j])),
        Frame("d", 0, ("x",), torch.tensor([[3j]]), components=("e",)),
        Frame("h", 0, ("x",), torch.tensor([0.1], dtype=torch.bfloat16)),
    ]
    written(CSV(tmp_path / "run.csv"), *frames)
    assert [
        (topic, component, float(value)) for topic, _, _, component, value in rows(tmp_path / "run.csv")
    ] == [
        ("b", "", 1.0),
        ("c", "real", 1.0),
        ("c", "imag", -2.0),
        ("d", "e.real", 0.0),
        ("d", "e.imag", 3.0),
        ("h", "", 0.10009765625),
    ]


def test_a_sentence_about_tensors_is_a_row_without_a_value(tmp_path: Path) -> None:
    written(CSV(tmp_path / "run.csv"), Frame("t", 0, ("a",), (torch.ones(2, 2),), meta={"text": "look"}))
    (row,) = read(tmp_path / "run.csv").to_dict("records")
    assert (row["value"], json.loads(row["meta"])) == ("", {"text": "look"})


def test_a_chain_of_tensors_is_refused_when_it_is_subscribed(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    lens = sl.observe(model)
    refused = r"shows scalar and text values, and the chain .*'weights'.* yields the run's own tensors: red"
    with pytest.raises(StreamlensError, match=refused):
        lens.pipe(sl.topic("weights")).subscribe(CSV(tmp_path / "run.csv"))
    with pytest.raises(StreamlensError, match=refused):
        lens.pipe(sl.topic("weights"), sl.every(2)).subscribe(CSV(tmp_path / "run.csv"))
    lens.pipe(sl.histogram("weights")).subscribe(CSV(tmp_path / "run.csv"))
    lens.close()


def test_tensors_that_nobody_could_foresee_are_left_out_and_reported(tmp_path: Path) -> None:
    chain = Connected(CSV(tmp_path / "run.csv"))
    chain.send(norms(0, [1.0]), Frame("w", 0, ("a",), (torch.ones(2, 2),)), norms(1, [2.0]))
    assert chain.close()
    assert [row[4] for row in rows(tmp_path / "run.csv")] == [1.0, 2.0]
    (report,) = chain.reports
    assert "CSV shows scalar and text values, and 'w' holds vector values: reduce them first" in report


def test_names_of_any_kind_stay_in_their_cells(tmp_path: Path) -> None:
    names = ['a,"b"', "two\nlines", "\u2028", "\ud800", "nan"]
    written(CSV(tmp_path / "run.csv"), Frame("t", 5, names, torch.arange(5.0)))
    assert [row[1:] for row in rows(tmp_path / "run.csv")] == [
        (name.encode(errors="backslashreplace").decode(), 5, "", float(i)) for i, name in enumerate(names)
    ]
    with (tmp_path / "run.csv").open("rb") as file:
        file.readline()
        records = list(CSV._records(file))
    assert [(record.run, record.step) for record in records] == [(RUN.id, 5)] * 5


def test_the_whole_of_a_run_is_there_as_the_lens_gave_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    table = sl.sinks.Table()
    with sl.observe(model) as lens:
        for sink in (table, CSV(tmp_path / "run.csv")):
            lens.pipe(sl.uw_ratio()).subscribe(sink)
        for _ in range(3):
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    got = read(tmp_path / "run.csv").drop(columns=["run", "component", "wall_time", "meta"])
    pd.testing.assert_frame_equal(got, table.dataframe, check_dtype=False, check_like=True)
