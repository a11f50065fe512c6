"""An operator and a sink that streamlens finds by their entry points."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch

import streamlens as sl
from streamlens.sink import RunInfo, Sink

__all__ = ["CsvFile", "crest_factor"]


def crest_factor(topic: str | None = "weight_gradients") -> sl.Operator:
    """The largest magnitude over the root mean square of each layer, max |x| / rms(x): how heavy its tail is.

    Topic `<topic>.crest_factor`; at least 1, and at most the root of the number of elements. One pass
    for each of the two; NaN gives NaN, as do zeros alone.
    """
    return sl.reduce(_crest_factor, topic, name="crest_factor")


def _crest_factor(x: torch.Tensor) -> torch.Tensor:
    return x.abs().max() / x.square().mean().sqrt()


class CsvFile(Sink):
    """Writes numbers as lines `topic,layer,step,value` of a text file, which is begun anew.

    Args:
        path: The file.
    """

    kinds = frozenset({"scalar"})

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def open(self, run: RunInfo) -> None:
        """Begin the file; a run that goes on appends to it."""
        self._file = self._path.open("w" if run.resumed_at is None else "a", newline="")
        self._lines = csv.writer(self._file)

    def write(self, frames: Sequence[sl.Frame]) -> None:
        """Write a line a layer, and one a component where there are several."""
        self._lines.writerows(
            (row.topic, row.layer, row.step, row.value)
            for frame in frames
            for row in frame.to_pandas().itertuples()
        )

    def flush(self) -> None:
        """Let others read what was written."""
        self._file.flush()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
