"""`Prometheus`: the newest values, for a Prometheus server to scrape."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Final

import numpy as np

from streamlens.errors import missing_package
from streamlens.frame import Frame
from streamlens.sink import RunInfo, Sink, ValueKind
from streamlens.sinks._names import NameRule
from streamlens.sinks._values import number_cells

__all__ = ["Prometheus"]

_NAMES: Final = NameRule("A-Za-z0-9_", first="A-Za-z_")
_PREFIX: Final = "streamlens_"


class Prometheus(Sink):
    """Serves the newest value of each topic, layer and component as a gauge, at `http://host:port/metrics`.

    - A topic is a metric, `streamlens_uw_ratio`, with the labels `run` (its name, or the first eight digits
      of its id), `layer` (empty: the model itself) and `component`. Characters that a name may not have are
      written by their codes: `weights.norm2` is `streamlens_weights_x2e_norm2`.
    - `streamlens_step{run, topic}` is the step that the values belong to.
    - `streamlens_alert_active{run, rule, severity, layer}` is 1 from the start of an alert to its end, then
      0: what an Alertmanager rule can ask for.

    Numbers have double precision; NaN and infinities are themselves. A histogram is a gauge a bin, its
    edges in `component`. Tensors are no numbers: chains that yield them are refused, or left out and
    reported. What lies between two scrapes is not seen; a store or a stream keeps everything.

    Cost: keeping a reference a frame; numbers are made texts when somebody scrapes.

    Args:
        port: Where to serve; 0 for any free port, which `port` then tells.
        host: The address; only this machine by default.
        registry: A `prometheus_client.CollectorRegistry` that the program serves itself; then no server of
            its own is started.

    Raises:
        ImportError: The `prometheus-client` package is missing.

    Attributes:
        port: Where it serves, while it is open.

    Example:
        >>> lens.pipe(uw_ratio(), ema(0.9)).subscribe(Prometheus(9464))  # doctest: +SKIP
    """

    kinds: ClassVar[frozenset[ValueKind]] = frozenset({"scalar"})

    def __init__(self, port: int = 9464, *, host: str = "127.0.0.1", registry: Any = None) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise missing_package("Prometheus", "prometheus-client", "prometheus") from error
        self._client = prometheus_client
        self.port = self._wanted = port
        self.host = host
        self._shared = registry
        self._registry: Any = None
        self._server: Any = None
        self._collector = _Collector("")

    def open(self, run: RunInfo) -> None:
        """Start serving.

        Raises:
            OSError: The port is taken.
        """
        self._collector = _Collector(run.name or run.id[:8])
        self._registry = self._client.CollectorRegistry() if self._shared is None else self._shared
        self._registry.register(self._collector)
        if self._shared is not None:
            return
        try:
            self._server = self._client.start_http_server(self._wanted, self.host, self._registry)
        except OSError as error:
            raise OSError(
                f"Prometheus cannot serve at {self.host}:{self._wanted}: {error.strerror or error}; pass "
                "another port, or 0 for any free one"
            ) from error
        self.port = self._server[0].server_port

    def write(self, frames: Sequence[Frame]) -> None:
        """Let the newest values be scraped."""
        self._collector.keep(frames)

    def close(self) -> None:
        """Stop serving."""
        if self._registry is not None:
            self._registry.unregister(self._collector)
            self._registry = None
        if self._server is not None:
            server, thread = self._server
            self._server = None
            server.shutdown()
            server.server_close()
            thread.join()


class _Collector:
    """What a scrape reads."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._newest: dict[str, Frame] = {}
        self._alerts: dict[tuple[str, str, str], float] = {}

    def keep(self, frames: Sequence[Frame]) -> None:
        with self._lock:
            for frame in frames:
                self._newest[frame.topic] = frame
                if "rule" in frame.meta and "state" in frame.meta:
                    for layer in frame.layers:
                        key = str(frame.meta["rule"]), str(frame.meta.get("severity", "")), layer
                        self._alerts[key] = float(frame.meta["state"] == "start")

    def describe(self) -> list[Any]:
        """Nothing is known beforehand; a registry that is told so does not scrape to find out."""
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        with self._lock:
            newest, alerts = dict(self._newest), dict(self._alerts)
        steps = GaugeMetricFamily(
            f"{_PREFIX}step", "The step of each topic's values.", labels=["run", "topic"]
        )
        for topic, frame in newest.items():
            steps.add_metric([self._run, topic], frame.step)
            values = GaugeMetricFamily(
                _PREFIX + _NAMES.encode(topic),
                f"The newest {topic}, by layer.",
                labels=["run", "layer", "component"],
            )
            for layer, component, value in number_cells(frame):
                if not isinstance(value, np.ndarray):
                    values.add_metric([self._run, layer, component], value)
            yield values
        yield steps
        if alerts:
            active = GaugeMetricFamily(
                f"{_PREFIX}alert_active",
                "Whether an alert has started and not ended.",
                labels=["run", "rule", "severity", "layer"],
            )
            for key, state in alerts.items():
                active.add_metric([self._run, *key], state)
            yield active
