"""What options of the command line stand for: checked by name, loaded and built.

The lab is imported where it is needed, so that `--help` answers at once.
"""

from __future__ import annotations

import enum
import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from streamlens.lab._registry import lookup

if TYPE_CHECKING:
    from torch import nn

    from streamlens.lab.data import ImageDataset

__all__ = ["Visualisation", "built", "known", "loaded", "positive", "shown_as"]


class Visualisation(enum.StrEnum):
    """Where a run is shown while it trains, beside what it always leaves."""

    TB = "tb"
    CONSOLE = "console"
    MPL = "mpl"
    ALTAIR = "altair"
    CSV = "csv"
    JSONL = "jsonl"
    PARQUET = "parquet"
    NONE = "none"


def known(kind: str, module: str, names: str) -> Callable[[str], str]:
    """A check of an option's value that gives it as registered, or says what was meant.

    The names are those of a collection in a module of the lab, which is imported when they are needed.
    """

    def check(value: str) -> str:
        entries = getattr(importlib.import_module(f"streamlens.lab.{module}"), names)
        try:
            return lookup(kind, value, dict.fromkeys(entries))[0]
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return check


def loaded(
    dataset: str, data_dir: Path | None, download: bool, image_size: int | None, *, whitened: bool = False
) -> ImageDataset:
    """A data set, or an error of `--dataset` that says what is missing."""
    from streamlens.errors import DatasetError
    from streamlens.lab.data import load_dataset, whiten

    try:
        data = load_dataset(dataset, data_dir=data_dir, download=download, image_size=image_size)
    except DatasetError as error:
        raise typer.BadParameter(str(error), param_hint="'--dataset'") from None
    return whiten(data) if whitened else data


def built(model: str, data: ImageDataset, init: str) -> nn.Module:
    """A model for a data set, initialised, or an error of the size that does not suit it."""
    from streamlens.lab.initialisation import initialise
    from streamlens.lab.models import make_model

    sizes = {"channels": data.channels, "image_size": data.image_size, "classes": data.classes}
    try:
        return initialise(make_model(model, **sizes), init)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--image-size'") from None


def positive(value: float) -> float:
    """The value, which must be finite and above 0."""
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not a finite number above 0")
    return value


def shown_as(visualisation: Sequence[Visualisation]) -> list[str]:
    """Each of them once.

    Raises:
        BadParameter: `none` beside others.
    """
    shown = list(dict.fromkeys(entry.value for entry in visualisation))
    if "none" in shown and len(shown) > 1:
        others = " and ".join(entry for entry in shown if entry != "none")
        raise typer.BadParameter(
            f"'none' leaves nothing for {others} to show: leave one of them out",
            param_hint="'--visualisation' / '-v'",
        )
    return shown
