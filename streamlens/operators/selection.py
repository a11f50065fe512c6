"""Which frames, and what of them: `topic`, `layers`, `every`, `between`, `where`, `rename`, `per_layer`.

Applied to a Lens, `topic`, `layers`, `every` and `between` give a narrower Lens: what they leave out is
never captured. On any other stream they filter its frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from reactivex import Observable
from torch import Tensor, nn

from streamlens.frame import Frame
from streamlens.layers import LayerSelector
from streamlens.lens import Lens
from streamlens.nodes import frame_operator
from streamlens.operators._base import check_topics, checked_source, is_whole, modules_of
from streamlens.operators._windowed import Windowed
from streamlens.stream import Operator, Stream

__all__ = ["between", "every", "layers", "per_layer", "rename", "topic", "where"]


def topic(*names: str) -> Operator:
    """Only the topics named.

    On a Lens this selects what is captured; on another stream it drops the frames of other topics.

    Args:
        *names: One or more topics, such as `"weights"` or `"loss"`.

    Returns:
        The operator.

    Raises:
        TypeError: No name, or one that is not a string.
        UnknownTopicError: When applied to a Lens that nothing can provide the topic for; the
            message has near names.
    """
    if not names:
        raise TypeError("topic() needs at least one topic name, such as topic('weights')")
    wanted = frozenset(check_topics("topic", names))

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        if isinstance(source, Lens):
            return source.narrow(topics=names)
        plan = f"topic({', '.join(map(repr, names))})"
        return frame_operator(source, lambda frame: frame if frame.topic in wanted else None, plan)

    return apply


def layers(*which: str | type[nn.Module], depth: int | None = None) -> Operator:
    """Only the layers that match; frames left without any are dropped.

    Globs go over qualified names (`"features.*"`, `"*.attn.q_proj"`), classes over the modules'
    types; a layer is selected if any of them matches, and if it lies at the depth asked for. The
    layers of parameter topics (`"features.0.weight"`) count as their module, and later calls of a
    module (`"act@1"`) as the module itself.

    Args:
        *which: Shell patterns and module classes.
        depth: -1 for the leaves, 0 for the model itself, d for the modules at depth d and the
            leaves above it.

    Returns:
        The operator.

    Raises:
        TypeError: Nothing to select by, or something that is neither a pattern nor a class.
        LayerNotFoundError: When applied to a Lens of a model without such a layer, or to a stream of
            the model's layers that comes from one.
        StreamlensError: When applied with classes or a depth to a stream that comes from no lens.
    """
    selector = _selector(which, depth)
    plan = f"layers({selector.describe()})"

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        if isinstance(source, Lens):
            return source.narrow(layers=selector)
        stream = checked_source(source)
        _check_names(stream, selector)
        by_name = not selector.classes and selector.depth is None
        modules = {} if by_name else modules_of(stream, plan)

        def selected(name: str) -> bool:
            module_name = name.partition("@")[0]
            if by_name:
                return selector.matches_name(name) or selector.matches_name(module_name)
            if module_name not in modules:
                module_name = module_name.rpartition(".")[0]
            module = modules.get(module_name)
            return module is not None and selector.matches_module(module_name, module)

        chosen = frame_operator(stream, LayerPick(selected), plan)
        chosen.selectors = (*stream.selectors, selector)
        return chosen

    return apply


def _check_names(stream: Stream, selector: LayerSelector) -> None:
    """Raise for a glob that no layer can match, where a stream's layers are still the model's."""
    lens = stream.lens
    if lens is None or stream.foreign or any("@" in glob for glob in selector.globs):
        return
    # Groups, functions of frames, and topics of the user's own have layers with names of their own.
    renaming = (
        "across_layers(",
        "scan(",
        *map(repr, lens.source.user_topics),
        *map(repr, lens.source.derived_topics),
    )
    if not any(sign in stream.plan_text for sign in renaming):
        Lens(lens.source, lens.session).narrow(layers=selector)


def _selector(which: tuple[str | type[nn.Module], ...], depth: int | None) -> LayerSelector:
    if not which and depth is None:
        raise TypeError("layers() needs globs, module classes or depth=, such as layers('features.*')")
    if depth is not None and (not is_whole(depth) or depth < -1):
        raise ValueError(f"layers(depth={depth!r}): depth is -1 (leaves), 0 (the model) or above")
    globs: list[str] = []
    classes: list[type[nn.Module]] = []
    for item in which:
        if isinstance(item, str):
            globs.append(item)
        elif isinstance(item, type) and issubclass(item, nn.Module):
            classes.append(item)
        else:
            raise TypeError(
                f"layers() takes globs ('features.*') and module classes (nn.Linear), got {item!r}"
            )
    return LayerSelector(tuple(globs), tuple(classes), depth)


class LayerPick:
    """Selects layers of frames by a test of their names, remembering the last answer.

    Args:
        selected: Whether a layer is wanted.
    """

    def __init__(self, selected: Callable[[str], bool]) -> None:
        self._selected = selected
        self._layers: tuple[str, ...] | None = None
        self._kept: tuple[str, ...] = ()
        self._index: dict[torch.device, Tensor] = {}

    def __call__(self, frame: Frame) -> Frame | None:
        """The frame with the layers wanted, or None if it has none of them."""
        names = frame.layers
        if names is not self._layers and names != self._layers:
            self._kept = tuple(name for name in names if self._selected(name))
            self._index = {}
            self._layers = names
        if not self._kept:
            return None
        if len(self._kept) == len(names):
            return frame
        if not frame.stacked:
            return frame.select(self._kept)
        values = cast("Tensor", frame.values)
        index = self._index.get(values.device)
        if index is None:
            wanted = frozenset(self._kept)
            rows = [i for i, name in enumerate(names) if name in wanted]
            index = torch.tensor(rows, dtype=torch.long).to(values.device, non_blocking=True)
            self._index[values.device] = index
        return frame.replace(layers=self._kept, values=values.index_select(0, index))


def every(n: int) -> Operator:
    """Only every `n`-th step: those with `step % n == 0`; after a window, every `n`-th window.

    On a Lens the steps between are not captured at all, and cadences combine to their least common
    multiple. Counting is by step and not by frame, so that chains with equal cadences meet.

    On a plain Observable it has to follow the window before an operator of another library does, which
    hides that its frames are windows; the streams of a Lens keep that in mind.

    Args:
        n: The cadence, at least 1.

    Returns:
        The operator.

    Raises:
        ValueError: `n` is not a positive integer.
    """
    if not is_whole(n) or n < 1:
        raise ValueError(f"every({n!r}): the cadence is a positive number of steps")

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        if isinstance(source, Lens):
            return source.narrow(every=n)
        if isinstance(source, Windowed):
            index = source.windows.index
            return frame_operator(source, lambda frame: None if index(frame) % n else frame, f"every({n})")
        return frame_operator(source, lambda frame: None if frame.step % n else frame, f"every({n})")

    return apply


def between(start: int, stop: int | None = None) -> Operator:
    """Only the steps from `start` up to, but not including, `stop`.

    Args:
        start: The first step.
        stop: The step before which it ends; None for no end.

    Returns:
        The operator.

    Raises:
        ValueError: A negative start, or a stop that is not after it.
    """
    whole = all(is_whole(s) for s in (start, 0 if stop is None else stop))
    if not whole or start < 0 or (stop is not None and stop <= start):
        raise ValueError(f"between({start!r}, {stop!r}): start is a step from 0 on, and stop is after it")

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        if isinstance(source, Lens):
            return source.narrow(between=(start, stop))

        def within(frame: Frame) -> Frame | None:
            return frame if frame.step >= start and (stop is None or frame.step < stop) else None

        return frame_operator(source, within, f"between({start}, {stop})")

    return apply


def where(predicate: Callable[[Frame], bool]) -> Operator:
    """Only the frames for which a predicate holds.

    A frame on which the predicate raises is dropped and reported. Reading values on the host
    inside it waits for a GPU; topic, step, epoch and layers cost nothing.

    Args:
        predicate: A function of the frame.

    Returns:
        The operator.

    Raises:
        TypeError: The predicate is not callable.
    """
    if not callable(predicate):
        raise TypeError(f"where() takes a function of a frame to a bool, got {predicate!r}")
    plan = f"where({_name_of(predicate)})"

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        return frame_operator(source, lambda frame: frame if predicate(frame) else None, plan)

    return apply


def rename(name: str | Callable[[str], str]) -> Operator:
    """The same frames under another topic.

    Args:
        name: The new topic, or a function of the old one to the new one (for a stream of several).

    Returns:
        The operator.

    Raises:
        TypeError: It is neither a name nor a function.
    """
    if not (isinstance(name, str) and name) and not callable(name):
        raise TypeError(f"rename() takes a topic name, or a function of the old one, got {name!r}")
    plan = f"rename({name!r})" if isinstance(name, str) else f"rename({_name_of(name)})"

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        if isinstance(name, str):
            return frame_operator(source, lambda frame: frame.replace(topic=name), plan)
        return frame_operator(source, lambda frame: frame.replace(topic=name(frame.topic)), plan)

    return apply


def per_layer() -> Operator:
    """One frame a layer, in model order.

    ::

        --[a b c]-----------[a b c]---->
              per_layer()
        --[a][b][c]---------[a][b][c]-->

    For those who want to see a stream item by item: an operator that follows runs once a layer
    and not once a step.

    Returns:
        The operator.
    """

    def split(frame: Frame) -> list[Frame]:
        if not frame.stacked:
            return [frame.select((name,)) for name in frame.layers]
        values = cast("Tensor", frame.values)
        return [
            frame.replace(layers=(name,), values=values[i : i + 1]) for i, name in enumerate(frame.layers)
        ]

    def apply(source: Observable[Frame]) -> Stream:
        return frame_operator(source, split, "per_layer()")

    return apply


def _name_of(fn: Callable[..., object]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
