"""`RunStore`: every frame in one embedded file, exactly."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from streamlens.errors import RunStoreError
from streamlens.frame import Frame
from streamlens.runs.origin import origin
from streamlens.runs.writer import RunWriter
from streamlens.sink import RunInfo, Sink
from streamlens.sinks._append_file import say_removed

__all__ = ["RunStore"]


class RunStore(Sink):
    """Stores frames in one SQLite file, which `read_run` reads back, also while it is written.

    Every bit of every value comes back, NaN and infinities included, with types, shapes,
    components, epoch, wall time and meta. What was written is committed at least every second
    and survives the death of the process.

    A fresh run begins a new run in the file, with what `observe(metadata=...)` was given (model and
    hyper-parameters) and the process it came from (command, git commit, machine). A resumed one goes
    on with its own, of which what lies beyond the step of its snapshot is dropped first, also where
    a run goes back to a snapshot in mid-flight. One file has one writer at a time; any number of
    processes may read it meanwhile.

    Cost: one row a frame; 600 float32 values take 2.7 KB, and 1 KB more for the roll-ups by which
    charts of long runs are read (`Run.envelope`); tens of millions of values a second.

    Where the file system cannot share SQLite's write-ahead log, as network file systems cannot, a
    rollback journal is used and a warning logged.

    Whatever keeps the file from being written (a folder without write permission, a full disk, a
    file that is no run store or that another run is writing) is a `RunStoreError`, which is
    reported while training goes on. Later writes try again. Where the file is removed meanwhile, a new one
    is begun.

    Args:
        path: The file; it and its folder are made if need be.

    Example:
        >>> lens.pipe(uw_ratio()).subscribe(RunStore("runs/first/run.db"))
        >>> read_run("runs/first/run.db").dataframe("uw_ratio")
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        # Made absolute at once: the worker may open the file after the program changed its folder.
        self.path = Path(path).absolute()
        self._run: RunInfo | None = None
        self._writer: RunWriter | None = None

    def open(self, run: RunInfo) -> None:
        """Begin the run in the file, or go on with it.

        Raises:
            RunStoreError: The file cannot be used.
        """
        self._run = run
        self._writer = RunWriter(
            self.path,
            run.id,
            name=run.name,
            metadata=run.metadata,
            resumed_at=run.resumed_at,
            resumption=run.resumption,
            origin=origin(),
        )

    def write(self, frames: Sequence[Frame]) -> None:
        """Commit frames, all or none of them.

        Raises:
            RunStoreError: The file cannot be written.
        """
        if self._run is None:
            raise RunStoreError(f"{self!r} was given frames while it was closed: call open(run) first")
        if self._writer is not None and self._writer.removed:
            say_removed(self.path)
            self._shut()
        if self._writer is None:
            self.open(self._run)
        assert self._writer is not None
        self._writer.write(frames, self.wall_times(frames))

    def close(self) -> None:
        """Merge what was written into the one file, and let others write it."""
        self._run = None
        self._shut()

    def _shut(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def __repr__(self) -> str:
        return f"RunStore({str(self.path)!r})"
