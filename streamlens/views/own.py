"""Charts of the user's own on the live page: from a Python file, or handed over."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TypeGuard, get_args

import altair as alt

from streamlens.views.marks import Limits
from streamlens.views.packed import packed
from streamlens.views.sections import Section
from streamlens.views.sources import AnyChart, filled, records, topics_of
from streamlens.views.thinned import Thinned

__all__ = ["OwnView", "charts_of", "own_views"]

_POINTS: Final = 4_000


@dataclass(frozen=True, slots=True)
class OwnView:
    """A chart over `sl.views.data(topic)`.

    Attributes:
        name: Its heading, and what it is known by.
        spec: Its specification, without rows.
    """

    name: str
    spec: Mapping[str, Any]

    def of(self, run: Thinned, limits: Limits | None, label: str = "") -> dict[str, Any] | None:
        """The chart with a run's rows, as JSON can hold it; None where the run has none of its topics.

        Args:
            run: The run.
            limits: The first and last step of the page.
            label: The run's name where several are shown, for the column `run`.
        """
        return self.of_several({label: run}, limits)

    def of_several(self, runs: Mapping[str, Thinned], limits: Limits | None) -> dict[str, Any] | None:
        """The chart with the rows of several runs, told apart by the column `run`.

        Args:
            runs: The runs by their names.
            limits: The first and last step of the page.
        """
        rows: dict[str, list[dict[str, Any]]] = {}
        for label, run in runs.items():
            for topic in topics_of(self.spec):
                if topic in run.topics:
                    table = run.dataframe(topic)
                    most = _POINTS // len(runs)
                    rows.setdefault(topic, []).extend(records(table, max_points=most, run=label))
        if not any(rows.values()):
            return None
        section = Section(f"own-{self.name}", "", self.name, "", alt.LayerChart())
        return packed(section, limits, filled(self.spec, rows))


def own_views(charts: Mapping[str, AnyChart]) -> tuple[OwnView, ...]:
    """Charts as the page shows them.

    Args:
        charts: Altair charts over `sl.views.data(topic)`, by their headings.

    Raises:
        ValueError: One is no Altair chart, draws no topic, or is not valid.
    """
    made = []
    for name, chart in charts.items():
        if not _is_chart(chart):
            raise ValueError(f"the view {name!r} is no Altair chart but {type(chart).__name__}")
        if not topics_of(chart):
            raise ValueError(
                f"the view {name!r} draws no topic: make it with alt.Chart(streamlens.views.data(topic))"
            )
        made.append(OwnView(name, chart.to_dict()))
    return tuple(made)


def charts_of(place: str) -> dict[str, AnyChart]:
    """The Altair charts in a Python file, which is run.

    Args:
        place: The file, and after a colon the names of charts in it with commas in between:
            `my_views.py:ratios`. Without names, all charts that it gives a name without a leading underscore.

    Raises:
        ValueError: There is no such file or name, the file fails, or it makes no chart over a topic.
    """
    path, _, names = (
        place.rpartition(":") if place.count(":") and not Path(place).exists() else (place, "", "")
    )
    module = _run(Path(path))
    if names:
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        missing = [name for name in wanted if not hasattr(module, name)]
        if missing:
            raise ValueError(f"{path} has no chart called {missing[0]!r}")
        return {name.replace("_", " "): getattr(module, name) for name in wanted}
    found = {
        name.replace("_", " "): value
        for name, value in vars(module).items()
        if not name.startswith("_") and _is_chart(value) and topics_of(value)
    }
    if not found:
        raise ValueError(f"{path} makes no chart over streamlens.views.data(topic) at its top level")
    return found


def _is_chart(value: object) -> TypeGuard[AnyChart]:
    return isinstance(value, get_args(AnyChart))


def _run(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"_streamlens_views_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} failed: {type(error).__name__}: {error}") from error
    return module
