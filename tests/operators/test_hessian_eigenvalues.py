"""`hessian_eigenvalues`: against the exact Hessian, and without touching the run."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reactivex.subject import Subject
from torch import Tensor, nn

import streamlens as sl
from streamlens.frame import Frame
from streamlens.operators import hessian_eigenvalues
from tests.helpers.curvature import Attention, classification, eigenvalues, exact_hessian, nets
from tests.helpers.recording import observed, record, record_errors

LOSS = nn.CrossEntropyLoss()
NETS = nets()
every_net = pytest.mark.parametrize("net", NETS)


def taken(model: nn.Module, *, times: int = 1, **options: Any) -> list[Frame]:
    """The frames that a stream without a lens gives."""
    source: Subject[Frame] = Subject()
    got: list[Frame] = []
    source.pipe(hessian_eigenvalues(model=model, **{"loss": LOSS, **options})).subscribe(got.append)
    for step in range(times):
        source.on_next(Frame("when", step, ("",), torch.zeros(1), epoch=step))
    return got


def values(frame: Frame) -> list[float]:
    assert isinstance(frame.values, Tensor)
    assert frame.values.shape[0] == 1
    return [float(v) for v in frame.values[0]]


def train(model: nn.Module, batch: tuple[Tensor, Tensor], steps: int) -> list[Tensor]:
    """Train a little; gives what a run consists of, in bits."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = LOSS(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [
        *losses,
        *model.state_dict().values(),
        *(optimizer.state[p]["momentum_buffer"] for p in model.parameters()),
    ]


@every_net
def test_the_five_largest_are_those_of_the_exact_hessian(net: str) -> None:
    model, batch = NETS[net]
    (frame,) = taken(model, batch=batch)
    exact = eigenvalues(exact_hessian(model, LOSS, batch))[:5].tolist()
    assert values(frame) == pytest.approx(exact, rel=1e-3)
    assert frame.meta["converged"] == 5
    assert frame.meta["products"] <= 40


@every_net
@pytest.mark.parametrize("which", ["smallest", "magnitude"])
def test_the_other_end_and_the_largest_in_size_are_exact_too(net: str, which: str) -> None:
    model, batch = NETS[net]
    (frame,) = taken(model, batch=batch, which=which, k=3, products=120, tolerance=1e-4)
    every = eigenvalues(exact_hessian(model, LOSS, batch))
    key = -every if which == "smallest" else every.abs()
    exact = every[key.argsort(descending=True)[:3]]
    assert values(frame) == pytest.approx(exact.tolist(), rel=1e-3, abs=1e-6)


def test_on_a_lens_it_is_due_after_each_update_of_the_cadence_at_the_weights_it_leaves() -> None:
    torch.manual_seed(1)
    model, batch = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), classification((6,))
    exact: list[list[float]] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with observed(model) as lens:
        frames = record(lens, sl.every(3), hessian_eigenvalues(2, loss=LOSS, batch=batch))
        for step in range(7):
            optimizer.zero_grad()
            LOSS(model(batch[0]), batch[1]).backward()
            optimizer.step()
            if step % 3 == 0:
                exact.append(eigenvalues(exact_hessian(model, LOSS, batch))[:2].tolist())
    assert [f.step for f in frames] == [0, 3, 6]
    assert [(f.topic, f.layers, f.components) for f in frames] == [
        ("hessian_eigenvalues", ("",), ("1", "2"))
    ] * 3
    for frame, wanted in zip(frames, exact, strict=True):
        assert values(frame) == pytest.approx(wanted, rel=1e-3)


def test_eigenvectors_are_unit_vectors_that_the_hessian_only_stretches() -> None:
    model, batch = NETS["tanh"]
    first, second = taken(model, batch=batch, k=3, eigenvectors=True, tolerance=1e-4, products=70)
    assert (first.topic, second.topic) == ("hessian_eigenvalues", "hessian_eigenvectors")
    assert second.layers == tuple(name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        assert second[name].shape == (3, *parameter.shape)
    vectors = torch.cat([v.reshape(3, -1) for v in second.values], dim=1).double()
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(3, dtype=torch.float64), atol=1e-5, rtol=0)
    matrix = exact_hessian(model, LOSS, batch)
    torch.testing.assert_close(vectors @ matrix, first.values[0][:, None] * vectors, atol=2e-4, rtol=0)
    assert all(float(v[v.abs().argmax()]) > 0 for v in vectors)


def test_several_batches_count_by_their_examples() -> None:
    model, _ = NETS["tanh"]
    batches = [classification((6,), examples=20, seed=1), classification((6,), examples=5, seed=2)]
    (frame,) = taken(model, batches=batches)
    exact = eigenvalues(exact_hessian(model, LOSS, *batches))[:5].tolist()
    assert values(frame) == pytest.approx(exact, rel=1e-3)


