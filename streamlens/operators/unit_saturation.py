"""`unit_saturation`: the share of bounded outputs that lie at their bounds."""

from __future__ import annotations

import contextlib
import glob
import math
from collections.abc import Mapping, Sequence
from typing import Final

from reactivex import Observable
from torch import nn

from streamlens.errors import LayerNotFoundError, StreamlensError
from streamlens.frame import Frame
from streamlens.operators._base import modules_of
from streamlens.operators._merge import merged
from streamlens.operators._units import UnitSaturation
from streamlens.operators.selection import layers
from streamlens.operators.statistics import reduction_operator
from streamlens.reductions import Reduction
from streamlens.stream import Operator, as_stream

__all__ = ["unit_saturation"]

_BOUNDS: Final = {
    nn.Sigmoid: (0.0, 1.0),
    nn.Hardsigmoid: (0.0, 1.0),
    nn.Tanh: (-1.0, 1.0),
    nn.Softsign: (-1.0, 1.0),
}


def unit_saturation(
    topic: str | None = "activations",
    *,
    lower: float | None = None,
    upper: float | None = None,
    margin: float = 0.01,
) -> Operator:
    """The share of a layer's outputs that lie within a margin of the ends of their range.

    |{x : x <= lower + m or x >= upper - m}| / n with m = margin * (upper - lower). Through a saturated unit
    hardly any gradient passes. By default, a sigmoid counts as saturated below 0.01 and above 0.99, a tanh
    beyond 0.98. (`saturation` is something else: how many directions a layer's outputs use.)

    On a Lens the ends are those of the modules: `nn.Sigmoid` and `nn.Hardsigmoid` 0 and 1, `nn.Tanh` and
    `nn.Softsign` -1 and 1, `nn.Hardtanh` its own; other layers are left out, and ranges that differ come in
    frames of their own. With `lower` and `upper` every layer selected has that range, as bounded outputs of
    functions called inside a module need, and streams that know no model.

    Input: activations, or another raw topic, of any shape and dtype. The result is topic
    `activations.unit_saturation`, float32 in [0, 1]; NaN for an output without elements. NaN counts as not
    saturated. The cost is one pass over the outputs, in the module's hook; nothing waits for a GPU. Source:
    Glorot and Bengio, Understanding the Difficulty of Training Deep Feedforward Neural Networks, 2010.

    Args:
        topic: The topic; None takes the stream as it is.
        lower: The lower end of the range.
        upper: Its upper end.
        margin: How near an end, as a share of the range, from 0 to below 0.5.

    Returns:
        The operator.

    Raises:
        TypeError: The topic is not a name.
        ValueError: Only one end, an empty range, or a margin out of range.
        LayerNotFoundError: When applied to a Lens without ends given: no bounded module is selected.
        StreamlensError: When applied without ends to a stream that comes from no lens.
    """
    operator = "unit_saturation"
    for name, value in (("lower", lower), ("upper", upper), ("margin", margin)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value)):
            raise ValueError(f"{operator}({name}={value!r}): a number")
    if not 0 <= margin < 0.5:
        raise ValueError(f"{operator}(margin={margin!r}): a share of the range from 0 to below 0.5")
    if (lower is None) != (upper is None):
        raise ValueError(f"{operator}() takes both ends of the range, lower= and upper=, or neither")
    if lower is not None and upper is not None:
        if lower >= upper:
            raise ValueError(f"{operator}(lower={lower!r}, upper={upper!r}): the range is empty")
        return reduction_operator(UnitSaturation(float(lower), float(upper), float(margin)), topic, operator)

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        stream = as_stream(source)
        if stream.lens is None:
            raise StreamlensError(
                f"{operator}() needs the ends of the range where there is no model to ask: pass lower= and "
                "upper=, such as lower=-1, upper=1 for a tanh"
            )
        found: list[Operator] = []
        for (low, high), names in _ranges(modules_of(stream, operator)).items():
            way = _of_layers(names, UnitSaturation(low, high, float(margin)), topic, operator)
            # The modules may lie outside of what the lens was narrowed to.
            with contextlib.suppress(LayerNotFoundError):
                way(source)
                found.append(way)
        if not found:
            raise LayerNotFoundError(
                f"{operator}() found no bounded module ({', '.join(c.__name__ for c in _BOUNDS)}, Hardtanh) "
                "among the layers selected: pass lower= and upper= where other outputs are bounded"
            )
        return found[0](source) if len(found) == 1 else merged(source, found)

    return apply


def _of_layers(names: Sequence[str], reduction: Reduction, topic: str | None, operator: str) -> Operator:
    reduced, pick = reduction_operator(reduction, topic, operator), layers(*names)
    return lambda source: reduced(pick(source))


def _ranges(modules: Mapping[str, nn.Module]) -> dict[tuple[float, float], list[str]]:
    """The bounded modules, as patterns that match each of them, by their ranges."""
    found: dict[tuple[float, float], list[str]] = {}
    for name, module in modules.items():
        if isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
            bounds = (float(module.min_val), float(module.max_val))
        else:
            bounds = next((b for kind, b in _BOUNDS.items() if isinstance(module, kind)), (0.0, 0.0))
        if bounds[0] < bounds[1]:
            found.setdefault(bounds, []).append(glob.escape(name))
    return found
