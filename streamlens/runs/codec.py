"""Frames to bytes and back, exactly: every bit of every value, types and shapes."""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from streamlens.errors import RunStoreError
from streamlens.frame import Frame, Kind

__all__ = [
    "Layout",
    "Spec",
    "array_of",
    "checksum",
    "decode_frame",
    "describe",
    "dump_json",
    "encode_values",
    "frame_of",
    "layout_of",
    "specs_of",
]

Spec: TypeAlias = tuple[torch.dtype, tuple[int, ...]]
"""Type and shape of one tensor."""

# Types of which NumPy knows the bytes as they are; the others are decoded by torch.
_NUMPY: Final[Mapping[str, str]] = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "int64": "<i8",
    "int32": "<i4",
    "int16": "<i2",
    "int8": "i1",
    "uint64": "<u8",
    "uint32": "<u4",
    "uint16": "<u2",
    "uint8": "u1",
    "bool": "?",
    "complex64": "<c8",
    "complex128": "<c16",
}


@dataclass(frozen=True)
class Layout:
    """What frames of one topic have in common: all but their position, meta and values.

    Attributes:
        kind: How often the topic yields a frame.
        source: The name of the lens the frames came from.
        layers: The layers, in model order.
        components: Names of the second dimension.
        stacked: Whether the values are one tensor whose first dimension is the layer.
        tensors: Type name and shape of the one stacked tensor, or of each layer's.
    """

    kind: Kind
    source: str
    layers: tuple[str, ...]
    components: tuple[str, ...]
    stacked: bool
    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def from_row(
        cls, kind: str, source: str, layers: str, components: str, stacked: int, tensors: str
    ) -> Layout:
        """Build a layout from its row in the store.

        Raises:
            ValueError: The row is damaged.
        """
        described = [json.loads(tensors)] if stacked else json.loads(tensors)
        layout = cls(
            kind=Kind(kind),
            source=source,
            layers=tuple(json.loads(layers)),
            components=tuple(json.loads(components)),
            stacked=bool(stacked),
            tensors=tuple((name, tuple(shape)) for name, shape in described),
        )
        for name, _ in layout.tensors:
            if not isinstance(getattr(torch, name, None), torch.dtype):
                raise ValueError(f"unknown type {name!r}")
        return layout

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each tensor."""
        return tuple(getattr(torch, name).itemsize * math.prod(shape) for name, shape in self.tensors)

    @property
    def holds_numbers(self) -> bool:
        """Whether the values are real numbers, one a layer, or one a layer and component."""
        alone = ((), (len(self.components),)) if self.components else ((),)
        return all(
            (shape[1:] if self.stacked else shape) in alone and not name.startswith("complex")
            for name, shape in self.tensors
        )

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one frame."""
        return sum(self.sizes)

    @cached_property
    def series(self) -> int:
        """Numbers in one frame."""
        return sum(math.prod(shape) for _, shape in self.tensors)

    @cached_property
    def rolls(self) -> bool:
        """Whether frames are rolled up: they hold numbers, all of one type and shape."""
        return self.holds_numbers and len(set(self.tensors)) == 1 and self.series > 0


def specs_of(frame: Frame) -> Spec | tuple[Spec, ...]:
    """Type and shape of a frame's tensor, or of each of its tensors; hashable and cheap."""
    if isinstance(frame.values, Tensor):
        return frame.values.dtype, frame.values.shape
    return tuple((value.dtype, value.shape) for value in frame.values)


def layout_of(frame: Frame, specs: Spec | tuple[Spec, ...]) -> Layout:
    """What a frame has in common with others of its topic; `specs` is what `specs_of` returned."""
    return Layout(
        frame.kind,
        frame.source,
        frame.layers,
        frame.components,
        frame.stacked,
        tuple(map(_named, _each(specs))),
    )


def describe(specs: Spec | tuple[Spec, ...]) -> str:
    """The text by which the store keeps what `specs_of` returned."""
    named = tuple(map(_named, _each(specs)))
    return json.dumps(named if _each(specs) is specs else named[0])


def _each(specs: Spec | tuple[Spec, ...]) -> tuple[Spec, ...]:
    single = len(specs) == 2 and isinstance(specs[0], torch.dtype)
    return cast("tuple[Spec, ...]", (specs,) if single else specs)


