"""Run stores for the live page, a server of it, and a browser's and a bare client's way of asking it."""

from __future__ import annotations

import http.client
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import torch

from streamlens.frame import Frame
from streamlens.runs import RunWriter
from streamlens.views.web.serve import PageServer

LAYERS = ("features.0", "features.3", "classifier.2")


def frames_of(step: int, layers: Sequence[str] = LAYERS) -> list[Frame]:
    """What a small run records at a step; its numbers tell the step, and nothing is random."""
    count = len(layers)
    place = torch.arange(1, count + 1, dtype=torch.float32)
    return [
        Frame("loss", step, ("",), torch.tensor([2.3 * math.exp(-step / 80) + 0.1 + 0.02 * (step % 3)])),
        Frame("learning_rate", step, tuple(layers), torch.full((count,), 3e-3)),
        Frame("uw_ratio", step, tuple(layers), 1e-3 * place),
        Frame("weight_gradients.norm2", step, tuple(layers), place / (1 + step / 50)),
    ]


def alert(step: int, text: str, rule: str = "loss_spike") -> Frame:
    """An alert's frame, as `health()` makes it."""
    meta = {"rule": rule, "state": "start", "severity": "critical", "text": text}
    return Frame(f"alerts.{rule}", step, ("",), torch.ones(1), meta=meta)


def action(step: int, text: str) -> Frame:
    """A controller's action."""
    return Frame("learning_rate.action", step, ("",), torch.ones(1), meta={"text": text, "cause": "plateau"})


def write_run(
    path: Path,
    steps: int = 60,
    *,
    run: str = "r1",
    name: str = "",
    layers: Sequence[str] = LAYERS,
    extra: Sequence[Frame] = (),
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run into a store; returns the store."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"model": "AlexNetMini", "dataset": "digits", **(metadata or {})}
    with RunWriter(path, run, name=name, metadata=told) as writer:
        frames = [frame for step in range(steps) for frame in frames_of(step, layers)] + list(extra)
        if frames:
            writer.write(frames, [time.time()] * len(frames))
    return path


@dataclass
class Reply:
    """What a server answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()


class Client:
    """Asks a server for exactly what it is told to, as no library would."""

    def __init__(self, server: PageServer) -> None:
        self.url = server.url
        self.port = urlsplit(server.url).port or 0

    def get(self, target: str, *, host: str | None = None, **headers: str) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.putrequest("GET", target, skip_host=True, skip_accept_encoding=True)
            if host != "":
                connection.putheader("Host", host or f"127.0.0.1:{self.port}")
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            connection.endheaders()
            answer = connection.getresponse()
            got = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, got, answer.read())
        finally:
            connection.close()

    def charts(self, *runs: str, **asked: str) -> Any:
        """What the page would show."""
        reply = self.get(f"/api/charts?{urlencode([('run', key) for key in runs] + list(asked.items()))}")
        assert reply.status == 200, reply.text
        return reply.json

    def runs(self) -> list[dict[str, Any]]:
        """The list of runs."""
        found: list[dict[str, Any]] = self.get("/api/runs").json["runs"]
        return found

    def keys(self) -> dict[str, str]:
        """The key of each run by its title."""
        return {run["title"]: run["key"] for run in self.runs()}


@contextmanager
def serving(path: Path, **options: Any) -> Iterator[Client]:
    """A server of the page, on a port that is free."""
    server = PageServer(path, port=0, **options)
    thread = server.start()
    try:
        yield Client(server)
    finally:
        server.stop()
        thread.join(timeout=10)
        assert not thread.is_alive()


def rows_of(content: Any, key: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of each data set of a section."""
    section = next(section for section in content["sections"] if section["key"] == key)
    return {
        name: [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        for name, columns in section["data"].items()
    }
