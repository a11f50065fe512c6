"""A replay gives what the run gave."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import streamlens as sl
from streamlens.frame import Frame
from streamlens.runs import stepwise
from streamlens.sinks import RunStore
from streamlens.sources import replaying
from streamlens.stream import Operator
from tests._runs import small_model

Rows = dict[tuple[str, int, int, str], Any]

STEP_TOPICS = ("weights.norm2", "weight_updates.norm2", "weight_gradients.norm2", "uw_ratio", "learning_rate")


def stored_chains(lens: sl.Lens) -> list[Any]:
    """What the runs of these tests store."""
    return [
        lens.pipe(sl.topic("loss")),
        lens.pipe(sl.norm("weights")),
        lens.pipe(sl.norm("weight_updates")),
        lens.pipe(sl.norm("weight_gradients")),
        lens.pipe(sl.norm("activations")),
        lens.pipe(sl.uw_ratio()),
        lens.pipe(sl.topic("learning_rate")),
        lens.pipe(sl.topic("parameters")),
        lens.pipe(sl.topic("parameter_gradients")),
        lens.pipe(sl.topic("parameter_updates")),
    ]


def train(
    path: Path, live: dict[str, Operator] | None = None, *, seed: int = 0, name: str = "", steps: int = 5
) -> dict[str, list[Frame]]:
    """Record a run of two epochs with two micro-steps a step; gives what operators gave meanwhile."""
    model = small_model(seed)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    out: dict[str, list[Frame]] = {key: [] for key in live or {}}
    with sl.observe(model, loss=criterion, name=name, on_error="raise") as lens:
        store = RunStore(path)
        for chain in stored_chains(lens):
            chain.subscribe(store)
        for key, operator in (live or {}).items():
            lens.pipe(operator).subscribe(out[key].append)
        generator = torch.Generator().manual_seed(seed)
        for _ in lens.epochs(2):
            for _ in range(steps):
                optimizer.zero_grad()
                for _ in range(2):
                    x = torch.randn(6, 4, generator=generator)
                    criterion(model(x), torch.randint(3, (6,), generator=generator)).backward()
                optimizer.step()
    return out


def play(replay: sl.Replay, operators: dict[str, Operator]) -> dict[str, list[Frame]]:
    out: dict[str, list[Frame]] = {key: [] for key in operators}
    for key, operator in operators.items():
        replay.pipe(operator).subscribe(out[key].append)
    assert replay.play()
    return out


def rows(frames: list[Frame]) -> list[tuple[Any, ...]]:
    return [
        (f.topic, f.step, f.epoch, f.micro_step, f.kind, f.layers, f.components, f.source) for f in frames
    ]


def chained(*operators: Operator) -> Operator:
    def apply(source: Any) -> Any:
        return source.pipe(*operators)

    return apply


def _summed(state: Any, frame: Frame) -> Any:
    return frame.values if state is None else state + frame.values


OF_A_TOPIC: dict[str, Any] = {
    "across_layers": lambda: sl.across_layers("mean"),
    "between": lambda: sl.between(2, 7),
    "diff": lambda: sl.diff(),
    "ema": lambda: sl.ema(0.8),
    "every": lambda: sl.every(3),
    "layers": lambda: sl.layers("0*"),
    "per_epoch": lambda: sl.per_epoch("max"),
    "per_layer": lambda: sl.per_layer(),
    "per_step": lambda: sl.per_step(),
    "rename": lambda: sl.rename("other"),
    "scan": lambda: sl.scan(_summed),
    "smooth": lambda: sl.smooth(3),
    "where": lambda: sl.where(lambda frame: frame.step % 2 == 1),
    "window": lambda: sl.window(4, hop=2, reduce="median"),
}


SELECTED: dict[str, Callable[[], Operator]] = {
    "loss": lambda: sl.topic("loss"),
    "weights.norm2": lambda: sl.norm("weights"),
    "activations.norm2": lambda: sl.norm("activations"),
    "uw_ratio": lambda: sl.uw_ratio(),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run.db"
    train(path)
    return path


def assert_equal(live: dict[str, list[Frame]], again: dict[str, list[Frame]]) -> None:
    for key, frames in live.items():
        assert frames, f"{key} gave nothing"
        assert rows(frames) == rows(again[key]), key
        for a, b in zip(frames, again[key], strict=True):
            for (_, x), (_, y) in zip(a.items(), b.items(), strict=True):
                torch.testing.assert_close(x, y, equal_nan=True, rtol=1e-6, atol=1e-9, msg=key)


def test_stream_operators_over_every_kind_of_topic_give_what_they_gave_live(tmp_path: Path) -> None:
    operators: dict[str, Operator] = {}
    for name, make in OF_A_TOPIC.items():
        for source in SELECTED:
            if name == "layers" and source == "loss":
                continue
            operators[f"{name} of {source}"] = chained(SELECTED[source](), make())
    operators["joined"] = sl.combine(
        sl.topic("loss"), sl.norm("weights"), fn=lambda a, b: a.sum() * b, name="joined"
    )
    operators["ratio"] = sl.ratio("weight_updates", "weight_gradients")
    live = train(tmp_path / "run.db", operators)
    with sl.replay(tmp_path / "run.db", on_error="raise") as replay:
        assert_equal(live, play(replay, operators))


def test_metrics_of_stored_tensors_give_what_they_gave_live(tmp_path: Path) -> None:
    operators: dict[str, Operator] = {
        name: getattr(sl, name)(topic="parameters")
        for name in (
            "absmax", "kurtosis", "maximum", "mean", "median", "minimum", "nonfinite", "norm", "rms",
            "skewness", "std", "total", "var", "zero_fraction", "histogram", "quantiles",
            "percentile_bands", "singular_values", "spectral_norm", "stable_rank", "effective_rank",
            "condition_number", "distance_from_start",
        )
    }  # fmt: skip
    operators["effective_lr"] = sl.effective_lr(of="parameters")
    operators["uw_ratio"] = sl.uw_ratio(of="parameters")
    operators["cosine"] = sl.cosine("parameter_gradients")
    live = train(tmp_path / "run.db", operators)
    with sl.replay(tmp_path / "run.db", on_error="raise") as replay:
        assert_equal(live, play(replay, operators))


def test_a_metric_is_made_from_the_norms_that_were_stored(recorded: Path) -> None:
    again = play(sl.replay(recorded), {"uw": sl.uw_ratio(), "stored": sl.topic("uw_ratio")})
    assert_equal({"uw": again["stored"]}, {"uw": again["uw"]})


def test_a_metric_that_was_stored_itself_needs_nothing_of_what_it_was_made_of(tmp_path: Path) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    live: list[Frame] = []
    with sl.observe(model, on_error="raise") as lens:
        lens.pipe(sl.uw_ratio()).subscribe(RunStore(tmp_path / "run.db"))
        lens.pipe(sl.uw_ratio(), sl.ema(0.5)).subscribe(live.append)
        for _ in range(4):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
    with sl.replay(tmp_path / "run.db", on_error="raise") as replay:
        again = play(replay, {"uw": chained(sl.uw_ratio(), sl.ema(0.5))})
        assert_equal({"uw": live}, again)
        with pytest.raises(sl.UnknownTopicError, match="did not store it"):
            replay.pipe(sl.uw_ratio(order=1))


def test_a_plan_says_where_frames_come_from_and_what_was_not_stored(recorded: Path) -> None:
    with sl.replay(recorded) as replay:
        replay.pipe(sl.uw_ratio()).subscribe(lambda _: None)
        replay.pipe(sl.health()).subscribe(lambda _: None)
        plan = replay.explain()
        with pytest.raises(sl.StreamlensError, match=r"validation_loss.*the run did not store it; subscribe"):
            replay.pipe(sl.overfitting())
    assert "weights.norm2 as it comes: read from the run store" in plan
    assert "hook" not in plan
    assert (
        "dead_units: it looks at 'activations.dead_fraction', which this lens cannot give: the run did"
        in plan
    )
    assert "the model has no" not in plan


def test_an_unknown_topic_lists_those_stored(recorded: Path) -> None:
    with pytest.raises(sl.UnknownTopicError, match=r"unknown topic 'biases'.*Topics: .*weights\.norm2"):
        sl.replay(recorded).pipe(sl.topic("biases"))


def test_a_reduction_that_was_not_stored_says_what_to_store(recorded: Path) -> None:
    replay = sl.replay(recorded)
    with pytest.raises(sl.UnknownTopicError, match=r"'weights.norm1' cannot be replayed.*weights.norm2"):
        replay.pipe(sl.norm("weights", order=1))
    with pytest.raises(sl.StreamlensError, match="did not store 'weights' itself, only"):
        replay.pipe(sl.topic("weights"), sl.ema(0.9))
    with pytest.raises(sl.StreamlensError, match="did not store 'weights' itself, only"):
        replay.pipe(sl.spectral_norm("weights"))


def test_metrics_of_the_model_and_classes_of_layers_say_what_they_need(recorded: Path) -> None:
    with pytest.raises(sl.StreamlensError, match=r"needs the model, and replay\('run.db'\) has none"):
        sl.replay(recorded).pipe(sl.sharpness(batch=(torch.ones(1, 4), torch.ones(1)), loss=nn.MSELoss()))
    with pytest.raises(sl.LayerNotFoundError, match="no model to tell module classes"):
        sl.replay(recorded).pipe(sl.layers(nn.Linear))
    with pytest.raises(sl.LayerNotFoundError, match="no layer matches 'nine'"):
        sl.replay(recorded).pipe(sl.layers("nine"))


def test_rules_with_other_thresholds_run_over_an_old_run(recorded: Path) -> None:
    found = play(
        sl.replay(recorded),
        {
            "default": sl.unchanged_weights(),
            "strict": sl.ratio_out_of_band(band=(1e-12, 1e-9), every=1),
        },
    )
    assert found["strict"]
    assert not found["default"]


def test_several_runs_are_kept_apart_and_aligned_by_step(tmp_path: Path) -> None:
    operators = {
        "uw": sl.uw_ratio(),
        "loss": chained(sl.topic("loss"), sl.ema(0.7)),
        "epochs": chained(sl.topic("loss"), sl.per_epoch()),
    }
    alone: dict[str, dict[str, list[Frame]]] = {}
    for name, seed, steps in (("a", 0, 5), ("b", 1, 3)):
        train(tmp_path / f"{name}.db", seed=seed, steps=steps)
        alone[name] = play(sl.replay(tmp_path / f"{name}.db"), operators)
    both = play(sl.replay([tmp_path / "a.db", tmp_path / "b.db"], on_error="raise"), operators)
    for key, frames in both.items():
        if key != "epochs":  # of which the longer come later
            assert [f.step for f in frames] == sorted(f.step for f in frames)
        for name, runs in alone.items():
            mine = [f for f in frames if f.source == name]
            assert [(f.step, f.to_dict()) for f in mine] == [(f.step, f.to_dict()) for f in runs[key]]


def test_a_replay_is_cold_and_can_be_played_again(recorded: Path) -> None:
    replay = sl.replay(recorded)
    first: list[Frame] = []
    done: list[int] = []
    replay.pipe(sl.topic("uw_ratio")).subscribe(first.append, on_completed=lambda: done.append(1))
    assert not first
    replay.play()
    second: list[Frame] = []
    replay.pipe(sl.topic("uw_ratio"), sl.window(2)).subscribe(second.append)
    replay.play()
    assert done == [1]
    assert [f.step for f in first] == list(range(10))
    assert [f.step for f in second] == [1, 3, 5, 7, 9]


def test_speed_paces_by_the_recorded_time(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    monkeypatch.setattr(replaying, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now))
    play(sl.replay(recorded, speed=0.5), {"uw": sl.topic("uw_ratio")})
    with sl.read_run(recorded) as run:
        times = run.dataframe("uw_ratio")["wall_time"]
    assert sum(slept) == pytest.approx(2 * (times.max() - times.min()), rel=1e-6)


def test_updates_are_told_once_whether_or_not_they_were_stored(tmp_path: Path, recorded: Path) -> None:
    with sl.replay(recorded) as replay:
        told = play(replay, {"updates": sl.topic("update_finished")})["updates"]
    assert [(f.step, f[""].item()) for f in told] == [(step, step) for step in range(10)]
    store = RunStore(tmp_path / "again.db")
    with sl.replay(recorded) as replay:
        replay.pipe(sl.topic("update_finished")).subscribe(store)
        replay.play()
    with sl.replay(tmp_path / "again.db") as replay:
        again = play(replay, {"updates": sl.topic("update_finished")})["updates"]
    assert [(f.step, f[""].item()) for f in again] == [(step, step) for step in range(10)]


def test_a_damaged_row_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    train(tmp_path / "run.db")
    with sqlite3.connect(tmp_path / "run.db") as db:
        db.execute("UPDATE frames SET data = zeroblob(length(data)) WHERE step = 3")
    db.close()
    replay = sl.replay(tmp_path / "run.db")
    out: list[Frame] = []
    replay.pipe(sl.norm("weights")).subscribe(out.append)
    with pytest.raises(sl.RunStoreError, match=r"run.db is damaged.*step 3 is not what was written"):
        replay.play()


def test_a_run_is_read_in_pieces_of_bounded_size(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operators = {"uw": sl.uw_ratio(), "parameters": sl.norm("parameters"), "loss": sl.topic("loss")}
    whole = play(sl.replay(recorded), operators)
    most: list[int] = []
    real = stepwise._frames

    def frames(read: list[Any]) -> Any:
        most.append(len({entry[0][0] for entry in read}))
        return real(read)

    monkeypatch.setattr(stepwise, "_frames", frames)
    monkeypatch.setattr(stepwise, "_MOST_ROWS", 12)
    assert_equal(whole, play(sl.replay(recorded), operators))
    assert max(most) <= 2
    assert len(most) > 5


@pytest.mark.parametrize("speed", [0, -1, "fast", float("nan")])
def test_a_wrong_speed_is_an_error(recorded: Path, speed: Any) -> None:
    with pytest.raises(ValueError, match="a number above 0"):
        sl.replay(recorded, speed=speed)


def test_derived_topics_and_sinks_work(recorded: Path) -> None:
    replay = sl.replay(recorded)
    replay.derive("smooth", replay.pipe(sl.topic("loss"), sl.ema(0.5)))
    table = sl.sinks.Table()
    replay.pipe(sl.topic("smooth")).subscribe(table)
    assert replay.play()
    assert len(table.dataframe) == 10
    assert replay.close()
    with pytest.raises(sl.ClosedLensError, match="this replay is closed"):
        replay.play()


def test_a_folder_stands_for_the_one_run_store_in_it_and_says_which_if_there_are_several(
    recorded: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "runs"
    (folder / "first").mkdir(parents=True)
    shutil.copy(recorded, folder / "first" / "run.db")
    seen: list[Frame] = []
    with sl.replay(folder) as old:
        old.pipe(sl.topic("loss")).subscribe(seen.append)
        old.play()
    assert len(seen) == 20  # two micro-steps a step
    train(folder / "other.db", steps=1)
    with pytest.raises(
        sl.RunStoreError, match=r"has several run stores: choose one of other.db, first/run.db"
    ):
        sl.replay(folder)
    with sl.read_run(recorded) as run, sl.replay(folder, run.id) as old:
        assert "weights.norm2" in old.source.known_topics
    with pytest.raises(sl.RunStoreError, match=r"no run store in the folder .* has a run 'b'"):
        sl.replay(folder, "b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(sl.RunStoreError, match=r"no run store is in the folder .*empty"):
        sl.replay(tmp_path / "empty")
