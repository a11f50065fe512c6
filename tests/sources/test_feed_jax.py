"""A real JAX training loop, watched through a feed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import streamlens as sl

jax: Any = pytest.importorskip("jax")


def test_a_jax_training_loop_is_watched_without_copies() -> None:
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
    assert ratios == pytest.approx(wanted, rel=1e-5)
    assert addresses == lying
