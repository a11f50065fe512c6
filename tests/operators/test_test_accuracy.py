"""`test_accuracy`, against an evaluation by hand; and that a run cannot tell that it took place."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from reactivex.subject import Subject
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

import streamlens as sl
from streamlens.frame import Frame
from streamlens.operators._batches import Loader
from streamlens.operators._model import undisturbed
from tests._runs import Recipe, same, small_model, train
from tests.helpers.recording import observed, record


def data(count: int = 23, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=g), torch.randint(0, 3, (count,), generator=g)


def by_hand(model: nn.Module, x: Tensor, y: Tensor) -> float:
    modes = [m.training for m in model.modules()]
    model.eval()
    with torch.no_grad():
        right = [int(row.argmax()) == int(label) for row, label in zip(model(x), y, strict=True)]
    for m, mode in zip(model.modules(), modes, strict=True):
        m.training = mode
    return sum(right) / len(right)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x, y = data(6, seed)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def dropping(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def test_a_short_last_batch_counts_for_what_it_has() -> None:
    model, (x, y) = dropping(), data(23)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    wanted: list[float] = []
    with observed(model) as lens:
        got = record(lens, sl.test_accuracy(DataLoader(TensorDataset(x, y), batch_size=10), every=2))
        for k in range(5):
            step(model, optimizer, k)
            if k % 2 == 0:
                with lens.paused():
                    wanted.append(by_hand(model, x, y))
    assert [f.step for f in got] == [0, 2, 4]
    assert [float(f[""]) for f in got] == pytest.approx(wanted)
    assert {(f.topic, f.layers, f.values.dtype) for f in got} == {  # type: ignore[union-attr]
        ("test_accuracy", ("",), torch.float32)
    }


@pytest.mark.parametrize(
    ("operators", "steps"),
    [
        (lambda d: (sl.test_accuracy(d),), [2, 5]),
        (lambda d: (sl.every(2), sl.test_accuracy(d)), [0, 2, 4]),
        (lambda d: (sl.every(2), sl.test_accuracy(d, every=3)), [0]),
        (lambda d: (sl.topic("epoch_started"), sl.test_accuracy(d)), [0, 3]),
        (lambda d: (sl.layers("0"), sl.test_accuracy(d, every=4)), [0, 4]),
    ],
    ids=["each epoch", "the lens's cadence", "both cadences", "a topic says when", "layers do not matter"],
)
def test_when_it_is_due(operators: Callable[[Any], tuple[sl.Operator, ...]], steps: list[int]) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        got = record(lens, *operators([data()]))
        for _ in lens.epochs(2):
            for k in range(3):
                step(model, optimizer, k)
    assert [f.step for f in got] == steps


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor | None = None) -> dict[str, Tensor]:
        return {"hidden": a, "logits": self.head(a if b is None else a + b)}


@pytest.mark.parametrize(
    "batch",
    [
        lambda x, y: (x, torch.zeros_like(x), y),
        lambda x, y: [x, torch.zeros_like(x), y],
        lambda x, y: {"a": x, "b": torch.zeros_like(x), "labels": y},
        lambda x, y: {"a": x, "target": y},
        lambda x, y: {"image": x, "y": y},
    ],
    ids=["tuple", "list", "mapping", "one argument by name", "one argument by another name"],
)
def test_batches_of_every_form(batch: Callable[[Tensor, Tensor], Any]) -> None:
    model, (x, y) = _Two(), data()
    wanted = float((model(x)["logits"].argmax(1) == y).float().mean())
    assert once(model, [batch(x, y)]) == pytest.approx(wanted)


def once(model: nn.Module, loader: Any, **options: Any) -> float:
    """The accuracy on a plain stream of one frame."""
    source: Subject[Frame] = Subject()
    got: list[Frame] = []
    source.pipe(sl.test_accuracy(loader, model=model, **options)).subscribe(got.append)
    source.on_next(Frame("loss", 0, ("",), torch.zeros(1)))
    (only,) = got
    return float(only[""])


def test_a_key_for_the_labels_and_a_forward_of_ones_own() -> None:
    model, (x, y) = _Two(), data()
    wanted = once(model, [(x, y)])
    assert once(model, [{"a": x, "gold": y}], labels="gold") == wanted
    assert once(model, [{"x": x, "y": y}], forward=lambda m, b: (m(b["x"])["logits"] * 2, b["y"])) == wanted


def test_a_metric_of_ones_own_is_averaged_over_examples() -> None:
    model, (x, y) = nn.Linear(4, 3), data(7)
    loader = [(x[:5], y[:5]), (x[5:], y[5:])]
    wanted = nn.functional.cross_entropy(model(x), y).item()
    assert once(model, loader, metric=nn.functional.cross_entropy) == pytest.approx(wanted, rel=1e-5)

    def each(outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, labels, reduction="none")

    assert once(model, loader, metric=each) == pytest.approx(wanted, rel=1e-5)


def test_ignored_labels_and_nan() -> None:
    model, (x, y) = nn.Linear(4, 3), data(8)
    y[:4] = 7
    right = float((model(x)[4:].argmax(1) == y[4:]).float().mean())
    assert once(model, [(x, y)], ignore_index=7) == pytest.approx(right)
    assert math.isnan(once(model, [(x, torch.full((8,), -100))]))
    with torch.no_grad():
        model.bias.fill_(math.nan)
    assert once(model, [(x, y)]) == 0


class _Drawing(Dataset[tuple[Tensor, int]]):
    """A data set that augments with every generator there is."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        random.random()
        np.random.rand()  # noqa: NPY002
        return torch.randn(16), i % 3


