"""Sections of a page as a browser gets them: specifications that stay while rows come, and the rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamlens.views.alerts import Alert
from streamlens.views.marks import Limits
from streamlens.views.sections import Section
from streamlens.views.sources import taken_apart

__all__ = ["FIRST", "LAST", "alert_rows", "encoded", "packed"]

FIRST = "first_step"
"""The parameter of every chart with the first step of its axis."""

LAST = "last_step"
"""The parameter with the last one."""


@dataclass(frozen=True, slots=True)
class _Follower:
    limits: list[float]

    def follow(self, part: Any) -> None:
        """Let every step axis of these limits end at the parameters instead, which a browser can move."""
        if isinstance(part, list):
            for entry in part:
                self.follow(entry)
        elif isinstance(part, dict):
            scale = part.get("scale")
            if part.get("field") == "step" and isinstance(scale, dict) and scale.get("domain") == self.limits:
                del scale["domain"]
                scale |= {"domainMin": {"expr": FIRST}, "domainMax": {"expr": LAST}}
            for key, entry in part.items():
                if key != "datasets":
                    self.follow(entry)


def packed(section: Section, limits: Limits | None, spec: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A section as JSON can hold it.

    Args:
        section: The section.
        limits: The first and last step of its axis.
        spec: Its chart's specification where it is known already.

    Returns:
        `key`, `model`, `title`, `reading`, `name`; `spec` without data, `form`, which is equal for
        equal specifications, and `data`: by data set the columns of its rows.
    """
    # What our own views make needs no check of its schema each time a row comes.
    bare, data = taken_apart(section.chart.to_dict(validate=False) if spec is None else spec)
    if limits is not None:
        bare["params"] = [
            *bare.get("params", []),
            {"name": FIRST, "value": limits[0]},
            {"name": LAST, "value": limits[1]},
        ]
        _Follower(list(limits)).follow(bare)
        # The values are said apart from the specification, which they are not to change.
        for param in bare["params"][-2:]:
            param["value"] = 0
    text = json.dumps(bare, sort_keys=True)
    return {
        "key": section.key,
        "model": section.model,
        "title": section.title,
        "reading": section.reading,
        "name": section.file_name,
        "spec": bare,
        "form": hashlib.sha256(text.encode()).hexdigest()[:16],
        "data": {name: _columns(rows) for name, rows in data.items()},
        "signals": {} if limits is None else {FIRST: limits[0], LAST: limits[1]},
    }


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    # Names once and not in every row: a third of the bytes.
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def alert_rows(alerts: Sequence[Alert], model: str = "", run: str = "") -> list[dict[str, Any]]:
    """Alerts as JSON can hold them.

    Args:
        alerts: The alerts.
        model: The model that they are of.
        run: The run, where there are several.
    """
    return [
        {
            "run": run,
            "model": model,
            "step": alert.step,
            "until": alert.until,
            "rule": alert.rule,
            "severity": alert.severity,
            "layers": [layer for layer in alert.layers if layer],
            "text": alert.text,
        }
        for alert in alerts
    ]


def encoded(content: Mapping[str, Any]) -> bytes:
    """JSON as every browser reads it: what is not finite is null."""
    try:
        text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    except ValueError:
        # Somebody's own chart may hold NaN in data of its own.
        text = json.dumps(_finite(content), separators=(",", ":"), allow_nan=False)
    # A name may hold half a character, as a broken file's does; JSON's escapes can say it.
    return text.encode("ascii")


def _finite(part: Any) -> Any:
    if isinstance(part, float):
        return part if part - part == 0 else None
    if isinstance(part, Mapping):
        return {key: _finite(value) for key, value in part.items()}
    return [_finite(entry) for entry in part] if isinstance(part, list | tuple) else part
