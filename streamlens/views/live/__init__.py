"""Charts in a notebook that move while a run goes on."""

from streamlens.views.live.chart import LiveChart
from streamlens.views.live.showing import Live, live

__all__ = ["Live", "LiveChart", "live"]
