"""`Findings`: what an experiment comes to, as sentences, tables and figures, and their files."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from streamlens.lab.experiments.figures import Figure
from streamlens.lab.experiments.results import file_name
from streamlens.views.theme import themed

__all__ = ["Findings", "check_export", "markdown", "sentences"]


@dataclass(frozen=True)
class Findings:
    """What follows from the runs of an experiment.

    Attributes:
        answers: Sentences, with the numbers in them.
        tables: Tables by name.
        figures: Charts by name.
    """

    answers: Sequence[str] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)

    def write(self, folder: Path, title: str) -> None:
        """Write each figure as SVG and as HTML that needs no network, each table as CSV, and `findings.md`.

        Args:
            folder: Where.
            title: The heading of `findings.md`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        text = [f"# {title}", "", *(f"- {answer}" for answer in self.answers), ""]
        for name, figure in self.figures.items():
            chart = themed(figure)
            file = file_name(name)
            chart.save(folder / f"{file}.svg")
            chart.save(folder / f"{file}.html", inline=True)
            text += [f"![{name}]({file}.svg)", ""]
        for name, table in self.tables.items():
            table.to_csv(folder / f"table-{file_name(name)}.csv", index=False)
            text += [f"## {name}", "", markdown(table), ""]
        (folder / "findings.md").write_text("\n".join(text))


def sentences(template: str, table: pd.DataFrame) -> list[str]:
    """A sentence for each row of a table: `"{model}: {mean:.2f} ({low:.2f} to {high:.2f})"`.

    Args:
        template: With columns in braces, as for `str.format`.
        table: The table.
    """
    columns = list(map(str, table.columns))
    return [template.format(**dict(zip(columns, row, strict=True))) for row in table.itertuples(index=False)]


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown; `mean`, `low` and `high` become one column."""
    rows = table.copy()
    if {"mean", "low", "high"} <= set(rows.columns):
        cells = [
            f"{_number(mean)} ({_number(low)} to {_number(high)})"
            for mean, low, high in zip(rows["mean"], rows["low"], rows["high"], strict=True)
        ]
        rows.insert(list(rows.columns).index("mean"), "mean (95% interval)", cells)
        rows = rows.drop(columns=["mean", "low", "high"])
    lines = [list(map(str, rows.columns)), ["---"] * len(rows.columns)]
    lines += [[_number(cell) for cell in row] for row in rows.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(cell: object) -> str:
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell).replace("|", "\\|")


def check_export() -> None:
    """Say what figures need, before hours are spent on runs.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    if importlib.util.find_spec("vl_convert") is None:
        raise ModuleNotFoundError(
            "figures as SVG need vl-convert: pip install 'streamlens[export]'", name="vl_convert"
        )