def test_frozen_parameters_are_constants() -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), classification((6,))
    model[0].requires_grad_(False)
    (frame,) = taken(model, batch=batch)
    matrix = exact_hessian(model, LOSS, batch)
    assert len(matrix) == 27
    assert values(frame) == pytest.approx(eigenvalues(matrix)[:5].tolist(), rel=1e-3)


def test_chosen_parameters_give_a_diagonal_block() -> None:
    model, batch = NETS["tanh"]
    (frame,) = taken(model, batch=batch, parameters="2.*", k=3)
    block = exact_hessian(model, LOSS, batch, names=["2.weight", "2.bias"])
    assert values(frame) == pytest.approx(eigenvalues(block)[:3].tolist(), rel=1e-3)


def test_an_eigenvalue_of_several_dimensions_comes_as_often() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 3, bias=False), torch.randn(30, 6)
    y = torch.zeros(30, 3)
    (frame,) = taken(model, batch=(x, y), loss=nn.MSELoss())
    exact = torch.linalg.eigvalsh(torch.kron(torch.eye(3), 2 * x.T @ x / 90)).flip(0)[:5]
    assert exact[0] == pytest.approx(float(exact[2]), rel=1e-5)
    assert values(frame) == pytest.approx(exact.tolist(), rel=1e-3)
    assert frame.meta["converged"] == 5


def test_what_has_not_converged_is_said() -> None:
    model, batch = NETS["tanh"]
    (frame,) = taken(model, batch=batch, products=7)
    assert frame.meta["products"] == 7
    assert frame.meta["converged"] < 5
    assert not frame.meta["confirmed"]
    exact = eigenvalues(exact_hessian(model, LOSS, batch))
    for value, residual in zip(values(frame), frame.meta["residuals"], strict=True):
        assert float((exact - value).abs().min()) <= residual * 1.001 + 1e-6
    within = [r <= 1e-3 * abs(v) for r, v in zip(frame.meta["residuals"], values(frame), strict=True)]
    assert sum(within) == frame.meta["converged"]


def test_an_embedding_with_sparse_gradients_is_one_like_any_other() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Tanh(), nn.Linear(8, 3))
    batch = (torch.randint(7, (20, 2)), torch.randint(3, (20,)))
    (frame,) = taken(model, batch=batch)
    assert next(iter(model.children())).sparse
    dense = nn.Sequential(nn.Embedding(7, 4), *list(model.children())[1:])
    dense.load_state_dict(model.state_dict())
    exact = eigenvalues(exact_hessian(dense, LOSS, batch))[:5]
    assert values(frame) == pytest.approx(exact.tolist(), rel=1e-3)


def test_a_loss_linear_in_the_parameters_has_no_curvature() -> None:
    (frame,) = taken(nn.Linear(3, 2), batch=(torch.ones(4, 3), None), loss=lambda out, _: out.mean())
    assert values(frame) == [0.0] * 5
    assert frame.meta["converged"] == 5


def test_one_parameter_has_one_eigenvalue() -> None:
    model = nn.Linear(1, 1, bias=False)
    (frame,) = taken(model, k=1, batch=(torch.full((2, 1), 3.0), torch.zeros(2, 1)), loss=nn.MSELoss())
    assert values(frame) == pytest.approx([18.0])


def test_nan_weights_give_nan_and_the_next_evaluation_is_itself_again() -> None:
    model, batch = nn.Linear(4, 3), classification((4,))
    before = taken(model, batch=batch)
    with torch.no_grad():
        model.weight[0, 0].fill_(torch.nan)
    (frame,) = taken(model, batch=batch)
    assert all(np.isnan(values(frame)))
    assert frame.meta["converged"] == 0
    with torch.no_grad():
        model.weight.fill_(0.1)
    assert all(np.isfinite(values(taken(model, batch=batch)[0])))
    assert all(np.isfinite(values(before[0])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_evaluated_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    x, y = classification((6,))
    (frame,) = taken(model, batch=(x.to(dtype), y))
    exact = eigenvalues(exact_hessian(model, LOSS, (x.to(dtype), y)))[:5]
    assert values(frame) == pytest.approx(exact.tolist(), rel=1e-3)
    assert all(p.dtype is dtype for p in model.parameters())


def test_double_precision_stays_double() -> None:
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), classification((6,))
    (frame,) = taken(model, batch=(x.double(), y), tolerance=1e-8, products=83)
    exact = eigenvalues(exact_hessian(model, LOSS, (x, y)))[:5]
    assert values(frame) == pytest.approx(exact.tolist(), rel=1e-9)


def test_inputs_may_be_several_arguments_or_named_ones() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a - 2 * b) * self.weight

    a, b, y = torch.ones(3, 2), torch.full((3, 2), 2.0), torch.zeros(3, 2)
    for inputs in ((a, b), [a, b], {"b": b, "a": a}):
        (frame,) = taken(Sum(), k=2, batch=(inputs, y), loss=nn.MSELoss())
        assert values(frame) == pytest.approx([9.0, 9.0])


