"""A server of the live page, and a bare client's way of asking it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from streamlens.views.web.serve import PageServer


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
