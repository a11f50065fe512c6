"""`ModuleHooks`: the hooks on the modules of a model, brought in line with what is wanted."""

from __future__ import annotations

import weakref
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from torch import nn
from torch.utils.hooks import RemovableHandle

from streamlens.capture.compiled import hooks_changed
from streamlens.capture.pass_hooks import ModuleHook, PartBegins, PartEnds

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine

__all__ = ["ModuleHooks"]


class _Hooks:
    """The hooks on one module.

    Args:
        module: The module.
        tapped: Whether its output is wanted, or its gradient.
        gradient: Whether its gradient is.
        part: Whether it may be the outermost module that is called.
    """

    __slots__ = ("_module", "_wanted", "handles")

    def __init__(self, module: nn.Module, *, tapped: bool, gradient: bool, part: bool) -> None:
        self._module = weakref.ref(module)
        self._wanted = (tapped, gradient, part)
        self.handles: list[RemovableHandle] = []

    def __bool__(self) -> bool:
        return any(self._wanted)

    def same(self, other: _Hooks | None) -> bool:
        """Whether these are the hooks that are wanted now, on the module that has the name now."""
        return other is not None and self._module() is other._module() and self._wanted == other._wanted

    def register(self, engine: Engine, name: str) -> None:
        """Put them in place."""
        module, (tapped, gradient, part) = self._module(), self._wanted
        if module is None:
            return
        if tapped:
            # The model's own comes before the hook that ends the forward.
            hook = ModuleHook(engine, name, gradient=gradient)
            self.handles.append(module.register_forward_hook(hook, prepend=not name))
        if part:
            self.handles.append(module.register_forward_pre_hook(PartBegins(engine, name), with_kwargs=True))
            self.handles.append(module.register_forward_hook(PartEnds(engine, name), always_call=True))

    def remove(self) -> None:
        """Take them away."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


class ModuleHooks:
    """The hooks on modules, by the module's name."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._hooks: dict[str, _Hooks] = {}

    @property
    def handles(self) -> list[RemovableHandle]:
        """Of all hooks that are in place."""
        return [handle for hooks in self._hooks.values() for handle in hooks.handles]

    def install(self, outputs: AbstractSet[str], gradients: AbstractSet[str], *, parts: bool) -> None:
        """Have those in place that are wanted, and no others.

        What stays as it is stays in place: compiled code is compiled again for any hook that changes.

        Args:
            outputs: The modules whose output is wanted.
            gradients: Those whose output's gradient is.
            parts: Whether any part may be the outermost module that is called.
        """
        changed = False
        wanted: dict[str, _Hooks] = {}
        for name, module in self._engine.index.modules.items():
            gradient = name in gradients
            hooks = _Hooks(
                module, tapped=gradient or name in outputs, gradient=gradient, part=parts and bool(name)
            )
            if hooks:
                old = self._hooks.get(name)
                wanted[name] = old if old is not None and old.same(hooks) else hooks
        for name, old in self._hooks.items():
            if wanted.get(name) is not old:
                old.remove()
                changed = True
        for name, hooks in wanted.items():
            if self._hooks.get(name) is not hooks:
                hooks.register(self._engine, name)
                changed = True
        self._hooks = wanted
        if changed:
            hooks_changed(self._engine.compiled)

    def remove(self) -> None:
        """Take all of them away."""
        for hooks in self._hooks.values():
            hooks.remove()
        self._hooks = {}
