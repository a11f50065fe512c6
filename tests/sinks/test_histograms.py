"""Histograms for backends: every finite element is in one bin."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlens.frame import Frame
from streamlens.operators import histogram
from streamlens.reductions import bin_edges
from streamlens.sinks._histograms import histogram_of
from tests.helpers.sinks import reduced


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_bins_hold_every_element_whatever_its_size(elements: list[float]) -> None:
    found, missing = histogram_of(np.array(elements), ())
    assert found is not None
    assert missing == 0
    assert found.counts.sum() == len(elements)
    assert found.edges[0] == min(elements)
    assert found.edges[-1] == max(elements)
    assert found.edges[1:].tolist() == sorted(set(found.edges[1:]))


def test_what_is_not_finite_is_counted_apart() -> None:
    found, missing = histogram_of(np.array([1.0, np.nan, 3.0, np.inf]), ())
    assert found is not None
    assert (found.counts.sum(), missing) == (2, 2)
    assert (found.total, found.squares) == (4.0, 10.0)
    assert histogram_of(np.array([np.nan]), ()) == (None, 1.0)


def test_counts_keep_the_bins_of_the_operator() -> None:
    weights = Frame("weights", 0, ("fc",), (torch.tensor([0.1, 0.2, 0.7, 5.0, float("nan")]),))
    frame = reduced(weights, histogram("weights", bins=4, range=(0, 1)))
    found, missing = histogram_of(frame["fc"].numpy(), frame.components)
    assert bin_edges(frame.components) is not None
    assert found is not None
    expected, _ = np.histogram([0.1, 0.2, 0.7], bins=4, range=(0, 1))
    # Five lies beyond the range: in one more bin, as wide as its neighbour.
    assert found.counts.tolist() == [*expected.tolist(), 1]
    assert found.edges.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    assert missing == 1
