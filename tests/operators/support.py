"""What the operator tests share: frames by hand, streams by hand, and values read back as plain Python."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from hypothesis import strategies as st
from reactivex import Observable
from reactivex.subject import Subject
from torch import Tensor

from streamlens.chain import Chain, Mark, MarkKind
from streamlens.frame import Frame, Kind
from streamlens.lens import Lens
from streamlens.runtime import Runtime, default_runtime
from streamlens.stream import Operator, Stream

Values = Mapping[str, float]


def frame(step: int, values: Mapping[str, Any], topic: str = "x", **fields: Any) -> Frame:
    """A stacked frame of float64 values by layer."""
    stacked = torch.tensor(list(values.values()), dtype=torch.float64).reshape(len(values), *_inner(values))
    return Frame(topic, step, tuple(values), stacked, **fields)


def _inner(values: Mapping[str, Any]) -> tuple[int, ...]:
    first = next(iter(values.values()), 0.0)
    return (len(first),) if isinstance(first, list) else ()


def ragged(step: int, values: Mapping[str, Tensor], topic: str = "x", **fields: Any) -> Frame:
    """A frame with a tensor a layer, of any shapes."""
    return Frame(topic, step, tuple(values), tuple(values.values()), **fields)


def run(operator: Operator, frames: Iterable[Frame], *, complete: bool = True) -> list[Frame]:
    """What an operator gives for some frames on a plain stream."""
    source: Subject[Frame] = Subject()
    out: list[Frame] = []
    source.pipe(operator).subscribe(out.append)
    for item in frames:
        source.on_next(item)
    if complete:
        source.on_completed()
    return out


def as_dicts(frames: Iterable[Frame]) -> list[tuple[int, dict[str, Any]]]:
    """(step, host values by layer) of each frame."""
    return [(f.step, f.to_dict()) for f in frames]


def flat(frames: Iterable[Frame]) -> dict[tuple[int, str], Any]:
    """Host values by (step, layer); a pair that comes twice fails."""
    out: dict[tuple[int, str], Any] = {}
    for item in frames:
        for layer, value in item.to_dict().items():
            assert (item.step, layer) not in out, f"({item.step}, {layer!r}) was given twice"
            out[item.step, layer] = value
    return out


def same(got: Any, wanted: Any, *, rel: float = 1e-9, abs_: float = 1e-9) -> bool:
    """Whether two numbers agree, NaN with NaN and inf with inf."""
    if math.isnan(wanted) or math.isnan(got):
        return math.isnan(wanted) and math.isnan(got)
    return math.isclose(got, wanted, rel_tol=rel, abs_tol=abs_)


def assert_same(got: Mapping[Any, Any], wanted: Mapping[Any, Any], **tolerance: float) -> None:
    """Fail unless two tables have the same keys and numbers."""
    assert set(got) == set(wanted)
    wrong = {key: (got[key], wanted[key]) for key in wanted if not same(got[key], wanted[key], **tolerance)}
    assert not wrong


NUMBERS = st.floats(-100, 100, width=32)
WITH_GAPS = st.one_of(NUMBERS, st.sampled_from([math.nan, math.inf, -math.inf]))
LAYERS = ("a", "b", "c")


@st.composite
def streams(
    draw: st.DrawFn, *, numbers: st.SearchStrategy[float] = WITH_GAPS
) -> list[tuple[int, dict[str, float]]]:
    """(step, values by layer) with steps left out and layers that come and go."""
    steps = sorted(draw(st.sets(st.integers(0, 25), max_size=14)))
    names = st.lists(st.sampled_from(LAYERS), min_size=1, max_size=3, unique=True).map(sorted)
    return [(step, {name: draw(numbers) for name in draw(names)}) for step in steps]


def chain_of(stream: Observable[Frame], on_next: Callable[[Frame], None]) -> Chain:
    """Subscribe a plain stream; gives its chain, which has the state of its operators."""
    known = set(map(id, default_runtime().chains))
    stream.subscribe(on_next)
    return next(chain for chain in default_runtime().chains if id(chain) not in known)


def saved_and_loaded(state: Any) -> Any:
    """The state after a trip through a file, read by torch's safe loader."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(operator: Callable[[], Operator], frames: Sequence[Frame], at: int) -> list[Frame]:
    """What an operator gives if the run is interrupted after some frames and resumed from its state."""
    out: list[Frame] = []
    first: Subject[Frame] = Subject()
    before = chain_of(first.pipe(operator()), out.append)
    for item in frames[:at]:
        first.on_next(item)
    state = saved_and_loaded(before.state_dict())
    assert before.disposable is not None
    before.disposable.dispose()
    second: Subject[Frame] = Subject()
    after = chain_of(second.pipe(operator()), out.append)
    for cell, saved in zip(after.cells, state, strict=True):
        assert cell.plan == saved["plan"]
        cell.load_state_dict(saved["state"])
    for item in frames[at:]:
        second.on_next(item)
    second.on_completed()
    return out


class Run:
    """A stand-in for a run: streams with marks, as those that come from a Lens have them."""

    session = None

    def __init__(self) -> None:
        self.runtime = Runtime(on_error="raise")
        self.subject: Subject[Frame] = Subject()

    def stream(self, kind: Kind | None = Kind.STEP, *, raw: bool = False, topic: str | None = None) -> Stream:
        """A stream of the run, of one topic if named."""

        def subscribe(observer: Any, scheduler: Any = None) -> Any:
            def on_next(item: Frame) -> None:
                if topic is None or item.topic == topic:
                    observer.on_next(item)

            return self.subject.subscribe(on_next, observer.on_error, observer.on_completed)

        # That there is a lens is all that an operator asks of it here.
        lens = cast("Lens", self)
        return Stream(
            subscribe, plan=("run", topic or ""), runtime=self.runtime, lens=lens, kind=kind, raw=raw
        )

    def push(self, *frames: Frame) -> None:
        for item in frames:
            self.subject.on_next(item)

    def update(self, step: int, epoch: int = 0) -> None:
        self.runtime.mark(Mark(MarkKind.UPDATE, step, epoch))

    def close_step(self, step: int, epoch: int = 0) -> None:
        self.runtime.mark(Mark(MarkKind.CLOSED, step, epoch))

    def end_epoch(self, step: int, epoch: int) -> None:
        self.runtime.mark(Mark(MarkKind.EPOCH, step, epoch))
