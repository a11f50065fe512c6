"""Observing a run does not change a bit of it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import streamlens as sl
from streamlens.frame import Frame
from streamlens.topics import TOPICS
from tests._runs import ARCHITECTURES, OPTIMIZERS, Recipe, same, train

STATES = [sl.optimizer_state(key) for key in ("momentum_buffer", "exp_avg", "exp_avg_sq", "step")]
EVERY_TOPIC = [*TOPICS, *STATES]
REDUCIBLE = [name for name in EVERY_TOPIC if name in STATES or TOPICS[name].raw]

Observing = Callable[[nn.Module, nn.Module], contextlib.AbstractContextManager[Any]]


def read(frame: Frame | sl.AlignedFrame) -> None:
    """Look at every number of a frame, as a subscriber would."""
    if isinstance(frame, sl.AlignedFrame):
        for part in frame.frames:
            read(part)
        return
    for _, value in frame.items():
        value.float().sum() if value.layout is torch.strided else value.coalesce()


@contextlib.contextmanager
def everything(model: nn.Module, criterion: nn.Module) -> Iterator[list[str]]:
    """Every topic raw and reduced, and every operator, subscribed; gives the topics seen."""
    seen: list[str] = []
    failures: list[Exception] = []

    def deliver(frame: Any) -> None:
        read(frame)
        seen.extend(frame if isinstance(frame, sl.AlignedFrame) else [frame.topic])

    with sl.observe(model, loss=criterion) as lens:
        lens.errors.subscribe(lambda report: failures.append(report.error))
        for topic in EVERY_TOPIC:
            lens.pipe(sl.topic(topic)).subscribe(deliver)
        for chain in (*chains(), *of_defaults(lens)):
            lens.pipe(*chain).subscribe(deliver)
        yield seen
    # What is said on purpose (an overwritten activation, a state that this optimizer lacks) is no failure.
    assert [e for e in failures if not isinstance(e, sl.StreamlensError)] == []


def of_defaults(lens: sl.Lens) -> Iterator[tuple[sl.Operator, ...]]:
    """Every operator that needs no argument: on all that can be reduced, or on the lens as it is."""
    raw = functools.partial(sl.topic, *REDUCIBLE)
    for name in sl.operators.__all__:
        make = getattr(sl, name)
        if isinstance(make, type) or any(
            p.default is p.empty and p.kind is not p.VAR_POSITIONAL
            for p in inspect.signature(make).parameters.values()
        ):
            continue
        chains: list[tuple[Callable[[], sl.Operator], ...]] = [(raw, make), (raw, sl.norm, make), (make,)]
        for chain in chains:
            try:
                operators = tuple(part() for part in chain)
                lens.pipe(*operators)
            except (sl.StreamlensError, TypeError):
                continue
            yield operators
            break


def chains() -> list[tuple[sl.Operator, ...]]:
    """Operators with their options."""
    return [
        (sl.topic(*REDUCIBLE), sl.norm(order=1)),
        (sl.topic(*REDUCIBLE), sl.norm(order=float("inf"))),
        (sl.topic(*REDUCIBLE), sl.percentile_bands(sample=5)),
        (sl.topic(*REDUCIBLE), sl.histogram(bins=8, range=(-1, 1))),
        (sl.uw_ratio(), sl.ema(0.9)),
        (sl.uw_ratio(of="parameters", relative_to="before"), sl.smooth(1.0)),
        (sl.ratio("weight_gradients", "weights"), sl.ema(half_life=3, bias_correction=True)),
        (sl.reduce(lambda value: value.float().abs().sum(), "parameter_gradients", name="size"),),
        (sl.norm("weights"), sl.scan(lambda total, frame: total + frame.values)),
        (sl.norm("weight_gradients"), sl.window(2, reduce="max"), sl.every(2)),
        (sl.norm("weight_gradients"), sl.window(2, 1, reduce=lambda values: values.var(0))),
        (sl.norm("activations"), sl.per_step(), sl.ema(0.5)),
        (sl.topic("loss"), sl.ema(0.5), sl.per_epoch()),
        (sl.align("weights", "weight_updates"),),
        (sl.combine(sl.norm("weights"), "loss", fn=torch.mul, name="product"),),
        (sl.layers(depth=-1), sl.topic("activations"), sl.std(), sl.rename("spread")),
        (sl.topic("weights"), sl.per_layer(), sl.where(lambda frame: frame.step > 0)),
        (sl.norm("weights"), sl.across_layers("mean")),
        (sl.topic("weights"), sl.between(1, 3), sl.ema(0.9)),
        (sl.topic("weights"), sl.layers(nn.Module), sl.every(2), sl.diff()),
    ]


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
    compare(Recipe("linear", optimizer))


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


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    recipe=st.builds(
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
    ),
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
    topics: set[str] = set()

    @contextlib.contextmanager
    def noting(model: nn.Module, criterion: nn.Module) -> Iterator[None]:
        with everything(model, criterion) as seen:
            yield
        topics.update(seen)

    train(Recipe("convolutions", "adam", steps=4), noting)
    missing = set(EVERY_TOPIC) - topics - {"epoch_started", "epoch_finished", STATES[0]}
    assert not missing
    assert {"uw_ratio.ema", "spread", "weights.norm2.diff", "activations.norm2.ema"} <= topics


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
