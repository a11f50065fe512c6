"""Right predictions among the training batches, counted from what the run itself computed."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from reactivex import Observable
from torch import Tensor

from streamlens.capture.engine import Engine
from streamlens.capture.exchange import Partial
from streamlens.capture.sharded import Part
from streamlens.capture.table import Rows, Table
from streamlens.chain import Mark, MarkKind
from streamlens.errors import StreamlensError, UnmergeableError
from streamlens.frame import Frame, Kind
from streamlens.lens import Lens
from streamlens.nodes import Emitted, stateful
from streamlens.operators._base import OperatorNode, checked_source, relabelled
from streamlens.operators._scoring import Guess, Scoring, share_of
from streamlens.operators.selection import topic
from streamlens.reductions import Statistic
from streamlens.runtime import Runtime
from streamlens.stream import Stream

if TYPE_CHECKING:
    from streamlens.capture.source import Source

__all__ = ["LABELS", "OUTPUT", "TALLY", "training_tallies"]

OUTPUT: Final = "network_output"
LABELS: Final = "input_labels"
TALLY: Final = "train_tally"
_SUM: Final = Statistic("sum")

_Place = tuple[int, int, str]
"""Step, micro-step and layer: `""`, or `"@1"` for a second output in one pass."""


def training_tallies(source: Observable[Frame], scoring: Scoring, *, shares: str = "") -> Stream:
    """Sums of scores and numbers of predictions of the training batches, once a step.

    On a Lens, where each of several processes has its part of the batch, they are of all parts.

    Args:
        source: A Lens, or a stream with raw frames of `network_output` and `input_labels`.
        scoring: What is right.
        shares: Give the quotients, under this topic.

    Returns:
        Frames of topic `train_tally`, (1, 2), of the model itself.
    """
    stream = checked_source(topic(OUTPUT, LABELS)(source))
    if isinstance(stream, Lens) and stream.view.reduction is not None:
        raise _needs_tensors(scoring.operator, stream.plan_text)
    of_a_run = stream.lens is not None
    others: _Follower | None = None
    if isinstance(stream, Lens):
        others = _Follower.of(scoring)
        if not others.label and stream.source.exchange.batch.parts > 1:
            raise UnmergeableError(
                f"{scoring.operator}(metric=...) is of the batches of all ranks, and they cannot be told of "
                f"{scoring.metric!r}, which does not pickle: pass a function at the top level of a module, "
                "or observe(model, distributed=False) to look at this rank's part alone"
            )
        stream = Lens(stream.source, stream.session, replace(stream.view, follower=others))
    runtime, plan = stream.runtime, f"{shares or TALLY}({scoring.plan})"

    def make() -> _Tallies:
        return _Tallies(runtime, scoring, shares, of_a_run=of_a_run, others=others)

    return stateful(stream, make, plan, marks=True, kind=Kind.STEP)


@dataclass(frozen=True)
class _Follower:
    """Counts this process's part of the batch for others, who have asked for it.

    Attributes:
        label: What is counted: equal where the same is; empty if other processes cannot be told of it.
        scoring: What is right.
    """

    label: str
    scoring: Scoring = field(compare=False)

    @classmethod
    def of(cls, scoring: Scoring) -> _Follower:
        """What others do."""
        try:
            return cls(hashlib.sha256(pickle.dumps(scoring)).hexdigest()[:16], scoring)
        except Exception:
            return cls("", scoring)

    def __call__(self, source: Source) -> Callable[[Frame], None]:
        """What receives the outputs and labels."""
        node = _Tallies(source, self.scoring, "", of_a_run=True, others=self)

        def count(frame: Frame) -> None:
            node.on_frame(frame)

        return count


def _needs_tensors(operator: str, what: str) -> StreamlensError:
    return StreamlensError(
        f"{operator}() needs raw frames of {OUTPUT!r} and {LABELS!r}, and {what} has numbers: apply it to "
        f"the lens that observe() returned. A stored run holds only what was computed while it ran: there, "
        f"subscribe {operator}() while training"
    )


@dataclass
class _Step:
    """What has come of one step."""

    at: Frame
    """The newest frame without its values: where in the run this is."""
    total: Tensor | None = None
    lost: bool = False
    """Whether something of it could not be merged with what other processes have."""
    guesses: dict[_Place, Guess] = field(default_factory=dict)
    labels: dict[_Place, Tensor] = field(default_factory=dict)

    def add(self, tally: Tensor) -> None:
        """Count more predictions."""
        self.total = tally if self.total is None else self.total + tally.to(self.total.device)


class _Tallies(OperatorNode):
    """Holds what a pass predicted until its labels come, or the other way round; sums over the step.

    Args:
        runtime: The stream's runtime.
        scoring: What is right.
        shares: The topic of the quotients; empty to give the sums.
        of_a_run: Whether the step's end is told by marks.
        others: What other processes do of it; None if they are not asked.
    """

    def __init__(
        self, runtime: Runtime, scoring: Scoring, shares: str, *, of_a_run: bool, others: _Follower | None
    ) -> None:
        super().__init__(runtime)
        self._others = others
        self._scoring = scoring
        self._shares = shares
        self._of_a_run = of_a_run
        self._steps: dict[str, _Step] = {}
        """The open step of each source."""

    def on_frame(self, frame: Frame) -> Emitted:
        """The tally of an earlier step, where no mark says that it is over."""
        out: list[Frame] = []
        step = self._steps.get(frame.source)
        if step is not None and frame.step > step.at.step:
            out = self._close(frame.source)
            step = None
        elif step is not None and frame.step < step.at.step:
            self.count("late")
            return out
        if not frame.layers:
            return out
        if isinstance(frame.values, Tensor) and frame.values.ndim < 2 and frame.topic == OUTPUT:
            raise _needs_tensors(self._scoring.operator, f"the frame of {frame.topic!r}")
        at = relabelled(frame, frame.topic, torch.empty(0), layers=())
        if step is None:
            step = self._steps[frame.source] = _Step(at)
        step.at = at
        for layer, value in frame.items():
            self._take(step, (frame.step, frame.micro_step, layer), frame.topic, value)
        return out

    def _take(self, step: _Step, place: _Place, topic: str, value: Tensor) -> None:
        if topic == OUTPUT:
            guess = self._scoring.guess(value)
            labels = step.labels.pop(place, None)
            if labels is None:
                step.guesses[place] = guess
                return
        else:
            labels = value
            found = step.guesses.pop(place, None)
            if found is None:
                step.labels[place] = value.clone()
                return
            guess = found
        tally = self._scoring.tally(guess, labels)
        engine = self._runtime
        if self._others is None or not isinstance(engine, Engine) or engine.exchange.batch.parts == 1:
            step.add(tally)
            return
        # The predictions of all processes are counted at the update.
        table = Table()
        table.put_wholes(Rows((_SUM,), ("",), tally.reshape(2, 1)))
        parts: dict[Hashable, Part | None] = {"": engine.exchange.batch}

        def counted() -> None:
            found = table.column(_SUM)
            step.lost |= not found
            for total, count in found.values():
                step.add(torch.stack([total, count]))

        _, micro_step, layer = place
        label = f"{TALLY}/{self._others.label}/{micro_step}/{layer}"
        engine.settling.later(Partial(label, table, parts, open=True), counted)

    def on_mark(self, mark: Mark) -> Emitted:
        """The tally of the step that has been updated."""
        if mark.kind is MarkKind.EPOCH:
            return None
        due = [source for source, step in self._steps.items() if step.at.step <= mark.step]
        return [frame for source in due for frame in self._close(source)]

    def on_completed(self) -> Emitted:
        """The last step's tally; on a lens it has none, since its update never came."""
        out = [frame for source in list(self._steps) for frame in self._close(source)]
        return None if self._of_a_run else out

    def _close(self, source: str) -> list[Frame]:
        step = self._steps.pop(source)
        if step.total is None or step.lost:
            return []
        values = share_of(step.total) if self._shares else step.total[None]
        frame = relabelled(step.at, self._shares or TALLY, values, layers=("",))
        return [frame.replace(kind=Kind.STEP)]

    def state_dict(self) -> dict[str, Any]:
        """The sums of the open step; a pass whose labels have not come yet is computed again."""
        return {
            "steps": [
                {"at": [s.at.step, s.at.epoch, s.at.micro_step], "source": source, "total": s.total}
                for source, s in self._steps.items()
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._steps = {}
        for saved in state["steps"]:
            step, epoch, micro_step = saved["at"]
            at = Frame(
                OUTPUT,
                step,
                (),
                torch.empty(0),
                epoch=epoch,
                micro_step=micro_step,
                kind=Kind.MICRO_STEP,
                source=saved["source"],
            )
            self._steps[saved["source"]] = _Step(at, saved["total"])
