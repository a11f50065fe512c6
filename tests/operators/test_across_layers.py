from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reactivex import operators as ops
from torch import nn

from streamlens import observe
from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.operators import across_layers, mean, norm, topic
from tests.operators.support import NUMBERS, assert_same, flat, frame, ragged, run
from tests.operators.test_window import NAMED

VALUES = st.dictionaries(st.sampled_from("abcdef"), st.one_of(NUMBERS, st.just(math.nan)), min_size=1)
ATTENTION = {"h.0.attn.q": 1.0, "h.0.mlp.fc": 2.0, "h.1.attn.q": 3.0, "h.1.mlp.fc": 8.0, "head": 9.0}


@given(VALUES, st.sampled_from(["mean", "max", "min", "sum", "median", "std"]))
def test_over_all_layers_equals_the_named_reduction_of_what_is_not_nan(
    values: dict[str, float], name: str
) -> None:
    (out,) = run(across_layers(name), [frame(3, values)])
    known = [x for x in values.values() if not math.isnan(x)]
    assert out.topic == f"x.layer_{name}"
    assert_same(flat([out]), {(3, ""): NAMED[name](known) if known else math.nan}, rel=1e-6, abs_=1e-6)


def test_groups_by_globs_may_overlap_and_are_left_out_where_empty() -> None:
    by = {"q": "*.attn.q", "mlp": ["*.mlp.*"], "all": "*", "none": "*.conv"}
    (out,) = run(across_layers("sum", by=by), [frame(0, ATTENTION)])
    assert out.to_dict() == {"q": 4.0, "mlp": 10.0, "all": 23.0}


def test_groups_by_a_function_of_the_name_come_in_order_of_appearance() -> None:
    (out,) = run(
        across_layers("max", by=lambda n: n.split(".")[1] if "." in n else None), [frame(0, ATTENTION)]
    )
    assert out.to_dict() == {"0": 2.0, "1": 8.0}


def test_a_frame_without_any_group_gives_nothing() -> None:
    assert run(across_layers(by={"conv": "*.conv"}), [frame(0, ATTENTION)]) == []


def test_groups_by_module_class_also_for_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(), nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observe(model, on_error="raise") as lens:
        modules: list[dict[str, float]] = []
        parameters: list[dict[str, float]] = []
        by = [nn.Linear, nn.LayerNorm]
        for what, out in (("weights", modules), ("parameters", parameters)):
            sums = lens.pipe(norm(what), across_layers("sum", by=by), ops.map(Frame.to_dict))
            sums.subscribe(out.append)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    weights = [p.detach().norm().item() for name, p in model.named_parameters() if name.endswith("weight")]
    assert modules[0] == pytest.approx({"Linear": weights[0] + weights[1], "LayerNorm": weights[2]})
    everything = {name: p.detach().norm().item() for name, p in model.named_parameters()}
    assert parameters[0]["LayerNorm"] == pytest.approx(everything["3.weight"] + everything["3.bias"])


def test_layers_that_change_from_frame_to_frame_are_grouped_anew() -> None:
    frames = [frame(0, {"a.x": 1.0, "b.x": 2.0}), frame(1, {"b.x": 5.0, "a.x": 4.0, "a.y": 6.0})]
    out = run(across_layers("sum", by={"a": "a.*", "b": "b.*"}), frames)
    assert [f.to_dict() for f in out] == [{"a": 1.0, "b": 2.0}, {"a": 10.0, "b": 5.0}]


def test_components_and_further_dimensions_are_kept() -> None:
    values = frame(0, {"a": [1.0, 2.0], "b": [3.0, math.nan]}, components=("p", "q"))
    (out,) = run(across_layers(), [values])
    assert out.components == ("p", "q")
    assert out.to_dict()[""].tolist() == [2.0, 2.0]


def test_a_function_is_given_the_groups_values_layer_first() -> None:
    (out,) = run(
        across_layers(lambda v: torch.tensor(np.ptp(v.numpy())), by={"h": "h.*"}), [frame(0, ATTENTION)]
    )
    assert (out.topic, out.to_dict()) == ("x.layer_function", {"h": 7.0})


def test_inf_is_a_value() -> None:
    (out,) = run(across_layers("max"), [frame(0, {"a": 1.0, "b": math.inf})])
    assert out.to_dict() == {"": math.inf}


def test_ragged_frames_of_one_shape_are_stacked() -> None:
    (out,) = run(across_layers(), [ragged(0, {"a": torch.zeros(2), "b": torch.full((2,), 4.0)})])
    assert out.to_dict()[""].tolist() == [2.0, 2.0]


def test_raw_tensors_of_a_lens_are_refused_when_applied() -> None:
    model = nn.Linear(2, 1)
    with observe(model) as lens, pytest.raises(StreamlensError, match="reduce them first"):
        lens.pipe(topic("weights"), across_layers())


def test_classes_on_a_stream_without_a_lens_are_refused_when_applied() -> None:
    with pytest.raises(StreamlensError, match="comes from no lens"):
        run(across_layers(by=[nn.Linear]), [])


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="'last'"):
        across_layers("last")
    with pytest.raises(TypeError, match="pass a mapping"):
        across_layers(by="*.attn.*")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not 3"):
        across_layers(by=[nn.Linear, 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="no group"):
        across_layers(by={})
    with pytest.raises(TypeError, match="globs are strings"):
        across_layers(by={"a": [3]})  # type: ignore[list-item]


def test_follows_a_reduction_that_was_pushed_down() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out: list[float] = []
    with observe(model, on_error="raise") as lens:
        lens.pipe(mean("parameters"), across_layers("max")).subscribe(lambda f: out.append(f.to_dict()[""]))
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert out == pytest.approx([max(p.detach().mean().item() for p in model.parameters())])
