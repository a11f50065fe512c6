"""Wrong use is an error at the call that was wrong, which names the thing and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reactivex.subject import Subject
from torch import nn

import streamlens as sl
from streamlens.frame import Frame
from tests._runs import small_model, steps_of


@pytest.fixture
def model() -> nn.Sequential:
    return small_model()


@pytest.fixture
def lens(model: nn.Sequential) -> sl.Lens:
    return sl.observe(model)


@pytest.mark.parametrize(
    "thing", [None, 3, "model", torch.ones(2), nn.Linear, [nn.Linear(1, 1)], lambda x: x]
)
def test_observe_takes_a_module_only(thing: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"observe\(\) needs a torch\.nn\.Module, got {type(thing).__name__}"
    ):
        sl.observe(thing)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": nn.functional.cross_entropy}, TypeError, r"loss.*cross_entropy.*lens\.watch_loss\("),
        ({"loss": "mse"}, TypeError, r"loss.*nn\.Module.*str"),
        ({"count": "trainig"}, ValueError, r"count='trainig'.*did you mean 'training'"),
        ({"count": "eval"}, ValueError, r"count='eval'.*'training' and 'grad'"),
        ({"on_error": "rise"}, ValueError, r"on_error='rise'.*did you mean 'raise'"),
        ({"start": 5}, ValueError, r"start=5.*0 begins the clock anew"),
        ({"name": 3}, TypeError, r"name=3.*string"),
        ({"emits": "validation_loss"}, TypeError, r"emits='validation_loss'.*\['validation_loss'\]"),
        ({"emits": [3]}, TypeError, r"topic's name.*3"),
        ({"emits": ["weights"]}, sl.StreamlensError, r"'weights'.*choose another name"),
        ({"optimizers": [3]}, TypeError, r"optimizers.*torch\.optim\.Optimizer.*int"),
        ({"optimizers": torch.optim.SGD}, TypeError, r"optimizers.*torch\.optim\.Optimizer"),
        ({"metadata": [1]}, TypeError, r"metadata.*mapping.*list"),
    ],
)
def test_a_wrong_option_of_observe_is_named_with_the_remedy(
    model: nn.Sequential, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sl.observe(model, **options)
    assert not model._forward_hooks, "a failed call leaves nothing behind"
    assert not model._forward_pre_hooks


def test_an_optimizer_that_owns_no_parameter_of_the_model_is_refused(model: nn.Sequential) -> None:
    other = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(sl.StreamlensError, match=r"SGD.*none of the model's parameters"):
        sl.observe(model, optimizers=[other])
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"count": "grad"}, {"count": "training"}, r"count='grad'.*count='training'.*close the"),
        ({"name": "G"}, {"name": "D"}, r"name='G'.*name='D'.*close the"),
        ({}, {"start": 0}, r"start=0.*close its lens"),
    ],
)
def test_options_that_contradict_an_earlier_observe_are_refused(
    model: nn.Sequential, first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    with sl.observe(model, **first), pytest.raises(sl.StreamlensError, match=message):
        sl.observe(model, **second)


def test_options_that_agree_with_an_earlier_observe_or_add_to_it_are_fine(model: nn.Sequential) -> None:
    criterion = nn.CrossEntropyLoss()
    losses: list[Frame] = []
    with sl.observe(model, name="G"), sl.observe(model, name="G", loss=criterion, count="training") as second:
        second.pipe(sl.topic("loss")).subscribe(losses.append)
        criterion(model(torch.ones(1, 4)), torch.tensor([0])).backward()
    assert len(losses) == 1


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("weight", r"did you mean 'weights'"),
        ("Weights", r"did you mean 'weights'"),
        ("weight_gradient", r"did you mean 'weight_gradients'"),
        ("gradients", r"did you mean .*gradients'"),
        ("zzz", r"Topics: weights, biases"),
    ],
)
@pytest.mark.parametrize("how", ["topic", "norm", "ratio", "align", "combine"])
def test_an_unknown_topic_names_near_ones_when_the_operator_is_applied(
    lens: sl.Lens, how: str, wrong: str, hint: str
) -> None:
    operators: dict[str, Callable[[], sl.Operator]] = {
        "topic": lambda: sl.topic(wrong),
        "norm": lambda: sl.norm(wrong),
        "ratio": lambda: sl.ratio(wrong, "weights"),
        "align": lambda: sl.align("weights", wrong),
        "combine": lambda: sl.combine(sl.norm("weights"), wrong, fn=torch.mul, name="x"),
    }
    operator = operators[how]()
    with pytest.raises(sl.UnknownTopicError, match=rf"unknown topic '{wrong}'.*{hint}"):
        lens.pipe(operator)


def test_an_unknown_topic_tells_of_emit_and_derive(lens: sl.Lens) -> None:
    with pytest.raises(sl.UnknownTopicError, match=r"lens\.emit\(\).*lens\.derive\(\)"):
        lens.pipe(sl.topic("validation_loss"))


def test_selecting_a_topic_twice_says_what_the_lens_has(lens: sl.Lens) -> None:
    with pytest.raises(sl.UnknownTopicError, match=r"'biases' was not selected.*weights.*observe\(\)"):
        lens.pipe(sl.topic("weights"), sl.topic("biases"))


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (sl.layers("featurs.*"), r"no layer matches 'featurs\.\*': did you mean 'features'"),
        (sl.layers("zzz*"), r"no layer matches 'zzz\*': layers: "),
        (sl.layers(nn.Conv2d), r"layers\(Conv2d\)"),
        (sl.layers("features.*", depth=1), r"depth=1"),
    ],
)
def test_a_selector_of_no_layer_names_near_ones(select: sl.Operator, message: str) -> None:
    model = nn.ModuleDict({"features": nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "head": nn.Linear(2, 1)})
    with sl.observe(model) as lens:
        for order in ((sl.topic("weights"), select), (select, sl.topic("weights"))):
            with pytest.raises(sl.LayerNotFoundError, match=message):
                lens.pipe(*order)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sl.layers(),
        lambda: sl.layers(3),  # type: ignore[arg-type]
        lambda: sl.layers(int),  # type: ignore[arg-type]
        lambda: sl.layers(depth=-2),
        lambda: sl.topic(),
        lambda: sl.topic(3),  # type: ignore[arg-type]
        lambda: sl.every(0),
        lambda: sl.every(-1),
        lambda: sl.every(1.5),  # type: ignore[arg-type]
        lambda: sl.every(True),
        lambda: sl.between(5, 3),
        lambda: sl.between(-1),
        lambda: sl.where("step > 3"),  # type: ignore[arg-type]
        lambda: sl.rename(3),  # type: ignore[arg-type]
        lambda: sl.rename(""),
        lambda: sl.ema(0),
        lambda: sl.ema(1),
        lambda: sl.ema(1.5),
        lambda: sl.ema(-0.1),
        lambda: sl.ema(float("nan")),
        lambda: sl.ema(),
        lambda: sl.ema(0.9, half_life=3),
        lambda: sl.ema(half_life=0),
        lambda: sl.ema("0.9"),  # type: ignore[arg-type]
        lambda: sl.window(0),
        lambda: sl.window(3, 0),
        lambda: sl.window(3, reduce="average"),
        lambda: sl.smooth(0),
        lambda: sl.diff(0),
        lambda: sl.scan(3),  # type: ignore[arg-type]
        lambda: sl.across_layers("average"),
        lambda: sl.across_layers(by=3),  # type: ignore[arg-type]
        lambda: sl.norm("weights", order="two"),  # type: ignore[arg-type]
        lambda: sl.norm("weights", order=-1),
        lambda: sl.norm("weights", order=float("nan")),
        lambda: sl.uw_ratio(relative_to="now"),
        lambda: sl.uw_ratio(of="gradients"),
        lambda: sl.align("weights"),
        lambda: sl.align("weights", "biases", allowed_lateness=-1),
        lambda: sl.combine("weights", "biases", fn=3),  # type: ignore[arg-type]
        lambda: sl.reduce(3, name="x"),  # type: ignore[arg-type]
        lambda: sl.per_epoch("average"),
        lambda: sl.optimizer_state(""),
    ],
)
def test_a_wrong_argument_of_an_operator_is_an_error_when_it_is_made(make: Callable[[], object]) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    message = str(caught.value)
    assert len(message) > 25, "it says what was wrong and what is right"
    assert "(" in message, "it names the operator"


def test_a_word_that_is_nearly_right_is_suggested() -> None:
    with pytest.raises(ValueError, match="did you mean 'mean'"):
        sl.window(3, reduce="meen")
    with pytest.raises(ValueError, match="did you mean 'after'"):
        sl.uw_ratio(relative_to="afterwards")


def test_a_decay_out_of_range_names_the_range() -> None:
    with pytest.raises(ValueError, match=r"1\.5.*between 0 and 1|\(0, 1\).*1\.5|1\.5.*\(0, 1\)"):
        sl.ema(1.5)


@pytest.mark.parametrize("n", [-1, 1.5, "3", True, None])
def test_epochs_takes_a_whole_number(lens: sl.Lens, n: Any) -> None:
    with pytest.raises(ValueError, match=r"epochs\(\).*whole number"):
        lens.epochs(n)


def test_explain_knows_two_styles(lens: sl.Lens) -> None:
    with pytest.raises(ValueError, match="did you mean 'mermaid'"):
        lens.explain("mermad")
    with pytest.raises(ValueError, match="text and mermaid"):
        lens.explain("svg")


def test_watch_loss_takes_something_to_call(lens: sl.Lens) -> None:
    with pytest.raises(TypeError, match=r"watch_loss\(\) needs a module or a function, got str"):
        lens.watch_loss("mse")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("topic", "value", "error", "message"),
    [
        ("weights", 1.0, sl.StreamlensError, r"'weights'.*choose another name"),
        ("loss", 1.0, sl.StreamlensError, r"'loss'.*choose another name"),
        ("", 1.0, TypeError, r"emit\(\).*name"),
        (3, 1.0, TypeError, r"emit\(\).*name"),
        ("x", "high", TypeError, r"emit\('x'\).*'high'"),
        ("x", None, TypeError, r"emit\('x'\).*None"),
        ("x", {"a": 1.0, "b": torch.ones(2)}, ValueError, r"emit\('x'\).*one shape"),
        ("x", {3: 1.0}, TypeError, r"emit\('x'\).*3"),
    ],
)
def test_emit_refuses_by_name(
    lens: sl.Lens, topic: Any, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        lens.emit(topic, value)


def test_derive_refuses_a_taken_name_a_foreign_chain_and_one_of_another_lens(lens: sl.Lens) -> None:
    chain = lens.pipe(sl.norm("weights"))
    for taken in ("weights", "loss"):
        with pytest.raises(sl.StreamlensError, match=rf"derive '{taken}'.*already"):
            lens.derive(taken, chain)
    lens.derive("mine", chain)
    with pytest.raises(sl.StreamlensError, match=r"derive 'mine'.*already"):
        lens.derive("mine", chain)
    with pytest.raises(sl.StreamlensError, match=r"emit 'mine'.*choose another name"):
        lens.emit("mine", 1.0)
    foreign: Subject[Frame] = Subject()
    with pytest.raises(sl.StreamlensError, match=r"derive\('x'\).*lens\.pipe"):
        lens.derive("x", foreign)
    elsewhere = nn.Linear(1, 1)
    with (
        sl.observe(elsewhere) as other,
        pytest.raises(sl.StreamlensError, match=r"derive\('x'\).*lens\.pipe"),
    ):
        lens.derive("x", other.pipe(sl.norm("weights")))
    with pytest.raises(sl.StreamlensError, match="no topic selected"):
        lens.derive("x", lens)


def test_a_topic_cannot_be_derived_from_itself(lens: sl.Lens) -> None:
    with pytest.raises(sl.UnknownTopicError, match="unknown topic 'mine'"):
        lens.derive("mine", lens.pipe(sl.topic("mine"), sl.rename("x")))


def test_reducing_twice_is_refused(lens: sl.Lens) -> None:
    with pytest.raises(sl.StreamlensError, match="reduced already"):
        lens.narrow(topics=("loss",), reduction=lens.pipe(sl.norm("weights")).view.reduction)


def test_a_raw_micro_step_topic_joined_to_a_parameter_topic_is_refused_with_the_remedy(lens: sl.Lens) -> None:
    with pytest.raises(sl.StreamlensError, match=r"raw micro-step.*reduce them first.*norm\(\)"):
        lens.pipe(sl.align("weights", "activations"))


def test_an_operator_applied_to_no_observable_says_how_to_write_it() -> None:
    for operator in (sl.norm(), sl.ema(0.9), sl.topic("weights"), sl.where(bool)):
        with pytest.raises(TypeError, match=r"source\.pipe\("):
            operator(3)  # type: ignore[arg-type]


def test_a_frame_knows_near_layers_and_how_it_is_changed() -> None:
    frame = Frame("t", 0, ("features.0",), torch.ones(1))
    with pytest.raises(KeyError, match=r"did you mean 'features\.0'"):
        frame["feature.0"]
    with pytest.raises(AttributeError, match=r"frame\.replace\(step="):
        frame.step = 3
    with pytest.raises(ValueError, match="2 layers"):
        Frame("t", 0, ("a", "b"), torch.ones(1))


def test_after_a_wrong_call_the_lens_works_as_before(model: nn.Sequential, lens: sl.Lens) -> None:
    for wrong in (
        lambda: lens.pipe(sl.topic("weight")),
        lambda: lens.subscribe(print),
        lambda: lens.epochs(-1),
    ):
        with pytest.raises(Exception, match=r"."):
            wrong()
    steps: list[int] = []
    lens.pipe(sl.norm("weights")).subscribe(lambda frame: steps.append(frame.step))
    list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 2))
    lens.close()
    assert steps == [0, 1]
