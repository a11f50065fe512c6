"""JupyterLab in a real browser, with nothing of the user's own and nothing from the network."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from playwright.sync_api import Page

__all__ = ["Lab", "jupyter_lab"]

_PATIENCE: Final = 90
nbformat: Any = importlib.import_module("nbformat")
_KERNEL: Final = "shell.currentWidget?.sessionContext?.session?.kernel"
_ROOT: Final = Path(__file__).parents[2]


class Lab:
    """A server of JupyterLab.

    Attributes:
        folder: Where its notebooks are.
        address: Where it is reached.
    """

    def __init__(self, folder: Path, address: str) -> None:
        self.folder = folder
        self.address = address

    def write(self, name: str, cells: Sequence[str]) -> Path:
        """Make a notebook."""
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        path = self.folder / name
        nbformat.write(made, path)
        return path

    def read(self, name: str) -> Any:
        """A notebook as it is saved."""
        return nbformat.read(self.folder / name, 4)

    def open(self, page: Page, name: str) -> None:
        """Open a notebook, and wait until its kernel is there."""
        page.goto(f"{self.address}/lab/tree/{name}")
        page.wait_for_function(
            f"() => window.jupyterapp?.{_KERNEL}?.status === 'idle'",
            timeout=_PATIENCE * 1000,
        )

    @staticmethod
    def command(page: Page, name: str) -> None:
        """Have JupyterLab do something; does not wait for it."""
        page.evaluate("name => { window.jupyterapp.commands.execute(name); }", name)


@contextmanager
def jupyter_lab(folder: Path) -> Iterator[Lab]:
    """Run a server of JupyterLab for notebooks in a folder.

    Args:
        folder: An empty folder.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    notebooks, own = folder / "notebooks", folder / "jupyter"
    settings = own / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    notebooks.mkdir()
    settings.joinpath("notification.jupyterlab-settings").write_text(
        '{"fetchNews": "false", "checkForUpdates": false}'
    )
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("VSCODE")},
        "PYTHONPATH": str(_ROOT),
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(own / "ipython"),
        "JUPYTER_CONFIG_DIR": str(own / "config"),
        "JUPYTER_DATA_DIR": str(own / "data"),
        "JUPYTER_RUNTIME_DIR": str(own / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
    }
    options = [
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        f"--ServerApp.root_dir={notebooks}",
        "--ServerApp.password=",
        "--IdentityProvider.token=",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.news_url=None",
    ]
    with (folder / "lab.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(lambda: _answers(address) or server.poll() is not None)
            assert server.poll() is None, (folder / "lab.log").read_text()
            yield Lab(notebooks, address)
        finally:
            # It ends its kernels too.
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/api", timeout=2):
            return True
    except OSError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
