"""What a run of the command line watches, and the folder it leaves."""

from __future__ import annotations

import datetime
import itertools
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

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
    """The folder of a run: `run.db`, what it is shown as and, in the end, `report.html`.

    Whatever of it cannot be written is said through `warn` in one line; the rest is.

    Args:
        folder: Where; made if it does not exist. A further run in the same folder is added to
            `run.db`, gets files of its own beside it, and the report shows it.
        show: As what to show the run: any of `"tb"`, `"mpl"`, `"csv"`, `"jsonl"` and `"parquet"`;
            others are left to others.
        warn: Receives a line for each thing that cannot be done.

    Attributes:
        folder: Where.
        sinks: What to subscribe the run's streams to; empty if nothing can be written.
        shown: What the run is shown as, by name, and where.
    """

    def __init__(self, folder: Path, *, show: Collection[str], warn: Callable[[str], None]) -> None:
        self.folder = folder
        self.sinks: list[Sink] = []
        self.shown: dict[str, Path] = {}
        self._warn = warn
        self.writable = self._make_folder()
        if not self.writable:
            return
        self._add(lambda: sl.sinks.RunStore(self.run_db))
        for name in show:
            if name in _SHOWN:
                title, file, make = _SHOWN[name]
                path = _unused(folder / file)
                if self._add(partial(make, path)):
                    self.shown[title] = path

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

    def _add(self, make: Callable[[], Sink]) -> bool:
        try:
            self.sinks.append(make())
        except (OSError, ImportError, StreamlensError) as error:
            self._warn(f"{error}; training goes on without it")
            return False
        return True


def _charts(path: Path) -> Sink:
    return sl.sinks.Matplotlib(path, live=sl.sinks.Matplotlib.can_show())


_SHOWN: Final[dict[str, tuple[str, str, Callable[[Path], Sink]]]] = {
    "tb": ("TensorBoard", "tensorboard", lambda path: sl.sinks.TensorBoard(path)),
    "mpl": ("Charts", "charts.png", _charts),
    "csv": ("CSV", "run.csv", lambda path: sl.sinks.CSV(path)),
    "jsonl": ("JSON lines", "run.jsonl", lambda path: sl.sinks.JSONLines(path)),
    "parquet": ("Parquet", "run.parquet", lambda path: sl.sinks.Parquet(path)),
}
"""By the name on the command line: its title, its file and the sink; imported when it is first made."""


def _unused(path: Path) -> Path:
    """The path, with a number appended if something is there."""
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())
