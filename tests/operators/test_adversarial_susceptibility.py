"""`adversarial_susceptibility`, against an attack written by hand; and that a run cannot tell of it."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import streamlens as sl
from streamlens.operators import adversarial_susceptibility
from tests.helpers.recording import observed, record, record_errors
from tests.operators.support import run
from tests.operators.when import when


def data(count: int = 23, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=g), torch.randint(0, 3, (count,), generator=g)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))


def by_hand(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, clip: tuple[float, float] | None = None
) -> float:
    """Example by example, on a copy: each step is that of a single input's own loss."""
    model = copy.deepcopy(model).eval()
    lost = 0
    for row, label in zip(x, y, strict=True):
        leaf = row[None].clone().requires_grad_()
        scores = model(leaf)
        (-scores.log_softmax(1)[0, label]).backward()
        assert leaf.grad is not None
        changed = [
            float(value) + eps * (1 if slope > 0 else -1 if slope < 0 else 0)
            for value, slope in zip(row, leaf.grad[0], strict=True)
        ]
        if clip is not None:
            changed = [min(max(value, clip[0]), clip[1]) for value in changed]
        before = int(scores[0].argmax()) == int(label)
        after = int(model(torch.tensor([changed]))[0].argmax()) == int(label)
        lost += before - after
    return lost / len(x)


def taken(model: nn.Module, loader: Any, eps: float = 0.5, **options: Any) -> float:
    (frame,) = run(adversarial_susceptibility(loader, eps, model=model, **options), [when(3)])
    assert (frame.topic, frame.step, frame.layers) == ("adversarial_susceptibility", 3, ("",))
    assert frame[""].dtype is torch.float32
    return float(frame[""])


@given(st.integers(0, 20), st.sampled_from([0.0, 0.1, 0.5, 2.0]), st.sampled_from([None, (-0.5, 0.7)]))
def test_equals_an_attack_by_hand(seed: int, eps: float, clip: Any) -> None:
    model, (x, y) = net(seed), data(seed=seed)
    loader = DataLoader(TensorDataset(x, y), batch_size=10)
    assert taken(model, loader, eps, clip=clip) == pytest.approx(by_hand(model, x, y, eps, clip))


def test_of_a_linear_model_it_is_known_how_far_each_example_is_from_the_boundary() -> None:
    # Two classes at w x and -w x: a step of eps moves the margin by 2 eps |w|_1.
    w = torch.tensor([1.0, -2, 0.5])
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.stack([w, -w]))
    margins = torch.tensor([0.1, 0.5, 1.0, 3.0, 7.0, -1.0])
    x = margins[:, None] * w / w.square().sum()
    y = torch.zeros(6, dtype=torch.long)
    for eps in (0.0, 0.1, 0.2, 0.5, 3.0):
        flipped = int(((margins > 0) & (margins < eps * 3.5)).sum())
        assert taken(model, [(x, y)], eps) == pytest.approx(flipped / 6), eps


def test_it_can_do_more_good_than_harm_nowhere_but_where_predictions_are_wrong() -> None:
    class Folded(nn.Module):
        """Right about inputs above 1 and below 0, and never sure in between."""

        def forward(self, x: Tensor) -> Tensor:
            score = (x - 0.5).abs().square() - 0.25
            return torch.cat([score, -score], 1)

    x, y = torch.tensor([[0.45], [0.4]]), torch.tensor([0, 0])
    # Away from the middle would be right; the attack goes to it, and with a large step past it.
    assert taken(Folded(), [(x, y)], 0.9) == -1


