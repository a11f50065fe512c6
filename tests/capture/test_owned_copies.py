"""Optimizers that own copies of the parameters: master weights, one flat buffer, a shard."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import streamlens as sl
from tests._runs import same
from tests.helpers.by_hand import norms, of_role, regression, snapshot, squared_error, train_by_hand
from tests.helpers.recording import assert_steps_equal, observed, points, record, record_errors

BATCHES = regression(1, 4, (4, 5))
NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")


def perceptron(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


@dataclass
class Truth:
    """What a loop by hand has taken down, a mapping a step."""

    weights: list[dict[str, Tensor]] = field(default_factory=list)
    updates: list[dict[str, Tensor]] = field(default_factory=list)
    masters: list[dict[str, Tensor]] = field(default_factory=list)
    master_updates: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)


class Masters:
    """The usual loop of mixed precision: the optimizer has float32 copies of the model's parameters."""

    def __init__(self, model: nn.Module, kind: type[Optimizer], **options: Any) -> None:
        self.model = model
        self.copies = {n: p.detach().clone().float().requires_grad_() for n, p in model.named_parameters()}
        self.optimizer = kind(list(self.copies.values()), **options)

    @property
    def owners(self) -> dict[str, Tensor]:
        return dict(self.copies)

    def hand_over_gradients(self) -> None:
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is not None
            self.copies[name].grad = parameter.grad.float()
        nn.utils.clip_grad_norm_(self.copies.values(), 0.5)

    def copy_back(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(self.copies[name].data)

    def of(self, tensors: Mapping[Tensor, Any], key: str) -> dict[str, Tensor]:
        return {name: tensors[t][key].clone() for name, t in self.copies.items()}

    def gradients(self) -> dict[str, Tensor]:
        return {name: cast("Tensor", t.grad).clone() for name, t in self.copies.items()}


class Flat(Masters):
    """The optimizer has one buffer for all parameters, padded at its end."""

    def __init__(self, model: nn.Module, kind: type[Optimizer], **options: Any) -> None:
        self.model = model
        parts = [p.detach().float().flatten() for p in model.parameters()]
        self.buffer = torch.cat([*parts, torch.zeros(3)]).requires_grad_()
        self.copies = self.parts(self.buffer.detach())
        self.optimizer = kind([self.buffer], **options)

    def parts(self, flat: Tensor) -> dict[str, Tensor]:
        found, start = {}, 0
        for name, p in self.model.named_parameters():
            found[name] = flat[start : start + p.numel()].view(p.shape)
            start += p.numel()
        return found

    def hand_over_gradients(self) -> None:
        gradient = torch.zeros_like(self.buffer)
        for name, part in self.parts(gradient).items():
            part.copy_(cast("Tensor", self.model.get_parameter(name).grad))
        self.buffer.grad = gradient
        nn.utils.clip_grad_norm_([self.buffer], 0.5)

    def of(self, tensors: Mapping[Tensor, Any], key: str) -> dict[str, Tensor]:
        return {name: t.clone() for name, t in self.parts(tensors[self.buffer][key]).items()}

    def gradients(self) -> dict[str, Tensor]:
        return {name: t.clone() for name, t in self.parts(cast("Tensor", self.buffer.grad)).items()}


def train(loop: Masters, batches: Any = BATCHES, after: Callable[[], None] = lambda: None) -> Truth:
    """Steps whose copies come back into the model once `step()` has returned."""
    truth = Truth()
    dtype = next(loop.model.parameters()).dtype
    for x, y in batches:
        squared_error(loop.model, (x.to(dtype), y.to(dtype))).backward()
        loop.hand_over_gradients()
        loop.model.zero_grad()
        truth.gradients.append(loop.gradients())
        before, masters = snapshot(loop.model), {n: t.detach().clone() for n, t in loop.copies.items()}
        loop.optimizer.step()
        loop.copy_back()
        after()
        truth.weights.append(snapshot(loop.model))
        truth.updates.append({n: w - before[n] for n, w in truth.weights[-1].items()})
        truth.masters.append({n: t.detach().clone() for n, t in loop.copies.items()})
        truth.master_updates.append({n: t - masters[n] for n, t in truth.masters[-1].items()})
        if isinstance(loop.optimizer, Adam):
            truth.states.append(loop.of(loop.optimizer.state, "exp_avg"))
    return truth


KINDS = pytest.mark.parametrize("kind", [Masters, Flat])
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@KINDS
@PRECISIONS
def test_what_stands_for_the_parameters_is_what_is_seen(kind: type[Masters], dtype: torch.dtype) -> None:
    truth = train(kind(perceptron(dtype), Adam, lr=0.01))
    loop = kind(perceptron(dtype), Adam, lr=0.01)
    with observed(loop.model, optimizers=[loop.optimizer], owners=loop.owners) as lens:
        raw = {
            topic: record(lens, sl.topic(topic))
            for topic in ("parameters", "parameter_updates", "parameter_gradients", "weights", "bias_updates")
        }
        reduced = {
            topic: record(lens, sl.norm(topic))
            for topic in ("parameters", "parameter_updates", "parameter_gradients")
        }
        states = record(lens, sl.topic(sl.optimizer_state("exp_avg")))
        rates = record(lens, sl.topic("learning_rate"))
        seen: list[int] = []
        train(loop, after=lambda: seen.append(len(raw["parameter_updates"])))
    assert_steps_equal(raw["parameters"], truth.masters)
    assert_steps_equal(raw["parameter_updates"], truth.master_updates)
    assert_steps_equal(raw["parameter_gradients"], truth.gradients)
    assert_steps_equal(raw["weights"], [of_role(m, "weight") for m in truth.masters])
    assert_steps_equal(raw["bias_updates"], [of_role(m, "bias") for m in truth.master_updates])
    assert_steps_equal(states, truth.states)
    assert_steps_equal(reduced["parameters"], [norms(m) for m in truth.masters], rtol=1e-5)
    assert_steps_equal(reduced["parameter_updates"], [norms(m) for m in truth.master_updates], rtol=1e-5)
    assert_steps_equal(reduced["parameter_gradients"], [norms(m) for m in truth.gradients], rtol=1e-5)
    assert [f.to_dict() for f in rates] == [pytest.approx({"0": 0.01, "2": 0.01})] * 4
    assert seen == [1, 2, 3, 4], "as with any optimizer, it is there when step() has returned"


@KINDS
@PRECISIONS
def test_otherwise_the_models_own_parameters_are_compared_once_they_have_changed(
    kind: type[Masters], dtype: torch.dtype
) -> None:
    """The copies come back after `step()`: an update taken within it would be zero."""
    truth = train(kind(perceptron(dtype), Adam, lr=0.01))
    loop = kind(perceptron(dtype), Adam, lr=0.01)
    with observed(loop.model, optimizers=[loop.optimizer]) as lens:
        weights, updates = (record(lens, sl.topic(t)) for t in ("parameters", "parameter_updates"))
        reduced = record(lens, sl.norm("parameter_updates"))
        ratio = record(lens, sl.uw_ratio())
        raw_gradients = record(lens, sl.norm("raw_gradients"))
        rates = record(lens, sl.topic("learning_rate"))
        train(loop)
        assert [f.step for f in updates] == [0, 1, 2], "the last has to wait for the end of its step"
    assert_steps_equal(weights, truth.weights)
    assert_steps_equal(updates, truth.updates)
    assert_steps_equal(reduced, [norms(u) for u in truth.updates], rtol=1e-5)
    assert min(float(v) for f in reduced for v in f.values) > 0
    expected = [
        {k: norms(of_role(u, "weight"))[k] / norms(of_role(w, "weight"))[k] for k in ("0", "2")}
        for u, w in zip(truth.updates, truth.weights, strict=True)
    ]
    assert_steps_equal(ratio, expected, rtol=1e-5)
    assert points(raw_gradients) == [(k, 0) for k in range(4)]
    assert [f.to_dict() for f in rates] == [pytest.approx({"0": 0.01, "2": 0.01})] * 4


@pytest.mark.parametrize("end", ["step", "epoch", "close"])
def test_a_waiting_update_comes_when_the_loop_says_that_it_is_over(end: str) -> None:
    truth = train(Masters(perceptron(), SGD, lr=0.1), BATCHES[:2])
    loop = Masters(perceptron(), SGD, lr=0.1)
    seen: list[int] = []
    with observed(loop.model, optimizers=[loop.optimizer]) as lens:
        updates = record(lens, sl.topic("parameter_updates"))

        def after() -> None:
            if end == "step":
                lens.step()
            elif end == "epoch":
                lens.epoch_finished()
            seen.append(len(updates))

        train(loop, BATCHES[:2], after)
    assert_steps_equal(updates, truth.updates)
    assert seen == ([0, 1] if end == "close" else [1, 2])


class CopyingBack(SGD):
    """Has the copies and copies them back within its own step, as wrappers for mixed precision do."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.pairs = [(p, p.detach().clone().requires_grad_()) for p in model.parameters()]
        super().__init__([copy for _, copy in self.pairs], **options)

    def step(self, closure: Any = None) -> Any:
        for parameter, master in self.pairs:
            master.grad = parameter.grad
        super().step()
        with torch.no_grad():
            for parameter, master in self.pairs:
                parameter.copy_(master)


def test_copies_that_are_back_when_step_returns_are_compared_there() -> None:
    model, twin = perceptron(), perceptron()
    truth = train_by_hand(twin, SGD(twin.parameters(), lr=0.1, momentum=0.9), BATCHES, squared_error)
    optimizer = CopyingBack(model, lr=0.1, momentum=0.9)
    seen: list[int] = []
    with observed(model, optimizers=optimizer) as lens:
        updates = record(lens, sl.topic("parameter_updates"))
        for batch in BATCHES:
            model.zero_grad()
            squared_error(model, batch).backward()
            optimizer.step()
            seen.append(len(updates))
            assert lens.current_step == len(seen), "all optimizers given have stepped: the step is over"
    assert_steps_equal(updates, [s.updates() for s in truth])
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("told", [False, True])
def test_copies_in_two_optimizers_make_one_step(told: bool) -> None:
    def split(loop: Masters) -> list[SGD]:
        tensors = list(loop.copies.values())
        return [SGD(tensors[:2], lr=0.1), SGD(tensors[2:], lr=0.2)]

    class Both(Masters):
        def __init__(self) -> None:
            super().__init__(perceptron(), SGD, lr=0.1)
            self.two = split(self)
            self.optimizer = cast("Any", self)

        def step(self) -> None:
            for optimizer in self.two:
                optimizer.step()

    truth = train(Both())
    loop = Both()
    with observed(loop.model, optimizers=loop.two, owners=loop.owners if told else None) as lens:
        updates = record(lens, sl.norm("parameter_updates"))
        weights = record(lens, sl.norm("parameters"))
        marks = record(lens, sl.topic("update_finished"))
        train(loop)
        assert lens.current_step == (4 if told else 3)
    for frames, expected in ((updates, truth.updates), (weights, truth.weights)):
        merged = [
            {k: v for f in frames if f.step == step for k, v in f.items()} for step in range(len(BATCHES))
        ]
        assert [set(m) for m in merged] == [set(NAMES)] * 4
        for got, values in zip(merged, expected, strict=True):
            for name, norm in norms(values).items():
                assert got[name].item() == pytest.approx(norm.item(), rel=1e-5)
    assert [f.step for f in marks] == [0, 1, 2, 3]


@pytest.mark.parametrize("told", [False, True])
def test_one_optimizer_may_own_a_part_and_another_copies_of_the_rest(told: bool) -> None:
    def loop_of(model: nn.Module) -> tuple[SGD, SGD, dict[str, Tensor]]:
        head = [p.detach().clone().requires_grad_() for p in model.get_submodule("2").parameters()]
        body = SGD(model.get_submodule("0").parameters(), lr=0.1)
        return body, SGD(head, lr=0.05), {"2.weight": head[0], "2.bias": head[1]}

    def train_both(model: nn.Module, body: SGD, head: SGD, copies: Mapping[str, Tensor]) -> list[Any]:
        steps = []
        for batch in BATCHES:
            model.zero_grad()
            squared_error(model, batch).backward()
            before = snapshot(model)
            for name, tensor in copies.items():
                tensor.grad = model.get_parameter(name).grad
            head.step()
            body.step()
            with torch.no_grad():
                for name, tensor in copies.items():
                    model.get_parameter(name).copy_(tensor)
            steps.append({n: w - before[n] for n, w in snapshot(model).items()})
        return steps

    twin = perceptron()
    truth = train_both(twin, *loop_of(twin))
    model = perceptron()
    body, head, copies = loop_of(model)
    with observed(model, optimizers=[body, head], owners=copies if told else None) as lens:
        updates = record(lens, sl.topic("parameter_updates"))
        train_both(model, body, head, copies)
    for step, expected in enumerate(truth):
        got = [(k, v) for f in updates if f.step == step for k, v in f.items()]
        assert sorted(k for k, _ in got) == sorted(NAMES)
        assert all(torch.equal(v, expected[k]) for k, v in got)


def test_an_optimizer_with_copies_and_a_closure_takes_one_step() -> None:
    loop = Masters(perceptron(), SGD, lr=0.1)
    with observed(loop.model, optimizers=[loop.optimizer], owners=loop.owners) as lens:
        gradients, outputs = (
            record(lens, sl.topic("parameter_gradients")),
            record(lens, sl.norm("activations")),
        )
        expected: list[dict[str, Tensor]] = []
        for batch in BATCHES:

            def closure(batch: Any = batch) -> Tensor:
                loop.model.zero_grad()
                loss = squared_error(loop.model, batch)
                loss.backward()
                loop.hand_over_gradients()
                expected.append(loop.gradients())
                return loss

            loop.optimizer.step(closure)  # type: ignore[arg-type] # a loss is a tensor in practice
            loop.copy_back()
    assert_steps_equal(gradients, expected)
    assert points(outputs) == [(k, 0) for k in range(4)]


@pytest.mark.parametrize("views", [False, True])
def test_the_zero_redundancy_optimizer_is_seen_like_the_one_within(views: bool) -> None:
    from torch import distributed
    from torch._C._distributed_c10d import HashStore
    from torch.distributed.optim import ZeroRedundancyOptimizer

    twin = perceptron()
    truth = train_by_hand(twin, SGD(twin.parameters(), lr=0.1, momentum=0.9), BATCHES, squared_error)
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model = perceptron()
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), SGD, lr=0.1, momentum=0.9, parameters_as_bucket_view=views
        )
        with observed(model) as lens:
            raw, reduced = (record(lens, op) for op in (sl.topic("parameter_updates"), sl.norm("parameters")))
            train_by_hand(model, optimizer, BATCHES, squared_error)
    finally:
        distributed.destroy_process_group()
    assert_steps_equal(raw, [s.updates() for s in truth])
    assert_steps_equal(reduced, [norms(s.after) for s in truth], rtol=1e-5)


def test_what_only_the_copies_can_tell_is_reported_with_the_remedy() -> None:
    loop = Masters(perceptron(), SGD, lr=0.1)
    with observed(loop.model, optimizers=[loop.optimizer], on_error="report") as lens:
        reports = record_errors(lens)
        gradients = record(lens, sl.norm("weight_gradients"))
        states = record(lens, sl.topic(sl.optimizer_state("momentum_buffer")))
        train(loop)
    assert gradients == states == []
    assert len(reports) == 2
    for report in reports:
        assert "the optimizer owns copies" in str(report.error)
        assert "owners={" in str(report.error)


def test_a_buffer_that_moves_is_followed() -> None:
    def shift(loop: Flat) -> None:
        loop.buffer.data = torch.cat([torch.zeros(7), loop.buffer.data])[7:]
        loop.copies = loop.parts(loop.buffer.detach())

    twin = Flat(perceptron(), SGD, lr=0.1)
    expected = train(twin, BATCHES[:2]).master_updates
    shift(twin)
    expected += train(twin, BATCHES[2:]).master_updates
    loop = Flat(perceptron(), SGD, lr=0.1)
    with observed(loop.model, optimizers=[loop.optimizer], owners=loop.owners) as lens:
        updates = record(lens, sl.topic("parameter_updates"))
        train(loop, BATCHES[:2])
        shift(loop)
        train(loop, BATCHES[2:])
    assert_steps_equal(updates, expected)


@KINDS
@pytest.mark.parametrize("told", [False, True])
def test_training_with_copies_is_bit_identical(kind: type[Masters], told: bool) -> None:
    bare = kind(perceptron(torch.bfloat16), Adam, lr=0.01)
    train(bare)
    loop = kind(perceptron(torch.bfloat16), Adam, lr=0.01)
    owners = loop.owners if told else None
    with observed(loop.model, optimizers=[loop.optimizer], owners=owners) as lens:
        for topic in ("parameters", "parameter_updates", "learning_rate", "raw_gradients"):
            record(lens, sl.topic(topic))
            record(lens, sl.norm(topic))
        train(loop)
    assert same(dict(loop.model.named_parameters()), dict(bare.model.named_parameters()))
    assert same(loop.copies, bare.copies)
    assert same(loop.optimizer.state_dict(), bare.optimizer.state_dict())


def test_a_closed_lens_keeps_no_copy() -> None:
    loop = Masters(perceptron(), SGD, lr=0.1)
    lens = sl.observe(loop.model, optimizers=[loop.optimizer], owners=loop.owners)
    record(lens, sl.norm("parameter_updates"))
    train(loop, BATCHES[:1])
    dead = [weakref.ref(t) for t in loop.copies.values()]
    lens.close()
    loop.copies.clear()
    loop.optimizer = cast("Any", None)
    gc.collect()
    assert all(ref() is None for ref in dead)


# -- nobody has said anything --------------------------------------------------------------------


@KINDS
def test_an_update_that_cannot_be_seen_is_warned_of_once_with_the_ways_out(
    kind: type[Masters], caplog: pytest.LogCaptureFixture
) -> None:
    loop = kind(perceptron(), SGD, lr=0.1)
    with observed(loop.model) as lens:
        updates = record(lens, sl.norm("parameter_updates"))
        # One that has more elements than the model could be anybody's at first.
        train(loop, BATCHES if kind is Flat else BATCHES[:1])
        lens.close()
        assert lens.stats()["updates_unseen"] == 1
    assert updates == [], "never zeros"
    assert len(caplog.messages) == 1
    for part in ("Sequential", "SGD", "lens.step()", "optimizers=[", "owners={"):
        assert part in caplog.messages[0]


def test_it_is_also_warned_of_where_the_model_itself_is_never_called(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Uncalled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = perceptron()

    model = Uncalled()
    loop = Masters(model, SGD, lr=0.1)
    with observed(model) as lens:
        record(lens, sl.norm("parameter_updates"))
        for x, y in BATCHES:
            nn.functional.mse_loss(model.body(x), y).backward()
            loop.hand_over_gradients()
            loop.optimizer.step()
            loop.copy_back()
    assert len(caplog.messages) == 1
    assert "lens.step()" in caplog.messages[0]


def test_another_model_of_its_size_leaves_no_hooks_on_its_parts() -> None:
    model, other = perceptron(), perceptron()
    optimizers = {id(m): SGD(m.parameters(), lr=0.1) for m in (model, other)}
    with sl.observe(model) as lens:
        steps = record(lens.pipe(sl.norm("weights")))
        for batch in BATCHES:
            for trained in (other, model):
                optimizers[id(trained)].zero_grad()
                squared_error(trained, batch).backward()
                optimizers[id(trained)].step()
            parts = [part for part in model.modules() if part is not model]
            assert not any(part._forward_hooks or part._forward_pre_hooks for part in parts)
        assert [frame.step for frame in steps] == [0, 1, 2, 3]


def test_a_loop_that_says_when_it_has_updated_is_right_and_not_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    truth = train(Masters(perceptron(), SGD, lr=0.1))
    loop = Masters(perceptron(), SGD, lr=0.1)
    with observed(loop.model) as lens:
        updates = record(lens, sl.topic("parameter_updates"))
        train(loop, after=lens.step)
    assert_steps_equal(updates, truth.updates)
    assert caplog.messages == []


def test_optimizers_of_other_things_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """A GAN's other half, and perturbations of the input, step between our backwards and our updates."""
    generator, critic = perceptron(), nn.Linear(3, 3)
    ours, theirs = SGD(generator.parameters(), lr=0.1), SGD(critic.parameters(), lr=0.1)
    with observed(generator) as lens:
        updates = record(lens, sl.norm("parameter_updates"))
        for x, _ in BATCHES:
            for optimizer in (theirs, ours):
                optimizer.zero_grad()
                critic(generator(x)).square().mean().backward()
                perturbation = torch.zeros(5, requires_grad=True)
                perturbation.sum().backward()
                SGD([perturbation], lr=0.1).step()
                optimizer.step()
    assert [f.step for f in updates] == [0, 1, 2, 3]
    assert caplog.messages == []


# -- wrong use -----------------------------------------------------------------------------------


def wrong_owners(case: str, loop: Masters) -> tuple[Any, Any]:
    copies = loop.owners
    good = [loop.optimizer]
    return {
        "name": (good, {"0.wight": copies["0.weight"]}),
        "shape": (good, {"0.weight": copies["2.weight"]}),
        "transposed": (good, {"0.weight": copies["0.weight"].detach().T}),
        "foreign": (good, {"0.weight": torch.zeros(4, 5)}),
        "no optimizer": (None, copies),
        "no tensor": (good, {"0.weight": 3}),
        "no mapping": (good, list(copies.values())),
        "stranger": ([loop.optimizer, SGD([torch.zeros(3, requires_grad=True)], lr=0.1)], copies),
    }[case]


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("name", sl.StreamlensError, r"no parameter '0\.wight': did you mean '0\.weight'"),
        ("shape", sl.StreamlensError, r"'0\.weight' has shape \(4, 5\).*\(3, 4\).*flat\[start:stop\]"),
        ("transposed", sl.StreamlensError, r"'0\.weight' has shape \(4, 5\).*\(5, 4\)"),
        ("foreign", sl.StreamlensError, r"owner of '0\.weight' is in none of the optimizers.*made from"),
        ("no optimizer", sl.StreamlensError, r"owners.*pass that optimizer too, as optimizers=\[\.\.\.\]"),
        ("no tensor", TypeError, r"'0\.weight' needs a tensor, got int"),
        ("no mapping", TypeError, r"owners.*mapping of parameter names to tensors, got list"),
        ("stranger", sl.StreamlensError, r"SGD owns none of the model's parameters.*owners=\{"),
    ],
)
def test_wrong_owners_are_named_with_the_remedy(case: str, error: type[Exception], message: str) -> None:
    loop = Masters(perceptron(), SGD, lr=0.1)
    optimizers, owners = wrong_owners(case, loop)
    with pytest.raises(error, match=message):
        sl.observe(loop.model, optimizers=optimizers, owners=owners)
    assert not loop.model._forward_pre_hooks, "a failed call leaves nothing behind"


