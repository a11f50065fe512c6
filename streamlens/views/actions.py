"""What controllers did, in a page about a run: marks over the steps of every chart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import altair as alt
import pandas as pd

from streamlens.views.marks import WIDTH, Limits, step_axis

__all__ = ["SUFFIX", "actions", "with_action_marks"]

SUFFIX: Final = ".action"
"""How the topics of actions end."""

_MOST_MARKS: Final = 100
_NEEDED: Final = frozenset({"step", "text", "cause"})


def actions(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The actions of a run, a row each: `step`, `steered` (what), `text` (what was done, and why).

    Args:
        tables: The rows of each topic `<what>.action`, with the columns of its frames' `meta`; tables of
            topics that only end like that are left out.
    """
    found = [
        table[["step", "text"]].drop_duplicates().assign(steered=topic.removesuffix(SUFFIX).replace("_", " "))
        for topic, table in tables.items()
        if set(table) >= _NEEDED and len(table)
    ]
    if not found:
        return pd.DataFrame({"step": [], "text": [], "steered": []})
    return pd.concat(found, ignore_index=True).sort_values("step", kind="stable", ignore_index=True)


def with_action_marks(chart: alt.LayerChart, found: pd.DataFrame, limits: Limits | None) -> alt.LayerChart:
    """A chart over steps with a small diamond at its foot for each action, and its sentence.

    Args:
        chart: The chart.
        found: The actions; of more than 100, evenly chosen ones are drawn.
        limits: The first and last step of the axis.
    """
    if not len(found):
        return chart
    chosen = found.iloc[:: -(-len(found) // _MOST_MARKS)]
    tooltip: list[Any] = [
        alt.Tooltip("steered:N"),
        alt.Tooltip("step:Q", format=","),
        alt.Tooltip("text:N"),
    ]
    base = alt.Chart(chosen, width=WIDTH).encode(x=step_axis(limits), tooltip=tooltip)
    marks: alt.Chart = base.mark_point(shape="diamond", filled=True, size=40, color="gray", opacity=0.8)
    return chart + marks.encode(y=alt.YValue("height"))  # type: ignore[no-untyped-call]
