"""Keeping the frames that a lens delivers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from reactivex import Observable
from torch import Tensor, nn

import streamlens as sl
from streamlens.chain import ErrorReport

Operator = Callable[[Observable[sl.Frame]], Observable[sl.Frame]]


@contextmanager
def observed(model: nn.Module, **options: Any) -> Iterator[sl.Lens]:
    """A lens that lets every failure through, and is closed at the end."""
    lens = sl.observe(model, **{"on_error": "raise", **options})
    try:
        yield lens
    finally:
        lens.close()


def record(lens: sl.Lens, *operators: Operator) -> list[sl.Frame]:
    """A list that fills with clones of what a chain delivers."""
    frames: list[sl.Frame] = []
    lens.pipe(*operators).subscribe(lambda frame: frames.append(frame.clone()))
    return frames


def record_errors(lens: sl.Lens) -> list[ErrorReport]:
    """A list that fills with the failures that were kept away from training."""
    reports: list[ErrorReport] = []
    lens.errors.subscribe(reports.append)
    return reports


def points(frames: Sequence[sl.Frame]) -> list[tuple[int, int]]:
    """(step, micro_step) of each frame."""
    return [(frame.step, frame.micro_step) for frame in frames]


def layer_sets(frames: Sequence[sl.Frame]) -> list[tuple[str, ...]]:
    """The layers of each frame."""
    return [frame.layers for frame in frames]


def numbers(frames: Sequence[sl.Frame]) -> list[float]:
    """The values of frames that hold one number each."""
    return [float(frame.values[0]) for frame in frames]


def assert_steps_equal(
    frames: Sequence[sl.Frame],
    expected: Sequence[Mapping[str, Tensor]],
    *,
    steps: Sequence[int] | None = None,
    rtol: float = 0.0,
) -> None:
    """One frame a step, with exactly the layers expected in that order, and their values.

    Args:
        frames: What was delivered.
        expected: Layer to value, a mapping a step.
        steps: The steps of the frames; 0, 1, 2, ... unless given.
        rtol: Relative tolerance; 0 asks for the same bits.
    """
    assert [frame.step for frame in frames] == list(range(len(expected)) if steps is None else steps)
    for frame, values in zip(frames, expected, strict=True):
        assert frame.layers == tuple(values), f"step {frame.step}"
        for layer, value in values.items():
            where = f"{frame.topic} of {layer!r} at step {frame.step}"
            got = frame[layer]
            assert got.shape == value.shape, where
            if rtol:
                torch.testing.assert_close(
                    got.double(), value.double(), rtol=rtol, atol=1e-12, equal_nan=True, msg=where
                )
            else:
                assert got.dtype == value.dtype, where
                assert torch.equal(got, value), where
