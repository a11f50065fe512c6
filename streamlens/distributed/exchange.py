"""`Ranks`: statistics of parts become those of the whole, over all processes of `torch.distributed`."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

import torch
import torch.distributed as dist
from torch import Tensor

from streamlens.capture.sharded import WHOLE, Part, data_part
from streamlens.capture.table import Rows
from streamlens.capture.view import View
from streamlens.distributed.group import Group, LostRanksError
from streamlens.distributed.layout import WEIGHT, Item
from streamlens.distributed.meeting import EVERY, Meeting, named
from streamlens.distributed.origins import Origins
from streamlens.distributed.shadows import Shadows, shared
from streamlens.distributed.wire import Wire
from streamlens.errors import StreamlensError, UnmergeableError
from streamlens.reductions import Reduction
from streamlens.topics import Facet, Phase, TopicSpec, topic_spec

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine
    from streamlens.capture.exchange import Partial

__all__ = ["Ranks"]

_AVAILABLE: Final = dist.is_available()


class Ranks:
    """What an engine asks of the other processes of `torch.distributed`.

    Args:
        engine: The engine.
        timeout: Seconds to wait for others at most.
    """

    def __init__(self, engine: Engine, timeout: float) -> None:
        self._engine = engine
        self.timeout = timeout
        self._rank = 0
        self._ranks = 0
        self._spread: tuple[Part, bool, bool] | None = None
        self._meeting: Meeting | None = None
        self._wire: Wire | None = None
        self._origins = Origins(0, 1)
        self._over = False
        self._since = 0.0
        self._told_alone = False
        self._told: set[tuple[str, str]] = set()
        self._asked: tuple[View, ...] | None = None
        self._published: tuple[View, ...] = ()
        self._agreed: tuple[View, ...] = ()
        self._shadows = Shadows(engine)
        self._moment = (-1, 0)

    # -- facts -------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether several processes train together; known from when the process group is there."""
        if not self._ranks:
            if not (_AVAILABLE and dist.is_initialized()):
                return False
            self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
            self._origins = Origins(self._rank, self._ranks)
        return self._ranks > 1

    @property
    def writes(self) -> bool:
        """Whether sinks write in this process: in the first one."""
        return not self.active or self._rank == 0

    @property
    def place(self) -> str:
        """`rank 1`."""
        return f"rank {self._rank}" if self.active else ""

    @property
    def batch(self) -> Part:
        """The part of the global batch that this process computes."""
        return self._facts[0] if self.active else WHOLE

    @property
    def split(self) -> bool:
        """Whether an output that is no DTensor may be a part of the layer's."""
        return self.active and self._facts[1]

    @property
    def _facts(self) -> tuple[Part, bool, bool]:
        """The part of the batch, whether computation is split, whether parameters are."""
        if self._spread is None:
            model, entries = self._engine.model, self._engine.index.entries
            if model is None:
                return WHOLE, False, False
            part, split = data_part(model, [e.parameter for e in entries], self._rank, self._ranks)
            self._spread = part, split, any(e.part is not WHOLE for e in entries)
        return self._spread

    @property
    def sent(self) -> int:
        """Bytes that this process put into the messages of the last update which took all."""
        return 0 if self._wire is None else self._wire.sent

    def model_changed(self) -> None:
        """Parameters were replaced."""
        self._spread = None
        self._asked = None

    def demands_changed(self) -> None:
        """A subscription has come or gone; what was agreed on is taken until all know of it."""
        self._asked = None
        if self._wire is not None and not self._shadows.changing:
            self._shadows.follow(self._agreed, self._asks)

    def admits(self, view: View) -> bool:
        """Whether a view is taken now: what takes all ranks is, once all know of it."""
        if view.whole and self.active and not self._has_whole(view):
            return False
        return self._wire is None or shared(view) in self._agreed or not self._takes_all(view)

    def _has_whole(self, view: View) -> bool:
        """Whether tensors are whole for what needs them so; that they no longer are is told once."""
        try:
            self.check(view.topics, view.whole, None)
        except UnmergeableError as error:
            what = (", ".join(view.topics), view.whole)
            if what not in self._told:
                self._told.add(what)
                self._engine.report(error, view.whole)
            return False
        return True

    def _takes_all(self, view: View) -> bool:
        """Whether there are topics in a view of which each process has a part that is reduced."""
        specs = [topic_spec(topic) for topic in view.topics]
        reduction = view.reduction
        # What does not merge is told of, and left out, by each process.
        made = (reduction is not None and reduction.merges) or view.follower is not None
        return any(spec is not None and (made or not spec.raw) and self._in_parts(spec) for spec in specs)

    def _in_parts(self, spec: TopicSpec) -> bool:
        """Whether what this process has of a topic is a part of the whole."""
        if spec.phase in (Phase.MODULE, Phase.BATCH, Phase.LOSS):
            return self.batch.parts > 1 or self.split
        return spec.phase is Phase.PARAMETER and spec.facet is not Facet.RATE and self._facts[2]

    def check(self, topics: Iterable[str], what: str, reduction: Reduction | None) -> None:
        """Raise where something cannot be had of a whole.

        Raises:
            UnmergeableError: It takes whole tensors, or a reduction that does not merge.
        """
        if not self.active:
            return
        for topic in topics:
            spec = topic_spec(topic)
            if spec is None or not spec.raw or not self._in_parts(spec):
                continue
            scaled = topic == "layer_gradients"
            if reduction is not None and reduction.merges and not (scaled and not reduction.needs()):
                continue
            holds = "a part of the parameters" if spec.phase is Phase.PARAMETER else "its part of the batch"
            raise UnmergeableError(
                f"{what} of {topic!r} does not follow from that of its parts, and each of {self._ranks} "
                f"ranks holds {holds}: use what merges (norm, mean, std, minimum, maximum, histogram, ...), "
                "or observe(model, distributed=False) to look at this rank's part alone"
            )

    # -- at an update ------------------------------------------------------------------------

    def settle(self, partials: Sequence[Partial]) -> None:
        """Turn the rows of parts into rows of the whole; those that cannot be are taken out."""
        items, lost = self._take(partials)
        step = self._engine.clock.step
        self._moment = (step, self._moment[1] + 1 if self._moment[0] == step else 0)
        if not self._over:
            try:
                if self._ready(step) and self._wire is not None:
                    found, tells = self._wire.merge(items, lost, self._moment, news=self._has_news)
                    self._origins.note(step, found)
                    for item, rows in found:
                        if item.table is not None:
                            item.table.put_wholes(rows)
                    if tells:
                        self._agree()
                    return
            except Exception as error:
                self._give_up(error)
        self._engine.counts["unmerged"] += bool(items)

    def _take(self, partials: Sequence[Partial]) -> tuple[list[Item], list[tuple[str, str]]]:
        """What there is to merge, and the layers that failed."""
        items: list[Item] = []
        lost: list[tuple[str, str]] = []
        for partial in partials:
            first = len(items)
            names = partial.names or {}
            lost += [
                (partial.label, str(names.get(k, k))) for k, part in partial.parts.items() if part is None
            ]
            scaled = partial.weight is not None
            taken = [
                rows
                for rows in partial.table.take(partial.parts)
                if isinstance(rows.what, tuple) or self._merges(rows.what, partial.label, scaled=scaled)
            ]
            for rows in taken:
                good = tuple(key for key in rows.keys if partial.parts[key] is not None)
                if len(good) < len(rows.keys):
                    rows = rows.select(good)
                items.append(
                    Item(
                        partial.label,
                        partial.table,
                        rows,
                        tuple(str(names.get(key, key)) for key in rows.keys),
                        tuple(partial.parts[key] or WHOLE for key in rows.keys),
                        partial.open,
                        scaled,
                    )
                )
            origins = self._origins.item(items[first:])
            if taken and partial.weight is not None:
                items.append(self._weight(partial, taken[0].values))
            if origins is not None:
                items.append(origins)
        return items, lost

    def _weight(self, partial: Partial, like: Tensor) -> Item:
        """How many examples this process has, beside the numbers that it is for."""
        number = torch.as_tensor(partial.weight, dtype=like.dtype).to(like.device, non_blocking=True)
        rows = Rows((), ("",), number.reshape(1, 1))
        return Item(partial.label + WEIGHT, None, rows, ("",), (self.batch,), open=True)

    def _merges(self, reduction: Reduction, label: str, *, scaled: bool) -> bool:
        """Whether a reduction merges; what does not, and was not refused when asked for, is told once."""
        if reduction.merges and not scaled:
            return True
        what = label.partition("/")[0]
        if (what, reduction.name) not in self._told:
            self._told.add((what, reduction.name))
            self._engine.report(
                UnmergeableError(
                    f"{reduction.describe()} of {what!r} does not follow from that of its parts, and "
                    f"each of {self._ranks} ranks holds a part: it is left out"
                ),
                f"{what}.{reduction.name}",
            )
        return False

    # -- agreement ---------------------------------------------------------------------------

    def _ready(self, step: int) -> bool:
        """Whether all processes merge at this update."""
        if self._wire is not None:
            return step % EVERY == 0 or any(view.due(step) for view in self._agreed)
        if self._meeting is None:
            self._meeting = self._meet()
            self._since = time.monotonic()
        if not self._meeting.come(step, asks=bool(self._asks)):
            self._look_for_others()
            return False
        self._wire = Wire(Group(self._meeting.store, self._rank, self._ranks, self.timeout))
        self._meeting.leave()
        # Where others have not taken at this step what is asked for here, they have from the next on.
        return self._agree()

    def _meet(self) -> Meeting:
        """Where all processes that observe this model meet."""
        from torch.distributed.distributed_c10d import _get_default_store

        model, entries = self._engine.model, self._engine.index.entries
        shape = (
            self._engine.name,
            type(model).__name__,
            [(e.name, tuple(e.parameter.shape)) for e in entries],
        )
        digest = hashlib.sha256(repr(shape).encode()).hexdigest()[:16]
        return Meeting(_get_default_store(), digest, self._rank, self._ranks, self.timeout)

    @property
    def _asks(self) -> tuple[View, ...]:
        """What is subscribed here and takes all processes."""
        if self._asked is None:
            self._asked = self._shadows.asked_here(self._takes_all)
        return self._asked

    @property
    def _has_news(self) -> bool:
        return self._asks != self._published

    def _agree(self) -> bool:
        """Tell each other what is subscribed: all of it is taken on all processes from the next step on.

        Returns:
            Whether all have asked for the same, and so have taken it at this step already.
        """
        assert self._wire is not None
        self._published = self._asks
        told: list[list[bytes]] = self._wire.group.gather([self._shadows.packed(v) for v in self._published])
        wanted = dict.fromkeys(packed for views in told for packed in views if packed)
        self._agreed = tuple(dict.fromkeys(pickle.loads(packed) for packed in wanted))
        self._shadows.follow(self._agreed, self._asks)
        self._engine.demands_changed()
        return all(set(views) - {b""} == set(wanted) for views in told)

    def _look_for_others(self) -> None:
        """Say so once if this process observes alone, though it can do so: what is whole goes on."""
        late = time.monotonic() - self._since > self.timeout
        if self._told_alone or not late or self._meeting is None or self._engine.idle:
            return
        self._told_alone = True
        missing = self._meeting.missing()
        if missing:
            self._engine.report(
                StreamlensError(
                    f"{self.place} observes the model, and after {self.timeout:g} s {named(missing)} not: "
                    "what every rank has whole goes on, and losses, activations and all else that takes all "
                    "ranks cannot be had. Call streamlens.observe(model) on every rank (sinks write on rank "
                    "0 alone by themselves), or observe(model, distributed=False) to look at this rank alone"
                ),
                "observing on one rank",
            )

    def origins(self, topic: str, layers: Sequence[str], step: int) -> tuple[int, ...]:
        """The processes from which values that are not finite come, as the last updates have told."""
        return self._origins.of(topic, layers, step)

    # -- the end -----------------------------------------------------------------------------

    def _give_up(self, error: Exception) -> None:
        """Merge no more: training goes on, and what this process has whole."""
        self._leave()
        if not isinstance(error, StreamlensError):
            why = f"could not merge with the other ranks ({error!r})"
            if isinstance(error, LostRanksError):
                why = f"lost the other ranks ({error}): one of them has failed, ended, or closed its lens"
            step = self._engine.clock.step
            error = StreamlensError(
                f"{self.place} {why}. What takes all ranks is left out from step {step} on, and training "
                "goes on"
            )
        self._engine.report(error, "merging over ranks")

    def _leave(self) -> None:
        self._over = True
        meeting, self._meeting, self._wire = self._meeting, None, None
        self._agreed = ()
        if meeting is not None:
            # The store may be gone, as where the process group was destroyed before.
            with contextlib.suppress(Exception):
                meeting.leave()
        self._shadows.drop()

    def close(self) -> None:
        """Nothing more will be merged; who still waits for this process fails at once."""
        self._leave()
