"""Seeing every `torch.optim` optimizer step, through PyTorch's global step hooks.

One pair of hooks serves all engines. An engine is told of the outermost step only (a subclass that
calls `super().step()` fires the hooks twice), and only of optimizers that own one of its model's
parameters.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from streamlens.capture.compiled import undisturbed
from streamlens.topics import Facet

if TYPE_CHECKING:
    from streamlens.capture.model import ModelIndex, ParameterEntry

__all__ = ["OptimizerInfo", "StepListener", "StepWatch", "step_watch", "steps_under_way"]

_WRAPPER: Final = next(
    (
        constant
        for constant in Optimizer.profile_hook_step.__code__.co_consts
        if getattr(constant, "co_name", "") == "wrapper"
    ),
    None,
)
"""The code of the function that PyTorch wraps around every `step`."""


class StepListener(Protocol):
    """What an engine does when an optimizer steps."""

    def wants(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer owns one of the model's parameters."""
        ...

    def before_step(
        self, optimizer: Optimizer, closure: Callable[[], Any] | None
    ) -> Callable[[], Any] | None:
        """Called before the update; may return a closure to be used instead."""
        ...

    def after_step(self, optimizer: Optimizer) -> None:
        """Called after the update."""
        ...


_Entered: TypeAlias = tuple[int, tuple[StepListener, ...], RemovableHandle | None]
"""A step under way: the optimizer's id, the engines that are told, and what is to be removed after it."""


class StepWatch:
    """The global hooks and the engines they serve."""

    def __init__(self) -> None:
        # Replaced and never changed: other threads may be going through it.
        self._listeners: tuple[weakref.ref[StepListener], ...] = ()
        self._handles: list[RemovableHandle] = []
        self._local = threading.local()
        self._lock = threading.RLock()

    def add(self, listener: StepListener) -> None:
        """Serve one more engine; the hooks are installed with the first."""
        with self._lock:
            self._listeners = (*self._others(listener), weakref.ref(listener))
            if not self._handles:
                self._handles = [
                    register_optimizer_step_pre_hook(undisturbed(self._before)),
                    register_optimizer_step_post_hook(undisturbed(self._after)),
                ]

    def discard(self, listener: StepListener) -> bool:
        """Serve an engine no longer; the hooks go with the last, once no step is under way.

        Returns:
            Whether nothing is left to be tidied up.
        """
        with self._lock:
            self._listeners = self._others(listener)
        return self.tidy()

    def _others(self, listener: StepListener) -> tuple[weakref.ref[StepListener], ...]:
        """The listeners that exist, without one."""
        return tuple(ref for ref in self._listeners if ref() not in (None, listener))

    def _live(self) -> tuple[StepListener, ...]:
        return tuple(listener for ref in self._listeners if (listener := ref()) is not None)

    def tidy(self) -> bool:
        """Remove the hooks if nobody needs them and no optimizer is stepping.

        Within a step PyTorch iterates over its hooks and would fail if one went.

        Returns:
            Whether no hook is left that nobody needs.
        """
        with self._lock:
            if not self._handles or self._live():
                return True
            if steps_under_way():
                return False
            _leave(self._local.__dict__.get("stack", []))
            for handle in self._handles:
                handle.remove()
            self._handles = []
            return True

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        stack: list[_Entered] = self._local.__dict__.setdefault("stack", [])
        if stack and _steps_below(sys._getframe()) <= 1:
            # An earlier step raised, so that its hook for the end never ran.
            _leave(stack)
        listeners = tuple(
            listener
            for listener in self._live()
            if listener.wants(optimizer) and not any(listener in told for _, told, _ in stack)
        )
        if listeners and self._others_follow(optimizer):
            # They may clip the gradients or set the rate, and the optimizer consumes what they leave.
            last = optimizer.register_step_pre_hook(_Once(listeners))
            stack.append((id(optimizer), listeners, last))
            return None
        stack.append((id(optimizer), listeners, None))
        return _tell(listeners, args, kwargs, optimizer) if listeners else None

    def _others_follow(self, optimizer: Optimizer) -> bool:
        """Whether hooks of others run after ours, before the update."""
        everybodys = self._handles[0].hooks_dict_ref() if self._handles else None
        return bool(optimizer._optimizer_step_pre_hooks) or len(everybodys or ()) > 1

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        stack: list[_Entered] = self._local.__dict__.setdefault("stack", [])
        if not any(entered == id(optimizer) for entered, *_ in stack):
            return
        while True:
            entered, listeners, last = stack.pop()
            if last is not None:
                last.remove()
            if entered == id(optimizer):
                break
        for listener in listeners:
            listener.after_step(optimizer)


