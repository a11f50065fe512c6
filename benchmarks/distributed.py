"""Bytes and time of the messages by which ranks merge, in worlds of a few processes on this machine.

`python -m benchmarks.distributed` prints a table; `docs/scaling.md` says what follows
for large worlds.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import streamlens as sl
from streamlens.capture.sharded import Part
from streamlens.capture.table import Rows
from streamlens.distributed.layout import Item, Report, build
from streamlens.reductions import Statistic

__all__ = ["Message", "layout_of", "measure"]

Message = dict[str, float]
"""`bytes` a sampled step and rank, `milliseconds` of merging, by the slower of the ranks."""

_LAYERS, _WIDTH, _STEPS = 100, 16, 12

_CHAINS: dict[str, Callable[[sl.Lens], list[Any]]] = {
    "loss": lambda lens: [sl.topic("loss")],
    "norms": lambda lens: [
        sl.norm("parameters"),
        sl.norm("parameter_gradients"),
        sl.uw_ratio(of="parameters"),
    ],
    "std of activations": lambda lens: [sl.std("activations")],
    "all of it, and extremes": lambda lens: [
        sl.topic("loss"),
        sl.norm("parameters"),
        sl.norm("parameter_gradients"),
        sl.uw_ratio(of="parameters"),
        sl.absmax("parameters"),
        sl.std("activations"),
    ],
}


def _train(rank: int, ranks: int, how: str, folder: str) -> None:
    """What one process does: train with each set of chains, and leave what its messages were."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    torch.save({name: _message(how, chains) for name, chains in _CHAINS.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _message(how: str, chains: Callable[[sl.Lens], list[Any]]) -> Message:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*[nn.Linear(_WIDTH, _WIDTH) for _ in range(_LAYERS)])
    if how == "FSDP2":
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = torch.randn(8, _WIDTH)
    took: list[float] = []
    with sl.observe(model) as lens:
        exchange: Any = lens.source.exchange
        settle = exchange.settle

        def timed(partials: Sequence[Any]) -> None:
            start = time.perf_counter()
            settle(partials)
            took.append(time.perf_counter() - start)

        exchange.settle = timed
        criterion = lens.watch_loss(nn.functional.mse_loss)
        for chain in chains(lens):
            lens.pipe(chain).subscribe(lambda frame: None)
        for _ in range(_STEPS):
            optimizer.zero_grad()
            criterion(model(batch), batch).backward()
            optimizer.step()
        return {"bytes": exchange.sent, "milliseconds": statistics.median(took[4:]) * 1e3}


def measure(ranks: int, how: str) -> dict[str, Message]:
    """Train a chain of 100 small layers on a few processes.

    Args:
        ranks: How many processes.
        how: `"DDP"` or `"FSDP2"`.

    Returns:
        The messages of each set of chains, on the rank where they are the longer or slower.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn = multiprocessing.get_context("spawn")
        processes = [spawn.Process(target=_train, args=(rank, ranks, how, folder)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]
    return {
        name: {key: max(each[name][key] for each in found) for key in ("bytes", "milliseconds")}
        for name in _CHAINS
    }


def layout_of(ranks: int, tensors: int) -> tuple[int, float, float]:
    """What one rank of a large world has to lay out, for the mean, the variance and extremes of shards.

    Args:
        ranks: How many there are; none is started.
        tensors: How many tensors each has a shard of.

    Returns:
        Bytes of all messages of a sampled step, seconds to lay them out (once), and to write them.
    """
    what = (*map(Statistic, ("sum", "minimum", "maximum")), Statistic("centred", 2.0))
    names = tuple(f"layers.{i}.weight" for i in range(tensors))
    values = torch.ones(len(what) + 1, tensors, dtype=torch.float64)
    items = [
        Item("value", None, Rows(what, names, values), names, (Part((rank,), ranks),) * tensors)
        for rank in range(2)
    ]
    mine = Report.of(items[:1], ())
    reports = [Report(mine.digest, ((Part((rank,), ranks),),), (), mine.shapes) for rank in range(ranks)]
    start = time.perf_counter()
    layout = build(0, reports, items[1:], 1, torch.device("cpu"))
    laid_out = time.perf_counter() - start
    buffer = torch.zeros(layout.host, dtype=torch.float64)
    start = time.perf_counter()
    layout.write(items[1:], buffer, on_host=True)
    return 8 * (layout.host + 2 * layout.later[True]), laid_out, time.perf_counter() - start


def main() -> None:
    """Measure, and print the tables."""
    print(
        f"{_LAYERS} layers, {2 * _LAYERS} parameters; bytes a rank and sampled step, milliseconds of merging"
    )
    for how in ("DDP", "FSDP2"):
        two, four = (measure(ranks, how) for ranks in (2, 4))
        for name in _CHAINS:
            row = [
                f"{found['bytes']:,.0f} B, {found['milliseconds']:.1f} ms"
                for found in (two[name], four[name])
            ]
            print(f"| {how} | {name} | {' | '.join(row)} |")
    for ranks, tensors in ((10, 10_000), (1_000, 10_000)):
        size, laid_out, written = layout_of(ranks, tensors)
        print(f"{ranks:,} ranks, {tensors:,} tensors, mean, variance and extremes of shards: {size:,} B,")
        print(f"  laid out once in {laid_out:.2f} s, written in {written * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
