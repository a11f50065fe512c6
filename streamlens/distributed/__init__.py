"""Observing past one process: `torch.distributed`.

Call `observe(model)` on every rank. What each rank has whole (parameters, gradients and updates under
DDP) is taken as it is; of all else (shards of DTensors; losses, activations and what else belongs to
the batch) each rank computes statistics of its part, and one collective an update merges them, so that
every rank has the numbers of one process with the same global batch. Sinks write on rank 0.

The way of a message: `Ranks` (`exchange.py`) is what the engine asks to settle what it has computed;
ranks find each other through the run's store (`meeting.py`), make a process group of their own
(`group.py`), agree on what is subscribed on any of them, and from then on send one buffer an update
(`wire.py`), in which numbers that add up share a place (`layout.py`). Controllers agree on what to do in
a group of theirs (`agreement.py`). Alerts learn which rank a NaN comes from (`origins.py`).
"""

from streamlens.distributed.agreement import Agreement
from streamlens.distributed.exchange import Ranks
from streamlens.distributed.origins import OneRank
from streamlens.distributed.refusals import check_distributed, check_model

__all__ = ["Agreement", "OneRank", "Ranks", "check_distributed", "check_model"]
