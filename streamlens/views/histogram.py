"""How a layer's values are distributed over steps: a heatmap of bins by steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import altair as alt
import numpy as np
import pandas as pd

from streamlens.reductions import bin_edges
from streamlens.views.marks import WIDTH, Limits, flag_marks, layered, nothing, step_axis

__all__ = ["histogram", "is_histogram"]

_HEIGHT: Final = 190
_MOST_BINS: Final = 48
_MOST_LABELS: Final = 12
_FEWEST_TENS: Final = 4
_NEAR: Final = 1e-4
"""Of an exponent: edges are numbers of single precision."""

Array = np.ndarray[Any, np.dtype[np.float64]]


def is_histogram(rows: pd.DataFrame) -> bool:
    """Whether the components of a topic are bins.

    Args:
        rows: The topic.
    """
    return "component" in rows.columns and bin_edges(_components(rows)) is not None


def histogram(
    rows: pd.DataFrame, *, limits: Limits | None = None, max_cells: int = 1500, values: str = "value"
) -> alt.LayerChart:
    """A heatmap of one layer's histograms: bins from the bottom to the top, steps from left to right.

    A cell's colour is the share of the elements that lie in the bin, on a scale of square roots, so that
    tails are seen too; cells that hold several steps show their mean. Bins that are empty throughout
    at either end are left out. A step with NaN or infinities has a magenta triangle at its foot.

    Args:
        rows: A topic of `histogram()`, of one layer.
        limits: The first and last step of the axis; by default those of the data.
        max_cells: The most cells drawn.
        values: What is counted, for the axis.

    Raises:
        ValueError: The components are no bins.
    """
    components = _components(rows)
    edges = bin_edges(components)
    if edges is None:
        raise ValueError(
            "rows whose components are no bins: this view takes a topic that sl.histogram() made"
        )
    if not len(rows):
        return nothing("no histogram was recorded")
    steps, counts, epochs = _counts(rows, components)
    inner = slice(1, len(components) - 2)
    total = np.maximum(counts.sum(1, keepdims=True), 1)
    shares, bins = (counts / total)[:, inner], edges[1:-2]
    used = np.flatnonzero(shares.any(0))
    marks = _beyond(components, steps, counts, epochs)
    if not len(used):
        return nothing("no finite value was counted")
    first, last = int(used[0]), int(used[-1])
    # Bins of fewer pixels than a line is wide would only cost columns.
    joined = -(-(last + 1 - first) // _MOST_BINS)
    starts = np.arange(first, last + 1, joined)
    table = _cells(steps, np.add.reduceat(shares[:, : last + 1], starts, axis=1), max_cells)
    kept = [(bins[i][0], bins[min(i + joined - 1, last)][1]) for i in starts.tolist()]
    table["from"] = [kept[i][0] for i in table["bin"]]
    table["to"] = [kept[i][1] for i in table["bin"]]
    labels = {i: _label(low) for i, (low, _) in enumerate(kept)} | {len(kept): _label(kept[-1][1])}
    shown = _thinned([edge for edge, _ in kept] + [kept[-1][1]])
    y = _bin_axis(values, {place: labels[place] for place in shown}, len(kept))
    color = alt.Color(
        "share:Q",
        scale=alt.Scale(type="sqrt", range="heatmap", domainMin=0, interpolate="lab"),
        legend=alt.Legend(title="share of elements", format="~%", gradientLength=200, gradientThickness=10),
    )
    cells: alt.Chart = alt.Chart(table, width=WIDTH, height=_HEIGHT).mark_rect(
        clip=True, x2Offset=0.6, y2Offset=-0.6
    )
    tooltip = [
        alt.Tooltip("step:Q", title="from step", format=","),
        alt.Tooltip("last:Q", title="to step", format=","),
        alt.Tooltip("from:Q", format=".3~g"),
        alt.Tooltip("to:Q", format=".3~g"),
        alt.Tooltip("share:Q", title="share of elements", format=".3~%"),
    ]
    table["top"] = table["bin"] + 1
    layers = [cells.encode(x=step_axis(limits), x2="end:Q", y=y, y2="top:Q", color=color, tooltip=tooltip)]
    if len(marks):
        layers.append(flag_marks(marks, limits, "count"))
    return layered(layers, interactive=0)


def _bin_axis(title: str, labels: Mapping[int, str], bins: int) -> alt.Y:
    """The axis of bins, labelled at some of their edges."""
    return alt.Y(
        "bin:Q",
        title=title,
        axis=alt.Axis(
            values=list(labels),
            labelExpr=f"{json.dumps({str(place): label for place, label in labels.items()})}[datum.value]",
            grid=False,
            titleAngle=0,
            titleAlign="left",
            titleAnchor="end",
            titleBaseline="bottom",
            titleX=0,
            titleY=-8,
        ),
        scale=alt.Scale(domain=[0, bins], nice=False, zero=False),
    )


def _components(rows: pd.DataFrame) -> tuple[str, ...]:
    column = rows["component"]
    if isinstance(column.dtype, pd.CategoricalDtype):
        return tuple(map(str, column.cat.categories))
    return tuple(dict.fromkeys(map(str, column.tolist())))


def _counts(rows: pd.DataFrame, components: tuple[str, ...]) -> tuple[Array, Array, Array]:
    """Steps, counts (a row a step, a column a bin; micro-steps added up), and each step's epoch."""
    names = pd.Categorical(rows["component"].astype(str), categories=components)
    place = np.asarray(names.codes, dtype=np.int64)
    steps, row = np.unique(rows["step"].to_numpy(), return_inverse=True)
    counts = np.zeros((len(steps), len(components)))
    np.add.at(counts, (row, place), np.nan_to_num(rows["value"].to_numpy(dtype=np.float64)))
    epochs = np.zeros(len(steps))
    epochs[row] = rows["epoch"].to_numpy()
    return steps.astype(np.float64), counts, epochs


