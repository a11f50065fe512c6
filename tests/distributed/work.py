"""What each rank does; run by torchrun with the name of a scenario and a folder for what it finds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import streamlens as sl
from tests.distributed.whole import Batches, Model, batches

Found = dict[str, Any]

PARAMETER_TOPICS = (
    "parameters",
    "parameter_gradients",
    "parameter_updates",
    "optimizer_state.exp_avg",
)
BATCH_TOPICS = ("activations", "layer_gradients", "input_data")
METRICS: dict[str, Callable[[str], Any]] = {
    "norm2": sl.norm,
    "norm1": lambda topic: sl.norm(topic, order=1),
    "mean": sl.mean,
    "std": sl.std,
    "minimum": sl.minimum,
    "maximum": sl.maximum,
    "absmax": sl.absmax,
    "kurtosis": sl.kurtosis,
}


def adam(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def model_of(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


def everything(lens: sl.Lens, topics: Sequence[str], frames: list[tuple[str, int, int, Any]]) -> None:
    """Subscribe to every metric of some topics."""

    def note(frame: sl.Frame) -> None:
        frames.append((frame.topic, frame.step, frame.micro_step, frame.to_dict()))

    for topic in topics:
        for metric in METRICS.values():
            lens.pipe(metric(topic)).subscribe(note)
    lens.pipe(sl.topic("loss")).subscribe(note)
    lens.pipe(sl.histogram(topics[0], bins=8, range=(-1.0, 1.0))).subscribe(note)
    lens.pipe(sl.uw_ratio(of="parameters")).subscribe(note)


def fit(
    model: nn.Module,
    data: Batches,
    lens: sl.Lens | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    part: int | None = None,
) -> None:
    """Train on this rank's part of the batches."""
    optimizer = optimizer or adam(list(model.parameters()))
    part = dist.get_rank() if part is None else part
    criterion: Any = nn.functional.cross_entropy
    if lens is not None:
        criterion = lens.watch_loss(criterion)
    for ranks in data:
        x, y = ranks[part]
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()


def observed(model: nn.Module, data: Batches, topics: Sequence[str], part: int | None = None) -> Found:
    """Train with everything subscribed."""
    frames: list[tuple[str, int, int, Any]] = []
    errors: list[str] = []
    table = sl.sinks.Table()
    with sl.observe(model, distributed_timeout=20.0) as lens:
        lens.errors.subscribe(lambda report: errors.append(f"{report.where}: {report.error}"))
        everything(lens, topics, frames)
        lens.pipe(sl.norm("parameters")).subscribe(table)
        fit(model, data, lens, part=part)
    return {"frames": frames, "errors": errors, "rows": len(table.dataframe)}


def ddp() -> Found:
    """Batches of different sizes."""
    model = DistributedDataParallel(model_of())
    return observed(model, batches(3, (5, 3)), [*PARAMETER_TOPICS, *BATCH_TOPICS])


def fsdp2() -> Found:
    """Shards of different sizes, down to none."""
    model = model_of()
    fully_shard(model.first)
    fully_shard(model)
    return observed(model, batches(3, (4, 4)), [*PARAMETER_TOPICS, *BATCH_TOPICS])


SCENARIOS: dict[str, Sequence[Callable[[], Found]]] = {"whole": (ddp, fsdp2)}


def main(scenario: str, folder: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    found = {work.__name__: work() for work in SCENARIOS[scenario]}
    torch.save(found, Path(folder) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
