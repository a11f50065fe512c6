"""The examples run and leave their figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import own_metric, quickstart


def test_quickstart_learns_and_leaves_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart.main(str(tmp_path / "figure.html"), epochs=1)
    assert "vega" in (tmp_path / "figure.html").read_text()
    assert "the loss went from 2." in capsys.readouterr().out


def test_own_metric_leaves_a_figure(tmp_path: Path) -> None:
    own_metric.main(str(tmp_path / "figure.html"), steps=30)
    assert "update_sign_agreement" in (tmp_path / "figure.html").read_text()
