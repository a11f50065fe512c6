"""A backend of matplotlib whose windows are files: named to it by `MPLBACKEND=module://...`.

A window is drawn to `window.png` in the folder `STREAMLENS_TEST_WINDOWS`, and somebody closes it once
there is a file `close` in it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends.backend_agg import FigureCanvasAgg

FOLDER = Path(os.environ.get("STREAMLENS_TEST_WINDOWS", "."))


class FigureManager(FigureManagerBase):
    def show(self) -> None:
        pass


class FigureCanvas(FigureCanvasAgg):
    manager_class = FigureManager

    def draw_idle(self, *args: Any, **kwargs: Any) -> None:
        self.figure.savefig(FOLDER / "drawn", format="png")
        (FOLDER / "drawn").replace(FOLDER / "window.png")

    def start_event_loop(self, timeout: float = 0) -> None:
        if (FOLDER / "close").exists():
            plt.close("all")
        super().start_event_loop(0.01)