def _loaders() -> dict[str, Callable[[], Any]]:
    return {
        "shuffled": lambda: DataLoader(_Drawing(), batch_size=5, shuffle=True),
        "with a sampler": lambda: DataLoader(
            _Drawing(), batch_size=5, sampler=RandomSampler(_Drawing(), replacement=True)
        ),
        "with workers": lambda: DataLoader(_Drawing(), batch_size=5, shuffle=True, num_workers=1),
    }


@pytest.mark.parametrize("kind", _loaders())
def test_a_run_with_it_is_bit_identical(kind: str) -> None:
    recipe = Recipe("convolutions", "momentum", steps=2)

    @contextlib.contextmanager
    def observing(model: nn.Module, criterion: nn.Module) -> Iterator[None]:
        with sl.observe(model, loss=criterion, on_error="raise") as lens:
            got = record(lens, sl.test_accuracy(_loaders()[kind](), every=1))
            yield
        assert len(got) == 2

    assert same(train(recipe), train(recipe, observing))


def test_the_loader_of_training_goes_on_in_its_own_order() -> None:
    def orders(watch: bool) -> list[list[float]]:
        torch.manual_seed(0)
        x = torch.arange(12.0)[:, None].expand(-1, 4)
        generator = torch.Generator().manual_seed(5)
        loader = DataLoader(
            TensorDataset(x, torch.zeros(12).long()), batch_size=4, shuffle=True, generator=generator
        )
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seen = []
        with observed(model) as lens:
            if watch:
                lens.pipe(sl.test_accuracy(loader, every=1)).subscribe(lambda _: None)
            for _ in range(2):
                for batch, labels in loader:
                    seen.append(batch[:, 0].tolist())
                    nn.functional.cross_entropy(model(batch), labels).backward()
                    optimizer.step()
        return seen

    assert orders(True) == orders(False)


def test_an_iteration_under_way_over_persistent_workers_is_not_cut_short() -> None:
    loader = DataLoader(TensorDataset(*data(8)), batch_size=2, num_workers=1, persistent_workers=True)
    model = small_model()
    under_way = iter(loader)
    next(under_way)
    value = once(model, loader)
    assert len(list(under_way)) == 3
    assert value == pytest.approx(by_hand(model, *data(8)))


class _Adapter(nn.Linear):
    """Merges something into its weight when it is put into evaluation mode, as adapters do."""

    def train(self, mode: bool = True) -> _Adapter:
        if mode != self.training:
            with torch.no_grad():
                self.weight.add_(0.1 if not mode else -0.1)
        return super().train(mode)


