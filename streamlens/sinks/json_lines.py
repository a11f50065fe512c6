"""`JSONLines`: one line of JSON a frame."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO

from streamlens.frame import Frame
from streamlens.sinks._json import dumps, frame_object
from streamlens.sinks._line_sink import LineSink
from streamlens.sinks._run_file import Record

__all__ = ["JSONLines"]


class JSONLines(LineSink):
    """Writes one line of JSON a frame, with all its layers: what `jq`, DuckDB and log shippers read.

    Members: `run` (its id), `topic`, `step`, `epoch`, `micro_step`, `kind`, `wall_time` (seconds
    since 1970), `values` (a member a layer; `""` is the model itself) and, where the frame has them,
    `components` and `meta`. Every kind of value is shown: a number as such, with all its digits, a
    histogram or tensor as lists. The JSON is strict, so NaN and infinities are the texts `NaN`,
    `Infinity` and `-Infinity`, which Python's `float` reads; complex numbers are pairs.

    Lines are written at least every second, unbuffered; they survive the death of the process, and a
    full disk leaves no half line. A fresh run begins a new file: if there is one of that name, it
    stays as it is, and the next free name with a number (`run-2.jsonl`) is taken, with a log line. A
    resumed run goes on with its own file, of which what lies beyond the step of its snapshot is
    dropped first.

    Args:
        path: The file; it and its folder are made if need be.

    Attributes:
        path: The file that is written.

    Example:
        >>> lens.pipe(uw_ratio()).subscribe(JSONLines("runs/first/run.jsonl"))  # doctest: +SKIP
    """

    def _lines(self, frame: Frame, wall_time: float) -> str:
        return dumps({"run": self._run, **frame_object(frame, wall_time)}) + "\n"

    @staticmethod
    def _records(file: BinaryIO) -> Iterator[Record]:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                found = json.loads(line)
                record = Record(line, found["run"], int(found["step"]))
            except (ValueError, LookupError, TypeError):
                continue
            yield record
