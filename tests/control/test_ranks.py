"""Two gloo ranks take one decision, rank 0's, also when only one of them sees a NaN."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

SCRIPT = Path(__file__).with_name("_ranks.py")


def run(store: Path, spoilt_rank: int) -> list[dict[str, Any]]:
    root = SCRIPT.parents[2]
    bootstrap = "import runpy, sys; sys.path.insert(0, sys.argv[1]); sys.argv = sys.argv[2:]; "
    bootstrap += "runpy.run_path(sys.argv[0], run_name='__main__')"
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                bootstrap,
                str(root),
                str(SCRIPT),
                str(rank),
                str(store),
                str(spoilt_rank),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize(("spoilt_rank", "acted"), [(1, [0, 1, 2, 3]), (0, [0, 2, 3])])
def test_both_ranks_act_alike_whichever_of_them_sees_a_nan(
    tmp_path: Path, spoilt_rank: int, acted: list[int]
) -> None:
    first, second = run(tmp_path / "store", spoilt_rank)
    assert first == second
    assert first["steps"] == acted
    assert len(set(first["rates"])) == len(acted)
