"""`WandB`: frames as the history of a Weights & Biases run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final

import numpy as np

from streamlens.errors import SinkError, missing_package
from streamlens.frame import Frame
from streamlens.reductions import bin_edges
from streamlens.sink import RunInfo, Sink, value_kinds
from streamlens.sinks._histograms import histogram_of
from streamlens.sinks._names import NameRule
from streamlens.sinks._values import host_values, number_cells

__all__ = ["WandB"]

_NAMES: Final = NameRule(r"A-Za-z0-9_\-./", first="A-Za-z_")
_STEP: Final = "global_step"
_MOST_BINS: Final = 512


class WandB(Sink):
    """Logs to Weights & Biases: a row of history a step, drawn over the column `global_step`.

    - Numbers are `topic/layer`, or `topic/layer/component`; the model's own are `topic`.
    - Counts in bins and any other tensor are histograms: with the operator's bins, else with 64 of equal
      width. How many elements are not finite is `topic/layer/non_finite`, where there are some.
    - Unsigned bytes of shape (height, width, 1, 3 or 4) are images.
    - The sentence that a frame carries as `meta["text"]` is the text `topic/_/text`.

    Letters, digits and `_ - . /` stay in a name, other characters are written by their codes; a slash
    within a topic or layer is `_x2f_`.

    The sink begins a W&B run of its own beside one that the program may have, with the run's metadata as its
    config. W&B cannot take back what was logged, so each time that a run is resumed is one more W&B run,
    of the same group (the run's id), which begins behind the snapshot's step. It is kept off the
    console and takes no system metrics, unless `settings=` says otherwise.

    Args:
        project: The W&B project.
        run: A W&B run to log to instead, which stays open. Log to it without `step=` elsewhere: rows count
            up W&B's own step.
        **init: Whatever else `wandb.init` takes, such as `mode="offline"`, `dir=`, `entity=`, `tags=`.

    Raises:
        ImportError: The `wandb` package is missing.
        TypeError: Both a run and what is for a new one.

    Attributes:
        run: The W&B run, once it is open.

    Example:
        >>> lens.pipe(uw_ratio(), ema(0.9)).subscribe(WandB("digits"))  # doctest: +SKIP
    """

    def __init__(self, project: str | None = None, *, run: Any = None, **init: Any) -> None:
        try:
            import wandb
        except ImportError as error:
            raise missing_package("WandB", "wandb", "wandb") from error
        if run is not None and (project is not None or init):
            given = ", ".join(["project"] * (project is not None) + list(init))
            raise TypeError(f"WandB(run=...) logs to that run: {given} would be for a new one")
        self._wandb: Any = wandb
        self._init = {"project": project, **init}
        self._given = run
        self.run = run
        self._defined: set[str] = set()

    def open(self, run: RunInfo) -> None:
        """Begin a W&B run.

        Raises:
            wandb.Error: It cannot be begun.
        """
        if self._given is None:
            attempt = run.id
            if run.resumed_at is not None:
                # Two attempts from one snapshot are two W&B runs.
                attempt += f"-from-{run.resumed_at + 1}-{run.resumption[:8]}".rstrip("-")
            quiet = {"console": "off", "silent": True, "x_disable_stats": True}
            settings = self._init.get("settings") or {}
            own = {
                "id": attempt,
                "name": run.name or None,
                "group": run.id,
                "config": {**run.metadata, "resumed_at": run.resumed_at},
                # Beside a run of the program's own. One that was closed here goes on.
                "reinit": "create_new",
                "resume": "allow",
            }
            merged = settings if not isinstance(settings, dict) else {**quiet, **settings}
            self.run = self._wandb.init(**{**own, **self._init, "settings": merged})
        self._defined = set()
        self.run.define_metric(_STEP, hidden=True)

    def write(self, frames: Sequence[Frame]) -> None:
        """Log frames: those of one step that follow each other are one row.

        Raises:
            SinkError: The sink is closed.
        """
        if self.run is None:
            raise SinkError("WandB was given frames while it was closed: call open(run) first")
        for step, group in groupby(frames, key=lambda frame: frame.step):
            row: dict[str, Any] = {}
            for frame in group:
                cells = dict(self._cells(frame))
                if row.keys() & cells:  # a second micro-step
                    self.run.log({_STEP: step, **row})
                    row = {}
                row.update(cells)
            if row:
                self.run.log({_STEP: step, **row})

    def close(self) -> None:
        """End the W&B run, unless it was given; what it still has to send is waited for."""
        if self._given is None and self.run is not None:
            run, self.run = self.run, None
            run.finish()

    def _cells(self, frame: Frame) -> Iterator[tuple[str, Any]]:
        if "text" in frame.meta:
            yield self._name(frame.topic, "", "text"), str(frame.meta["text"])
        if frame.components and bin_edges(frame.components) is not None:
            for layer, counts in host_values(frame):
                yield from self._histogram(frame, layer, counts)
            return
        images = "image" in value_kinds(frame)
        for layer, component, value in number_cells(frame):
            name = self._name(frame.topic, layer, component)
            if not isinstance(value, np.ndarray):
                yield name, value
            elif images:
                yield name, self._wandb.Image(value)
            elif not np.iscomplexobj(value):
                yield from self._histogram(frame, layer, value)

    def _histogram(self, frame: Frame, layer: str, value: Any) -> Iterator[tuple[str, Any]]:
        bins, missing = histogram_of(value, frame.components)
        if bins is not None:
            edges, counts = bins.edges, bins.counts
            while len(counts) > _MOST_BINS:  # more is refused: neighbours are put together
                odd = len(counts) % 2
                counts = np.append(counts, [0.0] * odd).reshape(-1, 2).sum(axis=1)
                edges = np.append(edges[:-1:2], edges[-1])
            yield self._name(frame.topic, layer, ""), self._wandb.Histogram(np_histogram=(counts, edges))
        if missing > 0:
            yield self._name(frame.topic, layer, "non_finite"), missing

    def _name(self, topic: str, layer: str, component: str) -> str:
        if topic not in self._defined:
            self._defined.add(topic)
            name = _NAMES.encode(topic)
            for pattern in (name, f"{name}/*"):
                self.run.define_metric(pattern, step_metric=_STEP)
        return _NAMES.join(topic, layer, component)
