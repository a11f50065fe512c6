"""What each rank does; run by torchrun with the name of a scenario and a folder for what it finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import streamlens as sl
from streamlens.distributed import layout
from streamlens.distributed.layout import Item
from tests.distributed.whole import Batches, Model, batches
from tests.helpers.ranks import run_scenario

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


def model_of(hidden: int = 7) -> Model:
    torch.manual_seed(0)
    return Model(hidden)


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


def sharded_later() -> Found:
    """Observed, and subscribed to, before `fully_shard` replaces the parameters."""
    model = model_of()
    frames: list[Any] = []
    with sl.observe(model) as lens:
        everything(lens, PARAMETER_TOPICS, frames)
        fully_shard(model)
        fit(model, batches(3, (4, 4)), lens)
    return {"frames": frames, "errors": []}


def tensor_parallel() -> Found:
    """Columns of the first layer's weight, rows of the second's; both ranks have the same batch."""
    model = model_of(hidden=8)
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})
    found = observed(model, batches(3, (6,)), [*PARAMETER_TOPICS, "input_data"], part=0)
    frames: list[Any] = []
    errors: list[str] = []
    with sl.observe(model) as lens:
        lens.errors.subscribe(lambda report: errors.append(str(report.error)))
        lens.pipe(sl.norm("activations")).subscribe(frames.append)
        fit(model, batches(2, (6,)), lens, part=0)
    return {**found, "activations": len(frames), "activation_errors": errors}


def subscribed_on_rank_0() -> Found:
    """Every rank observes, and one subscribes: to losses from the start, to more in mid-run."""
    model = DistributedDataParallel(model_of())
    frames: list[Any] = []
    errors: list[str] = []

    def note(frame: sl.Frame) -> None:
        frames.append((frame.topic, frame.step, frame.micro_step, frame.to_dict()))

    data = batches(40, (5, 3))
    optimizer = adam(list(model.parameters()))
    with sl.observe(model, distributed_timeout=20.0) as lens:
        lens.errors.subscribe(lambda report: errors.append(str(report.error)))
        if dist.get_rank() == 0:
            lens.pipe(sl.mean("activations"), sl.every(2)).subscribe(note)
        fit(model, data[:3], lens, optimizer)
        if dist.get_rank() == 0:
            late = lens.pipe(sl.std("layer_gradients")).subscribe(note)
        fit(model, data[3:35], lens, optimizer)
        if dist.get_rank() == 0:
            late.dispose()
        fit(model, data[35:], lens, optimizer)
        source: Any = lens.source
        demands, sent = len(source.demands), source.exchange.sent
    return {"frames": frames, "errors": errors, "demands": demands, "sent": sent}


def micro_steps() -> Found:
    """Gradient accumulation: forward topics a micro-step, with `no_sync` as users write it."""
    model = DistributedDataParallel(model_of())
    frames: list[Any] = []
    optimizer = adam(list(model.parameters()))
    with sl.observe(model) as lens:
        criterion = lens.watch_loss(nn.functional.cross_entropy)

        def note(frame: sl.Frame) -> None:
            frames.append((frame.topic, frame.step, frame.micro_step, frame.to_dict()))

        lens.pipe(sl.topic("loss")).subscribe(note)
        lens.pipe(sl.norm("activations")).subscribe(note)
        lens.pipe(sl.topic("loss"), sl.per_step(), sl.rename("loss.step")).subscribe(note)
        data = batches(6, (5, 3))
        for step in range(3):
            optimizer.zero_grad()
            first, second = data[2 * step][dist.get_rank()], data[2 * step + 1][dist.get_rank()]
            with model.no_sync():
                criterion(model(first[0]), first[1]).backward()
            criterion(model(second[0]), second[1]).backward()
            optimizer.step()
    return {"frames": frames}


def losses() -> Found:
    """Losses that count in their own ways: a sum, labels that are ignored, weights of classes."""
    kinds: dict[str, nn.Module] = {
        "sum": nn.CrossEntropyLoss(reduction="sum"),
        "ignored": nn.CrossEntropyLoss(ignore_index=1),
        "weighted": nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0])),
    }
    found: dict[str, Any] = {}
    for name, loss in kinds.items():
        model = DistributedDataParallel(model_of())
        with sl.observe(model, loss=loss) as lens:
            values: dict[str, Any] = {}
            lens.pipe(sl.topic("loss")).subscribe(lambda f, v=values: v.update(loss=f.to_dict()[""]))
            lens.pipe(sl.norm("layer_gradients")).subscribe(lambda f, v=values: v.update(f.to_dict()))
            for ranks in batches(1, (5, 3)):
                x, y = ranks[dist.get_rank()]
                loss(model(x), y).backward()
                adam(list(model.parameters())).step()
        found[name] = values
    return found


def sometimes() -> Found:
    """A layer that one rank alone calls."""

    class Sometimes(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            out: torch.Tensor = self.second(self.act(x) if dist.get_rank() == 1 else x)
            return out

    torch.manual_seed(0)
    model = DistributedDataParallel(Sometimes())
    frames: list[Any] = []
    with sl.observe(model) as lens:
        lens.pipe(sl.mean("activations")).subscribe(lambda f: frames.append(f.to_dict()))
        fit(model, batches(2, (5, 3)), lens)
    return {"frames": frames}


def bit_identity() -> Found:
    """The same training with and without everything observed."""
    states = []
    for watched in (False, True):
        model = DistributedDataParallel(model_of())
        optimizer = adam(list(model.parameters()))
        torch.manual_seed(7)
        if watched:
            with sl.observe(model) as lens:
                everything(lens, [*PARAMETER_TOPICS, *BATCH_TOPICS], [])
                fit(model, batches(4, (5, 3)), lens, optimizer)
        else:
            fit(model, batches(4, (5, 3)), None, optimizer)
        state = [p.detach().clone() for p in model.parameters()]
        state += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        state += [t.clone() for s in optimizer.state.values() for t in s.values()]
        states.append([*state, torch.get_rng_state()])
    return {"equal": all(torch.equal(a, b) for a, b in zip(*states, strict=True)), "tensors": len(states[0])}


def refusals() -> Found:
    """What does not merge says so when it is asked for."""
    replicated = DistributedDataParallel(model_of())
    sharded = model_of()
    fully_shard(sharded)
    said: dict[str, str] = {}

    def tried(name: str, lens: sl.Lens, operator: Any) -> None:
        try:
            lens.pipe(operator)
            said[name] = ""
        except sl.UnmergeableError as error:
            said[name] = str(error)

    with sl.observe(sharded) as lens:
        tried("a function of shards", lens, sl.reduce(lambda t: t.sum(), "weights", name="own"))
        tried("medians of shards", lens, sl.median("weights"))
        tried("spectral norm of shards", lens, sl.spectral_norm("weights"))
        tried("cosine of shards", lens, sl.cosine("weights"))
        tried("norm of shards", lens, sl.norm("weights"))
        tried("combine of shards", lens, sl.combine("weights", "weight_updates", fn=torch.add))
        tried("effective_lr of shards", lens, sl.effective_lr())
    with sl.observe(replicated) as lens:
        tried("median of copies", lens, sl.median("weights"))
        tried("median of activations", lens, sl.median("activations"))
        tried("histogram of gradients", lens, sl.histogram("layer_gradients"))
        tried("histogram of activations", lens, sl.histogram("activations"))
    with sl.observe(replicated, distributed=False) as lens:
        tried("median of activations, this rank alone", lens, sl.median("activations"))
    return said


def alone() -> Found:
    """`distributed=False`: each rank its own numbers, and its own sinks."""
    model = DistributedDataParallel(model_of())
    table = sl.sinks.Table()
    with sl.observe(model, distributed=False) as lens:
        lens.pipe(sl.topic("loss")).subscribe(table)
        fit(model, batches(2, (5, 3)), lens)
    return {"losses": list(table.dataframe.value)}


def alerts() -> Found:
    """NaN in the inputs of rank 1, of both, in a shard that rank 1 holds, and seen by one rank alone."""
    rank = dist.get_rank()
    told: dict[str, Any] = {}

    def watch(
        name: str, model: nn.Module, bad: Sequence[int], *, shard: bool = False, **options: Any
    ) -> None:
        table = sl.sinks.Table()
        rows: list[dict[str, Any]] = []
        optimizer = adam(list(model.parameters()))
        with sl.observe(model, **options) as lens:
            criterion = lens.watch_loss(nn.functional.cross_entropy)
            found = lens.pipe(sl.nonfinite_values())
            found.subscribe(lambda f: rows.append({"step": f.step, "layers": f.layers, **f.meta}))
            found.subscribe(table)
            for step, ranks in enumerate(batches(3, (4, 4))):
                x, y = ranks[rank]
                if step == 1 and rank in bad and not shard:
                    x = x.index_fill(0, torch.tensor(2), torch.nan)
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                if step == 1 and rank in bad and shard:
                    gradient: Any = model.get_parameter("second.weight").grad
                    gradient.to_local()[0] = torch.inf
                optimizer.step()
        told[name] = {"rows": rows, "written": len(table.dataframe)}

    watch("rank 1", DistributedDataParallel(model_of()), [1])
    watch("both", DistributedDataParallel(model_of()), [0, 1])
    watch("alone", DistributedDataParallel(model_of()), [0, 1], distributed=False)
    sharded = model_of()
    fully_shard(sharded)
    watch("a shard", sharded, [1], shard=True)
    return told


def hsdp() -> Found:
    """Two replicas of two shards."""
    model = model_of()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return observed(model, batches(3, (2, 2, 2, 2)), [*PARAMETER_TOPICS, *BATCH_TOPICS])


def fsdp_and_tensor_parallel() -> Found:
    """Two dimensions: the batch and shards over one, columns and rows over the other."""
    model = model_of(hidden=8)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    part = mesh["data"].get_local_rank()
    return observed(model, batches(3, (4, 4)), [*PARAMETER_TOPICS, "input_data"], part=part)


def on_a_device() -> Found:
    """Numbers that are not on the host go with a message of their own."""
    Item.on_host = property(lambda self: False)  # type: ignore[method-assign, assignment]
    try:
        model = model_of()
        fully_shard(model)
        return observed(model, batches(3, (4, 4)), [*PARAMETER_TOPICS, *BATCH_TOPICS])
    finally:
        Item.on_host = _ON_HOST  # type: ignore[method-assign]


def in_rounds(work: Callable[[], Found] = fsdp2) -> Found:
    """More parts than have a place each: here as many as there are count as more."""
    gathered, layout.GATHERED = layout.GATHERED, 1  # type: ignore[misc]
    try:
        return work()
    finally:
        layout.GATHERED = gathered  # type: ignore[misc]


def in_rounds_on_a_device() -> Found:
    """The same for numbers that are not on the host."""
    return in_rounds(on_a_device)


_ON_HOST = Item.on_host

SCENARIOS: dict[str, Sequence[Callable[[], Found]]] = {
    "whole": (
        ddp,
        fsdp2,
        sharded_later,
        tensor_parallel,
        subscribed_on_rank_0,
        micro_steps,
        losses,
        sometimes,
        bit_identity,
        refusals,
        alone,
        alerts,
        on_a_device,
        in_rounds,
        in_rounds_on_a_device,
    ),
    "meshes": (hsdp, fsdp_and_tensor_parallel),
}


if __name__ == "__main__":
    run_scenario(SCENARIOS)
