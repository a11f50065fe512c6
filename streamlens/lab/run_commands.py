"""`streamlens runs` and `streamlens export`: recorded runs listed, compared, removed, taken elsewhere."""

from __future__ import annotations

import datetime
import enum
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from streamlens.lab._told import FOLDER, Folder, Named, as_usage, console, shown, table_of

__all__ = ["export", "runs"]

runs = typer.Typer(
    help="List, compare and remove recorded runs.", no_args_is_help=True, rich_markup_mode=None
)


class Format(enum.StrEnum):
    """What a run is exported to."""

    CSV = "csv"
    PARQUET = "parquet"
    TENSORBOARD = "tensorboard"


@runs.command("list")
def list_recorded(
    path: Annotated[
        Path, typer.Argument(help="A folder with run stores in it or below it, or one such file.")
    ] = FOLDER,
) -> None:
    """List recorded runs, the one written last at the end."""
    from streamlens.lab.recorded import found_in

    with as_usage():
        found, broken = found_in(path)
    listing = table_of("Run", "Name", "Model", "Began", "Took", "Steps", "File")
    for entry in sorted(found, key=lambda entry: entry.record.written):
        record = entry.record
        began = datetime.datetime.fromtimestamp(record.started).isoformat(" ", "minutes")
        took = str(datetime.timedelta(seconds=round(max(record.written - record.started, 0))))
        model = str(record.metadata.get("model", ""))
        steps = "" if entry.last_step is None else str(entry.last_step + 1)
        listing.add_row(*map(Text, (entry.short, record.name, model, began, took, steps, shown(record.path))))
    if listing.row_count:
        console().print(listing)
    elif not broken:
        typer.echo(f"no run was recorded in {path}")
    for error in broken:
        typer.echo(f"streamlens: {error}", err=True)
    if broken:
        raise typer.Exit(1)


@runs.command()
def compare(names: Named, folder: Folder = FOLDER) -> None:
    """Compare runs: the settings in which they differ, and what became of each topic.

    Of a topic with several layers it is the median over layers; in brackets the lowest and the
    highest value that any layer had.
    """
    from streamlens.lab.recorded import differences, find, outcomes

    with as_usage():
        chosen = [find(name, folder) for name in names]
        sections = [("Settings", differences(chosen)), ("Topics", outcomes(chosen))]
    for title, rows in sections:
        if not rows:
            continue
        listing = table_of(title, *(entry.title for entry in chosen))
        for label, cells in rows.items():
            listing.add_row(*map(Text, (label, *cells)))
        console().print(listing)
        console().print()


@runs.command()
def remove(
    names: Named,
    folder: Folder = FOLDER,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.", show_default="ask")] = False,
) -> None:
    """Remove runs for good; the last run of a file goes with the file."""
    from streamlens.lab.recorded import find
    from streamlens.runs import remove_run

    with as_usage():
        chosen = {entry.record.id: entry for entry in (find(name, folder) for name in names)}
    for entry in chosen.values():
        what = f"{entry.title} ({entry.short}) in {shown(entry.record.path)}"
        if not yes and not typer.confirm(f"Remove {what}?"):
            typer.echo(f"kept {what}")
            continue
        with as_usage():
            remove_run(entry.record.path, entry.record.id)
        typer.echo(f"removed {what}")


def export(
    path: Annotated[Path, typer.Argument(help="A run store, such as runs/first/run.db.", show_default=False)],
    to: Annotated[Format, typer.Option("--to", help="What to export to.", show_default=False)],
    run: Annotated[
        str | None,
        typer.Option("--run", help="The run's id.", show_default="the run written last"),
    ] = None,
    topic: Annotated[
        list[str] | None,
        typer.Option("--topic", help="Export this topic; may be repeated.", show_default="all topics"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The file or folder to make.", show_default="beside the run store"),
    ] = None,
) -> None:
    """Export a recorded run, as its sink would have written it while the run trained."""
    from streamlens.lab.recorded import export_run
    from streamlens.runs import read_run

    with as_usage(), read_run(path, run) as recorded:
        done = export_run(recorded, to.value, out, topic)
    topics = "1 topic" if len(done.topics) == 1 else f"{len(done.topics)} topics"
    typer.echo(f"exported {done.written} frames of {topics} to {shown(done.target)}")
    for refused, reason in done.refused.items():
        typer.echo(f"left out {refused}: {reason}", err=True)
