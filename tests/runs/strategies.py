"""Frames of every kind that a run can send, and what it means that two are the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from streamlens.frame import Frame, Kind

DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
)

HOSTILE = (
    "",
    "a'; DROP TABLE frames; --",
    'x"y',
    "nul\0byte",
    "[ab]*?",
    "\ud800",
    "層.重み",
    "%_",
    "\\",
    "G/loss",
)

names = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(), max_size=6))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | names,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def tensors(draw: st.DrawFn, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A tensor of arbitrary bits: every NaN payload, infinities, subnormal numbers."""
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    if dtype is torch.bool:
        flags = draw(st.lists(st.booleans(), min_size=count, max_size=count))
        return torch.tensor(flags).reshape(tuple(shape))
    size = count * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(tuple(shape))


@st.composite
def frames(
    draw: st.DrawFn,
    topics: st.SearchStrategy[str] = names,
    layer_names: st.SearchStrategy[str] = names,
    dtypes: Sequence[torch.dtype] = DTYPES,
    max_inner: int = 2,
) -> Frame:
    """A frame with anything in it that its class allows."""
    layers = draw(st.lists(layer_names, max_size=3, unique=True))
    shapes = st.lists(st.integers(0, 3), max_size=max_inner)
    values: Tensor | list[Tensor]
    if draw(st.booleans()):
        values = draw(tensors(draw(st.sampled_from(dtypes)), [len(layers), *draw(shapes)]))
    else:
        values = [draw(tensors(draw(st.sampled_from(dtypes)), draw(shapes))) for _ in layers]
    return Frame(
        draw(topics),
        draw(st.integers(0, 6) | st.integers(0, 2**40)),
        layers,
        values,
        epoch=draw(st.integers(0, 3)),
        micro_step=draw(st.integers(0, 2)),
        components=draw(st.lists(names, max_size=3, unique=True)),
        meta=draw(st.dictionaries(names, json_values, max_size=2)),
        kind=draw(st.sampled_from(Kind)),
        source=draw(names),
    )


def bits(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor, to the bit."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
    return tensor.dtype, tuple(tensor.shape), bytes(raw)


def content(frame: Frame) -> tuple[Any, ...]:
    """Everything that a frame says, in a form that `==` compares to the bit."""
    values = frame.values
    return (
        frame.topic,
        frame.step,
        frame.micro_step,
        frame.epoch,
        frame.layers,
        frame.components,
        frame.kind,
        frame.source,
        json.dumps(dict(frame.meta), sort_keys=True),
        bits(values) if isinstance(values, Tensor) else tuple(map(bits, values)),
    )
