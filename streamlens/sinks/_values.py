"""What sinks make of a frame's values: arrays on the host, and single numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from streamlens.frame import Frame, to_numpy
from streamlens.reductions import bin_edges

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["drawn_edges", "host_values", "number_cells", "stacked_values"]


def stacked_values(frame: Frame) -> NDArray[Any]:
    """The one array of a stacked frame, its first dimension the layer."""
    values = frame.values
    assert not isinstance(values, tuple)
    return to_numpy(values)


def host_values(frame: Frame) -> Iterator[tuple[str, NDArray[Any]]]:
    """Each layer with its value as a host array, in model order."""
    if not frame.stacked:
        yield from ((layer, to_numpy(value)) for layer, value in frame.items())
        return
    # One conversion a frame: iterating over a NumPy array is cheap, over a tensor it is not.
    array = stacked_values(frame)
    yield from ((layer, np.asarray(array[i])) for i, layer in enumerate(frame.layers))


def drawn_edges(components: tuple[str, ...]) -> NDArray[np.float64] | None:
    """The lower and upper edges by which a histogram's bins are drawn.

    Args:
        components: A frame's components.

    Returns:
        One row a bin, without those of both infinities and NaN: the first and the last two. Intervals
        without an end are as wide as their neighbours. None if the components are no bins.
    """
    found = bin_edges(components)
    if found is None:
        return None
    edges = np.array(found)[1:-2]
    edges[0, 0] = edges[0, 1] - np.diff(edges[1])[0]
    edges[-1, 1] = edges[-1, 0] + np.diff(edges[-2])[0]
    return edges


def number_cells(frame: Frame) -> Iterator[tuple[str, str, float | int | NDArray[Any]]]:
    """A frame as single numbers: one a layer, or one a layer and named component.

    Truth values are 0 and 1. A complex number is two: its component is `real` and `imag`, or the
    component's own name with `.real` and `.imag` appended.

    Args:
        frame: A frame on the host.

    Yields:
        Layer, component (empty where there is none) and number. A value that is neither a number
        nor one number a named component comes whole, as the array it is.
    """
    names = frame.components
    for layer, value in host_values(frame):
        if value.dtype == bool:
            value = value.astype(np.uint8)
        if names and value.shape == (len(names),):
            components, numbers = names, value
        elif value.ndim == 0:
            components, numbers = ("",), value[np.newaxis]
        else:
            yield layer, "", value
            continue
        if np.iscomplexobj(numbers):
            components = tuple(
                f"{name}.{part}".lstrip(".") for name in components for part in ("real", "imag")
            )
            numbers = np.stack([numbers.real, numbers.imag], axis=-1).ravel()
        for component, number in zip(components, numbers.tolist(), strict=True):
            yield layer, component, number
