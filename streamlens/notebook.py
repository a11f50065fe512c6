"""Knowing which notebook cell is running, so that a cell run again replaces what it made before."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

__all__ = ["CellKey", "current_cell", "notebook_shell"]


@dataclass(frozen=True)
class CellKey:
    """A cell and one execution of it.

    Attributes:
        cell: What names the cell: the front end's id, or a hash of its code.
        execution: The execution count.
    """

    cell: str
    execution: int

    def is_rerun(self, later: CellKey) -> bool:
        """Whether `later` is the same cell at another execution."""
        return self.cell == later.cell and self.execution != later.execution


def current_cell() -> CellKey | None:
    """The cell that is running, or None outside a notebook."""
    shell = _shell()
    if shell is None:
        return None
    parent = getattr(shell, "parent_header", None) or {}
    cell = (parent.get("metadata") or {}).get("cellId") if isinstance(parent, dict) else None
    if not cell:
        cell = _outermost_cell_file()
    return CellKey(str(cell), int(getattr(shell, "execution_count", 0))) if cell else None


def notebook_shell() -> Any:
    """IPython's shell if it serves a notebook, or another front end that shows more than text; else None."""
    shell = _shell()
    return shell if getattr(shell, "kernel", None) is not None else None


def _shell() -> Any:
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None


def _outermost_cell_file() -> str | None:
    """The hash that ipykernel and IPython put into the file name of a cell's code."""
    frame: FrameType | None = sys._getframe(1)
    found: str | None = None
    while frame is not None:
        name = frame.f_code.co_filename
        match = re.search(r"ipykernel_\d+[/\\](\d+)\.py$", name) or re.search(
            r"<ipython-input-\d+-([0-9a-f]+)>$", name
        )
        if match:
            found = match.group(1)
        frame = frame.f_back
    return found
