"""The hooks on the observed model itself, which tell a forward pass from its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from streamlens.capture.hooks import Hook

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine

__all__ = ["RootHooks", "engine_of"]


def engine_of(model: nn.Module) -> Engine | None:
    """The engine that observes a model: its hooks know. No registry could keep the model alive."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, _RootBegins) and not hook.engine.closed:
            return hook.engine
    return None


class RootHooks:
    """Forward pre-hook and forward hook of the model, in place as long as it is observed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._handles: list[RemovableHandle] = []

    def install(self, model: nn.Module) -> None:
        """Register both hooks; the second also runs when the forward raises."""
        self._handles = [
            model.register_forward_pre_hook(_RootBegins(self._engine), with_kwargs=True),
            model.register_forward_hook(_RootEnds(self._engine), with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """Remove both hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _RootBegins(Hook):
    """The model is called."""

    __slots__ = ("engine",)

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passes = self.engine.passes
        if passes.elsewhere():
            return
        if not passes.in_forward or (module is self.engine.model and passes.abandoned(module)):
            self.engine.guard(passes.forward_begins, module, "", args, kwargs)
        elif self.engine.forward.opener == "":
            passes.nested += 1


class _RootEnds(Hook):
    """The model returns, or has raised, in which case the output is None."""

    __slots__ = ("engine",)

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
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
