"""What hooks leave behind in code that `torch.compile` traces.

The compiler runs a hook once, while it traces, and keeps the operations it has seen. A traced hook
therefore leaves one operation behind, `streamlens::tap` (`compiled.py`), which hands tensors back when
the compiled code runs. What is called here in traced code is itself traced, so it must be plain enough
for the compiler; what needs more runs while it traces, and gives it a constant.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch._guards import TracingContext

__all__ = ["GradientTap", "trace_begin", "trace_end", "trace_loss", "trace_output", "tracing_works"]

F = TypeVar("F", bound=Callable[..., Any])

_MOST_OUTPUTS: Final = 16
"""Tensors of an output that are watched for a backward."""

_DEEPEST: Final = 8
"""How deep a nested output is searched."""


class _Trace:
    """What has been traced so far of one graph.

    Attributes:
        calls: How often each tap has been placed in it.
        inside: The modules that have begun and not ended, from the outermost in.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.inside: list[str] = []


_works: Final[list[bool]] = []
"""Empty until the operation is there."""


def tracing_works() -> None:
    """The operation is there."""
    _works.append(True)


_traces: Final[weakref.WeakKeyDictionary[TracingContext, _Trace]] = weakref.WeakKeyDictionary()


def _while_tracing(fn: F) -> F:
    """Have the compiler call a function, with constants, and take what it returns for a constant.

    This is `torch._dynamo.assume_constant_result`, which would import the compiler.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


def _trace_under_way() -> _Trace | None:
    """What is traced now, if that is code whose taps can be called."""
    if not _works or torch._C._functorch.peek_interpreter_stack() is not None:
        # Within `torch.func` a tensor is not what it seems, and no forward counts.
        return None
    if getattr(torch.compiler, "is_exporting", bool)():
        # An exported program goes where nobody observes it.
        return None
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    return None if context is None else _traces.setdefault(context, _Trace())


@_while_tracing
def _place(key: str) -> str:
    """The name of one more tap in the graph; empty if there is to be none."""
    trace = _trace_under_way()
    if trace is None:
        return ""
    trace.calls[key] += 1
    return f"{key}@{trace.calls[key] - 1}"


@_while_tracing
def _enter(key: str) -> str:
    """As `_place`, for the begin of a module that may be outermost: those within another are not."""
    trace = _trace_under_way()
    if trace is None:
        return ""
    trace.inside.append(key)
    return f"{key}@0" if len(trace.inside) == 1 else ""


@_while_tracing
def _leave(key: str, entered: str) -> str:
    """As `_place`, for the end of a module whose begin was given as `entered`."""
    trace = _trace_under_way()
    if trace is None:
        return ""
    if entered not in trace.inside:
        # It began in another graph, before a graph break.
        return f"{key}@0"
    while trace.inside.pop() != entered:
        pass
    return "" if trace.inside else f"{key}@0"


@_while_tracing
def _shows_gradients() -> bool:
    """Whether a hook of a tensor that is computed in the graph ends up in its backward.

    Older versions of PyTorch break the graph for it, and compiled autograd traces the hook by itself.
    """
    compiled_autograd = sys.modules.get("torch._dynamo.compiled_autograd")
    if getattr(compiled_autograd, "compiled_autograd_enabled", False):
        return False
    return importlib.util.find_spec("torch._higher_order_ops.register_hook") is not None


def _tensors(value: object, depth: int = 0) -> list[Tensor]:
    """The tensors in a nested output, as far as the compiler can follow."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if depth > _DEEPEST:
        return found
    if isinstance(value, tuple | list):
        for entry in value:
            found.extend(_tensors(entry, depth + 1))
    elif isinstance(value, dict):
        for entry in value.values():
            found.extend(_tensors(entry, depth + 1))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            found.extend(_tensors(getattr(value, field.name), depth + 1))
    return found


def _first(tensors: list[Tensor]) -> list[Tensor]:
    """The first tensor that a gradient reaches, else the first, as a list of at most one."""
    for tensor in tensors:
        if tensor.requires_grad and torch.is_grad_enabled():
            return [tensor]
    return tensors[:1]


class GradientTap:
    """Hook of a tensor in traced code: its gradient is handed back when compiled code has computed it."""

    __slots__ = ("site",)

    def __init__(self, site: str) -> None:
        self.site = site

    def __call__(self, gradient: Tensor) -> None:
        """The gradient has been computed."""
        graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        torch.ops.streamlens.tap([gradient], self.site, graph)


def _watch(tensor: Tensor, site: str) -> None:
    """Hand the gradient of a tensor back under a name."""
    if site and tensor.requires_grad and torch.is_grad_enabled() and _shows_gradients():
        tensor.register_hook(GradientTap(site))


def trace_begin(key: str, args: object, kwargs: object) -> None:
    """A module that may be outermost is called, in traced code."""
    site = _enter(key)
    if site:
        torch.ops.streamlens.tap(_tensors((args, kwargs))[:1], site, torch.is_grad_enabled())


def trace_end(key: str, entered: str, backward: str, output: object) -> None:
    """A module that may be outermost returns, in traced code.

    Args:
        key: Of its end.
        entered: The key of its begin.
        backward: The key under which a backward through its output is told.
        output: What it returns.
    """
    site = _leave(key, entered)
    if site:
        tensors = _tensors(output)
        torch.ops.streamlens.tap(_first(tensors), site, torch.is_grad_enabled())
        for tensor in tensors[:_MOST_OUTPUTS]:
            if not tensor.is_leaf:
                _watch(tensor, _place(backward))


def trace_output(key: str, gradient: str, output: object) -> None:
    """A module whose output somebody wants returns, in traced code.

    Args:
        key: Of its output.
        gradient: The key of the gradient, if that is wanted too.
        output: What it returns.
    """
    site = _place(key)
    if not site or output is None:
        return
    found = _first(_tensors(output))
    torch.ops.streamlens.tap(found, site, torch.is_grad_enabled())
    if gradient and found:
        if found[0].requires_grad and (found[0].is_leaf or not _shows_gradients()):
            # A hook on a tensor that stays would stay with it. That there is none is told.
            torch.ops.streamlens.tap([], _place(gradient), found[0].is_leaf)
        else:
            # Numbered as the output is, so that the two are known to belong together.
            _watch(found[0], gradient + site[len(key) :])


def trace_loss(key: str, backward: str, value: object, labels: object) -> None:
    """A loss has been computed in traced code."""
    site = _place(key)
    found = _first(_tensors(value))
    if site and found and found[0].requires_grad and torch.is_grad_enabled():
        torch.ops.streamlens.tap(found + _first(_tensors(labels)), site, True)
        _watch(found[0], _place(backward))
