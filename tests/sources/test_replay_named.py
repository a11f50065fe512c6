"""Lenses with a name, replayed from the one store that they wrote."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn

import streamlens as sl
from streamlens.errors import StreamlensError, UnknownTopicError
from streamlens.frame import Frame
from streamlens.runs import read_run
from streamlens.sinks import RunStore


def chains(lens: sl.Lens) -> list[sl.Stream]:
    """What is asked of a lens, live and in a replay."""
    return [
        lens.pipe(sl.norm("weights"), sl.ema(0.5)),
        lens.pipe(sl.uw_ratio(), sl.window(2, reduce="max")),
        lens.pipe(sl.layers("fc"), sl.norm("activations")),
    ]


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, dict[str, list[Frame]]]:
    """A store of two models' lenses, of which one makes two steps where the other makes one."""
    live: dict[str, list[Frame]] = {"G": [], "D": []}
    store = RunStore(tmp_path / "run.db")
    torch.manual_seed(0)
    models = {name: nn.Sequential(OrderedDict(fc=nn.Linear(3, 2))) for name in live}
    with ExitStack() as open_lenses:
        for name, model in models.items():
            lens = open_lenses.enter_context(sl.observe(model, name=name, on_error="raise"))
            for reduction in (sl.norm("weights"), sl.norm("weight_updates"), sl.norm("activations")):
                lens.pipe(reduction).subscribe(store)
            for chain in chains(lens):
                chain.subscribe(live[name].append)
        optimizers = {name: torch.optim.Adam(model.parameters(), lr=0.1) for name, model in models.items()}
        for name in ("D", "D", "G") * 4:
            optimizers[name].zero_grad()
            models[name](torch.randn(5, 3)).sum().backward()
            optimizers[name].step()
    return store.path, live


def told(frames: list[Frame]) -> list[tuple[object, ...]]:
    return sorted((f.topic, f.step, f.layers, f.source, str(f.to_dict())) for f in frames)


@pytest.mark.parametrize("name", ["G", "D"])
def test_a_named_lens_gives_what_it_gave_live(
    recorded: tuple[Path, dict[str, list[Frame]]], name: str
) -> None:
    path, live = recorded
    again: list[Frame] = []
    replay = sl.replay(path, name=name, on_error="raise")
    for chain in chains(replay):
        chain.subscribe(again.append)
    assert replay.play()
    assert told(again) == told(live[name])
    assert {frame.source for frame in again} == {name}


def test_sinks_are_given_its_names_as_the_lens_gave_them(
    recorded: tuple[Path, dict[str, list[Frame]]], tmp_path: Path
) -> None:
    replay = sl.replay(recorded[0], name="D")
    replay.pipe(sl.norm("weights")).subscribe(RunStore(tmp_path / "again.db"))
    assert replay.play()
    replay.close()
    with read_run(recorded[0]) as first, read_run(tmp_path / "again.db") as again:
        assert again.topics == ["D/weights.norm2"]
        stored = [run.dataframe("D/weights.norm2").drop(columns="wall_time") for run in (first, again)]
        assert stored[0].equals(stored[1])


def test_a_topic_of_named_lenses_says_how_to_get_at_it(recorded: tuple[Path, dict[str, list[Frame]]]) -> None:
    replay = sl.replay(recorded[0])
    with pytest.raises(
        UnknownTopicError, match=r"'activations': .*Pass name='D' or name='G' to replay\(\)\."
    ):
        replay.pipe(sl.norm("activations"))
    with pytest.raises(StreamlensError, match="pass name='D' or name='G' to replay") as raised:
        replay.pipe(sl.health())
    assert str(raised.value).count("pass name=") == 1
    assert "dead_units() looks at 'activations.dead_fraction', " in str(raised.value)


def test_a_name_that_no_lens_had_is_an_error(recorded: tuple[Path, dict[str, list[Frame]]]) -> None:
    with pytest.raises(ValueError, match="no lens of that name stored anything; lenses: 'D', 'G'"):
        sl.replay(recorded[0], name="E")
