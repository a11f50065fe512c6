"""`LayerTable`: numbers kept for each layer, whichever layers a frame brings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Array", "Flags", "LayerTable"]

Array: TypeAlias = NDArray[np.float64]
"""Numbers, one a layer."""

Flags: TypeAlias = NDArray[np.bool_]
"""Yes or no, one a layer."""


class LayerTable:
    """Columns of numbers with a row for every layer seen.

    Args:
        columns: What a new layer's entry in each column is: a number, or a list of them.
    """

    def __init__(self, columns: Mapping[str, float | list[float]]) -> None:
        self._fresh = dict(columns)
        self._places: dict[str, int] = {}
        self._columns = {
            name: np.zeros((0, *np.shape(fresh)), dtype=np.float64) for name, fresh in columns.items()
        }
        self._last: tuple[tuple[str, ...], NDArray[np.intp]] | None = None

    def rows(self, layers: tuple[str, ...]) -> NDArray[np.intp]:
        """Where some layers are; those not seen before are added."""
        last = self._last
        if last is not None and (last[0] is layers or last[0] == layers):
            return last[1]
        new = [name for name in dict.fromkeys(layers) if name not in self._places]
        for name in new:
            self._places[name] = len(self._places)
        if new:
            for name, column in self._columns.items():
                fresh = np.asarray(self._fresh[name], dtype=np.float64)
                added = np.broadcast_to(fresh, (len(new), *fresh.shape))
                self._columns[name] = np.concatenate([column, added])
        rows = np.fromiter((self._places[name] for name in layers), np.intp, len(layers))
        self._last = (layers, rows)
        return rows

    @property
    def layers(self) -> tuple[str, ...]:
        """Every layer seen, in the order of the rows."""
        return tuple(self._places)

    def __getitem__(self, column: str) -> Array:
        """A whole column; assign to its entries to change it. Ask for `rows` first: they may add some."""
        return self._columns[column]

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return {
            "layers": list(self._places),
            "columns": {name: torch.from_numpy(column.copy()) for name, column in self._columns.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._places = {name: i for i, name in enumerate(state["layers"])}
        self._columns = {name: column.numpy().copy() for name, column in state["columns"].items()}
        self._last = None
