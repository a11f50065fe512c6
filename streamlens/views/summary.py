"""The few numbers at the head of a page about a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from streamlens.views.sections import ModelRows

__all__ = ["Tile", "last_step", "scientific", "tiles", "time_span"]

Verdict = Literal["", "good", "watch"]


@dataclass(frozen=True, slots=True)
class Tile:
    """One number.

    Attributes:
        label: What it is.
        value: The number, with its unit.
        note: A few words more.
        verdict: `"good"`, `"watch"`, or `""` where there is nothing to judge.
        wide: Whether it needs the room of two.
    """

    label: str
    value: str
    note: str = ""
    verdict: Verdict = ""
    wide: bool = False


def tiles(models: Sequence[ModelRows]) -> list[Tile]:
    """Steps, epochs, loss, accuracy, duration and update-to-weight ratio, as far as recorded.

    Args:
        models: What was recorded, one entry a model.
    """
    if not models:
        return []
    steps = last_step(models) + 1
    found = [Tile("steps", f"{steps:,}", "optimizer updates"), *_epochs(models, steps)]
    for model in models:
        of = f" of {model.name}" if model.name else ""
        found += [*_loss(model, of), *_accuracy(model, of)]
    found += _duration(models, steps)
    for model in models:
        found += _ratio(model, f" of {model.name}" if model.name else "")
    return found


def last_step(models: Sequence[ModelRows]) -> int:
    """The last step that anything was recorded at; -1 if nothing was."""
    return max((int(rows["step"].max()) for rows in _tables(models)), default=-1)


def time_span(models: Sequence[ModelRows]) -> tuple[float, float] | None:
    """When the first and the last frame was recorded, in seconds since 1970; None if unknown."""
    times = [rows["wall_time"] for rows in _tables(models) if "wall_time" in rows.columns]
    if not times:
        return None
    return min(float(t.min()) for t in times), max(float(t.max()) for t in times)


def scientific(value: float) -> str:
    """A positive number as `1.3 × 10⁻³`."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}\u202f×\u202f10{str(int(exponent)).translate(_SUPERSCRIPT)}"


_SUPERSCRIPT: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _tables(models: Sequence[ModelRows]) -> list[pd.DataFrame]:
    return [rows for model in models for rows in model.rows.values() if len(rows)]


def _epochs(models: Sequence[ModelRows], steps: int) -> list[Tile]:
    finished = [len(m.rows["epoch_finished"]) for m in models if "epoch_finished" in m.rows]
    if finished:
        epochs = max(finished)
    else:
        epochs = max((int(r["epoch"].max()) for r in _tables(models) if "epoch" in r.columns), default=0) + 1
    if not epochs:
        return []
    return [Tile("epochs", f"{epochs:,}", f"{steps / epochs:,.4g} steps each")]


def _loss(model: ModelRows, of: str) -> list[Tile]:
    for topic, note in (("loss.ema", "moving average at the end"), ("loss", "of the last step")):
        rows = model.rows.get(topic)
        if rows is None or not len(rows):
            continue
        last = rows[rows["step"] == rows["step"].max()]
        value = float(np.mean(last["value"].to_numpy(dtype=np.float64)))
        if "component" in last.columns and last["component"].nunique() > 1:
            note = f"mean of {last['component'].nunique()} losses, {note}"
        return [Tile(f"final loss{of}", f"{value:.4g}", note, "" if math.isfinite(value) else "watch")]
    return []


def _accuracy(model: ModelRows, of: str) -> list[Tile]:
    rows = model.rows.get("test_accuracy")
    if rows is None or not len(rows):
        return []
    ordered = rows.sort_values("step", kind="stable")
    values = ordered["value"].to_numpy(dtype=np.float64)
    note = "no finite value"
    if np.isfinite(values).any():
        best = int(np.nanargmax(np.where(np.isfinite(values), values, np.nan)))
        note = f"best {values[best]:.1%}, at step {int(ordered['step'].iloc[best]):,}"
    return [Tile(f"test accuracy{of}", f"{values[-1]:.1%}", note)]


def _duration(models: Sequence[ModelRows], steps: int) -> list[Tile]:
    span = time_span(models)
    if span is None or not math.isfinite(span[1] - span[0]):
        return []
    seconds = span[1] - span[0]
    note = f"{(steps - 1) / seconds:,.3g} steps a second" if seconds > 0 and steps > 1 else ""
    return [Tile("duration", _spoken(seconds), note)]


def _spoken(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def _ratio(model: ModelRows, of: str) -> list[Tile]:
    rows = model.rows.get("uw_ratio")
    if rows is None or not len(rows):
        return []
    values = rows["value"].to_numpy(dtype=np.float64)
    known = values[np.isfinite(values)]
    if not len(known):
        value, note, good = "NaN", "no finite value in any layer", False
    elif (median := float(np.median(known))) <= 0:
        value, note, good = "0", "median; most layers do not change", False
    else:
        # Half a decade to either side.
        exponent = math.log10(median)
        place = "above" if exponent > -2.5 else "below" if exponent < -3.5 else "around"
        value, good = scientific(median), place == "around"
        note = f"median of layers and steps, {place} the usual 10⁻³"
    return [Tile(f"update-to-weight ratio{of}", value, note, "good" if good else "watch", wide=True)]
