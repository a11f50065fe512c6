"""What is refused at `observe()`: wrong options, and models spread such that nothing can be looked into."""

from __future__ import annotations

import math
import os
from typing import Final

from torch import nn

from streamlens.errors import StreamlensError

__all__ = ["DEFAULT_TIMEOUT", "SWITCH", "TIMEOUT", "check_distributed", "check_model"]

SWITCH: Final = "STREAMLENS_DISTRIBUTED"
"""The environment's way to look at each process alone."""
TIMEOUT: Final = "STREAMLENS_DISTRIBUTED_TIMEOUT"
"""The environment's way to say how long others are waited for."""
DEFAULT_TIMEOUT: Final = 30.0
"""Seconds."""

_REFUSED: Final[tuple[tuple[str, str, str], ...]] = (
    (
        "torch.distributed.fsdp.",
        "FullyShardedDataParallel",
        """FSDP1 flattens parameters into shards that have lost their names and shapes: use
        torch.distributed.fsdp.fully_shard(model), whose shards are merged over ranks""",
    ),
    (
        "deepspeed.",
        "",
        """DeepSpeed steps flat partitions of its own: observe the module within, observe(engine.module), and
        call lens.step() after engine.step(); parameters that ZeRO stage 3 partitions cannot be looked into,
        those of torch.distributed.fsdp.fully_shard(model) can""",
    ),
    (
        "torch.distributed.pipelining.",
        "",
        """a pipeline's stages are different models on different ranks, which have nothing to merge: observe
        the stage's own module on each of them, observe(stage.submod, distributed=False)""",
    ),
)
"""Where a class comes from, its name (any if empty), and what to do."""


def check_model(model: object) -> None:
    """Raise for a model that cannot be looked into.

    Args:
        model: What `observe` was given; a pipeline's stage is no module.

    Raises:
        StreamlensError: It is, or holds, an engine that spreads parameters in a way of its own.
    """
    for module in model.modules() if isinstance(model, nn.Module) else (model,):
        for kind in type(module).__mro__:
            for home, name, remedy in _REFUSED:
                if f"{kind.__module__}.".startswith(home) and name in ("", kind.__name__):
                    holds = "observe() was given" if module is model else f"{type(model).__name__} holds"
                    remedy = " ".join(remedy.split())
                    raise StreamlensError(f"{holds} a {kind.__module__}.{kind.__name__}: {remedy}")


def check_distributed(distributed: object, timeout: object) -> tuple[bool, float]:
    """Whether to look at this process alone, and how long to wait for others.

    Args:
        distributed: False for this process alone; None for what the environment says.
        timeout: Seconds; None for what the environment says.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: The timeout is no positive number of seconds.
    """
    if distributed is not None and not isinstance(distributed, bool):
        raise TypeError(f"observe(distributed={distributed!r}): it is True or False")
    if distributed is None:
        distributed = os.environ.get(SWITCH, "").lower() not in ("0", "false", "no")
    said, name = timeout, f"observe(distributed_timeout={timeout!r})"
    if timeout is None:
        said = os.environ.get(TIMEOUT) or DEFAULT_TIMEOUT
        name = f"the environment's {TIMEOUT}={said!r}"
    try:
        seconds = float(said)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = math.nan
    if isinstance(said, bool) or not 0 < seconds < math.inf:
        raise ValueError(f"{name}: the others are waited for a positive number of seconds, such as 30.0")
    return not distributed, seconds
