from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from streamlens import observe
from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.operators import distance_from_start, every, layers, norm
from tests.helpers.by_hand import regression, snapshot, squared_error
from tests.operators.support import flat, ragged, resumed, run, saved_and_loaded


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    for batch in regression(seed, steps, (5, 3), 2):
        optimizer.zero_grad()
        squared_error(model, batch).backward()
        optimizer.step()


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("of", ["weights", "biases", "parameters"])
def test_on_a_lens_the_start_is_before_the_first_observed_update(of: str, relative: bool) -> None:
    model, out = small(), list[Frame]()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    train(model, optimizer, 2)
    kept = {"weights": ".weight", "biases": ".bias", "parameters": ""}[of]
    with observe(model, on_error="raise") as lens:
        lens.pipe(distance_from_start(of, relative=relative)).subscribe(out.append)
        start = snapshot(model)
        for step in range(4):
            train(model, optimizer, 1, seed=step)
            wanted = {}
            for name, now in snapshot(model).items():
                if name.endswith(kept):
                    moved = (now.double() - start[name].double()).norm()
                    below = start[name].double().norm() if relative else 1.0
                    wanted[name.removesuffix(kept) if kept else name] = float(moved / below)
            assert out[-1].to_dict() == pytest.approx(wanted, rel=1e-5)
    assert len(out) == 4
    assert out[0].topic == f"{of}.{'relative_' if relative else ''}distance_from_start"


def test_updates_are_asked_for_only_at_the_first_step() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observe(model, on_error="raise") as lens:
        lens.pipe(distance_from_start()).subscribe(lambda _: None)
        train(model, optimizer, 1)
        assert "weight_updates" in lens.explain()
        train(model, optimizer, 2)
        assert "weight_updates" not in lens.explain()
        assert "bytes held: 0" in lens.explain()


def test_follows_cadence_and_layers() -> None:
    model, out = small(), list[Frame]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observe(model, on_error="raise") as lens:
        lens.pipe(layers("2"), every(2), distance_from_start()).subscribe(out.append)
        start = snapshot(model)
        train(model, optimizer, 1)
        first = float((snapshot(model)["2.weight"] - start["2.weight"]).norm())
        train(model, optimizer, 3)
    assert [(f.step, f.layers) for f in out] == [(0, ("2",)), (2, ("2",))]
    assert float(out[0]["2"]) == pytest.approx(first, rel=1e-5)


def test_a_layer_without_updates_starts_where_it_is_and_stays_at_zero() -> None:
    model, out = small(), list[Frame]()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with observe(model, on_error="raise") as lens:
        lens.pipe(distance_from_start()).subscribe(out.append)
        train(model, optimizer, 2)
    got = flat(out)
    assert (got[0, "2"], got[1, "2"]) == (0.0, 0.0)
    assert 0 < got[0, "0"] < got[1, "0"]


def test_the_start_survives_a_resume_of_the_run() -> None:
    def outcome(interrupted: bool) -> list[dict[str, float]]:
        model, out = small(), list[Frame]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lens = observe(model, on_error="raise")
        lens.pipe(distance_from_start()).subscribe(out.append)
        train(model, optimizer, 2, seed=5)
        if interrupted:
            state = saved_and_loaded(lens.state_dict())
            lens.close()
            lens = observe(model, on_error="raise", start=0)
            lens.pipe(distance_from_start()).subscribe(out.append)
            lens.load_state_dict(state)
        train(model, optimizer, 2, seed=6)
        lens.close()
        return [f.to_dict() for f in out]

    assert outcome(True) == outcome(False)


def frames() -> list[Frame]:
    g = torch.Generator().manual_seed(0)
    return [
        ragged(s, {"a": torch.randn(2, 3, generator=g), "b": torch.randn(2, generator=g)}, "weights")
        for s in range(5)
    ]


def test_on_a_plain_stream_the_start_is_the_first_frame() -> None:
    items = frames()
    out = run(distance_from_start(), items)
    for frame, item in zip(out, items, strict=True):
        wanted = {n: float((v - items[0][n]).double().norm()) for n, v in item.items()}
        assert frame.to_dict() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("make", [distance_from_start, lambda: distance_from_start(relative=True)])
def test_resumed_equals_uninterrupted(make: Callable[[], object]) -> None:
    whole = [f.to_dict() for f in run(make(), frames())]  # type: ignore[arg-type]
    assert [f.to_dict() for f in resumed(make, frames(), 2)] == whole  # type: ignore[arg-type]


def test_scaling_everything_scales_the_distance_and_not_the_relative_one() -> None:
    scaled = [f.replace(values=tuple(8 * v for v in f.values)) for f in frames()]
    for relative, factor in ((False, 8.0), (True, 1.0)):
        once = run(distance_from_start(relative=relative), frames())
        many = run(distance_from_start(relative=relative), scaled)
        for a, b in zip(once, many, strict=True):
            assert b.to_dict() == pytest.approx({n: factor * v for n, v in a.to_dict().items()}, rel=1e-5)


def test_edge_cases_nan_empty_and_zero_start() -> None:
    nan = torch.tensor([1.0, math.nan])
    values = {"nan": nan, "empty": torch.empty(0), "zero": torch.zeros(2), "half": torch.ones(2).half()}
    later = {n: v + 1 for n, v in values.items()}
    items = [ragged(0, values, "weights"), ragged(1, later, "weights")]
    out = run(distance_from_start(), items)
    assert [math.isnan(f["nan"]) for f in out] == [True, True]
    assert [float(f["empty"]) for f in out] == [0.0, 0.0]
    assert float(out[1]["half"]) == pytest.approx(math.sqrt(2))
    relative = run(
        distance_from_start(relative=True), [ragged(0, values, "weights"), ragged(1, later, "weights")]
    )
    assert math.isnan(relative[1]["zero"])


def test_numbers_are_refused_with_the_remedy() -> None:
    model = nn.Linear(2, 2)
    with (
        observe(model) as lens,
        pytest.raises(StreamlensError, match=r"distance_from_start\(\) needs whole"),
    ):
        lens.pipe(norm("weights"), distance_from_start(None))
    with pytest.raises(TypeError, match="got 3"):
        run(distance_from_start(3), [])  # type: ignore[arg-type]
