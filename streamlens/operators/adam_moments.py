"""`adam_moments`: the moments that Adam would keep of any optimizer's gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from reactivex import Observable
from torch import Tensor

from streamlens.frame import Frame
from streamlens.nodes import Emitted
from streamlens.operators._base import is_number, relabelled
from streamlens.operators._gradients import GradientState, following
from streamlens.operators._merge import merged
from streamlens.operators._summaries import STATISTICS, check_statistics, summaries
from streamlens.operators._tensors import PARAMETERS, Due, check_of, wide
from streamlens.operators.effective_lr import effective_lr
from streamlens.operators.selection import where
from streamlens.runtime import Runtime
from streamlens.stream import Operator, as_stream

__all__ = ["adam_moments"]

_MOMENTS: Final = {"exp_avg": "grad_mean_estimate", "exp_avg_sq": "grad_var_estimate"}


def adam_moments(
    beta1: float = 0.9,
    beta2: float = 0.999,
    *,
    of: str = "weights",
    statistics: Sequence[str] = STATISTICS,
) -> Operator:
    """Adam's moments of any optimizer's gradients, and the effective learning rate, a layer.

    First and second moment, m <- beta1 m + (1 - beta1) g and v <- beta2 v + (1 - beta2) g^2, as they
    are kept (`biased_`) and divided by 1 - beta^t (Kingma & Ba 2015); and the effective learning rate
    (W_{k-1} - W_k) / g (see `effective_lr`). Of each the mean, median, variance (unbiased) and norm of the
    layer's elements: twenty topics,

        biased_grad_mean_estimate_mean, ..._median, ..._var, ..._norm
        biased_grad_var_estimate_mean, ...      grad_mean_estimate_mean, ...
        grad_var_estimate_mean, ...             effective_lr_mean, ...

    with `.biases` or `.parameters` appended where they are not of the weights. The last four are what
    `effective_lr()` gives: a sink that has both is given the same numbers twice, which is an error; leave
    that one out there, or `rename()` it. With Adam itself and its
    betas, watched from its first step on, they are its own state.

    The moments take in the gradient of every step. On a Lens a cadence in front of the operator,
    `lens.pipe(every(10), adam_moments())`, and `between()`, therefore only choose the steps that are given:
    the gradients between them are still taken, the effective learning rate is computed only where given.
    On another stream the moments are of the frames that come: put `every()` behind.

    Moments have the unit of the gradient, or its square; the variances, the square of that.
    The input is raw `weight_gradients` and `weight_updates`, which a Lens selects itself, of any shape. t
    counts a layer's gradients since it was first seen. A gradient with a NaN or an infinite element is
    counted and left out as a whole (as an optimizer under a gradient scaler leaves it out): moments and t
    stay as they are. The cost at each step is two copies of the gradients' size kept (and saved), and three
    passes over them; where given, two passes for each moment's mean, variance and norm and a selection
    for its median, shared between biased and corrected; nothing waits for a GPU. Without `"median"`
    it is much cheaper.

    Args:
        beta1: The decay of the first moment.
        beta2: The decay of the second.
        of: `"weights"`, `"biases"` or `"parameters"`.
        statistics: Which of `"mean"`, `"median"`, `"var"` and `"norm"`.

    Returns:
        The operator.

    Raises:
        ValueError: A decay outside [0, 1), an unknown statistic or kind of parameters.
        StreamlensError: When applied: the stream carries numbers and not tensors.
    """
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        number = is_number(beta)
        if not number or not 0 <= beta < 1:
            raise ValueError(f"adam_moments({name}={beta!r}): a decay from 0 to below 1, such as 0.9")
    if isinstance(statistics, str):
        statistics = (statistics,)
    names = check_statistics("adam_moments", statistics)
    gradients = PARAMETERS[check_of("adam_moments", of)][0]
    suffix = "" if of == "weights" else f".{of}"
    plan = f"adam_moments({beta1:g}, {beta2:g}, of={of!r}, statistics={list(names)})"

    def make(runtime: Runtime, due: Due) -> GradientState:
        return _Moments(runtime, due, (float(beta1), float(beta2)), names, suffix)

    def moments(source: Observable[Frame]) -> Observable[Frame]:
        return following(source, gradients, "adam_moments", plan, make)

    def rates(source: Observable[Frame]) -> Observable[Frame]:
        found = effective_lr(*names, of=of)(source)
        return where(_is_of_the_twenty)(found)

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        return merged(source, (moments, rates), (*as_stream(source).plan, plan))

    return apply


def _is_of_the_twenty(frame: Frame) -> bool:
    return not frame.topic.startswith("effective_lr_zero_gradients")


class _Moments(GradientState):
    def __init__(
        self, runtime: Runtime, due: Due, betas: tuple[float, float], statistics: Sequence[str], suffix: str
    ) -> None:
        super().__init__(runtime, due, "adam_moments", tuple(_MOMENTS))
        self._betas = betas
        self._statistics = statistics
        self._suffix = suffix

    def take(self, layers: Sequence[str], gradients: list[Tensor]) -> None:
        (first, second), (beta1, beta2) = self.tensors.values(), self._betas
        squares = [second[name] for name in layers]
        torch._foreach_lerp_([first[name] for name in layers], gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)

    def results(self, frame: Frame) -> Emitted:
        out: list[Frame] = []
        for (key, name), beta in zip(_MOMENTS.items(), self._betas, strict=True):
            held = [self.tensors[key][layer] for layer in frame.layers]
            taken = torch.stack([self.taken[layer].to(held[0].device) for layer in frame.layers])
            correction = 1 - beta ** wide(taken)
            dtype = torch.float64 if any(t.dtype is torch.float64 for t in held) else torch.float32
            for statistic, values in summaries(held, self._statistics).items():
                # A variance scales with the square; everything else as the elements do.
                below = correction.square() if statistic == "var" else correction
                topic = f"{name}_{statistic}{self._suffix}"
                out.append(relabelled(frame, f"biased_{topic}", values.to(dtype)))
                out.append(relabelled(frame, topic, (wide(values) / below).to(dtype)))
        return out
