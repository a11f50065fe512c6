from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from reactivex.subject import Subject
from torch import Tensor, nn

from streamlens import observe
from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.operators import adam_moments, between, every, norm
from tests.helpers.by_hand import regression, squared_error
from tests.operators.support import chain_of, ragged, resumed, run

TWENTY = {
    f"{prefix}_{statistic}"
    for prefix in (
        "biased_grad_mean_estimate",
        "biased_grad_var_estimate",
        "grad_mean_estimate",
        "grad_var_estimate",
        "effective_lr",
    )
    for statistic in ("mean", "median", "var", "norm")
}

Wanted = dict[str, dict[str, float]]


def summed_up(values: Tensor) -> dict[str, float]:
    x = values.double().numpy().ravel()
    return {
        "mean": float(x.mean()),
        "median": float(np.median(x)),
        "var": float(x.var(ddof=1)),
        "norm": float(np.linalg.norm(x)),
    }


def by_topic(moments: Mapping[str, Tensor]) -> dict[str, float]:
    return {f"{name}_{s}": v for name, tensor in moments.items() for s, v in summed_up(tensor).items()}


def by_definition(gradients: Sequence[Tensor], beta1: float, beta2: float) -> dict[str, float]:
    """The moments as weighted sums of all gradients, in double precision."""
    t = len(gradients)
    m = torch.zeros_like(gradients[0], dtype=torch.float64)
    v = m.clone()
    for age, gradient in enumerate(reversed([g.double() for g in gradients])):
        m += (1 - beta1) * beta1**age * gradient
        v += (1 - beta2) * beta2**age * gradient**2
    return by_topic(
        {
            "biased_grad_mean_estimate": m,
            "biased_grad_var_estimate": v,
            "grad_mean_estimate": m / (1 - beta1**t),
            "grad_var_estimate": v / (1 - beta2**t),
        }
    )


def gathered(frames: Sequence[Frame], layer: str) -> dict[int, dict[str, float]]:
    out: dict[int, dict[str, float]] = {}
    for frame in frames:
        step = out.setdefault(frame.step, {})
        assert frame.topic not in step
        step[frame.topic] = float(frame[layer])
    return out


def random_gradients(steps: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=g) for _ in range(steps)]


def stream_of(gradients: Sequence[Tensor]) -> list[Frame]:
    return [ragged(step, {"a": g}, "weight_gradients") for step, g in enumerate(gradients)]


def test_equal_the_weighted_sums_written_out() -> None:
    gradients = random_gradients(5)
    got = gathered(run(adam_moments(0.8, 0.95), stream_of(gradients)), "a")
    for step in range(5):
        wanted = by_definition(gradients[: step + 1], 0.8, 0.95)
        assert got[step] == pytest.approx(wanted, rel=1e-4)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    """Each step's gradient of the first layer's weight."""
    taken = []
    for batch in regression(3, steps, (6, 3), 2):
        optimizer.zero_grad()
        squared_error(model, batch).backward()
        gradient = model.get_parameter("0.weight").grad
        assert gradient is not None
        taken.append(gradient.clone())
        optimizer.step()
    return taken


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def test_with_adam_they_are_its_own_state_to_rounding() -> None:
    model, out = small(), list[Frame]()
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    with observe(model, on_error="raise") as lens:
        lens.pipe(adam_moments(0.9, 0.99)).subscribe(out.append)
        for t in range(1, 6):
            train(model, optimizer, 1)
            state = optimizer.state[model.get_parameter("0.weight")]
            own = by_topic(
                {
                    "biased_grad_mean_estimate": state["exp_avg"],
                    "biased_grad_var_estimate": state["exp_avg_sq"],
                    "grad_mean_estimate": state["exp_avg"].double() / (1 - 0.9**t),
                    "grad_var_estimate": state["exp_avg_sq"].double() / (1 - 0.99**t),
                }
            )
            got = gathered(out, "0")[t - 1]
            assert {n: got[n] for n in own} == pytest.approx(own, rel=1e-5)


