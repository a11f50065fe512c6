"""Frames as JSON: strict JSON, with names for the numbers that it lacks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from streamlens.frame import Frame, to_numpy
from streamlens.sinks._values import host_values

__all__ = ["dumps", "frame_object", "plain"]


def frame_object(frame: Frame, wall_time: float) -> dict[str, Any]:
    """A frame as an object of what JSON knows.

    `values` has a member a layer (`""` is the model itself): a number, or for anything larger a
    list, of lists if need be. `components` and `meta` are there where the frame has such.

    Args:
        frame: A frame on the host.
        wall_time: When it was emitted, in seconds since 1970.
    """
    found: dict[str, Any] = {
        "topic": frame.topic,
        "step": frame.step,
        "epoch": frame.epoch,
        "micro_step": frame.micro_step,
        "kind": frame.kind.value,
        "wall_time": wall_time,
    }
    if frame.components:
        found["components"] = list(frame.components)
    found["values"] = {layer: _listed(value) for layer, value in host_values(frame)}
    if frame.meta:
        found["meta"] = plain(frame.meta)
    return found


def dumps(value: Any) -> str:
    """Strict JSON in one line, of ASCII characters.

    Args:
        value: What `frame_object` or `plain` gave.
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def plain(value: Any) -> Any:
    """Anything as what JSON knows.

    NaN and infinities are the texts `NaN`, `Infinity` and `-Infinity`, as in the JSON of Protocol
    Buffers; Python's `float` reads them. Complex numbers are pairs of numbers, tensors and arrays
    lists. What JSON does not know is its text.

    Args:
        value: Whatever a frame's `meta` may hold.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Tensor):
        return _listed(to_numpy(value))
    if isinstance(value, np.ndarray | np.generic):
        return _listed(np.asarray(value))
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, complex):
        return [_number(value.real), _number(value.imag)]
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    return str(value)


def _listed(value: np.ndarray[Any, Any]) -> Any:
    if np.iscomplexobj(value):
        value = np.stack([value.real, value.imag], axis=-1)
    listed = value.tolist()
    if value.dtype.kind in "biu" or (value.dtype.kind == "f" and np.isfinite(value).all()):
        return listed
    return plain(listed)


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
