"""Answers of the live page's server: built when a run has changed, shared by all who ask."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

from streamlens.errors import RunStoreError
from streamlens.runs import Run
from streamlens.views.own import OwnView
from streamlens.views.packed import encoded
from streamlens.views.theme import vega_config
from streamlens.views.web.charts import Question, of_one_run
from streamlens.views.web.comparison import of_several_runs
from streamlens.views.web.library import Entry, Library, Look, State, state_of

__all__ = ["Answer", "Board"]

_SHARE: Final = 0.2
"""The share of one processor that building answers takes at most, however fast a run is written."""

_LOOK: Final = 1.0
"""Seconds for which a look at the folder is trusted."""

_KEPT: Final = 24
_SHORTEST: Final = 0.5


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent.

    Attributes:
        body: JSON.
        tag: Equal for equal bodies.
        wait: Seconds after which asking again may bring something else.
    """

    body: bytes
    tag: str
    wait: float


@dataclass(slots=True)
class _Kept:
    answer: Answer
    states: tuple[State, ...]
    due: float


class Board:
    """What the server knows; may be used from several threads.

    Args:
        library: The runs.
        views: Charts of the user's own.
    """

    def __init__(self, library: Library, views: tuple[OwnView, ...] = ()) -> None:
        self._library = library
        self._views = views
        self._looking = threading.Lock()
        # One at a time: several would only slow each other down, and often make the same.
        self._building = threading.Lock()
        self._look: Look | None = None
        self._looked = 0.0
        self._kept: OrderedDict[Question, _Kept] = OrderedDict()
        self._hurried = False

    def hurry(self) -> None:
        """From now on build answers at once, whatever that costs: what comes now is the last."""
        self._hurried = True

    def look(self, *, anew: bool = False) -> Look:
        """The runs that there are.

        Args:
            anew: Whether to look again at once.
        """
        with self._looking:
            start = time.monotonic()
            if self._look is None or anew or self._hurried or start - self._looked > _LOOK:
                self._look = self._library.look()
                end = time.monotonic()
                # A folder that takes long to search is searched as much more seldom.
                self._looked = end + (end - start) / _SHARE
            return self._look

    def runs(self) -> Answer:
        """The list of runs, as the page shows it."""
        look = self.look()
        rows = [
            {
                "key": entry.key,
                "title": label,
                "model": str(entry.record.metadata.get("model", "")),
                "id": entry.record.short,
                "place": entry.place,
                "started": entry.record.started,
                "written": entry.record.written,
                "steps": None if entry.last_step is None else entry.last_step + 1,
                "live": entry.live,
            }
            for entry, label in zip(look.entries, _labels(look.entries), strict=True)
        ]
        return _answer({"runs": rows, "problems": list(look.problems), "where": str(self._library.root)}, 2.0)

    def charts(self, question: Question) -> Answer:
        """What the page shows for a question.

        Args:
            question: What is asked for.
        """
        entries = self._chosen(question)
        states = tuple(state_of(entry.record.path) for entry in entries)
        kept = self._kept.get(question)
        if kept is not None and self._holds(kept, states):
            return _waiting(kept, states)
        with self._building:
            kept = self._kept.get(question)
            if kept is not None and self._holds(kept, states):
                return _waiting(kept, states)
            start = time.monotonic()
            answer = _answer(self._content(question, entries), _SHORTEST)
            end = time.monotonic()
            made = _Kept(answer, states, end + (end - start) * (1 / _SHARE - 1))
            self._kept[question] = made
            self._kept.move_to_end(question)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return _waiting(made, states)

    def _holds(self, kept: _Kept, states: tuple[State, ...]) -> bool:
        return kept.states == states or (time.monotonic() < kept.due and not self._hurried)

    def _chosen(self, question: Question) -> list[Entry]:
        entries = self.look().entries
        if not question.runs:
            return list(entries[:1])
        known = {entry.key: entry for entry in entries}
        if not known.keys() >= set(question.runs):
            known = {entry.key: entry for entry in self.look(anew=True).entries}
        return [known[key] for key in question.runs if key in known]

    def _content(self, question: Question, entries: list[Entry]) -> dict[str, Any]:
        labels = dict(
            zip((entry.key for entry in self.look().entries), _labels(self.look().entries), strict=True)
        )
        problems: list[str] = []
        shown: list[str] = []
        content: dict[str, Any] = {"sections": []}
        with ExitStack() as stack:
            runs: dict[str, Run] = {}
            for entry in entries:
                label = labels.get(entry.key, entry.record.title)
                try:
                    runs[label] = stack.enter_context(self._library.open(entry))
                    shown.append(entry.key)
                except RunStoreError as error:
                    problems.append(f"{label}: {error}")
            try:
                if len(runs) == 1:
                    content = of_one_run(next(iter(runs.values())), question, self._views)
                elif runs:
                    content = of_several_runs(runs, question, self._views)
            except RunStoreError as error:
                problems.append(str(error))
        width = content.get("labelWidth", 56)
        return {
            **content,
            "runs": shown,
            "gone": len(question.runs) - len(entries) if question.runs else 0,
            "problems": problems,
            "configs": {mode: vega_config(mode, label_width=width) for mode in ("light", "dark")},
        }


def _labels(entries: tuple[Entry, ...]) -> list[str]:
    """What each run is called: its title, with a part of its id where several share one."""
    titles = [entry.record.title for entry in entries]
    return [
        title if titles.count(title) == 1 else f"{title} ({entry.record.short})"
        for title, entry in zip(titles, entries, strict=True)
    ]


def _answer(content: dict[str, Any], wait: float) -> Answer:
    body = encoded(content)
    return Answer(body, hashlib.sha256(body).hexdigest()[:24], wait)


def _waiting(kept: _Kept, states: tuple[State, ...]) -> Answer:
    left = kept.due - time.monotonic() if kept.states != states else 0.0
    return Answer(kept.answer.body, kept.answer.tag, max(kept.answer.wait, left))
