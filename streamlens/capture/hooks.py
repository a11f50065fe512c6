"""Hook objects that copies and saved files of a model leave behind."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

__all__ = ["Hook", "Lifted", "first_tensor", "tensors_in"]


class Hook:
    """Base of every object that is registered as a hook with a model.

    A deep copy, a pickle or a `torch.save` of the model carries its hooks along; what it carries
    of ours is a function of the standard library that takes anything and does nothing, so that
    neither the copy nor a machine without streamlens is touched.
    """

    __slots__ = ()

    @property
    def __name__(self) -> str:
        """None, as objects have; TorchScript, which asks, is told what to do instead."""
        raise AttributeError(
            "the model is observed by streamlens, and torch.jit.script cannot compile its hooks: script it "
            "within `with lens.paused():`, where there are none"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return contextlib.nullcontext().__exit__

    def __copy__(self) -> Any:
        return contextlib.nullcontext().__exit__

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")


class Lifted:
    """Hooks that are off their modules for a while, and come back as they were, in their places."""

    def __init__(self, handles: Iterable[RemovableHandle]) -> None:
        self._taken: list[tuple[weakref.ref[Any], RemovableHandle, Any]] = []
        self._order: dict[int, tuple[weakref.ref[Any], list[int]]] = {}
        for handle in handles:
            for reference in (handle.hooks_dict_ref, *handle.extra_dict_ref):
                hooks = reference()
                if hooks is not None and handle.id in hooks:
                    self._order.setdefault(id(hooks), (reference, list(hooks)))
                    self._taken.append((reference, handle, hooks[handle.id]))
        for _, handle, _ in self._taken:
            handle.remove()

    def put_back(self, handles: Iterable[RemovableHandle]) -> None:
        """Put those back that are still wanted, before the hooks that they came before.

        Args:
            handles: Of the hooks that are.
        """
        wanted = {id(handle) for handle in handles}
        for reference, handle, hook in self._taken:
            hooks = reference()
            if hooks is not None and id(handle) in wanted:
                hooks[handle.id] = hook
        for reference, order in self._order.values():
            hooks = reference()
            if hooks is not None:
                for key in (*order, *(key for key in hooks if key not in order)):
                    if key in hooks:
                        hooks[key] = hooks.pop(key)


def tensors_in(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors in a nested output: tuples, lists, dicts, dataclasses, model outputs."""
    if isinstance(value, Tensor):
        yield value
    elif depth > 8:
        return
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors_in(entry, depth + 1)
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from tensors_in(entry, depth + 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name, None), depth + 1)
    elif type(value).__module__ != "builtins" and hasattr(value, "__dict__"):
        for entry in vars(value).values():
            if isinstance(entry, Tensor | tuple | list | Mapping):
                yield from tensors_in(entry, depth + 1)


def first_tensor(value: Any, *, but: Tensor | None = None) -> Tensor | None:
    """The first tensor of a nested output that a gradient reaches, else its first tensor.

    Args:
        value: The output.
        but: A tensor that is passed over where there is another.
    """
    if isinstance(value, Tensor):
        return value
    first: Tensor | None = None
    for tensor in tensors_in(value):
        if tensor is but:
            continue
        if tensor.requires_grad and torch.is_grad_enabled():
            return tensor
        first = tensor if first is None else first
    return but if first is None else first
