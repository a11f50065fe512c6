"""A run's topics as named sources of data, over which people draw charts of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import altair as alt
import numpy as np
import pandas as pd

from streamlens.views.series import flag_of, thin_indices

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["AnyChart", "data", "filled", "records", "source_name", "taken_apart", "topics_of"]

AnyChart: TypeAlias = (
    alt.Chart
    | alt.LayerChart
    | alt.VConcatChart
    | alt.HConcatChart
    | alt.ConcatChart
    | alt.FacetChart
    | alt.RepeatChart
)
"""Whatever Altair makes."""

_PREFIX: Final = "topic:"
"""In front of a topic in the name of its source, so that none is taken for data of Vega-Lite's own."""

_COLUMNS: Final = ("step", "epoch", "layer", "component", "run")


def data(topic: str) -> alt.NamedData:
    """A topic as the data of a chart of your own, which whoever shows it fills: notebook, page or report.

    A chart over it is an ordinary Altair chart, and may be layered and put together with others:

        alt.Chart(sl.views.data("uw_ratio")).mark_line().encode(x="step:Q", y="value:Q", color="layer:N")

    As Altair sees no values here, each field is written with its type: `"step:Q"`, not `"step"`. The columns:

    | column | type | what it holds |
    |---|---|---|
    | `step` | Q | the optimizer update |
    | `epoch` | Q | the epoch of that step |
    | `layer` | N | the layer; `""` is the model itself |
    | `component` | N | which of a layer's numbers it is (a quantile, a loss); `""` where it has one |
    | `value` | Q | the value; null where it is not finite, which breaks a line |
    | `flag` | N | `"NaN"`, `"+inf"` or `"-inf"` where the value is null, else `""` |
    | `run` | N | the run's name where a host shows several, else `""` |

    What a frame's `meta` says comes along as columns of its own: alerts have `rule`, `state`, `severity` and
    `text`, controllers' actions `text` and `cause`. A long run comes thinned, the extremes and what is not
    finite kept.

    Args:
        topic: Its name, as it is recorded: `"loss"`, `"weights.norm2"`, `"uw_ratio.ema"`; with the model's
            in front where it was observed under one: `"G/loss"`.

    Raises:
        ValueError: The name is empty.
    """
    return alt.NamedData(name=source_name(topic))


def source_name(topic: str) -> str:
    """What a topic's source is called in the specification of a chart.

    Args:
        topic: The topic.

    Raises:
        ValueError: The name is empty.
    """
    if not isinstance(topic, str) or not topic:
        raise ValueError(f"a topic is a name, such as 'loss' or 'uw_ratio'; got {topic!r}")
    return f"{_PREFIX}{topic}"


def topics_of(chart: AnyChart | Mapping[str, Any]) -> tuple[str, ...]:
    """The topics that a chart draws through `data`, each once, in the order in which they appear.

    Args:
        chart: A chart, or its specification.
    """
    names = (source["name"] for source in _sources(_specification(chart)) if "name" in source)
    topics = [name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX)]
    return tuple(dict.fromkeys(topics))


def filled(
    chart: AnyChart | Mapping[str, Any],
    rows: Mapping[str, Sequence[Mapping[str, Any]] | pd.DataFrame],
    *,
    max_points: int = 5000,
) -> dict[str, Any]:
    """The specification of a chart, with the rows of the topics that it draws in it.

    Args:
        chart: A chart over sources that `data` made, or its specification.
        rows: The rows of each topic, as a run's `dataframe(topic)` or as `records` of it; a topic that is
            not among them has none.
        max_points: The most rows of each topic that is given as a DataFrame.
    """
    specification = _specification(chart)
    datasets = dict(specification.get("datasets", {}))
    for topic in topics_of(specification):
        given = rows.get(topic, ())
        of_topic = records(given, max_points=max_points) if isinstance(given, pd.DataFrame) else list(given)
        datasets[source_name(topic)] = of_topic
    return {**specification, "datasets": datasets}


