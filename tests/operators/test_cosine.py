from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from streamlens import observe
from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.operators import combine, cosine, every, norm, topic
from tests.helpers.by_hand import regression, snapshot, squared_error
from tests.operators.support import NUMBERS, ragged, resumed, run

PAIRS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12)


def by_numpy(x: Tensor, y: Tensor) -> float:
    a, b = x.double().numpy().ravel(), y.double().numpy().ravel()
    below = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / below) if below else math.nan


def between(x: Tensor, y: Tensor) -> float:
    (only,) = run(cosine("a", "b"), [ragged(0, {"l": x}, "a"), ragged(0, {"l": y}, "b")])
    return float(only["l"])


@given(PAIRS)
def test_of_two_topics_equals_numpy(pairs: list[tuple[float, float]]) -> None:
    x, y = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    assert between(x, y) == pytest.approx(by_numpy(x, y), rel=1e-6, abs=1e-9, nan_ok=True)


@given(PAIRS, st.sampled_from([1e-30, 0.5, -3.0, 1e25]))
def test_scaling_one_side_changes_at_most_the_sign(pairs: list[tuple[float, float]], c: float) -> None:
    x, y = torch.tensor(pairs, dtype=torch.float64).float().unbind(1)
    x[x.abs() < 1e-3] = 0.0
    y[y.abs() < 1e-3] = 0.0
    wanted = math.copysign(1.0, c) * between(x, y)
    assert between(c * x, y) == pytest.approx(wanted, rel=1e-5, abs=1e-5, nan_ok=True)


def test_half_precision_and_other_shapes_are_computed_in_float32() -> None:
    x, y = torch.randn(3, 2, 2).half() * 300, torch.randn(3, 2, 2).half() * 300
    assert between(x, y) == pytest.approx(by_numpy(x, y), rel=1e-4)
    assert between(torch.tensor(2.0), torch.tensor(-3.0)) == -1.0
    assert math.isnan(between(torch.empty(0), torch.empty(0)))
    assert math.isnan(between(torch.tensor([math.inf, 1.0]), torch.ones(2)))


def test_names_say_what_was_compared() -> None:
    x = torch.ones(2)
    assert (
        run(cosine("a", "b"), [ragged(0, {"l": x}, "a"), ragged(0, {"l": x}, "b")])[0].topic
        == "a_to_b.cosine"
    )
    assert run(cosine("a"), [ragged(0, {"l": x}, "a"), ragged(1, {"l": x}, "a")])[0].topic == "a.cosine"


def test_of_one_topic_compares_with_the_frame_before_layer_by_layer() -> None:
    g = torch.Generator().manual_seed(0)
    values = [{n: torch.randn(3, 2, generator=g) for n in "ab"} for _ in range(5)]
    del values[2]["b"]
    out = run(cosine(), [ragged(s, v) for s, v in enumerate(values)])
    last: dict[str, Tensor] = {}
    wanted: list[dict[str, float]] = []
    for step in values:
        wanted.append({n: by_numpy(x, last[n]) for n, x in step.items() if n in last})
        last.update(step)
    assert [f.to_dict() for f in out] == [pytest.approx(w, rel=1e-5) for w in wanted if w]


def test_a_tensor_that_is_not_finite_is_passed_over() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    out = run(cosine(), [ragged(0, {"l": a}), ragged(1, {"l": a * math.nan}), ragged(2, {"l": b})])
    assert math.isnan(out[0]["l"])
    assert float(out[1]["l"]) == pytest.approx(0.8)


def test_resumed_equals_uninterrupted() -> None:
    frames = [ragged(s, {"a": torch.randn(4), "b": torch.randn(2, 2)}) for s in range(6)]
    whole = [f.to_dict() for f in run(cosine(), frames)]
    assert [f.to_dict() for f in resumed(cosine, frames, 3)] == whole


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[dict[str, Tensor]]:
    """Gradients as each update consumed them, and updates, by hand."""
    taken = []
    for batch in regression(1, steps, (5, 3), 2):
        optimizer.zero_grad()
        squared_error(model, batch).backward()
        before = snapshot(model)
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        after = snapshot(model)
        taken.append({n: torch.stack([gradients[n], after[n] - before[n]]) for n in gradients})
    return taken


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize("nesterov", [False, True])
def test_on_a_lens_updates_against_gradients_also_where_the_optimizer_overwrites_them(nesterov: bool) -> None:
    model, out = small(), list[Frame]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov, foreach=True)
    with observe(model, on_error="raise") as lens:
        lens.pipe(cosine("weight_updates", "weight_gradients")).subscribe(out.append)
        taken = trained(model, optimizer, 4)
    got = {f.step: f.to_dict() for f in out}
    for step in range(1 if nesterov else 0, 4):
        wanted = {n: by_numpy(*taken[step][f"{n}.weight"].unbind()) for n in ("0", "2")}
        assert got[step] == pytest.approx(wanted, rel=1e-4)


def test_every_nth_step_is_compared_with_the_step_just_before_it() -> None:
    model, out = small(), list[Frame]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observe(model, on_error="raise") as lens:
        lens.pipe(every(3), cosine("weight_gradients")).subscribe(out.append)
        taken = trained(model, optimizer, 8)
    assert [f.step for f in out] == [3, 6]
    for frame in out:
        step = frame.step
        wanted = {
            n: by_numpy(taken[step][f"{n}.weight"][0], taken[step - 1][f"{n}.weight"][0]) for n in ("0", "2")
        }
        assert frame.to_dict() == pytest.approx(wanted, rel=1e-5)


def test_numbers_in_place_of_tensors_are_refused_with_the_remedy() -> None:
    model = nn.Linear(2, 2)
    with observe(model) as lens:
        with pytest.raises(StreamlensError, match=r"cosine\(\) needs whole tensors.*before any reduction"):
            lens.pipe(norm("weights"), cosine())
        with pytest.raises(StreamlensError, match="needs whole tensors"):
            lens.pipe(topic("loss"), cosine())
        with pytest.raises(StreamlensError, match="no topic selected"):
            lens.pipe(cosine())
    with pytest.raises(StreamlensError, match=r"the frame of 'weights\.norm2' has numbers"):
        run(cosine(), [Frame("weights.norm2", 0, ("a",), torch.ones(1))])
    with pytest.raises(TypeError, match="got 3"):
        cosine(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs a too"):
        cosine(b="weights")


def test_shapes_that_differ_are_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="the same shapes"):
        between(torch.ones(2), torch.ones(3))


def test_a_join_copies_what_its_optimizer_overwrites_from_the_second_step_on() -> None:
    model, steps = small(), list[int]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    with observe(model, on_error="raise") as lens:
        joined = combine(
            "weight_gradients", "weights", fn=lambda g, _: torch.stack([x.sum() for x in g]), name="x"
        )
        lens.pipe(joined).subscribe(lambda f: steps.append(f.step))
        trained(model, optimizer, 4)
        assert lens.stats()["incomplete"] == 4
    assert steps == [1, 2, 3]
