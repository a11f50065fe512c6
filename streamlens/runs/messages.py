"""Frames as messages that stand alone, for queues between processes: every bit comes back."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Final

from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.runs.codec import Layout, decode_frame, describe, dump_json, encode_values, specs_of

__all__ = ["Message", "Packer", "layout_of", "unpack"]

_MOST_LAYOUTS: Final = 4096


@dataclass(frozen=True)
class Message:
    """A frame as bytes.

    What all frames of a metric have in common, such as the names of 600 layers, is a text of its own that
    needs to be sent once: `layout` names it by what it says, so that it is the same in every process.

    Attributes:
        layout: The name of the layout.
        head: Topic, place in time and meta, as JSON.
        data: The values.
    """

    layout: str
    head: str
    data: bytes


class Packer:
    """Makes messages of frames.

    Attributes:
        layouts: The layouts of the messages made so far, by name.
    """

    def __init__(self) -> None:
        self.layouts: dict[str, str] = {}
        self._names: dict[tuple[object, ...], str] = {}

    def pack(self, frame: Frame) -> Message:
        """A frame of host tensors as a message.

        Raises:
            RunStoreError: Its meta contains itself.
        """
        specs = specs_of(frame)
        key = (frame.kind, frame.source, frame.layers, frame.components, specs)
        name = self._names.get(key)
        if name is None:
            fields = [
                frame.kind.value,
                frame.source,
                json.dumps(frame.layers),
                json.dumps(frame.components),
                int(frame.stacked),
                describe(specs),
            ]
            text = json.dumps(fields)
            name = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=12).hexdigest()
            if len(self._names) >= _MOST_LAYOUTS:
                self._names.clear()
            self._names[key] = name
            self.layouts[name] = text
        meta = dump_json(frame.meta) if frame.meta else None
        head = json.dumps([frame.topic, int(frame.step), int(frame.micro_step), int(frame.epoch), meta])
        return Message(name, head, encode_values(frame))


def layout_of(text: str) -> Layout:
    """A layout from its text.

    Raises:
        StreamlensError: It is none.
    """
    try:
        return Layout.from_row(*json.loads(text))
    except (TypeError, ValueError, KeyError) as error:
        raise StreamlensError(f"{text[:80]!r} is no layout of frames: {error}") from error


def unpack(layout: Layout, head: str, data: bytes) -> Frame:
    """The frame that was packed; its tensors own their memory.

    Raises:
        StreamlensError: Head, data and layout do not fit each other.
    """
    try:
        topic, step, micro_step, epoch, meta = json.loads(head)
        return decode_frame(layout, topic, step, micro_step, epoch, meta, data)
    except (TypeError, ValueError) as error:
        raise StreamlensError(f"a message is damaged: {error}") from error
