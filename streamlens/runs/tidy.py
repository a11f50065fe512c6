"""Stored frames as a tidy table: one row a value, without a Python loop over values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from streamlens.runs.codec import Layout, array_of, checksum
from streamlens.runs.downsample import extremes

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["StoredFrame", "categories", "checked_row", "merge_orders", "tidy"]

StoredFrame: TypeAlias = tuple[int, int, int, float, int, str | None, bytes]
"""A row of the store: step, micro_step, epoch, wall_time, layout, meta, data."""

_Array: TypeAlias = np.ndarray[Any, Any]

_COLUMNS: Final = ("step", "micro_step", "epoch", "layer", "component", "value", "wall_time")
_NO_COMPONENT: Final = np.array([-1], np.int32)


@dataclass(frozen=True)
class _Cells:
    """The values of all frames of one layout: a row a frame, a column a layer and component."""

    frames: _Array
    """Of each row, the position of its frame in the table's order."""
    values: _Array
    layers: _Array
    """Of each column, the position of its layer among those wanted."""
    components: _Array
    """Of each column, the position of its component among all of the topic; -1 for none."""


def merge_orders(lists: Iterable[Sequence[str]]) -> list[str]:
    """All names of several lists in an order that keeps each list's own.

    A name that is new comes after the one before it in its list; the first of a list before the
    next one that is known. So layers that come and go stay in model order.
    """
    merged: list[str] = []
    for names in dict.fromkeys(tuple(names) for names in lists):
        known = set(merged)
        if known.issuperset(names):
            continue
        place = next((merged.index(name) for name in names if name in known), len(merged))
        for name in names:
            if name in known:
                place = merged.index(name) + 1
            else:
                merged.insert(place, name)
                known.add(name)
                place += 1
    return merged


def tidy(
    rows: Sequence[StoredFrame],
    layouts: Mapping[int, Layout],
    keep: Sequence[str],
    max_points: int | None,
) -> pd.DataFrame:
    """Lay frames of one topic out as a table, in the order of `rows`.

    Args:
        rows: The frames.
        layouts: The topic's layouts, also those that occur in no row.
        keep: The layers wanted, in the order that their categories shall have.
        max_points: At most this many rows a layer and component, extremes and NaN among them.
    """
    import pandas as pd

    components = merge_orders(layout.components for layout in layouts.values())
    cells = _cells(rows, layouts, keep, components)
    frame, layer, component, value = _long(cells)
    if max_points is not None:
        chosen = _thin(cells, layer * (len(components) + 1) + component, value, max_points)
        frame, layer, component, value = frame[chosen], layer[chosen], component[chosen], value[chosen]
    steps, micro_steps, epochs, times, _, metas, _ = zip(*rows, strict=True) if rows else ((),) * 7
    columns: dict[str, Any] = {
        "step": np.array(steps, np.int64)[frame],
        "micro_step": np.array(micro_steps, np.int64)[frame],
        "epoch": np.array(epochs, np.int64)[frame],
        "layer": pd.Categorical.from_codes(layer, categories=categories(keep)),
    }
    if components:
        columns["component"] = pd.Categorical.from_codes(component, categories=categories(components))
    columns["value"] = value
    columns["wall_time"] = np.array(times, np.float64)[frame]
    for key, entries in _meta_columns(metas).items():
        columns[f"meta.{key}" if key in _COLUMNS else key] = pd.Series(entries).take(frame).array
    # The arrays are this table's alone: letting pandas copy them into blocks doubles the time.
    return pd.DataFrame(columns, copy=False)


def categories(names: Sequence[str]) -> pd.Index[Any]:
    """Names as the categories of a column."""
    # Not left to pandas, whose own string type refuses names that are not valid Unicode.
    import pandas as pd

    categories: pd.Index[Any] = pd.Index(np.array(names, dtype=object), dtype="object")
    return categories


def _cells(
    rows: Sequence[StoredFrame], layouts: Mapping[int, Layout], keep: Sequence[str], components: Sequence[str]
) -> list[_Cells]:
    layer_codes = {name: code for code, name in enumerate(keep)}
    component_codes = {name: code for code, name in enumerate(components)}
    used = np.array([row[4] for row in rows], np.int64)
    cells: list[_Cells] = []
    for number in dict.fromkeys(used.tolist()):
        layout = layouts[number]
        frames = np.flatnonzero(used == number)
        data = b"".join([rows[i][6] for i in frames.tolist()])
        own_components = np.array([component_codes[name] for name in layout.components], np.int32)
        blocks: list[_Array] = []
        block_layers: list[_Array] = []
        block_components: list[_Array] = []
        for names, values in _blocks(layout, data, len(frames)):
            codes = np.array([layer_codes.get(name, -1) for name in names], np.int32)
            wanted = codes >= 0
            if not wanted.all():
                values, codes = values[:, wanted], codes[wanted]
            if not len(codes):
                continue
            named, columns = _by_component(values, len(own_components))
            blocks.append(columns.reshape(len(frames), -1))
            block_layers.append(np.repeat(codes, columns.shape[2]))
            block_components.append(np.tile(own_components if named else _NO_COMPONENT, len(codes)))
        if blocks:
            values = np.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]
            cells.append(
                _Cells(frames, values, np.concatenate(block_layers), np.concatenate(block_components))
            )
    return cells


