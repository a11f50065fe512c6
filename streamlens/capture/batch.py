"""Taking what a whole batch has one of: its input, its labels, the model's output."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Final, cast

from torch import Tensor

from streamlens.capture.exchange import Partial
from streamlens.capture.sharded import local, part_of
from streamlens.capture.table import Needs, Table
from streamlens.errors import StreamlensError
from streamlens.frame import Frame, Kind, Lease
from streamlens.reductions import Reduction

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine
    from streamlens.capture.view import Demand

__all__ = ["BatchCapture", "note_part", "reduced_frame"]

_MODEL: Final = ("",)
_GIVEN: Final = frozenset({"input_data", "input_labels"})
"""What a model is given: tensor parallelism gives all processes the same."""


def note_part(engine: Engine, table: Table, key: Hashable, tensor: Tensor, *, given: bool = False) -> None:
    """Note which part of the global batch's tensor this process has, in the table it is measured in.

    Args:
        engine: The engine.
        table: The table.
        key: The layer.
        tensor: The tensor.
        given: Whether it is no output of the model.
    """
    exchange = engine.exchange
    if not exchange.active:
        return
    try:
        if exchange.split and not given and not hasattr(tensor, "placements"):
            raise StreamlensError(
                "the model's computation is split over processes, and this output is no DTensor, so that "
                "nothing says which part of it this process has. Have the parallel style return DTensors "
                "(use_local_output=False), or look at parameter topics"
            )
        part = part_of(tensor).within(exchange.batch)
    except StreamlensError as error:
        table.parts[key] = None
        if key not in engine.batches.told:
            engine.batches.told.add(key)
            engine.report(error, f"layer {key!r}")
        return
    if part.parts > 1:
        table.parts[key] = part


def reduced_frame(
    engine: Engine,
    topic: str,
    table: Table,
    reduction: Reduction,
    keys: tuple[str, ...],
    micro_step: int | None = None,
    interned: Callable[[tuple[str, ...]], tuple[str, ...]] = tuple,
) -> Frame | None:
    """What one pass has of a reduction, as a frame; None if no layer has it, or if it fails.

    Args:
        engine: The engine.
        topic: What was reduced.
        table: Where it was measured.
        reduction: The reduction.
        keys: The layers wanted.
        micro_step: Whose it is; that of the open one unless given.
        interned: Gives equal names as one object.
    """
    name = f"{topic}.{reduction.name}"
    found = engine.attempt(name, table.finish, reduction, keys)
    if found is None:
        return None
    return engine.frame(
        name,
        interned(cast("tuple[str, ...]", found[0])),
        found[1],
        kind=Kind.MICRO_STEP,
        components=reduction.components,
        micro_step=micro_step,
    )


class BatchCapture:
    """Measures tensors of the whole batch, each as a burst of its own.

    Attributes:
        told: Layers of which it was said that they are of unknown parts.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.told: set[Hashable] = set()
        self._calls: dict[str, int] = {}

    def begin_pass(self) -> None:
        """A new micro-step begins."""
        self._calls = {}

    def measure(self, topic: str, tensor: Tensor, due: Sequence[Demand]) -> None:
        """Emit one tensor of the whole batch: its input, labels or output.

        A second one in the same pass is labelled `@1`, as a module's second call is.
        """
        found: dict[Reduction | None, list[Demand]] = {}
        for demand in due:
            if topic in demand.view.topics:
                found.setdefault(demand.view.reduction, []).append(demand)
        if not found:
            return
        call = self._calls.get(topic, 0)
        self._calls[topic] = call + 1
        layers = (f"@{call}",) if call else _MODEL
        engine, table = self._engine, Table()
        if (raw := found.pop(None, None)) is not None:
            lease = Lease()
            frame = engine.frame(topic, layers, (tensor.detach(),), kind=Kind.MICRO_STEP, lease=lease)
            engine.post_frames([(raw, frame)], lease)
        needs = Needs.of((r for r in found if r is not None), merging=engine.exchange.active)
        if not needs:
            return
        note_part(engine, table, layers[0], tensor, given=topic in _GIVEN)

        def failed(key: Hashable, error: Exception) -> None:
            table.parts[key] = None
            engine.report(error, f"layer {key!r}")

        table.measure(layers[0], local(tensor), needs, failed)
        if not table.parts:
            self._emit(topic, layers, table, found)
            return
        micro_step = engine.clock.micro_step
        engine.settling.later(
            Partial(f"{topic}/{micro_step}/{call}", table, table.parts, open=True),
            lambda: self._emit(topic, layers, table, found, micro_step),
        )

    def _emit(
        self,
        topic: str,
        layers: tuple[str, ...],
        table: Table,
        found: dict[Reduction | None, list[Demand]],
        micro_step: int | None = None,
    ) -> None:
        frames: list[tuple[Sequence[Demand], Frame]] = []
        for reduction, demands in found.items():
            assert reduction is not None
            frame = reduced_frame(self._engine, topic, table, reduction, layers, micro_step)
            if frame is not None:
                frames.append((demands, frame))
        self._engine.post_frames(frames)
