"""Parameters of unusual shapes, types and owners: recurrent, attention, sparse, scalar, half, complex."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD, Adam, SparseAdam

import streamlens as sl
from tests.helpers.by_hand import (
    HandStep,
    norms,
    regression,
    squared_error,
    train_by_hand,
    update_by_hand,
)
from tests.helpers.operations import Operations
from tests.helpers.recording import assert_steps_equal, observed, record

FULL = ("parameters", "parameter_gradients", "parameter_updates")


def truth_of(steps: list[HandStep]) -> dict[str, list[dict[str, Tensor]]]:
    return {
        "parameters": [s.after for s in steps],
        "parameter_gradients": [s.gradients for s in steps],
        "parameter_updates": [s.updates() for s in steps],
    }


class Recurrent(nn.Module):
    def __init__(self, cell: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell = cell(4, 3, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.cell(x)[0][:, -1])
        return out


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.attention(x, x, x)[0].mean(1))
        return out


class Encoding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        out: Tensor = self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))
        return out


IN_ENCODER = "encoder.layers.1.self_attn.in_proj_weight"


@pytest.mark.parametrize(
    "make",
    [lambda: Recurrent(nn.LSTM), lambda: Recurrent(nn.GRU), Attentive, Encoding],
    ids=["lstm", "gru", "attention", "transformer"],
)
def test_recurrent_and_attention_parameters_come_under_their_full_names(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    batches = regression(1, 3, (5, 2, 4))
    truth = truth_of(train_by_hand(twin, Adam(twin.parameters(), lr=0.01), batches, squared_error))
    with observed(model) as lens:
        raw = {name: record(lens, sl.topic(name)) for name in FULL}
        reduced = {name: record(lens, sl.norm(name)) for name in FULL}
        activations = record(lens, sl.norm("activations"))
        train_by_hand(model, Adam(model.parameters(), lr=0.01), batches, squared_error)
    for name in FULL:
        assert_steps_equal(raw[name], truth[name])
        assert_steps_equal(reduced[name], [norms(v) for v in truth[name]], rtol=2e-6)
    names = set(raw["parameters"][0])
    assert {"cell.weight_ih_l1_reverse", "attention.in_proj_weight", IN_ENCODER} & names
    assert names == {name for name, _ in model.named_parameters()}
    assert len(activations) == 3


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.embedding(x).sum(1)
        return out


def test_sparse_gradients_with_repeated_indices_have_the_norm_of_their_sums() -> None:
    torch.manual_seed(0)
    model = Lookup()
    tokens, target = torch.tensor([[1, 1, 4], [1, 0, 4]]), torch.zeros(2, 3)
    batches = [(tokens, target)] * 3
    twin = copy.deepcopy(model)
    steps = train_by_hand(twin, SparseAdam(list(twin.parameters()), lr=0.1), batches, squared_error)
    with observed(model) as lens:
        raw = record(lens, sl.topic("weight_gradients"))
        gradient_norms = record(lens, sl.norm("parameter_gradients"))
        update_norms = record(lens, sl.norm("parameter_updates"))
        unclipped = record(lens, sl.norm("raw_gradients"))
        train_by_hand(model, SparseAdam(list(model.parameters()), lr=0.1), batches, squared_error)
    truth = truth_of(steps)
    assert [f["embedding"].is_sparse for f in raw] == [True] * 3
    for frame, wanted in zip(raw, truth["parameter_gradients"], strict=True):
        assert torch.equal(frame["embedding"].to_dense(), wanted["embedding.weight"].to_dense())
    assert_steps_equal(gradient_norms, [norms(v) for v in truth["parameter_gradients"]], rtol=2e-6)
    assert_steps_equal(unclipped, [norms(v) for v in truth["parameter_gradients"]], rtol=2e-6)
    assert_steps_equal(update_norms, [norms(v) for v in truth["parameter_updates"]], rtol=2e-6)


class Scaled(nn.Module):
    """A scalar parameter and one without elements, next to an ordinary layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x) * self.gain + self.nothing.sum()
        return out


