"""`streamlens replay`: metrics and alert rules over recorded runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from streamlens.lab._told import FOLDER, Folder, Named, as_usage, console, shown, table_of
from streamlens.lab.choices import Visualisation, shown_as

if TYPE_CHECKING:
    from reactivex import Observable
    from rich.table import Table

    from streamlens.frame import Frame
    from streamlens.lab.recording import Recording
    from streamlens.sources import Replay

__all__ = ["replay"]


def replay(
    names: Named,
    folder: Folder = FOLDER,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="A metric or rule by name, with arguments: 'topic(uw_ratio) | ema(0.9)' or "
            "'loss_spike(factor=5)'. May be repeated; `streamlens plugins` lists what there is.",
            show_default=False,
        ),
    ] = None,
    health: Annotated[
        bool,
        typer.Option(
            "--health", help="The default rules, as far as the runs serve them.", show_default="off"
        ),
    ] = False,
    lens_name: Annotated[
        str,
        typer.Option(
            "--lens",
            help="Of named lenses, such as those of two models in one store, the one with this name.",
            show_default="everything, as it was stored",
        ),
    ] = "",
    visualisation: Annotated[
        list[Visualisation],
        typer.Option(
            "--visualisation",
            "-v",
            help="As `streamlens train` has it; all but the console need --out. May be repeated.",
        ),
    ] = [Visualisation.NONE],  # noqa: B006 - typer copies it
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for what comes of it, with a run store and a report.", show_default="none"
        ),
    ] = None,
) -> None:
    """Run metrics and alert rules over recorded runs, as they would have run while these trained.

    Prints what rules say, and of each topic that comes of it the last value (of several layers the
    median), and in brackets the lowest and the highest that any layer had.
    """
    from streamlens.lab.recorded import find
    from streamlens.runs import read_run
    from streamlens.sources import replay as lens_of

    show = shown_as(visualisation)
    if out is None and (needs := [name for name in show if name not in ("none", "console")]):
        raise typer.BadParameter(f"{needs[0]!r} leaves a file: say where with --out", param_hint="'-v'")
    if not metric and not health:
        raise typer.BadParameter("say what to run over it, or pass --health", param_hint="'--metric'")
    failures: list[object] = []
    with as_usage():
        found = [find(name, folder).record for name in names]
        runs = [read_run(record.path, record.id) for record in found]
        try:
            lens = lens_of(runs, name=lens_name)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="'--lens'") from None
        lens.errors.subscribe(failures.append)
        with lens:
            streams = _streams(lens, metric or [], health)
            failed = _play(lens, streams, show, out)
    raise typer.Exit(1 if failures or failed else 0)


def _streams(lens: Replay, metrics: Sequence[str], health: bool) -> list[Observable[Frame]]:
    from streamlens.lab.metrics import parse_metric
    from streamlens.operators import health as default_rules

    try:
        streams = [parse_metric(text).of(lens, lens) for text in metrics]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--metric'") from None
    return [*streams, *([lens.pipe(default_rules())] if health else [])]


def _play(lens: Replay, streams: Sequence[Observable[Frame]], show: Sequence[str], out: Path | None) -> bool:
    """Play it, and print what came of it; whether something could not be recorded."""
    import streamlens as sl
    from streamlens.lab.recording import Recording

    warnings: list[str] = []
    recording = None if out is None else Recording(out, show=show, warn=warnings.append)
    sinks = [] if recording is None else list(recording.sinks)
    if "console" in show:
        sinks.append(sl.sinks.Console())
    outcomes: dict[tuple[str, str], _Outcome] = {}
    said: list[Frame] = []

    def note(frame: Frame) -> None:
        if "text" in frame.meta:
            said.append(frame)
            place = f"{frame.source}, " if frame.source else ""
            typer.echo(f"{place}step {frame.step}: {frame.meta['text']}")
        else:
            outcomes.setdefault((frame.source, frame.topic), _Outcome()).add(frame)

    ends: list[Any] = [note, *sinks]
    for place, stream in enumerate(streams):
        for end in ends:
            # Named, since chains with operators of reactivex cannot be told apart by their plan.
            if isinstance(stream, sl.Stream):
                stream.subscribe(end, name=f"{place} in {type(end).__name__}")
            else:
                stream.subscribe(end)
    notes = {note: None for chain in lens.source.chains for cell in chain.cells for note in cell.notes}
    for line in notes:
        what = line.partition(": the run")[0].replace("this lens cannot give", "was not stored")
        typer.echo(what, err=True)
    if not lens.play():
        warnings.append("not everything was written: a sink failed")
    if not said and not outcomes:
        typer.echo("nothing came of it: no alert, and no number")
    if outcomes:
        console().print(_listing(outcomes))
    if recording is not None and recording.run_db.exists():
        _tell_what_is_left(recording, page="altair" in show)
    for line in warnings:
        typer.echo(f"warning: {line}", err=True)
    return bool(warnings)


def _tell_what_is_left(recording: Recording, *, page: bool) -> None:
    typer.echo(f"Run store: {shown(recording.run_db)}")
    if page:
        typer.echo(f"Live page: streamlens ui {shown(recording.folder)}")
    report = recording.write_report()
    if report is not None:
        typer.echo(f"Report: {shown(report)}")


def _listing(outcomes: Mapping[tuple[str, str], _Outcome]) -> Table:
    several = any(source for source, _ in outcomes)
    listing = table_of(*(["Run"] if several else []), "Topic", "Frames", "Last (lowest to highest)")
    for (source, topic), outcome in outcomes.items():
        cells = [source] if several else []
        listing.add_row(*map(Text, (*cells, topic, str(outcome.frames), str(outcome))))
    return listing


@dataclass
class _Outcome:
    """What became of a topic."""

    frames: int = 0
    last: float = math.nan
    low: float = math.nan
    high: float = math.nan

    def add(self, frame: Frame) -> None:
        import numpy as np

        self.frames += 1
        values = np.concatenate([value.double().numpy().ravel() for _, value in frame.items()])
        if not np.isnan(values).all():
            self.last = float(np.nanmedian(values))
            self.low = float(np.fmin(self.low, np.nanmin(values)))
            self.high = float(np.fmax(self.high, np.nanmax(values)))
        else:
            self.last = math.nan

    def __str__(self) -> str:
        return f"{self.last:.4g} ({self.low:.4g} to {self.high:.4g})".replace("nan", "NaN")
