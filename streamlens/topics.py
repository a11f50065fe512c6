"""The topics that an observed PyTorch model can emit."""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from streamlens.errors import StreamlensError, UnknownTopicError, did_you_mean
from streamlens.frame import Kind

__all__ = [
    "TOPICS",
    "Facet",
    "Phase",
    "TopicSpec",
    "check_own_topic",
    "optimizer_state",
    "topic_spec",
    "unknown_topic",
]


class Phase(enum.Enum):
    """Which part of the engine takes a topic."""

    PARAMETER = "parameter"
    MODULE = "module"
    BATCH = "batch"
    LOSS = "loss"
    CLOCK = "clock"
    USER = "user"


class Facet(enum.Enum):
    """What of a parameter is taken."""

    VALUE = "value"
    GRADIENT = "gradient"
    UPDATE = "update"
    RAW_GRADIENT = "raw_gradient"
    STATE = "state"
    RATE = "rate"


@dataclass(frozen=True)
class TopicSpec:
    """What is known of a topic before the run.

    Attributes:
        name: The topic.
        phase: Which part of the engine takes it.
        kind: How often it yields a frame.
        raw: Whether its frames hold the run's own tensors.
        facet: What of the parameter, for parameter topics.
        role: `"weight"` or `"bias"` for the topics keyed by module, `""` for every parameter.
        state: The key of `optimizer.state`, for `optimizer_state`.
    """

    name: str
    phase: Phase
    kind: Kind
    raw: bool = True
    facet: Facet | None = None
    role: str = ""
    state: str = ""


def _parameter(name: str, facet: Facet, role: str, *, raw: bool = True) -> TopicSpec:
    return TopicSpec(name, Phase.PARAMETER, Kind.STEP, raw=raw, facet=facet, role=role)


TOPICS: Final[Mapping[str, TopicSpec]] = {
    spec.name: spec
    for spec in (
        _parameter("weights", Facet.VALUE, "weight"),
        _parameter("biases", Facet.VALUE, "bias"),
        _parameter("parameters", Facet.VALUE, ""),
        _parameter("weight_gradients", Facet.GRADIENT, "weight"),
        _parameter("bias_gradients", Facet.GRADIENT, "bias"),
        _parameter("parameter_gradients", Facet.GRADIENT, ""),
        _parameter("weight_updates", Facet.UPDATE, "weight"),
        _parameter("bias_updates", Facet.UPDATE, "bias"),
        _parameter("parameter_updates", Facet.UPDATE, ""),
        _parameter("learning_rate", Facet.RATE, "weight", raw=False),
        TopicSpec("raw_gradients", Phase.PARAMETER, Kind.MICRO_STEP, facet=Facet.RAW_GRADIENT),
        TopicSpec("activations", Phase.MODULE, Kind.MICRO_STEP),
        TopicSpec("layer_gradients", Phase.MODULE, Kind.MICRO_STEP),
        TopicSpec("input_data", Phase.BATCH, Kind.MICRO_STEP),
        TopicSpec("input_labels", Phase.LOSS, Kind.MICRO_STEP),
        TopicSpec("network_output", Phase.BATCH, Kind.MICRO_STEP),
        TopicSpec("loss", Phase.LOSS, Kind.MICRO_STEP, raw=False),
        TopicSpec("batch_started", Phase.CLOCK, Kind.EVENT, raw=False),
        TopicSpec("batch_finished", Phase.CLOCK, Kind.EVENT, raw=False),
        TopicSpec("epoch_started", Phase.CLOCK, Kind.EVENT, raw=False),
        TopicSpec("epoch_finished", Phase.CLOCK, Kind.EVENT, raw=False),
        TopicSpec("update_finished", Phase.CLOCK, Kind.STEP, raw=False),
        TopicSpec("step_time", Phase.CLOCK, Kind.STEP, raw=False),
        TopicSpec("examples_per_second", Phase.CLOCK, Kind.STEP, raw=False),
    )
}
"""Every topic that an observed model provides by itself."""

_STATE: Final = "optimizer_state."


def optimizer_state(key: str) -> str:
    """The topic of an optimizer's own state tensors, such as Adam's `exp_avg`.

    Layers are the parameters' full names (`features.0.weight`); a parameter without that entry is
    absent. Taken after the update.

    Args:
        key: The entry of `optimizer.state[parameter]`, such as `"exp_avg"`, `"exp_avg_sq"` or
            `"momentum_buffer"`.

    Returns:
        The topic's name, `"optimizer_state.<key>"`, to be passed to `topic()` or a reduction.

    Example:
        >>> optimizer_state("exp_avg")
        'optimizer_state.exp_avg'
    """
    if not isinstance(key, str) or not key:
        raise ValueError(f"optimizer_state() needs the name of a state entry such as 'exp_avg', got {key!r}")
    return _STATE + key


def topic_spec(name: str) -> TopicSpec | None:
    """What is known of a topic, or None if an observed model does not provide it by itself."""
    spec = TOPICS.get(name)
    if spec is None and name.startswith(_STATE) and len(name) > len(_STATE):
        return TopicSpec(name, Phase.PARAMETER, Kind.STEP, facet=Facet.STATE, state=name.removeprefix(_STATE))
    return spec


def unknown_topic(name: object, known: Iterable[str]) -> UnknownTopicError:
    """The error for a topic that nothing provides, with near names."""
    names = list(known)
    hint = did_you_mean(str(name), names)
    return UnknownTopicError(
        f"unknown topic {name!r}" + (f": {hint}" if hint else ".") + f" Topics: {', '.join(names)}; "
        "your own come from lens.emit(), named to observe(emits=[...]) if selected before, and lens.derive()"
    )


def check_own_topic(name: object, derived: Collection[str] = ()) -> None:
    """Raise for what cannot be the name of a topic of the user's own.

    Args:
        name: The name.
        derived: Topics that are made from others.

    Raises:
        TypeError: It is no name.
        StreamlensError: The run provides that topic itself.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"emit() needs a topic's name such as 'validation_loss', got {name!r}")
    if topic_spec(name) is not None or name in derived:
        raise StreamlensError(
            f"cannot emit {name!r}: the run provides that topic itself; choose another name"
        )
