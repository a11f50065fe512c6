"""`Group`: a process group of our own, apart from those that training uses."""

from __future__ import annotations

import io
import pickle
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["Group", "LostRanksError"]


class LostRanksError(Exception):
    """Another process has ended, left or failed, or did not come in time."""


def _reason(error: RuntimeError) -> str:
    """What PyTorch says, in one sentence and without its source's places."""
    first = str(error).partition("\n")[0].rpartition("] ")
    sentence = (first[2] if "/" in first[0] else "".join(first)).partition(". ")[0]
    return sentence.removesuffix(".")


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

        try:
            self._gloo: Any = ProcessGroupGloo(store, rank, ranks, timedelta(seconds=timeout))
        except RuntimeError as error:
            raise LostRanksError(_reason(error)) from error

    def add(self, buffer: Tensor, *, largest: bool = False) -> None:
        """Add up what all processes have in a buffer on the host, or take the largest of it, in place.

        Raises:
            LostRanksError: A process has ended, left or failed, or did not come in time.
        """
        how = ReduceOp.MAX if largest else ReduceOp.SUM
        try:
            self._gloo.allreduce([buffer], how).wait()
        except RuntimeError as error:
            raise LostRanksError(_reason(error)) from error

    def gather(self, thing: object) -> list[Any]:
        """What each process gives, by rank. Rare and slow: in two collectives, pickled.

        Raises:
            LostRanksError: As for `add`.
        """
        mine = torch.frombuffer(bytearray(pickle.dumps(thing)), dtype=torch.uint8)
        sizes = torch.zeros(self.ranks, dtype=torch.int64)
        sizes[self.rank] = len(mine)
        self.add(sizes)
        longest = int(sizes.max())
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(mine)] = mine
        found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.ranks)]
        try:
            self._gloo.allgather([found], [padded]).wait()
        except RuntimeError as error:
            raise LostRanksError(_reason(error)) from error
        # What comes from the processes of one training run is as trusted as its code.
        return [
            pickle.load(io.BytesIO(part[:size].numpy().tobytes()))
            for part, size in zip(found, sizes.tolist(), strict=True)
        ]
