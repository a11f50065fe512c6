"""What metrics share that evaluate the model itself: when, on which model, and without a trace.

Such a metric writes a `ModelNode` with one method, `evaluate(model, frame)`, and applies it with
`on_model`. On a Lens with no topic selected it is due at each update of the lens's cadence, as in
`lens.pipe(every(500), hessian_eigenvalues(...))`; on any other stream at each frame, as in
`lens.pipe(topic("epoch_finished"), test_accuracy(loader))`. One that goes through a whole data set is
due at the end of each epoch unless it is told otherwise (`due_per_epoch`).
"""

from __future__ import annotations

import contextlib
import random
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from reactivex import Observable
from torch import nn

from streamlens.capture.sharded import fsdp_parameters, is_dtensor
from streamlens.errors import ClosedLensError, StreamlensError
from streamlens.frame import Frame
from streamlens.lens import Lens
from streamlens.nodes import Emitted, stateful
from streamlens.operators._base import OperatorNode, is_whole
from streamlens.operators._isolated import unwrapped
from streamlens.operators.selection import every as keep_every
from streamlens.stream import Stream, as_stream

__all__ = [
    "FindModel",
    "ModelNode",
    "check_every",
    "due_per_epoch",
    "evaluating",
    "on_model",
    "undisturbed",
]

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


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode, without gradients; `undisturbed` puts the modes back.

    Modes are set by their flags: a model's own `train()` may do more, such as merging adapters into the
    weights, and undoing that would not give the same bits. What is compiled runs as it is written, since
    compiling it for evaluation counts against the number of times it may be compiled for training.
    What only wraps a model (data parallelism, `torch.compile`) is left out: no rank waits for another.

    Args:
        model: The model.

    Yields:
        What to call.
    """
    for module in model.modules():
        module.training = False
    with contextlib.ExitStack() as stack:
        # Not inference mode: what the model keeps from one call to the next must stay good for training.
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield unwrapped(model)


class ModelNode(OperatorNode):
    """A node that evaluates the model, at most once a step.

    Args:
        stream: The stream whose frames say when.
        find: Gives the model.
    """

    operator = "a metric of the model"
    """The operator's name, for messages; `on_model` sets it."""

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
        """Evaluate, unless the step has been evaluated already or the model is gone.

        Raises:
            StreamlensError: The model has been sharded since the metric was applied.
        """
        model = self._find()
        if model is None or frame.step == self._last:
            return None
        self._last = frame.step
        _check_unsharded(self.operator, model)
        silence = self._lens.paused() if self._lens is not None else contextlib.nullcontext()
        with silence, undisturbed(model):
            return self.evaluate(model, frame)


def check_every(operator: str, every: int | None) -> None:
    """Raise unless a cadence is a number of steps, or left out.

    Raises:
        ValueError: It is something else.
    """
    if every is not None and (not is_whole(every) or every < 1):
        raise ValueError(f"{operator}(every={every!r}): a number of steps from 1 on, or None")


def _check_unsharded(operator: str, model: nn.Module) -> None:
    """Raise unless this process can evaluate the model by itself.

    The forward of a sharded model is a collective: where one rank alone is due, it would wait for the others
    for ever.

    Raises:
        StreamlensError: It cannot.
    """
    gathered = next((name for _, name in fsdp_parameters(model)), None)
    spread = (name for name, p in model.named_parameters() if is_dtensor(p) or is_dtensor(p.data))
    name = next(spread, gathered)
    if name is not None:
        raise StreamlensError(
            f"{operator}() evaluates the model on this process alone, and parameter {name!r} is sharded over "
            "processes, whose forward would wait for all of them: evaluate the model in the training loop, "
            f"on every rank, and give the result to lens.emit({operator!r}, value), or pass "
            f"{operator}(..., model=) a copy that is whole on this process"
        )


def due_per_epoch(source: Observable[Frame], every: int | None) -> Observable[Frame]:
    """When a metric that goes through a data set is due.

    On a Lens with no topic selected that is at the updates of steps divisible by `every`, or of the
    lens's own cadence if it was given one, else at the end of each epoch. Another stream says by its frames
    when; `every` chooses among them by their steps.

    Args:
        source: A Lens or a stream.
        every: The cadence, in steps.
    """
    if isinstance(source, Lens) and not source.topics:
        if every is None and source.view.every == 1:
            return _of_the_whole(source, "epoch_finished")
        source = _of_the_whole(source, "update_finished")
    return source if every is None else keep_every(every)(source)


def _of_the_whole(lens: Lens, topic: str) -> Lens:
    """A topic of the clock, which belongs to no layer."""
    return Lens(lens.source, lens.session, replace(lens.view, selectors=())).narrow(topics=(topic,))


def on_model(
    source: Observable[Frame],
    make: Callable[[Stream, FindModel], ModelNode],
    plan: str,
    *,
    operator: str,
    model: nn.Module | None = None,
    check: Callable[[nn.Module], None] | None = None,
    of_layers: str | None = "it has no part for some layers",
) -> Stream:
    """Apply a metric of the model.

    Args:
        source: A Lens, or a stream whose frames say when.
        make: Makes the node of a new subscription from the stream and the model's finder.
        plan: The operator as it shows in the plan.
        operator: The operator's name, for messages.
        model: The model, where the stream comes from no lens; held weakly.
        check: Raises if the metric cannot be taken of the model, so that this shows when it is applied.
        of_layers: What to do for some layers only, for the message to who narrowed the lens to them; None
            where the metric has a value for each layer, and its maker has asked the lens for which.

    Returns:
        The stream of its results.

    Raises:
        StreamlensError: No model is known, it is sharded over processes, or the lens was narrowed to some
            layers.
        TypeError: `model` is none.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"{operator}(model=...) takes an nn.Module, got {type(model).__name__}")
    stream = as_stream(source)
    if isinstance(stream, Lens) and not stream.topics:
        if stream.view.selectors and of_layers is not None:
            raise StreamlensError(
                f"{operator}() is of the whole model, and this lens was narrowed by layers(): {of_layers}; "
                "leave layers() out"
            )
        stream = _of_the_whole(stream, "update_finished")
    stream.check_subscribable()
    find = _finder(stream, operator, model)
    found = find()
    if found is not None:
        _check_unsharded(operator, found)
        if check is not None:
            check(found)

    def node() -> ModelNode:
        made = make(stream, find)
        made.operator = operator
        return made

    return stateful(stream, node, plan, raw=False)


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
