"""A real JAX training loop, watched through a feed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import streamlens as sl

ROOT = Path(__file__).parents[2]


def jax_loop() -> dict[str, Any]:
    """Train with JAX; what a feed gave of it, and what JAX's own arrays say."""
    import jax
    import numpy as np

    x = jax.random.normal(jax.random.PRNGKey(0), (32, 4))
    y = x @ jax.numpy.arange(1.0, 5.0)
    feed = sl.Feed(on_error="raise")
    ratios: list[float] = []
    seen: dict[str, list[int]] = {"weights": [], "weight_updates": []}
    feed.pipe(sl.uw_ratio()).subscribe(lambda f: ratios.append(f["dense"].item()))
    for topic, places in seen.items():
        feed.pipe(sl.topic(topic)).subscribe(lambda f, places=places: places.append(f["dense"].data_ptr()))
    halves: list[tuple[str, float]] = []
    feed.pipe(sl.layers("half"), sl.topic("weights")).subscribe(
        lambda f: halves.append((str(f["half"].dtype), f["half"].sum().item()))
    )

    def loss(w: Any) -> Any:
        return ((x @ w - y) ** 2).mean()

    def step_of(w: Any) -> tuple[Any, Any, Any]:
        value, gradient = jax.value_and_grad(loss)(w)
        return value, -0.05 * gradient, w - 0.05 * gradient

    # What is donated is written over by the next step: a feed that held on to it would show.
    trained, w = jax.jit(step_of, donate_argnums=0), jax.numpy.ones(4)
    wanted: list[float] = []
    lying: dict[str, list[int]] = {"weights": [], "weight_updates": []}
    for step in range(5):
        value, update, w = trained(w)
        half = jax.numpy.full(3, step, jax.numpy.bfloat16)
        feed.push(step, weights={"dense": w, "half": half}, weight_updates={"dense": update}, loss=value)
        wanted.append(float(np.linalg.norm(np.asarray(update)) / np.linalg.norm(np.array(w))))
        lying["weights"].append(w.unsafe_buffer_pointer())
        lying["weight_updates"].append(update.unsafe_buffer_pointer())
    feed.close()
    return {"ratios": ratios, "wanted": wanted, "seen": seen, "lying": lying, "halves": halves}


needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs jax")


def alone(*arguments: str, cwd: Path) -> str:
    """What Python prints in a process of its own: once JAX has run, every later fork warns of a deadlock."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_jax
def test_a_jax_training_loop_is_watched_without_copies() -> None:
    found = json.loads(alone("-m", "tests.sources.test_feed_jax", cwd=ROOT))
    assert len(found["ratios"]) == 5
    assert found["ratios"] == pytest.approx(found["wanted"], rel=1e-5)
    assert found["seen"] == found["lying"]
    assert found["halves"] == [["torch.bfloat16", 3.0 * step] for step in range(5)]


@needs_jax
def test_the_jax_example_learns_and_leaves_a_figure(tmp_path: Path) -> None:
    printed = alone(str(ROOT / "examples" / "jax_mlp.py"), cwd=tmp_path)
    before, after = map(float, re.findall(r"\d+\.\d+", printed))
    assert before > 2 > 0.5 > after
    figure = (tmp_path / "jax_mlp.html").read_text()
    assert "vega" in figure
    assert "hidden" in figure


if __name__ == "__main__":
    print(json.dumps(jax_loop()))
