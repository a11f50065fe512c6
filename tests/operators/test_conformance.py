"""What every exported metric and rule promises: where it works, all layers at once, odd tensors, words."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from reactivex.subject import Subject
from torch import Tensor, nn

import streamlens as sl
from streamlens.frame import Frame
from streamlens.runtime import default_runtime
from streamlens.sinks import RunStore
from tests.helpers import shipped
from tests.helpers.shipped import NAMES, chains_of
from tests.operators.support import ragged, run


def _make_metrics() -> ModuleType:
    path = Path(__file__).parents[2] / "docs" / "make_metrics.py"
    spec = importlib.util.spec_from_file_location("make_metrics", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


PAGE = _make_metrics()
OPERATORS: Mapping[str, Callable[..., Any]] = PAGE.exported()
METRICS = [name for name, value in OPERATORS.items() if PAGE.section_of(name, value) == "Metrics"]
RULES = [name for name, value in OPERATORS.items() if PAGE.section_of(name, value) == "Alert rules"]

every_metric = pytest.mark.parametrize("name", METRICS)


# -- the reference -----------------------------------------------------------------------------


def test_the_reference_is_what_the_docstrings_say() -> None:
    assert PAGE.PAGE.read_text() == PAGE.page(), "run python docs/make_metrics.py"


def test_every_exported_operator_is_in_the_reference_once() -> None:
    rows = [line for line in PAGE.page().splitlines() if line.startswith("| `")]
    assert sorted(row.split("(")[0].removeprefix("| `") for row in rows) == sorted(NAMES)


@pytest.mark.parametrize("name", [*METRICS, *RULES])
def test_docstrings_say_what_it_costs_and_what_nan_does(name: str) -> None:
    operator = OPERATORS[name]
    text = PAGE.prose_of(operator)
    assert PAGE.cost_of(text, operator), f"{name}: a sentence with 'cost'"
    assert PAGE.nan_of(text, operator), f"{name}: a sentence with 'NaN'"
    parts = inspect.getdoc(operator) or ""
    assert "Returns:" in parts
    assert bool(inspect.signature(operator).parameters) == ("Args:" in parts)


DEFINITIONS = frozenset(
    [
        "absmax", "adversarial_susceptibility", "condition_number", "cosine", "distance_from_start",
        "effective_lr", "generalisation_gap", "histogram", "kurtosis", "loss", "loss_decrease", "maximum",
        "mean", "median", "minimum", "nonfinite", "norm", "percentile_bands", "quantiles", "ratio", "rms",
        "singular_values", "skewness", "spectral_norm", "std", "test_accuracy", "total", "train_accuracy",
        "unit_saturation", "uw_ratio", "var", "zero_fraction",
    ]
)  # fmt: skip
"""What is defined by its formula, or its words; everything else has been proposed by somebody."""

STATED = {
    "the formula": r"[=/^|]|\b(sum|root|mean|share|number|count|largest|smallest|minus|over|how many)\b",
    "the input": r"\b[Ii]nputs?\b|\bstream as it is\b|\braw\b",
    "the unit or range": r"\bunits?\b|\b[Ss]hare\b|\bin [\[(]|\b[Nn]umber of\b",
}


@every_metric
@pytest.mark.parametrize("what", STATED)
def test_docstrings_state_formula_input_and_unit(name: str, what: str) -> None:
    operator = OPERATORS[name]
    assert PAGE.told_of(PAGE.prose_of(operator), operator, STATED[what]), f"{name}: {what}"


@every_metric
def test_docstrings_cite_who_proposed_what_is_no_mere_definition(name: str) -> None:
    cited = PAGE.told_of(PAGE.prose_of(OPERATORS[name]), OPERATORS[name], r"\b(19|20)\d\d\b")
    assert cited or name in DEFINITIONS, f"{name}: the paper it comes from"


def test_sentences_end_where_they_end() -> None:
    text = "One (e.g. this. That). Two, about 0.5 of a. small; three.\nFour"
    assert PAGE.sentences_of(text) == [
        "One (e.g. this. That).",
        "Two, about 0.5 of a. small;",
        "three.",
        "Four",
    ]


# -- where it works ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*METRICS, *RULES])
def test_a_plain_stream_will_do_or_it_says_at_pipe_what_it_needs(name: str) -> None:
    model = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 3))
    source: Subject[Frame] = Subject()
    with sl.observe(model) as lens:
        chains = chains_of(name, lens)
    for chain in chains:
        if PAGE.needs_of(name, OPERATORS[name]) == "a Lens, or `model=`":
            with pytest.raises(sl.StreamlensError, match=r"[Ll]ens|model"):
                source.pipe(*chain)
        else:
            source.pipe(*chain)


LAYERS: dict[str, Tensor] = {
    "matrix": torch.arange(12.0).reshape(3, 4) - 5.5,
    "kernel": torch.linspace(-2, 3, 24).reshape(2, 3, 2, 2),
    "scalar": torch.tensor(2.5),
    "single": torch.tensor([[-3.0]]),
    "empty": torch.zeros(0, 4),
    "half": (torch.arange(6.0) - 2).reshape(2, 3).half(),
    "coarse": torch.ones(2, 2, dtype=torch.bfloat16),
    "double": torch.eye(3, dtype=torch.float64),
    "zeros": torch.zeros(2, 2),
    "nan": torch.tensor([[1.0, torch.nan], [2.0, 3.0]]),
    "inf": torch.tensor([[1.0, -torch.inf], [2.0, torch.inf]]),
}
"""Tensors of every odd kind, a layer each."""

REDUCING = [
    name
    for name in METRICS
    if next(iter(inspect.signature(OPERATORS[name]).parameters), "") == "topic"
    and name not in ("saturation",)
]
"""Metrics of one tensor at a time, whatever topic it is of."""


def _of(name: str, layers: Mapping[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> dict[Any, list[float]]:
    """What two equal frames give, by topic, step and layer."""
    monkeypatch.setattr(default_runtime(), "on_error", "raise")
    operator = OPERATORS[name]
    options = {"lower": -1.0, "upper": 1.0} if name == "unit_saturation" else {}
    found: dict[Any, list[float]] = {}
    for out in run(operator("weights", **options), [ragged(s, layers, "weights") for s in range(2)]):
        for layer, value in out.items():
            found[out.topic, out.step, layer] = value.double().flatten().tolist()
    return found


@pytest.mark.parametrize("name", REDUCING)
def test_odd_tensors_fail_nothing_and_layers_together_are_as_each_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = _of(name, LAYERS, monkeypatch)
    assert {layer for _, _, layer in together} == set(LAYERS)
    for layer, tensor in LAYERS.items():
        alone = _of(name, {layer: tensor}, monkeypatch)
        mine = {key: value for key, value in together.items() if key[2] == layer}
        assert alone.keys() == mine.keys()
        for key, value in alone.items():
            # Iterations may draw their starts in another order.
            assert mine[key] == pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True), key


@every_metric
def test_a_lens_gives_all_layers_of_a_step_in_one_frame(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    frames: list[Frame] = []
    errors: list[str] = []
    criterion = nn.CrossEntropyLoss()
    with sl.observe(model, loss=criterion) as lens:
        lens.errors.subscribe(lambda report: errors.append(str(report)))
        lens.pipe(*chains_of(name, lens, every=2)[0]).subscribe(frames.append)
        for _ in lens.epochs(2):
            for _ in range(2):
                for _ in range(2):
                    criterion(model(torch.randn(8, 16)), torch.randint(0, 3, (8,))).backward()
                optimizer.step()
                optimizer.zero_grad()
    # Chains over all topics ask for the state of other optimizers too.
    assert [error for error in errors if "was asked for" not in error] == []
    assert frames
    keys = [(f.topic, f.step, f.micro_step) for f in frames]
    assert len(set(keys)) == len(keys)


# -- on a replay -------------------------------------------------------------------------------


def _topics_of_adam(names: Sequence[str]) -> list[str]:
    return [name for name in names if "momentum_buffer" not in name]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Frame]]]:
    """A run that stores every topic there is, and what each metric gave while it ran."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    criterion = nn.CrossEntropyLoss()
    path = tmp_path_factory.mktemp("conformance") / "run.db"
    found: dict[str, list[Frame]] = {name: [] for name in METRICS}
    with pytest.MonkeyPatch.context() as patch, sl.observe(model, loss=criterion, on_error="raise") as lens:
        patch.setattr(shipped, "REDUCIBLE", _topics_of_adam(shipped.REDUCIBLE))
        lens.pipe(sl.topic(*_topics_of_adam(shipped.EVERY_TOPIC))).subscribe(RunStore(path))
        for name, frames in found.items():
            lens.pipe(*chains_of(name, lens, every=2)[0]).subscribe(frames.append)
        for _ in lens.epochs(2):
            for _ in range(3):
                for _ in range(2):
                    criterion(model(torch.randn(8, 16)), torch.randint(0, 3, (8,))).backward()
                optimizer.step()
                optimizer.zero_grad()
    return path, found


