"""The hooks on parts of the model, on outputs and on parameters, that a pass is watched through."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from streamlens.capture.hooks import Hook
from streamlens.capture.traced import trace_begin, trace_end, trace_output

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine

__all__ = [
    "HOOKS",
    "AccumulateHook",
    "BackwardHook",
    "GradientHook",
    "ModuleHook",
    "PartBegins",
    "PartEnds",
    "after_backward",
]


class ModuleHook(Hook):
    """Forward hook of a module whose output somebody wants.

    Args:
        engine: Of the model.
        name: The module's name.
        gradient: Whether the gradient of the output is wanted.
    """

    __slots__ = ("engine", "gradient", "name", "output")

    def __init__(self, engine: Engine, name: str, *, gradient: bool) -> None:
        self.engine = engine
        self.name = name
        self.output = engine.compiled.key("output", name)
        self.gradient = engine.compiled.key("gradient", name) if gradient else ""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """The module has returned."""
        if torch.compiler.is_compiling():
            trace_output(self.output, self.gradient, output)
            return
        forward, passes = self.engine.forward, self.engine.passes
        # What is wanted at other steps only has its hook all the time.
        wanted = forward.plan is not None and self.name in forward.plan.taken
        if wanted and passes.in_forward and not passes.elsewhere():
            self.engine.guard(forward.output_of, self.name, output)


class PartBegins(Hook):
    """Forward pre-hook of a part, which may be the outermost module that is called."""

    __slots__ = ("begin", "engine", "name")

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name
        self.begin = engine.compiled.key("begin", name)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The part is called."""
        if torch.compiler.is_compiling():
            trace_begin(self.begin, args, kwargs)
            return
        passes = self.engine.passes
        if passes.elsewhere():
            return
        if passes.in_forward:
            if self.engine.forward.opener != self.name or not passes.abandoned(module):
                return
        elif passes.outside is not None:
            return
        self.engine.guard(passes.forward_begins, module, self.name, args, kwargs)


class PartEnds(Hook):
    """Forward hook of a part; does something only if that part began the forward."""

    __slots__ = ("backward", "begin", "end", "engine", "name")

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name
        key = engine.compiled.key
        self.begin, self.end, self.backward = key("begin", name), key("end", name), key("backward", name)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """The part has returned, or raised."""
        if torch.compiler.is_compiling():
            trace_end(self.end, self.begin, self.backward, output)
            return
        passes = self.engine.passes
        if passes.elsewhere():
            return
        if passes.outside == self.name:
            passes.outside = None
        elif self.engine.forward.opener == self.name and passes.in_forward:
            self.engine.guard(passes.forward_ends, output)


class GradientHook:
    """Hook of a module's output; must not hold that output, or autograd would keep both."""

    __slots__ = ("engine", "key", "name", "passes", "place")

    def __init__(self, engine: Engine, name: str, key: str, passes: int, place: int) -> None:
        self.engine = engine
        self.name = name
        self.key = key
        self.passes = passes
        self.place = place

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        """The gradients of the node have been computed."""
        engine = self.engine
        gradient = gradients[self.place]
        if gradient is not None and not engine.closed:
            engine.guard(engine.forward.gradient_of, self.name, self.key, self.passes, gradient)


class AccumulateHook(Hook):
    """Hook of a parameter whose raw gradient somebody wants: a backward is running."""

    __slots__ = ("engine",)

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, parameter: Tensor) -> None:
        """A gradient has been added to the parameter's."""
        if not self.engine.closed:
            self.engine.guard(self.engine.passes.backward_begins)


class BackwardHook:
    """Hook of an output or a loss: a backward through this pass begins."""

    __slots__ = ("engine", "passes")

    def __init__(self, engine: Engine, passes: int) -> None:
        self.engine = engine
        self.passes = passes

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        """The backward has reached the output."""
        # A gradient with a graph of its own (`create_graph=True`: a gradient penalty, a differential
        # equation) is on the way to the loss, and ends nothing.
        if not self.engine.closed and not torch.is_grad_enabled():
            self.engine.guard(self.engine.passes.backward_begins, self.passes)


HOOKS: Final = tuple(
    kind.__call__.__code__
    for kind in (ModuleHook, PartBegins, PartEnds, GradientHook, AccumulateHook, BackwardHook)
)
"""The code of these hooks, which the compiler must not compile by itself."""


def after_backward(callback: Callable[[], None]) -> bool:
    """Call `callback` when the backward under way has ended, on the thread that called it."""
    if torch._C._current_graph_task_id() == -1:
        return False
    torch.autograd.Variable._execution_engine.queue_callback(callback)
    return True
