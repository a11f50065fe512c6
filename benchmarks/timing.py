"""Interleaved timing: competitors take turns in one run, so that a noisy machine disturbs all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Timing", "interleave"]


@dataclass(frozen=True)
class Timing:
    """What one competitor took.

    Attributes:
        seconds: Median CPU seconds of the whole process for one repetition.
        over: Median ratio to the baseline of the same round, minus 1.
    """

    seconds: float
    over: float


def interleave(
    competitors: Mapping[str, Callable[[], object]],
    *,
    baseline: str,
    rounds: int,
    repeat: int = 1,
    warm_up: int = 3,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, Timing]:
    """Time competitors in turns.

    Args:
        competitors: What to time, by name.
        baseline: The one that ratios refer to.
        rounds: How often each takes its turn.
        repeat: Calls a turn.
        warm_up: Calls of each before the first round.
        clock: CPU time of the whole process (so that threads count), unless told otherwise.

    Returns:
        For each competitor its median time a call, and its median overhead over the baseline.
    """
    for run in competitors.values():
        for _ in range(warm_up):
            run()
    taken: dict[str, list[float]] = {name: [] for name in competitors}
    names = list(competitors)
    for turn in range(rounds):
        # The order changes, so that nobody always runs in the wake of the same other.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            for _ in range(repeat):
                competitors[name]()
            taken[name].append((clock() - start) / repeat)
    base = taken[baseline]
    return {
        name: Timing(
            statistics.median(times),
            statistics.median(t / b for t, b in zip(times, base, strict=True)) - 1,
        )
        for name, times in taken.items()
    }
