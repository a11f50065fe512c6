"""`across_layers`: all layers, or groups of them, as one."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, cast

import torch
from reactivex import Observable
from torch import Tensor, nn

from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.nodes import frame_operator
from streamlens.operators._base import checked_source, modules_of, relabelled, widened
from streamlens.operators._named import NAMED, Reduce, check_reduce, reduce_name
from streamlens.stream import Operator

__all__ = ["GroupBy", "across_layers"]

GroupBy: TypeAlias = (
    Mapping[str, str | Sequence[str]] | Sequence[type[nn.Module]] | Callable[[str], str | None]
)
"""Groups of layers: a name for each set of globs, module classes, or a function of a layer's name."""

_NAMES = ("mean", "max", "min", "sum", "median", "std")


class _Groups:
    """The rows of each group, remembered while the layers stay the same."""

    def __init__(self, assign: Callable[[tuple[str, ...]], dict[str, list[int]]]) -> None:
        self._assign = assign
        self._layers: tuple[str, ...] | None = None
        self._rows: dict[str, Tensor | None] = {}

    def of(self, layers: tuple[str, ...], device: torch.device) -> dict[str, Tensor | None]:
        """The index of each group's layers; None where it is all of them."""
        if layers is not self._layers and layers != self._layers:
            self._rows = {
                group: None if rows == list(range(len(layers))) else torch.tensor(rows, dtype=torch.long)
                for group, rows in self._assign(layers).items()
                if rows
            }
            self._layers = layers
        for group, rows in self._rows.items():
            if rows is not None and rows.device != device:
                self._rows[group] = rows.to(device, non_blocking=True)
        return self._rows


def across_layers(reduce: Reduce = "mean", *, by: GroupBy | None = None) -> Operator:
    """One value over all layers, or over each group of them.

    Without `by` the result's one layer is `""`, the model itself. With `by` the groups are its
    layers:

    - a mapping of group to globs: `{"q": "*.attn.q_proj", "mlp": ["*.mlp.*", "*.head"]}`; a layer may
      be in several groups;
    - module classes, `[nn.Linear, nn.Conv2d]`: groups of the classes' names; needs a Lens. The
      parameters of a module count as the module;
    - a function of a layer's name to its group, or None to leave it out:
      `lambda name: name.split(".")[0]`.

    A group without layers in a frame is left out of it. The result is topic `<topic>.layer_<reduce>`,
    such as `weights.norm2.layer_mean`. By name (`"mean"`, `"max"`, `"min"`, `"sum"`, `"median"`, `"std"`)
    NaN is left out, and a group of NaN alone gives NaN; inf is a value like others; `"std"` divides by
    n - 1. A function is given the group's values stacked, [layers, ...], and removes the first
    dimension. The cost is a few tensor operations a group; nothing waits for a GPU.

    Args:
        reduce: The name of a reduction, or a function.
        by: The groups; all layers together unless given.

    Returns:
        The operator.

    Raises:
        ValueError: An unknown name, or no group.
        TypeError: `reduce` or `by` is something else.
        StreamlensError: When applied to a stream of raw tensors, or with classes to one that comes
            from no lens.
    """
    check_reduce("across_layers", reduce, among=_NAMES)
    _check_groups(by)
    plan = f"across_layers({reduce_name(reduce)}{'' if by is None else ', by=' + _describe(by)})"

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        stream = checked_source(source)
        if stream.raw:
            raise StreamlensError(
                f"{plan}: the tensors of {stream.plan_text} have a shape of their own in each layer; reduce "
                "them first, for example with norm()"
            )
        modules = modules_of(stream, plan) if _is_classes(by) else {}
        groups = _Groups(lambda layers: _assign(by, layers, modules))

        def over_groups(frame: Frame) -> Frame | None:
            return _reduce_groups(frame, groups, reduce)

        return frame_operator(stream, over_groups, plan)

    return apply


def _reduce_groups(frame: Frame, groups: _Groups, reduce: Reduce) -> Frame | None:
    values = frame.values if isinstance(frame.values, Tensor) else torch.stack(tuple(frame.values))
    values = widened(values)
    found = groups.of(frame.layers, values.device)
    if not found:
        return None
    results: list[Tensor] = []
    for rows in found.values():
        mine = values if rows is None else values.index_select(0, rows)
        if isinstance(reduce, str):
            results.append(NAMED[reduce](mine, ~mine.isnan()))
        else:
            results.append(reduce(mine).detach())
    stacked = torch.stack(results)
    names = frame.components if stacked.shape[1:2] == (len(frame.components),) else ()
    topic = f"{frame.topic}.layer_{reduce_name(reduce)}"
    return relabelled(frame, topic, stacked, layers=tuple(found), components=names)


def _is_classes(by: GroupBy | None) -> bool:
    return isinstance(by, Sequence)


def _check_groups(by: GroupBy | None) -> None:
    wrong = f"across_layers(by={by!r}): "
    if by is None:
        return
    if isinstance(by, str):
        raise TypeError(wrong + "pass a mapping of group to globs, such as by={'attention': '*.attn.*'}")
    if isinstance(by, Mapping):
        for group, globs in by.items():
            patterns = (globs,) if isinstance(globs, str) else tuple(globs)
            if not isinstance(group, str) or not all(isinstance(glob, str) for glob in patterns):
                raise TypeError(wrong + "group names and globs are strings")
    elif isinstance(by, Sequence):
        for item in by:
            if not (isinstance(item, type) and issubclass(item, nn.Module)):
                raise TypeError(wrong + f"a list holds module classes such as nn.Linear, not {item!r}")
    elif callable(by):
        return
    else:
        raise TypeError(wrong + "pass a mapping of group to globs, module classes, or a function of the name")
    if not by:
        raise ValueError(wrong + "there is no group in it")


def _assign(
    by: GroupBy | None, layers: tuple[str, ...], modules: Mapping[str, nn.Module]
) -> dict[str, list[int]]:
    if by is None:
        return {"": list(range(len(layers)))}
    if isinstance(by, Mapping):
        return {
            group: [
                i
                for i, name in enumerate(layers)
                for globs in [(glob,) if isinstance(glob, str) else glob]
                if any(fnmatch.fnmatchcase(name, g) for g in globs)
            ]
            for group, glob in by.items()
        }
    if isinstance(by, Sequence):
        return {
            kind.__name__: [i for i, name in enumerate(layers) if isinstance(_module(name, modules), kind)]
            for kind in by
        }
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(layers):
        group = by(name)
        if group is not None:
            groups.setdefault(group, []).append(i)
    return groups


def _module(name: str, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    base = name.partition("@")[0]
    return modules.get(base if base in modules else base.rpartition(".")[0])


def _describe(by: GroupBy) -> str:
    if isinstance(by, Mapping):
        return f"{{{', '.join(by)}}}"
    if isinstance(by, Sequence):
        return f"[{', '.join(kind.__name__ for kind in by)}]"
    return cast("str", getattr(by, "__name__", type(by).__name__))
