"""Watch DistributedDataParallel on handwritten digits: every number is that of the global batch.

Run it with `torchrun --nproc-per-node 2 examples/ddp.py`, on any number of processes, or with plain
`python examples/ddp.py`, which is a run of one process. `observe` is called on every rank; the run's file
and the figure, `ddp.db` and `ddp.html` in the current folder, come from rank 0 alone. However many processes
share the batch of 64, the numbers are those of one process; only rounding differs, which training amplifies.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import streamlens as sl
from streamlens.lab import load_dataset
from streamlens.views import gradient_norms, loss, stack, update_to_weight_ratio

__all__ = ["main"]


def start() -> None:
    """Join the processes that torchrun has started; without it, be a group of one."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")  # "nccl" where each process has a GPU
    else:
        dist.init_process_group("gloo", init_method="tcp://localhost:0", rank=0, world_size=1)


def train(store: sl.sinks.RunStore, epochs: int) -> None:
    """Train as with any DDP script; the lens is the only addition."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = load_dataset("digits").train
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(data, drop_last=True)
    batch = 64 // dist.get_world_size()
    loader = DataLoader(data, batch_size=batch, sampler=sampler, drop_last=True)
    model = DistributedDataParallel(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(8 * 8 * 8, 10)
        )
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    criterion = nn.CrossEntropyLoss()

    with sl.observe(model, loss=criterion) as lens:
        # What belongs to the batch is merged over ranks, one small message an update.
        lens.pipe(sl.topic("loss")).subscribe(store)
        lens.pipe(sl.std("activations"), sl.every(5)).subscribe(store)
        # What every rank holds whole is not sent at all.
        lens.pipe(sl.uw_ratio(), sl.ema(0.9)).subscribe(store)
        lens.pipe(sl.norm("weight_gradients")).subscribe(store)
        # An alert names the rank that it comes from, where it comes from one.
        lens.pipe(sl.health()).subscribe(store)
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
        update_to_weight_ratio(stored.dataframe("uw_ratio.ema")),
        gradient_norms(stored.dataframe("weight_gradients.norm2")),
    )
    figure.save(out, inline=False)
    losses = stored.dataframe("loss").value
    print(
        f"{dist.get_world_size()} process(es): the loss went from {losses.iloc[0]:.4f} to "
        f"{losses.iloc[-1]:.4f}: see {out}"
    )


def main(run: str = "ddp.db", out: str = "ddp.html", epochs: int = 3) -> None:
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
