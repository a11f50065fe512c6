"""Training with every shipped operator: on each rank with its part of the batch, or in one process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import streamlens as sl
from streamlens import control
from tests.distributed.whole import Batches, Model, batches
from tests.helpers.ranks import run_scenario
from tests.helpers.shipped import NAMES, chains_of

Found = dict[str, Any]
Key = tuple[str, str, int, int, str]
"""The chain, the topic, the step, the micro-step, the layer."""

DATA: Batches = batches(3, (4, 4))
UNEVEN: Batches = batches(8, (5, 2))
RAW = ("parameters", "parameter_gradients", "activations")
TIMED = frozenset({"step_time", "examples_per_second"})


def fresh() -> Model:
    torch.manual_seed(0)
    return Model()


def chains(name: str, lens: sl.Lens) -> Sequence[Sequence[Any]]:
    """An operator alone, behind raw frames and behind numbers, or as it is used if it needs arguments."""
    try:
        alone = getattr(sl, name)()
    except TypeError:
        return chains_of(name, lens, inputs=5, every=2)
    return [(alone,), *((sl.topic(topic), alone) for topic in RAW), (sl.topic(*RAW), sl.norm(), alone)]


class Everything:
    """Every chain of every operator on a lens, and what came of it.

    Attributes:
        values: The numbers.
        raw: The operators that gave tensors of the model.
        said: What was said of chains that cannot be had, by operator.
        plans: The chains, with the operator in front.
        errors: What was reported.
    """

    def __init__(self, lens: sl.Lens) -> None:
        self.values: dict[Key, Tensor] = {}
        self.raw: set[str] = set()
        self.said: dict[str, list[str]] = {}
        self.plans: set[str] = set()
        self.errors: list[str] = []
        lens.errors.subscribe(lambda report: self.errors.append(str(report.error)))
        for name in NAMES:
            for chain in chains(name, lens):
                try:
                    stream = lens.pipe(*chain)
                except (sl.StreamlensError, TypeError) as error:
                    self.said.setdefault(name, []).append(str(error))
                    continue
                plan = f"{name}: {stream.plan_text}"
                if plan not in self.plans:
                    self.plans.add(plan)
                    stream.subscribe(self._receiver(plan))

    def _receiver(self, plan: str) -> Callable[[Any], None]:
        def receive(frame: Any) -> None:
            for part in frame.frames if isinstance(frame, sl.AlignedFrame) else (frame,):
                if not part.stacked or part.borrowed:
                    self.raw.add(plan.partition(":")[0])
                elif part.topic not in TIMED:
                    for layer, value in part.items():
                        place = (plan, part.topic, part.step, part.micro_step, layer)
                        self.values[place] = value.detach().double().clone()

        return receive

    def found(self) -> Found:
        """All of it, as plain data."""
        return {name: getattr(self, name) for name in ("values", "raw", "said", "plans", "errors")}


def train(model: nn.Module, lens: sl.Lens, criterion: Any, data: Batches, parts: Sequence[int]) -> None:
    """Train on the batches of some ranks together."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for ranks in lens.batches(data):
        x, y = (torch.cat([ranks[part][i] for part in parts]) for i in range(2))
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    lens.epoch_finished()


def watched(model: nn.Module, parts: Sequence[int], then: Callable[[nn.Module], Any] | None = None) -> Found:
    """Train with everything subscribed; `then` is done to the model before it is trained."""
    criterion = nn.CrossEntropyLoss()
    with sl.observe(model, loss=criterion, distributed_timeout=20.0) as lens:
        everything = Everything(lens)
        if then is not None:
            then(model)
            train(model, lens, criterion, DATA, parts)
    return everything.found()


def ddp() -> Found:
    """Each rank with half of the batch."""
    return watched(DistributedDataParallel(fresh()), [dist.get_rank()], lambda model: model)


def sharded_later() -> Found:
    """Everything was subscribed before the parameters lay in parts."""
    return watched(fresh(), [dist.get_rank()], fully_shard)


