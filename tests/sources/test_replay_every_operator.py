"""Live is replay: every operator that is shipped gives over a stored run what it gave live."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import streamlens as sl
from streamlens.frame import Frame
from streamlens.operators.align import AlignedFrame
from streamlens.sinks import RunStore
from tests._runs import small_model
from tests.helpers.interrupting import Chains
from tests.helpers.labelled import CHAINS
from tests.helpers.shipped import EVERY_TOPIC

STORED: Chains = {
    "layers, by their names": lambda lens: (sl.layers("0*"), sl.topic("activations"), sl.std()),
    "diff of stored tensors": lambda lens: (sl.topic("weights"), sl.every(2), sl.diff()),
}
"""What a replay can do of operators whose chains among the others ask the model."""

ALL: Chains = {**CHAINS, **STORED}


Both: TypeAlias = tuple[dict[str, list[Frame]], dict[str, list[Frame]]]
"""What chains gave live, and what they gave over the replay."""


@dataclass(frozen=True)
class Schedule:
    """How long a run is, and what happens in it."""

    epochs: int = 2
    steps: int = 4
    micro_steps: int = 2
    broken: int | None = 5
    """The step whose inputs are NaN."""


class Everything(torch.optim.Adam):
    """Adam with the state of SGD beside its own, so that every topic of the helpers is there to be stored."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for state in self.state.values():
            state["momentum_buffer"] = state["exp_avg"].clone()
        return result


def applied(lens: sl.Lens, chains: Chains) -> dict[str, sl.Stream | sl.StreamlensError]:
    """Each chain on a lens, or what that raises."""
    out: dict[str, sl.Stream | sl.StreamlensError] = {}
    for label, make in chains.items():
        try:
            out[label] = lens.pipe(*make(lens))
        except sl.StreamlensError as error:
            out[label] = error
    return out


def keep(frames: list[Frame]) -> Callable[[Frame | AlignedFrame], None]:
    """What a chain ends in: it keeps copies of the frames that come."""

    def receive(item: Frame | AlignedFrame) -> None:
        together = item.frames if isinstance(item, AlignedFrame) else (item,)
        frames.extend(frame.clone() for frame in together)

    return receive


def record(path: Path, schedule: Schedule, live: Mapping[str, Any]) -> dict[str, list[Frame]]:
    """Store every topic of a run, and give what chains on it gave meanwhile."""
    model, criterion = small_model(), nn.CrossEntropyLoss()
    optimizer = Everything(model.parameters(), lr=0.01)
    out: dict[str, list[Frame]] = {label: [] for label in live}
    generator = torch.Generator().manual_seed(1)
    with sl.observe(model, loss=criterion, on_error="raise") as lens:
        store = RunStore(path)
        lens.pipe(sl.topic(*EVERY_TOPIC)).subscribe(store)
        for label, stream in applied(lens, live).items():
            assert isinstance(stream, sl.Stream), label
            stream.subscribe(keep(out[label]), name=label)
        step = 0
        for _ in lens.epochs(schedule.epochs):
            for _ in range(schedule.steps):
                optimizer.zero_grad()
                for _ in range(schedule.micro_steps):
                    x = torch.randn(6, 4, generator=generator)
                    if step == schedule.broken:
                        x = x * torch.nan
                    criterion(model(x), torch.randint(3, (6,), generator=generator)).backward()
                optimizer.step()
                step += 1
    return out


def play(path: Path, chains: Chains) -> dict[str, list[Frame]]:
    out: dict[str, list[Frame]] = {}
    with sl.replay(path, on_error="raise") as replay:
        for label, stream in applied(replay, chains).items():
            assert isinstance(stream, sl.Stream), f"{label}: {stream}"
            stream.subscribe(keep(out.setdefault(label, [])), name=label)
        assert replay.play()
    return out


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The chains that no replay takes, although everything is stored, and why."""
    path = tmp_path_factory.mktemp("runs") / "run.db"
    record(path, Schedule(1, 2, 1, None), {})
    with sl.replay(path) as replay:
        found = applied(replay, ALL)
    return {label: str(error) for label, error in found.items() if isinstance(error, Exception)}


@pytest.fixture(scope="module")
def both(refused: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Both:
    """What every chain gave live, and what it gave over the replay."""
    path = tmp_path_factory.mktemp("runs") / "run.db"
    chains = {label: make for label, make in ALL.items() if label not in refused}
    return record(path, Schedule(), chains), play(path, chains)


def told(frames: list[Frame]) -> list[tuple[Any, ...]]:
    """Everything about frames but their values."""
    return [
        (f.topic, f.step, f.epoch, f.micro_step, f.kind, f.layers, f.components, f.source, meta(f))
        for f in frames
    ]


def meta(frame: Frame) -> dict[str, Any]:
    # Which batch of its epoch a step was, only the training loop knows.
    return {key: value for key, value in frame.meta.items() if key != "batch"}


def assert_equal(live: list[Frame], again: list[Frame]) -> None:
    assert told(live) == told(again)
    for a, b in zip(live, again, strict=True):
        for (layer, x), (_, y) in zip(a.items(), b.items(), strict=True):
            # Sums of one tensor may be taken in another order, where other chains asked for more of it live.
            torch.testing.assert_close(
                x, y, rtol=1e-5, atol=1e-7, equal_nan=True, msg=f"{a.topic} of {layer!r} at step {a.step}"
            )


def test_only_what_asks_the_model_is_refused(refused: Mapping[str, str]) -> None:
    for label, message in refused.items():
        assert re.search(
            r"has none: pass .*model=|has no model|which this lens cannot give: the run did not store it",
            message,
        ), f"{label}: {message}"
    assert not refused.keys() & STORED.keys()


@pytest.mark.parametrize("label", ALL)
def test_a_replay_gives_what_the_run_gave(
    label: str,
    refused: Mapping[str, str],
    both: Both,
) -> None:
    if label in refused:
        return
    live, again = both
    assert_equal(live[label], again[label])


def test_most_chains_had_something_to_say(
    both: Both,
) -> None:
    """Equal because both are empty is no equality; rules that saw nothing wrong are."""
    silent = {label for label, frames in both[0].items() if not frames}
    rules = set(sl.operators.alerts.__all__) | {label for label in ALL if label.endswith(", soon")}
    assert silent <= rules | {"flight_recorder 1"}
    assert {"health", "nonfinite_values, soon", "health, soon", "when, on and off"} <= both[0].keys() - silent


@settings(
    max_examples=4,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    labels=st.sets(st.sampled_from(sorted(ALL)), min_size=1, max_size=4),
    schedule=st.builds(
        Schedule,
        epochs=st.integers(1, 3),
        steps=st.integers(1, 5),
        micro_steps=st.integers(1, 3),
        broken=st.none() | st.integers(0, 6),
    ),
)
def test_any_chains_over_any_run_give_what_they_gave_live(
    labels: set[str], schedule: Schedule, refused: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("runs") / "run.db"
    chains = {label: ALL[label] for label in sorted(labels - refused.keys())}
    live, again = record(path, schedule, chains), play(path, chains)
    for label in chains:
        assert_equal(live[label], again[label])