def test_modes_come_back_part_by_part_and_a_models_own_train_is_not_called() -> None:
    model = nn.Sequential(_Adapter(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    once(model, [data()])
    assert [m.training for m in model] == [True, False, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_a_model_keeps_from_an_evaluation_is_good_for_training() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)
            self.cache: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.cache is None:
                self.cache = torch.ones(4).sin()
            out: Tensor = self.head(x * self.cache)
            return out

    model = Caching()
    once(model, [data()])
    model(data()[0].requires_grad_()).sum().backward()


def test_no_gradient_appears_and_every_lens_stays_silent() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observed(model, count="grad") as lens, observed(model, count="grad") as other:
        seen = record(other, sl.norm("activations"))
        lens.pipe(sl.test_accuracy([data()], every=1)).subscribe(lambda _: None)
        step(model, optimizer, 0)
        gradients = [p.grad is not None for p in model.parameters()]
        optimizer.zero_grad(set_to_none=True)
        step(model, optimizer, 1)
    assert all(gradients)
    assert [(f.step, f.micro_step) for f in seen] == [(0, 0), (1, 0)]


def test_what_only_wraps_the_model_is_left_out() -> None:
    model, (x, y) = small_model(), data()
    wrapped = nn.DataParallel(model)
    wrapped.forward = None  # type: ignore[assignment]
    assert once(wrapped, [(x, y)]) == pytest.approx(by_hand(model, x, y))


def test_a_failing_evaluation_is_reported_and_the_next_one_works() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = itertools.count()

    def forward(m: nn.Module, batch: Any) -> tuple[Any, Any]:
        if next(calls) == 0:
            raise OSError("disk")
        return m(batch[0]), batch[1]

    reports: list[Any] = []
    with sl.observe(model) as lens:
        lens.errors.subscribe(reports.append)
        got = record(lens, sl.test_accuracy([data()], every=1, forward=forward))
        for k in range(2):
            step(model, optimizer, k)
            assert model.training
    assert [f.step for f in got] == [1]
    assert [str(r.error) for r in reports] == ["disk"]


def test_as_a_derived_topic_it_is_what_the_rule_looks_for() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        lens.derive("test_accuracy", lens.pipe(sl.test_accuracy([data()], every=1)))
        got = record(lens, sl.topic("test_accuracy"))
        lens.pipe(sl.overfitting()).subscribe(lambda _: None)
        step(model, optimizer, 0)
    assert [f.topic for f in got] == ["test_accuracy"]


@pytest.mark.parametrize(
    ("loader", "options", "error", "message"),
    [
        (3, {}, TypeError, r"test_accuracy\(\) takes a loader"),
        (iter([1]), {}, TypeError, r"gone through only once.*list\(loader\)"),
        ([], {}, ValueError, "the loader has no batches"),
        ([1], {"every": 0}, ValueError, r"every=0"),
        ([1], {"every": True}, ValueError, r"every=True"),
        ([1], {"labels": 3}, TypeError, r"labels=3"),
        ([1], {"forward": 3}, TypeError, r"forward=3"),
        ([1], {"threshold": "x"}, ValueError, r"threshold='x'"),
    ],
)
def test_bad_arguments_are_named(
    loader: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sl.test_accuracy(loader, **options)


def test_a_plain_stream_needs_the_model() -> None:
    with pytest.raises(sl.StreamlensError, match=r"test_accuracy\(\) needs the model.*model=model"):
        Subject[Frame]().pipe(sl.test_accuracy([data()]))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.ones(3, 4), r"gave a Tensor: pass forward="),
        ((torch.ones(3, 4),), r"gave a tuple of 1: pass forward="),
        ({"a": torch.ones(3, 4), "gold": torch.ones(3)}, r"'a', 'gold'.*pass labels="),
    ],
)
def test_a_batch_that_is_not_understood_is_described(batch: Any, message: str) -> None:
    with pytest.raises(sl.StreamlensError, match=message):
        Loader("x", [batch]).split(batch)


def test_a_loader_that_turns_out_empty_is_reported() -> None:
    with pytest.raises(sl.StreamlensError, match="the loader gave no batch"):
        once(small_model(), DataLoader(TensorDataset(torch.empty(0, 4), torch.empty(0))))


def test_the_loaders_own_generators_are_put_back_also_when_it_is_left_early() -> None:
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(TensorDataset(torch.arange(6)), shuffle=True, generator=generator)
    before = generator.get_state()
    model = small_model()
    with undisturbed(model):
        for _ in Loader("x", loader):
            break
    assert torch.equal(generator.get_state(), before)
