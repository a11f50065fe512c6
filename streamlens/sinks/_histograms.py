"""`Histogram`: what backends that draw histograms are given of counts in bins and of whole tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from streamlens.sinks._values import drawn_edges

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Histogram", "histogram_of"]

_BINS: Final = 64


@dataclass(frozen=True)
class Histogram:
    """Finite numbers, counted in adjacent bins.

    Attributes:
        edges: Where bins begin and end, ascending; one more than there are bins.
        counts: How many numbers each bin holds.
        total: Their sum; from the middles of the bins where only counts are known.
        squares: The sum of their squares, likewise.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.float64]
    total: float
    squares: float


def histogram_of(value: NDArray[Any], components: Sequence[str]) -> tuple[Histogram | None, float]:
    """A histogram of a layer's value.

    Counts in bins (the operator `histogram`) keep these bins; what lies beyond their range is one more bin,
    as wide as its neighbour. The elements of any other tensor are counted in 64 bins of equal width from
    the least to the greatest finite one, or in one where these are equal.

    Args:
        value: The value, real or a truth value.
        components: The names of the frame's components.

    Returns:
        The histogram, None where there is no finite element; and how many elements are not finite.
    """
    edges = drawn_edges(tuple(components)) if value.shape == (len(components),) else None
    if edges is not None:
        return _of_counts(edges, value.astype(np.float64))
    elements = value.astype(np.float64).ravel()
    finite = elements[np.isfinite(elements)]
    return (_of_elements(finite) if finite.size else None), float(elements.size - finite.size)


def _of_counts(edges: NDArray[np.float64], counts: NDArray[np.float64]) -> tuple[Histogram | None, float]:
    """An interval a bin, but for both infinities and NaN."""
    missing = float(counts[0] + counts[-2:].sum())
    counts = counts[1:-2]
    held = np.flatnonzero(counts > 0)
    if not held.size or not np.isfinite(counts).all():
        return None, missing
    shown = slice(held[0], held[-1] + 1)
    edges, counts = edges[shown], counts[shown]
    middles = edges.mean(axis=1)
    total, squares = float(np.dot(counts, middles)), float(np.dot(counts, middles**2))
    return Histogram(np.append(edges[0, 0], edges[:, 1]), counts, total, squares), missing


def _of_elements(elements: NDArray[np.float64]) -> Histogram:
    least, greatest = float(elements.min()), float(elements.max())
    # Halves, because the width of all finite numbers is not finite itself.
    edges = 2 * np.linspace(least / 2, greatest / 2, _BINS + 1)
    edges[0], edges[-1] = least, greatest
    if np.all(np.diff(edges) > 0):
        counts = np.histogram(elements, bins=edges)[0].astype(np.float64)
    else:
        edges, counts = np.array([least, greatest]), np.array([float(elements.size)])
    # Sums of numbers near the limit may be infinite, and are written so.
    with np.errstate(over="ignore", invalid="ignore"):
        return Histogram(edges, counts, float(elements.sum()), float(np.dot(elements, elements)))
