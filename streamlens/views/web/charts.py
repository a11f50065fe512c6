"""What a page shows of one run: its settings, its numbers, its charts, and one layer's lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from streamlens.runs import Run
from streamlens.views.actions import actions, with_action_marks
from streamlens.views.alerts import quiet, rules_of, with_marks
from streamlens.views.heading import heading
from streamlens.views.marks import Limits
from streamlens.views.others import other_sections
from streamlens.views.own import OwnView
from streamlens.views.packed import alert_rows, packed
from streamlens.views.reading import read_thinned
from streamlens.views.sections import ModelRows, Section, label_width, read_models, sections
from streamlens.views.shipped import VIEWS
from streamlens.views.summary import last_step, tiles
from streamlens.views.thinned import Thinned, Window

__all__ = ["Question", "of_one_run"]

_BETWEEN: Final = " … "
"""What stands between the first and the last layer of a heatmap's row that several share."""

_MOST_SHARING: Final = 12
_LAYER_POINTS: Final = 6_000
_LONGEST: Final = 300
_MOST_SETTINGS: Final = 100


@dataclass(frozen=True, slots=True)
class Question:
    """What a page asks for.

    Attributes:
        runs: The keys of the runs chosen; the one written last if there are none.
        pattern: The layer filter.
        row: The row of a heatmap whose layer's lines are wanted, or None.
        model: The model that the row is of.
        window: The steps that the charts are zoomed to, or None.
    """

    runs: tuple[str, ...] = ()
    pattern: str = ""
    row: str | None = None
    model: str = ""
    window: Window | None = None


def of_one_run(run: Run, question: Question, views: Sequence[OwnView] = ()) -> dict[str, Any]:
    """What a page shows of one run, as JSON can hold it.

    Args:
        run: The run.
        question: What is asked for.
        views: Charts of the user's own, shown first.
    """
    thinned = Thinned(run, pattern=question.pattern, window=question.window)
    models = read_thinned(thinned)
    last = last_step(models)
    limits = (0.0, float(last + 1)) if last >= 0 else None
    title, settings = heading(run.metadata)
    own = [packed_view for view in views if (packed_view := view.of(thinned, limits)) is not None]
    rules = rules_of(run.metadata)
    found = [row for model in models for row in alert_rows(model.alerts, model.name)]
    return {
        "title": title,
        "settings": [[name[:60], value[:_LONGEST]] for name, value in settings[:_MOST_SETTINGS]],
        "tiles": [
            {
                "label": tile.label,
                "value": tile.value,
                "note": tile.note,
                "verdict": tile.verdict,
                "wide": tile.wide,
            }
            for tile in tiles(models)
        ],
        "alerts": found,
        "quiet": quiet(rules, last + 1) if rules and not found else "",
        "layers": thinned.every_layer,
        "sections": own + [packed(section, limits) for section in sections(models, limits)],
        "detail": _detail(run, question, models, limits),
        "thinned": thinned.thinned,
        "steps": None if limits is None else list(limits),
        "labelWidth": label_width(models),
    }


def _detail(
    run: Run, question: Question, models: Sequence[ModelRows], limits: Limits | None
) -> dict[str, Any] | None:
    """Every metric of one layer as lines, and its distributions."""
    if question.row is None:
        return None
    layers = _layers_of_row(run, question)
    found = [part for layer in layers for part in _of_layer(run, layer, question, models, limits)]
    return {"row": question.row, "model": question.model, "sections": found}


def _layers_of_row(run: Run, question: Question) -> list[str]:
    """The full names of the layers that share a row of a heatmap."""
    row = question.row or ""
    prefix = f"{question.model}." if question.model else ""
    names = Thinned(run).every_layer
    if f"{prefix}{row}" in names or _BETWEEN not in row:
        return [f"{prefix}{row}"]
    ends = [f"{prefix}{end}" for end in row.split(_BETWEEN)]
    if len(ends) != 2 or not set(ends) <= set(names):
        return []
    return names[names.index(ends[0]) : names.index(ends[1]) + 1][:_MOST_SHARING]


def _of_layer(
    run: Run, layer: str, question: Question, models: Sequence[ModelRows], limits: Limits | None
) -> Iterator[dict[str, Any]]:
    thinned = Thinned(run, layer=layer, window=question.window)
    for model in read_models(thinned):
        if question.model and model.name != question.model:
            continue
        short = layer.removeprefix(f"{model.name}.") if model.name else layer
        rows = {topic: table for topic, table in model.rows.items() if len(table)}
        marks = next((other for other in models if other.name == model.name), model)
        for topic, table in rows.items():
            if model.layers[topic] != [short]:
                continue  # of the model as a whole, and drawn already
            made = other_sections(
                {topic: table}, model.layers, limits=limits, max_points=_LAYER_POINTS // len(rows)
            )
            for key, title, reading, chart in made:
                marked = with_marks(chart, marks.alerts, limits)
                marked = with_action_marks(marked, actions(marks.actions), limits)
                named = _TITLES.get(topic, title.removesuffix(f": {short}"))
                section = Section(f"layer-{key}-{layer}", model.name, f"{named}: {short}", reading, marked)
                yield packed(section, limits)


_TITLES: Final = {view.needs[0]: view.title for view in VIEWS.values() if len(view.needs) == 1}
