"""`streamlens report`: a recorded run as one page or picture."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from streamlens.lab._told import FOLDER, Folder, OwnCharts, as_usage, shown

__all__ = ["report"]


class Format(enum.StrEnum):
    """What a report is written as."""

    HTML = "html"
    PNG = "png"
    SVG = "svg"


def report(
    name: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A run's id or the beginning of it, its name, its folder, or its run store.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The file to make.", show_default="report.html beside the run store"),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option("--run", help="The id of a run of that store.", show_default="the run written last"),
    ] = None,
    format_: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="A page to open in any browser, or the charts alone as a picture (needs the export extra).",
            show_default="as --out ends, else html",
        ),
    ] = None,
    dark: Annotated[
        bool, typer.Option("--dark", help="A picture for a dark background.", show_default="off")
    ] = False,
    views: OwnCharts = None,
    folder: Folder = FOLDER,
) -> None:
    """Write a report of a recorded run, also of one that is still being written: one file, no network."""
    from streamlens.lab.recorded import find
    from streamlens.runs import read_run
    from streamlens.views.own import charts_of
    from streamlens.views.picture import write_picture
    from streamlens.views.report import write_report

    form = _form(format_, out)
    try:
        own = {title: chart for place in views or [] for title, chart in charts_of(place).items()}
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--views'") from None
    with as_usage():
        record = find(name, folder).record
        stem = "report" if record.path.stem == "run" else record.path.stem
        target = out or record.path.with_name(f"{stem}.{form}")
        with read_run(record.path, run or record.id) as recorded:
            if form is Format.HTML:
                write_report(recorded, target, views=own)
            else:
                write_picture(recorded, target, mode="dark" if dark else "light", views=own)
    typer.echo(shown(target))


def _form(wanted: Format | None, out: Path | None) -> Format:
    """What to write.

    Raises:
        BadParameter: A picture is to be written into a file whose name says that it is another.
    """
    ending = "" if out is None else out.suffix.lower().removeprefix(".")
    told = Format(ending) if ending in set(Format) else None
    if wanted is None:
        return told or Format.HTML
    if wanted is not Format.HTML and out is not None and told is not wanted:
        raise typer.BadParameter(f"{out} does not end in .{wanted}", param_hint="'--out'")
    return wanted
