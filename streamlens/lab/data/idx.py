"""The IDX format of MNIST and its successors, compressed with gzip."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from streamlens.errors import DatasetError

__all__ = ["read_idx"]

_UNSIGNED_BYTES: Final = 0x08
_LARGEST: Final = 1 << 30


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The array of unsigned bytes in a file.

    A magic number (two zero bytes, the type, the number of dimensions), each dimension as a big-endian
    32-bit number, and the bytes, the last dimension the fastest.

    Args:
        path: A file compressed with gzip.
        dimensions: How many the array must have.

    Returns:
        A uint8 tensor.

    Raises:
        DatasetError: It is no such file, or a damaged one.
    """
    try:
        with gzip.open(path) as stream:
            magic, *shape = struct.unpack(f">{1 + dimensions}I", stream.read(4 * (1 + dimensions)))
            wanted = _UNSIGNED_BYTES << 8 | dimensions
            if magic != wanted:
                raise DatasetError(
                    f"{path} is no IDX file of bytes in {dimensions} dimensions: its magic number is "
                    f"{magic:#010x}, not {wanted:#010x}"
                )
            expected = math.prod(shape)
            if expected > _LARGEST:
                raise DatasetError(f"{path} is damaged: its header tells of {expected} bytes")
            data = stream.read(expected + 1)
    except struct.error:
        raise DatasetError(f"{path} is damaged: it ends within its header") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} is no whole gzip file: {error}") from error
    if len(data) != expected:
        more = f"{len(data)}" if len(data) < expected else "more"
        raise DatasetError(f"{path} is damaged: its header tells of {expected} bytes, it has {more}")
    if not data:  # which frombuffer refuses
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(shape)
