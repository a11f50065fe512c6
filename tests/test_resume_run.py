"""Interrupted and resumed is the same as uninterrupted: the clock and the state of every chain."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex import operators as ops
from torch import Tensor, nn

import streamlens as sl
from streamlens.chain import ErrorReport
from streamlens.frame import Frame
from tests._runs import small_model

Chain = tuple[Any, ...]


def totalled(total: Tensor, frame: Frame) -> Tensor:
    assert isinstance(frame.values, Tensor)
    return total + frame.values


STATEFUL: dict[str, Callable[[], Chain]] = {
    "ema": lambda: (sl.norm("weights"), sl.ema(0.8)),
    "ema by half-life, corrected": lambda: (
        sl.uw_ratio(),
        sl.ema(half_life=2, bias_correction=True),
    ),
    "ema of raw weights": lambda: (sl.topic("weights"), sl.ema(0.5)),
    "tumbling window": lambda: (sl.norm("weight_gradients"), sl.window(3)),
    "sliding window of a function": lambda: (
        sl.norm("weight_gradients"),
        sl.window(4, 2, reduce=lambda values: values.amax(0)),
    ),
    "window of windows": lambda: (sl.norm("weights"), sl.window(2), sl.every(2), sl.ema(0.5)),
    "per epoch": lambda: (sl.norm("weights"), sl.per_epoch()),
    "diff": lambda: (sl.norm("weights"), sl.diff(2)),
    "scan": lambda: (sl.norm("weights"), sl.scan(totalled)),
    "smooth": lambda: (sl.norm("weights"), sl.smooth(1.0)),
    "micro-steps averaged": lambda: (sl.norm("activations"), sl.per_step(), sl.ema(0.5)),
    "loss smoothed": lambda: (sl.topic("loss"), sl.ema(0.5)),
    "joined": lambda: (sl.ratio("weight_updates", "weights"), sl.ema(0.9), sl.window(2)),
    "through an operator of reactivex": lambda: (
        sl.norm("weights"),
        ops.filter(lambda frame: frame.step % 3 != 1),
        sl.ema(0.5),
    ),
}


@dataclass
class Run:
    """A run that can be interrupted between any two micro-steps, with everything a checkpoint holds."""

    chains: dict[str, Callable[[], Chain]]
    micro_steps: int = 1
    subscribe_after_loading: bool = False
    frames: list[tuple[Any, ...]] = field(default_factory=list)
    done: int = 0

    def __post_init__(self) -> None:
        self.start(None)

    def start(self, checkpoint: bytes | None) -> None:
        """Make everything anew, as a new process does, and load a checkpoint."""
        self.model = small_model()
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.lens = sl.observe(self.model, loss=self.criterion)
        if not self.subscribe_after_loading:
            self.subscribe()
        if checkpoint is not None:
            saved = torch.load(io.BytesIO(checkpoint))
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            for name, parameter in self.model.named_parameters():
                parameter.grad = saved["gradients"][name]
            self.lens.load_state_dict(saved["lens"])
        if self.subscribe_after_loading:
            self.subscribe()

    def subscribe(self) -> None:
        for label, chain in self.chains.items():

            def note(frame: Frame, label: str = label) -> None:
                values = {layer: value.tolist() for layer, value in frame.items()}
                self.frames.append((label, frame.topic, frame.step, frame.epoch, frame.micro_step, values))

            self.lens.pipe(*chain()).subscribe(note)

    def interrupt(self) -> None:
        """Save, lose everything, load."""
        file = io.BytesIO()
        gradients = {name: p.grad for name, p in self.model.named_parameters()}
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "gradients": gradients,
                "lens": self.lens.state_dict(),
            },
            file,
        )
        before = len(self.frames)
        self.lens.close()
        # What an interrupted process would still give at its end is not part of its run.
        del self.frames[before:]
        self.start(file.getvalue())

    def go_on(self, micro_steps: int, epoch: int) -> None:
        """Train; an epoch ends after every `epoch` steps."""
        for _ in range(micro_steps):
            data = torch.Generator().manual_seed(self.done)
            x = torch.randn(4, 4, generator=data)
            y = torch.randint(0, 3, (4,), generator=data)
            if self.done % self.micro_steps == 0:
                self.optimizer.zero_grad()
            (self.criterion(self.model(x), y) / self.micro_steps).backward()
            self.done += 1
            if self.done % self.micro_steps == 0:
                self.optimizer.step()
                if self.done // self.micro_steps % epoch == 0:
                    self.lens.epoch_finished()


def whole(chains: dict[str, Callable[[], Chain]], parts: list[int], micro_steps: int, epoch: int) -> Run:
    run = Run(chains, micro_steps)
    run.go_on(sum(parts), epoch)
    return run


@pytest.mark.filterwarnings("error")
@settings(max_examples=7, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.integers(0, 5), min_size=2, max_size=4),
    micro_steps=st.integers(1, 3),
    epoch=st.integers(1, 4),
    late=st.booleans(),
)
def test_interrupted_and_resumed_is_uninterrupted(
    parts: list[int], micro_steps: int, epoch: int, late: bool
) -> None:
    expected = whole(STATEFUL, parts, micro_steps, epoch)
    run = Run(STATEFUL, micro_steps, subscribe_after_loading=late)
    reports: list[ErrorReport] = []
    for i, part in enumerate(parts):
        if i:
            run.interrupt()
        run.lens.errors.subscribe(reports.append)
        run.go_on(part, epoch)
    assert reports == []
    assert run.frames == expected.frames
    assert (run.lens.current_step, run.lens.epoch) == (expected.lens.current_step, expected.lens.epoch)
    run.lens.close()
    expected.lens.close()


@pytest.mark.parametrize("label", list(STATEFUL))
def test_every_chain_with_state_needs_its_state_to_go_on(label: str) -> None:
    """Without loading it the frames differ: the property above is no accident."""
    chains = {label: STATEFUL[label]}
    expected = whole(chains, [5, 6], 1, 4)
    run = Run(chains)
    run.go_on(5, 4)
    state = copy.deepcopy(run.lens.state_dict())
    run.interrupt()
    forgetful = run.lens.state_dict()
    assert forgetful["chains"].keys() == state["chains"].keys()
    run.lens.load_state_dict({**state, "chains": {}})
    run.lens.close()
    run.start(None)
    run.lens.load_state_dict({**state, "chains": {}})
    run.go_on(6, 4)
    assert run.frames != expected.frames


def test_the_state_is_plain_containers_and_tensors() -> None:
    run = Run(STATEFUL)
    run.go_on(5, 3)
    state = run.lens.state_dict()

    def check(value: Any) -> None:
        assert type(value) in {dict, list, tuple, str, int, float, bool, type(None), Tensor}, type(value)
        if isinstance(value, dict):
            assert all(type(key) in {str, int} for key in value)
            for entry in value.values():
                check(entry)
        elif isinstance(value, list | tuple):
            for entry in value:
                check(entry)

    check(state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    torch.load(file, weights_only=True)
    run.lens.close()


def test_taking_a_snapshot_changes_nothing_and_the_run_does_not_change_it() -> None:
    expected = whole(STATEFUL, [4, 4], 1, 3)
    run = Run(STATEFUL)
    run.go_on(4, 3)
    snapshot = run.lens.state_dict()
    frozen = io.BytesIO()
    torch.save(snapshot, frozen)
    run.go_on(4, 3)
    later = io.BytesIO()
    torch.save(snapshot, later)
    assert run.frames == expected.frames
    assert frozen.getvalue() == later.getvalue(), "the snapshot is of its moment, however long it is kept"
    run.lens.close()
    expected.lens.close()


def smoothed(lens: sl.Lens, into: list[float], **options: Any) -> None:
    lens.pipe(sl.norm("weights"), sl.ema(0.5)).subscribe(
        lambda frame: into.append(frame["0"].item()), **options
    )


def step(model: nn.Sequential, optimizer: torch.optim.Optimizer, count: int = 1) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()


def test_equal_plans_are_told_apart_by_an_ordinal() -> None:
    """The second chain began later, so that its state differs from the first one's."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    first: list[float] = []
    second: list[float] = []
    with sl.observe(model) as lens:
        smoothed(lens, first)
        step(model, optimizer, 2)
        smoothed(lens, second)
        step(model, optimizer, 2)
        assert first[-1] != second[-1]
        state = lens.state_dict()
        assert len(state["chains"]) == 2
    twin = copy.deepcopy(model)
    resumed: list[list[float]] = [[], []]
    with sl.observe(twin) as lens:
        for into in resumed:
            smoothed(lens, into)
        lens.load_state_dict(state)
        step(twin, torch.optim.SGD(twin.parameters(), lr=0.01))
    weight = twin.get_parameter("0.weight").detach().norm().item()
    assert resumed[0] == pytest.approx([0.5 * first[-1] + 0.5 * weight])
    assert resumed[1] == pytest.approx([0.5 * second[-1] + 0.5 * weight])