def _named(spec: Spec) -> tuple[str, tuple[int, ...]]:
    dtype, shape = spec
    return str(dtype).removeprefix("torch."), tuple(shape)


def encode_values(frame: Frame) -> bytes:
    """The raw little-endian bytes of all values of a frame of host tensors, layer after layer."""
    if isinstance(frame.values, Tensor):
        return _bytes(frame.values)
    return b"".join(map(_bytes, frame.values))


def _bytes(tensor: Tensor) -> bytes:
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.dtype is torch.float32 and sys.byteorder == "little":
        return tensor.numpy().tobytes()  # nearly every frame: without the detours below
    flat = tensor.contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy()
    if sys.byteorder == "big":
        number = flat.element_size() // (2 if flat.is_complex() else 1)
        raw = raw.reshape(-1, number)[:, ::-1]
    return raw.tobytes()


def checksum(
    step: int,
    micro_step: int,
    sequence: int,
    epoch: int,
    wall_time: float,
    layout: int,
    meta: str | None,
    data: bytes,
) -> int:
    """CRC-32 of a row of the store: SQLite itself does not notice a flipped bit in one."""
    head = f"{step} {micro_step} {sequence} {epoch} {wall_time!r} {layout} {meta}"
    return zlib.crc32(data, zlib.crc32(head.encode()))


def decode_frame(
    layout: Layout, topic: str, step: int, micro_step: int, epoch: int, meta: str | None, data: bytes
) -> Frame:
    """Build the frame that was stored; its tensors own their memory.

    Raises:
        ValueError: The bytes do not fit the layout.
    """
    if len(data) != layout.nbytes:
        raise ValueError(f"{len(data)} bytes where {layout.nbytes} belong")
    tensors: list[Tensor] = []
    start = 0
    for (name, shape), size in zip(layout.tensors, layout.sizes, strict=True):
        tensors.append(_tensor(name, shape, data[start : start + size]))
        start += size
    values = tensors[0] if layout.stacked else tuple(tensors)
    return frame_of(layout, topic, step, micro_step, epoch, meta, values)


def frame_of(
    layout: Layout,
    topic: str,
    step: int,
    micro_step: int,
    epoch: int,
    meta: str | None,
    values: Tensor | tuple[Tensor, ...],
) -> Frame:
    """The frame that a layout and a row describe, with values that are decoded already."""
    return Frame(
        topic,
        step,
        layout.layers,
        values,
        epoch=epoch,
        micro_step=micro_step,
        components=layout.components,
        meta=None if meta is None else json.loads(meta),
        kind=layout.kind,
        source=layout.source,
    )


def _tensor(name: str, shape: tuple[int, ...], data: bytes) -> Tensor:
    dtype: torch.dtype = getattr(torch, name)
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def array_of(name: str, data: bytes) -> np.ndarray[Any, Any]:
    """The values in `data` as a flat array, without a copy where that is possible.

    Half precision becomes float32, which holds it exactly and with which pandas can reckon.
    """
    if name == "bfloat16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if name == "float16":
        return np.frombuffer(data, "<f2").astype(np.float32)
    if name in _NUMPY:
        return np.frombuffer(data, _NUMPY[name])
    tensor = _tensor(name, (-1,), data) if data else torch.empty(0, dtype=getattr(torch, name))
    wide = tensor.to(torch.complex64) if tensor.is_complex() else tensor.float()
    return cast("np.ndarray[Any, Any]", wide.numpy())


def dump_json(value: Mapping[str, Any]) -> str:
    """JSON of a mapping whose entries may be anything.

    Tensors and arrays become lists, tuples lists, what JSON does not know its text. NaN and
    infinities stay numbers, by the names that Python's reader knows.

    Raises:
        RunStoreError: The mapping contains itself.
    """
    try:
        return json.dumps({str(key): entry for key, entry in value.items()}, default=_plain, skipkeys=True)
    except (ValueError, RecursionError) as error:
        raise RunStoreError(f"cannot store {sorted(map(str, value))}: {error}; pass plain values") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): entry for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    return str(value)
