"""`MLflow`: frames as metrics of an MLflow run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Final

import numpy as np

from streamlens.errors import SinkError, missing_package
from streamlens.frame import Frame
from streamlens.sink import RunInfo, Sink, ValueKind
from streamlens.sinks._names import NameRule
from streamlens.sinks._values import number_cells

__all__ = ["MLflow"]

_log = logging.getLogger("streamlens")

_NAMES: Final = NameRule(r"A-Za-z0-9_\-. :")
_BATCH: Final = 1000
"""The most metrics of one request, as MLflow's servers allow."""
_PARAMS: Final = 100
_LONGEST_NAME: Final = 250
_LONGEST_PARAM: Final = 6000


class MLflow(Sink):
    """Logs numbers as metrics of an MLflow run: `topic/layer`, or `topic/layer/component`.

    The step is the frame's, the time when it was emitted. Characters that MLflow forbids in a name are
    written by their codes (`5%` is `5_x25_`), a slash within one is a colon. What MLflow's store cannot
    hold (NaN in some) it changes by its own rules. A histogram is a metric a bin. The latest sentence of a
    topic of alerts or actions is the run's tag `topic.text`. Tensors are no numbers: chains that yield them
    are refused, or left out and reported; so are names above 250 characters.

    A fresh run is a new MLflow run, with the run's metadata as parameters. A resumed one too, with the tags
    `streamlens.run_id` and `streamlens.resumed_at` and the first as its parent, since MLflow cannot take
    back what was logged beyond the step of the snapshot. It uses a client of its own: a run that the program
    has begun with `mlflow.start_run()` stays as it is, unless it is passed as `run_id=`.

    Args:
        tracking_uri: Where to log; by default where MLflow itself would. Recent versions refuse folders
            (`file:mlruns`) unless `MLFLOW_ALLOW_FILE_STORE=true` is set, and databases (`sqlite:///mlflow.db`)
            need the package `mlflow` where only `mlflow-skinny` is installed.
        experiment: The experiment's name, made if need be.
        run_id: An existing run to log to, which stays open.

    Raises:
        ImportError: MLflow is missing.

    Attributes:
        run_id: The MLflow run that is written, once it is open.

    Example:
        >>> lens.pipe(uw_ratio()).subscribe(MLflow("http://tracking:5000"))  # doctest: +SKIP
    """

    kinds: ClassVar[frozenset[ValueKind]] = frozenset({"scalar", "text"})

    def __init__(
        self,
        tracking_uri: str | os.PathLike[str] | None = None,
        experiment: str = "streamlens",
        *,
        run_id: str | None = None,
    ) -> None:
        try:
            from mlflow import entities
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise missing_package("MLflow", "mlflow", "mlflow") from error
        self._client_of: Any = MlflowClient
        self._entities: Any = entities
        self._uri = None if tracking_uri is None else os.fspath(tracking_uri)
        self._experiment = experiment
        self._given = run_id
        self.run_id = run_id
        self._client: Any = None
        self._of: tuple[str, str] | None = None
        self._done: tuple[Frame, int] | None = None
        self._too_long: set[str] = set()
        self.back_off = 0.25

    def open(self, run: RunInfo) -> None:
        """Begin an MLflow run, or go on with that of this attempt.

        Raises:
            MlflowException: The store cannot be reached.
        """
        self._client = self._client_of(tracking_uri=self._uri)
        attempt = run.id, run.resumption
        if self._given is None and self._of != attempt:
            self.run_id = self._begin(run)
        elif self._given is None:
            self._client.update_run(self.run_id, status="RUNNING")
        self._of = attempt

    def write(self, frames: Sequence[Frame]) -> None:
        """Log frames.

        Raises:
            MlflowException: The store did not take them. Trying again goes on behind what it took.
            SinkError: The sink is closed.
        """
        if self._client is None:
            raise SinkError("MLflow was given frames while it was closed: call open(run) first")
        metrics = list(self._metrics(frames))
        texts = {frame.topic: str(frame.meta["text"]) for frame in frames if "text" in frame.meta}
        tags = [
            self._entities.RunTag(f"{_NAMES.encode(topic)}.text", text[:_LONGEST_PARAM])
            for topic, text in texts.items()
        ]
        done = self._done[1] if self._done is not None and self._done[0] is frames[0] else 0
        for start in range(done, len(metrics), _BATCH):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + _BATCH])
            self._done = frames[0], start + _BATCH
        if tags:
            self._client.log_batch(self.run_id, tags=tags)
        self._done = None

    def close(self) -> None:
        """End the MLflow run, unless it was given."""
        client, self._client = self._client, None
        if client is not None and self._given is None:
            client.set_terminated(self.run_id)

    def _begin(self, run: RunInfo) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = (
            self._client.create_experiment(self._experiment) if found is None else found.experiment_id
        )
        tags = {"streamlens.run_id": run.id}
        if run.resumed_at is not None:
            tags["streamlens.resumed_at"] = str(run.resumed_at)
            earlier = self._client.search_runs(
                [experiment],
                f"tags.`streamlens.run_id` = '{run.id}'",
                order_by=["attributes.start_time ASC"],
                max_results=1,
            )
            if earlier:
                tags["mlflow.parentRunId"] = earlier[0].info.run_id
        begun = self._client.create_run(experiment, tags=tags, run_name=run.name or None)
        params = [
            self._entities.Param(_NAMES.encode(str(key)), str(value)[:_LONGEST_PARAM])
            for key, value in run.metadata.items()
        ]
        for start in range(0, len(params), _PARAMS):
            self._client.log_batch(begun.info.run_id, params=params[start : start + _PARAMS])
        return str(begun.info.run_id)

    def _metrics(self, frames: Sequence[Frame]) -> Iterator[Any]:
        metric = self._entities.Metric
        for frame, at in zip(frames, self.wall_times(frames), strict=True):
            for layer, component, value in number_cells(frame):
                if isinstance(value, np.ndarray):
                    continue
                name = _NAMES.join(frame.topic, layer, component)
                if len(name) > _LONGEST_NAME:
                    self._leave_out(frame.topic, name)
                    continue
                yield metric(name, float(value), int(at * 1000), frame.step)

    def _leave_out(self, topic: str, name: str) -> None:
        if topic not in self._too_long:
            self._too_long.add(topic)
            _log.warning(
                "MLflow allows no name above %d characters: of %r, %r and its like are left out there",
                _LONGEST_NAME,
                topic,
                f"{name[:60]}...",
            )
