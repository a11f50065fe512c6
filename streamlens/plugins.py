"""Operators and sinks by name: those that are shipped, and those that installed packages bring along.

A package brings its own through the entry points `streamlens.operators` and `streamlens.sinks`:

```toml
[project.entry-points."streamlens.operators"]
sign_agreement = "my_package:sign_agreement"
```
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Literal

from streamlens.errors import PluginError, did_you_mean

__all__ = ["GROUPS", "Kind", "Plugin", "load", "plugins"]

Kind = Literal["operator", "sink"]
"""What a plug-in can be."""

GROUPS: Final[dict[Kind, str]] = {"operator": "streamlens.operators", "sink": "streamlens.sinks"}
"""The entry points of each kind; the shipped ones are what the module of that name exports."""


@dataclass(frozen=True)
class Plugin:
    """An operator or sink that can be had by its name.

    Attributes:
        name: Its name.
        kind: `"operator"` or `"sink"`.
        package: The distribution that brings it.
        version: That distribution's version.
        summary: The first line of its documentation.
        error: Why it cannot be loaded; empty if it can.
    """

    name: str
    kind: Kind
    package: str
    version: str
    summary: str = ""
    error: str = ""


def plugins() -> list[Plugin]:
    """Everything that can be loaded by name, and what cannot, with the reason.

    Every plug-in is imported to find out. One that fails is an entry with its error and harms no other.

    Returns:
        The shipped operators and sinks, then those of installed packages, by kind, package and name.
    """
    found: list[Plugin] = []
    for kind in GROUPS:
        found += [
            Plugin(name, kind, "streamlens", _own_version(), summary=_summary(entry))
            for name, entry in _shipped(kind)
        ]
    for kind in GROUPS:
        taken = {name: "streamlens" for name, _ in _shipped(kind)}
        for point in _points(kind):
            package, version = _origin(point)
            summary = error = ""
            try:
                _check_name(point, kind, taken)
                summary = _summary(_imported(point, kind))
                taken[point.name] = package
            except PluginError as failure:
                error = str(failure)
            found.append(Plugin(point.name, kind, package, version, summary, error))
    return found


def load(kind: Kind, name: str) -> Callable[..., Any]:
    """An operator or sink by its name: a shipped one, or one that an installed package brings.

    No package can take a shipped one's name. Of packages with one name the first by alphabet that works
    has it. Only packages that bring the name are imported.

    Args:
        kind: `"operator"` or `"sink"`.
        name: Its name.

    Returns:
        What makes it: the operator's function, or the sink's class.

    Raises:
        PluginError: There is none of that name, or it cannot be loaded.
    """
    shipped = dict(_shipped(kind))
    if name in shipped:
        return shipped[name]
    points = _points(kind)
    failures: list[PluginError] = []
    for point in points:
        if point.name == name:
            try:
                _check_name(point, kind, {})
                return _imported(point, kind)
            except PluginError as failure:
                failures.append(failure)
    if failures:
        raise failures[0]
    known = [*shipped, *(point.name for point in points)]
    hint = did_you_mean(name, known)
    raise PluginError(
        f"no {kind} {name!r} is installed" + (f": {hint}" if hint else "; `streamlens plugins` lists all")
    )


def _shipped(kind: Kind) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The kind's exports in order; classes that operators hand out are no operators."""
    module = import_module(GROUPS[kind])
    for name in sorted(module.__all__):
        entry = getattr(module, name)
        if kind == "sink" or isinstance(entry, types.FunctionType):
            yield name, entry


def _own_version() -> str:
    # Not of the metadata: a checkout on the path may have none, or those of another version.
    return str(import_module("streamlens").__version__)


def _points(kind: Kind) -> list[EntryPoint]:
    points = (point for point in entry_points(group=GROUPS[kind]) if _origin(point)[0] != "streamlens")
    return sorted(points, key=lambda point: (*_origin(point), point.name, point.value))


def _origin(point: EntryPoint) -> tuple[str, str]:
    """The distribution's name and version; broken metadata may lack either."""
    if point.dist is None:
        return "unknown", ""
    return str(point.dist.name or "unknown"), str(point.dist.version or "")


def _check_name(point: EntryPoint, kind: Kind, taken: dict[str, str]) -> None:
    if not point.name.isidentifier():
        raise PluginError(
            f"the {kind} {point.name!r} of {_origin(point)[0]} cannot be named on the command line: "
            "its name must be one of Python's, of letters, digits and underscores"
        )
    if point.name in taken:
        raise PluginError(f"the name {point.name!r} is taken by {taken[point.name]}")


def _imported(point: EntryPoint, kind: Kind) -> Callable[..., Any]:
    package = _origin(point)[0]
    try:
        entry = point.load()
    # SystemExit too: a script among the modules must not end the program that looks for operators.
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"the {kind} {point.name!r} of {package} ({point.value}) cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not callable(entry):
        raise PluginError(
            f"the {kind} {point.name!r} of {package} ({point.value}) is not callable but of type "
            f"{type(entry).__name__}; its entry point must name a function or a class"
        )
    made: Callable[..., Any] = entry
    return made


def _summary(entry: object) -> str:
    """The first line of an object's own documentation."""
    lines = (inspect.getdoc(entry) or "").strip().splitlines()
    return lines[0] if lines else ""
