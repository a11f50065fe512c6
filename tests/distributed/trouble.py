"""What each rank does where something goes wrong. Nothing but streamlens ties the ranks together here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import streamlens as sl
from streamlens.reductions import Reduction
from tests.distributed.whole import Batches, Model, batches
from tests.helpers.ranks import run_scenario

Found = dict[str, Any]
DATA: Batches = batches(12, (4, 4))


class Watched:
    """Training on one rank, and what was seen of it."""

    def __init__(self, *, observe: bool = True, timeout: float = 1.0, whole: bool = False) -> None:
        torch.manual_seed(0)
        self.model = Model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.steps: dict[str, list[int]] = {}
        self.errors: list[str] = []
        self.places: list[str] = []
        self.criterion: Any = nn.functional.cross_entropy
        self.lens: sl.Lens | None = None
        if observe:
            self.lens = sl.observe(self.model, distributed_timeout=timeout)
            self.lens.errors.subscribe(self._note_error)
            self.lens.pipe(sl.norm("weights")).subscribe(self._note)
            if not whole:
                self.criterion = self.lens.watch_loss(self.criterion)
                self.lens.pipe(sl.topic("loss")).subscribe(self._note)
                self.lens.pipe(sl.std("activations")).subscribe(self._note)

    def _note(self, frame: sl.Frame) -> None:
        self.steps.setdefault(frame.topic, []).append(frame.step)

    def _note_error(self, report: Any) -> None:
        self.errors.append(str(report.error))
        self.places.append(report.where)

    def step(self, number: int) -> None:
        x, y = DATA[number][dist.get_rank()]
        self.optimizer.zero_grad()
        self.criterion(self.model(x), y).backward()
        self.optimizer.step()

    def finish(self) -> Found:
        if self.lens is not None:
            self.lens.close()
        trained = Model()
        torch.manual_seed(0)
        trained = Model()
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for ranks in self.trained_on:
            x, y = ranks[dist.get_rank()]
            optimizer.zero_grad()
            nn.functional.cross_entropy(trained(x), y).backward()
            optimizer.step()
        pairs = zip(self.model.parameters(), trained.parameters(), strict=True)
        return {
            "steps": self.steps,
            "errors": self.errors,
            "places": self.places,
            "unharmed": all(torch.equal(a, b) for a, b in pairs),
        }

    trained_on: Batches = DATA


def on_rank_0_only() -> Found:
    """Rank 0 alone observes what takes all ranks."""
    run = Watched(observe=dist.get_rank() == 0)
    for number in range(12):
        run.step(number)
    dist.barrier()
    return run.finish()


def on_rank_0_only_whole() -> Found:
    """Rank 0 alone observes what every rank has whole."""
    run = Watched(observe=dist.get_rank() == 0, timeout=0.2, whole=True)
    for number in range(12):
        run.step(number)
        if number == 6:
            time.sleep(0.3)
    dist.barrier()
    return run.finish()


def closes_early() -> Found:
    """Rank 1 closes its lens and trains on."""
    run = Watched(timeout=20.0)
    for number in range(12):
        run.step(number)
        if number == 5 and dist.get_rank() == 1 and run.lens is not None:
            run.lens.close()
    dist.barrier()
    return run.finish()


def raises() -> Found:
    """Rank 1's loop raises."""
    run = Watched(timeout=20.0)
    try:
        with run.lens or sl.observe(run.model):
            for number in range(12):
                if number == 5 and dist.get_rank() == 1:
                    run.trained_on = DATA[:5]
                    raise ArithmeticError("of the user's own")
                run.step(number)
    except ArithmeticError:
        pass
    dist.barrier()
    return run.finish()


def skips_an_update() -> Found:
    """Rank 1 makes one update less."""
    run = Watched(timeout=2.0)
    for number in range(12):
        if number == 5 and dist.get_rank() == 1:
            run.trained_on = [*DATA[:5], *DATA[6:]]
            continue
        run.step(number)
    dist.barrier()
    return run.finish()


def resumes_elsewhere() -> Found:
    """Rank 1 resumes at another step than rank 0."""
    run = Watched(timeout=20.0)
    assert run.lens is not None
    for number in range(12):
        if number == 5:
            state = run.lens.state_dict()
            state["clock"]["step"] += 2 * dist.get_rank()
            run.lens.load_state_dict(state)
        run.step(number)
    dist.barrier()
    return run.finish()


def is_late() -> Found:
    """Rank 1 comes later than others wait for it."""
    run = Watched(timeout=0.7)
    for number in range(12):
        if number == 5 and dist.get_rank() == 1:
            time.sleep(1.5)
        run.step(number)
    dist.barrier()
    return run.finish()


