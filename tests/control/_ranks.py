"""What one rank of `test_ranks` does: trains under each controller, and prints what came of it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import streamlens as sl
from streamlens import control
from streamlens.control._kept import keep, put_back
from streamlens.errors import StreamlensError
from tests._runs import small_model, steps_of


def ratio(rank: int, *, spoilt_rank: int = -1, absent_rank: int = -1) -> dict[str, Any]:
    """RatioLR, where at step 1 one rank sees NaN, or one has no controller."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lens = sl.observe(model, distributed_timeout=2.0 if absent_rank >= 0 else 60.0)
    reports: list[str] = []
    lens.errors.subscribe(lambda report: reports.append(str(report)))

    def local(updates: Tensor, weights: Tensor) -> Tensor:
        # Each rank sees ratios of its own.
        spoilt = math.nan if rank == spoilt_rank and lens.current_step == 1 else 0.0
        return updates / weights * (1 + rank) + spoilt

    chain = sl.combine(sl.norm("weight_updates"), sl.norm("weights"), fn=local, name="local")
    controller = control.RatioLR(mode="current", target=1e-2)
    second = control.Freeze(above=0.0, patience=1)
    steps: list[int] = []
    controller.actions.subscribe(lambda frame: steps.append(frame.step))
    second.actions.subscribe(lambda frame: steps.append(frame.step))
    if rank != absent_rank:
        lens.pipe(chain).subscribe(controller)
        if absent_rank >= 0:
            lens.pipe(chain).subscribe(second)
    rates = [optimizer.param_groups[0]["lr"] for _ in steps_of(model, optimizer, 4)]
    weights = [p.detach().flatten().tolist() for p in model.parameters()]
    if absent_rank >= 0:
        dist.barrier()
    lens.close()
    return {"rates": rates, "steps": steps, "weights": weights, "reports": reports}


def stop(rank: int) -> dict[str, Any]:
    """Stop, where rank 1 alone sees a NaN, at step 1."""
    model = small_model()
    lens = sl.observe(model, emits=["x"], on_error="raise")
    lens.pipe(sl.topic("x")).subscribe(control.Stop())
    causes: list[str] = []
    lens.pipe(sl.topic("stop.action")).subscribe(lambda f: causes.append(f"{f.step}: {f.meta['cause']}"))
    seen = []
    for _ in steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 3):
        seen.append(lens.should_stop)
        lens.emit("x", math.nan if rank == 1 else 1.0)
    lens.close()
    return {"seen": seen, "causes": causes}


def freeze(rank: int) -> dict[str, Any]:
    """Freeze under DDP, where rank 0 alone says that layer 0 is at rest, and rank 1 sees a NaN at step 1."""
    model = small_model()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    lens = sl.observe(wrapped, emits=["similarity"], on_error="raise")
    controller = control.Freeze(above=0.9, patience=1, thaw=0.2)
    lens.pipe(sl.topic("similarity")).subscribe(controller)
    steps: list[int] = []
    controller.actions.subscribe(lambda frame: steps.append(frame.step))
    weights, momenta, gradients = [], [], []
    for k in range(6):
        list(steps_of(wrapped, optimizer, 1, seed=10 * k + rank))
        weights.append([p.detach().flatten().tolist() for p in model.parameters()])
        momenta.append(optimizer.state[model.get_parameter("0.weight")]["momentum_buffer"].flatten().tolist())
        gradients.append(all(p.grad is not None and p.requires_grad for p in model.parameters()))
        number = (1.0 if k < 4 else 0.1) if rank == 0 else math.nan if k == 1 else 0.5
        lens.emit("similarity", {"0": number if k else 0.5, "2": 0.5})
    lens.close()
    return {"steps": steps, "weights": weights, "momenta": momenta, "gradients": gradients}


def gradients(rank: int, controller: control.Controller) -> dict[str, Any]:
    """A controller of gradients, which are each rank's own; the factors that they were multiplied by."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    lens = sl.observe(model, on_error="raise")
    lens.pipe(sl.norm("weight_gradients")).subscribe(controller)
    factors: list[float] = []
    for k in range(3):
        before = model.get_parameter("0.weight").detach().clone()
        (gradient,) = torch.autograd.grad(
            nn.functional.cross_entropy(model((1.0 + k + rank) * torch.ones(1, 4)), torch.tensor([k])),
            model.get_parameter("0.weight"),
        )
        nn.functional.cross_entropy(model((1.0 + k + rank) * torch.ones(1, 4)), torch.tensor([k])).backward()
        optimizer.step()
        optimizer.zero_grad()
        change = before - model.get_parameter("0.weight").detach()
        factors.append(float((change / gradient)[gradient != 0].median() / 0.01))
    lens.close()
    return {"factors": factors}


def roll_back(rank: int) -> dict[str, Any]:
    """Rollback, where rank 1 alone sees a NaN, at step 4."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lens = sl.observe(model, emits=["x"], on_error="raise")
    lens.pipe(sl.topic("x")).subscribe(control.Rollback(every=2, confirm=1))
    texts: list[str] = []
    lens.pipe(sl.topic("rollback.action")).subscribe(lambda f: texts.append(f"{f.step}: {f.meta['text']}"))
    weights = []
    for step, _ in enumerate(steps_of(model, optimizer, 6)):
        weights.append([p.detach().flatten().tolist() for p in model.parameters()])
        lens.emit("x", math.nan if rank == 1 and step == 3 else 1.0)
    lens.close()
    return {"weights": weights, "texts": texts}


