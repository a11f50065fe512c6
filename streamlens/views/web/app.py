"""The live page as a web application: the page itself, its files, the list of runs, and what they show."""

from __future__ import annotations

import gzip
import hashlib
import html
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import Final
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from streamlens.views.web.board import Answer, Board
from streamlens.views.web.charts import Question
from streamlens.views.web.guard import Guard

__all__ = ["application"]

_ASSETS: Final = {
    "vega.js": ("vega/vega.min.js", "text/javascript"),
    "host.js": ("page/host.js", "text/javascript"),
    "page.js": ("web/page.js", "text/javascript"),
    "runs.js": ("web/runs.js", "text/javascript"),
    "charts.js": ("web/charts.js", "text/javascript"),
    "report.css": ("page/report.css", "text/css"),
    "page.css": ("web/page.css", "text/css"),
}
"""All files that there are to ask for: a name that is not here leads nowhere."""

_MOST_RUNS: Final = 20
_LONGEST: Final = 400


@dataclass(frozen=True, slots=True)
class _Asset:
    """A file of the page, compressed once: the charts' library alone would take a visit 50 ms each time."""

    plain: bytes
    packed: bytes
    kind: str
    tag: str

    @classmethod
    def read(cls, path: str, kind: str) -> _Asset:
        plain = files("streamlens.views").joinpath(path).read_bytes()
        tag = f'"{hashlib.sha256(plain).hexdigest()[:16]}"'
        return cls(plain, gzip.compress(plain, 6, mtime=0), kind, tag)

    def answer(self, request: Request) -> Response:
        headers = {"etag": self.tag, "cache-control": "no-cache", "vary": "accept-encoding"}
        if self.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(self.plain, media_type=self.kind, headers=headers)
        return Response(self.packed, media_type=self.kind, headers=headers | {"content-encoding": "gzip"})


def application(
    board: Board, *, hosts: Collection[str] | None, token: str | None, ending: Callable[[], bool] = bool
) -> ASGIApp:
    """The application.

    Args:
        board: What answers.
        hosts: The names under which it may be asked; None for all.
        token: What every request must know; None for nothing.
        ending: Whether the server is about to end, which pages then say.
    """
    contents = {name: _Asset.read(path, kind) for name, (path, kind) in _ASSETS.items()}
    template = Template(files("streamlens.views").joinpath("web/page.html").read_text(encoding="utf-8"))
    query = f"?token={quote(token)}" if token else ""
    page = template.substitute(query=html.escape(query))

    def shown(_: Request) -> Response:
        return HTMLResponse(page, headers={"cache-control": "no-store"})

    def asset(request: Request) -> Response:
        found = contents.get(request.path_params["name"])
        if found is None:
            return Response(status_code=404)
        return found.answer(request)

    def runs(request: Request) -> Response:
        return _sent(request, board.runs(), ending())

    def charts(request: Request) -> Response:
        try:
            question = _question(request)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 400)
        return _sent(request, board.charts(question), ending())

    return Guard(
        Starlette(
            routes=[
                Route("/", shown),
                Route("/assets/{name}", asset),
                Route("/api/runs", runs),
                Route("/api/charts", charts),
            ],
            middleware=[Middleware(GZipMiddleware, minimum_size=2_000, compresslevel=5)],
        ),
        hosts,
        token,
    )


def _sent(request: Request, answer: Answer, ending: bool) -> Response:
    headers = {
        "etag": f'"{answer.tag}"',
        "cache-control": "no-cache",
        "streamlens-wait": f"{answer.wait:.2f}",
        "streamlens-ending": "1" if ending else "0",
    }
    if answer.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(answer.body, media_type="application/json", headers=headers)


def _question(request: Request) -> Question:
    """What is asked for.

    Raises:
        ValueError: It cannot be answered; the message is for whoever asked.
    """
    asked = request.query_params
    runs = tuple(dict.fromkeys(asked.getlist("run")))
    if len(runs) > _MOST_RUNS:
        raise ValueError(f"{len(runs)} runs were chosen: at most {_MOST_RUNS} can be compared at once")
    pattern, row, model = asked.get("layers", ""), asked.get("row"), asked.get("model", "")
    if len(pattern) > _LONGEST:
        raise ValueError(f"the layer filter is longer than {_LONGEST} characters")
    window = None
    if "from" in asked or "to" in asked:
        first, last = asked.get("from", ""), asked.get("to", "")
        if not (first.isdecimal() and last.isdecimal() and len(first) < 16 and len(last) < 16):
            raise ValueError("from and to must be steps, whole numbers from 0")
        if int(first) > int(last):
            raise ValueError("from must not be beyond to")
        window = (int(first), int(last))
    return Question(runs, pattern, row, model, window)
