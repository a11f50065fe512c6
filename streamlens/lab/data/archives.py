"""Published files: found in a folder or downloaded, and never used unless their checksum is right."""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streamlens.errors import DatasetError

__all__ = ["Published", "md5_of", "obtain"]

_BLOCK: Final = 1 << 20
_PATIENCE: Final = 30.0
"""Seconds that a server may stay silent."""


@dataclass(frozen=True)
class Published:
    """A file as its authors published it.

    Attributes:
        dataset: The data set it belongs to, which names its folder.
        name: Its name.
        md5: Its checksum, as published.
        folders: Where to download it, without its name; tried in order.
    """

    dataset: str
    name: str
    md5: str
    folders: Sequence[str]


def obtain(file: Published, folder: Path, *, download: bool) -> Path:
    """Where a file with the right checksum lies.

    It is looked for in the folder named after the data set, in that one's `raw`, where torchvision puts
    it, and in the folder itself.

    Args:
        file: What is wanted.
        folder: Where data sets are kept.
        download: Whether to download it, with a progress bar on the standard error, if it is not there
            or damaged. It then replaces a file of its name in the folder of the data set.

    Raises:
        DatasetError: It is not there, damaged, or could not be downloaded.
    """
    damaged: list[str] = []
    for place in (folder / file.dataset, folder / file.dataset / "raw", folder):
        path = place / file.name
        try:
            if not path.is_file():
                continue
            found = md5_of(path)
        except OSError as error:
            raise DatasetError(f"{path} cannot be read: {error.strerror or error}") from error
        if found == file.md5:
            return path
        damaged.append(f"{path} (MD5 {found})")
    if download:
        return _download(file, folder / file.dataset)
    remedy = (
        f"put it into {folder / file.dataset}, or have it downloaded (download=True, --download) from "
        f"{file.folders[0]}{file.name}"
    )
    if damaged:
        raise DatasetError(
            f"{file.dataset}: not the published file, whose MD5 is {file.md5}: {', '.join(damaged)}; {remedy}"
        )
    raise DatasetError(f"{file.dataset}: there is no {file.name} in {folder}: {remedy}")


def md5_of(path: Path) -> str:
    """The MD5 of a file's bytes. It tells damage, and no more: MD5 is what was published."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _download(file: Published, folder: Path) -> Path:
    failures: list[str] = []
    for base in file.folders:
        url = base + file.name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return _download_from(url, file, folder)
        except (OSError, http.client.HTTPException) as error:
            # A URLError keeps what went wrong in its reason.
            failures.append(f"{url}: {getattr(error, 'reason', None) or error or type(error).__name__}")
    raise DatasetError(
        f"{file.dataset} could not be downloaded ({'; '.join(failures)}). Without a network, put "
        f"{file.name} (MD5 {file.md5}) into {folder}, or train on digits, which need no download"
    )


def _download_from(url: str, file: Published, folder: Path) -> Path:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    # In the same folder, so that it takes its place at once, whole or not at all.
    handle, name = tempfile.mkstemp(dir=folder, prefix=f".{file.name}.", suffix=".part")
    part = Path(name)
    digest = hashlib.md5(usedforsecurity=False)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        with (
            os.fdopen(handle, "wb") as out,
            urllib.request.urlopen(url, timeout=_PATIENCE) as response,
            Progress(*columns, console=Console(stderr=True)) as progress,
        ):
            task = progress.add_task(f"{file.dataset}: {file.name}", total=response.length)
            while block := response.read(_BLOCK):
                digest.update(block)
                out.write(block)
                progress.update(task, advance=len(block))
        if digest.hexdigest() != file.md5:
            raise OSError(f"what came has MD5 {digest.hexdigest()}, not {file.md5}")
        target = folder / file.name
        part.chmod(0o644)  # as a download usually is: a folder of data may be shared
        return part.replace(target)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()
