"""`effective_lr`: the learning rate that each element has had, whatever the optimizer made of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from reactivex import Observable

from streamlens.frame import Frame
from streamlens.nodes import frame_operator
from streamlens.operators._base import relabelled
from streamlens.operators._summaries import check_statistics, summary_without_zeros
from streamlens.operators._tensors import PARAMETERS, check_of, check_whole, dense, tensors_of
from streamlens.operators.align import AlignedFrame, align
from streamlens.stream import Operator

__all__ = ["effective_lr"]


def effective_lr(*statistics: str, of: str = "weights") -> Operator:
    """The effective learning rate of each layer: element by element, the step taken over the gradient.

    (W_{k-1} - W_k) / g_k, summed up by `"median"` (the default), `"mean"`, `"var"` (unbiased) or `"norm"`,
    one topic each: `effective_lr_median` and the like (`effective_lr_median.biases` where it is not of the
    weights). For plain gradient descent every element is the learning rate; for Adam it is lr m / (sqrt(v)
    + eps) / g; weight decay counts as what it does. Elements move against their gradient where it
    is positive.

    Elements with a gradient of zero have none: they are left out, and counted in topic
    `effective_lr_zero_gradients`. Few gradients that are almost zero make mean, variance and norm large: the
    median is the one to look at. A layer whose gradients are all zero gives NaN (norm 0); NaN in an update or
    a gradient gives NaN.

    The input is the raw gradients and updates of one step, `weight_gradients` and `weight_updates`, which a
    Lens selects by itself; the unit is that of the learning rate. The cost is one division and a count an
    element, a copy of those left where gradients are zero, and a pass for mean, variance and norm each; the
    median selects. It needs the copy that updates are
    computed from. Where the optimizer overwrites gradients (SGD with Nesterov momentum, with
    `foreach=True`) the first step is lost, and from then on they are copied. Nothing waits for a GPU.

    Args:
        *statistics: Which; the median unless given.
        of: `"weights"`, `"biases"` or `"parameters"`.

    Returns:
        The operator.

    Raises:
        ValueError: An unknown statistic or kind of parameters.
        StreamlensError: When applied: the stream carries numbers and not tensors.
    """
    names = check_statistics("effective_lr", statistics or ("median",))
    gradients, updates = PARAMETERS[check_of("effective_lr", of)]
    suffix = "" if of == "weights" else f".{of}"
    inputs = [partial(tensors_of, topic=topic, operator="effective_lr") for topic in (updates, gradients)]
    plan = f"effective_lr({', '.join(map(repr, names))}{'' if of == 'weights' else f', of={of!r}'})"

    def summed_up(aligned: Frame) -> list[Frame]:
        return _summed_up(cast("AlignedFrame", cast("object", aligned)), names, suffix)

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        return frame_operator(align(*inputs)(source), summed_up, plan, raw=False)

    return apply


def _summed_up(aligned: AlignedFrame, statistics: Sequence[str], suffix: str) -> list[Frame]:
    for frame in aligned.frames:
        check_whole(frame, "effective_lr")
    updates, divisors = ([dense(v) for v in frame.values] for frame in aligned.frames)
    rates = [update.neg().div_(divisor) for update, divisor in zip(updates, divisors, strict=True)]
    found, zeros = summary_without_zeros(rates, divisors, statistics)
    double = any(rate.dtype is torch.float64 for rate in rates)
    out = {f"effective_lr_{n}": v.to(torch.float64 if double else torch.float32) for n, v in found.items()}
    out["effective_lr_zero_gradients"] = zeros
    frame = aligned.frames[0]
    return [relabelled(frame, name + suffix, values) for name, values in out.items()]
