"""A process group of one process is no other than none; what cannot be looked into is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import streamlens as sl
from tests.distributed.whole import Model, batches, train
from tests.distributed.work import adam, fit, model_of


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model: nn.Module) -> nn.Module:
    for part in model.children():
        fully_shard(part)
    fully_shard(model)
    return model


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("spread", [DistributedDataParallel, shard])
def test_everything_is_whole_also_what_does_not_merge(spread: Callable[[nn.Module], nn.Module]) -> None:
    model = spread(model_of())
    found: dict[str, Any] = {}
    errors: list[str] = []
    table = sl.sinks.Table()
    with sl.observe(model) as lens:
        lens.errors.subscribe(lambda report: errors.append(str(report.error)))
        for metric in (sl.median("weights"), sl.spectral_norm("weights"), sl.std("activations")):
            lens.pipe(metric).subscribe(lambda f: found.update({f.topic: f.to_dict()}))
        lens.pipe(sl.topic("loss")).subscribe(table)
        fit(model, batches(2, (6,)), lens)
    (_, record) = train(model_of(), batches(2, (6,)), adam)
    assert errors == []
    for layer in ("first", "second"):
        weight = record["parameters"][f"{layer}.weight"].double().numpy()
        assert found["weights.median"][layer] == pytest.approx(np.median(weight), rel=1e-5)
        assert found["weights.spectral_norm"][layer] == pytest.approx(np.linalg.norm(weight, 2), rel=1e-3)
        output = record["activations"][layer].double().numpy()
        assert found["activations.std"][layer] == pytest.approx(output.std(ddof=1), rel=1e-5)
    assert table.dataframe.value.iloc[-1] == pytest.approx(record["loss"], rel=1e-6)
    assert len(table.dataframe) == 2


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore")
def test_fsdp1_is_refused_by_name_wherever_it_is() -> None:
    flat = FullyShardedDataParallel(Model(), device_id=torch.device("cpu"))
    for model, who in ((flat, "observe() was given"), (nn.Sequential(flat), "Sequential holds")):
        with pytest.raises(sl.StreamlensError) as caught:
            sl.observe(model)
        assert f"{who} a torch.distributed.fsdp" in str(caught.value)
        assert "FullyShardedDataParallel: FSDP1 flattens parameters" in str(caught.value)
        assert "torch.distributed.fsdp.fully_shard(model)" in str(caught.value)


def test_a_deepspeed_engine_is_refused_by_name() -> None:
    kind = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})
    derived = type("Engine", (kind,), {"__module__": "my_training"})
    for engine in (kind(), derived()):
        with pytest.raises(
            sl.StreamlensError, match=r"deepspeed\.runtime\.engine\.DeepSpeedEngine"
        ) as caught:
            sl.observe(engine)
        assert "observe(engine.module), and call lens.step() after engine.step()" in str(caught.value)


def test_a_class_that_only_sounds_like_one_is_observed() -> None:
    kind = type("DeepSpeedEngine", (Model,), {"__module__": "deepspeeding"})
    with sl.observe(kind()) as lens:
        assert lens.topics == ()