def test_an_optimizer_of_a_model_of_equal_shapes_is_refused() -> None:
    model, other = perceptron(), perceptron()
    with torch.no_grad():
        other.get_parameter("0.weight").add_(torch.randn(4, 5))
    with pytest.raises(sl.StreamlensError, match=r"Adam owns none.*nor copies of their present values"):
        sl.observe(model, optimizers=[Adam(other.parameters())])


def test_an_optimizer_of_what_cannot_be_compared_is_refused_like_any_other() -> None:
    model, other = perceptron().to("meta"), perceptron().to("meta")
    with pytest.raises(sl.StreamlensError, match=r"SGD owns none"):
        sl.observe(model, optimizers=[SGD(other.parameters(), lr=0.1)])


def test_a_part_of_the_copies_is_none_unless_told_apart() -> None:
    loop = Masters(perceptron(), SGD, lr=0.1)
    shard = SGD([loop.copies["0.weight"]], lr=0.1)
    with pytest.raises(sl.StreamlensError, match=r"SGD owns none"):
        sl.observe(loop.model, optimizers=[shard])
    with observed(loop.model, optimizers=[shard], owners={"0.weight": loop.copies["0.weight"]}) as lens:
        updates = record(lens, sl.topic("parameter_updates"))
        loop.optimizer = shard
        truth = train(loop, BATCHES[:2])
    assert_steps_equal(updates, [{"0.weight": u["0.weight"]} for u in truth.master_updates])


