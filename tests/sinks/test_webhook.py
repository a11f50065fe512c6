"""Webhook: what a real server on this machine receives."""

from __future__ import annotations

import email.utils
import http.server
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import streamlens as sl
from streamlens.errors import SinkError, StreamlensError
from streamlens.frame import Frame
from streamlens.sink import RunInfo
from streamlens.sinks.webhook import Webhook, _seconds
from tests.helpers.sinks import Connected, norms

RUN = RunInfo(id="f00d", name="digits")


class Server:
    """A server that answers as it is told, and remembers what it got.

    Args:
        port: Where it listens; any free port by default.
    """

    def __init__(self, port: int = 0) -> None:
        self.got: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.requests = 0
        self.answers: list[tuple[int, dict[str, str]]] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.requests += 1
                body = self.rfile.read(int(self.headers["Content-Length"]))
                code, headers = server.answers.pop(0) if server.answers else (204, {})
                if code < 300:
                    server.got.append(json.loads(body))
                    server.headers.append(dict(self.headers.items()))
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - named so there
                pass

        self._http = http.server.HTTPServer(("127.0.0.1", port), Handler)
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}/hooks/secret"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def alert(step: int, text: str = "fc is NaN ☹") -> Frame:
    return Frame("alerts.nan", step, ("fc",), torch.tensor([math.nan]), meta={"text": text, "level": "error"})


def posting(server: Server, **options: Any) -> Webhook:
    return Webhook(server.url, **{"back_off": 0.005, **options})


def test_alerts_arrive_as_json_many_in_one_request(server: Server) -> None:
    chain = Connected(posting(server, headers={"Authorization": "Bearer x"}), RUN)
    assert chain.send(alert(5), alert(6, "still"))
    assert chain.close()
    (got,) = server.got
    assert got["text"] == "fc is NaN ☹\nstill"
    assert got["run"] == {"id": "f00d", "name": "digits"}
    first, second = got["alerts"]
    assert (first["topic"], first["step"], first["values"]) == ("alerts.nan", 5, {"fc": "NaN"})
    assert first["meta"] == {"text": "fc is NaN ☹", "level": "error"}
    assert second["step"] == 6
    (headers,) = server.headers
    assert (headers["Content-Type"], headers["Authorization"]) == ("application/json", "Bearer x")


def test_the_health_of_a_run_reaches_the_server(server: Server) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.MSELoss()
    with sl.observe(model, loss=criterion) as lens:
        lens.pipe(sl.health()).subscribe(posting(server))
        for _ in range(3):
            criterion(model(torch.full((1, 2), math.nan)), torch.ones(1, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert lens.flush(10)
    assert any("NaN" in got["text"] for got in server.got)


def test_a_payload_of_the_users_own_is_sent_instead(server: Server) -> None:
    sink = posting(server, payload=lambda frames: {"content": frames[0].meta["text"], "x": math.inf})
    chain = Connected(sink, RUN)
    assert chain.send(alert(5, "look"))
    chain.close()
    assert server.got == [{"content": "look", "x": "Infinity"}]


@pytest.mark.parametrize("code", [408, 425, 429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, code: int) -> None:
    server.answers = [(code, {})] * 3
    chain = Connected(posting(server), RUN)
    assert chain.send(alert(5))
    assert chain.close()
    assert (server.requests, len(server.got)) == (4, 1)
    assert chain.reports == []


def test_retry_after_is_heeded(server: Server) -> None:
    server.answers = [(429, {"Retry-After": "1"})]
    chain = Connected(posting(server), RUN)
    start = time.monotonic()
    assert chain.send(alert(5))
    assert time.monotonic() - start >= 1
    assert chain.close()


def test_retry_after_may_be_a_date() -> None:
    assert 58 < _seconds(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 60
    assert _seconds(email.utils.formatdate(time.time() - 60, usegmt=True)) == 0
    assert _seconds("soon") == _seconds("") == 0


@pytest.mark.parametrize("code", [301, 302, 307, 400, 403, 404])
def test_an_answer_that_no_retry_mends_is_reported_at_once_without_the_secret(
    server: Server, code: int
) -> None:
    server.answers = [(code, {"Location": server.url})] * 9
    chain = Connected(posting(server), RUN)
    assert not chain.send(alert(5))
    assert not chain.close()
    assert server.requests == 1
    (report,) = chain.reports
    assert report.startswith(f"sink Webhook: http://127.0.0.1 answered {code} ")
    assert "check the URL, the headers" in report
    assert "secret" not in report + repr(chain.sink)
    assert (chain.stats.written, chain.stats.failed) == (0, 1)


def test_a_server_that_is_gone_and_comes_back_costs_only_what_came_meanwhile(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = Server()
    chain = Connected(posting(first, retries=1), RUN)
    assert chain.send(alert(0))
    first.stop()
    assert not chain.send(alert(1))
    second = Server(first.port)
    assert chain.send(alert(2))
    assert not chain.close()
    second.stop()
    assert [got["alerts"][0]["step"] for got in first.got + second.got] == [0, 2]
    (report,) = chain.reports
    assert "http://127.0.0.1 cannot be reached: " in report
    assert (chain.stats.written, chain.stats.failed) == (2, 1)
    (said,) = (message for message in caplog.messages if message.startswith("sink Webhook"))
    assert said.startswith("sink Webhook lost 1 frames: 1 in writes that failed")


def test_a_server_that_never_answers_is_given_up_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        sink = Webhook(f"http://127.0.0.1:{listening.getsockname()[1]}/", timeout=0.05)
        sink.open(RUN)
        with pytest.raises(SinkError, match="cannot be reached: timed out") as caught:
            sink.write([alert(0)])
    assert caught.value.retry


def test_numbers_without_a_sentence_are_refused(server: Server) -> None:
    chain = Connected(posting(server), RUN)
    chain.send(norms(0, [1.0]))
    chain.close()
    assert server.requests == 0
    assert "Webhook shows text values, and 'norm' holds scalar values" in chain.reports[0]
    model = nn.Linear(2, 2)
    lens = sl.observe(model)
    with pytest.raises(StreamlensError, match="Webhook shows text values"):
        lens.pipe(sl.topic("weights")).subscribe(posting(server))
    lens.close()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"url": "example.org/hook"}, ValueError, "is a URL such as 'https://example.org/hook'"),
        ({"url": "file:///etc/passwd"}, ValueError, "got 'file:///etc/passwd'"),
        ({"payload": {}}, TypeError, "a function of a list of frames, got {}"),
        ({"timeout": 0}, ValueError, "seconds above 0; got 0, 0.5"),
        ({"back_off": math.nan}, ValueError, "seconds above 0; got 10.0, nan"),
        ({"retries": -1}, ValueError, "at least 0; got -1"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Webhook(**{"url": "http://localhost/", **arguments})