@pytest.mark.parametrize("recipe", ["every", "epochs"])
def test_on_a_lens_after_each_epoch_or_every_so_many_steps(recipe: str) -> None:
    model, (x, y) = net(), data(40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    wanted: list[float] = []
    with observed(model) as lens:
        every = 2 if recipe == "every" else None
        got = record(lens, adversarial_susceptibility([(x, y)], 0.3, every=every))
        for k in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if recipe == "every":
                wanted += [] if k % 2 else [by_hand(model, x, y, 0.3)]
            elif k in (1, 4):
                wanted.append(by_hand(model, x, y, 0.3))
                lens.epoch_finished()
    assert [f.step for f in got] == ([0, 2, 4] if recipe == "every" else [1, 4])
    assert [float(f[""]) for f in got] == pytest.approx(wanted)
    assert any(wanted)


def test_a_run_cannot_tell() -> None:
    def trained(watch: bool) -> list[Tensor]:
        model, (x, y) = net(), data(20)
        dataset = TensorDataset(x, y)
        loader = DataLoader(dataset, 5, shuffle=True, generator=torch.Generator().manual_seed(2))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        with observed(model) as lens:
            if watch:
                record(lens, adversarial_susceptibility(loader, 0.3, every=1))
            for inputs, target in itertools.islice(itertools.chain(loader, loader), 6):
                nn.functional.cross_entropy(model(inputs), target).backward()
                optimizer.step()
        assert all(m.training for m in model.modules())
        grads = [p.grad for p in model.parameters()]
        assert all(grad is not None for grad in grads)
        # Gradients add up over the steps: none of an attack is among them.
        return [*model.state_dict().values(), *(g for g in grads if g is not None), torch.get_rng_state()]

    assert all(torch.equal(a, b) for a, b in zip(trained(True), trained(False), strict=True))


def test_labels_that_do_not_count_classes_in_any_dimension_and_yes_and_no() -> None:
    torch.manual_seed(0)
    x, y = data(30)
    plain, model = taken(net(), [(x, y)]), net()
    ignored = torch.cat([y, torch.full((5,), -100)])
    assert taken(model, [(torch.cat([x, x[:5]]), ignored)]) == pytest.approx(plain)
    one_hot = nn.functional.one_hot(y, 3).float()
    assert taken(model, [(x, one_hot)]) == pytest.approx(plain)
    assert math.isnan(taken(model, [(x, torch.full((30,), -100))]))
    places = nn.Conv1d(4, 3, 1)
    last = nn.Linear(4, 3)
    last.weight.data, last.bias.data = places.weight.data[:, :, 0], places.bias.data  # type: ignore[union-attr]
    rows = x.reshape(6, 5, 4)
    assert taken(last, [(rows, y.reshape(6, 5))]) == pytest.approx(taken(last, [(x, y)]))
    assert taken(places, [(rows.mT, y.reshape(6, 5))]) == pytest.approx(taken(last, [(x, y)]))
    binary = nn.Sequential(nn.Linear(4, 1))
    two = nn.Linear(4, 2)
    two.weight.data = torch.cat([torch.zeros(1, 4), binary[0].weight.data])  # type: ignore[list-item]
    two.bias.data = torch.cat([torch.zeros(1), binary[0].bias.data])  # type: ignore[list-item]
    yes = (y > 0).long()
    assert taken(binary, [(x, yes.float())], threshold=0) == pytest.approx(taken(two, [(x, yes)]))
    assert taken(two, [(x, yes)]) > 0


def test_a_loss_and_a_metric_of_ones_own() -> None:
    x, y = data()
    model = net()

    def right(outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs.argmax(1) == target).float()

    given = taken(model, [(x, y)], metric=right, loss=nn.CrossEntropyLoss())
    assert given == pytest.approx(by_hand(model, x, y, 0.5))
    # Following the loss down instead takes nothing.
    assert taken(model, [(x, y)], loss=lambda out, target: -nn.functional.cross_entropy(out, target)) <= 0


def test_mappings_functions_and_half_precision() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, ids: Tensor, pixels: Tensor) -> dict[str, Tensor]:
            assert not ids.is_floating_point()
            return {"other": pixels, "logits": self.net(pixels)}

    model, (x, y) = Named(), data()
    wanted = by_hand(model.net, x, y, 0.5)
    batch = {"ids": torch.arange(23), "pixels": x, "labels": y}
    assert taken(model, [batch]) == pytest.approx(wanted)
    given = taken(model, [batch], forward=lambda m, b: (m(b["ids"], b["pixels"]), b["labels"]))
    assert given == pytest.approx(wanted)
    half = copy.deepcopy(model.net).half()
    assert taken(half, [(x.half(), y)]) == pytest.approx(by_hand(half.float(), x.half().float(), y, 0.5))


def test_recurrent_networks_and_attention_are_differentiated_in_evaluation_mode() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 8, batch_first=True)
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.lstm(x)[0]
            out: Tensor = self.head(self.attention(h, h, h)[0].mean(1))
            return out

    torch.manual_seed(0)
    model, (x, y) = Reader(), data(30)
    x = x.reshape(10, 3, 4)
    assert -1 <= taken(model, [(x, y[:10])], 3.0) <= 1


def test_nan_in_the_inputs_is_wrong_before_and_after() -> None:
    model, (x, y) = net(), data()
    wanted = by_hand(model, x[3:], y[3:], 0.5) * 20 / 23
    x[:3, 1] = math.nan
    assert taken(model, [(x, y)]) == pytest.approx(wanted)


def test_what_cannot_be_attacked_is_reported_and_training_goes_on() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3))
    ids, y = torch.randint(0, 5, (6, 2)), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lens = sl.observe(model)
    reports = record_errors(lens)
    got = record(lens, adversarial_susceptibility([(ids, y)], 0.1, every=1))
    record(
        lens, adversarial_susceptibility([(ids, y)], 0.1, every=1, forward=lambda m, b: (torch.ones(6, 3), y))
    )
    nn.functional.cross_entropy(model(ids), y).backward()
    optimizer.step()
    lens.close()
    assert got == []
    assert "no floating-point tensor" in str(reports[0].error)
    assert all(p.requires_grad for p in model.parameters())


def test_a_loss_that_does_not_depend_on_the_inputs_is_said() -> None:
    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(x.argmax(1), 4).float()

    model = nn.Sequential(Rounded(), nn.Linear(4, 3))
    with pytest.raises(sl.StreamlensError, match="does not depend on the inputs"):
        taken(model, [data()])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, r"adversarial_susceptibility\(eps=-0.1\)"),
        ({"eps": math.nan}, ValueError, "eps=nan"),
        ({"eps": "0.1"}, ValueError, "eps='0.1'"),
        ({"clip": (1, 0)}, ValueError, r"clip=\(1, 0\)"),
        ({"clip": 1}, ValueError, "clip=1"),
        ({"loss": "ce"}, TypeError, "loss='ce'"),
        ({"metric": torch.eq}, ValueError, "metric=.*pass loss="),
        ({"every": 0}, ValueError, "every=0"),
        ({"loader": []}, ValueError, "no batches"),
        ({"loader": iter([data()])}, TypeError, "only once"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        adversarial_susceptibility(**{"loader": [data()], "eps": 0.1, **options})


def test_without_a_model_it_says_what_to_pass() -> None:
    with pytest.raises(sl.StreamlensError, match=r"pass adversarial_susceptibility\(\.\.\., model=model\)"):
        adversarial_susceptibility([data()], 0.1)(sl.Feed())
