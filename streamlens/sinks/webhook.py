"""`Webhook`: alerts as JSON over HTTP."""

from __future__ import annotations

import email.utils
import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, ClassVar, Final

from streamlens.errors import SinkError
from streamlens.frame import Frame
from streamlens.sink import RunInfo, Sink, ValueKind
from streamlens.sinks._json import dumps, frame_object, plain

__all__ = ["Webhook"]

_PASSING: Final = frozenset({408, 425, 429})
"""Answers below 500 after which the same request may succeed later."""
_LONGEST_WAIT: Final = 300.0
"""Seconds that a server may ask to be left alone."""


class Webhook(Sink):
    """Posts alerts, and whatever else carries a sentence, as JSON to a URL.

    One request a second at most, holding all that has come meanwhile:

    ```json
    {"text": "fc: gradients are NaN ...", "run": {"id": "...", "name": "..."}, "alerts": [...]}
    ```

    `text` has a line an alert, which is what chat services show; `alerts` has an object each, as
    `JSONLines` writes them, NaN and infinities as texts.

    A request that fails, because the server is gone, busy (408, 425, 429, 5xx) or slow, is sent again
    with a back-off that doubles, or when the server's `Retry-After` says (300 s at most). Any other
    answer, redirections included, means that the URL or the payload is wrong, and is not tried again.
    What is given up is reported and counted; training waits for none of it. A server that took a
    request but could not say so gets it twice.

    The URL is often a secret: messages and logs name its host alone.

    Args:
        url: Where to, `http://` or `https://`.
        headers: Further headers, such as an authorization.
        payload: Makes what is sent of a list of frames, in place of the above; it may be anything that
            JSON knows.
        timeout: Seconds that the server may take to answer.
        retries: How often a request is sent again.
        back_off: Seconds before it is sent again for the first time; doubled each time.

    Raises:
        TypeError: `payload` is not callable.
        ValueError: The URL is none of HTTP, or a number is out of its range.

    Example:
        >>> lens.pipe(health()).subscribe(Webhook("https://chat.example.org/hooks/T0/B0"))
    """

    kinds: ClassVar[frozenset[ValueKind]] = frozenset({"text"})

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        payload: Callable[[list[Frame]], Any] | None = None,
        timeout: float = 10.0,
        retries: int = 5,
        back_off: float = 0.5,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(f"Webhook(url) is a URL such as 'https://example.org/hook'; got {url!r}")
        if payload is not None and not callable(payload):
            raise TypeError(f"Webhook(payload=) takes a function of a list of frames, got {payload!r}")
        if not (timeout > 0 and back_off > 0):
            raise ValueError(
                f"Webhook(timeout=, back_off=) are numbers of seconds above 0; got {timeout!r}, {back_off!r}"
            )
        if retries < 0:
            raise ValueError(f"Webhook(retries=) is a number of requests, at least 0; got {retries!r}")
        self._url = url
        self._host = f"{parts.scheme}://{parts.hostname}"
        self._headers = {
            "Content-Type": "application/json",
            "User-Agent": "streamlens",
            **(headers or {}),
        }
        self._payload = payload
        self._timeout = timeout
        self.retries = retries
        self.back_off = back_off
        self._run = RunInfo(id="")
        # The standard library is enough for a request a second, and needs no extra. Its redirection is not
        # wanted: it repeats a POST as a GET, which loses the alert and says nothing.
        self._opener = urllib.request.build_opener(_NoRedirection)

    def open(self, run: RunInfo) -> None:
        """Note which run the next alerts are of."""
        self._run = run

    def write(self, frames: Sequence[Frame]) -> None:
        """Send frames in one request.

        Raises:
            SinkError: The server did not take it; the error says whether it may later.
        """
        body = dumps(self._default(frames) if self._payload is None else plain(self._payload(list(frames))))
        request = urllib.request.Request(self._url, body.encode(), self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise SinkError(f"{self._host} cannot be reached: {reason}") from error

    def _default(self, frames: Sequence[Frame]) -> dict[str, Any]:
        times = self.wall_times(frames)
        return {
            "text": "\n".join(str(frame.meta["text"]) for frame in frames),
            "run": {"id": self._run.id, "name": self._run.name},
            "alerts": [frame_object(frame, at) for frame, at in zip(frames, times, strict=True)],
        }

    def _refused(self, error: urllib.error.HTTPError) -> SinkError:
        said = f"{self._host} answered {error.code} {error.reason}"
        if error.code in _PASSING or error.code >= 500:
            return SinkError(said, after=min(_seconds(error.headers.get("Retry-After", "")), _LONGEST_WAIT))
        remedy = "check the URL, the headers and what the service expects"
        return SinkError(f"{said}: {remedy}", retry=False)

    def __repr__(self) -> str:
        return f"Webhook({self._host!r})"


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        """Follow none: the answer is an error then."""


def _seconds(text: str) -> float:
    """What a server's `Retry-After` asks for: a number of seconds, or a date."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