def _blocks(layout: Layout, data: bytes, count: int) -> Iterator[tuple[Sequence[str], _Array]]:
    """Layers of equal type and shape, with their values: (frame, layer, then the layer's own shape)."""
    if layout.stacked or len(set(layout.tensors)) == 1:
        name, shape = layout.tensors[0]
        inner = shape[1:] if layout.stacked else shape
        yield layout.layers, array_of(name, data).reshape(count, len(layout.layers), *inner)
        return
    raw = np.frombuffer(data, np.uint8).reshape(count, layout.nbytes)
    start = 0
    for layer, (name, shape), size in zip(layout.layers, layout.tensors, layout.sizes, strict=True):
        values = array_of(name, raw[:, start : start + size].tobytes())
        yield (layer,), values.reshape(count, 1, *shape)
        start += size


def _by_component(values: _Array, components: int) -> tuple[bool, _Array]:
    """Whether the cells are one a component, and the cells: (frame, layer, component).

    As in `Frame.to_pandas`, a cell that is larger than a number stays an array.
    """
    count, layers, *shape = values.shape
    if not shape:
        return components == 1, values[:, :, None]
    named = components > 0 and shape[0] == components
    width, inner = (components, shape[1:]) if named else (1, shape)
    if not inner:
        return named, values
    cells = np.empty(count * layers * width, dtype=object)
    for i, cell in enumerate(values.reshape(len(cells), *inner)):
        cells[i] = cell
    return named, cells.reshape(count, layers, width)


def _long(cells: Sequence[_Cells]) -> tuple[_Array, _Array, _Array, _Array]:
    """Frame, layer, component and value of each row of the table."""
    if not cells:
        none = np.empty(0, np.int32)
        return none, none, none, np.empty(0, np.float32)
    frame = np.concatenate([np.repeat(c.frames, len(c.layers)) for c in cells])
    layer = np.concatenate([np.tile(c.layers, len(c.frames)) for c in cells])
    component = np.concatenate([np.tile(c.components, len(c.frames)) for c in cells])
    value = np.concatenate([c.values.ravel() for c in cells])
    if len(cells) > 1:
        order = np.argsort(frame, kind="stable")
        frame, layer, component, value = frame[order], layer[order], component[order], value[order]
    return frame, layer, component, value


def _thin(cells: Sequence[_Cells], series: _Array, value: _Array, max_points: int) -> _Array:
    """The rows of the table that remain, ascending."""
    if len(cells) == 1:
        # One layout: each series is every n-th row, and no sorting is needed to find it.
        width = len(cells[0].layers)
        parts = [np.arange(start, len(value), width) for start in range(width)]
    else:
        by_series = np.argsort(series, kind="stable")
        parts = np.split(by_series, np.flatnonzero(np.diff(series[by_series])) + 1)
    chosen = [part[extremes(value[part], max_points)] for part in parts]
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)


def _meta_columns(metas: Sequence[str | None]) -> dict[str, list[Any]]:
    """The entries of the frames' meta: a column a key, None where a frame lacks it."""
    columns: dict[str, list[Any]] = {}
    for i, meta in enumerate(metas):
        if meta is not None:
            for key, entry in json.loads(meta).items():
                columns.setdefault(key, [None] * len(metas))[i] = entry
    return columns


def checked_row(row: Sequence[Any], topic: str, layouts: Mapping[int, Layout]) -> StoredFrame:
    """The row, if it is what was written: no wrong number is ever returned."""
    step, micro_step, sequence, epoch, wall_time, layout, meta, data, stored = row
    if (
        not isinstance(data, bytes)
        or checksum(step, micro_step, sequence, epoch, wall_time, layout, meta, data) != stored
        or layout not in layouts
        or len(data) != layouts[layout].nbytes
    ):
        raise ValueError(f"the frame of {topic!r} at step {step} is not what was written")
    return step, micro_step, epoch, wall_time, layout, meta, data