def _told(frame: Frame) -> tuple[Any, ...]:
    return frame.topic, frame.step, frame.epoch, frame.micro_step, frame.kind, frame.layers, frame.components


@every_metric
def test_a_replay_gives_what_the_run_gave_or_says_at_pipe_that_it_needs_the_model(
    name: str, live: tuple[Path, dict[str, list[Frame]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, by_name = live
    monkeypatch.setattr(shipped, "REDUCIBLE", _topics_of_adam(shipped.REDUCIBLE))
    model = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 3))
    with sl.observe(model, loss=nn.CrossEntropyLoss()) as lens:
        chain = chains_of(name, lens, every=2)[0]
    wanted, again = by_name[name], list[Frame]()
    assert wanted
    with sl.replay(path, on_error="raise") as replay:
        if PAGE.needs_of(name, OPERATORS[name]) == "a Lens, or `model=`":
            with pytest.raises(sl.StreamlensError, match=rf"^{name}\(\) needs the model, and replay"):
                replay.pipe(*chain)
            return
        replay.pipe(*chain).subscribe(again.append)
        assert replay.play()
    assert [_told(frame) for frame in again] == [_told(frame) for frame in wanted]
    for mine, frame in zip(again, wanted, strict=True):
        for (layer, value), (_, other) in zip(mine.items(), frame.items(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-8, equal_nan=True, msg=layer)
