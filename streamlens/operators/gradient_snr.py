"""`gradient_snr`: how much of a gradient is signal, and how much noise from step to step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from reactivex import Observable
from torch import Tensor

from streamlens.frame import Frame
from streamlens.nodes import Emitted
from streamlens.operators._base import is_number, relabelled
from streamlens.operators._gradients import GradientState, following
from streamlens.operators._tensors import PARAMETERS, Due, check_of, pieces_of, wide
from streamlens.runtime import Runtime
from streamlens.stream import Operator

__all__ = ["gradient_snr"]


def gradient_snr(decay: float = 0.9, *, of: str = "weights") -> Operator:
    """The signal-to-noise ratio of each layer's gradient: |mean| over standard deviation, over steps.

    Element by element |E g| / sigma(g) (Rainforth et al. 2018, eq. 5), averaged over the layer's
    elements; mean and variance are over the last steps, weighted by decay^age. Above 1 steps agree on where
    to go; near 0 they cancel. The weights are normalised from the first step on and the variance is unbiased
    (divided by 1 - the sum of their squares). Noise alone gives about sqrt((1 - decay) / (1 + decay)) times
    0.8, a fifth for 0.9: what is not above it is no signal.

    The input is raw `weight_gradients`, which a Lens selects itself, of any shape; the value, topic
    `gradient_snr` (`gradient_snr.biases`, `gradient_snr.parameters`), has no unit, is at least 0, and comes
    from a layer's second gradient on (on a GPU its first gives NaN). Elements whose gradient has not varied
    (mostly because it is zero) are left out; NaN where all are. A gradient with an element that is not finite
    is counted and left out as a whole.

    Every step's gradient is taken in: on a Lens a cadence in front of the operator, `every(10)`, only chooses
    the steps that are given; on another stream put it behind. The cost is two copies of the gradients' size
    kept (and saved), six passes over them a step, in pieces that fit the cache, and seven where given;
    nothing waits for a GPU.

    Args:
        decay: The weight of the past: about 1 / (1 - decay) steps are remembered.
        of: `"weights"`, `"biases"` or `"parameters"`.

    Returns:
        The operator.

    Raises:
        ValueError: A decay outside (0, 1), or an unknown kind of parameters.
        StreamlensError: When applied: the stream carries numbers and not tensors.
    """
    number = is_number(decay)
    if not number or not 0 < decay < 1:
        raise ValueError(f"gradient_snr({decay!r}): the decay lies between 0 and 1, such as 0.9")
    topic = PARAMETERS[check_of("gradient_snr", of)][0]
    name = "gradient_snr" if of == "weights" else f"gradient_snr.{of}"

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        def make(runtime: Runtime, due: Due) -> GradientState:
            return _Snr(runtime, due, float(decay), name)

        return following(source, topic, "gradient_snr", f"gradient_snr({decay:g}, of={of!r})", make)

    return apply


class _Snr(GradientState):
    """Weighted mean and variance after West (1979): no difference of large numbers is taken."""

    def __init__(self, runtime: Runtime, due: Due, decay: float, topic: str) -> None:
        super().__init__(runtime, due, "gradient_snr", ("mean", "variance"))
        self._decay = decay
        self._topic = topic

    def take(self, layers: Sequence[str], gradients: list[Tensor]) -> None:
        for name, gradient in zip(layers, gradients, strict=True):
            # The newest one's share of all weights so far.
            share = (1 - self._decay) / (1 - self._decay ** wide(self.taken[name]).clamp(min=1))
            share = share.to(gradient.dtype)
            held = (self.tensors["mean"][name], self.tensors["variance"][name])
            for new, mean, variance in pieces_of(gradient, *held):
                deviation = new - mean
                part = deviation * share
                mean.add_(part)
                variance.addcmul_(deviation, part).mul_(1 - share)

    def results(self, frame: Frame) -> Emitted:
        values: list[Tensor] = []
        layers = frame.layers
        if all(self.taken[name].device.type == "cpu" for name in layers):
            layers = tuple(name for name in layers if self.taken[name] >= 2)
        for name in layers:
            total = count = torch.zeros((), device=self.taken[name].device)
            for mean, variance in pieces_of(self.tensors["mean"][name], self.tensors["variance"][name]):
                varied = variance > 0
                # One over infinity is the nothing that elements without a variance count.
                sizes = torch.where(varied, variance, math.inf).rsqrt_().mul_(mean).abs_()
                total = total + wide(sizes.sum())
                count = count + varied.sum()
            average = total / count
            values.append(average * self._squares(wide(self.taken[name])).neg().add(1).sqrt())
        if not values:
            return None
        double = any(self.tensors["mean"][name].dtype is torch.float64 for name in layers)
        stacked = torch.stack(values).to(torch.float64 if double else torch.float32)
        return relabelled(frame, self._topic, stacked, layers=layers)

    def _squares(self, taken: Tensor) -> Tensor:
        """The sum of the squares of the normalised weights of so many gradients."""
        b = self._decay
        return (1 - b) / (1 + b) * (1 + b**taken) / (1 - b**taken)
