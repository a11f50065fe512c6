"""The live page's server: where it listens, who may ask, and how it ends."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, Final

from streamlens.views.own import own_views
from streamlens.views.sources import AnyChart
from streamlens.views.web.board import Board
from streamlens.views.web.charts import Question
from streamlens.views.web.library import Library

__all__ = ["PORT", "PageServer", "require_packages", "serve"]

PORT: Final = 7411
"""Where the page is served where nobody says otherwise."""

_log = logging.getLogger("streamlens")

_TRIED: Final = 20
"""Ports tried from there on where the first are taken."""

_LINGER: Final = 4.0
"""Seconds that open pages get to fetch what came last."""

_OPEN: Final = 20.0
"""Seconds within which a page that is open has asked for something."""


def serve(
    path: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    views: Mapping[str, AnyChart] | None = None,
) -> None:
    """Serve the live page of recorded runs, also of one that is being written, until Ctrl-C.

    What `streamlens ui` does, for charts of your own made in Python. Needs `pip install "streamlens[ui]"`.

    Args:
        path: A run store, or a folder with run stores in it or below it.
        host: The address to listen at. Any but one of this machine's own (`127.0.0.1`) asks for a token,
            which is part of the address printed.
        port: The port; 0 for any free one. By default 7411, or the next that is free.
        views: Altair charts over `sl.views.data(topic)`, by their headings, shown above the others.

    Raises:
        RunStoreError: There is nothing at `path`.
        OSError: It cannot listen there.
        ValueError: A view is no Altair chart over a topic.
        ImportError: The `ui` extra is not installed.
    """
    server = PageServer(path, host=host, port=port, views=views)
    print(f"{server.url}\nCtrl-C ends it.", flush=True)  # noqa: T201 - it is what one runs it for
    server.run()


class PageServer:
    """A server that listens from the start, and answers while `run()` runs.

    Args:
        path: A run store, or a folder.
        host: The address to listen at.
        port: The port; 0 for any free one, None for 7411 or the next that is free.
        token: Whether to ask for a token at this machine's own addresses too, which others who work on it
            can reach.
        views: Charts of the user's own.

    Attributes:
        url: The address of the page, with the token where one is needed.

    Raises:
        RunStoreError: There is nothing at `path`.
        OSError: It cannot listen there.
        ValueError: A view is no Altair chart over a topic.
        ImportError: The `ui` extra is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        token: bool = False,
        views: Mapping[str, AnyChart] | None = None,
    ) -> None:
        # Starlette, and not the standard library's server: HTTP is not what this project is for.
        uvicorn = require_packages()
        from streamlens.views.web.app import application

        self._board = Board(Library(path), own_views(views or {}))
        self._socket = _listening(host, port)
        address = self._socket.getsockname()[0]
        own = ipaddress.ip_address(address).is_loopback
        secret = None if own and not token else secrets.token_urlsafe(24)
        # Where a token is asked for, a page from elsewhere that borrows our address does not know it.
        hosts = {"localhost", "127.0.0.1", "::1", address, host} if own else None
        self.url = _url(address, self._socket.getsockname()[1], secret)
        self._ending = False
        self._asked = 0.0
        app = application(self._board, hosts=hosts, token=secret, ending=self._ask)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=2,
        )
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        """Answer until Ctrl-C or `stop()`."""
        threading.Thread(target=self._warm, name="streamlens-page-first", daemon=True).start()
        try:
            self._server.run(sockets=[self._socket])
        except KeyboardInterrupt:
            pass  # how one ends it
        finally:
            self.close()

    def _warm(self) -> None:
        """Make what the first visitor will most likely ask for, while the address is being typed."""
        try:
            self._board.charts(Question())
        except Exception:  # the visitor will be told
            _log.debug("the first answer failed", exc_info=True)

    def stop(self) -> None:
        """End `run()`, from any thread."""
        self._server.should_exit = True

    def close(self) -> None:
        """Stop listening, where it never answered."""
        self._socket.close()

    def finish(self) -> None:
        """Let open pages fetch what came last, for some seconds, and then end `run()`.

        Blocks until then; returns at once where no page is open.
        """
        self._board.hurry()
        self._ending = True
        begun = time.monotonic()
        while time.monotonic() < begun + _LINGER and self._asked > begun - _OPEN:
            time.sleep(0.1)
        self.stop()

    def start(self) -> threading.Thread:
        """Answer on a thread of its own.

        Returns:
            The thread, which ends after `stop()`.
        """
        thread = threading.Thread(target=self.run, name="streamlens-page", daemon=True)
        thread.start()
        return thread

    def _ask(self) -> bool:
        """Note that a page has asked; whether the server is about to end."""
        self._asked = time.monotonic()
        return self._ending


def require_packages() -> Any:
    """The module `uvicorn`.

    Raises:
        ImportError: The `ui` extra is not installed.
    """
    try:
        import starlette  # noqa: F401 - asked for by name, so that its absence is said here
        import uvicorn
    except ImportError as error:
        raise ImportError(
            f"{error.name} is not installed; the live page needs: pip install 'streamlens[ui]'",
            name=error.name,
        ) from error
    return uvicorn


def _listening(host: str, port: int | None) -> socket.socket:
    """A socket that listens, or the error that says why none can."""
    ports = [port] if port is not None else list(range(PORT, PORT + _TRIED))
    for wanted in ports:
        try:
            return _bound(host, wanted)
        except OSError as error:
            reason = error
            # Only a port that is taken leaves another one to try.
            if isinstance(error, socket.gaierror) or wanted == ports[-1]:
                break
    where = f"{host}:{ports[0]}" if len(ports) == 1 else f"{host}, ports {ports[0]} to {ports[-1]}"
    # Without a number of its own: that would stand before the sentence.
    raise OSError(
        f"cannot listen at {where} ({reason.strerror}): choose another --port or --host"
    ) from reason


def _bound(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            # On Windows this would let two servers share a port.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(128)
    except BaseException:
        made.close()
        raise
    return made


def _url(address: str, port: int, token: str | None) -> str:
    if ipaddress.ip_address(address).is_unspecified:
        address = socket.gethostname()
    name = f"[{address}]" if ":" in address else address
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")
