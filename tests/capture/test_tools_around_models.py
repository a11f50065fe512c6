"""Tools that record, transform, wrap or convert an observed model find it as if it were not observed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import SGD

import streamlens as sl
from tests._runs import small_model
from tests.helpers.compiling import fresh_compiler
from tests.helpers.recording import observed, record

X = torch.linspace(-1, 1, 8).reshape(2, 4)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what PyTorch says of its own older tools."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def everything(lens: sl.Lens) -> list[sl.Frame]:
    """What forward, backward and updates give."""
    frames: list[sl.Frame] = []
    for topic in ("activations", "layer_gradients", "raw_gradients", "parameter_updates"):
        lens.pipe(sl.topic(topic)).subscribe(lambda frame: frames.append(frame.clone()))
        lens.pipe(sl.norm(topic)).subscribe(lambda frame: frames.append(frame.clone()))
    return frames


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def total(model: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
    out: Tensor = torch.func.functional_call(model, parameters, (X,))
    return out.square().sum()


def faked(model: nn.Module) -> str:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return str(tuple(model(torch.ones(5, 4)).shape))


TOOLS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.jit.trace": lambda model: str(torch.jit.trace(model, X).inlined_graph).replace(".1", ""),
    "torch.fx.symbolic_trace": lambda model: str(torch.fx.symbolic_trace(model).graph),
    "torch.export": lambda model: str(torch.export.export(model, (X,)).graph),
    "make_fx": lambda model: make_fx(lambda x: model(x))(X).code,
    "fake tensors": faked,
    "torch.func.grad": lambda model: torch.func.grad(lambda p: total(model, p))(parameters_of(model)),
    "torch.func.vmap": lambda model: torch.func.vmap(model)(torch.stack([X, X + 1, X + 2])),
    "torch.func.jacrev": lambda model: torch.func.jacrev(model)(X),
    "per-sample gradients": lambda model: torch.func.vmap(
        torch.func.grad(lambda p, x: torch.func.functional_call(model, p, (x,)).sum()), in_dims=(None, 0)
    )(parameters_of(model), X),
}


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(alike(value, b[key]) for key, value in a.items())
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_gives_what_it_gives_without_us_and_its_run_is_no_forward(tool: str) -> None:
    model = small_model()
    with quiet():
        if tool == "torch.jit.trace":
            # The names of the compiler's own types are counted up.
            first, second = (strip_numbers(TOOLS[tool](model)) for _ in range(2))
            assert first == second
        bare = TOOLS[tool](copy.deepcopy(model))
        with observed(model) as lens:
            frames = everything(lens)
            seen = TOOLS[tool](model)
            if tool == "torch.jit.trace":
                bare, seen = strip_numbers(bare), strip_numbers(seen)
            assert alike(bare, seen)
            # The trace is checked by a call of the model, which is a forward like any other.
            assert tool == "torch.jit.trace" or frames == []
            frames.clear()
            model(X).sum().backward()
            assert {frame.topic for frame in frames} >= {"activations", "layer_gradients", "raw_gradients"}


def strip_numbers(text: str) -> str:
    """The graph without source lines and without the numbers of TorchScript's types."""
    lines = (line.partition(" #")[0] for line in text.splitlines())
    return "\n".join(
        ".".join(part for part in line.split(".") if "torch_mangle" not in part) for line in lines
    )


def test_torchscript_compiles_an_observed_model_within_paused_and_says_so_elsewhere() -> None:
    model = small_model()
    expected = model(X).detach()
    with observed(model) as lens, quiet():
        frames = everything(lens)
        with pytest.raises(AttributeError, match=r"script it within `with lens\.paused\(\):`"):
            torch.jit.script(model)
        with lens.paused():
            scripted = torch.jit.script(model)
        torch.testing.assert_close(scripted(X).detach(), expected)
        assert frames == []
        model(X).sum().backward()
        assert frames


def test_hooks_come_back_from_a_pause_in_their_order_unless_nobody_wants_them_any_more() -> None:
    model = small_model()
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("first"))
    lens = sl.observe(model)
    frames = record(lens, sl.norm("activations"))
    model.register_forward_hook(lambda *_: calls.append("last"))
    before = [list(module._forward_hooks) for module in model.modules()]
    with lens.paused(), lens.paused():
        assert [len(module._forward_hooks) for module in model.modules()] == [2, 0, 0, 0]
        twin = copy.deepcopy(model)
        model(X).sum().backward()
    assert [list(module._forward_hooks) for module in model.modules()] == before
    assert [len(module._forward_hooks) for module in twin.modules()] == [2, 0, 0, 0]
    model(X).sum().backward()
    assert len(frames) == 1
    assert calls == ["first", "last"] * 2
    with lens.paused():
        lens.close()
    assert [len(module._forward_hooks) for module in model.modules()] == [2, 0, 0, 0]


