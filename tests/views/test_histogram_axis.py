"""The axis of a histogram's bins is labelled on both sides of zero, whichever edges are powers of ten."""

from __future__ import annotations

import numpy as np

from streamlens.views.histogram import _thinned


def test_both_sides_have_labels_where_only_one_meets_powers_of_ten() -> None:
    magnitudes = np.logspace(-8, 0, 33)
    # Joined two by two, the edges below zero are at powers of ten and those above between them.
    edges = [*(-magnitudes[::-2]).tolist(), *magnitudes[1::2].tolist()]
    shown = [edges[place] for place in _thinned(edges)]
    assert sum(edge < 0 for edge in shown) > 1
    assert sum(edge > 0 for edge in shown) > 1
    assert len(shown) <= 12


def test_powers_of_ten_are_preferred_where_both_sides_have_them() -> None:
    magnitudes = np.logspace(-3, 0, 13)
    edges = [*(-magnitudes[::-1]).tolist(), *magnitudes.tolist()]
    exponents = [np.log10(abs(edges[place])) for place in _thinned(edges)]
    np.testing.assert_allclose(exponents, np.round(exponents), atol=1e-9)