def test_a_name_keys_a_chain_whatever_the_order_of_subscription() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    values: dict[str, list[float]] = {"a": [], "b": []}
    with sl.observe(model) as lens:
        smoothed(lens, values["a"], name="a")
        step(model, optimizer, 2)
        smoothed(lens, values["b"], name="b")
        step(model, optimizer, 2)
        state = lens.state_dict()
        assert set(state["chains"]) == {"a", "b"}
    twin = copy.deepcopy(model)
    resumed: dict[str, list[float]] = {"a": [], "b": []}
    with sl.observe(twin) as lens:
        lens.load_state_dict(state)
        for name in ("b", "a"):
            smoothed(lens, resumed[name], name=name)
        step(twin, torch.optim.SGD(twin.parameters(), lr=0.01))
    weight = twin.get_parameter("0.weight").detach().norm().item()
    for name in ("a", "b"):
        assert resumed[name] == pytest.approx([0.5 * values[name][-1] + 0.5 * weight])


def test_a_derived_topic_resumes_with_the_chain_that_makes_it() -> None:
    def run(interrupted: bool) -> list[float]:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        values: list[float] = []
        state = None
        for count in (3, 3) if interrupted else (6,):
            with sl.observe(model, start=0) as lens:
                lens.derive("smooth", lens.pipe(sl.norm("weights"), sl.ema(0.5)))
                lens.pipe(sl.topic("smooth"), sl.window(2)).subscribe(lambda f: values.append(f["0"].item()))
                if state is not None:
                    lens.load_state_dict(state)
                step(model, optimizer, count)
                state = lens.state_dict()
        return values

    assert run(interrupted=True) == run(interrupted=False)


