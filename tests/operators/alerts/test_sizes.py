"""`layer_oversized` and `layer_undersized` on models whose layers are too large or small by construction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from tests.helpers.recording import observed, record

SOON: dict[str, Any] = {"window": 2, "start": (2, 2), "end": 1}


def trained(lens: sl.Lens, model: nn.Module, steps: int, *shape: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(200, *shape, generator=generator)).square().mean().backward()
        optimizer.step()


def found(frames: list[Frame]) -> list[tuple[int, str, tuple[str, ...]]]:
    return [(f.step, f.meta["state"], f.layers) for f in frames]


def test_a_layer_of_64_units_that_has_two_inputs_is_too_large() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 8), nn.Linear(8, 64))
    with observed(model) as lens:
        got = record(lens, sl.layer_oversized(**SOON))
        small = record(lens, sl.layer_undersized(**SOON))
        trained(lens, model, 8, 2)
    assert found(got) == [(3, "start", ("0",))]
    assert float(got[0]["0"]) == pytest.approx(2 / 64)
    assert "layer 0 (0.0312)" in got[0].meta["text"]
    assert got[0].meta["severity"] == "info"
    assert small == []


def test_a_layer_that_uses_every_direction_is_too_small_and_the_last_layer_is_not_asked() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 16), nn.Linear(16, 2))
    with observed(model) as lens:
        got = record(lens, sl.layer_undersized(**SOON))
        trained(lens, model, 6, 32)
    assert found(got) == [(3, "start", ("0",))]
    assert float(got[0]["0"]) == 1


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv1d(1, 40, 1), (1, 9)),
        (lambda: nn.Conv2d(1, 40, 1), (1, 3, 3)),
        (lambda: nn.Linear(1, 40), (9, 1)),
    ],
)
def test_units_are_channels_where_a_convolution_has_them(make: Any, shape: tuple[int, ...]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.head = make(), nn.Linear(40, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.wide(x)
            last: Tensor = self.head(out.flatten(2).mT if out.shape[1] == 40 else out)
            return last

    model = Net()
    with observed(model) as lens:
        got = record(lens, sl.layer_oversized(**SOON))
        trained(lens, model, 4, *shape)
    assert found(got) == [(3, "start", ("wide",))]
    assert float(got[0]["wide"]) == pytest.approx(1 / 40)


def test_a_topic_derived_beforehand_is_judged_as_it_is_also_by_health() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.Linear(64, 2))
    with observed(model) as lens:
        lens.derive("activations.saturation", lens.pipe(sl.layers("0"), sl.saturation(window=1)))
        alone = record(lens, sl.layer_oversized(start=(2, 2)))
        healthy: list[Frame] = []
        lens.pipe(sl.health()).subscribe(healthy.append)
        text = lens.explain()
        trained(lens, model, 4, 2)
    assert found(alone) == [(1, "start", ("0",))]
    assert [f.topic for f in healthy if "size" in f.topic] == ["alerts.layer_oversized"]
    assert "window=100" not in text


def test_health_does_not_compute_it_by_itself() -> None:
    model = nn.Sequential(nn.Linear(2, 64), nn.Linear(64, 2))
    with observed(model) as lens:
        lens.pipe(sl.health()).subscribe(lambda _: None)
        text = lens.explain()
    assert (
        "left out layer_oversized: it looks at 'activations.saturation', dear and no topic here: "
        "health(layer_oversized()) has it computed" in text
    )
    assert "saturation(" not in text


@pytest.mark.parametrize("rule", [sl.layer_oversized(**SOON), sl.layer_undersized(**SOON)])
def test_health_computes_what_a_rule_needs_that_it_was_given(rule: Any) -> None:
    torch.manual_seed(0)
    wide = rule.name == "layer_oversized"
    model = nn.Sequential(nn.Linear(*((2, 64) if wide else (32, 4))), nn.Linear(64 if wide else 4, 2))
    with observed(model) as lens:
        got = record(lens, sl.health(rule))
        text = lens.explain()
        trained(lens, model, 4, 2 if wide else 32)
    assert found([f for f in got if "size" in f.topic]) == [(3, "start", ("0",))]
    assert "left out layer_" not in text


def test_health_takes_rules_on_sizes_with_one_window() -> None:
    with pytest.raises(
        ValueError, match=r"layer_oversized\(window=2\) and layer_undersized\(window=3\).*one wi"
    ):
        sl.health(sl.layer_oversized(window=2), sl.layer_undersized(window=3))


def test_layers_in_front_choose_and_a_model_without_any_is_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    with observed(model) as lens:
        got = record(lens, sl.layers("1"), sl.layer_oversized(**SOON))
        with pytest.raises(StreamlensError, match="no layer with a matrix of weights among those selected"):
            lens.pipe(sl.layers("2"), sl.layer_oversized())
        trained(lens, model, 4, 2)
    assert [f.layers for f in got] == [("1",)]
    with observed(nn.Linear(2, 2)) as lens, pytest.raises(StreamlensError, match="beside its last one"):
        lens.pipe(sl.layer_undersized())


def test_a_resumed_run_goes_on_counting() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.Linear(64, 2))
    with observed(model) as lens:
        record(lens, sl.layer_oversized(**SOON))
        trained(lens, model, 3, 2)
        state = lens.state_dict()
    with observed(model, start=0) as lens:
        lens.load_state_dict(state)
        got = record(lens, sl.layer_oversized(**SOON))
        trained(lens, model, 1, 2)
    assert found(got) == [(3, "start", ("0",))]


@pytest.mark.parametrize("window", [0, 1.5, True])
def test_a_window_is_a_number_of_steps(window: Any) -> None:
    with pytest.raises(ValueError, match=r"layer_oversized\(window=.*a whole number from 1 on"):
        sl.layer_oversized(window=window)
