"""`train_accuracy`, against predictions counted one by one."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reactivex.subject import Subject
from torch import Tensor, nn

import streamlens as sl
from streamlens.frame import Frame, Kind
from tests._runs import Recipe, same, train
from tests.helpers.recording import observed, record
from tests.operators.support import resumed, run

OUTPUT, LABELS = "network_output", "input_labels"


def by_hand(outputs: Tensor, labels: Tensor, ignore: int = -100) -> tuple[int, int]:
    """(right, counted) of (N, C) outputs, with plain loops; NaN is never right."""
    right = counted = 0
    for row, label in zip(outputs.tolist(), labels.tolist(), strict=True):
        if label == ignore:
            continue
        counted += 1
        right += not any(map(math.isnan, row)) and max(range(len(row)), key=row.__getitem__) == label
    return right, counted


def pair(step: int, outputs: Tensor, labels: Tensor, **fields: Any) -> list[Frame]:
    fields = {"kind": Kind.MICRO_STEP, **fields}
    return [Frame(OUTPUT, step, ("",), (outputs,), **fields), Frame(LABELS, step, ("",), (labels,), **fields)]


def accuracy(outputs: Tensor, labels: Tensor, **options: Any) -> float:
    (only,) = run(sl.train_accuracy(**options), pair(0, outputs, labels))
    assert (only.topic, only.layers, only.kind) == ("train_accuracy", ("",), Kind.STEP)
    return float(only[""])


def test_micro_batches_of_different_sizes_count_by_their_examples() -> None:
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    wanted: list[float] = []
    with observed(model, loss=criterion) as lens:
        got = record(lens, sl.train_accuracy())
        for _ in range(4):
            right = counted = 0
            for size in (7, 3, 1):
                x, y = torch.randn(size, 4), torch.randint(0, 3, (size,))
                out = model(x)
                found = by_hand(out, y)
                right, counted = right + found[0], counted + found[1]
                (criterion(out, y) / 3).backward()
            optimizer.step()
            optimizer.zero_grad()
            wanted.append(right / counted)
    assert [f.step for f in got] == [0, 1, 2, 3]
    assert [float(f[""]) for f in got] == pytest.approx(wanted)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 99)), min_size=1, max_size=4),
    st.integers(2, 5),
)
def test_equals_counting(parts: list[tuple[int, int]], classes: int) -> None:
    frames: list[Frame] = []
    right = counted = 0
    for micro, (size, seed) in enumerate(parts):
        g = torch.Generator().manual_seed(seed)
        outputs = torch.randn(size, classes, generator=g)
        outputs[torch.rand(outputs.shape, generator=g) < 0.05] = math.nan
        labels = torch.randint(0, classes, (size,), generator=g)
        labels[torch.rand(size, generator=g) < 0.2] = -100
        found = by_hand(outputs, labels)
        right, counted = right + found[0], counted + found[1]
        frames += pair(3, outputs, labels, micro_step=micro)
    (only,) = run(sl.train_accuracy(), frames)
    got = float(only[""])
    assert math.isnan(got) if not counted else got == pytest.approx(right / counted)


def test_labels_may_come_before_the_output_they_belong_to() -> None:
    frames = pair(0, torch.eye(3), torch.tensor([0, 1, 0]))
    (only,) = run(sl.train_accuracy(), frames[::-1])
    assert float(only[""]) == pytest.approx(2 / 3)


def test_classes_are_found_where_the_labels_shape_says() -> None:
    torch.manual_seed(0)
    pixels, places = torch.randn(2, 5, 3, 4), torch.randint(0, 5, (2, 3, 4))
    wanted = by_hand(pixels.permute(0, 2, 3, 1).reshape(-1, 5), places.reshape(-1))
    assert accuracy(pixels, places) == pytest.approx(wanted[0] / 24)
    tokens, targets = torch.randn(2, 6, 5), torch.randint(0, 5, (2, 6))
    wanted = by_hand(tokens.reshape(-1, 5), targets.reshape(-1))
    assert accuracy(tokens, targets) == pytest.approx(wanted[0] / 12)
    assert accuracy(tokens, targets.reshape(-1)) == pytest.approx(wanted[0] / 12)
    square, targets = torch.randn(2, 5, 5), torch.randint(0, 5, (2, 5))
    wanted = by_hand(square.reshape(-1, 5), targets.reshape(-1))
    assert accuracy(square, targets, class_dim=-1) == pytest.approx(wanted[0] / 10)
    wanted = by_hand(square.transpose(1, 2).reshape(-1, 5), targets.reshape(-1))
    assert accuracy(square, targets) == pytest.approx(wanted[0] / 10)


def test_labels_may_be_class_probabilities_or_a_column() -> None:
    outputs, labels = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 1, 1])
    soft = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    assert accuracy(outputs, soft) == accuracy(outputs, labels[:, None]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 2)])
def test_a_threshold_is_for_numbers_that_say_yes_or_no(shape: tuple[int, ...]) -> None:
    outputs = torch.tensor([0.3, -0.2, math.nan, 2.0]).reshape(shape)
    assert accuracy(outputs, torch.tensor([1.0, 1.0, 0.0, 1.0]).reshape(shape), threshold=0) == 0.5
    assert accuracy(outputs, torch.tensor([0, -1, 0, 1]), threshold=0.5, ignore_index=-1) == pytest.approx(
        2 / 3
    )


def test_a_metric_of_ones_own_gives_scores_or_their_mean() -> None:
    def error(outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs - labels).abs()

    outputs, labels = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 1.0, 1.0])
    more = pair(0, torch.tensor([9.0]), torch.tensor([1.0]), micro_step=1)
    frames = pair(0, outputs, labels) + more
    (each,) = run(sl.train_accuracy(metric=error), frames)
    (mean,) = run(sl.train_accuracy(metric=lambda o, y: error(o, y).mean().item()), frames)
    assert float(each[""]) == float(mean[""]) == pytest.approx((0 + 1 + 3 + 8) / 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_outputs_of_any_precision(dtype: torch.dtype) -> None:
    assert accuracy(torch.eye(4, dtype=dtype), torch.tensor([0, 1, 2, 2])) == 0.75


def test_without_a_label_that_counts_it_is_nan() -> None:
    assert math.isnan(accuracy(torch.eye(2), torch.tensor([-100, -100])))
    assert math.isnan(accuracy(torch.empty(0, 3), torch.empty(0, dtype=torch.long)))


class _CarriesItsLoss(nn.Module):
    """As models of Hugging Face do: given labels, it returns its loss first."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_model_that_returns_its_loss_in_front_of_its_prediction() -> None:
    torch.manual_seed(0)
    model = _CarriesItsLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        got, made = record(lens, sl.train_accuracy()), record(lens, sl.topic(OUTPUT))
        x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
        output = model(x, labels=y)
        output["loss"].backward()
        optimizer.step()
    assert torch.equal(made[0][""], output["logits"].detach())
    assert float(got[0][""]) == pytest.approx(by_hand(output["logits"], y)[0] / 8)


