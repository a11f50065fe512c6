"""The head of a page about a run: its title, and its settings as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streamlens.views.alerts import RULES

__all__ = ["heading"]


def heading(metadata: Mapping[str, Any], models: Sequence[str] = ()) -> tuple[str, list[tuple[str, str]]]:
    """A page's title, and what else is known about the run as (name, value).

    Args:
        metadata: The run's.
        models: The names of the models in it. Several give the title: what is known of a model is then
            known of only one of them.
    """
    flat = dict(_flatten(metadata))
    flat.pop(RULES, None)
    model, data = flat.pop("model", ""), flat.pop("dataset", "")
    if len(models) > 1:
        flat.pop("parameters", None)
        model = f"{', '.join(models[:-1])} and {models[-1]}"
    title = f"{model or 'Training run'} on {data}" if data else model or "Training run"
    return title, list(flat.items())


def _flatten(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in entries.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{key}.")
        elif isinstance(value, float):
            yield key, f"{value:.6g}"
        elif value is not None and value != "":
            yield key, str(value)
