"""`Input`: what rules look at, and the ways in which a stream may have it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from reactivex import Observable
from torch import nn

from streamlens.errors import LayerNotFoundError, StreamlensError, UnknownTopicError, UnmergeableError
from streamlens.frame import Frame
from streamlens.layers import LayerSelector
from streamlens.lens import Lens
from streamlens.nodes import frame_operator
from streamlens.operators._base import relabelled
from streamlens.operators._finite import FiniteProbe
from streamlens.operators.align import combine
from streamlens.operators.dead_fraction import dead_fraction
from streamlens.operators.per_step import per_step
from streamlens.operators.ratio import divided, uw_ratio
from streamlens.operators.selection import LayerPick, between, layers, topic
from streamlens.operators.statistics import norm, reduction_operator, std
from streamlens.operators.unit_saturation import unit_saturation
from streamlens.stream import Operator, Stream

__all__ = [
    "ACTIVATION_NORMS",
    "ACTIVATION_PROBES",
    "DEAD_SHARES",
    "EACH_LOSS",
    "FIRST_ACTIVATION_STDS",
    "FIRST_BACKWARD_NORMS",
    "GRADIENT_NORMS",
    "LEARNING_RATE",
    "LOSS",
    "SATURATED_SHARES",
    "UPDATE_NORMS",
    "UPDATE_RATIO",
    "WEIGHT_NORMS",
    "WITH_GRADIENT",
    "Input",
    "Key",
    "found_on",
    "plain_ways",
]

Build = Callable[[], Operator]
Key = tuple[str, bool]


@dataclass(frozen=True)
class Input:
    """A topic that rules look at.

    Attributes:
        name: The topic of its frames, under which a stored or plain stream has it.
        build: Makes the operator that computes it from what a run emits; None for a user's own topic.
        parts: Two stored topics whose quotient it is, if it is one.
        micro_steps: Whether it comes once a micro-step and is to be averaged over the step.
        gathered: Whether rules average it themselves where marks tell that a step is over, so that one
            stream is enough for those that look at each micro-step and those that look at the mean.
        needed: Whether a rule cannot do without.
        remedy: What to do where a run lacks it.
    """

    name: str
    build: Build | None = None
    parts: tuple[str, str] | None = None
    micro_steps: bool = False
    gathered: bool = False
    needed: bool = True
    remedy: str = ""

    @property
    def key(self) -> Key:
        """What inputs that are one have in common."""
        return self.name, self.micro_steps

    @property
    def asked(self) -> Key:
        """What inputs that are asked of a lens once have in common."""
        return self.name, self.micro_steps and not self.gathered


def chained(*operators: Operator) -> Operator:
    """Operators one after the other, as one."""

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        for operator in operators:
            source = operator(source)
        return source

    return apply


def named(name: str) -> Operator:
    """Only the frames of a topic, whatever stream they are on."""

    def apply(source: Observable[Frame]) -> Stream:
        return frame_operator(
            source, lambda frame: frame if frame.topic == name else None, f"topic({name!r})"
        )

    return apply


GRADIENT_NORMS: Final = Input("weight_gradients.norm2", lambda: norm("weight_gradients"))
WEIGHT_NORMS: Final = Input("weights.norm2", lambda: norm("weights"))
UPDATE_NORMS: Final = Input("weight_updates.norm2", lambda: norm("weight_updates"))
UPDATE_RATIO: Final = Input("uw_ratio", uw_ratio, ("weight_updates.norm2", "weights.norm2"))
LEARNING_RATE: Final = Input("learning_rate", lambda: topic("learning_rate"), needed=False)
WITH_GRADIENT: Final = Input("weights.with_gradient", lambda: _with_gradient, needed=False)
LOSS: Final = Input(
    "loss",
    lambda: topic("loss"),
    micro_steps=True,
    gathered=True,
    remedy="pass observe(model, loss=criterion), or write criterion = lens.watch_loss(function)",
)
EACH_LOSS: Final = Input("loss", LOSS.build, remedy=LOSS.remedy)
"""The loss of each micro-step, as soon as it is there."""
ACTIVATION_NORMS: Final = Input("activations.norm2", lambda: norm("activations"))
ACTIVATION_PROBES: Final = Input(ACTIVATION_NORMS.name, lambda: _probed)
"""What stands for them where it only matters whether they are finite."""
FIRST_ACTIVATION_STDS: Final = Input(
    "activations.std", lambda: chained(between(0, 1), std("activations")), micro_steps=True
)
FIRST_BACKWARD_NORMS: Final = Input(
    "layer_gradients.norm2", lambda: chained(between(0, 1), norm("layer_gradients")), micro_steps=True
)


_HARMLESS: Final = (
    nn.Identity,
    nn.Flatten,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.Hardtanh,
    nn.Sigmoid,
    nn.Tanh,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.AdaptiveAvgPool2d,
)
"""Modules whose output is finite where their input is: they are no first layer."""


def _probed(source: Observable[Frame]) -> Observable[Frame]:
    """Whether outputs are finite, of the modules that may be the first whose is not."""
    if isinstance(source, Lens):
        # A replay knows no classes: it looks at all that were stored.
        with contextlib.suppress(LayerNotFoundError):
            source = source.narrow(layers=LayerSelector(without=_HARMLESS))
    return reduction_operator(FiniteProbe(), "activations", "finite_probe")(source)


def _with_gradient(source: Observable[Frame]) -> Stream:
    """One for each layer whose weights have a gradient, whether or not an optimizer updates them."""
    stream = norm("weights")(source)
    if not isinstance(stream, Lens):
        raise UnknownTopicError("only a lens knows its model's gradients")
    stream.module_classes()  # raises where there is no model, as in a replay

    def pick(frame: Frame) -> Frame | None:
        wanted = stream.source.resolve(stream.view)["weights"]
        weights = (
            (name, module._parameters.get("weight")) for name, module in stream.module_classes().items()
        )
        there = tuple(
            name
            for name, weight in weights
            if weight is not None and weight.grad is not None and (wanted is None or name in wanted)
        )
        return (
            relabelled(frame, "weights.with_gradient", torch.ones(len(there)), layers=there)
            if there
            else None
        )

    return frame_operator(stream, pick, "with_gradient")


def _saturation() -> Operator:
    """The saturation of bounded activations, but for the model's last layer, which is meant to be near."""

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        found = unit_saturation()(source)
        if not isinstance(source, Lens):
            return found
        last = next(reversed(list(source.module_classes())), None)
        return where_layers(found, lambda name: name.partition("@")[0] != last)

    return apply