def sharded_before() -> Found:
    """What is said of shards where operators are applied."""
    model = fresh()
    fully_shard(model)
    return watched(model, [])


def top(k: int, outputs: Tensor, labels: Tensor) -> Tensor:
    """Whether the label is among the largest outputs."""
    right: Tensor = (outputs.topk(k).indices == labels[:, None]).any(1)
    return right.float()


def accuracies() -> Found:
    """Training accuracy of uneven batches, two micro-steps an update, subscribed here and there."""
    model, rank = DistributedDataParallel(fresh()), dist.get_rank()
    criterion = nn.CrossEntropyLoss(ignore_index=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found: dict[str, list[tuple[int, float]]] = {}
    with sl.observe(model, loss=criterion, distributed_timeout=20.0) as lens:

        def note(name: str, *chain: Any) -> None:
            lens.pipe(*chain).subscribe(
                lambda frame: found.setdefault(name, []).append((frame.step, float(frame[""])))
            )

        note("all", sl.train_accuracy(ignore_index=2))
        note("top 2", sl.train_accuracy(metric=functools.partial(top, 2)))
        note("top 1", sl.train_accuracy(metric=functools.partial(top, 1)))
        note("gap", sl.generalisation_gap([UNEVEN[0][0]], every=2, ignore_index=2))
        if rank == 0:
            note("rank 0", sl.train_accuracy())
        said = ""
        try:
            lens.pipe(sl.train_accuracy(metric=lambda outputs, labels: 0.5))
        except sl.UnmergeableError as error:
            said = str(error)
        errors: list[str] = []
        lens.errors.subscribe(lambda report: errors.append(str(report.error)))
        for first, second in zip(UNEVEN[::2], UNEVEN[1::2], strict=True):
            optimizer.zero_grad()
            for ranks in (first, second):
                x, y = ranks[rank]
                criterion(model(x), y).backward()
            optimizer.step()
    return {"found": found, "errors": errors, "said": said}


def actions() -> Found:
    """What a controller does, written to a sink."""
    model = DistributedDataParallel(fresh())
    table, told = sl.sinks.Table(), []
    with sl.observe(model, distributed_timeout=20.0) as lens:
        controller = control.RatioLR(mode="current", target=1e-2)
        lens.pipe(sl.uw_ratio()).subscribe(controller)
        lens.pipe(sl.topic("learning_rate.action")).subscribe(table)
        controller.actions.subscribe(lambda frame: told.append(frame.step))
        train(model, lens, nn.functional.cross_entropy, DATA, [dist.get_rank()])
    return {"written": len(table.dataframe), "told": told}


def normalised(layer: Callable[[int], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), layer(4), nn.Tanh(), nn.Linear(4, 3))


def curvature(model: nn.Module) -> dict[str, float]:
    """Curvature in training mode of the global batch, evaluated by this process alone."""
    x, y = (torch.cat([part[i] for part in DATA[0]]) for i in range(2))
    given: dict[str, Any] = {
        "loss": nn.functional.cross_entropy,
        "batch": (x, y),
        "mode": "train",
    }
    found: dict[str, float] = {}
    with sl.observe(model, distributed=False, count="grad") as lens:
        for chain in (sl.hessian_eigenvalues(1, **given), sl.hessian_trace(**given), sl.sharpness(**given)):
            lens.pipe(chain).subscribe(
                lambda frame: found.update({frame.topic: float(frame.values.flatten()[0])})
            )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.eval()
        model(x).sum().backward()
        optimizer.step()
    return found


def synchronised() -> Found:
    """Curvature of a model with synchronised batch norm, on rank 0 alone."""
    return curvature(normalised(nn.SyncBatchNorm)) if dist.get_rank() == 0 else {}


SCENARIOS: dict[str, Sequence[Callable[[], Found]]] = {
    "operators": (ddp, sharded_later, sharded_before, accuracies, actions, synchronised)
}

if __name__ == "__main__":
    run_scenario(SCENARIOS)