def test_two_optimizers_resume_with_one_frame_a_step() -> None:
    """Which optimizers step together is part of what a run knows."""

    def run(interrupted: bool) -> list[tuple[int, tuple[str, ...]]]:
        model = small_model()
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.01) for part in (model[0], model[2])]
        frames: list[tuple[int, tuple[str, ...]]] = []
        state = None
        for count in (3, 2) if interrupted else (5,):
            with sl.observe(model, start=0) as lens:
                lens.pipe(sl.norm("weight_updates")).subscribe(lambda f: frames.append((f.step, f.layers)))
                if state is not None:
                    lens.load_state_dict(state)
                for _ in range(count):
                    model.zero_grad()
                    model(torch.ones(2, 4)).square().sum().backward()
                    for optimizer in optimizers:
                        optimizer.step()
                state = lens.state_dict()
        return frames

    expected = run(interrupted=False)
    assert expected[-1] == (4, ("0", "2"))
    assert run(interrupted=True) == expected


def test_equal_plans_with_foreign_operators_warn_and_a_name_silences_it() -> None:
    model = small_model()
    with sl.observe(model) as lens:
        chain = lens.pipe(sl.norm("weights"), ops.map(lambda frame: frame), sl.ema(0.5))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            chain.subscribe(print)
            chain.subscribe(print, name="second")
        with pytest.warns(UserWarning, match=r"name=") as caught:
            chain.subscribe(print)
        assert caught[0].filename == __file__, "the warning points at the caller"


def test_a_name_that_another_chain_has_is_refused_until_that_one_is_disposed() -> None:
    model = small_model()
    with sl.observe(model) as lens:
        first = lens.pipe(sl.norm("weights"), sl.ema(0.5)).subscribe(print, name="mine")
        with pytest.raises(sl.StreamlensError, match=r"'mine'.*another name"):
            lens.pipe(sl.uw_ratio(), sl.ema(0.5)).subscribe(print, name="mine")
        first.dispose()
        lens.pipe(sl.uw_ratio(), sl.ema(0.5)).subscribe(print, name="mine")
        assert list(lens.state_dict()["chains"]) == ["mine"]


def test_a_snapshot_that_does_not_fit_a_chain_is_reported_and_the_chain_begins_afresh() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("weights"), sl.ema(0.5)).subscribe(print, name="mine")
        step(model, optimizer)
        state = lens.state_dict()
    values: list[float] = []
    reports: list[ErrorReport] = []
    with sl.observe(model) as lens:
        lens.errors.subscribe(reports.append)
        lens.load_state_dict(state)
        lens.pipe(sl.norm("weights"), sl.window(2)).subscribe(
            lambda frame: values.append(frame["0"].item()), name="mine"
        )
        assert len(reports) == 1
        assert "'mine'" in str(reports[0])
        step(model, optimizer, 3)
    assert values


def test_epochs_go_on_to_the_same_end_after_a_resume() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    epochs: list[int] = []
    with sl.observe(model) as lens:
        for epoch in lens.epochs(5):
            epochs.append(epoch)
            step(model, optimizer, 2)
            if epoch == 2:
                break
        state = lens.state_dict()
    assert state["clock"]["epoch"] == 2
    fresh = small_model()
    with sl.observe(fresh) as lens:
        lens.load_state_dict(state)
        lens.epoch_finished()
        epochs += lens.epochs(5)
    assert epochs == [0, 1, 2, 3, 4]


def test_a_resumed_run_keeps_its_id_and_says_where_it_went_on() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.observe(model) as lens:
        step(model, optimizer, 3)
        first, state = lens.engine.run_info(), lens.state_dict()
    other = small_model()
    with sl.observe(other) as lens:
        fresh = lens.engine.run_info()
        lens.load_state_dict(state)
        resumed = lens.engine.run_info()
    assert first.resumed_at is None
    assert fresh.id != first.id
    assert (resumed.id, resumed.resumed_at) == (first.id, 2)


@pytest.mark.parametrize("state", [{}, {"model": 1}, None, [1]])
def test_what_is_no_snapshot_is_refused_by_name(state: Any) -> None:
    model = small_model()
    with (
        sl.observe(model) as lens,
        pytest.raises(ValueError, match=r"load_state_dict\(\).*lens\.state_dict\(\)"),
    ):
        lens.load_state_dict(state)


def test_a_snapshot_of_another_version_is_refused_with_the_remedy() -> None:
    model = small_model()
    with sl.observe(model) as lens:
        state = {**lens.state_dict(), "version": 99}
        with pytest.raises(ValueError, match=r"version 99.*use the one"):
            lens.load_state_dict(state)
