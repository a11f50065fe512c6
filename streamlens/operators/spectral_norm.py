"""`spectral_norm` and `stable_rank`: the largest singular value of each layer, followed while it changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from reactivex import Observable
from torch import Tensor

from streamlens.frame import Frame
from streamlens.lens import Lens
from streamlens.nodes import Emitted, frame_operator, stateful
from streamlens.operators._base import OperatorNode, TopicKey, is_number, relabelled
from streamlens.operators._krylov import LargestSingularValues
from streamlens.operators._reductions import Norm, reduce_values
from streamlens.operators._spectrum import SpectralNorm, StableRank, largest_by_gram, matrix_of
from streamlens.operators._tensors import check_whole, tensors_of
from streamlens.operators.statistics import reduction_operator
from streamlens.reductions import Reduction
from streamlens.runtime import Runtime
from streamlens.stream import Operator

__all__ = ["spectral_norm", "stable_rank"]

_SMALL: Final = 64
"""Matrices whose shorter side is at most this are decomposed exactly, which costs no more."""


def spectral_norm(
    topic: str | None = None, *, exact: bool = False, tolerance: float = 1e-3, residual: bool = True
) -> Operator:
    """The spectral norm of each layer: its largest singular value, max |W x| / |x|.

    It bounds how much the layer can stretch its input; the product over layers bounds the network's
    Lipschitz constant.

    The input is raw frames; a tensor of two dimensions or more is the matrix (first dimension, rest), as
    a convolution kernel is (out, in x height x width); a vector is one column, so that of biases and
    the scales of norms it is the Euclidean norm (leave them out with `layers()`). The value is
    in the tensor's unit, at least 0, as topic `<topic>.spectral_norm`, float32 or float64 as the values are.

    It is exact (float64, through the Gram matrix) where the shorter side is at most 64. Larger matrices are
    followed by a block Krylov iteration with Rayleigh-Ritz, which starts from the vectors of the step before
    and a random one, and is repeated until the relative residual |W'W v - s^2 v| / s^2 is below `tolerance`;
    the error is of second order in it (1e-6 over 5,760 matrices of runs under AdamW, where 30 times another
    singular value became the largest). A direction unknown before that becomes the largest within a single
    step may be seen some steps late. The residuals come as topic
    `<topic>.spectral_norm.residual` (0 where exact), right after the values. `exact=True` decomposes every
    matrix at every step.

    The cost on a warm start is 4 products of the matrix with 12 vectors in two passes over it, mostly once a
    step: a fiftieth of the decomposition for 1024 x 1024 (a sixth at the first step). Vectors and the private
    generator are saved with the lens's state. On a GPU nothing waits for the larger matrices: it takes 12
    rounds at first and 2 a step then, whatever the residual, which tells if that was enough (small ones, and
    `exact=True`, use the eigensolvers of PyTorch, which wait). A tensor that is not finite gives NaN and
    leaves the vectors as they are; one without elements gives 0.

    Args:
        topic: The topic to select, such as `"weights"`; the stream as it is unless given.
        exact: Decompose.
        tolerance: The relative residual to reach.
        residual: Give the residuals too.

    Returns:
        The operator.

    Raises:
        TypeError: The topic is not a name.
        ValueError: The tolerance is not between 0 and 1.
        StreamlensError: When applied: the stream carries numbers and not tensors.
    """
    _check_tolerance("spectral_norm", tolerance)
    if exact:
        return tensor_reduction(SpectralNorm(), topic, "spectral_norm")

    def values(frame: Frame, _: Mapping[str, Tensor], norms: Tensor, residuals: Tensor) -> list[Frame]:
        out = [relabelled(frame, f"{frame.topic}.spectral_norm", norms)]
        if residual:
            out.append(relabelled(frame, f"{frame.topic}.spectral_norm.residual", residuals))
        return out

    return _followed(values, topic, "spectral_norm", tolerance, "" if residual else "residual=False")


def stable_rank(topic: str | None = None, *, exact: bool = False, tolerance: float = 1e-3) -> Operator:
    """The stable rank of each layer: the squared Frobenius norm over the squared spectral norm.

    |W|_F^2 / |W|_2^2, the sum of the squared singular values over the largest of them (Rudelson & Vershynin
    2007): without unit, at least 1 and at most the rank, whose robust relative it is; it falls as a few
    directions take over. Unchanged when W is scaled. The result is topic `<topic>.stable_rank`.

    Input, method, cost, state and GPUs are as for `spectral_norm`, with one pass over the tensor for the
    Frobenius norm. A vector's is 1; a tensor of zeros or without elements, and one that is not finite,
    gives NaN.

    Args:
        topic: The topic to select, such as `"weights"`; the stream as it is unless given.
        exact: Decompose.
        tolerance: The relative residual to reach.

    Returns:
        The operator.

    Raises:
        TypeError: The topic is not a name.
        ValueError: The tolerance is not between 0 and 1.
        StreamlensError: When applied: the stream carries numbers and not tensors.
    """
    _check_tolerance("stable_rank", tolerance)
    if exact:
        return tensor_reduction(StableRank(), topic, "stable_rank")

    def values(frame: Frame, matrices: Mapping[str, Tensor], norms: Tensor, _: Tensor) -> list[Frame]:
        frobenius = reduce_values(tuple(matrices.values()), Norm(2.0))
        ranks = (frobenius / norms).square().masked_fill_(norms == 0, math.nan)
        return [relabelled(frame, f"{frame.topic}.stable_rank", ranks)]

    return _followed(values, topic, "stable_rank", tolerance, "")


def tensor_reduction(reduction: Reduction, topic: str | None, operator: str) -> Operator:
    """A reduction that needs whole tensors, and says so where they are numbers already."""
    reduce = reduction_operator(reduction, None, operator)

    def checked(frame: Frame) -> Frame:
        check_whole(frame, operator)
        return frame

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        stream = tensors_of(source, topic, operator)
        return reduce(stream if isinstance(stream, Lens) else frame_operator(stream, checked, "tensors"))

    return apply


_Results = Callable[[Frame, Mapping[str, Tensor], Tensor, Tensor], list[Frame]]


def _followed(
    results: _Results, topic: str | None, operator: str, tolerance: float, options: str
) -> Operator:
    given = [o for o in ("" if tolerance == 1e-3 else f"tolerance={tolerance:g}", options) if o]
    plan = f"{operator}({', '.join(given)})"

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        stream = tensors_of(source, topic, operator)
        return stateful(stream, lambda: _Followed(stream.runtime, results, operator, tolerance), plan)

    return apply


class _Followed(OperatorNode):
    """Keeps each topic's vectors from one frame to the next."""

    def __init__(self, runtime: Runtime, results: _Results, operator: str, tolerance: float) -> None:
        super().__init__(runtime)
        self._results = results
        self._operator = operator
        self._tolerance = tolerance
        self._topics: dict[TopicKey, LargestSingularValues] = {}

    def on_frame(self, frame: Frame) -> Emitted:
        check_whole(frame, self._operator)
        if not frame.layers:
            return None
        matrices = {name: matrix_of(value) for name, value in frame.items()}
        small = {name: m for name, m in matrices.items() if min(m.shape) <= _SMALL}
        large = {name: m for name, m in matrices.items() if name not in small}
        found: dict[str, Tensor] = dict(zip(small, largest_by_gram(tuple(small.values())), strict=True))
        residuals: dict[str, Tensor] = {}
        if large:
            key = (frame.source, frame.topic)
            follow = self._topics.get(key)
            if follow is None:
                follow = self._topics[key] = LargestSingularValues(self._tolerance)
            values, errors = follow(large)
            found.update(zip(large, values, strict=True))
            residuals.update(zip(large, errors, strict=True))
        norms = torch.stack([found[name] for name in matrices])
        # Exact ones have no residual: 0, or NaN where the value is.
        errors = torch.stack([residuals.get(n, found[n] - found[n]).to(norms) for n in matrices])
        self.count_finite(norms.isfinite())
        double = any(m.dtype in (torch.float64, torch.complex128) for m in matrices.values())
        dtype = torch.float64 if double else torch.float32
        return self._results(frame, matrices, norms.to(dtype), errors.to(dtype))

    def state_dict(self) -> dict[str, Any]:
        return {
            "topics": [
                {"source": source, "topic": topic, **follow.state_dict()}
                for (source, topic), follow in self._topics.items()
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._topics = {}
        for saved in state["topics"]:
            follow = self._topics[saved["source"], saved["topic"]] = LargestSingularValues(self._tolerance)
            follow.load_state_dict(saved)


def _check_tolerance(operator: str, tolerance: object) -> None:
    number = is_number(tolerance)
    if not number or not 0 < float(tolerance) < 1:  # type: ignore[arg-type] # a number, as just checked
        raise ValueError(
            f"{operator}(tolerance={tolerance!r}): a relative residual between 0 and 1, such as 1e-3"
        )
