"""Sinks and sources that need a package: without it they say what to install."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import streamlens as sl

EXTRAS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]

NEEDING: list[tuple[Callable[[], object], str, str]] = [
    (lambda: sl.sinks.Console(), "rich", "lab"),
    (lambda: sl.sinks.MLflow(), "mlflow", "mlflow"),
    (lambda: sl.sinks.Matplotlib("run.png"), "matplotlib", "mpl"),
    (lambda: sl.sinks.Parquet("run"), "pyarrow", "parquet"),
    (lambda: sl.sinks.Prometheus(), "prometheus_client", "prometheus"),
    (lambda: sl.sinks.RedisStream(), "redis", "redis"),
    (lambda: sl.sinks.TensorBoard("runs"), "tensorboard", "tensorboard"),
    (lambda: sl.sinks.WandB(), "wandb", "wandb"),
    (lambda: sl.sources.redis(), "redis", "redis"),
]


@pytest.mark.parametrize(
    ("make", "package", "extra"), NEEDING, ids=[f"{n[1]}-{i}" for i, n in enumerate(NEEDING)]
)
def test_without_its_package_the_constructor_names_the_extra(
    make: Callable[[], object], package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install 'streamlens\[{extra}\]'"):
        make()
    assert extra in EXTRAS
