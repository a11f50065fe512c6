"""From chains to sinks: one transfer to the host, a bounded queue and a worker thread a sink."""

from __future__ import annotations

from streamlens.delivery.core import Delivery, Proxy, default_delivery, drain
from streamlens.delivery.items import SinkStats

__all__ = ["Delivery", "Proxy", "SinkStats", "default_delivery", "drain"]
