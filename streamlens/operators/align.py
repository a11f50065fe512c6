"""`align` and `combine`: several topics of one step together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from reactivex import Observable
from torch import Tensor

from streamlens.errors import UnknownTopicError
from streamlens.frame import Frame
from streamlens.lens import Lens
from streamlens.operators._base import is_whole
from streamlens.operators._wiring import JoinSource, joined
from streamlens.stream import Operator, Stream

__all__ = ["AlignedFrame", "JoinSource", "align", "combine"]


class AlignedFrame(Mapping[str, Frame]):
    """One frame of each input of a join, of the same step and with the same layers.

    Read a frame by its topic, `aligned["weights"]`, or by its place among the inputs, `aligned[0]`.
    A frame of the model itself (layers `("",)`) stands beside any layers. Raw frames in it are valid
    during delivery only, as ever.

    Attributes:
        frames: The frames in the order of the inputs.
        layers: The layers in common, in model order.
    """

    __slots__ = ("frames", "layers")

    frames: tuple[Frame, ...]
    layers: tuple[str, ...]

    def __init__(self, frames: Sequence[Frame]) -> None:
        self.frames = tuple(frames)
        self.layers = next((f.layers for f in frames if f.layers != ("",)), ("",))

    @property
    def step(self) -> int:
        """The step of every frame."""
        return self.frames[0].step

    @property
    def epoch(self) -> int:
        """The epoch the step lies in."""
        return self.frames[0].epoch

    @property
    def micro_step(self) -> int:
        """The latest micro-step of the frames."""
        return max(frame.micro_step for frame in self.frames)

    def __getitem__(self, key: str | int) -> Frame:
        """The frame of an input, by topic or by place.

        Raises:
            KeyError: There is none, or two inputs have that topic.
        """
        if isinstance(key, int):
            return self.frames[key]
        found = [frame for frame in self.frames if frame.topic == key]
        if len(found) == 1:
            return found[0]
        topics = ", ".join(repr(frame.topic) for frame in self.frames)
        remedy = "read it by place, aligned[0], or rename() one of them" if found else f"it has {topics}"
        number = "several frames" if found else "no frame"
        raise KeyError(f"{number} of topic {key!r} at step {self.step}: {remedy}")

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(frame.topic for frame in self.frames))

    def __len__(self) -> int:
        return len(set(self))

    def __repr__(self) -> str:
        topics = ", ".join(repr(frame.topic) for frame in self.frames)
        return f"AlignedFrame([{topics}], step={self.step}, layers=[{', '.join(self.layers[:4])}])"


def align(*sources: JoinSource, allowed_lateness: int = 0) -> Operator:
    """The join: frames of several topics that belong to the same step, with the layers in common.

    ::

        weights          --a0----a1----a2----->
        weight_updates   -b0-----------b2----->
             align("weights", "weight_updates")
        -------------------(a0,b0)-----(a2,b2)>

    A source is a topic's name or an operator (both applied to the stream in front), or a stream of
    its own. Each result is an `AlignedFrame`, given as soon as its last part has come. It has the
    layers that every input has, in the order of the first; a frame of the model itself, such as
    `loss`, joins every layer. If a topic comes in several frames a step (several optimizers do
    that), layers are given once each, as they become complete.

    Steps are complete, and what still waits for a partner is dropped, once an input has moved on: by
    a frame of a later step, by the step's closing on a stream that comes from a Lens, or by its end.
    At most 1,024 steps wait (32 where raw tensors had to be copied). Counted in `lens.stats()`:
    `incomplete` (layers without their partner), `late` (frames after the watermark), `duplicate`
    (layers that came twice; the first counts).

    Micro-step topics pair with each other by (step, micro-step); with anything else, on a Lens, they
    are averaged over their step first. Raw frames that were taken at different moments are copied
    while they wait. NaN passes through. The cost is some microseconds a frame.

    Args:
        *sources: Two or more inputs.
        allowed_lateness: How many steps an input may reorder: a step stays open until one this much
            later than the next has come.

    Returns:
        The operator; its stream carries `AlignedFrame`s.

    Raises:
        TypeError: Fewer than two inputs, or one that is none.
        ValueError: A negative lateness.
        StreamlensError: When applied: an input that cannot be joined, such as raw micro-step frames
            with a parameter topic, or one that is there twice.
    """
    _check("align", sources, allowed_lateness)

    def emit(frames: tuple[Frame, ...]) -> Any:
        return AlignedFrame(frames)

    return lambda source: joined(source, sources, emit, "align", allowed_lateness, keyed=True)


def combine(
    *sources: JoinSource,
    fn: Callable[..., Tensor | Sequence[Tensor] | float | Frame],
    name: str | None = None,
    allowed_lateness: int = 0,
) -> Operator:
    """A function of several topics of the same step: `align`, then `fn` of their values.

    `fn` is given the values of each input in order, as its frame has them: a tensor with the layer as
    its first dimension, or a tuple with a tensor a layer (raw frames). It returns values of the same
    layers, or a whole frame. A frame on which it raises is skipped and reported. NaN passes through.

    Args:
        *sources: Two or more inputs, as for `align`.
        fn: The function.
        name: The topic of the result; the function's name unless given. A replay that lacks an input
            gives what was stored under this name.
        allowed_lateness: As for `align`.

    Returns:
        The operator.

    Raises:
        TypeError: As for `align`; `fn` is not callable; it is a lambda and no name is given.
        UnmergeableError: When applied: raw tensors of which each of several ranks holds a part.

    Example:
        `lens.pipe(combine(norm("weight_gradients"), norm("weights"), fn=torch.mul, name="product"))`
    """
    _check("combine", sources, allowed_lateness)
    if not callable(fn):
        raise TypeError(f"combine(fn={fn!r}): fn is a function of the inputs' values")
    label = name or getattr(fn, "__name__", "<lambda>")
    if not isinstance(label, str) or label == "<lambda>":
        raise TypeError("combine() needs name=, the topic of its result, where the function has no name")

    def emit(frames: tuple[Frame, ...]) -> Frame:
        return _result(label, frames, fn(*[frame.values for frame in frames]))

    def apply(source: Observable[Frame]) -> Stream:
        try:
            return joined(source, sources, emit, f"combine[{label}]", allowed_lateness, whole=True)
        except UnknownTopicError:
            # A recorded run may have what this gave, and not what it was made of.
            if isinstance(source, Lens) and source.source.recorded and label in source.source.known_topics:
                return source.narrow(topics=(label,))
            raise

    return apply


def _result(name: str, frames: tuple[Frame, ...], result: Tensor | Sequence[Tensor] | float | Frame) -> Frame:
    if isinstance(result, Frame):
        return result
    place = next((frame for frame in frames if frame.layers != ("",)), frames[0])
    if isinstance(result, int | float):
        result = torch.full((len(place),), float(result))
    values = result.detach() if isinstance(result, Tensor) else tuple(v.detach() for v in result)
    if not isinstance(values, Tensor) and any(frame.borrowed for frame in frames):
        # What the function only passed on belongs to the model.
        values = tuple(v.clone() for v in values)
    return Frame(
        name,
        place.step,
        place.layers,
        values,
        epoch=place.epoch,
        micro_step=max(frame.micro_step for frame in frames),
        kind=place.kind,
        source=place.source,
    )


def _check(operator: str, sources: Sequence[object], lateness: object) -> None:
    if len(sources) < 2:
        example = f"{operator}('weights', 'weight_updates')"
        raise TypeError(f"{operator}() needs two inputs or more, such as {example}")
    for source in sources:
        if not source or not (isinstance(source, str | Observable) or callable(source)):
            raise TypeError(f"{operator}() takes topics, streams and operators, got {source!r}")
    if not is_whole(lateness) or lateness < 0:
        raise ValueError(f"{operator}(allowed_lateness={lateness!r}): a number of steps from 0 on")
