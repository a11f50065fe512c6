"""Several views one below the other, as one chart."""

from __future__ import annotations

import warnings
from typing import TypeAlias, cast

import altair as alt

__all__ = ["stack"]

_View: TypeAlias = alt.Chart | alt.LayerChart


def stack(*charts: _View) -> alt.VConcatChart:
    """Put views one below the other; they pan and zoom along their steps together.

    What `first & second` makes too, but with colours of its own for each view, and without
    Altair's warning that the views share a selection, which is what they are meant to do.

    Args:
        *charts: Views of one run, from the top down.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Automatically deduplicated selection parameter", UserWarning)
        together = alt.vconcat(*charts)
    return cast(
        alt.VConcatChart,
        together.resolve_scale(color="independent", opacity="independent", strokeWidth="independent"),
    )