def test_a_model_that_is_paused_can_be_observed_again_as_the_same() -> None:
    model = small_model()
    with observed(model) as lens, lens.paused(), observed(model) as second:
        assert second.source is lens.source


def test_functional_call_with_other_parameters_leaves_the_model_and_its_names_alone() -> None:
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    fast = {name: value + 1 for name, value in parameters_of(model).items()}
    with observed(model) as lens:
        activations = record(lens, sl.topic("activations"), sl.layers("2"))
        gradients = record(lens, sl.norm("raw_gradients"))
        updates = record(lens, sl.norm("parameter_updates"))
        for _ in range(2):
            optimizer.zero_grad()
            out: Tensor = torch.func.functional_call(
                model, {k: v.requires_grad_() for k, v in fast.items()}, (X,)
            )
            out.sum().backward()
            assert all(p.grad is None for p in model.parameters())
            model(X).sum().backward()
            before = parameters_of(model)
            optimizer.step()
    torch.testing.assert_close(activations[0]["2"], out.detach())
    assert updates[-1].layers == tuple(before)
    for name, value in parameters_of(model).items():
        assert updates[-1][name].item() == pytest.approx((value - before[name]).norm().item(), rel=1e-5)
    assert gradients[-1].layers == tuple(before)


CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "double": lambda model: model.double(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
}


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_converting_the_model_in_mid_run_is_no_update(kind: str) -> None:
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.125)
    updates: list[dict[str, float]] = []
    wanted: list[dict[str, float]] = []
    with observed(model) as lens:
        lens.pipe(sl.norm("parameter_updates")).subscribe(lambda frame: updates.append(frame.to_dict()))
        raw = record(lens, sl.topic("activations"))
        for step in range(3):
            if step == 1:
                CONVERSIONS[kind](model)
            dtype = next(model.parameters()).dtype
            optimizer.zero_grad()
            model(X.to(dtype)).sum().backward()
            before = parameters_of(model)
            optimizer.step()
            moved = {n: (v.double() - before[n].double()) for n, v in parameters_of(model).items()}
            wanted.append({name: value.norm().item() for name, value in moved.items()})
    assert [frame["0"].dtype for frame in raw] == [torch.float32, dtype, dtype]
    for got, expected in zip(updates, wanted, strict=True):
        # A difference of two bfloat16 numbers has eight bits.
        assert got == pytest.approx(expected, rel=4e-3)


class Holder(nn.Module):
    """A model with a part that is wrapped."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.head(self.body(x)))


def compiled(module: nn.Module) -> nn.Module:
    return cast("nn.Module", torch.compile(module, backend="eager"))


WRAPPED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "DataParallel": (lambda: nn.DataParallel(small_model()), ""),
    "torch.compile": (lambda: compiled(small_model()), ""),
    "compiled DataParallel": (lambda: compiled(nn.DataParallel(small_model())), ""),
    "a compiled part": (lambda: Holder(compiled(small_model())), "body."),
    "a checkpointed part": (lambda: Holder(checkpoint_wrapper(small_model())), "body."),
    "a compiled model with one": (lambda: compiled(Holder(checkpoint_wrapper(small_model()))), "body."),
    "a DataParallel part": (lambda: Holder(nn.DataParallel(small_model())), "body."),
}


@pytest.mark.filterwarnings("ignore:.*record_function.*")
@pytest.mark.parametrize("kind", WRAPPED)
def test_names_are_those_of_the_model_without_its_wrappers(kind: str) -> None:
    make, prefix = WRAPPED[kind]
    model = make()
    layers = tuple(f"{prefix}{i}" for i in range(3)) + (("head",) if prefix else ())
    owners = [name for name in layers if not name.endswith("1")]
    with fresh_compiler(), observed(model) as lens:
        frames = {topic: record(lens, sl.norm(topic)) for topic in ("activations", "layer_gradients")}
        frames["parameter_updates"] = record(lens, sl.norm("parameter_updates"))
        chosen = record(lens, sl.norm("activations"), sl.layers(f"{prefix}0"))
        model(X).sum().backward()
        SGD(model.parameters(), lr=0.1).step()
    assert [f.layers for f in frames["activations"]] == [layers]
    assert [f.layers for f in frames["layer_gradients"]] == [layers]
    expected = tuple(f"{owner}.{role}" for owner in owners for role in ("weight", "bias"))
    assert [f.layers for f in frames["parameter_updates"]] == [expected]
    assert [f.layers for f in chosen] == [(f"{prefix}0",)]


def test_a_part_of_the_models_own_that_is_called_module_keeps_its_name() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return cast("Tensor", self.module(x))

    model = Own()
    with observed(model) as lens:
        frames = record(lens, sl.norm("activations"))
        model(X).sum().backward()
    assert [frame.layers for frame in frames] == [("module",)]
