"""Adam's moments and effective learning rates, layer by layer, under Adam and under SGD.

Three networks on whitened images at three learning rates; with SGD the moments are those that Adam would keep
of its gradients. Run it with `python examples/adam_moments.py`; figures, tables and findings are left in
`runs/experiments/adam_moments`.
"""

from __future__ import annotations

import itertools
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import streamlens as sl
from streamlens.lab import experiments as ex

__all__ = ["experiment"]

EPS: Final = 1e-8
BETAS: Final = (0.9, 0.999)
SHOWN: Final = {
    "grad_mean_estimate_norm": "first-moment",
    "grad_var_estimate_median": "second-moment",
    "weight_gradients.scan.adams": "effective-rate",
}


def conditions(scale: ex.Scale) -> list[ex.Settings]:
    """Optimizers x networks x learning rates."""
    models = ("ConvNet",) if scale.smoke else ("ConvNet", "FullyConnected", "VGG")
    rates = (1e-3,) if scale.smoke else (5e-4, 1e-3, 1e-2)
    width, epochs = scale.pick(smoke=(4, 1), digits=(8, 16), full=(64, 30))
    return [
        {"optimizer": optimizer, "model": model, "rate": rate, "width": width, "epochs": epochs}
        for optimizer, model, rate in itertools.product(("Adam", "SGD"), models, rates)
    ]


def moments(state: Any, frame: sl.Frame) -> tuple[Tensor, ...]:
    """Adam's moments of each layer's gradient, the gradient, and the number of steps so far."""
    found = []
    for i, gradient in enumerate(frame.values):
        first, second, _, steps = state[i] if state else torch.zeros(4, *gradient.shape).to(gradient)
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        found.append(torch.stack([first, second, gradient, steps + 1]))
    return tuple(found)


def adams_rate(planes: Tensor) -> Tensor:
    """The median over elements of the rate that Adam would have, as a multiple of its base rate."""
    first, second, gradient, steps = planes
    first, second = first / (1 - BETAS[0] ** steps), second / (1 - BETAS[1] ** steps)
    rates: Tensor = first / (second.sqrt() + EPS) / gradient
    return rates[gradient != 0].median()


def vanished(second: Tensor) -> Tensor:
    """The share of elements whose second moment no longer matters beside eps; dead ones never had any."""
    return (second[second > 0].sqrt() < EPS).float().mean()


def train(trial: ex.Trial) -> None:
    """One run; moments and rates of each layer are recorded about sixteen times."""
    options: dict[str, Any] = {"width": trial["width"]}
    if trial["model"] == "ConvNet":  # the experiment re-run here leaves out dropout of the input
        options |= {"hidden": 16 * trial["width"], "input_dropout": 0.0}
    if trial["model"] == "FullyConnected":
        options = {"hidden": (16 * trial["width"], 8 * trial["width"])}
    model = trial.model(trial["model"], **options)
    named = {"optimizer": trial["optimizer"], "learning_rate": trial["rate"], "epochs": trial["epochs"]}
    trainer = trial.trainer(model, trial.data(whitened=True), **named)
    lens = trainer.lens
    due = sl.every(max(trainer.steps // 16, 1))
    streams = [
        lens.pipe(due, sl.adam_moments(), sl.where(lambda frame: frame.topic in SHOWN)),
        lens.pipe(
            sl.topic("weight_gradients"), sl.scan(moments, 0.0), due, sl.reduce(adams_rate, name="adams")
        ),
        lens.pipe(sl.loss(), sl.per_epoch(), sl.rename("loss")),
    ]
    if trial["optimizer"] == "Adam":
        second = lens.pipe(due, sl.topic(sl.optimizer_state("exp_avg_sq")))
        streams.append(second.pipe(sl.reduce(vanished, name="vanished"), sl.rename("vanished")))
    trial.record(trainer, *streams)


def by_kind(rows: pd.DataFrame) -> pd.DataFrame:
    """Each run's geometric mean over the second half of training and the layers of a kind.

    The classifier is a kind of its own: it is linear, and unlike all other layers in what it is for.
    """
    half = rows.groupby(["model", "seed"]).step.transform("max") / 2
    rows = rows[(rows.step >= half) & (rows.value > 0)]
    last = rows.groupby("model").layer.transform(lambda layers: layers.iloc[-1])
    kinds = np.where(rows.layer.str.startswith("features"), "convolution", "linear")
    rows = rows.assign(value=np.log(rows.value), kind=np.where(rows.layer == last, "classifier", kinds))
    keys = ["optimizer", "model", "rate", "kind", "seed"]
    found = rows.groupby(keys, sort=False).value.mean().reset_index()
    return found.assign(value=np.exp(found.value))


def analyse(results: ex.Results) -> ex.Findings:
    """Rates by kind of layer, what became of second moments, and how sensitive all of it is to the rate."""
    by = ["optimizer", "model", "rate"]
    rates = by_kind(results.rows("weight_gradients.scan.adams"))
    than = ex.paired(rates[rates.optimizer == "Adam"], "kind", "convolution", by=by, log=True)
    second = results.rows("grad_var_estimate_median")
    roots = by_kind(second.assign(value=np.sqrt(second.value) / EPS))
    ends = second[second.value > 0].groupby([*by, "seed", "layer"], sort=False).value
    growth = (ends.last() / ends.first()).map(np.log).groupby(level=[*by, "seed"], sort=False).mean()
    gone = results.last("vanished").query("layer.str.endswith('weight')")
    worst = gone.groupby([*by, "seed"], sort=False).value.max().reset_index()
    accuracy = ex.interval(results.last("test_accuracy"), by=by, bounds=ex.SHARE)
    tables = {
        "accuracy": accuracy,
        "effective rate over base rate": ex.interval(rates, by=[*by, "kind"], log=True),
        "effective rate over that of convolutions": than,
        "root of second moment over eps": ex.interval(roots, by=[*by, "kind"], log=True),
        "growth of second moment": ex.interval(growth.map(np.exp).reset_index(), by=by, log=True),
        "vanished": ex.interval(worst, by=by, bounds=ex.SHARE),
    }
    form = "{model} under Adam at {rate:g}: "
    of = (
        form
        + "{kind} layers have {mean:.2f} ({low:.2f} to {high:.2f}) times the effective rate of convolutions"
    )
    beside = (
        form + "at most {mean:.1%} ({low:.1%} to {high:.1%}) of a layer's second moments vanish beside eps"
    )
    answers = [*ex.sentences(of, than), *ex.sentences(beside, tables["vanished"])]
    figures: dict[str, ex.Figure] = {}
    for topic, title in SHOWN.items():
        for model, rows in results.rows(topic).groupby("model", sort=False):
            figures[f"{title}-{model}"] = ex.curves(
                rows, color="layer", row="optimizer", column="rate", log=True, title=title
            )
    figures["accuracies"] = ex.points(accuracy, x="rate", color="optimizer", column="model", title="accuracy")
    return ex.Findings(answers, tables, figures)


experiment = ex.Experiment("adam_moments", conditions, train, analyse)

if __name__ == "__main__":
    experiment.main()
