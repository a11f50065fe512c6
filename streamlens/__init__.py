"""streamlens: see and steer the inside of a neural network's training while it trains.

```python
import streamlens as sl

lens = sl.observe(model)
lens.pipe(sl.uw_ratio(), sl.ema(0.9)).subscribe(sl.sinks.TensorBoard("runs/mine"))
```
"""

import importlib
from typing import TYPE_CHECKING, Any

from streamlens import control, operators, sinks, sources
from streamlens.errors import (
    ClosedLensError,
    ExpiredFrameError,
    LayerNotFoundError,
    OverwrittenActivationError,
    PluginError,
    RunStoreError,
    StreamlensError,
    UnknownTopicError,
    UnmergeableError,
)
from streamlens.frame import Frame, Kind
from streamlens.lens import Lens
from streamlens.observing import observe
from streamlens.operators import *  # noqa: F403
from streamlens.operators import __all__ as _operators
from streamlens.runs import read_run
from streamlens.sources import Feed, Replay, replay
from streamlens.stream import Operator, Stream
from streamlens.topics import optimizer_state

if TYPE_CHECKING:
    from streamlens import views
    from streamlens.views.live import live

__version__ = "0.1.0"

__all__ = [
    "ClosedLensError",
    "ExpiredFrameError",
    "Feed",
    "Frame",
    "Kind",
    "LayerNotFoundError",
    "Lens",
    "Operator",
    "OverwrittenActivationError",
    "PluginError",
    "Replay",
    "RunStoreError",
    "Stream",
    "StreamlensError",
    "UnknownTopicError",
    "UnmergeableError",
    "__version__",
    "control",
    "live",
    "observe",
    "operators",
    "optimizer_state",
    "read_run",
    "replay",
    "sinks",
    "sources",
    "views",
]
__all__ += _operators


def __getattr__(name: str) -> Any:
    # Charts are there when they are asked for: whoever only records does not wait for Altair.
    if name == "views":
        return importlib.import_module("streamlens.views")
    if name == "live":
        return importlib.import_module("streamlens.views.live").live
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
