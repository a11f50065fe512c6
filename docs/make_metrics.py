"""`python docs/make_metrics.py`: the reference table of every operator, from the operators' own docstrings.

Writes `docs/metrics.md`. What stands there is what the docstrings say, sentence by sentence: whoever wants
another table writes another docstring.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import streamlens.operators

PAGE: Final = Path(__file__).with_name("metrics.md")

STREAM: Final = frozenset(
    [
        "across_layers",
        "align",
        "between",
        "combine",
        "diff",
        "ema",
        "every",
        "flight_recorder",
        "layers",
        "per_epoch",
        "per_layer",
        "per_step",
        "reduce",
        "rename",
        "scan",
        "smooth",
        "topic",
        "when",
        "where",
        "window",
    ]
)
"""What transforms any stream; everything else that is exported measures something, or is a rule."""

_HEAD: Final = """# Every operator

Made by `python docs/make_metrics.py` from the docstrings, which say more: `help(sl.norm)`; what a family has
in common stands at the head of its module: `help("streamlens.operators.statistics")`. A Lens is what
`sl.observe(model)` returns; a replay is a stream of stored frames, which carries what was stored. "Any
stream" means a Lens (there the work is done where the tensors are, for all layers at once), a plain
Observable of frames, or a replay.
"""

_SECTIONS: Final = {
    "Metrics": 'One line of use each: `lens.pipe(sl.norm("weights")).subscribe(sink)`.',
    "Alert rules": "Topics `alerts.<rule>`; `health()` is the default set. How well they work: "
    "[alerts.md](alerts.md).",
    "Stream operators": "What chains are made of.",
}


def exported() -> dict[str, Callable[..., Any]]:
    """Every exported operator by name."""
    found = {name: getattr(streamlens.operators, name) for name in streamlens.operators.__all__}
    return {name: value for name, value in found.items() if not isinstance(value, type)}


def section_of(name: str, operator: Callable[..., Any]) -> str:
    """Under which heading an operator stands."""
    if ".alerts." in operator.__module__:
        return "Alert rules"
    return "Stream operators" if name in STREAM else "Metrics"


def prose_of(operator: Callable[..., Any]) -> str:
    """The docstring without its list of arguments, one paragraph a line."""
    text = re.split(r"\n(?:Args|Returns|Raises|Example):\n", inspect.getdoc(operator) or "")[0]
    return "\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def sentences_of(text: str) -> list[str]:
    """Its sentences; a full stop within brackets, or before a small letter, ends none."""
    found: list[str] = []
    for line in text.split("\n"):
        start = depth = 0
        for place, sign in enumerate(line):
            depth += (sign in "([") - (sign in ")]")
            rest = line[place + 1 : place + 3]
            if (
                sign in ".;"
                and depth <= 0
                and (not rest or (rest[0] == " " and (sign == ";" or not rest[1:].islower())))
            ):
                found.append(line[start : place + 1].strip())
                start = place + 1
        found.append(line[start:].strip())
    return [sentence for sentence in found if sentence]


def joined(sentences: Iterable[str]) -> str:
    """Sentences as one text, without its last full stop."""
    bare = [s.removeprefix("- ") for s in sentences]
    return ". ".join(s[0].upper() + s[1:].rstrip(";.") for s in bare)


def told_of(text: str, operator: Callable[..., Any], pattern: str) -> list[str]:
    """The sentences that have something in them; if there are none, those that its module has in common."""
    common = (sys.modules[operator.__module__].__doc__ or "").partition("Common to all: ")[2]
    for source in (text, " ".join(common.split())):
        told = [s for s in sentences_of(source) if re.search(pattern, s)]
        if told:
            return told
    return []


def cost_of(text: str, operator: Callable[..., Any]) -> str:
    """What it says of its cost."""
    told = told_of(text, operator, r"\b[Cc]osts?\b")
    return joined(told).replace("The cost is ", "").replace("Cost: ", "")


def nan_of(text: str, operator: Callable[..., Any]) -> str:
    """What it says of NaN."""
    return joined(told_of(text, operator, r"NaN|`nan`"))


def value_of(text: str, operator: Callable[..., Any]) -> str:
    """What it says of its value: topic, unit and range; the unit is perhaps told of all in its module."""
    value = r"^((The|Two) )?(value|values|result)\b|, as topic|\b(the|its) value is|is topic\b"
    told = [s for s in sentences_of(text)[1:] if re.search(value, s, re.IGNORECASE)]
    unit = r"\bunits?\b|\bin [\[(]|\bthe elements' unit"
    if ".alerts." not in operator.__module__ and not any(re.search(unit, s) for s in told):
        told += [s for s in told_of(text, operator, unit) if s not in told and s != sentences_of(text)[0]]
    return joined(told)


def needs_of(name: str, operator: Callable[..., Any]) -> str:
    """What it can be applied to."""
    text = inspect.getdoc(operator) or ""
    if ".alerts." in operator.__module__:
        return "a Lens, or a stream with its topics"
    if "model" in inspect.signature(operator).parameters:
        return "a Lens, or `model=`"
    if "carries numbers and not tensors" in text:
        return "tensors: a Lens, or raw frames"
    return "any stream"


def row_of(name: str, operator: Callable[..., Any]) -> str:
    """One row of the table."""
    text = prose_of(operator)
    required = [
        p.name if p.kind is not p.KEYWORD_ONLY else f"{p.name}="
        for p in inspect.signature(operator).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    cells = (
        f"`{name}({', '.join(required)})`",
        sentences_of(text)[0].rstrip(";."),
        value_of(text, operator),
        cost_of(text, operator),
        nan_of(text, operator),
        needs_of(name, operator),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    """The whole page."""
    parts = [_HEAD]
    for section, says in _SECTIONS.items():
        rows = [row_of(n, o) for n, o in sorted(exported().items()) if section_of(n, o) == section]
        head = "| operator | what it is | value | cost | NaN | applies to |\n|---|---|---|---|---|---|"
        parts.append(f"## {section}\n\n{says}\n\n{head}\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
