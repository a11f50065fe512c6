"""What if: rules with other thresholds, and controllers, over runs that are over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import streamlens as sl
from streamlens.control import ClipAt, Controller, Freeze, RatioLR, ReduceOnPlateau, Rollback, Stop
from streamlens.frame import Frame
from streamlens.sinks import RunStore
from tests._runs import small_model

RATE = 0.1
STEPS = 12


def stand_in() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1)], lr=RATE)


Make = Callable[[torch.optim.Optimizer], Controller]

CONTROLLERS: dict[str, tuple[Callable[[], Any], Make]] = {
    "RatioLR": (sl.uw_ratio, lambda opt: RatioLR(opt, dry_run=True)),
    "RatioLR, current": (sl.uw_ratio, lambda opt: RatioLR(opt, mode="current", slew_limit=2, dry_run=True)),
    "ReduceOnPlateau": (
        lambda: sl.topic("loss"),
        lambda opt: ReduceOnPlateau(opt, patience=1, cooldown=1, dry_run=True),
    ),
    "Stop": (lambda: sl.topic("loss"), lambda opt: Stop(1, dry_run=True)),
}


def record(path: Path, *, rate: float = RATE) -> dict[str, list[Frame]]:
    """Store a run; what controllers that only watched said meanwhile, and what `health()` did."""
    model, criterion = small_model(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    said: dict[str, list[Frame]] = {}
    generator = torch.Generator().manual_seed(0)
    with sl.observe(model, loss=criterion, on_error="raise") as lens:
        store = RunStore(path)
        for chain in (sl.topic("loss", "learning_rate"), sl.norm("weights"), sl.norm("weight_updates")):
            lens.pipe(chain).subscribe(store)
        lens.pipe(sl.norm("weight_gradients")).subscribe(store)
        for name, (select, make) in CONTROLLERS.items():
            end(lens, select(), make(optimizer), said.setdefault(name, []))
        lens.pipe(watch()).subscribe(said.setdefault("health", []).append)
        for _ in range(STEPS):
            x, y = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    return said


def end(lens: sl.Lens, chain: Any, controller: Controller, said: list[Frame]) -> None:
    controller.actions.subscribe(said.append)
    lens.pipe(chain).subscribe(controller)


def watch(low: float = 1e-3, high: float = 2e-3) -> Any:
    return sl.health(
        sl.ratio_out_of_band(band=(low, high), every=1, start=(1, 1), end=2), sl.unchanged_weights()
    )


def told(frames: list[Frame]) -> list[tuple[Any, ...]]:
    return [(f.topic, f.step, f.epoch, f.layers, f.to_dict(), dict(f.meta)) for f in frames]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Frame]]]:
    path = tmp_path_factory.mktemp("what-if") / "run.db"
    return path, record(path)


@pytest.mark.parametrize("name", CONTROLLERS)
def test_controllers_say_over_a_replay_what_they_said_live(
    name: str, run: tuple[Path, dict[str, list[Frame]]]
) -> None:
    path, live = run
    chain, make = CONTROLLERS[name]
    said: list[Frame] = []
    with sl.replay(path, on_error="raise") as replay:
        optimizer = stand_in()
        end(replay, chain(), make(optimizer), said)
        assert replay.play()
    assert said
    assert all(frame.meta["dry_run"] for frame in said)
    assert told(said) == told(live[name])
    assert optimizer.param_groups[0]["lr"] == RATE


def test_another_setting_of_a_controller_is_tried_on_an_old_run(
    run: tuple[Path, dict[str, list[Frame]]],
) -> None:
    """Which rate the law asks for is computed by hand from the ratios stored."""
    targets = (1e-3, 1e-2)
    said: dict[float, list[Frame]] = {target: [] for target in targets}
    ratios: list[Frame] = []
    with sl.replay(run[0], on_error="raise") as replay:
        for target in targets:
            controller = RatioLR(stand_in(), target=target, smoothing=0.5, dry_run=True)
            end(replay, sl.uw_ratio(), controller, said[target])
        replay.pipe(sl.uw_ratio()).subscribe(ratios.append)
        replay.play()
    for target in targets:
        mean, expected = 0.0, []
        for frame in ratios:
            mean = 0.5 * sum(frame.to_dict().values()) / len(frame) + 0.5 * mean
            expected.append(RATE * target / mean)
        assert [f.meta["new"] for f in said[target]] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "chain"),
    [
        (lambda: RatioLR(stand_in()), sl.uw_ratio()),
        (lambda: Stop(3), sl.topic("loss")),
        (lambda: ReduceOnPlateau(stand_in()), sl.topic("loss")),
    ],
)
def test_a_run_that_is_over_cannot_be_steered(
    make: Callable[[], Controller], chain: Any, run: tuple[Path, dict[str, list[Frame]]]
) -> None:
    with (
        sl.replay(run[0]) as replay,
        pytest.raises(sl.StreamlensError, match=r"cannot act on a recorded run.*dry_run=True"),
    ):
        replay.pipe(chain).subscribe(make())


@pytest.mark.parametrize(
    ("make", "chain", "message"),
    [
        (lambda: ClipAt(dry_run=True), sl.norm("weight_gradients"), "ClipAt acts on gradients"),
        (lambda: Freeze(below=1.0, dry_run=True), sl.uw_ratio(), "Freeze acts on a model"),
        (lambda: Rollback(dry_run=True), sl.ratio_out_of_band(), "Rollback puts a model back"),
        (lambda: ReduceOnPlateau(dry_run=True), sl.topic("loss"), r"pass ReduceOnPlateau\(optimizer=...\)"),
    ],
)
def test_controllers_that_need_the_model_say_so_when_they_are_subscribed(
    make: Callable[[], Controller], chain: Any, message: str, run: tuple[Path, dict[str, list[Frame]]]
) -> None:
    with sl.replay(run[0]) as replay, pytest.raises(sl.StreamlensError, match=message):
        replay.pipe(chain).subscribe(make())


def alerts(path: Path, *rules: Any) -> tuple[list[Frame], str]:
    found: list[Frame] = []
    with sl.replay(path, on_error="raise") as replay:
        replay.pipe(*rules).subscribe(found.append)
        plan = replay.explain()
        replay.play()
    return found, plan


def test_health_over_a_replay_finds_what_it_found_live(run: tuple[Path, dict[str, list[Frame]]]) -> None:
    path, live = run
    found, _ = alerts(path, watch())
    assert found
    assert told(found) == told(live["health"])


def test_health_with_other_thresholds_judges_an_old_run_anew(
    run: tuple[Path, dict[str, list[Frame]]],
) -> None:
    """Which steps lie outside of a band is counted by hand from what was stored."""
    with sl.read_run(run[0]) as stored:
        weights = stored.dataframe("weights.norm2").pivot_table(index="step", columns="layer", values="value")
        updates = stored.dataframe("weight_updates.norm2").pivot_table(
            index="step", columns="layer", values="value"
        )
    ratios = (updates / weights).to_numpy()[1:]
    assert alerts(run[0], watch(ratios.min() / 2, ratios.max() * 2))[0] == []
    middle = float(ratios.mean())
    strict, _ = alerts(run[0], watch(middle * 0.999, middle * 1.001))
    assert {layer for f in strict if f.topic == "alerts.ratio_out_of_band" for layer in f.layers} == {
        "0",
        "2",
    }


def test_the_default_health_says_which_rules_an_old_run_cannot_serve(
    run: tuple[Path, dict[str, list[Frame]]],
) -> None:
    found, plan = alerts(run[0], sl.health())
    assert all(frame.topic.startswith("alerts.") for frame in found)
    assert "dead_units" in plan
    assert "activations.dead_fraction" in plan
