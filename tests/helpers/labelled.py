"""A chain of every operator that is shipped, by a label, and of every rule made to speak up soon."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

import streamlens as sl
from tests._runs import small_model
from tests.helpers.interrupting import Chains
from tests.helpers.shipped import NAMES, chains_of

__all__ = ["CHAINS", "RULES", "SOON", "Make"]

Make = Callable[[sl.Lens], Sequence[Any]]

SOON: dict[str, Any] = {"every": 1, "start": (1, 1), "end": 2}
"""Of every rule: looks at each step, and has something to say at once."""

RULES: dict[str, Make] = {
    "dead_units, soon": lambda lens: (sl.dead_units(share=0.1, **SOON),),
    "diverging, soon": lambda lens: (sl.diverging(rise=0.01, **SOON),),
    "exploding_gradients, soon": lambda lens: (sl.exploding_gradients(factor=1.1, above=0.2, **SOON),),
    "layer_oversized, soon": lambda lens: (
        sl.layer_oversized(below=0.9, rank=1.01, window=3, start=(2, 3), end=1),
    ),
    "learning_rate_too_high, soon": lambda lens: (
        sl.learning_rate_too_high(above=1e-3, at_once=2e-3, fall=0.9, **SOON),
    ),
    "learning_rate_too_low, soon": lambda lens: (sl.learning_rate_too_low(below=0.05, fall=0.9, **SOON),),
    "loss_spike, soon": lambda lens: (sl.loss_spike(window=20, share=0.01, factor=1e-3, **SOON),),
    "loss_not_decreasing, soon": lambda lens: (sl.loss_not_decreasing(patience=2, **SOON),),
    "nonfinite_values, soon": lambda lens: (sl.nonfinite_values(**SOON),),
    "ratio_out_of_band, soon": lambda lens: (sl.ratio_out_of_band(band=(1e-3, 2e-3), **SOON),),
    "vanishing_gradients, soon": lambda lens: (sl.vanishing_gradients(**SOON),),
    "health, soon": lambda lens: (
        sl.health(sl.ratio_out_of_band(band=(1e-3, 2e-3), **SOON), sl.nonfinite_values(**SOON)),
    ),
    "when, on and off": lambda lens: (
        sl.when(lens.pipe(sl.nonfinite_values(every=1, end=2))),
        sl.norm("weights"),
        sl.ema(0.5),
    ),
    "when on a stream, on and off": lambda lens: (
        sl.norm("weights"),
        sl.ema(0.5),
        sl.when(lens.pipe(sl.nonfinite_values(every=1, end=2))),
    ),
    "flight_recorder, let go": lambda lens: (
        sl.norm("weights"),
        sl.flight_recorder(4, on=lens.pipe(sl.nonfinite_values(every=1, end=1)), after=3),
    ),
}
"""What ordinarily remembers for hundreds of steps and says nothing, made to speak up within thirty."""


def _shipped() -> Chains:
    """Every chain of the helper, by the operator's name and an ordinal."""

    def made(name: str, ordinal: int, lens: sl.Lens) -> Sequence[Any]:
        return chains_of(name, lens, inputs=4, every=2)[ordinal]

    model, criterion = small_model(), nn.CrossEntropyLoss()
    with sl.observe(model, loss=criterion) as lens:
        counts = {name: len(chains_of(name, lens, inputs=4)) for name in NAMES}
    return {
        f"{name} {ordinal + 1}" if count > 1 else name: functools.partial(made, name, ordinal)
        for name, count in counts.items()
        for ordinal in range(count)
    }


CHAINS: Chains = {**_shipped(), **RULES}