@pytest.mark.parametrize("options", [{"mode": "train"}, {"mode": "eval"}, {"eigenvectors": True}])
def test_training_is_bit_identical_with_and_without_it(options: dict[str, Any]) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    def seeded() -> None:
        torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002

    def drawn() -> list[float]:
        return [torch.rand(1).item(), random.random(), np.random.rand()]  # noqa: NPY002

    batch, plain, watched = classification((6,)), net(), net()
    seeded()
    expected, numbers = train(plain, batch, 3), drawn()
    activations: list[Frame] = []
    with observed(watched, loss=LOSS, count="grad") as lens:
        seeded()
        frames = record(lens, hessian_eigenvalues(2, loss=LOSS, batch=batch, **options))
        lens.pipe(sl.norm("activations")).subscribe(activations.append)
        losses = record(lens, sl.topic("loss"))
        got = train(watched, batch, 3)
        assert drawn() == numbers
    assert len(frames) == 3 * (1 + options.get("eigenvectors", False))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert watched.training
    assert len(activations) == len(losses) == 3


def test_dropout_and_batch_norm_are_off_unless_asked_for_and_always_draw_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    model.get_buffer("1.running_var").fill_(4.0)
    batch = classification((6,))
    for mode, train_mode in (("eval", False), ("train", True)):
        (frame,) = taken(model, batch=batch, mode=mode, products=107)
        exact = eigenvalues(exact_hessian(model, LOSS, batch, train=train_mode))[:5]
        assert values(frame) == pytest.approx(exact.tolist(), rel=1e-3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))
    first, again = taken(model, batch=batch, mode="train", times=2)
    other = taken(model, batch=batch, mode="train", seed=1)[0]
    assert values(first) == values(again)
    assert values(first) != pytest.approx(values(other), rel=1e-2)
    batches = [batch, classification((6,), seed=3)]
    assert taken(model, batches=batches, mode="train")[0].meta["converged"] == 5


def test_the_users_hooks_never_run_and_weight_norm_still_does() -> None:
    torch.manual_seed(0)
    model, batch = NETS["tanh"]
    plain = values(taken(model, batch=batch)[0])
    calls: list[str] = []
    handles = [
        model.register_forward_hook(lambda *_: calls.append("forward")),
        model.get_submodule("0").register_full_backward_hook(lambda *_: calls.append("backward")),
        model.get_parameter("0.weight").register_hook(lambda g: calls.append("gradient")),
    ]
    assert values(taken(model, batch=batch)[0]) == plain
    for handle in handles:
        handle.remove()
    assert calls == []


