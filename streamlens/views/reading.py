"""What a page shows of a run of any length, read from its roll-ups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from streamlens.runs import Run, read_run
from streamlens.views.sections import ModelRows, ReadableRun, read_models
from streamlens.views.thinned import Thinned

__all__ = ["read_thinned", "readable"]


@contextmanager
def readable(run: str | os.PathLike[str] | ReadableRun) -> Iterator[ReadableRun]:
    """A run as a page reads it: thinned, where it comes from a store.

    Args:
        run: The file that a `RunStore` wrote, or a run read from it.

    Raises:
        RunStoreError: `run` is a path at which there is no run store.
    """
    if isinstance(run, str | os.PathLike):
        with read_run(run) as opened:
            yield Thinned(opened)
    else:
        yield Thinned(run) if isinstance(run, Run) else run


def read_thinned(run: ReadableRun) -> list[ModelRows]:
    """What `read_models` reads, with an average of the loss over all its steps, not over the few drawn.

    Args:
        run: The run, thinned or not.
    """
    models = read_models(run)
    return [_averaged(model, run) for model in models] if isinstance(run, Thinned) else models


def _averaged(model: ModelRows, thinned: Thinned) -> ModelRows:
    if "loss" not in model.rows or "loss.ema" in model.rows or not thinned.thinned:
        return model
    topic = f"{model.name}/loss" if model.name else "loss"
    means = thinned.means(topic)
    if not (means["count"] + means["missing"] > 1).any():
        return model
    return replace(model, rows={**model.rows, "loss.ema": means.assign(value=means["mean"])})
