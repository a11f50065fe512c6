"""Sources: streams of frames from elsewhere than an observed PyTorch model."""

from streamlens.sources.feed import Feed

__all__ = ["Feed"]