def _cells(steps: Array, shares: Array, max_cells: int) -> pd.DataFrame:
    """One row a cell that is not empty: step, last, end, bin, share."""
    columns = max(1, max_cells // shares.shape[1])
    width = -(-len(steps) // columns)
    starts = np.arange(0, len(steps), width)
    means = np.add.reduceat(shares, starts, axis=0) / np.diff(np.append(starts, len(steps)))[:, None]
    first = steps[starts]
    last = steps[np.minimum(starts + width, len(steps)) - 1]
    gap = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    ends = np.append(first[1:], steps[-1] + gap)
    column, row = np.nonzero(means)
    return pd.DataFrame(
        {
            "step": first[column].astype(np.int64),
            "last": last[column].astype(np.int64),
            "end": ends[column],
            "bin": row,
            "share": [float(f"{share:.3g}") for share in means[column, row].tolist()],
        }
    )


def _beyond(components: tuple[str, ...], steps: Array, counts: Array, epochs: Array) -> pd.DataFrame:
    """A mark for each step at which NaN or infinities were counted."""
    names = {0: "-inf", len(components) - 2: "+inf", len(components) - 1: "NaN"}
    bad = counts[:, list(names)]
    rows = [
        {
            "series": f"{bad[i].sum():,.0f}",
            "step": int(steps[i]),
            "epoch": int(epochs[i]),
            "flag": ", ".join(name for name, count in zip(names.values(), bad[i], strict=True) if count),
        }
        for i in np.flatnonzero(bad.any(1)).tolist()
    ]
    return pd.DataFrame(rows, columns=["series", "step", "epoch", "flag"])


def _label(edge: float) -> str:
    if np.isinf(edge):
        return "−∞" if edge < 0 else "∞"
    return f"{edge:.2g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")


def _thinned(edges: Sequence[float]) -> list[int]:
    """The places of at most a dozen edges, powers of ten where there are several."""
    values = np.array(edges)
    with np.errstate(divide="ignore", invalid="ignore"):
        exponents = np.log10(np.abs(values))
        tens = np.abs(exponents - exponents.round()) < _NEAR
    if tens.sum() < _FEWEST_TENS:
        return _every(list(range(len(edges))), _MOST_LABELS)
    places: list[int] = []
    for side in (np.flatnonzero(values < 0), np.flatnonzero(values >= 0)):
        # Where bins are joined, the edges of one side may miss the powers that those of the other meet.
        met = side[tens[side]]
        places += _every((met if len(met) > 1 else side).tolist(), _MOST_LABELS // 2)
    return places


def _every(places: list[int], most: int) -> list[int]:
    return places[:: -(-len(places) // most) or 1]
