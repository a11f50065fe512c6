"""What one rank of `test_ranks` does: trains, and prints its rates and parameters."""

from __future__ import annotations

import json
import math
import sys

import torch
import torch.distributed as dist
from torch import Tensor

import streamlens as sl
from streamlens import control
from tests._runs import small_model, steps_of


def main(rank: int, store: str, spoilt_rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lens = sl.observe(model, on_error="raise")

    def local(updates: Tensor, weights: Tensor) -> Tensor:
        # Each rank sees ratios of its own; at step 1 one of them sees NaN.
        spoilt = math.nan if rank == spoilt_rank and lens.current_step == 1 else 0.0
        return updates / weights * (1 + rank) + spoilt

    chain = sl.combine(sl.norm("weight_updates"), sl.norm("weights"), fn=local, name="local")
    controller = control.RatioLR(mode="current", target=1e-2)
    steps: list[int] = []
    controller.actions.subscribe(lambda frame: steps.append(frame.step))
    lens.pipe(chain).subscribe(controller)
    rates = [optimizer.param_groups[0]["lr"] for _ in steps_of(model, optimizer, 4)]
    weights = [p.detach().flatten().tolist() for p in model.parameters()]
    print(json.dumps({"rates": rates, "steps": steps, "weights": weights}))
    lens.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
