from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from reactivex.subject import Subject
from torch import Tensor, nn

from streamlens import observe
from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.operators import norm, spectral_norm, stable_rank
from streamlens.operators._krylov import ritz, ritz_by_squaring
from streamlens.stream import Operator
from tests.operators.support import chain_of, ragged, resumed, run


def exact(tensor: Tensor) -> float:
    """NumPy's largest singular value in double precision."""
    matrix = tensor.double().numpy()
    return float(np.linalg.svd(matrix.reshape(matrix.shape[0], -1), compute_uv=False)[0])


def values_of(operator: Operator, values: Mapping[str, Tensor], topic: str = "weights") -> dict[str, float]:
    return run(operator, [ragged(0, values, topic)])[0].to_dict()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SHAPES: list[tuple[int, ...]] = [
    (3, 5),
    (64, 200),
    (70, 66),
    (66, 70),
    (80, 12, 3, 3),
    (200, 65),
    (5,),
    (1, 90),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operator", [spectral_norm, lambda: spectral_norm(exact=True)], ids=["", "exact"])
def test_equals_numpys_decomposition_for_any_shape(
    shape: tuple[int, ...], operator: Callable[[], Operator]
) -> None:
    tensor = random(*shape)
    wanted = exact(tensor if tensor.ndim > 1 else tensor[:, None])
    assert values_of(operator(), {"a": tensor})["a"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("shape", [(20, 30), (90, 80)])
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e25])
def test_scaling_the_matrix_scales_the_norm_and_not_the_stable_rank(
    shape: tuple[int, ...], scale: float
) -> None:
    tensor = random(*shape)
    once = values_of(spectral_norm(), {"a": tensor})["a"]
    assert values_of(spectral_norm(), {"a": tensor * scale})["a"] == pytest.approx(once * scale, rel=1e-4)
    rank = values_of(stable_rank(), {"a": tensor})["a"]
    assert values_of(stable_rank(), {"a": tensor * scale})["a"] == pytest.approx(rank, rel=1e-4)


@pytest.mark.parametrize("shape", [(7, 9), (80, 90)])
def test_stable_rank_equals_its_definition_on_the_exact_spectrum(shape: tuple[int, ...]) -> None:
    tensor = random(*shape)
    s = np.linalg.svd(tensor.double().numpy(), compute_uv=False)
    wanted = float((s**2).sum() / s[0] ** 2)
    for operator in (stable_rank(), stable_rank(exact=True)):
        assert values_of(operator, {"a": tensor})["a"] == pytest.approx(wanted, rel=1e-4)
    assert values_of(stable_rank(), {"a": random(9)})["a"] == pytest.approx(1.0)


def test_within_a_thousandth_at_every_one_of_200_adam_steps_also_where_singular_values_cross() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 80), nn.Tanh(), nn.Linear(80, 4))
    with torch.no_grad():
        # The largest at first is of an input that is never seen, so that it decays while others grow.
        model.get_parameter("0.weight")[:, 0] *= 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1.0)
    out: list[Frame] = []
    unseen: list[float] = []
    with observe(model, on_error="raise") as lens:
        lens.pipe(spectral_norm("weights", residual=False)).subscribe(out.append)
        for step in range(200):
            x = random(32, 70, seed=step)
            x[:, 0] = 0
            optimizer.zero_grad()
            (model(x) - 3 * torch.tanh(x @ random(70, 4, seed=1000) / 8)).square().mean().backward()
            optimizer.step()
            first, last = (model.get_parameter(f"{n}.weight").detach() for n in ("0", "2"))
            _, s, vt = np.linalg.svd(first.double().numpy(), full_matrices=False)
            assert out[-1].to_dict() == pytest.approx({"0": s[0], "2": exact(last)}, rel=1e-3), step
            unseen.append(abs(float(vt[0, 0])))
    assert len(out) == 200
    assert unseen[0] > 0.9 > 0.1 > unseen[-1]


def test_the_value_stays_right_while_one_singular_value_overtakes_another() -> None:
    left = torch.linalg.qr(random(90, 90, seed=1)).Q
    right = torch.linalg.qr(random(80, 80, seed=2)).Q
    frames, wanted = list[Frame](), list[float]()
    for step in range(30):
        s = torch.linspace(1.0, 0.2, 80)
        s[70] += 0.1 * step
        frames.append(ragged(step, {"a": left[:, :80] @ torch.diag(s) @ right.T}, "weights"))
        wanted.append(float(s.max()))
    out = run(spectral_norm(residual=False), frames)
    assert [float(f["a"]) for f in out] == pytest.approx(wanted, rel=1e-3)
    assert wanted[0] == 1.0
    assert wanted[-1] > 3


def test_the_residual_is_published_and_bounds_what_the_iteration_left() -> None:
    tensor = random(120, 100)
    value, residual = run(spectral_norm("weights"), [ragged(0, {"a": tensor, "b": tensor[:9]}, "weights")])
    assert (value.topic, residual.topic) == ("weights.spectral_norm", "weights.spectral_norm.residual")
    assert 0 < float(residual["a"]) < 1e-3
    assert float(residual["b"]) == 0.0
    s = np.linalg.svd(tensor.double().numpy(), compute_uv=False)
    # Some eigenvalue of W'W lies within residual * s^2 of s^2.
    found = float(value["a"]) ** 2
    assert np.abs(s**2 - found).min() <= float(residual["a"]) * found + 1e-5 * found


