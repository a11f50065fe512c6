"""`PassPlan`: what a forward/backward pass has to take, compiled once for the demands that are due."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from streamlens.capture.table import Needs
from streamlens.reductions import Reduction

if TYPE_CHECKING:
    from streamlens.capture.model import ModelIndex
    from streamlens.capture.view import Demand

__all__ = ["PASS_TOPICS", "PassOutput", "PassPlan", "compile_pass", "layers_by_topic"]

PASS_TOPICS: Final = ("activations", "layer_gradients", "raw_gradients")
"""The topics that are gathered layer by layer while a pass runs."""


@dataclass(eq=False)
class PassOutput:
    """One (topic, reduction) over one set of layers, and who asked for it."""

    topic: str
    reduction: Reduction | None
    wanted: frozenset[str] | None
    demands: list[Demand] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Taken:
    """What is taken of one module's output.

    Attributes:
        need: What is to be known of it.
        raw: Whether it is wanted itself.
        gradient: Whether anything of its gradient is.
    """

    need: Needs | None
    raw: bool
    gradient: bool


@dataclass(eq=False)
class PassPlan:
    """What a pass has to take: compiled once for a set of due demands."""

    outputs: dict[str, list[PassOutput]]
    needs: dict[str, dict[str, Needs]]
    raw: dict[str, frozenset[str]]
    merging: bool
    """Whether what is taken may be a part of what several processes have."""
    taken: dict[str, Taken] = field(init=False)
    """What is taken of the modules of whose output anything is."""

    def __post_init__(self) -> None:
        needs, gradients = self.needs["activations"], self.needs["layer_gradients"]
        raw, raw_gradients = self.raw["activations"], self.raw["layer_gradients"]
        self.taken = {
            name: Taken(needs.get(name), name in raw, name in gradients or name in raw_gradients)
            for name in {*needs, *gradients, *raw, *raw_gradients}
        }


def compile_pass(due: Sequence[Demand], index: ModelIndex, *, merging: bool = False) -> PassPlan:
    """What a pass takes for some demands.

    Args:
        due: The demands that are due at its step.
        index: The model's names.
        merging: Whether what is taken may be a part of what several processes have.
    """
    outputs: dict[str, list[PassOutput]] = {}
    needs: dict[str, dict[str, Needs]] = {side: {} for side in PASS_TOPICS}
    raw: dict[str, frozenset[str]] = {}
    names = layers_by_topic(index)
    for topic in PASS_TOPICS:
        found: dict[tuple[Reduction | None, frozenset[str] | None], PassOutput] = {}
        wants: dict[str, list[Reduction]] = {}
        for demand in due:
            if topic in demand.view.topics:
                key = (demand.view.reduction, demand.layers.get(topic))
                output = found.setdefault(key, PassOutput(topic, *key))
                output.demands.append(demand)
        outputs[topic] = list(found.values())
        untouched: set[str] = set()
        for output in outputs[topic]:
            chosen = output.wanted if output.wanted is not None else names[topic]
            if output.reduction is None:
                untouched |= chosen
            else:
                for name in chosen:
                    wants.setdefault(name, []).append(output.reduction)
        needs[topic] = {name: Needs.of(reductions, merging=merging) for name, reductions in wants.items()}
        raw[topic] = frozenset(untouched)
    return PassPlan(outputs, needs, raw, merging)


def layers_by_topic(index: ModelIndex) -> dict[str, frozenset[str]]:
    """The layers that each topic of a pass has unless told otherwise."""
    modules = frozenset(index.default_modules())
    return {
        "activations": modules,
        "layer_gradients": modules,
        "raw_gradients": frozenset(entry.name for entry in index.entries),
    }
