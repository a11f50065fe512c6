"""One decision for all ranks."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from streamlens.distributed import Agreement, check_distributed
from streamlens.errors import StreamlensError

if TYPE_CHECKING:
    from streamlens.control.decision import Decision
    from streamlens.runtime import Runtime

__all__ = ["Vote", "agreed", "agreement_of", "check_alike"]

_agreements: Final[weakref.WeakKeyDictionary[Runtime, weakref.ref[Agreement]]] = weakref.WeakKeyDictionary()
"""Controllers of one run share a group; it goes with the last of them."""


@dataclass(frozen=True)
class Vote:
    """What one rank makes of a frame.

    Attributes:
        place: Which controller it is, and what it looked at.
        held: Whether the frame was no input here.
        decision: What it would do.
    """

    place: tuple[str, str, int]
    held: bool
    decision: Decision | None


def agreement_of(runtime: Runtime, timeout: float | None) -> Agreement:
    """What the controllers of a run agree through.

    Args:
        runtime: The run.
        timeout: Seconds to wait for other ranks; what the environment says if None.
    """
    reference = _agreements.get(runtime)
    found = None if reference is None else reference()
    if found is None:
        found = Agreement("control", check_distributed(None, None)[1] if timeout is None else timeout)
        _agreements[runtime] = weakref.ref(found)
    return found


def check_alike(votes: Sequence[Vote]) -> None:
    """Raise where ranks have not looked at the same thing.

    Raises:
        StreamlensError: They have not.
    """
    if any(vote.place != votes[0].place for vote in votes):
        seen = "; ".join(
            f"rank {rank}: {vote.place[0]} on {vote.place[1]!r} of step {vote.place[2]}"
            for rank, vote in enumerate(votes)
        )
        raise StreamlensError(
            f"the ranks did not come to one decision ({seen}): end the same chains in the same controllers, "
            "in the same order, on every rank"
        )


def agreed(votes: Sequence[Vote], *, any_rank: bool) -> Decision | None:
    """The one decision that follows from what each rank would do.

    Args:
        votes: By rank; none where ranks cannot agree.
        any_rank: Whether the first rank that would act has its way; else it is rank 0's alone, and
            nothing is done where some rank had no input.
    """
    if any_rank:
        return next((vote.decision for vote in votes if vote.decision is not None), None)
    return None if not votes or any(vote.held for vote in votes) else votes[0].decision
