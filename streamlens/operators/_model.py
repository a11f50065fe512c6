"""What metrics share that evaluate the model itself: when, on which model, and without a trace.

Such a metric writes a `ModelNode` with one method, `evaluate(model, frame)`, and applies it with
`on_model`. On a Lens with no topic selected it is due at each update of the lens's cadence, as in
`lens.pipe(every(500), hessian_eigenvalues(...))`; on any other stream at each frame, as in
`lens.pipe(topic("epoch_finished"), test_accuracy(loader))`.
"""

from __future__ import annotations

import contextlib
import random
import weakref
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import torch
from reactivex import Observable
from torch import nn

from streamlens.errors import ClosedLensError, StreamlensError
from streamlens.frame import Frame
from streamlens.lens import Lens
from streamlens.nodes import Emitted, stateful
from streamlens.operators._base import OperatorNode
from streamlens.stream import Stream, as_stream

__all__ = ["FindModel", "ModelNode", "on_model", "undisturbed"]

FindModel: TypeAlias = Callable[[], nn.Module | None]
"""Gives the model while it exists: nothing here keeps one alive."""


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave no trace of what the block does with a model, beside what it writes into it.

    Afterwards each module is in the mode it was in, and the generators of torch (on the CPU and on
    the model's devices), NumPy and Python are where they were.

    Args:
        model: The model that is evaluated.
    """
    modes = {module: module.training for module in model.modules()}
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
        for module, mode in modes.items():
            module.training = mode


class ModelNode(OperatorNode):
    """A node that evaluates the model, at most once a step.

    Args:
        stream: The stream whose frames say when.
        find: Gives the model.
    """

    def __init__(self, stream: Stream, find: FindModel) -> None:
        super().__init__(stream.runtime)
        self._find = find
        self._lens = stream.lens
        self._last = -1

    def evaluate(self, model: nn.Module, frame: Frame) -> Emitted:
        """What the metric gives for the model as it is at a frame; `relabelled` makes the result.

        Args:
            model: The observed model itself: read it, copy it, run it, but change nothing.
            frame: Says when.
        """
        raise NotImplementedError

    def on_frame(self, frame: Frame) -> Emitted:
        """Evaluate, unless the step has been evaluated already or the model is gone."""
        model = self._find()
        if model is None or frame.step == self._last:
            return None
        self._last = frame.step
        silence = self._lens.paused() if self._lens is not None else contextlib.nullcontext()
        with silence, undisturbed(model):
            return self.evaluate(model, frame)


def on_model(
    source: Observable[Frame],
    make: Callable[[Stream, FindModel], ModelNode],
    plan: str,
    *,
    operator: str,
    model: nn.Module | None = None,
    check: Callable[[nn.Module], None] | None = None,
    of_layers: str = "it has no part for some layers",
) -> Stream:
    """Apply a metric of the model.

    Args:
        source: A Lens, or a stream whose frames say when.
        make: Makes the node of a new subscription from the stream and the model's finder.
        plan: The operator as it shows in the plan.
        operator: The operator's name, for messages.
        model: The model, where the stream comes from no lens; held weakly.
        check: Raises if the metric cannot be taken of the model, so that this shows when it is applied.
        of_layers: What to do for some layers only, for the message to who narrowed the lens to them.

    Returns:
        The stream of its results.

    Raises:
        StreamlensError: No model is known, or the lens was narrowed to some layers.
        TypeError: `model` is none.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"{operator}(model=...) takes an nn.Module, got {type(model).__name__}")
    stream = as_stream(source)
    if isinstance(stream, Lens) and not stream.topics:
        if stream.view.selectors:
            raise StreamlensError(
                f"{operator}() is of the whole model, and this lens was narrowed by layers(): {of_layers}; "
                "leave layers() out"
            )
        stream = stream.narrow(topics=("update_finished",))
    stream.check_subscribable()
    find = _finder(stream, operator, model)
    found = find()
    if check is not None and found is not None:
        check(found)
    return stateful(stream, lambda: make(stream, find), plan, raw=False)


def _finder(stream: Stream, operator: str, model: nn.Module | None) -> FindModel:
    if model is not None:
        return weakref.ref(model)
    if stream.lens is None:
        raise StreamlensError(
            f"{operator}() needs the model, and this stream comes from no lens: apply it to what observe() "
            f"returned, or pass {operator}(..., model=model)"
        )
    found = stream.lens.source.model
    if found is None and not stream.lens.source.of_model:
        raise StreamlensError(
            f"{operator}() needs the model, and {stream.lens.source.title} has none: pass "
            f"{operator}(..., model=model), or apply it to what observe() returns"
        )
    if found is None:
        raise ClosedLensError(f"{operator}(): the model that this lens observed no longer exists")
    return weakref.ref(found)
