"""`Absent`: topics that somebody waits for and that a run, as it turns out, does not have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamlens.errors import StreamlensError
from streamlens.topics import Facet, topic_spec

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine

__all__ = ["Absent"]


class Absent:
    """Says once a topic that nothing of it came in the first counted step that it was due in.

    Whether there is a loss, labels or an entry of the optimizer's state only the run can tell: a
    subscription to one that never comes would otherwise just stay silent.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._awaited: frozenset[str] = frozenset()
        self._checked: set[str] = set()
        self._settled: frozenset[str] = frozenset()

    def step_begins(self) -> None:
        """What is selected now, at the first forward of a step, can be expected of it."""
        self._awaited = self._engine.topics

    def check(self, step: int) -> None:
        """Look at the topics that were due in a step that has had a counted forward and is over."""
        engine = self._engine
        if engine.topics is self._settled:
            return
        asked = (d.view for d in engine.demands if d.view.due(step) and d.view.expected)
        due = {topic for view in asked for topic in view.topics}
        due &= self._awaited
        new = sorted(due - self._checked)
        self._checked |= due
        expected = {topic for d in engine.demands if d.view.expected for topic in d.view.topics}
        if expected <= self._checked:
            self._settled = engine.topics
        for topic in new:
            remedy = self._remedy(topic)
            if remedy:
                message = f"{topic!r} was asked for, but step {step} had none: {remedy}"
                engine.report(StreamlensError(message), f"topic {topic!r}")

    def _remedy(self, topic: str) -> str:
        losses = self._engine.losses
        spec = topic_spec(topic)
        if topic == "loss" and not losses.seen:
            if losses.watched:
                return "the watched loss must be called on the output of the observed model"
            return "pass observe(model, loss=criterion), or write criterion = lens.watch_loss(function)"
        if topic == "input_labels" and not losses.labels_seen:
            if losses.seen:
                return "the watched loss must be given labels, as its second argument or as target="
            return "labels come with a loss: pass observe(model, loss=criterion)"
        if spec is None:
            return ""
        if not self._engine.updates.owners.tells(spec.facet):
            groups = ", each group with a rate of its own" if spec.facet is Facet.RATE else ""
            return (
                f"the optimizer owns copies of the parameters{groups}: say which stands for what, "
                "observe(model, optimizers=[...], owners={'name of the parameter': tensor})"
            )
        if spec.facet is Facet.STATE:
            kept = self._state_keys()
            if spec.state not in kept:
                return f"the optimizer keeps {', '.join(kept) or 'no state'}"
        return ""

    def _state_keys(self) -> tuple[str, ...]:
        optimizers = (info.optimizer for info in self._engine.updates.owners.known)
        states = (state for known in optimizers if known is not None for state in known.state.values())
        return tuple(dict.fromkeys(str(key) for state in states for key in state))
