"""`CSV`: tidy rows of numbers in a text file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from functools import lru_cache
from typing import BinaryIO, ClassVar, Final

from streamlens.frame import Frame
from streamlens.sink import ValueKind
from streamlens.sinks._json import dumps, plain
from streamlens.sinks._line_sink import LineSink
from streamlens.sinks._run_file import Record
from streamlens.sinks._values import number_cells

__all__ = ["CSV"]

_COLUMNS: Final = (
    "run",
    "topic",
    "layer",
    "step",
    "epoch",
    "micro_step",
    "component",
    "value",
    "wall_time",
    "meta",
)
_STEP: Final = _COLUMNS.index("step")


class CSV(LineSink):
    """Writes one row a layer and frame, or one a layer and named component.

    Columns: `run` (its id), `topic`, `layer` (empty: the model itself), `step`, `epoch`, `micro_step`,
    `component` (empty where there is none), `value`, `wall_time` (seconds since 1970), `meta` (what goes
    with the frame, such as an alert's sentence, as JSON). Numbers have all their digits; NaN is `nan`,
    infinities `inf` and `-inf`, truth values 1 and 0; complex numbers are two rows, of components `real`
    and `imag`. `pandas.read_csv(path, na_filter=False, dtype={"layer": str})` reads all of it; before
    pandas 3 it takes `float_precision="round_trip"` to read the last bit too.

    A histogram is one row a bin, its edges in `component`. Tensors and images are no numbers: a chain that
    yields them is refused when it is subscribed, as far as is known then, or its frames are left out and
    that is reported.

    Lines are written at least every second, unbuffered; they survive the death of the process, and a
    full disk leaves no half line. A fresh run begins a new file: if there is one of that name, it
    stays as it is, and the next free name with a number (`run-2.csv`) is taken, with a log line. A
    resumed run goes on with its own file, of which what lies beyond the step of its snapshot is
    dropped first.

    Args:
        path: The file; it and its folder are made if need be.

    Attributes:
        path: The file that is written.

    Example:
        >>> lens.pipe(uw_ratio()).subscribe(CSV("runs/first/run.csv"))  # doctest: +SKIP
    """

    kinds: ClassVar[frozenset[ValueKind]] = frozenset({"scalar", "text"})
    header: ClassVar[bytes] = (",".join(_COLUMNS) + "\n").encode()

    def _lines(self, frame: Frame, wall_time: float) -> str:
        head = f"{_name(self._run)},{_name(frame.topic)},"
        middle = f",{frame.step},{frame.epoch},{frame.micro_step},"
        meta = _quoted(dumps(plain(frame.meta))) if frame.meta else ""
        tail = f",{wall_time!r},{meta}\n"
        return "".join(
            f"{head}{_name(layer)}{middle}{_name(component)},{_text(value)}{tail}"
            for layer, component, value in number_cells(frame)
        )

    @staticmethod
    def _records(file: BinaryIO) -> Iterator[Record]:
        lines: list[bytes] = []
        quotes = 0
        for line in file:
            lines.append(line)
            quotes += line.count(b'"')
            # A line's end within quotes is not the row's.
            if quotes % 2 or not line.endswith(b"\n"):
                continue
            record = b"".join(lines)
            lines.clear()
            text = io.StringIO(record.decode(errors="replace"), newline="")
            cells = next(csv.reader(text), [])
            if len(cells) == len(_COLUMNS) and cells[_STEP].lstrip("-").isdecimal():
                yield Record(record, cells[0], int(cells[_STEP]))


def _quoted(text: str) -> str:
    if any(sign in text for sign in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text


_name = lru_cache(maxsize=4096)(_quoted)
"""A topic, layer or component, which come again and again."""


def _text(value: object) -> str:
    """A number; nothing for the tensor that a sentence came with."""
    return repr(value) if isinstance(value, int | float) else ""
