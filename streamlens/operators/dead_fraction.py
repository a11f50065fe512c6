"""`dead_fraction`: the share of units that are zero for every example."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from reactivex import Observable
from torch import Tensor

from streamlens.errors import StreamlensError
from streamlens.frame import Frame, Kind
from streamlens.lens import Lens
from streamlens.nodes import stateful
from streamlens.operators._layout import UnitDimensions
from streamlens.operators._places import check_unit_dim
from streamlens.operators._raw_windows import Gathered, RawWindow, check_window
from streamlens.operators._tensors import tensors_of
from streamlens.operators._units import DeadFraction, alive_units
from streamlens.operators._windowed import StepWindows, Windowed
from streamlens.operators.statistics import reduction_operator
from streamlens.stream import Operator, Stream

__all__ = ["dead_fraction"]


def dead_fraction(
    topic: str | None = "activations", *, window: int | None = None, unit_dim: int | None = None
) -> Operator:
    """The share of a layer's units whose output is zero for every example and at every place.

    A unit of a ReLU that is zero for all there is passes no gradient and does not come back. A unit is a
    channel of an image or volume (outputs of four dimensions or more), else an entry of the last dimension.

    Without a window it is a reduction of each batch, computed in the module's hook, topic
    `activations.dead_fraction`: of each micro-step. With `window=n` a unit is dead only if it is zero
    throughout n steps in a row, aligned to step 0: topic `activations.dead_fraction.window<n>`, at the last.
    Few examples make any unit look dead now and then; a window tells those that are.

    Input: activations, or another raw topic, of any shape and dtype. Value: float32 in [0, 1]; NaN for an
    output without elements. NaN counts as alive. Select the layers that cut at zero, as in
    `lens.pipe(layers(nn.ReLU), dead_fraction())`: outputs of others are hardly ever exactly zero. The cost
    is one pass over the outputs; with a window, one truth value a unit is kept, and saved with the state.
    Nothing waits for a GPU. Source: Lu et al., Dying ReLU and Initialization, 2019.

    Args:
        topic: The topic; None takes the stream as it is.
        window: Steps in a window; each batch by itself unless given.
        unit_dim: The dimension that counts the units. Unless given, a Lens tells it by the module's class, as
            `saturation` does: 1 for `nn.Conv1d`, whose outputs are (N, C, L), and for a ReLU after it in an
            `nn.Sequential`. A stream that knows no model goes by the shape: there these need 1.

    Returns:
        The operator.

    Raises:
        TypeError: The topic is not a name.
        ValueError: An option out of range.
        StreamlensError: When applied, with a window: the stream carries numbers and not tensors.
    """
    operator = "dead_fraction"
    check_unit_dim(operator, unit_dim)
    if window is None:
        return _of_batches(topic, unit_dim, reduction_operator(DeadFraction(unit_dim), topic, operator))
    check_window(operator, window)
    steps = window

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        stream = tensors_of(source, topic, operator)

        def make() -> _Dead:
            return _Dead(stream, steps, unit_dim)

        result = stateful(stream, make, f"{operator}(window={steps})", marks=True, kind=Kind.STEP)
        return Windowed.of(result, StepWindows(steps, steps))

    return apply


def _of_batches(topic: str | None, unit_dim: int | None, by_shape: Operator) -> Operator:
    """The reduction of single batches, which knows the modules' units where there is a model."""

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        if not isinstance(source, Stream):
            return by_shape(source)
        topics = (topic,) if topic is not None else source.view.topics if isinstance(source, Lens) else ()
        reduction = DeadFraction(unit_dim, UnitDimensions.of_stream(source, unit_dim).of_topics(topics))
        return reduction_operator(reduction, topic, "dead_fraction")(source)

    return apply


class _Dead(RawWindow):
    """Keeps which units have been other than zero."""

    def __init__(self, stream: Stream, window: int, unit_dim: int | None) -> None:
        super().__init__(stream, "dead_fraction", window, f"dead_fraction.window{window}", unit_dim)

    def gather(self, held: Gathered | None, value: Tensor, unit_dim: int | None) -> Gathered:
        """The units that were alive before or are in this batch."""
        alive = alive_units(value, unit_dim)
        if held is None:
            return {"alive": alive}
        if held["alive"].shape != alive.shape:
            raise StreamlensError(
                f"dead_fraction(): an output had {held['alive'].numel()} units before, and "
                f"{alive.numel()} now: pass unit_dim=, the dimension that counts them"
            )
        return {"alive": held["alive"].to(alive.device) | alive}

    def finish(self, layers: Sequence[Gathered]) -> Tensor:
        """The shares of the others."""
        return torch.stack([1 - held["alive"].float().mean() for held in layers])
