"""`Agreement`: what every process says to a question, known to all of them."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import torch.distributed as dist

from streamlens.distributed.group import Group, LostRanksError
from streamlens.errors import StreamlensError

__all__ = ["Agreement"]

_made: Final[Counter[str]] = Counter()
"""How many there were of each name: the same on all processes, which make them in one order."""


class Agreement:
    """Processes tell each other plain data, in a group of their own, within a timeout.

    The group is made at the first question, which all processes have to come to. One that fails is not
    made again: a process that has been given up may be anywhere.

    Args:
        name: What it is about; equal on all processes.
        timeout: Seconds to wait for others at most.
    """

    def __init__(self, name: str, timeout: float) -> None:
        self._name = name
        self._timeout = timeout
        self._group: Group | None = None
        self._failure: StreamlensError | None = None

    @property
    def needed(self) -> bool:
        """Whether there is anybody to agree with."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def gather(self, answer: object) -> list[Any]:
        """What each process says, by rank: a collective, which every process must come to.

        Args:
            answer: What this one says; anything that pickles.

        Raises:
            StreamlensError: Others did not come in time, or have ended; from then on at every question.
        """
        if not self.needed:
            return [answer]
        if self._failure is not None:
            raise self._failure
        try:
            if self._group is None:
                self._group = self._make()
            return self._group.gather(answer)
        except LostRanksError as error:
            self._group = None
            self._failure = StreamlensError(
                f"rank {dist.get_rank()} lost the other ranks ({error}), within the {self._timeout:g} s of "
                "observe(distributed_timeout=)"
            )
            raise self._failure from error

    def _make(self) -> Group:
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        _made[self._name] += 1
        place = f"streamlens/{self._name}/{_made[self._name]}"
        store = PrefixStore(place, _get_default_store())
        return Group(store, dist.get_rank(), dist.get_world_size(), self._timeout)
