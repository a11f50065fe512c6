"""`python -m benchmarks.alerts`: every alert rule on healthy runs and on runs broken on purpose.

Writes `docs/alerts.md`: false alarms and misses, over ten seeds each, as they came out.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Final

import torch
from reactivex import Observable
from torch import nn

import streamlens as sl
from benchmarks.alert_runs import BROKEN, HEALTHY, MODELS, Scenario, adam, alerts_of, mlp

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


SIZES: Final[Mapping[str, Callable[[], nn.Module]]] = {
    **MODELS,
    "MLP of 4 units a layer": functools.partial(mlp, width=4),
    "MLP of 512 units a layer": functools.partial(mlp, width=512),
}
"""The ordinary models, and ones that are too small and too large for digits."""


def _both_sizes(lens: Observable[sl.Frame]) -> Observable[sl.Frame]:
    large, small = sl.layer_oversized()(lens), sl.layer_undersized()(lens)
    return large.merge(small)


def size_rows(seeds: Iterable[int]) -> list[str]:
    """One row a model: which of its layers were called too large or too small, and in how many runs."""
    seeds = list(seeds)
    rows = []
    for name, make in SIZES.items():
        found: dict[str, Counter[str]] = {"layer_oversized": Counter(), "layer_undersized": Counter()}
        for seed in seeds:
            alerts = alerts_of(Scenario(make, adam(1e-3), steps=400, validate=0), seed, lambda: _both_sizes)
            starts = [alert for alert in alerts if alert.meta["state"] == "start"]
            for rule, layer in {(alert.meta["rule"], layer) for alert in starts for layer in alert.layers}:
                found[rule][layer] += 1
        cells = [", ".join(f"`{k}` ({n})" for k, n in sorted(layers.items())) for layers in found.values()]
        rows.append(f"| {name} | {' | '.join(cells)} |")
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

## Sizes

`layer_oversized` and `layer_undersized` judge how large layers are and not whether a run is healthy, so they
are no part of the tables above. Layers for which they gave an alert within 400 steps of Adam at 0.001, of the
ordinary models and of two that are too small and too large, with the number of runs of {of_sizes}:

| model | `layer_oversized` | `layer_undersized` |
|---|---|---|
{sizes}
"""


def main() -> None:
    """Train every run over all seeds, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alerts", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="runs of each kind")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "alerts.md")
    options = parser.parse_args()
    began = time.monotonic()
    healthy, broken = healthy_rows(options.seeds), broken_rows(options.seeds)
    sizes = size_rows(range(options.seeds))
    page = _PAGE.format(
        seeds=options.seeds,
        torch=torch.__version__,
        minutes=(time.monotonic() - began) / 60,
        count=len(HEALTHY),
        healthy="\n".join(healthy),
        broken="\n".join(broken),
        sizes="\n".join(sizes),
        of_sizes=options.seeds,
    )
    options.out.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