@dataclass(frozen=True)
class Fragile(Reduction):
    """The sum of squares, which fails on one rank for one size."""

    adds: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "fragile"

    def reduce(self, tensors: Sequence[Tensor]) -> Tensor:
        if dist.get_rank() == 1 and any(t.shape[1] == 3 for t in tensors):
            raise ArithmeticError("of one layer on one rank")
        return torch.stack([t.double().square().sum() for t in tensors])

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(parts)).sum(0)


def one_layer_fails() -> Found:
    """A layer that fails on rank 1 is left out on all; the others have the values of all."""
    run = Watched(timeout=20.0)
    layers: list[dict[str, float]] = []
    assert run.lens is not None
    run.lens.narrow(topics=("activations",), reduction=Fragile()).subscribe(
        lambda frame: layers.append(frame.to_dict())
    )
    for number in range(2):
        run.step(number)
    run.trained_on = DATA[:2]
    return {**run.finish(), "layers": layers}


def ends_early() -> Found:
    """Rank 1's process ends while rank 0 trains on."""
    run = Watched(timeout=20.0)
    for number in range(12):
        if number == 5 and dist.get_rank() == 1:
            run.trained_on = DATA[:5]
            break
        run.step(number)
    if dist.get_rank() == 1:
        return {}  # the lens is left open: the process ends with it
    return run.finish()


def pipeline_stages() -> Found:
    """Two stages of a pipeline, each observed by itself, and not as what it is."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), nn.Linear(7, 3)]
    rank = dist.get_rank()
    layer = layers[rank]
    module = nn.Sequential(layer)
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=nn.functional.cross_entropy)
    said: list[str] = []
    for what in (stage, schedule):
        try:
            sl.observe(what)  # type: ignore[arg-type]
        except sl.StreamlensError as error:
            said.append(str(error))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    norms: list[float] = []
    errors: list[str] = []
    with sl.observe(stage.submod, distributed=False) as lens:
        lens.errors.subscribe(lambda report: errors.append(str(report.error)))
        lens.pipe(sl.norm("weight_updates")).subscribe(lambda f: norms.append(float(f.values[0])))
        before = layer.weight.detach().clone()
        x, y = DATA[0][0]
        optimizer.zero_grad()
        schedule.step(x) if rank == 0 else schedule.step(target=y)
        optimizer.step()
    change = (layer.weight.detach() - before).double().norm().item()
    return {"said": said, "norms": norms, "change": change, "errors": errors}


def on_shards() -> Found:
    """What evaluates a sharded model, and what takes whole matrices of one; rank 0 alone did so before."""
    (x, y), _ = DATA[0]

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, labels)

    asked: dict[str, Any] = {
        "test_accuracy": sl.test_accuracy([(x, y)], every=1),
        "generalisation_gap": sl.generalisation_gap([(x, y)], every=1),
        "adversarial_susceptibility": sl.adversarial_susceptibility([(x, y)], 0.1, every=1),
        "svcca": sl.svcca(x),
        "linear_cka": sl.linear_cka(x),
        "hessian_eigenvalues": sl.hessian_eigenvalues(1, loss=loss, batch=(x, y)),
        "hessian_trace": sl.hessian_trace(loss=loss, batch=(x, y)),
        "sharpness": sl.sharpness(loss=loss, batch=(x, y)),
        "spectral_norm": sl.spectral_norm("weights"),
        "spectral_norm, exact": sl.spectral_norm("weights", exact=True),
        "stable_rank": sl.stable_rank("weights"),
        "stable_rank, exact": sl.stable_rank("weights", exact=True),
        "singular_values": sl.singular_values(2, "weights"),
        "condition_number": sl.condition_number("weights"),
        "effective_rank": sl.effective_rank("weights"),
    }
    run = Watched(timeout=20.0)
    assert run.lens is not None
    evaluated: list[sl.Frame] = []
    if dist.get_rank() == 0:
        # Applied while the model is still whole.
        run.lens.pipe(asked["test_accuracy"]).subscribe(evaluated.append)
    fully_shard(run.model)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    for number in range(2):
        run.step(number)
    run.lens.close()
    said: dict[str, str] = {}
    sharded = Model()
    fully_shard(sharded)
    with sl.observe(sharded) as lens:
        for name, operator in asked.items():
            try:
                lens.pipe(operator)
                said[name] = ""
            except sl.StreamlensError as error:
                said[name] = str(error)
    return {"said": said, "errors": run.errors, "evaluated": len(evaluated), "steps": run.steps}


SCENARIOS: dict[str, Sequence[Callable[[], Found]]] = {
    "trouble": (
        on_rank_0_only,
        on_rank_0_only_whole,
        closes_early,
        raises,
        skips_an_update,
        resumes_elsewhere,
        is_late,
        one_layer_fails,
        on_shards,
        pipeline_stages,
        ends_early,
    ),
}

if __name__ == "__main__":
    run_scenario(SCENARIOS)
