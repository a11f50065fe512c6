"""Rules on a run: silent where training is ordinary, asked for once, and the same when replayed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from reactivex.subject import Subject
from torch import nn

import streamlens as sl
from benchmarks.alert_runs import BROKEN, HEALTHY, Broken, Scenario, alerts_of, sgd
from streamlens.errors import StreamlensError
from streamlens.frame import Frame, Kind
from streamlens.operators.alerts import Rule, units
from streamlens.operators.alerts._inputs import SATURATED_SHARES, found_on
from streamlens.operators.alerts._rule import Verdict
from streamlens.operators.alerts.health import RULES
from streamlens.runtime import default_runtime
from tests._runs import Recipe, same, steps_of, train
from tests.operators.support import chain_of, frame, run, saved_and_loaded

ALL = [make() for make in RULES]
every_rule = pytest.mark.parametrize("rule", ALL, ids=[rule.name for rule in ALL])


def told(alerts: list[Frame]) -> list[tuple[int, str, str, tuple[str, ...]]]:
    return [(f.step, f.topic, f.meta["state"], f.layers) for f in alerts]


# -- a sample of docs/alerts.md ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["MLP, SGD 0.01", "convnet, Adam 0.001", "transformer, Adam 0.001"])
def test_is_silent_on_ordinary_training(name: str) -> None:
    assert told(alerts_of(dataclasses.replace(HEALTHY[name], steps=60), seed=0)) == []


CASES = [(rule, case) for rule, cases in BROKEN.items() for case in cases if case.until <= 100]


@pytest.mark.parametrize(("rule", "case"), CASES, ids=[f"{rule}: {case.how}" for rule, case in CASES])
def test_says_in_time_what_is_broken(rule: str, case: Broken) -> None:
    scenario = dataclasses.replace(case.scenario, steps=case.until + 1)
    found = [f.step for f in alerts_of(scenario, seed=0) if f.meta["rule"] == rule]
    assert found
    assert case.since <= found[0] <= case.until


def test_every_rule_of_the_default_set_has_broken_runs_to_find() -> None:
    assert set(BROKEN) == {rule.name for rule in ALL if rule.cheap}


# -- what it says ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken() -> list[Frame]:
    return alerts_of(Scenario(optimizer=sgd(2.0), steps=120, validate=0), seed=0)


def test_alerts_carry_rule_severity_state_threshold_and_a_sentence(broken: list[Frame]) -> None:
    assert broken
    for alert in broken:
        assert alert.topic == f"alerts.{alert.meta['rule']}"
        assert alert.kind is Kind.EVENT
        assert alert.stacked
        assert alert.meta["severity"] in {"info", "warning", "critical"}
        assert alert.meta["state"] in {"start", "end"}
        assert isinstance(alert.meta["threshold"], float | list)
        assert str(alert.meta["text"]).endswith(".")


def test_an_alert_starts_before_it_ends_and_starts_no_second_time_before(broken: list[Frame]) -> None:
    is_open: dict[tuple[str, str, str], bool] = {}
    for alert in broken:
        for layer in alert.layers:
            key = (alert.topic, str(alert.meta.get("of")), layer)
            assert is_open.get(key, False) is (alert.meta["state"] == "end")
            is_open[key] = alert.meta["state"] == "start"


@every_rule
def test_a_rules_sentences_are_whole_and_name_layers_and_numbers(rule: Rule) -> None:

    layers = tuple(f"layer{i}" for i in range(6))
    group = {"nonfinite_values": "forward", "overfitting": "validation_loss"}.get(rule.name, "")
    verdict = Verdict(layers, np.arange(6) / 7, np.ones(6, dtype=np.bool_), (0.125, 0.25), group)
    meaning = rule.meaning(verdict, range(6))
    assert meaning[0].isupper()
    assert not meaning.endswith(".")
    assert rule.advice[0].isupper()
    assert not rule.advice.endswith(".")
    if "layer0" in meaning and rule.name != "nonfinite_values":
        assert "layer3 (0.429) and 2 more" in meaning


# -- what it asks for --------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.act(self.first(x)))
        return out


@pytest.fixture
def net() -> Iterator[tuple[Net, sl.Lens]]:
    torch.manual_seed(0)
    model = Net()
    with sl.observe(model, on_error="raise") as lens:
        yield model, lens


def steps(model: nn.Module, count: int) -> None:
    for _ in steps_of(model, torch.optim.SGD(model.parameters(), 0.01), count):
        pass


def test_each_topic_and_reduction_is_captured_once_at_the_cadence_it_needs(net: tuple[Net, sl.Lens]) -> None:
    _, lens = net
    lens.pipe(sl.health()).subscribe(lambda _: None)
    captured = {line.split(",")[0].strip() for line in lens.explain().split("captured\n")[1].splitlines()}
    assert "weight_gradients norm2" in captured
    updates = [d.view for d in lens.engine.demands if d.view.topics == ("weight_updates",)]
    assert {(view.every, view.start, view.stop) for view in updates} == {(10, 0, 100), (20, 100, None)}
    gradients = [d.view for d in lens.engine.demands if d.view.topics == ("weight_gradients",)]
    assert {(view.every, view.start, view.stop) for view in gradients} == {(1, 0, 10), (10, 10, None)}
    views = [(d.view.topics, d.view.reduction, d.view.every) for d in lens.engine.demands]
    several = {view for view in views if views.count(view) > 1}
    # The ratio is a chain of its own, and shares its norms with the other rules in the engine; of losses
    # one stream is enough for those rules that look at each and those that look at the step's mean.
    assert {topics for topics, _, _ in several} == {("weights",), ("weight_updates",)}


def test_leaves_out_what_a_run_has_nothing_for_and_says_so_in_explain(net: tuple[Net, sl.Lens]) -> None:
    model, lens = net
    reports: list[Any] = []
    lens.errors.subscribe(reports.append)
    lens.pipe(sl.health()).subscribe(lambda _: None)
    steps(model, 3)
    text = lens.explain()
    assert "left out saturated_units: it looks at 'activations.unit_saturation'" in text
    assert "left out overfitting: it looks at 'validation_loss' or 'test_accuracy'" in text
    assert 'pass observe(model, emits=["validation_loss"])' in text
    assert "left out loss_spike: no 'loss' has come: pass observe(model, loss=criterion)" in text
    assert "left out dead_units" not in text
    assert "left out nonfinite_values" not in text
    assert reports == []


def test_a_rule_that_a_lens_has_nothing_for_is_an_error_at_pipe(net: tuple[Net, sl.Lens]) -> None:
    _, lens = net
    with pytest.raises(StreamlensError, match=r"saturated_units\(\) looks at .* the model has no nn.Sigmoid"):
        lens.pipe(sl.saturated_units())
    with pytest.raises(StreamlensError, match=r"overfitting\(\) looks at 'validation_loss' or 'test_acc"):
        lens.pipe(sl.overfitting())
    with pytest.raises(StreamlensError, match=r"cannot give \(it has weights\)"):
        lens.pipe(sl.topic("weights"), sl.vanishing_gradients())


def test_a_rule_alone_reports_that_no_loss_came() -> None:
    model = Net()
    reports: list[str] = []
    with sl.observe(model) as lens:
        lens.errors.subscribe(lambda report: reports.append(str(report)))
        lens.pipe(sl.loss_spike()).subscribe(lambda _: None)
        steps(model, 2)
    assert len(reports) == 1
    assert "'loss' was asked for, but step 0 had none" in reports[0]


def test_the_last_layers_bounded_outputs_are_meant_to_be_near_their_bounds() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid())
    with sl.observe(model, on_error="raise") as lens:
        seen: list[tuple[str, ...]] = []
        stream = found_on(lens, SATURATED_SHARES)
        assert stream is not None
        stream.subscribe(lambda f: seen.append(f.layers))
        steps(model, 2)
    assert seen == [("1",)] * 2


def test_a_lens_cadence_and_its_layers_hold_for_rules_too(net: tuple[Net, sl.Lens]) -> None:
    model, lens = net
    seen: list[Frame] = []
    rule = sl.vanishing_gradients(below=1.0, every=2, start=(1, 1))
    lens.pipe(sl.every(3), sl.layers("first"), rule).subscribe(seen.append)
    lens.pipe(sl.every(3), rule).subscribe(seen.append)
    steps(model, 8)
    assert {f.step for f in seen} <= {0, 6}
    assert seen


# -- the same everywhere -----------------------------------------------------------------------


def stored(scenario: Scenario) -> tuple[list[Frame], list[Frame]]:
    """The alerts of a run, and the reduced frames that it recorded."""
    recorded: list[Frame] = []

    def rules() -> sl.Operator:
        def apply(source: Any) -> Any:
            for chain in (
                (sl.topic("loss"),),
                (sl.topic("learning_rate"),),
                (sl.norm("weight_gradients"),),
                (sl.norm("weights"),),
                (sl.norm("weight_updates"),),
            ):
                source.pipe(*chain).subscribe(recorded.append)
            return sl.health(without=WITHOUT)(source)

        return apply

    return alerts_of(scenario, 0, rules), recorded


# What needs activations, or knows more on a lens.
WITHOUT = ["dead_units", "saturated_units", "poor_initialisation", "nonfinite_values", "unchanged_weights"]


def test_recorded_topics_give_the_same_alerts_as_the_run_itself() -> None:
    live, recorded = stored(Scenario(optimizer=sgd(2.0), steps=80, validate=0))
    replayed = run(sl.health(without=WITHOUT), recorded)
    assert live
    assert sorted(told(replayed)) == sorted(told(live))


def test_recorded_topics_can_be_judged_by_other_thresholds() -> None:
    _, recorded = stored(Scenario(steps=40, validate=0))
    assert run(sl.health(without=WITHOUT), recorded) == []
    strict = sl.health(sl.vanishing_gradients(below=1.0, start=(1, 1)), without=WITHOUT)
    assert {f.topic for f in run(strict, recorded)} == {"alerts.vanishing_gradients"}


def test_raw_frames_on_a_plain_stream_will_do() -> None:
    source: Subject[Frame] = Subject()
    seen: list[Frame] = []
    source.pipe(sl.vanishing_gradients(every=1, start=(1, 1))).subscribe(seen.append)
    source.on_next(Frame("weight_gradients", 0, ("a", "b"), (torch.zeros(2), torch.ones(2))))
    assert told(seen) == [(0, "alerts.vanishing_gradients", "start", ("a",))]


def test_each_model_of_a_stream_has_a_memory_of_its_own() -> None:
    rule = sl.dead_units(every=1, start=(2, 2))
    items = [
        frame(step, {"a": 1.0}, "activations.dead_fraction", source=source)
        for step, source in ((0, "G"), (0, "D"), (1, "G"))
    ]
    (alert,) = run(rule, items)
    assert (alert.source, alert.step) == ("G", 1)


def test_a_rule_that_fails_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_runtime(), "on_error", "report")
    monkeypatch.setattr(units._Above, "look", lambda *_: 1 / 0)
    items = [frame(s, {"a": 1.0}, "activations.dead_fraction") for s in range(3)]
    items += [frame(s, {"a": 0.0, "b": 1.0}, "weight_gradients.norm2") for s in range(3)]
    found = run(sl.health(sl.dead_units(every=1), sl.vanishing_gradients(every=1, start=(1, 1))), items)
    assert {f.topic for f in found} == {"alerts.vanishing_gradients"}


# -- state and harmlessness --------------------------------------------------------------------


@pytest.mark.parametrize("at", [5, 25, 60])
def test_a_resumed_run_gives_the_alerts_that_an_uninterrupted_one_gives(at: int) -> None:
    live, recorded = stored(Scenario(optimizer=sgd(2.0), steps=80, validate=0))
    cut = next(i for i, f in enumerate(recorded) if f.step == at)
    first: Subject[Frame] = Subject()
    out: list[Frame] = []
    before = chain_of(first.pipe(sl.health(without=WITHOUT)), out.append)
    for item in recorded[:cut]:
        first.on_next(item)
    state = saved_and_loaded(before.state_dict())
    second: Subject[Frame] = Subject()
    after = chain_of(second.pipe(sl.health(without=WITHOUT)), out.append)
    for cell, saved in zip(after.cells, state, strict=True):
        cell.load_state_dict(saved["state"])
    for item in recorded[cut:]:
        second.on_next(item)
    second.on_completed()
    assert sorted(told(out)) == sorted(told(live))


@pytest.mark.parametrize(
    "recipe", [Recipe(optimizer="adam", accumulation=2), Recipe("attention"), Recipe("reused")]
)
def test_changes_nothing_of_the_run(recipe: Recipe) -> None:
    def observing(model: nn.Module, criterion: nn.Module) -> sl.Lens:
        lens = sl.observe(model, loss=criterion, on_error="raise")
        lens.pipe(sl.health()).subscribe(lambda _: None)
        return lens

    assert same(train(recipe), train(recipe, observing))


# -- arguments ---------------------------------------------------------------------------------


def test_equal_rules_are_equal_and_say_in_the_plan_what_is_not_the_default() -> None:
    assert sl.dead_units(share=0.9) == sl.dead_units(share=0.9) != sl.dead_units()
    assert hash(sl.dead_units(share=0.9)) == hash(sl.dead_units(share=0.9))
    assert sl.dead_units().describe() == "dead_units()"
    source: Subject[Frame] = Subject()
    plan = sl.health(sl.dead_units(share=0.9), without=["loss_spike"])(source).plan_text  # type: ignore[attr-defined]
    assert plan == "Subject | health(dead_units(share=0.9), without=['loss_spike'])"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sl.dead_units(share=1.5), r"dead_units\(share=1.5\): a share above 0, at most 1"),
        (lambda: sl.dead_units(every=0), r"dead_units\(every=0\): a whole number from 1 on"),
        (lambda: sl.dead_units(start=(3, 2)), r"dead_units\(start=\(3, 2\)\): \(n, m\)"),
        (lambda: sl.dead_units(end=0), r"dead_units\(end=0\)"),
        (lambda: sl.exploding_gradients(factor=-1), r"exploding_gradients\(factor=-1\): a number above 0"),
        (lambda: sl.loss_not_decreasing(patience=0), r"patience=0\): a whole number from 1 on"),
        (lambda: sl.ratio_out_of_band(band=(1.0, 0.1)), r"band=\(1.0, 0.1\)\): \(lower, upper\)"),
        (lambda: sl.loss_spike(window=19), r"loss_spike\(window=19\): a whole number from 20 on"),
        (lambda: sl.nonfinite_values(phases=("forwards",)), r"no phase 'forwards'"),
        (lambda: sl.health(without=["dead_unit"]), r"no rule 'dead_unit': did you mean 'dead_units'"),
        (lambda: sl.health(sl.dead_units(), sl.dead_units()), r"given two rules dead_units"),
        (lambda: sl.health(without=[rule.name for rule in ALL]), r"no rule is left"),
    ],
)
def test_wrong_parameters_are_errors_that_name_rule_and_parameter(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_no_rule_is_refused() -> None:
    with pytest.raises(TypeError, match=r"health\(\) takes rules such as dead_units\(share=0.8\), got 3"):
        sl.health(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a list of names"):
        sl.health(without="dead_units")


@pytest.mark.soak
@pytest.mark.parametrize("name", HEALTHY)
def test_is_silent_on_ordinary_training_over_ten_seeds(name: str) -> None:
    assert [told(alerts_of(HEALTHY[name], seed)) for seed in range(10)] == [[]] * 10


@pytest.mark.soak
@pytest.mark.parametrize(
    ("rule", "case"),
    [(r, c) for r, cases in BROKEN.items() for c in cases],
    ids=lambda v: getattr(v, "how", v),
)
def test_says_in_time_what_is_broken_over_ten_seeds(rule: str, case: Broken) -> None:
    missed = []
    for seed in range(10):
        found = [f.step for f in alerts_of(case.scenario, seed) if f.meta["rule"] == rule]
        if not any(case.since <= step <= case.until for step in found):
            missed.append(seed)
    assert len(missed) <= case.misses, missed
