"""`TensorBoard`: frames as TensorBoard's scalars, histograms and texts."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from streamlens.errors import missing_package
from streamlens.frame import Frame
from streamlens.reductions import bin_edges
from streamlens.sink import RunInfo, Sink, ValueKind
from streamlens.sinks._append_file import say_removed
from streamlens.sinks._histograms import Histogram, histogram_of
from streamlens.sinks._names import ANY_TEXT
from streamlens.sinks._run_file import has_gone_back, must_go_back
from streamlens.sinks._values import host_values, stacked_values

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from streamlens.sinks._event_file import EventFile

__all__ = ["TensorBoard"]

_TEMPLATES: Final = 512
"""How many event templates are kept; fewer sets of layers are alive at a time."""


class TensorBoard(Sink):
    """Writes TensorBoard event files: one event a frame, holding all its layers.

    - A number a layer is a scalar under `topic/layer`; the model's own under `topic`. Named
      components are scalars under `topic/layer/component`, the model's own under `topic/_/component`.
      NaN and infinities are written as such.
    - Counts in bins (the operator `histogram`) are a histogram with these bins; what lies beyond their
      range is drawn as one more bin, as wide as its neighbour. Elements that are not finite are a
      number under `topic/layer/non_finite`, where there are some.
    - Any other tensor is a histogram of its elements: 64 bins of equal width from the least to the
      greatest finite value (one bin where these are equal). Where there are NaN or infinite
      elements, their number is a scalar under `topic/layer/non_finite`.
    - The sentence that a frame carries as `meta["text"]` is a text under `topic/_/text`.

    A slash within a name is a colon: the topic `G/loss` of a named model is `G:loss`. The step is the
    frame's step, for every micro-step of it; the wall time is when the frame was emitted. A run that goes on
    after a resume hides what an earlier attempt wrote for later steps.

    Args:
        logdir: The folder of the event file, made when the first frame is written. A file that
            cannot be written is reported, and training goes on.
        flush_secs: How many seconds a frame may take to reach the file.

    Raises:
        ImportError: The `tensorboard` package is missing.
        ValueError: `flush_secs` is not positive.

    Example:
        >>> lens.pipe(uw_ratio(), ema(0.9)).subscribe(TensorBoard("runs/first"))  # doctest: +SKIP
    """

    kinds: ClassVar[frozenset[ValueKind]] = frozenset({"scalar", "vector", "text"})

    def __init__(self, logdir: str | os.PathLike[str], *, flush_secs: float = 1.0) -> None:
        if not flush_secs > 0:
            raise ValueError(f"TensorBoard(flush_secs=) is a number of seconds above 0; got {flush_secs!r}")
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.plugins.text import metadata as text_metadata
        except ImportError as error:
            raise missing_package("TensorBoard", "tensorboard", "tensorboard") from error
        self.logdir = Path(logdir)
        self.max_latency = flush_secs
        self._protos: Any = event_pb2
        self._histogram: Any = summary_pb2.HistogramProto
        self._text_metadata = text_metadata.create_summary_metadata(display_name=None, description=None)
        self._templates: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}
        self._run: RunInfo | None = None
        self._file: EventFile | None = None

    def open(self, run: RunInfo) -> None:
        """Begin a new event file.

        Raises:
            OSError: It cannot be written.
        """
        from streamlens.sinks._event_file import EventFile

        self._run = run
        try:
            self._file = EventFile(self.logdir)
        except OSError as error:
            raise OSError(
                f"TensorBoard cannot write to {str(self.logdir)!r}: {error.strerror or error}; "
                "pass a folder that can be written"
            ) from error
        now = time.time()
        first = [self._protos.Event(wall_time=now, file_version="brain.Event:2")]
        folder = self.logdir.resolve()
        goes_back = must_go_back(folder, run)
        if goes_back and run.resumed_at is not None:
            # TensorBoard then drops what other files of the folder hold from this step on: once a
            # resumption, or what this attempt has written itself would go as well.
            start = self._protos.SessionLog(status=self._protos.SessionLog.START)
            first.append(self._protos.Event(wall_time=now, step=run.resumed_at + 1, session_log=start))
        self._file.append(event.SerializeToString() for event in first)
        if goes_back:
            has_gone_back(folder, run)

    def write(self, frames: Sequence[Frame]) -> None:
        """Append one event a frame.

        Raises:
            OSError: They could not be written; the file is as before then.
        """
        assert self._run is not None, "a sink is opened before it is written"
        if self._file is not None and self._file.removed:
            say_removed(self._file.path)
            self._shut()
        if self._file is None:
            self.open(self._run)
        assert self._file is not None
        times = self.wall_times(frames)
        self._file.append([self._event(f, at) for f, at in zip(frames, times, strict=True)])

    def close(self) -> None:
        """Close the event file."""
        self._run = None
        self._shut()
        self._templates.clear()

    def _shut(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _event(self, frame: Frame, wall_time: float) -> bytes:
        text = frame.meta.get("text")
        if text is None and frame.stacked:
            array = stacked_values(frame)
            if array.ndim == 1 or (
                array.ndim == 2
                and array.shape[1] == len(frame.components)
                and bin_edges(frame.components) is None
            ):
                return self._scalar_event(frame, array, wall_time)
        event = self._protos.Event(wall_time=wall_time, step=frame.step)
        for layer, value in host_values(frame):
            self._add(event.summary, frame, layer, value)
        if text is not None:
            entry = event.summary.value.add(
                tag=ANY_TEXT.join(frame.topic, "", "text"), metadata=self._text_metadata
            )
            entry.tensor.dtype = 7  # DT_STRING
            entry.tensor.tensor_shape.dim.add(size=1)
            entry.tensor.string_val.append(str(text).encode())
        return bytes(event.SerializeToString())

    def _scalar_event(self, frame: Frame, array: NDArray[Any], wall_time: float) -> bytes:
        """An event of scalars only: its tags are made once, not once a frame."""
        key = (frame.topic, frame.layers, frame.components if array.ndim == 2 else ())
        template = self._templates.get(key)
        if template is None:
            if len(self._templates) >= _TEMPLATES:
                self._templates.clear()
            event = self._protos.Event()
            names: Sequence[str] = key[2] or ("",)
            for layer in frame.layers:
                for name in names:
                    event.summary.value.add(tag=ANY_TEXT.join(frame.topic, layer, name))
            template = self._templates[key] = (event, list(event.summary.value))
        event, entries = template
        event.wall_time, event.step = wall_time, frame.step
        for entry, number in zip(entries, array.ravel().tolist(), strict=True):
            entry.simple_value = number
        return bytes(event.SerializeToString())

    def _add(self, summary: Any, frame: Frame, layer: str, value: NDArray[Any]) -> None:
        tag = ANY_TEXT.join(frame.topic, layer)
        if value.ndim == 0:
            summary.value.add(tag=tag, simple_value=float(value))
        elif value.shape == (len(frame.components),) and bin_edges(frame.components) is None:
            for name, number in zip(frame.components, value.tolist(), strict=True):
                summary.value.add(tag=ANY_TEXT.join(frame.topic, layer, name), simple_value=number)
        else:
            bins, missing = histogram_of(value, frame.components)
            if bins is not None:
                summary.value.add(tag=tag, histo=self._histogram_proto(bins))
            if missing > 0:
                summary.value.add(tag=ANY_TEXT.join(frame.topic, layer, "non_finite"), simple_value=missing)

    def _histogram_proto(self, bins: Histogram) -> Any:
        return self._histogram(
            min=bins.edges[0],
            max=bins.edges[-1],
            num=bins.counts.sum(),
            sum=bins.total,
            sum_squares=bins.squares,
            bucket_limit=bins.edges[1:].tolist(),
            bucket=bins.counts.tolist(),
        )
