"""`lens.explain()`: what runs, what is captured for it, what is shared, and what it costs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from streamlens.errors import did_you_mean
from streamlens.topics import Phase, topic_spec

if TYPE_CHECKING:
    from streamlens.capture.source import Source
    from streamlens.capture.view import Demand
    from streamlens.chain import Chain

__all__ = ["explain"]


def explain(source: Source, style: str = "text") -> str:
    """The plan of everything that is subscribed.

    Args:
        source: Where the frames come from.
        style: `"text"` or `"mermaid"`.

    Raises:
        ValueError: Another style.
    """
    if style == "text":
        return _text(source)
    if style == "mermaid":
        return _mermaid(source)
    hint = did_you_mean(style, ("text", "mermaid"))
    raise ValueError(f"explain({style!r}): {hint or 'allowed are text and mermaid'}")


def _text(source: Source) -> str:
    first, *held = source.summary()
    lines = [first]
    for chain in source.chains:
        lines += ["", f"chain {_without_source(chain.key)}", *(f"  {line}" for line in _chain(source, chain))]
    if not source.chains:
        lines += ["", "no chain is subscribed: nothing is captured"]
    lines += ["", "captured", *(f"  {line}" for line in _captured(source))]
    if held:
        lines += ["", *held]
    return "\n".join(lines)


def _chain(source: Source, chain: Chain) -> Iterable[str]:
    demands = [d for d in source.demands if d.chain is chain]
    for demand in demands:
        yield f"asks for {_asked(demand)}"
    steps = _steps(source)
    cost = (
        f"{chain.seconds / steps * 1e6:.0f} us a step" if steps and chain.counts["frames"] else "not run yet"
    )
    yield f"ends in {chain.ends_in}: {_counted(chain.counts['frames'], 'frame')}, {cost}"
    lost = [f"{chain.counts[name]} {name}" for name in ("late", "incomplete", "errors") if chain.counts[name]]
    skipped = sum(cell.skipped for cell in chain.cells)
    if skipped:
        lost.append(f"{skipped} NaN skipped")
    if lost:
        yield ", ".join(lost)
    for cell in chain.cells:
        yield from cell.notes


def _asked(demand: Demand) -> str:
    view = demand.view
    parts = []
    for topic in view.topics:
        layers = demand.layers.get(topic)
        parts.append(topic + ("" if layers is None else f" of {len(layers)} layer{'s' * (len(layers) != 1)}"))
    text = ", ".join(parts)
    if view.reduction is not None:
        text += f", reduced to {view.reduction.describe()} where it is taken"
    if view.every > 1:
        text += f", every {view.every} steps"
    if view.start or view.stop is not None:
        text += f", steps {view.start} to {'the end' if view.stop is None else view.stop}"
    return text


_TAKEN_BY: Final = {
    Phase.PARAMETER: "optimizer hook",
    Phase.MODULE: "module hooks",
    Phase.BATCH: "model hook",
    Phase.LOSS: "loss hook",
    Phase.CLOCK: "clock",
}


def _what(demand: Demand, topic: str) -> str:
    """What is taken of a topic: a reduction, the tensors themselves, or the numbers it consists of."""
    if demand.view.reduction is not None:
        return demand.view.reduction.describe()
    spec = topic_spec(topic)
    return "raw" if spec is not None and spec.raw else "as it comes"


def _captured(source: Source) -> Iterable[str]:
    """Each (topic, reduction): of which layers, taken where and when, and for how many."""
    asked: dict[tuple[str, str], list[Demand]] = defaultdict(list)
    for demand in source.demands:
        for topic in demand.view.topics:
            asked[topic, _what(demand, topic)].append(demand)
    for (topic, what), demands in asked.items():
        spec = topic_spec(topic)
        taken_by = _TAKEN_BY[spec.phase] if spec is not None else "emitted by you or derived"
        if topic not in source.derived_topics:
            taken_by = source.taken_by or taken_by
        cadences = sorted({demand.view.every for demand in demands})
        every = ", ".join(f"every {n} steps" if n > 1 else "every step" for n in cadences)
        shared = f", shared by {len(demands)}" if len(demands) > 1 else ""
        yield f"{topic} {what}{_layers(topic, demands)}: {taken_by}, {every}{shared}"
    if not asked:
        yield "nothing"


def _layers(topic: str, demands: Sequence[Demand]) -> str:
    spec = topic_spec(topic)
    if spec is None or spec.phase not in (Phase.PARAMETER, Phase.MODULE):
        return ""
    chosen = [demand.layers.get(topic) for demand in demands]
    if any(layers is None for layers in chosen):
        return ", all layers"
    names = sorted(set().union(*(layers for layers in chosen if layers is not None)))
    return f", {_counted(len(names), 'layer')} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _mermaid(source: Source) -> str:
    """A flowchart from the run through what is captured and each chain's operators to its end."""
    lines = ["flowchart LR", f'  run["{_escape(source.metadata().get("model") or source.title)}"]']
    nodes: dict[tuple[str, str], str] = {}
    for number, chain in enumerate(source.chains):
        entries = []
        for demand in source.demands:
            if demand.chain is not chain:
                continue
            for topic in demand.view.topics:
                what = _what(demand, topic)
                if (topic, what) not in nodes:
                    nodes[topic, what] = f"t{len(nodes)}"
                    lines.append(f'  run --> {nodes[topic, what]}(["{_escape(topic)} {_escape(what)}"])')
                entries.append(nodes[topic, what])
        steps = [_without_source(p) for p in ([c.plan for c in reversed(chain.cells)] or [chain.plan])]
        previous = list(dict.fromkeys(entries))
        for place, step in enumerate(steps):
            name = f"c{number}_{place}"
            lines.append(f'  {name}["{_escape(step)}"]')
            lines += [f"  {p} --> {name}" for p in previous]
            previous = [name]
        lines.append(f'  e{number}[/"{_escape(chain.ends_in)}"/]')
        lines += [f"  {p} --> e{number}" for p in previous]
    return "\n".join(lines)


def _without_source(plan: str) -> str:
    """A plan without the lens at the start of each branch, which is the same everywhere."""
    return re.sub(r"(observe|Feed|replay)\([^)]*\) \| ", "", plan)


def _escape(text: str) -> str:
    return str(text).replace("&", "#amp;").replace('"', "#quot;").replace("<", "#lt;").replace(">", "#gt;")


def _steps(source: Source) -> int:
    """Steps that have had their update."""
    return source.clock.step + int(source.clock.updated)
