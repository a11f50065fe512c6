"""Recorded runs as the command line shows them: found by name, compared, exported."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

from streamlens.errors import RunStoreError, UnknownTopicError, did_you_mean
from streamlens.frame import Frame
from streamlens.runs import Run, RunRecord, list_runs, read_run
from streamlens.runs.catalogue import run_stores
from streamlens.runs.stepwise import Stored, stepwise
from streamlens.sink import RunInfo, Sink, refusal
from streamlens.sinks import load

__all__ = ["Exported", "Recorded", "differences", "export_run", "find", "found_in", "outcomes"]

_BATCH: Final = 1000
_ABSENT: Final = "-"


@dataclass(frozen=True)
class Recorded:
    """A run in some file.

    Attributes:
        record: What its store says about it.
        last_step: The last step of which anything is stored.
    """

    record: RunRecord
    last_step: int | None

    @property
    def short(self) -> str:
        """The beginning of the id."""
        return self.record.short

    @property
    def title(self) -> str:
        """What people call it: its name, else its folder, else the beginning of its id."""
        return self.record.title


def found_in(path: Path) -> tuple[list[Recorded], list[RunStoreError]]:
    """The runs of all run stores in a folder, or of one file, and what is wrong with broken files.

    Raises:
        RunStoreError: `path` is a file that is no run store, or there is nothing.
    """
    if not path.is_dir():
        return _recorded(path), []
    found: list[Recorded] = []
    broken: list[RunStoreError] = []
    for file in run_stores(path):
        try:
            found += _recorded(file)
        except RunStoreError as error:
            broken.append(error)
    return found, broken


def _recorded(file: Path) -> list[Recorded]:
    entries: list[Recorded] = []
    for record in list_runs(file):
        with read_run(file, record.id) as run:
            entries.append(Recorded(record, None if run.steps is None else run.steps[1]))
    return entries


def find(name: str, folder: Path) -> Recorded:
    """The run that somebody means.

    Args:
        name: Its id or the beginning of it, its name, its folder's name, or the path of its run
            store or of the folder of it: then the run written last.
        folder: Where to look for all but a path.

    Raises:
        RunStoreError: None is called that, or several.
    """
    place = Path(name)
    candidates = [place, place / "run.db"]
    for file in candidates:
        if file.is_file():
            with read_run(file) as run:
                return next(entry for entry in _recorded(file) if entry.record.id == run.id)
    known = found_in(folder)[0] if folder.exists() else []
    for matches in (_same_id, _same_title, _begins):
        found = [entry for entry in known if matches(entry, name)]
        if len(found) == 1:
            return found[0]
        if found:
            which = ", ".join(f"{entry.short} ({entry.record.path})" for entry in found)
            raise RunStoreError(f"several runs in {folder} are called {name!r}: {which}; give more of the id")
    names = [entry.title for entry in known]
    hint = did_you_mean(name, names)
    listed = ", ".join(f"{entry.title} ({entry.short})" for entry in known[:12]) or "none"
    raise RunStoreError(
        f"no run {name!r} in {folder}{': ' + hint if hint else '.'} Runs: {listed}"
        f"{', ...' if len(known) > 12 else ''}; --in looks elsewhere"
    )


def _same_id(entry: Recorded, name: str) -> bool:
    return entry.record.id == name


def _same_title(entry: Recorded, name: str) -> bool:
    return name in (entry.record.name, entry.title, entry.record.path.parent.name)


def _begins(entry: Recorded, name: str) -> bool:
    return bool(name) and entry.record.id.startswith(name)


def differences(entries: Sequence[Recorded]) -> dict[str, list[str]]:
    """The settings in which runs differ, and where they came from; of one run all of them."""
    told = [dict(_flat(_settings(entry.record))) for entry in entries]
    rows: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for settings in told for key in settings):
        cells = [settings.get(key, _ABSENT) for settings in told]
        if len(entries) == 1 or len(set(cells)) > 1:
            rows[key] = cells
    return rows


def _settings(record: RunRecord) -> dict[str, Any]:
    began = datetime.datetime.fromtimestamp(record.started).isoformat(" ", "seconds")
    return {"id": record.id, "began": began, **record.metadata, **record.origin}


def _flat(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", f"{value:.6g}" if isinstance(value, float) else str(value)


def outcomes(entries: Sequence[Recorded]) -> dict[str, list[str]]:
    """What became of each topic of numbers: its last value, the lowest and the highest."""
    told: list[dict[str, str]] = []
    for entry in entries:
        with read_run(entry.record.path, entry.record.id) as run:
            told.append({topic: _outcome(run, topic) for topic in run.topics if run.rolls(topic)})
    topics = dict.fromkeys(topic for outcome in told for topic in outcome)
    return {topic: [outcome.get(topic, _ABSENT) for outcome in told] for topic in topics}


def _outcome(run: Run, topic: str) -> str:
    whole = run.envelope(topic, max_points=1)
    span = run.steps_of(topic)
    if whole.empty:
        return _ABSENT
    last = run.envelope(topic, steps=span[1])["mean"].median()
    low, high = whole["min"].min(), whole["max"].max()
    return f"{_number(last)} ({_number(low)} to {_number(high)})"


def _number(value: float) -> str:
    return "NaN" if math.isnan(value) else f"{value:.4g}"


# -- export --------------------------------------------------------------------------------------


@dataclass
class Exported:
    """What an export has done.

    Attributes:
        target: The file or folder that was made.
        written: How many frames were written.
        topics: The topics they are of.
        refused: Topics that the format cannot show, and why.
    """

    target: Path
    written: int = 0
    topics: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)


def export_run(run: Run, to: str, out: Path | None = None, topics: Iterable[str] | None = None) -> Exported:
    """Write a recorded run by the sink of a format.

    Args:
        run: The run.
        to: `"csv"`, `"parquet"` or `"tensorboard"`.
        out: The file or folder to make; beside the run store by default.
        topics: Which topics; by default all.

    Raises:
        RunStoreError: The store is damaged, or what should be made is there already.
        UnknownTopicError: The run has no such topic.
        ImportError: The format's package is missing.
    """
    name, ending = _FORMATS[to]
    target = out or run.path.with_name(f"{run.path.stem}{ending}")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise RunStoreError(f"{target} is there already: remove it, or choose another place with --out")
    wanted = list(run.topics if topics is None else topics)
    for topic in wanted:
        if topic not in run.topics:
            hint, known = did_you_mean(topic, run.topics), ", ".join(run.topics)
            raise UnknownTopicError(
                f"no topic {topic!r} in {run.path}: {hint}{' ' if hint else ''}Topics: {known}"
            )
    sink: Sink = load(name)(target)
    done = Exported(target)
    sink.open(RunInfo(id=run.id, name=run.name, metadata=run.metadata))
    try:
        frames = stepwise(run, wanted)
        while batch := list(islice(frames, _BATCH)):
            _write(sink, batch, done)
        sink.flush()
    finally:
        sink.close()
    return done


_FORMATS: Final[Mapping[str, tuple[str, str]]] = {
    "csv": ("CSV", ".csv"),
    "parquet": ("Parquet", ".parquet"),
    "tensorboard": ("TensorBoard", "-tensorboard"),
}
"""The sink of each format, and how what it makes is called after the run store."""


def _write(sink: Sink, batch: Sequence[Stored], done: Exported) -> None:
    frames: list[Frame] = []
    times: list[float] = []
    for frame, wall_time in batch:
        error = refusal(frame, sink)
        if error is None:
            frames.append(frame)
            times.append(wall_time)
        else:
            done.refused.setdefault(frame.topic, str(error))
    sink.received = times
    sink.write(frames)
    done.written += len(frames)
    done.topics.update(frame.topic for frame in frames)
