"""The loss, how fast it falls, and the update-to-weight ratio: do they belong together?

VGG under SGD, under Adam, and under the ratio-adaptive schedule from three base rates. Run it with
`python examples/ratio_vs_loss.py`; figures, tables and findings are left in `runs/experiments/ratio_vs_loss`.
"""

from __future__ import annotations

from typing import Final

import altair as alt
import numpy as np
import pandas as pd

import streamlens as sl
from streamlens.control import RatioLR
from streamlens.lab import experiments as ex

__all__ = ["experiment"]

TARGET: Final = 1e-3
RATES: Final = {"SGD": (0.01, 0.05, 0.1), "Adam": (0.01, 0.05, 0.1), "adaptive": (0.001, 0.01, 0.1)}


def conditions(scale: ex.Scale) -> list[ex.Settings]:
    """Optimizers x rates; `adaptive` is SGD whose rate follows the ratio, from a base rate."""
    width = scale.pick(smoke=4, digits=8, full=64)
    epochs = scale.pick(smoke=2, digits=30, full=75)
    return [
        {"optimizer": optimizer, "rate": rate, "width": width, "epochs": epochs}
        for optimizer, rates in RATES.items()
        for rate in (rates[:2] if scale.smoke else rates)
    ]


def train(trial: ex.Trial) -> None:
    """One run; losses, ratios and rates of every step are recorded."""
    adaptive = trial["optimizer"] == "adaptive"
    trainer = trial.trainer(
        trial.model("VGG", width=trial["width"]),
        optimizer="SGD" if adaptive else trial["optimizer"],
        learning_rate=trial["rate"],
        epochs=trial["epochs"],
    )
    lens = trainer.lens
    if adaptive:
        lens.pipe(sl.uw_ratio()).subscribe(RatioLR(target=TARGET))
    trial.record(
        trainer,
        lens.pipe(sl.loss(), sl.rename("loss")),
        lens.pipe(sl.loss_decrease(sigma=3), sl.rename("decrease")),
        lens.pipe(sl.uw_ratio(), sl.across_layers("mean"), sl.rename("ratio")),
        lens.pipe(sl.topic("learning_rate"), sl.across_layers("max"), sl.rename("lr")),
    )


def joined(results: ex.Results) -> pd.DataFrame:
    """A row a step of each run: its loss, its decrease, ratio and rate, and what the law says of it."""
    keys = ["optimizer", "rate", "seed", "step"]
    table = results.rows("loss").rename(columns={"value": "loss"})[[*keys, "epoch", "loss"]]
    for topic in ("decrease", "ratio", "lr"):
        table = table.merge(results.rows(topic).rename(columns={"value": topic})[[*keys, topic]], on=keys)
    return table.assign(share=table.step / table.step.max(), law=table.lr * table.ratio / table.rate / TARGET)


def exponents(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """The exponent p of column ~ rate^p: least squares over logarithms, in each run of three rates."""
    rows = rows[rows[column] > 0].assign(x=np.log(rows.rate), y=np.log(rows[column]))
    fitted = rows.groupby(["optimizer", "seed"], sort=False)[["x", "y"]].apply(
        lambda run: float(np.polyfit(run.x, run.y, 1)[0])
    )
    return ex.interval(fitted.rename("value").reset_index(), by=["optimizer"]).assign(quantity=column)


def correlation(rows: pd.DataFrame, when: str) -> pd.DataFrame:
    """Pearson's correlation of ratio and decrease over the steps of a run."""
    found = rows.groupby(["optimizer", "rate", "seed"], sort=False)[["ratio", "decrease"]].apply(
        lambda run: run.ratio.corr(run.decrease)
    )
    table = found.rename("value").reset_index()
    return ex.interval(table, by=["optimizer", "rate"], bounds=ex.CORRELATION).assign(when=when)


def lines(rows: pd.DataFrame, quantities: list[str], *, log: bool = False) -> ex.Figure:
    """Quantities over epochs, a chart each and a line for each base rate."""
    keys = ["rate", "seed", "epoch"]
    means = rows.groupby(keys)[quantities].mean().reset_index()
    table = means.melt(keys, quantities, "quantity")
    return ex.curves(table, x="epoch", color="rate", row="quantity", log=log, free=True, size=(360, 130))


def scatter(rows: pd.DataFrame) -> ex.Figure:
    """Ratio against decrease, step by step, coloured by time: 150 steps of each rate."""
    some = rows[rows.ratio > 0].groupby("rate").sample(150, replace=True, random_state=0)
    chart = alt.Chart(some, width=220, height=180).mark_circle(size=14, opacity=0.7)
    coloured: alt.Chart = chart.encode(
        x=alt.X("ratio:Q", scale=alt.Scale(type="log", nice=False), title="update-to-weight ratio"),
        y=alt.Y("decrease:Q", title="decrease of the loss a step"),
        color=alt.Color("step:Q", title="step"),
        column=alt.Column("rate:N", sort=None),
    )
    return coloured


def analyse(results: ex.Results) -> ex.Findings:
    """What the ratio has to do with the loss, what it follows, and the law of the adaptive schedule."""
    rows, by = joined(results), ["optimizer", "rate"]
    early, late = rows[rows.share < 0.05], rows[rows.share >= 0.75]
    follows = pd.concat([exponents(early, "ratio").assign(when="first twentieth")]
        + [exponents(late, column).assign(when="last quarter") for column in ("ratio", "lr")])  # fmt: skip
    law = np.log(late.law[late.ratio > 0]).groupby([late[key] for key in [*by, "seed"]], sort=False).mean()
    mean = rows.groupby([*by, "seed", "epoch"], sort=False).loss.mean().reset_index()
    reached = mean[mean.loss < 0.1].groupby([*by, "seed"], sort=False).epoch.min() + 1
    tables = {
        "accuracy": ex.interval(results.last("test_accuracy"), by=by, bounds=ex.SHARE),
        "correlation": pd.concat([correlation(rows, "all"), correlation(rows[rows.share >= 0.1], "later")]),
        "exponent": follows,
        "law": ex.interval(law.pipe(np.exp).rename("value").reset_index(), by=by, log=True),
        "epochs to a loss of 0.1": ex.interval(reached.rename("value").reset_index(), by=by),
    }
    power = "{optimizer}: the {quantity} of the {when} follows the base rate to the power {mean:.2f} "
    times = (
        "{optimizer} from {rate:g}: rate x ratio is {mean:.2f} ({low:.2f} to {high:.2f}) times base x target"
    )
    answers = ex.sentences(power + "({low:.2f} to {high:.2f})", follows)
    answers += ex.sentences(times, tables["law"][tables["law"].optimizer == "adaptive"])
    adaptive = rows[rows.optimizer == "adaptive"]
    figures: dict[str, ex.Figure] = {"law": lines(adaptive, ["lr", "ratio", "law"], log=True)}
    for optimizer, part in rows.groupby("optimizer", sort=False):
        figures[f"scatter-{optimizer}"] = scatter(part)
        figures[f"lines-{optimizer}"] = lines(part, ["loss", "decrease", "ratio"])
    return ex.Findings(answers, tables, figures)


experiment = ex.Experiment("ratio_vs_loss", conditions, train, analyse)

if __name__ == "__main__":
    experiment.main()
