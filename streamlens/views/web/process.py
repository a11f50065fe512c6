"""The live page in a process of its own, beside a training: `python -m streamlens.views.web.process PATH`.

Prints the page's address as one line and ends when its standard input does: with the process that
started it, however that ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["PageProcess", "main"]

_PATIENCE: Final = 60.0
_NICE: Final = 5
"""Drawing gives way to training."""


class PageProcess:
    """The live page of a folder, served by a process of its own until `close()` or the end of this one.

    Args:
        path: A run store, or a folder that runs will appear in.

    Attributes:
        url: The address of the page.

    Raises:
        ImportError: The `ui` extra is not installed.
        OSError: The process could not be started, or cannot serve the page; says why.
    """

    def __init__(self, path: Path) -> None:
        from streamlens.views.web.serve import require_packages

        require_packages()
        # In a session of its own: Ctrl-C in the terminal is for the training, which then closes this.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "streamlens.views.web.process", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            _, said = self._process.communicate(timeout=_PATIENCE)
            raise OSError(
                f"the live page could not be served: {said.strip().splitlines()[-1:] or 'it ended'}"
            )
        # What it says later goes nowhere, and must not fill the pipe.
        threading.Thread(target=self._drain, daemon=True, name="streamlens-page-errors").start()

    def _drain(self) -> None:
        assert self._process.stderr is not None
        with suppress(ValueError, OSError):
            while self._process.stderr.read(4096):
                pass

    def close(self) -> None:
        """End it, once the pages that are open have fetched what came last; some seconds at most."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


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
