"""A run's charts as one picture: PNG and SVG, and what is said where they cannot be made."""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path

import altair as alt
import numpy as np
import pytest
from PIL import Image

from streamlens import views
from streamlens.views.picture import write_picture
from tests.views.fakes import FakeRun, count_pixels, rows, tables

HOSTILE = "</text><script>alert(1)</script>"


def test_an_svg_has_a_title_for_the_run_and_each_chart_and_its_texts_are_texts(tmp_path: Path) -> None:
    run = FakeRun({**tables(24), f"{HOSTILE}/loss": rows({HOSTILE: [2.0, 1.0]})}, {"model": HOSTILE})
    svg = write_picture(run, tmp_path / "new" / "run.svg").read_text()
    assert svg.startswith("<svg")
    for title in ("Loss", "Learning rate", "Accuracy", "Gradient norms", "Curvature"):
        assert f">{title}</text>" in svg
    assert "<script" not in svg
    assert "&lt;script" in svg


@pytest.mark.parametrize(("mode", "page"), [("light", 255), ("dark", 0x0D)])
def test_a_png_has_the_colours_of_its_mode(tmp_path: Path, mode: views.theme.Mode, page: int) -> None:
    out = write_picture(FakeRun({"loss": tables()["loss"]}), tmp_path / "run.png", mode=mode)
    pixels = np.asarray(Image.open(BytesIO(out.read_bytes())).convert("RGB")).astype(int)
    assert pixels[0, 0, 0] == page
    assert count_pixels(pixels, views.vega_config(mode)["range"]["category"][0]) > 100


def test_a_chart_of_ones_own_is_in_it_with_its_rows(tmp_path: Path) -> None:
    own: alt.Chart = alt.Chart(views.data("weights.var")).mark_text()
    chart = own.encode(x="step:Q", y="value:Q", text="layer:N")
    run = FakeRun({**tables(24), "weights.var": rows({"fc_of_mine": [1.0, 2.0]})})
    svg = write_picture(run, tmp_path / "a.svg", views={"Mine": chart, "Absent": chart}).read_text()
    assert ">Mine</text>" in svg
    assert svg.count("fc_of_mine</text>") >= 2


def test_a_run_of_nothing_is_a_picture_that_says_so(tmp_path: Path) -> None:
    assert "nothing was recorded" in write_picture(FakeRun({}), tmp_path / "a.svg").read_text()


def test_another_ending_or_mode_is_an_error_that_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"written as \.png or \.svg, not as 'run\.pdf'"):
        write_picture(FakeRun({}), tmp_path / "run.pdf")
    with pytest.raises(ValueError, match="'sepia': use 'light' or 'dark'"):
        write_picture(FakeRun({}), tmp_path / "run.png", mode="sepia")  # type: ignore[arg-type]


def test_without_the_export_extra_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(ImportError, match=r"vl-convert-python package: pip install 'streamlens\[export\]'"):
        write_picture(FakeRun({}), tmp_path / "run.png")