def test_gives_the_twenty_topics_a_step_each_once() -> None:
    model, out = small(), list[Frame]()
    with observe(model, on_error="raise") as lens:
        lens.pipe(adam_moments()).subscribe(out.append)
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    assert {f.topic for f in out} == TWENTY
    assert len(out) == 40
    rates = [f for f in out if f.topic == "effective_lr_median"]
    assert [f.to_dict() for f in rates] == [pytest.approx({"0": 0.1, "2": 0.1}, rel=1e-3)] * 2


def test_every_nth_step_is_given_with_the_moments_of_all_gradients() -> None:
    model, out = small(), list[Frame]()
    with observe(model, on_error="raise") as lens:
        lens.pipe(every(3), between(2), adam_moments(0.8, 0.95)).subscribe(out.append)
        gradients = train(model, torch.optim.SGD(model.parameters(), lr=0.1), 8)
    got = gathered(out, "0")
    assert set(got) == {3, 6}
    for step, values in got.items():
        assert set(values) == TWENTY
        wanted = by_definition(gradients[: step + 1], 0.8, 0.95)
        assert {n: values[n] for n in wanted} == pytest.approx(wanted, rel=1e-4)


def test_updates_are_copied_only_where_they_are_given() -> None:
    model = small()
    with observe(model, on_error="raise") as lens:
        lens.pipe(every(3), adam_moments()).subscribe(lambda _: None)
        text = lens.explain()
    asked = [line for line in text.splitlines() if "asks for" in line]
    assert any("weight_updates" in line and "every" in line for line in asked)
    assert any("weight_gradients" in line and "every" not in line for line in asked)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    gradients = random_gradients(4)
    gradients[2] = gradients[2].clone()
    gradients[2][0, 0] = math.inf
    source: Subject[Frame] = Subject()
    out: list[Frame] = []
    chain = chain_of(source.pipe(adam_moments()), out.append)
    for frame in stream_of(gradients):
        source.on_next(frame)
    got = gathered(out, "a")
    assert got[2] == got[1]
    assert got[3] == pytest.approx(by_definition([*gradients[:2], gradients[3]], 0.9, 0.999), rel=1e-4)
    assert sum(cell.skipped for cell in chain.cells) == 1


def test_resumed_equals_uninterrupted_to_the_bit() -> None:
    frames = stream_of(random_gradients(6))
    whole = [(f.topic, f.to_dict()) for f in run(adam_moments(), frames)]
    assert [(f.topic, f.to_dict()) for f in resumed(adam_moments, frames, 3)] == whole


def test_scaling_the_gradients_scales_each_topic_by_its_power() -> None:
    gradients = random_gradients(3)
    once = gathered(run(adam_moments(), stream_of(gradients)), "a")[2]
    scaled = gathered(run(adam_moments(), stream_of([8 * g for g in gradients])), "a")[2]
    for topic, value in once.items():
        power = (2 if "var_estimate" in topic else 1) * (2 if topic.endswith("_var") else 1)
        assert scaled[topic] == pytest.approx(8.0**power * value, rel=1e-4)


def test_half_precision_is_kept_in_float32_and_kinds_of_parameters_are_named() -> None:
    frames = [ragged(0, {"a": torch.tensor([3e-5, 1.0]).half()}, "bias_gradients")]
    out = run(adam_moments(of="biases", statistics=["norm"]), frames)
    assert {f.topic.removesuffix(".biases") for f in out} == {
        t for t in TWENTY if "norm" in t and "lr" not in t
    }
    assert all(f.topic.endswith(".biases") for f in out)
    found = next(f for f in out if f.topic == "grad_var_estimate_norm.biases")
    assert float(found["a"]) == pytest.approx(1.0)


def test_bad_arguments_and_numbers_are_named() -> None:
    with pytest.raises(ValueError, match=r"adam_moments\(beta2=1.5\): a decay"):
        adam_moments(0.9, 1.5)
    with pytest.raises(ValueError, match="unknown statistic 'max'"):
        adam_moments(statistics=["max"])
    with pytest.raises(ValueError, match="needs a statistic"):
        adam_moments(statistics=[])
    model = nn.Linear(2, 2)
    with observe(model) as lens, pytest.raises(StreamlensError, match="was not selected before"):
        lens.pipe(norm("weights"), adam_moments())
    with pytest.raises(StreamlensError, match=r"adam_moments\(\) needs whole tensors"):
        run(adam_moments(), [Frame("weight_gradients", 0, ("a",), torch.ones(1))])
