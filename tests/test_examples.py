"""The examples run and leave their figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import control, own_metric, quickstart


def test_quickstart_learns_and_leaves_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart.main(str(tmp_path / "figure.html"), epochs=1)
    assert "vega" in (tmp_path / "figure.html").read_text()
    assert "the loss went from 2." in capsys.readouterr().out


def test_own_metric_leaves_a_figure(tmp_path: Path) -> None:
    own_metric.main(str(tmp_path / "figure.html"), steps=30)
    assert "update_sign_agreement" in (tmp_path / "figure.html").read_text()


def test_control_brings_rates_a_hundred_apart_to_the_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = control.main(str(tmp_path / "figure.html"), epochs=3)
    assert "vega" in (tmp_path / "figure.html").read_text()
    ends = runs.groupby(["run", "base"]).ratio.apply(lambda ratio: ratio.tail(10).mean())
    assert ends["RatioLR"].between(control.TARGET / 1.5, control.TARGET * 1.5).all()
    assert ends["constant"].max() / ends["constant"].min() > 10
    assert capsys.readouterr().out.count("test accuracy") == 6