def test_scalar_and_empty_parameters_come_like_any_other() -> None:
    torch.manual_seed(0)
    model = Scaled()
    twin = copy.deepcopy(model)
    batches = regression(1, 3, (6, 5))
    truth = truth_of(train_by_hand(twin, SGD(twin.parameters(), lr=0.1), batches, squared_error))
    with observed(model) as lens:
        raw = {name: record(lens, sl.topic(name)) for name in FULL}
        train_by_hand(model, SGD(model.parameters(), lr=0.1), batches, squared_error)
    for name in FULL:
        assert_steps_equal(raw[name], truth[name])


def test_norms_of_scalar_and_empty_parameters_are_right_without_a_raw_subscriber() -> None:
    torch.manual_seed(0)
    model = Scaled()
    twin = copy.deepcopy(model)
    batches = regression(1, 3, (6, 5))
    truth = truth_of(train_by_hand(twin, SGD(twin.parameters(), lr=0.1), batches, squared_error))
    with observed(model) as lens:
        reduced = {name: record(lens, sl.norm(name)) for name in FULL}
        train_by_hand(model, SGD(model.parameters(), lr=0.1), batches, squared_error)
    for name in FULL:
        assert_steps_equal(reduced[name], [norms(v) for v in truth[name]], rtol=2e-6)
        assert [f["nothing"].item() for f in reduced[name]] == [0.0] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_other_precisions_are_exact_raw_and_accumulated_wide(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    twin = copy.deepcopy(model)
    batches = [(x.to(dtype), y.to(dtype)) for x, y in regression(1, 3, (6, 5))]
    truth = truth_of(train_by_hand(twin, SGD(twin.parameters(), lr=0.1), batches, squared_error))
    with observed(model) as lens:
        reduced = {name: record(lens, sl.norm(name)) for name in FULL}
        train_by_hand(model, SGD(model.parameters(), lr=0.1), batches, squared_error)
    for name in FULL:
        assert_steps_equal(reduced[name], [norms(v) for v in truth[name]], rtol=2e-6)
        assert {f[layer].dtype for f in reduced[name] for layer in f} <= {torch.float32, torch.float64}


def test_raw_frames_keep_the_precision_of_the_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3)).to(torch.bfloat16)
    twin = copy.deepcopy(model)
    batches = [(x.bfloat16(), y.bfloat16()) for x, y in regression(1, 3, (6, 5))]
    truth = truth_of(train_by_hand(twin, SGD(twin.parameters(), lr=0.1), batches, squared_error))
    with observed(model) as lens:
        raw = {name: record(lens, sl.topic(name)) for name in FULL}
        train_by_hand(model, SGD(model.parameters(), lr=0.1), batches, squared_error)
    for name in FULL:
        assert_steps_equal(raw[name], truth[name])


def test_the_norm_of_half_precision_weights_does_not_overflow() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).half()
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(8000.0)
    optimizer = SGD(model.parameters(), lr=0.0)
    with observed(model) as lens:
        weights = record(lens, sl.norm("weights"))
        model(torch.zeros(1, 64).half()).sum().backward()
        optimizer.step()
    assert weights[0]["0"].item() == pytest.approx(8000.0 * 64)


class ComplexGain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(3, 5, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex64) @ self.gain.T).abs()


def test_complex_parameters_have_the_norm_of_their_moduli() -> None:
    torch.manual_seed(0)
    model = ComplexGain()
    twin = copy.deepcopy(model)
    batches = regression(1, 3, (6, 5))
    truth = truth_of(train_by_hand(twin, SGD(twin.parameters(), lr=0.1), batches, squared_error))
    with observed(model) as lens:
        raw = {name: record(lens, sl.topic(name)) for name in FULL}
        train_by_hand(model, SGD(model.parameters(), lr=0.1), batches, squared_error)
    with observed(copy.deepcopy(twin)) as lens:
        second = lens.engine.model
        assert second is not None
        reduced = {name: record(lens, sl.norm(name)) for name in FULL}
        train_by_hand(second, SGD(second.parameters(), lr=0.1), batches, squared_error)
    again = copy.deepcopy(twin)
    later = truth_of(train_by_hand(again, SGD(again.parameters(), lr=0.1), batches, squared_error))
    for name in FULL:
        assert_steps_equal(raw[name], truth[name])
        wanted = [{k: v.abs().double().square().sum().sqrt() for k, v in s.items()} for s in later[name]]
        assert_steps_equal(reduced[name], wanted, rtol=2e-6)


