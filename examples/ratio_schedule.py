"""Learning-rate schedules that follow the update-to-weight ratio, against constant and exponential ones.

Each trains AlexNetMini by plain SGD from several base rates, with several batch sizes. Run it with
`python examples/ratio_schedule.py`; figures, tables and findings are left in
`runs/experiments/ratio_schedule`.
"""

from __future__ import annotations

import itertools
from typing import Final

import pandas as pd
import torch
from torch.optim.lr_scheduler import ExponentialLR

import streamlens as sl
from streamlens.control import Controller, ExponentialDecay, FixedRatio, RatioLR
from streamlens.lab import experiments as ex

__all__ = ["experiment"]

TARGET: Final = 1e-3
"""The update-to-weight ratio that Karpathy recommends."""

DECAY: Final = 0.98
"""Of the exponential schedule, an epoch."""

SCHEDULES: Final = (
    "constant",
    "exponential",
    "ratio",
    "ratio by size",
    "ratio current",
    "ratio decaying",
)


def conditions(scale: ex.Scale) -> list[ex.Settings]:
    """Schedules x base rates x batch sizes, and beside them the ratio fixed layer by layer."""
    rates = scale.pick(smoke=(0.1,), digits=(0.003, 0.1, 1.0), full=(0.003, 0.2, 1.0))
    batches = scale.pick(smoke=(256,), digits=(32, 128, 256), full=(32, 128, 512))
    epochs = scale.pick(smoke=1, digits=20, full=100)
    # What scales gradients to one ratio comes to the same whatever the rate is.
    grid = [*itertools.product(SCHEDULES, rates), ("fixed ratio", rates[len(rates) // 2])]
    return [
        {"schedule": schedule, "rate": rate, "batch": batch, "epochs": epochs}
        for (schedule, rate), batch in itertools.product(grid, batches)
    ]


def controller(schedule: str, steps: int) -> Controller | None:
    """What sets the rate after each update, or scales the gradients before it."""
    match schedule:
        case "ratio":
            return RatioLR(target=TARGET)
        case "ratio by size":
            return RatioLR(target=TARGET, layer_weights="parameters")
        case "ratio current":
            return RatioLR(target=TARGET, mode="current", smoothing=0.5, slew_limit=1.5)
        case "ratio decaying":  # from ten times the target to a tenth of it
            falling = ExponentialDecay(10 * TARGET, 0.01 ** (1 / steps))
            return RatioLR(target=falling, mode="current", smoothing=0.5, slew_limit=1.5)
        case "fixed ratio":
            return FixedRatio(TARGET)
    return None


def train(trial: ex.Trial) -> None:
    """One run; its ratios, rates and accuracies are recorded."""
    model = trial.model("AlexNetMini")
    optimizer = torch.optim.SGD(model.parameters(), lr=trial["rate"])
    trainer = trial.trainer(
        model,
        optimizer=optimizer,
        schedule=ExponentialLR(optimizer, DECAY) if trial["schedule"] == "exponential" else "constant",
        epochs=trial["epochs"],
        batch_size=trial["batch"],
    )
    lens = trainer.lens
    steers = controller(trial["schedule"], trainer.steps)
    if steers is not None:
        lens.pipe(sl.uw_ratio()).subscribe(steers)
    due = lens.pipe(sl.every(5))
    trial.record(
        trainer,
        due.pipe(sl.uw_ratio(), sl.across_layers("mean"), sl.per_epoch(), sl.rename("ratio")),
        due.pipe(sl.topic("learning_rate"), sl.across_layers("max"), sl.per_epoch(), sl.rename("lr")),
    )


def verdict(schedule: str, gains: pd.DataFrame) -> str:
    """Where a schedule wins and loses against the constant rate, and by how much."""
    parts = []
    form = "{mean:+.1%} ({low:+.1%} to {high:+.1%}) at rate {rate:g} batch {batch}"
    for word, cells in (("above", gains[gains.low > 0]), ("below", gains[gains.high < 0])):
        where = ", ".join(ex.sentences(form, cells)) or "none"
        parts.append(f"{word} the constant rate in {len(cells)} of {len(gains)} settings: {where}")
    return f"{schedule} is {'; '.join(parts)}"


def analyse(results: ex.Results) -> ex.Findings:
    """Final accuracies, what each schedule gains over the constant rate, and how it went."""
    last = results.last("test_accuracy")
    cells = ["schedule", "rate", "batch"]
    gains = ex.paired(last, "schedule", "constant", by=["rate", "batch"], bounds=ex.SHARE)
    traces = results.rows("test_accuracy")
    middle = last.loc[last.schedule == "fixed ratio", "rate"].iloc[0]
    fixed = traces[traces.schedule.isin(["constant", "fixed ratio"]) & (traces.rate == middle)]
    ratios = results.rows("ratio")
    accuracy = ex.interval(last, by=cells, bounds=ex.SHARE)
    steered = ex.interval(results.last("ratio"), by=cells)
    return ex.Findings(
        answers=[verdict(str(name), cells) for name, cells in gains.groupby("schedule", sort=False)],
        tables={"accuracy": accuracy, "gain": gains, "final ratio": steered},
        figures={
            "traces": ex.curves(
                traces[traces.schedule.isin(SCHEDULES)],
                x="epoch", color="schedule", row="batch", column="rate", title="test accuracy",
                bounds=ex.SHARE,
            ),
            "accuracies": ex.points(
                accuracy, x="rate", color="schedule", column="batch", title="test accuracy"
            ),
            "fixed-ratio": ex.curves(
                fixed, x="epoch", color="schedule", column="batch", title="accuracy", bounds=ex.SHARE
            ),
            "ratios": ex.curves(
                ratios[ratios.value > 0],
                x="epoch", color="schedule", row="batch", column="rate", log=True, title="mean ratio",
            ),
        },
    )  # fmt: skip


experiment = ex.Experiment("ratio_schedule", conditions, train, analyse)

if __name__ == "__main__":
    experiment.main()
