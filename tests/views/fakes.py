"""Runs made by hand, with numbers that are known because they were written down here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
import vl_convert
from numpy.typing import NDArray
from PIL import Image

from streamlens.views import vega_config

LAYERS = ("features.0", "features.3", "classifier.2")


def rows(
    values: Mapping[str, Sequence[float] | NDArray[np.float64]],
    *,
    every: int = 1,
    epoch_length: int = 12,
    component: str = "",
) -> pd.DataFrame:
    """Rows as a run gives them: a layer's name to its values at the steps 0, every, 2 * every, ..."""
    parts = []
    for layer, series in values.items():
        steps = np.arange(len(series)) * every
        part = pd.DataFrame(
            {
                "step": steps,
                "micro_step": 0,
                "epoch": steps // epoch_length,
                "layer": layer,
                "value": np.asarray(series, dtype=np.float64),
                "wall_time": 1.7e9 + 0.01 * steps,
            }
        )
        parts.append(part.assign(component=component) if component else part)
    return pd.concat(parts, ignore_index=True)


class FakeRun:
    """What a page needs of a run, from tables in memory."""

    def __init__(self, tables: Mapping[str, pd.DataFrame], metadata: Mapping[str, Any] | None = None) -> None:
        self._tables = dict(tables)
        self._metadata = dict(metadata or {})

    @property
    def topics(self) -> list[str]:
        return list(self._tables)

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._metadata

    def layers(self, topic: str) -> list[str]:
        return list(dict.fromkeys(self._tables[topic]["layer"].tolist()))

    def holds_numbers(self, topic: str) -> bool:
        return self._tables[topic]["value"].dtype != object

    def dataframe(self, topic: str, *, max_points: int | None = None) -> pd.DataFrame:
        del max_points
        return self._tables[topic]


def tables(steps: int = 120, layers: Sequence[str] = LAYERS, prefix: str = "") -> dict[str, pd.DataFrame]:
    """Every topic that a page shows, of a run that looks like a small network's."""
    rng = np.random.default_rng(0)
    time = np.arange(steps)
    epochs = max(1, steps // 12)
    ends = np.arange(1, epochs + 1) * 12 - 1
    decay = 2.3 * np.exp(-time / 40) + 0.2
    noisy = decay * np.exp(0.15 * rng.normal(size=steps))

    def named(layer: str) -> str:
        return f"{prefix}.{layer}" if prefix else layer

    def per_layer(scale: float, spread: float) -> pd.DataFrame:
        return rows(
            {
                named(layer): scale * (i + 1) * np.exp(-time / 90 + spread * rng.normal(size=steps))
                for i, layer in enumerate(layers)
            }
        )

    def per_epoch(values: Sequence[float]) -> pd.DataFrame:
        table = rows({prefix: list(values)})
        return table.assign(step=ends, epoch=np.arange(epochs), wall_time=1.7e9 + 0.01 * ends)

    largest = (500 * (1 - np.exp(-np.arange(epochs) / 3)) + 20).tolist()
    made = {
        "loss": rows({prefix: noisy.tolist()}),
        "loss.ema": rows({prefix: decay.tolist()}),
        "train_accuracy": per_epoch((0.95 - 0.6 * np.exp(-np.arange(epochs) / 2)).tolist()),
        "test_accuracy": per_epoch((0.96 - 0.5 * np.exp(-np.arange(epochs) / 2)).tolist()),
        "learning_rate": rows({named(layer): (3e-3 * 0.9 ** (time // 12)).tolist() for layer in layers}),
        "hessian_eigenvalues": pd.concat(
            [per_epoch([value / i for value in largest]).assign(component=str(i)) for i in range(1, 4)],
            ignore_index=True,
        ),
        "uw_ratio": per_layer(3e-3, 0.3),
        "weight_gradients.norm2": per_layer(0.4, 0.25),
        "weights.norm2": rows({named(layer): (1 + i + time / 60).tolist() for i, layer in enumerate(layers)}),
        "epoch_finished": per_epoch(list(range(epochs))),
    }
    return {f"{prefix}/{topic}" if prefix else topic: table for topic, table in made.items()}


def draw(spec: dict[str, Any], mode: Any = "light") -> np.ndarray[Any, Any]:
    """The pixels (height, width, RGB) that Vega-Lite's own renderer makes of a specification."""
    config = {**vega_config(mode), "background": "#ffffff" if mode == "light" else "#0d1117"}
    png = vl_convert.vegalite_to_png(spec, vl_version="6.4", config=config)
    return np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int)


def count_pixels(pixels: np.ndarray[Any, Any], color: str, tolerance: int = 12) -> int:
    """How many pixels have a colour such as `#e6007e`."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(pixels[..., :3] - wanted).max(axis=-1) <= tolerance).sum())
