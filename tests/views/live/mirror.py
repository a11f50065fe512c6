"""What a browser makes of the messages: rows of numbers by topic, and charts, as their words say."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from streamlens.views.live.board import Message


class Mirror:
    """Applies messages one after the other."""

    def __init__(self) -> None:
        self.charts: dict[str, dict[str, Any]] = {}
        self.rows: dict[tuple[str, str], list[tuple[float, ...]]] = {}
        self.received: list[int] = []

    def take(self, message: Message | None) -> None:
        if message is None:
            return
        content = message.content
        self.received.append(content["number"])
        if content["kind"] == "whole":
            self.charts, self.rows = {}, {}
        at = 0
        for part in content["rows"]:
            count, columns = part["count"], part["columns"]
            read = [
                struct.unpack_from(f"<{count}d", message.numbers, at + 8 * count * j) for j in range(columns)
            ]
            at += 8 * count * columns
            key = part["topic"], part["form"]
            kept = [row for row in self.rows.get(key, []) if row[1] < part["since"]]
            self.rows[key] = kept + list(zip(*read, strict=True))
        assert at == len(message.numbers)
        for chart in content["charts"]:
            self.charts[chart["key"]] = chart

    def line(self, topic: str, series: int = 0) -> Sequence[tuple[float, float]]:
        """Steps and numbers of one series."""
        return [(row[1], row[3]) for row in self.rows[topic, "line"] if row[0] == series]

    def forms(self, chart: str) -> set[tuple[str, str]]:
        """Topic and form of each binding of a chart."""
        return {(binding["topic"], binding["form"]) for binding in self.charts[chart]["bindings"]}
