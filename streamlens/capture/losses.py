"""Watching loss functions: the loss, the labels, and the moment a backward begins."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.utils.hooks import RemovableHandle

from streamlens.capture.exchange import Partial
from streamlens.capture.hooks import Hook, first_tensor
from streamlens.capture.sharded import Part
from streamlens.capture.table import Rows, Table
from streamlens.capture.traced import trace_loss
from streamlens.frame import Kind
from streamlens.reductions import Statistic, double_where_known

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine
    from streamlens.capture.view import Demand

__all__ = ["HOOKS", "LossCapture", "loss_of_output"]

P = ParamSpec("P")
R = TypeVar("R")

_SUM: Final = Statistic("sum")
_NONE: Final[Mapping[str, Any]] = {}


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
        self._examples: dict[str, Tensor | float | None] = {}
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
                engine.guard(engine.losses.computed, name, loss, args, kwargs, result)
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
        self._examples = {}
        self._sent = False

    @property
    def weight(self) -> Tensor | float | None:
        """How many examples the loss of this micro-step is a mean over; None if it is a sum."""
        if len(self._examples) == 1:
            return next(iter(self._examples.values()))
        return float(self._engine.passes.examples)

    def computed(
        self, name: str, loss: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """A watched loss has returned."""
        engine = self._engine
        # Losses are let go when a pass begins, which only what is taken in passes makes known.
        if not engine.passes.watches_passes or not engine.passes.loss_counts():
            return
        value = first_tensor(result)
        if value is None or not value.requires_grad:
            return
        engine.passes.watch_backward(value)
        target = first_tensor(_labels(args, kwargs))
        self.take(name, value)
        self._count(loss, target, kwargs)
        if target is not None:
            self.take_labels(target)

    def computed_from(self, name: str, value: Tensor, labels: Tensor | None) -> None:
        """Compiled code has computed a watched loss; its backward is told by itself."""
        passes = self._engine.passes
        if passes.watches_passes and passes.loss_counts():
            self.take(name, value)
            self._count(next((loss for loss, known in self._watched.items() if known == name), None), labels)
            if labels is not None:
                self.take_labels(labels)

    def take_own(self, value: Tensor, labels: Tensor | None) -> None:
        """Note the loss that a model's output carries, unless the user has named one."""
        if not self.watched and self._engine.due_now and self._engine.passes.watches_passes:
            self.take("loss", value)
            self._count(None, labels)
            if labels is not None:
                self.take_labels(labels)

    def _count(self, loss: Any, labels: Tensor | None, options: Mapping[str, Any] = _NONE) -> None:
        """Note how many examples the loss that was taken last is a mean over."""
        if self._engine.exchange.active:
            self._examples[next(reversed(self._values))] = examples_of(loss, labels, options)

    def take_labels(self, labels: Tensor) -> None:
        """Emit the labels that came with a loss."""
        self.labels_seen = True
        self._engine.batches.measure("input_labels", labels, self._engine.due_now)

    def take(self, name: str, value: Tensor) -> None:
        """Note a loss of this micro-step; a second call of the same one gets a name of its own."""
        self.seen = True
        key, call = name, 0
        while key in self._values:
            call += 1
            key = f"{name}@{call}"
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
        if engine.exchange.batch.parts > 1:
            self._settle_later(values, demands)
        else:
            self._emit(values, demands, engine.clock.micro_step)

    def _emit(self, values: Mapping[str, Tensor], demands: list[Demand], micro_step: int) -> None:
        single = len(values) == 1 and len(self._watched) <= 1
        numbers = list(values.values())
        # Each is a copy of its own already.
        stacked = numbers[0].reshape(1) if len(numbers) == 1 else torch.stack(numbers)
        frame = self._engine.frame(
            "loss",
            ("",),
            stacked if single else stacked[None],
            kind=Kind.MICRO_STEP,
            components=() if single else tuple(values),
            micro_step=micro_step,
        )
        self._engine.post_frames([(demands, frame)])

    def _settle_later(self, values: Mapping[str, Tensor], demands: list[Demand]) -> None:
        """Emit the losses of the global batch, each its examples' mean (or their sum), at the update."""
        engine, micro_step = self._engine, self._engine.clock.micro_step
        table = Table()
        names = tuple(values)
        examples = [self._examples.get(name, float(engine.passes.examples)) for name in names]
        home = values[names[0]].device
        wide = double_where_known(home)
        counts = torch.stack(
            [
                torch.as_tensor(1.0 if n is None else n, dtype=wide).to(home, non_blocking=True)
                for n in examples
            ]
        )
        means = torch.stack([v.to(wide) for v in values.values()])
        # Of no examples the mean is NaN, and adds nothing.
        sums = torch.where(counts > 0, means * counts, 0.0)
        table.put_wholes(Rows((_SUM,), names, torch.stack([sums, counts])))
        parts: dict[Hashable, Part | None] = dict.fromkeys(names, engine.exchange.batch)
        summed = {name for name, n in zip(names, examples, strict=True) if n is None}

        def emit() -> None:
            whole = {
                str(name): (total if name in summed else total / count).to(values[str(name)].dtype)
                for name, (total, count) in table.column(_SUM).items()
            }
            whole = {name: whole[name] for name in names if name in whole}
            if whole:
                self._emit(whole, demands, micro_step)

        engine.settling.later(Partial(f"loss/{micro_step}", table, parts, open=True), emit)

    def remove(self) -> None:
        """Remove every hook; wrapped functions go on working, unwatched."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self._values = {}


def examples_of(loss: Any, labels: Tensor | None, options: Mapping[str, Any]) -> Tensor | float | None:
    """How many examples a loss is the mean over, in any unit that all processes share.

    Labels that are ignored do not count, and with weights of classes their weights do, as in PyTorch's
    own cross-entropy.

    Args:
        loss: The loss: a module or a function.
        labels: The labels it was given.
        options: The keyword arguments it was given.

    Returns:
        The number, waiting for no device; None if the loss is a sum.
    """

    def option(name: str, default: Any = None) -> Any:
        return options.get(name, getattr(loss, name, default))

    if option("reduction") == "sum":
        return None
    if labels is None or not labels.ndim:
        return 1.0
    if labels.is_floating_point():
        return float(labels.numel())
    valid = labels != option("ignore_index", -100)
    weight = option("weight")
    kind = getattr(loss, "__name__", type(loss).__name__)
    if isinstance(weight, Tensor) and kind in {"CrossEntropyLoss", "NLLLoss", "cross_entropy", "nll_loss"}:
        return torch.where(valid, weight.detach()[labels.clamp(0, len(weight) - 1)], 0.0).sum()
    number: Tensor = valid.sum()
    return number


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
            self.engine.guard(self.engine.losses.computed, self.name, module, args, kwargs, output)


HOOKS: Final = (_LossHook.__call__.__code__,)
"""The code of this hook, which the compiler must not compile by itself."""
