"""`streamlens report`: a run found as `streamlens runs` finds it, written as what is asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from streamlens.frame import Frame
from streamlens.lab.commands import app
from streamlens.runs import RunWriter


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """runs/first/run.db with the runs "old" and "new"."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("old", "new")):
        store = RunWriter(tmp_path / "runs/first/run.db", name, name=name, metadata={"model": f"Net {name}"})
        store.write([Frame("loss", step, ("",), torch.tensor([2.0 + number])) for step in range(3)])
        store.close()
    return tmp_path / "runs"


def report(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.mark.parametrize("name", ["runs/first/run.db", "runs/first", "new"])
def test_a_store_a_folder_or_a_name_gives_a_page_beside_the_store(runs: Path, name: str) -> None:
    result = report(name)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(Path("runs/first/report.html"))
    assert "<h1>Net new</h1>" in (runs / "first/report.html").read_text()


@pytest.mark.parametrize("arguments", [("runs/first", "--run", "old"), ("old",)])
def test_another_run_of_a_store_is_chosen_by_its_id_or_name(runs: Path, arguments: tuple[str, ...]) -> None:
    assert report(*arguments, "--out", runs / "page.html").exit_code == 0
    assert "<h1>Net old</h1>" in (runs / "page.html").read_text()


def test_a_picture_is_what_the_ending_or_the_format_says(runs: Path) -> None:
    assert report("new", "--out", runs / "a.svg").exit_code == 0
    assert (runs / "a.svg").read_text().startswith("<svg")
    assert report("new", "--format", "png", "--dark").exit_code == 0
    assert (runs / "first/report.png").read_bytes().startswith(b"\x89PNG")


def test_charts_of_ones_own_come_first(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import altair as alt\nimport streamlens as sl\n"
        "my_loss = alt.Chart(sl.views.data('loss')).mark_line().encode(x='step:Q', y='value:Q')\n"
    )
    assert report("new", "--views", "mine.py").exit_code == 0
    page = (runs / "first/report.html").read_text()
    assert page.index("<h3>my loss</h3>") < page.index("<h3>Loss</h3>")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("newer",), "no run 'newer' in runs: did you mean 'new'?"),
        (("new", "--run", "third"), "no run 'third'"),
        (("new", "--format", "svg", "--out", "a.png"), "a.png does not end in .svg"),
        (("new", "--views", "no.py"), "there is no file no.py"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(runs: Path, arguments: tuple[str, ...], said: str) -> None:
    result = report(*arguments)
    assert result.exit_code != 0
    assert said in " ".join(result.output.split())
    assert not list(runs.rglob("*.html"))


def test_a_picture_without_the_export_extra_says_what_to_install(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    result = report("new", "--format", "png")
    assert result.exit_code == 1
    assert "pip install 'streamlens[export]'" in result.output