INTEGERS = {
    "int8": torch.tensor([-100, 100, 7], dtype=torch.int8),
    "uint8": torch.tensor([200, 3, 7], dtype=torch.uint8),
    "int64": torch.tensor([2**40, 3, 7]),
    "bool": torch.tensor([True, False, True]),
    "float8": torch.tensor([1.5, -3.0, 7.0]).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_quantised_parameters_change_by_what_they_change_and_cost_nobody_a_value(name: str) -> None:
    """Their own arithmetic wraps around, or there is none."""

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, 3)
            self.codes = nn.Parameter(INTEGERS[name].clone(), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(x)
            return out

    model = Quantised()
    optimizer = SGD(model.parameters(), lr=0.1)
    before = model.codes.double()

    def flip(*_: object) -> None:
        with torch.no_grad():
            model.codes.copy_(before.flip(0))

    with observed(model) as lens:
        raw, reduced = record(lens, sl.topic("parameter_updates")), record(lens, sl.norm("parameter_updates"))
        optimizer.register_step_post_hook(flip)
        train_by_hand(model, optimizer, regression(1, 1, (6, 5)), squared_error)
    expected = model.codes.double() - before
    assert torch.equal(raw[0]["codes"].double(), expected)
    assert reduced[0]["codes"].item() == pytest.approx(expected.norm().item(), rel=1e-6)
    assert set(reduced[0]) == {"codes", "head.weight", "head.bias"}


def test_transposed_and_channels_last_parameters_are_measured_like_contiguous_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 2 * 2, 3))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weight = model.get_parameter("2.weight")
    weight.data = weight.data.T.contiguous().T
    twin = copy.deepcopy(model)
    batches = regression(1, 3, (6, 2, 4, 4))
    truth = truth_of(train_by_hand(twin, Adam(twin.parameters(), lr=0.01), batches, squared_error))
    with observed(model) as lens:
        reduced = {name: record(lens, sl.norm(name)) for name in FULL}
        train_by_hand(model, Adam(model.parameters(), lr=0.01), batches, squared_error)
    for name in FULL:
        assert_steps_equal(reduced[name], [norms(v) for v in truth[name]], rtol=2e-6)


def test_lazy_modules_are_known_from_their_first_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(3))
    batches = regression(1, 3, (6, 5))
    with observed(model) as lens:
        weights, updates = record(lens, sl.norm("weights")), record(lens, sl.norm("weight_updates"))
        model(batches[0][0])
        optimizer = SGD(model.parameters(), lr=0.1)
        train_by_hand(model, optimizer, batches, squared_error)
    assert [f.layers for f in weights] == [("0", "2")] * 3
    assert [f.layers for f in updates] == [("0", "2")] * 3
    assert weights[-1]["2"].item() == pytest.approx(float(model.get_parameter("2.weight").detach().norm()))


@pytest.mark.parametrize("given", [False, True])
def test_lazy_modules_are_observed_from_their_very_first_forward(given: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(3), nn.Identity())
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = regression(1, 3, (6, 5))
    steps: list[HandStep] = []
    with observed(model, optimizers=[optimizer] if given else None) as lens:
        raw = {topic: record(lens, sl.topic(topic)) for topic in (*FULL, "raw_gradients")}
        chosen = record(lens, sl.layers("2"), sl.norm("weight_updates"))
        outputs, backward = record(lens, sl.norm("activations")), record(lens, sl.norm("layer_gradients"))
        # Its parameters have no shape yet, so that the loop cannot take them down beforehand.
        squared_error(model, batches[0]).backward()
        steps.append(update_by_hand(model, optimizer))
        optimizer.zero_grad()
        steps += train_by_hand(model, optimizer, batches[1:], squared_error)
    truth = truth_of(steps)
    for topic in FULL:
        assert_steps_equal(raw[topic], truth[topic])
    assert_steps_equal(raw["raw_gradients"], truth["parameter_gradients"])
    assert_steps_equal(chosen, [{"2": norms(u)["2.weight"]} for u in truth["parameter_updates"]], rtol=1e-5)
    assert [f.layers for f in outputs] == [f.layers for f in backward] == [("0", "1", "2", "3")] * 3


