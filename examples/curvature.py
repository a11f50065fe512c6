"""Curvature while training: at small and large batches, against adversarial susceptibility, and against 2/lr.

A network with one hidden layer under plain SGD. Run it with `python examples/curvature.py`; figures,
tables and findings are left in `runs/experiments/curvature`.
"""

from __future__ import annotations

from typing import Any, Final

import altair as alt
import pandas as pd
from scipy import stats

import streamlens as sl
from streamlens.lab import experiments as ex
from streamlens.lab import make_loader

__all__ = ["experiment"]

LOOKS: Final = 10
"""Evaluations in a run: each takes some twenty gradients' time."""

EPS: Final = 0.1
"""How far the attack moves each pixel, whose standard deviation is 1."""


def conditions(scale: ex.Scale) -> list[ex.Settings]:
    """Batch sizes at one rate, for equally many epochs; then whole batches at several rates."""
    epochs, updates = scale.pick(smoke=(2, 4), digits=(30, 200), full=(40, 4000))
    batches = scale.pick(smoke=(256, 512), digits=(32, 128, 512), full=(128, 512, 2048))
    rates = scale.pick(smoke=(0.2,), digits=(0.1, 0.2, 0.4), full=(0.02, 0.05, 0.1))
    hidden = scale.pick(smoke=16, digits=64, full=512)
    sizes: list[ex.Settings] = [
        {"part": "batch", "batch": batch, "rate": 0.05, "epochs": epochs} for batch in batches
    ]
    edges: list[ex.Settings] = [
        {"part": "edge", "batch": 50_000, "rate": rate, "epochs": updates} for rate in rates
    ]
    return [{**condition, "hidden": hidden} for condition in (*sizes, *edges)]


def train(trial: ex.Trial) -> None:
    """One run; curvature and susceptibility are recorded ten times."""
    trainer = trial.trainer(
        trial.model("FullyConnected", hidden=(trial["hidden"],)),
        optimizer="SGD",
        learning_rate=trial["rate"],
        epochs=trial["epochs"],
        batch_size=trial["batch"],
        measure=("test_accuracy",) if trial["part"] == "batch" else (),
    )
    lens, cadence = trainer.lens, max(trainer.steps // LOOKS, 1)
    due = lens.pipe(sl.every(cadence))
    images, labels = next(iter(make_loader(trial.data().train, batch_size=512, shuffle=False)))
    surface: dict[str, Any] = {"loss": trainer.criterion, "batch": (images, labels), "tolerance": 1e-2}
    if trial["part"] == "edge":
        trial.record(trainer, due.pipe(sl.sharpness(**surface)), due.pipe(sl.loss(), sl.rename("loss")))
        return
    attack = sl.adversarial_susceptibility(make_loader(trial.data().test, shuffle=False), EPS, every=cadence)
    trial.record(
        trainer,
        due.pipe(sl.hessian_eigenvalues(3, **surface)),
        lens.pipe(attack, sl.rename("susceptibility")),
        lens.pipe(sl.loss(), sl.per_epoch(), sl.rename("loss")),
    )


def joined(results: ex.Results) -> pd.DataFrame:
    """A row an evaluation of each run of the first part: the largest eigenvalue and the susceptibility."""
    keys = ["batch", "seed", "step", "epoch"]
    found = results.rows("hessian_eigenvalues")
    found = found[found.component == "1"].rename(columns={"value": "eigenvalue"})[[*keys, "eigenvalue"]]
    attacked = results.rows("susceptibility").rename(columns={"value": "susceptibility"})
    return found.merge(attacked[[*keys, "susceptibility"]], on=keys)


def correlations(rows: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation over the evaluations of a run, and over the runs' ends, seed by seed."""
    pair = ["eigenvalue", "susceptibility"]

    def rank(part: pd.DataFrame) -> float:
        return float(stats.spearmanr(part.eigenvalue, part.susceptibility).statistic)

    within = rows[rows.step > 0].groupby(["batch", "seed"])[pair].apply(rank).rename("value").reset_index()
    ends = rows.groupby(["batch", "seed"]).tail(1).groupby("seed")[pair].apply(rank).rename("value")
    over = ex.interval(ends.reset_index().assign(batch="all"), by=["batch"], bounds=ex.CORRELATION)
    time = ex.interval(within, by=["batch"], bounds=ex.CORRELATION)
    return pd.concat([time.assign(over="over time"), over.assign(over="over batches")])


def at_equal_loss(results: ex.Results, rows: pd.DataFrame) -> pd.DataFrame:
    """The largest eigenvalue where the training loss of each run first falls below what all runs reach."""
    loss = results.rows("loss").query("part == 'batch'")
    level = loss.groupby(["batch", "seed"]).value.min().max()
    when = loss[loss.value <= level].groupby(["batch", "seed"]).step.min().rename("when").reset_index()
    near = rows.merge(when, on=["batch", "seed"])
    near = near.loc[(near.step - near.when).abs().groupby([near.batch, near.seed]).idxmin()]
    return near.rename(columns={"eigenvalue": "value"}).assign(level=level)


def analyse(results: ex.Results) -> ex.Findings:
    """Whether large batches end sharper, whether sharp is susceptible, and where full batches settle."""
    rows = joined(results)
    end = rows.groupby(["batch", "seed"]).tail(1)
    sharp = results.rows("sharpness")
    peak = sharp.groupby(["rate", "seed"]).value.max().reset_index()
    equal = at_equal_loss(results, rows)
    tables = {
        "largest eigenvalue in the end": ex.interval(end, by=["batch"], value="eigenvalue"),
        "eigenvalue at equal loss": ex.interval(equal, by=["batch", "level"]),
        "susceptibility in the end": ex.interval(end, by=["batch"], value="susceptibility", bounds=(-1, 1)),
        "accuracy": ex.interval(results.last("test_accuracy"), by=["batch"], bounds=ex.SHARE),
        "correlation": correlations(rows),
        "highest sharpness over 2/lr": ex.interval(peak, by=["rate"]),
        "last sharpness over 2/lr": ex.interval(results.last("sharpness"), by=["rate"]),
    }
    spread = "{mean:.2f} ({low:.2f} to {high:.2f})"
    told = {
        "batch {batch}: the largest eigenvalue ends at ": "largest eigenvalue in the end",
        "batch {batch}: where the loss is {level:.2f} it is ": "eigenvalue at equal loss",
        "batch {batch}: rank correlation of eigenvalue and susceptibility {over}: ": "correlation",
        "full batch at {rate:g}: sharpness over 2/lr is at most ": "highest sharpness over 2/lr",
    }  # fmt: skip
    answers = [line for form, name in told.items() for line in ex.sentences(form + spread, tables[name])]
    cloud = alt.Chart(rows[rows.step > 0], width=320, height=220).mark_circle(size=30)
    means = rows.groupby(["batch", "seed", "epoch"])[["eigenvalue", "susceptibility"]].mean().reset_index()
    long = means.melt(["batch", "seed", "epoch"], var_name="quantity")
    figures: dict[str, ex.Figure] = {
        "curvature": ex.curves(long, x="epoch", color="batch", column="quantity", free=True, title=""),
        "against": cloud.encode(
            x="eigenvalue:Q", y="susceptibility:Q", color=alt.Color("batch:N", sort=None)
        ),
        "edge": ex.curves(sharp, color="rate", title="largest eigenvalue over 2/lr"),
    }
    return ex.Findings(answers, tables, figures)


experiment = ex.Experiment("curvature", conditions, train, analyse)

if __name__ == "__main__":
    experiment.main()
