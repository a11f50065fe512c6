"""Where streams end. Each sink is imported when it is first named, with what it needs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from streamlens.errors import did_you_mean

if TYPE_CHECKING:
    from streamlens.sinks.callback import Callback
    from streamlens.sinks.console import Console
    from streamlens.sinks.csv import CSV
    from streamlens.sinks.json_lines import JSONLines
    from streamlens.sinks.matplotlib import Matplotlib
    from streamlens.sinks.mlflow import MLflow
    from streamlens.sinks.parquet import Parquet
    from streamlens.sinks.prometheus import Prometheus
    from streamlens.sinks.redis_stream import RedisStream
    from streamlens.sinks.run_store import RunStore
    from streamlens.sinks.sacred import SacredSink
    from streamlens.sinks.table import Table
    from streamlens.sinks.tensorboard import TensorBoard
    from streamlens.sinks.wandb import WandB
    from streamlens.sinks.webhook import Webhook
    from streamlens.views.live import LiveChart

__all__ = [
    "CSV",
    "Callback",
    "Console",
    "JSONLines",
    "LiveChart",
    "MLflow",
    "Matplotlib",
    "Parquet",
    "Prometheus",
    "RedisStream",
    "RunStore",
    "SacredSink",
    "Table",
    "TensorBoard",
    "WandB",
    "Webhook",
]

_HOMES: Final = {
    "CSV": "streamlens.sinks.csv",
    "Callback": "streamlens.sinks.callback",
    "Console": "streamlens.sinks.console",
    "JSONLines": "streamlens.sinks.json_lines",
    # It draws with the views, which know sinks and not the other way round.
    "LiveChart": "streamlens.views.live",
    "Matplotlib": "streamlens.sinks.matplotlib",
    "Parquet": "streamlens.sinks.parquet",
    "MLflow": "streamlens.sinks.mlflow",
    "Prometheus": "streamlens.sinks.prometheus",
    "RedisStream": "streamlens.sinks.redis_stream",
    "RunStore": "streamlens.sinks.run_store",
    "SacredSink": "streamlens.sinks.sacred",
    "Table": "streamlens.sinks.table",
    "TensorBoard": "streamlens.sinks.tensorboard",
    "Webhook": "streamlens.sinks.webhook",
    "WandB": "streamlens.sinks.wandb",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        hint = did_you_mean(name, __all__)
        raise AttributeError(
            f"module {__name__!r} has no sink {name!r}" + (f": {hint}" if hint else f"; it has {__all__}")
        )
    value = globals()[name] = getattr(importlib.import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(name: str) -> Callable[..., Any]:
    """A sink by its name, also one that an installed package brings along.

    Args:
        name: Its name: a shipped one's, or that of an entry point `streamlens.sinks`.

    Returns:
        The sink's class: `sl.sinks.load("RunStore")("run.db")`.

    Raises:
        PluginError: There is none of that name, or it cannot be loaded.
    """
    from streamlens import plugins

    return plugins.load("sink", name)
