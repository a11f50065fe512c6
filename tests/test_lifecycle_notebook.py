"""A real kernel, which runs a cell again as people do."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

jupyter = pytest.importorskip("jupyter_client")
pytest.importorskip("ipykernel")

Run = Callable[[str, str | None], str]

MODEL = """
import torch, streamlens as sl
from torch.optim import optimizer as optimizers
torch.manual_seed(0)
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
seen, lenses = [], []
"""
OBSERVE = """
lens = sl.observe(model)
lens.pipe(sl.norm("weights")).subscribe(lambda frame: seen.append((frame.step, float(frame.values[0]))))
lenses.append(lens)
for _ in range(2):
    optimizer.zero_grad()
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
"""
LOOK = "seen, [lens.closed for lens in lenses], len(model._forward_hooks)"
CLOSE = "[lens.close() for lens in lenses], len(optimizers._global_optimizer_pre_hooks)"


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs a cell as a front end does, with its id or without, and gives what it shows."""
    manager: Any = jupyter.KernelManager(kernel_name="python3")
    manager.start_kernel()
    client: Any = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)

        def execute(code: str, cell: str | None) -> str:
            content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}}
            message = client.session.msg("execute_request", {**content, "allow_stdin": False})
            message["metadata"] = {"cellId": cell} if cell else {}
            client.shell_channel.send(message)
            shown = ""
            while True:
                reply = client.get_iopub_msg(timeout=60)
                if reply["parent_header"].get("msg_id") != message["header"]["msg_id"]:
                    continue
                kind, told = reply["msg_type"], reply["content"]
                assert kind != "error", "\n".join(told["traceback"])
                if kind == "execute_result":
                    shown = str(told["data"]["text/plain"])
                elif kind == "status" and told["execution_state"] == "idle":
                    return shown

        yield execute
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def by_hand(steps: int) -> list[tuple[int, float]]:
    """The gradient of each row is four times a row of ones."""
    torch.manual_seed(0)
    weight = torch.nn.Linear(3, 2).weight.detach().double()
    return [(k, float((weight - 0.4 * (k + 1)).square().sum().sqrt())) for k in range(steps)]


@pytest.mark.parametrize("ids", [True, False], ids=["cells with ids", "cells told by their code"])
def test_a_cell_run_three_times_counts_on_with_one_lens_open_and_no_frame_twice(
    run: Run, *, ids: bool
) -> None:
    def cell(name: str) -> str | None:
        return name if ids else None

    run(MODEL, cell("model"))
    for _ in range(3):
        run(OBSERVE, cell("observe"))
    seen, closed, _ = ast.literal_eval(run(LOOK, cell("look")))
    assert [step for step, _ in seen] == list(range(6))
    assert [value for _, value in seen] == pytest.approx([value for _, value in by_hand(6)], rel=1e-5)
    assert closed == [True, True, False]
    run("lenses.append(sl.observe(model))", cell("another"))
    seen, closed, _ = ast.literal_eval(run(LOOK, cell("look")))
    assert closed == [True, True, False, False], "a lens of another cell leaves it open"
    assert run(CLOSE, cell("close")).endswith(", 0)"), "no hook is left"
