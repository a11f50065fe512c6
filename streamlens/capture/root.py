"""The hooks on the observed model itself, which tell a forward pass from its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamlens.capture.hooks import Hook
from streamlens.capture.losses import loss_of_output
from streamlens.capture.traced import trace_begin, trace_end, trace_loss

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine

__all__ = ["HOOKS", "RootHooks", "engine_of"]


def engine_of(model: nn.Module) -> Engine | None:
    """The engine that observes a model: its hooks know. No registry could keep the model alive."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, _RootBegins) and not (hook.engine.closed or hook.engine.inherited):
            return hook.engine
    return None


class RootHooks:
    """Forward pre-hook and forward hook of the model, in place as long as it is observed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.handles: list[RemovableHandle] = []

    def install(self, model: nn.Module) -> None:
        """Register both hooks; the second also runs when the forward raises."""
        self.handles = [
            model.register_forward_pre_hook(_RootBegins(self._engine), with_kwargs=True),
            model.register_forward_hook(_RootEnds(self._engine), with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """Remove both hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


class _RootBegins(Hook):
    """The model is called."""

    __slots__ = ("begin", "engine")

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.begin = engine.compiled.key("begin", "")

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            trace_begin(self.begin, args, kwargs)
            return
        passes = self.engine.passes
        if passes.elsewhere():
            return
        if not passes.in_forward or (module is self.engine.model and passes.abandoned(module)):
            self.engine.guard(passes.forward_begins, module, "", args, kwargs)
        elif self.engine.forward.opener == "":
            passes.nested += 1


class _RootEnds(Hook):
    """The model returns, or has raised, in which case the output is None."""

    __slots__ = ("backward", "begin", "end", "engine", "loss")

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        key = engine.compiled.key
        self.begin, self.end = key("begin", ""), key("end", "")
        self.backward, self.loss = key("backward", ""), key("own loss", "")

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            # Not asked of a tensor, where the compiler does not answer.
            loss = None if isinstance(output, Tensor | tuple | list) else loss_of_output(output)
            if loss is not None:
                trace_loss(self.loss, self.backward, loss, kwargs.get("labels"))
            trace_end(self.end, self.begin, self.backward, output)
            return
        passes = self.engine.passes
        if passes.elsewhere():
            return
        if passes.outside == "":
            passes.outside = None
        elif passes.in_forward and self.engine.forward.opener == "":
            if passes.nested:
                passes.nested -= 1
            else:
                self.engine.guard(passes.forward_ends, output, kwargs)


HOOKS: Final = (_RootBegins.__call__.__code__, _RootEnds.__call__.__code__)
"""The code of these hooks, which the compiler must not compile by itself."""