class WeightNormed(nn.Module):
    """A layer whose weight is length times direction over its norm, from elementary operations."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.bias, self.length, self.direction = (
            nn.Parameter(like.get_parameter(name).detach().clone())
            for name in ("bias", "weight_g", "weight_v")
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = self.length * self.direction / self.direction.square().sum(dim=1, keepdim=True).sqrt()
        return x @ weight.T + self.bias


def test_weight_norm_stays_and_its_wrong_second_derivative_in_pytorch_is_not_used() -> None:
    torch.manual_seed(0)
    batch = classification((6,))
    with pytest.warns(FutureWarning, match="weight_norm"):
        by_hook = nn.utils.weight_norm(nn.Linear(6, 4))
    head = nn.Linear(4, 3)
    model = nn.Sequential(by_hook, nn.Tanh(), head)
    model(batch[0])  # leaves a weight with a history behind
    exact = eigenvalues(exact_hessian(nn.Sequential(WeightNormed(by_hook), nn.Tanh(), head), LOSS, batch))
    (frame,) = taken(model, batch=batch)
    assert values(frame) == pytest.approx(exact[:5].tolist(), rel=1e-3)
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    with torch.no_grad():
        for ours, theirs in zip(
            parametrised.parameters(), (by_hook.bias, by_hook.weight_g, by_hook.weight_v), strict=True
        ):
            ours.copy_(theirs)
    (frame,) = taken(nn.Sequential(parametrised, nn.Tanh(), head), batch=batch)
    assert values(frame) == pytest.approx(exact[:5].tolist(), rel=1e-3)


def test_a_wrong_second_derivative_is_an_error_and_no_eigenvalue() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            wrong: Tensor = gradient * 3 * (x * x.detach().roll(1)).roll(-1)
            return wrong

    model, batch = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), classification((6,))
    with pytest.raises(sl.StreamlensError, match=r"no symmetric matrix.*wrong second derivative"):
        taken(model, batch=batch, loss=lambda out, y: LOSS(Wrong.apply(out), y))  # type: ignore[no-untyped-call]


def test_what_trains_the_model_is_not_copied_and_may_refuse_to_be() -> None:
    class Trainer:
        def __deepcopy__(self, memo: dict[int, Any]) -> Trainer:
            raise AssertionError("a trainer holds loaders and processes")

    model, batch = NETS["tanh"]
    model._trainer = Trainer()  # type: ignore[assignment]
    assert taken(model, batch=batch)[0].meta["converged"] == 5
    del model._trainer


def test_wrappers_that_compute_nothing_are_looked_through_and_names_stay_the_models() -> None:
    inner, batch = NETS["tanh"]
    parts = list(inner.children())
    whole, part = (torch.compile(module, backend="eager") for module in (inner, parts[0]))
    assert isinstance(whole, nn.Module)
    assert isinstance(part, nn.Module)
    for model in (nn.DataParallel(inner), whole, nn.Sequential(part, *parts[1:])):
        frame, vectors = taken(model, batch=batch, eigenvectors=True)
        assert values(frame) == values(taken(inner, batch=batch)[0])
        assert vectors.layers == tuple(name for name, _ in model.named_parameters())


def test_a_loss_that_refers_to_the_model_is_given_its_copy() -> None:
    class Penalised(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            penalty = torch.stack([p.square().sum() for p in self.model.parameters()]).sum()
            total: Tensor = LOSS(out, y) + penalty
            return total

    model, batch = NETS["tanh"]
    (frame,) = taken(model, batch=batch, loss=Penalised(model))
    exact = eigenvalues(exact_hessian(model, LOSS, batch))[:5] + 2
    assert values(frame) == pytest.approx(exact.tolist(), rel=1e-3)


def test_autocast_and_no_grad_around_the_update_change_nothing() -> None:
    model, batch = NETS["tanh"]
    plain = values(taken(model, batch=batch)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert values(taken(model, batch=batch)[0]) == plain
    with torch.inference_mode():
        assert values(taken(model, batch=batch)[0]) == plain


def test_a_failing_loss_costs_that_frame_and_is_reported() -> None:
    model, batch = nn.Sequential(nn.Linear(6, 3)), classification((6,))
    bad = [True]

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out, y, reduction="none" if bad[0] else "mean")

    with observed(model, on_error="report") as lens:
        frames = record(lens, hessian_eigenvalues(2, loss=loss, batch=batch))
        errors = record_errors(lens)
        train(model, batch, 1)
        bad[0] = False
        train(model, batch, 1)
    assert [f.step for f in frames] == [1]
    assert "the loss must be one number" in str(errors[0].error)
    assert "shape (20,)" in str(errors[0].error)


def test_a_detached_loss_is_an_error_that_says_so() -> None:
    model, batch = nn.Linear(6, 3), classification((6,))
    with pytest.raises(sl.StreamlensError, match="does not depend on the parameters"):
        taken(model, batch=batch, loss=lambda out, y: LOSS(out.detach(), y))
    with pytest.raises(sl.StreamlensError, match="a copy of it does not reach its parameters"):
        taken(model, batch=batch, loss=lambda out, y: LOSS(model(batch[0]), y))


X, Y = classification((6,))


def test_inputs_and_labels_of_two_tensors_each_are_one_batch() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(a), self.other(b)

    def loss(outputs: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor]) -> Tensor:
        total: Tensor = LOSS(outputs[0], labels[0]) + LOSS(outputs[1], labels[1])
        return total

    x, y = torch.randn(8, 6), torch.randint(0, 2, (8,))
    (frame,) = taken(Two(), batch=((x, -x), (y, 1 - y)), loss=loss)
    assert frame.meta["converged"] == 5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "mse", "batch": (X, Y)}, TypeError, r"loss='mse'.*function of the model's output"),
        ({}, ValueError, r"either batch=\(inputs, labels\) or batches="),
        ({"batch": (X, Y), "batches": [(X, Y)]}, ValueError, "either batch="),
        ({"batch": X}, TypeError, r"a batch as a pair \(inputs, labels\), got Tensor"),
        ({"batch": (X, Y, Y)}, TypeError, "a batch as a pair.*got a tuple of 3"),
        ({"batch": [(X, Y), (X[:3], Y[:3])]}, TypeError, r"looks like several: pass them as batches=\[\("),
        ({"batch": ((X, Y),) * 3}, TypeError, "looks like several"),
        ({"batches": iter([(X, Y)])}, TypeError, r"a list of pairs.*islice\(loader, 4\)"),
        ({"batches": []}, TypeError, "a list of pairs"),
        ({"batches": [X]}, TypeError, "a batch as a pair"),
        ({"batch": (X, Y), "mode": "both"}, ValueError, "mode='both'.*'eval' or 'train'"),
        ({"batch": (X, Y), "k": 0}, ValueError, "k=0.*from 1 on"),
        ({"batch": (X, Y), "k": 2.0}, ValueError, "k=2.0"),
        (
            {"batch": (X, Y), "which": "biggest"},
            ValueError,
            "which='biggest'.*'largest', 'smallest' or 'magnitude'",
        ),
        ({"batch": (X, Y), "products": 4}, ValueError, "products=4.*at least k = 5"),
        ({"batch": (X, Y), "tolerance": 0}, ValueError, "tolerance=0.*between 0 and 1"),
        ({"batch": (X, Y), "parameters": 3}, TypeError, r"parameters=3.*head\.\*"),
        ({"batch": (X, Y), "seed": -1}, ValueError, "seed=-1"),
    ],
)
def test_wrong_arguments_are_errors_before_anything_runs(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hessian_eigenvalues(**{"loss": LOSS, **options})


def _complex() -> nn.Module:
    model = nn.Module()
    model.phase = nn.Parameter(torch.ones(9, dtype=torch.complex64))
    return model


def _frozen() -> nn.Module:
    return nn.Linear(3, 3).requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (_complex, {}, sl.StreamlensError, "parameter 'phase' is complex"),
        (_frozen, {}, sl.StreamlensError, "no trainable parameters"),
        (lambda: nn.Linear(1, 2), {}, sl.StreamlensError, "k=5.*only 4 trainable numbers.*at most 4"),
        (lambda: nn.Linear(6, 3), {"parameters": "wieght"}, sl.LayerNotFoundError, "did you mean 'weight'"),
        (lambda: 3, {}, TypeError, "takes an nn.Module, got int"),
    ],
)
def test_a_model_that_it_cannot_be_taken_of_is_an_error_at_pipe(
    model: Callable[[], nn.Module], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    made = model()
    with pytest.raises(error, match=message):
        Subject().pipe(hessian_eigenvalues(loss=LOSS, batch=(X, Y), model=made, **options))


def test_a_stream_without_lens_needs_the_model() -> None:
    with pytest.raises(sl.StreamlensError, match=r"hessian_eigenvalues\(\) needs the model.*model=model"):
        Subject().pipe(hessian_eigenvalues(loss=LOSS, batch=(X, Y)))


def test_a_lens_narrowed_to_layers_is_an_error_that_says_how_to_choose_parameters() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    with (
        observed(model) as lens,
        pytest.raises(sl.StreamlensError, match=r"whole model.*layers\(\).*pass parameters="),
    ):
        lens.pipe(sl.layers("0"), hessian_eigenvalues(loss=LOSS, batch=(X, Y)))


def test_the_copy_is_gone_when_the_evaluation_is_over() -> None:
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    ran = [0]

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            alive.add(self)
            ran[0] += 1
            return super().forward(x)

    model = Counted(6, 3)
    gc.collect()
    gc.disable()
    try:
        taken(model, k=2, batch=(X, Y), times=2)
        assert ran == [2]
        assert len(alive) == 0
    finally:
        gc.enable()


def test_attention_by_the_fused_kernel_has_no_second_derivative_of_its_own() -> None:
    model, (x, y) = Attention(), classification((4, 8))
    (gradient,) = torch.autograd.grad(LOSS(model(x), y), model.qkv.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="flash_attention"):
        torch.autograd.grad(gradient.sum(), model.qkv.weight)


def test_lazy_parameters_are_counted_once_they_have_a_shape() -> None:
    model, batch = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 3)), classification((6,))
    source: Subject[Frame] = Subject()
    got: list[Frame] = []
    source.pipe(hessian_eigenvalues(loss=LOSS, batch=batch, model=model)).subscribe(got.append)
    model(batch[0])
    source.on_next(Frame("when", 0, ("",), torch.zeros(1)))
    exact = eigenvalues(exact_hessian(model, LOSS, batch))[:5]
    assert values(got[0]) == pytest.approx(exact.tolist(), rel=1e-3)