def where_layers(source: Observable[Frame], wanted: Callable[[str], bool]) -> Stream:
    """Only some layers of each frame."""
    return frame_operator(source, LayerPick(wanted), "layers()")


DEAD_SHARES: Final = Input(
    "activations.dead_fraction",
    lambda: chained(
        layers(nn.ReLU, nn.ReLU6, nn.Threshold),
        dead_fraction(),
    ),
    micro_steps=True,
    remedy="the model has no nn.ReLU modules, whose outputs it looks at",
)
SATURATED_SHARES: Final = Input(
    "activations.unit_saturation",
    _saturation,
    micro_steps=True,
    remedy="the model has no nn.Sigmoid or nn.Tanh modules, whose outputs it looks at",
)


def found_on(lens: Lens, entry: Input, *, compute: bool = True) -> Stream | None:
    """An input's stream on a Lens; None where the Lens cannot have it.

    Args:
        lens: The Lens, narrowed to the rule's cadence.
        entry: The input.
        compute: Whether it may be computed, and not only selected by its name.
    """
    ways: list[Operator] = [topic(entry.name)]
    if compute and entry.build is not None:
        ways.insert(0, entry.build())
    if entry.parts is not None:
        ways.append(_quotient(entry, topic))
    for way in ways:
        try:
            stream = way(lens)
        except (UnknownTopicError, LayerNotFoundError, UnmergeableError):
            continue
        assert isinstance(stream, Stream)
        return per_step()(stream) if entry.asked[1] else stream  # type: ignore[return-value]
    return None


def plain_ways(entry: Input) -> Sequence[Operator]:
    """The operators that find an input in a stream of frames: as it is, from its parts, or from raw ones."""
    found: list[Operator] = [named(entry.name)]
    if entry.parts is not None:
        found.append(_quotient(entry, named))
    if entry.build is not None and entry.name not in TAKEN_AS_IT_IS:
        found.append(_if_possible(entry.build))
    return [chained(way, per_step()) if entry.micro_steps else way for way in found]


TAKEN_AS_IT_IS: Final = frozenset({"loss", "learning_rate"})
"""Topics that nothing has to be computed for."""


def _quotient(entry: Input, select: Callable[[str], Operator]) -> Operator:
    assert entry.parts is not None
    above, below = entry.parts
    return combine(select(above), select(below), fn=divided, name=entry.name)


def _if_possible(build: Build) -> Operator:
    """What `build` makes, or nothing where the stream cannot have it, as classes without a model."""

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        try:
            return build()(source)
        except StreamlensError:
            return frame_operator(source, lambda _: None, "nothing")

    return apply
