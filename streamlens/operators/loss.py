"""`loss`: the watched loss of each step."""

from __future__ import annotations

from reactivex import Observable

from streamlens.frame import Frame
from streamlens.operators.per_step import per_step
from streamlens.operators.selection import topic
from streamlens.stream import Operator

__all__ = ["loss"]


def loss() -> Operator:
    """The loss of each step: that of its micro-batches, averaged.

    The loss is what `observe(model, loss=criterion)` or `lens.watch_loss(function)` watches, or what the
    model's output carries as `.loss`, as it was computed: before whatever the loop divides it by, and before
    the update. Each micro-batch counts alike, as it does in the accumulated gradient. Several watched
    losses are a component each.

    Input: topic `loss`, of a Lens or any stream. The result is topic `loss` of the layer `""`, the model,
    one frame a step, in the loss's unit: float32, or float64 where the loss is. A NaN makes the step's
    loss NaN. The cost is an addition a micro-step; nothing waits for a GPU. Streams that come from no lens
    give a step when a later one comes, as `per_step` does.

    Returns:
        The operator.

    Raises:
        UnknownTopicError: When applied to a Lens that has other topics selected. While training, reported
            once: no loss came.
    """

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        return per_step()(topic("loss")(source))

    return apply
