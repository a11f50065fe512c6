"""`observe()`: from a model to the lens on its training."""

from __future__ import annotations

import atexit
import contextlib
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import nn
from torch.optim import Optimizer

from streamlens.capture.clock import Clock
from streamlens.capture.engine import Engine
from streamlens.capture.orphans import close_orphans
from streamlens.capture.root import engine_of
from streamlens.errors import StreamlensError, did_you_mean
from streamlens.lens import Lens
from streamlens.notebook import CellKey, current_cell
from streamlens.runtime import log
from streamlens.session import Session
from streamlens.topics import check_own_topic

__all__ = ["observe"]

_clocks: Final[weakref.WeakKeyDictionary[nn.Module, Clock]] = weakref.WeakKeyDictionary()
"""The clock belongs to the model: one that is observed again goes on counting."""

_engines: Final[weakref.WeakSet[Engine]] = weakref.WeakSet()


def observe(
    model: nn.Module,
    *,
    loss: nn.Module | None = None,
    optimizers: Sequence[Optimizer] | Optimizer | None = None,
    count: str | None = None,
    name: str = "",
    start: int | None = None,
    emits: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
    on_error: str = "report",
) -> Lens:
    """Observe a model's training, whatever loop trains it.

    Nothing is captured until something subscribes, and nothing that is captured changes the run.

    Args:
        model: Any `nn.Module`.
        loss: The loss module, if losses and labels are wanted; for functions there is
            `lens.watch_loss`.
        optimizers: The optimizers whose steps together make one step. Optimizers are found by
            themselves; naming them closes a step as soon as all of them have stepped.
        count: Which forwards are training: `"training"` (the default) in training mode only,
            `"grad"` any with gradients enabled, for those who train in eval mode.
        name: A label that prefixes layers and topics in sinks, so that two models share one.
        start: 0 begins the clock anew; a model that was observed before goes on counting.
        emits: Topics that will come from `lens.emit()`, so that they can be selected before.
        metadata: Whatever describes the run (hyper-parameters, data set), for sinks that store it.
        on_error: `"report"` contains every failure; `"raise"` lets it through, for tests.

    Returns:
        A Lens with nothing selected.

    Raises:
        TypeError: `model` is no module, or an argument has the wrong type.
        StreamlensError: The options contradict those of an earlier `observe` of this model.

    Example:
        >>> import streamlens as sl
        >>> model = torch.nn.Linear(2, 1)
        >>> with sl.observe(model) as lens:
        ...     table = sl.sinks.Table()
        ...     subscription = lens.pipe(sl.uw_ratio(), sl.ema(0.9)).subscribe(table)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"observe() needs a torch.nn.Module, got {type(model).__name__}: pass the network itself"
        )
    if isinstance(optimizers, Optimizer):
        optimizers = [optimizers]
    _check_options(loss, count, name, start, emits, metadata, on_error)
    if optimizers is not None:
        _check_optimizers(model, optimizers)
    close_orphans()
    cell = current_cell()
    _close_rerun_cell(cell)
    engine = engine_of(model)
    if engine is None or engine.closed:
        engine = Engine(model, count=count or "training", name=name, on_error=on_error, optimizers=optimizers)
        _engines.add(engine)
        if start is None and model in _clocks:
            engine.clock.load_state_dict(_clocks[model].state_dict())
        _clocks[model] = engine.clock
    else:
        _merge(engine, count, name, start, optimizers)
        if on_error == "raise":
            engine.on_error = on_error
    if loss is not None and not engine.inert:
        engine.losses.watch_module(loss)
    for topic in emits:
        engine.check_own_topic(topic)
    engine.extra_metadata.update(metadata or {})
    session = Session(engine, cell)
    engine.sessions.add(session)
    return Lens(engine, session)


def _check_options(
    loss: object,
    count: object,
    name: object,
    start: object,
    emits: Sequence[str],
    metadata: object,
    on_error: object,
) -> None:
    """Raise for the first option of `observe` that is wrong."""
    if loss is not None and not isinstance(loss, nn.Module):
        raise TypeError(
            f"observe(loss=...) needs an nn.Module, got {getattr(loss, '__name__', type(loss).__name__)}; "
            "for a function write criterion = lens.watch_loss(function)"
        )
    for option, value, allowed in (
        ("count", count, ("training", "grad")),
        ("on_error", on_error, ("report", "raise")),
    ):
        if value is not None and value not in allowed:
            hint = did_you_mean(str(value), allowed)
            raise ValueError(
                f"observe({option}={value!r}): {hint or 'allowed are ' + ' and '.join(map(repr, allowed))}"
            )
    if start not in (None, 0):
        raise ValueError(f"observe(start={start!r}): 0 begins the clock anew; None goes on counting")
    if not isinstance(name, str):
        raise TypeError(f"observe(name={name!r}): the label is a string")
    if isinstance(emits, str):
        raise TypeError(f"observe(emits={emits!r}) needs a list of topics: emits=[{emits!r}]")
    for topic in emits:
        check_own_topic(topic)
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"observe(metadata=...) needs a mapping, got {type(metadata).__name__}")


def _check_optimizers(model: nn.Module, optimizers: object) -> None:
    """Raise for what is no optimizer, or one of another model."""
    owned = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers if isinstance(optimizers, Sequence) else [optimizers]:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "observe(optimizers=...) needs instances of torch.optim.Optimizer, got "
                f"{optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__}"
            )
        if not any(id(p) in owned for group in optimizer.param_groups for p in group["params"]):
            raise StreamlensError(
                f"observe(optimizers=...): this {type(optimizer).__name__} owns none of the model's "
                "parameters; pass the one that was made from model.parameters(), or leave the option out "
                "and let optimizers be found"
            )


def _merge(
    engine: Engine,
    count: str | None,
    name: str,
    start: int | None,
    optimizers: Sequence[Optimizer] | None,
) -> None:
    """Bring a later `observe` of the same model together with the first."""
    for option, new, old in (("count", count, engine.count), ("name", name or None, engine.name)):
        if new is not None and new != old:
            raise StreamlensError(
                f"this model is observed already with {option}={old!r}, now {option}={new!r}: close the "
                "earlier lens first, or leave the option out"
            )
    if start is not None:
        raise StreamlensError(
            f"observe(start={start}): this model is being observed; close its lens to begin the clock anew"
        )
    if optimizers is not None:
        engine.updates.expect(optimizers)


def _close_rerun_cell(cell: CellKey | None) -> None:
    """A notebook cell that runs again replaces the lens it made before, also where it makes a new model."""
    if cell is None:
        return
    for session in [session for engine in tuple(_engines) for session in engine.sessions]:
        if session.cell is not None and session.cell.is_rerun(cell):
            log.info("this notebook cell ran before: its earlier lens is closed")
            session.close(timeout=5.0)


def _silence_child() -> None:
    """A forked process (a data loader's worker) has our engines, but no business with them."""
    for engine in list(_engines):
        engine.inert = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_silence_child)


@atexit.register
def _close_all() -> None:
    close_orphans()
    for engine in list(_engines):
        with contextlib.suppress(Exception):
            engine.shut_down(timeout=10.0)
