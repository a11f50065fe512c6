"""`Group`: a process group of our own, apart from those that training uses."""

from __future__ import annotations

import io
import pickle
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["Group"]


class Group:
    """All processes, over gloo, with a timeout of its own.

    It is made from the run's store alone and registered nowhere: what happens to it, a timeout above
    all, does not touch the groups that training uses, and their numbering stays what it was. When it is
    let go its connections close, so that whoever still waits for this process fails at once.

    Args:
        store: Where the processes find each other; a name of its own for each group.
        rank: This process.
        ranks: How many there are.
        timeout: Seconds after which a collective fails.
    """

    def __init__(self, store: Store, rank: int, ranks: int, timeout: float) -> None:
        self.rank = rank
        self.ranks = ranks
        from torch.distributed import ProcessGroupGloo

        self._gloo: Any = ProcessGroupGloo(store, rank, ranks, timedelta(seconds=timeout))

    def add(self, buffer: Tensor) -> None:
        """Add up what all processes have in a buffer on the host, in place."""
        self._gloo.allreduce([buffer]).wait()

    def gather(self, thing: object) -> list[Any]:
        """What each process gives, by rank. Rare and slow: in two collectives, pickled."""
        mine = torch.frombuffer(bytearray(pickle.dumps(thing)), dtype=torch.uint8)
        sizes = torch.zeros(self.ranks, dtype=torch.int64)
        sizes[self.rank] = len(mine)
        self.add(sizes)
        longest = int(sizes.max())
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(mine)] = mine
        found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.ranks)]
        self._gloo.allgather([found], [padded]).wait()
        # What comes from the processes of one training run is as trusted as its code.
        return [
            pickle.load(io.BytesIO(part[:size].numpy().tobytes()))
            for part, size in zip(found, sizes.tolist(), strict=True)
        ]
