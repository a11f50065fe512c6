"""What a run of the command line watches, and the folder it leaves."""

from __future__ import annotations

import datetime
import itertools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from reactivex import Observable
from reactivex.operators import share

import streamlens as sl
from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.lab.metrics import Metric
from streamlens.sink import Sink

__all__ = ["Recording", "chains", "default_folder"]


def chains(
    lens: sl.Lens,
    *,
    ratio: bool = False,
    norm: bool = False,
    variance: bool = False,
    histogram: bool = False,
    spectral_norm: bool = False,
    health: bool = False,
    metrics: Sequence[Metric] = (),
    emitted: Iterable[str] = (),
    subsample: int = 1,
    depth: int = -1,
    epoch: int = 1,
) -> list[Observable[Frame]]:
    """The streams a run is recorded as.

    The loss, its moving average, the learning rates and the epochs are always among them.

    Args:
        lens: The run.
        ratio: The update-to-weight ratio of each layer.
        norm: The 2-norms of each layer's weights and of their gradients.
        variance: The variances of the same.
        histogram: Histograms of the same.
        spectral_norm: The spectral norm of each layer's weights.
        health: The alerts of the default rules.
        metrics: Further ones; one that is there already is not recorded twice.
        emitted: Topics that the trainer emits, such as `"test_accuracy"`; never subsampled.
        subsample: Watch the steps divisible by this number.
        depth: Which layers to watch: -1 the leaves, 0 the model, d the modules at depth d.
        epoch: The steps of an epoch; metrics that evaluate the model are due as often.

    Returns:
        Streams, to be subscribed to sinks.

    Raises:
        LayerNotFoundError: There is nothing at that depth.
        ValueError: A number is out of its range, or a metric cannot be had of this run.
    """
    due = lens.pipe(sl.every(subsample))
    watched = due.pipe(sl.layers(depth=depth))
    loss = due.pipe(sl.topic("loss"))
    streams = [loss, loss.pipe(sl.ema(0.9)), watched.pipe(sl.topic("learning_rate"))]
    if ratio:
        streams.append(watched.pipe(sl.uw_ratio()))
    for wanted, reduction in ((norm, sl.norm), (variance, sl.var), (histogram, sl.histogram)):
        if wanted:
            streams += [watched.pipe(reduction(topic)) for topic in ("weights", "weight_gradients")]
    if spectral_norm:
        streams.append(watched.pipe(sl.spectral_norm("weights"), share()))
    if health:
        streams.append(lens.pipe(sl.health(), share()))
    streams += [lens.pipe(sl.topic(name)) for name in ("epoch_finished", *emitted)]
    streams += [metric.of(lens, watched, epoch) for metric in metrics]
    return list({_plan(stream): stream for stream in streams}.values())


def _plan(stream: Observable[Frame]) -> object:
    """What a stream computes; equal for equal streams of ours."""
    return stream.plan_text if isinstance(stream, sl.Stream) else stream


def default_folder(model: str, dataset: str, root: Path = Path("runs")) -> Path:
    """A folder below `root` that does not exist yet, named after the time, the model and the data."""
    name = f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}-{model}-{dataset}"
    return _unused(root / name)


class Recording:
    """The folder of a run: `run.db`, TensorBoard events and, in the end, `report.html`.

    Whatever of it cannot be written is said through `warn` in one line; the rest is.

    Args:
        folder: Where; made if it does not exist. A further run in the same folder is added to
            `run.db`, gets an events folder of its own, and the report shows it.
        tensorboard: Whether to write events.
        warn: Receives a line for each thing that cannot be done.

    Attributes:
        folder: Where.
        sinks: What to subscribe the run's streams to; empty if nothing can be written.
        events: The folder of the events, or None.
    """

    def __init__(self, folder: Path, *, tensorboard: bool, warn: Callable[[str], None]) -> None:
        self.folder = folder
        self.sinks: list[Sink] = []
        self.events: Path | None = None
        self._warn = warn
        self.writable = self._make_folder()
        if not self.writable:
            return
        self._add(lambda: sl.sinks.RunStore(self.run_db))
        if tensorboard:
            events = self.events = _unused(folder / "tensorboard")
            self._add(lambda: sl.sinks.TensorBoard(events))

    @property
    def run_db(self) -> Path:
        """The run store."""
        return self.folder / "run.db"

    def write_report(self) -> Path | None:
        """Write `report.html` from what the store holds.

        Returns:
            The page, or None if it could not be written.
        """
        from streamlens.views.report import write_report

        if not self.writable:
            return None
        try:
            return write_report(self.run_db, self.folder / "report.html")
        except (OSError, StreamlensError) as error:
            self._warn(f"no report was written: {error}")
            return None

    def _make_folder(self) -> bool:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Permissions say little (root, read-only mounts, quotas): trying says it all.
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            self._warn(f"cannot write to {self.folder}: {error.strerror}; training goes on unrecorded")
            return False
        return True

    def _add(self, make: Callable[[], Sink]) -> None:
        try:
            self.sinks.append(make())
        except (OSError, ImportError, StreamlensError) as error:
            self._warn(f"{error}; training goes on without it")


def _unused(path: Path) -> Path:
    """The path, with a number appended if something is there."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())
