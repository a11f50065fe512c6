"""`Hysteresis`: from bad looks to the start of an alert, and from good ones to its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from streamlens.operators.alerts._layers import Flags, LayerTable

__all__ = ["Hysteresis"]


class Hysteresis:
    """Tells for each layer when an alert starts and when it ends.

    It starts once `n` of the last `m` looks were bad, and ends after `end` good looks in a row. A look
    that knows nothing of a layer (NaN) leaves it as it is.

    Args:
        n: Bad looks that start an alert.
        m: Looks among which they have to be.
        end: Good looks in a row that end it.

    Attributes:
        calm: Whether nothing is open and no look remembered was bad: then a good look changes nothing.
    """

    def __init__(self, n: int, m: int, end: int) -> None:
        self._n, self._m, self._end = n, m, end
        self._table = LayerTable({"recent": [0.0] * m, "good": 0.0, "open": 0.0})
        self.calm = True

    @property
    def open(self) -> tuple[str, ...]:
        """The layers whose alert has started and not ended."""
        return tuple(name for name, on in zip(self._table.layers, self._table["open"], strict=True) if on)

    def look(self, layers: tuple[str, ...], bad: Flags, known: Flags) -> tuple[Flags, Flags]:
        """Take in one look.

        Args:
            layers: The layers looked at.
            bad: Which of them are beyond the threshold.
            known: Of which of them anything is known.

        Returns:
            Masks over the layers: whose alert starts, and whose ends.
        """
        bad = bad & known
        rows = self._table.rows(layers)
        recent, good, open_ = self._table["recent"], self._table["good"], self._table["open"]
        seen = rows[known]
        recent[seen, 1:] = recent[seen, :-1].copy()
        recent[seen, 0] = bad[known]
        good[seen] = np.where(bad[known], 0.0, good[seen] + 1)
        was_open = open_[rows] > 0
        starts = known & ~was_open & (recent[rows].sum(axis=1) >= self._n)
        ends = known & was_open & (good[rows] >= self._end)
        open_[rows[starts]] = 1.0
        open_[rows[ends]] = 0.0
        recent[rows[ends]] = 0.0
        self.calm = not (recent.any() or open_.any())
        return starts, ends

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return {"table": self._table.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._table.load_state_dict(state["table"])
        self.calm = not (self._table["recent"].any() or self._table["open"].any())