def test_a_tighter_tolerance_is_reached() -> None:
    frame = ragged(0, {"a": random(100, 90)}, "weights")
    assert float(run(spectral_norm(tolerance=1e-5), [frame])[1]["a"]) < 1e-5


def test_nan_gives_nan_and_leaves_the_vectors_alone() -> None:
    good, bad = random(90, 80), random(90, 80)
    bad[3, 3] = math.nan
    small = torch.tensor([[math.inf, 1.0], [0.0, 1.0]])
    frames = [ragged(s, {"a": m, "b": small}, "weights") for s, m in enumerate([good, bad, good])]
    out = run(spectral_norm(residual=False), frames)
    assert [math.isnan(f["a"]) for f in out] == [False, True, False]
    assert all(math.isnan(f["b"]) for f in out)
    assert float(out[2]["a"]) == pytest.approx(exact(good), rel=1e-4)
    assert all(math.isnan(v) for v in values_of(spectral_norm(exact=True), {"a": bad, "b": small}).values())


def test_zeros_empty_tensors_and_half_precision() -> None:
    values = {"zero": torch.zeros(90, 80), "none": torch.empty(0, 3), "half": random(90, 80).half()}
    for operator in (spectral_norm(), spectral_norm(exact=True)):
        got = values_of(operator, values)
        assert (got["zero"], got["none"]) == (0.0, 0.0)
        assert got["half"] == pytest.approx(exact(values["half"]), rel=1e-3)
    ranks = values_of(stable_rank(), values)
    assert math.isnan(ranks["zero"])
    assert math.isnan(ranks["none"])
    grown = run(spectral_norm(residual=False), [ragged(0, values), ragged(1, {"zero": random(90, 80)})])
    assert float(grown[1]["zero"]) == pytest.approx(exact(random(90, 80)), rel=1e-4)


def test_a_matrix_of_rank_one_and_one_with_equal_singular_values() -> None:
    rank_one = torch.outer(random(90), random(80, seed=1))
    orthogonal = 3 * torch.linalg.qr(random(80, 80)).Q
    got = values_of(spectral_norm(), {"one": rank_one, "same": orthogonal})
    assert got == pytest.approx({"one": exact(rank_one), "same": 3.0}, rel=1e-4)


def test_float64_and_complex_matrices() -> None:
    double = random(90, 80).double()
    wave = torch.complex(random(90, 80), random(90, 80, seed=1))
    got = run(spectral_norm(tolerance=1e-6), [ragged(0, {"a": double, "b": wave})])[0]
    assert got["a"].dtype is torch.float64
    assert float(got["a"]) == pytest.approx(exact(double), rel=1e-10)
    wanted = np.linalg.svd(wave.numpy().astype(np.complex128), compute_uv=False)[0]
    assert float(got["b"]) == pytest.approx(wanted, rel=1e-4)


def changing() -> list[Frame]:
    start = random(90, 80)
    return [ragged(s, {"a": start + 0.1 * s * random(90, 80, seed=s + 1)}, "weights") for s in range(6)]


def test_resumed_equals_uninterrupted_to_the_bit() -> None:
    whole = [f.to_dict() for f in run(spectral_norm(), changing())]
    assert [f.to_dict() for f in resumed(spectral_norm, changing(), 3)] == whole


def test_draws_nothing_from_the_runs_generator() -> None:
    before = torch.random.get_rng_state()
    run(spectral_norm(), changing())
    assert torch.equal(before, torch.random.get_rng_state())


def test_vectors_are_kept_by_topic() -> None:
    source: Subject[Frame] = Subject()
    chain = chain_of(source.pipe(spectral_norm()), lambda _: None)
    source.on_next(ragged(0, {"a": random(90, 80)}, "weights"))
    source.on_next(ragged(0, {"a": random(70, 80)}, "weight_gradients"))
    (state,) = chain.state_dict()
    kept = {t["topic"]: t["vectors"]["a"].shape for t in state["state"]["topics"]}
    assert kept == {"weights": (80, 12), "weight_gradients": (70, 12)}


@pytest.mark.parametrize("count", [1, 12])
def test_the_eigensolver_that_never_waits_agrees_with_the_other(count: int) -> None:
    g = torch.Generator().manual_seed(0)
    factors = torch.randn(5, 24, 24, generator=g, dtype=torch.float64)
    matrices = factors @ factors.mT
    matrices[3] = 0
    matrices[4] = torch.eye(24)
    wanted, spanning = ritz(matrices, count)
    found, vectors = ritz_by_squaring(matrices, count)
    assert torch.allclose(found, wanted, rtol=1e-8)
    assert torch.allclose(vectors.mT @ vectors, torch.eye(count, dtype=torch.float64).expand(5, -1, -1))
    overlap = (vectors[:3, :, 0] * spanning[:3, :, 0]).sum(1).abs()
    assert torch.allclose(overlap, torch.ones(3, dtype=torch.float64))


def test_bad_arguments_and_numbers_are_named() -> None:
    for operator in (spectral_norm, stable_rank):
        with pytest.raises(ValueError, match=r"tolerance=0\): a relative residual"):
            operator(tolerance=0)
    model = nn.Linear(2, 2)
    with observe(model) as lens:
        for made in (spectral_norm(), spectral_norm(exact=True), stable_rank(), stable_rank(exact=True)):
            with pytest.raises(StreamlensError, match=r"needs whole tensors"):
                lens.pipe(norm("weights"), made)
    with pytest.raises(StreamlensError, match=r"'weights\.norm2' has numbers"):
        run(spectral_norm(), [Frame("weights.norm2", 0, ("a",), torch.ones(1))])
