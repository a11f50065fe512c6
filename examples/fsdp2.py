"""Watch FSDP2 (`fully_shard`) on handwritten digits: norms and extremes of whole tensors, from their shards.

Run it with `torchrun --nproc-per-node 2 examples/fsdp2.py`, on any number of processes, or with plain
`python examples/fsdp2.py`, which is a run of one process. Each process holds a shard of every parameter, of
its gradient and of Adam's moments, and looks at nothing else: no tensor is gathered for a metric, statistics
of shards are merged. The run's file and the figure, `fsdp2.db` and `fsdp2.html`, come from rank 0 alone.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import streamlens as sl
from streamlens.lab import load_dataset
from streamlens.views import gradient_norms, loss, stack, update_to_weight_ratio

__all__ = ["main"]


class Classifier(nn.Module):
    """A small transformer that reads an image row by row."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * 32, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = self.embed(images.transpose(1, 2).flatten(2))
        for block in self.blocks:
            rows = block(rows)
        logits: torch.Tensor = self.head(rows.mean(1))
        return logits


def start() -> None:
    """Join the processes that torchrun has started; without it, be a group of one."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")  # "nccl" where each process has a GPU
    else:
        dist.init_process_group("gloo", init_method="tcp://localhost:0", rank=0, world_size=1)


def sharded() -> Classifier:
    """The model, its blocks sharded one by one, as FSDP2 is meant to be used."""
    model = Classifier()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(store: sl.sinks.RunStore, epochs: int) -> None:
    """Train as with any FSDP2 script; the lens is the only addition."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = load_dataset("digits").train
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(data, drop_last=True)
    batch = 64 // dist.get_world_size()
    loader = DataLoader(data, batch_size=batch, sampler=sampler, drop_last=True)
    model = sharded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    criterion = nn.CrossEntropyLoss()

    with sl.observe(model, loss=criterion) as lens:
        lens.pipe(sl.topic("loss")).subscribe(store)
        # By the parameters' full names, so that attention's `in_proj_weight` is among them.
        lens.pipe(sl.uw_ratio(of="parameters"), sl.ema(0.9)).subscribe(store)
        lens.pipe(sl.norm("parameter_gradients")).subscribe(store)
        lens.pipe(sl.absmax("parameters"), sl.every(10)).subscribe(store)
        lens.pipe(sl.mean(sl.optimizer_state("exp_avg_sq")), sl.every(10)).subscribe(store)
        for epoch in lens.epochs(epochs):
            sampler.set_epoch(epoch)
            for x, y in lens.batches(loader):
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()


def draw(run: str, out: str) -> None:
    """A figure of what the run's file holds."""
    stored = sl.read_run(run)
    figure = stack(
        loss(stored.dataframe("loss")),
        update_to_weight_ratio(stored.dataframe("uw_ratio.parameters.ema")),
        gradient_norms(stored.dataframe("parameter_gradients.norm2")),
    )
    figure.save(out, inline=False)
    losses = stored.dataframe("loss").value
    print(
        f"{dist.get_world_size()} process(es): the loss went from {losses.iloc[0]:.4f} to "
        f"{losses.iloc[-1]:.4f}: see {out}"
    )


def main(run: str = "fsdp2.db", out: str = "fsdp2.html", epochs: int = 3) -> None:
    """Train on all ranks, and draw on rank 0 what was seen."""
    start()
    try:
        train(sl.sinks.RunStore(run), epochs)
        if dist.get_rank() == 0:
            draw(run, out)
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
