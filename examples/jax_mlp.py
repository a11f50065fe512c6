"""Watch a JAX training loop: the operators and charts are those of any PyTorch run; ends in a figure.

Run it with `python examples/jax_mlp.py` (it needs `pip install jax`); it leaves `jax_mlp.html` in the
current folder. streamlens reads JAX's arrays where they lie, through DLPack; nothing of JAX is imported
by it, and any other framework can push its arrays in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import streamlens as sl
from streamlens.lab import load_dataset
from streamlens.views import gradient_norms, loss, stack, update_to_weight_ratio

__all__ = ["main"]

Params = dict[str, dict[str, jax.Array]]

SIZES = {"hidden": (64, 32), "output": (32, 10)}
RATE, MOMENTUM, BATCH = 0.05, 0.9, 64


def initial(key: jax.Array) -> Params:
    """Layers of a multi-layer perceptron, He-initialised."""
    keys = jax.random.split(key, len(SIZES))
    return {
        name: {"w": jax.random.normal(k, size) * (2 / size[0]) ** 0.5, "b": jnp.zeros(size[1])}
        for k, (name, size) in zip(keys, SIZES.items(), strict=True)
    }


def cross_entropy(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean loss of a batch."""
    hidden = jax.nn.relu(x @ params["hidden"]["w"] + params["hidden"]["b"])
    logits = hidden @ params["output"]["w"] + params["output"]["b"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1).mean()


@jax.jit
def train_step(
    params: Params, velocity: Params, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, Params, Params, Params, Params]:
    """Loss, gradients, updates, and the parameters and velocity after them, of SGD with momentum."""
    value, gradients = jax.value_and_grad(cross_entropy)(params, x, y)
    velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, gradients)
    updates = jax.tree.map(lambda v: -RATE * v, velocity)
    params = jax.tree.map(jnp.add, params, updates)
    return value, gradients, updates, params, velocity


def batches(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], seed: int) -> Iterator[tuple[Any, Any]]:
    """One epoch, shuffled."""
    order = np.random.default_rng(seed).permutation(len(x))
    for start in range(0, len(x) - BATCH + 1, BATCH):
        chosen = order[start : start + BATCH]
        yield x[chosen], y[chosen]


def weights_of(params: Params) -> dict[str, jax.Array]:
    """What a feed takes: an array a layer."""
    return {name: layer["w"] for name, layer in params.items()}


def main(out: str = "jax_mlp.html", epochs: int = 5) -> None:
    """Train, and draw what was seen."""
    pixels, digits = (tensor.numpy() for tensor in load_dataset("digits").train.tensors)
    # Grey images of 8 x 8, enlarged to 3 x 32 x 32.
    x, y = pixels[:, 0, 2::4, 2::4].reshape(len(pixels), -1), digits
    params = initial(jax.random.PRNGKey(0))
    velocity = jax.tree.map(jnp.zeros_like, params)

    with sl.Feed() as feed:
        table = sl.sinks.Table()
        feed.pipe(sl.topic("loss")).subscribe(table)
        feed.pipe(sl.uw_ratio(), sl.ema(0.9)).subscribe(table)
        feed.pipe(sl.norm("weight_gradients")).subscribe(table)
        step = 0
        for epoch in range(epochs):
            for images, labels in batches(x, y, seed=epoch):
                value, gradients, updates, params, velocity = train_step(params, velocity, images, labels)
                feed.push(
                    step,
                    loss=value,
                    weights=weights_of(params),
                    weight_gradients=weights_of(gradients),
                    weight_updates=weights_of(updates),
                )
                step += 1
            feed.epoch_finished()

    rows = dict(iter(table.dataframe.groupby("topic", observed=True)))
    figure = stack(
        loss(rows["loss"]),
        update_to_weight_ratio(rows["uw_ratio.ema"]),
        gradient_norms(rows["weight_gradients.norm2"]),
    )
    figure.save(out, inline=False)
    losses = rows["loss"].value
    print(f"the loss went from {losses.iloc[0]:.2f} to {losses.iloc[-1]:.2f}: see {out}")


if __name__ == "__main__":
    main()
