"""`streamlens plugins`: the operators and sinks there are."""

from __future__ import annotations

__all__ = ["list_plugins"]


def list_plugins() -> None:
    """List all operators and sinks, shipped or installed, and what is wrong with those that are broken."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from streamlens.plugins import plugins

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("Name", "Kind", "Package", "Version"):
        table.add_column(title, no_wrap=True)
    table.add_column("What it is", overflow="fold")
    for plugin in plugins():
        # As Text: brackets in other people's words are no markup.
        told = Text(f"error: {plugin.error}", "red") if plugin.error else Text(plugin.summary)
        table.add_row(*map(Text, (plugin.name, plugin.kind, plugin.package, plugin.version)), told)
    Console(highlight=False).print(table)
