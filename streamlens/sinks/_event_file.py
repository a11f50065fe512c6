"""TensorBoard's event files: records with checksums, appended in batches, all or nothing."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterable
from functools import cache, lru_cache
from itertools import count
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from streamlens.sinks._append_file import AppendFile

__all__ = ["EventFile", "crc32c"]

_POLYNOMIAL: Final = 0x82F63B78
_BLOCK: Final = 1024
_serial = count()


class EventFile:
    """An event file that is new, open and empty.

    Args:
        folder: The folder it is made in; made too where it is missing.

    Raises:
        OSError: The folder or the file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        unique = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_serial)}"
        self.path = folder / f"events.out.tfevents.{unique}"
        self._file = AppendFile.create(self.path)

    @property
    def removed(self) -> bool:
        """Whether nobody will ever read what is appended."""
        return self._file.removed

    def append(self, events: Iterable[bytes]) -> None:
        """Append serialized events; if that fails, the file ends where it did before.

        Raises:
            OSError: They could not be written, for example for lack of space.
        """
        self._file.append(b"".join(map(_record, events)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def crc32c(data: bytes) -> int:
    """The CRC-32C (Castagnoli) of some bytes, as RFC 3720 defines it.

    A CRC is linear: the checksum of a block is the exclusive or of what each byte contributes at
    its distance from the end. NumPy looks these up for a block at once; pure Python takes 50 times
    as long, which would be most of the cost of an event.
    """
    table = _contributions()
    crc = 0xFFFFFFFF
    octets = np.frombuffer(data, dtype=np.uint8)
    for start in range(0, len(octets), _BLOCK):
        block = octets[start : start + _BLOCK]
        distance = np.arange(len(block) - 1, -1, -1)
        combined = int(np.bitwise_xor.reduce(table[distance, block]))
        # The checksum so far acts as if it were added to the first four bytes.
        for i in range(min(4, len(block))):
            combined ^= int(table[len(block) - 1 - i, crc >> (8 * i) & 0xFF])
        crc = combined ^ (crc >> 8 * len(block) if len(block) < 4 else 0)
    return crc ^ 0xFFFFFFFF


@cache
def _contributions() -> NDArray[np.uint32]:
    """What a byte contributes to the checksum, by its distance from the end and its value."""
    table = np.empty((_BLOCK, 256), dtype=np.uint32)
    row = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        row = np.where(row & 1, (row >> 1) ^ np.uint32(_POLYNOMIAL), row >> 1).astype(np.uint32)
    table[0] = row
    for distance in range(1, _BLOCK):
        table[distance] = table[0][table[distance - 1] & 0xFF] ^ (table[distance - 1] >> 8)
    return table


def _record(event: bytes) -> bytes:
    return b"".join((_header(len(event)), event, _masked(event)))


@lru_cache(maxsize=1024)
def _header(size: int) -> bytes:
    length = struct.pack("<Q", size)
    return length + _masked(length)


def _masked(data: bytes) -> bytes:
    # The format masks checksums, so that a checksum of data with checksums in it stays good.
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
