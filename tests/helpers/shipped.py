"""Chains with every operator that is shipped, found by the list of what is exported.

An operator that needs no argument is found by itself; one that does is given them in `_ARGUMENTS`.
One that is in neither way part of a chain is an error, so that a new operator cannot be left out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import streamlens as sl
from streamlens.topics import TOPICS

__all__ = ["EVERY_TOPIC", "NAMES", "REDUCIBLE", "STATES", "Chain", "chains_of"]

Chain = Sequence[Any]

STATES = [sl.optimizer_state(key) for key in ("momentum_buffer", "exp_avg", "exp_avg_sq", "step")]
EVERY_TOPIC = [*TOPICS, *STATES]
REDUCIBLE = [name for name in EVERY_TOPIC if name in STATES or TOPICS[name].raw]

NAMES = [name for name in sl.operators.__all__ if not isinstance(getattr(sl, name), type)]
"""Every exported operator."""


def _loss(output: Any, labels: Tensor) -> Tensor:
    logits = output["logits"] if isinstance(output, dict) else output
    return nn.functional.cross_entropy(logits, labels)


def _batch(inputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, inputs, generator=generator), torch.tensor([0, 1, 2, 0])


def _alarm(lens: sl.Lens) -> sl.Stream:
    """An alert from the first step on: no ratio is that large."""
    stream: sl.Stream = lens.pipe(sl.ratio_out_of_band(band=(1e9, 1e10), every=1, start=(1, 1)))
    return stream


def _raw(*operators: Any) -> Chain:
    return (sl.topic(*REDUCIBLE), *operators)


_ARGUMENTS: dict[str, Callable[[sl.Lens, int, int], list[Chain]]] = {
    "adversarial_susceptibility": lambda lens, inputs, every: [
        (sl.adversarial_susceptibility([_batch(inputs)], 0.1, every=every),),
    ],
    "align": lambda lens, inputs, every: [(sl.align("weights", "weight_updates"),)],
    "across_layers": lambda lens, inputs, every: [(sl.norm("weights"), sl.across_layers("mean"))],
    "between": lambda lens, inputs, every: [(sl.topic("weights"), sl.between(1, 3), sl.ema(0.9))],
    "combine": lambda lens, inputs, every: [
        (sl.combine(sl.norm("weights"), "loss", fn=torch.mul, name="product"),),
    ],
    "dead_fraction": lambda lens, inputs, every: [
        _raw(sl.dead_fraction(None)),
        (sl.dead_fraction(window=2),),
    ],
    "diff": lambda lens, inputs, every: [(sl.topic("weights"), sl.layers(nn.Module), sl.every(2), sl.diff())],
    "ema": lambda lens, inputs, every: [
        _raw(sl.norm(), sl.ema(0.5)),
        (sl.uw_ratio(), sl.ema(0.9)),
        (sl.ratio("weight_gradients", "weights"), sl.ema(half_life=3, bias_correction=True)),
    ],
    "every": lambda lens, inputs, every: [
        (sl.norm("weight_gradients"), sl.window(2, reduce="max"), sl.every(2))
    ],
    "flight_recorder": lambda lens, inputs, every: [
        (sl.norm("weights"), sl.flight_recorder(3)),
        (sl.topic("weights"), sl.flight_recorder(2, on=_alarm(lens), after=1)),
    ],
    "generalisation_gap": lambda lens, inputs, every: [
        (sl.generalisation_gap([_batch(inputs)], train=[_batch(inputs)], every=every),),
    ],
    "health": lambda lens, inputs, every: [(sl.health(),)],
    "hessian_eigenvalues": lambda lens, inputs, every: [
        (
            sl.every(every),
            sl.hessian_eigenvalues(1, loss=_loss, batch=_batch(inputs), products=3, tolerance=0.1),
        ),
    ],
    "hessian_trace": lambda lens, inputs, every: [
        (sl.every(every), sl.hessian_trace(loss=_loss, batch=_batch(inputs), probes=2, mode="train")),
    ],
    "histogram": lambda lens, inputs, every: [
        _raw(sl.histogram()),
        _raw(sl.histogram(bins=8, range=(-1, 1))),
    ],
    "layers": lambda lens, inputs, every: [
        (sl.layers(depth=-1), sl.topic("activations"), sl.std(), sl.rename("spread")),
    ],
    "linear_cka": lambda lens, inputs, every: [
        (sl.every(every), sl.linear_cka(_batch(inputs)[0])),
        (sl.every(every), sl.linear_cka(_batch(inputs)[0], between="layers")),
    ],
    "norm": lambda lens, inputs, every: [_raw(sl.norm(order=order)) for order in (1, 2, float("inf"))],
    "per_epoch": lambda lens, inputs, every: [(sl.topic("loss"), sl.ema(0.5), sl.per_epoch())],
    "per_layer": lambda lens, inputs, every: [(sl.topic("weights"), sl.per_layer())],
    "per_step": lambda lens, inputs, every: [(sl.norm("activations"), sl.per_step(), sl.ema(0.5))],
    "percentile_bands": lambda lens, inputs, every: [
        _raw(sl.percentile_bands()),
        _raw(sl.percentile_bands(sample=5)),
    ],
    "ratio": lambda lens, inputs, every: [(sl.ratio("weight_gradients", "weights"),)],
    "reduce": lambda lens, inputs, every: [
        (sl.reduce(lambda value: value.float().abs().sum(), "parameter_gradients", name="size"),),
    ],
    "rename": lambda lens, inputs, every: [(sl.norm("weights"), sl.rename("size of {}".format))],
    "saturation": lambda lens, inputs, every: [(sl.saturation(window=2),)],
    "scan": lambda lens, inputs, every: [
        (sl.norm("weights"), sl.scan(lambda total, frame: total + frame.values)),
    ],
    "sharpness": lambda lens, inputs, every: [
        (sl.every(every), sl.sharpness(loss=_loss, batch=_batch(inputs), products=3, tolerance=0.1)),
    ],
    "smooth": lambda lens, inputs, every: [
        (sl.uw_ratio(of="parameters", relative_to="before"), sl.smooth(1.0)),
    ],
    "svcca": lambda lens, inputs, every: [(sl.every(every), sl.svcca(_batch(inputs)[0]))],
    "test_accuracy": lambda lens, inputs, every: [(sl.test_accuracy([_batch(inputs)], every=every),)],
    "topic": lambda lens, inputs, every: [(sl.topic(topic),) for topic in EVERY_TOPIC],
    "unit_saturation": lambda lens, inputs, every: [_raw(sl.unit_saturation(None, lower=0, upper=1))],
    "when": lambda lens, inputs, every: [(sl.norm("weights"), sl.when(_alarm(lens)))],
    "where": lambda lens, inputs, every: [(sl.topic("weights"), sl.where(lambda frame: frame.step > 0))],
    "window": lambda lens, inputs, every: [
        (sl.norm("weight_gradients"), sl.window(2)),
        (sl.norm("weight_gradients"), sl.window(2, 1, reduce=lambda values: values.amax(0))),
    ],
}


def chains_of(name: str, lens: sl.Lens, inputs: int = 16, every: int = 3) -> list[Chain]:
    """Chains on a lens that have an exported operator in them.

    Args:
        name: The operator's name.
        lens: What they are applied to.
        inputs: The width of the model's input, for operators that evaluate it.
        every: The cadence of the dearest of them.
    """
    given = _ARGUMENTS.get(name)
    if given is not None:
        return given(lens, inputs, every)
    make = getattr(sl, name)
    needed = [
        p.name
        for p in inspect.signature(make).parameters.values()
        if p.default is p.empty and p.kind is not p.VAR_POSITIONAL
    ]
    if needed:
        raise AssertionError(f"{name}() needs {', '.join(needed)}: give them in tests/helpers/shipped.py")
    raw = functools.partial(sl.topic, *REDUCIBLE)
    # A metric with topics of its own says so where others are in front of it.
    ways: list[tuple[Callable[[], Any], ...]] = [(make,), (raw, make), (raw, sl.norm, make)]
    if name not in sl.operators.alerts.__all__:
        ways = [*ways[1:], ways[0]]
    for way in ways:
        chain = [part() for part in way]
        try:
            lens.pipe(*chain)
        except (sl.StreamlensError, TypeError):
            continue
        return [chain]
    raise AssertionError(f"{name}() can be applied to nothing: give a chain in tests/helpers/shipped.py")