def test_a_lazy_module_that_is_never_called_is_waited_for_without_looking_at_the_model_again() -> None:
    model = nn.ModuleDict({"used": nn.Linear(5, 3), "spare": nn.LazyLinear(2)})
    optimizer = SGD(model["used"].parameters(), lr=0.1)
    with observed(model) as lens:
        weights = record(lens, sl.norm("weights"))
        index = lens.engine.index
        for batch in regression(1, 3, (6, 5)):
            squared_error(model["used"], batch).backward()
            optimizer.step()
        assert lens.engine.index is index
    assert [f.layers for f in weights] == [("used",)] * 3


def test_weight_normalisation_is_seen_as_the_parameters_that_it_has() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3))
    twin = copy.deepcopy(model)
    batches = regression(1, 3, (6, 5))
    truth = truth_of(train_by_hand(twin, Adam(twin.parameters(), lr=0.01), batches, squared_error))
    with observed(model) as lens:
        raw = {name: record(lens, sl.topic(name)) for name in FULL}
        reduced = record(lens, sl.norm("parameter_updates"))
        weights = record(lens, sl.norm("weights"))
        train_by_hand(model, Adam(model.parameters(), lr=0.01), batches, squared_error)
    for name in FULL:
        assert_steps_equal(raw[name], truth[name])
    assert_steps_equal(reduced, [norms(u) for u in truth["parameter_updates"]], rtol=1e-5)
    assert {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1"} < set(reduced[0])
    assert [f.layers for f in weights] == [("2",)] * 3, "a computed weight is no parameter"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(("topic", "fast"), [("parameters", True), ("activations", False)])
def test_evaluating_a_transformer_gives_the_same_bits_by_its_fast_path_or_without(
    topic: str, fast: bool
) -> None:
    """PyTorch leaves the fast path of a layer that has hooks, which only activations need."""
    torch.manual_seed(0)
    model = Encoding().eval()
    x, padding = torch.randn(3, 5, 4), torch.arange(5) > torch.tensor([[1], [3], [4]])
    before: list[str] = []
    during: list[str] = []
    with torch.no_grad(), Operations(before):
        expected = model(x, padding)
    with observed(model) as lens:
        record(lens, sl.norm(topic))
        with torch.no_grad(), Operations(during):
            assert torch.equal(model(x, padding), expected)
    name = "aten._transformer_encoder_layer_fwd.default"
    assert name in before
    assert (name in during) is fast


def test_observing_does_not_advance_the_vectors_of_spectral_normalisation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 4)), nn.Linear(4, 3))
    twin = copy.deepcopy(model)
    batches = regression(1, 3, (6, 5))
    steps = train_by_hand(twin, SGD(twin.parameters(), lr=0.1), batches, squared_error)
    with observed(model) as lens:
        frames = record(lens, sl.topic("parameters"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), batches, squared_error)
    assert_steps_equal(frames, [s.after for s in steps])
    for name, buffer in twin.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name


def test_a_reduction_that_fails_on_one_layer_leaves_out_that_layer_alone() -> None:

    def picky(value: Tensor) -> Tensor:
        if value.numel() == 15:
            raise ValueError("not this one")
        return value.sum()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3))
    with observed(model, on_error="report") as lens:
        custom = record(lens, sl.reduce(picky, "weights", name="total"))
        other = record(lens, sl.mean("weights"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), regression(1, 2, (6, 5)), squared_error)
        assert lens.stats()["errors"] == 2
    assert [f.layers for f in custom] == [("2",)] * 2
    assert custom[1]["2"].item() == pytest.approx(
        float(model.get_parameter("2.weight").detach().sum()), rel=1e-5
    )
    assert [f.layers for f in other] == [("0", "2")] * 2