class _Once:
    """The last of an optimizer's own hooks before a step: tells the engines, and only of that step."""

    def __init__(self, listeners: tuple[StepListener, ...]) -> None:
        self._listeners = listeners

    def __call__(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The optimizer's other hooks have run; within this step it may call itself again."""
        listeners, self._listeners = self._listeners, ()
        return _tell(listeners, args, kwargs, optimizer) if listeners else None


def _tell(
    listeners: tuple[StepListener, ...], args: tuple[Any, ...], kwargs: dict[str, Any], optimizer: Optimizer
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Tell engines of a step; gives new arguments for it if its closure is to be another one."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    replaced = closure if callable(closure) else None
    for listener in listeners:
        replaced = listener.before_step(optimizer, replaced) or replaced
    if replaced is None or replaced is closure:
        return None
    if len(args) > 1:
        return (args[0], replaced, *args[2:]), kwargs
    return args, {**kwargs, "closure": replaced}


def _leave(stack: list[_Entered]) -> None:
    """Forget steps that have not come to their end."""
    for _, _, last in stack:
        if last is not None:
            last.remove()
    stack.clear()


def steps_under_way(thread: int | None = None) -> int:
    """How many optimizer steps are running now, those within others included.

    Args:
        thread: On this thread only.
    """
    frames = sys._current_frames()
    return sum(_steps_below(frame) for ident, frame in frames.items() if thread in (None, ident))


def _steps_below(frame: FrameType | None) -> int:
    """How many optimizer steps have led to a frame."""
    count = 0
    while frame is not None:
        count += frame.f_code is _WRAPPER
        frame = frame.f_back
    return count


_watch: Final = StepWatch()


def step_watch() -> StepWatch:
    """The process's one pair of optimizer hooks."""
    return _watch


class OptimizerInfo:
    """What an engine knows of one optimizer: which of the model's parameters it owns, and where.

    Attributes:
        serial: Tells it from others.
        entries: The parameters that it updates, in model order.
        group_of: The place of the parameter group that holds each of them.
        stands_in: Whether it owns none of them, but copies that nobody has told apart.
    """

    def __init__(self, optimizer: Optimizer | None, serial: int) -> None:
        self.serial = serial
        self.entries: tuple[ParameterEntry, ...] = ()
        self.group_of: dict[int, int] = {}
        self.stands_in = False
        self._signature: tuple[Any, ...] = ()
        self._optimizer = (lambda: None) if optimizer is None else weakref.ref(optimizer)

    @classmethod
    def by_hand(cls, index: ModelIndex) -> OptimizerInfo:
        """An update without an optimizer, which may touch every parameter."""
        info = cls(None, 0)
        info.entries = tuple(index.entries)
        return info

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, while it exists."""
        return self._optimizer()

    def refresh(self, index: ModelIndex, *, force: bool = False) -> bool:
        """Look again at what the optimizer owns if its groups changed; whether they did."""
        optimizer = self._optimizer()
        if optimizer is None:
            return False
        signature = (id(index), *((id(g["params"]), len(g["params"])) for g in optimizer.param_groups))
        if signature == self._signature and not force:
            return False
        self._signature = signature
        self.stands_in = False
        self.group_of = {}
        owned: dict[int, ParameterEntry] = {}
        for place, group in enumerate(optimizer.param_groups):
            for tensor in group["params"]:
                for entry in index.owned_through(tensor):
                    owned[entry.order] = entry
                    self.group_of[entry.order] = place
        self.entries = tuple(owned[order] for order in sorted(owned))
        return True

    def stand_in_for(self, entries: Iterable[ParameterEntry]) -> None:
        """It owns copies of these parameters, in a layout that is not known."""
        self.stands_in = True
        self.entries = tuple(entries)
        optimizer = self._optimizer()
        if optimizer is not None and len(optimizer.param_groups) == 1:
            self.group_of = dict.fromkeys((entry.order for entry in self.entries), 0)

    def tells(self, facet: Facet | None) -> bool:
        """Whether something of a parameter can be taken at this optimizer's update.

        Of copies that nobody has told apart the gradients and state are anybody's, and the rate is known
        if there is one group.
        """
        if self.stands_in and facet is Facet.RATE:
            return bool(self.group_of)
        return not self.stands_in or facet not in (Facet.GRADIENT, Facet.STATE)

    def shares(self, other: OptimizerInfo) -> bool:
        """Whether another optimizer updates some parameter too, so that two updates make two steps."""
        return not self.group_of.keys().isdisjoint(other.group_of)

    def unknown(self, index: ModelIndex) -> bool:
        """Whether the optimizer holds parameters that the index does not know."""
        optimizer = self._optimizer()
        return optimizer is not None and any(
            not index.knows(tensor) for group in optimizer.param_groups for tensor in group["params"]
        )
