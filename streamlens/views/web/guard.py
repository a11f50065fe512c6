"""Who may ask: the right host, the token where one is needed; and what every answer tells browsers."""

from __future__ import annotations

import hmac
from collections.abc import Collection
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["HEADERS", "Guard"]

HEADERS: Final = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Nothing is loaded from or sent to anywhere else, and no other page may read or frame this one."""


class Guard:
    """Turns away who may not ask, before anything else sees the request.

    The name of the host is checked because a page from elsewhere can have its own name resolved to
    127.0.0.1 (DNS rebinding), and its scripts then count as ours; the name stays theirs.

    Args:
        app: What answers.
        hosts: The names under which the page may be asked for, any port; None for all.
        token: What every request must know, as `?token=` or as `Authorization: Bearer`; None for nothing.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, token: str | None) -> None:
        self._app = app
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or have it answered."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no web sockets here: the server closes what nobody accepts

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        refused = self._refusal(scope)
        if refused is not None:
            await refused(scope, receive, sending)
        else:
            await self._app(scope, receive, sending)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        if self._hosts is not None and _host_name(headers.get("host", "")) not in self._hosts:
            known = ", ".join(sorted(self._hosts))
            text = f"This page is not served under that name. Open it as one of: {known}\n"
            return PlainTextResponse(text, 403)
        if self._token is not None and not self._knows(scope, headers):
            text = "Open the whole address that `streamlens ui` printed: it ends in ?token=...\n"
            return PlainTextResponse(text, 401)
        return None

    def _knows(self, scope: Scope, headers: Headers) -> bool:
        given = headers.get("authorization", "").removeprefix("Bearer ")
        given = given or QueryParams(scope.get("query_string", b"")).get("token", "")
        return hmac.compare_digest(given.encode(), (self._token or "").encode())


def _host_name(host: str) -> str:
    """A host header without its port; `""` for what is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "") if not set(host) & set("/?#@\\") else ""
    except ValueError:
        return ""
