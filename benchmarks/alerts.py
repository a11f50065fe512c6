"""`python -m benchmarks.alerts`: every alert rule on healthy runs and on runs broken on purpose.

Writes `docs/alerts.md`: false alarms and misses, over ten seeds each, as they came out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Final

import torch

from benchmarks.alert_runs import BROKEN, HEALTHY, Scenario, alerts_of

__all__ = ["main"]


def starts_of(scenario: Scenario, seed: int) -> list[tuple[str, int]]:
    """The rules that started an alert in a run, and when."""
    torch.set_num_threads(1)
    alerts = alerts_of(scenario, seed)
    return [(alert.meta["rule"], alert.step) for alert in alerts if alert.meta["state"] == "start"]


def healthy_rows(seeds: int) -> list[str]:
    """One row a rule: its false alarms in all healthy runs."""
    false: dict[str, list[str]] = {rule: [] for rule in BROKEN}
    for name, scenario in HEALTHY.items():
        for seed in range(seeds):
            for rule in dict.fromkeys(rule for rule, _ in starts_of(scenario, seed)):
                false[rule].append(name)
    runs = len(HEALTHY) * seeds
    return [
        f"| `{rule}` | {len(where)} of {runs} | "
        + ", ".join(f"{name} ({where.count(name)})" for name in dict.fromkeys(where))
        + " |"
        for rule, where in false.items()
    ]


def broken_rows(seeds: int) -> list[str]:
    """One row a broken run: how many of the seeds were found in time, and when."""
    rows = []
    for rule, cases in BROKEN.items():
        for case in cases:
            found: list[int] = []
            late = early = 0
            for seed in range(seeds):
                steps = [step for name, step in starts_of(case.scenario, seed) if name == rule]
                early += any(step < case.since for step in steps)
                after = [step for step in steps if step >= case.since]
                if after and after[0] <= case.until:
                    found.append(after[0] - case.since)
                else:
                    late += 1
            when = f"{median(found):g} (at most {max(found)})" if found else "-"
            cells = (f"`{rule}`", case.how, str(case.within), f"{len(found)} of {seeds}", when, str(late))
            rows.append(f"| {' | '.join((*cells, str(early)))} |")
    return rows


_PAGE: Final = """# Alert rules on healthy and on broken runs

Made by `python -m benchmarks.alerts` ({seeds} seeds a run, torch {torch}, {minutes:.0f} minutes); its source
says how each run is made. All runs are on scikit-learn's handwritten digits with batches of 64, small
enough to be trained by the hundred: what the rules do on large models is not measured here.

## Healthy runs

{count} ordinary runs: MLP, deep MLP, tanh MLP, convnet, convnet with batch norm, transformer and LSTM, each
with SGD with momentum at 0.01 and at 0.05 with weight decay, and with Adam at 0.001 and at 0.003, by
PyTorch's default initialisation, 600 steps; two with a cosine schedule to zero (1,500 steps) and a long one
(4,000 steps); `validation_loss` emitted every 25 steps. Alerts of `health()` from step 0 on are false alarms.

| rule | runs with a false alarm | which |
|---|---|---|
{healthy}

## Broken runs

Each run is broken in the way that the rule is for; found is an alert of that rule within the steps given.
Other rules mostly fire too, and are not counted here.

| rule | broken how | within steps | found | steps until then, median | missed | alarms before it broke |
|---|---|---|---|---|---|---|
{broken}
"""


def main() -> None:
    """Train every run over all seeds, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alerts", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="runs of each kind")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "alerts.md")
    options = parser.parse_args()
    began = time.monotonic()
    healthy, broken = healthy_rows(options.seeds), broken_rows(options.seeds)
    page = _PAGE.format(
        seeds=options.seeds,
        torch=torch.__version__,
        minutes=(time.monotonic() - began) / 60,
        count=len(HEALTHY),
        healthy="\n".join(healthy),
        broken="\n".join(broken),
    )
    options.out.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
