"""JSON lines: strict JSON, a frame a line, with every kind of value."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamlens.frame import Frame, Kind
from streamlens.sinks._json import dumps, plain
from streamlens.sinks.json_lines import JSONLines
from tests.helpers.sinks import norms, written


def strict(text: str) -> Any:
    """JSON of RFC 8259: without the names that Python's reader knows beyond it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def lines(path: Path) -> list[dict[str, Any]]:
    return [strict(line) for line in path.read_text().split("\n")[:-1]]


def test_a_frame_is_a_line_with_all_its_layers(tmp_path: Path) -> None:
    frame = norms(7, [0.5, 2.0], epoch=3, micro_step=1, kind=Kind.MICRO_STEP, meta={"text": "two\nlines ☹"})
    loss = Frame("loss", 8, ("",), torch.tensor([[1.5, 2.5]]), components=("a", "b"))
    written(JSONLines(tmp_path / "deep" / "run.jsonl"), frame, loss)
    assert lines(tmp_path / "deep" / "run.jsonl") == [
        {
            "run": "f00d",
            "topic": "norm",
            "step": 7,
            "epoch": 3,
            "micro_step": 1,
            "kind": "micro_step",
            "wall_time": 100.0,
            "values": {"layer0": 0.5, "layer1": 2.0},
            "meta": {"text": "two\nlines ☹"},
        },
        {
            "run": "f00d",
            "topic": "loss",
            "step": 8,
            "epoch": 0,
            "micro_step": 0,
            "kind": "step",
            "wall_time": 101.0,
            "components": ["a", "b"],
            "values": {"": [1.5, 2.5]},
        },
    ]


def test_pandas_reads_the_lines(tmp_path: Path) -> None:
    written(JSONLines(tmp_path / "run.jsonl"), *(norms(step, [1.0 * step, 9.0]) for step in range(3)))
    table = pd.read_json(tmp_path / "run.jsonl", lines=True)
    assert table["step"].tolist() == [0, 1, 2]
    assert pd.json_normalize(table["values"].tolist())["layer0"].tolist() == [0.0, 1.0, 2.0]


@given(st.lists(st.floats(width=32), min_size=1, max_size=5))
def test_numbers_and_tensors_of_any_shape_come_back_exactly(numbers: list[float]) -> None:
    array = np.array(numbers)
    assert np.array_equal(
        np.array(strict(dumps(plain(torch.tensor([numbers, numbers])))), dtype=float),
        [array, array],
        equal_nan=True,
    )
    got = strict(dumps(plain(dict(enumerate(numbers)))))
    assert np.array_equal([float(entry) for entry in got.values()], array, equal_nan=True)


def test_numbers_that_json_lacks_are_texts(tmp_path: Path) -> None:
    values = (
        torch.tensor([math.nan, math.inf, -math.inf]),
        torch.tensor(2**60),
        torch.tensor([True, False]),
        torch.tensor([1 - 2j]),
        torch.eye(2).to_sparse(),
        torch.tensor(math.nan, dtype=torch.bfloat16),
    )
    written(JSONLines(tmp_path / "run.jsonl"), Frame("w", 0, tuple("abcdef"), values))
    (line,) = lines(tmp_path / "run.jsonl")
    assert line["values"] == {
        "a": ["NaN", "Infinity", "-Infinity"],
        "b": 2**60,
        "c": [True, False],
        "d": [[1.0, -2.0]],
        "e": [[1.0, 0.0], [0.0, 1.0]],
        "f": "NaN",
    }


def test_whatever_goes_with_a_frame_becomes_json() -> None:
    given_meta = {
        "tensor": torch.tensor([1.0, math.nan]),
        "numpy": np.float32(math.inf),
        "whole": np.int64(3),
        "tuple": (1, None, True, "a", math.nan),
        "nested": {1: {2.5}},
        "complex": complex(1, math.inf),
        "path": Path("a/b"),
    }
    assert strict(dumps(plain(given_meta))) == {
        "tensor": [1.0, "NaN"],
        "numpy": "Infinity",
        "whole": 3,
        "tuple": [1, None, True, "a", "NaN"],
        "nested": {"1": [2.5]},
        "complex": [1.0, "Infinity"],
        "path": str(Path("a/b")),
    }