def test_only_due_steps_are_counted() -> None:
    model, criterion = nn.Linear(2, 2), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observed(model, loss=criterion) as lens:
        got = record(lens, sl.every(2), sl.train_accuracy())
        for _ in range(5):
            criterion(model(torch.randn(3, 2)), torch.tensor([0, 1, 0])).backward()
            optimizer.step()
    assert [f.step for f in got] == [0, 2, 4]


def test_training_is_bit_identical() -> None:
    recipe = Recipe("convolutions", "adam", accumulation=2)
    alone = train(recipe)

    def observing(model: nn.Module, criterion: nn.Module) -> sl.Lens:
        lens = sl.observe(model, loss=criterion, on_error="raise")
        lens.pipe(sl.train_accuracy()).subscribe(lambda _: None)
        return lens

    assert same(alone, train(recipe, observing))


def test_a_resumed_step_counts_all_its_micro_batches() -> None:
    torch.manual_seed(0)
    frames = [
        f for m in range(3) for f in pair(0, torch.randn(4, 3), torch.randint(0, 3, (4,)), micro_step=m)
    ]
    wanted = float(run(sl.train_accuracy(), frames)[0][""])
    for at in (2, 4):
        (only,) = resumed(sl.train_accuracy, frames, at)
        assert float(only[""]) == pytest.approx(wanted)


def test_what_does_not_fit_is_said_with_the_remedy() -> None:
    source: Subject[Frame] = Subject()
    source.pipe(sl.train_accuracy()).subscribe(lambda _: None)
    with pytest.raises(sl.StreamlensError, match=r"\(4, 1\).*threshold="):
        source.on_next(pair(0, torch.ones(4, 1), torch.ones(4))[0])
    bad = pair(1, torch.ones(4, 3), torch.ones(2, 2).long())
    source.on_next(bad[0])
    with pytest.raises(sl.StreamlensError, match=r"shape \(4,\) and labels of shape \(2, 2\).*class_dim="):
        source.on_next(bad[1])


def test_numbers_are_refused_with_the_remedy() -> None:
    source: Subject[Frame] = Subject()
    source.pipe(sl.train_accuracy()).subscribe(lambda _: None)
    with pytest.raises(sl.StreamlensError, match=r"train_accuracy\(\) needs raw frames.*while training"):
        source.on_next(Frame(OUTPUT, 0, ("",), torch.ones(1)))
    model = nn.Linear(2, 2)
    with sl.observe(model) as lens, pytest.raises(sl.StreamlensError, match="needs raw frames"):
        lens.pipe(sl.topic(OUTPUT, LABELS), sl.norm(), sl.train_accuracy())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"class_dim": 1.0}, ValueError, r"train_accuracy\(class_dim=1.0\)"),
        ({"ignore_index": "x"}, ValueError, "ignore_index='x'"),
        ({"threshold": math.nan}, ValueError, "threshold=nan"),
        ({"metric": 3}, TypeError, "metric=3"),
        ({"threshold": 0, "class_dim": 1}, ValueError, "not both"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sl.train_accuracy(**options)


def test_labels_that_never_come_are_reported() -> None:
    model = nn.Linear(2, 2)
    reports: list[Any] = []
    with sl.observe(model) as lens:
        lens.errors.subscribe(reports.append)
        lens.pipe(sl.train_accuracy()).subscribe(lambda _: None)
        for _ in range(2):
            model(torch.ones(1, 2)).sum().backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert any("labels come with a loss" in str(r.error) for r in reports)


def test_an_output_with_logits_is_read_by_that_name() -> None:
    from streamlens.operators._batches import logits_of

    first, second = torch.ones(1), torch.ones(2)
    assert logits_of(SimpleNamespace(hidden=first, logits=second), "x") is second
    assert logits_of({"a": first, "b": second}, "x") is first
    with pytest.raises(sl.StreamlensError, match=r"x\(\): the model's output, str, has no tensor"):
        logits_of("text", "x")
