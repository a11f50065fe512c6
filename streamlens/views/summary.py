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
    return [Tile("epochs", f"{epochs:,}", f"{steps / epochs:,.4g} step{'s' if steps != epochs else ''} each")]


def _loss(model: ModelRows, of: str) -> list[Tile]:
    recorded = [topic for topic in ("loss.ema", "loss") if len(model.rows.get(topic, ()))]
    if not recorded:
        return []
    rows = model.rows[recorded[0]]
    last = rows[rows["step"] == rows["step"].max()]
    value = float(np.mean(last["value"].to_numpy(dtype=np.float64)))
    note = "moving average at the end" if recorded[0] == "loss.ema" else "of the last step"
    # An average skips what is not finite: it would show a number for a run that has ended in NaN.
    ended = _not_finite_from(model.rows["loss"]) if "loss" in recorded else None
    if ended is not None:
        average = f"; moving average before it {value:.4g}" if math.isfinite(value) else ""
        return [
            Tile(f"final loss{of}", ended.value, f"not finite from step {ended.step:,} on{average}", "watch")
        ]
    if "component" in last.columns and last["component"].nunique() > 1:
        note = f"mean of {last['component'].nunique()} losses, {note}"
    return [Tile(f"final loss{of}", _plain(value), note, "" if math.isfinite(value) else "watch")]


@dataclass(frozen=True, slots=True)
class _Ended:
    step: int
    value: str


def _not_finite_from(rows: pd.DataFrame) -> _Ended | None:
    """Since when every step up to the last one has a value that is not finite; None if the last has none."""
    values = rows["value"].to_numpy(dtype=np.float64)
    steps = rows["step"].to_numpy()
    missing = ~np.isfinite(values)
    bad = np.unique(steps[missing])
    if not len(bad) or bad[-1] != steps.max():
        return None
    fine = np.setdiff1d(steps, bad)
    since = bad if not len(fine) else bad[bad > fine.max()]
    # Of several losses one may have stayed finite: their mean has not.
    with np.errstate(invalid="ignore"):
        value = float(np.mean(values[missing & (steps == bad[-1])]))
    return _Ended(int(since[0]), _plain(value))


def _plain(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return f"{value:.4g}" if math.isfinite(value) else "∞" if value > 0 else "-∞"


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
    known = math.isfinite(values[-1])
    shown = f"{values[-1]:.1%}" if known else _plain(values[-1])
    return [Tile(f"test accuracy{of}", shown, note, "" if known else "watch")]


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
    if len(known) and (at_the_end := _layers_not_finite(rows)):
        note, good = f"{note}; {at_the_end} at the end", False
    return [Tile(f"update-to-weight ratio{of}", value, note, "good" if good else "watch", wide=True)]


def _layers_not_finite(rows: pd.DataFrame) -> str:
    """How many layers' last values are not finite, in words; `""` if none."""
    last = rows.sort_values("step", kind="stable").groupby("layer", sort=False).tail(1)
    count = int((~np.isfinite(last["value"].to_numpy(dtype=np.float64))).sum())
    if not count:
        return ""
    if count == len(last):
        return "NaN or infinity in every layer"
    return f"NaN or infinity in {count} layer{'s' if count > 1 else ''}"
