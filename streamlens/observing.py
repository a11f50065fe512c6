"""`observe()`: from a model to the lens on its training."""

from __future__ import annotations

import atexit
import contextlib
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import Optimizer

from streamlens.capture.clock import Clock
from streamlens.capture.copies import Copy, check_stand_ins, copies_of
from streamlens.capture.engine import Engine
from streamlens.capture.model import ModelIndex
from streamlens.capture.orphans import close_orphans
from streamlens.capture.root import engine_of
from streamlens.distributed import OneRank, Ranks, check_distributed, check_model
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
    owners: Mapping[str, Tensor] | None = None,
    count: str | None = None,
    name: str = "",
    start: int | None = None,
    emits: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
    on_error: str = "report",
    distributed: bool | None = None,
    distributed_timeout: float | None = None,
) -> Lens:
    """Observe a model's training, whatever loop trains it.

    Nothing is captured until something subscribes, and nothing that is captured changes the run.

    Args:
        model: Any `nn.Module`.
        loss: The loss module, if losses and labels are wanted; for functions there is
            `lens.watch_loss`.
        optimizers: The optimizers whose steps together make one step. Optimizers are found by
            themselves; naming them closes a step as soon as all of them have stepped. One that owns
            copies of the parameters (fp32 master weights, one flat buffer) has to be named: the updates
            are then the changes of the model's own parameters, emitted when `step()` returns if the
            copies are back in the model by then, else when the step closes, by the next forward at the
            latest, or at `lens.step()`. Gradients as it consumes them, its state, and the rates of
            several groups are known through `owners` alone.
        owners: Which tensor of these optimizers stands for which of the model's parameters: a tensor of
            the optimizer's own, or a view into one, by the parameter's name. Weights, updates, gradients,
            rates and state of that parameter are then those of the optimizer's tensor, which may be
            more precise than the parameter.
        count: Which forwards are training: `"training"` (the default) in training mode only,
            `"grad"` any with gradients enabled, for those who train in eval mode.
        name: A label that prefixes layers and topics in sinks, so that two models share one.
        start: 0 begins the clock anew; a model that was observed before goes on counting.
        emits: Topics that will come from `lens.emit()`, so that they can be selected before.
        metadata: Whatever describes the run (hyper-parameters, data set), for sinks that store it.
        on_error: `"report"` contains every failure; `"raise"` lets it through, for tests.
        distributed: Under `torch.distributed`, numbers are by default those of all ranks, and sinks write
            on rank 0: call `observe` on every rank. False looks at this rank alone, and its sinks write;
            so does the environment's `STREAMLENS_DISTRIBUTED=0`.
        distributed_timeout: Seconds for which the first update that takes all ranks waits for them, and
            for which any later one does, before they are given up and training goes on without; 30
            by default, or what the environment's `STREAMLENS_DISTRIBUTED_TIMEOUT` says.

    Returns:
        A Lens with nothing selected.

    Raises:
        TypeError: `model` is no module, or an argument has the wrong type.
        StreamlensError: The options contradict those of an earlier `observe` of this model, or an
            optimizer has nothing to do with it.

    Example:
        >>> import streamlens as sl
        >>> model = torch.nn.Linear(2, 1)
        >>> with sl.observe(model) as lens:
        ...     table = sl.sinks.Table()
        ...     subscription = lens.pipe(sl.uw_ratio(), sl.ema(0.9)).subscribe(table)
    """
    check_model(model)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"observe() needs a torch.nn.Module, got {type(model).__name__}: pass the network itself"
        )
    if isinstance(optimizers, Optimizer):
        optimizers = [optimizers]
    _check_options(loss, count, name, start, emits, metadata, on_error)
    alone, timeout = check_distributed(distributed, distributed_timeout)
    copies = _check_optimizers(model, optimizers, owners)
    close_orphans()
    cell = current_cell()
    _close_rerun_cell(cell)
    # Within `paused()` the model has no hooks that would know.
    engine = engine_of(model) or next((e for e in _engines if e.paused and e.model is model), None)
    if engine is None or engine.closed:
        engine = Engine(
            model,
            count=count or "training",
            name=name,
            on_error=on_error,
            optimizers=optimizers,
            copies=copies,
        )
        engine.exchange = OneRank() if alone else Ranks(engine, timeout)
        _engines.add(engine)
        if start is None and model in _clocks:
            engine.clock.load_state_dict(_clocks[model].state_dict())
        _clocks[model] = engine.clock
    else:
        _merge(engine, count, name, start, optimizers, copies)
        if on_error == "raise":
            engine.on_error = on_error
    if loss is not None and not engine.inert:
        engine.losses.watch_module(loss)
    for topic in emits:
        engine.check_own_topic(topic)
    engine.threads.observed()
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


def _check_optimizers(model: nn.Module, optimizers: object, owners: object) -> dict[str, Copy]:
    """The copies that stand for parameters; raise for what is no optimizer, or one of another model."""
    if optimizers is None and owners is None:
        return {}
    given: list[Optimizer] = []
    for optimizer in optimizers if isinstance(optimizers, Sequence) else [optimizers]:
        if isinstance(optimizer, Optimizer):
            given.append(optimizer)
        elif optimizers is not None:
            raise TypeError(
                "observe(optimizers=...) needs instances of torch.optim.Optimizer, got "
                f"{optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__}"
            )
    index = ModelIndex(model)
    copies = {} if owners is None else copies_of(model, index, given, owners)
    check_stand_ins(model, index, given, copies)
    return copies


def _merge(
    engine: Engine,
    count: str | None,
    name: str,
    start: int | None,
    optimizers: Sequence[Optimizer] | None,
    copies: Mapping[str, Copy],
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
    for parameter, copy in copies.items():
        earlier = engine.copies.get(parameter, copy)
        if earlier.base is not copy.base or earlier.offset != copy.offset:
            raise StreamlensError(
                f"this model is observed already with another owner of {parameter!r}: close the earlier lens "
                "first, or leave it out of owners="
            )
    if optimizers is not None:
        engine.expect(optimizers, copies)


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
        engine.inert = engine.inherited = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_silence_child)


@atexit.register
def _close_all() -> None:
    close_orphans()
    for engine in list(_engines):
        with contextlib.suppress(Exception):
            engine.shut_down(timeout=10.0)
