from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from streamlens import observe
from streamlens.chain import ErrorReport
from streamlens.errors import StreamlensError
from streamlens.frame import Frame, Kind
from streamlens.operators import every, gradient_noise_scale, layers
from tests.helpers.by_hand import regression
from tests.operators.support import Run, ragged, resumed, run, saved_and_loaded

Gradients = list[dict[str, Tensor]]


def estimates(parts: Gradients, sizes: list[int], names: list[str]) -> tuple[float, float]:
    """tr(Sigma) and |G|^2 of one step, from the sample covariance of gradients of equal micro-batches."""
    (size,) = set(sizes)
    rows = np.stack([np.concatenate([p[n].double().numpy().ravel() for n in names]) for p in parts])
    trace = rows.var(axis=0, ddof=1).sum() * size
    return float(trace), float((rows.mean(0) ** 2).sum() - trace / (size * len(parts)))


def accumulated(steps: list[Gradients], sizes: list[int]) -> list[Frame]:
    """The frames of a run that accumulates: sizes of micro-batches, and gradients summed up."""
    frames = []
    for step, parts in enumerate(steps):
        total: dict[str, Tensor] = {}
        for i, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            total = {n: total.get(n, torch.zeros_like(g)) + g for n, g in part.items()}
            data = {"": torch.zeros(size, 2)}
            frames.append(ragged(step, data, "input_data", micro_step=i, kind=Kind.MICRO_STEP))
            frames.append(ragged(step, total, "raw_gradients", micro_step=i, kind=Kind.MICRO_STEP))
    return frames


def random_steps(count: int, parts: int, noise: float = 1.0) -> list[Gradients]:
    g = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 4), "b": (5,)}
    true = {n: torch.randn(shape, generator=g, dtype=torch.float64) for n, shape in shapes.items()}
    return [
        [
            {n: t + noise * torch.randn(t.shape, generator=g, dtype=torch.float64) for n, t in true.items()}
            for _ in range(parts)
        ]
        for _ in range(count)
    ]


def smoothed(steps: list[Gradients], sizes: list[int], names: list[str], decay: float) -> list[float]:
    above = below = 0.0
    out = []
    for parts in steps:
        s, g = estimates(parts, sizes, names)
        above, below = decay * above + (1 - decay) * s, decay * below + (1 - decay) * g
        out.append(above / below if below > 0 else math.nan)
    return out


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_equals_the_sample_covariance_of_micro_batches(decay: float) -> None:
    steps, sizes = random_steps(4, 3), [8, 8, 8]
    out = run(gradient_noise_scale(decay), accumulated(steps, sizes))
    whole = [f for f in out if f.topic == "gradient_noise_scale"]
    assert [f.step for f in whole] == [0, 1, 2, 3]
    assert [float(f[""]) for f in whole] == pytest.approx(
        smoothed(steps, sizes, ["a", "b"], decay), rel=1e-5, nan_ok=True
    )
    each = [f for f in out if f.topic == "gradient_noise_scale.layers"]
    for name in ("a", "b"):
        wanted = smoothed(steps, sizes, [name], decay)
        assert [float(f[name]) for f in each] == pytest.approx(wanted, rel=1e-5, nan_ok=True)


def test_recovers_the_noise_scale_of_a_known_distribution_also_with_unequal_micro_batches() -> None:
    # Gradients of single samples are true + N(0, 2^2): tr(Sigma) = 4 * 400, |G|^2 = 400 * 0.25.
    g, sizes = torch.Generator().manual_seed(1), [2, 6, 4]
    true = torch.full((400,), 0.5, dtype=torch.float64)
    steps: list[Gradients] = [
        [{"a": true + 2 * torch.randn(400, generator=g, dtype=torch.float64) / math.sqrt(b)} for b in sizes]
        for _ in range(150)
    ]
    out = run(gradient_noise_scale(0.99), accumulated(steps, sizes))
    assert float(out[-2][""]) == pytest.approx(16.0, rel=0.1)


def test_dividing_the_losses_changes_nothing_and_batch_size_is_the_unit() -> None:
    steps = random_steps(3, 2)
    frames = accumulated(steps, [4, 4])
    halved = [f.replace(values=tuple(v / 2 for v in f.values)) for f in frames if f.topic == "raw_gradients"]
    once = [f.to_dict() for f in run(gradient_noise_scale(), frames)]
    for operator, factor in (
        (gradient_noise_scale(batch_size=4), 1),
        (gradient_noise_scale(batch_size=8), 2),
    ):
        out = run(operator, halved)
        for a, b in zip(out, once, strict=True):
            assert a.to_dict() == pytest.approx({n: factor * v for n, v in b.items()}, rel=1e-5, nan_ok=True)


