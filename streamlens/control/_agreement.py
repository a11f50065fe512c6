"""One decision for all ranks."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

__all__ = ["agreed"]

T = TypeVar("T")


def agreed(decision: T) -> T:
    """Rank 0's decision, on every rank of the default process group; one's own without one.

    A collective: every rank must come here, also one that has nothing to decide.

    Args:
        decision: What this rank would do; anything that pickles.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return decision
    box = [decision]
    dist.broadcast_object_list(box, src=0)
    return box[0]
