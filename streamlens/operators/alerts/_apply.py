"""`alerts_of`: rules applied to a Lens, where they ask for what they need, or to any other stream."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

from reactivex import Observable

from streamlens.errors import StreamlensError
from streamlens.frame import Frame, Kind
from streamlens.lens import Lens
from streamlens.nodes import stateful
from streamlens.operators._base import checked_source
from streamlens.operators._merge import merged
from streamlens.operators.alerts._inputs import Input, Key, found_on, plain_ways
from streamlens.operators.alerts._node import RulesNode
from streamlens.operators.alerts._rule import Pace, Rule, cadence_at
from streamlens.stream import Operator, Stream

__all__ = ["alerts_of"]

_LACKING: Final = ", which this lens cannot give"


def alerts_of(
    source: Observable[Frame],
    rules: Sequence[Rule],
    plan: str,
    *,
    lenient: bool = False,
    chosen: Collection[str] = (),
) -> Stream:
    """The alerts of some rules.

    Args:
        source: A Lens, or a stream that carries what the rules look at.
        rules: The rules, each of another name.
        plan: The operator as it shows in the plan.
        lenient: Leave out rules that the Lens has nothing for, and say so in `explain()`.
        chosen: Names of rules whose inputs are computed even where that is dear, and as these want them.

    Returns:
        The stream of alerts.

    Raises:
        StreamlensError: The Lens has nothing for a rule (for any rule, where lenient).
    """
    left_out: dict[str, str] = {}
    if isinstance(source, Lens) and source.view.reduction is None:
        streams, left_out = _on_lens(source, rules, lenient=lenient, chosen=chosen)
        rules = [rule for rule in rules if rule.name not in left_out]
        if not rules:
            raise StreamlensError(_all_left_out(left_out))
        front = merged(source, streams)
        gathers = True
    else:
        gathers = False
        entries = {entry.key: entry for rule in rules for entry in rule.inputs()}
        ways: list[Operator] = [way for entry in entries.values() for way in plain_ways(entry)]
        front = merged(checked_source(source), ways)
    runtime = front.runtime
    return stateful(
        front,
        lambda: RulesNode(runtime, rules, left_out, gathers=gathers),
        plan,
        marks=True,
        kind=Kind.EVENT,
        raw=False,
    )


def _on_lens(
    lens: Lens, rules: Sequence[Rule], *, lenient: bool, chosen: Collection[str]
) -> tuple[list[Stream], dict[str, str]]:
    """The inputs' streams, each asked for once, and why rules have to be left out."""
    asked: dict[Key, _Asked] = {}
    # What two rules look at is made once: as the one wants it that somebody chose.
    for rule in sorted(rules, key=lambda rule: rule.name not in chosen):
        compute = rule.cheap or not lenient or rule.name in chosen
        for entry in rule.inputs():
            asked.setdefault(entry.asked, _Asked(entry)).add(rule, entry, compute=compute)
    found: dict[Key, list[Stream]] = {}
    for key, wish in asked.items():
        for every, between in wish.spans():
            narrowed = lens.narrow(every=every, between=between, expected=wish.needed and not lenient)
            stream = found_on(narrowed, wish.entry, compute=wish.compute)
            if stream is not None:
                found.setdefault(key, []).append(stream)
    dear = {key for key, wish in asked.items() if not wish.compute}
    left_out = {rule.name: why for rule in rules if (why := _lacks(rule, found, lens, dear))}
    kept = {entry.asked for rule in rules if rule.name not in left_out for entry in rule.inputs()}
    return [stream for key, streams in found.items() if key in kept for stream in streams], left_out


class _Asked:
    """What all rules together want of one input."""

    def __init__(self, entry: Input) -> None:
        self.entry = entry
        self.paces: set[Pace] = set()
        self.needed = False
        self.compute = False

    def add(self, rule: Rule, entry: Input, *, compute: bool) -> None:
        """A rule wants it too."""
        self.paces.add(rule.pace(entry))
        self.needed = self.needed or entry.needed
        self.compute = self.compute or compute

    def spans(self) -> Iterator[tuple[int, tuple[int, int | None] | None]]:
        """At which cadence it is asked for between which steps."""
        starts = sorted({start for pace in self.paces for start, _ in pace})
        shared: list[tuple[int, int]] = []
        for start in starts:
            every = math.gcd(*(cadence_at(pace, start) for pace in self.paces))
            if not shared or shared[-1][1] != every:
                shared.append((start, every))
        if len(shared) == 1:
            yield shared[0][1], None
            return
        stops = [start for start, _ in shared[1:]]
        for (start, every), stop in zip(shared, [*stops, None], strict=True):
            yield every, (start, stop)


def _all_left_out(left_out: Mapping[str, str]) -> str:
    """Why no rule is left, each remedy said once."""
    rules: dict[str, list[str]] = {}
    for name, why in left_out.items():
        looks, lacking, remedy = why.partition(_LACKING)
        rules.setdefault(lacking + remedy, []).append(f"{name}() {looks}")
    return "; ".join(", ".join(those) + remedy for remedy, those in rules.items())


def _lacks(rule: Rule, found: Collection[Key], lens: Lens, dear: Collection[Key]) -> str:
    """What a rule cannot do without and lacks; empty if nothing."""
    needed = [entry for entry in rule.inputs() if entry.needed]
    missing = [entry for entry in needed if entry.asked not in found]
    if not missing or (rule.any_input and len(missing) < len(needed)):
        return ""
    what = (" or " if rule.any_input else " and ").join(repr(entry.name) for entry in missing)
    if any(entry.asked in dear for entry in missing) and lens.source.of_model:
        return f"looks at {what}, dear and no topic here: health({rule.name}()) has it computed"
    remedies = dict.fromkeys(entry.remedy for entry in missing if entry.remedy)
    if not lens.source.of_model:
        remedies = dict.fromkeys([lens.source.remedy] if lens.source.remedy else [])
    selected = f" (it has {', '.join(lens.topics)})" if lens.topics else ""
    return f"looks at {what}{_LACKING}{selected}" + "".join(f": {remedy}" for remedy in remedies)
