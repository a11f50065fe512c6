"""`Parquet`: tidy rows in Parquet files, readable at any time."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from streamlens.errors import SinkError, missing_package
from streamlens.frame import Frame
from streamlens.runs.lock import try_lock
from streamlens.sink import RunInfo, Sink
from streamlens.sinks._append_file import say_removed
from streamlens.sinks._json import dumps, plain
from streamlens.sinks._run_file import first_claimed, has_gone_back, must_go_back
from streamlens.sinks._values import number_cells

__all__ = ["Parquet"]

_RUN: Final = b"streamlens.run"
"""Under this key a part's metadata names its run."""
_LOCK: Final = ".lock"


class Parquet(Sink):
    """Writes a folder of Parquet files, one row a layer and frame, or one a layer and named component.

    `pandas.read_parquet(path)`, `pyarrow.dataset` and DuckDB (`'path/*.parquet'`) read the folder as one
    table. Columns: `run` (its id), `topic`, `layer` (empty: the model itself), `step`, `epoch`,
    `micro_step`, `component`, `value` (float64), `elements` and `shape` (of a value that is no number: a
    tensor, an image), `wall_time` (seconds since 1970), `meta` (as JSON); what a row lacks is null. A
    histogram is one row a bin, its edges in `component`. NaN and infinities are themselves, truth values 1
    and 0; a complex number is two rows, of components `real` and `imag`, and a tensor of them has a last
    dimension of two.

    A Parquet file can be read only when it is whole. So the newest file of the folder is written anew
    with what has come, at least once a second, beside itself, and then takes its own place; when it has
    `part_rows` rows, the next one begins. The death of the process costs a second; readers always find
    whole files. On a full disk a quarter of a file's rows are held until there is space again; what
    comes beyond that is lost and counted.

    A fresh run begins a new folder: if there is something of that name, it stays as it is, and the next
    free name with a number (`run-2.parquet`) is taken, with a log line. A resumed run goes on in its
    own folder, of which what lies beyond the step of its snapshot is dropped first.

    Args:
        path: The folder; those above it are made if need be.
        part_rows: Rows of a file.

    Attributes:
        path: The folder that is written.

    Raises:
        ImportError: The `pyarrow` package is missing.
        ValueError: `part_rows` is not positive.

    Example:
        >>> lens.pipe(uw_ratio()).subscribe(Parquet("runs/first/run.parquet"))  # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike[str], *, part_rows: int = 1 << 17) -> None:
        if part_rows < 1:
            raise ValueError(f"Parquet(part_rows=) is the rows of a file, at least 1; got {part_rows!r}")
        try:
            import pyarrow as pa
            import pyarrow.compute as pc
            import pyarrow.parquet as pq
        except ImportError as error:
            raise missing_package("Parquet", "pyarrow", "parquet") from error
        self._pa, self._pc, self._pq = pa, pc, pq
        self.path = self._wanted = Path(path).absolute()
        self.part_rows = part_rows
        self._run = ""
        self._lock: BinaryIO | None = None
        self._number = 0
        self._batches: list[Any] = []
        self._rows = 0
        self._unsaved_rows = self._unsaved_frames = 0

    def open(self, run: RunInfo) -> None:
        """Begin a new folder, or go on in the one in which this run has begun.

        Raises:
            OSError: It cannot be written.
        """
        wanted = self._wanted if run.id != self._run else self.path
        self.path, self._lock = first_claimed(wanted, lambda path: self._claim(path, run))
        self._run = run.id
        self._begin_part(1 + max((_number(part) for part in _parts(self.path)), default=-1))
        schema = self._pa.schema(
            [
                ("run", self._pa.string()),
                ("topic", self._pa.string()),
                ("layer", self._pa.string()),
                ("step", self._pa.int64()),
                ("epoch", self._pa.int64()),
                ("micro_step", self._pa.int64()),
                ("component", self._pa.string()),
                ("value", self._pa.float64()),
                ("elements", self._pa.list_(self._pa.float64())),
                ("shape", self._pa.list_(self._pa.int64())),
                ("wall_time", self._pa.float64()),
                ("meta", self._pa.string()),
            ]
        )
        self._schema = schema.with_metadata(
            {_RUN: run.id.encode(), b"streamlens.run_name": run.name.encode()}
        )

    def write(self, frames: Sequence[Frame]) -> None:
        """Take frames for the next file, all or none of them.

        Raises:
            OSError: There are many already that cannot be saved.
            SinkError: The sink is closed.
        """
        if self._lock is None:
            raise SinkError(f"{self!r} was given frames while it was closed: call open(run) first")
        batch = self._batch(frames)
        # Before anything is taken, so that frames which find no room are not taken at all.
        if self._unsaved_rows >= max(1, self.part_rows // 4):
            self._save()
        if self._rows >= self.part_rows:
            self._save()
            self._begin_part(self._number + 1)
        self._batches.append(batch)
        self._rows += batch.num_rows
        self._unsaved_rows += batch.num_rows
        self._unsaved_frames += len(frames)

    def flush(self) -> None:
        """Write the newest file anew, with all that has come.

        Raises:
            OSError: It cannot be written; the rows are held, and the next flush tries again.
        """
        self._save()

    def close(self) -> None:
        """Save what is left, and let others write the folder.

        Raises:
            SinkError: That failed; the frames are lost.
        """
        lock, self._lock = self._lock, None
        if lock is None:
            return
        try:
            self._save()
        except Exception as error:
            raise SinkError(
                f"the last {self._unsaved_frames:,} frames could not be saved: {error}",
                lost=self._unsaved_frames,
            ) from error
        finally:
            self._begin_part(0)
            with contextlib.suppress(OSError):
                (self.path / _LOCK).unlink(missing_ok=True)
            lock.close()

    def __repr__(self) -> str:
        return f"Parquet({str(self.path)!r})"

    # -- rows ----------------------------------------------------------------------------------

    def _batch(self, frames: Sequence[Frame]) -> Any:
        columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        for frame, wall_time in zip(frames, self.wall_times(frames), strict=True):
            before = len(columns["layer"])
            for layer, component, value in number_cells(frame):
                tensor = value if isinstance(value, np.ndarray) else None
                if tensor is not None and np.iscomplexobj(tensor):
                    tensor = np.stack([tensor.real, tensor.imag], axis=-1)
                columns["layer"].append(_text(layer))
                columns["component"].append(_text(component) or None)
                columns["value"].append(None if tensor is not None else float(value))
                columns["elements"].append(None if tensor is None else tensor.astype(np.float64).ravel())
                columns["shape"].append(None if tensor is None else tensor.shape)
            meta = dumps(plain(frame.meta)) if frame.meta else None
            same = {
                "run": self._run,
                "topic": _text(frame.topic),
                "step": frame.step,
                "epoch": frame.epoch,
                "micro_step": frame.micro_step,
                "wall_time": wall_time,
                "meta": meta,
            }
            rows = len(columns["layer"]) - before
            for name, entry in same.items():
                columns[name].extend(itertools.repeat(entry, rows))
        # from_pandas=False: NaN is a number here, and not a value that is missing.
        arrays = [
            self._pa.array(columns[field.name], type=field.type, from_pandas=False) for field in self._schema
        ]
        return self._pa.RecordBatch.from_arrays(arrays, schema=self._schema)

    def _begin_part(self, number: int) -> None:
        self._number = number
        self._batches = []
        self._rows = self._unsaved_rows = self._unsaved_frames = 0

    def _save(self) -> None:
        if self._unsaved_frames:
            self._replace(_part(self.path, self._number), self._pa.Table.from_batches(self._batches))
            self._unsaved_rows = self._unsaved_frames = 0

    def _replace(self, part: Path, table: Any) -> None:
        """Write a file beside its place, then put it there, so that it is whole or as it was."""
        beside = part.with_name(f".{part.name}")
        if not part.parent.is_dir():
            say_removed(part.parent)
            part.parent.mkdir(parents=True)
        try:
            self._pq.write_table(table, beside)
            beside.replace(part)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise

    # -- folders -------------------------------------------------------------------------------

    def _claim(self, path: Path, run: RunInfo) -> BinaryIO | None:
        """The lock on a folder that is new, or this run's and nobody else's; None for any other."""
        try:
            path.mkdir()
            new = True
        except FileExistsError:
            new = False
            if not self._holds(path, run.id):
                return None
        lock = open(path / _LOCK, "a+b")  # noqa: SIM115 - closed by close()
        try:
            if not try_lock(lock.fileno()) and not new:
                lock.close()
                return None
            if run.resumed_at is not None and must_go_back(path, run):
                self._cut(path, run.resumed_at)
                has_gone_back(path, run)
        except BaseException:
            lock.close()
            raise
        return lock

    def _holds(self, path: Path, run_id: str) -> bool:
        parts = _parts(path)
        try:
            metadata = (self._pq.read_schema(parts[0]).metadata if parts else None) or {}
        except (OSError, self._pa.ArrowInvalid):
            return False
        return bool(metadata.get(_RUN) == run_id.encode())

    def _cut(self, path: Path, step: int) -> None:
        """Drop the rows beyond a step."""
        for part in _parts(path):
            table = self._pq.read_table(part)
            kept = table.filter(self._pc.less_equal(table["step"], step))
            if kept.num_rows == 0:
                part.unlink()
            elif kept.num_rows < table.num_rows:
                self._replace(part, kept)


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.parquet"


def _number(part: Path) -> int:
    return int(part.stem.removeprefix("part-"))


def _parts(folder: Path) -> list[Path]:
    """The files of a folder in the order in which they were begun."""
    found = [part for part in folder.glob("part-*.parquet") if part.stem.removeprefix("part-").isdecimal()]
    return sorted(found, key=_number)


def _text(name: str) -> str:
    # Of a name that UTF-8 lacks, what Python would write for it.
    return name.encode(errors="backslashreplace").decode()
