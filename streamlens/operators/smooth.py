"""`smooth`: a Gaussian moving average over steps."""

from __future__ import annotations

from reactivex import Observable
from torch import Tensor

from streamlens.frame import Frame
from streamlens.nodes import stateful
from streamlens.operators._base import checked_source
from streamlens.operators._kernel import KernelNode, check_sigma
from streamlens.stream import Operator

__all__ = ["smooth"]


def _mean(values: Tensor, weights: Tensor, _: Tensor) -> Tensor:
    return (values * weights).sum(0) / weights.sum(0)


def smooth(sigma: float) -> Operator:
    """A Gaussian moving average over steps, of the past only.

    The value at step s is the mean of the layer's values at steps r <= s with weights
    exp(-(s - r)^2 / (2 sigma^2)), cut off at 4 sigma. It looks back only, so that it is there at once
    and can be joined to other topics of its step; the price is a lag of about 0.8 sigma steps.
    Weights follow the distance in steps, so that a missing step does not shift the others, and are
    normalised to what is there, so that the beginning is not pulled towards zero.

    The result is topic `<topic>.smooth`, a frame for each frame. NaN and inf are left out and
    counted; a layer without any finite value in reach gives NaN. On a Lens, micro-step frames are
    averaged over their step first. The cost is 4 sigma kept frames (raw ones are copied), one stack
    of them and a few tensor operations a frame; `ema` does it with one kept value.

    Args:
        sigma: The standard deviation of the kernel in steps, above 0.

    Returns:
        The operator.

    Raises:
        ValueError: Sigma is not a positive number.
    """
    width = check_sigma("smooth", sigma)

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        stream = checked_source(source)

        def make() -> KernelNode:
            return KernelNode(stream.runtime, width, _mean, lambda name: f"{name}.smooth")

        return stateful(stream, make, f"smooth({width:g})", per_step=True)

    return apply