def test_another_owner_of_a_parameter_contradicts_the_first() -> None:
    loop, other = Masters(perceptron(), SGD, lr=0.1), Masters(perceptron(), SGD, lr=0.1)
    with observed(loop.model, optimizers=[loop.optimizer], owners=loop.owners):
        with pytest.raises(sl.StreamlensError, match=r"another owner of '0\.weight'.*close the"):
            sl.observe(loop.model, optimizers=[other.optimizer], owners=other.owners)
        sl.observe(loop.model, optimizers=[loop.optimizer], owners=loop.owners).close()


def test_a_later_observe_may_bring_the_owners() -> None:
    loop = Masters(perceptron(), SGD, lr=0.1)
    truth = train(copied(loop))
    with observed(loop.model), observed(loop.model, optimizers=[loop.optimizer], owners=loop.owners) as lens:
        updates = record(lens, sl.topic("parameter_updates"))
        train(loop)
    assert_steps_equal(updates, truth.master_updates)


def copied(loop: Masters) -> Masters:
    return type(loop)(copy.deepcopy(loop.model), SGD, lr=0.1)


def test_parameters_are_named_as_the_wrapped_model_or_the_wrapper_names_them() -> None:
    loop = Masters(perceptron(), SGD, lr=0.1)
    for prefix in ("", "module."):
        wrapped = nn.DataParallel(loop.model)
        owners = {prefix + name: tensor for name, tensor in loop.owners.items()}
        with observed(wrapped, optimizers=[loop.optimizer], owners=owners) as lens:
            updates = record(lens, sl.norm("parameter_updates"))
            x, y = BATCHES[0]
            nn.functional.mse_loss(wrapped(x), y).backward()
            loop.hand_over_gradients()
            loop.optimizer.step()
        assert [f.layers for f in updates] == [NAMES]
