"""Observing a run does not change a bit of it."""

from __future__ import annotations

import contextlib
import functools
import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import streamlens as sl
from streamlens.frame import Frame
from tests._runs import ARCHITECTURES, OPTIMIZERS, Recipe, same, train
from tests.helpers.shipped import EVERY_TOPIC, NAMES, REDUCIBLE, STATES, chains_of

Observing = Callable[[nn.Module, nn.Module], contextlib.AbstractContextManager[Any]]
Seen = dict[str, set[str]]
"""The topics that came out of the chains of each operator."""


def read(frame: Frame | sl.AlignedFrame) -> None:
    """Look at every number of a frame, as a subscriber would."""
    if isinstance(frame, sl.AlignedFrame):
        for part in frame.frames:
            read(part)
        return
    for _, value in frame.items():
        value.float().sum() if value.layout is torch.strided else value.coalesce()


@contextlib.contextmanager
def everything(model: nn.Module, criterion: nn.Module) -> Iterator[Seen]:
    """Every topic raw and reduced, and every shipped operator, subscribed; gives what was seen."""
    seen: Seen = defaultdict(set)
    failures: list[Exception] = []

    def deliver(frame: Any, name: str) -> None:
        read(frame)
        seen[name].update(frame if isinstance(frame, sl.AlignedFrame) else [frame.topic])

    with sl.observe(model, loss=criterion) as lens:
        lens.errors.subscribe(lambda report: failures.append(report.error))
        recorders: list[sl.FlightRecorder] = []
        for name in NAMES:
            for chain in chains_of(name, lens):
                lens.pipe(*chain).subscribe(functools.partial(deliver, name=name))
                recorders += [part for part in chain if isinstance(part, sl.FlightRecorder)]
        yield seen
        for recorder in recorders:
            recorder.dump()
    # What is said on purpose (an overwritten activation, a state that this optimizer lacks) is no failure;
    # nor is that reentrant checkpointing has no second derivatives.
    unexpected = [e for e in failures if not isinstance(e, sl.StreamlensError)]
    assert [e for e in unexpected if "use_reentrant=True" not in str(e)] == []


OPTIMIZER_OF = {
    "convolutions": "momentum",
    "sparse embedding": "sgd",
    "recurrent": "adamw",
    "reused": "momentum",
}


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_every_topic_and_operator_leaves_each_model_bit_identical(architecture: str) -> None:
    compare(Recipe(architecture, OPTIMIZER_OF.get(architecture, "adam"), steps=2, evaluate=True))


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_every_topic_and_operator_leaves_each_optimizer_bit_identical(optimizer: str) -> None:
    compare(Recipe("linear", optimizer, steps=2))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("convolutions", "momentum", accumulation=3, clip=0.5),
        Recipe("attention", "adamw", autocast=True, scaler=True, clip=0.5),
        Recipe("checkpointed", "adam", accumulation=2, autocast=True),
        Recipe("reused", "adam, fused", scaler=True),
        Recipe("convolutions", "adam", closure=True),
    ],
    ids=[
        "accumulation and clipping",
        "autocast, scaler and clipping",
        "checkpointing under autocast",
        "scaler and fused optimizer",
        "closure",
    ],
)
def test_ways_to_train_stay_bit_identical(recipe: Recipe) -> None:
    compare(recipe)


RECIPES = st.builds(
    Recipe,
    architecture=st.sampled_from([a for a in ARCHITECTURES if a != "sparse embedding"]),
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    steps=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    clip=st.sampled_from([None, 0.1]),
    autocast=st.booleans(),
    closure=st.booleans(),
    evaluate=st.booleans(),
    seed=st.integers(0, 9),
)


@pytest.mark.soak
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(recipe=RECIPES)
def test_any_recipe_under_every_operator_stays_bit_identical(recipe: Recipe) -> None:
    compare(recipe)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    recipe=RECIPES,
    topics=st.sets(st.sampled_from(EVERY_TOPIC), min_size=1, max_size=6),
    cadence=st.integers(1, 3),
)
def test_any_recipe_under_any_demand_stays_bit_identical(
    recipe: Recipe, topics: set[str], cadence: int
) -> None:
    @contextlib.contextmanager
    def some(model: nn.Module, criterion: nn.Module) -> Iterator[None]:
        with sl.observe(model, loss=criterion) as lens:
            for topic in sorted(topics):
                lens.pipe(sl.topic(topic), sl.every(cadence)).subscribe(read)
                if topic in REDUCIBLE:
                    lens.pipe(sl.topic(topic), sl.norm(), sl.ema(0.5)).subscribe(read)
            yield

    compare(recipe, some)


def compare(recipe: Recipe, observing: Observing = everything) -> None:
    with warnings.catch_warnings():
        # Warnings of PyTorch about the recipe itself come with and without observing.
        warnings.simplefilter("ignore")
        alone = train(recipe)
        watched = train(recipe, observing)
    for part, value in vars(alone).items():
        assert same(value, vars(watched)[part]), f"{part} differ"


def test_the_comparison_sees_a_single_bit_and_a_single_draw() -> None:
    @contextlib.contextmanager
    def nudge(model: nn.Module, criterion: nn.Module) -> Iterator[None]:
        yield
        with torch.no_grad():
            next(model.parameters()).view(-1)[0].nextafter_(torch.tensor(9.0))

    @contextlib.contextmanager
    def draw(model: nn.Module, criterion: nn.Module) -> Iterator[None]:
        random.random()
        yield

    recipe = Recipe("linear", "adam")
    assert same(train(recipe), train(recipe))
    assert not same(train(recipe), train(recipe, nudge))
    assert not same(train(recipe), train(recipe, draw))


def test_everything_really_is_everything() -> None:
    """Every topic comes, and every operator gives something, but for rules where nothing is wrong."""
    found: Seen = defaultdict(set)

    @contextlib.contextmanager
    def noting(model: nn.Module, criterion: nn.Module) -> Iterator[None]:
        with everything(model, criterion) as seen:
            yield
        found.update(seen)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(Recipe("convolutions", "adam", steps=4, accumulation=2), noting)
    assert set(NAMES) - set(found) <= set(sl.operators.alerts.__all__)
    missing = set(EVERY_TOPIC) - set().union(*found.values())
    assert missing == {"epoch_started", "epoch_finished", STATES[0]}


def test_an_operator_that_no_chain_has_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh(size: int) -> sl.Operator:
        return sl.ema(size)

    monkeypatch.setattr(sl, "fresh", fresh, raising=False)
    with sl.observe(nn.Linear(2, 2)) as lens, pytest.raises(AssertionError, match=r"fresh\(\) needs size"):
        chains_of("fresh", lens)


def test_an_overflow_is_no_step_and_changes_nothing() -> None:
    def run(observing: bool) -> tuple[Tensor, list[int]]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        steps: list[int] = []
        with sl.observe(model) if observing else contextlib.nullcontext() as lens:
            if lens is not None:
                lens.pipe(sl.norm("weight_updates")).subscribe(lambda frame: steps.append(frame.step))
            for scale in (1.0, float("inf"), 1.0):
                optimizer.zero_grad()
                scaler.scale((model(torch.ones(2, 3)) * scale).sum()).backward()
                scaler.step(optimizer)
                scaler.update()
        return model.weight.detach().clone(), steps

    (alone, _), (watched, steps) = run(observing=False), run(observing=True)
    assert same(alone, watched)
    assert steps == [0, 1]
