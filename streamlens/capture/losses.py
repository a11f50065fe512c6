"""Watching loss functions: the loss, the labels, and the moment a backward begins."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.utils.hooks import RemovableHandle

from streamlens.capture.hooks import Hook, first_tensor
from streamlens.capture.traced import trace_loss
from streamlens.frame import Kind

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine

__all__ = ["HOOKS", "LossCapture", "loss_of_output"]

P = ParamSpec("P")
R = TypeVar("R")


class LossCapture:
    """The losses watched in a run, and their values in the open micro-step.

    Attributes:
        seen: Whether a loss has come yet.
        labels_seen: Whether labels have.
        handles: Of the hooks on loss modules.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.seen = False
        self.labels_seen = False
        self.handles: list[RemovableHandle] = []
        self._watched: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._values: dict[str, Tensor] = {}
        self._sent = False

    @property
    def watched(self) -> bool:
        """Whether the user has named a loss."""
        return bool(self._watched)

    def watch_module(self, loss: nn.Module) -> None:
        """Take prediction, labels and loss from a loss module's forward."""
        if loss in self._watched:
            return
        name = self._watched[loss] = self._name(type(loss).__name__)
        self.handles.append(loss.register_forward_hook(_LossHook(self._engine, name), with_kwargs=True))

    def watch_function(self, loss: Callable[P, R]) -> Callable[P, R]:
        """A function that does what `loss` does, and is watched."""
        name = self._name(getattr(loss, "__name__", type(loss).__name__))
        engine = self._engine

        compiled = _keys(engine, name)

        @functools.wraps(loss)
        def watched(*args: P.args, **kwargs: P.kwargs) -> R:
            result = loss(*args, **kwargs)
            if torch.compiler.is_compiling():
                trace_loss(*compiled, result, _labels(args, kwargs))
            elif not engine.closed:
                engine.guard(engine.losses.computed, name, args, kwargs, result)
            return result

        self._watched[watched] = name
        return watched

    def is_loss(self, module: nn.Module | None) -> bool:
        """Whether a part of the model gives a loss and not an output."""
        return isinstance(module, _Loss) or (module is not None and module in self._watched)

    def _name(self, base: str) -> str:
        taken, name, ordinal = set(self._watched.values()), base, 1
        while name in taken:
            ordinal += 1
            name = f"{base}.{ordinal}"
        return name

    def begin_pass(self) -> None:
        """A new micro-step begins."""
        self._values = {}
        self._sent = False

    def computed(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """A watched loss has returned."""
        engine = self._engine
        # Losses are let go when a pass begins, which only what is taken in passes makes known.
        if not engine.passes.watches_passes or not engine.passes.loss_counts():
            return
        value = first_tensor(result)
        if value is None or not value.requires_grad:
            return
        engine.passes.watch_backward(value)
        self.take(name, value)
        target = first_tensor(_labels(args, kwargs))
        if target is not None:
            self.take_labels(target)

    def computed_from(self, name: str, value: Tensor, labels: Tensor | None) -> None:
        """Compiled code has computed a watched loss; its backward is told by itself."""
        passes = self._engine.passes
        if passes.watches_passes and passes.loss_counts():
            self.take(name, value)
            if labels is not None:
                self.take_labels(labels)

    def take_own(self, value: Tensor, labels: Tensor | None) -> None:
        """Note the loss that a model's output carries, unless the user has named one."""
        if not self.watched and self._engine.due_now and self._engine.passes.watches_passes:
            self.take("loss", value)
            if labels is not None:
                self.take_labels(labels)

    def take_labels(self, labels: Tensor) -> None:
        """Emit the labels that came with a loss."""
        self.labels_seen = True
        self._engine.forward.measure_batch("input_labels", labels, self._engine.due_now)

    def take(self, name: str, value: Tensor) -> None:
        """Note a loss of this micro-step; a second call of the same one gets a name of its own."""
        self.seen = True
        key, call = name, 0
        while key in self._values:
            call += 1
            key = f"{name}@{call}"
        with torch.no_grad():
            # A copy: `loss /= accumulation_steps` would change the value that was computed.
            number = value.detach() if value.dtype == torch.float64 else value.detach().float()
            self._values[key] = number.mean() if value.ndim else number.clone()

    def take_if_none(self, name: str, value: Tensor) -> None:
        """Note a loss that was returned by a closure, unless one is known already."""
        if not self._values and not self._sent:
            self.take(name, value)

    def send(self) -> None:
        """Emit the losses of the micro-step; once, when its backward has run."""
        values, self._values = self._values, {}
        if not values or self._sent:
            return
        self._sent = True
        engine = self._engine
        demands = [d for d in engine.due_now if "loss" in d.view.topics]
        if not demands:
            return
        single = len(values) == 1 and len(self._watched) <= 1
        stacked = torch.stack(list(values.values()))
        frame = engine.frame(
            "loss",
            ("",),
            stacked if single else stacked[None],
            kind=Kind.MICRO_STEP,
            components=() if single else tuple(values),
        )
        engine.post_frames([(demands, frame)])

    def remove(self) -> None:
        """Remove every hook; wrapped functions go on working, unwatched."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self._values = {}


def loss_of_output(output: Any) -> Tensor | None:
    """The loss that a model's output carries, as `.loss` or `["loss"]`."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def _labels(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The labels among the arguments of a loss."""
    return args[1] if len(args) > 1 else kwargs.get("target", kwargs.get("labels"))


def _keys(engine: Engine, name: str) -> tuple[str, str]:
    """How compiled code names a loss, and a backward through it."""
    return engine.compiled.key("loss", name), engine.compiled.key("backward", name)


class _LossHook(Hook):
    """Forward hook of a loss module."""

    __slots__ = ("compiled", "engine", "name")

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name
        self.compiled = _keys(engine, name)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            trace_loss(*self.compiled, output, _labels(args, kwargs))
        elif not self.engine.closed:
            self.engine.guard(self.engine.losses.computed, self.name, args, kwargs, output)


HOOKS: Final = (_LossHook.__call__.__code__,)
"""The code of this hook, which the compiler must not compile by itself."""
