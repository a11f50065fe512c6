"""The live page in a process of its own, beside a training: `python -m streamlens.views.web.process PATH`.

Prints the page's address as one line and ends when its standard input does: with the process that
started it, however that ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["PageProcess", "main"]

_PATIENCE: Final = 10.0
"""Seconds that the process gets to end by itself."""

_NICE: Final = 5
"""Drawing gives way to training."""


class PageProcess:
    """The live page of a folder, served by a process of its own until `close()` or the end of this one.

    Starting it takes seconds, which nobody waits for.

    Args:
        path: A run store, or a folder in which runs will appear.
        on_url: Called with the page's address once it can be opened, on a thread of its own.
        on_failure: Called with the reason where it cannot be served, on that thread.

    Raises:
        ImportError: The `ui` extra is not installed.
        OSError: The process could not be started.
    """

    def __init__(
        self, path: Path, *, on_url: Callable[[str], None], on_failure: Callable[[str], None]
    ) -> None:
        from streamlens.views.web.serve import require_packages

        require_packages()
        self._on_url = on_url
        self._on_failure = on_failure
        self._closing = False
        self._url = ""
        # In a session of its own: Ctrl-C in the terminal is for the training, which then closes this.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "streamlens.views.web.process", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True, name="streamlens-page")
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        said = ""
        with suppress(ValueError, OSError):
            # To its end: what it says later is of no use, but must not fill the pipe.
            for line in self._process.stdout:
                if not self._url and line.startswith("http://"):
                    self._url = line.strip()
                    self._on_url(self._url)
                said = line.strip() or said
        if not self._url and not self._closing:
            self._on_failure(said or "its process ended")

    def close(self) -> None:
        """End it, once the pages that are open have fetched what came last; some seconds at most."""
        self._closing = True
        assert self._process.stdin is not None
        if not self._url:
            self._process.kill()  # nobody has seen anything of it
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=1)
        assert self._process.stdout is not None
        self._process.stdout.close()


def main(arguments: list[str]) -> int:
    """Serve the page of a path until the standard input ends.

    Args:
        arguments: The path.

    Returns:
        The exit status.
    """
    from streamlens.views.web.serve import PageServer

    with suppress(OSError, AttributeError):
        os.nice(_NICE)
    try:
        server = PageServer(arguments[0], port=0)
    except Exception as error:
        print(error, file=sys.stderr)  # noqa: T201 - for the process that started this one
        return 1
    thread = server.start()
    print(server.url, flush=True)  # noqa: T201 - for the process that started this one
    with suppress(OSError):
        while sys.stdin.buffer.read(4096):
            pass
    server.finish()
    thread.join(timeout=5)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