def test_between_ranks_the_own_gradient_is_held_against_the_reduced_one() -> None:
    steps, frames = random_steps(3, 2), list[Frame]()
    for step, (own, other) in enumerate(steps):
        frames.append(ragged(step, own, "raw_gradients", kind=Kind.MICRO_STEP))
        frames.append(ragged(step, {n: (own[n] + other[n]) / 2 for n in own}, "parameter_gradients"))
    out = [f for f in run(gradient_noise_scale(0, batch_size=5, ranks=2), frames) if f.layers == ("",)]
    for frame, (own, other) in zip(out, steps, strict=True):
        small = sum(float(g.square().sum()) for g in own.values())
        big = sum(float(((own[n] + other[n]) / 2).square().sum()) for n in own)
        noise, signal = (small - big) / (1 / 5 - 1 / 10), (10 * big - 5 * small) / (10 - 5)
        assert float(frame[""]) == pytest.approx(noise / signal if signal > 0 else math.nan, nan_ok=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, parts: int) -> list[Gradients]:
    """Train; gives the gradients of micro-batches, computed on a twin of the model."""
    taken: list[Gradients] = []
    twin = small()
    batches = iter(regression(0, steps * parts, (6, 3), 2))
    for _ in range(steps):
        optimizer.zero_grad()
        twin.load_state_dict(model.state_dict())
        taken.append([])
        for _ in range(parts):
            x, y = next(batches)
            found = torch.autograd.grad((twin(x) - y).square().mean(), list(twin.parameters()))
            taken[-1].append(dict(zip(dict(model.named_parameters()), found, strict=True)))
            ((model(x) - y).square().mean() / parts).backward()
        optimizer.step()
    return taken


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def test_on_a_lens_equals_gradients_of_micro_batches_taken_by_autograd() -> None:
    model, out = small(), list[Frame]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observe(model, on_error="raise") as lens:
        lens.pipe(gradient_noise_scale(0.5)).subscribe(out.append)
        taken = train(model, optimizer, 4, 3)
    whole = [f for f in out if f.layers == ("",)]
    assert [f.step for f in whole] == [0, 1, 2, 3]
    wanted = smoothed(taken, [6, 6, 6], list(dict(model.named_parameters())), 0.5)
    assert [float(f[""]) for f in whole] == pytest.approx(wanted, rel=1e-3, nan_ok=True)
    assert any(w > 0 for w in wanted)


def test_layers_and_cadence_in_front_choose_what_is_estimated() -> None:
    model, out = small(), list[Frame]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observe(model, on_error="raise") as lens:
        lens.pipe(layers("2"), every(2), gradient_noise_scale()).subscribe(out.append)
        train(model, optimizer, 3, 2)
    each = [f for f in out if f.topic == "gradient_noise_scale.layers"]
    assert [(f.step, f.layers) for f in each] == [(0, ("2.weight", "2.bias")), (2, ("2.weight", "2.bias"))]


def test_one_micro_batch_a_step_is_reported_once_with_the_remedy() -> None:
    model, reports, out = small(), list[ErrorReport](), list[Frame]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observe(model) as lens:
        lens.errors.subscribe(reports.append)
        lens.pipe(gradient_noise_scale()).subscribe(out.append)
        train(model, optimizer, 3, 1)
    assert out == []
    assert len(reports) == 1
    assert "accumulate gradients over two or more backward passes" in str(reports[0])


def test_an_unknown_batch_size_is_reported_with_the_remedy() -> None:
    frames = [ragged(0, {"a": torch.ones(2)}, "raw_gradients")]
    with pytest.raises(StreamlensError, match="pass batch_size="):
        run(gradient_noise_scale(), frames)


def test_an_estimate_that_is_not_finite_is_left_out_of_the_averages() -> None:
    steps, sizes = random_steps(3, 2, noise=0.3), [4, 4]
    bad = [{n: g.clone() for n, g in part.items()} for part in steps[1]]
    bad[1]["b"][0] = math.nan
    out = run(gradient_noise_scale(0.5), accumulated([steps[0], bad, steps[1], steps[2]], sizes))
    each = [f for f in out if f.topic == "gradient_noise_scale.layers"]
    assert float(each[1]["b"]) == float(each[0]["b"])
    wanted = smoothed(steps, sizes, ["b"], 0.5)
    assert float(each[3]["b"]) == pytest.approx(wanted[2], rel=1e-5)


def test_resumed_equals_uninterrupted_also_within_a_step() -> None:
    frames = accumulated(random_steps(4, 3, noise=0.3), [4, 4, 4])
    whole = [f.to_dict() for f in run(gradient_noise_scale(), frames)]
    for at in (6, 8, 9):
        assert [f.to_dict() for f in resumed(gradient_noise_scale, frames, at)] == whole


def test_the_open_step_of_a_run_that_ends_gives_nothing() -> None:
    source, out = Run(), list[Frame]()
    source.stream(Kind.MICRO_STEP, raw=True).pipe(gradient_noise_scale(batch_size=2)).subscribe(out.append)
    first, second = random_steps(2, 2)
    source.push(*accumulated([first], [2, 2]))
    source.update(0)
    source.push(*(f.replace(step=1) for f in accumulated([second], [2, 2])))
    source.subject.on_completed()
    assert [f.step for f in out] == [0, 0]


def test_state_reads_back_with_the_safe_loader() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observe(model, on_error="raise") as lens:
        lens.pipe(gradient_noise_scale()).subscribe(lambda _: None)
        train(model, optimizer, 2, 2)
        lens.load_state_dict(saved_and_loaded(lens.state_dict()))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"gradient_noise_scale\(1\): a decay"):
        gradient_noise_scale(1)
    with pytest.raises(ValueError, match=r"batch_size=0\): a number from 1 on"):
        gradient_noise_scale(batch_size=0)
    with pytest.raises(ValueError, match=r"ranks=1\): a number from 2 on"):
        gradient_noise_scale(ranks=1)
    with pytest.raises(StreamlensError, match=r"gradient_noise_scale\(\) needs whole tensors"):
        run(gradient_noise_scale(batch_size=1), [Frame("raw_gradients", 0, ("a",), torch.ones(1))])
