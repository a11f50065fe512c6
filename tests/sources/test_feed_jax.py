"""A real JAX training loop, watched through a feed."""

from __future__ import annotations

import importlib.util
import json
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

    key = jax.random.PRNGKey(0)
    x = jax.random.normal(key, (32, 4))
    y = x @ jax.numpy.arange(1.0, 5.0)
    feed = sl.Feed()
    ratios: list[float] = []
    addresses: list[int] = []
    feed.pipe(sl.uw_ratio()).subscribe(lambda f: ratios.append(f["dense"].item()))
    feed.pipe(sl.topic("weights")).subscribe(lambda f: addresses.append(f["dense"].data_ptr()))
    step_of = jax.jit(jax.value_and_grad(lambda w: ((x @ w - y) ** 2).mean()))
    w = jax.numpy.ones(4)
    wanted, lying = [], []
    for step in range(5):
        loss, gradient = step_of(w)
        update = -0.05 * gradient
        w = w + update
        feed.push(step, weights={"dense": w}, weight_updates={"dense": update}, loss=loss)
        wanted.append(float(np.linalg.norm(np.asarray(update)) / np.linalg.norm(np.asarray(w))))
        lying.append(w.unsafe_buffer_pointer())
    return {"ratios": ratios, "wanted": wanted, "addresses": addresses, "lying": lying}


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs jax")
def test_a_jax_training_loop_is_watched_without_copies() -> None:
    # In a process of its own: once JAX has run, every later fork of a process warns of a deadlock.
    done = subprocess.run(
        [sys.executable, "-m", "tests.sources.test_feed_jax"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen["ratios"]) == 5
    assert seen["ratios"] == pytest.approx(seen["wanted"], rel=1e-5)
    assert seen["addresses"] == seen["lying"]


if __name__ == "__main__":
    print(json.dumps(jax_loop()))