def records(rows: pd.DataFrame, *, max_points: int | None = None, run: str = "") -> list[dict[str, Any]]:
    """Rows of a topic as what `data` promises: plain values for JSON, what is not finite flagged.

    Args:
        rows: Columns `step`, `layer` and `value`, as a run's `dataframe(topic)` has them.
        max_points: The most rows, shared by the series; their extremes and what is not finite are kept. By
            default all.
        run: The run's name, for the column `run`.
    """
    if max_points is not None and len(rows) > max_points and "value" in rows.columns:
        rows = _thinned(rows, max_points)
    columns: dict[str, list[Any]] = {
        "step": rows["step"].tolist(),
        "epoch": rows["epoch"].tolist() if "epoch" in rows.columns else [0] * len(rows),
        "layer": rows["layer"].astype(str).tolist() if "layer" in rows.columns else [""] * len(rows),
        "component": _texts(rows, "component"),
    }
    values = pd.to_numeric(rows["value"], errors="coerce").tolist() if "value" in rows.columns else []
    if values:
        columns["value"] = [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]
        columns["flag"] = ["" if np.isfinite(value) else flag_of(value) for value in values]
    columns["run"] = [run] * len(rows)
    for name in rows.columns:
        if name not in {*columns, "micro_step", "topic", "wall_time", "value"}:
            columns[str(name)] = [_plain(value) for value in rows[name].tolist()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def taken_apart(
    chart: AnyChart | Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """A chart as its specification, free of data, and its data by the names that the specification uses.

    The names are those of the places (`data-0`, `data-1`, ...), not of the contents: of two charts that a
    view made of a run as it grew, the specifications are equal where only the rows differ. A host then
    swaps the rows and leaves the chart, with its zoom and selections, as it stands.

    Args:
        chart: A chart, or its specification.
    """
    specification = _specification(chart)
    datasets = specification.pop("datasets", {})
    places: dict[str, str] = {}
    for source in _sources(specification):
        name = source.get("name")
        if isinstance(name, str) and name in datasets and not name.startswith(_PREFIX):
            source["name"] = places.setdefault(name, f"data-{len(places)}")
    _name_by_place(specification)
    return specification, {places.get(name, name): rows for name, rows in datasets.items()}


def _name_by_place(specification: dict[str, Any]) -> None:
    """Call the views that selections stand on after their places: Altair's names depend on the data."""
    names: dict[str, str] = {}
    parts: list[Any] = [specification]
    while parts:
        part = parts.pop()
        name = part.get("name")
        if isinstance(name, str) and name.startswith("view_"):
            part["name"] = names.setdefault(name, f"view_{len(names)}")
        parts += [inner for key in _PARTS for inner in part.get(key, ())]
    for parameter in specification.get("params", ()):
        if "views" in parameter:
            parameter["views"] = [names.get(name, name) for name in parameter["views"]]


_PARTS: Final = ("layer", "vconcat", "hconcat", "concat")


def _specification(chart: AnyChart | Mapping[str, Any]) -> dict[str, Any]:
    """A specification of one's own, of which every part may be changed."""
    if isinstance(chart, Mapping):
        return cast("dict[str, Any]", _copied(chart))
    return chart.to_dict()


def _copied(part: Any) -> Any:
    if isinstance(part, Mapping):
        # Rows are shared, not copied: they are many, and nobody here changes them.
        return {key: value if key == "datasets" else _copied(value) for key, value in part.items()}
    return [_copied(entry) for entry in part] if isinstance(part, list) else part


def _sources(part: Any) -> Iterator[dict[str, Any]]:
    """Every `data` of a specification: of its views and of the look-ups among their transforms."""
    if isinstance(part, list):
        for entry in part:
            yield from _sources(entry)
    elif isinstance(part, dict):
        for key, value in part.items():
            if key == "data" and isinstance(value, dict):
                yield value
            elif key != "datasets":
                yield from _sources(value)


def _thinned(rows: pd.DataFrame, most: int) -> pd.DataFrame:
    keys = [name for name in ("layer", "component") if name in rows.columns]
    groups = rows.groupby(keys, observed=True, sort=False).indices if keys else {"": np.arange(len(rows))}
    share = max(5, most // max(1, len(groups)))
    values = pd.to_numeric(rows["value"], errors="coerce").to_numpy(dtype=np.float64)
    kept = [mine[thin_indices(values[mine], share)] for mine in map(np.sort, groups.values())]
    return rows.iloc[np.sort(np.concatenate(kept))]


def _texts(rows: pd.DataFrame, column: str) -> list[str]:
    if column not in rows.columns:
        return [""] * len(rows)
    return ["" if pd.isna(value) else str(value) for value in rows[column].tolist()]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return str(value)
