"""Alerts in a page about a run: marks over the steps of every chart, and a list."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import altair as alt
import pandas as pd

from streamlens.views.marks import WIDTH, Limits, step_axis
from streamlens.views.theme import ALERT

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PREFIX", "RULES", "Alert", "alert_list", "alerts", "no_alerts", "quiet", "rules_of", "with_marks"]

RULES: Final = "alert_rules"
"""The entry of a run's metadata that names the alert rules which were on, with commas in between."""

PREFIX: Final = "alerts."
"""How the topics of alerts begin."""

_MOST_MARKS: Final = 100
_MOST_LISTED: Final = 60
_NEEDED: Final = frozenset({"rule", "state", "text", "layer", "step"})


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert from its start to its end.

    Attributes:
        step: Where it started.
        rule: The rule.
        severity: How bad it is.
        layers: The layers concerned; `("",)` is the model.
        text: What it means and what to try.
        until: Where it ended for all of them; None if it has not.
    """

    step: int
    rule: str
    severity: str
    layers: tuple[str, ...]
    text: str
    until: int | None = None


def rules_of(metadata: Mapping[str, Any]) -> str:
    """The alert rules that were on, as a run's metadata name them; `""` for none."""
    return str(metadata.get(RULES) or "")


def alerts(tables: Mapping[str, pd.DataFrame]) -> list[Alert]:
    """The alerts of a run in the order of their starts.

    Args:
        tables: The rows of each topic `alerts.<rule>`, with the columns of its frames' `meta`; tables of
            topics that only begin like that are left out.
    """
    found = [alert for table in tables.values() if set(table) >= _NEEDED for alert in _of_topic(table)]
    return sorted(found, key=lambda alert: alert.step)


def _of_topic(table: pd.DataFrame) -> Iterator[Alert]:
    table = table.assign(of=table["of"].fillna("") if "of" in table else "")
    severities = table["severity"] if "severity" in table else pd.Series("warning", index=table.index)
    table = table.assign(severity=severities.fillna("warning"))
    ends = table[table["state"] == "end"]
    starts = table[table["state"] == "start"]
    for _, rows in starts.groupby(["step", "of", "text"], sort=False):
        first = rows.iloc[0]
        step, of = int(first["step"]), str(first["of"])
        layers = tuple(rows["layer"].tolist())
        last: list[int] = []
        for layer in layers:
            later = ends[(ends["layer"] == layer) & (ends["of"] == of) & (ends["step"] > step)]["step"]
            last += [int(later.min())] if len(later) else []
        until = max(last) if len(last) == len(layers) else None
        yield Alert(step, str(first["rule"]), str(first["severity"]), layers, str(first["text"]), until)


def with_marks(chart: alt.LayerChart, found: Sequence[Alert], limits: Limits | None) -> alt.LayerChart:
    """A chart over steps with a mark where each alert started: a line, and a triangle with its sentence.

    Args:
        chart: The chart.
        found: The alerts; of more than 100, the first are drawn.
        limits: The first and last step of the axis.
    """
    if not found:
        return chart
    rows = pd.DataFrame(
        [
            {
                "step": alert.step,
                "alert": alert.rule.replace("_", " "),
                "severity": alert.severity,
                "layers": _named(alert.layers),
                "text": alert.text,
            }
            for alert in found[:_MOST_MARKS]
        ]
    )
    tooltip: list[Any] = [
        alt.Tooltip("alert:N"),
        alt.Tooltip("severity:N"),
        alt.Tooltip("step:Q", format=","),
        alt.Tooltip("layers:N"),
        alt.Tooltip("text:N"),
    ]
    base = alt.Chart(rows, width=WIDTH).encode(x=step_axis(limits), tooltip=tooltip)
    line: alt.Chart = base.mark_rule(color=ALERT, strokeDash=[3, 3], opacity=0.6)
    head: alt.Chart = base.mark_point(
        shape="triangle-down", filled=True, size=80, color=ALERT, opacity=1, yOffset=5
    )
    head = head.encode(y=alt.YValue(0))  # type: ignore[no-untyped-call]
    return chart + line + head


def alert_list(found: Sequence[Alert], model: str = "") -> str:
    """The alerts as a section of a page.

    Args:
        found: The alerts.
        model: The model that they are of, or `""`.
    """
    if not found:
        return ""
    of = f" of {model}" if model else ""
    items = "\n".join(_item(alert) for alert in found[:_MOST_LISTED])
    more = len(found) - _MOST_LISTED
    rest = f"\n<p>And {more:,} more.</p>" if more > 0 else ""
    return (
        f'<section class="card alerts">\n<h3>Alerts{html.escape(of)}</h3>\n'
        "<p>Where rules found something wrong; charts mark these steps with a triangle.</p>\n"
        f"<ol>\n{items}\n</ol>{rest}\n</section>"
    )


def no_alerts(rules: str, steps: int) -> str:
    """The section of a page about a run in which rules found nothing.

    Args:
        rules: The rules, as the run's metadata name them.
        steps: The steps of the run.
    """
    return (
        '<section class="card alerts">\n<h3>Alerts</h3>\n'
        f"<p>{html.escape(quiet(rules, steps))}</p>\n</section>"
    )


def quiet(rules: str, steps: int) -> str:
    """What to say of a run in which rules found nothing.

    Args:
        rules: The rules, as the run's metadata name them.
        steps: The steps of the run.
    """
    return (
        f"No alert in {steps:,} step{'s' * (steps != 1)}. Rules asked for: {rules.replace('_', ' ')}; those "
        "for which the run has nothing to look at were left out."
    )


def _item(alert: Alert) -> str:
    span = f"step {alert.step:,}" + (f" to {alert.until:,}" if alert.until is not None else ", not over")
    rule = html.escape(alert.rule.replace("_", " "))
    severity = html.escape(alert.severity)
    return (
        f'<li class="{severity if severity in _SEVERITIES else "warning"}"><b>{rule}</b> '
        f'<span class="when">{severity} · {span}</span><br>{html.escape(alert.text)}</li>'
    )


_SEVERITIES: Final = frozenset({"info", "warning", "critical"})


def _named(layers: tuple[str, ...]) -> str:
    names = [layer or "the model" for layer in layers[:4]]
    return ", ".join(names) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
