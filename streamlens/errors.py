"""The exceptions streamlens raises, and the wording they share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ClosedLensError",
    "DatasetError",
    "ExpiredFrameError",
    "LayerNotFoundError",
    "OverwrittenActivationError",
    "PluginError",
    "RunStoreError",
    "SinkError",
    "StreamlensError",
    "UnknownTopicError",
    "UnmergeableError",
    "did_you_mean",
    "missing_package",
]


class StreamlensError(Exception):
    """Base class of every error that streamlens raises on purpose."""


class UnknownTopicError(StreamlensError, LookupError):
    """A topic that nothing in this run can provide."""


class LayerNotFoundError(StreamlensError, LookupError):
    """A layer pattern that selects no layer of the observed model."""


class ClosedLensError(StreamlensError, RuntimeError):
    """A lens was used after `close()`."""


class ExpiredFrameError(StreamlensError, RuntimeError):
    """A raw frame was read after its delivery had ended."""


class OverwrittenActivationError(StreamlensError, RuntimeError):
    """An activation was overwritten in place before it could be delivered."""


class PluginError(StreamlensError, LookupError):
    """An operator or sink that no installed package brings, or one that cannot be loaded."""


class UnmergeableError(StreamlensError, ValueError):
    """Something of a whole was asked for that does not follow from what each process has of its part."""


class RunStoreError(StreamlensError, RuntimeError):
    """A file that is not a run store, is damaged, or cannot be used as asked."""


class DatasetError(StreamlensError, RuntimeError):
    """A data set's file that is missing, damaged, or could not be downloaded."""


class SinkError(StreamlensError, RuntimeError):
    """Something that a sink could not write.

    Args:
        message: What, and what to do about it.
        retry: Whether the same write may succeed later.
        after: Seconds to wait before that at least.
        lost: Raised by `flush` or `close`: how many frames `write` had taken that are lost after all.
    """

    def __init__(self, message: str, *, retry: bool = True, after: float = 0.0, lost: int = 0) -> None:
        super().__init__(message)
        self.retry = retry
        self.after = after
        self.lost = lost


def missing_package(user: str, package: str, extra: str) -> ImportError:
    """The error of something that lacks a package which is not always installed.

    Args:
        user: What needs it.
        package: The package.
        extra: The extra of streamlens that brings it.
    """
    return ImportError(f"{user} needs the {package} package: pip install 'streamlens[{extra}]'", name=package)


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """Return `"did you mean 'x'?"` for the nearest known names, or `""`.

    Case is ignored, and a suffix such as `weight` finds `weights`.
    """
    names = list(dict.fromkeys(known))
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(wrong.lower(), list(by_lower), n=3, cutoff=0.6)
    if not near:
        near = [low for low in by_lower if wrong and wrong.lower() in low][:3]
    if not near:
        return ""
    return "did you mean " + " or ".join(repr(by_lower[low]) for low in near) + "?"
