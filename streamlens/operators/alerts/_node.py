"""`RulesNode`: runs rules on the frames they look at, and turns what they find into alerts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from streamlens.chain import Mark, MarkKind
from streamlens.delivery.transfer import Burst, Ticket, on_host
from streamlens.errors import StreamlensError
from streamlens.frame import Frame, Kind, to_numpy
from streamlens.nodes import Emitted, Node
from streamlens.operators._base import frame_from_state, frame_state
from streamlens.operators.alerts._hysteresis import Hysteresis
from streamlens.operators.alerts._rule import Judge, Look, Pace, Rule, Verdict, cadence_at
from streamlens.runtime import Runtime

__all__ = ["RulesNode"]


class _Watch:
    """One rule on one model: its memory, and which of its alerts are open."""

    def __init__(self, rule: Rule, runtime: Runtime) -> None:
        self.rule = rule
        self._runtime = runtime
        self.judge: Judge = rule.judge()
        self.groups: dict[str, Hysteresis] = {}
        self.since: dict[tuple[str, str], int] = {}
        self.judge.calm = self._calm

    def _calm(self, group: str) -> bool:
        hysteresis = self.groups.get(group)
        return hysteresis is not None and hysteresis.calm

    def take(self, frame: Frame, look: Look, skip: Callable[[int], None]) -> list[Frame]:
        """The alerts that a look starts and ends."""
        alerts: list[Frame] = []
        for verdict in self.judge.look(look):
            known = ~np.isnan(verdict.values) if verdict.known is None else verdict.known
            unknown = len(known) - int(np.count_nonzero(known))
            if unknown:
                skip(unknown)
            hysteresis = self.groups.get(verdict.group)
            if hysteresis is None:
                hysteresis = self.groups[verdict.group] = Hysteresis(*self.rule.start, self.rule.end)
            if hysteresis.calm and not verdict.bad.any():
                # What every look of a healthy run comes to.
                continue
            starts, ends = hysteresis.look(verdict.layers, verdict.bad, known)
            if starts.any():
                alerts.append(self._alert(frame, verdict, np.flatnonzero(starts).tolist(), "start"))
            if ends.any():
                alerts.append(self._alert(frame, verdict, np.flatnonzero(ends).tolist(), "end"))
        return alerts

    def _alert(self, frame: Frame, verdict: Verdict, index: list[int], state: str) -> Frame:
        rule = self.rule
        layers = tuple(verdict.layers[i] for i in index)
        meta: dict[str, Any] = {
            "rule": rule.name,
            "severity": rule.severity,
            "state": state,
            "threshold": list(verdict.threshold)
            if isinstance(verdict.threshold, tuple)
            else verdict.threshold,
            **({"of": verdict.group} if verdict.group else {}),
            **verdict.meta,
        }
        if state == "start":
            self.since.update({(verdict.group, layer): frame.step for layer in layers})
            ranks = self._runtime.origins(frame.topic, layers, frame.step)
            if ranks:
                meta["rank"] = ranks[0] if len(ranks) == 1 else list(ranks)
            meta["text"] = f"{rule.meaning(verdict, index)}{_on(ranks)}. {rule.advice}."
        else:
            since = min(self.since.pop((verdict.group, layer), frame.step) for layer in layers)
            meta["since"] = since
            steps = frame.step - since
            after = f"{steps} step{'s' * (steps != 1)}"
            meta["text"] = f"Back to normal after {after}: {rule.named(verdict, index)}."
        return Frame(
            f"alerts.{rule.name}",
            frame.step,
            layers,
            torch.from_numpy(verdict.values[index].copy()),
            epoch=frame.epoch,
            micro_step=frame.micro_step,
            meta=meta,
            kind=Kind.EVENT,
            source=frame.source,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "judge": self.judge.state_dict(),
            "groups": {name: hysteresis.state_dict() for name, hysteresis in self.groups.items()},
            "since": [[group, layer, step] for (group, layer), step in self.since.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.judge.load_state_dict(state["judge"])
        self.groups = {}
        for name, saved in state["groups"].items():
            self.groups[name] = Hysteresis(*self.rule.start, self.rule.end)
            self.groups[name].load_state_dict(saved)
        self.since = {(group, layer): step for group, layer, step in state["since"]}


class _Gathered:
    """The looks at the micro-steps of one step, as their sum."""

    def __init__(self, frame: Frame, look: Look) -> None:
        self.frame = frame
        self._last = look
        self._total = look.values
        self._looks = 1

    def add(self, frame: Frame, look: Look) -> bool:
        """Take in another micro-step; False if it is of another step, or of other losses."""
        first = self._last
        same = (frame.step, look.layers, look.components) == (first.step, first.layers, first.components)
        if same:
            self.frame, self._last = frame, look
            self._total = self._total + look.values
            self._looks += 1
        return same

    @property
    def look(self) -> Look:
        """Their mean."""
        return self._last if self._looks == 1 else replace(self._last, values=self._total / self._looks)

    def state_dict(self) -> dict[str, Any]:
        values = torch.from_numpy(self._total / self._looks)
        frame = self.frame.replace(values=values)
        return {"frame": frame_state(frame), "looks": self._looks}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> _Gathered:
        frame = frame_from_state(state["frame"])
        values = to_numpy(cast("torch.Tensor", frame.values))
        held = cls(frame, Look(frame.topic, frame.step, frame.layers, values, frame.components))
        held._total, held._looks = values * state["looks"], state["looks"]
        return held


def _on(ranks: Sequence[int]) -> str:
    """Where it was, as a sentence ends."""
    if not ranks:
        return ""
    return f", on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


class RulesNode(Node):
    """Runs rules on each frame that they look at; each model of a stream has a memory of its own.

    Values on a device are copied to the host without waiting, and judged when they have arrived:
    their alerts have the step of the values, and come a step or two later.

    Args:
        runtime: Where a failing rule is reported; the others go on.
        rules: The rules.
        left_out: Why rules were left out, for `explain()`.
        gathers: Whether what comes once a micro-step has to be averaged over the step, which marks end.
    """

    def __init__(
        self, runtime: Runtime, rules: Sequence[Rule], left_out: Mapping[str, str], *, gathers: bool = False
    ) -> None:
        self._runtime = runtime
        self._gathers = gathers
        self._rules = rules
        self._left_out = left_out
        self._routes: dict[str, list[tuple[int, Pace, bool]]] = {}
        for i, rule in enumerate(rules):
            for entry in rule.inputs():
                self._routes.setdefault(entry.name, []).append((i, rule.pace(entry), entry.micro_steps))
        self._averaged = frozenset(entry.name for rule in rules for entry in rule.inputs() if entry.gathered)
        self._watches: dict[str, list[_Watch]] = {}
        self._seen: dict[tuple[str, str, Kind], tuple[int, int, frozenset[str]]] = {}
        self._gathered: dict[tuple[str, str], _Gathered] = {}
        self._arriving: deque[tuple[Burst, Ticket] | Mark] = deque()

    @property
    def notes(self) -> tuple[str, ...]:
        """Rules that were left out, and those that nothing has come for yet."""
        notes = [f"left out {name}: it {why}" for name, why in self._left_out.items()]
        if self._runtime.step > 0:
            came = {topic for _, topic, _ in self._seen}
            for rule in self._rules:
                needed = [entry for entry in rule.inputs() if entry.needed]
                if came.isdisjoint(entry.name for entry in needed) and came:
                    what = " or ".join(repr(entry.name) for entry in needed)
                    remedy = "".join(f": {entry.remedy}" for entry in needed[:1] if entry.remedy)
                    notes.append(f"left out {rule.name}: no {what} has come{remedy}")
        return tuple(notes)

    def on_frame(self, frame: Frame) -> Emitted:
        """The alerts that a frame starts and ends, and those of earlier ones that have arrived."""
        if frame.topic not in self._routes or not frame.layers or self._is_repeated(frame):
            return None
        if not frame.stacked:
            raise StreamlensError(f"{frame.topic!r} at step {frame.step} has no number a layer to judge")
        if not self._arriving and on_host(frame):
            return self._judge(frame)
        burst = Burst()
        ticket = burst.add(frame)
        assert ticket is not None
        burst.settle()
        self._arriving.append((burst, ticket))
        return self._arrived()

    def on_mark(self, mark: Mark) -> Emitted:
        """The alerts of what has arrived meanwhile, and of means over a step that is over."""
        if self._arriving:
            self._arriving.append(mark)
            return self._arrived()
        return self._step_over(mark) if self._gathered else None

    def on_completed(self) -> Emitted:
        """The alerts of what is still on its way."""
        return self._arrived(wait=True)

    def _arrived(self, *, wait: bool = False) -> list[Frame]:
        alerts: list[Frame] = []
        while self._arriving:
            first = self._arriving[0]
            if isinstance(first, Mark):
                alerts += self._step_over(first)
            elif wait or first[0].arrived:
                alerts += self._judge(first[1].take(), on_device=True)
            else:
                break
            self._arriving.popleft()
        return alerts

    def _step_over(self, mark: Mark) -> list[Frame]:
        """The alerts of what was gathered in the step that a mark ends."""
        if mark.kind is MarkKind.EPOCH:
            return []
        alerts: list[Frame] = []
        for key in [key for key, held in self._gathered.items() if held.frame.step <= mark.step]:
            held = self._gathered.pop(key)
            alerts += self._looked(held.frame, held.look, averaged=True)
        return alerts

    def _is_repeated(self, frame: Frame) -> bool:
        """Whether another way to the same topic has brought the same layers of this step already."""
        key = (frame.source, frame.topic, frame.kind)
        step, micro_step, layers = self._seen.get(key, (-1, -1, frozenset()))
        if (step, micro_step) != (frame.step, frame.micro_step):
            self._seen[key] = (frame.step, frame.micro_step, frozenset(frame.layers))
            return False
        if layers.issuperset(frame.layers) and frame.kind is not Kind.EVENT:
            return True
        self._seen[key] = (step, micro_step, layers.union(frame.layers))
        return False

    def _judge(self, frame: Frame, *, on_device: bool = False) -> list[Frame]:
        values = to_numpy(cast("torch.Tensor", frame.values)).astype(np.float64)
        look = Look(frame.topic, frame.step, frame.layers, values, frame.components, on_device)
        if frame.kind is not Kind.MICRO_STEP:
            return self._looked(frame, look)
        if self._gathers and frame.topic in self._averaged:
            key = (frame.source, frame.topic)
            held = self._gathered.get(key)
            if held is None or not held.add(frame, look):
                self._gathered[key] = _Gathered(frame, look)
        # The mean over the step follows.
        return self._looked(frame, look, averaged=False)

    def _looked(self, frame: Frame, look: Look, *, averaged: bool | None = None) -> list[Frame]:
        """The alerts of one look, by the rules that look at means, at what they are of, or at either."""
        watches = self._watches.get(frame.source)
        if watches is None:
            watches = self._watches[frame.source] = [_Watch(rule, self._runtime) for rule in self._rules]
        alerts: list[Frame] = []
        for i, pace, mean in self._routes[frame.topic]:
            if averaged is not None and mean is not averaged:
                continue
            if frame.kind is not Kind.EVENT and frame.step % cadence_at(pace, frame.step):
                continue
            watch = watches[i]
            try:
                alerts += watch.take(frame, look, self._skip)
            except Exception as error:
                self._runtime.report(error, f"{watch.rule.describe()} on {frame.topic!r}")
        return alerts

    def _skip(self, number: int) -> None:
        self.skipped += number

    def state_dict(self) -> dict[str, Any]:
        """What each rule remembers of each model, and what the open step has given so far."""
        return {
            "sources": {
                source: {watch.rule.name: watch.state_dict() for watch in watches}
                for source, watches in self._watches.items()
            },
            "gathered": [held.state_dict() for held in self._gathered.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave; a rule that is new starts afresh."""
        gathered = [_Gathered.from_state(saved) for saved in state.get("gathered", ())]
        self._gathered = {(held.frame.source, held.frame.topic): held for held in gathered}
        self._watches = {}
        for source, saved in state["sources"].items():
            watches = self._watches[source] = [_Watch(rule, self._runtime) for rule in self._rules]
            for watch in watches:
                if watch.rule.name in saved:
                    watch.load_state_dict(saved[watch.rule.name])
