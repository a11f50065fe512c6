"""Sources: streams of frames from elsewhere than an observed PyTorch model."""

from streamlens.sources.feed import Feed
from streamlens.sources.redis_stream import RedisFrames, redis
from streamlens.sources.replaying import Replay, replay

__all__ = ["Feed", "RedisFrames", "Replay", "redis", "replay"]
