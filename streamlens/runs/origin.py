"""Where a run came from: the command, the state of the code, and the machine."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["git_commit", "origin"]


def origin() -> dict[str, Any]:
    """What is known of this process, for somebody who wants to run it again.

    Nothing is run for it, neither git nor anything else: all of it is read from this process and from
    small files, so that it can be asked for while training.

    Returns:
        `command` (as one would type it), `folder`, `git_commit` (of the program's folder, else of
        the working one; None outside a repository), `machine` (host, system, processor, count of
        CPUs, names of the accelerators in use), `python`, `torch` and `streamlens`.
    """
    program = Path(sys.argv[0]) if sys.argv and sys.argv[0] not in ("", "-c", "-m") else None
    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "folder": _folder(),
        "git_commit": (git_commit(program.parent) if program else None) or git_commit(Path(_folder())),
        "machine": {
            "host": socket.gethostname(),
            "system": platform.platform(),
            "processor": _processor(),
            "cpus": os.cpu_count(),
            "accelerators": _accelerators(),
        },
        "python": platform.python_version(),
        "torch": _version("torch"),
        "streamlens": _version("streamlens"),
    }


def git_commit(folder: Path) -> str | None:
    """The commit that is checked out where `folder` lies; None outside a repository."""
    try:
        for place in (folder.resolve(), *folder.resolve().parents):
            if (place / ".git").exists():
                return _head(place / ".git")
    except (OSError, ValueError):
        pass  # unreadable, or not as git writes it: the run is worth more than its commit
    return None


def _head(entry: Path) -> str | None:
    # In a worktree or submodule `.git` is a file that names the folder.
    git = entry if entry.is_dir() else entry.parent / entry.read_text().removeprefix("gitdir:").strip()
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref:"):
        return head or None
    name = head.removeprefix("ref:").strip()
    shared = git / "commondir"
    common = git / shared.read_text().strip() if shared.exists() else git
    for base in (git, common):
        if (base / name).is_file():
            return (base / name).read_text().strip() or None
    packed = common / "packed-refs"
    lines = packed.read_text().splitlines() if packed.exists() else []
    return next((line.split()[0] for line in lines if line.split()[1:] == [name]), None)


def _folder() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        return ""  # it was removed


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _accelerators() -> list[str]:
    """Names of CUDA devices, if this process uses them already: asking would start the driver."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
