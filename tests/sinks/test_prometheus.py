"""Prometheus: what a scrape over HTTP reads, with Prometheus's own parser."""

from __future__ import annotations

import math
import socket
import urllib.request
from collections.abc import Iterator

import pytest
import torch

from streamlens.delivery import Delivery
from streamlens.frame import Frame
from streamlens.sink import RunInfo
from tests.helpers.sinks import RUN, norms

pytest.importorskip("prometheus_client", reason="needs prometheus-client")

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from streamlens.sinks.prometheus import Prometheus

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def sink() -> Iterator[Prometheus]:
    served = Prometheus(0)
    served.open(RUN)
    yield served
    served.close()


def scrape(sink: Prometheus) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def key(
    name: str, run: str = "f00d", layer: str = "", component: str = ""
) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset({"run": run, "layer": layer, "component": component}.items())


def test_the_newest_values_are_served_by_layer_and_component(sink: Prometheus) -> None:
    sink.write([norms(0, [1.0, 2.0]), norms(1, [3.0, math.inf])])
    sink.write([Frame("loss", 1, ("",), torch.tensor([[0.25, 0.75]]), components=("a", "b"))])
    found = scrape(sink)
    assert found[key("streamlens_norm", layer="layer0")] == 3.0
    assert found[key("streamlens_norm", layer="layer1")] == math.inf
    assert found[key("streamlens_loss", component="b")] == 0.75
    assert found["streamlens_step", frozenset({"run": "f00d", "topic": "norm"}.items())] == 1


def test_names_that_prometheus_forbids_are_written_by_their_codes(sink: Prometheus) -> None:
    hostile = 'fc"\n\\{}'
    sink.write([Frame("G/weights.norm2", 0, (hostile,), torch.tensor([1.5]))])
    assert scrape(sink)[key("streamlens_G_x2f_weights_x2e_norm2", layer=hostile)] == 1.5


def test_a_layer_that_is_gone_is_served_no_longer(sink: Prometheus) -> None:
    sink.write([norms(0, [1.0, 2.0])])
    sink.write([norms(1, [1.0])])
    assert key("streamlens_norm", layer="layer1") not in scrape(sink)


def test_an_alert_is_active_from_its_start_to_its_end(sink: Prometheus) -> None:
    def alert(state: str) -> Frame:
        meta = {"rule": "dead_units", "severity": "warning", "state": state, "text": "units are dead"}
        return Frame("alerts.dead_units", 3, ("fc",), torch.tensor([0.9]), meta=meta)

    labels = {"run": "f00d", "rule": "dead_units", "severity": "warning", "layer": "fc"}
    active = "streamlens_alert_active", frozenset(labels.items())
    sink.write([alert("start")])
    assert scrape(sink)[active] == 1
    sink.write([alert("end")])
    assert scrape(sink)[active] == 0


def test_it_serves_while_open_and_frees_its_port() -> None:
    served = Prometheus(0)
    served.open(RunInfo(id="0123456789", name="digits"))
    served.write([norms(0, [1.0])])
    assert key("streamlens_norm", run="digits", layer="layer0") in scrape(served)
    port = served.port
    served.close()
    with socket.socket() as free:
        assert free.connect_ex(("127.0.0.1", port)) != 0


def test_a_registry_of_the_programs_own_is_served_by_the_program() -> None:
    registry = CollectorRegistry()
    served = Prometheus(registry=registry)
    served.open(RUN)
    served.write([norms(0, [4.0])])
    labels = {"run": "f00d", "layer": "layer0", "component": ""}
    assert registry.get_sample_value("streamlens_norm", labels) == 4.0
    served.close()
    assert registry.get_sample_value("streamlens_norm", labels) is None


def test_a_port_that_is_taken_is_reported_and_the_run_goes_on() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        reports: list[str] = []
        delivery = Delivery(lambda: RUN, lambda error, where: reports.append(str(error)))
        proxy = delivery.connect(Prometheus(taken.getsockname()[1]), "chain")
        proxy.on_next(norms(0, [1.0]))
        delivery.close(10)
    assert "pass another port, or 0 for any free one" in reports[0]
