"""The binary version of CIFAR-10 and CIFAR-100: records in a compressed tar archive."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from streamlens.errors import DatasetError
from streamlens.lab.data.dataset import Split

__all__ = ["read_cifar"]

_SHAPE: Final = (3, 32, 32)
_PIXELS: Final = 3 * 32 * 32
_LARGEST: Final = 1 << 30
_BLOCK: Final = 1 << 20


def read_cifar(path: Path, members: Sequence[str], label_bytes: int) -> Split:
    """The images of some of an archive's members, in their order.

    A record is a label of one byte (CIFAR-100: the coarse and then the fine one, which is taken) and
    3,072 bytes of pixels: red, green and blue, each row by row. Members are read where they lie:
    nothing is extracted, so an archive cannot write anywhere.

    Args:
        path: An archive compressed with gzip.
        members: The names of its members.
        label_bytes: Bytes of labels in a record.

    Returns:
        uint8 images `(examples, 3, 32, 32)` and their labels.

    Raises:
        DatasetError: It is no such archive, or a damaged one.
    """
    found = _contents(path, members)
    record = label_bytes + _PIXELS
    for name, data in found.items():
        if not data or len(data) % record:
            raise DatasetError(
                f"{path} is damaged: {name} has {len(data)} bytes, which are no whole records of {record}"
            )
    joined = bytearray(b"".join(found[name] for name in members))
    records = torch.frombuffer(joined, dtype=torch.uint8).reshape(-1, record)
    return Split(records[:, label_bytes:].reshape(-1, *_SHAPE), records[:, label_bytes - 1])


def _contents(path: Path, members: Sequence[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        # As a stream: once through the archive, in the order in which it is compressed. Uncompressed by
        # gzip, since tarfile does not look at the checksum at the end.
        with gzip.open(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as archive:
            for member in archive:
                if member.name not in members:
                    continue
                stream = archive.extractfile(member) if member.isreg() else None
                if stream is None or member.name in found or member.size > _LARGEST:
                    raise DatasetError(f"{path} is damaged: {member.name} is not one plain file")
                found[member.name] = stream.read()
            while unpacked.read(_BLOCK):
                pass
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} is no whole tar.gz archive: {error}") from error
    for name in members:
        if name not in found:
            raise DatasetError(f"{path} is damaged: it has no {name}")
    return found
