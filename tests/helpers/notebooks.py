"""A notebook without a front end: cells that run, and what they would show."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

__all__ = ["Notebook", "notebook"]


class Notebook:
    """IPython's own shell, taken for a notebook's.

    Attributes:
        shell: The shell.
    """

    def __init__(self, shell: Any) -> None:
        self.shell = shell

    def run(self, cell: str, count: int) -> None:
        """Begin an execution of a cell."""
        self.shell.parent_header = {"metadata": {"cellId": cell}}
        self.shell.execution_count = count

    def finish(self) -> None:
        """The cell that runs has ended."""
        self.shell.events.trigger("post_run_cell", None)

    @property
    def outputs(self) -> list[dict[str, Any]]:
        """What was shown, and shown anew, in order."""
        return list(self.shell.display_pub.outputs)

    def last(self) -> dict[str, Any]:
        """What the latest output holds, by kind."""
        data: dict[str, Any] = self.outputs[-1]["data"]
        return data


@contextmanager
def notebook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Notebook]:
    """A notebook for the length of a test."""
    interactiveshell = pytest.importorskip("IPython.core.interactiveshell")
    displaypub = pytest.importorskip("IPython.core.displaypub")
    shell = interactiveshell.InteractiveShell.instance()
    try:
        monkeypatch.setattr(shell, "display_pub", displaypub.CapturingDisplayPublisher())
        monkeypatch.setattr(shell, "kernel", object(), raising=False)
        monkeypatch.setattr(shell, "parent_header", {}, raising=False)
        monkeypatch.setattr(shell, "execution_count", 1)
        yield Notebook(shell)
        # What is over by now lets go.
        shell.events.trigger("post_run_cell", None)
    finally:
        shell.clear_instance()
        monkeypatch.undo()
        builtins.__dict__.pop("get_ipython", None)
