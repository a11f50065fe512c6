"""The sink's base, and how sinks are found."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from streamlens import sinks
from streamlens.frame import Frame
from streamlens.sink import ALL_KINDS, RunInfo, Sink, ValueKind, value_kinds


class Minimal(Sink):
    """A sink of nothing but `write`, without a constructor."""

    def write(self, frames: Sequence[Frame]) -> None:
        self.got = list(frames)


def test_only_write_must_be_written() -> None:
    sink = Minimal()
    sink.open(RunInfo("id"))
    sink.flush()
    sink.close()
    assert sink.kinds == ALL_KINDS
    with pytest.raises(TypeError, match="abstract method"):
        Sink()  # type: ignore[abstract]


def test_a_sink_that_was_given_nothing_is_drained() -> None:
    assert Minimal().drain(0)


def test_outside_a_delivery_the_wall_time_is_now() -> None:
    before = time.time()
    frame = Frame("loss", 0, ("",), torch.zeros(1))
    (at,) = Minimal().wall_times([frame])
    assert before <= at <= time.time()


@pytest.mark.parametrize(
    ("values", "components", "kinds"),
    [
        (torch.zeros(2), (), ("scalar",)),
        ((torch.zeros(()), torch.zeros(())), (), ("scalar",)),
        (torch.zeros(2, 3), ("a", "b", "c"), ("scalar",)),
        (torch.zeros(2, 3), (), ("vector",)),
        ((torch.zeros(2, 3), torch.zeros(4)), (), ("vector",)),
        ((torch.zeros(2, 3), torch.zeros(())), (), ("vector",)),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), (), ("image", "vector")),
        (torch.zeros(2, 8, 8, 3), (), ("vector",)),
    ],
)
def test_values_are_shown_by_their_shape(
    values: Tensor | tuple[Tensor, ...], components: tuple[str, ...], kinds: tuple[ValueKind, ...]
) -> None:
    frame = Frame("topic", 0, ("a", "b"), values, components=components)
    assert value_kinds(frame) == kinds
    assert value_kinds(frame.replace(meta={"text": "look"})) == ("text", *kinds)


def test_naming_the_sinks_needs_none_of_their_packages() -> None:
    program = (
        "import sys, streamlens.frame; before = set(sys.modules); import streamlens.sinks as sinks;"
        "assert {'Table', 'TensorBoard'} <= set(dir(sinks));"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(new & {'tensorboard', 'google', 'rich', 'pandas', 'altair', 'sqlite3'})"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_every_sink_is_found_by_its_name() -> None:
    for name in sinks.__all__:
        assert issubclass(getattr(sinks, name), Sink)
        assert getattr(sinks, name).__name__ == name


def test_an_unknown_sink_names_the_near_ones() -> None:
    with pytest.raises(AttributeError, match="did you mean 'TensorBoard'"):
        _ = sinks.Tensorboard
