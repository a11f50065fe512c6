from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reactivex.subject import Subject
from torch import Tensor, nn

from streamlens import observe
from streamlens.frame import Frame
from streamlens.operators import ratio, uw_ratio
from streamlens.stream import Operator
from tests.operators.support import NUMBERS, ragged


def given_pair(operator: Operator, update: Tensor, weight: Tensor) -> Frame:
    """What a ratio gives for one layer's update and its weight after it."""
    source: Subject[Frame] = Subject()
    out: list[Frame] = []
    source.pipe(operator).subscribe(out.append)
    source.on_next(ragged(0, {"a": update}, "weight_updates"))
    source.on_next(ragged(0, {"a": weight}, "weights"))
    source.on_completed()
    (only,) = out
    return only


PAIRS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12)


@given(PAIRS, st.sampled_from([1.0, 2.0, 3.0, math.inf]), st.sampled_from(["after", "before"]))
def test_equals_the_norms_written_out(
    pairs: list[tuple[float, float]], order: float, relative_to: str
) -> None:
    update, weight = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    below = torch.linalg.vector_norm(weight if relative_to == "after" else weight - update, order)
    got = float(given_pair(uw_ratio(order=order, relative_to=relative_to), update, weight)["a"])
    above = torch.linalg.vector_norm(update, order)
    assert math.isnan(got) if below == 0 else got == pytest.approx(float(above / below), rel=1e-9)


@given(PAIRS, st.sampled_from([0.125, -2.0, 16.0]), st.sampled_from(["after", "before"]))
def test_is_unchanged_when_weights_and_updates_are_scaled_together(
    pairs: list[tuple[float, float]], c: float, relative_to: str
) -> None:
    update, weight = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    operator = uw_ratio(relative_to=relative_to)
    once, scaled = given_pair(operator, update, weight), given_pair(operator, c * update, c * weight)
    assert float(scaled["a"]) == pytest.approx(float(once["a"]), rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("update", [0.0, 1.0])
def test_zero_weights_give_nan(update: float) -> None:
    assert math.isnan(given_pair(uw_ratio(), torch.full((3,), update), torch.zeros(3)).to_dict()["a"])
    before = uw_ratio(relative_to="before")
    assert math.isnan(given_pair(before, torch.full((3,), update), torch.full((3,), update)).to_dict()["a"])


def test_names_say_what_is_not_the_default() -> None:
    x = torch.ones(2)
    for operator, name in [
        (uw_ratio(), "uw_ratio"),
        (uw_ratio(order=1), "uw_ratio.norm1"),
        (uw_ratio(relative_to="before"), "uw_ratio.before"),
        (ratio("weight_updates", "weights"), "weight_updates_to_weights"),
        (ratio("weight_updates", "weights", order=math.inf), "weight_updates_to_weights.norminf"),
    ]:
        assert given_pair(operator, x, x).topic == name


@pytest.mark.parametrize("of", ["weights", "biases", "parameters"])
@pytest.mark.parametrize("relative_to", ["after", "before"])
def test_on_a_lens_equals_a_hand_written_loop(of: str, relative_to: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    kept = {"weights": ".weight", "biases": ".bias", "parameters": ""}[of]
    out: list[Frame] = []
    with observe(model, on_error="raise") as lens:
        lens.pipe(uw_ratio(of=of, relative_to=relative_to)).subscribe(out.append)
        for step in range(3):
            before = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(kept)}
            optimizer.zero_grad()
            model(torch.randn(5, 3)).square().sum().backward()
            optimizer.step()
            after = {n: p.detach() for n, p in model.named_parameters() if n in before}
            below = after if relative_to == "after" else before
            wanted = {
                n.removesuffix(kept) if kept else n: float((after[n] - before[n]).norm() / below[n].norm())
                for n in before
            }
            assert out[step].to_dict() == pytest.approx(wanted, rel=1e-4)
            assert out[step].step == step
    assert out[0].topic.startswith("uw_ratio" if of == "weights" else f"uw_ratio.{of}")


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'before'"):
        uw_ratio(relative_to="befor")
    with pytest.raises(ValueError, match=r"of='gradients'\): it is 'weights'"):
        uw_ratio(of="gradients")
    with pytest.raises(ValueError, match="order=-1"):
        uw_ratio(order=-1)
    with pytest.raises(ValueError, match=r"ratio\(order=-1"):
        ratio("weights", "biases", order=-1)
    with pytest.raises(TypeError, match="got 3"):
        ratio("weights", 3)  # type: ignore[arg-type]
