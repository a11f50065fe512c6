"""Arrays of any framework as tensors, on the same memory where that is possible."""

from __future__ import annotations

from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

__all__ = ["as_tensor"]


def as_tensor(value: Any, where: str) -> Tensor:
    """A tensor on an array's memory, without its gradient; or a copy where DLPack does not allow that.

    A NumPy array that cannot be written to, and one in an order of bytes or a type that DLPack lacks,
    is copied.

    Args:
        value: A tensor, an array with `__dlpack__`, or a number.
        where: What it is, for the message.

    Raises:
        TypeError: It is none of these.
    """
    if isinstance(value, Tensor):
        return value.detach()
    try:
        if isinstance(value, np.ndarray):
            return from_dlpack(value) if value.flags.writeable else torch.tensor(value)
        if hasattr(value, "__dlpack__"):
            return from_dlpack(value)
        if isinstance(value, Number | np.generic):
            return torch.as_tensor(np.asarray(value).copy())
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise TypeError(f"{where} cannot be read as an array of numbers: {error}") from error
    raise TypeError(
        f"{where} is a {type(value).__name__}: pass an array that has DLPack (JAX, NumPy, CuPy, PyTorch) "
        "or a number"
    )
