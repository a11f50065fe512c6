"""`SacredSink`: frames as metrics of a Sacred run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from streamlens.errors import SinkError
from streamlens.frame import Frame
from streamlens.sink import RunInfo, Sink, ValueKind
from streamlens.sinks._names import ANY_TEXT
from streamlens.sinks._values import number_cells

__all__ = ["SacredSink"]


class SacredSink(Sink):
    """Logs numbers by `experiment.log_scalar`: to whichever observers the experiment has, such as MongoDB.

    A metric is `topic/layer`, or `topic/layer/component`; its step is the frame's. NaN and infinities are
    themselves, a histogram is a metric a bin. Tensors are no numbers: chains that yield them are refused, or
    left out and reported. Sacred brings metrics to its observers with its heartbeat, every ten seconds and at
    the end of the run. A resumed run is a Sacred run of its own, as Sacred has it.

    Args:
        experiment: A `sacred.Experiment`, or a `sacred.run.Run` of one.

    Raises:
        TypeError: It has no `log_scalar`.

    Example:
        >>> @experiment.main
        ... def main():
        ...     lens.pipe(uw_ratio()).subscribe(SacredSink(experiment))
    """

    kinds: ClassVar[frozenset[ValueKind]] = frozenset({"scalar"})

    def __init__(self, experiment: Any) -> None:
        if not callable(getattr(experiment, "log_scalar", None)):
            raise TypeError(
                f"SacredSink(experiment) takes a sacred.Experiment or a run of one, got "
                f"{type(experiment).__name__}: pip install 'streamlens[sacred]' and pass the experiment"
            )
        self._experiment = experiment
        self._run: Any = None

    def open(self, run: RunInfo) -> None:
        """Find the Sacred run that is under way.

        Raises:
            SinkError: There is none.
        """
        # An experiment forgets its run before the sink has written everything.
        self._run = getattr(self._experiment, "current_run", self._experiment)
        if self._run is None:
            raise SinkError(
                "SacredSink: the experiment is not running: subscribe in its main function or a command",
                retry=False,
            )

    def write(self, frames: Sequence[Frame]) -> None:
        """Hand numbers to Sacred, which keeps them until its next heartbeat."""
        for frame in frames:
            for layer, component, value in number_cells(frame):
                if not isinstance(value, np.ndarray):
                    name = ANY_TEXT.join(frame.topic, layer, component)
                    self._run.log_scalar(name, float(value), int(frame.step))

    def close(self) -> None:
        """Forget the Sacred run."""
        self._run = None
