"""Nothing is captured, copied or computed that nobody asked for; what several ask for is computed once."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex.subject import Subject
from torch import Tensor, nn

import streamlens as sl
from streamlens.frame import Frame
from streamlens.reductions import Reduction
from streamlens.topics import TOPICS
from tests._runs import small_model, steps_of
from tests.helpers.operations import Operations
from tests.helpers.recording import observed, record


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The operations of one training step."""
    names: list[str] = []
    with Operations(names):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    return names


def steps_of_operations(
    count: int, subscribe: Callable[[sl.Lens], object] | None, *, close: bool = False
) -> list[list[str]]:
    """The operations of each of some steps under a lens; without one if there is nothing to subscribe."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    step_of(model, optimizer)
    lens = None if subscribe is None else sl.observe(model)
    if lens is not None and subscribe is not None:
        subscribe(lens)
        if close:
            lens.close()
    found = [step_of(model, optimizer) for _ in range(count)]
    if lens is not None:
        lens.close()
    return found


def ignore(frame: object) -> None:
    pass


def nothing(lens: sl.Lens) -> None:
    pass


def and_away(lens: sl.Lens) -> None:
    for topic in TOPICS:
        lens.pipe(sl.topic(topic)).subscribe(ignore).dispose()


def only_derived(lens: sl.Lens) -> None:
    lens.derive("mine", lens.pipe(sl.uw_ratio(), sl.ema(0.5)))


def late(lens: sl.Lens) -> None:
    lens.pipe(sl.topic(*TOPICS), sl.between(100)).subscribe(ignore)


@pytest.mark.parametrize("subscribe", [nothing, and_away, only_derived, late])
def test_without_a_demand_a_step_runs_exactly_the_operations_of_an_unobserved_one(
    subscribe: Callable[[sl.Lens], object],
) -> None:
    assert steps_of_operations(3, subscribe) == steps_of_operations(3, None)


def test_a_closed_lens_leaves_exactly_the_operations_of_an_unobserved_step() -> None:
    def everything(lens: sl.Lens) -> None:
        for topic in TOPICS:
            lens.pipe(sl.topic(topic)).subscribe(ignore)

    assert steps_of_operations(2, everything, close=True) == steps_of_operations(2, None)
    assert steps_of_operations(2, everything) != steps_of_operations(2, None)


@pytest.mark.parametrize(
    "topic", ["weight_updates", "weights", "weight_gradients", "activations", "raw_gradients"]
)
def test_steps_that_the_cadence_skips_run_exactly_the_operations_of_an_unobserved_step(topic: str) -> None:
    plain = steps_of_operations(7, None)
    observed = steps_of_operations(7, lambda lens: lens.pipe(sl.norm(topic), sl.every(3)).subscribe(ignore))
    assert [a == b for a, b in zip(observed, plain, strict=True)] == [
        False, True, True, False, True, True, False
    ]  # fmt: skip


def test_updates_at_every_step_keep_one_copy_and_copy_each_parameter_once_a_step() -> None:
    copies = ("aten.copy_.default", "aten.clone.default", "aten._foreach_copy_.default")
    big = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 150))
    optimizer = torch.optim.SGD(big.parameters(), lr=0.01)

    def step() -> Counter[str]:
        names: list[str] = []
        with Operations(names):
            optimizer.zero_grad()
            big(torch.ones(2, 200)).sum().backward()
            optimizer.step()
        return Counter(names)

    plain = step()
    with sl.observe(big) as lens:
        lens.pipe(sl.norm("weight_updates")).subscribe(ignore)
        step()
        with_copy = [step() for _ in range(3)]
        size = sum(layer.weight.numel() * 4 for layer in big if isinstance(layer, nn.Linear))
        assert f"bytes held: {size:,}" in lens.explain()
    extra = [sum(counts[name] - plain[name] for name in copies) for counts in with_copy]
    assert max(extra) <= 2


def test_idle_lenses_put_no_hook_on_any_part() -> None:
    model = small_model()

    def on_parts() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.children())

    with sl.observe(model) as lens:
        assert on_parts() == 0
        weights = lens.pipe(sl.uw_ratio()).subscribe(ignore)
        assert on_parts() == 0
        activations = lens.pipe(sl.norm("activations")).subscribe(ignore)
        assert on_parts() > 0
        activations.dispose()
        assert on_parts() == 0
        weights.dispose()


@dataclass(frozen=True)
class Counted(Reduction):
    """A reduction that counts the tensors it is given, by shape."""

    label: str = "counted"

    @property
    def name(self) -> str:
        return self.label

    def reduce(self, tensors: Sequence[Tensor]) -> Tensor:
        COUNTS.update((self.label, tuple(t.shape)) for t in tensors)
        return torch.stack([t.sum() for t in tensors])


COUNTS: Counter[tuple[str, tuple[int, ...]]] = Counter()


@pytest.fixture(autouse=True)
def _counts() -> None:
    COUNTS.clear()


@pytest.mark.parametrize(
    "topic", ["weights", "weight_gradients", "weight_updates", "activations", "layer_gradients"]
)
def test_an_equal_reduction_is_computed_once_however_many_chains_use_it(topic: str) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    received: list[list[Any]] = [[], [], []]
    with sl.observe(model) as lens:
        for into in received:

            def note(frame: Frame, into: list[Any] = into) -> None:
                into.append(frame.to_dict())

            lens.narrow(topics=(topic,), reduction=Counted()).subscribe(note)
        for _ in range(2):
            step_of(model, optimizer)
        assert "shared by 3" in lens.explain()
    assert received[0] == received[1] == received[2]
    assert len(received[0]) == 2
    assert sum(COUNTS.values()) == sum(map(len, received[0])), "one computation a layer and step"


def test_demands_are_united_and_what_none_of_them_wants_is_not_computed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 5), nn.Linear(5, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    layers: dict[str, set[tuple[str, ...]]] = {"a": set(), "b": set()}
    with sl.observe(model) as lens:
        for label, globs in (("a", ("0", "1")), ("b", ("1", "2"))):

            def note(frame: Frame, label: str = label) -> None:
                layers[label].add(frame.layers)

            chain: sl.Lens = lens.pipe(sl.layers(*globs))
            chain.narrow(topics=("weights",), reduction=Counted()).subscribe(note)
        for _ in range(3):
            step_of(model, optimizer)
    assert layers == {"a": {("0", "1")}, "b": {("1", "2")}}
    assert COUNTS == {("counted", (3, 4)): 3, ("counted", (2, 3)): 3, ("counted", (5, 2)): 3}


def test_different_reductions_of_one_topic_do_not_disturb_each_other() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    operators = [sl.norm(), sl.norm(order=1), sl.mean(), sl.var(), sl.rms(), sl.minimum(), sl.maximum()]
    alone: list[Any] = []
    together: list[Any] = []

    def subscribe(lens: sl.Lens, operator: sl.Operator, into: list[Any]) -> None:
        lens.pipe(sl.topic("weights"), operator).subscribe(lambda f: into.append((f.topic, f.to_dict())))

    step_of(model, optimizer)
    with torch.no_grad():
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    for operator in operators:
        with sl.observe(model) as lens:
            subscribe(lens, operator, alone)
            step_of(model, optimizer)
    with sl.observe(model) as lens:
        for operator in operators:
            subscribe(lens, operator, together)
        step_of(model, optimizer)
    assert [topic for topic, _ in together] == [topic for topic, _ in alone]
    for (_, some), (_, others) in zip(together, alone, strict=True):
        assert some == pytest.approx(others, rel=1e-6)


PARTS: dict[str, sl.Operator] = {
    "topic": sl.topic("weights", "weight_gradients"),
    "layers": sl.layers("0", "4*"),
    "every": sl.every(2),
    "between": sl.between(1, 5),
}


@settings(max_examples=10, deadline=None, derandomize=True)
@given(order=st.permutations(list(PARTS)), reduced=st.booleans())
def test_what_is_pushed_down_gives_what_filtering_all_frames_gives(order: list[str], reduced: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    operators = [*(PARTS[name] for name in order), *([sl.norm()] if reduced else [])]
    pushed: list[Any] = []
    filtered: list[Any] = []

    def note(into: list[Any]) -> Callable[[Frame], None]:
        return lambda f: into.append((f.topic, f.step, {name: v.tolist() for name, v in f.items()}))

    everything: Subject[Frame] = Subject()
    with sl.observe(model) as lens:
        chain = lens.pipe(*operators)
        assert isinstance(chain, sl.Lens)
        chain.subscribe(note(pushed))
        plain: Any = everything
        for operator in operators:
            plain = operator(plain)
        plain.subscribe(note(filtered))
        lens.pipe(sl.topic("weights", "weight_gradients", "biases")).subscribe(everything.on_next)
        for _ in range(7):
            step_of(model, optimizer)
    assert len(pushed) == 4
    assert [p[:2] for p in pushed] == [f[:2] for f in filtered]
    for (_, _, some), (_, _, others) in zip(pushed, filtered, strict=True):
        assert some.keys() == others.keys() == {"0", "4"}
        for name, value in some.items():
            assert torch.allclose(torch.tensor(value), torch.tensor(others[name]), rtol=1e-6)


def test_cadences_combine_to_their_least_common_multiple() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    steps: list[int] = []
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("weights"), sl.every(2), sl.every(3)).subscribe(lambda f: steps.append(f.step))
        for _ in range(13):
            step_of(model, optimizer)
    assert steps == [0, 6, 12]


def test_narrowing_gives_a_new_lens_and_leaves_the_old_one_as_it_was() -> None:
    model = small_model()
    with sl.observe(model) as lens:
        weights = lens.pipe(sl.topic("weights"))
        some = weights.pipe(sl.layers("0"), sl.every(2))
        assert [type(x) for x in (weights, some)] == [sl.Lens, sl.Lens]
        assert lens.topics == ()
        assert weights.plan_text == "observe() | topic('weights')"
        assert some.plan_text == "observe() | topic('weights') | layers('0') | every(2)"


@pytest.mark.parametrize("order", list(itertools.permutations(range(2))))
def test_two_chains_of_different_cadence_get_each_their_own(order: Sequence[int]) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    steps: dict[int, list[int]] = {2: [], 3: []}
    norms: dict[int, dict[int, float]] = {2: {}, 3: {}}
    updates: dict[int, float] = {}
    with sl.observe(model) as lens:
        for i in order:
            n = (2, 3)[i]

            def note(frame: Frame, n: int = n) -> None:
                steps[n].append(frame.step)
                norms[n][frame.step] = frame["0"].item()

            lens.pipe(sl.norm("weight_updates"), sl.every(n)).subscribe(note)
        for step in range(8):
            before = model.get_parameter("0.weight").detach().clone()
            step_of(model, optimizer)
            updates[step] = (model.get_parameter("0.weight").detach() - before).norm().item()
    assert steps == {2: [0, 2, 4, 6], 3: [0, 3, 6]}
    for by_step in norms.values():
        assert by_step == pytest.approx({step: updates[step] for step in by_step}, rel=1e-5)


def test_what_has_come_to_its_end_leaves_no_hooks_and_no_copies() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with observed(model) as lens:
        bare = lens.engine.hook_counts()
        frames = record(lens, sl.between(0, 2), sl.norm("activations"))
        record(lens, sl.between(0, 2), sl.norm("weight_updates"))
        before = lens.state_dict()
        assert lens.engine.hook_counts() != bare
        for _ in steps_of(model, optimizer, 4):
            pass
        assert lens.engine.hook_counts() == bare
        assert lens.engine.updates.bytes_held == 0
        # Back before the end, it is wanted again.
        lens.load_state_dict(before)
        for _ in steps_of(model, optimizer, 4):
            pass
    assert [frame.step for frame in frames] == [0, 1, 0, 1]
