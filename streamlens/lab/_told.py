"""How commands on recorded runs take names and tell what they found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["FOLDER", "Folder", "Named", "OwnCharts", "as_usage", "console", "shown", "table_of"]

FOLDER: Final = Path("runs")
"""Where runs are recorded unless somebody says otherwise."""

Folder = Annotated[
    Path, typer.Option("--in", help="A folder with run stores in it or below it, or one such file.")
]
Named = Annotated[
    list[str],
    typer.Argument(
        help="A run's id or the beginning of it, its name, its folder, or its run store.", show_default=False
    ),
]
OwnCharts = Annotated[
    list[str] | None,
    typer.Option(
        "--views",
        help="Charts of your own: a Python file, which is run; with :name,name after it only these. "
        "May be repeated.",
        show_default=False,
    ),
]


@contextmanager
def as_usage() -> Iterator[None]:
    """What is wrong with a file or a name, in one line."""
    from streamlens.errors import StreamlensError

    try:
        yield
    except (StreamlensError, OSError, ImportError) as error:
        typer.echo(f"streamlens: {error}", err=True)
        raise typer.Exit(1) from None


def table_of(*titles: str) -> Table:
    """A table with these columns."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        # As Text: brackets in names are no markup.
        made.add_column(Text(title), overflow="fold")
    return made


def console() -> Console:
    """The standard output."""
    made = Console(highlight=False)
    # Cut at the width of a terminal; elsewhere a line of a table is a line.
    return made if made.is_terminal else Console(highlight=False, width=1000)


def shown(path: Path) -> str:
    """A path as one would type it here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
