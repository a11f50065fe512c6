"""Sources: streams of frames from elsewhere than an observed PyTorch model."""

from streamlens.sources.feed import Feed
from streamlens.sources.replaying import Replay, replay

__all__ = ["Feed", "Replay", "replay"]