def sharded_model() -> nn.Sequential:
    """Of five rows one rank has three and the other two."""
    model = small_model()
    fully_shard(model[0])
    fully_shard(model)
    return model


def shards(tensors: Iterable[Tensor]) -> list[list[float]]:
    """What this rank holds of tensors."""
    return [tensor.to_local().flatten().tolist() for tensor in tensors]  # type: ignore[attr-defined]


def roll_back_shards(rank: int) -> dict[str, Any]:
    """Rollback of weights and moments that FSDP2 has spread over both ranks; rank 1 sees a NaN at step 4."""
    model = sharded_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    lens = sl.observe(model, emits=["x"], on_error="raise")
    lens.pipe(sl.topic("x")).subscribe(control.Rollback(every=2, confirm=1))
    texts: list[str] = []
    lens.pipe(sl.topic("rollback.action")).subscribe(lambda f: texts.append(f"{f.step}: {f.meta['text']}"))
    weights, moments = [], []
    for step, _ in enumerate(steps_of(model, optimizer, 6)):
        weights.append(shards(model.parameters()))
        moments.append(shards(optimizer.state[p]["exp_avg"] for p in model.parameters()))
        lens.emit("x", math.nan if rank == 1 and step == 3 else 1.0)
    lens.close()
    # Also where the optimizer has let go of its state.
    kept = keep(model, {0: optimizer})
    optimizer.state.clear()
    put_back(kept, model, {0: optimizer})
    moments.append(shards(optimizer.state[p]["exp_avg"] for p in model.parameters()))
    return {"weights": weights, "moments": moments, "texts": texts}


def gradients_of_shards(rank: int) -> dict[str, Any]:
    """What controllers of gradients say of a model that is spread, or will be."""
    said = []
    for controller in (control.ClipAt(), control.FixedRatio()):
        with sl.observe(sharded_model()) as lens:
            try:
                lens.pipe(sl.norm("weight_gradients")).subscribe(controller)
            except StreamlensError as error:
                said.append(str(error))
    model, reports = small_model(), list[str]()
    with sl.observe(model) as lens:
        lens.errors.subscribe(lambda report: reports.append(str(report.error)))
        lens.pipe(sl.norm("weight_gradients")).subscribe(control.ClipAt(0))
        fully_shard(model)
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 3))
    return {"said": said, "later": reports}


def steps_of_shards(rank: int, *, sharded: bool) -> dict[str, Any]:
    """RatioLR scales the step of each layer, of a model that is spread or whole; its weights, and scales."""
    model = sharded_model() if sharded else small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    lens = sl.observe(model, on_error="raise")
    controller = control.RatioLR(mode="current", per_layer=True, target=1e-2)
    lens.pipe(sl.uw_ratio()).subscribe(controller)
    scales: list[list[float]] = []
    controller.actions.subscribe(lambda frame: scales.append([float(v) for _, v in frame.items()]))
    list(steps_of(model, optimizer, 4))
    lens.close()
    whole = [p.full_tensor() if sharded else p for p in model.parameters()]  # type: ignore[attr-defined]
    return {"scales": scales, "weights": [p.detach().flatten().tolist() for p in whole]}


SCENARIOS: dict[str, Callable[[int], dict[str, Any]]] = {
    "ratio": ratio,
    "ratio, NaN on rank 0": lambda rank: ratio(rank, spoilt_rank=0),
    "ratio, NaN on rank 1": lambda rank: ratio(rank, spoilt_rank=1),
    "stop": stop,
    "freeze": freeze,
    "clip": lambda rank: gradients(rank, control.ClipAt(0)),
    "fixed ratio": lambda rank: gradients(rank, control.FixedRatio(1e-3)),
    "rollback": roll_back,
    "rollback, shards": roll_back_shards,
    "gradients, shards": gradients_of_shards,
    "steps, shards": lambda rank: steps_of_shards(rank, sharded=True),
    "steps, whole": lambda rank: steps_of_shards(rank, sharded=False),
    "ratio, none on rank 1": lambda rank: ratio(rank, absent_rank=1),
}


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    print(json.dumps({name: scenario(rank) for name, scenario in SCENARIOS.items()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
