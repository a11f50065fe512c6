"""`streamlens ui`: the live page over recorded runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamlens.lab._told import OwnCharts

__all__ = ["ui"]


def ui(
    path: Annotated[
        Path,
        typer.Argument(
            help="A run store, such as runs/first/run.db, or a folder with run stores in it or below it."
        ),
    ] = Path("runs"),
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            help="Port to serve at; 0 for any free one.",
            min=0,
            max=65535,
            show_default="7411, or the next free one",
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            help="Address to listen at. Any but this machine's own asks for a token, which is part of the "
            "address printed; through SSH the default is enough.",
        ),
    ] = "127.0.0.1",
    token: Annotated[
        bool,
        typer.Option(
            "--token",
            help="Ask for a token in any case: where others work on this machine too.",
            show_default="off",
        ),
    ] = False,
    views: OwnCharts = None,
) -> None:
    """Serve a live page of recorded runs, also of those being written, until Ctrl-C."""
    from streamlens.errors import StreamlensError
    from streamlens.views.own import charts_of
    from streamlens.views.web.serve import PageServer

    try:
        charts = {name: chart for place in views or [] for name, chart in charts_of(place).items()}
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--views'") from None
    try:
        server = PageServer(path, host=host, port=port, token=token, views=charts)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--views'") from None
    except (StreamlensError, OSError, ImportError) as error:
        typer.echo(f"streamlens: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(server.url)
    typer.echo("Ctrl-C ends it.", err=True)
    server.run()
